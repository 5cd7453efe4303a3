"""Three levels at which skills are composed, and the policy they make.

Each level is `(net, base, library, strength, alpha, draw) -> action` for one example,
`draw(denoise) -> action` being the sampler on its noise and its normalised observation;
the caller vmaps. With one-hot alpha and strength 1 all three give the same action from
the same noise.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from psec_jax import tree
from psec_jax.choice import RULES, Critics, Judged, judge
from psec_jax.errors import InputError, lookup
from psec_jax.gating import GateConfig, gate_alpha
from psec_jax.lora import check_weights, zero_skill
from psec_jax.networks.denoiser import (
    Denoise,
    Denoiser,
    NetworkConfig,
    make_denoise,
    make_network,
)
from psec_jax.process import (
    ProcessConfig,
    Scan,
    draw_noise,
    sample_from,
)
from psec_jax.types import Normaliser, Params

Draw = Callable[[Denoise], Array]


def parameter_denoise(
    net: Denoiser,
    base: Params,
    library: Params,
    strength: Float[Array, " K"],
    alpha: Float[Array, "*L K"],
) -> Denoise:
    """PSEC: W(s) = W0 + sum_k alpha_k(s) B_k A_k; alpha is the whole multiplier.

    The weights are the same for all layers, or [L, K] each layer's own.
    """
    del strength
    return make_denoise(net, base, library, alpha)


def noise_denoise(
    net: Denoiser,
    base: Params,
    library: Params,
    strength: Float[Array, " K"],
    alpha: Float[Array, " K"],
) -> Denoise:
    """NSEC: eps = sum_k alpha_k(s) eps_k, each eps_k the net with skill k alone."""
    check_weights(alpha, strength.shape[0])

    def denoise(obs: Array, a_t: Array, t: Array) -> Array:
        eps = _alone(net, base, library, strength, lambda one: one(obs, a_t, t))
        return jnp.einsum("k,ka->a", alpha, eps)

    return denoise


def _alone(
    net: Denoiser,
    base: Params,
    library: Params,
    strength: Float[Array, " K"],
    predict: Callable[[Denoise], Float[Array, " A"]],
) -> Float[Array, "K A"]:
    """What `predict` makes of each skill alone.

    Skills that the network merges have kernels of their own, and come one after the
    other; the others share the base's in one product.
    """

    def one(skill: Params, strength: Array) -> Array:
        return predict(make_denoise(net, base, tree.stack([skill]), strength[None]))

    skills = library, strength
    if not net.merged:
        return jax.vmap(one)(*skills)
    parts = [jax.tree.map(lambda x, k=k: x[k], skills) for k in range(len(strength))]
    return jnp.stack([one(*part) for part in parts])


DENOISERS = {"parameter": parameter_denoise, "noise": noise_denoise}


def parameter_level(
    net: Denoiser,
    base: Params,
    library: Params,
    strength: Float[Array, " K"],
    alpha: Float[Array, "*L K"],
    draw: Draw,
) -> Float[Array, " A"]:
    """One chain of the network with composed weights (`parameter_denoise`)."""
    return draw(parameter_denoise(net, base, library, strength, alpha))


def noise_level(
    net: Denoiser,
    base: Params,
    library: Params,
    strength: Float[Array, " K"],
    alpha: Float[Array, " K"],
    draw: Draw,
) -> Float[Array, " A"]:
    """One chain on the mixed noise (`noise_denoise`)."""
    return draw(noise_denoise(net, base, library, strength, alpha))


def action_level(
    net: Denoiser,
    base: Params,
    library: Params,
    strength: Float[Array, " K"],
    alpha: Float[Array, " K"],
    draw: Draw,
) -> Float[Array, " A"]:
    """ASEC: a = sum_k alpha_k(s) a_k, each a_k from its own chain on the same noise."""
    check_weights(alpha, strength.shape[0])
    actions = _alone(net, base, library, strength, draw)
    return jnp.einsum("k,ka->a", alpha, actions)


LEVELS = {"parameter": parameter_level, "noise": noise_level, "action": action_level}


@jax.tree_util.register_static
@dataclass(frozen=True)
class PolicyConfig:
    """Everything static about a policy.

    Attributes:
      network: the denoiser's kind and sizes.
      process: the generative process, its sampler and its chunks.
      action_dim: A, of a single action.
      level: a key of `LEVELS`.
      gate: the gate's form; None is the base alone.
      candidates: actions sampled with each candidate of the weights.
      rule: how critics choose among all of them, a key of `choice.RULES`; one action
        needs no critic.
      gathered: skills of the largest weights whose matrices are gathered and computed,
        where the others' weights are 0; 0 computes all. Rounding may differ.
      merged: at the noise and action levels each skill is merged into the base's
        weights, once for a batch; see `networks.layers.AdaptedDense`.
    """

    network: NetworkConfig
    process: ProcessConfig
    action_dim: int
    level: str = "parameter"
    gate: GateConfig | None = None
    candidates: int = 1
    rule: str = "safety"
    gathered: int = 0
    merged: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        lookup(LEVELS, self.level, "level")
        lookup(RULES, self.rule, "rule")
        if self.candidates < 1:
            raise InputError(f"candidates: got {self.candidates}, expected 1 or more")
        if self.chooses and self.process.horizon > 1:
            raise InputError(
                f"candidates: got {self.candidates} with chunks of "
                f"{self.process.horizon} actions, expected 1: critics judge one action"
            )
        if self.gate and self.gate.base_member and self.level == "parameter":
            raise InputError(
                "gate.base_member: the base is always part of the parameter level; "
                "the noise and action levels alone weigh it"
            )
        if self.gate and self.gate.layers and self.level != "parameter":
            raise InputError(
                f"gate.layers: got {self.gate.layers} at the {self.level} level, which "
                "weighs predictions of the whole network; expected 0"
            )

    @property
    def chooses(self) -> bool:
        """Whether critics choose among several actions."""
        selects = self.gate is not None and self.gate.head == "select"
        return self.candidates > 1 or selects


def network_of(config: PolicyConfig) -> Denoiser:
    """The policy's network, which predicts chunks of H actions as H * A numbers."""
    horizon = config.process.horizon
    size = horizon * config.action_dim
    return make_network(config.network, size, horizon, merged=config.merged)


