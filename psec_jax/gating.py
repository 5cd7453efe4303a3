"""Gates: which skill acts how strongly in a state, `(params, obs) -> alpha [K]`.

A gate is a head times a support: alpha_k(s) = head_k(s) * support_k(s). The head is the
part that is tuned or learned; the support, in [0, 1], says whether skill k's
demonstrations reach the state s, and lets the base act where they do not.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from psec_jax import tree
from psec_jax.choice import RULES
from psec_jax.errors import InputError, lookup
from psec_jax.networks.mlp import MLP, apply, init_net, mlp_shapes, mlp_widths
from psec_jax.types import Params


@dataclass(frozen=True)
class GateForm:
    """What a user chooses of a gate.

    Attributes:
      head: a key of `HEADS`; "linear" is the paper's.
      support: a key of `SUPPORTS`; "none" is the paper's.
      priority: with a support, a skill gets only what the skills before it left over
        (stick-breaking in the order of the skills), so that strengths never add up;
        the shares of "nearest" add up to 1 by themselves.
      widths: hidden widths of learned heads.
      top_k: skills kept by the "topk" head.
      top_p: of the "topp" head, which keeps the fewest skills whose shares add up to
        at least this.
      temperature: of the softmax in the heads "softmax", "topk" and "topp": their
        logits are divided by it.
      candidates: actions that the "select" head samples with each of its weights.
      rule: how critics choose one of them, a key of `choice.RULES`.
      q_of: the policy whose Q the critics are: "data", what they were trained on;
        "own", for each of the weights that of keeping them from there on.
    """

    head: str = "linear"
    support: str = "none"
    priority: bool = True
    widths: tuple[int, ...] = (256, 256)
    top_k: int = 1
    top_p: float = 0.9
    temperature: float = 1.0
    candidates: int = 4
    rule: str = "reward_cost"
    q_of: str = "data"

    def __post_init__(self) -> None:
        lookup(HEADS, self.head, "head")
        lookup(RULES, self.rule, "rule")
        lookup(dict.fromkeys(Q_OF), self.q_of, "q_of")
        lookup(SUPPORTS, self.support, "support")
        for field in ("top_k", "candidates"):
            if getattr(self, field) < 1:
                raise InputError(
                    f"{field}: got {getattr(self, field)}, expected 1 or more"
                )
        if min(self.widths, default=1) < 1:
            raise InputError(f"widths: got {self.widths}, expected 1 or more")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p: got {self.top_p}, expected in (0, 1]")
        if not self.temperature > 0:
            raise InputError(f"temperature: got {self.temperature}, expected above 0")
        for field, heads in _READ_BY.items():
            if getattr(self, field) != _DEFAULTS[field] and self.head not in heads:
                raise InputError(
                    f"{field}: got {getattr(self, field)} with the head {self.head!r}, "
                    f"expected {_DEFAULTS[field]}: it is of {', '.join(heads)} alone"
                )


@dataclass(frozen=True)
class GateConfig(GateForm):
    """The form of a gate.

    Attributes:
      base_member: weight 0 is the base's own, as the noise and action levels need;
        what a support withholds from the skills then goes to the base.
      layers: L, where every layer of the network has weights of its own; 0 are the
        same weights for all layers.
    """

    base_member: bool = False
    layers: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers < 0:
            raise InputError(f"layers: got {self.layers}, expected 0 or more")
        if self.layers and (self.base_member or self.head == "select"):
            raise InputError(
                f"layers: got {self.layers} with the head {self.head!r} and "
                f"base_member {self.base_member}, expected 0: layers have weights of "
                "their own at the parameter level alone, and not with 'select'"
            )


def of_today(fields: Any) -> Any:
    """The fields of a form by today's names: older ones say "values" for "q_of"."""
    if not isinstance(fields, Mapping):
        return fields  # whoever reads it refuses it
    return {"q_of" if name == "values" else name: fields[name] for name in fields}


Q_OF = ("data", "own")
# Who reads a field; elsewhere it has to stay at its default.
_READ_BY = {"top_p": ("topp",), "temperature": ("softmax", "topk", "topp")}
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(GateForm)}


class Head(NamedTuple):
    """`init(config, key, obs_dim, start [K])`, `apply(config, params, obs)`.

    The start and the weights are [L, K] where layers have weights of their own.
    """

    init: Callable[[GateConfig, Array, int, Array], Params]
    apply: Callable[[GateConfig, Params, Array], Array]


