"""Speed of this machine and of every stage, beside the targets.

    python -m experiments.tools.benchmark
    python -m experiments.tools.benchmark --quick --only=matmul,train

Measures start-up and memory, the rate of matrix products, training steps of every
stage, where a step's time goes, several seeds as one program, also by the number of
steps in one call, data in a file, several steps as one call, the cost of composing
skills, of which few are active, libraries of many skills and the search of their
supports, the latency of an action, also of exported policies and of a server,
evaluation (also with simulators on the device), and bfloat16; prints a table and saves
it as JSON.
A full run takes minutes, in which nothing else should run on the machine. --quick
repeats less and starts with fewer transitions: it checks the benchmark, its figures are
not to be quoted. Evaluation by several processes needs `make setup-safe`, that on the
device `make setup-mjx`, onnxruntime `make setup-onnx`; they are left out without.

Training is `runtime.loop.train` on what the workflows plan: the benchmark has no step
of its own. Rates and ratios come from measurements in turns (A B A B ...), because the
speed of a machine drifts: a figure is the median over the turns, a ratio the median of
the ratios within each turn.
"""

import asyncio
import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from psec_jax import exporting, tree
from psec_jax.agents import cloning
from psec_jax.agents.common import batch_noise
from psec_jax.agents.critics import CriticConfig
from psec_jax.cli import no_arguments, run, values_of
from psec_jax.composition import PolicyConfig, PolicyParams, act
from psec_jax.data import d4rl, dataset
from psec_jax.data.normalise import standard
from psec_jax.envs import make_on_device
from psec_jax.envs.vector import VectorEnv
from psec_jax.errors import lookup
from psec_jax.evaluation import MAX_WIDTH, evaluate
from psec_jax.files import make_room, write_json
from psec_jax.gating import SUPPORTS, GateConfig, index_boxes, init_gate
from psec_jax.library import SkillLibrary
from psec_jax.lora import dense_layers, init_skill
from psec_jax.networks.critics import init_q
from psec_jax.networks.denoiser import NetworkConfig, init_base, make_network
from psec_jax.policy import Policy, compose, load_skills
from psec_jax.process import ProcessConfig
from psec_jax.runtime import batches, loop, platform, streaming
from psec_jax.runtime.loop import LoopConfig
from psec_jax.runtime.run import versions
from psec_jax.runtime.runs import Training
from psec_jax.support import SupportConfig, fit_neighbour
from psec_jax.types import Dataset, Normaliser, Params
from psec_jax.workflows import Job, base, gate, skill
from psec_jax.workflows.collection import collect, simulator_versions
from psec_jax.workflows.demonstrations import Demos
from psec_jax.workflows.multirun import Plan

ROOT = Path(__file__).resolve().parents[2]
OUT = "results/benchmark.json"
RANK, STRENGTH = 8, 16.0
PERCENTILE_TURNS = 3


class Robot(NamedTuple):
    """Numbers of an observation and of an action."""

    obs: int
    action: int


WALKER, META_WORLD = Robot(24, 6), Robot(39, 4)
OBS_DIM, ACTION_DIM = WALKER
PAPERS_GATE = GateConfig()
DTYPES = ("float32", "bfloat16")
_SHORT = {"float32": "f32", "bfloat16": "bf16"}

Times = dict[str, list[float]]


@dataclass(frozen=True)
class Sizes:
    """What is measured, and for how long.

    Attributes:
      repeats: turns of every measurement.
      seconds: of each measurement in a turn.
      latency_repeats: actions timed one by one.
      matmul: m of the square products m x m x m.
      batches: batch sizes.
      seeds: numbers R of bases trained as one program, the first of them 1.
      loops: steps in one call, the first of them 1.
      skills: numbers K of skills composed.
      active: numbers of skills that are active under a "topk" head.
      acting: numbers of observations that it acts on at once.
      libraries: numbers K of skills in a library.
      tasks: of Meta-World, whose demonstrations are searched; of more skills than tasks
        each task has several.
      demonstrations: of each task.
      library_batch: transitions of a step of a gate over them.
      transitions: in the file that the start-up is measured with.
      start_steps: gradient steps of that run.
      rows: transitions the other stages draw from.
      episodes: evaluated together.
      cell_episodes: the same, in a grid cell of a table.
      evaluation_repeats: turns of the evaluation.
      env: environment of the evaluation.
      safe_env: environment of the evaluation by several processes.
      workers: their numbers.
      device_env: environment of the evaluation on the device.
      device_episodes: numbers of episodes evaluated there at once.
      robots: numbers of connections to a server.
      replies: of the server in a turn, over all connections.
      network: sizes of the denoiser.
    """

    repeats: int = 7
    seconds: float = 0.7
    latency_repeats: int = 300
    matmul: int = 2048
    batches: tuple[int, ...] = (256, 2048)
    seeds: tuple[int, ...] = (1, 2, 4, 8)
    loops: tuple[int, ...] = (1, 8, 64)
    skills: tuple[int, ...] = (1, 4, 16, 64)
    active: tuple[int, ...] = (1, 2)
    acting: tuple[int, ...] = (1, 32, 256)
    libraries: tuple[int, ...] = (1, 10, 50, 200)
    tasks: int = 50
    demonstrations: int = 20
    library_batch: int = 256
    transitions: int = 1_000_000
    start_steps: int = 20
    rows: int = 100_000
    episodes: int = 10
    cell_episodes: int = 20
    evaluation_repeats: int = 5
    env: str = "dm_control:walker-walk"
    safe_env: str = "bullet:SafetyBallRun-v0"
    workers: tuple[int, ...] = (1, 2, 4)
    device_env: str = "mjx:walker-walk?time_limit=2.5"  # 100 control steps
    device_episodes: tuple[int, ...] = (10, 100, 1000, 4000)
    robots: tuple[int, ...] = (1, 8, 32)
    replies: int = 1000
    network: NetworkConfig = dataclasses.field(default_factory=NetworkConfig)


FULL = Sizes()
QUICK = Sizes(
    repeats=2,
    seconds=0.05,
    latency_repeats=10,
    transitions=100_000,
    start_steps=2,
    evaluation_repeats=1,
    device_episodes=(10,),
    replies=64,
    libraries=(1, 10),
    tasks=2,
    demonstrations=2,
)


@dataclass(frozen=True)
class Target:
    """A bound on a figure.

    Attributes:
      sense: ">=" or "<=".
      bound: in the figure's unit.
      anywhere: False where a CPU is not judged by it.
    """

    sense: str
    bound: float
    anywhere: bool = True

    def met(self, value: float) -> bool:
        """Whether the figure keeps the bound."""
        return value >= self.bound if self.sense == ">=" else value <= self.bound


