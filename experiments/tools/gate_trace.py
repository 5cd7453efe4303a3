r"""Draw the weights of a gate over an episode, and how they go with the cost.

    python -m experiments.tools.gate_trace --gate=PSEC \
        --library=runs/dsrl/standard/OfflineBallRun-v0/seed0/library
    python -m experiments.tools.gate_trace --library=runs/library --gate=walk-psec \
        --env=dm_control:walker-run --episodes=5 --out=results/walker_trace

plays --episodes whole episodes of the gate's composition in the simulator (that of the
gate's card, unless --env names one) and keeps every step: reward, cost, the weight of
each skill (where layers have weights of their own, their mean), and the events that can
be read off the observation. From those raw files alone (OUT/raw) it makes
OUT/ENV-GATE_seedS

  .png, .svg  weights, events, cost and reward over the first episode, with frames
              above where the simulator can draw; where critics choose, the weights
              chosen and Q of the action by each critic
  .md, .json  Pearson's r of each weight with the cost of the same step, with that of
              the next --ahead steps and with each event, over all episodes

A correlation with something constant is undefined, and the table says so. Existing
traces are kept; --plot_only makes the figures and tables of all of them again, without
a library or a simulator. Another --seed shows another episode.
"""

import io
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from numpy.lib.stride_tricks import sliding_window_view

from experiments import plots
from experiments.tools.rollout import Trace, make_trace
from psec_jax.envs import metadrive
from psec_jax.envs.rendering import Renderer
from psec_jax.envs.workers import WorkerDied
from psec_jax.errors import InputError
from psec_jax.files import read_json, reported, write_atomic, write_json
from psec_jax.library import SkillLibrary
from psec_jax.policy import compose
from psec_jax.runtime.run import versions
from psec_jax.workflows.demonstrations import card_env

HEIGHT, WIDTH = 180, 240  # of a frame, pixels
DECIMALS = 6  # of raw numbers
BEND = 11  # coordinate of the bend's radius, of the lane to the next checkpoint
LIDAR_RANGE, NEAR = 50.0, 10.0  # m


class Event(NamedTuple):
    """Something that can be read off an observation.

    Attributes:
      rule: when it happens, in words.
      quantity: what is measured, with its unit.
      measure: observations [N, S] -> [N].
      happens: [N] -> bool [N].
    """

    rule: str
    quantity: str
    measure: Callable[[np.ndarray], np.ndarray]
    happens: Callable[[np.ndarray], np.ndarray]


# By the prefix of an environment's name. The road says where a turn is: safe cars turn
# too slowly, and careless ones twitch too much, for a threshold on the heading's rate.
EVENTS: dict[str, dict[str, Event]] = {
    "metadrive": {
        "turn": Event(
            "turn: the lane bends",
            "radius of the lane's bend, as observed (0: straight)",
            lambda obs: obs[:, BEND],
            lambda radius: radius > 0,
        ),
        "vehicle near": Event(
            f"vehicle within {NEAR:g} m",
            "least lidar distance (m)",
            lambda obs: LIDAR_RANGE * obs[:, -metadrive.RAYS :].min(1),
            lambda distance: distance < NEAR,
        ),
    }
}


class Correlation(NamedTuple):
    """Pearson's r of a weight with something else.

    Attributes:
      weight: the skill's name.
      other: what it is compared with.
      steps: over how many steps.
      r: None where it is undefined.
      undefined: why, in words; else None.
    """

    weight: str
    other: str
    steps: int
    r: float | None
    undefined: str | None


