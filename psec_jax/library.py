"""The skill library on disk: one base, any number of skills and gates.

    ROOT/base/base.safetensors            ROOT/base/base.json
    ROOT/skills/NAME/skill.safetensors    ROOT/skills/NAME/skill.json
    ROOT/gates/NAME/gate.safetensors      ROOT/gates/NAME/gate.json
    ROOT/removed/skills/NAME/...          what was retired, and can be restored

Arrays are in safetensors files under "/"-joined paths of their pytree; the JSON card
beside them says what they are, with the SHA-256 of the arrays' file and of the card
itself. A folder appears whole or not at all. What is added, replaced or removed is
decided under a lock, ROOT/.lock; readers need none.

A library may come from anybody: hashes only show accidents, so that every field of a
card and every array is checked for what it has to be.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import safetensors
import safetensors.numpy

from psec_jax import tree
from psec_jax.cards import DTYPES, NAME, check_card, form_of, shortened
from psec_jax.errors import InputError, printable
from psec_jax.files import (
    beside,
    left_over,
    locked,
    read_bytes,
    read_json,
    recover,
    regular_size,
    remove_folder,
    replace_folder,
    reported,
    sync_folder,
    write_atomic,
    write_json,
)
from psec_jax.gating import GateConfig, check_gate, of_today
from psec_jax.lora import adapter_of, check_skill, rank_of
from psec_jax.types import Normaliser, Params

FORMAT_VERSION = 1
FOLDERS = {"skill": "skills", "gate": "gates"}
_MAX_LEVELS = 16  # of an array's path

T = TypeVar("T")


def base_fingerprint(params: Params, normaliser: Normaliser) -> str:
    """16 hex digits that change with any number of the base or its normaliser."""
    return tree.fingerprint(_base_tensors(params, normaliser))


def _base_tensors(params: Params, normaliser: Normaliser) -> dict[str, Any]:
    return {"params": params, "normaliser": dict(normaliser._asdict())}


class SkillLibrary:
    """A library's folder; every method reads or writes it at once."""

    def __init__(self, root: str | Path) -> None:
        """Use `open` or `create`."""
        self.root = Path(root).expanduser()

    def _lock(self, shared: bool = False) -> Any:
        return locked(self.root / ".lock", shared)

    @classmethod
    def open(cls, root: str | Path) -> "SkillLibrary":
        """An existing library.

        Raises:
          InputError: there is none.
        """
        library = cls(root)
        library._recover()
        if not (library.root / "base" / "base.json").is_file():
            raise InputError(
                f"{root} is not a skill library: it has no base/base.json; "
                "python -m launch.pretrain makes one"
            )
        return library

    @classmethod
    def create(cls, root: str | Path) -> "SkillLibrary":
        """A library, new or existing.

        Raises:
          InputError: the folder cannot be made.
        """
        library = cls(root)
        with reported(f"make library {root}"):
            library.root.mkdir(parents=True, exist_ok=True)
        library._recover()
        return library

    def _recover(self) -> None:
        folders = (self.root, *(self.root / f for f in FOLDERS.values()))
        folders = [f for f in folders if f.is_dir() and left_over(f)]
        # A reader of a library that it may not write leaves everything as it is.
        if folders and os.access(self.root, os.W_OK):
            with self._lock():
                for folder in folders:
                    recover(folder)

    def _again(self, read: Callable[[], T]) -> T:
        """What `read` returns, read once more where a writer may have been at it."""
        try:
            return read()
        except InputError:
            with self._lock(shared=True):
                return read()

    def skills(self) -> list[str]:
        """Names of the skills, sorted."""
        return self._names("skill")

    def gates(self) -> list[str]:
        """Names of the gates, sorted."""
        return self._names("gate")

    def _names(self, kind: str) -> list[str]:
        folder = self.root / FOLDERS[kind]
        if not folder.is_dir():
            return []
        return sorted(p.name for p in folder.iterdir() if NAME.fullmatch(p.name))

    def add_base(
        self,
        params: Params,
        normaliser: Normaliser,
        card: Mapping[str, Any],
        overwrite: bool = False,
    ) -> None:
        """Add the base.

        Args:
          params: the denoiser's parameters.
          normaliser: of observations.
          card: "name", "obs_dim", "action_dim", "network", "process" and whatever
            else says where it comes from.
          overwrite: replace a base that a run of the same "config" made; refused while
            skills or gates need it.

        Raises:
          InputError: there is a base already, also one that another run added since,
            or the disk is full.
        """
        tensors = _base_tensors(params, normaliser)
        fingerprint = tree.fingerprint(tensors)
        name = str(card["name"])
        _check_base(f"base {name!r}", tensors, card)
        with self._lock():
            if os.path.lexists(self.folder("base", "base")):
                old = self._read_card("base", "base")
                dependants = self.skills() + self.gates()
                if old["fingerprint"] != fingerprint and dependants:
                    raise InputError(
                        f"{self.root}: the base {old['fingerprint']} cannot be "
                        f"replaced by {fingerprint}: {', '.join(dependants)} were made "
                        "for it"
                    )
                if not overwrite:
                    raise InputError(f"{self.root} has a base already")
                self._same_run("base", "base", old, card)
            self._add("base", name, tensors, dict(card) | {"fingerprint": fingerprint})

    def add_skill(
        self,
        name: str,
        params: Params,
        card: Mapping[str, Any],
        overwrite: bool = False,
    ) -> None:
        """Add one skill made for this library's base.

        Args:
          name: letters, digits, ".", "_" and "-".
          params: {layer: {"a", "b"}}.
          card: "alpha" (the strength it was trained at), "objective", "env", ... If it
            names a "base_fingerprint" or "obs_dim", they must be the base's.
          overwrite: replace a skill of that name that a run of the same "config" made;
            refused while gates need it.

        Raises:
          InputError: a bad name, one that another run used since, another base, other
            layers, numbers that are not finite, or a full disk.
        """
        _check_fields("skill", name, card, ("alpha",))
        with self._lock():
            base, _, base_card = self._load_base()
            check_skill(base, params, f"skill {name!r}")
            check_finite(f"skill {name!r}", params)
            print_ = tree.fingerprint(params)
            card = self._adopt("skill", name, card, base_card, overwrite, print_)
            card |= {
                "adapter": adapter_of(params),
                "rank": rank_of(params),
                "fingerprint": print_,
            }
            self._add("skill", name, params, card)

    def add_gate(
        self,
        name: str,
        params: Params,
        card: Mapping[str, Any],
        overwrite: bool = False,
    ) -> None:
        """Add one gate over skills of this library.

        Args:
          name: letters, digits, ".", "_" and "-".
          params: {"head": ..., "support": ...}.
          card: "skills" (names in the order of alpha), "level", "gate" (its form). If
            it names "skill_fingerprints", they must be those of the library's skills.
          overwrite: replace a gate of that name that a run of the same "config" made.

        Raises:
          InputError: a bad name, one that another run used since, an unknown skill,
            another base, a skill that was replaced, arrays of another form than the
            card's, numbers that are not finite, or a full disk.
        """
        _check_fields("gate", name, card, ("skills", "level", "gate"))
        print_ = tree.fingerprint(params)
        with self._lock():
            _, _, base_card = self._load_base()
            card = self._adopt("gate", name, card, base_card, overwrite, print_)
            prints = self._skill_fingerprints(card["skills"])
            card = {"skill_fingerprints": prints} | card
            self._same_skills(name, card, prints)
            _check_gate(f"gate {name!r}", params, card)
            card |= {"fingerprint": print_}
            self._add("gate", name, params, card)

    def _adopt(
        self,
        kind: str,
        name: str,
        card: Mapping[str, Any],
        base_card: Mapping[str, Any],
        overwrite: bool,
        fingerprint: str,
    ) -> dict[str, Any]:
        """The card with the base's identity; refuses a name or a base that is wrong."""
        if os.path.lexists(self.folder(kind, name)):
            if not overwrite:
                raise InputError(f"{self.root} has a {kind} {name!r} already")
            self._check_replaced(kind, name, card, fingerprint)
        mine = {
            "base_fingerprint": base_card["fingerprint"],
            "obs_dim": base_card["obs_dim"],
            "action_dim": base_card["action_dim"],
        }
        for field, expected in mine.items():
            if card.get(field, expected) != expected:
                raise InputError(
                    f"{kind} {name!r}: made for {field} {card[field]}, the base of "
                    f"{self.root} has {expected}"
                )
        return dict(card) | mine

    def _check_replaced(
        self, kind: str, name: str, card: Mapping[str, Any], fingerprint: str
    ) -> None:
        """Refuse to replace an entry of another run, or a skill that a gate needs."""
        if self.folder(kind, name).is_symlink():
            return  # what it names stays
        old = self._read_card(kind, name)
        self._same_run(kind, name, old, card)
        if kind == "skill" and old["fingerprint"] != fingerprint:
            self._refuse_needed(name)

    def _same_run(
        self, kind: str, name: str, old: Mapping[str, Any], card: Mapping[str, Any]
    ) -> None:
        if old.get("config") != _as_json(card.get("config")):
            raise InputError(
                f"{self._made_by_another(kind, name)}; what this run trained stays in "
                "its workdir, and the same command adds it once there is none"
            )

    def _made_by_another(self, kind: str, name: str) -> str:
        what = "a base" if kind == "base" else f"a {kind} {name!r}"
        advice = "another library" if kind == "base" else "another name, or remove it"
        return f"{self.root} has {what} already, made by another run; choose {advice}"

    def load_base(self) -> tuple[Params, Normaliser, dict[str, Any]]:
        """Parameters, normaliser and card of the base.

        Raises:
          InputError: the library is damaged; the file is named.
        """
        return self._again(self._load_base)

    def _load_base(self) -> tuple[Params, Normaliser, dict[str, Any]]:
        tensors, card = self._load("base", "base")
        normaliser = Normaliser(**tensors["normaliser"])
        return tensors["params"], normaliser, card

    def load_skill(self, name: str) -> tuple[Params, dict[str, Any]]:
        """Parameters and card of one skill, checked against the base.

        Raises:
          InputError: an unknown name, a damaged file, or a skill of another base.
        """
        [skill] = self.load_skills([name])
        return skill

    def load_skills(self, names: Sequence[str]) -> list[tuple[Params, dict[str, Any]]]:
        """`load_skill` of several; the base is read once.

        Raises:
          InputError: as `load_skill`.
        """
        return self._again(lambda: self._load_skills(names))

    def _load_skills(self, names: Sequence[str]) -> list[tuple[Params, dict[str, Any]]]:
        base, _, base_card = self._load_base()
        return [self._load_skill(name, base, base_card) for name in names]

    def _load_skill(
        self, name: str, base: Params, base_card: dict[str, Any]
    ) -> tuple[Params, dict[str, Any]]:
        params, card = self._load("skill", name)
        self._same_base("skill", name, card, base_card)
        check_skill(base, params, f"skill {name!r}")
        got = (adapter_of(params), rank_of(params))
        if got != (card["adapter"], card["rank"]):
            raise InputError(
                f"skill {name!r}: is a {got[0]} of rank {got[1]}, its card says "
                f"{card['adapter']} of rank {card['rank']}"
            )
        return params, card

    def load_gate(self, name: str) -> tuple[Params, dict[str, Any]]:
        """Parameters and card of one gate, checked against base and skills.

        Raises:
          InputError: an unknown name, a damaged file, a gate of another base, or a
            skill that was replaced since.
        """
        return self._again(lambda: self._load_gate(name))

    def _load_gate(self, name: str) -> tuple[Params, dict[str, Any]]:
        params, card = self._load("gate", name)
        self._same_base("gate", name, card, self._read_card("base", "base"))
        self._same_skills(name, card, self._skill_fingerprints(card["skills"]))
        _check_gate(f"gate {name!r}", params, card)
        return params, card

    def _skill_fingerprints(self, names: Sequence[str]) -> list[str]:
        return [self._read_card("skill", name)["fingerprint"] for name in names]

    def _same_skills(
        self, name: str, card: Mapping[str, Any], prints: Sequence[str]
    ) -> None:
        for skill, made_for, found in zip(
            card["skills"], card["skill_fingerprints"], prints, strict=True
        ):
            if found != made_for:
                raise InputError(
                    f"gate {name!r}: made for skill {skill!r} {made_for}, the library "
                    f"has {found}; make the gate again"
                )

    def _same_base(
        self,
        kind: str,
        name: str,
        card: Mapping[str, Any],
        base_card: Mapping[str, Any],
    ) -> None:
        for field in ("obs_dim", "action_dim"):
            if card[field] != base_card[field]:
                raise InputError(
                    f"{kind} {name!r}: made for {field} {card[field]}, the base of "
                    f"{self.root} has {base_card[field]}"
                )
        if card["base_fingerprint"] != base_card["fingerprint"]:
            raise InputError(
                f"{kind} {name!r}: made for base {card['base_fingerprint']}, the base "
                f"of {self.root} is {base_card['fingerprint']}"
            )

    def set_returns(self, kind: str, name: str, returns: Mapping[str, Any]) -> None:
        """Record evaluation returns on the card of a "skill" or "gate".

        Raises:
          InputError: an unknown name, a symbolic link, a damaged card, or a file that
            cannot be written.
        """
        folder = self.folder(kind, name)
        with self._lock():
            card = self._read_card(kind, name)
            if folder.is_symlink():
                raise InputError(f"{folder} is a symbolic link, which is not written")
            card["returns"] = dict(returns)
            write_json(folder / f"{kind}.json", _sealed(card))

    def remove(self, kind: str, name: str) -> None:
        """Remove a "skill" or "gate"; of a symbolic link the link alone.

        Raises:
          InputError: an unknown name, or a skill that a gate needs.
        """
        if kind not in FOLDERS:
            raise InputError(f"cannot remove a {kind}; expected skill or gate")
        folder = self.folder(kind, name)
        self._refuse_linked(kind)
        with self._lock():
            if not folder.is_symlink():
                self._require(kind, name)
            if kind == "skill":
                self._refuse_needed(name)
            with reported(f"remove {folder}"):
                remove_folder(folder)

    def retire(self, kind: str, name: str) -> None:
        """Remove a "skill" or "gate" so that `restore` brings it back.

        Raises:
          InputError: as `remove`; a symbolic link; one of that name was retired before.
        """
        folder, aside = self.folder(kind, name), self._retired(kind, name)
        self._refuse_linked(kind)
        with self._lock():
            self._require(kind, name)
            if folder.is_symlink():
                raise InputError(f"{folder} is a symbolic link, which is not retired")
            if kind == "skill":
                self._refuse_needed(name)
            if os.path.lexists(aside):
                raise InputError(
                    f"{aside} is there already; restore it or move it elsewhere"
                )
            _move(folder, aside)

    def restore(self, kind: str, name: str) -> None:
        """Bring a retired "skill" or "gate" back.

        Raises:
          InputError: none of that name was retired; one of that name was added since;
            it is damaged, or does not fit the library as it is now. It stays retired.
        """
        folder, aside = self.folder(kind, name), self._retired(kind, name)
        self._refuse_linked(kind)
        with self._lock():
            if not aside.is_dir():
                names = ", ".join(self.retired(kind)) or "none"
                raise InputError(f"{self.root} has no retired {kind} {name!r}: {names}")
            if os.path.lexists(folder):
                raise InputError(f"{self.root} has a {kind} {name!r} again")
            _move(aside, folder)
            try:
                if kind == "skill":
                    self._load_skills([name])
                else:
                    self._load_gate(name)
            except InputError:
                _move(folder, aside)
                raise

    def retired(self, kind: str) -> list[str]:
        """Names of the retired ones of a kind, sorted."""
        folder = self._retired(kind, "any").parent
        names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
        return sorted(name for name in names if NAME.fullmatch(name))

    def _retired(self, kind: str, name: str) -> Path:
        return self.root / "removed" / self.folder(kind, name).relative_to(self.root)

    def _refuse_needed(self, skill: str) -> None:
        for gate in self.gates():
            if skill in self._read_card("gate", gate)["skills"]:
                raise InputError(
                    f"skill {skill!r} is needed by gate {gate!r}; remove that first"
                )

    def _refuse_linked(self, kind: str) -> None:
        folder = self.folder(kind, "any").parent
        if kind != "base" and folder.is_symlink():
            raise InputError(
                f"{folder} is a symbolic link, through which nothing is written; move "
                "the folder itself there"
            )

    def adopt(self, other: "SkillLibrary", entries: Sequence[tuple[str, str]]) -> None:
        """Move entries of another library, all of which was verified, into this one.

        Args:
          other: on the same disk.
          entries: kinds and names, the base before skills and these before gates, so
            that the library is whole wherever a kill ends it.

        Raises:
          InputError: a name that is in use by now, another base, or a full disk.
        """
        with self._lock():
            for kind, name in entries:
                self._refuse_linked(kind)
                if os.path.lexists(self.folder(kind, name)):
                    raise InputError(f"{self.root} has a {kind} {name!r} already")
            if ("base", "base") not in entries:
                mine = self._read_card("base", "base")["fingerprint"]
                theirs = other._read_card("base", "base")["fingerprint"]
                if mine != theirs:
                    raise InputError(
                        f"{other.root}: made for base {theirs}, the base of "
                        f"{self.root} is {mine}"
                    )
            for kind, name in entries:
                _move(other.folder(kind, name), self.folder(kind, name))

    def entries(self) -> list[tuple[str, str]]:
        """("base", "base"), then every ("skill", name) and ("gate", name)."""
        return [
            ("base", "base"),
            *(("skill", name) for name in self.skills()),
            *(("gate", name) for name in self.gates()),
        ]

    def holds(self, kind: str, name: str, config: Mapping[str, Any]) -> bool:
        """Whether the entry is there, made by a run of this config.

        Raises:
          InputError: a bad name, a damaged card, or an entry that another run made.
        """
        if not self.folder(kind, name).exists():
            return False
        if self.card(kind, name).get("config") == _as_json(dict(config)):
            return True
        raise InputError(self._made_by_another(kind, name))

    def card(self, kind: str, name: str) -> dict[str, Any]:
        """One card.

        Raises:
          InputError: an unknown name or a damaged card.
        """
        return self._again(lambda: self._read_card(kind, name))

    def size(self, kind: str, name: str) -> int:
        """Bytes of an entry's arrays.

        Raises:
          InputError: an unknown name, or no such file.
        """
        return regular_size(self._require(kind, name) / f"{kind}.safetensors")

    def verify(self) -> list[str]:
        """One line for each thing wrong; an empty list means every file is whole."""
        problems = []
        for kind, name in self.entries():
            try:
                if kind == "base":
                    self.load_base()
                elif kind == "skill":
                    self.load_skill(name)
                else:
                    self.load_gate(name)
            except InputError as error:
                if kind == "base" or os.path.lexists(self.folder(kind, name)):
                    problems.append(str(error))  # else it was removed meanwhile
        # A damaged base is reported again for every skill.
        return list(dict.fromkeys(problems))

    def folder(self, kind: str, name: str) -> Path:
        """Where an entry is, or would be.

        Raises:
          InputError: no name of an entry.
        """
        if kind == "base":
            return self.root / "base"
        if not NAME.fullmatch(name):
            raise InputError(
                f"{kind} name {name!r}: expected letters, digits, '.', '_' and '-', "
                "not starting with '.'"
            )
        return self.root / FOLDERS[kind] / name

    def _require(self, kind: str, name: str) -> Path:
        folder = self.folder(kind, name)
        if not folder.is_dir():
            names = self._names(kind) if kind in FOLDERS else []
            raise InputError(
                f"{self.root} has no {kind} {name!r}; it has "
                f"{', '.join(names) or 'none'}"
            )
        return folder

    def _read_card(self, kind: str, name: str) -> dict[str, Any]:
        path = self._require(kind, name) / f"{kind}.json"
        card = read_json(path)
        verify_card(str(path), kind, name, card)
        return card

    def _load(self, kind: str, name: str) -> tuple[Params, dict[str, Any]]:
        card = self._read_card(kind, name)
        path = self.folder(kind, name) / f"{kind}.safetensors"
        content = read_bytes(path)
        found = hashlib.sha256(content).hexdigest()
        if found != card["sha256"]:
            raise InputError(
                f"{path}: SHA-256 is {found[:12]}, its card says {card['sha256'][:12]}"
            )
        flat = read_arrays(path, content)
        found = _layout(flat)
        if found != card["tensors"]:
            wrong = min(
                name
                for name in found.keys() | card["tensors"].keys()
                if found.get(name) != card["tensors"].get(name)
            )
            raise InputError(
                f"{path}: holds {wrong!r} as {found.get(wrong)}, its card says "
                f"{card['tensors'].get(wrong)}"
            )
        params = tree.unflatten(flat)
        check_finite(str(path), params)
        if kind == "base":
            _check_base(str(path), params, card)
        if (print_ := tree.fingerprint(params)) != card["fingerprint"]:
            raise InputError(
                f"{path}: its numbers have the fingerprint {print_}, its card says "
                f"{card['fingerprint']}"
            )
        return params, card

    def _add(self, kind: str, name: str, params: Params, card: dict[str, Any]) -> None:
        folder = self.folder(kind, name)
        self._refuse_linked(kind)
        # Not np.ascontiguousarray: that turns a scalar into an array of one element.
        flat = {
            path: np.asarray(leaf, order="C")
            for path, leaf in tree.flatten(params).items()
        }
        content = safetensors.numpy.save(flat)
        card = card | {
            "kind": kind,
            "name": name,
            "format_version": FORMAT_VERSION,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "sha256": hashlib.sha256(content).hexdigest(),
            "tensors": _layout(flat),
        }
        sealed = _sealed(card)
        check_card(f"{kind} {name!r}", kind, name, sealed)
        temporary = beside(folder, "tmp")
        try:
            with reported(f"write {folder}"):
                temporary.mkdir(parents=True, exist_ok=True)
                write_atomic(temporary / f"{kind}.safetensors", content)
                write_json(temporary / f"{kind}.json", sealed)
                sync_folder(temporary)
                replace_folder(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _move(source: Path, target: Path) -> None:
    with reported(f"move {source} to {target}"):
        target.parent.mkdir(parents=True, exist_ok=True)
        os.rename(source, target)
        sync_folder(target.parent)
        sync_folder(source.parent)


def verify_card(source: str, kind: str, name: str, card: Mapping[str, Any]) -> None:
    """Refuse a card of another format, one that was edited, or one that says what no
    card of this kind and name does.

    Args:
      source: its file, named in messages.
      kind: "base", "skill" or "gate".
      name: of the entry's folder.
      card: what the file holds.

    Raises:
      InputError: any of these.
    """
    if card.get("format_version") != FORMAT_VERSION:
        made = card.get("versions")
        by = made.get("psec_jax") if isinstance(made, dict) else None
        raise InputError(
            f"{source}: format version {shortened(card.get('format_version'))}, "
            f"expected {FORMAT_VERSION}; to read it, use the psec_jax that wrote it"
            f"{f', {shortened(by)},' if by else ''} or a later one"
        )
    if card.get("card_sha256") != _card_hash(card):
        raise InputError(f"{source}: does not match its own hash; it was edited")
    check_card(source, kind, name, card)


def find_entry(
    entries: Sequence[tuple[str, str]], name: str, where: str
) -> tuple[str, str]:
    """Kind and name of the entry that NAME, or KIND/NAME, stands for.

    Args:
      entries: all kinds and names.
      name: of one of them.
      where: the library, named in messages.

    Raises:
      InputError: no such entry, or several.
    """
    kind, slash, rest = name.partition("/")
    found = [
        entry
        for entry in entries
        if entry == (kind, rest) or (not slash and entry[1] == name)
    ]
    if not found:
        names = ", ".join(name for _, name in entries)
        raise InputError(f"{where} has no {name!r}; it has {names}")
    if len(found) > 1:
        raise InputError(
            f"{where} has several entries {name!r}; "
            f"write {' or '.join(f'{kind}/{name}' for kind, name in found)}"
        )
    return found[0]


def read_arrays(path: Path | str, content: bytes) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file, by path.

    Raises:
      InputError: not such a file, or types and paths that no tree of this project has.
    """
    try:
        flat = safetensors.numpy.load(content)
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is not a safetensors file: {error}") from error
    for name, array in flat.items():
        parts = name.split("/")
        if len(parts) > _MAX_LEVELS or "" in parts or str(array.dtype) not in DTYPES:
            raise InputError(
                f"{path}: array {name!r:.80} of type {array.dtype}, expected "
                f"LAYER/NAME and one of {', '.join(DTYPES)}"
            )
    return flat


def _check_fields(
    kind: str, name: str, card: Mapping[str, Any], fields: Sequence[str]
) -> None:
    for field in fields:
        if field not in card:
            raise InputError(f"{kind} {name!r}: its card has no {field!r}")


def _check_base(source: str, tensors: Params, card: Mapping[str, Any]) -> None:
    """Refuse a base whose arrays are not a network's and a normaliser's, or odd."""
    if tensors.keys() != {"params", "normaliser"} or not isinstance(
        tensors["params"], Mapping
    ):
        raise InputError(f"{source}: holds no params and normaliser")
    normaliser = tensors["normaliser"]
    shape = (card["obs_dim"],)
    if not isinstance(normaliser, Mapping) or normaliser.keys() != {"mean", "std"}:
        raise InputError(f"{source}: its normaliser has no mean and std")
    for field, array in normaliser.items():
        if np.shape(array) != shape:
            raise InputError(
                f"{source}: the normaliser's {field} has shape {np.shape(array)}, "
                f"expected {shape}"
            )
    check_finite(source, tensors)
    if not np.all(np.asarray(normaliser["std"]) > 0):
        raise InputError(f"{source}: the normaliser's std is not above 0")


def gate_config(card: Mapping[str, Any], source: str = "gate") -> GateConfig:
    """The form of gate a gate's card describes, an older one too."""
    return form_of(GateConfig, of_today(card["gate"]), f"{source}: gate")


def _check_gate(source: str, params: Params, card: Mapping[str, Any]) -> None:
    check_finite(source, params)
    form = gate_config(card, source)
    sizes = (card["obs_dim"], card["action_dim"], len(card["skills"]))
    check_gate(form, params, *sizes, source)


def check_finite(source: str, params: Params) -> None:
    """Refuse NaN and infinity.

    Args:
      source: what holds the arrays, named in the message.
      params: a tree of arrays.

    Raises:
      InputError: there are some; the array is named.
    """
    for path, leaf in tree.flatten(params).items():
        array = np.asarray(leaf)
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            bad = array.size - np.count_nonzero(np.isfinite(array))
            raise InputError(
                f"{source}: {path} holds {bad} NaN or infinite of {array.size} values"
            )


def _as_json(value: Any) -> Any:
    """As it will be read back: JSON has no tuples, and only strings for keys."""
    return json.loads(json.dumps(value, default=_plain))


def _layout(flat: Mapping[str, np.ndarray]) -> dict[str, Any]:
    return {path: [list(x.shape), str(x.dtype)] for path, x in flat.items()}


def _sealed(card: Mapping[str, Any]) -> dict[str, Any]:
    plain = _as_json(dict(card))
    return plain | {"card_sha256": _card_hash(plain)}


def _plain(value: Any) -> Any:
    """A number or array of NumPy or JAX as JSON holds it.

    Raises:
      InputError: anything else that JSON does not hold.
    """
    if isinstance(value, (np.generic, np.ndarray)) or hasattr(value, "__array__"):
        return np.asarray(value).tolist()
    raise InputError(f"a card holds {value!r}, expected numbers, texts, lists or dicts")


def _card_hash(card: Mapping[str, Any]) -> str:
    content = {field: value for field, value in card.items() if field != "card_sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text in aligned columns; the first row is the head."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
