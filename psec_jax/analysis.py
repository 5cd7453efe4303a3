"""How the skills of a library relate: alike, in conflict, or made up for by the others.

Matrices compare the skills in weights, each at its own strength; predictions compare
them on given states. A skill is redundant where fixed weights of the others predict
what it does.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from psec_jax.cards import form_of
from psec_jax.errors import InputError
from psec_jax.gating import SUPPORTS, GateConfig
from psec_jax.library import SkillLibrary
from psec_jax.lora import stack_skills
from psec_jax.merging import Factors, factors_of
from psec_jax.probe import Composed, Probe, composed, draw_states, relative

# Field of `Analysis` -> title, range of values.
MAPS: Mapping[str, tuple[str, tuple[float, float]]] = {
    "cosine": ("cosine of the weights' changes", (-1, 1)),
    "agreement": ("cosine of the predictions' changes", (-1, 1)),
    "distance": ("distance of predictions", (0, 2)),
    "conflict": ("conflict", (0, 1)),
    "overlap": ("overlap of supports", (0, 1)),
}
LAYERS = ("cosine of the weights' changes by layer", (-1, 1))

_STEPS = 8  # of Gauss-Newton
_RIDGE = 1e-6
_NOTHING = 1e-3  # of a weight in units of the skill's strength


@dataclass(frozen=True)
class AnalysisConfig:
    """What is looked at, and where suggestions begin.

    Attributes:
      states: how many states of the data, drawn at random.
      seed: of states, actions, times and noise.
      redundant: a skill is suggested for removal where the others predict what it does
        with at most this relative error.
      conflict: two skills are suggested to be kept apart where their conflict is at
        least this.
    """

    states: int = 256
    seed: int = 0
    redundant: float = 0.1
    conflict: float = 0.5

    def __post_init__(self) -> None:
        for name in ("redundant", "conflict"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name}: got {getattr(self, name)}, expected 0 to 1")


class Analysis(NamedTuple):
    """What was found of K skills; matrices are [K, K] in the order of the skills.

    Attributes:
      skills: names.
      layers: of each layer "cosine" [K, K] of alpha A B, and "inputs" and "outputs",
        the mean squared cosine of the principal angles between the spaces that two
        skills read and write.
      angles: of each layer and pair "I,J" the principal angles in degrees of inputs and
        of outputs, smallest first.
      cosine: of all layers' changes as one vector.
      distance: ||D_i - D_j|| over the larger of ||D_i|| and ||D_j||, where D is what a
        skill changes of the predictions.
      agreement: the cosine of D_i and D_j.
      conflict: max(0, -agreement).
      overlap: of the supports of gates on the states, sum of the smaller over sum of
        the larger; None without such gates.
      left: of each skill the relative error of predictions where it is dropped and the
        rest composed anew, at the weights `weights`.
      weights: of each skill those of all skills; its own is 0.
      removed: the skills that are suggested for removal, with the weights of those that
        are kept and the error: {name: {"weights": {name: weight}, "error": error}}.
      suggestions: of each skill one line.
    """

    skills: list[str]
    layers: dict[str, dict[str, list[list[float]]]]
    angles: dict[str, dict[str, dict[str, list[float]]]]
    cosine: list[list[float]]
    distance: list[list[float]]
    agreement: list[list[float]]
    conflict: list[list[float]]
    overlap: list[list[float | None]] | None
    left: list[float]
    weights: list[list[float]]
    removed: dict[str, dict[str, Any]]
    suggestions: dict[str, str]


def gram(factors: Sequence[Factors]) -> np.ndarray:
    """<A_i B_i, A_j B_j> of one layer, by the factors: [K, K]."""
    return np.array(
        [[np.sum((a.T @ c) * (b @ d.T)) for c, d in factors] for a, b in factors]
    )


def cosines(gram: np.ndarray) -> np.ndarray:
    """Cosines of an inner product's matrix; 0 for what is zero."""
    size = np.sqrt(np.diag(gram))
    product = np.outer(size, size)
    return np.divide(gram, product, out=np.zeros_like(gram), where=product > 0)


