"""Policies that need no JAX: the packaged experts, weaker forms of them, random."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from psec_jax import files
from psec_jax.data import npz
from psec_jax.errors import InputError

ASSETS = Path(__file__).resolve().parent.parent / "assets" / "experts"
SAFE_ASSETS = ASSETS.parent / "safe"  # snapshots of safe tasks, a folder each
D4RL_ASSETS = ASSETS.parent / "d4rl"  # of robots, plain and shifted, a folder each
OBS_CLIP = 10.0
NORM_EPS = 1e-5
SAMPLED = "sampled:"  # before a policy's name: it acts by its own distribution

Policy = Callable[[np.ndarray, np.random.Generator], np.ndarray]


class Expert(NamedTuple):
    """A trained tanh policy: relu layers, each with an optional layer norm.

    Attributes:
      layers: for each hidden layer kernel [d, o], bias [o] and, where the policy has
        layer norms, norm_scale [o] and norm_bias [o].
      head: kernel [o, A or 2A] and bias. The first A outputs are the mean before tanh;
        the last A, s, give the training policy's log standard deviation.
      obs_mean: [S].
      obs_std: [S].
      action_dim: A.
      log_std_clip: the log standard deviation is s clipped to these two; without them
        it is -5 + 3 (tanh(s) + 1).
    """

    layers: tuple[dict[str, np.ndarray], ...]
    head: dict[str, np.ndarray]
    obs_mean: np.ndarray
    obs_std: np.ndarray
    action_dim: int
    log_std_clip: np.ndarray | None = None

    def __call__(self, obs: Any) -> Any:
        """The deterministic action tanh(mean): obs [..., S] -> float32 [..., A]."""
        xp = obs.__array_namespace__()
        return xp.tanh(self._outputs(obs)[..., : self.action_dim])

    def sample(self, obs: Any, noise: Any) -> Any:
        """An action of the training policy: obs [..., S], standard normal noise
        [..., A] -> [..., A]; the head has 2A outputs."""
        xp = obs.__array_namespace__()
        outputs = self._outputs(obs)
        mean, s = outputs[..., : self.action_dim], outputs[..., self.action_dim :]
        if self.log_std_clip is None:
            log_std = -5 + 3 * (xp.tanh(s) + 1)
        else:
            log_std = xp.clip(s, *self.log_std_clip)
        return xp.tanh(mean + xp.exp(log_std) * noise)

    def _outputs(self, obs: Any) -> Any:
        xp = obs.__array_namespace__()  # NumPy's, or JAX's in a compiled roll-out
        x = (obs - self.obs_mean) / self.obs_std
        x = xp.clip(x, -OBS_CLIP, OBS_CLIP).astype(np.float32)
        for layer in self.layers:
            x = x @ layer["kernel"] + layer["bias"]
            if "norm_scale" in layer:
                x = x - x.mean(-1, keepdims=True)
                x = x / xp.sqrt(xp.square(x).mean(-1, keepdims=True) + NORM_EPS)
                x = x * layer["norm_scale"] + layer["norm_bias"]
            x = xp.maximum(x, 0)
        return x @ self.head["kernel"] + self.head["bias"]


def cards() -> dict[str, dict[str, Any]]:
    """The cards of the packaged experts, keyed by environment."""
    read = [files.read_json(path) for path in sorted(ASSETS.glob("*.json"))]
    return {card["environment"]: card for card in read}


def find_card(env_spec: str) -> dict[str, Any] | None:
    """The card of the packaged expert of an environment; `mjx` has dm_control's."""
    return cards().get(env_spec.replace("mjx:", "dm_control:", 1))


def expert_path(env_spec: str) -> Path:
    """The packaged expert of an environment.

    Raises:
      InputError: there is none; the message lists those there are.
    """
    card = find_card(env_spec)
    if card is None:
        raise InputError(
            f"no packaged expert for {env_spec}; there is one for "
            f"{', '.join(sorted(cards()))} (or give a policy's .npz, or "
            "your own demonstrations)"
        )
    return ASSETS / card["file"]


