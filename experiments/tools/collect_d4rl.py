r"""Make a set of D4RL's names in Gymnasium's simulators, from packaged snapshots.

    python -m experiments.tools.collect_d4rl --set=halfcheetah-medium-v2 --seed=0
    python -m experiments.tools.collect_d4rl --set=walker2d-gravity-source \
        --transitions=100000 --seed=0

writes one file in D4RL's layout where `--data=halfcheetah-medium-v2` finds it
(`$PSEC_DATA_DIR`), unless the official file is there, and prints a line about it. The
policies are snapshots of a training (psec_jax/assets/d4rl, or --policies: a folder made
by experiments.tools.train_expert with --snapshots), a folder for the plain robot and
for each shifted one. RECIPES says which of them play:

  expert         the one of highest return
  medium         of those before the expert, the one whose normalised score is nearest
                 to 40
  medium-replay  all up to the medium one
  medium-expert  the medium one, then the expert
  full-replay, and the source sets of shifted simulators: all
  random         none; actions are uniform

in the order of their training, each the same number of transitions, by samples of their
own distributions, as D4RL's do; with --action_noise by their means with Gaussian noise.
A policy plays whole episodes until it has its part, and its last trajectory is cut
there, which is marked as a timeout. The same arguments give the same content, whatever
the number of processes.
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import flags

from psec_jax import files
from psec_jax.data import d4rl_sets, dataset, trajectories
from psec_jax.data.paths import data_dir
from psec_jax.envs.experts import D4RL_ASSETS, SAMPLED, label
from psec_jax.errors import InputError
from psec_jax.types import Dataset
from psec_jax.workflows.collection import (
    Actor,
    check_numbers,
    check_same,
    play,
    policy_hash,
    simulator_versions,
)

LONGEST = 1000  # steps of an episode
MEDIUM = 40.0  # about the score of D4RL's medium HalfCheetah
SET_HELP = "A set's name, such as halfcheetah-medium-v2."


class Snapshot(NamedTuple):
    """A policy as it was at one point of its training.

    Attributes:
      path: its file.
      steps: environment steps it had been trained for.
      score: D4RL's normalised score of its mean return in its own simulator, without
        noise, from its card.
    """

    path: Path
    steps: int
    score: float


def snapshots(name: str, folder: Path | None = None) -> list[Snapshot]:
    """A simulator's policies in the order of their training.

    Args:
      name: a set of that simulator.
      folder: of the policies and their cards; default the package's.

    Raises:
      InputError: no policy, a card of another simulator or without snapshots, or a
        missing file.
    """
    task = d4rl_sets.task(name)
    if folder is None:
        shift = name.split("-")[1] if task.quality == "source" else ""
        folder = D4RL_ASSETS / "-".join(filter(None, [task.robot, shift]))
    policies = []
    for path in sorted(folder.glob("*.json")):
        card = files.read_json(path)
        if card.get("environment") != task.spec:
            raise InputError(
                f"{path}: policies of {card.get('environment')}, {name} is made in "
                f"{task.spec}"
            )
        points = card.get("snapshots", card.get("training_curve", []))
        kept = [point for point in points if "file" in point]
        if not kept:
            raise InputError(
                f"{path}: names no snapshot; train with train_expert --snapshots"
            )
        for point in kept:
            if "steps" not in point or not point.get("returns"):
                raise InputError(f"{path}: {point['file']} has no steps or no returns")
            policy = path.with_name(point["file"])
            if not policy.is_file():
                raise InputError(f"{path}: {policy.name} is missing")
            mean = float(np.mean(point["returns"]))
            score = float(d4rl_sets.normalised_score(task.robot, mean))
            policies.append(Snapshot(policy, point["steps"], score))
    if not policies:
        raise InputError(
            f"{folder}: no card of a policy (*.json) for {name}; make some with "
            f"experiments.tools.train_expert --env={task.spec} --snapshots, and name "
            "their folder with --policies"
        )
    return sorted(policies, key=lambda snapshot: (snapshot.steps, snapshot.path.name))


def expert(policies: Sequence[Snapshot]) -> Snapshot:
    """The snapshot of highest return."""
    return max(policies, key=lambda snapshot: snapshot.score)


def medium(policies: Sequence[Snapshot]) -> Snapshot:
    """Of the snapshots before the expert, the one whose score is nearest to MEDIUM.

    Raises:
      InputError: no snapshot before the expert.
    """
    best = expert(policies)
    before = policies[: policies.index(best)]
    if not before:
        raise InputError(
            f"{best.path.parent}: no snapshot before the best, {best.path.name}, that "
            "could be the medium one"
        )
    return min(before, key=lambda snapshot: abs(snapshot.score - MEDIUM))


# Each: snapshots in the order of their training -> those that play, in their order.
RECIPES: dict[str, Callable[[Sequence[Snapshot]], list[Snapshot]]] = {
    "expert": lambda policies: [expert(policies)],
    "medium": lambda policies: [medium(policies)],
    "medium-replay": lambda policies: [
        *policies[: policies.index(medium(policies)) + 1]
    ],
    "medium-expert": lambda policies: [medium(policies), expert(policies)],
    "full-replay": list,
    "source": list,
}


def collect_d4rl(
    name: str,
    transitions: int,
    seed: int,
    action_noise: float | None = None,
    policies: str | Path | None = None,
    workers: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Play until a set has this many transitions, and write its file.

    Args:
      name: a set, such as halfcheetah-medium-v2.
      transitions: in all, in equal parts of every policy.
      seed: of initial states and noise, with the episode's number.
      action_noise: act by the policies' means, with Gaussian noise of this standard
        deviation on every action; without it by samples of their own distributions.
      policies: directory of expert files and their cards; default the package's.
      workers: processes; default one for every core.
      overwrite: collect again, and replace the file.

    Returns:
      The file's path.

    Raises:
      InputError: bad arguments, no policies, a simulator that is not installed, or the
        file holds another collection.
    """
    task = d4rl_sets.task(name)
    check_numbers(seed, workers, transitions=transitions)
    if task.quality == "random":
        if action_noise is not None:
            raise InputError(
                f"action_noise is {action_noise}: {name} is of uniform actions, no "
                "policy plays"
            )
        actors, chosen = [Actor("random")], []
        definition = {}
    else:
        known = snapshots(name, Path(policies) if policies else None)
        chosen = RECIPES[task.quality](known)
        form, noise = (SAMPLED, 0.0) if action_noise is None else ("", action_noise)
        actors = [Actor(f"{form}{policy.path}", noise) for policy in chosen]
        definition = {"expert_score": expert(known).score}
        if task.quality.startswith("medium"):
            definition |= {
                "medium": "of the snapshots before the expert, the one whose score is "
                f"nearest to {MEDIUM:g}",
                "medium_score": medium(known).score,
            }
    if transitions < len(actors):
        raise InputError(
            f"transitions is {transitions}, expected {len(actors)} or more, one for "
            "each policy"
        )
    identity = {
        "transitions": transitions,
        "seed": seed,
        "action_noise": float(actors[0].action_noise),
        "policies": json.dumps([label(actor.policy) for actor in actors]),
        "policies_sha256": json.dumps([policy_hash(a.policy, "") for a in actors]),
    }
    path = data_dir() / d4rl_sets.made_name(name)
    if path.is_file() and not overwrite:
        check_same(path, d4rl_sets.load(path)[1], identity, "move it away")
        return path
    files.make_room(path)
    ends = np.linspace(0, transitions, len(actors) + 1).astype(int)
    parts = gather(task.spec, actors, np.diff(ends).tolist(), seed, workers)
    ds = dataset.concatenate(parts)
    counts = [len(dataset.episode_slices(part)) for part in parts]
    returns = dataset.episode_returns(ds)
    attrs = (
        identity
        | definition
        | {
            "policy_steps": [policy.steps for policy in chosen],
            "policy_scores": [policy.score for policy in chosen],
            "policy_of_trajectory": np.repeat(np.arange(len(parts)), counts),
            "returns": returns,
            "scores": d4rl_sets.normalised_score(name, returns),
            "versions": json.dumps(simulator_versions(), sort_keys=True),
        }
    )
    return d4rl_sets.save(name, ds, attrs)


