"""The one result format: raw episodes in files, statistics and tables from those only.

A raw file is one JSON object: setting, method, seed, env, the raw returns of every
episode, the steps and config they come from, versions, hardware and commit. Those of
Table 2 lie in RESULTS/raw, those of a figure in RESULTS/raw_figures/NAME.
"""

import csv
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from psec_jax.errors import InputError
from psec_jax.files import read_json, write_atomic, write_json
from psec_jax.runtime.run import versions

STAGES = ("base", "skill", "gate")
FALL = 150.0  # an episode of the walker below this return lay on the ground
RESAMPLES = 10_000


def raw_path(
    folder: str | Path, setting: str, method: str, seed: int, kind: str = "raw"
) -> Path:
    """File of one cell and seed in the subfolder `kind` of a results folder."""
    name = re.sub(r"[^A-Za-z0-9+]+", "-", f"{setting}_{method}").strip("-")
    return Path(folder) / kind / f"{name}_seed{seed}.json"


def config_fingerprint(config: Mapping[str, Any]) -> str:
    """12 hex digits that change with any field but the table's rows and seeds.

    More seeds or rows leave the cells that are there as they are.
    """
    table = {k: v for k, v in config["table"].items() if k not in ("methods", "seeds")}
    text = json.dumps({**config, "table": table}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def header(
    config: Mapping[str, Any], setting: str, method: str, seed: int
) -> dict[str, Any]:
    """What every raw file begins with: whose result it is and what it was made with."""
    return {
        "setting": setting,
        "method": method,
        "seed": seed,
        "preset": config["preset"],
        "budget": {
            stage: {k: config[stage][k] for k in ("steps", "batch_size")}
            for stage in STAGES
        },
        "config_fingerprint": config_fingerprint(config),
        "versions": versions(),
    }


def read_raw(path: Path, fingerprint: str) -> dict[str, Any] | None:
    """A finished cell, or None.

    Raises:
      InputError: the file was made with another config.
    """
    if not path.exists():
        return None
    raw = read_json(path)
    if raw.get("config_fingerprint") != fingerprint:
        raise InputError(
            f"{path}: made with config {raw.get('config_fingerprint')}, this is "
            f"{fingerprint}; choose another --results folder, or delete the old one"
        )
    return raw


def write_raw(path: Path, raw: Mapping[str, Any]) -> None:
    """Keep one cell."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, raw)


def load_all(folder: str | Path, kind: str = "raw") -> list[dict[str, Any]]:
    """Every raw file in the subfolder `kind` of a results folder.

    Raises:
      InputError: there is none.
    """
    paths = sorted((Path(folder) / kind).glob("*.json"))
    if not paths:
        raise InputError(f"{folder}: no {kind}/*.json; measure something first")
    return [read_json(path) for path in paths]


def interval(by_seed: Sequence[Sequence[float]]) -> tuple[float, float]:
    """95 % bootstrap interval of the mean: seeds resampled, then their episodes."""
    generator = np.random.default_rng(0)
    groups = [np.asarray(returns, float) for returns in by_seed]
    chosen = generator.integers(len(groups), size=(RESAMPLES, len(groups)))
    means = np.empty_like(chosen, dtype=float)
    for g, returns in enumerate(groups):
        places = np.argwhere(chosen == g)
        draws = generator.integers(len(returns), size=(len(places), len(returns)))
        means[places[:, 0], places[:, 1]] = returns[draws].mean(1)
    low, high = np.quantile(means.mean(1), (0.025, 0.975))
    return float(low), float(high)


def summarise(raws: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """{setting: {method: {"mean", "low", "high", "returns", ...}}} of raw files."""
    table: dict[str, dict[str, Any]] = {}
    for raw in raws:
        cell = table.setdefault(raw["setting"], {}).setdefault(raw["method"], {})
        cell[raw["seed"]] = raw["returns"]
    for methods in table.values():
        for method, by_seed in methods.items():
            returns = [r for seed in sorted(by_seed) for r in by_seed[seed]]
            low, high = interval(list(by_seed.values()))
            methods[method] = {
                "mean": float(np.mean(returns)),
                "low": low,
                "high": high,
                "falls": float(np.mean(np.asarray(returns) < FALL)),
                "seeds": {str(s): float(np.mean(by_seed[s])) for s in sorted(by_seed)},
                "episodes": len(returns),
                "returns": returns,
            }
    return table


def conditions(raws: Sequence[Mapping[str, Any]]) -> str:
    """What raw files were measured with: seeds, episodes, budget and machine."""
    seeds = Counter((raw["setting"], raw["method"]) for raw in raws).values()
    measured = f"{_range(seeds)} training seed{'s' * (max(seeds) > 1)}"
    if episodes := [len(raw["returns"]) for raw in raws if "returns" in raw]:
        measured += f", {_range(episodes)} episodes a seed"
    budget = []
    for stage in (*STAGES, "gaussian"):
        if sizes := [raw["budget"][stage] for raw in raws if stage in raw["budget"]]:
            steps = _range(size["steps"] for size in sizes)
            batch = _range(size["batch_size"] for size in sizes)
            budget.append(f"{stage} {steps} steps of {batch}")
    presets = " and ".join(sorted({raw["preset"] for raw in raws}))
    made = raws[0]["versions"]
    cores = f"{made['cores']} core{'s' * (made['cores'] > 1)}"
    return (
        f"{measured}. Preset {presets}: {', '.join(budget)}; {cores} of "
        f"{made['cpu']}, jax {made['jax']}."
    )


def _range(numbers: Iterable[int]) -> str:
    numbers = sorted(numbers)
    first, last = numbers[0], numbers[-1]
    return str(first) if first == last else f"{first} to {last}"


def markdown(
    summary: Mapping[str, Mapping[str, Any]],
    methods: Sequence[str],
    paper: Mapping[str, Mapping[str, float]],
) -> str:
    """One row a method: mean [95 % interval], share of falls, the paper's number."""
    settings = list(summary)
    head = ["method"] + [f"{s} | falls | paper" for s in settings]
    lines = [
        "| " + " | ".join(head) + " |",
        "|" + "---|" * (1 + 3 * len(settings)),
    ]
    for method in methods:
        cells = [method]
        for setting in settings:
            cell = summary[setting].get(method)
            cells.append(
                f"{cell['mean']:.0f} [{cell['low']:.0f}, {cell['high']:.0f}]"
                if cell
                else "-"
            )
            cells.append(f"{100 * cell['falls']:.0f} %" if cell else "-")
            reported = paper.get(setting, {}).get(method)
            cells.append("-" if reported is None else f"{reported:g}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def write_tables(
    folder: str | Path,
    name: str,
    summary: Mapping[str, Mapping[str, Any]],
    methods: Sequence[str],
    paper: Mapping[str, Mapping[str, float]],
    note: str,
) -> str:
    """Write NAME.json, NAME.md and NAME.csv; returns the markdown."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = f"{markdown(summary, methods, paper)}\n{note}\n"
    write_json(folder / f"{name}.json", summary)
    write_atomic(folder / f"{name}.md", text)
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow("setting method mean low high falls episodes seeds paper".split())
    for setting, cells in summary.items():
        for method in methods:
            if method in cells:
                cell = cells[method]
                writer.writerow(
                    [
                        setting,
                        method,
                        *(f"{cell[k]:.2f}" for k in ("mean", "low", "high", "falls")),
                        cell["episodes"],
                        len(cell["seeds"]),
                        paper.get(setting, {}).get(method, ""),
                    ]
                )
    write_atomic(folder / f"{name}.csv", buffer.getvalue())
    return text
