"""Libraries and single entries on the Hugging Face Hub, or in another folder.

A place is "hf:OWNER/NAME", a repository of the Hub, or a folder; both hold the files of
a library, and a README.md that says what they are. What comes from a place is written
into a hidden folder of the library, verified there as a whole (hashes, types, ranges,
base) and only then moved to where it belongs, under the library's lock. Entries are
added, never replaced.
"""

import contextlib
import importlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from psec_jax.cards import NAME, form_text
from psec_jax.errors import InputError, printable
from psec_jax.files import (
    MAX_JSON,
    beside,
    parse_json,
    read_bytes,
    reported,
    write_atomic,
)
from psec_jax.library import FOLDERS, SkillLibrary, find_entry, verify_card

HUB = "hf:"
README = "README.md"
MAX_ARRAYS = 2**32  # bytes of an entry's arrays
MAX_FILES = 10_000  # of a place
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_START, _END = "<!-- psec_jax library -->", "<!-- end -->"

BASE, ENDS = ("base", "base"), ("json", "safetensors")

Entry = tuple[str, str]  # kind and name
Cards = Mapping[Entry, Mapping[str, Any]]


class Folder:
    """A library in a folder, as a place."""

    def __init__(self, root: str | Path) -> None:
        self.root, self.name = Path(root).expanduser(), str(root)

    def files(self) -> dict[str, int]:
        """Bytes of every file of base, skills and gates.

        Raises:
          InputError: a link, or something else than files and folders.
        """
        found = {}
        for top in ("base", *FOLDERS.values()):
            for parent, folders, names in os.walk(self.root / top):
                for path in (Path(parent, name) for name in (*folders, *names)):
                    if path.is_symlink():
                        raise InputError(f"{path} is a symbolic link, which stays here")
                folders[:] = [name for name in folders if not name.startswith(".")]
                for path in (Path(parent, name) for name in names):
                    found[path.relative_to(self.root).as_posix()] = path.stat().st_size
        return found

    def read(self, path: str, limit: int) -> bytes:
        """The bytes of a file; more than `limit` are refused."""
        return read_bytes(self.root / path, limit)


class Hub:
    """A repository of the Hugging Face Hub, as a place.

    Args:
      repository: "OWNER/NAME".
      revision: branch, tag or commit; default the main branch.
    """

    def __init__(self, repository: str, revision: str | None = None) -> None:
        if not _REPOSITORY.fullmatch(repository):
            raise InputError(f"{HUB}{printable(repository)}: expected {HUB}OWNER/NAME")
        try:
            self.hub: Any = importlib.import_module("huggingface_hub")
            self.errors: Any = importlib.import_module("huggingface_hub.errors")
        except ModuleNotFoundError as error:
            raise InputError(
                f"{error.name} is not installed; pip install 'psec_jax[hub]'"
            ) from error
        self.api = self.hub.HfApi(library_name="psec_jax")
        self.repository, self.name = repository, HUB + repository
        self.revision = revision

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        """Turn what the Hub, or the way there, refuses into an `InputError`."""
        try:
            yield
        except (self.errors.HTTPError, OSError, ValueError) as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            raise InputError(f"{self.name}: {' '.join(lines[:2])}") from error

    def exists(self) -> bool:
        """Whether there is such a repository, which the user may see."""
        with self._reported():
            return self.api.repo_exists(self.repository)

    def files(self) -> dict[str, int]:
        """Bytes of every file, at the commit that is read from now on."""
        with self._reported():
            info = self.api.repo_info(self.repository, revision=self.revision)
            self.revision = info.sha
            tree = self.api.list_repo_tree(
                self.repository, recursive=True, revision=info.sha
            )
            return {file.path: file.size for file in tree if hasattr(file, "size")}

    def read(self, path: str, limit: int) -> bytes:
        """The bytes of a file; more than `limit` are refused."""
        with tempfile.TemporaryDirectory(prefix="psec_hub_") as folder:
            with self._reported():
                saved = self.api.hf_hub_download(
                    self.repository, path, revision=self.revision, local_dir=folder
                )
            return read_bytes(saved, limit)

    def write(self, files: Mapping[str, bytes], message: str, private: bool) -> None:
        """One commit on the main branch of these files; a new repository is made."""
        with self._reported():
            made = not self.api.repo_exists(self.repository)
            if made:
                self.api.create_repo(self.repository, private=private)
            add = self.hub.CommitOperationAdd
            self.api.create_commit(
                self.repository,
                [
                    add(path_in_repo=path, path_or_fileobj=data)
                    for path, data in files.items()
                ],
                commit_message=message,
                parent_commit=None if made else self.revision,
            )


