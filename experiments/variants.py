"""Rows of Table 2 with one thing changed, to see what it brings.

    python -m experiments.variants --variant=unscaled

trains and rolls out the variant's rows as `experiments.table2` does. Raw results are in
results/VARIANT/table2.jsonl, and table2.md, .csv and .json are made from those alone
(--tables_only).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from absl import flags

from experiments import grid, table2
from experiments.configs import dmc_walker
from psec_jax.cli import no_arguments
from psec_jax.errors import lookup

RUNS = "runs/variants"


@dataclass(frozen=True)
class Variant:
    """What is changed, and the part of Table 2 that is measured with it.

    Attributes:
      changes: fields of the job, by dotted name.
      settings: of Table 2.
      methods: of Table 2.
    """

    changes: Mapping[str, Any]
    settings: Sequence[str] = ("S->W",)
    methods: Sequence[str] = field(default_factory=lambda: tuple(table2.METHODS))


VARIANTS = {
    # Neither the paper nor the released code scales observations.
    "unscaled": Variant(
        {"normaliser": "none"}, methods=("Base", "Scratch", "NSEC", "PSEC")
    ),
}


def main(argv: Sequence[str]) -> None:
    """Measure what is missing, then write the table."""
    no_arguments(argv)
    name = FLAGS["variant"].value
    variant = lookup(VARIANTS, name, "variant")
    folder = Path(FLAGS["results"].value or f"results/{name}")
    table = dataclasses.replace(
        table2.TABLE,
        settings={
            key: dataclasses.replace(
                table2.SETTINGS[key], changes=variant.changes, folder=name
            )
            for key in variant.settings
        },
        methods={row: table2.METHODS[row] for row in variant.methods},
    )
    job, root = dmc_walker.job(FLAGS["preset"].value), grid.run_root(FLAGS, RUNS)
    if grid.measure(FLAGS, table, job, root, folder):
        print(table2.write_table(folder))


if __name__ == "__main__":
    from psec_jax.cli import run

    FLAGS: Mapping[str, Any] = grid.define_flags(None, RUNS) | {
        "variant": flags.DEFINE_string(
            "variant", "unscaled", f"One of {', '.join(VARIANTS)}."
        ),
    }
    run(main)
