"""Sentences about results whose numbers are read from committed results.

The pages' sentences about results are templates, experiments/sentences/*.md, that
experiments.tools.include puts into the pages. Their placeholders are format fields of
`known`:

    {walker[S->W][PSEC][return]:0i}         852 [722, 937]: no decimals, with interval
    {walker[S->W][PSEC][falls]:%}           8 %
    {diff[walker][S->W][return PSEC > NSEC][verdict]}    not separated
    {orders[walker][S->W][stands]}          PSEC > ASEC, NSEC > ASEC and ...
    {safe[all][PSEC]:words}                 two

tests/test_statements.py checks that the pages hold no other numbers.
"""

import functools
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import dynamics_shift, results, table1, table2, tables
from psec_jax.files import read_json

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
FOLDER = ROOT / "experiments" / "sentences"
WORDS = (
    "none one two three four five six seven eight nine ten eleven twelve thirteen "
    "fourteen fifteen sixteen seventeen eighteen"
).split()
TABLES = {
    "walker": "dmc_walker/table2",
    "demo": "demo/table2",
    "changes": "walker_changes/walker_changes",
    "reported": "walker_changes/walker_reported",
    "bullet": "dsrl/table1_bullet",
    "bullet5": "dsrl/table1_bullet_limit5",
    "metadrive": "dsrl/table1_metadrive",
    "softmax": "dsrl_softmax/table1_bullet",
    "select": "dsrl_select/table1_bullet",
    "select_metadrive": "dsrl_select/table1_metadrive",
    "shift": "dynamics/dynamics_shift",
    "thousand": "dynamics_1000/dynamics_shift",
    "sampled": "dynamics_sampled/dynamics_shift",
    "sampled_thousand": "dynamics_sampled_1000/dynamics_shift",
    "cw10": "continual/cw10",
    "cw20": "continual/cw20",
    "unseen12": "continual/unseen12",
    "cube": "continual/cube",
    "back_and_forth": "continual/walker",
    "walker12": "continual/walker12",
    "mixed": "continual/walker12_mixed",
}
FIGURES = ("interpolation", "rank", "sample_efficiency", "training_efficiency")


class Stats(dict[str, Any]):
    """Statistics: ":1" is the mean, ":1i" mean and interval, ":%" a share."""

    def __format__(self, spec: str) -> str:
        if spec == "%":
            return f"{100 * self['mean']:.0f} %"
        if spec.endswith("i"):
            return tables.spread(self, int(spec[:-1]))
        return f"{self['mean']:z.{int(spec)}f}"


class Names(list[str]):
    """Names, joined; ":words" is their number in words."""

    def __format__(self, spec: str) -> str:
        if spec == "words":
            return WORDS[len(self)]
        if len(self) < 2:
            return "".join(self) or "none"
        return f"{', '.join(self[:-1])} and {self[-1]}"


def render(template: str) -> str:
    """The template with its numbers and wrapped paragraphs; tables stay as they are."""
    blocks = template.format_map(known()).strip().split("\n\n")
    return "\n\n".join(map(_wrapped, blocks)) + "\n"


def _wrapped(block: str) -> str:
    if re.search(r"^ *\|", block, re.MULTILINE):
        return block
    return "\n".join(map(_filled, re.split(r"\n(?=- )", block)))


