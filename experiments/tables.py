"""Raw results to tables: scores, their statistics, Markdown, CSV and JSON."""

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments import intervals, results
from experiments.grid import Table
from experiments.results import Raw
from psec_jax.errors import InputError
from psec_jax.files import write_atomic, write_json

Scores = Mapping[str, Mapping[str, Mapping[int, Mapping[str, np.ndarray]]]]
Entries = Mapping[str, Mapping[str, Any]]  # statistics of one setting, by method
STATS = ("mean", "low", "high", "iqm")
MARKS = {  # of rows with a result of which something is not known
    "†": "the commit of the code was not recorded",
    "‡": "the set's fingerprint was not recorded",
}
INTERVALS = "Mean and 95 % interval (seeds and start states resampled jointly)"
COMPARED = (
    "Paired differences (the same seeds and start states), mean and 95 % interval; an "
    "order whose interval includes 0 is not separated."
)


class Shown(NamedTuple):
    """A table with its statistics and what is said below them.

    Attributes:
      table: what is shown.
      raws: raw results.
      note: below the table.
      summary: statistics of the raw results.
      name: of its files.
      digits: of differences.
    """

    table: Table
    raws: Sequence[Raw]
    note: str
    summary: Mapping[str, Entries]
    name: str
    digits: int = 0

    def notes(self) -> list[str]:
        """Paragraphs below the table: note and conditions, and what marks mean."""
        marks = {
            m for c in self.summary.values() for e in c.values() for m in e["mark"]
        }
        known = [f"{mark} {what}" for mark, what in MARKS.items() if mark in marks]
        first = f"{self.note} {results.conditions(self.raws)}"
        return [first, *([f"{'; '.join(known)}."] if known else [])]


def collect(table: Table, raws: Sequence[Raw]) -> Scores:
    """{setting: {method: {seed: {metric: score of each episode}}}}, in table order.

    Raises:
      InputError: seeds of one grid cell that differ in config, data, start states or
        number of episodes.
    """
    cells: dict[tuple[str, str], list[Raw]] = {}
    for raw in sorted(raws, key=results.key):
        cells.setdefault(results.key(raw)[:2], []).append(raw)
    scores: dict[str, Any] = {}
    for setting in table.settings:
        for method in table.methods:
            if group := cells.get((setting, method)):
                _check_seeds(table, group)
                scores.setdefault(setting, {})[method] = {
                    raw["seed"]: {
                        metric: np.asarray(values, float)
                        for metric, values in table.score(raw).items()
                    }
                    for raw in group
                }
    return scores


def _check_seeds(table: Table, group: Sequence[Raw]) -> None:
    seen = [
        {name: raw.get(name) for name in (*table.identity, "evaluation_seed")}
        | {"number of episodes": len(raw.get("returns", []))}
        for raw in group
    ]
    for name in seen[0]:
        if len({json.dumps(fields[name]) for fields in seen}) > 1:
            values = {
                f"seed {r['seed']}": f[name] for r, f in zip(group, seen, strict=True)
            }
            raise InputError(
                f"{group[0]['setting']}, {group[0]['method']}: results of different "
                f"{name}, {values}; measure those that are wrong anew"
            )


def matrix(
    cell: Mapping[int, Mapping[str, np.ndarray]],
    metric: str,
    seeds: Sequence[int] | None = None,
) -> np.ndarray:
    """Scores [S, E] of a grid cell, of all its seeds or of those given."""
    return np.stack([cell[seed][metric] for seed in seeds or sorted(cell)])


def summarise(table: Table, raws: Sequence[Raw]) -> dict[str, dict[str, Any]]:
    """{setting: {method: {seeds, episodes, mark, METRIC: {mean, low, high, ...}}}}."""
    marks: dict[tuple[str, str], set[str]] = {}
    for raw in raws:
        marks.setdefault(results.key(raw)[:2], set()).update(_marks(raw))
    summary: dict[str, dict[str, Any]] = {}
    for setting, cells in collect(table, raws).items():
        for method, cell in cells.items():
            mark = "".join(sorted(marks[setting, method]))
            entry: dict[str, Any] = {"seeds": sorted(cell), "mark": mark}
            for metric in cell[min(cell)]:
                scores = matrix(cell, metric)
                entry["episodes"] = scores.shape[1]
                entry[metric] = intervals.describe(scores) | {
                    "of_seeds": scores.mean(1).tolist()
                }
            summary.setdefault(setting, {})[method] = entry
    return summary


def _marks(raw: Raw) -> str:
    """The marks of one raw result; sets named by a word alone have no fingerprint."""
    commit = "" if raw["versions"].get("commit") else "†"
    unknown = isinstance(raw.get("data"), str) and "data_fingerprint" not in raw
    return commit + ("‡" if unknown else "")


def of_metric(summary: Mapping[str, Entries], metric: str) -> dict[str, Any]:
    """{setting: {method: statistics of one metric}}, as figures read them."""
    return {
        setting: {method: entry[metric] for method, entry in entries.items()}
        for setting, entries in summary.items()
    }


