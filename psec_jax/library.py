"""The skill library on disk: one base, any number of skills and gates.

    ROOT/base/base.safetensors            ROOT/base/base.json
    ROOT/skills/NAME/skill.safetensors    ROOT/skills/NAME/skill.json
    ROOT/gates/NAME/gate.safetensors      ROOT/gates/NAME/gate.json

Arrays lie in safetensors files under "/"-joined paths of their pytree; the JSON card
beside them says what they are, with the SHA-256 of the arrays' file and of the card
itself. A folder appears whole or not at all.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from psec_jax import tree
from psec_jax.errors import InputError
from psec_jax.files import (
    beside,
    read_json,
    recover,
    remove_folder,
    replace_folder,
    reported,
    sync_folder,
    write_atomic,
    write_json,
)
from psec_jax.lora import adapter_of, check_skill, rank_of
from psec_jax.types import Normaliser, Params

FORMAT_VERSION = 1
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
_FOLDERS = {"skill": "skills", "gate": "gates"}


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
        for folder in (self.root, *(self.root / f for f in _FOLDERS.values())):
            if folder.is_dir():
                recover(folder)

    def skills(self) -> list[str]:
        """Names of the skills, sorted."""
        return self._names("skill")

    def gates(self) -> list[str]:
        """Names of the gates, sorted."""
        return self._names("gate")

    def _names(self, kind: str) -> list[str]:
        folder = self.root / _FOLDERS[kind]
        if not folder.is_dir():
            return []
        return sorted(p.name for p in folder.iterdir() if _NAME.fullmatch(p.name))

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
          overwrite: replace a base; refused while skills or gates need it.

        Raises:
          InputError: there is a base already, or the disk is full.
        """
        fingerprint = base_fingerprint(params, normaliser)
        existing = self.root / "base" / "base.json"
        if existing.exists():
            old = self._read_card("base", "base")["fingerprint"]
            dependants = self.skills() + self.gates()
            if old != fingerprint and dependants:
                raise InputError(
                    f"{self.root}: the base {old} cannot be replaced by {fingerprint}: "
                    f"{', '.join(dependants)} were made for it"
                )
            if not overwrite:
                raise InputError(f"{self.root} has a base already")
        self._add(
            "base",
            str(card["name"]),
            _base_tensors(params, normaliser),
            dict(card) | {"fingerprint": fingerprint},
        )

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
          overwrite: replace a skill of that name.

        Raises:
          InputError: a bad name, another base, other layers, or a full disk.
        """
        _check_card("skill", name, card, ("alpha",))
        base, _, base_card = self.load_base()
        check_skill(base, params, f"skill {name!r}")
        card = self._adopt("skill", name, card, base_card, overwrite)
        card |= {
            "adapter": adapter_of(params),
            "rank": rank_of(params),
            "fingerprint": tree.fingerprint(params),
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
          overwrite: replace a gate of that name.

        Raises:
          InputError: a bad name, an unknown skill, another base, a skill that was
            replaced, or a full disk.
        """
        _check_card("gate", name, card, ("skills", "level", "gate"))
        _, _, base_card = self.load_base()
        card = self._adopt("gate", name, card, base_card, overwrite)
        prints = self._skill_fingerprints(card["skills"])
        card = {"skill_fingerprints": prints} | card
        self._same_skills(name, card, prints)
        card |= {"fingerprint": tree.fingerprint(params)}
        self._add("gate", name, params, card)

    def _adopt(
        self,
        kind: str,
        name: str,
        card: Mapping[str, Any],
        base_card: Mapping[str, Any],
        overwrite: bool,
    ) -> dict[str, Any]:
        """The card with the base's identity; refuses a name or a base that is wrong."""
        folder = self._folder(kind, name)
        if folder.exists() and not overwrite:
            raise InputError(f"{self.root} has a {kind} {name!r} already")
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

    def load_base(self) -> tuple[Params, Normaliser, dict[str, Any]]:
        """Parameters, normaliser and card of the base.

        Raises:
          InputError: the library is damaged; the file is named.
        """
        tensors, card = self._load("base", "base")
        normaliser = Normaliser(**tensors["normaliser"])
        return tensors["params"], normaliser, card

    def load_skill(self, name: str) -> tuple[Params, dict[str, Any]]:
        """Parameters and card of one skill, checked against the base.

        Raises:
          InputError: an unknown name, a damaged file, or a skill of another base.
        """
        params, card = self._load("skill", name)
        base, _, base_card = self.load_base()
        self._same_base("skill", name, card, base_card)
        check_skill(base, params, f"skill {name!r}")
        return params, card

    def load_gate(self, name: str) -> tuple[Params, dict[str, Any]]:
        """Parameters and card of one gate, checked against base and skills.

        Raises:
          InputError: an unknown name, a damaged file, a gate of another base, or a
            skill that was replaced since.
        """
        params, card = self._load("gate", name)
        self._same_base("gate", name, card, self._read_card("base", "base"))
        self._same_skills(name, card, self._skill_fingerprints(card["skills"]))
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
        """Record evaluation returns on the card of a "skill" or "gate"."""
        card = self._read_card(kind, name)
        card["returns"] = dict(returns)
        write_json(self._folder(kind, name) / f"{kind}.json", _sealed(card))

    def remove(self, kind: str, name: str) -> None:
        """Remove a "skill" or "gate".

        Raises:
          InputError: an unknown name, or a skill that a gate needs.
        """
        if kind not in _FOLDERS:
            raise InputError(f"cannot remove a {kind}; expected skill or gate")
        self._require(kind, name)
        if kind == "skill":
            for gate in self.gates():
                if name in self._read_card("gate", gate)["skills"]:
                    raise InputError(
                        f"skill {name!r} is needed by gate {gate!r}; remove that first"
                    )
        folder = self._folder(kind, name)
        with reported(f"remove {folder}"):
            remove_folder(folder)

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
        folder = self._folder(kind, name)
        if not folder.exists():
            return False
        # As JSON holds it: lists for tuples.
        mine = json.loads(json.dumps(dict(config)))
        if self._read_card(kind, name).get("config") == mine:
            return True
        what = "a base" if kind == "base" else f"a {kind} {name!r}"
        advice = "another library" if kind == "base" else "another name, or remove it"
        raise InputError(
            f"{self.root} has {what} already, made by another run; choose {advice}"
        )

    def card(self, kind: str, name: str) -> dict[str, Any]:
        """One card.

        Raises:
          InputError: an unknown name or a damaged card.
        """
        return self._read_card(kind, name)

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
                problems.append(str(error))
        # A damaged base is found again by every skill.
        return list(dict.fromkeys(problems))

    def _folder(self, kind: str, name: str) -> Path:
        if kind == "base":
            return self.root / "base"
        if not _NAME.fullmatch(name):
            raise InputError(
                f"{kind} name {name!r}: expected letters, digits, '.', '_' and '-', "
                "not starting with '.'"
            )
        return self.root / _FOLDERS[kind] / name

    def _require(self, kind: str, name: str) -> Path:
        folder = self._folder(kind, name)
        if not folder.is_dir():
            names = self._names(kind) if kind in _FOLDERS else []
            raise InputError(
                f"{self.root} has no {kind} {name!r}; it has "
                f"{', '.join(names) or 'none'}"
            )
        return folder

    def _read_card(self, kind: str, name: str) -> dict[str, Any]:
        path = self._require(kind, name) / f"{kind}.json"
        card = read_json(path)
        if card.get("format_version") != FORMAT_VERSION:
            raise InputError(
                f"{path}: format version {card.get('format_version')!r}, "
                f"expected {FORMAT_VERSION}"
            )
        if card.get("card_sha256") != _card_hash(card):
            raise InputError(f"{path}: does not match its own hash; it was edited")
        return card

    def _load(self, kind: str, name: str) -> tuple[Params, dict[str, Any]]:
        card = self._read_card(kind, name)
        path = self._folder(kind, name) / f"{kind}.safetensors"
        with reported(f"read {path}"):
            content = path.read_bytes()
        found = hashlib.sha256(content).hexdigest()
        if found != card["sha256"]:
            raise InputError(
                f"{path}: SHA-256 is {found[:12]}, its card says {card['sha256'][:12]}"
            )
        try:
            flat = safetensors.numpy.load(content)
        except safetensors.SafetensorError as error:
            raise InputError(f"{path} is not a safetensors file: {error}") from error
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
        return tree.unflatten(flat), card

    def _add(self, kind: str, name: str, params: Params, card: dict[str, Any]) -> None:
        folder = self._folder(kind, name)
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
        temporary = beside(folder, "tmp")
        try:
            with reported(f"write {folder}"):
                temporary.mkdir(parents=True, exist_ok=True)
                write_atomic(temporary / f"{kind}.safetensors", content)
                write_json(temporary / f"{kind}.json", _sealed(card))
                sync_folder(temporary)
                replace_folder(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _check_card(
    kind: str, name: str, card: Mapping[str, Any], fields: Sequence[str]
) -> None:
    for field in fields:
        if field not in card:
            raise InputError(f"{kind} {name!r}: its card has no {field!r}")


def _layout(flat: Mapping[str, np.ndarray]) -> dict[str, Any]:
    return {path: [list(x.shape), str(x.dtype)] for path, x in flat.items()}


def _sealed(card: Mapping[str, Any]) -> dict[str, Any]:
    # As it will be read back: JSON has no tuples, and only strings for keys.
    card = dict(json.loads(json.dumps(dict(card), default=_plain)))
    return card | {"card_sha256": _card_hash(card)}


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
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
