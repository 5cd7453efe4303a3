"""The page of a library: what it says, what it refuses, and how a browser shows it."""

import html
import html.parser
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import browser
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from shell import call

from experiments import report, reproduce
from psec_jax.data import d4rl
from psec_jax.errors import InputError
from psec_jax.library import SkillLibrary
from psec_jax.types import Dataset, Normaliser

ROOT = Path(__file__).parents[1]
ENV, OBS_DIM, ACTION_DIM = "gymnasium:Hopper-v5", 11, 3
TINY = {
    "network.width": 16,
    "network.blocks": 1,
    "base.episodes": 0,
    "base.steps": 2,
    "base.batch_size": 8,
    "skill.episodes": 0,
    "skill.steps": 2,
    "skill.batch_size": 8,
    "skill.learning_rate": 0.1,
    "gate.steps": 2,
    "gate.batch_size": 8,
    "gate.widths": "(8,)",
    "support.queries": 64,
}
NAUGHTY = "<script>window.pwned=1</script>\x1b[2J\u202e</script>\"'><img src=x>"

needs_gl = pytest.mark.skipif(
    "MUJOCO_GL" not in os.environ,
    reason="neither EGL nor OSMesa is installed: apt-get install libegl1 libgl1",
)


def demos(seed):
    generator = np.random.default_rng(seed)
    obs = generator.normal(size=(3, 9, OBS_DIM)).astype(np.float32)
    ends = np.tile(np.arange(8) == 7, 3)
    return Dataset(
        obs[:, :-1].reshape(24, -1),
        generator.uniform(-1, 1, size=(24, ACTION_DIM)).astype(np.float32),
        np.ones(24, np.float32),
        np.zeros(24, np.float32),
        obs[:, 1:].reshape(24, -1),
        np.zeros(24, bool),
        ends,
    )


def done(module, *arguments):
    answer = call(module, *arguments)
    assert answer.code == 0, answer.err
    return answer


def train(stage, name, data, *arguments):
    flags = [f"--config.{field}={value}" for field, value in TINY.items()]
    shared = [f"--data={data}", f"--env={ENV}", "--library=lib", "--noevaluate"]
    own = [f"--workdir=runs/{name}", f"--name={name}", "--seed=3"]
    done(f"launch.{stage}", *flags, *shared, *own, *arguments)


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        (folder / "experiments").symlink_to(ROOT / "experiments")
        yield folder


@pytest.fixture(scope="module")
def library(place):
    """A base, two skills, a retired one, and two gates, trained for two steps."""
    for seed, name in enumerate(("stand", "hop", "jump")):
        d4rl.save(Path(f"{name}.hdf5"), demos(seed), {})
    train("pretrain", "stand", "stand.hdf5")
    for name in ("hop", "jump"):
        train("expand", name, f"{name}.hdf5")
    train("expand", "spare", "hop.hdf5")
    train("compose", "learned", "hop.hdf5", "--skills=hop,jump", "--alpha=9,-3")
    form = ("--config.gate.head=constant", "--config.gate.support=neighbour")
    files = "--support_data=jump.hdf5,hop.hdf5"
    train(
        "compose", "near", "hop.hdf5", "--skills=jump,hop", "--alpha=8,2", files, *form
    )
    made = SkillLibrary.open("lib")
    made.retire("skill", "spare")
    skills = ("--skills=hop,jump", "--gates=near")
    analysed = ("--library=lib", "--data=hop.hdf5", "--out=analysis", "--states=8")
    done("launch.library", "analyse", *skills, *analysed)
    return made


@pytest.fixture(scope="module")
def page(library):
    """The file of the whole page."""
    results = f"--results={ROOT / 'results/demo'}"
    given = ("--library=lib", results, "--analysis=analysis", "--out=page.html")
    answer = done("experiments.report", *given)
    assert "gate near: one episode in gymnasium:Hopper-v5" in answer.out
    first = Path("page.html").read_bytes()
    done("experiments.report", *given)
    assert Path("page.html").read_bytes() == first
    return Path("page.html")


