"""The gate's head, trained through the composed policy; base and skills frozen."""

from dataclasses import dataclass, field
from functools import partial

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
from psec_jax.composition import (
    DENOISERS,
    LEVELS,
    PolicyConfig,
    PolicyParams,
    members,
    network_of,
)
from psec_jax.errors import InputError, lookup
from psec_jax.gating import gate_alpha
from psec_jax.losses import cloning_loss, diffusion_loss, released_regulariser
from psec_jax.networks.denoiser import COMPATS
from psec_jax.types import Params, TrainState


def _diffusion(config: PolicyConfig, params: PolicyParams, alpha, key, obs, action):
    net = network_of(config)
    library, strength = members(config, params)
    compose = lookup(DENOISERS, config.level, "level for the gate loss 'diffusion'")
    denoise = compose(net, params.base, library, strength, alpha)
    return diffusion_loss(denoise, config.process, key, obs, action)


def _cloning(config: PolicyConfig, params: PolicyParams, alpha, key, obs, action):
    net = network_of(config)
    library, strength = members(config, params)
    sampled = LEVELS[config.level](
        net, config.process, params.base, library, strength, alpha, key, obs
    )
    return cloning_loss(sampled, action)


# "diffusion" is the paper's form; "cloning" is how the authors' code trains the weights
# of the noise and action levels, and the only one the action level admits.
GATE_LOSSES = {"diffusion": _diffusion, "cloning": _cloning}


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
        if self.loss == "diffusion":
            lookup(DENOISERS, self.policy.level, "level for the gate loss 'diffusion'")
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


def _example(
    config: GateTrainConfig,
    frozen: PolicyParams,
    head: Params,
    key: Key[Array, ""],
    obs: Float[Array, " S"],
    action: Float[Array, " A"],
) -> tuple[Float[Array, ""], Float[Array, " K"]]:
    """Loss and alpha(s) of one example."""
    policy = config.policy
    assert policy.gate is not None and frozen.gate is not None
    alpha = gate_alpha(policy.gate, {**frozen.gate, "head": head}, obs)
    return GATE_LOSSES[config.loss](policy, frozen, alpha, key, obs, action), alpha
