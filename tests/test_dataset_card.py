"""The card of a dataset: what it says, and what it refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
from shell import call
from test_dsrl import NAME, make, write

from experiments.tools import dataset_card
from psec_jax.data import dataset, dsrl

CARD = "experiments.tools.dataset_card"


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    """Work in an empty folder, without an address to download from."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DSRL_DATASET_DIR", str(tmp_path / "dsrl"))
    monkeypatch.setenv("PSEC_DATA_DIR", str(tmp_path / "made"))
    monkeypatch.setattr(dsrl, "MIRRORS", ())


def test_card_of_a_made_set():
    ds = make()
    path = dsrl.save(NAME, ds, {"seed": 3, "returns": np.zeros(9), "long": "x" * 999})
    answer = call(CARD, f"--data={NAME}", "--out=new/card", "--offline")
    assert answer.code == 0, answer.err
    assert answer.out.startswith("new/card/card.md: 12 trajectories of SafetyBallRun")
    names = {file.name for file in Path("new/card").iterdir()}
    assert names == {"card.json", "card.md", "plane.png", "plane.svg"}
    card = json.loads(Path("new/card/card.json").read_text())
    returns, costs = dataset.episode_returns(ds), dataset.episode_costs(ds)
    assert card["source"] == path.name and card["task"] == NAME
    assert card["origin"] == "made by this project in the simulator"
    assert card["environment"] == "bullet:SafetyBallRun-v0"
    assert card["fingerprint"] == dataset.fingerprint(ds)
    assert (card["trajectories"], card["transitions"]) == (12, 1200)
    assert (card["ended"], card["cut"]) == (0, 12)
    assert card["length"]["0"] == card["length"]["1"] == 100
    assert card["return"]["mean"] == pytest.approx(returns.mean())
    assert card["cost"]["1"] == costs.max()
    assert card["normalised_cost"]["1"] == pytest.approx(costs.max() / 10)
    task = dsrl.TASKS[NAME]
    assert card["normalised_return"]["0"] == pytest.approx(
        (returns.min() - task.min_return) / (task.max_return - task.min_return)
    )
    assert 0 < card["within_limit"] == np.mean(costs <= 10) < 1
    assert card["best_return_within_limit"] == returns[costs <= 10].max()
    assert card["attributes"]["seed"] == 3
    assert card["attributes"]["returns"] == "array of shape [9], float64"
    assert card["attributes"]["long"].endswith("... (999 characters)")
    page = Path("new/card/card.md").read_text()
    assert page.startswith(f"# {NAME}\n") and "| normalised return |" in page


def test_the_same_data_gives_the_same_files():
    dsrl.save(NAME, make(), {})
    for out in ("one", "two"):
        dataset_card.write(NAME, out)
    for file in Path("one").iterdir():
        assert file.read_bytes() == Path("two", file.name).read_bytes(), file


def test_card_without_a_safe_trajectory_or_a_task():
    ds = make()._replace(cost=np.ones(1200, np.float32))
    card = dataset_card.write(str(write(Path("my.hdf5"), ds)), "card", 99.5)
    assert card["within_limit"] == 0 and card["best_return_within_limit"] is None
    assert card["task"] is None and card["normalised_return"] is None
    assert card["origin"] == "given by path" and card["attributes"] == {
        "action_units": "scaled"
    }
    page = Path("card/card.md").read_text()
    assert page.startswith("# my.hdf5\n") and "0.0 % of the trajectories" in page
    assert dataset_card.write("my.hdf5", "card", 100.0)["within_limit"] == 1


def test_card_of_an_official_set():
    write(dsrl.cache_dir() / dsrl.TASKS[NAME].file, make())
    assert dataset_card.write(NAME, "card")["origin"] == "official DSRL file"


REFUSED = {
    "unknown task": (("--data=OfflineBalRun-v0",), "unknown DSRL task 'OfflineBalRun"),
    "no set": ((f"--data={NAME}",), "python -m experiments.tools.collect_safe --task="),
    "offline": ((f"--data={NAME}", "--offline"), "no such file, and offline"),
    "no file": (("--data=gone.hdf5",), "gone.hdf5: no such file"),
    "limit below 0": (("--data=my.hdf5", "--cost_limit=-1"), "cost_limit: got -1"),
    "negative cost": (("--data=below.hdf5",), "1200 of 1200 costs are negative"),
    "loud actions": (("--data=loud.hdf5",), "values lie outside [-1, 1]"),
    "no data": ((), "data"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    arguments, words = REFUSED[name]
    ds = make()
    write(Path("my.hdf5"), ds)
    write(Path("below.hdf5"), ds._replace(cost=np.full(1200, -1.0)))
    write(Path("loud.hdf5"), ds._replace(action=2 * ds.action))
    answer = call(CARD, "--out=card", *arguments)
    assert answer.code == 2 and answer.out == ""
    assert answer.err.startswith("error: ") and answer.err.count("\n") == 1, answer.err
    assert words in answer.err
    assert not Path("card").exists()
    assert call(CARD, "--out=card", "--data=loud.hdf5", "--clip_actions").code == 0