def spaces(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Orthonormal bases [d, r'] and [o, r'] of what A B reads and what it writes."""
    q_a, r_a = np.linalg.qr(a)
    q_b, r_b = np.linalg.qr(b.T)
    u, s, vt = np.linalg.svd(r_a @ r_b.T, full_matrices=False)
    rank = int(np.sum(s > 1e-6 * s[0])) if s[0] > 0 else 0
    return q_a @ u[:, :rank], q_b @ vt[:rank].T


def principal_cosines(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Cosines of the principal angles between the columns of two orthonormal bases."""
    if not u.shape[1] or not v.shape[1]:
        return np.zeros(0)
    return np.clip(np.linalg.svd(u.T @ v, compute_uv=False), 0, 1)


def compare_layer(factors: Sequence[Factors]) -> tuple[dict, dict]:
    """The fields `layers` and `angles` of `Analysis` of one layer."""
    bases = [spaces(a, b) for a, b in factors]
    count = len(factors)
    shares = {"inputs": np.zeros((count, count)), "outputs": np.zeros((count, count))}
    angles: dict[str, dict[str, list[float]]] = {}
    for i in range(count):
        for j in range(i, count):
            pair = {}
            for side, name in enumerate(shares):
                found = principal_cosines(bases[i][side], bases[j][side])
                share = float(np.mean(found**2)) if len(found) else 0.0
                shares[name][i, j] = shares[name][j, i] = share
                pair[name] = np.degrees(np.arccos(found)).round(3).tolist()
            if i < j:
                angles[f"{i},{j}"] = pair
    matrices = {"cosine": cosines(gram(factors))} | shares
    return {name: matrix.tolist() for name, matrix in matrices.items()}, angles


class Predictions:
    """Predictions of K skills at any weights on a probe, as flat vectors.

    Weights are in units of each skill's own strength: 1 is the skill as trained.
    """

    def __init__(self, net: Composed, strength: Any, probe: Probe) -> None:
        strength = jnp.asarray(strength, jnp.float32)
        count = len(strength)

        def predict(weights: Any) -> Any:
            return net.predict(weights * strength, probe).ravel()

        self._predict = jax.jit(predict)
        self._slopes = jax.jit(jax.jacfwd(predict))
        self.base = self.at(np.zeros(count))
        self.alone = np.stack([self.at(row) for row in np.eye(count)])
        self.changes = self.alone - self.base

    def at(self, weights: np.ndarray) -> np.ndarray:
        """The predictions at some weights."""
        predicted = self._predict(jnp.asarray(weights, jnp.float32))
        return np.asarray(predicted, np.float64)

    def without(self, skill: int, kept: Sequence[int]) -> tuple[np.ndarray, float]:
        """Weights of the kept skills that come nearest to one skill alone.

        Gauss-Newton from no skill at all, with steps halved that do not help.

        Returns:
          Weights of all skills, zero but of those kept, and the relative error.
        """
        weights = np.zeros(len(self.alone))
        target, kept = self.alone[skill], list(kept)
        error = relative(self.base, target, self.changes[skill])
        if not kept:
            return weights, error
        for _ in range(_STEPS):
            slopes = np.asarray(
                self._slopes(jnp.asarray(weights, jnp.float32)), np.float64
            )[:, kept]
            normal = slopes.T @ slopes
            normal += _RIDGE * np.trace(normal) / len(kept) * np.eye(len(kept))
            step = np.linalg.lstsq(
                normal, slopes.T @ (target - self.at(weights)), rcond=None
            )[0]
            for scale in (1.0, 0.5, 0.25):
                tried = weights.copy()
                tried[kept] += scale * step
                now = relative(self.at(tried), target, self.changes[skill])
                if now < error:
                    break
            else:
                break
            done = error - now < 1e-4 * error
            weights, error = tried, now
            if done:
                break
        weights[np.abs(weights) < _NOTHING] = 0
        return weights, relative(self.at(weights), target, self.changes[skill])


def redundant(
    predictions: Predictions, bound: float
) -> dict[int, tuple[np.ndarray, float]]:
    """Skills that can go one after the other, with the weights that replace them.

    The one that the rest replaces best goes first; another one follows where every
    skill removed so far is still replaced by what is then left.
    """
    removed: dict[int, tuple[np.ndarray, float]] = {}
    kept = list(range(len(predictions.alone)))
    while len(kept) > 1:
        found = {}
        for skill in kept:
            rest = [k for k in kept if k != skill]
            own = predictions.without(skill, rest)
            if own[1] > bound:
                continue
            replaced = {k: predictions.without(k, rest) for k in removed} | {skill: own}
            if max(error for _, error in replaced.values()) <= bound:
                found[skill] = replaced
        if not found:
            return removed
        best = min(found, key=lambda k: found[k][k][1])
        removed = found[best]
        kept.remove(best)
    return removed


def supports(
    library: SkillLibrary, gates: Sequence[str], names: Sequence[str], obs: jax.Array
) -> np.ndarray:
    """Each skill's support on normalised states, [N, K], by the first gate that has it.

    NaN where no gate has it.

    Raises:
      InputError: an unknown gate, or one without a support.
    """
    columns: dict[str, np.ndarray] = {}
    for gate in gates:
        columns = _supports(library, gate, obs) | columns
    nothing = np.full(len(obs), np.nan)
    return np.stack([columns.get(name, nothing) for name in names], axis=1)


def _supports(
    library: SkillLibrary, gate: str, obs: jax.Array
) -> dict[str, np.ndarray]:
    params, card = library.load_gate(gate)
    form = form_of(GateConfig, card["gate"], f"gate {gate!r}")
    share = SUPPORTS[form.support]
    if share is None:
        raise InputError(f"gate {gate!r} has no support to compare skills by")
    shares = jax.jit(jax.vmap(share, (None, 0)))
    found = np.asarray(shares(params["support"], obs))
    return dict(zip(card["skills"], found.T, strict=True))


def overlaps(shares: np.ndarray) -> list[list[float | None]]:
    """sum min / sum max of every two columns; None where one is not known."""

    def one(left: np.ndarray, right: np.ndarray) -> float | None:
        larger = np.maximum(left, right).sum()
        if np.isnan(larger):
            return None
        return float(np.minimum(left, right).sum() / larger) if larger > 0 else 0.0

    return [[one(left, right) for right in shares.T] for left in shares.T]


def analyse(
    root: str | Path,
    names: Sequence[str],
    config: AnalysisConfig,
    obs: np.ndarray,
    gates: Sequence[str] = (),
) -> tuple[Analysis, dict[str, Any]]:
    """The relations of skills of a library, and a record of what they were made of.

    Args:
      root: the library's folder.
      names: of LoRA skills; none is all skills.
      config: states and bounds.
      obs: raw observations of data, [N, S].
      gates: with supports, to compare where skills apply.

    Raises:
      InputError: fewer than two skills, MLP skills, or other observations.
    """
    library = SkillLibrary.open(root)
    names = list(names) or library.skills()
    if len(names) < 2:
        raise InputError(
            f"{library.root}: got {len(names)} skills to compare, expected 2 or more"
        )
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"skill {twice[0]!r} is given twice")
    loaded = library.load_skills(names)
    strength = [card["alpha"] for _, card in loaded]
    layers = factors_of([skill for skill, _ in loaded], strength)
    net, normaliser = composed(root, stack_skills([skill for skill, _ in loaded]))
    rows = draw_states(obs, normaliser, config.states, config.seed)
    nothing = jnp.zeros(len(names))
    probe = jax.jit(net.probe)(nothing, jax.random.key(config.seed), rows)
    predictions = Predictions(net, strength, probe)
    shares = supports(library, gates, names, rows) if gates else None
    record = {
        "config": dataclasses.asdict(config),
        "base_fingerprint": loaded[0][1]["base_fingerprint"],
        "skill_fingerprints": [card["fingerprint"] for _, card in loaded],
        "alpha": strength,
        "gates": list(gates),
        "states": len(rows),
    }
    return _analysis(names, layers, predictions, shares, config), record


