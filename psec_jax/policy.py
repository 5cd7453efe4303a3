"""Load a library, pick skills, compose, act: the API of notebooks and robots."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.tree_util import Partial
from jaxtyping import Array, Float, Key

from psec_jax import tree
from psec_jax.agents import critic_file
from psec_jax.agents.critic_file import Finished
from psec_jax.agents.critics import of_kind
from psec_jax.cards import form_of
from psec_jax.choice import RULES
from psec_jax.composition import (
    LEVELS,
    Choice,
    PolicyConfig,
    PolicyParams,
    act,
    act_from,
    act_noise,
    choose,
    weights,
)
from psec_jax.data.actions import ActionBox
from psec_jax.data.recording import box_of_card
from psec_jax.errors import InputError, lookup
from psec_jax.gating import SEARCHED, GateConfig, index_boxes
from psec_jax.library import SkillLibrary, gate_config
from psec_jax.lora import adapter_of, inputs_first, layers_of, merge, stack_skills
from psec_jax.networks.denoiser import NetworkConfig, init_base
from psec_jax.process import ProcessConfig
from psec_jax.runtime import platform
from psec_jax.types import Normaliser, Params

GATHER_FROM = 4  # skills for each that is active, see results/sparse.json
INDEX_FROM = 8  # skills under a support by search, see results/library.json
SUPPORTED = 8  # skills at most that a support keeps active in a state, as a rule
HUGE = 1e6  # observations beyond may be too much for float32 somewhere in a network


@dataclasses.dataclass(frozen=True)
class Policy:
    """A composed policy: static config and arrays; every call is jitted.

    Attributes:
      config: the static part.
      params: the arrays.
      skills: names of the K skills, in the order of alpha; with a gate that weighs
        the base too, alpha has the base's weight in front.
      box: what actions in [-1, 1] stand for in the environment of the base's data;
        None where that is not known.
    """

    config: PolicyConfig
    params: PolicyParams
    skills: tuple[str, ...] = ()
    box: ActionBox | None = None

    def act(self, keys: Any, obs: Any) -> Array:
        """Actions in [-1, 1] for raw observations.

        Args:
          keys: one key, or a key for each observation; one key is split for a batch.
          obs: one observation [S], or a batch [B, S]: an array or a list of numbers.

        Returns:
          [A] or [B, A]; where `process.execute` is h > 1, the h actions to execute one
          after the other before the next call, [h, A] or [B, h, A].

        Raises:
          InputError: observations that are not finite numbers of the base's size, or
            keys that are none, or as many as there are observations.
        """
        obs = self.observations(obs)
        keys = _keys(keys, obs)
        one_or_batch = _act_batch if obs.ndim == 2 else _act_one
        with jax.enable_x64(False):  # the same numbers whatever the caller computes in
            rows = _padded(keys, obs)
            acting = self._indexed if obs.ndim == 2 else self._acting_one
            action = one_or_batch(*acting, *rows)
            return _finite(action[: len(obs)] if obs.ndim == 2 else action, obs)

    def batched(self) -> Partial:
        """`act` of a batch without its checks, as a pytree: a compiled program that has
        it as an argument fits every policy that is `alike`."""
        return Partial(_act_batch, *self._indexed)

    def noise(self, keys: Key[Array, " B"]) -> Float[Array, "B ..."]:
        """The standard normal numbers that `act` draws from B keys."""
        with jax.enable_x64(False):
            return _noise_batch(*self._acting, keys)

    def from_noise(self) -> Partial:
        """`(noise [B, ...], obs [B, S]) -> actions`: `act` of a batch from the noise
        that it would draw, without its checks, as `batched` is."""
        return Partial(_act_from_batch, *self._acting)

    @functools.cached_property
    def _acting(self) -> tuple[PolicyConfig, PolicyParams]:
        """What `act` runs: LoRA skills of fixed weights are merged into the base once,
        where that changes nothing but the rounding."""
        config, params = self.config, self.params
        leaves = jax.tree.leaves(params)
        fixed = (
            config.gate is not None
            and (config.gate.head, config.gate.support) == ("constant", "none")
            and (config.level, config.network.compat) == ("parameter", "paper")
            and config.network.matmul_dtype == "float32"
            and adapter_of(params.library) == "lora"
        )
        if not fixed or any(isinstance(leaf, Tracer) for leaf in leaves):
            return config, params
        alpha = cast(Any, params.gate)["head"]["alpha"]
        # Kept, and so no part of a program that may be traced right now.
        with jax.enable_x64(False), jax.ensure_compile_time_eval():
            base = _merge(params.base, params.library, alpha)
        alone = params._replace(base=base, library=None, strength=None, gate=None)
        return dataclasses.replace(config, gate=None), alone

    @functools.cached_property
    def _indexed(self) -> tuple[PolicyConfig, PolicyParams]:
        """`_acting`, with an index of a support by search over many skills. Exported
        files do without: they have no loops."""
        config, params = self._acting
        if (
            config.gate is None
            or config.gate.support not in SEARCHED
            or len(self.skills) < INDEX_FROM
            or any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(params))
        ):
            return config, params
        gate = cast(Any, params.gate)
        with jax.enable_x64(False), jax.ensure_compile_time_eval():
            support = _index_boxes(gate["support"])
        return config, params._replace(gate=gate | {"support": support})

    @functools.cached_property
    def _acting_one(self) -> tuple[PolicyConfig, PolicyParams]:
        """What `act` runs for one observation: of many skills under a "topk" head or a
        support only those that are active are computed, where they are few. For a
        batch, each of whose states has matrices of its own then, that takes longer.
        Where all are computed, their matrices are laid out for one observation."""
        config, params = self._indexed
        gate, plain = config.gate, config.level == "parameter" and not config.chooses
        if gate is None or gate.layers or gate.base_member or not plain:
            return config, params
        active = 0
        if gate.head == "topk":
            active = gate.top_k
        elif gate.support != "none":
            active = SUPPORTED
        if active and len(self.skills) >= GATHER_FROM * active:
            return dataclasses.replace(config, gathered=active), params
        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(params)):
            return config, params
        with jax.enable_x64(False), jax.ensure_compile_time_eval():
            library = _inputs_first(params.library)
        return config, params._replace(library=library)

    def alpha(self, obs: Any) -> Array:
        """The gate's weights [K] of one raw observation [S], or [B, K] of a batch.

        [L, K] and [B, L, K] where the L layers have weights of their own, in the order
        of `lora.layers_of`.

        Raises:
          InputError: the policy is a base alone, its weights depend on sampled actions
            (see `choice`), or observations that are not finite numbers of the base's
            size.
        """
        if self.config.gate is None:
            raise InputError("this policy is a base alone: it has no skills to weigh")
        if self.config.gate.head == "select":
            raise InputError(
                "the weights of the head 'select' depend on the sampled actions: "
                "Policy.choice(keys, obs).alpha has them"
            )
        obs = self.observations(obs)
        one_or_batch = _weights_batch if obs.ndim == 2 else _weights_one
        with jax.enable_x64(False):
            return _finite(one_or_batch(self.config, self.params, obs), obs)

    def choice(self, keys: Any, obs: Any) -> Choice:
        """What critics choose among candidate actions, and why; arguments of `act`.

        Raises:
          InputError: nothing is chosen here, or as `act`.
        """
        if not self.config.chooses:
            raise InputError("this policy samples one action: it chooses among none")
        obs = self.observations(obs)
        keys = _keys(keys, obs)
        one_or_batch = _choose_batch if obs.ndim == 2 else _choose_one
        with jax.enable_x64(False):
            return one_or_batch(self.config, self.params, keys, obs)

    def to_env(self, action: Any) -> np.ndarray:
        """Actions of `act` [..., A] in the units of the environment of the base's data.

        Raises:
          InputError: the base's card has no action box.
        """
        if self.box is None:
            raise InputError(
                "the base's card has no action box: its data were recorded in an "
                "environment that is not known"
            )
        return self.box.to_env(np.asarray(action))

    def observations(self, obs: Any) -> Any:
        """Observations [S] or [B, S] as float32, as every method here reads them.

        Raises:
          InputError: they are not finite numbers of the base's size.
        """
        array = obs if isinstance(obs, Tracer) else _numbers(obs)
        # Observations of one number would be broadcast without a word.
        size = len(self.params.normaliser.mean)
        if array.ndim not in (1, 2):
            raise InputError(
                f"observations have shape {array.shape}, expected ({size},) or "
                f"(B, {size})"
            )
        if array.shape[-1] != size:
            raise InputError(
                f"observations have {array.shape[-1]} numbers, the policy's base "
                f"expects {size}"
            )
        return array.astype(np.float32)


_merge = jax.jit(merge)
_index_boxes = jax.jit(index_boxes)
_inputs_first = jax.jit(inputs_first)


def _padded(keys: Any, obs: Any) -> tuple[Any, Any]:
    """A batch with its last row repeated up to a power of two, so that batches of many
    sizes are few programs."""
    if obs.ndim != 2 or isinstance(obs, Tracer) or isinstance(keys, Tracer):
        return keys, obs
    count = len(obs)
    size = 1 << max(count - 1, 0).bit_length()
    if count in (0, size):
        return keys, obs
    rows = np.minimum(np.arange(size), count - 1)
    return keys[rows], obs[rows]


def _numbers(obs: Any) -> np.ndarray:
    """An array of finite float32.

    Raises:
      InputError: anything else.
    """
    try:
        array = np.asarray(obs)
    except (TypeError, ValueError) as error:
        raise InputError(f"observations are no array of numbers ({error})") from error
    # float32 and its kin beyond NumPy, such as bfloat16, are of kind V.
    if array.dtype.kind not in "biuf" and not jnp.issubdtype(array.dtype, jnp.floating):
        raise InputError(
            f"observations are {type(obs).__name__} of type {array.dtype}, expected an "
            "array of numbers"
        )
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
    bad = array.size - np.count_nonzero(np.isfinite(array))
    if bad:
        raise InputError(
            f"observations hold {bad} NaN or infinite of {array.size} values, expected "
            "finite numbers"
        )
    return array


def _finite(result: Array, obs: Any) -> Array:
    """The result; looked at only where observations are so large that it may overflow.

    Raises:
      InputError: it has.
    """
    if isinstance(obs, Tracer) or np.abs(obs).max(initial=0) < HUGE:
        return result
    if not np.isfinite(np.asarray(result)).all():
        raise InputError(
            f"observations of magnitudes up to {np.abs(obs).max():.2g} are too large "
            "for the policy, expected those of its data"
        )
    return result


def _keys(keys: Any, obs: Any) -> Any:
    """A key for each observation; a key of the older kind is wrapped, one is split.

    Raises:
      InputError: no keys, or another number of them.
    """
    form = "expected jax.random.key(seed), or one such key for each observation"
    if not isinstance(keys, (jax.Array, np.ndarray)):
        raise InputError(f"keys: got {type(keys).__name__}, {form}")
    if not jnp.issubdtype(keys.dtype, jax.dtypes.prng_key):
        if keys.dtype != np.uint32 or keys.ndim not in (1, 2) or keys.shape[-1] != 2:
            raise InputError(f"keys: got {keys.dtype} {keys.shape}, {form}")
        keys = jax.random.wrap_key_data(jnp.asarray(keys))
    batch = obs.shape[:-1]
    if keys.shape == () and batch:
        return jax.random.split(keys, batch[0])
    if keys.shape != batch:
        raise InputError(
            f"keys: got {keys.shape} keys for observations {obs.shape}, {form}"
        )
    return keys


@functools.partial(jax.jit, static_argnums=0)
def _act_one(config, params, key, obs):
    return act(config, params, key, obs)


@functools.partial(jax.jit, static_argnums=0)
def _act_batch(config, params, keys, obs):
    one = functools.partial(act, config, params)
    return jax.vmap(one)(keys, obs)


@functools.partial(jax.jit, static_argnums=0)
def _act_from_batch(config, params, noise, obs):
    return jax.vmap(functools.partial(act_from, config, params))(noise, obs)


@functools.partial(jax.jit, static_argnums=0)
def _noise_batch(config, params, keys):
    return jax.vmap(functools.partial(act_noise, config, params))(keys)


@functools.partial(jax.jit, static_argnums=0)
def _choose_one(config, params, key, obs):
    return choose(config, params, key, obs)


@functools.partial(jax.jit, static_argnums=0)
def _choose_batch(config, params, keys, obs):
    return jax.vmap(functools.partial(choose, config, params))(keys, obs)


@functools.partial(jax.jit, static_argnums=0)
def _act_together(config, params, keys, obs):
    def one(params, keys, obs):
        return jax.vmap(functools.partial(act, config, params))(keys, obs)

    if platform.current().unroll_skills:
        return jax.lax.map(lambda each: one(*each), (params, keys, obs))
    return jax.vmap(one)(params, keys, obs)


def alike(left: Policy, right: Policy) -> bool:
    """Whether the two can act in one call: the same config and shapes of arrays."""
    (mine, my_arrays), (its, its_arrays) = left._indexed, right._indexed
    return mine == its and tree.shapes(my_arrays) == tree.shapes(its_arrays)


def act_together(
    policies: Sequence[Policy],
) -> Callable[[Key[Array, "R B"], Float[Array | np.ndarray, "R B S"]], jax.Array]:
    """`act` of R policies that are `alike`, as one jitted call with R in front."""
    params = tree.stack([policy._indexed[1] for policy in policies])
    return Partial(_act_together, policies[0]._indexed[0], params)


@functools.partial(jax.jit, static_argnums=0)
def _weights_one(config, params, obs):
    return weights(config, params, obs)


@functools.partial(jax.jit, static_argnums=0)
def _weights_batch(config, params, obs):
    return jax.vmap(functools.partial(weights, config, params))(obs)


def network_config(card: dict[str, Any]) -> NetworkConfig:
    """The network a base's card describes.

    Raises:
      InputError: no such network.
    """
    # Cards of the first edition have the rate of dropout, which is a training's.
    fields = {k: v for k, v in card["network"].items() if k != "dropout"}
    return form_of(NetworkConfig, fields, "base: network")


def process_config(card: dict[str, Any]) -> ProcessConfig:
    """The generative process a base's card describes; older cards say "diffusion"."""
    fields = card.get("process") or card.get("diffusion")
    return form_of(ProcessConfig, fields, "base: process")


