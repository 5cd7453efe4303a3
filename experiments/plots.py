"""Drawings: bars, lines, points and traces, each one function.

Bars and lines take statistics of `experiments.tables`, the others raw results (`plane`
the numbers of a dataset), and give a figure; nothing is measured here.
"""

import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import ScaledTranslation

from experiments.style import COLOURS, Style
from psec_jax.files import reported, write_atomic

Raws = Sequence[Mapping[str, Any]]
Stats = Mapping[str, Mapping[str, Any]]  # {method: mean, low, high, of_seeds}
Styles = Mapping[str, Style]

BLACK, DARK, VERMILION = (COLOURS[name] for name in ("black", "dark", "vermilion"))
BLUE, ORANGE, GREEN = (COLOURS[name] for name in ("blue", "orange", "green"))
PURPLE, SKY = COLOURS["purple"], COLOURS["sky"]
SERIES = (BLUE, ORANGE, GREEN, PURPLE, SKY, BLACK, DARK)  # of lines without a style
DASHES = ("-", "--", ":", "-.")  # once the colours have been used up
TASKS = {"stand": (DARK, "X"), "walk": (BLUE, "o"), "run": (VERMILION, "D")}
FRAMES = 8  # images above a trace of one episode
LEGEND_ROWS = 11  # beside it
RETURN = "return of an episode (0 to 1000)"

_RC: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "svg.hashsalt": "psec_jax",  # the same picture is the same file
}


