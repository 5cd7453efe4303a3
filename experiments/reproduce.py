"""Commands that train the entries of a library anew, from what their cards record."""

import functools
import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from experiments.configs import continual, d4rl, dmc_walker, dsrl
from psec_jax.cards import NAME
from psec_jax.envs.trust import runs_code
from psec_jax.errors import InputError
from psec_jax.workflows import Selection

FILES = {"dmc_walker": dmc_walker, "dsrl": dsrl, "d4rl": d4rl, "continual": continual}
COMMANDS = {
    "base": "launch.pretrain",
    "skill": "launch.expand",
    "gate": "launch.compose",
}
LIBRARY = "runs/again/library"
_SECTIONS = {"network", "process", "base", "skill", "gate", "support"}
_SECTIONS |= {"critics", "weights", "fitted_q"}
_KNOWN = _SECTIONS | {"name", "seed", "env", "data", "section", "objective"}
_KNOWN |= {"normaliser", "std_floor", "base_fingerprint", "skill_fingerprints"}
_KNOWN |= {"skills", "support_data", "base_data", "start_weights"}
_APART = {"base": ("env",), "skill": ("env", "objective")}  # flags of their own


@functools.cache
def configs() -> dict[str, dict[str, Any]]:
    """Every config file and preset, as JSON holds its job."""
    return {
        f"experiments/configs/{name}.py:{preset}": json.loads(
            json.dumps(asdict(module.job(preset)))
        )
        for name, module in FILES.items()
        for preset in module.PRESETS
    }


def command(name: str, card: Mapping[str, Any]) -> str:
    """The command that trains an entry.

    Nothing of a card is left to a shell, names a flag, a place to write to or code to
    run: it may be pasted.

    Args:
      name: of the entry.
      card: checked.

    Raises:
      InputError: the card does not say how.
      AttributeError, KeyError, TypeError, ValueError: its config is not that of a run.
    """
    kind, config, data = card["kind"], dict(card.get("config") or {}), card.get("data")
    if not config or not data:
        raise InputError("its card has no config: imported, merged or added otherwise")
    if "diffusion" in config:  # of the first edition
        config["process"] = config.pop("diffusion")
    if foreign := config.keys() - _KNOWN:
        raise InputError(f"its config has {min(foreign)!r}")
    if (env := card.get("env")) and runs_code(env):
        raise InputError("its environment is code of the card's choice")
    if config.get("section", "base") != "base":
        raise InputError("it is a base on the budget of a skill")
    names = config["name"] if isinstance(config["name"], list) else [config["name"]]
    if kind != "base" and not (name in names and all(map(NAME.fullmatch, names))):
        raise InputError(f"its config is of {names!r:.80}")
    run = name if kind == "base" else f"{kind}-{names[0]}"
    flags = {
        "workdir": f"runs/again/{run}",
        "library": LIBRARY,
        "name": ",".join(names),
        "seed": config["seed"],
        "data": _file(data),
        "env": env,
    }
    selection = Selection(**data.get("selection", {}))._asdict()
    flags |= {field: value for field, value in selection.items() if value is not False}
    if kind == "gate":
        flags |= _of_gate(card, config)
        config["skill"] = {"episodes": data["trajectories"]}
    else:
        flags["objective"] = config.get("objective")
        if kind == "skill":
            flags["objective"] = config["skill"]["objective"]
        if isinstance(critics := config.get("critics"), str):
            flags["critics"] = f"runs/critics-{int(critics, 16):016x}"
            del config["critics"]
    found = {name: list(_fields(config, job)) for name, job in configs().items()}
    nearest = min(found, key=lambda name: len(found[name]))
    words = [f"--config={nearest}"]
    for flag, value in flags.items():
        if value is not None:
            words.append(f"--{flag}" if value is True else f"--{flag}={value}")
    words += [f"--config.{field}={_tuples(value)}" for field, value in found[nearest]]
    return " \\\n    ".join([f"python -m {COMMANDS[kind]}", *map(shlex.quote, words)])


def _of_gate(card: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    if config.get("critics"):
        raise InputError("critics of another run guided it")
    if config["support"]["safe"]:
        raise InputError("the cost limit of its support is not on its card")
    if "transitions" in card["data"].get("selection", {}):
        raise InputError("how many trajectories it drew from is not on its card")
    sources, base = config["support_data"], config["base_data"]
    weights = ",".join(map(str, config["start_weights"]))
    return {
        "skills": ",".join(card["skills"]),
        "alpha": None if config["gate"]["head"] == "select" else weights,
        "support_data": ",".join(map(_file, sources)) or None,
        "base_data": _file(base) if base else None,
    }


def _file(data: Mapping[str, Any]) -> str:
    return Path(data["source"]).name


def _fields(
    config: Mapping[str, Any], job: Mapping[str, Any]
) -> Iterator[tuple[str, Any]]:
    """Fields of a run's config that differ from a job's, by dotted name."""
    for name in ("normaliser", "std_floor"):
        if config.get(name, job[name]) != job[name]:
            yield name, config[name]
    for section in sorted(_SECTIONS & config.keys()):
        for name, value in sorted(config[section].items()):
            if name not in _APART.get(section, ()) and value != job[section][name]:
                yield f"{section}.{name}", value


def _tuples(value: Any) -> Any:
    """A value of JSON as the command line reads it."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def commands(
    cards: Mapping[tuple[str, str], Mapping[str, Any]],
) -> tuple[dict[str, list[Any]], dict[Any, str]]:
    """Commands in the order in which they are run, with the entries that each trains;
    and the other entries, with the reason why there is none."""
    found: dict[str, list[Any]] = {}
    without = {}
    for key, card in cards.items():
        try:
            found.setdefault(command(key[1], card), []).append(key)
        except InputError as error:
            without[key] = str(error)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            without[key] = f"its config is not that of a run ({error!r:.80})"
    return found, without
