"""Where a skill's demonstrations reach: supports for `gating`, made from data alone.

The scale tau of a support comes from the demonstrations themselves: leave one
trajectory out, and measure the distance of its states to the nearest state of the
others. A skill is then trusted as far from its demonstrations as they are from one
another. Returns are never looked at.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from psec_jax import tree
from psec_jax.errors import InputError, TrainingError
from psec_jax.gating import DISTANCE_CAP, init_distance, learned_distance
from psec_jax.types import Params

Trajectories = Sequence[np.ndarray]  # of one skill: normalised states [n_e, S] of each

MIN_SCALE = 1e-3  # for a state variable that never moves in the demonstrations
MIN_TAU = 1e-3  # shorter distances are lost in float32
EVERYWHERE = 1e9  # a tau beyond every distance: support 1 in every state


@dataclass(frozen=True)
class SupportConfig:
    """How a support is fitted.

    Attributes:
      quantile: of the leave-one-trajectory-out distances that tau is; "nearest" has no
        tau.
      max_demos: states kept per skill by the nearest-neighbour form, evenly spaced.
      queries: states the learned form is fitted on, per skill.
      steps: gradient steps of the learned form.
      batch_size: states a step of the learned form.
      learning_rate: of the learned form.
      expectile: of the learned form; above 0.5 it errs on the far side.
      safe: only demonstrations within the job's cost limit count.
    """

    quantile: float = 0.98
    max_demos: int = 20_000
    queries: int = 60_000
    steps: int = 3000
    batch_size: int = 512
    learning_rate: float = 1e-3
    expectile: float = 0.97
    safe: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.quantile <= 1:
            raise InputError(
                f"quantile: got {self.quantile}, expected 0 < quantile <= 1"
            )
        if not 0 < self.expectile < 1:
            raise InputError(
                f"expectile: got {self.expectile}, expected 0 < expectile < 1"
            )
        if self.learning_rate <= 0:
            raise InputError(
                f"learning_rate: got {self.learning_rate}, expected above 0"
            )
        for field in ("max_demos", "queries", "steps", "batch_size"):
            if getattr(self, field) < 1:
                raise InputError(
                    f"{field}: got {getattr(self, field)}, expected 1 or more"
                )


def nearest(queries: np.ndarray, demos: np.ndarray, chunk: int = 512) -> np.ndarray:
    """Euclidean distance [Q] of each query [Q, S] to the nearest of demos [M, S]."""
    # Far from the origin the three terms would cancel to noise.
    queries, demos = queries - demos[0], demos - demos[0]
    square = np.sum(demos**2, axis=1)
    least = [
        np.min(square - 2 * part @ demos.T, axis=1) + np.sum(part**2, axis=1)
        for part in np.split(queries, range(chunk, len(queries), chunk))
    ]
    return np.sqrt(np.maximum(np.concatenate(least), 0))


def leave_one_out_distances(trajectories: Trajectories) -> np.ndarray:
    """Distance [N] of each demonstration state to the other demonstrations' states.

    Raises:
      InputError: fewer than two demonstrations.
    """
    if len(trajectories) < 2:
        raise InputError(
            "a support's scale needs at least 2 demonstrations of each skill, "
            f"got {len(trajectories)}"
        )
    return np.concatenate(
        [
            nearest(
                left_out, np.concatenate([*trajectories[:i], *trajectories[i + 1 :]])
            )
            for i, left_out in enumerate(trajectories)
        ]
    )


def fit_neighbour(
    config: SupportConfig, skills: Sequence[Trajectories], background: np.ndarray
) -> Params:
    """The reference form: the nearest demonstration state, by search.

    Distances are in units of the standard deviation of the skill's own states.

    Args:
      config: the rule for tau.
      skills: for each of K skills its demonstrations.
      background: unused; see `fit_learned`.

    Returns:
      "demos" [K, M, S], "valid" [K, M] bool, "tau" [K], "scale" [K, S].

    Raises:
      InputError: fewer than two demonstrations of a skill, or copies of one.
    """
    del background
    searched, scaled = _searched(config, skills)
    tau = [np.quantile(leave_one_out_distances(ts), config.quantile) for ts in scaled]
    if min(tau) < MIN_TAU:
        raise InputError(
            f"the demonstrations of skill {int(np.argmin(tau))} all visit the same "
            f"states: their distance, tau = {min(tau):.2g}, gives a support no scale"
        )
    return searched | {"tau": jnp.asarray(tau, jnp.float32)}


def fit_nearest(
    config: SupportConfig, skills: Sequence[Trajectories], background: np.ndarray
) -> Params:
    """The same demonstrations and scales with tau 1: skills are compared by distance,
    and one whose demonstrations differ much from one another gets no more for that.

    Args:
      config: how many states are kept.
      skills: for each of K skills its demonstrations.
      background: unused; see `fit_learned`.

    Returns:
      As `fit_neighbour`.
    """
    del background
    searched, _ = _searched(config, skills)
    return searched | {"tau": jnp.ones(len(skills))}


def _searched(
    config: SupportConfig, skills: Sequence[Trajectories]
) -> tuple[Params, list[list[np.ndarray]]]:
    """A support by search without its tau, and the skills in units of their scales."""
    scales = [np.maximum(np.concatenate(t).std(0), MIN_SCALE) for t in skills]
    scaled = [[t / scale for t in ts] for ts, scale in zip(skills, scales, strict=True)]
    demos = [_thin(np.concatenate(ts), config.max_demos) for ts in scaled]
    most = max(len(d) for d in demos)
    searched = {
        "demos": jnp.stack([np.pad(d, ((0, most - len(d)), (0, 0))) for d in demos]),
        "valid": jnp.stack([np.arange(most) < len(d) for d in demos]),
        "scale": jnp.asarray(np.stack(scales), jnp.float32),
    }
    return searched, scaled


def _thin(rows: np.ndarray, most: int) -> np.ndarray:
    if len(rows) <= most:
        return rows
    return rows[np.linspace(0, len(rows) - 1, most).astype(int)]


def fit_learned(
    config: SupportConfig, skills: Sequence[Trajectories], background: np.ndarray
) -> Params:
    """A small network per skill that predicts the distance: no search at run time.

    It is fitted to the reference form's distances, in units of tau and capped, on the
    demonstrations, the other skills' states, background states, and mixtures and
    jittered copies of all of them.

    Args:
      config: the rule for tau, and the fit.
      skills: for each of K skills its demonstrations.
      background: [M, S] normalised states of other behaviour, such as the base's own
        data.

    Returns:
      "low" and "high" [K, S], the box of the demonstrations, and "reach" [K], the
      reference's tau: outside the box the distance is at least the one to the box;
      "net" leaves [K, ...], "tau" [K] (all 1: the network speaks in units of tau),
      "scale" [K, S].

    Raises:
      InputError: fewer than two demonstrations of a skill, or copies of one.
      TrainingError: the fit is not finite.
    """
    reference = fit_neighbour(config, skills, background)
    every = np.concatenate([background, *(np.concatenate(t) for t in skills)])
    generator = np.random.default_rng(0)
    nets, low, high = [], [], []
    for k in range(len(skills)):
        demos = np.asarray(reference["demos"][k][reference["valid"][k]])
        low.append(demos.min(0))
        high.append(demos.max(0))
        others = every / np.asarray(reference["scale"][k])
        pool = _queries(generator, demos, others, config.queries)
        target = nearest(pool, demos) / float(reference["tau"][k])
        nets.append(_regress(config, pool, np.minimum(target, DISTANCE_CAP)))
    return {
        "net": tree.stack(nets),
        "tau": jnp.ones(len(skills)),
        "scale": reference["scale"],
        "low": jnp.stack(low),
        "high": jnp.stack(high),
        "reach": reference["tau"],
    }


def _queries(
    generator: np.random.Generator, demos: np.ndarray, every: np.ndarray, count: int
) -> np.ndarray:
    """States [Q, S] to fit a distance on: real ones, crossed ones, jittered ones.

    A crossed state takes some of its variables from a demonstration and the others from
    any real state: bodies and velocities that never occur at once. Without them the
    network underrates the distance of states that no data shows, such as a fallen body.
    """
    quarter = max(count // 4, 1)

    def real(rows: np.ndarray, size: int) -> np.ndarray:
        return rows[generator.integers(len(rows), size=size)]

    def some(shape: tuple[int, ...]) -> np.ndarray:
        return generator.random(shape) < generator.random((shape[0], 1))

    seen = np.concatenate([real(demos, quarter), real(every, quarter)])
    partner = real(np.concatenate([demos, every]), quarter)
    crossed = np.where(some(partner.shape), real(demos, quarter), partner)
    centre = real(np.concatenate([seen, crossed]), quarter)
    size = np.exp(generator.uniform(np.log(0.03), np.log(2.0), (quarter, 1)))
    noise = size * generator.normal(size=centre.shape) * some(centre.shape)
    return np.concatenate([seen, crossed, centre + noise]).astype(np.float32)


def _regress(config: SupportConfig, pool: np.ndarray, target: np.ndarray) -> Params:
    """A high expectile of the distance, by Adam with cosine decay in one scan.

    The network errs on the far side: a state wrongly held to be supported costs a fall,
    one wrongly held to be unsupported costs a moment of the base.
    """
    schedule = optax.cosine_decay_schedule(config.learning_rate, config.steps)
    optimiser = optax.adam(schedule)
    init_key, batch_key = jax.random.split(jax.random.key(0))
    net = init_distance(init_key, pool.shape[1])

    def loss_fn(net: Params, x: Array, y: Array) -> Array:
        error = y - jax.vmap(learned_distance, (None, 0))(net, x)
        weight = jnp.where(error > 0, config.expectile, 1 - config.expectile)
        return jnp.mean(weight * error**2)

    @jax.jit
    def run(net: Params, state: Params, pool: Array, target: Array) -> Params:
        def step(carry: tuple, key: Array) -> tuple[tuple, None]:
            net, state = carry
            index = jax.random.randint(key, (config.batch_size,), 0, pool.shape[0])
            grads = jax.grad(loss_fn)(net, pool[index], target[index])
            updates, state = optimiser.update(grads, state)
            return (optax.apply_updates(net, updates), state), None

        keys = jax.random.split(batch_key, config.steps)
        return jax.lax.scan(step, (net, state), keys)[0][0]

    net = run(net, optimiser.init(net), pool, target.astype(np.float32))
    # Numbers that are not finite stay so from step to step.
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(net)):
        raise TrainingError(
            f"the learned support is not finite between steps 0 and {config.steps}; "
            "nothing was saved"
        )
    return net


def append(kept: Params, new: Params) -> Params:
    """Supports of one form for the skills of the first and then those of the second.

    Args:
      kept: made by one of `FITS`; its numbers stay as they are.
      new: likewise. The shorter list of demonstrations is padded.
    """
    left, right = tree.flatten(kept), tree.flatten(new)
    if "valid" in left:
        most = max(left["valid"].shape[1], right["valid"].shape[1])
        for flat in (left, right):
            for leaf in ("demos", "valid"):
                widths = [(0, 0)] * flat[leaf].ndim
                widths[1] = (0, most - flat[leaf].shape[1])
                flat[leaf] = jnp.pad(flat[leaf], widths)
    return tree.unflatten({p: jnp.concatenate([left[p], right[p]]) for p in left})


FITS = {"neighbour": fit_neighbour, "nearest": fit_nearest, "learned": fit_learned}
