r"""A skill library as one page to look at in a browser, with nothing to download.

    python -m experiments.report --library=runs/library --out=report.html

    # with the tables of raw results, and what `launch.library analyse` has written
    python -m experiments.report --library=runs/demo/seed0/library \
        --results=runs/demo/results --analysis=runs/analysis --out=report.html

The page has the cards of base, skills and gates, what was made for what, returns with
their intervals, an episode of each gate as weights over time beside its video, how the
skills relate, and the commands that train them again. A gate plays one episode in the
simulator that its card names: --gates=A,B plays only these, --gates= none. Where this
machine cannot draw, and with --videos=0, there are weights alone. The same input gives
the same page. The page loads nothing, and nothing of a card can run in it.
"""

import base64
import contextlib
import json
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from experiments import (
    continual,
    dynamics_shift,
    reproduce,
    results,
    seams,
    table1,
    table2,
    tables,
    tasks,
)
from experiments.page import Cell, Html, el, joined, page, scrolled, table
from experiments.tools.rollout import Trace, by_size, make_trace, write_video
from psec_jax.analysis import LAYERS, MAPS
from psec_jax.cards import form_text, is_text, list_of
from psec_jax.envs.gl import CannotDraw
from psec_jax.envs.rendering import Renderer
from psec_jax.envs.workers import WorkerDied
from psec_jax.errors import InputError, lookup
from psec_jax.evaluation import successes
from psec_jax.files import read_json, write_atomic
from psec_jax.library import SkillLibrary
from psec_jax.policy import compose
from psec_jax.workflows.demonstrations import card_env

Card = Mapping[str, Any]
Key = tuple[str, str]  # "base", "skill", "gate", "retired skill" ..., and a name


# --- cards ----------------------------------------------------------------------------


def read(root: str | Path) -> tuple[SkillLibrary, dict[Key, Card], list[str]]:
    """A library, its cards with "bytes" of arrays, and what is wrong, a line each.

    Raises:
      InputError: no library, or a base without card or arrays. Other entries without
        are among what is wrong.
    """
    library = SkillLibrary.open(root)
    for needed in (library.card, library.size):
        needed("base", "base")
    cards, problems = {}, library.verify()
    retired = SkillLibrary(library.root / "removed")
    aside = [("skill", name) for name in retired.skills()]
    aside += [("gate", name) for name in retired.gates()]
    for source, kind, name, prefix in [
        *((library, *entry, "") for entry in library.entries()),
        *((retired, *entry, "retired ") for entry in aside),
    ]:
        try:
            card = source.card(kind, name)
            cards[prefix + kind, name] = card | {"bytes": source.size(kind, name)}
        except InputError as error:
            problems.append(str(error))
    return library, cards, list(dict.fromkeys(problems))


def called(kind: str, name: str) -> str:
    """An entry in words."""
    return kind if kind == "base" else f"{kind} {name}"


def of_kind(cards: Mapping[Key, Card], *kinds: str) -> list[Key]:
    """The entries of some kinds, kind by kind."""
    return [key for kind in kinds for key in cards if key[0] == kind]


def entries(cards: Mapping[Key, Card]) -> Html:
    """A row for each card, and below the table the cards, to be opened."""
    head = "name, kind, form, environment, return, steps, bytes, fingerprint"
    rows: list[Sequence[Any]] = [head.split(", ")]
    details = []
    for (kind, name), card in cards.items():
        target = f"card-{kind.replace(' ', '-')}-{name}"
        mean, steps = (card.get("returns") or {}).get("mean"), card.get("steps")
        rows.append(
            (
                el("a", card["name"], href=f"#{target}"),
                kind,
                form_text(card),
                card.get("env") or "-",
                "-" if mean is None else Cell(f"{mean:.1f}", mean),
                "-" if steps is None else Cell(f"{steps:,}", steps),
                Cell(f"{card['bytes']:,}", card["bytes"]),
                el("code", card["fingerprint"]),
            )
        )
        summary = el("summary", f"{kind} ", el("b", card["name"]))
        details.append(el("details", summary, el("div", value(card), id=target)))
    shown = table("Base, skills and gates", rows)
    return joined(shown, el("h3", "Cards"), el("div", *details, class_="cards"))


def value(x: Any) -> Html:
    """Any value of JSON, its fields as lists of terms."""
    if isinstance(x, dict) and x:
        pairs = [joined(el("dt", k), el("dd", value(v))) for k, v in x.items()]
        return el("dl", *pairs)
    if isinstance(x, list) and any(isinstance(one, dict) for one in x):
        return el("ol", *(el("li", value(one)) for one in x))
    return joined(x if isinstance(x, str) else json.dumps(x, ensure_ascii=False))