Place = Folder | Hub


def place_of(name: str, revision: str | None = None) -> Place:
    """The place that a name stands for.

    Raises:
      InputError: no name of a repository, or a revision of a folder.
    """
    if name.startswith(HUB):
        return Hub(name.removeprefix(HUB), revision)
    if revision is not None:
        raise InputError(f"revision: {name} is a folder, which has none")
    return Folder(name)


def entries_of(place: Place) -> list[Entry]:
    """The entries of a library in a place, the base first, then skills, then gates.

    Raises:
      InputError: paths that climb out, files that no library holds, an entry of which a
        file is missing, files that are too large or too many, or no base.
    """
    found: dict[Entry, set[str]] = {}
    files = place.files()
    if len(files) > MAX_FILES:
        raise InputError(
            f"{place.name}: {len(files)} files, expected {MAX_FILES} at most"
        )
    for path, size in files.items():
        parts = path.split("/")
        if "\\" in path or not {"", ".", ".."}.isdisjoint(parts):
            raise InputError(f"{place.name}: the path {path!r} climbs out of it")
        if parts[0] not in ("base", *FOLDERS.values()):
            continue  # a README, a licence, pictures
        entry, end = _entry(parts)
        if entry is None:
            raise InputError(f"{place.name}: {path!r} is no file of a library")
        if size > _limit(end):
            raise InputError(
                f"{place.name}: {path} has {size} bytes, expected {_limit(end)} at most"
            )
        found.setdefault(entry, set()).add(end)
    for (kind, name), ends in found.items():
        for end in set(ENDS) - ends:
            raise InputError(f"{place.name}: {kind} {name!r} has no {kind}.{end}")
    if BASE not in found:
        raise InputError(f"{place.name} is no skill library: it has no base/base.json")
    order = ["base", *FOLDERS]
    return sorted(found, key=lambda entry: (order.index(entry[0]), entry[1]))


def _entry(parts: list[str]) -> tuple[Entry | None, str]:
    """The entry that a path belongs to, and the file's ending."""
    stem, _, end = parts[-1].rpartition(".")
    kinds = {folder: kind for kind, folder in FOLDERS.items()}
    if parts[:-1] == ["base"]:
        entry = BASE
    elif len(parts) == 3 and parts[0] in kinds and NAME.fullmatch(parts[1]):
        entry = (kinds[parts[0]], parts[1])
    else:
        return None, end
    good = stem == entry[0] and end in ENDS
    return (entry if good else None), end


def _limit(end: str) -> int:
    return MAX_JSON if end == "json" else MAX_ARRAYS


def _path(entry: Entry, end: str) -> str:
    kind, name = entry
    folder = "base" if kind == "base" else f"{FOLDERS[kind]}/{name}"
    return f"{folder}/{kind}.{end}"


def _cards(place: Place, entries: Iterable[Entry]) -> dict[Entry, dict[str, Any]]:
    """Cards as they are in a place.

    Raises:
      InputError: a damaged one.
    """
    found = {}
    for entry in entries:
        path = _path(entry, "json")
        source = f"{place.name}: {path}"
        found[entry] = parse_json(place.read(path, MAX_JSON), source)
        verify_card(source, *entry, found[entry])
    return found


def _chosen(place: Place, entries: list[Entry], name: str | None) -> list[Entry]:
    """All entries, or one of them; of a gate its skills too."""
    if name is None:
        return entries
    entry = find_entry(entries, name, place.name)
    skills = _skills(entry, _cards(place, [entry])[entry])
    return [e for e in entries if e[0] == "skill" and e[1] in skills] + [entry]


