"""The library on disk: round trips, refusals by name, nothing half-written."""

import dataclasses
import errno
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy
import tiny

from psec_jax import files, tree
from psec_jax.errors import InputError
from psec_jax.library import SkillLibrary, base_fingerprint, table
from psec_jax.lora import init_skill
from psec_jax.networks.denoiser import init_base
from psec_jax.policy import compose
from psec_jax.types import Normaliser

NORMALISER = Normaliser(np.zeros(tiny.OBS_DIM), np.ones(tiny.OBS_DIM))
BASE_CARD = {
    "name": "stand",
    "obs_dim": tiny.OBS_DIM,
    "action_dim": tiny.ACTION_DIM,
    "network": {"width": 16},
    "process": {"steps": 5},
}
SKILL_CARD = {"alpha": 16.0, "objective": "bc", "env": "dm_control:walker-walk"}
GATE_CARD = {
    "skills": ["walk", "run"],
    "level": "parameter",
    "gate": {"head": "constant", "support": "neighbour", "widths": (8, 8)},
}
GATE = {
    "head": {"alpha": np.ones(2, np.float32)},
    "support": {
        "demos": np.ones((2, 4, tiny.OBS_DIM), np.float32),
        "valid": np.ones((2, 4), bool),
        "tau": np.ones(2, np.float32),
        "scale": np.ones((2, tiny.OBS_DIM), np.float32),
    },
}


@pytest.fixture
def library(tmp_path):
    made = SkillLibrary.create(tmp_path / "library")
    made.add_base(tiny.base(), NORMALISER, BASE_CARD)
    made.add_skill("walk", tiny.skill(0), SKILL_CARD)
    made.add_skill("run", tiny.skill(1), SKILL_CARD)
    made.add_gate("both", GATE, GATE_CARD)
    return made


def assert_same(left, right):
    left, right = tree.flatten(left), tree.flatten(right)
    assert left.keys() == right.keys()
    for path, leaf in left.items():
        assert np.shape(leaf) == np.shape(right[path]), path
        np.testing.assert_array_equal(leaf, right[path])


def files_of(root):
    return {
        str(p.relative_to(root)): p.read_bytes()
        for p in sorted(root.rglob("*"))
        if p.is_file() and p.name != ".lock"
    }


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def other_base(tmp_path, size=tiny.OBS_DIM):
    """A library whose base has other numbers."""
    made = SkillLibrary.create(tmp_path / "other")
    normaliser = Normaliser(np.ones(size), np.ones(size))
    made.add_base(tiny.base(), normaliser, BASE_CARD | {"obs_dim": size})
    return made


def test_skills_of_other_ranks_compose_and_of_other_chunks_are_refused(tmp_path):
    """The chunks are the base's: a skill of another base's does not fit."""
    library = SkillLibrary.create(tmp_path)
    forms = {"network": tiny.NETWORK, "process": tiny.PROCESS}
    card = BASE_CARD | {name: dataclasses.asdict(form) for name, form in forms.items()}
    library.add_base(tiny.base(), NORMALISER, card)
    for name, skill in (("thin", tiny.skill(0, 1)), ("thick", tiny.skill(1, 4))):
        library.add_skill(name, skill, SKILL_CARD)
    obs, keys = np.asarray(tiny.normal(5, tiny.OBS_DIM)), tiny.keys(5)
    for k, name in enumerate(("thin", "thick")):
        both = compose(tmp_path, ["thin", "thick"], alpha=np.eye(2)[k])
        alone = compose(tmp_path, name, alpha=1.0)
        np.testing.assert_allclose(both.act(keys, obs), alone.act(keys, obs), atol=1e-5)
    chunks = init_base(tiny.NETWORK, tiny.keys(1)[0], tiny.OBS_DIM, 4, horizon=2)
    other = init_skill(tiny.keys(1)[0], chunks, 2)
    with pytest.raises(InputError, match="skill 'far': layer .* maps .* the base's"):
        library.add_skill("far", other, SKILL_CARD)
    named = SKILL_CARD | {"base_fingerprint": base_fingerprint(chunks, NORMALISER)}
    with pytest.raises(InputError, match="skill 'far': .*base"):
        library.add_skill("far", tiny.skill(0), named)