class Reader(html.parser.HTMLParser):
    """Elements with their attributes, and the texts of every table's cells."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.tables, self.text, self._in = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._in.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        while self._in and self._in.pop() != tag:
            pass

    def handle_data(self, data):
        self.text.append(data)
        if {"td", "th"} & set(self._in):
            self.tables[-1][-1][-1] += data


def test_it_loads_nothing_and_runs_its_own_script_alone(page):
    text = page.read_text()
    seen = Reader(text)
    places = [v for _, a in seen.elements for k, v in a.items() if k in ("src", "href")]
    assert len(places) > 10
    assert {re.match(r"#|data:video/mp4;base64,", place)[0] for place in places}
    assert "@import" not in text and "url(" not in text
    names = [name for name, _ in seen.elements]
    assert names.count("script") == names.count("style") == 1
    assert not {"link", "iframe", "object", "form", "base"} & set(names)
    [policy] = [a["content"] for _, a in seen.elements if "http-equiv" in a]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert not [k for _, a in seen.elements for k in a if k.startswith("on")]
    assert not [1 for _, a in seen.elements if "style" in a]


def test_numbers_of_returns_are_those_of_the_tables(page):
    text = (ROOT / "results/demo/table2.md").read_text()
    expected, rows = [], []
    for line in [*text.splitlines(), ""]:
        if line.startswith("| "):
            rows.append(line.strip("| ").split(" | "))
        elif rows:
            expected.append([rows[0], *rows[2:]])
            rows = []
    assert len(expected) == 2
    seen = Reader(page.read_text())
    for table in expected:
        assert table in seen.tables
    for note in text.split("\n\n")[1:3]:
        assert " ".join(note.split()) in seen.text


def test_cards_data_and_heat_maps_are_tables(page, library):
    tables = Reader(page.read_text()).tables
    entries = {tuple(row[:2]): row for row in tables[0][1:]}
    assert list(entries) == [
        ("stand", "base"),
        ("hop", "skill"),
        ("jump", "skill"),
        ("learned", "gate"),
        ("near", "gate"),
        ("spare", "retired skill"),
    ]
    card = library.card("gate", "near")
    size = (library.root / "gates/near/gate.safetensors").stat().st_size
    assert entries["near", "gate"] == [
        "near",
        "gate",
        "constant gate over jump, hop, neighbour support, parameter level",
        ENV,
        "-",
        "0",
        f"{size:,}",
        card["fingerprint"],
    ]
    found = json.loads(Path("analysis/analysis.json").read_text())
    for field in ("cosine", "agreement", "distance", "conflict", "overlap"):
        rows = [[f"{x:.2f}" for x in row] for row in found[field]]
        map_ = [["", "hop", "jump"], ["hop", *rows[0]], ["jump", *rows[1]]]
        assert map_ in tables, field
    data = [row for table in tables for row in table if row[0] == "hop.hdf5"]
    print_ = library.card("skill", "hop")["data"]["fingerprint"]
    assert data == [
        ["hop.hdf5", print_, "24", "3", "skill hop, gate learned, gate near, "
         "retired skill spare"]
    ]  # fmt: skip


def words(command):
    """The arguments that a shell gives to python."""
    shell = f"python() {{ printf '%s\\0' \"$@\"; }}\n{command}"
    answer = subprocess.run(["sh", "-c", shell], capture_output=True, check=True)
    assert not answer.stderr
    return answer.stdout.decode().split("\0")[:-1]


def test_the_commands_train_the_same_entries(page, library):
    [text] = re.findall("<pre>(.*?)</pre>", page.read_text(), re.DOTALL)
    commands = html.unescape(text).split("\n\n")
    assert len(commands) == 6
    for command in commands:
        _, module, *arguments = words(command)
        done(module, *arguments, "--noevaluate")
    again = SkillLibrary.open(reproduce.LIBRARY)
    for kind, name in library.entries():
        mine, theirs = library.card(kind, name), again.card(kind, name)
        assert theirs["fingerprint"] == mine["fingerprint"], name
        assert theirs["config"] == mine["config"], name


def weights(text):
    """{gate: {skill: its line}} of the episodes' plots."""
    found = {}
    for part in re.findall("<article.*?</article>", text):
        [gate] = re.findall("<h3>(.*?)</h3>", part)
        lines = re.findall('<polyline points="(.*?)"', part)
        names = re.findall("<li class=.*?><b>(.*?)</b>", part)
        found[gate] = {
            name: [float(pair.split(",")[1]) for pair in line.split()]
            for name, line in zip(names, lines, strict=True)
        }
    return found


def test_lines_are_the_weights_of_the_episode(page, library):
    found = weights(page.read_text())
    assert list(found) == ["learned", "near"]
    for gate, names in (("learned", ("hop", "jump")), ("near", ("jump", "hop"))):
        trace = report.play(library, gate, 10_000).trace
        assert tuple(found[gate]) == names == trace.names
        lines = np.array(list(found[gate].values())).T
        np.testing.assert_allclose(lines, trace.alpha, rtol=1e-4, atol=1e-6)
    assert len(lines) > 3