def _new(here: Cards, place: Place, there: Cards, root: str) -> list[Entry]:
    """Entries that are there and not here.

    Args:
      here: cards of the library that is to get them; none of a new one.
      place: where they come from.
      there: their cards.
      root: the name of that library.

    Raises:
      InputError: another base, or another entry of the same name.
    """
    made_for = {
        card["fingerprint" if entry == BASE else "base_fingerprint"]
        for entry, card in there.items()
    }
    mine = here[BASE]["fingerprint"] if here else None
    for fingerprint in made_for:
        if mine is not None and fingerprint != mine:
            raise InputError(
                f"{place.name}: made for base {fingerprint}, the base of "
                f"{root} is {mine}"
            )
    for entry, card in there.items():
        if entry in here and here[entry]["fingerprint"] != card["fingerprint"]:
            kind, name = entry
            raise InputError(
                f"{root} has another {kind} {name!r} than {place.name}; remove one of "
                "them, or choose another name"
            )
    return [entry for entry in there if entry not in here]


def pull(
    root: str | Path, where: str, name: str | None = None, revision: str | None = None
) -> list[Entry]:
    """Add what a place holds to a library, or make a library of it.

    Args:
      root: the library, or a new folder.
      where: the place.
      name: of one entry, with the skills of a gate; default everything.
      revision: of a repository.

    Returns:
      The entries that were added; those that the library has already are not.

    Raises:
      InputError: no library there, paths that climb out, links, files that no library
        holds or that are damaged; another base; another entry of a name. The library is
        then as it was.
    """
    return _taken(root, place_of(where, revision), name)


def _taken(root: str | Path, place: Place, name: str | None) -> list[Entry]:
    library = SkillLibrary(root)
    here = _local(library)
    chosen = _chosen(place, entries_of(place), name)
    if not here:
        chosen = list(dict.fromkeys([BASE, *chosen]))
    there = _cards(place, dict.fromkeys([BASE, *chosen]))
    new = _new(here, place, {entry: there[entry] for entry in chosen}, str(root))
    if not new:
        return []
    # What is here already, for what is new to be verified with.
    needed = {BASE, *(("skill", name) for e in new for name in _skills(e, there[e]))}
    made = not library.root.exists()
    library = SkillLibrary.create(root)
    temporary = SkillLibrary(beside(library.root / "pull", "tmp"))
    try:
        with reported(f"write {temporary.root}"):
            for entry in new:
                temporary.folder(*entry).mkdir(parents=True)
                for end in ENDS:
                    content = place.read(_path(entry, end), _limit(end))
                    write_atomic(temporary.root / _path(entry, end), content)
            for entry in needed & here.keys():
                link = temporary.folder(*entry)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(library.folder(*entry).absolute())
        problems = temporary.verify()
        if problems:
            raise InputError(problems[0].replace(str(temporary.root), place.name))
        library.adopt(temporary, new)
    finally:
        shutil.rmtree(temporary.root, ignore_errors=True)
        if made:
            with contextlib.suppress(OSError):  # where it holds something now
                library.root.rmdir()
    return new


def _skills(entry: Entry, card: Mapping[str, Any]) -> list[str]:
    """The names of the skills that a gate weighs; none of other entries."""
    return card["skills"] if entry[0] == "gate" else []


def _local(library: SkillLibrary) -> dict[Entry, dict[str, Any]]:
    """The cards of a library, none of a folder that is new or empty.

    Raises:
      InputError: a damaged card, or a folder that holds something else.
    """
    if not library.root.exists():
        return {}
    if not (library.root / "base").is_dir():
        with reported(f"read {library.root}"):
            others = [p.name for p in library.root.iterdir() if p.name[0] != "."]
        if others:
            raise InputError(
                f"{library.root} is no skill library and holds {min(others)}; choose "
                "another folder"
            )
        return {}
    library = SkillLibrary.open(library.root)
    return {entry: library.card(*entry) for entry in library.entries()}


