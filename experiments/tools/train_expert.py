r"""Train an expert from nothing, with SAC from SBX (stable-baselines3 in JAX).

    pip install 'psec_jax[experts]'
    python -m experiments.tools.train_expert --env=dm_control:walker-stand \
        --steps=100000 --seed=0 --out=stand.npz

writes stand.npz, which `experiments.tools.collect --policy=stand.npz` rolls out, and
its card stand.json. Every --eval_every steps the deterministic policy plays a few
episodes; the best so far is what the file holds, so that a run can be stopped at any
time.

    python -m experiments.tools.train_expert --env=bullet:SafetyBallRun-v0 \
        --steps=30000 --cost_penalty=10 --width=64 --snapshots --out=ball_run_10.npz

learns from the reward less 10 for every unit of cost, and --snapshots also keeps the
policy of every evaluation, ball_run_10_5000.npz and so on: policies of mixed quality,
from which `experiments.tools.collect_safe` makes a set.

Measured on one core of an Intel Xeon, two at once, width 128, seed 1: HalfCheetah's
deterministic policy returned 4588 after 96,000 steps, 8266 after 384,000 and 11,755
after 1,512,000, which took 35 minutes (720 steps/s); Walker2d's 4776 after 696,000.
Not every seed learns: with gravity doubled Walker2d fell with seed 1 to the end, and
scored 85 with seed 2. The packaged experts of the suite's own tasks were trained
otherwise; see their cards.
"""

import io
import platform
import time
from collections.abc import Mapping, Sequence
from copy import deepcopy
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from psec_jax import envs, files
from psec_jax.envs.experts import OBS_CLIP, load_expert
from psec_jax.errors import InputError
from psec_jax.workflows.collection import rollout

EVAL_SEED = 1_000_003  # far from the seeds data are collected with
VAR_FLOOR = 1e-4
LOG_STD_CLIP = (-20.0, 2.0)  # of SBX
SETTINGS = {
    "learning_rate": 5e-4,
    "batch_size": 128,
    "gamma": 0.99,
    "tau": 0.005,
    "ent_coef": "auto_0.1",
    "learning_starts": 4000,
    # One update for two environment steps, eight of them in one compiled call.
    "train_freq": 16,
    "gradient_steps": 8,
}


def train_expert(
    env: str,
    steps: int,
    seed: int,
    out: str | Path,
    eval_every: int = 10_000,
    eval_episodes: int = 3,
    cost_penalty: float = 0.0,
    width: int = 256,
    snapshots: bool = False,
    overwrite: bool = False,
) -> Path:
    """Train, and write the best policy and its card.

    Args:
      env: see `psec_jax.envs.make`; it may be shifted.
      steps: environment steps in all.
      seed: of the training.
      out: expert file to write, NAME.npz; the card is NAME.json.
      eval_every: environment steps from one evaluation to the next.
      eval_episodes: deterministic episodes an evaluation plays.
      cost_penalty: reward given up for one unit of cost.
      width: of the two hidden layers of every network.
      snapshots: also keep the policy of every evaluation, as NAME_STEPS.npz.
      overwrite: replace an existing file.

    Returns:
      The expert file's path.

    Raises:
      InputError: bad arguments, a file that exists or cannot be written, or a package
        that is missing.
    """
    out, env = Path(out), envs.shifted(env)
    numbers = {
        "steps": steps,
        "eval_every": eval_every,
        "eval_episodes": eval_episodes,
        "width": width,
    }
    for name, number in numbers.items():
        if number < 1:
            raise InputError(f"{name} is {number}, expected 1 or more")
    if not 0 <= seed < 2**32:
        raise InputError(f"seed is {seed}, expected 0 to {2**32 - 1}")
    if not 0 <= cost_penalty < np.inf:
        raise InputError(f"cost_penalty is {cost_penalty}, expected 0 or more")
    if out.suffix != ".npz":
        raise InputError(f"out is {out}, expected a name ending in .npz")
    if out.exists() and not overwrite:
        raise InputError(f"{out} exists already; give another name, or --overwrite")
    try:
        import sbx
        import stable_baselines3 as sb3
    except ModuleNotFoundError as error:
        raise InputError(
            f"{error.name} is not installed; pip install 'psec_jax[experts]'"
        ) from error
    with files.reported(f"make the folder {out.parent}"):
        out.parent.mkdir(parents=True, exist_ok=True)

    judge = envs.make(env)
    vector = sb3.common.vec_env.VecNormalize(
        sb3.common.vec_env.DummyVecEnv([lambda: _gymnasium_env(env, cost_penalty)]),
        norm_reward=False,
        clip_obs=OBS_CLIP,
        epsilon=VAR_FLOOR,
    )
    settings = SETTINGS | {"policy_kwargs": {"net_arch": [width, width]}}
    model = sbx.SAC("MlpPolicy", vector, seed=seed, **deepcopy(settings))
    start, curve, best = time.monotonic(), [], -np.inf
    while model.num_timesteps < steps:
        chunk = min(eval_every, steps - model.num_timesteps)
        model.learn(chunk, reset_num_timesteps=False)
        actor = model.policy.actor_state.params["params"]
        arrays = export(actor, vector.obs_rms.mean, vector.obs_rms.var)
        returns, costs = _judge(judge, arrays, out, eval_episodes)
        minutes = (time.monotonic() - start) / 60
        point = {
            "steps": model.num_timesteps,
            "minutes": round(minutes, 2),
            "returns": [round(float(value), 2) for value in returns],
            "costs": [round(float(value), 2) for value in costs],
        }
        if snapshots:
            kept_as = out.with_name(f"{out.stem}_{model.num_timesteps}.npz")
            _write(kept_as, arrays)
            point["file"] = kept_as.name
        curve.append(point)
        score = np.mean(returns - cost_penalty * costs)
        kept = score > best
        print(
            f"step {model.num_timesteps} of {steps}: return {returns.mean():.1f}, "
            f"cost {costs.mean():.1f}{' (kept)' if kept else ''}, {minutes:.1f} min, "
            f"{model.num_timesteps / minutes / 60:.0f} steps/s",
            flush=True,
        )
        if kept:
            best = score
            _write(out, arrays)
            card = _card(env, out, seed, point, settings, steps)
            card["cost_penalty"] = cost_penalty
        files.write_json(out.with_suffix(".json"), card | {"training_curve": curve})
    judge.close()
    vector.close()
    return out