def _init_constant(config, key, obs_dim, start):
    return {"alpha": start}


def _constant(config, params, obs):
    return params["alpha"]


def _init_linear(config, key, obs_dim, start):
    net = MLP(config.widths, start.size)
    params = init_net(net, key, (obs_dim,))
    params["output"]["bias"] = start.ravel()
    return params


def _linear(config, params, obs):
    outputs = params["output"]["bias"].shape[-1]
    out = apply(MLP(config.widths, outputs), params, obs)
    return out.reshape(config.layers, -1) if config.layers else out


def _init_bounded(config, key, obs_dim, start):
    return {
        "strength": start,
        "mlp": _init_linear(config, key, obs_dim, jnp.zeros_like(start)),
    }


def _logits(config, mlp, obs):
    return _linear(config, mlp, obs) / config.temperature


def _softmax(config, params, obs):
    share = jax.nn.softmax(_logits(config, params["mlp"], obs))
    return jax.lax.stop_gradient(params["strength"]) * share


def _sigmoid(config, params, obs):
    share = jax.nn.sigmoid(_linear(config, params["mlp"], obs))
    return jax.lax.stop_gradient(params["strength"]) * share


def _topk(config, params, obs):
    logits = _logits(config, params["mlp"], obs)
    if config.top_k > logits.shape[-1]:
        raise ValueError(f"top_k {config.top_k} of {logits.shape[-1]} skills")
    rank = jnp.argsort(jnp.argsort(-logits))  # of equal ones the first skill is first
    # Not renormalised over those kept: a single one would always have share 1 and
    # pass no gradient on.
    share = jnp.where(rank < config.top_k, jax.nn.softmax(logits), 0.0)
    return jax.lax.stop_gradient(params["strength"]) * share


def _topp(config, params, obs):
    share = jax.nn.softmax(_logits(config, params["mlp"], obs))
    order = jnp.argsort(-share)
    largest = jnp.take_along_axis(share, order, axis=-1)
    # A skill is kept while those before it add up to less; the first one always is.
    kept = jnp.cumsum(largest, axis=-1) - largest < config.top_p
    kept = jnp.take_along_axis(kept, jnp.argsort(order), axis=-1)
    return jax.lax.stop_gradient(params["strength"]) * jnp.where(kept, share, 0.0)


def _init_select(config, key, obs_dim, start):
    return {"alphas": jnp.atleast_2d(start)}


def _select(config, params, obs):
    return params["alphas"]


SPARSE_HEADS = ("topk", "topp")  # weights that are not kept are 0
BOUNDED_HEADS = ("softmax", "sigmoid", *SPARSE_HEADS)  # start at their largest values
HEADS = {
    "constant": Head(_init_constant, _constant),
    "linear": Head(_init_linear, _linear),
    "softmax": Head(_init_bounded, _softmax),
    "sigmoid": Head(_init_bounded, _sigmoid),
    "topk": Head(_init_bounded, _topk),
    "topp": Head(_init_bounded, _topp),
    "select": Head(_init_select, _select),  # several weights; critics choose an action
}
UNTRAINED_HEADS = ("constant", "select")


def neighbour_distance(
    demos: Float[Array, "M S"], valid: Bool[Array, " M"], x: Float[Array, " S"]
) -> Float[Array, ""]:
    """Distance from a state to the nearest of a skill's demonstration states.

    Args:
      demos: states in units of the skill's scale.
      valid: which rows are states, not padding.
      x: the state in the same units.
    """
    # Far from the origin the three terms would cancel to noise.
    demos, x = demos - demos[0], x - demos[0]
    inner = jnp.matmul(demos, x, precision="highest")
    square = jnp.sum(demos**2, axis=-1) - 2 * inner + jnp.sum(x**2)
    return jnp.sqrt(jnp.maximum(jnp.min(jnp.where(valid, square, jnp.inf)), 0.0))


_DISTANCE_NET = MLP((256, 256), 1)
DISTANCE_CAP = 4.0  # in units of tau: beyond it every support is zero anyway


def init_distance(key: Key[Array, ""], obs_dim: int) -> Params:
    """Parameters of the network behind `learned_distance`."""
    return init_net(_DISTANCE_NET, key, (obs_dim,))