# --- lineage --------------------------------------------------------------------------

ROW, LETTER, LONGEST = 30, 7.4, 32  # pixels of a row and of a letter; letters of a name


class Node(NamedTuple):
    """A box of the lineage, in pixels."""

    left: float
    right: float
    y: float


def lineage(cards: Mapping[Key, Card]) -> Html:
    """Base, skills and gates in columns, with lines from what each was made of."""
    skills = of_kind(cards, "skill", "retired skill")
    named = {name: (kind, name) for kind, name in reversed(skills)}
    gates = of_kind(cards, "gate", "retired gate")
    columns = {"base": [("base", "base")], "skills": skills, "gates": gates}
    height = ROW * max(map(len, columns.values())) + 24
    nodes: dict[Key, Node] = {}
    heads, left = [], 1.0

    def mean_height(gate: Key) -> tuple[float, str]:
        found = [nodes[named[s]].y for s in cards[gate]["skills"] if s in named]
        return sum(found) / max(len(found), 1), gate[1]

    for (head, column), gap in zip(columns.items(), (90, 150, 0), strict=True):
        longest = max([len(str(cards[key]["name"])) for key in column], default=0)
        right = left + LETTER * min(max(longest, 6), LONGEST) + 20
        top = 24 + (height - 24 - ROW * len(column)) / 2
        if column is gates:
            column = sorted(column, key=mean_height)
        for i, key in enumerate(column):
            nodes[key] = Node(left, right, top + ROW * (i + 0.5))
        heads.append(el("text", head, x=f"{left:.0f}", y=12))
        left = right + gap
    groups = []
    for key, node in nodes.items():
        name, made_of = str(cards[key]["name"]), sources(key, cards[key], cards, named)
        groups.append(
            el(
                "g",
                el("title", f"{called(*key)}: {form_text(cards[key])}"),
                *(_line(nodes[other], node, how) for other, how in made_of),
                *_box(node, name),
                class_=key[0],
            )
        )
    drawn = el(
        "svg",
        *heads,
        *groups,
        width=f"{left + 1:.0f}",
        height=height,
        viewBox=f"0 0 {left + 1:.0f} {height}",
        role="img",
        aria_label=f"Lines from the base to {len(skills)} skills, and from skills to "
        f"{len(gates)} gates over them",
    )
    return scrolled("Lineage", drawn, "lineage")


def sources(
    key: Key, card: Card, cards: Mapping[Key, Card], skills: Mapping[str, Key]
) -> Iterator[tuple[Key, str]]:
    """What an entry was made of, each with how: "made", "merged" or "replaced"."""
    if key[0].endswith("skill"):
        yield ("base", "base"), "made"
    merged = card.get("merged")
    names = merged.get("skills") if isinstance(merged, dict) else None
    for how, found in (("made", card.get("skills")), ("merged", names)):
        for name in found if list_of(is_text)(found) else ():
            if name in skills:
                yield skills[name], how
    for other in of_kind(cards, "retired skill"):
        if card.get("in_place_of") == cards[other]["fingerprint"]:
            yield other, "replaced"


def _line(start: Node, end: Node, how: str) -> Html:
    x1, x2, bend = start.right, end.left, (end.left - start.right) / 2
    if start.left == end.left:  # between skills: a bow on their right
        x2, bend = end.right, 40.0
        curve = f"{x1 + bend:.0f} {start.y:.0f} {x2 + bend:.0f} {end.y:.0f}"
    else:
        curve = f"{x1 + bend:.0f} {start.y:.0f} {x2 - bend:.0f} {end.y:.0f}"
    path = f"M{x1:.0f} {start.y:.0f}C{curve} {x2:.0f} {end.y:.0f}"
    return el("path", d=path, class_=how)


def _box(node: Node, name: str) -> tuple[Html, Html]:
    short = name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"
    width = f"{node.right - node.left:.0f}"
    at = {"x": f"{node.left:.0f}", "y": f"{node.y - 11:.0f}"}
    return (
        el("rect", **at, width=width, height=22, rx=5),
        el("text", short, x=f"{node.left + 10:.0f}", y=f"{node.y + 4:.0f}"),
    )


# --- returns --------------------------------------------------------------------------

SPREAD = re.compile(r"(-?[\d.]+) \[(-?[\d.]+), (-?[\d.]+)\]")  # as `tables.spread`


