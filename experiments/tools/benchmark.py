"""Speed of this machine and of every stage, against the targets.

    python -m experiments.tools.benchmark
    python -m experiments.tools.benchmark --quick --only=matmul,train

Measures start-up and memory, the rate of matrix products, training steps of every
stage, several seeds as one program, data in a file, several steps as one call, the cost
of composing skills, the latency of an action, evaluation, and bfloat16; prints a table
and saves it as JSON. A full run takes some eight minutes of two CPU cores, on which
nothing else should run. --quick repeats less and starts with fewer transitions: it
checks the benchmark, its figures are not to be quoted. Evaluation by several processes
needs `make setup-safe`, and is left out without it.

Rates and ratios come from measurements taken in turns (A B A B ...), because the speed
of a machine drifts: a figure is the median over the turns, a ratio the median of the
ratios within each turn.
"""

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
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import programs, stages
from experiments.configs.dmc_walker import get_config
from psec_jax import tree
from psec_jax.agents import critics as critic_agent
from psec_jax.agents import gate as gate_agent
from psec_jax.agents import offline as offline_agent
from psec_jax.agents import pretrain as pretrain_agent
from psec_jax.agents import skill as skill_agent
from psec_jax.agents.common import TrainData, Transitions, init_state, rows_of
from psec_jax.agents.critics import CriticConfig
from psec_jax.agents.offline import Frozen, OfflineConfig, OfflineData, OfflineState
from psec_jax.cli import no_arguments, run
from psec_jax.composition import PolicyConfig, PolicyParams
from psec_jax.data import d4rl
from psec_jax.envs.vector import VectorEnv
from psec_jax.errors import lookup
from psec_jax.evaluation import evaluate
from psec_jax.files import reported, write_json
from psec_jax.gating import GateConfig, init_gate
from psec_jax.lora import dense_layers, init_skill
from psec_jax.networks.denoiser import (
    Denoiser,
    NetworkConfig,
    init_base,
    make_network,
)
from psec_jax.policy import Policy
from psec_jax.process import ProcessConfig
from psec_jax.runtime import sharding, streaming
from psec_jax.runtime.run import versions
from psec_jax.types import Dataset, Normaliser, Params