def learned_distance(net: Params, x: Float[Array, " S"]) -> Float[Array, ""]:
    """The same distance as a small network predicts it: no search at run time.

    Trust it near the states it was fitted on alone; `SUPPORTS` bounds it elsewhere.
    """
    return jax.nn.softplus(apply(_DISTANCE_NET, net, x)[0])


def _falloff(distance: Array) -> Array:
    """exp(-(d / tau)^4): flat inside the demonstrations, steep at their edge."""
    return jnp.exp(-(distance**4))


NO_SUPPORT = 3.2  # in units of tau: from here on `_falloff` is 0 in float32
NO_SHARE = 17.0  # exp(-17) is less than the rounding of 1
FARTHEST = 1e9  # in units of tau: beyond it all are equally far


def _distances(
    params: Params, obs: Float[Array, " S"], enough: Callable[[Array], Any]
) -> Float[Array, " K"]:
    """Distance to the demonstrations of each skill, in units of its tau.

    Args:
      params: of the support; with an index skills are searched from the nearest box on.
      obs: one normalised observation.
      enough: distances [K] so far, infinite where not searched -> the distance from
        which on a skill is not searched and stays infinite.
    """
    x, demos, valid = obs / params["scale"], params["demos"], params["valid"]
    tau = params["tau"]
    if "low" not in params:
        return jax.vmap(neighbour_distance)(demos, valid, x) / tau
    least = _to_box(params, x) / tau
    largest = jnp.finfo(least.dtype).max

    def unsearched(so_far: Array) -> Array:
        return jnp.where(jnp.isinf(so_far), least, jnp.inf)

    def search(so_far: Array) -> Array:
        k = jnp.argmin(unsearched(so_far))
        distance = neighbour_distance(demos[k], valid[k], x[k])
        # Finite also where a square overflows: the others count as not searched.
        return so_far.at[k].set(jnp.minimum(distance / tau[k], largest))

    def more(so_far: Array) -> Array:
        return jnp.min(unsearched(so_far)) < enough(so_far)

    return jax.lax.while_loop(more, search, jnp.full_like(tau, jnp.inf))


def _neighbour(params: Params, obs: Float[Array, " S"]) -> Float[Array, " K"]:
    return _falloff(_distances(params, obs, lambda so_far: NO_SUPPORT))


def _nearest(params: Params, obs: Float[Array, " S"]) -> Float[Array, " K"]:
    """softmax(-d^2): the skills of the nearest demonstrations share 1."""

    def enough(so_far: Array) -> Array:
        return jnp.sqrt(jnp.min(so_far) ** 2 + NO_SHARE)

    distance = jnp.minimum(_distances(params, obs, enough), FARTHEST)
    # softmax(-d^2) by differences: of large squares nothing but rounding would be left.
    least = jnp.min(distance)
    weight = jnp.exp(-(distance - least) * (distance + least))
    return weight / jnp.sum(weight)


def index_boxes(support: Params) -> Params:
    """A support by search that leaves out skills whose demonstrations are too far.

    A state's distance to the box of a skill's demonstrations is at most its distance to
    the nearest of them. Where that is too far for any weight the skill is left out:
    the weights are those of the whole search, apart from rounding. Not to be
    differentiated.
    """
    demos, valid = support["demos"], support["valid"][..., None]
    low = jnp.min(jnp.where(valid, demos, jnp.inf), axis=1)
    high = jnp.max(jnp.where(valid, demos, -jnp.inf), axis=1)
    return support | {"low": low, "high": high}


def _to_box(params: Params, x: Float[Array, "K S"]) -> Float[Array, " K"]:
    """Distance to the box of each skill's demonstrations, 0 inside."""
    outside = jnp.maximum(jnp.maximum(params["low"] - x, x - params["high"]), 0)
    return jnp.linalg.norm(outside, axis=-1)


def _learned(params: Params, obs: Float[Array, " S"]) -> Float[Array, " K"]:
    x = obs / params["scale"]
    distance = jax.vmap(learned_distance)(params["net"], x)
    # How far x lies outside the box of the demonstrations bounds its distance from
    # below, however far from its data the network is evaluated.
    bound = _to_box(params, x) / params["reach"]
    return _falloff(jnp.maximum(distance, bound) / params["tau"])


