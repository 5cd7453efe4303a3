"""Demonstrations: which trajectories of which data a run learns from."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from psec_jax import data as datasets
from psec_jax import envs
from psec_jax.agents.common import Demonstrations
from psec_jax.data import d4rl_sets, dataset
from psec_jax.data.actions import ActionBox
from psec_jax.data.recording import Recording, success_rate
from psec_jax.data.trajectories import apply_filter, cut, share, split
from psec_jax.envs.trust import check_untrusted
from psec_jax.errors import InputError
from psec_jax.policy import Policy
from psec_jax.types import Dataset, Normaliser
from psec_jax.workflows.collection import collect
from psec_jax.workflows.config import DataConfig, Job


class Selection(NamedTuple):
    """Which trajectories of the data are taken, where not all of them are.

    Attributes:
      best: those of highest return, not the first ones.
      min_return: none below this return.
      max_cost: none above this cost.
      return_quantile: none below this quantile of the returns that are left.
      cost_quantile: none above this quantile of all costs.
      split: cut into pieces of this many steps; everything else counts pieces.
      filter: a key of `data.trajectories.FILTERS`.
      share: a random part of those that the filter left, in (0, 1].
      transitions: of all that is left, trajectories drawn at random until there are
        this many; the last one is cut.
      leave_out: how many of the last trajectories of all that is left are dropped.
      draw: seed of what filter, share and transitions draw; None is 0.
    """

    best: bool = False
    min_return: float | None = None
    max_cost: float | None = None
    return_quantile: float | None = None
    cost_quantile: float | None = None
    split: int | None = None
    filter: str | None = None
    share: float | None = None
    transitions: int | None = None
    leave_out: int | None = None
    draw: int | None = None

    def of(self, ds: Dataset, episodes: int, source: str) -> Dataset:
        """The trajectories chosen: `episodes` of them, or all with 0.

        Raises:
          InputError: fewer are there, or a filter or a number that cannot be used.
        """
        for name in ("split", "transitions", "leave_out"):
            if (value := getattr(self, name)) is not None:
                dataset.whole(name, value)
        seed = self._seed()
        for name in ("min_return", "max_cost", "return_quantile", "cost_quantile"):
            if (value := getattr(self, name)) is not None:
                dataset.real(name, value)
        if self.share is not None:
            dataset.real("share", self.share)
        if self.split is not None:
            ds = split(ds, self.split)
        if self.filter is not None:
            ds = apply_filter(ds, self.filter, seed)
        if self.share is not None:
            ds = share(ds, self.share, seed)
        ds = dataset.select(
            ds,
            min_return=self.min_return,
            max_cost=self.max_cost,
            return_quantile=self.return_quantile,
            cost_quantile=self.cost_quantile,
            source=source,
            **{"best" if self.best else "first": episodes or None},
        )
        if self.transitions is not None:
            ds = cut(ds, self.transitions, seed)
        if self.leave_out is None:
            return ds
        kept = len(dataset.episode_slices(ds)) - self.leave_out
        return dataset.take(ds, range(kept))

    def _seed(self) -> int:
        """That of what is drawn."""
        if self.draw is None:
            return 0
        if not 0 <= dataset.whole("draw", self.draw) < 2**32:
            raise InputError(f"draw: got {self.draw}, expected 0 to {2**32 - 1}")
        if (self.filter, self.share, self.transitions) == (None, None, None):
            raise InputError(
                "draw: nothing is drawn without filter, share or transitions"
            )
        return self.draw

    @classmethod
    def best_of_safe(cls, job: Job) -> "Selection":
        """Of the trajectories within the cost limit those of high return: a gate's."""
        quantile = job.table.return_quantile
        return cls(max_cost=job.cost_limit, return_quantile=quantile)

    def reads_costs(self) -> bool:
        """Whether data without costs cannot be chosen from."""
        return self.max_cost is not None or self.cost_quantile is not None

    def reads_rewards(self) -> bool:
        """Whether data without rewards cannot be chosen from."""
        returns = (self.min_return, self.return_quantile, self.filter)
        return self.best or any(bound is not None for bound in returns)

    def card(self) -> dict[str, Any]:
        """What is recorded: the first two, and of the others those that are set."""
        later = self._fields[2:]
        return {
            name: value
            for name, value in self._asdict().items()
            if name not in later or value is not None
        }


FIRST = Selection()


class Demos(NamedTuple):
    """Demonstrations of one task.

    Attributes:
      dataset: whole trajectories.
      source: file or folder they come from.
      selection: how they were chosen there.
      recording: how they were recorded.
      success: the share of the source's trajectories that reached their task's goal;
        None where it does not say.
    """

    dataset: Dataset
    source: str
    selection: Selection = FIRST
    recording: Recording = Recording()
    success: float | None = None

    def card(self) -> dict[str, Any]:
        """What cards and configs record of the data."""
        returns = dataset.episode_returns(self.dataset)
        known = "reward" not in self.recording.missing
        chosen = self.selection != FIRST
        card = {
            "source": Path(self.source).name,
            "fingerprint": dataset.fingerprint(self.dataset),
            "transitions": len(self.dataset.obs),
            "trajectories": len(returns),
            "return_mean": float(np.mean(returns)) if known else None,
        }
        if chosen:
            card["selection"] = self.selection.card()
        if self.success is not None:
            card["success"] = self.success
        return card