TARGETS = {
    ("train", "base, batch 2048: share of f32 matmul"): Target(">=", 75),
    ("train", "both skills and critics, batch 256: over a base step"): Target("<=", 2),
    ("train", "both skills and critics, batch 2048: over a base step"): Target("<=", 2),
    ("seeds", "8 bases, batch 256: time over one"): Target("<=", 1.3, False),
    ("startup", "first gradient step, 1000000 transitions"): Target("<=", 15),
    ("startup", "peak memory, 1000000 transitions"): Target("<=", 2),
    ("skills", "K = 16, batch 2048: cost over the base"): Target("<=", 2.0),
    ("skills", "K = 64, batch 2048: cost over the base"): Target("<=", 4.5),
    ("evaluation", "10 episodes together over one at a time"): Target(">=", 5),
    ("evaluation", "a grid cell of 20 episodes"): Target("<=", 3, False),
    ("bfloat16", "sampling, batch 2048: speed over f32"): Target(">=", 2),
}


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
      group: a key of `GROUPS`.
      name: what was measured.
      value: the median over the turns.
      low: the 5 % quantile over the turns.
      high: the 95 % quantile.
      unit: of all three.
      target: the bound, or None.
      met: whether it is kept, or None.
    """

    group: str
    name: str
    value: float
    low: float
    high: float
    unit: str
    target: str | None = None
    met: bool | None = None


def make_row(group: str, name: str, values: Sequence[float], unit: str) -> Row:
    """A figure from its values in every turn, beside its target."""
    low, value, high = (float(q) for q in np.quantile(values, (0.05, 0.5, 0.95)))
    target = TARGETS.get((group, name))
    if target is None or not judged(group, target):
        return Row(group, name, value, low, high, unit)
    bound = f"{target.sense} {target.bound:g}"
    return Row(group, name, value, low, high, unit, bound, target.met(value))


def judged(group: str, target: Target) -> bool:
    """Whether a target of the group applies here: only CPUs with AMX have fast
    bfloat16."""
    if not target.anywhere and jax.default_backend() == "cpu":
        return False
    return group != "bfloat16" or fast_bfloat16()


# Seconds of one call, or of one step.
Measure = Callable[[], float]


def timed(call: Callable[[], Any], seconds: float) -> Measure:
    """A measure of a call that returns arrays to wait for.

    The call runs twice before, to compile and to choose how many calls fill `seconds`;
    0 times single calls.
    """
    jax.block_until_ready(call())
    began = time.perf_counter()
    jax.block_until_ready(call())
    count = max(1, round(seconds / (time.perf_counter() - began)))

    def measure() -> float:
        began = time.perf_counter()
        for _ in range(count):
            result = call()
        jax.block_until_ready(result)
        return (time.perf_counter() - began) / count

    return measure


def in_turns(measures: Mapping[str, Measure], repeats: int) -> Times:
    """[repeats] seconds by each measure, one of each in every turn."""
    times: Times = {name: [] for name in measures}
    for _ in range(repeats):
        for name, measure in measures.items():
            times[name].append(measure())
    return times


def calls_in_turns(
    calls: Mapping[str, Callable[[], Any]], repeats: int, seconds: float
) -> Times:
    """`in_turns` of calls, each as long as `seconds` in a turn."""
    return in_turns({n: timed(call, seconds) for n, call in calls.items()}, repeats)


def waiting(function: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    """A call that waits for its result: two of them never run at the same time."""
    return lambda: jax.block_until_ready(function(*args))


def ratios(numerator: Sequence[float], denominator: Sequence[float]) -> list[float]:
    """Turn by turn."""
    return [a / b for a, b in zip(numerator, denominator, strict=True)]


def rates(amount: float, seconds: Sequence[float]) -> list[float]:
    """Amount per second in every turn."""
    return [amount / s for s in seconds]


def normal(seed: int, *shape: int) -> jax.Array:
    """Random numbers on the device, drawn on the host: nothing to compile."""
    generator = np.random.default_rng(seed)
    return jnp.asarray(generator.standard_normal(shape, np.float32))


def weights_of(params: Params) -> int:
    """N: the weights of the dense layers; biases, norms and Fourier kernels are not
    counted, as they take part in no matrix product worth counting."""
    return sum(d * o for d, o in dense_layers(params).values())


@functools.cache
def cpu_flags() -> tuple[str, ...]:
    """The vector and matrix extensions that decide the rate of products."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ()
    lines = [line for line in text.splitlines() if line.startswith("flags")]
    known = set(lines[0].partition(":")[2].split()) if lines else set()
    names = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16")
    return tuple(name for name in names if name in known)


def fast_bfloat16() -> bool:
    """Whether products in bfloat16 can be faster here: on CPUs with AMX."""
    return jax.default_backend() != "cpu" or "amx_bf16" in cpu_flags()


# The products of a block's dense layers, forward and backward, as einsum terms with the
# dimensions [batch b, width w, hidden h].
PRODUCTS = {
    "up": ("bw", "wh", "bh"),
    "down": ("bh", "hw", "bw"),
    "up, input gradient": ("bh", "wh", "bw"),
    "up, weight gradient": ("bw", "bh", "wh"),
}


def _product(
    terms: tuple[str, str, str], dims: Mapping[str, int], dtype: str
) -> tuple[Callable[[], Any], float]:
    """A call of one product with float32 sums, and its FLOP."""
    x, y = (
        normal(seed, *(dims[d] for d in term)).astype(dtype)
        for seed, term in enumerate(terms[:2])
    )
    form = f"{terms[0]},{terms[1]}->{terms[2]}"
    function = jax.jit(
        functools.partial(jnp.einsum, form, preferred_element_type=jnp.float32)
    )
    flop = 2.0 * np.prod([dims[d] for d in set(terms[0] + terms[1])])
    return waiting(function, x, y), float(flop)


def _square(m: int, dtype: str) -> tuple[Callable[[], Any], float]:
    return _product(("ij", "jk", "ik"), {"i": m, "j": m, "k": m}, dtype)


def matmul(sizes: Sizes) -> list[Row]:
    """The machine's own rate: square products, and the network's shapes."""
    width, hidden = sizes.network.width, sizes.network.width * sizes.network.expansion
    products = {
        f"{_SHORT[dtype]} {sizes.matmul}^3": _square(sizes.matmul, dtype)
        for dtype in DTYPES
    }
    for batch in sizes.batches:
        dims = {"b": batch, "w": width, "h": hidden}
        for dtype in DTYPES:
            for name, terms in PRODUCTS.items():
                label = f"{_SHORT[dtype]} {name}, batch {batch}"
                products[label] = _product(terms, dims, dtype)
    calls = {name: call for name, (call, _) in products.items()}
    times = calls_in_turns(calls, sizes.repeats, sizes.seconds / 2)
    return [
        make_row("matmul", name, rates(flop / 1e9, times[name]), "GFLOP/s")
        for name, (_, flop) in products.items()
    ]


FLOP = {
    "base": "6 N B: forward, input gradients and weight gradients, 2 N B each",
    "skill": "4 N B + 4 M B + 2 r N: no weight gradients of the frozen base, whose sum "
    "with the skill is formed once",
    "gate": "4 N B + 4 M B + 6 G B: no weight gradients of base and skills",
    "NSEC": "2 N (2 T - 1) K B + 6 G B: input gradients of every step but the first; "
    "skills merged into the base",
    "ASEC": "2 N T K B + 6 G B: no gradients of the steps",
    "both skills and critics": "twice a skill's + (32 Q + 16 V) B: target Q, Q and V "
    "forward and backward, V at the next state",
    "N": "weights of the base's dense layers",
    "M": f"weights of the adapters (one skill of rank {RANK})",
    "G": "weights of the gate's dense layers",
    "Q": "weights of one Q of the critics",
    "V": "weights of one V",
    "T": "denoising steps",
    "K": "networks that are mixed, the base and one skill",
    "B": "batch size",
}


OFFLINE = "both skills and critics"
GATES = {"gate": "parameter", "NSEC": "noise", "ASEC": "action"}  # levels


