"""The library on disk: round trips, refusals by name, nothing half-written."""

import errno
import hashlib
import json
import os
import platform
import shutil

import numpy as np
import pytest
import tiny

from psec_jax import tree
from psec_jax.errors import InputError
from psec_jax.library import SkillLibrary, base_fingerprint
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
    "gate": {"head": "constant", "support": "none", "widths": (8, 8)},
}
GATE = {"head": {"alpha": np.ones(2, np.float32)}, "support": {"tau": np.float32(2)}}


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
        if p.is_file()
    }


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def other_base(tmp_path, **changes):
    """A library whose base has other numbers."""
    made = SkillLibrary.create(tmp_path / "other")
    normaliser = Normaliser(NORMALISER.mean + 1, NORMALISER.std)
    made.add_base(tiny.base(), normaliser, BASE_CARD | changes)
    return made


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
    before = files_of(library.root)
    with monkeypatch.context() as patch:
        patch.setattr(os, step, full_disk)
        with pytest.raises(InputError, match="cannot write .*No space left on device"):
            library.add_skill(name, tiny.skill(2), SKILL_CARD, overwrite=True)
    assert files_of(library.root) == before
    assert library.verify() == []


def test_failed_exchange_puts_the_old_entry_back(library, monkeypatch):
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
    (skills / f".walk.tmp-{here}-{os.getpid()}").mkdir()  # of an earlier process
    (skills / f".walk.json.tmp-{here}-{dead}").write_text("{")
    shutil.copytree(skills / "run", skills / f".run.removed-{here}-{dead}")
    alive = (f".a.tmp-{here}-{os.getppid()}", f".a.tmp-elsewhere-{dead}")
    for name in alive:
        (skills / name).mkdir()
    assert SkillLibrary.open(library.root).skills() == ["run", "walk"]
    assert files_of(library.root) == before
    left = [path.name for path in skills.iterdir() if path.name[0] == "."]
    assert sorted(left) == sorted(alive), "they may still be written"


def test_gate_of_skills_that_were_replaced_is_refused(library):
    prints = [library.card("skill", name)["fingerprint"] for name in ("walk", "run")]
    card = GATE_CARD | {"skill_fingerprints": prints}
    library.add_gate("new", GATE, card)
    library.add_skill("run", tiny.skill(5), SKILL_CARD, overwrite=True)
    before = files_of(library.root)
    with pytest.raises(InputError, match="'new': made for skill 'run' .* make the"):
        library.add_gate("new", GATE, card, overwrite=True)
    assert files_of(library.root) == before


def test_existing_names_are_refused_unless_overwritten(library):
    with pytest.raises(InputError, match="has a skill 'walk' already"):
        library.add_skill("walk", tiny.skill(2), SKILL_CARD)
    with pytest.raises(InputError, match="has a gate 'both' already"):
        library.add_gate("both", GATE, GATE_CARD)
    with pytest.raises(InputError, match="has a base already"):
        library.add_base(tiny.base(), NORMALISER, BASE_CARD)
    library.add_skill("walk", tiny.skill(2), SKILL_CARD, overwrite=True)
    assert_same(library.load_skill("walk")[0], tiny.skill(2))
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
    other = other_base(tmp_path, obs_dim=5)
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
