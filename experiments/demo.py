"""The main job from nothing, in minutes: what `make demo` runs.

    python -m experiments.demo

Collects expert demonstrations of walker stand, walk and run, pretrains a base on stand,
learns walk and run as LoRA skills from 10 demonstrations each, trains gates and a
from-scratch baseline, evaluates all of them in the simulator and prints the table. It
then draws the bar figure, films one composition, and names the files. Started again it
goes on where it stopped.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from experiments import figures, grid, table2
from experiments.configs import dmc_walker
from experiments.tools import rollout
from psec_jax.cli import no_arguments, run


def main(argv: Sequence[str]) -> None:
    """Quick preset, one seed, then table, figure and video."""
    no_arguments(argv)
    job = dmc_walker.job("quick")
    folder, root = Path(FLAGS["results"].value), Path(FLAGS["workdir"].value)
    grid.run(table2.TABLE, job, root, folder, methods=job.table.methods)
    text = table2.write_table(folder)
    figure = figures.draw("table2", folder)
    library = root / f"seed{job.table.seeds[0]}" / "library"
    video = rollout.try_video(
        library,
        gate=table2.gate_name("Support", "S->W"),
        env=table2.ENV.format("walk"),
        seed=job.evaluation.seed,
        out=folder / "walk.mp4",
    )
    print(f"\n{text}")
    print(f"table    {folder / 'table2.md'} (.csv, .json; raw returns in .jsonl)")
    print(f"figure   {figure}")
    if video is not None:
        print(f"video    {video}")
    print(f"library  {library}")
    print(f"         python -m launch.library list --library={library}")


if __name__ == "__main__":
    FLAGS = {
        # Not results/demo, which is committed: its results would count as finished.
        "results": flags.DEFINE_string(
            "results", "runs/demo/results", "Folder of results."
        ),
        "workdir": flags.DEFINE_string("workdir", "runs/demo", "Folder of runs."),
    }
    run(main)
