"""The commands end to end on dm_control's walker, with budgets of a few steps."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import jax
import numpy as np
import pytest
import short
import stages
from shell import call

from experiments import grid, results, table2
from experiments.configs.dmc_walker import get_config
from psec_jax import tree
from psec_jax.data import d4rl, dataset
from psec_jax.errors import InputError, Stopped
from psec_jax.library import SkillLibrary, _sealed
from psec_jax.policy import compose
from psec_jax.runtime import loop
from psec_jax.runtime.loop import train
from psec_jax.types import Dataset
from psec_jax.workflows import Job, demonstrations
from psec_jax.workflows.collection import collect
from psec_jax.workflows.demonstrations import FIRST, load_demos

ROOT = Path(__file__).parents[1]
BASE, SKILL = "dm_control:walker-stand", "dm_control:walker-walk"
TINY = {
    "network.width": 16,
    "network.blocks": 1,
    "base.episodes": 2,
    "base.steps": 2,
    "base.batch_size": 8,
    "skill.episodes": 2,
    "skill.steps": 2,
    "skill.batch_size": 8,
    "gate.steps": 2,
    "gate.batch_size": 8,
    "gate.widths": (8,),
    "support.queries": 64,
    "support.steps": 2,
    "evaluation.episodes": 1,
    "run.log_every": 1,
    "run.save_every": 1,
}
FLAGS = tuple(f"--config.{name}={value}" for name, value in TINY.items())


def tiny(**changes):
    """The quick preset with tiny budgets."""
    config = get_config("quick")
    config.update_from_flattened_dict(TINY | changes)
    return config


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    """A folder to work in, where data is collected too."""
    folder = tmp_path_factory.mktemp("commands")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PSEC_DATA_DIR", str(folder / "data"))
        patch.setenv("PYTHONPATH", os.path.dirname(short.__file__))
        (folder / "experiments").symlink_to(ROOT / "experiments")
        yield folder


@pytest.fixture(scope="module")
def stand(place):
    """Two demonstrations of the base's task."""
    return str(collect(BASE, "expert", 2, seed=0))


@pytest.fixture(scope="module")
def walk(place):
    """Two demonstrations of the skill's task."""
    return str(collect(SKILL, "expert", 2, seed=1))


@pytest.fixture(scope="module")
def library(stand, walk):
    """A library with a base and the skills walk and run, made without evaluation."""
    run = short.SPEC.format("run")
    options = {"library": "lib", "seed": 0, "evaluate": False}
    stages.pretrain(tiny(), workdir="lib_base", data=stand, **options)
    for name, env, data in (
        ("walk", SKILL, walk),
        ("run", run, str(collect(run, "random", 2, seed=2))),
    ):
        stages.expand(
            tiny(), workdir=f"lib_{name}", name=name, env=env, data=data, **options
        )
    return SkillLibrary.open("lib")


def done(module, *arguments):
    """What a command printed; it must succeed."""
    answer = call(module, *arguments)
    assert answer.code == 0, answer.err
    return answer.out


def numbers(root, kind, name):
    """Every array of one entry of a library."""
    library = SkillLibrary.open(root)
    load = {"base": library.load_base, "skill": library.load_skill}
    loaded = load[kind]() if kind == "base" else load[kind](name)
    return tree.flatten(loaded[0])