def make_plans(sizes: Sizes, batch: int) -> dict[str, Plan]:
    """Every stage as the commands plan it, on random data."""
    job, load = make_job(sizes, batch), functools.partial(_load, sizes.rows)
    names = ("reward", "safety")
    # Plans read the library and make no directory.
    with tempfile.TemporaryDirectory(prefix="psec_benchmark_") as folder:
        write_library(sizes, folder)
        common: dict[str, Any] = {"workdir": "", "library": folder, "evaluate": False}
        return {
            "base": base_plan(sizes, batch),
            "base (bf16)": base_plan(sizes, batch, dtype="bfloat16"),
            "skill": skill.plan(job, skill.Request(name="skill", **common), load),
            **{
                name: gate.plan(
                    job.changed({"gate.level": level}),
                    gate.Request(name="gate", skills=["skill0"], **common),
                    load,
                )
                for name, level in GATES.items()
            },
            OFFLINE: skill.plan(
                job, skill.Request(name=names, objectives=names, **common), load
            ),
        }


def base_plan(sizes: Sizes, batch: int, seed: int = 0, dtype: str = "float32") -> Plan:
    """A base as `launch.pretrain` plans it, on random data."""
    job = make_job(sizes, batch).changed({"network.matmul_dtype": dtype})
    request = base.Request("", "", seed=seed, evaluate=False)
    return base.plan(job, request, functools.partial(_load, sizes.rows))


def make_job(sizes: Sizes, batch: int) -> Job:
    """The paper's settings with these sizes."""
    network = {f"network.{k}": v for k, v in dataclasses.asdict(sizes.network).items()}
    sections = ("base", "skill", "gate", "critics")
    return Job().changed(network | {f"{s}.batch_size": batch for s in sections})


def _load(count: int, *_: Any, robot: Robot = WALKER) -> Demos:
    """Random data, whatever trajectories a workflow requests."""
    return Demos(random_data(count, robot), "random")