def load_base(root: str | Path) -> Policy:
    """The library's base alone.

    Raises:
      InputError: no library there, or a damaged one.
    """
    params, normaliser, card = SkillLibrary.open(root).load_base()
    network, process = network_config(card), process_config(card)
    check_base(str(root), network, process, params, card)
    config = PolicyConfig(network, process, card["action_dim"])
    box = box_of_card(card.get("actions"))
    return Policy(config, _on_device(PolicyParams(params, normaliser)), box=box)


def check_base(
    root: str,
    network: NetworkConfig,
    process: ProcessConfig,
    params: Params,
    card: dict[str, Any],
) -> None:
    """Refuse a base whose arrays are not those of the network that its card names.

    Args:
      root: the library, named in messages.
      network: of the card.
      process: of the card, for its chunks.
      params: the base's arrays.
      card: "obs_dim" and "action_dim".

    Raises:
      InputError: an array that is missing, unknown or of another shape.
    """
    got = {path: jnp.shape(leaf) for path, leaf in tree.flatten(params).items()}
    if network.blocks > len(got):
        raise InputError(f"{root}: base: {len(got)} arrays for {network.blocks} blocks")
    expected = _shapes(network, process.horizon, card["obs_dim"], card["action_dim"])
    for path in sorted(got.keys() | expected.keys()):
        if got.get(path) != expected.get(path):
            raise InputError(
                f"{root}: base: {path} is {got.get(path, 'missing')}, the network of "
                f"its card has {expected.get(path, 'nothing')}"
            )