ROOT = Path(__file__).resolve().parents[2]
OUT = "results/benchmark.json"
OBS_DIM, ACTION_DIM = 24, 6  # of the walker
RANK, STRENGTH = 8, 16.0
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
      loop: steps in one call.
      skills: numbers K of skills composed.
      transitions: in the file that the start-up is measured with.
      start_steps: gradient steps of that run.
      rows: transitions the other stages draw from.
      episodes: evaluated together.
      evaluation_repeats: turns of the evaluation.
      env: environment of the evaluation.
      safe_env: environment of the evaluation by several processes.
      workers: their numbers.
      network: sizes of the denoiser.
    """

    repeats: int = 7
    seconds: float = 0.7
    latency_repeats: int = 300
    matmul: int = 2048
    batches: tuple[int, ...] = (256, 2048)
    seeds: tuple[int, ...] = (1, 2, 4, 8)
    loop: int = 8
    skills: tuple[int, ...] = (1, 4, 16, 64)
    transitions: int = 1_000_000
    start_steps: int = 20
    rows: int = 100_000
    episodes: int = 10
    evaluation_repeats: int = 5
    env: str = "dm_control:walker-walk"
    safe_env: str = "bullet:SafetyBallRun-v0"
    workers: tuple[int, ...] = (1, 2, 4)
    network: NetworkConfig = dataclasses.field(default_factory=NetworkConfig)


FULL = Sizes()
QUICK = Sizes(
    repeats=2,
    seconds=0.05,
    latency_repeats=10,
    transitions=100_000,
    start_steps=2,
    evaluation_repeats=1,
)


@dataclass(frozen=True)
class Target:
    """A bound on a figure."""

    sense: str
    bound: float

    def met(self, value: float) -> bool:
        """Whether the figure keeps the bound."""
        return value >= self.bound if self.sense == ">=" else value <= self.bound


TARGETS = {
    ("train", "base, batch 2048: share of f32 matmul"): Target(">=", 75),
    ("train", "both skills and critics, batch 256: over a base step"): Target("<=", 2),
    ("train", "both skills and critics, batch 2048: over a base step"): Target("<=", 2),
    ("seeds", "8 bases, batch 256: time over one"): Target("<=", 2),
    ("startup", "first gradient step, 1000000 transitions"): Target("<=", 15),
    ("startup", "peak memory, 1000000 transitions"): Target("<=", 2),
    ("skills", "K = 16, batch 2048: cost over the base"): Target("<=", 2.0),
    ("skills", "K = 64, batch 2048: cost over the base"): Target("<=", 4.5),
    ("evaluation", "10 episodes together over one at a time"): Target(">=", 5),
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
      target: the bound asked for, or None.
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
    if target is None or not judged(group):
        return Row(group, name, value, low, high, unit)
    asked = f"{target.sense} {target.bound:g}"
    return Row(group, name, value, low, high, unit, asked, target.met(value))


def judged(group: str) -> bool:
    """Whether targets of the group apply here: several seeds cost an accelerator less
    than as many times one, a CPU is busy with one."""
    if group == "seeds":
        return jax.default_backend() != "cpu"
    return group != "bfloat16" or fast_bfloat16()


def interleave(
    calls: Mapping[str, Callable[[], Any]], repeats: int, seconds: float
) -> Times:
    """Seconds of one call of each, measured in turns.

    Args:
      calls: each returns arrays to wait for; called once before, to compile.
      repeats: turns.
      seconds: aimed at for each in a turn; 0 times single calls.

    Returns:
      [repeats] for each name.
    """
    counts = {}
    for name, call in calls.items():
        jax.block_until_ready(call())
        began = time.perf_counter()
        jax.block_until_ready(call())
        elapsed = time.perf_counter() - began
        counts[name] = max(1, round(seconds / elapsed))
    times: Times = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            began = time.perf_counter()
            for _ in range(counts[name]):
                result = call()
            jax.block_until_ready(result)
            times[name].append((time.perf_counter() - began) / counts[name])
    return times


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
    """Whether the bfloat16 target applies: it is asked of CPUs with AMX."""
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
    times = interleave(calls, sizes.repeats, sizes.seconds / 2)
    return [
        make_row("matmul", name, rates(flop / 1e9, times[name]), "GFLOP/s")
        for name, (_, flop) in products.items()
    ]


@dataclass(frozen=True)
class Stage:
    """One stage's training, ready to be stepped.

    Attributes:
      update: (state, data, key) -> (state, metrics).
      state: at step 0.
      data: what it draws from.
      flop_per_example: of one step; see `FLOP`.
    """

    update: Callable[..., Any]
    state: Any
    data: Any
    flop_per_example: float


FLOP = {
    "base": "6 N B: forward, input gradients and weight gradients, 2 N B each",
    "skill": "4 N B + 4 M B + 2 r N: no weight gradients of the frozen base, whose sum "
    "with the skill is formed once",
    "gate": "4 N B + 4 M B + 6 G B: no weight gradients of base and skills",
    "both skills and critics": "twice a skill's + (32 Q + 16 V) B: target Q, Q and V "
    "forward and backward, V at the next state",
    "N": "weights of the base's dense layers",
    "M": f"weights of the adapters (one skill of rank {RANK})",
    "G": "weights of the gate's dense layers",
    "Q": "weights of one Q of the critics",
    "V": "weights of one V",
    "B": "batch size",
}


OFFLINE = "both skills and critics"


def make_stages(sizes: Sizes, batch: int) -> dict[str, Stage]:
    """Every stage as the commands train it, on random data."""
    network, diffusion = sizes.network, ProcessConfig()
    obs = normal(0, sizes.rows, OBS_DIM)
    action = jnp.tanh(normal(1, sizes.rows, ACTION_DIM))
    policy = make_policy(sizes, skills=1)
    base, gate = policy.params.base, policy.params.gate
    n, m = weights_of(base), tree.size(policy.params.library)
    g = weights_of(gate["head"])
    made = {}
    for dtype in DTYPES:
        agent = pretrain_agent.PretrainConfig(
            dataclasses.replace(network, matmul_dtype=dtype),
            diffusion,
            batch_size=batch,
        )
        made["base" if dtype == "float32" else "base (bf16)"] = Stage(
            functools.partial(pretrain_agent.update, agent),
            init_state(agent.optimiser, base),
            TrainData(obs, action),
            6.0 * n,
        )
    agent = skill_agent.SkillConfig(network, diffusion, batch_size=batch, rank=RANK)
    made["skill"] = Stage(
        functools.partial(skill_agent.update, agent),
        init_state(agent.optimiser, make_skill(base)),
        TrainData(obs, action, base),
        _skill_flop(n, m, batch),
    )
    agent = gate_agent.GateTrainConfig(policy.config, batch_size=batch)
    made["gate"] = Stage(
        functools.partial(gate_agent.update, agent),
        gate_agent.init(agent, gate),
        TrainData(obs, action, policy.params),
        4.0 * n + 4.0 * m + 6.0 * g,
    )
    made[OFFLINE] = _offline_stage(sizes, batch, base)
    return made


def _offline_stage(sizes: Sizes, batch: int, base: Params) -> Stage:
    """A reward skill and a safety skill with their critics, in one program."""
    skills = skill_agent.SkillConfig(
        sizes.network, ProcessConfig(), batch_size=batch, rank=RANK
    )
    critics = CriticConfig(batch_size=batch)
    agent = OfflineConfig(skills, ("reward", "safety"), critics)
    rows = sizes.rows
    transitions = Transitions(
        obs=normal(0, rows, OBS_DIM),
        action=jnp.tanh(normal(1, rows, ACTION_DIM)),
        reward=normal(2, rows),
        h=jnp.where(normal(3, rows) > 1, 25.0, -1.0),
        next_obs=normal(4, rows, OBS_DIM),
        mask=jnp.ones(rows),
    )

    def fresh() -> Any:
        return critic_agent.init(critics, jax.random.key(0), OBS_DIM, ACTION_DIM)

    q = randomised(lambda: fresh().q.params)
    v = randomised(lambda: fresh().v.params)
    q_weights = sum(x[0, 0].size for x in jax.tree.leaves(q) if x.ndim > 3)
    v_weights = sum(x[0].size for x in jax.tree.leaves(v) if x.ndim > 2)
    state = OfflineState(
        init_state(skills.optimiser, make_library(base, 2)),
        critic_agent.CriticState(
            init_state(critics.q_optimiser, q), init_state(critics.v_optimiser, v)
        ),
    )
    n, m = weights_of(base), tree.size(make_skill(base))
    return Stage(
        functools.partial(offline_agent.update, agent),
        state,
        OfflineData(transitions, Frozen(base)),
        2 * _skill_flop(n, m, batch) + 32.0 * q_weights + 16.0 * v_weights,
    )


def _skill_flop(n: int, m: int, batch: int) -> float:
    """Of one example of a skill's step; see `FLOP`."""
    return 4.0 * n + 4.0 * m + 2.0 * RANK * n / batch


