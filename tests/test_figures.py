"""Figures: one end to end in the real simulator, the others from raw files."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shell
import tiny

from experiments import figures, grid, results, table2, walker_changes
from experiments.configs import dmc_walker
from psec_jax.composition import PolicyConfig, PolicyParams
from psec_jax.errors import InputError
from psec_jax.gating import GateConfig
from psec_jax.library import SkillLibrary
from psec_jax.policy import Policy
from psec_jax.types import Normaliser
from psec_jax.workflows import demonstrations
from psec_jax.workflows.collection import collect

NAME = "interpolation"
BUDGET = {"seeds": (0,), "points": (0, 24), "columns": ("S->W",)}
PNG = b"\x89PNG\r\n\x1a\n"


def tiny_config():
    sizes = {"episodes": 1, "steps": 2, "batch_size": 4}
    return dmc_walker.job("quick").changed(
        {"network.width": 8, "network.blocks": 1, "network.expansion": 1}
        | {"network.time_width": 8, "skill.rank": 2, "evaluation.episodes": 1}
        | {f"{part}.{k}": v for part in ("base", "skill") for k, v in sizes.items()}
    )


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
    figures.measure(NAME, tiny_config(), root, folder, lines.append)
    assert [line.split(":")[0] for line in lines] == [
        "S->W, alpha 0 walk skill seed 0",
        "S->W, alpha 24 walk skill seed 0",
    ]
    raws = results.read_all(folder / f"{NAME}.jsonl")
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

    figures.measure(NAME, tiny_config(), root, folder, lines.append)
    assert len(lines) == 2  # all is there
    assert figures.draw(NAME, folder).read_bytes() == first
    assert path.with_suffix(".svg").read_bytes() == svg

    other = tiny_config().changed({"skill.steps": 3})
    with pytest.raises(InputError, match="measured with config_fingerprint"):
        figures.measure(NAME, other, root, folder, lines.append)


def test_a_variant_keeps_the_tables_base(place, quick_starts):
    """Skills on another budget stand on a copy of the table's base."""
    root, folder = place
    job = tiny_config()
    varied = figures.points("rank {}", "skill.rank", (4,), "walk skill")
    settings = {
        name: dataclasses.replace(setting, record={"x": 8.0}, same="")
        for name, setting in varied.items()
    }
    methods = figures.interpolation({"points": ()}).methods
    table = figures.table("rank", settings, methods)

    def variant(setting):
        return figures.variant(job, setting.changes)

    grid.run(table, job, root, folder, print, variant=variant)
    [raw] = results.read_all(folder / "rank.jsonl")
    assert raw["setting"] == "S->W, rank 4"
    seed = root / "seed0"
    other = seed / "variants" / "skill.rank-4"
    cards = [
        SkillLibrary.open(at / "library").card("base", "base") for at in (seed, other)
    ]
    assert cards[0]["fingerprint"] == cards[1]["fingerprint"]
    assert SkillLibrary.open(other / "library").card("skill", "walk")["rank"] == 4
    assert (seed / "runs/base").exists() and not (other / "runs/base").exists()


def test_each_change_of_the_walker_alone(place, quick_starts, monkeypatch):
    def collect_two(env, policy, episodes, *others):
        return collect(env, "random", 2, *others)

    monkeypatch.setattr(demonstrations, "collect", collect_two)
    job = tiny_config().changed({"skill.episodes": 2})
    root, folder = place
    names = ("as it is", "no noise", "skills held 5 steps", "rank 64")
    chosen = {"settings": ["S->W"], "methods": names}
    grid.run(walker_changes.TABLE, job, root, folder, print, **chosen)
    raws = results.by_key(folder / "walker_changes.jsonl")
    assert {method for _, method, _ in raws} == set(names)
    starts = {raw["evaluation_seed"] for raw in raws.values()}
    assert starts == {job.evaluation.seed + 1}
    assert len({tuple(raw["returns"]) for raw in raws.values()}) == len(names)
    text = walker_changes.write_table(folder)
    assert "return: no noise > as it is" in text
    reported = walker_changes.REPORTED
    grid.run(reported, job, root, folder, print, **chosen | {"methods": names[:1]})
    [raw] = results.read_all(reported.path(folder))
    assert raw["evaluation_seed"] == job.evaluation.seed
    text = walker_changes.write_table(folder, reported)
    assert "start states those of Table 2" in text
    libraries = {
        place: SkillLibrary.open(root / place / "library")
        for place in ("seed0", "seed0/skill.rank-64")
    }
    ranks = [one.card("skill", "walk")["rank"] for one in libraries.values()]
    assert ranks == [job.skill.rank, 64]


