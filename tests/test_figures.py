"""Figures: one end to end in the real simulator, the others from raw files."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from experiments import figures, plots, results, table2
from experiments.configs import dmc_walker
from psec_jax.errors import InputError
from psec_jax.files import read_json
from psec_jax.workflows import demonstrations
from psec_jax.workflows.collection import collect

NAME = "interpolation"
BUDGET = {"seeds": (0,), "points": (0, 24), "columns": ("S->W",)}
PNG = b"\x89PNG\r\n\x1a\n"


def tiny_config():
    config = dmc_walker.get_config("quick")
    config.network.update({"width": 8, "blocks": 1, "expansion": 1, "time_width": 8})
    config.base.update({"episodes": 1, "steps": 2, "batch_size": 4})
    config.skill.update({"episodes": 1, "steps": 2, "batch_size": 4, "rank": 2})
    config.evaluation.episodes = 1
    return config


@pytest.fixture
def place(tmp_path, monkeypatch):
    def collect_one(env, policy, episodes, *others):
        return collect(env, policy, 1, *others)

    monkeypatch.setenv("PSEC_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setattr(demonstrations, "collect", collect_one)
    monkeypatch.setitem(figures.BUDGETS[NAME], "quick", BUDGET)
    return tmp_path / "runs", tmp_path / "results"


def test_figure_end_to_end(place):
    root, folder = place
    lines = []
    figures.run_cells(NAME, tiny_config(), root, folder, lines.append)
    assert [line.split(":")[0] for line in lines] == [
        "S->W, alpha 0 walk skill seed 0",
        "S->W, alpha 24 walk skill seed 0",
    ]
    raws = results.load_all(folder, f"raw_figures/{NAME}")
    assert [raw["x"] for raw in raws] == [0, 24]
    assert all(len(raw["returns"]) == 1 for raw in raws)
    assert raws[0]["budget"] == {
        stage: {"steps": 2, "batch_size": 4} for stage in ("base", "skill")
    }
    path = figures.draw(NAME, folder)
    first = path.read_bytes()
    assert path == folder / "figures" / f"{NAME}.png" and first.startswith(PNG)
    svg = path.with_suffix(".svg").read_bytes()
    assert svg.startswith(b"<?xml")

    figures.run_cells(NAME, tiny_config(), root, folder, lines.append)
    assert len(lines) == 2  # all is there
    assert figures.draw(NAME, folder).read_bytes() == first
    assert path.with_suffix(".svg").read_bytes() == svg

    other = tiny_config()
    other.skill.steps = 3
    with pytest.raises(InputError, match="made with config"):
        figures.run_cells(NAME, other, root, folder, lines.append)


def test_a_cell_counts_only_the_stages_that_it_trained(place, monkeypatch):
    root, folder = place

    def cells(budget):
        return [figures._row_cell("S->W", "Base")]

    spec = dataclasses.replace(figures.FIGURES[NAME], cells=cells)
    monkeypatch.setitem(figures.FIGURES, NAME, spec)
    figures.run_cells(NAME, tiny_config(), root, folder, print)
    (raw,) = results.load_all(folder, f"raw_figures/{NAME}")
    assert raw["budget"] == {"base": {"steps": 2, "batch_size": 4}}


def raw_file(setting, method, seed=0, **fields):
    config = dmc_walker.get_config("quick").to_dict()
    generator = np.random.default_rng(seed)
    returns = generator.uniform(0, 1000, 5).tolist()
    return results.header(config, setting, method, seed) | {
        "x": None,
        "returns": returns,
        **fields,
    }


def made_up(name):
    """Raw files of every cell that a figure has, without a measurement."""
    if name == "table2":
        return [raw_file(s, m) for s in table2.SETTINGS for m in table2.METHODS]
    budget = figures.BUDGETS[name]["quick"]
    if name == "tsne":
        plane = np.random.default_rng(0).normal(size=(3, 9, 2)).tolist()
        extra = {
            "points": dict(zip(("stand", "walk", "run"), plane, strict=True)),
            "dimensions": 6,
            "agreement": 0.5,
        }
    else:
        extra = {"reward": [0.0, 1.0], "alpha": {"walk": [16.0, 0.0]}}
    return [
        raw_file(cell.setting, cell.method, seed, x=cell.x, **extra)
        for cell in figures.FIGURES[name].cells(budget)
        for seed in ((0,) if name in ("tsne", "alpha_trace") else (0, 1))
    ]


@pytest.mark.parametrize("name", figures.FIGURES)
def test_every_figure_is_drawn_from_raw_files(name, tmp_path):
    with pytest.raises(
        InputError, match=r"no raw\S*/\*\.json; measure something first"
    ):
        figures.draw(name, tmp_path)
    for raw in made_up(name):
        path = results.raw_path(
            tmp_path, raw["setting"], raw["method"], raw["seed"], figures.raw_kind(name)
        )
        assert not path.exists(), "two cells in one file"
        results.write_raw(path, raw)
    drawn = figures.draw(name, tmp_path)
    assert drawn.read_bytes().startswith(PNG)


def test_every_preset_has_a_budget():
    assert set(figures.BUDGETS) == set(figures.FIGURES) - {"table2"}
    for name, budgets in figures.BUDGETS.items():
        for preset in dmc_walker.PRESETS:
            config = dmc_walker.get_config(preset)
            for cell in figures.FIGURES[name].cells(budgets[preset]):
                changes = budgets[preset].get("changes", {}) | dict(cell.changes)
                figures.make_place(config, name, 0, changes)
                plots.style(cell.method) if cell.method not in figures.SPACES else None


def test_place_is_shared_with_the_table_where_nothing_differs(tmp_path):
    config = tiny_config()
    same = {"skill.rank": 2, "evaluation.episodes": 3}
    shared = figures.make_place(config, tmp_path, 0, same)
    assert type(shared) is table2.Place and shared.config.evaluation.episodes == 3
    other = figures.make_place(config, tmp_path, 0, {"skill.rank": 4})
    table = table2.Place(config, tmp_path, 0)
    assert other.workdir("base") == table.workdir("base")
    assert other.workdir("walk") != table.workdir("walk")
    assert other.library != table.library
    assert other.scratch("walk") != table.scratch("walk")


def test_cell_of_the_table_is_taken_over(tmp_path):
    cell = figures.gate_cells({})[0]
    raw = raw_file("S->W", cell.method)
    path = results.raw_path(tmp_path, "S->W", cell.method, 0)
    results.write_raw(path, raw)
    fingerprint = raw["config_fingerprint"]
    assert figures._from_table(tmp_path, cell, 0, fingerprint) == read_json(path)
    assert figures._from_table(tmp_path, cell, 0, "another") is None
    assert figures._from_table(tmp_path, cell, 1, fingerprint) is None


@pytest.mark.parametrize(
    ("names", "message"),
    [([], "got 0 names, expected one of table2, "), (["rank", "gate"], "got 2 names")],
)
def test_one_name_is_wanted(names, message):
    with pytest.raises(InputError, match=message):
        figures.main(["figures", *names])


def test_unknown_figure_is_one_line_and_exit_code_2(tmp_path):
    command = [sys.executable, "-m", "experiments.figures", "nope", "--preset=quick"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        "error: unknown figure 'nope'; choose from "
        f"{', '.join(sorted(figures.FIGURES))}\n"
    )
