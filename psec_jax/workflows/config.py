"""A job: everything a run is configured by, as one tree of frozen dataclasses.

Each section is, or inherits, the dataclass that its consumer uses. `Job.from_dict` is
the one door: below it nothing is checked against an example or copied field by field.
The defaults are the paper's for DeepMind Control.
"""

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from psec_jax.agents.cloning import AdapterConfig
from psec_jax.agents.common import OptimiserConfig
from psec_jax.agents.critics import CriticConfig
from psec_jax.agents.fitted_q import FittedQConfig
from psec_jax.agents.gate import GATE_LOSSES
from psec_jax.choice import RULES
from psec_jax.composition import LEVELS
from psec_jax.data import ENDS, UNITS
from psec_jax.data.normalise import NORMALISERS
from psec_jax.errors import InputError, at_least, lookup
from psec_jax.gating import UNTRAINED_HEADS, GateForm, of_today
from psec_jax.losses import OBJECTIVES, WeightConfig
from psec_jax.networks.denoiser import NetworkConfig
from psec_jax.process import ProcessConfig
from psec_jax.runtime.loop import LoopConfig
from psec_jax.support import SupportConfig

T = TypeVar("T")


@dataclass(frozen=True)
class Budget:
    """Length of one training.

    Attributes:
      steps: updates.
      batch_size: transitions an update.
    """

    steps: int = 1000
    batch_size: int = 2048

    def __post_init__(self) -> None:
        at_least(self, 1, "steps", "batch_size")


@dataclass(frozen=True)
class Training(Budget):
    """Length and optimiser of one training: AdamW with cosine decay over all steps.

    Attributes:
      learning_rate: at the start.
      weight_decay: decoupled, on all trained parameters.
      ema: rate of the moving average that is kept.
      dropout: rate while training.
    """

    learning_rate: float = 3e-4
    weight_decay: float = 1e-4
    ema: float = 1e-3
    dropout: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.optimiser  # noqa: B018 (its own checks)
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout: got {self.dropout}, expected 0 <= rate < 1")

    @property
    def optimiser(self) -> OptimiserConfig:
        """The optimiser; its rate decays to zero over `steps`."""
        return part(OptimiserConfig, self, decay_steps=self.steps)


@dataclass(frozen=True)
class BaseSection(Training):
    """Demonstrations and training of a base.

    Attributes:
      env: simulator to collect and evaluate in, where neither --env nor the data name
        one.
      episodes: trajectories, the first of the data; 0 takes all.
    """

    steps: int = 1_000_000
    env: str = "dm_control:walker-stand"
    episodes: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "episodes")


@dataclass(frozen=True)
class SkillSection(AdapterConfig, Training):
    """Demonstrations, objective, form and training of a skill.

    Attributes:
      env: as of a base.
      episodes: as of a base; also of a gate.
      objective: a key of `losses.OBJECTIVES`, or several, joined by commas: a skill
        each, learned in one program.
    """

    steps: int = 50_000
    env: str = "dm_control:walker-walk"
    episodes: int = 10
    objective: str = "bc"

    def __post_init__(self) -> None:
        super().__post_init__()
        Training.__post_init__(self)
        at_least(self, 0, "episodes")
        for name in self.objective.split(","):
            lookup(OBJECTIVES, name, "objective")


GATE_STARTS = ("strength", "zero")
FITTED = {"reward", "cost"}  # kinds of critics that fitted Q evaluation can update