def push(
    root: str | Path, where: str, name: str | None = None, private: bool = True
) -> list[Entry]:
    """Add what a library holds to a place, with a README.md that says what it is.

    Args:
      root: the library.
      where: the place; a repository or folder that is not there is made.
      name: of one entry, with the skills of a gate and, where the place has none, the
        base; default everything.
      private: who may see a repository that is made.

    Returns:
      The entries that were added, or on the Hub whose card has changed.

    Raises:
      InputError: a library that is not whole; another base or another entry of a name
        there; or what the Hub refuses. Nothing was changed there then.
    """
    library = SkillLibrary.open(root)
    problems = library.verify()
    if problems:
        raise InputError(problems[0])
    mine, there = Folder(root), place_of(where)
    if isinstance(there, Folder):
        added = _taken(where, mine, name)
        path = there.root / README
        old = read_bytes(path, MAX_JSON).decode() if path.exists() else None
        text = readme(old, describe(_local(SkillLibrary(where)), where))
        if text != old:
            write_atomic(path, text)
        return added
    remote: dict[Entry, dict[str, Any]] = {}
    old = None
    if there.exists():
        files = there.files()
        if any(path.startswith("base/") for path in files):
            remote = _cards(there, entries_of(there))
        if README in files:
            old = there.read(README, MAX_JSON).decode("utf-8", "replace")
    chosen = _chosen(mine, entries_of(mine), name)
    if not remote:
        chosen = list(dict.fromkeys([BASE, *chosen]))
    cards = {entry: library.card(*entry) for entry in chosen}
    new = _new(remote, mine, cards, where)
    changed = [
        entry
        for entry, card in cards.items()
        if entry in remote and remote[entry]["card_sha256"] != card["card_sha256"]
    ]
    paths = [_path(entry, end) for entry in new for end in ENDS]
    paths += [_path(entry, "json") for entry in changed]
    content = {path: mine.read(path, MAX_ARRAYS) for path in paths}
    text = readme(old, describe({**remote, **cards}, where))
    if text != old:
        content[README] = text.encode()
    if content:
        names = ", ".join(f"{kind} {name}" for kind, name in [*new, *changed])
        there.write(content, f"psec_jax: {names or README}"[:200], private)
    return [*new, *changed]


def readme(old: str | None, text: str) -> str:
    """A README.md with a description in it.

    Args:
      old: the present one; what is outside of the description stays, and one without
        the marks of a description stays as it is.
      text: the description.
    """
    block = f"{_START}\n\n{text}\n{_END}"
    if old is None:
        return f"{_HEAD}\n{block}\n"
    before, start, rest = old.partition(_START)
    _, end, after = rest.partition(_END)
    return f"{before}{block}{after}" if start and end else old


_HEAD = """---
library_name: psec_jax
tags:
- robotics
- diffusion-policy
- lora
# license: yours to choose; it is not set by psec_jax
---
"""


def describe(cards: Cards, where: str) -> str:
    """A library in Markdown: base, skills, gates, returns, and commands to use it."""
    base = cards[BASE]
    rows = [
        f"# {_text(base['name'])}: composable skills of a diffusion policy",
        "",
        f"Base `{_text(base['name'])}` (fingerprint `{_text(base['fingerprint'])}`), "
        f"environment {_text(base.get('env') or 'not known')}, observations of "
        f"{base['obs_dim']} numbers, actions of {base['action_dim']}.",
        "",
        "| kind | name | environment | form | return |",
        "|---|---|---|---|---|",
    ]
    for (kind, name), card in cards.items():
        returns = card.get("returns") or {}
        found = f"{returns['mean']:.1f}" if "mean" in returns else "-"
        form = form_text(card)
        env = card.get("env") or "-"
        cells = (kind, name, env, form, found)
        rows.append(f"| {' | '.join(map(_text, cells))} |")
    gates = [name for kind, name in cards if kind == "gate"]
    skills = [name for kind, name in cards if kind == "skill"]
    policy = f"--gate={gates[0]}" if gates else ""
    if skills and not gates:
        policy = f"--skills={skills[0]}"
    target = f"runs/{where.rstrip('/').rpartition('/')[2] or 'library'}"
    return "\n".join(
        [
            *rows,
            "",
            "Arrays are safetensors, with hashes in the JSON card beside them. With "
            "psec_jax:",
            "",
            f"    python -m launch.library pull --library={target} --from={where}",
            f"    python -m launch.library list --library={target}",
            f"    python -m launch.evaluate --library={target} {policy} --env=...",
            "",
        ]
    )


def _text(value: Any) -> str:
    """A value of a card in Markdown; it may be anybody's."""
    text = printable(str(value)).replace("\n", " ")[:200]
    return re.sub(r"([\\`*<>|\[\]&])", r"\\\1", text)
