"""Load a library, pick skills, compose, act: the API of notebooks and robots."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from psec_jax import tree
from psec_jax.agents import critic_file
from psec_jax.agents.critic_file import Finished
from psec_jax.agents.critics import of_kind
from psec_jax.composition import LEVELS, PolicyConfig, PolicyParams, act, weights
from psec_jax.errors import InputError, lookup
from psec_jax.gating import GateConfig
from psec_jax.library import SkillLibrary
from psec_jax.lora import stack_skills
from psec_jax.networks.denoiser import NetworkConfig
from psec_jax.process import ProcessConfig
from psec_jax.types import Normaliser, Params


@dataclasses.dataclass(frozen=True)
class Policy:
    """A composed policy: static config and arrays; every call is jitted.

    Attributes:
      config: the static part.
      params: the arrays.
      skills: names of the K skills, in the order of alpha; with a gate that weighs
        the base too, alpha has the base's weight in front.
    """

    config: PolicyConfig
    params: PolicyParams
    skills: tuple[str, ...] = ()

    def act(
        self, keys: Key[Array, "*B"], obs: Float[Array | np.ndarray, "*B S"]
    ) -> Float[Array, "*B A"] | Float[Array, "*B h A"]:
        """Actions in [-1, 1] for raw observations; one key for each observation.

        Where `process.execute` is above 1, the h actions to execute one after the other
        before the next call.

        Raises:
          InputError: observations of another size than the base's.
        """
        self._check(obs)
        one_or_batch = _act_batch if jnp.ndim(obs) == 2 else _act_one
        return one_or_batch(self.config, self.params, keys, obs)

    def alpha(self, obs: Float[Array | np.ndarray, "B S"]) -> Float[Array, "B K"]:
        """The gate's weights for raw observations.

        Raises:
          InputError: the policy is a base alone, or observations of another size than
            the base's.
        """
        if self.config.gate is None:
            raise InputError("this policy is a base alone: it has no skills to weigh")
        self._check(obs)
        return _weights_batch(self.config, self.params, obs)

    def _check(self, obs: Float[Array | np.ndarray, "*B S"]) -> None:
        # Observations of one number would be broadcast without a word.
        got, expected = jnp.shape(obs)[-1], len(self.params.normaliser.mean)
        if got != expected:
            raise InputError(
                f"observations have {got} numbers, the policy's base expects {expected}"
            )


@functools.partial(jax.jit, static_argnums=0)
def _act_one(config, params, key, obs):
    return act(config, params, key, obs)


@functools.partial(jax.jit, static_argnums=0)
def _act_batch(config, params, keys, obs):
    one = functools.partial(act, config, params)
    return jax.vmap(one)(keys, obs)


@functools.partial(jax.jit, static_argnums=0)
def _act_together(config, params, keys, obs):
    def one(params, keys, obs):
        return jax.vmap(functools.partial(act, config, params))(keys, obs)

    return jax.vmap(one)(params, keys, obs)


def alike(left: Policy, right: Policy) -> bool:
    """Whether the two can act in one call: the same config and shapes of arrays."""
    same = tree.shapes(left.params) == tree.shapes(right.params)
    return left.config == right.config and same


def act_together(
    policies: Sequence[Policy],
) -> Callable[[Key[Array, "R B"], Float[Array | np.ndarray, "R B S"]], jax.Array]:
    """`act` of R policies that are `alike`, as one jitted call with R in front."""
    params = tree.stack([policy.params for policy in policies])
    return functools.partial(_act_together, policies[0].config, params)


@functools.partial(jax.jit, static_argnums=0)
def _weights_batch(config, params, obs):
    return jax.vmap(functools.partial(weights, config, params))(obs)


def network_config(card: dict[str, Any]) -> NetworkConfig:
    """The network a base's card describes."""
    # Cards of the first edition have the rate of dropout, which is a training's.
    fields = {k: v for k, v in card["network"].items() if k != "dropout"}
    return NetworkConfig(**fields)


def process_config(card: dict[str, Any]) -> ProcessConfig:
    """The generative process a base's card describes; older cards say "diffusion"."""
    return ProcessConfig(**(card.get("process") or card["diffusion"]))


def gate_config(card: dict[str, Any]) -> GateConfig:
    """The form of gate a gate's card describes."""
    fields = card["gate"]
    return GateConfig(**{**fields, "widths": tuple(fields["widths"])})


def load_base(root: str | Path) -> Policy:
    """The library's base alone.

    Raises:
      InputError: no library there, or a damaged one.
    """
    params, normaliser, card = SkillLibrary.open(root).load_base()
    config = PolicyConfig(
        network_config(card), process_config(card), card["action_dim"]
    )
    return Policy(config, _on_device(PolicyParams(params, normaliser)))


def load_skills(
    root: str | Path, names: Sequence[str]
) -> tuple[Policy, Params, Array, list[dict[str, Any]]]:
    """The base's policy, the named skills as one library, their strengths and cards."""
    library = SkillLibrary.open(root)
    loaded = [library.load_skill(name) for name in names]
    cards = [card for _, card in loaded]
    strength = jnp.asarray([card["alpha"] for card in cards], jnp.float32)
    stacked = stack_skills([skill for skill, _ in loaded])
    return load_base(root), stacked, strength, cards