def load_expert(path: str | Path, action_dim: int) -> Expert:
    """Read an expert file.

    Args:
      path: .npz with layer_i/kernel, layer_i/bias (i from 0), optionally
        layer_i/norm_scale with layer_i/norm_bias, head/kernel, head/bias, obs_mean and
        obs_std, and optionally log_std_clip.
      action_dim: A, which the head must have once or twice.

    Raises:
      InputError: no such file, not an .npz, an array missing, or shapes that do not
        fit one another.
    """
    path = Path(path)
    arrays = npz.read(path)
    count = 0
    while f"layer_{count}/kernel" in arrays:
        count += 1
    names = [f"layer_{i}" for i in range(count)] + ["head"]
    needed = [f"{name}/{part}" for name in names for part in ("kernel", "bias")]
    missing = sorted({*needed, "obs_mean", "obs_std"} - arrays.keys())
    if missing:
        raise InputError(f"{path}: no {', '.join(missing)} in this expert file")
    mean, std = arrays["obs_mean"], arrays["obs_std"]
    if mean.ndim != 1 or std.shape != mean.shape or not (std > 0).all():
        raise InputError(
            f"{path}: obs_mean has shape {mean.shape} and obs_std has shape "
            f"{std.shape}, expected one number for each coordinate, obs_std above 0"
        )
    width = len(mean)
    blocks = []
    for name in names:
        block = {
            part: arrays[f"{name}/{part}"]
            for part in ("kernel", "bias", "norm_scale", "norm_bias")
            if f"{name}/{part}" in arrays
        }
        outputs = block["kernel"].shape[-1]
        for part, array in block.items():
            expected = (width, outputs) if part == "kernel" else (outputs,)
            if array.shape != expected or not np.isfinite(array).all():
                raise InputError(
                    f"{path}: {name}/{part} has shape {array.shape}, expected finite "
                    f"numbers of shape {expected}"
                )
        if ("norm_scale" in block) != ("norm_bias" in block):
            raise InputError(f"{path}: {name} has one of norm_scale and norm_bias only")
        blocks.append(block)
        width = outputs
    if width not in (action_dim, 2 * action_dim):
        raise InputError(
            f"{path}: the head has {width} outputs, expected {action_dim} or "
            f"{2 * action_dim} for {action_dim} actions"
        )
    clip = arrays.get("log_std_clip")
    if clip is not None and (clip.shape != (2,) or not clip[0] < clip[1]):
        raise InputError(
            f"{path}: log_std_clip is {clip.tolist()}, expected the least and the "
            "largest log standard deviation"
        )
    return Expert(tuple(blocks[:-1]), blocks[-1], mean, std, action_dim, clip)


def make_policy(
    name: str, env_spec: str, obs_dim: int, action_dim: int, action_noise: float = 0.0
) -> Policy:
    """A policy `(obs [S], generator) -> action [A]` in float32, clipped to [-1, 1].

    Args:
      name: "expert", "medium", "random", or the path of an expert file (.npz); after
        "sampled:" an expert's actions are samples of its own distribution.
      env_spec: the environment it acts in.
      obs_dim: S.
      action_dim: A.
      action_noise: standard deviation of Gaussian noise added to every action.

    Raises:
      InputError: an unknown name, no packaged expert for this environment, an expert
        file that does not fit it or has no distribution, or noise on a policy that is
        random by itself.
    """
    act = preset_or_file(name, env_spec, obs_dim, action_dim, action_noise)
    if act is None:
        return lambda obs, generator: generator.uniform(-1, 1, action_dim).astype("f4")

    def policy(obs: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        action = act(obs, generator.standard_normal(action_dim))
        return np.clip(action, -1, 1).astype(np.float32)

    return policy


def preset_or_file(
    name: str, env_spec: str, obs_dim: int, action_dim: int, action_noise: float
) -> Callable[[Any, Any], Any] | None:
    """`make_policy` as (obs [..., S], standard normal noise [..., A]) -> action, not
    clipped; None for the random one. Arguments and errors are the same."""
    if not action_noise >= 0 or not np.isfinite(action_noise):
        raise InputError(f"action_noise is {action_noise}, expected 0 or more")
    if action_noise and (name == "random" or name.startswith(SAMPLED)):
        raise InputError(f"policy {name!r} takes no action noise, it is random already")
    if name == "random":
        return None
    plain = name.removeprefix(SAMPLED)
    if plain in PRESETS:
        path = expert_path(env_spec)
        extra = PRESETS[plain](find_card(env_spec) or {})
    elif plain.endswith(".npz"):
        path, extra = Path(plain), 0.0
    else:
        raise InputError(
            f"unknown policy {name!r}; choose from {', '.join(sorted(PRESETS))}, "
            f"random, or a path ending in .npz, and {SAMPLED}NAME for samples"
        )
    expert = load_expert(path, action_dim)
    if len(expert.obs_mean) != obs_dim:
        raise InputError(
            f"{path}: made for observations of size {len(expert.obs_mean)}, {env_spec} "
            f"has {obs_dim}"
        )
    if name.startswith(SAMPLED):
        if extra or len(expert.head["bias"]) == action_dim:
            raise InputError(
                f"policy {name!r}: expected the expert or a file with a standard "
                f"deviation for each of the {action_dim} actions"
            )
        return expert.sample
    std = float(np.hypot(action_noise, extra))  # two independent Gaussians add up
    return lambda obs, noise: expert(obs) + std * noise


def label(policy: str) -> str:
    """A policy's name without folders."""
    plain = policy.removeprefix(SAMPLED)
    return f"{SAMPLED if plain != policy else ''}{Path(plain).name}"


def with_noise(act: Policy, std: float, action_dim: int) -> Policy:
    """A policy with Gaussian noise on every action, clipped to [-1, 1]."""
    if std == 0:
        return act

    def noisy(obs: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        action = act(obs, generator) + std * generator.standard_normal(action_dim)
        return np.clip(action, -1, 1).astype(np.float32)

    return noisy


PRESETS: dict[str, Callable[[dict[str, Any]], float]] = {
    "expert": lambda card: 0.0,
    "medium": lambda card: card["medium"]["action_noise"],
}
