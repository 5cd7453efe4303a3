r"""Make a set with rewards and costs for a task of DSRL, in its own simulator.

    make setup-safe
    python -m experiments.tools.collect_safe --task=OfflineBallRun-v0 \\
        --episodes=3000 --seed=0

rolls out many policies of mixed quality and writes one file in DSRL's layout where
`--data=OfflineBallRun-v0` finds it (`$PSEC_DATA_DIR`), unless the official file is
there. Policies of Bullet-Safety-Gym are the packaged snapshots of agents trained with
several penalties on cost (--policies names a folder of others, made by
experiments.tools.train_expert --snapshots); those of MetaDrive are the simulator's own
drivers. Each plays without and with noise on its actions, and hands over to others at a
random step, which fills the plane between safe and fast.

Like the official sets, which end at a highest cost (80 for BallRun), these leave out
the trajectories that cost more; --max_cost is another bound. A crowded plane is then
thinned out: at most --most trajectories in each grid cell of the density filter over
costs and returns. The same arguments give the same content, whatever the number of
processes.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from psec_jax.data import dataset, dsrl
from psec_jax.data.paths import data_dir
from psec_jax.data.trajectories import density
from psec_jax.envs.experts import SAFE_ASSETS
from psec_jax.envs.metadrive import IDM_SPEEDS
from psec_jax.errors import InputError
from psec_jax.workflows.collection import (
    Actor,
    check_numbers,
    check_same,
    play,
    simulator_versions,
)

# Standard deviations of the noise with which every policy plays.
NOISES = {"bullet": (0.0, 0.2, 0.5), "metadrive": (0.0, 0.1, 0.3)}
HANDOVER_NOISE = 0.1
# The share of the longest episode in which a handover falls: a fast driver arrives
# after a quarter of it.
HANDOVER_WITHIN = {"bullet": 1.0, "metadrive": 0.25}
DRIVERS = ("expert", "idm", *(f"idm-{speed}" for speed in IDM_SPEEDS))


def collect_safe(
    task: str,
    episodes: int,
    seed: int,
    policies: str | Path | None = None,
    max_cost: float | None = None,
    most: int = 5,
    workers: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Play whole episodes of a task, and write those whose cost is not too high.

    Args:
      task: a task of DSRL, such as OfflineBallRun-v0.
      episodes: to play, by each policy in turn.
      seed: of initial states and noise, with the episode's number.
      policies: directory of expert files; default the package's.
      max_cost: trajectories of a higher cost are left out; default the highest of the
        official set.
      most: trajectories kept in one grid cell of costs and returns.
      workers: processes; default one for every core.
      overwrite: collect again, and replace the file.

    Returns:
      The file's path.

    Raises:
      InputError: bad arguments, no policy for the task, a simulator that is not
        installed, no trajectory within the cost, or a file of another collection.
    """
    spec = dsrl.task(task).spec
    if max_cost is None:
        max_cost = dsrl.task(task).max_cost
    if not max_cost >= 0:
        raise InputError(f"max_cost is {max_cost}, expected 0 or more")
    check_numbers(seed, workers, episodes=episodes)
    chosen = actors(spec, policies)
    names = [_name(actor) for actor in chosen]
    identity = {
        "seed": seed,
        "episodes": episodes,
        "policies": json.dumps(names),
        "policies_sha256": _hash(chosen),
        "max_cost": float(max_cost),
        "most": most,
    }
    path = data_dir() / dsrl.made_name(task)
    if path.exists() and not overwrite:
        check_same(path, dsrl.load(path)[1], identity, "move it away")
        return path
    order = [chosen[e % len(chosen)] for e in range(episodes)]
    played = play(spec, order, seed, workers)
    ds = dataset.concatenate([one.dataset for one in played])
    costs, returns = dataset.episode_costs(ds), dataset.episode_returns(ds)
    kept = np.flatnonzero(costs <= max_cost)
    if not len(kept):
        raise InputError(
            f"{task}: none of {episodes} episodes costs {max_cost:g} or less; give "
            "another --max_cost or other --policies"
        )
    generator = np.random.default_rng(seed)
    kept = kept[density(costs[kept], returns[kept], generator, most=most, least=1)]
    ds = dataset.take(ds, kept)
    attrs = identity | {
        "versions": json.dumps(simulator_versions(), sort_keys=True),
        "policy_of_episode": kept % len(chosen),
        "returns": returns[kept],
        "costs": costs[kept],
    }
    return dsrl.save(task, ds, attrs)


def actors(spec: str, policies: str | Path | None = None) -> list[Actor]:
    """Every policy for a simulator at every level of noise, and pairs of them.

    Args:
      spec: the simulator, such as "bullet:SafetyBallRun-v0".
      policies: directory of expert files; default the package's.

    Raises:
      InputError: no policy.
    """
    prefix, _, name = spec.partition(":")
    if prefix == "metadrive" and policies is None:
        names = list(DRIVERS)
    else:
        folder = Path(policies) if policies else SAFE_ASSETS / name
        names = [str(path) for path in sorted(folder.glob("*.npz"))]
        if not names:
            where = f"{folder} holds" if policies else f"the package has for {spec}"
            raise InputError(
                f"{where} no policy (*.npz); make some with "
                "experiments.tools.train_expert --snapshots, and name their folder"
            )
    alone = [Actor(policy, noise) for noise in NOISES[prefix] for policy in names]
    if len(names) == 1:
        return alone
    # Sorted by the penalty on cost, or by the speed: far apart in the list is unlike.
    count = len(names)
    offsets = sorted({max(1, count * k // 4) for k in (1, 2, 3)})
    return alone + [
        Actor(
            policy,
            HANDOVER_NOISE,
            then=names[(i + offset) % count],
            within=HANDOVER_WITHIN[prefix],
        )
        for offset in offsets
        for i, policy in enumerate(names)
    ]


def _name(actor: Actor) -> str:
    name = Path(actor.policy).stem
    if actor.then:
        name += f" then {Path(actor.then).stem}"
    return f"{name} + noise {actor.action_noise:g}"


def _hash(chosen: Sequence[Actor]) -> str:
    """SHA-256 of the policies' files; empty for the simulator's own drivers."""
    paths = sorted({actor.policy for actor in chosen if actor.policy.endswith(".npz")})
    if not paths:
        return ""
    content = b"".join(Path(path).read_bytes() for path in paths)
    return hashlib.sha256(content).hexdigest()


def main(argv: Sequence[str]) -> None:
    """Collect as the flags say, and print one line about the file."""
    no_arguments(argv)
    path = collect_safe(**values_of(FLAGS))
    _, attrs = dsrl.load(path)
    returns, costs = attrs["returns"], attrs["costs"]
    print(
        f"{path}: {len(returns)} of {attrs['episodes']} episodes kept, return "
        f"{returns.min():.1f} to {returns.max():.1f}, cost {costs.min():.1f} to "
        f"{costs.max():.1f}"
    )


if __name__ == "__main__":
    from psec_jax.cli import flags_of, no_arguments, run, values_of

    FLAGS = flags_of(collect_safe, episodes=1000, seed=0)
    run(main)
