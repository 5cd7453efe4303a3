"""Raw results: lines of a file, statistics by hand, tables from committed lines."""

import concurrent.futures
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from experiments import (
    dynamics_shift,
    figures,
    grid,
    intervals,
    results,
    shift_strength,
    table1,
    table2,
    tables,
    variants,
    walker_changes,
)
from experiments.configs import d4rl, dmc_walker, dsrl
from experiments.grid import Order
from experiments.tools import include
from psec_jax.errors import InputError

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
PAGES = ("reproducing", "safe", "dynamics")


def raw(seed, returns=(100.0, 300.0), method="PSEC", **fields):
    return {
        "setting": "S->W",
        "method": method,
        "seed": seed,
        "preset": "quick",
        "budget": {"base": {"steps": 2, "batch_size": 4}},
        "config_fingerprint": "aaa",
        "evaluation_seed": 7,
        "versions": {"commit": "c", "cores": 2, "cpu": "a cpu", "jax": "0"},
        "returns": list(returns),
        **fields,
    }


def test_lines_come_back_in_order(tmp_path):
    path = tmp_path / "deep" / "table.jsonl"
    assert results.read(path) == []
    lines = [raw(seed) for seed in (2, 0, 1)]
    assert all(results.append(path, line) for line in lines)
    assert results.read(path) == lines
    assert not results.append(path, raw(0, (5.0, 6.0))), "the first one stays"
    assert results.read(path) == lines
    path.write_text(path.read_text().rstrip("\n"))  # an editor's doing
    results.append(path, raw(3))
    assert len(results.read(path)) == 4


def test_writers_at_the_same_time_lose_nothing(tmp_path):
    path = tmp_path / "table.jsonl"
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        kept = list(pool.map(lambda s: results.append(path, raw(s % 30)), range(60)))
    assert sum(kept) == 30
    assert sorted(line["seed"] for line in results.read(path)) == list(range(30))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"setting": "S->W", "me', "line 2 is not a JSON file"),
        ('["S->W"]', "line 2: got list, expected a JSON object"),
        ('{"setting": "S->W", "method": "x"}', "line 2: no raw result"),
        ("", "line 2 is not a JSON file"),
        (json.dumps(raw(0)), "line 2: S->W PSEC seed 0 is also on line 1"),
        ('{"setting": "S", "method": "x", "seed": [1]}', "line 2: no raw result"),
    ],
)
def test_a_damaged_or_foreign_line_is_named(tmp_path, line, message):
    path = tmp_path / "table.jsonl"
    path.write_text(f"{json.dumps(raw(0))}\n{line}\n{json.dumps(raw(1))}\n")
    with pytest.raises(InputError) as caught:
        results.read(path)
    assert f"{path}, {message}" in str(caught.value)
    before = path.read_bytes()
    with pytest.raises(InputError):
        results.append(path, raw(5))
    assert path.read_bytes() == before


def test_interval_of_one_seed_is_the_interval_of_its_episodes():
    assert intervals.interval(np.full((1, 10), 100.0)) == (100.0, 100.0)
    scores = np.random.default_rng(1).normal(500, 50, size=(1, 400))
    low, high = intervals.interval(scores)
    assert (high - low) / 2 == pytest.approx(1.96 * 50 / np.sqrt(400), rel=0.15)


def test_start_states_that_seeds_share_are_resampled_jointly():
    """Where the start state decides alone, more seeds make no interval narrower."""
    starts = np.random.default_rng(0).normal(0, 1, 30)
    one = intervals.interval(starts[None])
    three = intervals.interval(np.tile(starts, (3, 1)))
    np.testing.assert_allclose(one, three, atol=0.05)


def test_interquartile_mean_by_hand():
    scores = np.array([[0.0, 10.0, 20.0, 1000.0], [30.0, 40.0, 50.0, 60.0]])
    assert intervals.interquartile_mean(scores) == (20 + 30 + 40 + 50) / 4


def committed(name):
    return results.read_all(RESULTS / f"{name}.jsonl")


