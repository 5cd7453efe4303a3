"""The gate's head, trained through the composed policy; base and skills frozen."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from psec_jax.agents.common import (
    Demonstrations,
    Metrics,
    OptimiserConfig,
    check_batch_size,
    descend,
    init_state,
)
from psec_jax.choice import judge
from psec_jax.composition import (
    DENOISERS,
    LEVELS,
    PolicyConfig,
    PolicyParams,
    act_noise,
    action_noise,
    choose_scaled,
    members,
    network_of,
    sampler,
    score,
)
from psec_jax.errors import InputError, lookup
from psec_jax.gating import GateConfig, gate_alpha
from psec_jax.lora import adapter_of
from psec_jax.losses import cloning_loss, diffusion_loss, released_regulariser
from psec_jax.networks.denoiser import COMPATS
from psec_jax.process import scan_after_first
from psec_jax.runtime import platform
from psec_jax.types import Params, TrainState

MERGED = 4  # skills at most: merged ones are unrolled, which compilation grows with


class GateLoss(NamedTuple):
    """What a gate's head is trained on.

    Attributes:
      loss: `(policy's config, its params, alpha, key, obs, action) -> scalar` of one
        example with normalised observation.
      critics: whether it reads critics, by `PolicyConfig.rule`.
      levels: where it can be used.
    """

    loss: Callable[..., Array]
    critics: bool = False
    levels: Mapping[str, Any] = LEVELS


def _diffusion(config: PolicyConfig, params: PolicyParams, alpha, key, obs, action):
    net = network_of(config)
    library, strength = members(config, params)
    denoise = DENOISERS[config.level](net, params.base, library, strength, alpha)
    return diffusion_loss(denoise, config.process, key, obs, action)


def _sampled(config: PolicyConfig, params: PolicyParams, alpha, key, obs) -> Array:
    """The action that the weights sample, to be differentiated by them."""
    # At the parameter level the weights are in every layer of every step, and at the
    # action level no gradient reaches the steps.
    scan = scan_after_first if config.level == "noise" else jax.lax.scan
    return sampler(config, params, obs, scan)(action_noise(config, key), alpha)


def _cloning(config: PolicyConfig, params: PolicyParams, alpha, key, obs, action):
    return cloning_loss(_sampled(config, params, alpha, key, obs), action)


def _critic(config: PolicyConfig, params: PolicyParams, alpha, key, obs, action):
    """-(Q - lambda Q_c) of the action that the weights sample, or another rule's."""
    sampled = _sampled(config, params, alpha, key, obs)
    values = judge(params.critics or {}, obs, sampled[None])
    return -score(config, params, values)[0]


def _selected(config: PolicyConfig, params: PolicyParams, alpha, key, obs, action):
    """Mean (alpha - alpha*)^2, alpha* the weights that critics choose there."""
    policy = selecting(config, params)
    chosen = choose_scaled(*policy, act_noise(*policy, key), obs).alpha
    return jnp.mean((alpha - chosen) ** 2)


def selecting(
    config: PolicyConfig, params: PolicyParams
) -> tuple[PolicyConfig, PolicyParams]:
    """The policy whose critics choose among the weights `params.gate["alphas"]`."""
    assert config.gate is not None and params.gate is not None
    form = config.gate
    form = GateConfig(
        "select",
        candidates=form.candidates,
        rule=form.rule,
        q_of=form.q_of,
        base_member=form.base_member,
    )
    config = dataclasses.replace(config, gate=form, candidates=form.candidates)
    head = {"head": {"alphas": params.gate["alphas"]}}
    return config, params._replace(gate=head)


# "diffusion" is the paper's form; "cloning" is how the authors' code trains the weights
# of the noise and action levels, and the only one of the two that the action level
# admits. "critic" goes through the sampler, "selected" imitates the head "select".
GATE_LOSSES = {
    "diffusion": GateLoss(_diffusion, levels=DENOISERS),
    "cloning": GateLoss(_cloning),
    "critic": GateLoss(_critic, critics=True),
    "selected": GateLoss(_selected, critics=True),
}