def _analysis(
    names: list[str],
    layers: Mapping[str, Sequence[Factors]],
    predictions: Predictions,
    shares: np.ndarray | None,
    config: AnalysisConfig,
) -> Analysis:
    grams = np.stack([gram(factors) for factors in layers.values()])
    compared = {layer: compare_layer(factors) for layer, factors in layers.items()}
    change = predictions.changes
    agreement = cosines(change @ change.T)
    conflict = np.maximum(-agreement, 0)
    distance = [[_distance(left, right) for right in change] for left in change]
    everyone = range(len(names))
    dropped = [
        predictions.without(k, [other for other in everyone if other != k])
        for k in everyone
    ]
    removed = {
        names[skill]: {
            "weights": {names[k]: float(w) for k, w in enumerate(weights) if w != 0},
            "error": error,
        }
        for skill, (weights, error) in redundant(predictions, config.redundant).items()
    }
    return Analysis(
        skills=names,
        layers={layer: found for layer, (found, _) in compared.items()},
        angles={layer: angles for layer, (_, angles) in compared.items()},
        cosine=cosines(grams.sum(axis=0)).tolist(),
        distance=distance,
        agreement=agreement.tolist(),
        conflict=conflict.tolist(),
        overlap=None if shares is None else overlaps(shares),
        left=[error for _, error in dropped],
        weights=[weights.tolist() for weights, _ in dropped],
        removed=removed,
        suggestions={
            name: _suggestion(name, names, removed, conflict[k], config)
            for k, name in enumerate(names)
        },
    )


def _distance(left: np.ndarray, right: np.ndarray) -> float:
    larger = max(np.linalg.norm(left), np.linalg.norm(right))
    return float(np.linalg.norm(left - right) / larger) if larger > 0 else 0.0


def _suggestion(
    name: str,
    names: Sequence[str],
    removed: Mapping[str, Mapping[str, Any]],
    conflict: np.ndarray,
    config: AnalysisConfig,
) -> str:
    if name in removed:
        weights = removed[name]["weights"]
        others = " + ".join(f"{w:.2f} {other}" for other, w in weights.items())
        error = removed[name]["error"]
        return f"remove: {others or 'the base'} predicts the same to {error:.2g}"
    worst = int(np.argmax(conflict))
    if conflict[worst] >= config.conflict:
        return (
            f"keep apart from {names[worst]}: their changes have the cosine "
            f"{-conflict[worst]:.2f}"
        )
    return "keep"