def test_intervals_of_the_committed_walker_table():
    """PSEC fixed S->W is about [658, 914], not the [712, 880] of episodes apart."""
    raws = committed("dmc_walker/table2")
    cell = tables.summarise(table2.TABLE, raws)["S->W"]["PSEC fixed"]
    assert cell["seeds"] == [0, 1, 2] and cell["episodes"] == 20
    assert cell["return"]["mean"] == pytest.approx(802.385, abs=0.001)
    assert cell["return"]["low"] == pytest.approx(658, abs=4)
    assert cell["return"]["high"] == pytest.approx(914, abs=4)


def test_orders_of_the_paper_that_stand_on_walker():
    """Of the paper's orders on S->W two are separated."""
    rows = tables.differences(table2.TABLE, committed("dmc_walker/table2"))
    paper = {(a, b) for a in ("PSEC", "NSEC") for b in ("ASEC", "NSEC", "Scratch")}
    paper |= {("PSEC", "PSEC (MLP)"), ("PSEC", "PSEC fixed")}
    said = {
        (row["above"], row["below"]): tables.verdict(row)
        for row in rows
        if row["setting"] == "S->W" and (row["above"], row["below"]) in paper
    }
    stands = {order for order, verdict in said.items() if verdict == "stands"}
    assert stands == {("PSEC", "ASEC"), ("NSEC", "ASEC")}
    assert set(said.values()) == {"stands", "not separated"} and len(said) == 6


TABLES = {
    "dmc_walker/table2": table2.TABLE,
    "demo/table2": table2.TABLE,
    "dsrl/table1": table1.TABLE,
    "dsrl_softmax/table1": table1.TABLE,
    "dynamics/dynamics_shift": dynamics_shift.TABLE,
    "dynamics_1000/dynamics_shift": dynamics_shift.TABLE,
    "dynamics_sampled/dynamics_shift": dynamics_shift.TABLE,
    "dynamics_sampled_1000/dynamics_shift": dynamics_shift.TABLE,
}


