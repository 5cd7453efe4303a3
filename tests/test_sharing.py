"""Libraries pushed and pulled: there and back, and everything that is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
from fake_hub import Hub
from shell import call

from psec_jax import sharing
from psec_jax.errors import InputError
from psec_jax.library import SkillLibrary
from psec_jax.types import Normaliser

REPO = "hf:me/walker"
ALL = [
    ("base", "base"),
    ("skill", "run"),
    ("skill", "walk"),
    ("gate", "constant"),
    ("gate", "linear"),
]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    pytest.importorskip("huggingface_hub", reason="needs the extra hub")
    from huggingface_hub import constants

    server = Hub()
    path = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + path)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_tests")
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def here(tmp_path, monkeypatch, made):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made, "lib")
    return SkillLibrary.open("lib")


def files(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted(Path(folder).rglob("*"))
        if p.is_file() and p.name != ".lock"
    }


def command(*arguments):
    answer = call("launch.library", *arguments)
    assert answer.code == 0, answer.err
    return answer.out


def test_a_folder_and_back(here):
    out = command("push", "--library=lib", "--to=there")
    assert out.splitlines() == [f"added {kind} {name} to there" for kind, name in ALL]
    sent = files("there")
    text = sent.pop("README.md").decode()
    assert sent == files("lib")
    assert "| skill | walk | gymnasium:Hopper-v5 |" in text
    assert (
        "| gate | linear | - | linear gate over walk, run, parameter level | 1.0 |"
        in text
    )
    command("pull", "--library=new", "--from=there")
    assert files("new") == files("lib")
    assert not SkillLibrary.open("new").verify()
    assert "has it all already" in command("pull", "--library=new", "--from=there")
    assert "has it all already" in command("push", "--library=lib", "--to=there")


def test_the_hub_and_back(here, hub):
    command("push", "--library=lib", f"--to={REPO}")
    repo = hub.repos["me/walker"]
    assert {p: x for p, x in repo.items() if p != "README.md"} == files("lib")
    assert hub.private["me/walker"] and len(hub.commits) == 1
    command("pull", "--library=new", f"--from={REPO}")
    assert files("new") == files("lib")
    assert "has it all already" in command("push", "--library=lib", f"--to={REPO}")
    assert len(hub.commits) == 1

    # A card with returns, a skill more, and what somebody wrote into the README.
    own = (
        b"---\nlicense: mit\n---\nMine.\n" + repo["README.md"].partition(b"---\n\n")[2]
    )
    repo["README.md"] = own
    here.set_returns("skill", "walk", {"mean": 812.25, "returns": [812.25]})
    here.add_skill("hop", tiny.skill(5), {"alpha": 2.0, "env": "a|b<script>`x`"})
    out = command("push", "--library=lib", f"--to={REPO}")
    assert out.splitlines() == [
        f"added skill hop to {REPO}",
        f"added skill walk to {REPO}",
    ]
    text = repo["README.md"].decode()
    assert text.startswith("---\nlicense: mit\n---\nMine.\n") and "| 812.2 |" in text
    assert r"a\|b\<script\>\`x\`" in text
    assert {p: x for p, x in repo.items() if p != "README.md"} == files("lib")


@pytest.mark.parametrize("kind", ["folder", "hub"])
def test_single_entries(here, kind, request):
    if kind == "hub":
        request.getfixturevalue("hub")
    place = REPO if kind == "hub" else "there"
    assert sharing.push("lib", place, "walk") == [ALL[0], ("skill", "walk")]
    assert sharing.push("lib", place, "linear") == [
        ("skill", "run"),
        ("gate", "linear"),
    ]
    assert sharing.pull("new", place, "skill/walk") == [ALL[0], ("skill", "walk")]
    gate = [("skill", "run"), ("gate", "linear")]
    assert sharing.pull("new", place, "linear") == gate
    new = SkillLibrary.open("new")
    assert not new.verify() and new.skills() == ["run", "walk"]
    with pytest.raises(
        InputError, match="has no 'fly'; it has base, run, walk, linear"
    ):
        sharing.pull("new", place, "fly")


def other_base(folder):
    """A library of the same sizes and another base."""
    library = SkillLibrary.create(folder)
    card = json.loads(Path("lib/base/base.json").read_text())
    fields = {f: card[f] for f in ("obs_dim", "action_dim", "network", "process")}
    normaliser = Normaliser(np.ones(tiny.OBS_DIM), np.ones(tiny.OBS_DIM))
    library.add_base(tiny.base(), normaliser, fields | {"name": "other"})
    library.add_skill("hop", tiny.skill(7), {"alpha": 1.0})
    return library


@pytest.mark.parametrize("kind", ["folder", "hub"])
def test_another_base_and_another_entry_are_refused(here, kind, request):
    if kind == "hub":
        request.getfixturevalue("hub")
    place = REPO if kind == "hub" else "there"
    other_base("other")
    sharing.push("lib", place)
    before = files("other")
    for name in ((), ("walk",)):
        answer = call(
            "launch.library", "pull", *name, "--library=other", f"--from={place}"
        )
        assert answer.code == 2 and "made for base" in answer.err
    assert files("other") == before
    answer = call("launch.library", "push", "--library=other", f"--to={place}")
    assert answer.code == 2 and "made for base" in answer.err
    shutil.copytree("lib", "again")
    again = SkillLibrary.open("again")
    for gate in again.gates():
        again.remove("gate", gate)
    again.remove("skill", "walk")
    again.add_skill("walk", tiny.skill(9), {"alpha": 1.0})
    before = files("again")
    for verb, flag in (("pull", "--from"), ("push", "--to")):
        answer = call("launch.library", verb, "--library=again", f"{flag}={place}")
        assert answer.code == 2 and "another skill 'walk'" in answer.err
        assert answer.err.count("\n") == 1
    assert files("again") == before


def flipped(path):
    data = bytearray(Path(path).read_bytes())
    data[-1] ^= 1
    Path(path).write_bytes(data)


def edited(path, sealed=True, **changes):
    from psec_jax import library

    card = json.loads(Path(path).read_text()) | changes
    Path(path).write_text(json.dumps(library._sealed(card) if sealed else card))


def linked(path, target):
    Path(path).unlink()
    Path(path).symlink_to(target)


SKILL = "there/skills/walk/skill"
DAMAGE = {
    "numbers": (lambda: flipped(f"{SKILL}.safetensors"), "SHA-256 is"),
    "card": (lambda: edited(f"{SKILL}.json", False, alpha=2.0), "it was edited"),
    "tensors": (lambda: edited(f"{SKILL}.json", tensors={}), "its card says None"),
    "format": (
        lambda: edited(f"{SKILL}.json", format_version=2, versions={"psec_jax": "9.1"}),
        "format version 2, expected 1; to read it, use the psec_jax that wrote it, "
        "'9.1', or a later one",
    ),
    "rank": (lambda: edited(f"{SKILL}.json", rank=3), "its card says lora of rank 3"),
    "base": (
        lambda: edited(f"{SKILL}.json", base_fingerprint="0" * 16),
        "0000000000000000",
    ),
    "no arrays": (lambda: Path(f"{SKILL}.safetensors").unlink(), "has no skill.safet"),
    "no base": (lambda: shutil.rmtree("there/base"), "it has no base/base.json"),
    "more": (
        lambda: Path("there/skills/walk/run.py").touch(),
        "is no file of a library",
    ),
    "link": (lambda: linked(f"{SKILL}.json", "/etc/passwd"), "is a symbolic link"),
    "folder link": (
        lambda: Path("there/skills/evil").symlink_to("/etc"),
        "is a symbolic link",
    ),
    "no JSON": (lambda: Path(f"{SKILL}.json").write_text("{"), "is not a JSON file"),
    "no print": (lambda: edited(f"{SKILL}.json", fingerprint=[1]), "expected 16 hex"),
    "gate": (
        lambda: edited("there/gates/linear/gate.json", skills=[["walk"]]),
        "expected a list of names",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_what_is_damaged_is_not_pulled(here, case):
    sharing.push("lib", "there")
    damage, message = DAMAGE[case]
    damage()
    shutil.copytree("lib", "mine")
    mine = SkillLibrary.open("mine")
    for gate in mine.gates():
        mine.remove("gate", gate)
    mine.remove("skill", "walk")
    before = files("mine")
    for root in ("mine", "new"):
        answer = call("launch.library", "pull", f"--library={root}", "--from=there")
        assert answer.code == 2 and message in answer.err, answer.err
        assert answer.err.count("\n") == 1 and ".pull" not in answer.err
    assert files("mine") == before and not Path("new").exists()


PATHS = {
    "../evil.json": "the path '../evil.json' climbs out",
    "skills/../../evil/skill.json": "climbs out",
    "/etc/evil": "climbs out",
    "skills\\walk\\skill.json": "climbs out",
    "skills/./walk/skill.json": "climbs out",
    "skills/walk/more/skill.json": "is no file of a library",
    "skills/.hidden/skill.json": "is no file of a library",
    "base/base.pickle": "is no file of a library",
    "gates/g/skill.json": "is no file of a library",
}


@pytest.mark.parametrize("path", PATHS)
def test_paths_of_a_repository(here, hub, path):
    sharing.push("lib", REPO)
    hub.repos["me/walker"][path] = b"{}"
    answer = call("launch.library", "pull", "--library=new", f"--from={REPO}")
    assert answer.code == 2 and PATHS[path] in answer.err
    assert not Path("new").exists() and not Path("../evil").exists()


def test_bounds_and_other_files_of_a_repository(here, hub, monkeypatch):
    sharing.push("lib", REPO)
    hub.repos["me/walker"]["videos/run.mp4"] = b"\x00" * 10
    assert sharing.pull("new", REPO) == ALL
    assert files("new") == files("lib")
    monkeypatch.setattr(sharing, "MAX_ARRAYS", 100)
    with pytest.raises(InputError, match=r"has \d+ bytes, expected 100 at most"):
        sharing.pull("more", REPO)
    monkeypatch.setattr(sharing, "MAX_FILES", 3)
    with pytest.raises(InputError, match="files, expected 3 at most"):
        sharing.pull("more", REPO)


REFUSED = {
    ("push",): "--to: not given, expected hf:OWNER/NAME",
    ("pull",): "--from: not given",
    ("push", "--to=hf:walker"): "hf:walker: expected hf:OWNER/NAME",
    ("pull", "--from=hf:../.."): "expected hf:OWNER/NAME",
    ("pull", "--from=lib", "--revision=main"): "revision: lib is a folder",
    ("pull", "--from=none"): "none is no skill library",
    ("pull", "walk", "run", "--from=lib"): "expected 'pull [NAME]'",
    ("push", "fly", "--to=there"): "lib has no 'fly'",
    ("push", "--to=used"): "used is no skill library and holds a.txt",
    ("push", "--library=none", "--to=there"): "none is not a skill library",
}


@pytest.mark.parametrize("arguments", REFUSED)
def test_refused(here, arguments):
    Path("used").mkdir()
    Path("used/a.txt").touch()
    before = sorted(Path().rglob("*"))
    answer = call("launch.library", "--library=lib", *arguments)
    assert answer.code == 2 and REFUSED[arguments] in answer.err, answer.err
    assert answer.err.count("\n") == 1
    assert sorted(p for p in Path().rglob("*") if p.name != ".lock") == before


def test_the_hub_says_no(here, hub, monkeypatch):
    answer = call("launch.library", "pull", "--library=new", f"--from={REPO}")
    assert answer.code == 2 and answer.err.startswith(f"error: {REPO}: ")
    assert answer.err.count("\n") == 1
    sharing.push("lib", REPO)
    read = sharing.Hub.read

    def meanwhile(self, path, limit):  # somebody else commits
        hub.repos["me/walker"]["more.txt"] = b"x"
        return read(self, path, limit)

    monkeypatch.setattr(sharing.Hub, "read", meanwhile)
    here.add_skill("hop", tiny.skill(5), {"alpha": 2.0})
    answer = call("launch.library", "push", "--library=lib", f"--to={REPO}")
    assert answer.code == 2 and "412" in answer.err
    assert "skills/hop/skill.json" not in hub.repos["me/walker"]


def test_a_library_that_is_damaged_is_not_pushed(here, hub):
    flipped("lib/skills/walk/skill.safetensors")
    for place in ("there", REPO):
        answer = call("launch.library", "push", "--library=lib", f"--to={place}")
        assert answer.code == 2 and "SHA-256 is" in answer.err
    assert not Path("there").exists() and not hub.repos


def test_what_a_killed_pull_leaves_is_tidied(here):
    left = Path("lib/.pull.tmp-999999999/skills/x")
    left.mkdir(parents=True)
    assert sharing.pull("lib", "lib") == []
    assert not left.exists()


def test_a_readme_without_marks_stays():
    assert sharing.readme("# Mine\n", "x") == "# Mine\n"
    made = sharing.readme(None, "x")
    assert sharing.readme(sharing.readme(None, "y"), "x") == made