def play(
    library: str | Path,
    gate: str,
    folder: str | Path,
    env: str | None = None,
    episodes: int = 1,
    seed: int = 0,
) -> Path:
    """Play episodes, and keep every step and the frames of the first episode.

    Args:
      library: directory of the skill library.
      gate: name of a gate; it brings its skills and its level.
      folder: OUT; the raw file and the frames are in its subdirectory raw.
      env: simulator, such as bullet:SafetyBallRun-v0; default that of the gate's card.
      episodes: whole episodes; the first is drawn, all are correlated.
      seed: of initial states and the policy's noise, as in `evaluate`.

    Returns:
      The raw file; an existing one is kept.

    Raises:
      InputError: an unknown gate, no environment, bad numbers, or a raw file of the
        same name with other content.
    """
    _, card = SkillLibrary.open(library).load_gate(gate)
    env = env or card_env(card, f"gate {gate!r}")
    if env is None:
        raise InputError(f"env: the card of gate {gate!r} names none; give one")
    identity = {
        "env": env,
        "gate": gate,
        "seed": seed,
        "episode_count": episodes,
        "base_fingerprint": card["base_fingerprint"],
        "skill_fingerprints": card["skill_fingerprints"],
        "gate_fingerprint": card["fingerprint"],
    }
    name = re.sub(r"[^A-Za-z0-9+]+", "-", f"{env}_{gate}").strip("-")
    path = Path(folder) / "raw" / f"{name}_seed{seed}.json"
    if path.exists():
        _check_same(path, identity)
        return path
    trace = make_trace(compose(library, gate=gate), env, episodes, seed)
    raw = identity | {"level": card["level"], "head": card["gate"]["head"]}
    with reported(f"make {path.parent}"):
        path.parent.mkdir(parents=True, exist_ok=True)
    film(trace, env, _film_path(path))
    write_json(path, raw | as_json(trace, env) | {"versions": versions()})
    return path


def _check_same(path: Path, identity: Mapping[str, Any]) -> None:
    raw = read_json(path)
    differing = [name for name, value in identity.items() if raw.get(name) != value]
    if differing:
        raise InputError(
            f"{path}: holds a trace with other {', '.join(differing)}; choose another "
            "--out, or delete it"
        )


def as_json(trace: Trace, env: str) -> dict[str, Any]:
    """The "rules" of events and the "episodes" of a raw file.

    Args:
      trace: of the environment.
      env: its name, by whose prefix the events are chosen.
    """
    known = EVENTS.get(env.partition(":")[0], {})
    episodes = []
    for rows, seed in zip(trace.episodes(), trace.seeds, strict=True):
        cost = trace.cost[rows]
        measured = {e.quantity: e.measure(trace.obs[rows]) for e in known.values()}
        happens = {n: e.happens(measured[e.quantity]) for n, e in known.items()}
        episodes.append(
            {
                "seed": int(seed),
                "t": list(range(len(cost))),
                "reward": _numbers(trace.reward[rows]),
                "cost": _numbers(cost),
                "alpha": {
                    name: _numbers(trace.alpha[rows, k])
                    for k, name in enumerate(trace.names)
                },
                "values": {
                    kind: _numbers(trace.values[rows, c])
                    for c, kind in enumerate(trace.critics)
                },
                "measured": {
                    name: _numbers(values) for name, values in measured.items()
                },
                "events": {"cost": (cost > 0).tolist()}
                | {name: happened.tolist() for name, happened in happens.items()},
            }
        )
    rules = {"cost": "cost > 0"} | {name: event.rule for name, event in known.items()}
    return {"rules": rules, "episodes": episodes}


def _numbers(values: np.ndarray) -> list[float]:
    return values.astype(float).round(DECIMALS).tolist()


def _film_path(raw: Path) -> Path:
    return raw.with_name(f"{raw.stem}_frames.png")