def shown_tables(folder: Path) -> Iterator[tables.Shown]:
    """The tables of a folder of raw results."""
    made = {t.TABLE.name: t.shown for t in (table2, dynamics_shift, seams)}
    for name in sorted(path.stem for path in folder.glob("*.jsonl")):
        path = folder / f"{name}.jsonl"
        if name in made:
            yield made[name](folder)
        elif name == table1.TABLE.name:
            there = {raw["setting"] for raw in results.read_all(path)}
            for suite, names in table1.SUITES.items():
                if there & set(names):
                    yield table1.shown(folder, suite)
        elif name in tasks.PACKAGED:
            yield continual.shown(continual.make_table(tasks.read(name)), folder)


def returns(folder: Path) -> Html:
    """The tables of a folder of raw results, with their intervals drawn.

    Raises:
      InputError: no raw results of a table, or damaged ones.
    """
    parts = []
    for shown in shown_tables(folder):
        cells = tables.cells(shown.table, shown.summary)
        parts += [el("h3", shown.name), _intervals(shown.name, cells)]
        parts += [el("p", note, class_="note") for note in shown.notes()]
        if rows := tables.differences(shown.table, shown.raws):
            title = "Paired differences"
            compared = table(title, tables.compared(rows, shown.digits))
            note = el("p", tables.COMPARED, class_="note")
            parts.append(el("details", el("summary", title), note, compared))
    if not parts:
        raise InputError(
            f"{folder}: no raw results of a table, such as table1.jsonl or table2.jsonl"
        )
    return joined(*parts)


def _intervals(name: str, cells: Sequence[Sequence[str]]) -> Html:
    """The cells of a table; those with an interval have it drawn, a scale a column."""
    columns = []
    for column in zip(*cells[1:], strict=True):
        found = [SPREAD.search(text) for text in column]
        numbers = [float(x) for match in found if match for x in match.groups()]
        low, high = min([0.0, *numbers]), max([0.0, *numbers])
        shown = zip(column, found, strict=True)
        columns.append([_number(*cell, low, (high - low) or 1.0) for cell in shown])
    return table(f"Table {name}", [cells[0], *zip(*columns, strict=True)])


def _number(text: str, match: re.Match[str] | None, low: float, span: float) -> Any:
    if match is None:
        first = text.partition(" ")[0]
        with contextlib.suppress(ValueError):
            return Cell(text, float(first))
        return text
    mean, start, end = map(float, match.groups())
    bar = el(
        "svg",
        el("path", d=f"M{start} 1H{end}"),
        el("path", d=f"M{mean} 0V2", class_="mean"),
        viewBox=f"{low} 0 {span} 2",
        preserveAspectRatio="none",
        aria_hidden="true",
        class_="interval",
    )
    words = text.replace("**", "")
    return Cell(joined(el("strong", words) if "**" in text else words, bar), mean)


# --- episodes of gates ----------------------------------------------------------------

HEIGHT, WIDTH, EVERY = 240, 320, 2  # of a video: pixels; steps from frame to frame


class Episode(NamedTuple):
    """What a gate did in one episode.

    Attributes:
      gate: its name.
      env: the simulator.
      trace: every step.
      rate: steps a second of simulated time; None where nothing was drawn.
      video: mp4; empty where there is none.
    """

    gate: str
    env: str
    trace: Trace
    rate: float | None = None
    video: bytes = b""


def play(library: SkillLibrary, gate: str, seed: int) -> Episode:
    """One episode of a gate.

    Raises:
      InputError, WorkerDied: it cannot be played.
    """
    env = card_env(library.card("gate", gate), f"gate {gate!r}")
    if env is None:
        raise InputError(f"the card of gate {gate!r} names no environment")
    return Episode(
        gate, env, make_trace(compose(library.root, gate=gate), env, 1, seed)
    )


def film(episode: Episode) -> Episode:
    """The episode with its video.

    Raises:
      CannotDraw: this machine cannot.
      InputError, WorkerDied: another failure.
    """
    trace = episode.trace
    with (
        tempfile.TemporaryDirectory() as folder,
        Renderer(episode.env, HEIGHT, WIDTH) as renderer,
    ):
        rate, path = 1 / renderer.step_seconds, Path(folder, "video.mp4")
        frames = renderer.frames(int(trace.seeds[0]), trace.obs, trace.action, EVERY)
        write_video(path, rate / EVERY, frames)
        return episode._replace(rate=rate, video=path.read_bytes())


