"""The launchers beside Python: the TPU script, the container file, the SLURM script."""

import os
import re
import shlex
import shutil
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest
from shell import call

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "launch" / "tpu_pod.sh"
DOCS = (ROOT / "docs" / "launching.md").read_text(encoding="utf-8")
SLICE = ("--name=psec", "--zone=us-west4-a")
QUEUED = ("gcloud", "compute", "tpus", "queued-resources")
WHERE = ("psec", "--zone=us-west4-a")
RUN = ("--", "launch.pretrain", "--distributed", "--workdir=/mnt/bucket/a")
RUN += ("--library=/mnt/bucket/lib", "--config.gate.widths=(3, 4)")


def pod(*arguments, **options):
    return subprocess.run(
        ["bash", SCRIPT, *arguments],
        capture_output=True,
        text=True,
        check=False,
        **options,
    )


def shown(*arguments):
    """The words of every command that a dry run prints."""
    answer = pod(*arguments, *SLICE, "--dry_run")
    assert answer.returncode == 0 and answer.stderr == "", answer.stderr
    lines = answer.stdout.splitlines()
    assert all(line.startswith("+ ") for line in lines)
    return [shlex.split(line)[1:] for line in lines]


def remote(words):
    """What a command has the workers do, and which."""
    text = [w.removeprefix("--command=") for w in words if w.startswith("--command=")]
    return next(w for w in words if w.startswith("--worker=")), text[0]


GCLOUD = """#!/bin/bash
case "$*" in
  *" describe "*)
    read -r state <"$HERE/states" && sed -i 1d "$HERE/states"
    case $state in
      NOT_FOUND) echo "ERROR: (gcloud) NOT_FOUND: no psec" >&2; exit 1 ;;
      '') echo "ERROR: (gcloud) You do not have permission" >&2; exit 1 ;;
    esac
    echo "$state" ;;
  *) echo "$4 $5" >>"$HERE/asked" ;;
esac
"""