@dataclass(frozen=True)
class GateSection(GateForm, Budget):
    """Form and training of a gate.

    Attributes:
      level: a key of `composition.LEVELS`.
      loss: a key of `agents.gate.GATE_LOSSES`, or "auto": diffusion at the parameter
        level, cloning at the others, as in the paper and its code.
      per_layer: every layer of the network has weights of its own, at the parameter
        level; by default all layers have the same.
      compat: "paper", or "released" for the authors' regulariser.
      start: weights the head starts from; see `gate.start_weights`.
      alphas: the weights that critics choose among, one for each skill; none are all
        ways to share the strength in quarters, and the base alone.
      fallback: name of the skill that acts where no other has support, the last one;
        none is the base.
      cost_weights: lambda of the rule "reward_cost". Of several the smallest whose
        estimated cost is within the limit's budget, see `workflows.estimates`.
      budget_share: of that budget, which an estimate may use, as it errs.
      learning_rate: of Adam, constant.
    """

    level: str = "parameter"
    loss: str = "auto"
    per_layer: bool = False
    compat: str = "paper"
    start: str = "strength"
    fallback: str = ""
    alphas: tuple[tuple[float, ...], ...] = ()
    cost_weights: tuple[float, ...] = (
        *(0.3, 0.6, 1.0, 1.5, 2.5, 4.0, 6.0, 10.0),
        *(16.0, 25.0, 40.0, 60.0, 100.0),
    )
    budget_share: float = 1.0
    learning_rate: float = 3e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        Budget.__post_init__(self)
        lookup(LEVELS, self.level, "level")
        lookup({"auto": None} | GATE_LOSSES, self.loss, "loss")
        lookup(dict.fromkeys(GATE_STARTS), self.start, "start")
        if self.per_layer and (self.level != "parameter" or self.head == "select"):
            raise InputError(
                f"per_layer: got True with the head {self.head!r} at the {self.level} "
                "level; layers have weights of their own at the parameter level alone, "
                "and not with the head 'select'"
            )
        if self.guided and self.loss != "auto" and self.head in UNTRAINED_HEADS:
            raise InputError(
                f"loss: got {self.loss!r} with the head {self.head!r}, which is not "
                "trained, expected 'auto'"
            )
        if not self.cost_weights or min(self.cost_weights) < 0:
            raise InputError(
                f"cost_weights: got {self.cost_weights}, expected one or more of 0 or "
                "more"
            )
        if not 0 < self.budget_share <= 1:
            raise InputError(
                f"budget_share: got {self.budget_share}, expected in (0, 1]"
            )
        if self.q_of == "own" and self.head != "select" and self.loss != "selected":
            raise InputError(
                f"q_of: got 'own' with the head {self.head!r} and the loss "
                f"{self.loss!r}, expected 'data': only the head 'select' and the loss "
                "'selected' choose among weights"
            )
        if self.q_of == "own" and not FITTED.issuperset(RULES[self.rule].critics):
            raise InputError(
                f"q_of: got 'own' with the rule {self.rule!r}, expected 'data': the "
                f"values of weights are of {' and '.join(sorted(FITTED))} alone"
            )
        self.optimiser  # noqa: B018 (its own checks)

    @property
    def guided(self) -> bool:
        """Whether critics choose or train its weights."""
        return self.head == "select" or (
            self.loss != "auto" and GATE_LOSSES[self.loss].critics
        )

    @property
    def optimiser(self) -> OptimiserConfig:
        """Plain Adam without averaging, as in the authors' code."""
        return part(OptimiserConfig, self, weight_decay=0.0, ema=1.0)


@dataclass(frozen=True)
class AutoSection:
    """How it is decided whether new demonstrations need a new skill.

    Attributes:
      ranks: of the new skills that are tried.
      steps: of each trial.
      held_out: share of the trajectories that the trials are compared on, 1 or more.
      rows: the most transitions of those that are compared on.
      draws: times and noises of each.
      tolerance: the loss of what is chosen is at most 1 + this times the least.
      coverage: share of the states that the demonstrations of what adds no skill reach.
    """

    ranks: tuple[int, ...] = (4, 16)
    steps: int = 1000
    held_out: float = 0.2
    rows: int = 2048
    draws: int = 8
    tolerance: float = 0.1
    coverage: float = 0.9

    def __post_init__(self) -> None:
        at_least(self, 1, "steps", "rows", "draws")
        at_least(self, 0, "tolerance")
        if not self.ranks or min(self.ranks) < 1:
            raise InputError(f"ranks: got {self.ranks}, expected one or more of 1 up")
        for name in ("held_out", "coverage"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name}: got {getattr(self, name)}, expected 0 to 1")


@dataclass(frozen=True)
class CriticSection(CriticConfig):
    """Form and training of critics, and how transitions are prepared for them.

    Attributes:
      steps: of critics that are trained alone, to be shared by skills; those trained
        with skills take the skills' batches and steps.
      scale_rewards: multiply rewards by `reward_scale`.
      reward_scale: 0 is longest episode / (highest - lowest return) of the data.
      violation: h where the cost is above 0; elsewhere h is -1.
      bootstrap_timeouts: whether a cut episode went on unseen.
    """

    steps: int = 50_000
    scale_rewards: bool = True
    reward_scale: float = 0.0
    violation: float = 25.0
    bootstrap_timeouts: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "steps", "batch_size")
        at_least(self, 0, "reward_scale")


def _walker_seeds() -> dict[str, int]:
    return {
        "dm_control:walker-stand": 0,
        "dm_control:walker-walk": 1,
        "dm_control:walker-run": 2,
    }