def episodes(
    library: SkillLibrary, gates: Sequence[str], seed: int, videos: bool, room: int
) -> tuple[list[Html], int]:
    """A figure for each gate, and the bytes of all videos.

    Args:
      library: that has the gates.
      gates: names.
      seed: of initial state and noise, as in `evaluate`.
      videos: whether they are made, where that is possible.
      room: bytes of all videos at most.
    """
    figures, used = [], 0

    def left_out(what: str, error: object) -> Html:
        print(f"{what}: {error}", file=sys.stderr)
        return el("p", f"{what}: {error}", class_="note")

    for gate in gates:
        try:
            episode = play(library, gate, seed)
        except (InputError, WorkerDied) as error:
            figures.append(left_out(f"Gate {gate}: no episode", error))
            continue
        try:
            if videos:
                episode = film(episode)
        except (InputError, WorkerDied) as error:
            videos = not isinstance(error, CannotDraw)
            figures.append(left_out("No video" if videos else "No videos", error))
        size = len(episode.video)
        if used + size > room:
            why = f"{size:,} bytes, of {room:,} for all videos {used:,} are in use"
            figures.append(left_out(f"Gate {gate}: no video", why))
            episode = episode._replace(video=b"")
        used += len(episode.video)
        figures.append(figure(episode))
        print(f"gate {gate}: one episode in {episode.env}")
    return figures, used


def figure(episode: Episode) -> Html:
    """Weights over the steps of an episode, beside its video."""
    trace, count = episode.trace, len(episode.trace.reward)
    said = f"return {trace.reward.sum():.1f}, {count:,} steps"
    if trace.cost.any():
        said += f", cost {trace.cost.sum():.1f}"
    said += successes(trace.success if len(trace.success) else None)
    parts = [el("h3", episode.gate), el("p", f"{episode.env}: {said}")]
    if episode.video:
        content = base64.b64encode(episode.video).decode()
        source = Html(f"data:video/mp4;base64,{content}")
        label = f"Video of the gate {episode.gate} in {episode.env}"
        size = {"width": WIDTH, "height": HEIGHT, "controls": "", "playsinline": ""}
        parts.append(el("video", src=source, aria_label=label, **size))
    parts.append(_weights(episode))
    rate = episode.rate and f"{episode.rate:.6g}"
    return el("article", *parts, class_="trace", data_rate=rate)


def _weights(episode: Episode) -> Html:
    alpha, names = episode.trace.alpha.astype(float), episode.trace.names
    named, others = by_size(alpha)
    low, high = min(0.0, alpha.min()), max(0.0, alpha.max())
    margin = 0.04 * ((high - low) or 1.0)
    top, bottom = high + margin, low - margin
    order = [*others, *named]
    looks = ["cx"] * len(others) + [f"c{i}" for i in range(len(named))]
    lines, legend = [], []
    for line, (k, look) in enumerate(zip(order, looks, strict=True)):
        points = " ".join(f"{t},{x:.5g}" for t, x in enumerate(alpha[:, k]))
        lines.append(el("polyline", points=points, class_=look))
        if look != "cx":
            number = el("span", data_line=line)
            legend.append(el("li", el("b", names[k]), " ", number, class_=look))
    if len(others):
        legend.append(el("li", f"{len(others)} others", class_="cx"))
    drawn = el(
        "svg",
        el(
            "g",
            el("line", x1=0, x2=len(alpha), y1=0, y2=0),
            *lines,
            el("line", x1=0, x2=0, y1=bottom, y2=top, class_="cursor"),
            transform="scale(1 -1)",  # upwards, in units of steps and weights
        ),
        viewBox=f"0 {-top:.6g} {max(len(alpha) - 1, 1)} {top - bottom:.6g}",
        preserveAspectRatio="none",
        role="img",
        aria_label=f"Weights of {len(names)} skills over {len(alpha)} steps, from "
        f"{low:.3g} to {high:.3g}",
    )
    return el(
        "div",
        el("span", f"{high:.3g}", class_="high"),
        el("span", f"{low:.3g}", class_="low"),
        drawn,
        el(
            "input",
            type="range",
            min=0,
            max=len(alpha) - 1,
            value=0,
            aria_label=f"Step of the episode of {episode.gate}",
        ),
        el("span", "step 0", class_="step"),
        el("ul", *legend),
        class_="weights",
    )


# --- how skills relate ----------------------------------------------------------------

SHADES = 10  # on each side of 0
STYLE = "".join(
    f".{name}{i}{{background:color-mix(in oklab,var(--{name}) {6 * i}%,transparent)}}\n"
    for name in ("more", "less")
    for i in range(1, SHADES + 1)
)