SUPPORTS: dict[str, Callable[[Params, Array], Array] | None] = {
    "none": None,
    "neighbour": _neighbour,
    "nearest": _nearest,
    "learned": _learned,
}
SEARCHED = ("neighbour", "nearest")  # which `index_boxes` makes faster


def init_gate(
    config: GateConfig,
    key: Key[Array, ""],
    obs_dim: int,
    start: Float[Array, "*W K"],
    support: Params | None = None,
) -> dict[str, Any]:
    """Parameters of a gate: {"head": ..., "support": ... or absent}.

    Args:
      config: the gate's form.
      key: for a learned head.
      obs_dim: S.
      start: the weights the head starts from (a constant head stays there; bounded
        heads have them as their largest values), or the candidates of "select"; of all
        layers, or [L, K] of each where `config.layers` is L.
      support: made by one of `psec_jax.support.FITS`.

    Raises:
      InputError: a support is configured and not given, or the reverse.
    """
    if (support is not None) != (config.support != "none"):
        raise InputError(
            f"gate.support is {config.support!r} but the support's parameters are "
            f"{'given' if support is not None else 'missing'}"
        )
    start = jnp.asarray(start)
    if config.layers:
        start = jnp.broadcast_to(start, (config.layers, start.shape[-1]))
    params = {"head": HEADS[config.head].init(config, key, obs_dim, start)}
    return params if support is None else params | {"support": support}


LOWEST_SHARE = 2.0**-25  # added to 1 in float32 it leaves 1


def grow_head(
    config: GateConfig,
    params: Params,
    start: Float[Array, "*L K"],
    obs: Float[Array, "N S"],
) -> Params:
    """A trained head with more weights, behind those that it has.

    The weights it has stay as they are, to the rounding of a matrix product. The new
    ones are 0 in a linear head. A new share of a bounded head is at most `LOWEST_SHARE`
    on the states, too little for float32 to see beside the others, and passes a
    gradient on; where "topk" or "topp" do not keep it, its weight is 0.

    Args:
      config: the form, of both.
      params: the head.
      start: of the new form, as in `init_gate`; bounded heads take the largest values
        of the new weights from it.
      obs: normalised states.
    """
    rows, count = max(config.layers, 1), start.shape[-1]
    bounded = config.head in BOUNDED_HEADS
    params = jax.tree.map(jnp.asarray, params)
    mlp = params["mlp"] if bounded else params
    output = mlp["output"]
    kept = output["bias"].shape[-1] // rows

    def appended(leaf: Array, new: Array | float) -> Array:
        """[..., L K] with `new` [L, 1] behind the weights of each layer."""
        leaf = leaf.reshape(*leaf.shape[:-1], rows, kept)
        shape = (*leaf.shape[:-1], count - kept)
        joined = jnp.concatenate([leaf, jnp.broadcast_to(new, shape)], axis=-1)
        return joined.reshape(*joined.shape[:-2], rows * count)

    lowest: Array | float = 0.0
    if bounded:
        lowest = jnp.log(LOWEST_SHARE)
    if bounded and config.head != "sigmoid":
        logits = jax.vmap(partial(_logits, config, mlp))(obs).reshape(-1, rows, kept)
        total = jax.nn.logsumexp(logits, axis=-1).min(axis=0)
        lowest = config.temperature * (total[:, None] + lowest)
    grown = {
        "kernel": appended(output["kernel"], 0.0),
        "bias": appended(output["bias"], lowest),
    }
    mlp = {**mlp, "output": grown}
    if not bounded:
        return mlp
    start = jnp.broadcast_to(start, (*params["strength"].shape[:-1], count))
    strength = jnp.concatenate([params["strength"], start[..., kept:]], axis=-1)
    return {"strength": strength, "mlp": mlp}


def gate_alpha(
    config: GateConfig, params: Params, obs: Float[Array, " S"]
) -> Float[Array, "*W K"]:
    """alpha(s) of one normalised observation.

    Of "select" [W, K], each of its candidates; [L, K] where layers have weights of
    their own.
    """
    alpha = HEADS[config.head].apply(config, params["head"], obs)
    support = SUPPORTS[config.support]
    if support is None:
        return alpha
    share = support(params["support"], obs)
    if config.priority and config.support != "nearest":
        left = jnp.cumprod(1 - share)
        share = share * jnp.concatenate([jnp.ones(1), left[:-1]])
    if not config.base_member:
        return alpha * share
    skills = alpha[..., 1:] * share
    withheld = jnp.sum(alpha[..., 1:] - skills, axis=-1, keepdims=True)
    return jnp.concatenate([alpha[..., :1] + withheld, skills], axis=-1)


