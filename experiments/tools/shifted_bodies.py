r"""Draw plain and shifted simulators side by side.

    # a picture of how an episode begins
    python -m experiments.tools.shifted_bodies --env=gymnasium:HalfCheetah-v5 \
        --env=gymnasium:Walker2d-v5 --shift=thigh_size:2 \
        --out=results/dynamics/bodies.png

    # a video: one policy and one seed in the plain simulator and in two others
    python -m experiments.tools.shifted_bodies --env=gymnasium:HalfCheetah-v5 \
        --shift=thigh_size:2 --shift=friction:0.25,gravity:2 --out=bodies.mp4

Every --env has a row: the plain simulator, and a panel for each --shift. A panel whose
episode has ended keeps its last frame.
"""

import contextlib
import io
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from absl import flags

from experiments.tools.rollout import WRITERS, check_packages, write_video
from psec_jax import envs
from psec_jax.envs.rendering import Renderer
from psec_jax.envs.shifts import MARK, QUANTITIES
from psec_jax.errors import InputError, lookup
from psec_jax.files import make_room, write_atomic
from psec_jax.workflows.collection import Actor, play, streams

PANEL = 480  # pixels, as Gymnasium draws
COLOURS = 128  # of a picture
SHIFT_HELP = (
    "QUANTITY:FACTOR, such as thigh_size:2, several of one panel separated by commas; "
    f"of {', '.join(QUANTITIES)}"  # absl adds that it may be repeated
)


def draw(
    env: Sequence[str],
    shift: Sequence[str],
    out: str | Path,
    policy: str = "random",
    seed: int = 0,
    every: int = 1,
    steps: int = 200,
) -> Path:
    """Make the picture or the video.

    Args:
      env: one or more, see `psec_jax.envs.make`; a row each.
      shift: see `psec_jax.envs.shifted`; a panel each, after the plain one.
      out: picture (.png) or video (.mp4 or .gif) to write.
      policy: who acts in a video: random, or an expert file (.npz).
      seed: of the initial state and the policy's noise.
      every: steps from one frame to the next.
      steps: film no more than this many of the episode.

    Raises:
      CannotDraw: no OpenGL library works, or a package is missing.
      InputError: another suffix, numbers below 1, an environment or a policy that
        cannot be made, or a video of environments that differ in their steps.
    """
    out = Path(out)
    lookup({".png": None, **WRITERS}, out.suffix, "suffix")
    for name, number in {"every": every, "steps": steps}.items():
        if number < 1:
            raise InputError(f"{name} is {number}, expected 1 or more")
    if seed < 0:
        raise InputError(f"seed is {seed}, expected 0 or more")
    rows = [[envs.shifted(e), *(envs.shifted(e, s) for s in shift)] for e in env]
    check_packages()
    make_room(out)
    with contextlib.ExitStack() as stack:
        renderers = [
            stack.enter_context(Renderer(spec, PANEL, PANEL)) for spec in sum(rows, [])
        ]
        if out.suffix == ".png":
            steps = 1
        elif len(seconds := {r.step_seconds for r in renderers}) > 1:
            raise InputError(
                f"steps take {sorted(seconds)} s in these environments, expected one "
                "length for a video; make one of each"
            )
        panels = [_panel(r, policy, seed, every, steps) for r in renderers]
        images = _grids(panels, len(rows))
        if out.suffix == ".png":
            write_atomic(out, _png(next(images)))
        else:
            write_video(out, 1 / (every * renderers[0].step_seconds), images)
    return out


def _panel(
    renderer: Renderer, policy: str, seed: int, every: int, steps: int
) -> Iterator[np.ndarray]:
    """Frames of the episode, with the environment's name on them."""
    from PIL import Image, ImageDraw, ImageFont

    episode = play(renderer.spec, [Actor(policy)], seed)[0].dataset
    reset_seed, _ = streams(seed, 0)
    scenes = renderer.frames(
        reset_seed, episode.obs[:steps], episode.action[:steps], every
    )
    name, _, tail = renderer.spec.partition(":")[2].partition(MARK)
    for scene in scenes:
        image = Image.fromarray(scene)
        ImageDraw.Draw(image).multiline_text(
            (8, 6),
            f"{name}\n{tail or 'plain'}",
            "white",
            ImageFont.load_default(20),
            stroke_width=2,
            stroke_fill="black",
        )
        yield np.asarray(image)


def _grids(panels: Sequence[Iterator[np.ndarray]], rows: int) -> Iterator[np.ndarray]:
    """One image of all panels for every frame of the longest."""
    frames: list[np.ndarray] = []
    for new in itertools.zip_longest(*panels):
        frames = [frames[i] if n is None else n for i, n in enumerate(new)]
        grid = np.stack(frames).reshape(rows, -1, PANEL, PANEL, 3)
        yield np.concatenate([np.concatenate(row, 1) for row in grid])


def _png(image: np.ndarray) -> bytes:
    from PIL import Image

    content = io.BytesIO()
    Image.fromarray(image).quantize(COLOURS).save(content, "PNG", optimize=True)
    return content.getvalue()


def main(argv: Sequence[str]) -> None:
    """Draw as the flags say, and print the file's name."""
    no_arguments(argv)
    print(draw(**values_of(FLAGS)))


if __name__ == "__main__":
    from psec_jax.cli import ENV_HELP, flags_of, no_arguments, run, values_of

    FLAGS = flags_of(
        draw,
        {
            "env": flags.DEFINE_multi_string("env", None, ENV_HELP, required=True),
            "shift": flags.DEFINE_multi_string("shift", [], SHIFT_HELP),
        },
    )
    run(main)