def compile_step(
    stage: Stage, datas: Iterator[Any] | None = None
) -> tuple[Callable[[], Any], float]:
    """A call that makes one step (it keeps the state), and the seconds to compile.

    Each call takes the next of `datas`, by default the stage's own.
    """
    datas = datas or itertools.repeat(stage.data)

    def step(state: Any, data: Any, key: jax.Array) -> tuple[Any, dict]:
        # Several members stand at the same step.
        step = jnp.ravel(state.step)[0]
        return stage.update(state, data, jax.random.fold_in(key, step))

    # The step donates its input, as in training.
    state = jax.tree.map(lambda x: jnp.array(x, x.dtype), stage.state)
    key = jax.random.key(1)
    began = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=0).lower(state, stage.data, key).compile()
    seconds = time.perf_counter() - began

    def call() -> Any:
        nonlocal state
        state, metrics = compiled(state, next(datas), key)
        return metrics

    return call, seconds


def train(sizes: Sizes) -> list[Row]:
    """Gradient steps of every stage, in turns with the f32 product."""
    rows = []
    square, square_flop = _square(sizes.matmul, "float32")
    for batch in sizes.batches:
        made = make_stages(sizes, batch)
        calls, compiled = {"matmul": square}, {}
        for name, stage in made.items():
            calls[name], compiled[name] = compile_step(stage)
        times = interleave(calls, sizes.repeats, sizes.seconds)
        matmul_rates = rates(square_flop, times["matmul"])
        for name, stage in made.items():
            flops = rates(stage.flop_per_example * batch, times[name])
            label = f"{name}, batch {batch}"
            share = [100 * r for r in ratios(flops, matmul_rates)]
            rows += [
                make_row("train", label, rates(1, times[name]), "steps/s"),
                make_row(
                    "train", f"{label}: rate", [f / 1e9 for f in flops], "GFLOP/s"
                ),
                make_row("train", f"{label}: share of f32 matmul", share, "%"),
                make_row("train", f"{label}: compilation", [compiled[name]], "s"),
            ]
        over = ratios(times[OFFLINE], times["base"])
        label = f"{OFFLINE}, batch {batch}: over a base step"
        rows.append(make_row("train", label, over, "x"))
    return rows


