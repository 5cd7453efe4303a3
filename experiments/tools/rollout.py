r"""Film a base, a skill or a composition, with alpha(s) drawn under the frames.

    # a skill at the strength it was trained at; the base alone; two skills
    python -m experiments.tools.rollout --library=runs/library \
        --env=dm_control:walker-walk \
        --skills=walk --out=walk.mp4
    python -m experiments.tools.rollout --library=runs/library \
        --env=dm_control:walker-stand \
        --out=stand.gif
    python -m experiments.tools.rollout --library=runs/library \
        --env=dm_control:walker-run \
        --skills=walk,run --alpha=8,8 --out=both.mp4

    # a gate brings its skills and its level
    python -m experiments.tools.rollout --library=runs/library \
        --env=dm_control:walker-walk \
        --gate=walk-support --episodes=3 --seed=10000 --out=gate.mp4

Episode e of seed S is the one that `launch.evaluate --seed=S` counts, apart from the
rounding of batched products. The video runs at the speed of the simulated time. An .npz
of the same name has obs, action, reward, cost and alpha of every step.
Without a screen MuJoCo draws through EGL or OSMesa (`MUJOCO_GL`); where neither works
only the .npz is written.
"""

import contextlib
import importlib.util
import io
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from psec_jax import policy as policies
from psec_jax.envs.gl import CannotDraw
from psec_jax.envs.rendering import Renderer
from psec_jax.errors import InputError, lookup
from psec_jax.evaluation import policy_keys, record, successes
from psec_jax.files import reported, write_atomic
from psec_jax.policy import Policy

WIDTH, FRAME_HEIGHT, PANEL_HEIGHT = 640, 304, 176  # mp4 wants multiples of 16
NAMED = 8  # skills with a line and a name of their own; the others are grey
ALPHA_BATCH = 256


class Trace(NamedTuple):
    """N steps of whole episodes, one after another.

    Attributes:
      obs: [N, S], what was observed before each action.
      action: [N, A].
      reward: [N], of each action.
      cost: [N], of each action; 0 where the environment has none.
      alpha: [N, M], weights at each observation; M is 0 for a base alone, and K or
        K + 1 for K skills. Where critics choose, those of the action chosen; where
        layers have weights of their own, the means over the layers.
      names: of the M weights: the skills', with "base" in front where the gate weighs
        the base too.
      lengths: [E], steps of each episode.
      seeds: [E], environment seed of each episode.
      values: [N, C], Q of the action chosen by each critic; C is 0 where none chooses.
      critics: kinds of the C critics.
      success: [E] bool, whether each episode reached the task's goal; [0] where the
        environment does not say.
    """

    obs: np.ndarray
    action: np.ndarray
    reward: np.ndarray
    cost: np.ndarray
    alpha: np.ndarray
    names: tuple[str, ...]
    lengths: np.ndarray
    seeds: np.ndarray
    values: np.ndarray = np.zeros((0, 0), np.float32)
    critics: tuple[str, ...] = ()
    success: np.ndarray = np.zeros(0, bool)

    def episodes(self) -> list[slice]:
        """Rows of each episode."""
        ends = np.cumsum(self.lengths).tolist()
        return [slice(a, b) for a, b in zip([0, *ends[:-1]], ends, strict=True)]


