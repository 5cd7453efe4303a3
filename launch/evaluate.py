r"""Roll a base, a skill or a composition out in the simulator: raw returns as JSON.

    python -m launch.evaluate --library=runs/library --env=dm_control:walker-stand
    python -m launch.evaluate --library=runs/library --env=dm_control:walker-walk \
        --skills=walk --alpha=16
    python -m launch.evaluate --library=runs/library --env=dm_control:walker-walk \
        --gate=walk-psec --episodes=30 --out=walk.json
    python -m launch.evaluate --library=runs/library --env=dm_control:walker-walk \
        --gate=walk-psec --seeds=0,1,2      # runs/library/seed0 ..., all at once
"""

from collections.abc import Sequence

from absl import flags

from launch import composed
from psec_jax import envs
from psec_jax.choice import RULES
from psec_jax.cli import (
    define_env,
    define_seeds,
    define_shift,
    no_arguments,
    run,
    seeds_of,
)
from psec_jax.data.recording import check_box
from psec_jax.evaluation import successes
from psec_jax.files import make_room, write_json
from psec_jax.library import SkillLibrary
from psec_jax.policy import compose
from psec_jax.workflows.multirun import roll_out

ENV = define_env()
SHIFT = define_shift()
MATMUL_DTYPE = flags.DEFINE_string(
    "matmul_dtype",
    None,
    "float32, or bfloat16: products in bfloat16, sums in float32; default the base's.",
)
CANDIDATES = flags.DEFINE_integer(
    "candidates", 1, "Actions sampled at every step, of which critics choose one."
)
CRITICS = flags.DEFINE_string(
    "critics", None, "Folder of the run whose critics choose among candidates."
)
RULE = flags.DEFINE_enum(
    "rule",
    None,
    list(RULES),
    "How critics choose: least Q_h (safety, the default), least Q_c (cost), most Q "
    "(reward), most Q where Q_h <= 0 (feasible), most Q - lambda Q_c (reward_cost).",
)
COST_WEIGHT = flags.DEFINE_float(
    "cost_weight", None, "lambda of --rule=reward_cost; default 1."
)
SEEDS = define_seeds()
EPISODES = flags.DEFINE_integer("episodes", 10, "Whole episodes.")
SEED = flags.DEFINE_integer("seed", 10_000, "Of initial states and the policy's noise.")
OUT = flags.DEFINE_string("out", None, "JSON file for the raw returns.")


def main(argv: Sequence[str]) -> None:
    """Flags to one call."""
    no_arguments(argv)
    env = envs.shifted(ENV.value, *SHIFT.value)
    if OUT.value:
        make_room(OUT.value)
    policies = {
        seed.name: compose(
            seed.within(composed.LIBRARY.value),
            **composed.choice(),
            matmul_dtype=MATMUL_DTYPE.value,
            candidates=CANDIDATES.value,
            critics=seed.within_any(CRITICS.value),
            rule=RULE.value,
            cost_weight=COST_WEIGHT.value,
        )
        for seed in seeds_of(SEEDS.value)
    }
    about = envs.describe(env)
    for seed in seeds_of(SEEDS.value):
        card = SkillLibrary.open(seed.within(composed.LIBRARY.value)).card(
            "base", "base"
        )
        check_box(card.get("actions"), about)
    played = dict.fromkeys(policies, env)
    results = roll_out(policies, played, EPISODES.value, SEED.value)
    if OUT.value:
        write_json(OUT.value, results if SEEDS.value else results[""])
    for name, episodes in results.items():
        returns = episodes["returns"]
        print(
            f"{name and f'{name}: '}{len(returns)} episode{'s' * (len(returns) != 1)} "
            f"in {env}: return mean {episodes['mean']:.1f}, min {min(returns):.1f}, "
            f"max {max(returns):.1f}{successes(episodes.get('success'))}"
        )


if __name__ == "__main__":
    run(main)