@dataclass(frozen=True)
class GateTrainConfig:
    """What the gate weighs and how its head is trained.

    Attributes:
      policy: the composed policy, with the gate's form.
      loss: a key of `GATE_LOSSES`.
      optimiser: of the head; plain Adam without averaging, as in the authors' code.
      batch_size: transitions a step.
      compat: "paper"; "released" adds the authors' regulariser and draws the same
        noise and steps at every update, as their code does.
      strength: of the regulariser.
    """

    policy: PolicyConfig
    loss: str = "diffusion"
    optimiser: OptimiserConfig = field(
        default_factory=lambda: OptimiserConfig(weight_decay=0.0, ema=1.0)
    )
    batch_size: int = 2048
    compat: str = "paper"
    strength: float = 16.0

    def __post_init__(self) -> None:
        lookup(GATE_LOSSES, self.loss, "loss")
        if self.policy.gate is None:
            raise InputError("a policy without a gate has no gate to train")
        if self.compat not in COMPATS:
            raise InputError(f"compat: got {self.compat!r}, expected {COMPATS}")
        levels = GATE_LOSSES[self.loss].levels
        lookup(levels, self.policy.level, f"level for the gate loss {self.loss!r}")
        horizon = self.policy.process.horizon
        if GATE_LOSSES[self.loss].critics and horizon > 1:
            raise InputError(
                f"loss: got {self.loss!r} with chunks of {horizon} actions, expected "
                "another: critics judge one action"
            )
        if self.compat == "released" and self.policy.gate.layers:
            raise InputError(
                "compat: got 'released' with weights for each layer, expected 'paper': "
                "the authors' regulariser has one weight for each skill"
            )
        check_batch_size(self.batch_size)


def init(config: GateTrainConfig, gate: Params) -> TrainState:
    """Start from a gate made by `gating.init_gate`; only its head is trained."""
    return init_state(config.optimiser, gate["head"])


def update(
    config: GateTrainConfig,
    state: TrainState,
    batch: Demonstrations,
    frozen: PolicyParams,
    key: Key[Array, ""],
) -> tuple[TrainState, Metrics]:
    """One step on the gate's loss.

    Args:
      config: what the gate weighs and how its head is trained.
      state: training state of the head.
      batch: B demonstrations, with normalised observations.
      frozen: the policy around the head; its gate holds the support, if any.
      key: of the loss; not used by "released", whose noise is always the same.
    """
    obs, action = batch.obs, batch.action
    if _merges(config, frozen, len(obs)):
        policy = dataclasses.replace(config.policy, merged=True)
        config = dataclasses.replace(config, policy=policy)
    if config.compat == "released":
        key = jax.random.key(0)

    def loss_fn(head: Params) -> tuple[Array, Metrics]:
        keys = jax.random.split(key, len(obs))
        losses, alpha = jax.vmap(partial(_example, config, frozen, head))(
            keys, obs, action
        )
        loss = jnp.mean(losses)
        metrics = {
            "loss/gate": loss,
            "alpha/mean": jnp.mean(alpha),
            "alpha/std": jnp.mean(jnp.std(alpha, axis=0)),
        }
        if config.compat == "released":
            metrics["loss/regulariser"] = released_regulariser(alpha, config.strength)
            loss = loss + metrics["loss/regulariser"]
        return loss, metrics

    return descend(config.optimiser, state, loss_fn)


def _merges(config: GateTrainConfig, frozen: PolicyParams, batch_size: int) -> bool:
    """Whether the frozen skills are merged into the base, each alone."""
    policy = config.policy
    return (
        policy.level != "parameter"
        and frozen.strength is not None
        and len(frozen.strength) <= MERGED
        and policy.network.matmul_dtype == "float32"
        and adapter_of(frozen.library) == "lora"
        and platform.current().merges(batch_size)
    )


def _example(
    config: GateTrainConfig,
    frozen: PolicyParams,
    head: Params,
    key: Key[Array, ""],
    obs: Float[Array, " S"],
    action: Float[Array, " A"],
) -> tuple[Float[Array, ""], Float[Array, "*L K"]]:
    """Loss and alpha(s) of one example."""
    policy = config.policy
    assert policy.gate is not None and frozen.gate is not None
    alpha = gate_alpha(policy.gate, {**frozen.gate, "head": head}, obs)
    loss = GATE_LOSSES[config.loss].loss
    return loss(policy, frozen, alpha, key, obs, action), alpha