def film_steps(length: int) -> range:
    """The steps of an episode whose frames are drawn: middles of equal spans."""
    half = -(-length // (2 * plots.FRAMES))
    return range(half, length, 2 * half)


def film(trace: Trace, env: str, path: Path) -> None:
    """Draw frames of the first episode side by side into a .png; where this machine
    cannot draw there is no file, and one line on standard error says why."""
    from PIL import Image

    with reported(f"remove {path}"):
        path.unlink(missing_ok=True)
    rows, steps = trace.episodes()[0], film_steps(int(trace.lengths[0]))
    try:
        with Renderer(env, HEIGHT, WIDTH) as renderer:
            every = renderer.frames(
                int(trace.seeds[0]), trace.obs[rows], trace.action[rows], steps.start
            )
            # Of the steps 0, h, 2h, 3h, ... those at h, 3h, ...
            shown = [frame for i, frame in enumerate(every) if i % 2]
    except (InputError, WorkerDied) as error:
        print(f"no frames: {error}", file=sys.stderr)
        return
    if not shown:  # an episode of one step
        return
    content = io.BytesIO()
    Image.fromarray(np.concatenate(shown, 1)).save(content, "PNG")
    write_atomic(path, content.getvalue())


def _read_film(path: Path, length: int) -> list[tuple[int, np.ndarray]]:
    """Steps and frames; none where there is no file."""
    from PIL import Image

    if not path.exists():
        return []
    with reported(f"read {path}"), Image.open(path) as image:
        strip = np.asarray(image.convert("RGB"))
    steps = film_steps(length)
    expected = (HEIGHT, WIDTH * len(steps))
    if strip.shape[:2] != expected:
        raise InputError(
            f"{path}: an image of {strip.shape[0]} x {strip.shape[1]} pixels, expected "
            f"{expected[0]} x {expected[1]}; delete it to do without frames"
        )
    frames = np.split(strip, len(steps), axis=1)
    return list(zip(steps, frames, strict=True))


def correlate(raw: Mapping[str, Any], ahead: int) -> list[Correlation]:
    """Every weight against the cost and every event, over all steps of a raw file.

    Args:
      raw: a raw file.
      ahead: N of "the next N steps", which begin with the present one; only steps that
        have all of them count.

    Raises:
      InputError: `ahead` below 1.
    """
    if ahead < 1:
        raise InputError(f"ahead is {ahead}, expected 1 or more")
    episodes = raw["episodes"]
    others = {"cost of the step": [np.array(e["cost"]) for e in episodes]}
    if ahead > 1:
        others[f"cost of the next {ahead} steps"] = [
            _sums_ahead(np.array(e["cost"]), ahead) for e in episodes
        ]
    for name, rule in raw["rules"].items():
        others[rule] = [np.array(e["events"][name], float) for e in episodes]
    correlations = []
    for other, values in others.items():
        y = np.concatenate(values)
        for weight in episodes[0]["alpha"]:
            pairs = zip(episodes, values, strict=True)
            x = np.concatenate([e["alpha"][weight][: len(v)] for e, v in pairs])
            correlations.append(Correlation(weight, other, len(y), *pearson(x, y)))
    return correlations


def _sums_ahead(cost: np.ndarray, ahead: int) -> np.ndarray:
    if len(cost) < ahead:
        return np.zeros(0)
    return sliding_window_view(cost, ahead).sum(1).round(DECIMALS)


def pearson(x: np.ndarray, y: np.ndarray) -> tuple[float | None, str | None]:
    """r of a weight x [N] with y [N]; where it is undefined, None and the reason."""
    if len(x) < 2:
        return None, f"{_count(len(x), 'step')}, too few"
    for head, values in (("the weight is ", x), ("", y)):
        if values.min() == values.max():
            return None, f"{head}always {values[0]:g} in {len(x)} steps"
    return float(np.corrcoef(x, y)[0, 1]), None


def markdown(raw: Mapping[str, Any], correlations: Sequence[Correlation]) -> str:
    """The correlations as a page: a row for each other thing, a column a weight."""
    episodes = raw["episodes"]
    weights = list(episodes[0]["alpha"])
    returns = [sum(e["reward"]) for e in episodes]
    costs = [sum(e["cost"]) for e in episodes]
    lines = [
        f"# Gate {raw['gate']} in {raw['env']}",
        "",
        f"{_count(len(episodes), 'episode')} of seed {raw['seed']}; return "
        f"{np.mean(returns):.1f}, cost {np.mean(costs):.1f} an episode. Pearson's r of "
        "the weight of each skill with",
        "",
        f"| | steps | {' | '.join(weights)} |",
        "|" + "---|" * (2 + len(weights)),
    ]
    for other in dict.fromkeys(c.other for c in correlations):
        row = [c for c in correlations if c.other == other]
        cells = [_number(c) for c in row]
        lines.append(f"| {other} | {row[0].steps} | {' | '.join(cells)} |")
    reasons: dict[tuple[str, str], list[str]] = {}
    for c in correlations:
        if c.undefined:
            reasons.setdefault((c.other, c.undefined), []).append(c.weight)
    lines += [""] if reasons else []
    for (other, reason), names in reasons.items():
        lines.append(f"- Undefined for {', '.join(names)} with {other}: {reason}.")
    return "\n".join(lines) + "\n"


def _number(c: Correlation) -> str:
    return "undefined" if c.r is None else f"{c.r:+.2f}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _caption(raw: Mapping[str, Any], correlations: Sequence[Correlation]) -> str:
    count = len(raw["episodes"])
    shown = f"Episode 1 of {count}" if count > 1 else "One episode"
    sentences = [f"{shown}, seed {raw['seed']}; shaded: cost > 0."]
    # The first two are of the cost.
    for other in list(dict.fromkeys(c.other for c in correlations))[:2]:
        row = [c for c in correlations if c.other == other]
        cells = [f"{c.weight} {_number(c)}" for c in row]
        steps = _count(row[0].steps, "step")
        sentences.append(f"Pearson's r with the {other} ({steps}): {', '.join(cells)}.")
    return " ".join(sentences)


def write(path: Path, folder: str | Path, ahead: int) -> str:
    """Make the figure and the table of one raw file.

    Args:
      path: the raw file.
      folder: OUT.
      ahead: see `correlate`.

    Returns:
      The table, as markdown.

    Raises:
      InputError: a file that is no trace or cannot be read or written, or `ahead`
        below 1.
    """
    folder, raw = Path(folder), read_json(path)
    if "episodes" not in raw or "rules" not in raw:
        raise InputError(f"{path}: not a trace of experiments.tools.gate_trace")
    correlations = correlate(raw, ahead)
    frames = _read_film(_film_path(path), len(raw["episodes"][0]["t"]))
    figure = plots.gate_trace(raw, _caption(raw, correlations), frames)
    plots.save(figure, folder, path.stem)
    text = markdown(raw, correlations)
    write_atomic(folder / f"{path.stem}.md", text)
    table = {"correlations": [c._asdict() for c in correlations]}
    write_json(folder / f"{path.stem}.json", table)
    return text


def main(argv: Sequence[str]) -> None:
    """Play what is missing, then draw from the raw files."""
    no_arguments(argv)
    given = values_of(FLAGS)
    folder, ahead = Path(given["folder"]), given.pop("ahead")
    if given.pop("plot_only"):
        paths = sorted((folder / "raw").glob("*.json"))
        if not paths:
            raise InputError(f"{folder}: no raw/*.json; play an episode first")
    else:
        if given["gate"] is None:
            gates = ", ".join(SkillLibrary.open(given["library"]).gates()) or "none"
            raise InputError(
                f"gate: give the name of one; {given['library']} has {gates}"
            )
        paths = [play(**given)]
    for path in paths:
        print(write(path, folder, ahead))
        print(f"figure   {folder / path.stem}.png")


if __name__ == "__main__":
    from psec_jax.cli import flags_of, no_arguments, run, values_of

    defined = {
        "folder": flags.DEFINE_string(
            "out",
            "results/dsrl/gate_trace",
            "Directory of raw files, figures and tables.",
        ),
        "ahead": flags.DEFINE_integer(
            "ahead", 10, "N of the next N steps whose cost is also compared.", 1
        ),
        "plot_only": flags.DEFINE_bool(
            "plot_only", False, "Only draw again, from the raw files."
        ),
    }
    FLAGS = flags_of(play, defined, library="runs/library", gate=None, seed=10_000)
    run(main)