def test_a_skill_keeps_acting():
    # Two skills and the base under a support: skill a is at 0, skill b at 10.
    gate = GateConfig(head="constant", support="neighbour")
    support = {
        "demos": jnp.asarray([[[0.0] * tiny.OBS_DIM], [[10.0] * tiny.OBS_DIM]]),
        "valid": jnp.ones((2, 1), bool),
        "tau": jnp.ones(2),
        "scale": jnp.ones((2, tiny.OBS_DIM)),
    }
    config = PolicyConfig(tiny.NETWORK, tiny.PROCESS, tiny.ACTION_DIM, gate=gate)
    params = PolicyParams(
        tiny.base(),
        Normaliser(jnp.zeros(tiny.OBS_DIM), jnp.ones(tiny.OBS_DIM)),
        tiny.library(2),
        jnp.ones(2),
        {"head": {"alpha": jnp.asarray([2.0, 3.0])}, "support": support},
    )
    switching = Policy(config, params, ("a", "b"))
    a, b, base = ([x] * tiny.OBS_DIM for x in (0.0, 10.0, 5.0))
    np.testing.assert_array_equal(
        switching.alpha(np.array([a, b, base])), [[2, 0], [0, 3], [0, 0]]
    )
    held = walker_changes.Held(switching, 3)
    # Each column is an episode: who would act, and who does.
    seen = np.array([[base, a], [a, base], [b, b], [base, b], [base, a]])
    does = np.array([[base, a], [a, a], [a, a], [a, b], [base, b]])
    for step in range(len(seen)):
        keys = jax.random.split(jax.random.key(step), 2)
        got = held(keys, seen[step])
        alpha = switching.alpha(does[step])
        np.testing.assert_array_equal(held.alpha, alpha)
        for episode in range(2):
            alone = dataclasses.replace(
                switching,
                config=dataclasses.replace(config, gate=GateConfig(head="constant")),
                params=params._replace(gate={"head": {"alpha": alpha[episode]}}),
            )
            expected = alone.act(keys[episode], seen[step][episode])
            np.testing.assert_allclose(got[episode], expected, atol=1e-5)


def raw_line(table, setting, method, seed=0, **fields):
    job = dmc_walker.job("quick")
    generator = np.random.default_rng(seed)
    returns = generator.uniform(0, 1000, 5).tolist()
    head = results.header(job, setting, method, seed, table.methods[method].stages)
    record = dict(table.settings[setting].record)
    return head | {"evaluation_seed": 1, "returns": returns} | record | fields


def made_up(name):
    """Raw results of every cell that a figure has, without a measurement."""
    budget = figures.BUDGETS.get(name, {}).get("quick", {})
    table = figures.FIGURES[name].table(budget)
    extra = {}
    if name == "tsne":
        plane = np.random.default_rng(0).normal(size=(3, 9, 2)).tolist()
        extra = {
            "points": dict(zip(("stand", "walk", "run"), plane, strict=True)),
            "dimensions": 6,
            "agreement": 0.5,
        }
    elif name == "alpha_trace":
        extra = {"reward": [0.0, 1.0], "alpha": {"walk": [16.0, 0.0]}}
    return table, [
        raw_line(table, setting, method, seed, **extra)
        for setting, one in table.settings.items()
        for method in one.methods or table.methods
        for seed in ((0,) if extra else (0, 1))
    ]


