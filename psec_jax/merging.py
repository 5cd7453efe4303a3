"""Several LoRA skills at fixed weights as one: the ways, and the error that each makes.

At fixed weights the skills change every layer by sum_k alpha_k A_k B_k, of a rank that
is the sum of theirs. The sum of the A_k times the sum of the B_k is something else: it
has the products A_i B_j of different skills too.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from psec_jax import tree
from psec_jax.errors import InputError, lookup
from psec_jax.library import SkillLibrary
from psec_jax.lora import (
    adapter_of,
    dense_layers,
    merge,
    stack_skills,
    zero_skill,
)
from psec_jax.probe import Composed, composed, draw_states, relative
from psec_jax.types import Params

FOLD = "fold"
Factors = tuple[np.ndarray, np.ndarray]  # A [d, r] and alpha B [r, o] of one layer


@dataclass(frozen=True)
class MergeConfig:
    """How skills are merged.

    Attributes:
      method: a key of `METHODS`, or `FOLD`: into the base's own weights.
      rank: of the result; 0 is the sum of the skills' ranks, which "concatenate" has.
      density: share of the numbers of each alpha_k A_k B_k that "ties" and "dare"
        keep.
      seed: of the numbers that "dare" drops.
      bound: the largest relative error, of any layer and of predictions on data, that
        is accepted.
    """

    method: str = "concatenate"
    rank: int = 0
    density: float = 0.5
    seed: int = 0
    bound: float = 0.01

    def __post_init__(self) -> None:
        if self.method != FOLD:
            lookup(METHODS, self.method, "method")
        if self.rank < 0:
            raise InputError(f"rank: got {self.rank}, expected 0 or more")
        if self.rank and self.method in (FOLD, "concatenate"):
            raise InputError(
                f"rank: method {self.method} keeps the sum of the ranks; svd makes a "
                "smaller one"
            )
        if not 0 < self.density <= 1:
            raise InputError(f"density: got {self.density}, expected in (0, 1]")
        if not self.bound >= 0:
            raise InputError(f"bound: got {self.bound}, expected 0 or more")


def concatenate(factors: Sequence[Factors]) -> Factors:
    """All A side by side and all B one below the other: the sum itself."""
    a, b = zip(*factors, strict=True)
    return np.concatenate(a, axis=1), np.concatenate(b, axis=0)


def truncate(a: np.ndarray, b: np.ndarray, rank: int) -> Factors:
    """The nearest A' B' of a rank to A B (Eckart and Young 1936), by its factors.

    Both get the square root of the singular values.
    """
    q_a, r_a = np.linalg.qr(a)
    q_b, r_b = np.linalg.qr(b.T)
    u, s, vt = np.linalg.svd(r_a @ r_b.T, full_matrices=False)
    root = np.sqrt(s[:rank])
    return (q_a @ u[:, :rank]) * root, root[:, None] * (vt[:rank] @ q_b.T)


def _svd(
    config: MergeConfig, factors: Sequence[Factors], rank: int, layer: int
) -> Factors:
    return truncate(*concatenate(factors), rank)


def _concatenate(
    config: MergeConfig, factors: Sequence[Factors], rank: int, layer: int
) -> Factors:
    return concatenate(factors)


def trim(delta: np.ndarray, density: float) -> np.ndarray:
    """The largest magnitudes, this share of all, and zeros elsewhere."""
    kept = max(round(density * delta.size), 1)
    least = np.partition(np.abs(delta).ravel(), -kept)[-kept]
    return np.where(np.abs(delta) >= least, delta, 0)


def elect(deltas: np.ndarray) -> np.ndarray:
    """The mean of those [K, d, o] that have the sign of their sum, zeros left out."""
    agree = np.sign(deltas) == np.sign(deltas.sum(axis=0))
    agree &= deltas != 0
    return (deltas * agree).sum(axis=0) / np.maximum(agree.sum(axis=0), 1)


def _ties(
    config: MergeConfig, factors: Sequence[Factors], rank: int, layer: int
) -> Factors:
    """Trim, elect a sign, take the mean of what agrees (Yadav et al. 2023)."""
    deltas = np.stack([trim(a @ b, config.density) for a, b in factors])
    return _dense(elect(deltas), rank)


def _dare(
    config: MergeConfig, factors: Sequence[Factors], rank: int, layer: int
) -> Factors:
    """Drop at random, rescale what is left, and add (Yu et al. 2024)."""
    random = np.random.default_rng([config.seed, layer])
    total = np.zeros(())
    for a, b in factors:
        delta = a @ b
        kept = random.random(delta.shape) < config.density
        total = total + delta * kept / config.density
    return _dense(total, rank)


def _dense(delta: np.ndarray, rank: int) -> Factors:
    return truncate(delta, np.eye(delta.shape[1]), rank)


METHODS: dict[str, Callable[[MergeConfig, Sequence[Factors], int, int], Factors]] = {
    "concatenate": _concatenate,
    "svd": _svd,
    "ties": _ties,
    "dare": _dare,
}


def factors_of(
    skills: Sequence[Params], alpha: Sequence[float]
) -> dict[str, list[Factors]]:
    """Of each layer the A and alpha B of every skill, in float64.

    Raises:
      InputError: no skills, other weights than one each, or MLP skills.
    """
    if not skills:
        raise InputError("merge: got no skills, expected one or more")
    if len(alpha) != len(skills):
        raise InputError(f"alpha: got {len(alpha)} weights for {len(skills)} skills")
    if not np.isfinite(alpha).all():
        raise InputError(f"alpha: got {list(alpha)}, expected finite numbers")
    if any(adapter_of(skill) != "lora" for skill in skills):
        raise InputError("only lora skills are products A B, an mlp skill is none")
    flat = [
        {path: np.asarray(leaf, np.float64) for path, leaf in tree.flatten(s).items()}
        for s in skills
    ]
    layers = [path.removesuffix("/a") for path in flat[0] if path.endswith("/a")]
    return {
        layer: [
            (s[f"{layer}/a"], weight * s[f"{layer}/b"])
            for s, weight in zip(flat, alpha, strict=True)
        ]
        for layer in layers
    }


def merge_skills(
    config: MergeConfig, skills: Sequence[Params], alpha: Sequence[float]
) -> Params:
    """One skill for several at fixed weights; its own strength is 1.

    Args:
      config: the way.
      skills: LoRA skills of one base.
      alpha: the weight of each.

    Raises:
      InputError: no skills, other weights than one each, or MLP skills.
    """
    flat = {}
    for number, (layer, factors) in enumerate(factors_of(skills, alpha).items()):
        largest = min(factors[0][0].shape[0], factors[0][1].shape[1])
        together = sum(a.shape[1] for a, _ in factors)
        rank = config.rank or min(together, largest)
        a, b = METHODS[config.method](config, factors, rank, number)
        flat[f"{layer}/a"] = a.astype(np.float32)
        flat[f"{layer}/b"] = b.astype(np.float32)
    return tree.unflatten(flat)


class Errors(NamedTuple):
    """How far a merge is from the exact sum.

    Attributes:
      layers: ||dW - sum_k alpha_k A_k B_k|| / ||sum_k alpha_k A_k B_k|| of each layer.
      prediction: the same of the network's predictions on data, in terms of what the
        skills change there.
      action: root mean square of the difference of sampled actions, in [-1, 1].
    """

    layers: dict[str, float]
    prediction: float
    action: float

    def worst(self) -> tuple[str, float]:
        """Where the largest relative error is, and the error."""
        parts = self.layers | {"predictions on data": self.prediction}
        where = max(parts, key=lambda name: parts[name])
        return where, parts[where]

    def check(self, bound: float) -> None:
        """Refuse errors above a bound.

        Raises:
          InputError: there are; the largest is named.
        """
        where, error = self.worst()
        if not error <= bound:
            raise InputError(
                f"merge: the relative error of {where} is {error:.3g}, above the bound "
                f"{bound:g}; nothing was saved"
            )


def layer_errors(
    skills: Sequence[Params], alpha: Sequence[float], deltas: dict[str, np.ndarray]
) -> dict[str, float]:
    """The relative error of each layer's change [d, o] against the exact sum."""
    errors = {}
    for layer, factors in factors_of(skills, alpha).items():
        a, b = concatenate(factors)
        errors[layer] = relative(deltas[layer], a @ b, a @ b)
    return errors


