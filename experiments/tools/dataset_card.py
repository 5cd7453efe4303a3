r"""Describe a dataset: a card, and a plot of its trajectories.

    python -m experiments.tools.dataset_card --data=OfflineBallRun-v0 \
        --out=cards/ball_run
    python -m experiments.tools.dataset_card --data=halfcheetah-medium-v2 \
        --out=cards/cheetah
    python -m experiments.tools.dataset_card --data=walker.hdf5 --out=cards/walker

writes OUT/card.json, OUT/card.md and OUT/plane.png and .svg: where the data comes from,
how many trajectories and of which lengths, quantiles of returns and costs, the share
within --cost_limit, and the file's attributes. For a DSRL task returns and costs are
given normalised too, for a set of D4RL its scores. The plot is of costs and returns,
or of lengths and returns where the data have no costs.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import plots
from psec_jax import data as datasets
from psec_jax.data import d4rl_sets, dataset, dsrl, minari, sets
from psec_jax.data.recording import success_rate
from psec_jax.errors import InputError
from psec_jax.files import reported, write_atomic, write_json
from psec_jax.types import Dataset

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
LONG = 200  # characters of an attribute beyond which it is only described
BENCHMARKS = {"DSRL": dsrl, "D4RL": d4rl_sets}


def describe(
    ds: Dataset, attrs: Mapping[str, Any], path: Path, cost_limit: float
) -> dict[str, Any]:
    """The card of a dataset, of JSON types.

    Args:
      ds: whole trajectories.
      attrs: the file's attributes.
      path: of the file; only its name is in the card.
      cost_limit: the most that a safe trajectory costs.

    Raises:
      InputError: a limit below 0.
    """
    benchmark, task = _task(path) or (None, "")
    returns, costs = dataset.episode_returns(ds), dataset.episode_costs(ds)
    normalised = dsrl.normalised_cost(costs, cost_limit)
    slices = dataset.episode_slices(ds)
    lengths = np.array([rows.stop - rows.start for rows in slices])
    safe = costs <= cost_limit
    card = {
        "source": path.name,
        "origin": _origin(path, attrs, benchmark),
        "task": task or None,
        "environment": datasets.environment(path) or attrs.get("environment"),
        "fingerprint": dataset.fingerprint(ds),
        "transitions": len(ds.obs),
        "trajectories": len(returns),
        "obs_dim": ds.obs.shape[1],
        "action_dim": ds.action.shape[1],
        "ended": int(ds.terminal.sum()),
        "cut": int(ds.timeout.sum()),
        "success": success_rate(attrs, str(path)),
        "length": _quantiles(lengths),
        "return": _quantiles(returns),
        "has_costs": benchmark == "DSRL" or bool(ds.cost.any()),
        "cost": _quantiles(costs),
        "steps_with_cost": float(np.mean(ds.cost > 0)),
        "cost_limit": cost_limit,
        "within_limit": float(np.mean(safe)),
        "best_return_within_limit": float(returns[safe].max()) if safe.any() else None,
        "normalised_cost": _quantiles(normalised),
        "normalised_return": None,
        "normalised_score": None,
        "attributes": {
            name: _short(value)
            for name, value in attrs.items()
            if name != "missing" or value
        },
    }
    if benchmark == "DSRL":
        card["normalised_return"] = _quantiles(dsrl.normalised_return(task, returns))
    if benchmark == "D4RL":
        scores = d4rl_sets.normalised_score(task, returns)
        card["normalised_score"] = _quantiles(scores)
    return card


def _task(path: Path) -> tuple[str, str] | None:
    """The benchmark of a file and its task, where its name says so."""
    for benchmark, source in BENCHMARKS.items():
        task = source.task_of(path)
        if task is not None:
            return benchmark, task
    return None


def _origin(path: Path, attrs: Mapping[str, Any], benchmark: str | None) -> str:
    if attrs.get("made_by") == sets.MAKER:
        return "made by this project in the simulator"
    if minari.task_of(path) is not None:
        return "Minari dataset"
    return f"official {benchmark} file" if benchmark else "given by path"


def _quantiles(values: np.ndarray | float) -> dict[str, float]:
    """Mean and quantiles of numbers [E]."""
    quantiles = {f"{q:g}": float(np.quantile(values, q)) for q in QUANTILES}
    return {"mean": float(np.mean(values))} | quantiles


def _short(value: Any) -> Any:
    """An attribute in the form of a card."""
    if isinstance(value, np.ndarray):
        return f"array of shape {list(value.shape)}, {value.dtype}"
    if isinstance(value, str) and len(value) > LONG:
        return f"{value[:LONG]}... ({len(value)} characters)"
    return value if isinstance(value, (str, int, float)) else repr(value)


def markdown(card: Mapping[str, Any]) -> str:
    """The card as a page."""
    rows = {
        "length": "length",
        "return": "return",
        "normalised return": "normalised_return",
        "normalised score": "normalised_score",
    }
    if card["has_costs"]:
        rows |= {"cost": "cost", "normalised cost": "normalised_cost"}
    names = ["mean", *(f"{q:g}" for q in QUANTILES)]
    heads = ["mean", "least", *(f"{100 * q:g} %" for q in QUANTILES[1:-1]), "most"]
    best = card["best_return_within_limit"]
    lines = [
        f"# {card['task'] or card['source']}",
        "",
        f"- file: {card['source']} ({card['origin']}), fingerprint "
        f"{card['fingerprint']}",
        f"- simulator: {card['environment'] or 'unknown'}",
        f"- {card['trajectories']} trajectories, {card['transitions']} transitions; "
        f"{card['ended']} ended, {card['cut']} cut at a time limit"
        + (
            ""
            if card["success"] is None
            else f"; {100 * card['success']:.1f} % reached the task's goal"
        ),
        f"- observations of {card['obs_dim']} numbers, actions of {card['action_dim']}",
    ]
    if card["has_costs"]:
        lines += [
            f"- cost limit {card['cost_limit']:g}: {100 * card['within_limit']:.1f} % "
            "of the trajectories are within it"
            + ("" if best is None else f", the best of them with return {best:.1f}"),
            f"- {100 * card['steps_with_cost']:.1f} % of the steps have a cost",
        ]
    lines += [
        "",
        "| of a trajectory | " + " | ".join(heads) + " |",
        "|" + "---|" * (1 + len(heads)),
    ]
    for label, field in rows.items():
        if card[field] is not None:
            cells = " | ".join(f"{card[field][name]:.4g}" for name in names)
            lines.append(f"| {label} | {cells} |")
    if card["attributes"]:
        lines += ["", "Attributes of the file:", ""]
        lines += [f"- {name}: {value}" for name, value in card["attributes"].items()]
    return "\n".join([*lines, "", "![plane](plane.png)", ""])


def write(
    data: str,
    out: str | Path,
    cost_limit: float = 10.0,
    clip_actions: bool = False,
    offline: bool = False,
) -> dict[str, Any]:
    """Write a dataset's card and plot into a directory; returns the card.

    Args:
      data: HDF5 file, episode .npz or a directory of them, or a set's name.
      out: directory of the card, made if missing.
      cost_limit: the most that a safe trajectory costs.
      clip_actions: clip actions into [-1, 1] instead of refusing them.
      offline: never download data.

    Raises:
      InputError: data or a limit that cannot be used, or files that cannot be written.
    """
    if cost_limit < 0:
        raise InputError(f"cost_limit: got {cost_limit:g}, expected 0 or more")
    path = datasets.locate(data, offline)
    ds, attrs = datasets.read(path, clip_actions=clip_actions)
    card = describe(ds, attrs, path, cost_limit)
    out = Path(out)
    with reported(f"make the folder {out}"):
        out.mkdir(parents=True, exist_ok=True)
    draw = functools.partial(
        plots.plane,
        returns=dataset.episode_returns(ds),
        title=card["task"] or card["source"],
        note=f"{card['trajectories']} trajectories of {card['source']} "
        f"({card['origin']}).",
    )
    if card["has_costs"]:
        figure = draw(dataset.episode_costs(ds), limit=cost_limit)
    else:
        lengths = [rows.stop - rows.start for rows in dataset.episode_slices(ds)]
        figure = draw(np.array(lengths), x_label="steps of a trajectory")
    plots.save(figure, out, "plane")
    write_atomic(out / "card.md", markdown(card))
    write_json(out / "card.json", card)
    return card


def main(argv: Sequence[str]) -> None:
    """Write the card as the flags say, and print one line about it."""
    no_arguments(argv)
    card = write(**values_of(FLAGS))
    least, most = (card["return"][end] for end in ("0", "1"))
    line = f"return {least:.1f} to {most:.1f}"
    if card["has_costs"]:
        line += (
            f", {100 * card['within_limit']:.1f} % within the cost limit "
            f"{card['cost_limit']:g}"
        )
    print(
        f"{FLAGS['out'].value}/card.md: {card['trajectories']} trajectories of "
        f"{card['source']} ({card['origin']}), {line}"
    )


if __name__ == "__main__":
    from psec_jax.cli import flags_of, no_arguments, run, values_of

    FLAGS = flags_of(write)
    run(main)