def test_round_trip(library):
    params, normaliser, card = SkillLibrary.open(library.root).load_base()
    assert_same(params, tiny.base())
    assert_same(normaliser._asdict(), NORMALISER._asdict())
    assert card["network"] == {"width": 16} and card["kind"] == "base"
    assert card["fingerprint"] == base_fingerprint(tiny.base(), NORMALISER)

    params, card = library.load_skill("walk")
    assert_same(params, tiny.skill(0))
    assert card["rank"] == tiny.RANK and card["adapter"] == "lora"
    assert card["alpha"] == 16.0 and card["obs_dim"] == tiny.OBS_DIM

    params, card = library.load_gate("both")
    assert_same(params, GATE)
    assert card["gate"]["widths"] == [8, 8]
    assert library.skills() == ["run", "walk"] and library.gates() == ["both"]
    assert library.verify() == []


def test_files_are_readable_anywhere(library):
    content = (library.root / "skills/walk/skill.safetensors").read_bytes()
    card = json.loads((library.root / "skills/walk/skill.json").read_text())
    assert card["sha256"] == hashlib.sha256(content).hexdigest()
    for path, leaf in tree.flatten(tiny.skill(0)).items():
        assert card["tensors"][path] == [list(leaf.shape), "float32"]


def test_returns_are_recorded(library):
    library.set_returns("skill", "walk", {"mean": 900.5})
    assert library.load_skill("walk")[1]["returns"] == {"mean": 900.5}
    assert library.verify() == []


@pytest.mark.parametrize("step", ["fsync", "replace", "rename"])
@pytest.mark.parametrize("name", ["new", "walk"])
def test_full_disk_leaves_the_library_as_it_was(library, monkeypatch, step, name):
    library.remove("gate", "both")
    before = files_of(library.root)
    with monkeypatch.context() as patch:
        patch.setattr(os, step, full_disk)
        with pytest.raises(InputError, match="cannot write .*No space left on device"):
            library.add_skill(name, tiny.skill(2), SKILL_CARD, overwrite=True)
    assert files_of(library.root) == before
    assert library.verify() == []


def test_failed_exchange_puts_the_old_entry_back(library, monkeypatch):
    library.remove("gate", "both")
    before, rename = files_of(library.root), os.rename

    def second_fails(source, target):
        if ".tmp-" in str(source):
            full_disk()
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", second_fails)
        with pytest.raises(InputError, match="No space left"):
            library.add_skill("walk", tiny.skill(2), SKILL_CARD, overwrite=True)
    assert files_of(library.root) == before


@pytest.mark.parametrize("field", ["skills", "level", "gate"])
def test_cards_without_what_loading_needs_are_refused(library, field):
    with pytest.raises(InputError, match="skill 'new': its card has no 'alpha'"):
        library.add_skill("new", tiny.skill(2), {"objective": "bc"})
    card = {key: value for key, value in GATE_CARD.items() if key != field}
    with pytest.raises(InputError, match=f"gate 'new': its card has no '{field}'"):
        library.add_gate("new", GATE, card)
    assert library.skills() == ["run", "walk"]


def test_full_disk_while_recording_returns_keeps_the_card(library, monkeypatch):
    before = files_of(library.root)
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(InputError, match=r"cannot write .*skill\.json: No space left"):
        library.set_returns("skill", "walk", {"mean": 1.0})
    assert files_of(library.root) == before


def test_what_a_killed_process_left_is_put_right(library):
    dead, skills = 2**22 + 1, library.root / "skills"  # above the largest process id
    here = platform.node()
    before = files_of(library.root)
    os.rename(skills / "walk", skills / f".walk.old-{here}-{dead}")
    odd = [f".a.tmp-{n}" for n in ("5000000000", "0", "9" * 5000)]
    odd = [name for name in odd if len(name) < 255] + [".a.tmp-\u0661", ".a.tmp-²"]
    for name in odd:
        (skills / name).mkdir()
    (skills / f".walk.tmp-{here}-{os.getpid()}").mkdir()  # of an earlier process
    (skills / f".walk.json.tmp-{here}-{dead}").write_text("{")
    shutil.copytree(skills / "run", skills / f".run.removed-{here}-{dead}")
    alive = (f".a.tmp-{here}-{os.getppid()}", f".a.tmp-elsewhere-{dead}")
    for name in alive:
        (skills / name).mkdir()
    assert SkillLibrary.open(library.root).skills() == ["run", "walk"]
    assert files_of(library.root) == before
    left = [path.name for path in skills.iterdir() if path.name[0] == "."]
    assert sorted(left) == sorted([*alive, *odd]), "they may still be written"