def changes(skill: Params) -> dict[str, np.ndarray]:
    """A B of each layer of a skill, in float64."""
    return {layer: a @ b for layer, ((a, b),) in factors_of([skill], [1.0]).items()}


def data_errors(
    exact: Composed,
    alpha: Sequence[float],
    merged: Composed,
    obs: jax.Array,
    seed: int = 0,
) -> tuple[float, float]:
    """Errors of predictions and of actions on normalised states, see `Errors`.

    Args:
      exact: the base with the skills.
      alpha: their weights.
      merged: the base with the merged skill, or the base that they were folded into
        with a skill that changes nothing; of strength 1.
      obs: the states, [N, S].
      seed: of actions, times and noise.
    """
    weights, one = jnp.asarray(alpha, jnp.float32), jnp.ones(1)
    probe_key, key = jax.random.split(jax.random.key(seed))
    probe = jax.jit(exact.probe)(weights, probe_key, obs)
    predict = jax.jit(exact.predict)
    expected = predict(weights, probe)
    change = expected - predict(jnp.zeros_like(weights), probe)
    prediction = relative(jax.jit(merged.predict)(one, probe), expected, change)
    action = jax.jit(merged.actions)(one, key, obs)
    difference = action - jax.jit(exact.actions)(weights, key, obs)
    return prediction, float(jnp.sqrt(jnp.mean(difference**2)))


