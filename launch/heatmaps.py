"""Heat maps of an analysis of skills."""

from pathlib import Path
from typing import Any

import numpy as np

from psec_jax.analysis import LAYERS, MAPS, Analysis
from psec_jax.errors import InputError
from psec_jax.files import make_room, reported


def draw(analysis: Analysis, path: str | Path) -> None:
    """Write one picture: a map for each comparison, and one of cosines by layer.

    Raises:
      InputError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(
            f"heat maps need the extra plot: pip install '.[plot]' ({error})"
        ) from error
    shown = [name for name in MAPS if getattr(analysis, name) is not None]
    count = len(analysis.skills)
    side = max(2.6, 0.45 * count + 1.6)
    figure = Figure(figsize=(side * 3, side * 2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3).ravel()
    for ax, name in zip(axes, shown, strict=False):
        title, limits = MAPS[name]
        matrix = np.array(getattr(analysis, name), float)  # None becomes NaN
        _map(figure, ax, matrix, title, limits, analysis.skills, analysis.skills)
    pairs = [(i, j) for i in range(count) for j in range(i)]
    names = [f"{analysis.skills[j]}, {analysis.skills[i]}" for i, j in pairs]
    layers = np.array(
        [
            [found["cosine"][i][j] for i, j in pairs]
            for found in analysis.layers.values()
        ]
    )
    _map(figure, axes[5], layers, *LAYERS, names, list(analysis.layers))
    for ax in axes[len(shown) : 5]:
        ax.set_axis_off()
    make_room(path)
    with reported(f"write {path}"):
        figure.savefig(path, dpi=120)


def _map(
    figure: Any,
    ax: Any,
    matrix: np.ndarray,
    title: str,
    limits: tuple[float, float],
    columns: list[str],
    rows: list[str],
) -> None:
    colours = "coolwarm" if limits[0] < 0 else "Oranges"
    image = ax.imshow(matrix, vmin=limits[0], vmax=limits[1], cmap=colours)
    ax.set_aspect("auto")
    ax.set_title(title, fontsize=8)
    ax.set_xticks(range(len(columns)), columns, rotation=90, fontsize=6)
    ax.set_yticks(range(len(rows)), rows, fontsize=6)
    if matrix.size <= 64:
        for (i, j), value in np.ndenumerate(matrix):
            text = "-" if np.isnan(value) else f"{value:.2f}"
            ax.text(j, i, text, ha="center", va="center", fontsize=6)
    figure.colorbar(image, ax=ax, shrink=0.8).ax.tick_params(labelsize=6)