@pytest.mark.parametrize("name", figures.FIGURES)
def test_every_figure_is_drawn_from_raw_results(name, tmp_path):
    with pytest.raises(InputError, match=r"\.jsonl: no raw results; measure something"):
        figures.draw(name, tmp_path)
    table, raws = made_up(name)
    for raw in raws:
        assert results.append(table.path(tmp_path), raw), "two cells of one name"
    drawn = figures.draw(name, tmp_path)
    assert drawn.read_bytes().startswith(PNG)


def parts_of(svg):
    """Text and numbers of a drawing, without its identifiers: those are digests of
    numbers, of which processors round the last place otherwise."""
    text = re.sub(r"\b[a-z][0-9a-f]{10}\b", "id", svg.read_text())
    number = r"-?\d+\.\d+"
    return re.sub(number, "number", text), np.array(re.findall(number, text), float)


@pytest.mark.parametrize("name", sorted(set(figures.FIGURES) - {"table2"}))
def test_committed_figures_follow_from_the_committed_lines(name, tmp_path):
    folder = Path(__file__).parents[1] / "results/dmc_walker"
    for file in folder.glob("*.jsonl"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    svg = figures.draw(name, tmp_path).with_suffix(".svg")
    (words, numbers), (their_words, their_numbers) = map(
        parts_of, (svg, folder / "figures" / svg.name)
    )
    assert words == their_words
    np.testing.assert_allclose(numbers, their_numbers, atol=1e-3)


def test_every_preset_has_a_budget():
    assert set(figures.BUDGETS) == set(figures.FIGURES) - {"table2"}
    for name, budgets in figures.BUDGETS.items():
        for preset in dmc_walker.PRESETS:
            job = dmc_walker.job(preset)
            table = figures.FIGURES[name].table(budgets[preset])
            for setting in table.settings.values():
                job.changed(budgets[preset].get("changes", {}) | setting.changes)
                assert set(setting.methods or ()) <= set(table.methods)


def test_runs_are_shared_with_the_table_where_nothing_differs(tmp_path):
    job = tiny_config()
    assert figures.variant(job, {"skill.rank": 2, "evaluation.episodes": 3}) == ""
    tag = figures.variant(job, {"skill.rank": 4, "skill.episodes": 1})
    assert tag == "variants/skill.rank-4"


def test_a_result_of_the_table_is_used_again(tmp_path):
    """A setting with `same` copies Table 2's line where the job is equal."""
    budget = {"points": (10,)}
    table = figures.sample_efficiency(budget)
    raw = raw_line(table2.TABLE, "S->W", "PSEC")
    results.append(table2.TABLE.path(tmp_path), raw)
    lines = []
    job = dmc_walker.job("quick")
    borrow = table2.TABLE.path(tmp_path)
    arguments = (table, job, tmp_path / "runs", tmp_path, lines.append)
    chosen = {"settings": ["S->W, 10 trajectories"], "methods": ["PSEC"]}
    grid.run(*arguments, **chosen, borrow=borrow)
    [line] = results.read(table.path(tmp_path))
    assert line == raw | {"setting": "S->W, 10 trajectories", "x": 10}
    assert len(lines) == 1 and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("names", "message"),
    [([], "got 0 names, expected one of table2, "), (["rank", "gate"], "got 2 names")],
)
def test_one_name_is_wanted(names, message):
    with pytest.raises(InputError, match=message):
        figures.main(["figures", *names])


def test_unknown_figure_is_one_line_and_exit_code_2():
    answer = shell.call("experiments.figures", "nope", "--preset=quick")
    assert answer.code == 2 and answer.out == ""
    assert answer.err == (
        "error: unknown figure 'nope'; choose from "
        f"{', '.join(sorted(figures.FIGURES))}\n"
    )
