"""Raw files to tables: seeds kept apart, statistics by hand."""

import numpy as np
import pytest

from experiments import results, stages
from experiments.configs.dmc_walker import get_config
from psec_jax.errors import InputError
from psec_jax.evaluation import Episodes

EPISODES = Episodes(*(np.array(x) for x in ([100.0, 300.0], [0, 0], [9, 9], [1, 2])))


def raw(seed, returns=(100.0, 300.0), method="PSEC"):
    return {"setting": "S->W", "method": method, "seed": seed, "returns": list(returns)}


def test_training_seed_and_evaluation_seed_are_two_things():
    config = get_config("quick").to_dict()
    header = results.header(config, "S->W", "PSEC", seed=3)
    episodes = stages.episodes_json(EPISODES, "dm_control:walker-walk", seed=77)
    assert not header.keys() & episodes.keys()
    assert (header["seed"], episodes["evaluation_seed"]) == (3, 77)


def test_summary_by_hand():
    cell = results.summarise([raw(0), raw(1, (200.0, 400.0))])["S->W"]["PSEC"]
    assert cell["mean"] == 250.0
    assert cell["falls"] == 0.25
    assert cell["seeds"] == {"0": 200.0, "1": 300.0}
    assert cell["returns"] == [100.0, 300.0, 200.0, 400.0]
    assert cell["low"] < 250.0 < cell["high"]


def test_interval_of_one_seed_is_that_of_its_episodes():
    low, high = results.interval([[100.0] * 10])
    assert low == high == 100.0
    generator = np.random.default_rng(1)
    returns = generator.normal(500, 50, size=400)
    low, high = results.interval([returns])
    expected = 1.96 * 50 / np.sqrt(400)
    assert (high - low) / 2 == pytest.approx(expected, rel=0.15)


def test_cell_of_another_config_is_refused(tmp_path):
    path = results.raw_path(tmp_path, "S->W", "PSEC", 0)
    results.write_raw(path, raw(0) | {"config_fingerprint": "aaa"})
    assert results.read_raw(path, "aaa")["returns"] == [100.0, 300.0]
    with pytest.raises(InputError, match="made with config aaa, this is bbb"):
        results.read_raw(path, "bbb")


def test_more_seeds_or_rows_keep_what_is_there():
    config = get_config("quick")
    before = results.config_fingerprint(config.to_dict())
    config.table.seeds = (0, 1, 2)
    config.table.methods = ("Base",)
    assert results.config_fingerprint(config.to_dict()) == before
    config.skill.rank = 4
    assert results.config_fingerprint(config.to_dict()) != before


def test_table_puts_the_papers_number_beside_ours():
    summary = results.summarise([raw(0), raw(0, (1.0, 2.0), "Base")])
    text = results.markdown(summary, ["Base", "PSEC", "NSEC"], {"S->W": {"PSEC": 688}})
    rows = [line for line in text.splitlines() if line.startswith("| PSEC")]
    assert len(rows) == 1
    assert rows[0].startswith("| PSEC | 200 [") and rows[0].endswith("| 50 % | 688 |")
    assert "| NSEC | - | - | - |" in text