@needs_gl
def test_a_video_that_does_not_fit_is_left_out(library, capsys):
    text = report.build("lib", gates=["near"], video_bytes=1000)
    assert "<video" not in text and weights(text)
    [line] = re.findall("Gate near: no video: ([0-9,]+) bytes, of 1,000 for", text)
    assert int(line.replace(",", "")) > 1000
    assert "Gate near: no video: " in capsys.readouterr().err


def test_without_opengl_one_line_says_so(library, monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "disabled")
    text = report.build("lib")
    assert text.count("No videos: cannot draw") == 1
    assert "<video" not in text and len(weights(text)) == 2


def test_episodes_are_left_out_on_request(library):
    assert "<h2>Episodes" not in report.build("lib", gates=[])
    text = report.build("lib", gates=["near"], videos=False)
    assert list(weights(text)) == ["near"] and "<video" not in text


def hostile(folder):
    """A library whose every text is a trap, with a gate of an evil environment."""
    made = SkillLibrary.create(folder)
    config = {"name": NAUGHTY, "seed": 0, "env": ENV, "base": {"steps": NAUGHTY}}
    data = {"source": f"../{NAUGHTY}\n; rm -r ~", "fingerprint": "0" * 16}
    data |= {"transitions": 1, "trajectories": 1}
    card = {
        "name": f"{NAUGHTY}\nrm -r ~",
        "obs_dim": tiny.OBS_DIM,
        "action_dim": tiny.ACTION_DIM,
        "network": {NAUGHTY: [NAUGHTY, {"a": NAUGHTY}]},
        "env": NAUGHTY,
        "versions": {NAUGHTY: {NAUGHTY: [[1]]}},
        "config": config,
        "data": data,
    }
    normaliser = Normaliser(jnp.zeros(tiny.OBS_DIM), jnp.ones(tiny.OBS_DIM))
    made.add_base(tiny.base(), normaliser, card)
    evil = {"alpha": 1.0, "objective": NAUGHTY, "merged": {"skills": 5}}
    run = {"config": {"name": "b", "seed": 0, "skill": {"objective": NAUGHTY}}}
    flags = {"selection": {"compilation_cache": "/tmp"}}
    made.add_skill("a", tiny.skill(0), evil | {"config": {NAUGHTY: 1}, "data": data})
    made.add_skill("b", tiny.skill(1), {"alpha": 1.0, "data": data | flags, **run})
    outside = {"config": {"name": ["../../x", "c"], "seed": 0, "skill": {}}}
    made.add_skill("c", tiny.skill(2), {"alpha": 1.0, "data": data, **outside})
    gate = {"skills": ["a", "b"], "level": NAUGHTY, "gate": {"head": "constant"}}
    gate |= {"env": "gymnasium:evil.module:X-v0", "in_place_of": [NAUGHTY]}
    made.add_gate("g", {"head": {"alpha": jnp.ones(2)}}, gate)
    return made


def test_nothing_of_a_card_is_markup(tmp_path):
    made = hostile(tmp_path / "lib")
    text = report.build(str(made.root))
    assert "\x1b" not in text and "\u202e" not in text
    seen = Reader(text)
    assert {name for name, _ in seen.elements} & {"script", "img"} == {"script"}
    assert [name for name, _ in seen.elements].count("script") == 1
    shown = "".join(seen.text)
    escaped = NAUGHTY.replace("\x1b", "\\x1b").replace("\u202e", "\\u202e")
    assert shown.count(escaped) > 10
    assert "runs code of its choice" in shown  # the gate was not played
    why = {name: reason for (_, name), reason in _without(made).items()}
    assert "config has '<script>" in why["a"]
    assert "compilation" in why["b"] and "../../x" in why["c"]
    assert "no config" in why["g"]


def _without(made):
    _, cards, _ = report.read(made.root)
    return reproduce.commands(cards)[1]


def test_a_command_leaves_nothing_to_the_shell(library):
    card = dict(library.card("base", "base"))
    evil = "x\n; touch pwned `id` $(id) '"
    card |= {"config": card["config"] | {"name": evil}}
    card["data"] = card["data"] | {"source": f"../../{evil}"}
    given = words(f"# a comment\n{reproduce.command('base', card)}")
    assert f"--name={evil}" in given and f"--data={evil}" in given
    assert all(word.startswith("--") for word in given[2:])
    assert not Path("pwned").exists()
    card["env"] = "gymnasium:evil.module:X-v0"
    with pytest.raises(InputError, match="code of the card's choice"):
        reproduce.command("base", card)