def test_gate_of_skills_that_were_replaced_is_refused(library):
    prints = [library.card("skill", name)["fingerprint"] for name in ("walk", "run")]
    card = GATE_CARD | {"skill_fingerprints": prints}
    library.remove("gate", "both")
    library.add_skill("run", tiny.skill(5), SKILL_CARD, overwrite=True)
    before = files_of(library.root)
    with pytest.raises(InputError, match="'new': made for skill 'run' .* make the"):
        library.add_gate("new", GATE, card, overwrite=True)
    assert files_of(library.root) == before


def test_skill_that_a_gate_needs_is_not_replaced(library):
    before = files_of(library.root)
    with pytest.raises(InputError, match="skill 'run' is needed by gate 'both'; rem"):
        library.add_skill("run", tiny.skill(5), SKILL_CARD, overwrite=True)
    assert files_of(library.root) == before
    library.add_skill("run", tiny.skill(1), SKILL_CARD, overwrite=True)  # the same
    assert library.verify() == []


def test_what_another_run_added_meanwhile_is_kept(library, tmp_path):
    mine, theirs = {"config": {"seed": 0, "sizes": (1, 2)}}, {"config": {"seed": 1}}
    library.add_skill("new", tiny.skill(2), SKILL_CARD | theirs, overwrite=True)
    gate = GATE_CARD | {"skills": ["walk", "new"]}
    library.add_gate("pair", GATE, gate | theirs, overwrite=True)
    before = files_of(library.root)
    words = "already, made by another run; choose another name, or remove it; what this"
    with pytest.raises(InputError, match=f"has a skill 'new' {words}"):
        library.add_skill("new", tiny.skill(2), SKILL_CARD | mine, overwrite=True)
    with pytest.raises(InputError, match=f"has a gate 'pair' {words}"):
        library.add_gate("pair", GATE, gate | mine, overwrite=True)
    assert files_of(library.root) == before
    other = SkillLibrary.create(tmp_path / "new")
    other.add_base(tiny.base(), NORMALISER, BASE_CARD | theirs, overwrite=True)
    with pytest.raises(InputError, match="has a base already, made by another run"):
        other.add_base(tiny.base(), NORMALISER, BASE_CARD | mine, overwrite=True)
    other.add_base(tiny.base(), NORMALISER, BASE_CARD | theirs, overwrite=True)
    library.add_skill("mine", tiny.skill(2), SKILL_CARD | mine)
    library.add_skill("mine", tiny.skill(3), SKILL_CARD | mine, overwrite=True)
    assert_same(library.load_skill("mine")[0], tiny.skill(3))


def test_existing_names_are_refused_unless_overwritten(library):
    with pytest.raises(InputError, match="has a skill 'walk' already"):
        library.add_skill("walk", tiny.skill(2), SKILL_CARD)
    with pytest.raises(InputError, match="has a gate 'both' already"):
        library.add_gate("both", GATE, GATE_CARD)
    with pytest.raises(InputError, match="has a base already"):
        library.add_base(tiny.base(), NORMALISER, BASE_CARD)
    gate = library.root / "gates" / "both"
    os.rename(gate, library.root / "kept")
    library.add_skill("walk", tiny.skill(2), SKILL_CARD, overwrite=True)
    assert_same(library.load_skill("walk")[0], tiny.skill(2))
    os.rename(library.root / "kept", gate)
    with pytest.raises(InputError, match="gate 'both': made for skill 'walk' .* again"):
        library.load_gate("both")