def make_trace(
    policy: Policy, env: str, episodes: int, seed: int, steps: int | None = None
) -> Trace:
    """Roll a policy out and keep every step.

    Args:
      policy: a base, a skill or a composition.
      env: see `psec_jax.envs.make`.
      episodes: E.
      seed: as in `evaluate`.
      steps: keep no more than this many of each episode.

    Raises:
      InputError: numbers below 1, or an environment that cannot be made.
    """
    if steps is not None and steps < 1:
        raise InputError(f"steps is {steps}, expected 1 or more")
    played, data, rows = record(policy.act, env, episodes, seed)
    rows = [slice(r.start, r.stop if steps is None else r.start + steps) for r in rows]
    obs = [data.obs[r] for r in rows]
    if policy.config.chooses:
        steps_of = [np.arange(len(o)) for o in obs]
        episode = np.repeat(np.arange(len(obs)), [len(o) for o in obs])
        keys = policy_keys(np.uint32(seed), episode, np.concatenate(steps_of))
        critics, alpha, values = _choices(policy, keys, np.concatenate(obs))
    else:
        critics, alpha = (), _alpha(policy, np.concatenate(obs))
        values = np.zeros((len(alpha), 0), np.float32)
    return Trace(
        np.concatenate(obs),
        np.concatenate([data.action[r] for r in rows]),
        np.concatenate([data.reward[r] for r in rows]),
        np.concatenate([data.cost[r] for r in rows]),
        alpha,
        _names(policy),
        np.array([len(o) for o in obs]),
        played.seeds,
        values,
        critics,
        np.zeros(0, bool) if played.success is None else played.success,
    )


def _names(policy: Policy) -> tuple[str, ...]:
    gate = policy.config.gate
    if gate is None:
        return ()
    return (("base",) if gate.base_member else ()) + policy.skills