def _filled(item: str) -> str:
    """One paragraph or list item; a line that began with ">" would be a quotation."""
    indent = " " * (len(item) - len(item.lstrip()))
    hanging = indent + "  " * item.lstrip().startswith("- ")
    text = textwrap.fill(
        " ".join(item.split()).replace(" > ", "\0>\0"),
        width=88,
        initial_indent=indent,
        subsequent_indent=hanging,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return text.replace("\0", " ")


@functools.cache
def known() -> dict[str, Any]:
    """All that templates read."""
    files = {name: read_json(RESULTS / f"{f}.json") for name, f in TABLES.items()}
    shown = {name: _cells(file["cells"]) for name, file in files.items()}
    differences = {name: _differences(f["differences"]) for name, f in files.items()}
    raws = results.read_all(RESULTS / "dsrl/table1.jsonl")
    return shown | {
        "diff": differences,
        "orders": {name: _orders(found) for name, found in differences.items()},
        "wins": _wins(files["shift"]["differences"]),
        "safe": _tasks(shown, table1.is_safe),
        "near": _tasks(
            shown, lambda e: not table1.is_safe(e) and e["cost"]["mean"] < 1
        ),
        "over": _tasks(shown, lambda e: e["cost"]["mean"] >= 1),
        "tasks": _tasks(shown, lambda entry: True)["all"]["PSEC"],
        "steps": _means(raws, "lengths"),
        "returns": _means(raws, "returns"),
        "released_gap": _released_gap(shown["metadrive"]),
        "figure": {name: _figure(name) for name in FIGURES},
        "strength": _means(
            results.read_all(RESULTS / "dynamics/shift_strength.jsonl"), "scores"
        ),
        "data": _data("dynamics")
        | {"thousand": _data("dynamics_1000"), "sampled": _data("dynamics_sampled")},
        "bfloat16": {
            name: read_json(RESULTS / f"bfloat16/bf16_{name}_S-W.json")["mean"]
            for name in ("Support", "PSEC")
        },
        "hundred": _hundred(),
        "bench": _rows("benchmark.json"),
        "sparse": _rows("sparse.json"),
        "library": _rows("library.json"),
        "train1": _rows("benchmark_train/run1.json"),
        "train2": _rows("benchmark_train/run2.json"),
        "share": _rows("benchmark_share.json"),
        "gpu": _gpu("steps", "stage", "batch", "form", "calls"),
        "gpu_authors": _gpu("authors", "stage", "batch"),
        "gpu_seeds": _rows("gpu/seeds.json"),
        "gpu_cell": _rows("gpu/evaluation.json"),
        "mjx": _mjx(),
        "trace": _traces(),
        "sets": _sets(),
        "paper": {
            "walker": {n: dict(row) for n, row in table2.TABLE.paper.items()},
            "shift": {n: dict(row) for n, row in dynamics_shift.TABLE.paper.items()},
        },
        "run_gain": _across("S+W->R", "S->R"),
        "unscaled": _unscaled(RESULTS / "unscaled/table2.jsonl"),
        "without_scaling": _cells(
            tables.summarise(
                table2.TABLE, results.read_all(RESULTS / "unscaled/table2.jsonl")
            )
        ),
    }


def short(setting: str) -> str:
    """A task's name without what all names of its suite share."""
    return re.sub(r"^Offline(Metadrive-)?|-v0$", "", setting)


def _cells(cells: Mapping[str, Any]) -> dict[str, Any]:
    return {
        short(setting): {
            method: {
                key: Stats(value) if isinstance(value, Mapping) else value
                for key, value in entry.items()
            }
            for method, entry in entries.items()
        }
        for setting, entries in cells.items()
    }


def _differences(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Stats]]:
    found: dict[str, dict[str, Stats]] = {}
    for row in rows:
        name = f"{row['metric']} {row['above']} > {row['below']}"
        stats = Stats(row, verdict=tables.verdict(row))
        found.setdefault(short(row["setting"]), {})[name] = stats
    return found


def _orders(differences: Mapping[str, Mapping[str, Stats]]) -> dict[str, Any]:
    return {
        setting: {
            verdict: Names(
                name.partition(" ")[2]
                for name, stats in rows.items()
                if stats["verdict"] == verdict
            )
            for verdict in ("stands", "reversed", "not separated")
        }
        for setting, rows in differences.items()
    }