def test_base_that_others_need_is_not_replaced(library):
    normaliser = Normaliser(NORMALISER.mean + 1, NORMALISER.std)
    with pytest.raises(InputError, match="cannot be replaced .* run, walk, both were"):
        library.add_base(tiny.base(), normaliser, BASE_CARD, overwrite=True)
    library.add_base(tiny.base(), NORMALISER, BASE_CARD, overwrite=True)


@pytest.mark.parametrize("name", ["", ".hidden", "..", "a/b", "walk fast", "ü", "a\n"])
def test_bad_names_are_refused(library, name):
    with pytest.raises(InputError, match="expected letters, digits"):
        library.add_skill(name, tiny.skill(2), SKILL_CARD)


def test_unknown_names_list_the_choices(library):
    with pytest.raises(InputError, match="no skill 'fly'; it has run, walk"):
        library.load_skill("fly")
    with pytest.raises(InputError, match="no skill 'fly'"):
        library.add_gate("g", GATE, GATE_CARD | {"skills": ["fly"]})
    with pytest.raises(InputError, match="no gate 'walk'; it has both"):
        library.remove("gate", "walk")


def test_other_layers_are_refused(library):
    flat = tree.flatten(tiny.skill(2))
    path = next(iter(flat))
    wrong = tree.unflatten(
        {p: np.ones((9, 9), np.float32) if p == path else x for p, x in flat.items()}
    )
    with pytest.raises(InputError, match=f"skill 'new': .*{path.rpartition('/')[0]}"):
        library.add_skill("new", wrong, SKILL_CARD)
    assert library.skills() == ["run", "walk"]


@pytest.mark.parametrize(
    ("field", "value"),
    [("base_fingerprint", "0123456789abcdef"), ("obs_dim", 99), ("action_dim", 7)],
)
def test_card_of_another_base_is_refused(library, field, value):
    with pytest.raises(InputError, match=f"'new': made for {field} {value}"):
        library.add_skill("new", tiny.skill(2), SKILL_CARD | {field: value})
    with pytest.raises(InputError, match=f"'new': made for {field} {value}"):
        library.add_gate("new", GATE, GATE_CARD | {field: value})


@pytest.mark.parametrize("kind", ["skill", "gate"])
def test_entry_copied_from_another_library_is_refused_by_name(library, tmp_path, kind):
    other = other_base(tmp_path)
    for folder in ("skills", "gates"):
        shutil.copytree(library.root / folder, other.root / folder)
    load, name = {
        "skill": (other.load_skill, "walk"),
        "gate": (other.load_gate, "both"),
    }[kind]
    with pytest.raises(InputError, match=f"{kind} '{name}': made for base"):
        load(name)
    assert len(other.verify()) == 3


def test_entry_of_another_observation_space_is_refused(library, tmp_path):
    other = other_base(tmp_path, size=5)
    shutil.copytree(library.root / "skills", other.root / "skills")
    with pytest.raises(InputError, match="'walk': made for obs_dim 3, .* has 5"):
        other.load_skill("walk")


def test_skill_that_a_gate_needs_is_kept(library):
    with pytest.raises(InputError, match="'walk' is needed by gate 'both'"):
        library.remove("skill", "walk")
    library.remove("gate", "both")
    library.remove("skill", "walk")
    assert library.skills() == ["run"] and library.gates() == []
    assert sorted(p.name for p in (library.root / "skills").iterdir()) == ["run"]
    with pytest.raises(InputError, match="cannot remove a base"):
        library.remove("base", "base")


def test_no_library_is_told(tmp_path):
    with pytest.raises(InputError, match=r"is not a skill library: .*base\.json"):
        SkillLibrary.open(tmp_path)


def cut(path):
    path.write_bytes(path.read_bytes()[:-3])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def edit(path):
    path.write_text(path.read_text().replace("16.0", "17.0"))