@dataclass(frozen=True)
class DataConfig:
    """What is collected where no file is named, and how files are read.

    Attributes:
      policy: "expert", "medium", "random" or the path of an expert file.
      action_noise: standard deviation of Gaussian noise on every action.
      clip_actions: clip actions into [-1, 1] instead of refusing them.
      actions: units of stored actions, a key of `data.UNITS`: "env" are the
        environment's own, "scaled" are in [-1, 1], "auto" is what the file says or what
        the environment's box leaves.
      ends: what ends a trajectory, a key of `data.ENDS`.
      seeds: of the collection in each environment; 0 in those not named.
    """

    policy: str = "expert"
    action_noise: float = 0.0
    clip_actions: bool = False
    actions: str = "auto"
    ends: str = "check"
    seeds: Mapping[str, int] = field(default_factory=_walker_seeds)

    def __post_init__(self) -> None:
        at_least(self, 0, "action_noise")
        lookup(dict.fromkeys(UNITS), self.actions, "actions")
        lookup(dict.fromkeys(ENDS), self.ends, "ends")


@dataclass(frozen=True)
class EvaluationConfig:
    """Roll-outs after training.

    Attributes:
      episodes: whole episodes.
      seed: of initial states and of the policy's noise.
    """

    episodes: int = 30
    seed: int = 10_000

    def __post_init__(self) -> None:
        at_least(self, 1, "episodes")
        at_least(self, 0, "seed")


@dataclass(frozen=True)
class GaussianSection(Budget):
    """Training of the Gaussian baselines BC and IQL, actor and critics alike.

    Attributes:
      learning_rate: at the start, with cosine decay.
      reward_temperature: a factor of IQL's advantages.
    """

    steps: int = 1_000_000
    batch_size: int = 256
    learning_rate: float = 3e-4
    reward_temperature: float = 3.0


@dataclass(frozen=True)
class TableSection:
    """What the tables of experiments/ vary and choose.

    Attributes:
      seeds: training seeds.
      methods: rows; none is all.
      tuning_episodes: by which fixed weights are chosen, from other start states.
      cloning: training of gates through the sampler, which costs some ten times a step
        on the diffusion loss.
      guided: training of gates by critics, through the sampler too.
      return_quantile: gates with costs learn from the trajectories above it, among
        those within the cost limit.
      fisor_candidates: actions sampled by the FISOR baseline.
      transitions: of a target set of the dynamics shift.
      gaussian: of BC and IQL.
      ewc_strength: a factor of EWC's weights.
      packnet_retraining: steps after pruning, as a share of the steps before.
    """

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    methods: tuple[str, ...] = ()
    tuning_episodes: int = 10
    cloning: Budget = field(default_factory=Budget)
    guided: Budget = field(default_factory=lambda: Budget(600, 256))
    return_quantile: float = 0.5
    fisor_candidates: int = 16
    transitions: int = 10_000
    gaussian: GaussianSection = field(default_factory=GaussianSection)
    ewc_strength: float = 1e4
    packnet_retraining: float = 0.1

    def __post_init__(self) -> None:
        at_least(self, 1, "tuning_episodes", "fisor_candidates", "transitions")
        at_least(self, 0, "ewc_strength", "packnet_retraining")