class PolicyParams(NamedTuple):
    """The arrays of a policy.

    Attributes:
      base: the base's parameters.
      normaliser: of observations.
      library: K skills, leaves [K, ...]; None is the base alone.
      strength: [K], the alpha each skill was trained at.
      gate: the gate's parameters.
      critics: those that choose among candidates, by kind.
      cost_weight: lambda of the rule "reward_cost".
    """

    base: Params
    normaliser: Normaliser
    library: Params | None = None
    strength: Array | None = None
    gate: Params | None = None
    critics: Critics | None = None
    cost_weight: Array | None = None


def members(config: PolicyConfig, params: PolicyParams) -> tuple[Params, Array]:
    """Library and strengths with the base in front, where the gate weighs it too.

    Raises:
      ValueError: the policy is a base alone.
    """
    if config.gate is None or params.library is None or params.strength is None:
        raise ValueError("a base alone has no skills to weigh")
    if not config.gate.base_member:
        return params.library, params.strength
    library = jax.tree.map(
        lambda zero, skills: jnp.concatenate([zero[:1], skills]),
        zero_skill(params.library),
        params.library,
    )
    return library, jnp.concatenate([jnp.zeros(1), params.strength])


def weights(
    config: PolicyConfig, params: PolicyParams, obs: Float[Array, " S"]
) -> Float[Array, "*W K"]:
    """alpha(s) of one raw observation; of the head "select" its candidates [W, K].

    [L, K] where the L layers have weights of their own.

    Raises:
      ValueError: the policy is a base alone.
    """
    if config.gate is None:
        raise ValueError("a base alone has no gate")
    return gate_alpha(config.gate, params.gate, params.normaliser(obs))


class Choice(NamedTuple):
    """One action of several, and why; candidates are in order of the weights.

    Attributes:
      action: [A], the one that is executed.
      alpha: [K] or [L, K], the weights it was sampled with; [0] of a base alone.
      values: Q of every candidate [N] by the kind of critic.
      chosen: its number among them.
    """

    action: Float[Array, " A"]
    alpha: Float[Array, "*L K"]
    values: dict[str, Float[Array, " N"]]
    chosen: Int[Array, ""]


def action_noise(config: PolicyConfig, key: Key[Array, ""]) -> Float[Array, "Z HA"]:
    """The noise of one sampled action (or chunk)."""
    size = config.process.horizon * config.action_dim
    return draw_noise(config.process, key, size)


def act_noise(
    config: PolicyConfig, params: PolicyParams, key: Key[Array, ""]
) -> Float[Array, "*N Z HA"]:
    """The noise of one call of `act`: where critics choose, of each candidate."""
    if not config.chooses:
        return action_noise(config, key)
    count = config.candidates
    if config.gate is not None and config.gate.head == "select":
        assert params.gate is not None
        count *= len(params.gate["head"]["alphas"])
    keys = jax.random.split(key, count)
    return jax.vmap(functools.partial(action_noise, config))(keys)


def act(
    config: PolicyConfig,
    params: PolicyParams,
    key: Key[Array, ""],
    obs: Float[Array, " S"],
) -> Float[Array, " A"] | Float[Array, "h A"]:
    """`act_from` of noise drawn from a key."""
    return act_from(config, params, act_noise(config, params, key), obs)