def other_version(path):
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 7}))


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("skill.json", os.remove, "cannot read .*No such file"),
        ("skill.json", cut, "is not a JSON file"),
        ("skill.json", edit, "does not match its own hash"),
        ("skill.json", other_version, "format version 7, expected 1"),
        (
            "skill.json",
            lambda p: p.write_text("[]"),
            "got list, expected a JSON object",
        ),
        ("skill.json", lambda p: p.write_bytes(b"\xff\xfe"), "is not a JSON file"),
        ("skill.safetensors", os.remove, "cannot read .*No such file"),
        ("skill.safetensors", cut, "SHA-256 is"),
        ("skill.safetensors", flip, "SHA-256 is"),
    ],
)
def test_damage_by_hand_is_one_clear_line(library, file, damage, message):
    path = library.root / "skills" / "walk" / file
    damage(path)
    with pytest.raises(InputError, match=message) as caught:
        library.load_skill("walk")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert str(path) in library.verify()[0]


def reseal(path, content, **changes):
    """Write arrays with a card that has the right hashes: damage no hash shows."""
    path.with_suffix(".safetensors").write_bytes(content)
    card = json.loads(path.read_text()) | changes
    card["sha256"] = hashlib.sha256(content).hexdigest()
    del card["card_sha256"]
    text = json.dumps(card, sort_keys=True).encode()
    card["card_sha256"] = hashlib.sha256(text).hexdigest()
    path.write_text(json.dumps(card))


def test_resealed_rubbish_is_refused(library):
    path = library.root / "skills" / "walk" / "skill.json"
    reseal(path, b"rubbish")
    with pytest.raises(InputError, match="is not a safetensors file"):
        library.load_skill("walk")


def test_resealed_arrays_of_another_skill_are_refused(library):
    path = library.root / "skills" / "walk" / "skill.json"
    reseal(path, (library.root / "base" / "base.safetensors").read_bytes())
    with pytest.raises(
        InputError, match=r"skill\.safetensors: holds .*, its card says"
    ):
        library.load_skill("walk")


def test_damaged_base_is_told_once(library):
    flip(library.root / "base" / "base.safetensors")
    problems = library.verify()
    assert len(problems) == 1 and "base.safetensors: SHA-256" in problems[0]
    with pytest.raises(InputError, match=r"base\.safetensors"):
        library.add_skill("new", tiny.skill(2), SKILL_CARD)


def link(path, target):
    """A symbolic link in the place of a folder, which moves to `target`."""
    shutil.move(path, target)
    path.symlink_to(target)


def test_links_are_removed_and_never_written_through(library, tmp_path):
    walk = library.root / "skills" / "walk"
    link(walk, tmp_path / "elsewhere")
    elsewhere = files_of(tmp_path / "elsewhere")
    assert library.verify() == []
    with pytest.raises(InputError, match="walk is a symbolic link, which is not wr"):
        library.set_returns("skill", "walk", {"mean": 1.0})
    library.add_skill("walk", tiny.skill(0), SKILL_CARD, overwrite=True)
    assert not walk.is_symlink() and library.verify() == []
    both = library.root / "gates" / "both"
    link(both, tmp_path / "gate")
    library.remove("gate", "both")
    assert not os.path.lexists(both) and (tmp_path / "gate" / "gate.json").is_file()
    (library.root / "skills" / "lost").symlink_to(tmp_path / "nowhere")
    library.remove("skill", "lost")
    link(library.root / "skills", tmp_path / "skills")
    before = files_of(tmp_path / "skills")
    with pytest.raises(InputError, match="skills is a symbolic link, through which"):
        library.add_skill("new", tiny.skill(2), SKILL_CARD)
    with pytest.raises(InputError, match="skills is a symbolic link, through which"):
        library.remove("skill", "walk")
    assert files_of(tmp_path / "skills") == before
    assert files_of(tmp_path / "elsewhere") == elsewhere
    assert SkillLibrary.open(library.root).skills() == ["run", "walk"]