def export(
    actor: Mapping[str, Mapping[str, Any]], mean: np.ndarray, var: np.ndarray
) -> dict[str, np.ndarray]:
    """An actor of SBX's SAC as the arrays of an expert file.

    Args:
      actor: its parameters: Dense_0 and so on, each a kernel [in, out] and a bias; the
        last two give the mean and the log standard deviation.
      mean: [S], of the observations.
      var: [S].

    Returns:
      float32 arrays; there are no layer norms.
    """
    count = len(actor) - 2
    arrays = {
        f"layer_{i}/{part}": actor[f"Dense_{i}"][part]
        for i in range(count)
        for part in ("kernel", "bias")
    }
    for part in ("kernel", "bias"):
        both = [actor[f"Dense_{i}"][part] for i in (count, count + 1)]
        arrays[f"head/{part}"] = np.concatenate(both, axis=-1)
    arrays |= {"obs_mean": mean, "obs_std": np.sqrt(var + VAR_FLOOR)}
    arrays["log_std_clip"] = np.array(LOG_STD_CLIP)
    return {k: np.ascontiguousarray(v, dtype=np.float32) for k, v in arrays.items()}


def _write(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    content = io.BytesIO()
    np.savez(content, **dict[str, Any](arrays))
    files.write_atomic(path, content.getvalue())


def _judge(
    env: envs.Env, arrays: Mapping[str, np.ndarray], out: Path, episodes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns and costs of the policy as it will be read from the file."""
    trial = out.with_name(f".{out.name}.trial.npz")
    _write(trial, arrays)
    try:
        expert = load_expert(trial, env.action_dim)
    finally:
        trial.unlink()
    played = [
        rollout(env, lambda obs, generator: expert(obs), EVAL_SEED, e).dataset
        for e in range(episodes)
    ]
    returns = [np.sum(ds.reward, dtype=np.float64) for ds in played]
    return np.array(returns), np.array(
        [np.sum(ds.cost, dtype=np.float64) for ds in played]
    )


def _card(
    env: str,
    out: Path,
    seed: int,
    point: Mapping[str, Any],
    settings: Mapping[str, Any],
    steps: int,
) -> dict[str, Any]:
    returns = point["returns"]
    packages = ("sbx-rl", "stable-baselines3", "jax", "gymnasium", "numpy")
    return {
        "environment": env,
        "file": out.name,
        "source": "experiments.tools.train_expert",
        "algorithm": "SAC (SBX), running observation normalisation",
        "settings": settings,
        "seed": seed,
        "steps": point["steps"],
        "steps_asked": steps,
        "returns": {
            "episodes": len(returns),
            "policy": "deterministic",
            "mean": float(np.mean(returns)),
            "std": float(np.std(returns)),
            "min": min(returns),
            "max": max(returns),
        },
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in packages},
    }


def _gymnasium_env(spec: str, cost_penalty: float = 0.0) -> Any:
    """One of our environments, as stable-baselines3 wants it."""
    import gymnasium

    class Adapter(gymnasium.Env):
        def __init__(self) -> None:
            self.inner = envs.make(spec)
            sizes = self.inner.obs_dim, self.inner.action_dim
            self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, sizes[:1])
            self.action_space = gymnasium.spaces.Box(-1.0, 1.0, sizes[1:])

        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            super().reset(seed=seed)
            return self.inner.reset(int(self.np_random.integers(2**32))), {}

        def step(self, action: np.ndarray) -> Any:
            step = self.inner.step(action)
            reward = step.reward - cost_penalty * step.cost
            return step.obs, reward, step.terminal, step.timeout, {}

    return Adapter()


def main(argv: Sequence[str]) -> None:
    """Train as the flags say."""
    no_arguments(argv)
    given = values_of(FLAGS)
    env = envs.shifted(given.pop("env"), *given.pop("shift"))
    path = train_expert(env, **given)
    print(f"{path} and {path.with_suffix('.json')}")


if __name__ == "__main__":
    from psec_jax.cli import (
        define_env,
        define_shift,
        flags_of,
        no_arguments,
        run,
        values_of,
    )

    FLAGS = flags_of(
        train_expert,
        {"env": define_env(), "shift": define_shift()},
        steps=200_000,
        seed=0,
    )
    run(main)