@functools.lru_cache(maxsize=16)
def _shapes(
    network: NetworkConfig, horizon: int, obs_dim: int, action_dim: int
) -> dict[str, tuple[int, ...]]:
    """Shape of each array of a base by its path."""
    key, size = jax.random.key(0), horizon * action_dim
    made = jax.eval_shape(lambda: init_base(network, key, obs_dim, size, horizon))
    return {path: leaf.shape for path, leaf in tree.flatten(made).items()}


def load_skills(
    root: str | Path, names: Sequence[str]
) -> tuple[Policy, Params, Array, list[dict[str, Any]]]:
    """The base's policy, the named skills as one library, their strengths and cards."""
    loaded = SkillLibrary.open(root).load_skills(names)
    cards = [card for _, card in loaded]
    forms = {card["adapter"]: name for name, card in zip(names, cards, strict=True)}
    if len(forms) > 1:
        named = " and ".join(f"{name!r} ({form})" for form, name in forms.items())
        raise InputError(f"skills {named}: cannot compose lora and mlp adapters")
    strength = jnp.asarray([card["alpha"] for card in cards], jnp.float32)
    stacked = stack_skills([skill for skill, _ in loaded])
    return load_base(root), stacked, strength, cards


# Of a process what may differ from how the base was trained, with its type.
SAMPLING = {
    "sampler": str,
    "sampling_steps": int,
    "temperature": float,
    "start_scale": float,
    "execute": int,
}