def _choices(
    policy: Policy, keys: Any, obs: np.ndarray
) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
    """What critics chose in each step: their kinds, weights [N, M], values [N, C]."""
    rows = np.minimum(
        np.arange(-(-len(obs) // ALPHA_BATCH) * ALPHA_BATCH), len(obs) - 1
    )
    alpha, values, kinds = [], [], ()
    for part in rows.reshape(-1, ALPHA_BATCH):
        choice = policy.choice(keys[part], obs[part])
        kinds = tuple(choice.values)
        alpha.append(_over_layers(choice.alpha))
        picked = np.arange(ALPHA_BATCH), np.asarray(choice.chosen)
        values.append(
            np.stack([np.asarray(q)[picked] for q in choice.values.values()], axis=1)
        )
    return kinds, *(np.concatenate(x)[: len(obs)] for x in (alpha, values))


def _alpha(policy: Policy, obs: np.ndarray) -> np.ndarray:
    if policy.config.gate is None:
        return np.zeros((len(obs), 0), np.float32)
    # In parts of one size: compiled once, and no N x M table of a neighbour search.
    padded = np.pad(obs, ((0, -len(obs) % ALPHA_BATCH), (0, 0)))
    parts = padded.reshape(-1, ALPHA_BATCH, obs.shape[1])
    return np.concatenate([_over_layers(policy.alpha(part)) for part in parts])[
        : len(obs)
    ]


def _over_layers(alpha: Any) -> np.ndarray:
    """Weights [B, K], of [B, L, K] their means over the layers."""
    alpha = np.asarray(alpha)
    return alpha if alpha.ndim == 2 else alpha.mean(axis=1)


def save_trace(path: Path, trace: Trace, env: str, seed: int) -> Path:
    """Write a trace as .npz, whole or not at all.

    Raises:
      InputError: the file cannot be written.
    """
    content = io.BytesIO()
    np.savez_compressed(content, **trace._asdict(), env=env, seed=seed)
    write_atomic(path, content.getvalue())
    return path


class Panel:
    """alpha(s) and reward of one episode as a plot that grows with the steps.

    Matplotlib draws it twice, finished and empty; a frame is the finished one up to its
    step and the empty one from there on.
    """

    def __init__(self, trace: Trace, rows: slice, step_seconds: float) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(
            (WIDTH / 100, PANEL_HEIGHT / 100), dpi=100, layout="constrained"
        )
        canvas = FigureCanvasAgg(figure)
        reward_axes = figure.subplots()
        alpha, reward = trace.alpha[rows], trace.reward[rows]
        time = np.arange(len(reward)) * step_seconds
        reward_axes.set_xlabel("time (s)", fontsize=9, labelpad=1)
        reward_axes.set_ylabel("reward", fontsize=9)
        reward_axes.tick_params(labelsize=8)
        reward_axes.set_ylim(min(0, reward.min()), 1.05 * max(1, reward.max()))
        reward_axes.set_xlim(0, max(time[-1], step_seconds))
        colour = "0.7" if trace.names else "black"
        lines = reward_axes.plot(time, reward, color=colour, lw=1, label="reward")
        if trace.names:
            lines = [*_plot_alpha(reward_axes, time, alpha, trace.names), *lines]
        shown = [line for line in lines if not str(line.get_label()).startswith("_")]
        figure.legend(
            handles=shown, fontsize=8, labelspacing=0.2, loc="outside right upper"
        )
        self._full = _pixels(canvas)
        # Pixels of a step: the layout is settled only after the first drawing.
        at = reward_axes.transData.transform([(t, 0.0) for t in time])[:, 0]
        self._column = np.clip(at.round().astype(int), 0, WIDTH - 1)
        box = reward_axes.get_window_extent()
        top, bottom = PANEL_HEIGHT - box.y1, PANEL_HEIGHT - box.y0
        self._span = slice(round(top), round(bottom))
        for line in lines:
            line.set_visible(False)
        self._empty = _pixels(canvas)

    def at(self, step: int) -> np.ndarray:
        """The plot as far as `step`: uint8 [PANEL_HEIGHT, WIDTH, 3]."""
        column = self._column[step]
        image = self._empty.copy()
        image[:, : column + 1] = self._full[:, : column + 1]
        image[self._span, column] = 0
        return image


def by_size(alpha: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Columns of weights [N, M]: the `NAMED` largest in their order, and the others."""
    largest = np.argsort(-np.abs(alpha).mean(0), kind="stable")
    return np.sort(largest[:NAMED]), largest[NAMED:]


def _plot_alpha(
    reward_axes: Any, time: np.ndarray, alpha: np.ndarray, names: Sequence[str]
) -> list[Any]:
    """Lines of the weights on the left, with the reward's axis moved to the right."""
    from matplotlib import colormaps

    axes = reward_axes.twinx()
    reward_axes.yaxis.tick_right()
    reward_axes.yaxis.set_label_position("right")
    axes.yaxis.tick_left()
    axes.yaxis.set_label_position("left")
    axes.set_ylabel("alpha", fontsize=9)
    axes.tick_params(labelsize=8)
    low, high = min(0.0, alpha.min()), max(0.0, alpha.max())
    margin = 0.05 * max(high - low, 1e-3)
    axes.set_ylim(low - margin, high + margin)
    named, others = by_size(alpha)
    lines = axes.plot(time, alpha[:, others], color="0.8", lw=0.5)
    for line, number in zip(lines, range(len(others)), strict=True):
        line.set_label(f"_{number}" if number else f"{len(others)} others")
    colours = colormaps["tab10"]
    for i, k in enumerate(named):
        # Grey is the reward's and the others'.
        colour = colours(i if i < 7 else i + 1)
        lines += axes.plot(time, alpha[:, k], color=colour, lw=1.5, label=names[k])
    return lines[len(others) :] + lines[: len(others)]


def _pixels(canvas: Any) -> np.ndarray:
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _frames(
    trace: Trace, renderer: Renderer, every: int, title: str
) -> Iterator[np.ndarray]:
    """The video's images: the scene with two lines of text, and the plot under it."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(16)
    count = len(trace.lengths)
    for e, rows in enumerate(trace.episodes()):
        panel = Panel(trace, rows, renderer.step_seconds)
        reward = trace.reward[rows]
        gained = np.append(0.0, np.cumsum(reward, dtype=np.float64))
        seed = int(trace.seeds[e])
        scenes = renderer.frames(seed, trace.obs[rows], trace.action[rows], every)
        head = f"{title}   episode {e + 1} of {count}" if count > 1 else title
        for i, scene in enumerate(scenes):
            step = i * every
            image = Image.fromarray(scene)
            text = (
                f"time {step * renderer.step_seconds:6.2f} s   step {step:4d}   "
                f"reward {reward[step]:5.2f}   return {gained[step]:7.1f}"
            )
            ImageDraw.Draw(image).multiline_text(
                (8, 6),
                f"{text}\n{head}",
                "white",
                font,
                stroke_width=2,
                stroke_fill="black",
            )
            yield np.concatenate([np.asarray(image), panel.at(step)])


def _write_mp4(path: Path, fps: float, images: Iterator[np.ndarray]) -> None:
    import imageio_ffmpeg

    # Not imageio's writer: it does not see that ffmpeg failed, as on a full disk.
    first = next(images)
    size = f"{first.shape[1]}x{first.shape[0]}"
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", size, "-r", str(fps)]
    target = ["-c:v", "libx264", "-pix_fmt", "yuv420p", str(path)]
    program = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-loglevel", "error"]
    with subprocess.Popen(
        [*program, *source, "-i", "-", *target],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
    ) as encoder:
        assert encoder.stdin is not None and encoder.stderr is not None
        # Where it ends early, its message follows on stderr.
        with contextlib.suppress(BrokenPipeError), encoder.stdin:
            for image in itertools.chain([first], images):
                encoder.stdin.write(image.tobytes())
        lines = encoder.stderr.read().decode(errors="replace").strip().splitlines()
    if encoder.returncode:
        reason = lines[-1] if lines else f"exit status {encoder.returncode}"
        raise InputError(f"cannot write {path}: ffmpeg: {reason}")


def _write_gif(path: Path, fps: float, images: Iterator[np.ndarray]) -> None:
    from PIL import Image

    first, *others = map(Image.fromarray, images)
    content = io.BytesIO()
    options = {"append_images": others, "duration": 1000 / fps, "loop": 0}
    first.save(content, "GIF", save_all=True, **options)
    path.write_bytes(content.getvalue())


WRITERS: dict[str, Callable[[Path, float, Iterator[np.ndarray]], None]] = {
    ".mp4": _write_mp4,
    ".gif": _write_gif,
}
PACKAGES = ("imageio_ffmpeg", "matplotlib", "PIL")


def check_packages() -> None:
    """Raise `CannotDraw` where a package that drawing needs is missing."""
    if missing := [p for p in PACKAGES if importlib.util.find_spec(p) is None]:
        raise CannotDraw(
            f"cannot draw: {', '.join(missing)} not installed; "
            "pip install 'psec_jax[plot,video]'"
        )


def write_video(path: Path, fps: float, images: Iterator[np.ndarray]) -> None:
    """Make a video, whole or not at all.

    Args:
      path: ends in .mp4 or .gif; replaced when the new one is complete.
      fps: frames a second.
      images: one or more, uint8 [H, W, 3] with H and W even.

    Raises:
      CannotDraw: a package is missing.
      InputError: another suffix, or a file that cannot be written.
    """
    write = lookup(WRITERS, path.suffix, "video suffix")
    check_packages()
    # ffmpeg chooses the format by the suffix, so it stays at the end.
    temporary = path.with_name(f"{path.stem}.tmp-{os.getpid()}{path.suffix}")
    with reported(f"write {path}"):
        try:
            write(temporary, fps, images)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def draw(
    trace: Trace, env: str, out: Path, every: int = 2, title: str | None = None
) -> Path:
    """Make the video of a trace: every `every`-th step, at the simulation's speed.

    Args:
      trace: made by `make_trace` in `env`.
      env: the environment.
      out: ends in .mp4 or .gif; replaced when the new one is complete.
      every: steps from one frame to the next.
      title: printed on every frame; default the environment and the skills.

    Raises:
      CannotDraw: no OpenGL library works, or a package is missing.
      InputError: another suffix, an environment that does not repeat itself, or a
        file that cannot be written.
    """
    if title is None:
        many = len(trace.names) > 4
        names = f"{len(trace.names)} skills" if many else " + ".join(trace.names)
        title = f"{env}   {names or 'base'}"
    with Renderer(env, FRAME_HEIGHT, WIDTH) as renderer:
        fps = 1 / (every * renderer.step_seconds)
        write_video(out, fps, _frames(trace, renderer, every, title))
    return out


def film(
    policy: Policy,
    env: str,
    out: str | Path,
    *,
    episodes: int = 1,
    seed: int = 0,
    every: int = 2,
    steps: int | None = None,
    title: str | None = None,
) -> tuple[Path, Trace]:
    """Roll a policy out, keep its trace beside `out`, and make the video.

    Args:
      policy: a base, a skill or a composition.
      env: see `psec_jax.envs.make`.
      out: the video, .mp4 or .gif; the trace has its name and .npz.
      episodes: whole episodes, filmed one after another.
      seed: of initial states and the policy's noise, as in `evaluate`.
      every: steps from one frame to the next.
      steps: film no more than this many of each episode.
      title: on every frame; default the environment and the skills.

    Returns:
      The video's path and the trace.

    Raises:
      CannotDraw: only the trace was written.
      InputError: see `make_trace` and `draw`.
    """
    out = Path(out)
    lookup(WRITERS, out.suffix, "video suffix")
    if every < 1:
        raise InputError(f"every is {every}, expected 1 or more")
    trace = make_trace(policy, env, episodes, seed, steps)
    with reported(f"write {out}"):
        out.parent.mkdir(parents=True, exist_ok=True)
    save_trace(out.with_suffix(".npz"), trace, env, seed)
    return draw(trace, env, out, every, title), trace


def try_video(
    library: str | Path,
    *,
    env: str,
    out: str | Path,
    skills: Sequence[str] = (),
    alpha: Sequence[float] | None = None,
    gate: str | None = None,
    level: str = "parameter",
    **options: Any,
) -> Path | None:
    """The video of a policy of a library; where this machine cannot draw, None, and a
    line on standard error that says why.

    Args:
      library: its directory.
      env: see `film`.
      out: see `film`.
      skills: see `psec_jax.policy.compose`, as for the next three.
      alpha: fixed weights.
      gate: a gate's name.
      level: of fixed weights.
      **options: of `film`.

    Raises:
      InputError: anything else that is wrong.
    """
    policy = policies.compose(library, skills, alpha=alpha, gate=gate, level=level)
    try:
        return film(policy, env, out, **options)[0]
    except CannotDraw as error:
        print(f"no video: {error}", file=sys.stderr)
        return None


def main(argv: Sequence[str]) -> None:
    """Film as the flags say, and print one line about it."""
    no_arguments(argv)
    given = values_of(FLAGS)
    chosen = {name: given.pop(name) for name in ("library", "skills", "gate", "level")}
    policy = policies.compose(**chosen, alpha=floats("alpha", given.pop("alpha")))
    path, trace = film(policy, **given)
    returns = [float(trace.reward[rows].sum()) for rows in trace.episodes()]
    print(
        f"{path}: return {', '.join(f'{r:.1f}' for r in returns)}"
        f"{successes(trace.success if len(trace.success) else None)}; trace in "
        f"{path.with_suffix('.npz')}"
    )


if __name__ == "__main__":
    from psec_jax.cli import define_env, flags_of, floats, no_arguments, run, values_of

    chosen = {
        "library": flags.DEFINE_string(
            "library", "runs/library", "Directory of the skill library."
        ),
        "env": define_env(),
        "skills": flags.DEFINE_list(
            "skills", [], "Names of skills; none is the base alone."
        ),
        "alpha": flags.DEFINE_list(
            "alpha",
            None,
            "Fixed weights: of each skill at the parameter level, of the base and each "
            "skill at the others.",
        ),
        "gate": flags.DEFINE_string(
            "gate", None, "Name of a gate; it brings its skills."
        ),
        "level": flags.DEFINE_string(
            "level", "parameter", "Of fixed weights: parameter, noise or action."
        ),
    }
    FLAGS = flags_of(film, chosen, omit=["policy"])
    run(main)