def check_gate(
    config: GateConfig,
    params: Params,
    obs_dim: int,
    action_dim: int,
    skills: int,
    name: str = "gate",
) -> None:
    """Refuse a gate whose arrays are not those of its form.

    Args:
      config: the form.
      params: {"head", "support"}, without a support where the form has none, with
        "critics" and "cost_weight" for the head "select".
      obs_dim: S.
      action_dim: A.
      skills: K.
      name: named in messages.

    Raises:
      InputError: an array is missing, unknown or of another shape or type.
    """
    got = {path: _kind(leaf) for path, leaf in tree.flatten(params).items()}
    outputs = skills + config.base_member
    if not 1 <= config.top_k <= outputs:
        raise InputError(f"{name}: top_k {config.top_k} of {outputs} weights")
    rows = (config.layers,) if config.layers else ()
    expected: dict[str, tuple[tuple[int, ...], str]] = {}
    mlp = {"linear": "head/"} | dict.fromkeys(BOUNDED_HEADS, "head/mlp/")
    if config.head == "select":
        shape = got.get("head/alphas", ((), "f"))[0]
        expected["head/alphas"] = ((shape[0] if shape else 1, outputs), "f")
        count = (shape[0] if shape else 1, 1) if config.q_of == "own" else (2,)
        expected |= _critic_shapes(config.rule, count, got, obs_dim, action_dim)
    elif config.head != "linear":
        start = "alpha" if config.head == "constant" else "strength"
        expected[f"head/{start}"] = ((*rows, outputs), "f")
    if config.head in mlp:
        flat = math.prod((*rows, outputs))
        for path, shape in mlp_shapes(config.widths, obs_dim, flat).items():
            expected[f"{mlp[config.head]}{path}"] = (shape, "f")
    sizes = {"K": skills, "S": obs_dim}
    if config.support in SEARCHED:
        shape = got.get("support/valid", ((skills, 1), "b"))[0]
        sizes["M"] = shape[1] if len(shape) == 2 else 1
    for leaf, axes in _SUPPORT_LEAVES[config.support].items():
        kind = "b" if leaf == "valid" else "f"
        expected[f"support/{leaf}"] = (tuple(sizes[axis] for axis in axes), kind)
    if config.support == "learned":
        for path, shape in mlp_shapes(_DISTANCE_NET.widths, obs_dim, 1).items():
            expected[f"support/net/{path}"] = ((skills, *shape), "f")
    for path in sorted(expected.keys() | got.keys()):
        if got.get(path) != expected.get(path):
            shape = got[path][0] if path in got else "missing"
            wanted = expected[path][0] if path in expected else "nothing"
            raise InputError(f"{name}: {path} is {shape}, expected {wanted}")


def _critic_shapes(
    rule: str,
    count: tuple[int, ...],
    got: Mapping[str, tuple],
    obs_dim: int,
    action_dim: int,
) -> dict[str, tuple[tuple[int, ...], str]]:
    """The arrays of the critics that a rule reads, and of its cost weight."""
    expected: dict[str, tuple[tuple[int, ...], str]] = {"cost_weight": ((), "f")}
    shapes = {path: shape for path, (shape, _) in got.items()}
    for kind in RULES[rule].critics:
        widths = mlp_widths(shapes, f"critics/{kind}")
        for path, shape in mlp_shapes(widths, obs_dim + action_dim, 1).items():
            expected[f"critics/{kind}/{path}"] = ((*count, *shape), "f")
    return expected


def _kind(leaf: Any) -> tuple[tuple[int, ...], str]:
    return tuple(jnp.shape(leaf)), jnp.result_type(leaf).kind


# The arrays of a support; K skills, S numbers of a state, M demonstration states.
_SEARCHED_LEAVES = {"demos": "KMS", "valid": "KM", "tau": "K", "scale": "KS"}
_SUPPORT_LEAVES: dict[str, dict[str, str]] = {
    "none": {},
    "neighbour": _SEARCHED_LEAVES,
    "nearest": _SEARCHED_LEAVES,
    "learned": {"tau": "K", "scale": "KS", "low": "KS", "high": "KS", "reach": "K"},
}
