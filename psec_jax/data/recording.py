"""How data were recorded: what a file, a set or a simulator knows of it."""

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from psec_jax.data.actions import ActionBox
from psec_jax.data.dataset import episode_slices
from psec_jax.errors import InputError
from psec_jax.types import Dataset

Say = Callable[[str], None]


def say(line: str) -> None:
    """One line on standard error."""
    print(line, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Recording:
    """How data were, or would be, recorded; None or empty where it is not known.

    Attributes:
      environment: the simulator's name, in the form of `envs.shifted`.
      sizes: of an observation and an action, (S, A).
      units: of stored actions, "env" or "scaled".
      box: the bounds of the environment's actions.
      max_steps: steps after which an episode is cut.
      observation: the parts of an observation in their order, "name:size" each; empty
        where it has one part.
      missing: fields of `Dataset` that the source lacks and that are filled with zeros.
    """

    environment: str | None = None
    sizes: tuple[int, int] | None = None
    units: str | None = None
    box: ActionBox | None = None
    max_steps: int | None = None
    observation: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()

    @classmethod
    def of(cls, attrs: Mapping[str, Any], source: str = "the file") -> "Recording":
        """What the attributes of a file say.

        Raises:
          InputError: an attribute with another value than it may have.
        """
        environment = attrs.get("environment")
        units = attrs.get("action_units")
        # Files that this project collected before they said so.
        if units is None and ("policy_sha256" in attrs or "made_by" in attrs):
            units = "scaled"
        if units not in (None, "env", "scaled"):
            raise InputError(
                f"{source}: attribute action_units is {units!r}, expected env or scaled"
            )
        try:
            box = None
            if "action_low" in attrs and "action_high" in attrs:
                box = ActionBox.of(attrs["action_low"], attrs["action_high"])
            steps = attrs.get("max_steps")
            parts = attrs.get("observation_order") or "[]"
            return cls(
                environment=environment if _is_spec(environment) else None,
                units=units,
                box=box,
                max_steps=None if steps is None else int(steps),
                observation=tuple(str(part) for part in json.loads(parts)),
                missing=tuple(attrs.get("missing", ())),
            )
        except (TypeError, ValueError) as error:
            raise InputError(
                f"{source}: an attribute of how it was recorded is malformed ({error})"
            ) from error

    def attributes(self) -> dict[str, Any]:
        """The attributes of a file of scaled actions recorded so; inverse of `of`."""
        attrs: dict[str, Any] = {"action_units": self.units or "scaled"}
        if self.environment is not None:
            attrs["environment"] = self.environment
        if self.box is not None:
            attrs["action_low"] = np.array(self.box.low)
            attrs["action_high"] = np.array(self.box.high)
        if self.max_steps is not None:
            attrs["max_steps"] = self.max_steps
        if self.observation:
            attrs["observation_order"] = json.dumps(self.observation)
        return attrs

    def now(self, box: ActionBox | None, env: "Recording | None") -> "Recording":
        """The recording of these data once read: scaled to a box, and with the parts of
        observations in an environment's order."""
        parts = env.observation if env and self.observation else ()
        return replace(
            self, units="scaled", box=box, observation=parts or self.observation
        )

    def card(self) -> dict[str, Any]:
        """What a base's card records of its actions."""
        box = self.box
        return {
            "units": "scaled",
            "low": None if box is None else list(box.low),
            "high": None if box is None else list(box.high),
        }


def success_rate(attrs: Mapping[str, Any], source: str = "the file") -> float | None:
    """The share of a file's trajectories that reached their task's goal, by the file's
    attribute "success"; None where it has none.

    Raises:
      InputError: an attribute that is not true or false for each trajectory.
    """
    if "success" not in attrs:
        return None
    success = np.asarray(attrs["success"])
    if success.dtype != bool or success.ndim != 1 or not success.size:
        raise InputError(
            f"{source}: attribute success is {success.dtype} of shape {success.shape}, "
            "expected true or false for each trajectory"
        )
    return float(np.mean(success))


def _is_spec(text: Any) -> bool:
    return isinstance(text, str) and ":" in text


def box_of_card(card: Mapping[str, Any] | None) -> ActionBox | None:
    """The box of a card's `actions` entry; None where it has none."""
    if not card or card.get("low") is None:
        return None
    return ActionBox.of(card["low"], card["high"])


def check_box(card: Mapping[str, Any] | None, env: Recording) -> None:
    """One line where a base was trained for another action box than an environment's,
    or for one that is not known.

    Args:
      card: the `actions` entry of the base's card.
      env: the environment it acts in.
    """
    box = box_of_card(card)
    if card is not None and box is None and not _is_unit(env.box):
        say(
            f"{env.environment}: its action box is {env.box}, that of the base's data "
            "is not known: actions are scaled to the first"
        )
    if box is not None and env.box is not None and not box.same(env.box):
        say(
            f"{env.environment}: its action box is {env.box}, the base was trained for "
            f"{box}: the same action moves it otherwise"
        )


def _is_unit(box: ActionBox | None) -> bool:
    return box is None or box.same(ActionBox.unit(len(box.low)))


def arrange(
    ds: Dataset, data: Recording, env: Recording, source: str, say: Say = say
) -> Dataset:
    """The dataset with the parts of its observations in the environment's order.

    Raises:
      InputError: parts that the environment does not have, or that it has besides.
    """
    mine, theirs = data.observation, env.observation
    if not mine or not theirs or mine == theirs:
        return ds
    if sorted(mine) != sorted(theirs):
        raise InputError(
            f"{source}: observations consist of {', '.join(mine)}, those of "
            f"{env.environment} of {', '.join(theirs)}"
        )
    sizes = [int(part.rpartition(":")[2]) for part in mine]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    if starts[-1] != ds.obs.shape[1]:
        raise InputError(
            f"{source}: observations have {ds.obs.shape[1]} numbers, their parts "
            f"{', '.join(mine)} make {starts[-1]}"
        )
    order = [mine.index(part) for part in theirs]
    columns = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in order])
    say(
        f"{source}: observations are ordered {', '.join(mine)}, read as "
        f"{', '.join(theirs)}, the order of {env.environment}"
    )
    return ds._replace(obs=ds.obs[:, columns], next_obs=ds.next_obs[:, columns])


