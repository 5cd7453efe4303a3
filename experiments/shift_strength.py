"""Score against the strength of the shift, of base, skill and composition.

    python -m experiments.shift_strength --targets=halfcheetah-medium,walker2d-medium

rolls the policies of finished runs of experiments.dynamics_shift (the base of doubled
gravity, the skill learned in the plain simulator, and both composed by the gate) out in
simulators from the plain one, factor 1, to beyond the base's own. Nothing is trained
that is there. Raw episodes are in results/dynamics/shift_strength.jsonl, the figures
results/dynamics/figures/strength_TARGET.png are made from those alone.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from experiments import dynamics_shift, grid, plots, results, tables
from experiments.configs import d4rl
from experiments.dynamics_shift import RUNS, TARGETS
from experiments.grid import Table
from experiments.style import Style
from psec_jax.cli import floats, no_arguments

SHIFT = "gravity"  # the shift whose bases are used, and what is varied
FACTORS = (1, 1.25, 1.5, 1.75, 2, 2.5, 3)
STYLES = {
    "Base": Style("light", "X"),
    "Skill": Style("green", "D"),
    "PSEC": Style("blue"),
}
TABLE = Table(
    name="shift_strength",
    settings={},  # of the targets and factors wanted
    methods={
        name: dataclasses.replace(
            dynamics_shift.METHODS[f"{name} ({SHIFT})"], style=style
        )
        for name, style in STYLES.items()
    },
    score=dynamics_shift.score,
)


def table(targets: Sequence[str], factors: Sequence[float]) -> Table:
    """The grid over targets and factors.

    Raises:
      InputError: a factor that no simulator has.
    """
    settings = {
        f"{target} {SHIFT} {factor:g}": dynamics_shift.setting(
            target, factor, record={"target": target, "x": factor}
        )
        for target in targets
        for factor in factors
    }
    return dataclasses.replace(TABLE, settings=settings)


def draw(folder: Path) -> list[Path]:
    """A figure for each target, from the raw results alone."""
    raws = results.read_all(TABLE.path(folder))
    paths = []
    for target in sorted({raw["target"] for raw in raws}):
        mine = [raw for raw in raws if raw["target"] == target]
        factors = sorted({raw["x"] for raw in mine})
        summary = tables.summarise(table([target], factors), mine)
        stats = tables.of_metric(summary, "score")
        highest = max(
            cell["high"] for cells in stats.values() for cell in cells.values()
        )
        figure = plots.lines(
            stats,
            {raw["setting"]: raw["x"] for raw in mine},
            STYLES,
            f"{SHIFT}, times the plain simulator's",
            f"{target}: score against the strength of the shift",
            "Base cloned at factor 2; skill and gate learned at factor 1, 10,000 "
            f"transitions. {results.conditions(mine)}",
            {},
            mark=(2.0, "the base's own"),
            y_label="normalised score",
            top=max(1.1 * highest, 1.0),
        )
        paths.append(plots.save(figure, folder / "figures", f"strength_{target}"))
    return paths


def main(argv: Sequence[str]) -> None:
    """Measure what is missing, then draw."""
    no_arguments(argv)
    folder = Path(FLAGS["results"].value)
    known = dict.fromkeys(TARGETS)
    targets = grid.known_names(FLAGS["targets"].value, known, "target")
    factors = floats("factors", FLAGS["factors"].value) or FACTORS
    job, root = d4rl.job(FLAGS["preset"].value), grid.run_root(FLAGS, RUNS)
    rows = table(targets, factors)
    if FLAGS["figures_only"].value or grid.measure(FLAGS, rows, job, root, folder):
        for path in draw(folder):
            print(path)


if __name__ == "__main__":
    from psec_jax.cli import run

    FLAGS: Mapping[str, Any] = grid.define_flags("results/dynamics", RUNS) | {
        "targets": flags.DEFINE_list(
            "targets", ["halfcheetah-medium", "walker2d-medium"], "Target sets."
        ),
        "factors": flags.DEFINE_list(
            "factors",
            [f"{factor:g}" for factor in FACTORS],
            "Strengths to roll out at.",
        ),
        "figures_only": flags.DEFINE_bool(
            "figures_only", False, "Only draw the figures again."
        ),
    }
    run(main)