def compose(
    root: str | Path,
    skills: str | Sequence[str] = (),
    *,
    alpha: Any = None,
    gate: str | None = None,
    level: str = "parameter",
    matmul_dtype: str | None = None,
    sampling: Mapping[str, Any] | None = None,
    candidates: int = 1,
    critics: str | Path | None = None,
    rule: str | None = None,
    cost_weight: float | None = None,
) -> Policy:
    """A policy from a library on disk.

    Args:
      root: the library's folder.
      skills: names of skills, or one name; empty is the base alone (or the gate's own
        skills).
      alpha: fixed weights, numbers or an array, or one number for one skill: at the
        parameter level a multiplier for each skill, or [L, K] for each layer (in the
        order of `lora.layers_of`) and skill, by default the strength one skill was
        trained at; at the noise and action levels the share of the base and of each
        skill, by default 0 and 1 for one skill.
      gate: name of a gate of the library instead of fixed weights; it brings its
        skills and its level.
      level: of fixed weights, a key of `composition.LEVELS`.
      matmul_dtype: "bfloat16" makes the products in it and sums in float32, faster on
        processors with units for it; default the base's.
      sampling: fields of the base's process that need no training, `SAMPLING`, in place
        of its own, such as {"temperature": 0.0}.
      candidates: actions sampled at every step, of which critics choose one; a gate of
        the head "select" brings its own number, critics and rule.
      critics: folder of the run whose critics choose among several candidates.
      rule: how they choose, a key of `choice.RULES`; default "safety".
      cost_weight: lambda of the rule "reward_cost"; default 1.

    Raises:
      InputError: names or numbers that do not fit the library, or several candidates, a
        rule or a cost weight without critics.
    """
    lookup(LEVELS, level, "level")
    choosing = {"rule": rule, "cost_weight": cost_weight}
    choosing = {name: value for name, value in choosing.items() if value is not None}
    if choosing and critics is None:
        raise InputError(
            f"{' and '.join(choosing)}: critics choose by it, and none are given; a "
            "gate of the head 'select' has its own"
        )
    if candidates < 1:
        raise InputError(f"candidates: got {candidates}, expected 1 or more")
    if candidates > 1 and critics is None:
        raise InputError(
            f"candidates: got {candidates}, more than 1 need critics to choose"
        )
    names = (skills,) if isinstance(skills, str) else tuple(skills)
    policy = _compose(root, names, _alpha(alpha), gate, level)
    if policy.config.chooses:
        if critics is not None or candidates != 1:
            raise InputError(
                f"candidates and critics: the gate {gate!r} has its own, give none"
            )
    elif critics is not None:
        policy = with_critics(policy, critics, candidates, **choosing)
    network, process = policy.config.network, policy.config.process
    if matmul_dtype is not None:
        network = dataclasses.replace(network, matmul_dtype=matmul_dtype)
    fields = {}
    for field, value in (sampling or {}).items():
        kind = lookup(SAMPLING, field, "field of sampling")
        if not isinstance(value, (int, float) if kind is float else kind):
            raise InputError(
                f"sampling: {field} is {value!r}, expected {kind.__name__}"
            )
        fields[field] = kind(value)
    process = dataclasses.replace(process, **fields)
    config = dataclasses.replace(policy.config, network=network, process=process)
    return dataclasses.replace(policy, config=config)