@dataclass(frozen=True)
class Job:
    """Everything a run is configured by.

    Attributes:
      preset: name of the config's preset, for cards and results.
      normaliser: a key of `data.normalise.NORMALISERS`, of observations.
      std_floor: the least scale of an observation.
      network: of the denoiser.
      process: generative process and action chunks.
      data: what is collected, and how files are read.
      base: of a base.
      skill: of skills.
      gate: of a gate.
      support: how a gate's support is fitted.
      auto: of the decision between a new skill and those that are there.
      critics: of critics.
      fitted_q: how costs of policies are estimated from data.
      weights: how critics' advantages become weights.
      cost_limit: costs of a trajectory up to here are safe.
      evaluation: roll-outs after training.
      run: how often a training reports and saves.
      table: of the tables of experiments/.
    """

    preset: str = "paper"
    normaliser: str = "standard"
    std_floor: float = 0.1
    network: NetworkConfig = field(default_factory=NetworkConfig)
    process: ProcessConfig = field(default_factory=ProcessConfig)
    data: DataConfig = field(default_factory=DataConfig)
    base: BaseSection = field(default_factory=BaseSection)
    skill: SkillSection = field(default_factory=SkillSection)
    gate: GateSection = field(default_factory=GateSection)
    support: SupportConfig = field(default_factory=SupportConfig)
    auto: AutoSection = field(default_factory=AutoSection)
    critics: CriticSection = field(default_factory=CriticSection)
    fitted_q: FittedQConfig = field(default_factory=FittedQConfig)
    weights: WeightConfig = field(default_factory=WeightConfig)
    cost_limit: float = 10.0
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    run: LoopConfig = field(default_factory=LoopConfig)
    table: TableSection = field(default_factory=TableSection)

    def __post_init__(self) -> None:
        lookup(NORMALISERS, self.normaliser, "normaliser")
        at_least(self, 0, "cost_limit")
        if self.std_floor <= 0:
            raise InputError(f"std_floor: got {self.std_floor}, expected above 0")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Job":
        """The job of nested values; fields that are not given keep their defaults.

        Names of the first edition are read too: the section "diffusion" is `process`,
        "critics.safety" says whether `critics.kinds` has "safety".

        Raises:
          InputError: an unknown field, a value of another type or out of range, or a
            number that is not finite; the field is named.
        """
        return from_dict(cls, _migrated(values))

    def changed(self, changes: Mapping[str, Any]) -> "Job":
        """The job with other values under these dotted names.

        Raises:
          InputError: as `from_dict`.
        """
        values = dataclasses.asdict(self)
        for name, value in changes.items():
            *sections, last = name.split(".")
            section = values
            for key in sections:
                section = section.setdefault(key, {})
            section[last] = value
        return type(self).from_dict(values)


def _migrated(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with the names of today."""
    values = dict(values)
    if "diffusion" in values:
        values["process"] = values.pop("diffusion")
    critics = values.get("critics")
    if isinstance(critics, Mapping) and "safety" in critics:
        critics = dict(critics)
        safety = critics.pop("safety")
        critics["kinds"] = ("reward", "safety") if safety else ("reward",)
        values["critics"] = critics
    if "gate" in values:
        values["gate"] = of_today(values["gate"])
    return values


def from_dict(kind: type[T], values: Mapping[str, Any], path: str = "") -> T:
    """A dataclass, and those in it, of nested values.

    Args:
      kind: the dataclass.
      values: some of its fields by name.
      path: put before the names of fields in messages, such as "skill.".

    Raises:
      InputError: see `Job.from_dict`.
    """
    hints = _hints(kind)
    for name in values:
        if name not in hints:
            raise InputError(
                f"unknown config field '{path}{name}'; choose from "
                f"{', '.join(sorted(hints))}"
            )
    given = {
        name: _value(hints[name], value, f"{path}{name}")
        for name, value in values.items()
    }
    try:
        return kind(**given)
    except InputError as error:
        # The dataclass names its field, if it is a field's fault.
        named = not path or str(error).partition(":")[0] in hints
        place = path if named else f"{path.removesuffix('.')}: "
        raise InputError(f"{place}{error}") from error


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {f.name: hints[f.name] for f in dataclasses.fields(kind)}  # pyright: ignore[reportArgumentType]


_WORDS = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}


def _value(hint: Any, value: Any, name: str) -> Any:
    """The value as a field of this type holds it."""
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise InputError(f"{name}: got {value!r}, expected a section of fields")
        return from_dict(typing.cast(type, hint), value, f"{name}.")
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        if value is None:
            return None
        [hint] = [kind for kind in arguments if kind is not type(None)]
        return _value(hint, value, name)
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, (list, tuple)):
            raise InputError(f"{name}: got {value!r}, expected several in brackets")
        return tuple(_value(arguments[0], one, name) for one in value)
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise InputError(f"{name}: got {value!r}, expected values by name")
        return {key: _value(arguments[1], one, name) for key, one in value.items()}
    if hint is float and type(value) is int:
        value = float(value)
    if type(value) is not hint:
        raise InputError(f"{name}: got {value!r}, expected {_WORDS[hint]}")
    if hint is float and not math.isfinite(value):
        raise InputError(f"{name}: got {value}, expected a finite number")
    return value


def part(kind: type[T], config: Any, **changes: Any) -> T:
    """The dataclass `kind` with the fields that `config` has under the same names."""
    names = [f.name for f in dataclasses.fields(kind)]  # pyright: ignore[reportArgumentType]
    mine = {name: getattr(config, name) for name in names if hasattr(config, name)}
    return kind(**mine | changes)