def metrics(workdir):
    """The lines of a run's metrics."""
    text = Path(workdir, "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def assert_equal(left, right):
    assert left.keys() == right.keys()
    for path in left:
        np.testing.assert_array_equal(left[path], right[path], err_msg=path)


def test_main_job(stand, walk):
    common = (*FLAGS, "--library=main")
    base = (*common, "--workdir=base", f"--data={stand}", "--noevaluate")
    assert done("launch.pretrain", *base) == "base 'base' is in main\n"

    skill = (*common, "--workdir=walk", "--name=walk", f"--env={SKILL}")
    out = done("launch.expand", *skill, f"--data={walk}")
    assert out.startswith("skill 'walk' is in main; return ")
    assert out.endswith(f"in {SKILL} (1 episode)\n")

    gate = (*common, "--workdir=gate", "--name=gate", "--skills=walk")
    out = done("launch.compose", *gate, f"--data={walk}", "--noevaluate")
    assert out == "gate 'gate' is in main\n"

    evaluate = ("launch.evaluate", "--library=main", f"--env={SKILL}", "--gate=gate")
    out = done(*evaluate, "--episodes=1", "--out=returns/gate.json")
    found = json.loads(Path("returns/gate.json").read_text())
    assert len(found["returns"]) == 1 and found["lengths"] == [1000]
    assert found["env"] == SKILL and 0 < found["mean"] < 1000
    assert f"return mean {found['mean']:.1f}" in out

    listed = done("launch.library", "list", "--library=main").splitlines()
    assert [line.split()[:2] for line in listed[1:]] == [
        ["base", "base"],
        ["skill", "walk"],
        ["gate", "gate"],
    ]
    shown = done("launch.library", "show", "walk", "--library=main")
    assert "rank" in shown and "walker-walk" in shown and "input/a" in shown
    assert "3 entries" in done("launch.library", "verify", "--library=main")
    done("launch.library", "remove", "gate", "--library=main")
    done("launch.library", "remove", "walk", "--library=main")
    assert SkillLibrary.open("main").entries() == [("base", "base")]

    again = call("launch.expand", *skill, f"--data={walk}", "--noevaluate")
    assert again.code == 0 and "resumed at step 2" in again.err
    assert SkillLibrary.open("main").skills() == ["walk"]


def test_run_folder(library):
    for name in ("config.json", "versions.json", "metrics.jsonl", "result.json"):
        assert Path("lib_walk", name).is_file()
    lines = metrics("lib_walk")
    assert [line["step"] for line in lines] == [1, 2]
    assert "loss/skill" in lines[0] and "grad/norm" in lines[0]
    assert list(Path("lib_walk/events").glob("events.out.tfevents.*"))
    card = library.card("skill", "walk")
    assert (
        card["config"] == json.loads(Path("lib_walk/config.json").read_text())["config"]
    )
    assert card["data"]["trajectories"] == 2 and card["steps"] == 2


FIXED = {"parameter": (8.0, 8.0), "noise": (0.0, 0.5, 0.5), "action": (1.0, 0.0, 0.0)}


@pytest.mark.parametrize(
    ("level", "head", "support"),
    [
        ("parameter", "constant", "neighbour"),
        ("parameter", "linear", "learned"),
        ("noise", "linear", "none"),
        ("noise", "constant", "nearest"),
        ("action", "constant", "none"),
        ("action", "softmax", "neighbour"),
    ],
)
def test_compositions(library, stand, walk, quick_starts, level, head, support):
    name = f"{level}-{head}-{support}"
    run = library.card("skill", "run")["data"]["source"]
    changes = {"gate.level": level, "gate.head": head, "gate.support": support}
    result = stages.compose(
        tiny(**changes),
        workdir=f"lib_{name}",
        library="lib",
        seed=0,
        name=name,
        skills=["walk", "run"],
        env=short.SPEC.format("walk"),
        data=walk,
        support_data=[walk, f"data/{run}"] if support != "none" else (),
        base_data=stand,
        alpha=FIXED[level] if head == "constant" else None,
    )
    assert len(result["returns"]["returns"]) == 1
    assert result["returns"]["lengths"] == [short.STEPS]
    params, card = library.load_gate(name)
    assert card["level"] == level and card["returns"] == result["returns"]
    assert ("support" in params) == (support != "none")
    assert (result["summary"] is None) == (head == "constant")


def composed(name, walk, **fields):
    """The card of a gate made without evaluation, its parameters and its result."""
    changes = {k: fields.pop(k) for k in list(fields) if "." in k}
    result = stages.compose(
        tiny(**changes),
        workdir=f"lib_{name}",
        library="lib",
        seed=0,
        name=name,
        data=walk,
        evaluate=False,
        **fields,
    )
    params, card = SkillLibrary.open("lib").load_gate(name)
    return params, card, result


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("head", ["topk", "topp"])
def test_the_load_of_a_gate_is_reported(library, walk, head, per_layer):
    form = ("gate.head", head), ("gate.per_layer", per_layer), ("gate.temperature", 2.0)
    options = {"skills": ["walk", "run"], "env": SKILL, **dict(form)}
    name = f"{head}-{per_layer}"
    _, card, result = composed(name, walk, **options)
    load = card["load"]
    assert result["load"] == load and load["states"] == card["data"]["transitions"]
    obs = d4rl.load(walk)[0].obs
    alpha = np.asarray(compose("lib", gate=name).alpha(obs)).reshape(-1, 2)
    for k, one in enumerate(load["skills"].values()):
        assert one["active"] == pytest.approx(np.mean(alpha[:, k] != 0))
        assert one["weight"] == pytest.approx(np.mean(alpha[:, k]), rel=1e-4)
    assert load["active"] == pytest.approx(np.mean((alpha != 0).sum(1)))
    assert head == "topp" or load["active"] == 1
    # The finished run says it again.
    flags = (f"--config.{field}={value}" for field, value in form)
    flags = (*FLAGS, *flags, "--library=lib", f"--workdir=lib_{name}", "--noevaluate")
    flags += (f"--name={name}", "--skills=walk,run", f"--env={SKILL}", f"--data={walk}")
    quick = "--config=experiments/configs/dmc_walker.py:quick"
    printed = done("launch.compose", quick, *flags).splitlines()
    assert printed[1].startswith(f"active on the {len(obs)} states of the")
    assert f"{load['active']:.2f} of 2 weights" in printed[1]
    assert [line.split()[0] for line in printed[2:]] == ["weight", "walk", "run"]


@pytest.mark.parametrize("head", ["linear", "constant"])
def test_layers_with_weights_of_their_own_act(library, walk, head):
    alpha = list(np.arange(12.0)) if head == "constant" else None
    form = ("gate.head", head), ("gate.per_layer", True)
    options = {"skills": ["walk", "run"], "env": SKILL, "alpha": alpha, **dict(form)}
    params, card, _ = composed(f"layers-{head}", walk, **options)
    assert card["gate"]["layers"] == 6 and card["load"] is None
    policy = compose("lib", gate=f"layers-{head}")
    obs = d4rl.load(walk)[0].obs[:3]
    assert policy.alpha(obs).shape == (3, 6, 2)
    assert np.isfinite(policy.act(jax.random.key(0), obs)).all()
    if head == "constant":
        rows = np.arange(12.0).reshape(6, 2)
        np.testing.assert_array_equal(policy.alpha(obs[0]), rows)
        by_hand = compose("lib", ["walk", "run"], alpha=rows)
        key = jax.random.key(0)
        np.testing.assert_array_equal(by_hand.act(key, obs), policy.act(key, obs))


@pytest.mark.parametrize(
    ("rows", "level", "words"),
    [
        (np.ones((6, 3)), "parameter", "alpha: got 3 weights for 2 skills"),
        (np.ones((5, 2)), "parameter", "alpha: has weights for 5 layers, the base has"),
        (np.ones((0, 2)), "parameter", "alpha: got float64 of shape (0, 2)"),
        (np.ones((1, 6, 2)), "parameter", "alpha: got float64 of shape (1, 6, 2)"),
        (np.full((6, 2), np.nan), "parameter", "expected finite numbers"),
        (np.ones((6, 3)), "noise", "alpha: got weights of shape (6, 3) at the noise"),
    ],
)
def test_weights_of_layers_that_do_not_fit(library, rows, level, words):
    with pytest.raises(InputError, match=re.escape(words)):
        compose("lib", ["walk", "run"], alpha=rows, level=level)


@pytest.mark.parametrize("support", ["none", "neighbour", "learned"])
def test_a_gate_is_grown_by_a_skill(library, stand, walk, support):
    run = f"data/{library.card('skill', 'run')['data']['source']}"
    form = {"gate.support": support}
    data = {"support_data": [walk], "base_data": stand} if support != "none" else {}
    old, before, _ = composed(f"old-{support}", walk, skills=["walk"], **data, **form)
    data |= {"support_data": [run] if support == "neighbour" else [walk, run]}
    options = {"skills": ["walk", "run"], "start": f"old-{support}", **form}
    options |= data if support != "none" else {}
    # A rate so small that the head stays where it starts.
    new, card, _ = composed(
        f"new-{support}", walk, **options, **{"gate.learning_rate": 1e-30}
    )
    assert card["start"] == {n: before[n] for n in ("name", "fingerprint")}
    kept = np.asarray(new["head"]["output"]["kernel"])
    np.testing.assert_array_equal(kept[:, :1], old["head"]["output"]["kernel"])
    for path, leaf in tree.flatten(old.get("support", {})).items():
        grown = np.asarray(tree.flatten(new["support"])[path])
        assert len(grown) == 2
        cut = tuple(slice(n) for n in np.shape(leaf))
        np.testing.assert_array_equal(grown[cut], leaf, err_msg=path)
    obs = d4rl.load(walk)[0].obs
    got = np.asarray(compose("lib", gate=f"new-{support}").alpha(obs))
    expected = np.asarray(compose("lib", gate=f"old-{support}").alpha(obs))
    np.testing.assert_allclose(got[:, :1], expected, rtol=1e-5, atol=1e-6)
    assert np.abs(got[:, 1]).max() < 1e-20


def test_a_gate_without_the_newer_fields_loads_and_resumes(library, walk):
    """As an older version wrote its card and its run."""
    _, card, first = composed("older", walk, skills=["walk"])
    path = Path("lib/gates/older/gate.json")
    content = json.loads(path.read_text())
    newer = {"top_p", "temperature", "layers", "load", "start"}
    assert newer - {"load", "start"} <= content["gate"].keys()
    content["gate"] = {k: v for k, v in content["gate"].items() if k not in newer}
    content = {k: v for k, v in content.items() if k not in newer}
    recorded = content["config"]["gate"].keys()
    assert not recorded & {"top_p", "temperature", "per_layer"}
    obs, key = d4rl.load(walk)[0].obs[:4], jax.random.key(0)
    expected = compose("lib", gate="older")
    path.write_text(json.dumps(_sealed(content)))
    got = compose("lib", gate="older")
    np.testing.assert_array_equal(got.alpha(obs), expected.alpha(obs))
    np.testing.assert_array_equal(got.act(key, obs), expected.act(key, obs))
    assert composed("older", walk, skills=["walk"])[2] == first


def test_demonstrations_a_support_are_collected_again(library, walk, monkeypatch):
    asked = []

    def collected(config, env, episodes, path, selection, with_costs=False):
        asked.append((env, episodes, path, selection))
        return load_demos(config, env, episodes, path or walk, selection, with_costs)

    monkeypatch.setattr(demonstrations, "load_demos", collected)
    changes = {"gate.head": "constant", "gate.support": "neighbour"}
    stages.compose(
        tiny(**changes),
        workdir="lib_again",
        library="lib",
        seed=0,
        name="again",
        skills=["walk"],
        evaluate=False,
    )
    # Those of the target are the same, and are there already.
    assert asked == [(SKILL, 2, None, FIRST)]


def test_the_best_trajectories_by_flag(library, walk):
    ds, _ = d4rl.load(walk)
    slices = dataset.episode_slices(ds)
    returns = np.array([3.0, 1.0, 2.0, 0.5])
    rows = np.concatenate(
        [np.arange(slices[i % 2].start, slices[i % 2].stop) for i in range(4)]
    )
    many = Dataset(*(column[rows] for column in ds))
    for i, part in enumerate(dataset.episode_slices(many)):
        many.reward[part] = returns[i] / (part.stop - part.start)
        many.obs[part] += 1e-3 * i
    d4rl.save("many.hdf5", many, {})
    mine = (*FLAGS, "--library=lib", f"--env={SKILL}", "--data=many.hdf5", "--best")
    mine += ("--noevaluate", "--workdir=lib_best")
    answer = call("launch.expand", *mine, "--name=best", "--min_return=2.5")
    assert answer.code == 2
    assert "asked for 2 trajectories, many.hdf5 has 1 with return >= 2.5" in answer.err
    done("launch.expand", *mine, "--name=best")
    data = library.card("skill", "best")["data"]
    assert data["trajectories"] == 2
    assert data["return_mean"] == pytest.approx(2.5)
    assert data["selection"] == {"best": True, "min_return": None}
    # The support takes the same trajectories of the file again.
    support = ("--config.gate.head=constant", "--config.gate.support=neighbour")
    support += ("--skills=best", "--support_data=many.hdf5", "--workdir=lib_support")
    done("launch.compose", *mine, "--name=best-support", *support)


def test_a_stopped_stage_goes_on_to_the_same_result(library, stand, monkeypatch):
    def stopped_at_2(*arguments, **options):
        def stop(step, states):
            if step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

        return train(*arguments, **options, on_save=stop)

    config = tiny(**{"base.steps": 4})
    options = {"seed": 0, "data": stand, "evaluate": False}
    stages.pretrain(config, workdir="whole", library="whole_lib", **options)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train", stopped_at_2)
        with pytest.raises(Stopped, match="stopped by SIGTERM at step 2"):
            stages.pretrain(config, workdir="halves", library="halves_lib", **options)
    assert not Path("halves/result.json").exists()
    assert not Path("halves_lib/base").exists()
    result = stages.pretrain(config, workdir="halves", library="halves_lib", **options)
    assert result["summary"]["resumed_at"] == 2
    assert_equal(numbers("halves_lib", "base", ""), numbers("whole_lib", "base", ""))
    left, right = metrics("halves"), metrics("whole")
    for a, b in zip(left, right, strict=True):
        assert a["step"] == b["step"] and a["loss/base"] == b["loss/base"]


def test_a_finished_stage_is_not_run_again(library, walk, monkeypatch):
    def never(*arguments, **options):
        raise AssertionError("trained again")

    versions = Path("lib_walk/versions.json")
    versions.write_text("{}")
    monkeypatch.setattr(loop, "train", never)
    options = {"seed": 0, "name": "walk", "env": SKILL, "evaluate": False}
    result = stages.expand(
        tiny(), workdir="lib_walk", library="lib", data=walk, **options
    )
    assert result["summary"]["steps"] == 2 and result["library"] == "lib"
    assert versions.read_text() == "{}", "these are the versions that made it"


def test_a_changed_config_is_refused_by_field(library, walk):
    with pytest.raises(InputError) as caught:
        stages.expand(
            tiny(**{"skill.rank": 4, "skill.learning_rate": 1e-4}),
            workdir="lib_walk",
            library="lib",
            seed=0,
            name="walk2",
            env=SKILL,
            data=walk,
        )
    for words in (
        'config.name: got "walk2", the run has "walk"',
        "config.skill.rank: got 4, the run has 8",
        "config.skill.learning_rate: got 0.0001, the run has 0.001",
    ):
        assert words in str(caught.value)


def test_own_data_and_environment_by_flag(place):
    env = "--env=gymnasium:HalfCheetah-v5"
    collected = ("--policy=random", "--episodes=1", "--out=cheetah.hdf5", "--workers=1")
    out = done("experiments.tools.collect", env, *collected)
    assert out.startswith("cheetah.hdf5: 1 episode, return mean ")
    with h5py.File("cheetah.hdf5") as file:
        assert file["observations"].shape == (1000, 17)
        assert np.abs(file["actions"][()]).max() <= 1
    mine = (*FLAGS, "--library=cheetah", env, "--data=cheetah.hdf5", "--noevaluate")
    everything = ("--config.base.episodes=0", "--config.skill.episodes=0")
    done("launch.pretrain", *mine, *everything, "--workdir=cheetah_base")
    done("launch.expand", *mine, *everything, "--workdir=cheetah_hop", "--name=hop")
    card = SkillLibrary.open("cheetah").card("skill", "hop")
    assert (card["obs_dim"], card["action_dim"]) == (17, 6)
    assert card["env"] == env.removeprefix("--env=")
    assert card["data"]["trajectories"] == 1
    evaluate = ("launch.evaluate", "--library=cheetah", env, "--skills=hop")
    assert "1 episode in gymnasium:HalfCheetah-v5" in done(*evaluate, "--episodes=1")


def test_table(place, quick_starts, monkeypatch):
    monkeypatch.setattr(table2, "ENV", short.SPEC)
    settings = {
        "S->W": table2.target("walk", "walk"),
        "S+W->R": table2.target("run", "run", "walk"),
    }
    table = dataclasses.replace(table2.TABLE, settings=settings)
    monkeypatch.setattr(table2, "TABLE", table)
    # The base alone, and one other choice.
    few = {key: (weights[0], weights[-1]) for key, weights in table2.GRIDS.items()}
    monkeypatch.setattr(table2, "GRIDS", few)
    methods = ("Base", "Scratch", "PSEC", "ASEC fixed")
    config = tiny(
        **{
            "base.env": short.SPEC.format("stand"),
            "data.policy": "random",
            "table.seeds": (0,),
            "table.tuning_episodes": 1,
        }
    )
    job, lines = Job.from_dict(config.to_dict()), []
    arguments = (table, job, Path("table"), Path("results"), lines.append)
    grid.run(*arguments, methods=methods)
    assert len(lines) == 8 and lines[0].startswith("S->W Base seed 0: return")
    text = table2.write_table(Path("results"))
    summary = json.loads(Path("results/table2.json").read_text())["cells"]
    assert list(summary) == ["S->W", "S+W->R"]
    for setting in summary.values():
        assert set(setting) == set(methods)
        for entry in setting.values():
            assert entry["return"]["low"] <= entry["return"]["mean"]
            assert entry["return"]["mean"] <= entry["return"]["high"]
            assert entry["seeds"] == [0] and entry["episodes"] == 1
    assert Path("results/table2.md").read_text() == text and "| PSEC |" in text
    assert Path("results/table2.csv").read_text().count("\n") == 9
    tables = ("experiments.table2", "--tables_only", "--results=results")
    assert done(*tables) == text + "\n"
    raws = results.by_key("results/table2.jsonl")
    fixed = raws["S+W->R", "ASEC fixed", 0]
    tried = [one["alpha"] for one in fixed["tried"]]
    assert tried == [list(weights) for weights in few["shares", 2]]
    assert fixed["alpha"] in tried and tried[0] == [1, 0, 0]
    best = max(fixed["tried"], key=lambda one: (one["mean"], one["alpha"]))
    assert fixed["alpha"] == best["alpha"]
    tuning = results.by_key("table/tuning.jsonl")
    starts = {raw["evaluation_seed"] for raw in tuning.values()}
    assert starts == {job.evaluation.seed + 1}, "from other start states"
    assert raws["S->W", "PSEC", 0]["budget"].keys() == {"base", "skill", "gate"}

    def fail(cell):
        raise AssertionError(f"{cell.method} is made again")

    again = {
        name: dataclasses.replace(m, make=fail) for name, m in table.methods.items()
    }
    unmade = dataclasses.replace(table, methods=again)
    grid.run(unmade, *arguments[1:], methods=methods)
    assert len(lines) == 8, "finished results are kept"


def test_a_process(library):
    """One command as a real process: what every other test here takes for granted."""
    command = [sys.executable, "-m", "launch.library", "verify", "--library=lib"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    answer = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert answer.returncode == 0 and answer.stderr == ""
    assert "every file matches its hash" in answer.stdout


def test_demo_starts_from_nothing():
    """Committed cells would be taken for done: the demo writes where none can be."""
    answer = call("experiments.demo", "--help")
    folders = re.findall(r"default: (\S+)\)", answer.out)
    assert len(folders) == 2 and all(f.startswith("runs/") for f in folders)
    root = Path(__file__).parents[1]
    assert "runs/" in (root / ".gitignore").read_text().split()