def test_lines_of_merges_and_of_what_takes_a_skills_place():
    cards = {
        ("base", "base"): {},
        ("skill", "both"): {"merged": {"skills": ["walk", "gone", "unknown"]}},
        ("skill", "walk"): {},
        ("gate", "gone"): {"skills": ["walk"], "in_place_of": "f"},
        ("retired skill", "gone"): {"fingerprint": "f"},
    }
    skills = {"both": ("skill", "both"), "walk": ("skill", "walk")}
    skills["gone"] = ("retired skill", "gone")
    found = {
        key: list(report.sources(key, card, cards, skills))
        for key, card in cards.items()
    }
    base, walk, gone = ("base", "base"), ("skill", "walk"), ("retired skill", "gone")
    assert found == {
        base: [],
        ("skill", "both"): [(base, "made"), (walk, "merged"), (gone, "merged")],
        walk: [(base, "made")],
        ("gate", "gone"): [(walk, "made"), (gone, "replaced")],
        gone: [(base, "made")],
    }


def test_dozens_of_skills_do_not_overlap(tmp_path):
    made = SkillLibrary.create(tmp_path / "lib")
    card = {"name": "base", "obs_dim": tiny.OBS_DIM, "action_dim": tiny.ACTION_DIM}
    normaliser = Normaliser(jnp.zeros(tiny.OBS_DIM), jnp.ones(tiny.OBS_DIM))
    made.add_base(tiny.base(), normaliser, card | {"network": {}})
    for i in range(30):
        made.add_skill(f"skill-{i:02}", tiny.skill(0), {"alpha": 1.0})
    _, cards, problems = report.read(made.root)
    assert not problems
    rows = re.findall('<rect x="(.*?)" y="(.*?)"', report.lineage(cards))
    heights = [int(y) for x, y in rows if x == rows[-1][0]]
    assert len(heights) == 30 and min(np.diff(heights)) >= 22


def test_damage_is_shown_on_the_page(library, tmp_path):
    shutil.copytree(library.root, tmp_path / "lib")
    (tmp_path / "lib/skills/jump/skill.json").write_text("{}")
    text = report.build(str(tmp_path / "lib"), gates=[])
    assert "something is wrong" in text
    assert re.search('class="problem">[^<]*jump/skill.json', text)