def _wins(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """In how many grid cells PSEC is above each rival, and by what differences."""
    found = {}
    for rival in dynamics_shift.RIVALS:
        mine = [row for row in rows if row["below"].partition(" (")[0] == rival]
        found[rival] = {
            "cells": len(mine),
            "above": sum(row["mean"] > 0 for row in mine),
            "separated": sum(row["low"] > 0 for row in mine),
            "reversed": sum(row["high"] < 0 for row in mine),
        }
    return found


def _tasks(shown: Mapping[str, Any], chosen: Any) -> dict[str, dict[str, Names]]:
    """{suite or "all": {method: tasks whose entry is chosen}}."""
    found: dict[str, dict[str, Names]] = {}
    of_all = ("bullet", "metadrive")
    for suite in (*of_all, "bullet5", "select", "select_metadrive"):
        for task, entries in shown[suite].items():
            for method, entry in entries.items() if task != "mean" else ():
                for name in (suite, "all") if suite in of_all else (suite,):
                    names = found.setdefault(name, {}).setdefault(method, Names())
                    names.extend([task] if chosen(entry) else [])
    return found


def _means(raws: Sequence[results.Raw], name: str) -> dict[str, dict[str, float]]:
    """Mean of a field over seeds and episodes, by setting and method."""
    values: dict[str, dict[str, list[float]]] = {}
    for raw in raws:
        cell = values.setdefault(short(raw["setting"]), {})
        cell.setdefault(raw["method"], []).extend(raw[name])
    return {s: {m: float(np.mean(v)) for m, v in c.items()} for s, c in values.items()}


def _released_gap(cells: Mapping[str, Any]) -> float:
    """How far the gate of the authors' code is from its safety skill, at most."""
    return max(
        abs(
            entries["PSEC released"][metric]["mean"]
            - entries["Safety skill"][metric]["mean"]
        )
        for task, entries in cells.items()
        for metric in ("reward", "cost")
    )


def _figure(name: str) -> dict[str, dict[str, float]]:
    return _means(results.read_all(RESULTS / f"dmc_walker/{name}.jsonl"), "returns")


def _hundred() -> dict[str, Stats]:
    """The demo's PSEC and Scratch on 100 start states of S->W: returns, falls and the
    paired difference."""
    returns = {
        name: np.array(read_json(RESULTS / f"demo/walk_100_{name}.json")["returns"])
        for name in ("PSEC", "Scratch")
    }
    stats = tables.intervals.describe((returns["PSEC"] - returns["Scratch"])[None])
    found = {"difference": Stats(stats, verdict=tables.verdict(stats))}
    for name, values in returns.items():
        found[name] = Stats(mean=float(values.mean()))
        found[f"{name} falls"] = Stats(mean=float(np.mean(values < table2.FALL)))
    return found


def _data(folder: str) -> dict[str, float]:
    """Mean score of each target's transitions."""
    raws = results.read_all(RESULTS / folder / "dynamics_shift.jsonl")
    return {raw["setting"]: float(np.mean(raw["data_scores"])) for raw in raws}


def _rows(name: str) -> dict[str, Mapping[str, float]]:
    return {row["name"]: row for row in read_json(RESULTS / name)["rows"]}


def _gpu(name: str, *keys: str) -> dict[str, dict[str, float]]:
    """Steps per second by stage and batch, with the seconds of one in ms."""
    rows = read_json(RESULTS / f"gpu/{name}.json")["rows"]
    return {
        ", ".join(str(row[key]) for key in keys): row | {"ms": 1e3 / row["steps_per_s"]}
        for row in rows
    }


def _mjx() -> dict[str, dict[str, Any]]:
    """Returns in MJX and in dm_control, and their paired difference, by file."""
    found = {}
    for path in sorted((RESULTS / "mjx").glob("*.json")):
        raw = read_json(path)
        mjx = np.array(raw["returns"][raw["env"]])
        [processes] = [v for name, v in raw["returns"].items() if name != raw["env"]]
        difference = mjx - np.array(processes)
        found[path.stem] = {
            "episodes": len(mjx),
            "mjx": Stats(mean=float(mjx.mean())),
            "dm_control": Stats(mean=float(np.mean(processes))),
            "difference": Stats(tables.intervals.describe(difference[None])),
            "most": float(np.abs(difference).max()),
        }
    return found


def _traces() -> dict[str, dict[str, float]]:
    """{simulator: {"WEIGHT, OTHER": Pearson's r}}."""
    found = {}
    for path in sorted((RESULTS / "dsrl/gate_trace").glob("*.json")):
        rows = read_json(path)["correlations"]
        found[path.name.rpartition("-PSEC")[0]] = {
            f"{row['weight']}, {row['other']}": row["r"] for row in rows
        }
    return found


def _sets() -> dict[str, dict[str, float]]:
    """Trajectories within the cost limit of each set: their number and share."""
    cards = {
        path.parent.name: read_json(path)
        for path in sorted((RESULTS / "dsrl/sets").glob("*/card.json"))
    }
    return {
        name: {
            "safe": round(card["within_limit"] * card["trajectories"]),
            "percent": 100 * card["within_limit"],
        }
        for name, card in cards.items()
    }


def _across(above: str, below: str) -> dict[str, Stats]:
    """Paired differences of two settings on the same start states, by method."""
    raws = results.read_all(RESULTS / "dmc_walker/table2.jsonl")
    scores = tables.collect(table2.TABLE, raws)
    found = {}
    for method in ("PSEC", "Support"):
        pair = [
            tables.matrix(scores[name][method], "return") for name in (above, below)
        ]
        stats = tables.intervals.describe(pair[0] - pair[1])
        found[method] = Stats(stats, verdict=tables.verdict(stats))
    return found


def _unscaled(path: Path) -> str:
    """What was measured without scaled observations, beside the committed table."""
    if not path.exists():
        return "three seeds of Scratch, NSEC and PSEC on S->W: not measured yet"
    scaled = known_cells("walker")
    cells = _cells(tables.summarise(table2.TABLE, results.read_all(path)))
    return "; ".join(
        f"{setting} {method}: {entry['return']:0i} unscaled, "
        f"{scaled[setting][method]['return']:0i} scaled ({len(entry['seeds'])} seeds)"
        for setting, entries in cells.items()
        for method, entry in entries.items()
    )


def known_cells(name: str) -> dict[str, Any]:
    """The statistics of one committed table."""
    return _cells(read_json(RESULTS / f"{TABLES[name]}.json")["cells"])