def test_a_dead_processs_link_is_tidied_and_not_followed(library, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    left = library.root / "skills" / f".a.removed-{platform.node()}-{2**22 + 1}"
    left.symlink_to(tmp_path / "mine")
    SkillLibrary.open(library.root)
    assert not os.path.lexists(left) and (tmp_path / "mine" / "file").exists()
    # Somebody put a link where the next temporary file goes.
    victim = tmp_path / "victim"
    victim.write_text("kept")
    files.beside(tmp_path / "out", "tmp").symlink_to(victim)
    files.write_json(tmp_path / "out", {})
    assert victim.read_text() == "kept" and not (tmp_path / "out").is_symlink()


def test_left_overs_of_a_read_only_library_stop_no_reader(library, monkeypatch):
    skills = library.root / "skills"
    (skills / f".walk.tmp-{platform.node()}-{2**22 + 1}").mkdir()

    def read_only(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch:  # root may write everywhere
        patch.setattr(os, "rmdir", read_only)
        assert SkillLibrary.open(library.root).verify() == []
        patch.setattr(os, "access", lambda *args: False)
        patch.setattr(files, "locked", read_only)
        assert SkillLibrary.open(library.root).verify() == []


WRITER = """
import sys, tiny
from psec_jax.library import SkillLibrary
library = SkillLibrary.open(sys.argv[1])
print("ready", flush=True)
for i in range(60):
    library.add_skill("busy", tiny.skill(i % 2), {"alpha": 1.0}, overwrite=True)
    library.add_skill("gone", tiny.skill(i % 2), {"alpha": 1.0}, overwrite=True)
    library.remove("skill", "gone")
"""


def test_readers_beside_a_writer_see_no_damage(library):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(library.root)],
        env=environment,
        stdout=subprocess.PIPE,
    )
    with writer:
        writer.stdout.readline()
        reads = 0
        while writer.poll() is None:
            assert SkillLibrary.open(library.root).verify() == []
            reads += 1
    assert writer.returncode == 0 and reads > 3
    assert library.skills() == ["busy", "run", "walk"]


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("skill", {"alpha": True}, "alpha is True, expected a finite number"),
        ("skill", {"alpha": "16"}, "alpha is '16', expected a finite"),
        ("skill", {"alpha": 10**400}, "alpha is 1000"),
        ("skill", {"rank": 0}, "rank is 0, expected"),
        ("skill", {"rank": 3}, "is a lora of rank 2, its card says lora of rank 3"),
        ("skill", {"adapter": "mlp"}, "is a lora of rank 2, its card says mlp"),
        ("skill", {"name": "run"}, "is the card of 'run', not of 'walk'"),
        ("skill", {"kind": "gate"}, "is the card of a 'gate', expected a skill"),
        ("skill", {"obs_dim": 3.0}, r"obs_dim is 3\.0, expected a number"),
        (
            "skill",
            {"fingerprint": "0" * 16},
            "have the fingerprint .*, its card says 0",
        ),
        ("skill", {"tensors": []}, r"tensors is \[\], expected shape"),
        ("skill", {"env": 3}, "env is 3, expected a text"),
        ("skill", {"data": {"fingerprint": 3}}, "data is .*, expected source, finger"),
        ("skill", {"returns": {"mean": "\x1b"}}, "returns is .*, expected an object"),
        ("gate", {"skills": "walk"}, "skills is 'walk', expected a list of names"),
        ("gate", {"skills": []}, "0 skills and 2 fingerprints"),
        ("gate", {"skills": ["../../base", "run"]}, "skills is .*, expected a list"),
        ("gate", {"skill_fingerprints": ["0" * 16]}, "2 skills and 1 fingerprints"),
        ("gate", {"level": None}, "level is None"),
        ("gate", {"gate": {"odd": 1}}, "gate has no 'odd' of 1"),
        ("gate", {"gate": {"head": ["constant"]}}, "gate has no 'head' of"),
        ("gate", {"gate": {"head": "linear"}}, "head/alpha is .*, expected nothing"),
        ("gate", {"gate": {"head": "constant"}}, "support/demos is .*, expected nothi"),
        ("gate", {"gate": {"head": "x"}}, "unknown (gate.)?head 'x'"),
        ("base", {"network": 1}, "network is 1, expected an object"),
        ("base", {"obs_dim": 4}, r"mean has shape \(3,\), expected \(4,\)"),
        ("base", {"obs_dim": -1}, "obs_dim is -1, expected"),
    ],
)
def test_resealed_cards_are_checked_field_by_field(library, kind, changes, words):
    name = {"base": "base", "skill": "walk", "gate": "both"}[kind]
    folder = library.root / ("base" if kind == "base" else f"{kind}s/{name}")
    path = folder / f"{kind}.json"
    reseal(path, path.with_suffix(".safetensors").read_bytes(), **changes)
    load = {
        "base": library.load_base,
        "skill": lambda: library.load_skill("walk"),
        "gate": lambda: library.load_gate("both"),
    }[kind]
    with pytest.raises(InputError, match=words) as caught:
        load()
    text = str(caught.value)
    assert "\n" not in text and text.isprintable()
    assert library.verify() != []