class Wanted(NamedTuple):
    """What a run needs of its data.

    Attributes:
      costs: refuse data without costs.
      rewards: refuse data without rewards.
      compare: refuse data that are not the environment's, which is made for it.
      box: action box of the base that the data are for; None is the environment's.
    """

    costs: bool = False
    rewards: bool = False
    compare: bool = True
    box: ActionBox | None = None


ANY = Wanted()


def load_demos(
    config: DataConfig,
    env: str | None,
    episodes: int,
    path: str | None = None,
    selection: Selection = FIRST,
    wanted: Wanted = ANY,
) -> Demos:
    """`episodes` trajectories of a file, or of a fresh collection.

    Args:
      config: how to collect and read.
      env: environment the demonstrations are for; None where nobody named it.
      episodes: trajectories; 0 takes all that a file has.
      path: an HDF5 file, an episode file or a folder of them, or a set's name; None
        collects with `config.policy` in `env`, or uses what was collected before.
      selection: by default the first ones.
      wanted: what the run needs of them.

    Raises:
      InputError: the data cannot be used.
    """
    if path is None:
        if env is None:
            raise InputError("data: neither data nor an environment to collect in")
        if episodes < 1:
            raise InputError(
                f"episodes: got {episodes}, expected 1 or more to collect in {env}"
            )
        seed = config.seeds.get(env, 0)
        path = str(
            collect(env, config.policy, max(episodes, 10), seed, config.action_noise)
        )
    if env is not None:
        check_robot(env, datasets.environment(path) or "", path)
    ds, attrs = datasets.read(
        path,
        actions=config.actions,
        ends=config.ends,
        env=envs.describe(env) if env is not None and wanted.compare else None,
        box=wanted.box,
        clip_actions=config.clip_actions,
        with_costs=wanted.costs or selection.reads_costs(),
        with_rewards=wanted.rewards or selection.reads_rewards(),
    )
    recording = Recording.of(attrs, path)
    chosen = selection.of(ds, episodes, path)
    return Demos(chosen, path, selection, recording, success_rate(attrs, path))


Load = Callable[..., Demos]


def loader(config: DataConfig) -> Load:
    """`load_demos` with this config, which reads what is the same only once."""
    return functools.cache(functools.partial(load_demos, config))


def environment_of(
    data: str | None, env: str | None, collect_in: str, otherwise: str | None = None
) -> str | None:
    """The environment of a run.

    Args:
      data: what it learns from; None collects.
      env: the environment named by the user, which comes first.
      collect_in: where data are collected.
      otherwise: where data do not say what they were recorded in; of a card.

    Raises:
      InputError: data or card name code of their choice; see `envs.trust`.
    """
    if env is not None:
        return env
    if data is None:
        return collect_in
    spec = datasets.environment(data)
    if spec is None:
        return None if otherwise is None else check_untrusted(otherwise, "the library")
    return check_untrusted(spec, data)


def card_env(
    card: Mapping[str, Any], owner: str, named: str | None = None
) -> str | None:
    """The simulator that a library's card names, to be made; None where it names none.

    Args:
      card: of a base, skill or gate.
      owner: the entry, named in the message.
      named: a simulator that the user named, which may be any.

    Raises:
      InputError: it is code of the card's choice; see `envs.trust`.
    """
    spec = card.get("env")
    return spec if spec in (None, named) else check_untrusted(spec, owner)


def check_robot(env: str, other: str, owner: str) -> None:
    """Refuse two of D4RL's robots for one another: sizes do not tell them apart.

    Args:
      env: the simulator in use.
      other: that of the owner, or "" where it is not known.
      owner: a data file or a library, named in the message.

    Raises:
      InputError: both robots.
    """
    mine, theirs = d4rl_sets.robot_in(env), d4rl_sets.robot_in(other)
    if mine and theirs and mine != theirs:
        raise InputError(f"{owner}: of the robot {theirs}, {env} expects {mine}")


def demonstrations(
    demos: Demos, normaliser: Normaliser, horizon: int
) -> Demonstrations:
    """What cloning reads: normalised observations and chunks of `horizon` actions."""
    obs = np.asarray(normaliser(demos.dataset.obs))
    return Demonstrations(obs, np.asarray(dataset.windows(demos.dataset, horizon)))


def check_fit(demos: Demos, policy: Policy) -> None:
    """Refuse demonstrations whose sizes are not the base's."""
    obs_dim = len(policy.params.normaliser.mean)
    check_sizes(demos, obs_dim, policy.config.action_dim, "the library's base")


def check_sizes(demos: Demos, obs_dim: int, action_dim: int, owner: str) -> None:
    """Refuse demonstrations of other sizes than their owner's.

    Raises:
      InputError: both sizes.
    """
    for what, got, expected in (
        ("observations", demos.dataset.obs, obs_dim),
        ("actions", demos.dataset.action, action_dim),
    ):
        if got.shape[1] != expected:
            raise InputError(
                f"{demos.source}: {what} have {got.shape[1]} numbers, "
                f"{owner} expects {expected}"
            )