def with_critics(
    policy: Policy,
    critics: str | Path,
    candidates: int,
    rule: str = "safety",
    cost_weight: float = 1.0,
) -> Policy:
    """The policy with critics of a finished run, which choose among candidates.

    Args:
      policy: without critics.
      critics: the run's folder.
      candidates: actions sampled at every step.
      rule: a key of `choice.RULES`.
      cost_weight: lambda of the rule "reward_cost", 0 or more.

    Raises:
      InputError: no critics of the rule there, critics that do not fit the base, or a
        cost weight below 0.
    """
    finished = critic_file.load(critics)
    check_critics(critics, finished, policy)
    params = policy.params._replace(
        critics=twins_of(critics, finished, rule),
        cost_weight=jnp.asarray(check_cost_weight(cost_weight), jnp.float32),
    )
    config = dataclasses.replace(policy.config, candidates=candidates, rule=rule)
    return dataclasses.replace(policy, config=config, params=params)


def twins_of(critics: str | Path, finished: Finished, rule: str) -> dict[str, Params]:
    """The twins that a rule reads, by kind, of a finished run.

    Raises:
      InputError: an unknown rule, or one that needs a critic which is not there.
    """
    kinds = finished.card["kinds"]
    twins = {}
    for kind in lookup(RULES, rule, "rule").critics:
        if kind not in kinds:
            raise InputError(
                f"{critics}: these critics judge {', '.join(kinds)} alone, the choice "
                f"among candidates by {rule} needs {kind}"
            )
        q = of_kind(finished.params, kinds, kind).q
        twins[kind] = jax.device_put(q)
    return twins


