"""What single changes bring to the walker's compositions with a support.

    python -m experiments.walker_changes --preset=standard

rolls out the row "Support" of Table 2 as it is and with one thing changed at a time, on
start states of its own (those that tables report stay unseen), and writes raw results
and tables to results/walker_changes/. Rows share what they train where its job is
equal. Finished runs and results are kept: start it again after a stop. With --reported
the start states are those of Table 2, for what was chosen on the others, and the files
are walker_reported's.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from absl import flags

from experiments import grid, results, table2, tables
from experiments.configs import dmc_walker
from experiments.grid import Cell, Made, Method, Order, Table
from experiments.style import Style
from experiments.table2 import SKILL, Composition
from psec_jax.cli import no_arguments
from psec_jax.composition import act, weights
from psec_jax.errors import InputError
from psec_jax.evaluation import MAX_WIDTH
from psec_jax.gating import GateConfig
from psec_jax.policy import Policy
from psec_jax.runtime import platform
from psec_jax.workflows import Job

STARTS = {"evaluation.seed": Job().evaluation.seed + 1}


class Change(NamedTuple):
    """One thing that is changed.

    Attributes:
      sampling: of the composed policy, see `policy.compose`.
      job: of what is made, by dotted name.
      hold: steps for which a skill keeps acting once the support has chosen it.
    """

    sampling: Mapping[str, Any] = {}
    job: Mapping[str, Any] = {}
    hold: int = 1


COLD = {"temperature": 0.0}
QUIET = {"temperature": 0.0, "start_scale": 0.0}
NOISY = {"data.action_noise": 0.2}
RANK = {"skill.rank": 64}
LONGER = {"skill.steps": 24_000}
CHUNKS = {"process.horizon": 4, "process.execute": 4}
WIDER_BASE = {"base.episodes": 1000}
WIDER = {"support.quantile": 1.0}
CHANGES = {
    "as it is": Change(),
    "temperature 0": Change(COLD),
    "start 0": Change({"start_scale": 0.0}),
    "no noise": Change(QUIET),
    "narrower support": Change(job={"support.quantile": 0.9}),
    "wider support": Change(job=WIDER),
    "wider support at temperature 0": Change(COLD, WIDER),
    "skills held 5 steps": Change(hold=5),
    "skills held 25 steps": Change(hold=25),
    "demonstrations with noise": Change(job=NOISY),
    "demonstrations with noise at temperature 0": Change(COLD, NOISY),
    "noise in demonstrations alone": Change(QUIET, NOISY),
    "noisy demonstrations with wider support": Change(job=NOISY | WIDER),
    "noisy demonstrations with wider support at temperature 0": Change(
        COLD, NOISY | WIDER
    ),
    "rank 64": Change(job=RANK),
    "rank 64 at temperature 0": Change(COLD, RANK),
    "twice the steps": Change(job=LONGER),
    "twice the steps at temperature 0": Change(COLD, LONGER),
    "chunks of 4": Change(job=CHUNKS),
    "chunks of 4 at temperature 0": Change(COLD, CHUNKS),
    "base of 1000": Change(job=WIDER_BASE),
    "base of 1000 at temperature 0": Change(COLD, WIDER_BASE),
    "base of 1000 and twice the steps": Change(job=WIDER_BASE | LONGER),
    "base of 1000 and twice the steps at temperature 0": Change(
        COLD, WIDER_BASE | LONGER
    ),
}

# What is made anew with a field of a section; with others everything.
ANEW = {"skill": "skill", "support": "gate"}


class Held:
    """A policy whose weights, where they are not all zero, stay as they are for some
    steps, with the memory that `Policy.act` does not have: every row of the batch plays
    one episode, and all of them begin with the first call."""

    def __init__(self, policy: Policy, steps: int) -> None:
        self.policy, self.steps = policy, steps
        self.alpha: Any = None
        self.left: Any = None

    def __call__(self, keys: Any, obs: Any) -> jax.Array:
        """Actions [B, A] for keys [B] and raw observations [B, S]."""
        if self.left is None:
            self.left = jnp.zeros(len(obs), jnp.int32)
            self.alpha = jnp.zeros((len(obs), len(self.policy.skills)))
        action, self.alpha, self.left = _act_held(
            self.policy.config,
            self.policy.params,
            keys,
            jnp.asarray(obs),
            self.alpha,
            self.left,
            self.steps,
        )
        return action


@functools.partial(jax.jit, static_argnums=0)
def _act_held(config, params, keys, obs, alpha, left, steps):
    fixed = dataclasses.replace(config, gate=GateConfig(head="constant"))

    def one(key, obs, alpha, left):
        alpha = jnp.where(left > 0, alpha, weights(config, params, obs))
        started = jnp.where(jnp.any(alpha != 0), steps, 1)
        held = params._replace(gate={"head": {"alpha": alpha}})
        left = jnp.where(left > 0, left, started) - 1
        return act(fixed, held, key, obs), alpha, left

    return jax.vmap(one)(keys, obs, alpha, left)


def make(change: Change, cell: Cell) -> list[Made]:
    """The row "Support" of Table 2 with one change."""

    def place(level: str) -> str:
        return "-".join(
            f"{name}-{value}"
            for name, value in change.job.items()
            if ANEW.get(name.partition(".")[0], "base") == level
        )

    cell = dataclasses.replace(cell, job=cell.job.changed(change.job))
    cell = dataclasses.replace(cell.within(place("base")), variant=place("skill"))
    form = Composition(head="constant", support="neighbour", sampling=change.sampling)
    made = table2.make_composition(form, cell)
    if change.hold == 1:
        return made
    if platform.current().overlap or cell.job.evaluation.episodes > MAX_WIDTH:
        raise InputError(
            f"{cell.method}: expected a CPU, where the policy is called once a step, "
            f"and at most {MAX_WIDTH} episodes, which begin together"
        )
    policies = [cast(Any, one.act).__self__ for one in made]
    return [Made(Held(policy, change.hold)) for policy in policies]


TABLE = dataclasses.replace(
    table2.TABLE,
    name="walker_changes",
    settings={
        name: dataclasses.replace(setting, changes=STARTS)
        for name, setting in table2.SETTINGS.items()
    },
    methods={
        name: Method(functools.partial(make, change), SKILL, Style("green", "D"))
        for name, change in CHANGES.items()
    },
    orders=[
        Order(name, "as it is", "return") for name in CHANGES if name != "as it is"
    ],
    paper={},
)


# What was chosen there, on the start states that tables report.
REPORTED = dataclasses.replace(TABLE, name="walker_reported", settings=table2.SETTINGS)


def shown(folder: Path, table: Table = TABLE) -> tables.Shown:
    """The table of the raw results in a folder."""
    raws = results.read_all(table.path(folder))
    starts = "those of Table 2" if table is REPORTED else "of no other table"
    note = (
        f"Returns. {tables.INTERVALS}; start states {starts}. Skills at their training "
        "strength under the nearest-neighbour support."
    )
    summary = tables.summarise(table, raws)
    return tables.Shown(table, raws, note, summary, table.name)


def write_table(folder: Path, table: Table = TABLE) -> str:
    """NAME.md, .csv and .json from the raw results alone."""
    return tables.write(shown(folder, table), folder)


def main(argv: Sequence[str]) -> None:
    """Measure what is missing, then write the table."""
    no_arguments(argv)
    folder = Path(FLAGS["results"].value)
    job, root = dmc_walker.job(FLAGS["preset"].value), grid.run_root(FLAGS, table2.RUNS)
    table = REPORTED if FLAGS["reported"].value else TABLE
    if grid.measure(FLAGS, table, job, root, folder):
        print(write_table(folder, table))


if __name__ == "__main__":
    from psec_jax.cli import run

    FLAGS: Mapping[str, Any] = {
        **grid.define_flags("results/walker_changes", table2.RUNS),
        "reported": flags.DEFINE_bool(
            "reported", False, "Play from the start states of Table 2."
        ),
    }
    run(main)
