"""Score against the strength of the shift, of base, skill and composition.

    python -m experiments.shift_strength --targets=halfcheetah-medium,walker2d-medium

rolls the policies of finished runs of experiments.dynamics_shift (the base of doubled
gravity, the skill learned in the plain simulator, and both composed by the gate) out in
simulators from the plain one, factor 1, to beyond the base's own. Nothing is trained
that is there. Raw episodes are in results/dynamics/raw_strength, the figures
results/dynamics/figures/strength_TARGET.png are made from those files.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from absl import flags
from ml_collections import ConfigDict

from experiments import dynamics_shift, plots, results, stages
from psec_jax import envs
from psec_jax.cli import floats, no_arguments, run
from psec_jax.data import d4rl_sets
from psec_jax.errors import lookup
from psec_jax.evaluation import evaluate

KIND = "raw_strength"
POLICIES = ("Base", "Skill", "PSEC")
QUANTITY = "gravity"  # the shift whose bases are taken, and what is varied
FACTORS = ["1", "1.25", "1.5", "1.75", "2", "2.5", "3"]


def run_cells(
    config: ConfigDict,
    targets: Sequence[str],
    factors: Sequence[float],
    root: Path,
    folder: Path,
    report: Callable[[str], None],
) -> None:
    """Fill every missing point, target by target and seed by seed."""
    for target in targets:  # refuse a factor before anything is trained
        for factor in factors:
            envs.shifted(d4rl_sets.task(f"{target}-v2").spec, f"{QUANTITY}:{factor:g}")
    jax.config.update("jax_compilation_cache_dir", str(root.absolute() / "compiled"))
    for target in targets:
        for seed in config.table.seeds:
            cell = dynamics_shift.place(root, config, seed, target, QUANTITY)
            fingerprint = results.config_fingerprint(cell.config.to_dict())
            for method in POLICIES:
                act = None
                for factor in factors:
                    setting = f"{target} {QUANTITY} {factor:g}"
                    path = results.raw_path(folder, setting, method, seed, KIND)
                    if results.read_raw(path, fingerprint) is not None:
                        continue
                    env = cell.env
                    if factor != 1:
                        env = envs.shifted(env, f"{QUANTITY}:{factor:g}")
                    act = act or dynamics_shift.MAKE[method](cell)
                    count, start = config.evaluation.episodes, config.evaluation.seed
                    episodes = evaluate(act, env, count, start)
                    scores = d4rl_sets.normalised_score(cell.robot, episodes.returns)
                    raw = results.header(cell.config.to_dict(), setting, method, seed)
                    raw |= {"target": target, "x": factor, "scores": scores.tolist()}
                    raw |= stages.episodes_json(episodes, env, start)
                    results.write_raw(path, raw)
                    report(f"{setting} {method} seed {seed}: score {scores.mean():.1f}")


def draw(folder: Path) -> list[Path]:
    """A figure for each target, from the raw files alone."""
    raws = results.load_all(folder, KIND)
    paths = []
    for target in sorted({raw["target"] for raw in raws}):
        mine = dynamics_shift.scored([raw for raw in raws if raw["target"] == target])
        cells = results.summarise(mine).values()
        top = 1.1 * max(cell["high"] for points in cells for cell in points.values())
        figure = plots.lines(
            mine,
            f"{QUANTITY}, times the plain simulator's",
            f"{target}: score against the strength of the shift",
            "Base cloned at factor 2; skill and gate learned at factor 1, 10,000 "
            "transitions.",
            {},
            mark=(2.0, "the base's own"),
            y_label="normalised score",
            top=max(top, 1.0),
        )
        paths.append(plots.save(figure, folder / "figures", f"strength_{target}"))
    return paths


def main(argv: Sequence[str]) -> None:
    """Run what is missing, then draw."""
    no_arguments(argv)
    folder = Path(FLAGS["results"].value)
    if not FLAGS["figures_only"].value:
        config, root = dynamics_shift.chosen(FLAGS)
        config.table.methods = dynamics_shift.METHODS
        for target in FLAGS["targets"].value:
            lookup(dict.fromkeys(dynamics_shift.TARGETS), target, "target")
        factors = floats("factors", FLAGS["factors"].value)
        run_cells(config, FLAGS["targets"].value, factors, root, folder, print)
    for path in draw(folder):
        print(path)


if __name__ == "__main__":
    FLAGS = dynamics_shift.define_flags() | {
        "targets": flags.DEFINE_list(
            "targets", ["halfcheetah-medium", "walker2d-medium"], "Target sets."
        ),
        "factors": flags.DEFINE_list("factors", FACTORS, "Strengths to roll out at."),
        "figures_only": flags.DEFINE_bool(
            "figures_only", False, "Only draw the figures again."
        ),
    }
    run(main)
