"""How a base or skills learn: by cloning alone, or on the objectives of offline RL."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from psec_jax import tree
from psec_jax.agents import cloning, offline
from psec_jax.agents.cloning import Anchor, CloningConfig
from psec_jax.agents.critic_file import Finished
from psec_jax.agents.critics import CriticConfig
from psec_jax.agents.offline import Frozen, OfflineConfig
from psec_jax.errors import InputError
from psec_jax.losses import OBJECTIVES
from psec_jax.runtime.batches import Drawn
from psec_jax.types import Normaliser, Params
from psec_jax.workflows import critics
from psec_jax.workflows.config import Job, part
from psec_jax.workflows.demonstrations import Demos, demonstrations
from psec_jax.workflows.multirun import Trained


class Actor(NamedTuple):
    """What is trained, on which data.

    Attributes:
      config: of cloning, or of objectives that critics guide.
      update: its step on batches.
      rows: demonstrations or transitions.
      start: makes its fresh state, and what is frozen.
      key: of the whole training.
      stage: name in the progress line.
      record: what it depends on beside its own section.
      normaliser: of observations.
      demos: what it learns from.
      finished: critics that are used as they are.
    """

    config: CloningConfig | OfflineConfig
    update: Drawn
    rows: Any
    start: Callable[[], tuple[Any, Any]]
    key: jax.Array
    stage: str
    record: dict[str, Any]
    normaliser: Normaliser
    demos: Demos
    finished: Finished | None


def make(
    job: Job,
    config: CloningConfig,
    objectives: Sequence[str],
    demos: Demos,
    normaliser: Normaliser,
    seed: int,
    finished: Finished | None = None,
    base: Params | None = None,
    start: Params | None = None,
    anchor: Params | None = None,
) -> Actor:
    """A base, or a skill for each objective, ready to be trained.

    Args:
      job: its critics and weights are used.
      config: of the base or of the skills.
      objectives: keys of `OBJECTIVES`.
      demos: demonstrations, or transitions.
      normaliser: of observations.
      seed: of parameters, batches and noise.
      finished: critics to use as they are; None trains those that are needed.
      base: under the skills.
      start: of a base that is trained on; None starts afresh.
      anchor: weights that tie it to the start, see `cloning.Anchor`.

    Raises:
      InputError: objectives that do not go together, data that critics cannot use, or
        an anchor that does not fit.
    """
    init_key, train_key = jax.random.split(jax.random.key(seed))
    record: dict[str, Any] = {}
    if anchor is not None:
        _check_anchor(anchor, start, objectives)
        record["anchor"] = tree.fingerprint(anchor)
    if any(OBJECTIVES[name].guided for name in objectives):
        agent, stage = offline, " ".join(objectives)
        mine = None
        if finished is None and critics.needed(objectives):
            mine = part(CriticConfig, job.critics, batch_size=config.batch_size)
        kept = tuple(finished.card["kinds"]) if finished else ()
        full = OfflineConfig(config, tuple(objectives), mine, job.weights, kept)
        kinds = mine.kinds if mine else ()
        rows = critics.transitions(job.critics, demos, normaliser, kinds)
        frozen = Frozen(base, finished.params if finished else None)
        if mine is not None:
            record["critics"] = dataclasses.asdict(job.critics)
        elif finished is not None:
            record["critics"] = finished.card["fingerprint"]
        record["weights"] = dataclasses.asdict(job.weights)
    else:
        agent, stage = cloning, "base" if base is None else "skill"
        full, frozen = config, base
        if anchor is not None:
            frozen = Anchor(start, anchor)
        rows = demonstrations(demos, normaliser, config.process.horizon)

    def fresh() -> tuple[Any, Any]:
        dims = rows.obs.shape[-1], rows.action.shape[-1]
        state = agent.init(full, init_key, *dims, base=base, start=start)
        return state, jax.device_put(frozen)

    return Actor(
        config=full,
        update=Drawn(agent.update, full, config.batch_size),
        rows=rows,
        start=fresh,
        key=train_key,
        stage=stage,
        record=record,
        normaliser=normaliser,
        demos=demos,
        finished=finished,
    )


def _check_anchor(
    anchor: Params, start: Params | None, objectives: Sequence[str]
) -> None:
    if start is None or any(OBJECTIVES[name].guided for name in objectives):
        raise InputError(
            f"anchor: got one with the objective {', '.join(objectives)} and "
            f"{'no' if start is None else 'a'} start, expected bc and a start"
        )
    got, expected = tree.flatten(anchor), tree.flatten(start)
    for path in sorted(got.keys() | expected.keys()):
        shapes = [np.shape(x[path]) if path in x else None for x in (got, expected)]
        if shapes[0] != shapes[1] or not np.all(got[path] >= 0):
            raise InputError(
                f"anchor: {path} has the shape {shapes[0]}, expected {shapes[1]} and "
                "numbers of 0 or more"
            )


def trained_params(trained: Trained, actor: Actor) -> tuple[Params, Finished | None]:
    """Averaged parameters, of several skills with leaves [K, ...], and the critics.

    Critics that were trained beside the actor are written into the run's directory.
    """
    if isinstance(actor.config, CloningConfig):
        params = trained.state.ema
        return params if actor.config.skill is None else tree.stack([params]), None
    finished = actor.finished
    if actor.config.critics is not None:
        finished = critics.save(
            trained.run,
            actor.config.critics,
            trained.state.critics.trained,
            actor.normaliser,
            actor.demos,
            trained.summary or {},
        )
    return trained.state.actor.ema, finished


def critics_card(finished: Finished | None) -> dict[str, Any]:
    """What a card says of the critics, where there were some."""
    return {"critics": finished.brief()} if finished else {}