def check_cost_weight(value: float) -> float:
    """A cost weight as it is.

    Raises:
      InputError: below 0, or not finite.
    """
    if not 0 <= value < float("inf"):
        raise InputError(f"cost_weight: got {value}, expected a number of 0 or more")
    return value


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


def describe(
    root: str | Path, policy: Policy, gate: str | None = None, alpha: Any = None
) -> dict[str, Any]:
    """What a composed policy is, for JSON: names, fingerprints, shapes and units.

    Args:
      root: the library.
      policy: made of it.
      gate: its gate's name.
      alpha: its fixed weights.
    """
    library = SkillLibrary.open(root)

    def entry(kind: str, name: str) -> dict[str, str]:
        card = library.card(kind, name)
        return {"name": card["name"], "fingerprint": card["fingerprint"]}

    execute = policy.config.process.execute
    return {
        "base": entry("base", "base"),
        "skills": [entry("skill", name) for name in policy.skills],
        "gate": None if gate is None else entry("gate", gate),
        "alpha": None if alpha is None else np.asarray(alpha).tolist(),
        "obs": [len(policy.params.normaliser.mean)],
        "action": [*([execute] if execute > 1 else []), policy.config.action_dim],
        "units": "[-1, 1]" if policy.box is None else "environment",
    }