@functools.cache
def random_data(count: int, robot: Robot = WALKER) -> Dataset:
    """Random transitions, at least two episodes."""
    generator = np.random.default_rng(0)
    states = generator.standard_normal((count + 1, robot.obs), np.float32)
    ends = np.arange(1, count + 1) % min(1000, count // 2) == 0
    ends[-1] = True
    return Dataset(
        obs=states[:-1],
        action=generator.random((count, robot.action), np.float32) * 2 - 1,
        reward=generator.standard_normal(count, np.float32),
        cost=(generator.random(count) < 0.1).astype(np.float32),
        next_obs=states[1:],
        terminal=np.zeros(count, bool),
        timeout=ends,
    )


def write_library(
    sizes: Sizes, folder: str, skills: int = 1, robot: Robot = WALKER
) -> None:
    """Make a directory the library of a random base and skills."""
    policy = make_policy(sizes, skills, obs_dim=robot.obs, action_dim=robot.action)
    library = SkillLibrary.create(folder)
    card = {"name": "random", "obs_dim": robot.obs, "action_dim": robot.action}
    card |= {"network": dataclasses.asdict(sizes.network), "env": None}
    card |= {"process": dataclasses.asdict(policy.config.process)}
    library.add_base(policy.params.base, policy.params.normaliser, card)
    for k in range(skills):
        one = jax.tree.map(lambda leaf, k=k: leaf[k], policy.params.library)
        library.add_skill(f"skill{k}", one, {"alpha": STRENGTH, "env": "random"})


def flop_per_example(plan: Plan, batch: int) -> float:
    """FLOP of one example of a step; see `FLOP`."""
    state, frozen = plan.start()
    if plan.kind == "base":
        return 6.0 * weights_of(state.params)
    if plan.kind == "gate":
        assert plan.update is not None
        policy = plan.update.config.policy
        n, m = weights_of(frozen.base), tree.size(frozen.library)
        steps, mixed = policy.process.steps, len(frozen.strength) + 1
        passes = {"noise": 2 * steps - 1, "action": steps}
        through = 4.0 * n + 4.0 * m
        if policy.level in passes:
            through = 2.0 * n * passes[policy.level] * mixed
        return through + 6.0 * weights_of(state.params)
    several = len(plan.names)
    n = weights_of(frozen if several == 1 else frozen.base)
    params = state.params if several == 1 else state.actor.params
    m = tree.size(params) / several
    flop = several * (4.0 * n + 4.0 * m + 2.0 * RANK * n / batch)
    if several == 1:
        return flop
    q = sum(x[0, 0].size for x in jax.tree.leaves(state.critics.q.params) if x.ndim > 3)
    v = sum(x[0].size for x in jax.tree.leaves(state.critics.v.params) if x.ndim > 2)
    return flop + 32.0 * q + 16.0 * v


class Trainer:
    """Trains plans as one program by the project's loop, and reports its speed.

    Args:
      plans: one or several.
      seconds: aimed at for each measurement.
      steps_per_call: see `LoopConfig`.
      folder: where the data are written, to be streamed; None keeps them in memory.

    Attributes:
      cold: seconds to the first update, compilation included.
      warm: the same where the program was compiled before.
    """

    def __init__(
        self,
        plans: Sequence[Plan],
        seconds: float,
        steps_per_call: int = 0,
        folder: Path | None = None,
    ) -> None:
        own = 1 if folder else platform.current().steps_per_call
        self._update, self._per_call = plans[0].update, steps_per_call or own
        datas: list[Any] = []
        states = []
        for plan in plans:
            state, frozen = plan.start()
            data = batches.Data(plan.rows, frozen)
            datas.append(batches.shared(data, datas[0]) if datas else data)
            states.append(state)
        if folder is not None:
            datas = streaming.make_streams(datas, folder)
        self._trainings = [
            Training(state, data, plan.key)
            for plan, state, data in zip(plans, states, datas, strict=True)
        ]
        first, again = (self._train(3 * self._per_call) for _ in range(2))
        self.cold, self.warm = first["first_step_seconds"], again["first_step_seconds"]
        calls = round(seconds * again["steps_per_s"] / self._per_call)
        self._steps = self._per_call * (1 + max(1, calls))

    def __call__(self) -> float:
        """Seconds of one step; the loop leaves the first call out."""
        return 1 / self._train(self._steps)["steps_per_s"]

    def _train(self, steps: int) -> dict[str, Any]:
        assert self._update is not None
        options = LoopConfig(steps, steps, self._per_call)
        [(_, summary), *_] = loop.train(
            self._update, self._trainings, steps=steps, config=options, progress=False
        )
        return summary


def train(sizes: Sizes) -> list[Row]:
    """Gradient steps of every stage, in turns with the f32 product."""
    rows = []
    square, square_flop = _square(sizes.matmul, "float32")
    for batch in sizes.batches:
        plans = make_plans(sizes, batch)
        trainers = {n: Trainer([plan], sizes.seconds) for n, plan in plans.items()}
        flop = {n: flop_per_example(plan, batch) for n, plan in plans.items()}
        measures = {"matmul": timed(square, sizes.seconds), **trainers}
        times = in_turns(measures, sizes.repeats)
        matmul_rates = rates(square_flop, times["matmul"])
        for name, trainer in trainers.items():
            flops = rates(flop[name] * batch, times[name])
            label = f"{name}, batch {batch}"
            share = [100 * r for r in ratios(flops, matmul_rates)]
            row = functools.partial(make_row, "train")
            rows += [
                row(label, rates(1, times[name]), "steps/s"),
                row(f"{label}: rate", [f / 1e9 for f in flops], "GFLOP/s"),
                row(f"{label}: share of f32 matmul", share, "%"),
                row(f"{label}: first step, cold", [trainer.cold], "s"),
                row(f"{label}: first step, warm", [trainer.warm], "s"),
            ]
        over = ratios(times[OFFLINE], times["base"])
        label = f"{OFFLINE}, batch {batch}: over a base step"
        rows += [make_row("train", label, over, "x"), *_memory("train", batch)]
    return rows


def _memory(group: str, batch: int) -> list[Row]:
    """The device's peak memory up to here; no row where it is not reported."""
    peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    if peak is None:
        return []
    return [make_row(group, f"batch {batch}: peak device memory", [peak / 1e9], "GB")]


def profile(sizes: Sizes) -> list[Row]:
    """What the parts of a base's step take: what is left without them, or with others.

    The forward pass and the gradients alone add a trifle of their result to the
    parameters, so that nothing of them can be left out.
    """
    rows = []
    for batch in sizes.batches:
        whole = base_plan(sizes, batch)
        job, load = make_job(sizes, batch), functools.partial(_load, sizes.rows)
        request = base.Request("", "", evaluate=False)
        others = {
            "without dropout": {"base.dropout": 0.0},
            "relu for mish": {"network.activation": "relu"},
            "products in bfloat16": {"network.matmul_dtype": "bfloat16"},
        }
        plans = {"whole": whole}
        for name, part in {"forward": _forward_pass, "gradients": _gradients}.items():
            assert whole.update is not None
            plans[f"{name} alone"] = whole._replace(
                update=dataclasses.replace(whole.update, update=part)
            )
        for name, changes in others.items():
            plans[name] = base.plan(job.changed(changes), request, load)
        trainers = {n: Trainer([plan], sizes.seconds) for n, plan in plans.items()}
        times = in_turns(trainers, sizes.repeats)
        for name in plans:
            label = f"base, batch {batch}: {name}"
            rows.append(
                make_row("profile", label, [1e3 * t for t in times[name]], "ms")
            )
            if name != "whole":
                over = ratios(times[name], times["whole"])
                rows.append(make_row("profile", f"{label} over whole", over, "x"))
    return rows


def _loss(config: Any, params: Params, batch: Any, key: jax.Array) -> jax.Array:
    obs, action = batch.obs, batch.action
    noise = batch_noise(config.process, key, len(obs), action.shape[-1])
    return jnp.mean(cloning.errors(config, params, None, obs, action, noise))


def _forward_pass(config: Any, state: Any, batch: Any, _: Any, key: jax.Array) -> Any:
    loss = _loss(config, state.params, batch, key)
    params = jax.tree.map(lambda p: p + 1e-9 * loss, state.params)
    return state._replace(params=params, step=state.step + 1), {"loss/base": loss}


def _gradients(config: Any, state: Any, batch: Any, _: Any, key: jax.Array) -> Any:
    loss, grads = jax.value_and_grad(lambda p: _loss(config, p, batch, key))(
        state.params
    )
    params = jax.tree.map(lambda p, g: p - 1e-9 * g, state.params, grads)
    return state._replace(params=params, step=state.step + 1), {"loss/base": loss}


def seeds(sizes: Sizes) -> list[Row]:
    """A step of several bases as one program, in turns with a step of one; the largest
    number of them also by the number of steps in one call."""
    rows = []
    on_cpu = jax.default_backend() == "cpu"
    own = platform.current().steps_per_call
    for batch in sizes.batches[:1] if on_cpu else sizes.batches:
        plans = [base_plan(sizes, batch, seed) for seed in range(max(sizes.seeds))]
        for length in dict.fromkeys((own, *sizes.loops)):
            counts = (
                sizes.seeds if length == own else (sizes.seeds[0], max(sizes.seeds))
            )
            trainers = {
                str(n): Trainer(plans[:n], sizes.seconds, length) for n in counts
            }
            times = in_turns(trainers, sizes.repeats)
            calls = "" if length == own else f", {length} steps in one call"
            for count in counts[1:]:
                label = f"{count} bases, batch {batch}{calls}: time over one"
                over = ratios(times[str(count)], times[str(counts[0])])
                rows.append(make_row("seeds", label, over, "x"))
    return rows


def data_in_a_file(sizes: Sizes) -> list[Row]:
    """A step on batches from a file, in turns with one on data in memory.

    The file is in the system's page cache, as it was written just before.
    """
    rows = []
    for batch in sizes.batches:
        plan = base_plan(sizes, batch)
        with tempfile.TemporaryDirectory(prefix="psec_benchmark_") as folder:
            times = in_turns(
                {
                    "memory": Trainer([plan], sizes.seconds),
                    "file": Trainer([plan], sizes.seconds, folder=Path(folder)),
                },
                sizes.repeats,
            )
        label = f"base, batch {batch}: from a file over from memory"
        over = ratios(times["file"], times["memory"])
        rows.append(make_row("streaming", label, over, "x"))
    return rows


def loops(sizes: Sizes) -> list[Row]:
    """Several steps as one compiled loop, in turns with single ones."""
    rows = []
    for batch in sizes.batches:
        plan = base_plan(sizes, batch)
        trainers = {str(n): Trainer([plan], sizes.seconds, n) for n in sizes.loops}
        times = in_turns(trainers, sizes.repeats)
        for count in sizes.loops[1:]:
            label = f"base, batch {batch}: {count} steps in one call over single calls"
            over = ratios(times[str(count)], times["1"])
            rows.append(make_row("steps_per_call", label, over, "x"))
    return rows


def _fresh(function: str, *args: Any) -> Any:
    """What a function of this module returns in a fresh process; plain values only."""
    code = (
        "import json, sys; from experiments.tools import benchmark; "
        f"print(json.dumps(benchmark.{function}(*json.loads(sys.argv[1]))))"
    )
    command = [sys.executable, "-c", code, json.dumps(args)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{function} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def write_transitions(path: str, count: int) -> None:
    """Write `random_data` into a file."""
    d4rl.save(path, random_data(count), {})


def start_up(
    folder: str, network: dict[str, Any], batch: int, steps: int, started: float
) -> dict[str, float]:
    """Pretrain on the file in a folder, as `launch.pretrain` does.

    Args:
      folder: holds "demos.hdf5"; the run goes there too.
      network: fields of the config's network.
      batch: batch size.
      steps: gradient steps.
      started: `time.time()` just before this process was started.

    Returns:
      Seconds from there to the imports done and to the first gradient step done (an
      upper bound: writing the finished base is counted too), the training loop's own
      "steps_per_s", and "peak_bytes" of memory.
    """
    imported = time.time() - started
    changes = {"base.episodes": 0, "base.steps": steps, "base.batch_size": batch}
    changes |= {f"network.{field}": value for field, value in network.items()}
    [result] = base.run(
        Job().changed(changes),
        base.Request(
            f"{folder}/run",
            f"{folder}/library",
            data=f"{folder}/demos.hdf5",
            evaluate=False,
        ),
    )
    ended, summary = time.time() - started, result["summary"]
    after_first = summary["seconds"] - summary["first_step_seconds"]
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "imported": imported,
        "first_step": ended - after_first,
        "steps_per_s": summary["steps_per_s"],
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
    }


def startup(sizes: Sizes) -> list[Row]:
    """From the start of the interpreter to the first gradient step, and the memory."""
    with tempfile.TemporaryDirectory(prefix="psec_benchmark_") as folder:
        _fresh("write_transitions", f"{folder}/demos.hdf5", sizes.transitions)
        batch, steps = max(sizes.batches), sizes.start_steps
        network = dataclasses.asdict(sizes.network)
        got = _fresh("start_up", folder, network, batch, steps, time.time())
    label = f"{sizes.transitions} transitions"
    return [
        make_row("startup", "imports", [got["imported"]], "s"),
        make_row("startup", f"first gradient step, {label}", [got["first_step"]], "s"),
        make_row("startup", f"peak memory, {label}", [got["peak_bytes"] / 1e9], "GB"),
        make_row(
            "startup",
            f"training loop, batch {batch}, {steps} steps",
            [got["steps_per_s"]],
            "steps/s",
        ),
    ]


def make_policy(
    sizes: Sizes,
    skills: int = 0,
    dtype: str = "float32",
    obs_dim: int = OBS_DIM,
    action_dim: int = ACTION_DIM,
    gate_form: GateConfig = PAPERS_GATE,
) -> Policy:
    """A random policy: the base alone, or skills under a gate."""
    network = dataclasses.replace(sizes.network, matmul_dtype=dtype)
    key = jax.random.key(0)
    base_params = randomised(lambda: init_base(network, key, obs_dim, action_dim))
    normaliser = Normaliser(jnp.zeros(obs_dim), jnp.ones(obs_dim))
    config = PolicyConfig(network, ProcessConfig(), action_dim)
    if not skills:
        return Policy(config, PolicyParams(base_params, normaliser))
    strength = jnp.full(skills, STRENGTH)
    head = randomised(lambda: init_gate(gate_form, key, obs_dim, strength))
    library = make_library(base_params, skills)
    return Policy(
        dataclasses.replace(config, gate=gate_form),
        PolicyParams(base_params, normaliser, library, strength, head),
        tuple(f"skill{k}" for k in range(skills)),
    )


def make_selecting(sizes: Sizes) -> Policy:
    """A random policy of two skills: six weight vectors, four samples of each."""
    policy = make_policy(sizes, skills=2)
    widths = CriticConfig().widths
    twins = randomised(
        lambda: jax.vmap(lambda k: init_q(widths, k, OBS_DIM, ACTION_DIM))(
            jax.random.split(jax.random.key(0))
        )
    )
    config = dataclasses.replace(
        policy.config,
        gate=GateConfig(head="select", candidates=4),
        candidates=4,
        rule="reward_cost",
    )
    params = policy.params._replace(
        gate={"head": {"alphas": STRENGTH * normal(0, 6, 2)}},
        critics={"reward": twins, "cost": twins},
        cost_weight=jnp.float32(1),
    )
    return Policy(config, params, policy.skills)


def make_library(frozen: Params, count: int) -> Params:
    """Random skills on a base: leaves [K, ...]."""
    keys = jax.random.split(jax.random.key(0), count)
    return randomised(lambda: jax.vmap(lambda k: init_skill(k, frozen, RANK))(keys))


def randomised(make: Callable[[], Params]) -> Params:
    """Random numbers in the shapes of `make()`, which is not run: its compilation would
    take longer than the measurements."""
    generator = np.random.default_rng(0)

    def leaf(like: jax.ShapeDtypeStruct) -> jax.Array:
        scale = like.shape[-2] ** -0.5 if len(like.shape) > 1 else 0.1
        return jnp.asarray(scale * generator.standard_normal(like.shape), like.dtype)

    return jax.tree.map(leaf, jax.eval_shape(make))


def _forward(net: Any) -> Callable[..., jax.Array]:
    """The jitted denoiser on a batch; without weights the base alone."""

    @jax.jit
    def forward(variables, obs, a_t, t, alpha=None):
        return jax.vmap(lambda *inputs: net.apply(variables, *inputs))(
            *((obs, a_t, t) if alpha is None else (obs, a_t, t, alpha))
        )

    return forward


def skills(sizes: Sizes) -> list[Row]:
    """One forward pass with K skills, weights of their own for every state."""
    policy = make_policy(sizes)
    frozen = policy.params.base
    forward = _forward(make_network(policy.config.network, ACTION_DIM))
    rows, n = [], weights_of(frozen)
    libraries = {count: make_library(frozen, count) for count in sizes.skills}
    for batch in sizes.batches:
        inputs = (normal(0, batch, OBS_DIM), normal(1, batch, ACTION_DIM))
        inputs += (jnp.ones(batch),)
        calls = {"base": waiting(forward, {"params": frozen}, *inputs)}
        for count, library in libraries.items():
            variables = {"params": frozen, "skills": library}
            alpha = normal(2, batch, count)
            calls[str(count)] = waiting(forward, variables, *inputs, alpha)
        times = calls_in_turns(calls, sizes.repeats, sizes.seconds)
        milliseconds = [1e3 * t for t in times["base"]]
        rows.append(make_row("skills", f"base, batch {batch}", milliseconds, "ms"))
        for count, library in libraries.items():
            label = f"K = {count}, batch {batch}"
            cost = ratios(times[str(count)], times["base"])
            bound = 1 + tree.size(library) / n
            rows += [
                make_row("skills", f"{label}: cost over the base", cost, "x"),
                make_row("skills", f"{label}: its FLOP over the base's", [bound], "x"),
            ]
    return rows


def sparse(sizes: Sizes) -> list[Row]:
    """An action where few of K skills are active: their matrices gathered before the
    product, in turns with all of them computed."""
    rows = []
    for count in sizes.skills:
        for active in sizes.active:
            if active >= count:
                continue
            form = GateConfig("topk", top_k=active)
            policy = make_policy(sizes, skills=count, gate_form=form)
            some = dataclasses.replace(policy.config, gathered=active)
            for batch in sizes.acting:
                obs = normal(0, batch, OBS_DIM)
                keys = jax.random.split(jax.random.key(0), batch)
                calls = {}
                for name, config in (("all", policy.config), ("some", some)):
                    one = functools.partial(act, config)
                    if batch == 1:
                        inputs = (policy.params, keys[0], obs[0])
                        calls[name] = waiting(jax.jit(one), *inputs)
                    else:
                        several = jax.jit(jax.vmap(one, (None, 0, 0)))
                        calls[name] = waiting(several, policy.params, keys, obs)
                times = calls_in_turns(calls, sizes.repeats, sizes.seconds / 2)
                label = f"{active} of {count} skills, batch {batch}"
                all_ = [1e3 * t for t in times["all"]]
                over = ratios(times["some"], times["all"])
                rows += [
                    make_row("sparse", f"{label}: all computed", all_, "ms"),
                    make_row("sparse", f"{label}: gathered over all", over, "x"),
                ]
    return rows


def libraries(sizes: Sizes) -> list[Row]:
    """Libraries of K random skills in Meta-World's sizes: read, composed, in use, and
    how an action's cost grows beside its FLOP, 1 + K M / N of the base's."""
    rows, robot = [], META_WORLD
    load = functools.partial(_load, sizes.rows, robot=robot)
    job = make_job(sizes, sizes.library_batch)
    policies, steps = {}, {}
    policies[0] = make_policy(sizes, obs_dim=robot.obs, action_dim=robot.action)
    with contextlib.ExitStack() as stack:
        for count in sizes.libraries:
            folder = stack.enter_context(
                tempfile.TemporaryDirectory(prefix="psec_benchmark_")
            )
            write_library(sizes, folder, count, robot)
            names = [f"skill{k}" for k in range(count)]
            form = GateConfig()
            head = init_gate(form, jax.random.key(0), robot.obs, jnp.ones(count))
            card = {"skills": names, "level": "parameter"}
            card |= {"gate": dataclasses.asdict(form)}
            SkillLibrary.open(folder).add_gate("gate", head, card)
            read = functools.partial(load_skills, folder, names)
            made = functools.partial(compose, folder, gate="gate")
            times = calls_in_turns({"load": read, "compose": made}, sizes.repeats, 0)
            for name, seconds in times.items():
                rows.append(make_row("library", f"K = {count}: {name}", seconds, "s"))
            policies[count] = made()
            size = megabytes(policies[count].params)
            rows.append(make_row("library", f"K = {count}: memory", [size], "MB"))
            request = gate.Request("", folder, "new", names, evaluate=False)
            steps[str(count)] = Trainer([gate.plan(job, request, load)], sizes.seconds)
    times = in_turns(steps, sizes.repeats)
    for count in sizes.libraries:
        label = f"K = {count}: a step of the gate, batch {sizes.library_batch}"
        milliseconds = [1e3 * t for t in times[str(count)]]
        rows.append(make_row("library", label, milliseconds, "ms"))
    calls = {str(count): _acting(policy, 1) for count, policy in policies.items()}
    shares = _percentiles(calls, sizes)
    n = weights_of(policies[0].params.base)
    for count, policy in policies.items():
        who = f"K = {count}" if count else "base"
        for share, seconds in shares[str(count)].items():
            label = f"{who}: an action, p{share}"
            rows.append(make_row("library", label, [1e3 * t for t in seconds], "ms"))
        if count:
            cost = ratios(shares[str(count)][50], shares["0"][50])
            bound = 1 + tree.size(policy.params.library) / n
            rows += [
                make_row("library", f"{who}: an action over the base's", cost, "x"),
                make_row("library", f"{who}: its FLOP over the base's", [bound], "x"),
            ]
    return rows


def _percentiles(
    calls: Mapping[str, Callable[[], Any]], sizes: Sizes
) -> dict[str, dict[int, list[float]]]:
    """p50 and p99 of the seconds of single calls, in each of a few turns."""
    shares: dict[str, dict[int, list[float]]] = {n: {50: [], 99: []} for n in calls}
    measures = {name: timed(call, 0) for name, call in calls.items()}
    for _ in range(min(sizes.repeats, PERCENTILE_TURNS)):
        for name, measure in measures.items():
            seconds = [measure() for _ in range(sizes.latency_repeats)]
            for share, values in shares[name].items():
                values.append(float(np.percentile(seconds, share)))
    return shares


def supports(sizes: Sizes) -> list[Row]:
    """The search of a neighbour support over K skills in one state, of all skills and
    of those alone whose demonstrations may be near; none where Meta-World is not
    installed. The demonstrations are the scripted experts', collected where they are
    not there yet (minutes); states are every 40th of them, in random order."""
    if importlib.util.find_spec("metaworld") is None:
        return []
    skills = _demonstrated(sizes)
    states = np.concatenate([np.concatenate(s)[::40] for s in skills])
    states = jnp.asarray(np.random.default_rng(0).permutation(states), jnp.float32)
    rows, row = [], functools.partial(make_row, "support")
    search = jax.jit(SUPPORTS["neighbour"])
    several = jax.jit(jax.vmap(SUPPORTS["neighbour"], (None, 0)))
    for count in sizes.libraries:
        some = skills[:count]
        fit = fit_neighbour(SupportConfig(), some, np.zeros(0))
        whole = tree.take(fit, [k % len(some) for k in range(count)])
        forms = {"all": whole, "near": jax.jit(index_boxes)(whole)}
        calls = {}
        for name, form in forms.items():
            inputs = itertools.cycle(list(states))
            calls[name] = lambda form=form, inputs=inputs: search(form, next(inputs))
        shares = _percentiles(calls, sizes)
        label = f"K = {count}"
        for name, values in shares.items():
            for share, seconds in values.items():
                title = f"{label}: {name} searched, p{share}"
                rows.append(row(title, [1e3 * t for t in seconds], "ms"))
        batch = {
            name: waiting(several, form, states[: sizes.episodes])
            for name, form in forms.items()
        }
        times = calls_in_turns(batch, sizes.repeats, sizes.seconds / 2)
        for name, seconds in times.items():
            title = f"{label}: {name} searched, {sizes.episodes} states"
            rows.append(row(title, [1e3 * t for t in seconds], "ms"))
        form = GateConfig(head="constant", support="neighbour")
        policy = make_policy(
            sizes, count, obs_dim=META_WORLD.obs, action_dim=META_WORLD.action
        )
        head = {"alpha": jnp.full(count, STRENGTH)}
        policy = dataclasses.replace(
            policy,
            config=dataclasses.replace(policy.config, gate=form),
            params=policy.params._replace(gate={"head": head, "support": whole}),
        )
        for share, seconds in _percentiles({"": _at(policy, states)}, sizes)[
            ""
        ].items():
            title = f"{label}: an action under the support, p{share}"
            rows.append(row(title, [1e3 * t for t in seconds], "ms"))
        some = states[:: max(1, len(states) // 500)]
        exact, got = (np.stack([search(f, s) for s in some]) for f in forms.values())
        rows += [
            row(f"{label}: states", [float(np.sum(whole["valid"]))], ""),
            row(f"{label}: memory of the support", [megabytes(whole)], "MB"),
            row(f"{label}: largest difference", [float(np.abs(got - exact).max())], ""),
        ]
    return rows


def _at(policy: Policy, states: jax.Array) -> Callable[[], np.ndarray]:
    """An action in one state after the other."""
    inputs, key = itertools.cycle(np.asarray(states)), jax.random.key(0)
    return lambda: np.asarray(policy.act(key, next(inputs)))


def megabytes(params: Params) -> float:
    """Of the arrays."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / 1e6


def _demonstrated(sizes: Sizes) -> list[list[np.ndarray]]:
    """Normalised states of the demonstrations of Meta-World's tasks, by task."""
    tasks = sorted(importlib.import_module("metaworld").ALL_V3_ENVIRONMENTS)
    skills = []
    for seed, name in enumerate(tasks[: sizes.tasks], 100):
        spec = f"metaworld:{name}?terminate_on_success=True"
        path = collect(spec, "scripted", sizes.demonstrations, seed, 0.1)
        ds, _ = d4rl.load(path)
        skills.append([ds.obs[rows] for rows in dataset.episode_slices(ds)])
    normaliser = standard(np.concatenate([np.concatenate(s) for s in skills]), 0.1)
    return [[normaliser(obs) for obs in trajectories] for trajectories in skills]


def _acting(policy: Policy, batch: int) -> Callable[[], np.ndarray]:
    """One call of the policy, host to host; batch 1 is one unbatched observation."""
    obs = np.asarray(normal(0, batch, policy.params.normaliser.mean.shape[0]))
    keys = jax.random.split(jax.random.key(0), batch)
    if batch == 1:
        obs, keys = obs[0], keys[0]
    return lambda: np.asarray(policy.act(keys, obs))


def latency(sizes: Sizes) -> list[Row]:
    """Time of one action (all denoising steps) for 1 and 10 observations."""
    policies = {
        "base": make_policy(sizes),
        "one skill with gate": make_policy(sizes, skills=1),
        "two skills, 24 candidates judged by critics": make_selecting(sizes),
    }
    calls = {
        f"{name}, {batch} observation{'s' * (batch > 1)}": _acting(policy, batch)
        for name, policy in policies.items()
        for batch in (1, 10)
    }
    times = calls_in_turns(calls, sizes.latency_repeats, 0)
    return [
        make_row("latency", name, [1e3 * t for t in seconds], "ms")
        for name, seconds in times.items()
    ]


def exported(sizes: Sizes) -> list[Row]:
    """Time of one action by `Policy.act` and by exported files, from NumPy to NumPy, in
    calls that follow each other: after a call of another the first one is slower.
    onnxruntime has one thread, and is left out where it is not installed."""
    calls: dict[str, Callable[[], Any]] = {}
    forms = ["jax"]
    if importlib.util.find_spec("jax2onnx") is not None:
        forms.append("onnx")
    for name, policy in {
        "base": make_policy(sizes),
        "two skills with gate": make_policy(sizes, skills=2),
    }.items():
        keys = jax.random.split(jax.random.key(0), 1)
        obs, noise = np.asarray(normal(0, 1, OBS_DIM)), np.asarray(policy.noise(keys))
        calls[f"{name}: Policy.act"] = _acting(policy, 1)
        for form in forms:
            read = exporting.FORMATS[form][1]
            function = read(exporting.convert(policy, form)[0])
            label = f"{name}: {'onnxruntime' if form == 'onnx' else 'jax.export'}"
            calls[label] = _called(function, obs, noise)
    times = calls_in_turns(calls, sizes.repeats, sizes.seconds)
    return [
        make_row("export", name, [1e3 * t for t in seconds], "ms")
        for name, seconds in times.items()
    ]


def _called(function: Callable[..., Any], *args: Any) -> Callable[[], np.ndarray]:
    return lambda: np.asarray(function(*args))


def served(sizes: Sizes) -> list[Row]:
    """Replies of `launch.serve` on this machine to several robots at once, each of
    which waits for its action before it sends the next observation; one observation a
    call of the policy, and several. Robots run on the same cores as the server. None
    where websockets is not installed."""
    if importlib.util.find_spec("websockets") is None:
        return []
    turns: dict[tuple[int, int], list[Played]] = {}
    with tempfile.TemporaryDirectory(prefix="psec_benchmark_") as folder:
        write_library(sizes, folder)
        policy = make_policy(sizes, skills=1)
        form = dataclasses.asdict(GateConfig())
        card = {"skills": ["skill0"], "level": "parameter", "gate": form}
        SkillLibrary.open(folder).add_gate("gate", policy.params.gate, card)
        with contextlib.ExitStack() as stack:
            urls = {
                batch: stack.enter_context(_server(folder, batch))
                for batch in (1, max(sizes.robots))
            }
            for _ in range(sizes.repeats + 1):
                for batch, url in urls.items():
                    for robots in sizes.robots:
                        count = max(1, sizes.replies // robots)
                        played = asyncio.run(_play(url, robots, count))
                        turns.setdefault((batch, robots), []).append(played)
    rows = []
    for (batch, robots), [_, *played] in turns.items():  # the first turn warms up
        who = f"{robots} robot{'s' * (robots > 1)}"
        label = who if batch == 1 else f"{who}, up to {batch} a call"
        for share in (50, 99):
            times = [1e3 * float(np.percentile(p.seconds, share)) for p in played]
            rows.append(make_row("serve", f"{label}: p{share}", times, "ms"))
        rate = [len(p.seconds) / p.total for p in played]
        rows.append(make_row("serve", f"{label}: replies", rate, "1/s"))
    return rows


class Played(NamedTuple):
    """Seconds that robots waited for each reply, and of all of it."""

    seconds: list[float]
    total: float


@contextlib.contextmanager
def _server(library: str, batch: int) -> Iterator[str]:
    """`launch.serve` in a process of its own; its address."""
    command = [sys.executable, "-m", "launch.serve", f"--library={library}"]
    command += ["--gate=gate", "--port=0", f"--max_batch={batch}"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as made:
        assert made.stdout is not None
        line = made.stdout.readline()
        try:
            yield line.split()[-1]
        finally:
            made.terminate()


async def _play(url: str, robots: int, count: int) -> Played:
    """Robots that each wait for `count` actions."""
    import msgpack
    from websockets.asyncio.client import connect

    from psec_jax.serving import encode

    observation = encode(np.asarray(normal(0, OBS_DIM)))
    message = msgpack.packb({"obs": observation})
    seconds: list[float] = []

    async def robot() -> None:
        async with connect(url, compression=None) as connection:
            await connection.recv()
            for _ in range(count):
                began = time.perf_counter()
                await connection.send(message)
                reply = await connection.recv()
                seconds.append(time.perf_counter() - began)
            assert "action" in msgpack.unpackb(reply)

    began = time.perf_counter()
    await asyncio.gather(*(robot() for _ in range(robots)))
    return Played(seconds, time.perf_counter() - began)


def evaluation(sizes: Sizes) -> list[Row]:
    """Environment steps of whole episodes, together and one at a time."""
    count, steps = sizes.episodes, {}
    with VectorEnv(sizes.env, count) as many, VectorEnv(sizes.env, 1) as one:
        policy = make_policy(
            sizes, skills=1, obs_dim=one.obs_dim, action_dim=one.action_dim
        )

        def rollout(name: str, env: VectorEnv) -> None:
            episodes = evaluate(policy.act, sizes.env, env.num_envs, 0, vector_env=env)
            steps[name] = int(episodes.lengths.sum())

        def simulate() -> None:
            slots = np.arange(count)
            action = np.zeros((count, many.action_dim), np.float32)
            many.reset(slots, slots)
            for _ in range(100):
                many.step(slots, action)

        calls = {
            "together": functools.partial(rollout, "together", many),
            "one": functools.partial(rollout, "one", one),
            "simulator": simulate,
        }
        times = calls_in_turns(calls, sizes.evaluation_repeats, 0)
    together = rates(steps["together"], times["together"])
    alone = rates(steps["one"], times["one"])
    simulator = rates(100 * count, times["simulator"])
    row = functools.partial(make_row, "evaluation")
    return [
        row(f"{count} episodes together", together, "steps/s"),
        row("one episode at a time", alone, "steps/s"),
        row(
            f"{count} episodes together over one at a time",
            ratios(together, alone),
            "x",
        ),
        row(f"{count} simulators, no policy", simulator, "steps/s"),
        *_grid_cell(sizes),
        *_by_workers(sizes),
    ]


def _grid_cell(sizes: Sizes) -> list[Row]:
    """Whole episodes by a worker for every core, as tables evaluate a policy."""
    count = sizes.cell_episodes
    with VectorEnv(sizes.env, count) as env:
        policy = make_policy(
            sizes, skills=1, obs_dim=env.obs_dim, action_dim=env.action_dim
        )
        play = functools.partial(
            evaluate, policy.act, sizes.env, count, 0, vector_env=env
        )
        times = calls_in_turns({"play": play}, sizes.evaluation_repeats, 0)
    return [
        make_row("evaluation", f"a grid cell of {count} episodes", times["play"], "s")
    ]


def _by_workers(sizes: Sizes) -> list[Row]:
    """Episodes of a safe task by several processes; none where it is not installed."""
    if importlib.util.find_spec("pybullet") is None:
        return []
    env, count = sizes.safe_env, sizes.episodes
    with contextlib.ExitStack() as stack:
        made = {
            f"{count} episodes of {env}, {workers} worker{'s' * (workers > 1)}": (
                stack.enter_context(VectorEnv(env, count, workers))
            )
            for workers in sizes.workers
        }
        any_of_them = next(iter(made.values()))
        policy = make_policy(
            sizes,
            skills=1,
            obs_dim=any_of_them.obs_dim,
            action_dim=any_of_them.action_dim,
        )
        play = functools.partial(evaluate, policy.act, env, count, 0)
        calls = {
            label: functools.partial(play, vector_env=vector)
            for label, vector in made.items()
        }
        times = calls_in_turns(calls, sizes.evaluation_repeats, 0)
    first, *others = times
    row = functools.partial(make_row, "evaluation")
    return [
        *(row(label, rates(count, times[label]), "episodes/s") for label in times),
        *(
            row(
                f"{label}: over {sizes.workers[0]}",
                ratios(times[first], times[label]),
                "x",
            )
            for label in others
        ),
    ]


def on_device(sizes: Sizes) -> list[Row]:
    """Evaluations with simulators on the device, beside dm_control's in processes, and
    the seconds of their compilation; none where MJX is not installed. A CPU, on which
    the others would take hours, plays the first number of episodes only."""
    if "mujoco-mjx" not in simulator_versions():
        return []
    env = make_on_device(sizes.device_env)
    policy = make_policy(
        sizes, skills=1, obs_dim=env.obs_dim, action_dim=env.action_dim
    )

    def play(count: int, spec: str = sizes.device_env, **options: Any) -> None:
        evaluate(policy.act, spec, count, 0, **options)

    first, calls = {}, {}
    on_cpu = jax.default_backend() == "cpu"
    counts = sizes.device_episodes[: 1 if on_cpu else None]
    for count in counts:
        calls[count] = functools.partial(play, count)
        began = time.perf_counter()
        calls[count]()
        first[count] = time.perf_counter() - began
    processes = sizes.device_env.replace("mjx:", "dm_control:", 1)
    with VectorEnv(processes, MAX_WIDTH) as vector:
        calls[0] = functools.partial(play, MAX_WIDTH, processes, vector_env=vector)
        times = calls_in_turns(
            {str(count): call for count, call in calls.items()},
            sizes.evaluation_repeats,
            0,
        )
    row, steps = functools.partial(make_row, "mjx"), env.max_steps
    label = f"dm_control, {MAX_WIDTH} episodes of {steps} steps"
    rows = [row(label, rates(MAX_WIDTH * steps, times["0"]), "steps/s")]
    for count in counts:
        label = f"mjx, {count} episodes of {steps} steps"
        compiling = first[count] - np.median(times[str(count)])
        rows += [
            row(label, rates(count * steps, times[str(count)]), "steps/s"),
            row(f"{label}: compilation", [compiling], "s"),
        ]
    return rows


def bfloat16(sizes: Sizes) -> list[Row]:
    """Forward passes and sampling with matmul_dtype=bfloat16 against float32."""
    policies = {
        _SHORT[dtype]: make_policy(sizes, skills=1, dtype=dtype) for dtype in DTYPES
    }
    forwards = {
        short: _forward(make_network(policy.config.network, ACTION_DIM))
        for short, policy in policies.items()
    }
    rows = []
    for batch in sorted({10, *sizes.batches}):
        inputs = (normal(0, batch, OBS_DIM), normal(1, batch, ACTION_DIM))
        inputs += (jnp.ones(batch), normal(2, batch, 1))
        calls = {}
        for short, policy in policies.items():
            variables = {
                "params": policy.params.base,
                "skills": policy.params.library,
            }
            calls[f"forward {short}"] = waiting(forwards[short], variables, *inputs)
            calls[f"sampling {short}"] = _acting(policy, batch)
        times = calls_in_turns(calls, sizes.repeats, sizes.seconds)
        for what in ("forward", "sampling"):
            full, half = times[f"{what} f32"], times[f"{what} bf16"]
            label = f"{what}, batch {batch}"
            rows += [
                make_row("bfloat16", f"{label}, f32", [1e3 * t for t in full], "ms"),
                make_row(
                    "bfloat16", f"{label}: speed over f32", ratios(full, half), "x"
                ),
            ]
    return rows


# Start-up comes first: a process inherits the peak memory of the one that starts it,
# and this one is still small then.
GROUPS = {
    "startup": startup,
    "matmul": matmul,
    "train": train,
    "profile": profile,
    "seeds": seeds,
    "streaming": data_in_a_file,
    "steps_per_call": loops,
    "skills": skills,
    "sparse": sparse,
    "library": libraries,
    "support": supports,
    "latency": latency,
    "export": exported,
    "serve": served,
    "evaluation": evaluation,
    "mjx": on_device,
    "bfloat16": bfloat16,
}


def measure(
    sizes: Sizes, groups: Sequence[str] = (), show: Callable[[str], None] = print
) -> dict[str, Any]:
    """Run groups of measurements.

    Args:
      sizes: see `Sizes`.
      groups: keys of `GROUPS`; none is all of them.
      show: gets the table, group by group.

    Returns:
      What is saved: "rows" (see `Row`), "sizes", "flop", "versions" (with commit and
      hardware), "cpu_flags", "load_before" (processes that wanted to run).

    Raises:
      InputError: an unknown group.
    """
    chosen = {name: lookup(GROUPS, name, "group") for name in groups or GROUPS}
    load = os.getloadavg()[0]
    rows: list[Row] = []
    with compilation_cache():
        for name, group in GROUPS.items():
            if name in chosen:
                rows += (measured := group(sizes))
                if measured:
                    show(table(measured))
    machine = versions()
    show(summary(rows, load, machine))
    return {
        "rows": [dataclasses.asdict(row) for row in rows],
        "sizes": dataclasses.asdict(sizes),
        "flop": FLOP,
        "commit": machine["commit"],
        "versions": machine,
        "cpu_flags": list(cpu_flags()),
        "load_before": load,
    }


@contextlib.contextmanager
def compilation_cache() -> Iterator[None]:
    """Compile every program once in the body: each training jits its step anew."""
    with tempfile.TemporaryDirectory(prefix="psec_benchmark_") as folder:
        options: dict[str, Any] = {
            "jax_compilation_cache_dir": folder,
            "jax_persistent_cache_min_compile_time_secs": 0,
            "jax_persistent_cache_min_entry_size_bytes": -1,
        }
        before = {name: getattr(jax.config, name) for name in options}
        try:
            _configure(options)
            yield
        finally:
            _configure(before)


def _configure(options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        jax.config.update(name, value)
    reset_cache()  # JAX opens its cache once, where the first program is compiled


def table(rows: Sequence[Row]) -> str:
    """One group as text: figure, 5 % to 95 % of the turns, target."""
    lines = [rows[0].group]
    for row in rows:
        spread = f"{_number(row.low)}-{_number(row.high)}"
        text = f"  {row.name:<46} {_number(row.value):>6} {row.unit:<8}"
        text += "" if row.low == row.high else spread
        if row.target:
            text = f"{text:<75} {row.target} {'met' if row.met else 'NOT MET'}"
        lines.append(text.rstrip())
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def summary(rows: Sequence[Row], load: float, machine: Mapping[str, Any]) -> str:
    """The machine, and how many targets are met."""
    judged = [row for row in rows if row.met is not None]
    missed = [row for row in judged if not row.met]
    lines = [
        f"machine  {machine['cpu']}, {machine['cores']} cores, {machine['device']}",
        f"versions jax {machine['jax']}, commit {machine['commit']}",
        f"targets  {len(judged) - len(missed)} of {len(judged)} met",
    ]
    lines += [
        f"         not met: {row.name}: {_number(row.value)} {row.unit}, "
        f"target {row.target}"
        for row in missed
    ]
    if any(row.group == "bfloat16" for row in rows) and not fast_bfloat16():
        lines.append("         not judged: bfloat16 (a target of CPUs with AMX only)")
    if load > 0.5:
        lines.append(
            f"warning  the machine was busy before (load {load:.1f}): the figures are "
            "too low, and ratios unsure"
        )
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    """Measure, print, save."""
    no_arguments(argv)
    given = values_of(FLAGS)
    quick, only = given["quick"], given["only"]
    out = given["out"] or (None if quick or only else OUT)
    if out:
        make_room(out)
    result = measure(QUICK if quick else FULL, only)
    if out:
        write_json(out, {"quick": quick} | result)
        print(f"saved    {out}")


if __name__ == "__main__":
    FLAGS = {
        "out": flags.DEFINE_string(
            "out",
            None,
            f"JSON file; default {OUT} for a full run, none for a quick or partial "
            "one, which would overwrite it.",
        ),
        "quick": flags.DEFINE_bool(
            "quick", False, "Few repeats: a check, not figures to quote."
        ),
        "only": flags.DEFINE_list("only", [], f"Groups: {', '.join(GROUPS)}."),
    }
    run(main)
