"""The dynamics shift end to end on the real walker, and the strength of the shift."""

import json
from pathlib import Path

import numpy as np
import pytest
import shell

from experiments import dynamics_shift, grid, results, shift_strength
from experiments.configs import d4rl
from psec_jax.data import d4rl_sets, dataset
from psec_jax.errors import InputError
from psec_jax.library import SkillLibrary
from psec_jax.workflows.collection import Actor, play

CONFIG = Path(__file__).parent.parent / "experiments/configs/d4rl.py"
TARGET = "walker2d-medium"
METHODS = ("BC", "IQL", "Scratch", *(f"{m} (gravity)" for m in dynamics_shift.SHIFTED))


def small_config():
    sizes = {"steps": 2, "batch_size": 8}
    parts = ("base", "skill", "gate", "table.gaussian")
    return d4rl.job("quick").changed(
        {"network.width": 16, "network.blocks": 1, "network.time_features": 8}
        | {"network.time_width": 8, "critics.widths": (8,), "table.transitions": 30}
        | {"evaluation.episodes": 2}
        | {f"{part}.{name}": n for part in parts for name, n in sizes.items()}
    )


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Sets of a few short episodes, and an empty working directory."""
    monkeypatch.setenv("PSEC_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "official"))
    monkeypatch.chdir(tmp_path)
    for name in (f"{TARGET}-v2", "walker2d-gravity-source"):
        spec = d4rl_sets.task(name).spec
        episodes = play(spec, [Actor("random")] * 4, seed=0, workers=1)
        d4rl_sets.save(name, dataset.concatenate([e.dataset for e in episodes]), {})


def test_table_and_study(place, quick_starts):
    job, lines = small_config(), []
    table = dynamics_shift.TABLE
    root, folder = Path("runs"), Path("results")
    chosen = {"settings": [TARGET], "methods": METHODS}
    grid.run(table, job, root, folder, lines.append, **chosen)
    assert len(lines) == len(METHODS)
    # The skill leaves the base as it is; fine-tuning starts from it and does not.
    seed = Path("runs/walker2d-gravity/seed0")
    cards = {
        name: json.loads((seed / name / "base/base.json").read_text())
        for name in ("library", f"library-tuned-{TARGET}", f"library-joint-{TARGET}")
    }
    joint = cards[f"library-joint-{TARGET}"]["data"]
    assert joint["transitions"] == cards["library"]["data"]["transitions"] + 30
    tuned = cards[f"library-tuned-{TARGET}"]
    assert tuned["config"]["start"] == cards["library"]["fingerprint"]
    skill = json.loads((seed / f"library/skills/{TARGET}/skill.json").read_text())
    assert skill["data"]["transitions"] == 30 and skill["objective"] == "reward"
    # The next seed learns from transitions of its own.
    both = job.changed({"table.seeds": (0, 1)})
    chosen["methods"] = ("Joint (gravity)", "Skill (gravity)")
    grid.run(table, both, root, folder, print, **chosen)
    chosen["methods"] = METHODS
    of_next = Path(f"runs/walker2d-gravity/seed1/library/skills/{TARGET}/skill.json")
    other = json.loads(of_next.read_text())["data"]
    assert other["selection"]["draw"] == 1 and other["transitions"] == 30
    assert other["fingerprint"] != skill["data"]["fingerprint"]
    assert len(list(Path("runs/walker2d-gravity/joint").iterdir())) == 2
    text = dynamics_shift.write_table(folder)
    assert "| PSEC (gravity) |" in text and "57.1" in text
    assert "Of 1 cells" in text and "gaussian 2 steps of 8" in text
    assert "10 transitions" not in text and "30 transitions" in text
    assert "the transitions are drawn by each seed from the set. " in text
    summary = json.loads(Path("results/dynamics_shift.json").read_text())["cells"]
    raw = results.by_key(table.path(folder))[TARGET, "BC", 0]
    scores = 100 * (np.array(raw["returns"]) - 1.629008) / (4592.3 - 1.629008)
    assert raw["budget"] == {"gaussian": {"steps": 2, "batch_size": 8}}
    assert raw["d4rl_environment"] == "Walker2d-v2"
    assert raw["env"] == "gymnasium:Walker2d-v5"
    mean = summary[TARGET]["BC"]["score"]["mean"]
    assert mean == pytest.approx(np.mean(scores), rel=1e-9)
    assert Path("results/figures/dynamics_shift.png").exists()
    grid.run(table, job, root, folder, lines.append, **chosen)
    assert len(lines) == len(METHODS)  # nothing is run twice

    lines.clear()
    study = shift_strength.table([TARGET], [1.0, 3.0])
    grid.run(study, job, root, folder, lines.append)
    assert len(lines) == 2 * len(shift_strength.TABLE.methods)
    raw = results.by_key(study.path(folder))[f"{TARGET} gravity 3", "Skill", 0]
    assert raw["env"] == "gymnasium:Walker2d-v5@gravity:3"
    assert (raw["x"], raw["target"]) == (3.0, TARGET)
    assert [p.name for p in shift_strength.draw(folder)] == [
        "strength_walker2d-medium.png"
    ]
    with pytest.raises(InputError, match="gravity is '0'"):  # before it trains
        shift_strength.table([TARGET], [1.0, 0.0])
    # The set was made again with other episodes: no result of the old one is kept.
    path = d4rl_sets.find(f"{TARGET}-v2").path
    ds, _ = d4rl_sets.load(path)
    path.rename(path.with_suffix(".old"))
    d4rl_sets.save(f"{TARGET}-v2", ds._replace(reward=ds.reward + 1), {})
    with pytest.raises(InputError, match="measured with data_fingerprint"):
        grid.run(table, job, root, folder, lines.append, **chosen)
    # A target set that is smaller than the cut.
    more = job.changed({"table.transitions": 10**6})
    with pytest.raises(InputError, match="1000000|1,000,000"):
        grid.run(table, more, Path("more"), Path("more"), lines.append, **chosen)
    assert not Path("more").exists()


def test_wins_are_counted_by_means_and_by_intervals():
    def row(name, shift, mean, half=1.0):
        return {
            "setting": TARGET,
            "above": f"PSEC ({shift})",
            "below": dynamics_shift.rival(name, shift),
            "mean": mean,
            "low": mean - half,
            "high": mean + half,
        }

    rows = [
        row(name, shift, -5 if (name, shift) == ("Joint", "thigh") else mean)
        for shift in dynamics_shift.SHIFTS
        for name, mean in (
            ("BC", 5),
            ("IQL", 0.5),
            ("Joint", 12),
            ("Scratch", -5),
            ("Fine-tune", -1),
        )
    ]
    text = dynamics_shift.wins(rows)
    for words in (
        "Of 3 cells",
        "BC in 3 (3 separated, 0 separated the other way)",
        "IQL in 3 (0 separated, 0 separated the other way)",
        "Joint in 2 (2 separated, 1 separated the other way)",
        "Scratch in 0 (0 separated, 3 separated the other way)",
        "Fine-tune in 0 (0 separated, 0 separated the other way)",
        "all three in 2.",
    ):
        assert words in text
    some = [row for row in rows if row["below"] != "BC"]
    assert "Of 0 cells" in dynamics_shift.wins(some)


def test_another_robot_of_the_same_sizes_is_refused(place):
    """HalfCheetah and Walker2d both have 17 observations and 6 actions."""
    common = ("--config=" + str(CONFIG), "--config.base.steps=1", "--noevaluate")
    folders = ("--workdir=w", "--library=l")
    data = "--data=walker2d-medium-v2"
    cheetah = "--env=gymnasium:HalfCheetah-v5"
    answer = shell.call("launch.pretrain", *common, *folders, data, cheetah)
    assert answer.code == 2 and answer.err.count("\n") == 1, answer.err
    assert "of the robot Walker2d, gymnasium:HalfCheetah-v5 expects" in answer.err
    assert not Path("w").exists() and not Path("l").exists()
    size = ("--config.network.width=8", "--config.network.blocks=1")
    answer = shell.call("launch.pretrain", *common, *size, *folders, data)
    assert answer.code == 0, answer.err
    spec = d4rl_sets.task("halfcheetah-medium-v2").spec
    actors = [Actor("random")] * 2
    episodes = play(spec, actors, seed=0, workers=1)
    d4rl_sets.save(
        "halfcheetah-medium-v2", dataset.concatenate([e.dataset for e in episodes]), {}
    )
    expand = ("launch.expand", f"--config={CONFIG}", "--noevaluate", "--name=s")
    expand += ("--workdir=s", "--library=l")
    answer = shell.call(*expand, "--data=halfcheetah-medium-v2")
    assert answer.code == 2 and answer.err.count("\n") == 1, answer.err
    assert "l: of the robot Walker2d, gymnasium:HalfCheetah-v5 expects" in answer.err
    answer = shell.call(*expand, data, "--config.critics.reward_scale=-1")
    assert answer.code == 2 and answer.err.count("\n") == 1, answer.err
    assert "critics.reward_scale: got -1.0, expected 0 or more" in answer.err
    # A base made in Python need not say where.
    library = SkillLibrary.open("l")
    params, normaliser, card = library.load_base()
    del card["env"]
    library.add_base(params, normaliser, card, overwrite=True)
    answer = shell.call(*expand, data, "--config.skill.steps=1")
    assert answer.code == 0, answer.err


def test_refusals(place):
    for flag, said in (
        ("--targets=ant-medium", "unknown target 'ant-medium'"),
        ("--methods=PSEC", "unknown method 'PSEC'"),
        ("--preset=huge", "unknown preset 'huge'"),
        ("--transitions=0", "transitions"),
        ("--tables_only", "dynamics_shift.jsonl: no raw results"),
        ("--factors=1,0", "gravity is '0', expected a finite number above 0"),
        ("--figures_only", "shift_strength.jsonl: no raw results"),
    ):
        study = flag.startswith(("--factors", "--figures"))
        command = "shift_strength" if study else "dynamics_shift"
        answer = shell.call(f"experiments.{command}", flag, "--results=none")
        assert answer.code == 2 and answer.err.count("\n") == 1, answer.err
        assert said in answer.err
    answer = shell.call(
        "experiments.dynamics_shift", "--targets=walker2d-medium-expert", "--seeds=0"
    )
    assert answer.code == 2 and "collect_d4rl" in answer.err, answer.err
