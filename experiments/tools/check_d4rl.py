r"""Compare our reading of D4RL's files, and our scores, with the d4rl package's.

    python3.11 -m venv d4rl
    d4rl/bin/pip install --no-deps d4rl==1.1 gym==0.24.1 mujoco==2.3.3
    d4rl/bin/pip install 'numpy<2' h5py tqdm gym-notices cloudpickle imageio glfw \
        pyopengl click termcolor absl-py ml_collections
    d4rl/bin/python -m experiments.tools.check_d4rl --set=walker2d-medium-v2 --data=FILE

in an environment of its own, from a checkout: d4rl asks for mujoco-py and old versions
of everything, and is no dependency of psec_jax. (Its Walker2d and Hopper do not load in
MuJoCo 2.3.4 and later.) FILE is an official or a made set. It is read by d4rl's
`qlearning_dataset` and by ours, as it is and without its next_observations, and the
rows are compared bit for bit; so are the scores of its returns, and the references and
addresses of every set. Prints a line for each, and ends with code 1 where something
differs. Last, gym's simulator of v4 makes a step from the state and action of every
row, and two lines say by how much its observations and rewards are others than those
recorded.
"""

import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from absl import flags

from psec_jax.data import d4rl as reader
from psec_jax.data import d4rl_sets, dataset
from psec_jax.errors import InputError
from psec_jax.types import Dataset

CLIPPED = 10.0  # of velocities in Walker2d's and Hopper's observations


def packages() -> tuple[Any, Any]:
    """gym and d4rl, with gym's MuJoCo environments of v4 in place of mujoco-py's.

    Raises:
      InputError: a package is not installed.
    """
    try:
        import gym
        from gym.envs import mujoco
        from gym.envs.mujoco import half_cheetah_v4, hopper_v4, walker2d_v4

        mujoco.HalfCheetahEnv = half_cheetah_v4.HalfCheetahEnv
        mujoco.HopperEnv = hopper_v4.HopperEnv
        mujoco.Walker2dEnv = walker2d_v4.Walker2dEnv
        import d4rl
        import d4rl.gym_mujoco
    except ModuleNotFoundError as error:
        raise InputError(
            f"{error.name} is not installed; experiments/tools/check_d4rl.py says how "
            "to make an environment for this check"
        ) from error
    return gym, d4rl


def customary(ds: Dataset) -> Dataset:
    """Our rows without those that `qlearning_dataset` leaves out: at a timeout, and in
    last place."""
    kept = np.flatnonzero(~ds.timeout)
    return Dataset(*(array[kept[kept < len(ds.obs) - 1]] for array in ds))


def same_rows(theirs: Mapping[str, np.ndarray], ours: Dataset) -> bool:
    """Whether all arrays are, but for next observations at true ends, which nothing
    reads: d4rl takes them from the next episode."""
    inside = ~ours.terminal
    return (
        np.array_equal(theirs["observations"], ours.obs)
        and np.array_equal(theirs["actions"], ours.action)
        and np.array_equal(theirs["rewards"], ours.reward)
        and np.array_equal(theirs["terminals"], ours.terminal)
        and np.array_equal(theirs["next_observations"][inside], ours.next_obs[inside])
    )


def steps(env: Any, ds: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """How far each row [N] is from a step of `env`: the largest difference of an
    observation, and that of the reward.

    Rows with a velocity at the bound of its observation are left out, for their state
    is not known.
    """
    velocities = ds.obs[:, env.model.nq - 1 :]
    known = np.flatnonzero((np.abs(velocities) < CLIPPED).all(1))
    differences = []
    for i in known:
        env.set_state(
            np.concatenate([[0], ds.obs[i][: env.model.nq - 1]]), velocities[i]
        )
        obs, reward, *_ = env.step(ds.action[i])
        differences.append((np.abs(obs - ds.next_obs[i]).max(), reward - ds.reward[i]))
    far, reward = np.array(differences).T
    return far, np.abs(reward)


def compare(d4rl: Any, env: Any, name: str, path: Path) -> dict[str, bool]:
    """What was compared, and whether it is the same.

    Args:
      d4rl: the package.
      env: its environment of the set.
      name: a set of D4RL v2.
      path: a file of that set.

    Raises:
      InputError: a file that cannot be read.
    """
    ours, _ = d4rl_sets.load(path)
    theirs = d4rl.qlearning_dataset(env, env.get_dataset(h5path=str(path)))
    rows = customary(ours)
    counted = f"{len(rows.obs)} rows of {len(ours.obs)}"
    found = {
        f"{counted}, {int(ours.terminal.sum())} true ends": same_rows(theirs, rows)
    }
    with tempfile.TemporaryDirectory() as folder:
        older = Path(folder) / path.name
        older.write_bytes(path.read_bytes())
        with h5py.File(older, "r+") as file:
            del file["next_observations"]
        theirs = d4rl.qlearning_dataset(env, env.get_dataset(h5path=str(older)))
        rows, _ = reader.load(older)
    # Ours has already dropped the cut rows; a true end in last place it keeps.
    rows = Dataset(*(array[: len(theirs["rewards"])] for array in rows))
    found[f"{len(rows.obs)} rows without next_observations"] = same_rows(theirs, rows)
    returns = dataset.episode_returns(ours)
    scores = 100 * env.get_normalized_score(returns)
    found[f"scores of {len(returns)} trajectories"] = np.allclose(
        scores, d4rl_sets.normalised_score(name, returns), rtol=1e-12, atol=0
    )
    official = {n: task for n, task in d4rl_sets.TASKS.items() if task.file}
    infos = d4rl.infos
    found[f"references and addresses of {len(official)} sets"] = all(
        infos.REF_MIN_SCORE[n] == d4rl_sets.ROBOTS[task.robot].min_return
        and infos.REF_MAX_SCORE[n] == d4rl_sets.ROBOTS[task.robot].max_return
        and infos.DATASET_URLS[n] == d4rl_sets.MIRRORS[0] + task.file
        for n, task in official.items()
    )
    return found


def main(argv: Sequence[str]) -> None:
    """Compare, and print a line for each comparison."""
    no_arguments(argv)
    name, path = FLAGS["set"].value, Path(FLAGS["data"].value)
    if not d4rl_sets.task(name).file:
        raise InputError(f"{name}: no set of D4RL's own")
    gym, d4rl = packages()
    env = gym.make(name).unwrapped
    found = compare(d4rl, env, name, path)
    for what, same in found.items():
        print(f"{'same' if same else 'DIFFERENT'}: {what}")
    ds, _ = reader.load(path)
    for what, far in zip(("observations", "reward"), steps(env, ds), strict=True):
        told = ", ".join(f"{np.quantile(far, q):.2g}" for q in (0.5, 0.9, 0.99, 1))
        print(f"one step of v4: {what} differ by {told} (median, 90 %, 99 %, most)")
    if not all(found.values()):
        sys.exit(1)


if __name__ == "__main__":
    from psec_jax.cli import no_arguments, run

    FLAGS = {
        "set": flags.DEFINE_string(
            "set", None, "A set of D4RL v2, whose robot FILE is of.", required=True
        ),
        "data": flags.DEFINE_string("data", None, "A file of it.", required=True),
    }
    run(main)