def relations(path: Path, cards: Mapping[Key, Card]) -> Html:
    """Heat maps of an analysis of the library's skills, as tables.

    Raises:
      InputError: no analysis, or one of other skills.
    """
    found = read_json(path)
    try:
        return _relations(found, cards)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not an analysis ({error!r:.80})") from error


def _relations(found: Mapping[str, Any], cards: Mapping[Key, Card]) -> Html:
    names = found["skills"]
    skills = of_kind(cards, "retired skill", "skill")
    prints = {name: cards[kind, name]["fingerprint"] for kind, name in skills}
    for name, then in zip(names, found["made_of"]["skill_fingerprints"], strict=True):
        if prints.get(name) != then:
            raise InputError(
                f"skill {name!r:.80} was {then!r:.40} then and is {prints.get(name)} "
                "now; analyse the library again"
            )
    rows: list[Sequence[Any]] = [("skill", "error without it", "suggestion")]
    for name, error in zip(names, found["left"], strict=True):
        rows.append((name, Cell(f"{error:.3g}", error), found["suggestions"][name]))
    maps = [
        _map(title, limits, names, names, found[field])
        for field, (title, limits) in MAPS.items()
        if found[field] is not None
    ]
    pairs = [(i, j) for i in range(len(names)) for j in range(i)]
    layers = {name: one["cosine"] for name, one in found["layers"].items()}
    cosines = [[cosine[i][j] for i, j in pairs] for cosine in layers.values()]
    columns = [f"{names[j]}, {names[i]}" for i, j in pairs]
    maps.append(_map(*LAYERS, list(layers), columns, cosines))
    note = "Numbers of launch.library analyse; docs/library.md says what they are."
    return joined(
        el("p", note, class_="note"),
        table("Suggestions", rows),
        el("div", *maps, class_="maps"),
    )


def _map(
    title: str,
    limits: tuple[float, float],
    rows: Sequence[str],
    columns: Sequence[str],
    matrix: Sequence[Sequence[float | None]],
) -> Html:
    def cell(row: str, column: str, x: float | None) -> Cell:
        if x is None:
            return Cell("-", title=f"{row}, {column}: not known")
        shade = min(round(SHADES * abs(x) / limits[1]), SHADES)
        class_ = f"{'more' if x > 0 else 'less'}{shade}" if shade else None
        return Cell(f"{x:.2f}", title=f"{row}, {column}: {x:.4f}", class_=class_)

    body: list[Sequence[Any]] = [["", *(el("span", column) for column in columns)]]
    for row, numbers in zip(rows, matrix, strict=True):
        found = zip(columns, numbers, strict=True)
        body.append([row, *(cell(row, column, x) for column, x in found)])
    heading = f"{title} ({limits[0]} to {limits[1]})"
    return el("div", el("h3", heading), table(title, body, "heat"))


# --- provenance -----------------------------------------------------------------------

_DATA = ("source", "fingerprint", "transitions", "trajectories")
_COMMANDS = (
    "From the configs on the cards. They train the entries of the fingerprints above "
    "them where data, versions and machine are the same. Give data by their paths, and "
    "critics by the directories of their runs; how files are read (config.data) is not "
    "on a card."
)


def provenance(cards: Mapping[Key, Card]) -> Html:
    """Versions, hardware, data, and commands that train the entries again."""
    versions: dict[str, list[str]] = {}
    data: dict[tuple[Any, ...], list[str]] = {}
    for key, card in cards.items():
        made = json.dumps(card.get("versions") or "not on the cards")
        versions.setdefault(made, []).append(called(*key))
        if used := card.get("data"):
            row = tuple(used.get(field, "-") for field in _DATA)
            data.setdefault(row, []).append(called(*key))
    parts = [el("h3", "Versions and hardware")]
    for made, names in versions.items():
        head = f"{len(names)} of {len(cards)} entries: {', '.join(names)}"
        content = value(json.loads(made))
        parts.append(el("details", el("summary", head), content, open=""))
    if data:
        rows: list[Sequence[Any]] = [(*_DATA, "used by")]
        for (source, fingerprint, *counts), names in data.items():
            numbers = [Cell(f"{count:,}", count) for count in counts]
            rows.append((source, el("code", fingerprint), *numbers, ", ".join(names)))
        parts += [el("h3", "Data"), table("Data", rows)]
    commands, without = reproduce.commands(cards)
    lines = []
    for command, keys in commands.items():
        made = [f"{called(*key)} {cards[key]['fingerprint']}" for key in keys]
        lines.append(f"# {', '.join(made)}\n{command}")
    parts.append(el("h3", "Commands"))
    if lines:
        parts.append(el("p", _COMMANDS, class_="note"))
        parts.append(scrolled("Commands", el("pre", "\n\n".join(lines))))
    for key, why in without.items():
        parts.append(el("p", f"No command for {called(*key)}: {why}.", class_="note"))
    return joined(*parts)


