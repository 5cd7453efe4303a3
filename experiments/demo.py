"""The main job from nothing, in minutes: what `make demo` runs.

    python -m experiments.demo

Collects expert demonstrations of walker stand, walk and run, pretrains a base on stand,
learns walk and run as LoRA skills from 10 demonstrations each, trains gates and a
from-scratch baseline, evaluates all of them in the simulator and prints the table. It
then draws the bar figure, films one composition, and says where everything lies.
Started again it goes on where it stopped.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from experiments import figures, table2
from experiments.configs.dmc_walker import get_config
from experiments.tools import rollout
from psec_jax.cli import no_arguments, run


def main(argv: Sequence[str]) -> None:
    """Quick preset, one seed, then table, figure and video."""
    no_arguments(argv)
    config = get_config("quick")
    folder, root = Path(FLAGS["results"].value), Path(FLAGS["workdir"].value)
    table2.run_cells(config, root, folder, print)
    text = table2.write_table(folder)
    figure = figures.draw_table2(folder)
    place = table2.Place(config, root, config.table.seeds[0])
    gate = table2.gate_name("Support", "S->W")
    video = rollout.try_video(
        place.library,
        gate=gate,
        env=table2.ENV.format("walk"),
        seed=config.evaluation.seed,
        out=folder / "walk.mp4",
    )
    print(f"\n{text}")
    print(f"table    {folder / 'table2.md'} (.csv, .json; raw returns in {folder}/raw)")
    print(f"figure   {figure}")
    if video is not None:
        print(f"video    {video}")
    print(f"library  {place.library}")
    print(f"         python -m launch.library list --library={place.library}")


if __name__ == "__main__":
    FLAGS = {
        # Not results/demo, which is committed: its cells would be taken for done.
        "results": flags.DEFINE_string(
            "results", "runs/demo/results", "Folder of results."
        ),
        "workdir": flags.DEFINE_string("workdir", "runs/demo", "Folder of runs."),
    }
    run(main)