def check_sizes(ds: Dataset, env: Recording, source: str) -> None:
    """Refuse data of other sizes than an environment's.

    Raises:
      InputError: what differs.
    """
    for what, array, expected in zip(
        ("observations", "actions"), (ds.obs, ds.action), env.sizes or (), strict=False
    ):
        got = np.shape(array)[1:]
        if got != (expected,):
            raise InputError(
                f"{source}: {what} have {' x '.join(map(str, got)) or 'no'} numbers, "
                f"{env.environment} expects {expected}"
            )


def check_lengths(ds: Dataset, data: Recording, source: str) -> None:
    """Refuse trajectories longer than the episodes that they were recorded in.

    Raises:
      InputError: the first of them.
    """
    for rows in episode_slices(ds):
        length = rows.stop - rows.start
        if data.max_steps is not None and length > data.max_steps:
            raise InputError(
                f"{source}: the trajectory of row {rows.start} has {length} steps, its "
                f"attribute max_steps is {data.max_steps}: an end is not marked"
            )


def compare(
    ds: Dataset, data: Recording, env: Recording, source: str, say: Say = say
) -> None:
    """One line for each thing in which data and an environment differ.

    Args:
      ds: the data.
      data: what is known of them.
      env: the environment they are used for.
      source: the file, named in every line.
      say: called with each line.
    """
    if data.environment and env.environment and data.environment != env.environment:
        say(f"{source}: recorded in {data.environment}, used for {env.environment}")
    longest = max(rows.stop - rows.start for rows in episode_slices(ds))
    longest = max(longest, data.max_steps or 0)
    if env.max_steps is not None and longest > env.max_steps:
        say(
            f"{source}: episodes of up to {longest} steps, {env.environment} cuts them "
            f"after {env.max_steps}: returns cannot be compared"
        )