def several(stage: Stage, count: int) -> Stage:
    """`count` members of a stage as one program, as `training.train_together` runs it;
    the data are shared."""

    def update(state: Any, data: Any, key: jax.Array) -> tuple[Any, dict]:
        keys = jax.random.split(key, count)
        return jax.vmap(stage.update, (0, None, 0))(state, data, keys)

    state = tree.stack([stage.state] * count)
    return dataclasses.replace(stage, update=update, state=state)


def seeds(sizes: Sizes) -> list[Row]:
    """A step of several bases as one program, in turns with a step of one."""
    rows = []
    on_cpu = jax.default_backend() == "cpu"
    for batch in sizes.batches[:1] if on_cpu else sizes.batches:
        base = make_stages(sizes, batch)["base"]
        calls = {
            str(count): compile_step(base if count == 1 else several(base, count))[0]
            for count in sizes.seeds
        }
        times = interleave(calls, sizes.repeats, sizes.seconds)
        one = times[str(sizes.seeds[0])]
        for count in sizes.seeds[1:]:
            label = f"{count} bases, batch {batch}: time over one"
            rows.append(make_row("seeds", label, ratios(times[str(count)], one), "x"))
    return rows


def data_in_a_file(sizes: Sizes) -> list[Row]:
    """A step on batches from a file, in turns with one on data in memory.

    The file is in the system's page cache, as it was written just before.
    """
    rows = []
    for batch in sizes.batches:
        base = make_stages(sizes, batch)["base"]
        with tempfile.TemporaryDirectory() as folder:
            stage, batches = _in_a_file(base, Path(folder) / "rows.npy")
            with contextlib.closing(batches):
                calls = {
                    "memory": compile_step(base)[0],
                    "file": compile_step(stage, batches)[0],
                }
                times = interleave(calls, sizes.repeats, sizes.seconds)
        label = f"base, batch {batch}: from a file over from memory"
        over = ratios(times["file"], times["memory"])
        rows.append(make_row("streaming", label, over, "x"))
    return rows


def _in_a_file(
    base: Stage, path: Path
) -> tuple[Stage, Generator[jax.Array, None, None]]:
    """The stage on rows of its data, and such rows, as `training` draws them."""
    index = functools.partial(pretrain_agent.index, *base.update.args)
    table = streaming.write_table(rows_of(base.data), path)
    stream = programs.make_stream(base.data, index, table)
    layout, key = sharding.Layout(None, 1), jax.random.key(0)
    batches = streaming.batches([stream], [key], layout, 0, sys.maxsize)

    def update(state: Any, rows: jax.Array, key: jax.Array) -> tuple[Any, dict]:
        return base.update(state, stream.data(stream.rest, rows), key)

    return dataclasses.replace(base, update=update, data=next(batches)), batches