class Merged(NamedTuple):
    """A merge that is not saved yet.

    Attributes:
      params: the skill, or the base that the skills were folded into.
      errors: against the exact sum.
      card: what its card says.
    """

    params: Params
    errors: Errors
    card: dict[str, Any]


def merge_of_library(
    root: str | Path,
    names: Sequence[str],
    alpha: Sequence[float],
    config: MergeConfig,
    obs: np.ndarray,
    states: int = 256,
) -> Merged:
    """Skills of a library as one skill, or folded into the base, with the errors.

    Args:
      root: the library's folder.
      names: of the skills.
      alpha: the weight of each.
      config: the way.
      obs: raw observations of data, [N, S].
      states: how many of them predictions are compared on.

    Raises:
      InputError: skills or weights that cannot be merged, or other observations.
    """
    library = SkillLibrary.open(root)
    loaded = library.load_skills(names)
    skills = [skill for skill, _ in loaded]
    factors_of(skills, alpha)  # refuses what cannot be merged
    exact, normaliser = composed(root, stack_skills(skills))
    rows = draw_states(obs, normaliser, states, config.seed)
    if config.method == FOLD:
        params, merged, deltas = _folded(exact, alpha)
    else:
        params = merge_skills(config, skills, alpha)
        merged = exact._replace(library=stack_skills([params]))
        deltas = changes(params)
    errors = Errors(
        layer_errors(skills, alpha, deltas),
        *data_errors(exact, alpha, merged, rows, config.seed),
    )
    record = {
        "config": dataclasses.asdict(config),
        "skills": list(names),
        "alpha": [float(weight) for weight in alpha],
        "skill_fingerprints": [card["fingerprint"] for _, card in loaded],
        "errors": errors._asdict(),
        "states": len(rows),
    }
    return Merged(params, errors, {"alpha": 1.0, "merged": record})


def _folded(
    exact: Composed, alpha: Sequence[float]
) -> tuple[Params, Composed, dict[str, np.ndarray]]:
    if exact.net.config.compat != "paper":
        raise InputError(
            "merge: this base has another activation with skills than alone "
            "(compat='released'), so that nothing can be folded into it; method "
            "concatenate is exact"
        )
    base = merge(exact.base, exact.library, jnp.asarray(alpha, jnp.float32))
    old, new = tree.flatten(exact.base), tree.flatten(base)
    deltas = {
        layer: np.asarray(new[f"{layer}/kernel"], np.float64)
        - np.asarray(old[f"{layer}/kernel"])
        for layer in dense_layers(exact.base)
    }
    nothing = jax.tree.map(lambda x: x[:1], zero_skill(exact.library))
    return base, exact._replace(base=base, library=nothing), deltas
