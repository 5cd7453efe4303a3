"""Safe tasks end to end in a real simulator: a set is made, learned from, tabulated."""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import shell

from experiments import grid, results, table1, tables
from experiments.configs import dsrl as config
from experiments.tools.collect_safe import NOISES, actors, collect_safe
from psec_jax.data import dataset, dsrl
from psec_jax.errors import InputError
from psec_jax.workflows import collection as collect
from psec_jax.workflows.demonstrations import Selection

TASK = "OfflineBallRun-v0"
ROOT = Path(__file__).resolve().parent.parent
CONFIG = f"--config={ROOT}/experiments/configs/dsrl.py:quick"
ALL = {"max_cost": 200.0, "most": 12}  # of a set that keeps every episode
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("pybullet") is None, reason="run: make setup-safe"
)


def write_policy(path: Path, drive: float) -> None:
    """A policy that always gives about the same push."""
    entry = dsrl.task(TASK)
    hidden = np.zeros((entry.obs_dim, 4), np.float32)
    head = np.array([drive] + [0.0] * (entry.action_dim - 1), np.float32)
    np.savez(
        path,
        **{
            "layer_0/kernel": hidden,
            "layer_0/bias": np.zeros(4, np.float32),
            "head/kernel": np.zeros((4, entry.action_dim), np.float32),
            "head/bias": head,
            "obs_mean": np.zeros(entry.obs_dim, np.float32),
            "obs_std": np.ones(entry.obs_dim, np.float32),
        },
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A set of 12 trajectories by a slow and a fast policy, and where it lies."""
    folder = tmp_path_factory.mktemp("safe")
    write_policy(folder / "fast.npz", 3.0)
    write_policy(folder / "slow.npz", 0.1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PSEC_DATA_DIR", str(folder / "data"))
        patch.setenv("DSRL_DATASET_DIR", str(folder / "official"))
        collect_safe(TASK, 12, seed=0, policies=folder, **ALL)
    return folder


@pytest.fixture
def place(made, monkeypatch, tmp_path):
    monkeypatch.setenv("PSEC_DATA_DIR", str(made / "data"))
    monkeypatch.setenv("DSRL_DATASET_DIR", str(made / "official"))
    monkeypatch.chdir(tmp_path)
    return made


def test_collected_set(place, monkeypatch):
    ds, attrs = dsrl.load(TASK, offline=True)
    assert len(dataset.episode_slices(ds)) == 12
    assert attrs["made_by"] == "psec_jax" and attrs["task"] == TASK
    names = json.loads(attrs["policies"])
    assert names[:2] == ["fast + noise 0", "slow + noise 0"]
    assert names[6:] == [
        "fast then slow + noise 0.1",
        "slow then fast + noise 0.1",
    ]
    assert len(names) == 2 * len(NOISES["bullet"]) + 2
    returns, costs = dataset.episode_returns(ds), dataset.episode_costs(ds)
    np.testing.assert_allclose(returns, attrs["returns"])
    # The fast one runs beyond the speed limit, the slow one does not, and one that
    # hands over lies between.
    assert costs[0] > costs[6] > costs[1] and returns[0] > returns[6] > returns[1]
    again = collect_safe(TASK, 12, seed=0, policies=place, **ALL)
    assert again == dsrl.find(TASK, offline=True).path
    with pytest.raises(InputError, match="holds another collection"):
        collect_safe(TASK, 3, seed=0, policies=place, **ALL)
    monkeypatch.setenv("PSEC_DATA_DIR", str(Path.cwd() / "one"))
    collect_safe(TASK, 12, seed=0, policies=place, workers=1, **ALL)
    one, _ = dsrl.load(TASK, offline=True)
    assert dataset.fingerprint(one) == dataset.fingerprint(ds)


def test_handovers():
    """Drivers of MetaDrive take over early: the fast ones arrive after 250 steps."""
    first, second = (lambda obs, generator, a=a: np.array([a]) for a in (1, 2))
    for seed in range(20):
        act = collect._handover(first, second, 3)
        played = [
            int(act(np.zeros(1), np.random.default_rng(seed))[0]) for _ in range(4)
        ]
        assert played[0] == 1 and played[3] == 2 and played == sorted(played)
    chosen = actors("metadrive:easysparse")
    handovers = [actor for actor in chosen if actor.then]
    assert len(handovers) == 24 and len(chosen) == 48
    assert all(actor.within == 0.25 for actor in handovers)


def test_other_policies_of_the_same_names_are_another_collection(place, tmp_path):
    folder = tmp_path / "others"
    folder.mkdir()
    for name, other in (("fast", "slow"), ("slow", "fast")):
        (folder / f"{name}.npz").write_bytes((place / f"{other}.npz").read_bytes())
    with pytest.raises(InputError, match="policies_sha256"):
        collect_safe(TASK, 12, seed=0, policies=folder, **ALL)


def test_costly_and_crowded_trajectories_are_left_out(place, monkeypatch):
    whole, _ = dsrl.load(TASK, offline=True)
    monkeypatch.setenv("PSEC_DATA_DIR", str(Path.cwd() / "bounded"))
    collect_safe(TASK, 12, seed=0, policies=place, max_cost=10, most=1)
    ds, attrs = dsrl.load(TASK, offline=True)
    costs = dataset.episode_costs(ds)
    assert max(costs) <= 10 < max(dataset.episode_costs(whole))
    assert len(costs) < (dataset.episode_costs(whole) <= 10).sum()
    assert len(attrs["policy_of_episode"]) == len(costs)
    with pytest.raises(InputError, match="none of 1 episodes costs 0 or less"):
        collect_safe(TASK, 1, seed=0, policies=place, max_cost=0, overwrite=True)


VERSIONS = {"cores": 1, "cpu": "a processor", "jax": "1"}


def test_refusals(place, tmp_path):
    with pytest.raises(InputError, match="unknown DSRL task 'OfflineLuck-v0'"):
        collect_safe("OfflineLuck-v0", 1, seed=0)
    with pytest.raises(InputError, match="no policy"):
        actors("bullet:SafetyBallRun-v0", tmp_path)
    with pytest.raises(InputError, match="episodes is 0"):
        collect_safe(TASK, 0, seed=0)
    answer = shell.call("experiments.table1", "--suite=luck")
    assert answer.code == 2 and "unknown suite 'luck'" in answer.err
    answer = shell.call("experiments.table1", f"--tasks={TASK}", "--cost_limit=-1")
    assert answer.code == 2 and "cost limit" in answer.err.replace("_", " ")
    answer = shell.call("experiments.table1", "--tables_only", "--results=none")
    assert answer.code == 2 and answer.err.count("\n") == 1
    raw = {"setting": TASK, "method": "BC", "seed": 0, "cost_limit": 10.0}
    raw |= {"data": "made", "returns": [1.0], "costs": [1.0], "preset": "quick"}
    raw |= {"budget": {}, "config_fingerprint": "0", "versions": VERSIONS}
    results.append(tmp_path / "some" / "table1.jsonl", raw)
    flags = ("--tables_only", f"--results={tmp_path / 'some'}", "--cost_limit=-1")
    answer = shell.call("experiments.table1", *flags)
    assert answer.code == 2 and "cost limit: got -1" in answer.err


def test_table1(place, quick_starts, monkeypatch):
    sizes = {"steps": 2, "batch_size": 8}
    parts = ("base", "critics", "skill", "gate")
    job = config.job("quick").changed(
        {"network.width": 16, "network.blocks": 1, "network.time_features": 8}
        | {"network.time_width": 8, "critics.widths": (8,), "evaluation.episodes": 2}
        | {"table.fisor_candidates": 2, "table.tuning_episodes": 1}
        | {"table.cloning": {"steps": 2, "batch_size": 4}}
        | {"table.guided": {"steps": 2, "batch_size": 4}}
        | {"fitted_q.steps": 2, "fitted_q.transitions": 64, "fitted_q.batch_size": 8}
        | {f"{part}.{name}": n for part in parts for name, n in sizes.items()}
    )
    lines = []
    table, root, folder = table1.TABLE, Path("runs"), Path("results")
    arguments = (table, job, root, folder, lines.append)
    with monkeypatch.context() as patch:  # none is safe: an error before anything runs
        none = Selection(max_cost=-1.0)
        patch.setattr(Selection, "best_of_safe", lambda job: none)
        with pytest.raises(InputError, match="cost"):
            grid.run(*arguments, settings=[TASK])
    assert not Path("runs", TASK).exists()
    grid.run(*arguments, settings=[TASK])
    assert len(lines) == len(table1.METHODS)
    text = table1.write_table(folder, "bullet")
    assert text == Path("results/table1_bullet.md").read_text()
    assert f"| method | {TASK} | cost | paper |" in text and "Data: made." in text
    assert "| CDT | - | - | 0.32 / 0.45 |" in text, "the paper's other rows"
    summary = json.loads(Path("results/table1_bullet.json").read_text())["cells"][TASK]
    assert sorted(summary) == sorted(table1.METHODS)
    raws = results.by_key(table.path(folder))
    chosen = raws[TASK, "PSEC fixed", 0]
    assert tuple(chosen["alpha"]) in table1.GRID
    assert [tuple(one["alpha"]) for one in chosen["tried"]] == list(table1.GRID)
    tuning = results.by_key(f"runs/{TASK}/tuning.jsonl")
    weights = ", ".join(f"{w:g}" for w in chosen["alpha"])
    key = (TASK, f"PSEC fixed ({weights})", 0)
    assert key in tuning, "tuned on the cell's own seed"
    cloning = {"steps": 2, "batch_size": 4}
    assert raws[TASK, "NSEC", 0]["budget"]["gate"] == cloning
    assert raws[TASK, "PSEC", 0]["budget"]["gate"] == {"steps": 2, "batch_size": 8}
    assert raws[TASK, "FISOR", 0]["budget"].keys() == {"base", "critics"}
    assert all(raw["data_fingerprint"] for raw in raws.values())
    raw, cell = raws[TASK, "PSEC", 0], summary["PSEC"]
    assert cell["cost"]["mean"] == pytest.approx(np.mean(raw["costs"]) / 10)
    low, high = dsrl.task(TASK).min_return, dsrl.task(TASK).max_return
    expected = (np.mean(raw["returns"]) - low) / (high - low)
    assert cell["reward"]["mean"] == pytest.approx(expected)
    # The same episodes by another limit, beside the table.
    other = table1.write_table(folder, "bullet", limit=5.0)
    assert other == Path("results/table1_bullet_limit5.md").read_text() != text
    cells = json.loads(Path("results/table1_bullet_limit5.json").read_text())["cells"]
    doubled = pytest.approx(2 * cell["cost"]["mean"])
    assert cells[TASK]["PSEC"]["cost"]["mean"] == doubled
    assert Path("results/table1_bullet.md").read_text() == text
    grid.run(*arguments, settings=[TASK])
    assert len(lines) == len(table1.METHODS)  # nothing is run twice
    # The set of the skills' own task, and its best safe trajectories, by one word.
    library = f"--library=runs/{TASK}/seed0/library"
    flags = (library, "--workdir=gate", "--name=again", "--skills=safety,reward")
    sizes = ("--config.gate.steps=2", "--config.gate.batch_size=8", "--noevaluate")
    answer = shell.call("launch.compose", CONFIG, *flags, *sizes, "--data=best")
    assert answer.code == 0, answer.err
    card = json.loads(Path(f"{library[10:]}/gates/again/gate.json").read_text())
    assert card["data"]["source"] == dsrl.made_name(TASK)
    chosen = card["data"]["selection"]
    assert (chosen["max_cost"], chosen["return_quantile"]) == (10.0, 0.5)
    # Where none is within the limit: the least costly ones instead.
    other = tuple(f.replace("gate", "least").replace("again", "least") for f in flags)
    sizes = tuple(size.replace("least", "gate") for size in sizes)
    least = ("--data=best", "--cost_quantile=0.5")
    answer = shell.call("launch.compose", CONFIG, *other, *sizes, *least)
    assert answer.code == 0, answer.err
    card = json.loads(Path(f"{library[10:]}/gates/least/gate.json").read_text())
    assert card["data"]["selection"].get("max_cost") is None
    assert card["data"]["selection"]["cost_quantile"] == 0.5
    # The set that is found must be the one that the skills were learned from.
    shutil.copy(dsrl.find(TASK, offline=True).path, "mine.hdf5")
    fitted = ("--config.skill.steps=2", "--config.skill.batch_size=8", "--noevaluate")
    names = ("--name=mine", "--data=mine.hdf5", "--workdir=mine")
    answer = shell.call("launch.expand", CONFIG, library, *names, *fitted)
    assert answer.code == 0, answer.err
    flags = (library, "--workdir=gate2", "--name=other", "--skills=safety,mine")
    answer = shell.call("launch.compose", CONFIG, *flags, "--data=best")
    assert answer.code == 2 and "'mine' was learned from mine.hdf5" in answer.err


def raw_line(method, rewards, costs, seed=0, task=TASK, **fields):
    """A raw result by its normalised rewards and its costs."""
    known = dsrl.task(task)
    low, high = known.min_return, known.max_return
    return {
        "setting": task,
        "method": method,
        "seed": seed,
        "evaluation_seed": 1,
        "config_fingerprint": "a",
        "cost_limit": 10.0,
        "data": "made",
        "data_fingerprint": "d",
        "versions": {"commit": "c"},
        "returns": [low + reward * (high - low) for reward in rewards],
        "costs": list(costs),
        **fields,
    }


def test_seeds_of_one_cell_are_of_one_kind():
    one = raw_line("BC", [0.1], [1.0])
    tables.summarise(table1.TABLE, [one, one | {"seed": 1}])
    for field, value in (("cost_limit", 5.0), ("data", "official")):
        other = one | {"seed": 1, field: value}
        with pytest.raises(InputError, match=f"BC: results of different {field}"):
            tables.summarise(table1.TABLE, [one, other])


def test_safe_is_the_whole_interval():
    raws = [
        raw_line("BC", [0.9] * 4, [30.0] * 4),
        raw_line("FISOR", [0.2] * 4, [5.0] * 4),
        raw_line("PSEC", [0.4] * 4, [9.0] * 4),
        raw_line("NSEC", [0.5] * 4, [0.0, 0.0, 0.0, 36.0]),  # safe by its mean alone
    ]
    summary = tables.summarise(table1.TABLE, raws)
    text = tables.markdown(tables.cells(table1.TABLE, summary))
    assert "| BC | 0.90 [0.90, 0.90] | 3.00 [3.00, 3.00] | 0.67 / 11.38 |" in text
    assert "| FISOR | **0.20 [0.20, 0.20]** | 0.50" in text
    assert "| PSEC | **0.40 [0.40, 0.40]** * | 0.90" in text
    assert summary[TASK]["NSEC"]["cost"]["mean"] == pytest.approx(0.9)
    assert "| NSEC | 0.50 [0.50, 0.50] | 0.90" in text


def test_mean_over_tasks(tmp_path):
    other = "OfflineCarRun-v0"
    conditions = {"preset": "quick", "budget": {"base": {"steps": 1, "batch_size": 1}}}
    conditions["versions"] = {"commit": "c", "cores": 1, "cpu": "x", "jax": "0"}
    for raw in (
        raw_line("BC", [0.9], [30.0]),
        raw_line("BC", [0.5], [6.0], task=other),
        raw_line("FISOR", [0.5], [6.0], task=other),
    ):
        results.append(tmp_path / "table1.jsonl", raw | conditions)
    lines = table1.write_table(tmp_path, "bullet").splitlines()
    [head, bc] = [line for line in lines if line.startswith(("| method", "| BC |"))]
    assert head.endswith("| mean | cost | paper |")
    assert bc.endswith("| 0.70 [0.70, 0.70] | 1.80 [1.80, 1.80] | 0.815 / 6.63 |")
    [fisor] = [line for line in lines if line.startswith("| FISOR |")]
    assert "| - | - | 0.455 / 0.07 |" in fisor, "measured on one of two tasks"