BAD = {
    "no library": ("--library=nowhere", "nowhere is not a skill library"),
    "no results": ("--results=nowhere", "nowhere: no raw results of a table"),
    "no analysis": ("--analysis=nowhere", "cannot read nowhere/analysis.json"),
    "another analysis": ("--analysis=other", "other/analysis.json: skill 'hop' was '0"),
    "not an analysis": ("--analysis=odd", "odd/analysis.json: not an analysis"),
    "an unknown gate": (
        "--gates=nigh",
        "unknown gate 'nigh'; choose from learned, near",
    ),
    "no folder": ("--out=nowhere/page.html", "there is no folder nowhere"),
    "a folder": ("--out=lib", "--out=lib: is a folder"),
    "a seed": ("--seed=-1", "flag --seed=-1"),
    "bytes": ("--video_bytes=-1", "flag --video_bytes=-1"),
    "an argument": ("walk", "unexpected argument 'walk'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(library, case):
    argument, words = BAD[case]
    found = json.loads(Path("analysis/analysis.json").read_text())
    for folder, change in (
        ("other", {"made_of": {"skill_fingerprints": ["0" * 16] * 2}}),
        ("odd", {"cosine": [[1, 2], [3]]}),
    ):
        Path(folder).mkdir(exist_ok=True)
        Path(folder, "analysis.json").write_text(json.dumps(found | change))
    given = ["--library=lib", "--out=bad.html", "--gates="]
    name = argument.partition("=")[0]
    given = [flag for flag in given if not flag.startswith(f"{name}=")]
    answer = call("experiments.report", *given, argument)
    assert answer.code == 2 and words in answer.err, answer.err
    assert answer.err.count("\n") == 1
    assert not Path("bad.html").exists()


# --- in a browser ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def tab():
    if browser.PROGRAM is None:
        pytest.skip("no chromium: apt-get install chromium")
    pytest.importorskip("websockets")
    with browser.tab() as opened:
        yield opened


OVERFLOW = "document.documentElement.scrollWidth - innerWidth"  # no scroll bars
ROWS = "[...document.querySelectorAll('#entries tbody tr')]"
FIRST = ROWS + ".map(row => row.cells[{}].innerText)"


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("dark", [False, True])
def test_it_loads_and_fits(page, tab, width, dark):
    tab.complaints.clear()
    tab.open(page, width, dark)
    assert tab.run(OVERFLOW) <= 0
    tab.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert tab.run(OVERFLOW) <= 0
    # Ink on paper, and links: a contrast that anybody can read.
    colours = "[getComputedStyle(document.{}).color, getComputedStyle(document.body)"
    for element in ("body", "querySelector('a')", "querySelector('.note')"):
        pair = tab.run(colours.format(element) + ".backgroundColor]")
        assert contrast(*pair) >= 4.5, element
    assert not tab.complaints


def contrast(*colours):
    """Ratio of WCAG 2 of two "rgb(r, g, b)"."""
    lights = []
    for colour in colours:
        c = np.array([int(x) for x in re.findall(r"\d+", colour)[:3]]) / 255
        linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
        lights.append(linear @ [0.2126, 0.7152, 0.0722] + 0.05)
    return max(lights) / min(lights)


def test_a_table_sorts_by_mouse_and_keyboard(page, tab):
    tab.open(page, 1400)
    names = tab.run(FIRST.format(0))
    head = "document.querySelectorAll('#entries thead th')[{}]"
    tab.run(head.format(6) + ".querySelector('button').click()")
    sizes = [int(text.replace(",", "")) for text in tab.run(FIRST.format(6))]
    assert sizes == sorted(sizes) and len(set(sizes)) > 3
    assert tab.run(head.format(6) + ".getAttribute('aria-sort')") == "ascending"
    tab.run(head.format(0) + ".querySelector('button').focus()")
    for order, reverse in (("ascending", False), ("descending", True)):
        tab.press("Enter", 13)
        assert tab.run(FIRST.format(0)) == sorted(names, reverse=reverse)
        assert tab.run(head.format(0) + ".getAttribute('aria-sort')") == order
    assert tab.run(head.format(6) + ".getAttribute('aria-sort')") is None


def test_a_link_opens_its_card(page, tab):
    tab.open(page, 1400)
    closed = "document.getElementById('card-skill-hop').closest('details').open"
    assert tab.run(closed) is False
    tab.run("document.querySelector('a[href=\"#card-skill-hop\"]').click()")
    assert tab.run(f"new Promise(r => setTimeout(() => r({closed}), 300))") is True


@needs_gl
def test_a_video_plays_with_the_line_in_the_plot(page, tab):
    tab.complaints.clear()
    tab.open(page, 1400)
    script = """(async () => {
      const figure = document.querySelector('.trace');
      const video = figure.querySelector('video');
      const slider = figure.querySelector('input');
      const line = figure.querySelector('.cursor');
      const state = () => [video.currentTime, Number(slider.value),
        line.getAttribute('x1'), figure.querySelector('.step').textContent];
      const next = (event) => new Promise(r => video.addEventListener(event,
        () => requestAnimationFrame(() => r(state())), { once: true }));
      await video.play();
      const played = await next('ended');
      slider.value = 2;
      const seeked = next('seeked');
      slider.dispatchEvent(new Event('input'));
      return [video.videoWidth, Number(figure.dataset.rate), played, await seeked];
    })()"""
    width, rate, played, seeked = tab.run(script)
    assert width == report.WIDTH and rate == pytest.approx(125)
    time, step, line, text = played
    assert time > 0 and step == int(line) > 2
    assert text.startswith(f"step {step}, ")
    assert seeked[0] == pytest.approx(2 / rate)
    assert seeked[1:] == [2, "2", "step 2, 0.02 s"]
    assert not tab.complaints


def test_larger_weights_are_higher(page, tab):
    """Not only in the numbers: the point of the largest weight is the highest."""
    tab.open(page, 1400)
    script = """[...document.querySelectorAll('.trace polyline')].flatMap(line =>
      [...line.points].map(p => [p.y, p.matrixTransform(line.getScreenCTM()).y]))"""
    points = np.array(tab.run(script))
    first = points[: len(points) // 4]
    assert np.corrcoef(first.T)[0, 1] < -0.99
    box = tab.run(
        "(b => [b.top, b.bottom])"
        "(document.querySelector('.trace svg').getBoundingClientRect())"
    )
    assert box[0] <= first[:, 1].min() and first[:, 1].max() <= box[1]


def test_hostile_cards_do_nothing_in_a_browser(tab, tmp_path):
    file = tmp_path / "page.html"
    file.write_text(report.build(str(hostile(tmp_path / "lib").root)))
    tab.complaints.clear()
    tab.open(file, 400)
    assert tab.run("window.pwned === undefined")
    assert tab.run(OVERFLOW) <= 0
    assert not tab.complaints
    # Were a text markup nevertheless, the page's policy would not run it.
    tab.run(
        "(s => { s.textContent = 'window.pwned = 1'; document.body.append(s); })"
        "(document.createElement('script'))"
    )
    assert tab.run("window.pwned === undefined")
    tab.complaints.clear()