def repeated(stage: Stage, count: int) -> Stage:
    """`count` steps of a stage in one call, as `training` runs run.steps_per_call: the
    count is known only at run time, and metrics are summed."""

    def update(state: Any, data: Any, key: jax.Array) -> tuple[Any, dict]:
        drawn_from, count = data
        _, metrics = jax.eval_shape(stage.update, state, drawn_from, key)

        def one(_: jax.Array, carry: tuple[Any, dict]) -> tuple[Any, dict]:
            state, sums = carry
            step_key = jax.random.fold_in(key, state.step)
            state, metrics = stage.update(state, drawn_from, step_key)
            return state, {name: sums[name] + metrics[name] for name in sums}

        zeros = {name: jnp.zeros(x.shape, x.dtype) for name, x in metrics.items()}
        return jax.lax.fori_loop(0, count, one, (state, zeros))

    return dataclasses.replace(
        stage, update=update, data=(stage.data, jnp.int32(count))
    )


def loops(sizes: Sizes) -> list[Row]:
    """Several steps as one compiled loop, in turns with single ones."""
    rows = []
    for batch in sizes.batches:
        base = make_stages(sizes, batch)["base"]
        calls = {
            "single": compile_step(base)[0],
            "looped": compile_step(repeated(base, sizes.loop))[0],
        }
        times = interleave(calls, sizes.repeats, sizes.seconds)
        singly = [sizes.loop * seconds for seconds in times["single"]]
        label = f"base, batch {batch}: {sizes.loop} steps in one call over single calls"
        over = ratios(times["looped"], singly)
        rows.append(make_row("steps_per_call", label, over, "x"))
    return rows


