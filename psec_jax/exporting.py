"""Composed policies as files that run without this package.

    policy.json    what the files are: shapes, skills, gate, normaliser, versions
    policy.jax     a serialised `jax.export` of CPU, CUDA and TPU
    policy.onnx    an ONNX model

Either is the function `(obs [B, S], noise [B, ...]) -> action [B, A]` of float32
arrays, for any B, from raw observations and standard normal numbers to actions in the
units of the environment, or in [-1, 1] where the base does not know them. Normaliser,
skills, gate and critics are inside. From the noise that `Policy.act` would draw the
actions are those of `act`, which is checked before anything is kept.
"""

import dataclasses
import hashlib
import importlib
import importlib.metadata
import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export
from jax.extend.core import jaxpr_as_fun

from psec_jax.errors import InputError, lookup
from psec_jax.files import (
    beside,
    replace_folder,
    reported,
    sync_folder,
    write_atomic,
    write_json,
)
from psec_jax.policy import Policy, compose, describe
from psec_jax.runtime.run import versions

ABOUT = "policy.json"
FORMAT_VERSION = 1
TOLERANCE = 1e-4  # between actions of `act` and of a file, which lie in [-1, 1]
STATES = 33  # in which both are compared
PLATFORMS = ("cpu", "cuda", "tpu")
OPSET, OPSET_SUPPORT = 21, 26  # the second has CumProd, which shares of supports need

Function = Callable[[Any, Any], Any]  # (obs, noise) -> action


def _to_jax(policy: Policy) -> bytes:
    _package("flatbuffers", "pip install 'psec_jax[export]'")
    function = jax.jit(_function(policy))
    exported = jax_export.export(function, platforms=PLATFORMS)(*_specs(policy))
    return bytes(exported.serialize())


def _from_jax(content: bytes) -> Function:
    call = jax.jit(jax_export.deserialize(bytearray(content)).call)
    return lambda obs, noise: call(obs, noise)


def _to_onnx(policy: Policy) -> bytes:
    # They say which layers of other packages they do not know.
    for name in ("jax2onnx", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.ERROR)
    converter = _package("jax2onnx", "make setup-onnx")
    specs = _specs(policy)
    # Traced before the converter replaces layers of flax, and without loops and calls:
    # the graph is then of plain operations alone.
    with jax.disable_jit():
        traced = jaxpr_as_fun(jax.make_jaxpr(_function(policy))(*specs))
    gate = policy.config.gate
    shares = gate is not None and gate.support != "none" and gate.priority
    try:
        model = converter.to_onnx(
            lambda *inputs: traced(*inputs)[0],
            inputs=specs,
            opset=OPSET_SUPPORT if shares else OPSET,
            model_name="policy",
            input_names=["obs", "noise"],
            output_names=["action"],
        )
    except NotImplementedError as error:
        raise InputError(f"format: jax2onnx cannot convert this ({error})") from error
    used = {name for node in model.graph.node for name in node.input}
    for array in [x for x in model.graph.initializer if x.name not in used]:
        model.graph.initializer.remove(array)
    return model.SerializeToString()


def _from_onnx(content: bytes) -> Function:
    runtime = _package("onnxruntime", "make setup-onnx")
    known = runtime.capi.onnxruntime_pybind11_state
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1  # others would wait for work at full speed
    try:
        session = runtime.InferenceSession(content, options)
    except (known.Fail, known.InvalidGraph, known.NotImplemented) as error:
        raise InputError(
            f"format: onnxruntime cannot run this policy ({error}); jax can"
        ) from error
    return lambda obs, noise: session.run(None, {"obs": obs, "noise": noise})[0]


# name -> (to bytes, from bytes); the file is policy.NAME.
FORMATS = {"jax": (_to_jax, _from_jax), "onnx": (_to_onnx, _from_onnx)}