def save(figure: Figure, folder: Path, name: str) -> Path:
    """Write FOLDER/NAME.png and .svg; returns the first.

    Raises:
      InputError: the files cannot be written.
    """
    with reported(f"make {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    for ending, metadata in {"svg": {"Date": None}, "png": {"Software": None}}.items():
        content = io.BytesIO()
        with matplotlib.rc_context(_RC):
            figure.savefig(content, format=ending, dpi=150, metadata=metadata)
        write_atomic(folder / f"{name}.{ending}", content.getvalue())
    return folder / f"{name}.png"


def _canvas(
    title: str,
    caption: str,
    size: tuple[float, float],
    rows: int = 1,
    columns: int = 1,
    heights: Sequence[float] | None = None,
) -> tuple[Figure, np.ndarray]:
    """A figure with title, caption and axes [rows, columns]; heights are of rows."""
    figure = Figure(size, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    text = textwrap.fill(caption, int(size[0] * 17))
    figure.supxlabel(text, fontsize=7.5, color="0.3", x=0.01, ha="left")
    axes = figure.subplots(rows, columns, squeeze=False, height_ratios=heights)
    return figure, axes


def _paper_mark() -> Line2D:
    return Line2D(
        [], [], ls="", marker="d", mfc="white", mec=BLACK, ms=6, label="the paper"
    )


def _whiskers(cell: Mapping[str, Any]) -> np.ndarray:
    """Distances [2, 1] from the mean to both ends of the interval."""
    mean = cell["mean"]
    ends = [mean - cell["low"], cell["high"] - mean]
    # Rounding of the bootstrap may put an end on the wrong side of the mean.
    return np.maximum(np.array(ends)[:, None], 0)


def _seeds(axes: Axes, x: float, cell: Mapping[str, Any], flat: bool = False) -> None:
    """A dot for the mean of each training seed, where there are several."""
    means = cell["of_seeds"]
    if len(means) > 1:
        places = [x] * len(means)
        xy = (means, places) if flat else (places, means)
        axes.plot(*xy, ".", color=BLACK, ms=3, zorder=4)


def table(
    stats: Mapping[str, Stats],
    styles: Styles,
    paper: Mapping[str, Mapping[str, float]],
    title: str,
    caption: str,
    x_label: str = RETURN,
) -> Figure:
    """Bars of every method, a panel for each setting, the paper's numbers as marks."""
    rows = [m for m in styles if any(m in cells for cells in stats.values())]
    size = (2.2 + 2.6 * len(stats), 1.9 + 0.3 * len(rows))
    with matplotlib.rc_context(_RC):
        figure, panels = _canvas(title, caption, size, 1, len(stats))
        for axes, (setting, cells) in zip(panels[0], stats.items(), strict=True):
            _bars(axes, cells, rows, styles, paper.get(setting, {}))
            axes.set_title(setting, fontsize=10)
            axes.set_xlabel(x_label)
        for axes in panels[0, 1:]:
            axes.set_yticklabels([])
        figure.legend(handles=[_paper_mark()], loc="outside upper right")
    return figure


def _bars(
    axes: Axes,
    cells: Stats,
    rows: Sequence[str],
    styles: Styles,
    paper: Mapping[str, float],
) -> None:
    ends = [*(cell["high"] for cell in cells.values()), *paper.values()]
    label = 0.18 * max(ends, default=0)  # about the width of a number
    for y, method in enumerate(rows):
        if method in cells:
            cell = cells[method]
            # The number stands at its bar; behind the paper's mark only where the mark
            # would cover it, or it would read as the paper's.
            end, mark = cell["high"], paper.get(method, 0)
            colour, hatch = COLOURS[styles[method].colour], styles[method].hatch
            face: dict[str, Any] = (
                {"color": colour} if not hatch else {"fc": "white", "ec": colour}
            )
            axes.barh(y, cell["mean"], 0.7, hatch=hatch, **face)
            axes.errorbar(
                cell["mean"], y, xerr=_whiskers(cell), color=BLACK, capsize=2.5, lw=1
            )
            _seeds(axes, y, cell, flat=True)
            axes.text(
                mark if end < mark < end + label else end,
                y,
                f"  {cell['mean']:.0f}",
                va="center",
                fontsize=8,
            )
        if method in paper:
            axes.plot(paper[method], y, "d", mfc="white", mec=BLACK, ms=6, zorder=5)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    lowest = min((cell["low"] for cell in cells.values()), default=0)
    axes.set_xlim(min(0, 1.12 * lowest), axes.get_xlim()[1] * 1.12)
    axes.grid(axis="y", visible=False)


def groups(
    cells: Stats,
    styles: Styles,
    parts: Mapping[str, Sequence[str]],
    labels: Mapping[str, str],
    paper: Mapping[str, float],
    title: str,
    caption: str,
) -> Figure:
    """Vertical bars in named groups.

    Args:
      cells: of one setting.
      styles: of the methods.
      parts: the methods of each group.
      labels: the text under each method's bar.
      paper: number of each method.
      title: of the figure.
      caption: below it.
    """
    with matplotlib.rc_context(_RC):
        figure, panels = _canvas(title, caption, (8, 4.6))
        axes = panels[0, 0]
        places, names, x = [], [], 0.0
        for group, methods in parts.items():
            shown = [m for m in methods if m in cells]
            for method in shown:
                _upright(axes, x, cells[method], styles[method], paper.get(method))
                places.append(x)
                names.append(labels[method])
                x += 1
            if shown:
                middle = np.mean(places[-len(shown) :])
                axes.text(middle, 1055, group, ha="center", fontweight="bold")
            x += 0.6
        axes.set_xticks(places, names, fontsize=8)
        axes.set_ylim(0, 1030)
        axes.set_ylabel(RETURN)
        axes.grid(axis="x", visible=False)
        figure.legend(handles=[_paper_mark()], loc="outside upper right")
    return figure


def _upright(
    axes: Axes, x: float, cell: Mapping[str, Any], style: Style, paper: float | None
) -> None:
    colour, hatch = COLOURS[style.colour], style.hatch
    face: dict[str, Any] = (
        {"color": colour} if not hatch else {"fc": "white", "ec": colour}
    )
    axes.bar(x, cell["mean"], 0.8, hatch=hatch, **face)
    axes.errorbar(x, cell["mean"], _whiskers(cell), color=BLACK, capsize=3, lw=1)
    _seeds(axes, x, cell)
    if paper is not None:
        axes.plot(x + 0.3, paper, "d", mfc="white", mec=BLACK, ms=6, zorder=5)
    top = min(cell["high"] + 12, 985)
    axes.text(x - 0.05, top, f"{cell['mean']:.0f}", ha="right", fontsize=8)


def lines(
    stats: Mapping[str, Stats],
    number: Mapping[str, float | None],
    styles: Styles,
    x_label: str,
    title: str,
    caption: str,
    paper: Mapping[str, Mapping[float, float]],
    log: bool = False,
    ticks: Mapping[float, str] | None = None,
    mark: tuple[float, str] | None = None,
    y_label: str = RETURN,
    top: float = 1000.0,
) -> Figure:
    """A score against a number, one line with intervals for each method.

    Args:
      stats: of every setting.
      number: of every setting; where it is None the method is a level.
      styles: of the methods.
      x_label: of the number.
      title: of the figure.
      caption: below it.
      paper: {method: {number: score}}.
      log: scale of the number.
      ticks: labels of chosen numbers; by default those measured.
      mark: a number to point out, and why.
      y_label: of the score.
      top: the highest score shown.
    """
    curves: dict[str, list[tuple[Any, Any]]] = {}
    for setting, cells in stats.items():
        for method, cell in cells.items():
            curves.setdefault(method, []).append((number[setting], cell))
    measured = sorted({x for x in number.values() if x is not None})
    with matplotlib.rc_context(_RC):
        figure, panels = _canvas(title, caption, (7.5, 4.6))
        axes = panels[0, 0]
        axes.set_xscale("log" if log else "linear")
        if mark is not None:
            axes.axvline(mark[0], color="0.6", ls=":", lw=1.2)
            axes.text(mark[0], 1.005 * top, f" {mark[1]}", color="0.4", fontsize=8)
        drawn = [method for method in styles if method in curves]
        for i, method in enumerate(drawn):
            if curves[method][0][0] is None:
                _level(axes, method, styles[method], curves[method][0][1])
            else:
                # A few points aside, so that the intervals do not hide one another.
                step = min(3.5, 28 / len(drawn))
                aside = step * (i - (len(drawn) - 1) / 2)
                curve = sorted(curves[method], key=lambda point: point[0])
                _curve(
                    axes, method, styles[method], curve, paper.get(method, {}), aside
                )
        shown = ticks or {x: f"{x:g}" for x in measured}
        axes.set_xticks(list(shown), list(shown.values()))
        axes.minorticks_off()
        seen = [*measured, *shown, *(x for m in drawn for x in paper.get(m, {}))]
        _set_width(axes, min(seen), max(seen), log)
        lowest = min(cell["low"] for curve in curves.values() for _, cell in curve)
        axes.set_ylim(min(0, 1.12 * lowest), top)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        handles = axes.get_legend_handles_labels()[0]
        if any(method in paper for method in drawn):
            handles.append(_paper_mark())
        figure.legend(handles=handles, loc="outside right upper")
    return figure


def _set_width(axes: Axes, first: float, last: float, log: bool) -> None:
    """Room on both sides of the points, which are drawn a little aside."""
    if log:
        side = max(last / first, 2) ** 0.07
        axes.set_xlim(first / side, last * side)
    else:
        side = 0.05 * max(last - first, 1)
        axes.set_xlim(first - side, last + side)


def _level(axes: Axes, method: str, style: Style, cell: Mapping[str, Any]) -> None:
    colour = COLOURS[style.colour]
    axes.axhline(cell["mean"], color=colour, ls="--", lw=1.2, label=method)
    axes.axhspan(cell["low"], cell["high"], color=colour, alpha=0.25, lw=0)


def _curve(
    axes: Axes,
    method: str,
    style: Style,
    curve: Sequence[tuple[float, Mapping[str, Any]]],
    paper: Mapping[float, float],
    aside: float,
) -> None:
    colour, marker = COLOURS[style.colour], style.marker
    hatched = {"ls": "--", "mfc": "white"} if style.hatch else {}
    shift = ScaledTranslation(aside / 72, 0, axes.figure.dpi_scale_trans)
    axes.errorbar(
        [x for x, _ in curve],
        [cell["mean"] for _, cell in curve],
        np.hstack([_whiskers(cell) for _, cell in curve]),
        color=colour,
        marker=marker,
        ms=6,
        lw=1.5,
        elinewidth=1,
        capsize=2.5,
        label=method,
        transform=axes.transData + shift,
        **hatched,
    )
    axes.plot(list(paper), list(paper.values()), "d", mfc="white", mec=colour, ms=7)


def heat_maps(
    matrices: Mapping[str, np.ndarray], names: Sequence[str], title: str, caption: str
) -> Figure:
    """A square of scores in [0, 1] for each method.

    Args:
      matrices: [N, N] by method; nan is left white.
      names: of rows and columns.
      title: of the figure.
      caption: below it.
    """
    columns = min(len(matrices), 3)
    rows = -(-len(matrices) // columns)
    with matplotlib.rc_context(_RC):
        figure, panels = _canvas(
            title, caption, (2.6 * columns + 1.5, 2.6 * rows + 1.2), rows, columns
        )
        image = None
        for axes, (method, matrix) in zip(panels.flat, matrices.items(), strict=False):
            image = axes.imshow(matrix, cmap="viridis", vmin=0, vmax=1)
            axes.grid(False)
            axes.set_title(method, fontsize=9)
            axes.set_xticks(range(len(names)), names, rotation=90, fontsize=6)
            axes.set_yticks(range(len(names)), names, fontsize=6)
        for axes in panels.flat[len(matrices) :]:
            axes.set_axis_off()
        if image is not None:
            figure.colorbar(
                image, ax=panels.ravel().tolist(), label="score", shrink=0.8
            )
    return figure


def points(raws: Raws, order: Sequence[str], title: str, caption: str) -> Figure:
    """Points of every task in the plane, one panel for each raw file.

    Args:
      raws: of one seed, with "points" {task: [[x, y], ...]}, "dimensions" and
        "agreement".
      order: of the methods.
      title: of the figure.
      caption: below it.
    """
    raws = sorted(raws, key=lambda raw: order.index(raw["method"]))
    with matplotlib.rc_context(_RC):
        size = (3.1 * len(raws) + 0.4, 4.3)
        figure, panels = _canvas(title, caption, size, 1, len(raws))
        for axes, raw in zip(panels[0], raws, strict=True):
            for task, xy in raw["points"].items():
                colour, marker = TASKS[task]
                axes.scatter(
                    *np.transpose(xy), s=9, c=colour, marker=marker, lw=0, label=task
                )
            axes.set_title(f"{raw['method']}, {raw['dimensions']} numbers", fontsize=10)
            axes.set_xlabel(
                f"neighbours of the same task: {100 * raw['agreement']:.0f} %"
            )
            axes.set(xticks=[], yticks=[])
        handles = panels[0, 0].get_legend_handles_labels()[0]
        figure.legend(
            handles=handles, loc="outside upper right", ncols=3, markerscale=2
        )
    return figure


def traces(raws: Raws, order: Sequence[str], title: str, caption: str) -> Figure:
    """alpha of every skill and the reward over one episode, one panel a raw file.

    Args:
      raws: of one seed, with "alpha" {skill: [N]} and "reward" [N].
      order: of the settings.
      title: of the figure.
      caption: below it.
    """
    raws = sorted(raws, key=lambda raw: (order.index(raw["setting"]), raw["method"]))
    with matplotlib.rc_context(_RC):
        rows = -(-len(raws) // 2)
        figure, panels = _canvas(title, caption, (9.5, 1.4 + 2.2 * rows), rows, 2)
        for axes in panels.flat[len(raws) :]:
            axes.set_visible(False)
        drawn = {}
        every = np.concatenate([list(raw["alpha"].values()) for raw in raws], axis=None)
        for axes, raw in zip(panels.flat, raws, strict=False):
            steps = np.arange(len(raw["reward"]))
            reward = axes.twinx()
            reward.fill_between(steps, raw["reward"], color="0.85", lw=0)
            reward.set(ylim=(0, 1), ylabel="reward of a step")
            reward.grid(visible=False)
            reward.spines["right"].set_visible(True)
            # The twin is drawn over the axes that it was made from.
            axes.set_zorder(reward.get_zorder() + 1)
            axes.patch.set_visible(False)
            for skill, alpha in raw["alpha"].items():
                axes.plot(steps, alpha, color=TASKS[skill][0], lw=1.2, label=skill)
            axes.set_title(
                f"{raw['setting']}  {raw['method']}: return {sum(raw['reward']):.0f}",
                fontsize=10,
            )
            axes.set(xlabel="step of the episode", ylabel="alpha of a skill")
            axes.set_ylim(min(0, every.min()) - 1, max(0, every.max()) + 1)
            drawn |= {line.get_label(): line for line in axes.get_lines()}
        figure.legend(handles=list(drawn.values()), loc="outside upper right", ncols=2)
    return figure


def gate_trace(
    raw: Mapping[str, Any],
    note: str,
    frames: Sequence[tuple[int, np.ndarray]] = (),
) -> Figure:
    """Weights, events, cost and reward over the first episode of a raw file.

    Args:
      raw: as `experiments.tools.gate_trace` keeps it.
      note: the caption.
      frames: steps of the episode and their images, uint8 [height, width, 3].
    """
    episode = raw["episodes"][0]
    count = len(episode["t"])
    events = episode["events"]
    rows = {"weight": 2.3, "event": 0.2 + 0.22 * len(events), "cost": 0.8}
    values = episode.get("values", {})
    judged = {f"q {kind}": 0.8 for kind in values}
    heights = {"frames": 0.75} | rows | {"reward": 0.8} | judged
    if not frames:
        del heights["frames"]
    title = (
        f"Gate {raw['gate']} in {raw['env']}: return {sum(episode['reward']):.1f}, "
        f"cost {sum(episode['cost']):.1f}"
    )
    with matplotlib.rc_context(_RC):
        size = (9.5, 1.9 + sum(heights.values()))
        figure, panels = _canvas(
            title, note, size, len(heights), heights=list(heights.values())
        )
        panel = dict(zip(heights, panels[:, 0], strict=True))
        if frames:
            _filmstrip(panel["frames"], frames, count)
        for k, (name, alpha) in enumerate(episode["alpha"].items()):
            colour = SERIES[k % len(SERIES)]
            dash = DASHES[k // len(SERIES) % len(DASHES)]
            panel["weight"].plot(alpha, color=colour, ls=dash, lw=1.3, label=name)
        panel["weight"].set_ylabel(
            "multiplier of a skill" if raw["level"] == "parameter" else "weight"
        )
        _event_rows(panel["event"], events, raw["rules"])
        edges = np.arange(count + 1) - 0.5
        for name, colour in (("cost", VERMILION), ("reward", DARK)):
            bars = {"fill": True, "color": colour, "linewidth": 0.8}
            panel[name].stairs(episode[name], edges, **bars)
            panel[name].set_ylabel(f"{name}\nof a step")
        panel["cost"].set_ylim(0, 1.05 * max(episode["cost"]) or 1)
        for kind, q in values.items():
            panel[f"q {kind}"].plot(q, color=DARK, lw=1)
            panel[f"q {kind}"].set_ylabel(f"Q of\n{kind}")
        # Weights are read against what happens: the same spans lie behind them.
        for start, length in _runs(events["cost"]):
            end = start + length
            panel["weight"].axvspan(start, end, color=VERMILION, alpha=0.13, lw=0)
        for axes in panels[:, 0]:
            axes.set_xlim(-0.5, count - 0.5)
            axes.tick_params(labelbottom=axes is panels[-1, 0])
        panels[-1, 0].set_xlabel("step of the episode")
        figure.align_ylabels(panels[:, 0])
        panel["weight"].legend(
            title="weight of",
            loc="upper left",
            bbox_to_anchor=(1, 1),
            ncols=-(-len(episode["alpha"]) // LEGEND_ROWS),
        )
    return figure


def _runs(happens: Sequence[bool]) -> list[tuple[float, int]]:
    """Beginning and length of each unbroken span; step t lies from t - 0.5 on."""
    change = np.diff(np.concatenate([[0], np.asarray(happens, int), [0]]))
    starts, ends = np.flatnonzero(change == 1), np.flatnonzero(change == -1)
    return list(zip((starts - 0.5).tolist(), (ends - starts).tolist(), strict=True))


def _event_rows(
    axes: Axes, events: Mapping[str, Sequence[bool]], rules: Mapping[str, str]
) -> None:
    """A bar for every span of every event, and the share of the steps that have it."""
    labels = []
    for row, (name, happens) in enumerate(events.items()):
        colour = VERMILION if name == "cost" else BLACK
        axes.broken_barh(_runs(happens), (row - 0.35, 0.7), color=colour, lw=0.5)
        labels.append(f"{rules[name]}  ({100 * np.mean(happens):.0f} %)")
    axes.yaxis.tick_right()
    axes.tick_params(axis="y", length=0)
    axes.set_yticks(range(len(events)), labels)
    axes.set_ylim(len(events) - 0.5, -0.5)
    axes.set_ylabel("events")
    axes.grid(axis="y", visible=False)


def _filmstrip(
    axes: Axes, frames: Sequence[tuple[int, np.ndarray]], count: int
) -> None:
    """Images of one size side by side, each with its step in the middle."""
    half = 0.48 * count / FRAMES
    for step, image in frames:
        axes.imshow(image, extent=(step - half, step + half, 0, 1), aspect="auto")
        axes.text(step, 1.04, f"step {step}", ha="center", va="bottom", fontsize=7)
    axes.set_ylim(0, 1)
    axes.axis("off")


def plane(
    costs: np.ndarray,
    returns: np.ndarray,
    title: str,
    note: str,
    limit: float | None = None,
    x_label: str = "cost of a trajectory",
) -> Figure:
    """Trajectories of a dataset as points of cost and return.

    Args:
      costs: [E], or other numbers with their x_label.
      returns: [E].
      title: of the figure.
      note: the caption.
      limit: cost limit, drawn as a line; points beyond it differ.
      x_label: of the costs.
    """
    safe = np.ones(len(costs), bool) if limit is None else costs <= limit
    kinds = {
        "trajectory" if limit is None else "within the limit": (safe, BLUE, "o"),
        "above the limit": (~safe, VERMILION, "x"),
    }
    with matplotlib.rc_context(_RC):
        figure, panels = _canvas(title, note, (6, 4.6))
        axes = panels[0, 0]
        for label, (members, colour, marker) in kinds.items():
            if members.any():
                axes.scatter(
                    costs[members],
                    returns[members],
                    s=12,
                    c=colour,
                    marker=marker,
                    lw=0.8,
                    alpha=0.6,
                    label=f"{label}: {members.sum()}",
                )
        if limit is not None:
            axes.axvline(limit, color=BLACK, ls="--", lw=1, label=f"limit {limit:g}")
        axes.set(xlabel=x_label, ylabel="return of a trajectory")
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3)
    return figure