def rewritten(path, change):
    """Change the arrays of an entry, with hashes and fingerprint to match."""
    flat = safetensors.numpy.load(path.with_suffix(".safetensors").read_bytes())
    flat = change(flat)
    layout = {name: [list(x.shape), str(x.dtype)] for name, x in flat.items()}
    try:
        mark = tree.fingerprint(tree.unflatten(flat))
    except InputError:
        mark = "0" * 16
    content = safetensors.numpy.save(flat)
    reseal(path, content, tensors=layout, fingerprint=mark)


def nan(flat):
    first = min(flat)
    return flat | {first: np.full_like(flat[first], np.nan)}


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("skill", nan, "holds .* NaN or infinite of"),
        ("gate", nan, "holds .* NaN or infinite of"),
        ("base", nan, "holds .* NaN or infinite of"),
        (
            "base",
            lambda flat: flat | {"normaliser/std": np.zeros(3)},
            "normaliser's std is not above 0",
        ),
        (
            "base",
            lambda flat: {n: x for n, x in flat.items() if "normal" not in n},
            "holds no params and normaliser",
        ),
        (
            "gate",
            lambda flat: flat | {"head/alpha": np.ones(3, np.float32)},
            r"head/alpha is \(3,\), expected \(2,\)",
        ),
        (
            "gate",
            lambda flat: flat | {"support/tau": np.ones(2, np.int32)},
            "support/tau is",
        ),
        (
            "skill",
            lambda flat: flat | {f"{min(flat)}/c": np.ones(2, np.float32)},
            "is inside another array",
        ),
        (
            "skill",
            lambda flat: flat | {"/".join("a" * 20): np.ones(2, np.float32)},
            "expected LAYER/NAME",
        ),
    ],
)
def test_resealed_arrays_are_checked(library, kind, change, words):
    name = {"base": "base", "skill": "skills/walk", "gate": "gates/both"}[kind]
    rewritten(library.root / name / f"{kind}.json", change)
    with pytest.raises(InputError, match=words):
        {"base": library.load_base, "skill": lambda: library.load_skill("walk")}.get(
            kind, lambda: library.load_gate("both")
        )()


def test_what_is_no_file_is_refused_at_once(library):
    folder = library.root / "skills" / "walk"
    for name in ("skill.json", "skill.safetensors"):
        kept = (folder / name).read_bytes()
        (folder / name).unlink()
        os.mkfifo(folder / name)
        with pytest.raises(InputError, match=f"{name}: not a regular file"):
            library.load_skill("walk")
        (folder / name).unlink()
        (folder / name).mkdir()
        with pytest.raises(InputError, match=f"{name}: not a regular file"):
            library.load_skill("walk")
        (folder / name).rmdir()
        (folder / name).write_bytes(kept)
    for text in ("[" * 100_000, '{"a":' * 100_000, '{"a": 1e999}', '{"a": NaN}'):
        (folder / "skill.json").write_text(text)
        with pytest.raises(InputError, match="is not a JSON file"):
            library.load_skill("walk")
    (folder / "skill.json").write_text('{"a":' * 80 + "1" + "}" * 80)
    with pytest.raises(InputError, match="more than 64 deep"):
        library.load_skill("walk")


def test_control_characters_are_shown_escaped(library, capsys):
    with pytest.raises(InputError) as caught:
        library.load_skill("\x1b[2Jwalk\u202e")
    assert str(caught.value).isprintable() and "x1b[2Jwalk" in str(caught.value)
    print(table([["\x1b[31mred\ud800", "b"]]))
    assert capsys.readouterr().out == "\\x1b[31mred\\ud800  b\n"