def differences(table: Table, raws: Sequence[Raw]) -> list[dict[str, Any]]:
    """The table's orders with their paired differences: same seeds and start states."""
    rows = []
    for setting, cells in collect(table, raws).items():
        for order in table.orders:
            if not {order.above, order.below} <= cells.keys():
                continue
            above, below = cells[order.above], cells[order.below]
            seeds = sorted(above.keys() & below.keys())
            if not seeds:
                continue
            scores = matrix(above, order.metric, seeds)
            scores = scores - matrix(below, order.metric, seeds)
            rows.append(
                {"setting": setting, **order._asdict(), "seeds": seeds}
                | intervals.describe(scores)
            )
    return rows


def verdict(difference: Mapping[str, float]) -> str:
    """What the interval of a paired difference says of the order."""
    if difference["low"] > 0:
        return "stands"
    return "reversed" if difference["high"] < 0 else "not separated"


def spread(stats: Mapping[str, float], digits: int = 0) -> str:
    """Mean and interval as text."""
    return "{mean:z.{d}f} [{low:z.{d}f}, {high:z.{d}f}]".format(d=digits, **stats)


def number(metric: str, digits: int = 0) -> Callable[[Entries, str], str]:
    """A column: mean and interval of a metric."""
    return lambda entries, method: (
        spread(entries[method][metric], digits) + entries[method]["mark"]
    )


def middle(metric: str, digits: int = 0) -> Callable[[Entries, str], str]:
    """A column: interquartile mean of a metric."""
    return lambda entries, method: f"{entries[method][metric]['iqm']:z.{digits}f}"


def share(metric: str) -> Callable[[Entries, str], str]:
    """A column: mean of a metric in per cent."""
    return lambda entries, method: f"{100 * entries[method][metric]['mean']:.0f} %"


def cells(table: Table, summary: Mapping[str, Entries]) -> list[list[str]]:
    """The head, and a row a method: the table's columns and the paper's number for each
    setting."""
    measured = {method for entries in summary.values() for method in entries}
    reported = {m: None for name in summary for m in table.paper.get(name, {})}
    rows = [m for m in table.methods if m in measured]
    rows += [m for m in reported if m not in table.methods]
    head = ["method"]
    for setting in summary:
        head += [setting, *list(table.columns)[1:], *(["paper"] if reported else [])]
    lines = [head]
    for method in rows:
        texts = [method]
        for setting, entries in summary.items():
            for show in table.columns.values():
                texts.append(show(entries, method) if method in entries else "-")
            if reported:
                texts.append(_paper(table.paper.get(setting, {}).get(method), "-"))
        lines.append(texts)
    return lines


def compared(rows: Sequence[Mapping[str, Any]], digits: int) -> list[list[str]]:
    """The head, and a row an order: the paired difference and its verdict in each
    setting."""
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    found: dict[str, dict[str, str]] = {}
    for row in rows:
        claim = f"{row['metric']}: {row['above']} > {row['below']}"
        text = f"{spread(row, digits)} {verdict(row)}"
        found.setdefault(claim, {})[row["setting"]] = text
    lines = [[c, *(texts.get(s, "-") for s in settings)] for c, texts in found.items()]
    return [["claimed order", *settings], *lines]


def untried(raws: Sequence[Raw]) -> str:
    """A sentence about fixed rows whose raw results name no weights; else empty."""
    fixed = [raw for raw in raws if raw["method"].endswith(" fixed")]
    without = sum("tried" not in raw for raw in fixed)
    if not without:
        return ""
    return (
        f" {without} of {len(fixed)} results of fixed rows were tuned on grids without "
        "0 (the base alone) and do not name all weights tried."
    )


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text, of which the first is the head, as a table."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "".join(f"| {' | '.join(row)} |\n" for row in lines)


def _paper(value: Any, missing: str) -> str:
    if value is None:
        return missing
    return " / ".join(f"{number:.4g}" for number in np.atleast_1d(value))


def write(shown: Shown, folder: Path) -> str:
    """Writes NAME.json, NAME.md and NAME.csv; returns the Markdown."""
    table, summary, name = shown.table, shown.summary, shown.name
    rows = differences(table, shown.raws)
    text = "\n".join(
        [markdown(cells(table, summary)), *(f"{n}\n" for n in shown.notes())]
    )
    if rows:
        text += f"\n{COMPARED}\n\n{markdown(compared(rows, shown.digits))}"
    write_json(folder / f"{name}.json", {"cells": summary, "differences": rows})
    write_atomic(folder / f"{name}.md", text)
    write_atomic(folder / f"{name}.csv", _csv(table, summary))
    return text


def _csv(table: Table, summary: Mapping[str, Entries]) -> str:
    """A row a setting and method: every statistic of every metric."""
    first = next(iter(next(iter(summary.values())).values()))
    metrics = [k for k, v in first.items() if isinstance(v, Mapping)]
    columns = [(metric, stat) for metric in metrics for stat in STATS]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    heads = ["_".join(column) for column in columns]
    writer.writerow(["setting", "method", "seeds", "episodes", *heads, "paper"])
    for setting, cells in summary.items():
        for method, entry in cells.items():
            reported = _paper(table.paper.get(setting, {}).get(method), "")
            numbers = [f"{entry[metric][stat]:z.4f}" for metric, stat in columns]
            known = (len(entry["seeds"]), entry["episodes"])
            writer.writerow([setting, method, *known, *numbers, reported])
    return buffer.getvalue()
