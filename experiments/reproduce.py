"""Commands that train the entries of a library anew, from what their cards record."""

import functools
import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from experiments.configs import continual, d4rl, dmc_walker, dsrl
from psec_jax.envs.trust import runs_code

FILES = {"dmc_walker": dmc_walker, "dsrl": dsrl, "d4rl": d4rl, "continual": continual}
COMMANDS = {
    "base": "launch.pretrain",
    "skill": "launch.expand",
    "gate": "launch.compose",
}
LIBRARY = "runs/again/library"
_SECTIONS = ("network", "process", "base", "skill", "gate", "support", "critics")
_SECTIONS += ("weights", "fitted_q")
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


def unknown(card: Mapping[str, Any]) -> str | None:
    """Why a checked card does not say how its entry is made again; None where it does.

    Nothing that is read off a card may run code where its command is pasted.
    """
    config = card.get("config")
    if not config or not card.get("data"):
        return "its card has no config: it was imported, merged or added by hand"
    if card.get("env") and runs_code(card["env"]):
        return "its environment is code of the card's choice"
    if config.get("section", "base") != "base" or "start" in config:
        return "a base that was trained on, or on the budget of a skill"
    if card["kind"] != "gate":
        return None
    if config.get("critics"):
        return "critics of another run guided it"
    if config.get("support", {}).get("safe"):
        return "the cost limit of its support is not on its card"
    if "transitions" in card["data"].get("selection", {}):
        return (
            "how many trajectories its transitions were drawn from is not on its card"
        )
    return None


def command(card: Mapping[str, Any]) -> str:
    """The command that trains the entry of a card, for which `unknown` is None.

    Raises:
      KeyError, TypeError, ValueError, AttributeError: a config that no run has written.
    """
    kind, config, data = card["kind"], dict(card["config"]), card["data"]
    if "diffusion" in config:  # of the first edition
        config["process"] = config.pop("diffusion")
    names = config["name"] if isinstance(config["name"], list) else [config["name"]]
    flags = {
        "workdir": f"runs/again/{kind}-{names[0]}",
        "library": LIBRARY,
        "name": ",".join(names),
        "seed": config["seed"],
        "data": data.get("source", ""),
        "env": config["env"],
    }
    for name, value in data.get("selection", {}).items():
        flags[name] = None if value is False else value
    if kind == "gate":
        config["skill"] = {"episodes": data["trajectories"]}
        flags["skills"] = ",".join(config["skills"])
        if config["gate"]["head"] != "select":
            flags["alpha"] = ",".join(map(str, config["start_weights"]))
        sources = [one["source"] for one in config["support_data"]]
        flags["support_data"] = ",".join(sources) or None
        flags["base_data"] = (config["base_data"] or {}).get("source")
    else:
        default = config["skill"]["objective"] if kind == "skill" else None
        flags["objective"] = config.get("objective", default)
        if isinstance(config.get("critics"), str):
            flags["critics"] = f"runs/critics-{config.pop('critics')}"
    found = {name: list(_fields(config, job)) for name, job in configs().items()}
    nearest = min(found, key=lambda name: len(found[name]))
    words = [f"python -m {COMMANDS[kind]}", f"--config={nearest}"]
    words += [
        f"--{k}" if v is True else f"--{k}={v}"
        for k, v in flags.items()
        if v is not None
    ]
    words += [f"--config.{name}={_tuples(value)}" for name, value in found[nearest]]
    return " \\\n    ".join([words[0], *map(shlex.quote, words[1:])])


def _fields(
    config: Mapping[str, Any], job: Mapping[str, Any]
) -> Iterator[tuple[str, Any]]:
    """Fields of a run's config that differ from a job's, by dotted name."""
    for name in ("normaliser", "std_floor"):
        if config.get(name, job[name]) != job[name]:
            yield name, config[name]
    for section in _SECTIONS:
        for name, value in config.get(section, {}).items():
            known = job[section].get(name, ...)
            if (
                known is not ...
                and name not in _APART.get(section, ())
                and value != known
            ):
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
        reason = unknown(card)
        if reason is None:
            try:
                found.setdefault(command(card), []).append(key)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                reason = f"its config is not that of a run ({error!r:.80})"
        if reason is not None:
            without[key] = reason
    return found, without