def compose(
    root: str | Path,
    skills: Sequence[str] = (),
    *,
    alpha: Sequence[float] | None = None,
    gate: str | None = None,
    level: str = "parameter",
    matmul_dtype: str | None = None,
    candidates: int = 1,
    critics: str | Path | None = None,
) -> Policy:
    """A policy from a library on disk.

    Args:
      root: the library's folder.
      skills: names of skills; empty is the base alone (or the gate's own skills).
      alpha: fixed weights: at the parameter level a multiplier for each skill, by
        default the strength one skill was trained at; at the noise and action levels
        the share of the base and of each skill, by default 0 and 1 for one skill.
      gate: name of a gate of the library instead of fixed weights; it brings its
        skills and its level.
      level: of fixed weights, a key of `composition.LEVELS`.
      matmul_dtype: "bfloat16" makes the products in it and sums in float32, faster on
        processors with units for it; default the base's.
      candidates: actions sampled at every step, of which the one of least Q_h is used.
      critics: folder of the run whose critics choose among several candidates.

    Raises:
      InputError: names or numbers that do not fit the library, or several candidates
        without critics of safety.
    """
    lookup(LEVELS, level, "level")
    policy = _compose(root, skills, alpha, gate, level)
    if candidates > 1 and critics is None:
        raise InputError(
            f"candidates: got {candidates}, more than 1 need critics to choose"
        )
    if critics is not None:
        policy = with_critics(policy, critics)
    config = dataclasses.replace(policy.config, candidates=candidates)
    policy = dataclasses.replace(policy, config=config)
    if matmul_dtype is None:
        return policy
    network = dataclasses.replace(policy.config.network, matmul_dtype=matmul_dtype)
    config = dataclasses.replace(policy.config, network=network)
    return dataclasses.replace(policy, config=config)


def with_critics(policy: Policy, critics: str | Path) -> Policy:
    """The policy with a finished run's Q_h, which chooses among candidates.

    Raises:
      InputError: no critics of safety there, or critics that do not fit the base.
    """
    finished = critic_file.load(critics)
    check_critics(critics, finished, policy)
    if "safety" not in finished.card["kinds"]:
        raise InputError(
            f"{critics}: these critics judge {', '.join(finished.card['kinds'])} "
            "alone, the choice among candidates needs safety"
        )
    q_h = of_kind(finished.params, finished.card["kinds"], "safety").q
    q_h = jax.tree.map(jnp.asarray, q_h)
    return dataclasses.replace(policy, params=policy.params._replace(q_h=q_h))


def check_critics(critics: str | Path, finished: Finished, policy: Policy) -> None:
    """Refuse critics that do not fit the policy's base.

    Args:
      critics: their folder, named in messages.
      finished: what it holds.
      policy: the base, or skills over it.

    Raises:
      InputError: observations or actions of another size, or observations scaled
        otherwise: the critics were trained for another base.
    """
    normaliser = policy.params.normaliser
    sizes = (len(normaliser.mean), policy.config.action_dim)
    for what, got, expected in zip(
        ("observations", "actions"), finished.dims, sizes, strict=True
    ):
        if got != expected:
            raise InputError(
                f"{critics}: these critics read {what} of {got} numbers, those of the "
                f"base have {expected}"
            )
    for field in Normaliser._fields:
        theirs, mine = getattr(finished.normaliser, field), getattr(normaliser, field)
        if not np.array_equal(theirs, mine):
            raise InputError(
                f"{critics}: these critics read observations scaled by another {field} "
                "than the base's; train critics for this base"
            )


def _compose(root, skills, alpha, gate, level) -> Policy:
    if gate is not None:
        return _compose_gate(root, skills, gate, alpha)
    if not skills:
        if alpha:
            raise InputError(f"alpha: got {len(alpha)} weights for no skills")
        return load_base(root)
    policy, library, strength, _ = load_skills(root, skills)
    base_member = level != "parameter"
    if alpha is None:
        if len(skills) > 1:
            raise InputError(
                f"{len(skills)} skills need a gate, or one alpha for each of them"
            )
        alpha = [0.0, 1.0] if base_member else strength
    if len(alpha) != len(skills) + base_member:
        raise InputError(
            f"alpha: got {len(alpha)} weights for {len(skills)} skills"
            f"{' and the base' if base_member else ''} at the {level} level"
        )
    gate_form = GateConfig(head="constant", base_member=base_member)
    config = dataclasses.replace(policy.config, level=level, gate=gate_form)
    params = policy.params._replace(
        library=library,
        strength=strength,
        gate={"head": {"alpha": jnp.asarray(alpha, jnp.float32)}},
    )
    return Policy(config, _on_device(params), tuple(skills))


def _compose_gate(root, skills, gate, alpha) -> Policy:
    gate_params, card = SkillLibrary.open(root).load_gate(gate)
    if alpha is not None:
        raise InputError(f"alpha and gate {gate!r} were both given; choose one")
    if skills and list(skills) != list(card["skills"]):
        raise InputError(
            f"gate {gate!r} weighs the skills {card['skills']}, not {list(skills)}"
        )
    policy, library, strength, _ = load_skills(root, card["skills"])
    config = dataclasses.replace(
        policy.config, level=card["level"], gate=gate_config(card)
    )
    params = policy.params._replace(
        library=library, strength=strength, gate=gate_params
    )
    return Policy(config, _on_device(params), tuple(card["skills"]))


def _on_device(params: PolicyParams) -> PolicyParams:
    return jax.tree.map(jnp.asarray, params)