# --- the page -------------------------------------------------------------------------


def build(
    library: str,
    results: str | None = None,
    analysis: str | None = None,
    gates: Sequence[str] | None = None,
    seed: int = 10_000,
    videos: bool = True,
    video_bytes: int = 24_000_000,
) -> str:
    """The page of a library.

    Args:
      library: directory of the skill library.
      results: directory of raw results, whose tables are shown.
      analysis: directory where `launch.library analyse` has written.
      gates: names of gates that play an episode; None is all.
      seed: of initial states and the policies' noise.
      videos: film the episodes, where this machine can draw.
      video_bytes: of all videos in the page at most.

    Raises:
      InputError: something that is missing, damaged, or of another library.
    """
    opened, cards, problems = read(library)
    known = dict.fromkeys(name for _, name in of_kind(cards, "gate"))
    for name in gates or []:
        lookup(known, name, "gate")
    sections = {"Entries": entries(cards), "Lineage": lineage(cards)}
    if results is not None:
        sections["Returns"] = returns(Path(results))
    if analysis is not None:
        path = Path(analysis, "analysis.json")
        sections["How the skills relate"] = relations(path, cards)
    played = list(known) if gates is None else gates
    figures, used = episodes(opened, played, seed, videos, video_bytes)
    if figures:
        note = (
            f"One episode each, of seed {seed}: the weight of every skill at every "
            f"step. All videos: {used:,} bytes."
        )
        sections["Episodes"] = joined(el("p", note, class_="note"), *figures)
    sections["Provenance"] = provenance(cards)
    base = cards["base", "base"]["name"]
    kinds = ("skill", "gate", "retired skill", "retired gate")
    found = {kind: len(of_kind(cards, kind)) for kind in kinds}
    counts = [f"{n} {kind}{'s' * (n > 1)}" for kind, n in found.items() if n]
    size = sum(card["bytes"] for card in cards.values())
    state = "every file matches its hash" if not problems else "something is wrong"
    ids = {heading: heading.lower().replace(" ", "-") for heading in sections}
    links = [el("a", heading, href=f"#{id_}") for heading, id_ in ids.items()]
    body = joined(
        el(
            "header",
            el("h1", "Skill library"),
            el("p", el("code", library), f": base “{base}”, {', '.join(counts)}"),
            el("p", f"{size:,} bytes of arrays; {state}.", class_="note"),
            *(el("p", problem, class_="problem") for problem in problems),
            el("nav", *links, aria_label="Sections"),
        ),
        el(
            "main",
            *(
                el("section", el("h2", heading), content, id=ids[heading])
                for heading, content in sections.items()
            ),
        ),
    )
    return page(f"Skill library {library}", body, STYLE)


def main(argv: Sequence[str]) -> None:
    """Write the page, and print one line about it."""
    no_arguments(argv)
    given = values_of(FLAGS)
    out = Path(given.pop("out"))
    if out.is_dir():
        raise InputError(f"--out={out}: is a folder, expected a file to be written")
    if not out.parent.is_dir():
        raise InputError(f"--out={out}: there is no folder {out.parent}")
    content = build(**given).encode()
    write_atomic(out, content)
    print(f"{out}: {len(content):,} bytes")


if __name__ == "__main__":
    from psec_jax.cli import flags_of, no_arguments, run, values_of

    defined = {
        "out": flags.DEFINE_string("out", "report.html", "The page."),
        "gates": flags.DEFINE_list(
            "gates", None, "Gates that play an episode; default all."
        ),
        "seed": flags.DEFINE_integer(
            "seed",
            10_000,
            "Of initial states and the policies' noise, as in launch.evaluate.",
            0,
            2**32 - 1,
        ),
        "video_bytes": flags.DEFINE_integer(
            "video_bytes",
            24_000_000,
            "Of all videos in the page at most; one that does not fit is left out, and "
            "the page says so.",
            0,
        ),
    }
    FLAGS = flags_of(build, defined, library="runs/library")
    run(main)