def _package(name: str, remedy: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise InputError(f"{error.name} is not installed: {remedy}") from error


def export(
    root: str | Path, out: str | Path, formats: Sequence[str], **choice: Any
) -> dict[str, Any]:
    """Write a composed policy, and compare it with `Policy.act`.

    Args:
      root: the library.
      out: a folder, new or of an earlier export, which is replaced.
      formats: keys of `FORMATS`.
      **choice: skills, alpha, gate and level, arguments of `compose`.

    Returns:
      What policy.json holds; its "differences" are the largest ones from the actions of
      `act`, in [-1, 1], by format.

    Raises:
      InputError: names that do not fit the library; no format or an unknown one; a
        folder that holds something else; a package that is missing; a policy that ONNX
        cannot hold, or a file that acts otherwise. Nothing is written then.
    """
    for name in formats:
        lookup(FORMATS, name, "format")
    if not formats:
        raise InputError(f"format: got none, expected one of {', '.join(FORMATS)}")
    out = Path(out)
    _check_folder(out)
    policy = compose(root, **choice)
    about = _about(root, policy, choice)
    contents: dict[str, bytes] = {}
    for name in formats:
        content, difference = convert(policy, name)
        contents[_file(name)] = content
        about["differences"][name] = difference
    if "onnx" in formats:
        for package in ("jax2onnx", "onnx", "onnxruntime"):
            about["versions"][package] = importlib.metadata.version(package)
    about["files"] = {
        name: hashlib.sha256(content).hexdigest() for name, content in contents.items()
    }
    temporary = beside(out, "tmp")
    try:
        with reported(f"write {out}"):
            temporary.mkdir(parents=True, exist_ok=True)
            for name, content in contents.items():
                write_atomic(temporary / name, content)
            write_json(temporary / ABOUT, about)
            sync_folder(temporary)
            replace_folder(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return about


def convert(policy: Policy, name: str) -> tuple[bytes, float]:
    """A policy in a format, a key of `FORMATS`, and its difference from `act`.

    Raises:
      InputError: a package that is missing, a policy that ONNX cannot hold, or actions
        that differ by more than `TOLERANCE`.
    """
    if policy.config.chooses and name == "onnx":
        raise InputError(
            "format: onnx cannot hold critics that choose among candidates, as this "
            "policy's do; jax can"
        )
    write, read = FORMATS[name]
    with jax.enable_x64(False):
        content = write(policy)
        difference = compare(policy, read(content))
    if not difference <= TOLERANCE:
        raise InputError(
            f"{name}: actions of the file are up to {difference:.2g} from the "
            f"policy's, expected {TOLERANCE:g} at most"
        )
    return content, difference


def _check_folder(out: Path) -> None:
    """Refuse a folder with anything that an export does not hold."""
    if not out.exists():
        return
    if not out.is_dir():
        raise InputError(f"--out: {out} is there and is no folder")
    with reported(f"read {out}"):
        others = {p.name for p in out.iterdir()} - {ABOUT, *map(_file, FORMATS)}
    if others:
        raise InputError(
            f"--out: {out} holds {min(others)}, expected a new folder or one of an "
            "earlier export"
        )


def _file(form: str) -> str:
    return f"policy.{form}"


def _function(policy: Policy) -> Function:
    """(obs, noise) -> actions in the units of the environment where they are known."""
    act, box = policy.from_noise(), policy.box

    def function(obs: Any, noise: Any) -> Any:
        action = act(noise, obs)
        if box is None:
            return action
        return box.centre.astype(np.float32) + box.half.astype(np.float32) * action

    return function


def _shapes(policy: Policy) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of one observation and its noise."""
    noise = jax.eval_shape(policy.noise, jax.random.split(jax.random.key(0), 1))
    return (len(policy.params.normaliser.mean),), noise.shape[1:]


def _specs(policy: Policy) -> list[jax.ShapeDtypeStruct]:
    (batch,) = jax_export.symbolic_shape("batch")
    return [
        jax.ShapeDtypeStruct((batch, *shape), jnp.float32) for shape in _shapes(policy)
    ]


def compare(policy: Policy, function: Function) -> float:
    """The largest difference of actions from those of `act`, in [-1, 1], in states
    drawn about the mean of the base's data, together and one alone; infinite where an
    action is not finite or has another shape."""
    mean, std = (np.asarray(x) for x in policy.params.normaliser)
    drawn = np.random.default_rng(0).standard_normal((STATES, len(mean)), np.float32)
    obs = (mean + std * drawn).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), STATES)
    expected, noise = np.asarray(policy.act(keys, obs)), np.asarray(policy.noise(keys))
    if policy.box is not None:
        expected = np.where(policy.box.half > 0, expected, 0)  # as `to_scaled` does
    found = 0.0
    for count in (STATES, 1):
        got = np.asarray(function(obs[:count], noise[:count]))
        if got.shape != expected[:count].shape or not np.isfinite(got).all():
            return float("inf")
        scaled = got if policy.box is None else policy.box.to_scaled(got)
        found = max(found, float(np.abs(scaled - expected[:count]).max()))
    return found


def _about(root: str | Path, policy: Policy, choice: dict[str, Any]) -> dict[str, Any]:
    """policy.json, but for the files."""
    given = {name: choice.get(name) for name in ("gate", "alpha")}
    return {
        "format_version": FORMAT_VERSION,
        **describe(root, policy, **given),
        "noise": list(_shapes(policy)[1]),
        "policy": dataclasses.asdict(policy.config),
        "normaliser": {
            field: np.asarray(value).tolist()
            for field, value in policy.params.normaliser._asdict().items()
        },
        "action_box": policy.box and dataclasses.asdict(policy.box),
        "differences": {},
        "versions": versions(),
    }