def act_from(
    config: PolicyConfig,
    params: PolicyParams,
    noise: Float[Array, "*N Z HA"],
    obs: Float[Array, " S"],
) -> Float[Array, " A"] | Float[Array, "h A"]:
    """The actions to execute from one raw observation; alpha(s) is computed once.

    Args:
      config: the static part.
      params: the arrays.
      noise: as `act_noise` draws it.
      obs: raw.

    Returns:
      One action [A], or [h, A] where h = `process.execute` is above 1: the first ones
      of the chunk.

    Raises:
      InputError: several candidates, and no critics to choose among them.
    """
    obs = params.normaliser(obs)
    if config.chooses:
        return choose_scaled(config, params, noise, obs).action
    alpha = _alphas(config, params, obs)[0]
    chunk = sampler(config, params, obs)(noise, alpha).reshape(-1, config.action_dim)
    execute = config.process.execute
    return chunk[0] if execute == 1 else chunk[:execute]


def choose(
    config: PolicyConfig,
    params: PolicyParams,
    key: Key[Array, ""],
    obs: Float[Array, " S"],
) -> Choice:
    """The action that `config.rule` chooses from one raw observation, and why.

    Raises:
      InputError: no critics, or not those of the rule.
    """
    noise = act_noise(config, params, key)
    return choose_scaled(config, params, noise, params.normaliser(obs))


def choose_scaled(
    config: PolicyConfig,
    params: PolicyParams,
    noise: Float[Array, "N Z A"],
    obs: Float[Array, " S"],
) -> Choice:
    """`choose` from the noise of one normalised observation."""
    for kind in RULES[config.rule].critics:
        if kind not in (params.critics or {}):
            raise InputError(
                f"the choice among candidates by {config.rule} needs a critic of {kind}"
            )
    alphas, actions = candidates(config, params, noise, obs)
    values = judge(params.critics or {}, obs, actions, judges_own(config))
    chosen = jnp.argmax(score(config, params, values))
    return Choice(actions[chosen], alphas[chosen], values, chosen)


def judges_own(config: PolicyConfig) -> bool:
    """Whether each of the gate's weights has critics of its own."""
    return config.gate is not None and config.gate.q_of == "own"


def score(config: PolicyConfig, params: PolicyParams, values: Judged) -> Array:
    """What the rule makes of the critics' values of N candidates, [N]."""
    weight = jnp.zeros(()) if params.cost_weight is None else params.cost_weight
    return RULES[config.rule].score(values, weight)


def candidates(
    config: PolicyConfig,
    params: PolicyParams,
    noise: Float[Array, "N Z A"],
    obs: Float[Array, " S"],
) -> tuple[Float[Array, "N *L K"], Float[Array, "N A"]]:
    """N = W n weights and actions of one normalised observation: n =
    `config.candidates` samples with each of the gate's W candidates of the weights."""
    alphas = jnp.repeat(_alphas(config, params, obs), config.candidates, axis=0)
    return alphas, jax.vmap(sampler(config, params, obs))(noise, alphas)


def _alphas(
    config: PolicyConfig, params: PolicyParams, obs: Float[Array, " S"]
) -> Float[Array, "W *L K"]:
    """The candidates of the weights: one, of every head but "select"."""
    if config.gate is None:
        return jnp.zeros((1, 0))
    alpha = gate_alpha(config.gate, params.gate, obs)
    return alpha if config.gate.head == "select" else alpha[None]


def sampler(
    config: PolicyConfig,
    params: PolicyParams,
    obs: Float[Array, " S"],
    scan: Scan = jax.lax.scan,
) -> Callable[[Float[Array, "Z HA"], Float[Array, "*L K"]], Array]:
    """(noise, alpha) -> action, or chunk, [H * A] of one normalised observation; see
    `process.sample_from` for `scan`."""
    net = network_of(config)

    def drawing(noise: Array) -> Draw:
        return lambda denoise: sample_from(denoise, config.process, noise, obs, scan)

    if config.gate is None:
        return lambda noise, alpha: drawing(noise)(make_denoise(net, params.base))
    library, strength = members(config, params)
    level = LEVELS[config.level]

    def draw(noise: Array, alpha: Array) -> Array:
        def of(skills: Params, strengths: Array, shares: Array) -> Array:
            return level(net, params.base, skills, strengths, shares, drawing(noise))

        every = library, strength, alpha
        if not config.gathered:
            return of(*every)

        def of_largest() -> Array:
            largest = jax.lax.top_k(jnp.abs(alpha), config.gathered)[1]
            return of(*jax.tree.map(lambda leaf: leaf[largest], every))

        if config.gate is not None and config.gate.head == "topk":
            return of_largest()  # no other has a weight
        few = jnp.count_nonzero(alpha) <= config.gathered
        return jax.lax.cond(few, of_largest, lambda: of(*every))

    return draw