def _compose(root, skills, alpha, gate, level) -> Policy:
    if gate is not None:
        return _compose_gate(root, skills, gate, alpha)
    if not skills:
        if alpha is not None and len(alpha):
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
    alpha = np.asarray(alpha, np.float32)
    if alpha.shape[-1] != len(skills) + base_member:
        raise InputError(
            f"alpha: got {alpha.shape[-1]} weights for {len(skills)} skills"
            f"{' and the base' if base_member else ''} at the {level} level"
        )
    layers = len(alpha) if alpha.ndim == 2 else 0
    if layers and base_member:
        raise InputError(
            f"alpha: got weights of shape {alpha.shape} at the {level} level, expected "
            "one for each skill and the base: it weighs no layers"
        )
    check_layers("alpha", layers, library)
    gate_form = GateConfig(head="constant", base_member=base_member, layers=layers)
    config = dataclasses.replace(policy.config, level=level, gate=gate_form)
    params = policy.params._replace(
        library=library,
        strength=strength,
        gate={"head": {"alpha": jnp.asarray(alpha)}},
    )
    return Policy(config, _on_device(params), tuple(skills), policy.box)


def check_layers(what: str, layers: int, library: Params) -> None:
    """Refuse weights of another number of layers than a library of skills adapts.

    Args:
      what: has the weights, named in the message.
      layers: L, or 0 where all layers have the same.
      library: the skills.

    Raises:
      InputError: L is another number.
    """
    expected = len(layers_of(library))
    if layers not in (0, expected):
        raise InputError(
            f"{what}: has weights for {layers} layers, the base has {expected}"
        )


def _alpha(alpha: Any) -> np.ndarray | None:
    """Weights as finite float32 [K] or [L, K], or None.

    Raises:
      InputError: anything else.
    """
    if alpha is None:
        return None
    try:
        array = np.asarray(alpha)
    except (TypeError, ValueError) as error:
        raise InputError(f"alpha: no array of numbers ({error})") from error
    array = array.reshape(1) if array.ndim == 0 else array
    empty = array.shape == (0,)
    odd = array.ndim not in (1, 2) or (0 in array.shape and not empty)
    if odd or not (empty or array.dtype.kind in "iuf"):
        raise InputError(
            f"alpha: got {array.dtype} of shape {array.shape}, expected one number for "
            "each skill, or for each layer and skill"
        )
    if not empty and not np.isfinite(array).all():
        raise InputError(f"alpha: got {array.tolist()}, expected finite numbers")
    return array.astype(np.float32)


def _compose_gate(root, skills, gate, alpha) -> Policy:
    gate_params, card = SkillLibrary.open(root).load_gate(gate)
    if alpha is not None:
        raise InputError(f"alpha and gate {gate!r} were both given; choose one")
    if skills and list(skills) != list(card["skills"]):
        raise InputError(
            f"gate {gate!r} weighs the skills {card['skills']}, not {list(skills)}"
        )
    policy, library, strength, _ = load_skills(root, card["skills"])
    form = gate_config(card)
    config = dataclasses.replace(policy.config, level=card["level"], gate=form)
    if form.base_member != (card["level"] != "parameter"):
        raise InputError(
            f"gate {gate!r}: base_member is {form.base_member} at the {card['level']} "
            "level, where it cannot be"
        )
    check_layers(f"gate {gate!r}", form.layers, library)
    params = policy.params._replace(
        library=library, strength=strength, gate=gate_params
    )
    if form.head == "select":
        config = dataclasses.replace(config, candidates=form.candidates, rule=form.rule)
        params = params._replace(
            critics=gate_params["critics"], cost_weight=gate_params["cost_weight"]
        )
    return Policy(config, _on_device(params), tuple(card["skills"]), policy.box)


def _on_device(params: PolicyParams) -> PolicyParams:
    return jax.device_put(params)