@pytest.mark.parametrize("name", TABLES)
def test_every_committed_line_is_a_cell_of_its_table(name):
    table, raws = TABLES[name], committed(name)
    scores = tables.collect(table, raws)
    collected = [
        (setting, method, seed)
        for setting, cells in scores.items()
        for method, cell in cells.items()
        for seed in cell
    ]
    assert sorted(collected) == sorted(results.key(line) for line in raws)
    for line in raws:
        assert line["mean"] == pytest.approx(np.mean(line["returns"]), rel=1e-12)
        if "scores" in line:
            cell = scores[line["setting"]][line["method"]]
            np.testing.assert_allclose(cell[line["seed"]]["score"], line["scores"])


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("dmc_walker/table2", table2.write_table),
        ("dsrl/table1_bullet", lambda folder: table1.write_table(folder, "bullet")),
        (
            "dsrl/table1_bullet_limit5",
            lambda folder: table1.write_table(folder, "bullet", 5.0),
        ),
        ("dynamics_1000/dynamics_shift", dynamics_shift.write_table),
        ("dynamics_sampled_1000/dynamics_shift", dynamics_shift.write_table),
        ("walker_changes/walker_changes", walker_changes.write_table),
        (
            "walker_changes/walker_reported",
            lambda folder: walker_changes.write_table(folder, walker_changes.REPORTED),
        ),
    ],
)
def test_committed_tables_follow_from_the_committed_lines(name, write, tmp_path):
    folder, _, table = name.partition("/")
    for file in (RESULTS / folder).glob("*.jsonl"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    text = write(tmp_path)
    assert text == (RESULTS / f"{name}.md").read_text()
    for ending in ("md", "csv"):
        expected = (RESULTS / f"{name}.{ending}").read_text()
        assert (tmp_path / f"{table}.{ending}").read_text() == expected


FINISHED = {
    "dmc_walker/table2": (table2.TABLE, dmc_walker.job("standard")),
    "demo/table2": (table2.TABLE, dmc_walker.job("quick")),
    "dsrl/table1": (table1.TABLE, dsrl.job("standard")),
    "dsrl_select/table1": (table1.TABLE, dsrl.job("standard")),
    "unscaled/table2": (
        table2.TABLE,
        dmc_walker.job("standard").changed(variants.VARIANTS["unscaled"].changes),
    ),
    "walker_changes/walker_changes": (
        walker_changes.TABLE,
        dmc_walker.job("standard").changed(walker_changes.STARTS),
    ),
    "walker_changes/walker_reported": (
        walker_changes.REPORTED,
        dmc_walker.job("standard"),
    ),
    "dynamics/dynamics_shift": (dynamics_shift.TABLE, d4rl.job("standard")),
    "dynamics_1000/dynamics_shift": (
        dynamics_shift.TABLE,
        d4rl.job("standard").changed({"table.transitions": 1000}),
    ),
    "dynamics_sampled/dynamics_shift": (dynamics_shift.TABLE, d4rl.job("standard")),
    "dynamics_sampled_1000/dynamics_shift": (
        dynamics_shift.TABLE,
        d4rl.job("standard").changed({"table.transitions": 1000}),
    ),
    "dynamics/shift_strength": (
        shift_strength.table(
            ("halfcheetah-medium", "walker2d-medium"), shift_strength.FACTORS
        ),
        d4rl.job("standard"),
    ),
}


@pytest.fixture
def no_training(monkeypatch):
    """Whatever would be measured anew fails."""

    def fail(*arguments, **options):
        raise AssertionError("a finished result is measured again")

    monkeypatch.setattr(grid, "train", fail)
    monkeypatch.setattr(dynamics_shift.multirun, "train", fail)


@pytest.mark.parametrize("name", FINISHED)
def test_committed_lines_are_finished_results_of_their_preset(
    name, no_training, tmp_path
):
    table, job = FINISHED[name]
    path = tmp_path / Path(name).with_suffix(".jsonl").name
    path.write_bytes((RESULTS / f"{name}.jsonl").read_bytes())
    table = dataclasses.replace(table, known=lambda *_: {})  # sets are not in git
    measured: dict[tuple[str, int], list[str]] = {}
    for setting, method, seed in map(results.key, results.read(path)):
        measured.setdefault((setting, seed), []).append(method)
    for (setting, seed), rows in measured.items():
        options = {"settings": [setting], "methods": rows}
        chosen = job.changed({"table.seeds": [seed]})
        grid.run(table, chosen, tmp_path / "runs", tmp_path, print, **options)
    assert path.read_bytes() == (RESULTS / f"{name}.jsonl").read_bytes()


@pytest.mark.parametrize("name", sorted(set(figures.FIGURES) - {"table2"}))
def test_committed_figures_are_finished(name, no_training, tmp_path):
    for file in (RESULTS / "dmc_walker").glob("*.jsonl"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    job, report = dmc_walker.job("standard"), []
    figures.measure(name, job, tmp_path / "runs", tmp_path, report.append)
    assert not report


def test_a_new_field_with_a_default_changes_no_fingerprint():
    def tree(*more):
        skill = dataclasses.make_dataclass("Skill", [("rank", int, 8), *more])
        part = dataclasses.field(default_factory=skill)
        return skill, dataclasses.make_dataclass("Tree", [("skill", skill, part)])

    for skill, job in (tree(), tree(("more", int, 7))):
        assert results.differing(job(), job()) == {}
        assert results.differing(job(skill(4)), job()) == {"skill": {"rank": 4}}
    assert results.differing(job(skill(4, 5)), job()) == {
        "skill": {"rank": 4, "more": 5}
    }


def test_more_seeds_or_rows_keep_what_is_there():
    job = dmc_walker.job("quick")
    before = results.fingerprint(job)
    more = {"table.seeds": (0, 1, 2), "table.methods": ("Base",)}
    assert results.fingerprint(job.changed(more)) == before
    for change in ({"skill.rank": 4}, {"data.seeds": {}}, {"table.transitions": 7}):
        assert results.fingerprint(job.changed(change)) != before


def test_summary_by_hand():
    raws = [raw(0), raw(1, (200.0, 400.0))]
    cell = tables.summarise(table2.TABLE, raws)["S->W"]["PSEC"]
    assert cell["return"]["mean"] == 250.0
    assert cell["return"]["of_seeds"] == [200.0, 300.0]
    assert cell["return"]["low"] < 250.0 < cell["return"]["high"]
    assert cell["falls"]["mean"] == 0.25
    assert (cell["seeds"], cell["episodes"], cell["mark"]) == ([0, 1], 2, "")
    without = [raw(0), raw(1) | {"versions": raw(1)["versions"] | {"commit": None}}]
    assert tables.summarise(table2.TABLE, without)["S->W"]["PSEC"]["mark"] == "†"
    without[0] |= {"data": "made"}  # a set of which only the origin is known
    assert tables.summarise(table2.TABLE, without)["S->W"]["PSEC"]["mark"] == "†‡"


def test_conditions_name_the_budgets_that_were_used():
    def gate(method, steps, batch):
        budget = {"gate": {"steps": steps, "batch_size": batch}}
        return raw(0, method=method) | {"budget": budget}

    raws = [gate("PSEC", 500, 256), gate("Support", 500, 256), gate("NSEC", 200, 64)]
    assert "gate 500 steps of 256 (NSEC: 200 of 64);" in results.conditions(raws)
    assert "gate 500 steps of 256;" in results.conditions(raws[:2])
    raws.append(gate("ASEC", 100, 64))
    assert "gate 100 to 500 steps of 64 to 256;" in results.conditions(raws)


@pytest.mark.parametrize(
    ("other", "what"),
    [
        ({"evaluation_seed": 8}, "evaluation_seed"),
        ({"config_fingerprint": "bbb"}, "config_fingerprint"),
        ({"data_fingerprint": "d"}, "data_fingerprint"),
        ({"returns": [1.0]}, "number of episodes"),
    ],
)
def test_seeds_of_one_cell_are_of_one_kind(other, what):
    with pytest.raises(InputError, match=f"S->W, PSEC: results of different {what}"):
        tables.summarise(table2.TABLE, [raw(0), raw(1) | other])


def test_differences_are_paired():
    """Noise that two methods share cancels: the order is separated all the same."""
    noise = np.random.default_rng(0).normal(500, 300, (3, 20))
    raws = [raw(s, noise[s] + 30, "NSEC") for s in range(3)]
    raws += [raw(s, noise[s], "ASEC") for s in range(3)]
    raws += [raw(s, noise[s] + 30, "PSEC") for s in range(2)]
    rows = {(r["above"], r["below"]): r for r in tables.differences(table2.TABLE, raws)}
    apart = rows["NSEC", "ASEC"]
    assert apart["mean"] == pytest.approx(30) and apart["low"] > 29
    assert tables.verdict(apart) == "stands" and apart["seeds"] == [0, 1, 2]
    assert tables.verdict(rows["PSEC", "NSEC"]) == "not separated"
    assert rows["PSEC", "NSEC"]["seeds"] == [0, 1], "of the seeds that both have"
    assert tables.verdict({"low": -2.0, "high": -1.0}) == "reversed"


def test_table_puts_the_papers_number_beside_ours():
    raws = [raw(0), raw(0, (1.0, 2.0), "Base")]
    table, summary = table2.TABLE, tables.summarise(table2.TABLE, raws)
    lines = tables.markdown(tables.cells(table, summary)).splitlines()
    assert lines[0] == "| method | S->W | IQM | falls | paper |"
    [line] = [line for line in lines if line.startswith("| PSEC |")]
    assert line.startswith("| PSEC | 200 [") and line.endswith("| 50 % | 688 |")
    assert len(lines) == 4, "rows that were measured nowhere are left out"
    rows = tables.compared(
        [
            {"setting": "S->W", **Order("A", "B", "return")._asdict()}
            | {"mean": 5.0, "low": -1.0, "high": 9.0}
        ],
        0,
    )
    assert rows[1:] == [["return: A > B", "5 [-1, 9] not separated"]]


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{p}.md" for p in PAGES)])
def test_tables_in_the_docs_are_the_committed_ones(page):
    text = (ROOT / page).read_text()
    assert include.BLOCK.search(text), "a page without a table"
    assert include.included(text) == text, f"python -m experiments.tools.include {page}"