@pytest.fixture
def queue(tmp_path, monkeypatch):
    """A gcloud that tells the states in a file one by one, and notes the rest."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in {"gcloud": GCLOUD, "sleep": "#!/bin/bash\n"}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("HERE", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return tmp_path


@pytest.fixture
def workers(tmp_path, monkeypatch):
    """A gcloud that does what the workers should in a folder here."""
    home, programs = tmp_path / "home", tmp_path / "bin"
    python = home / "psec_jax" / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/bash\nprintf "<%s>" "$@"\nexec sleep 60\n')
    programs.mkdir()
    (programs / "gcloud").write_text(
        '#!/bin/bash\nfor word; do case $word in --command=*) cd "$HERE/home" && '
        'exec bash -c "${word#--command=}" ;; esac; done\necho "$STATE"\n'
    )
    (programs / "mountpoint").write_text('#!/bin/bash\n[ -e "$HERE/mounted" ]\n')
    for program in (python, programs / "gcloud", programs / "mountpoint"):
        program.chmod(0o755)
    monkeypatch.setenv("HERE", str(tmp_path))
    monkeypatch.setenv("STATE", "ACTIVE")
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    yield home / "psec_jax"
    if (home / "psec_jax" / "run.pid").exists():
        pod("stop", *SLICE)


def test_scripts_are_well_formed(tmp_path):
    example = tmp_path / "slurm.sh"
    example.write_text(re.search(r"```bash\n(#!.*?)```", DOCS, re.DOTALL)[1])
    for script in (SCRIPT, example):
        subprocess.run(["bash", "-n", script], check=True)
        if shutil.which("shellcheck"):
            subprocess.run(["shellcheck", "--exclude=SC1091", script], check=True)
    assert os.access(SCRIPT, os.X_OK)


def test_create_is_one_command():
    (create,) = shown("create", "--type=v5litepod-16", "--spot", "--project=mine")
    assert create == [
        *("gcloud", "compute", "tpus", "queued-resources", "create", "psec"),
        *("--zone=us-west4-a", "--project=mine", "--node-id=psec"),
        *("--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite"),
        *("--scopes=cloud-platform", "--spot"),
    ]
    (plain,) = shown("create", "--type=x-1", "--runtime=y")
    assert "--runtime-version=y" in plain and "--spot" not in plain


def test_watch_stop_and_delete_word_for_word():
    ssh = ("gcloud", "compute", "tpus", "tpu-vm", "ssh", *WHERE)
    assert shown("watch") == [
        [*QUEUED, "describe", *WHERE, "--format=value(state.state)"],
        [*ssh, "--worker=0", "--command=tail -n 50 -F psec_jax/run.log"],
    ]
    assert shown("stop") == [
        [*ssh, "--worker=all", "--command=pkill -TERM -F psec_jax/run.pid"]
    ]
    assert shown("delete") == [[*QUEUED, "delete", *WHERE, "--force", "--quiet"]]


def test_setup_copies_installs_and_mounts():
    wait, pack, copy, *installs = shown("setup", "--bucket=gs://my-bucket")
    ask = [*QUEUED, "describe", *WHERE, "--format=value(state.state)"]
    assert wait == ["until:", *ask, "is", "ACTIVE"]
    assert pack[0] == "bash" and "git ls-files" in pack[2]
    assert copy[3:5] == ["tpu-vm", "scp"] and "psec:psec_jax.tgz" in copy
    steps = [remote(words) for words in installs]
    assert all(worker == "--worker=all" for worker, _ in steps)
    text = "\n".join(step for _, step in steps)
    assert "-r requirements.txt -e '.[tpu]'" in text.replace('"', "'")
    assert re.search(r"gcsfuse --metadata-cache-ttl-secs=0 my-bucket /mnt/bucket", text)
    assert len(shown("setup")) == len(installs) + 3 - 2
    for _, step in steps:
        subprocess.run(["bash", "-n", "-c", step], check=True)


def test_resume_makes_the_slice_anew():
    flags = ("--type=v6e-8", "--spot", "--bucket=b")
    ask, *resume = shown("resume", *flags, *SLICE, "--dry_run", *RUN)
    assert ask == [*QUEUED, "describe", *WHERE, "--format=value(state.state)"]
    parts = [shown("delete"), shown("create", *flags), shown("setup", *flags)]
    parts.append(shown("run", *SLICE, "--dry_run", *RUN))
    assert resume == [words for part in parts for words in part]


@pytest.mark.parametrize(
    ("states", "changes"),
    [
        ("NOT_FOUND WAITING_FOR_RESOURCES ACTIVE", ["create psec"]),
        ("SUSPENDED PROVISIONING ACTIVE", ["delete psec", "create psec"]),
        ("FAILED ACTIVE", ["delete psec", "create psec"]),
        ("WAITING_FOR_RESOURCES PROVISIONING ACTIVE", []),
        ("ACCEPTED ACTIVE", []),
    ],
)
def test_resume_by_state(queue, states, changes):
    """Only a slice that is dead is deleted; one in the queue keeps its place."""
    (queue / "states").write_text(states.replace(" ", "\n") + "\n")
    answer = pod("resume", *SLICE, "--type=v6e-8", *RUN)
    assert answer.returncode == 0, answer.stderr
    asked = (queue / "asked").read_text().splitlines()
    archive = next(line for line in asked if line.startswith("scp "))
    assert re.fullmatch(rf"scp {queue}/psec_jax-\w{{6}}\.tgz", archive)  # of mktemp
    assert asked == [*changes, archive, *["ssh psec"] * 4]
    assert (queue / "states").read_text() == ""


@pytest.mark.parametrize(
    ("states", "flags", "message"),
    [
        ("", ["--type=v6e-8"], "You do not have permission\nerror: slice psec: its st"),
        (
            "DELETING",
            ["--type=v6e-8"],
            "slice psec is DELETING; resume when it is gone",
        ),
        ("SUSPENDED", [], "resume needs --type"),
        ("WAITING_FOR_RESOURCES", [], "You do not have permission"),
    ],
)
def test_resume_deletes_nothing_that_it_cannot_replace(queue, states, flags, message):
    (queue / "states").write_text(states + "\n")
    answer = pod("resume", *SLICE, *flags, *RUN)
    assert answer.returncode != 0 and message in answer.stderr
    assert not (queue / "asked").exists()


def test_run_and_stop(workers):
    """One run at a time, apart from the connection, with every word as it was given."""
    refused = pod("run", *SLICE, *RUN)
    assert refused.returncode == 1 and "/mnt/bucket is not mounted" in refused.stderr
    (workers.parents[1] / "mounted").touch()
    started = pod("run", *SLICE, *RUN)
    assert started.returncode == 0, started.stderr
    assert started.stdout.startswith("+ gcloud compute tpus tpu-vm ssh psec ")
    for _ in range(100):
        if (workers / "run.log").read_text():
            break
        subprocess.run(["sleep", "0.1"], check=True)
    words = ("-m", *RUN[1:])
    assert (workers / "run.log").read_text() == "".join(f"<{word}>" for word in words)
    again = pod("resume", *SLICE, *RUN)
    assert again.returncode == 1 and "a run is going here" in again.stderr
    assert "delete" not in again.stdout
    assert pod("stop", *SLICE).returncode == 0


def test_setup_gives_up_on_a_slice_that_will_not_come(workers, monkeypatch):
    monkeypatch.setenv("STATE", "SUSPENDED")
    answer = pod("setup", *SLICE)
    assert answer.returncode == 2 and "slice psec is SUSPENDED" in answer.stderr
    assert "scp" not in answer.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "got '', expected create, setup"),
        (["start"], "got 'start', expected create, setup"),
        (["create", *SLICE], "create needs --type"),
        (["create", *SLICE, "--type=v9-1"], "give its software too"),
        (["create", "--name=a", "--type=v4-8"], "create needs --zone"),
        (["create", "--name=", "--zone=z"], "got '--name='"),
        (["run", *SLICE], "run needs -- launch.COMMAND"),
        (["run", *SLICE, *RUN[:-2]], "run needs -- launch.COMMAND"),
        (["run", *SLICE, *RUN, "--workdir=runs/a"], "expected a folder in /mnt/bucket"),
        (["run", *SLICE, *RUN, "--data=gs://a/b"], "expected a folder in /mnt/bucket"),
        (["watch", *SLICE, "--dryrun"], "got '--dryrun'"),
    ],
)
def test_bad_input_of_the_tpu_script(workers, arguments, message):
    answer = pod(*arguments)
    assert answer.returncode == 2 and answer.stdout == ""
    assert answer.stderr.startswith("error: ") and answer.stderr.count("\n") == 1
    assert message in answer.stderr


def test_buckets_are_not_taken_for_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    answer = call("launch.library", "list", "--library=gs://bucket/lib")
    assert answer.code == 2 and "--library=gs://bucket/lib: a bucket" in answer.err
    assert not (ROOT / "gs:").exists()


def test_container_file():
    """Every file it copies is there and reaches the build; it ends without root."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    steps = [line.split(maxsplit=1) for line in text.splitlines() if line[:1].isupper()]
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    ignored = [line for line in ignored if line and line[0] != "#"]
    needed = ["requirements.txt", "setup.py", "pyproject.toml", "README.md", "LICENSE"]
    needed += ["psec_jax", "experiments", "launch"]
    for name in needed:
        assert (ROOT / name).exists()
        assert not any(fnmatch(name, pattern) for pattern in ignored), name
    for secret in (".git", ".venv", "runs", "results"):
        assert any(fnmatch(secret, pattern) for pattern in ignored), secret
    sources = [w for step, rest in steps if step == "COPY" for w in rest.split()[:-1]]
    assert sources == ["requirements.txt", "."]
    assert steps[0] == ["FROM", "python:3.11-slim-bookworm"]
    users = [rest for step, rest in steps if step == "USER"]
    assert users == ["psec"]
    assert any("--requirement /tmp/requirements.txt" in " ".join(s) for s in steps)


def test_the_page_names_what_is_there():
    for path in re.findall(
        r"\b(?:launch|experiments|docs)/[\w/.]+\.(?:py|sh|md)", DOCS
    ):
        assert (ROOT / path).is_file(), path
    for module in re.findall(r"\blaunch\.([a-z]+)\b", DOCS):
        assert (ROOT / "launch" / f"{module}.py").is_file(), module
    for extra in re.findall(r"psec_jax\[(\w+)\]", DOCS):
        assert f'"{extra}": [' in (ROOT / "setup.py").read_text(encoding="utf-8")