def _fresh(function: str, *args: Any) -> Any:
    """What a function of this module returns in a fresh process; plain values only."""
    code = (
        "import json, sys; from experiments import benchmark; "
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
    """A file of random transitions in the walker's shape, episodes of 1000 steps."""
    generator = np.random.default_rng(0)
    states = generator.standard_normal((count + 1, OBS_DIM), np.float32)
    action = generator.random((count, ACTION_DIM), np.float32) * 2 - 1
    d4rl.save(
        path,
        Dataset(
            obs=states[:-1],
            action=action,
            reward=np.zeros(count, np.float32),
            cost=np.zeros(count, np.float32),
            next_obs=states[1:],
            terminal=np.zeros(count, bool),
            timeout=np.arange(1, count + 1) % 1000 == 0,
        ),
        {},
    )


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
    config = get_config("paper")
    config.network.update(network)
    config.base.update({"episodes": 0, "steps": steps, "batch_size": batch})
    result = stages.pretrain(
        config,
        workdir=f"{folder}/run",
        library=f"{folder}/library",
        seed=0,
        data=f"{folder}/demos.hdf5",
        evaluate_after=False,
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
        del network["dropout"]  # the stage's own
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
) -> Policy:
    """A random policy: the base alone, or skills under the paper's gate."""
    network = dataclasses.replace(sizes.network, dropout=0.0, matmul_dtype=dtype)
    key = jax.random.key(0)
    base = randomised(lambda: init_base(network, key, obs_dim, action_dim))
    normaliser = Normaliser(jnp.zeros(obs_dim), jnp.ones(obs_dim))
    config = PolicyConfig(network, ProcessConfig(), action_dim)
    if not skills:
        return Policy(config, PolicyParams(base, normaliser))
    gate_form = GateConfig()
    strength = jnp.full(skills, STRENGTH)
    gate = randomised(lambda: init_gate(gate_form, key, obs_dim, strength))
    return Policy(
        dataclasses.replace(config, gate=gate_form),
        PolicyParams(base, normaliser, make_library(base, skills), strength, gate),
        tuple(f"skill{k}" for k in range(skills)),
    )


def make_skill(base: Params) -> Params:
    """A random skill."""
    return randomised(lambda: init_skill(jax.random.key(0), base, RANK))


def make_library(base: Params, count: int) -> Params:
    """Random skills: leaves [K, ...]."""
    keys = jax.random.split(jax.random.key(0), count)
    return randomised(lambda: jax.vmap(lambda k: init_skill(k, base, RANK))(keys))


def randomised(make: Callable[[], Params]) -> Params:
    """Random numbers in the shapes of `make()`, which is not run: its compilation would
    take longer than the measurements."""
    generator = np.random.default_rng(0)

    def leaf(like: jax.ShapeDtypeStruct) -> jax.Array:
        scale = like.shape[-2] ** -0.5 if len(like.shape) > 1 else 0.1
        return jnp.asarray(scale * generator.standard_normal(like.shape), like.dtype)

    return jax.tree.map(leaf, jax.eval_shape(make))


def _forward(net: Denoiser) -> Callable[..., jax.Array]:
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
    base = policy.params.base
    forward = _forward(make_network(policy.config.network, ACTION_DIM))
    rows, n = [], weights_of(base)
    libraries = {count: make_library(base, count) for count in sizes.skills}
    for batch in sizes.batches:
        inputs = (normal(0, batch, OBS_DIM), normal(1, batch, ACTION_DIM))
        inputs += (jnp.ones(batch),)
        calls = {"base": waiting(forward, {"params": base}, *inputs)}
        for count, library in libraries.items():
            variables = {"params": base, "skills": library}
            alpha = normal(2, batch, count)
            calls[str(count)] = waiting(forward, variables, *inputs, alpha)
        times = interleave(calls, sizes.repeats, sizes.seconds)
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
    }
    calls = {
        f"{name}, {batch} observation{'s' * (batch > 1)}": _acting(policy, batch)
        for name, policy in policies.items()
        for batch in (1, 10)
    }
    times = interleave(calls, sizes.latency_repeats, 0)
    return [
        make_row("latency", name, [1e3 * t for t in seconds], "ms")
        for name, seconds in times.items()
    ]


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
        times = interleave(calls, sizes.evaluation_repeats, 0)
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
        *_by_workers(sizes),
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
        times = interleave(calls, sizes.evaluation_repeats, 0)
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
        times = interleave(calls, sizes.repeats, sizes.seconds)
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
    "seeds": seeds,
    "streaming": data_in_a_file,
    "steps_per_call": loops,
    "skills": skills,
    "latency": latency,
    "evaluation": evaluation,
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
    for name, group in GROUPS.items():
        if name in chosen:
            found = group(sizes)
            show(table(found))
            rows += found
    found = versions()
    show(summary(rows, load, found))
    return {
        "rows": [dataclasses.asdict(row) for row in rows],
        "sizes": dataclasses.asdict(sizes),
        "flop": FLOP,
        "commit": found["commit"],
        "versions": found,
        "cpu_flags": list(cpu_flags()),
        "load_before": load,
    }


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


def summary(rows: Sequence[Row], load: float, found: Mapping[str, Any]) -> str:
    """The machine, and how many targets are met."""
    judged = [row for row in rows if row.met is not None]
    missed = [row for row in judged if not row.met]
    lines = [
        f"machine  {found['cpu']}, {found['cores']} cores, {found['device']}",
        f"versions jax {found['jax']}, commit {found['commit']}",
        f"targets  {len(judged) - len(missed)} of {len(judged)} met",
    ]
    lines += [
        f"         not met: {row.name}: {_number(row.value)} {row.unit}, "
        f"asked {row.target}"
        for row in missed
    ]
    if any(row.group == "bfloat16" for row in rows) and not fast_bfloat16():
        lines.append("         not judged: bfloat16 (asked of CPUs with AMX only)")
    if load > 0.5:
        lines.append(
            f"warning  the machine was busy before (load {load:.1f}): the figures are "
            "too low, and ratios unsure"
        )
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    """Measure, print, save."""
    no_arguments(argv)
    quick, only, out = (FLAGS[name].value for name in ("quick", "only", "out"))
    if out is None and not (quick or only):
        out = OUT
    if out:
        with reported(f"make the folder of {out}"):
            Path(out).parent.mkdir(parents=True, exist_ok=True)
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