def gather(
    env: str,
    actors: Sequence[Actor],
    sizes: Sequence[int],
    seed: int,
    workers: int | None = None,
) -> list[Dataset]:
    """The requested number of transitions of every actor.

    Args:
      env: see `psec_jax.envs.make`.
      actors: who plays; episode i of actor k has the number i * len(actors) + k.
      sizes: transitions of each.
      seed: of initial states and noise.
      workers: processes; default one for every core.

    Raises:
      InputError: an environment or a policy that cannot be made.
    """
    played: list[list[Dataset]] = [[] for _ in actors]
    while True:
        todo = []
        for k, (episodes, size) in enumerate(zip(played, sizes, strict=True)):
            steps = sum(len(ds.obs) for ds in episodes)
            length = steps / len(episodes) if episodes else LONGEST
            first, more = len(episodes), math.ceil((size - steps) / length)
            todo += [(k, i) for i in range(first, first + more)]
        if not todo:
            break
        numbers = [i * len(actors) + k for k, i in todo]
        rounds = play(env, [actors[k] for k, _ in todo], seed, workers, numbers)
        for (k, _), one in zip(todo, rounds, strict=True):
            played[k].append(one.dataset)
    return [
        trajectories.head(dataset.concatenate(episodes), int(size))
        for episodes, size in zip(played, sizes, strict=True)
    ]


def main(argv: Sequence[str]) -> None:
    """Collect as the flags say, and print one line about the file."""
    no_arguments(argv)
    path = collect_d4rl(**values_of(FLAGS))
    _, attrs = d4rl_sets.load(path)
    scores = attrs["scores"]
    print(
        f"{path}: {attrs['transitions']} transitions, {len(scores)} trajectories, "
        f"normalised score mean {scores.mean():.1f} min {scores.min():.1f} max "
        f"{scores.max():.1f}"
    )


if __name__ == "__main__":
    from psec_jax.cli import flags_of, no_arguments, run, values_of

    FLAGS = flags_of(
        collect_d4rl,
        {"name": flags.DEFINE_string("set", None, SET_HELP, required=True)},
        transitions=100_000,
        seed=0,
    )
    run(main)
