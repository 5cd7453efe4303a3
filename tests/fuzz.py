"""Damaged and hostile files for every reader; counts what is neither read nor refused.

    python tests/fuzz.py --cases=100000 --seed=0

Each case changes good files of one reader (flipped bits, cuts, splices, sizes, JSON
values and arrays with hashes mended, links, pipes, other HDF5 and zip structures) and
reads them in a worker process. Reading may end in a value or in an InputError of one
printable line. Everything else is a fault: another exception, 10 seconds, a dead
process, a gigabyte of memory, a file opened or a process started outside the case's
folder. Case N of a seed is the same wherever it runs: --only=N repeats it alone.
"""

import argparse
import collections
import contextlib
import functools
import hashlib
import io
import json
import os
import pickletools
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

SECONDS = 10  # for one case
MEMORY = 10**9  # bytes beyond those of the worker at rest
CANARY = "canary"
Files = dict[str, bytes]
Random = np.random.Generator


class Reader(NamedTuple):
    """One door of the product.

    Attributes:
      make: writes good files into a folder.
      read: reads them through the product.
      mend: makes hashes match after a change, or None.
      share: of all cases.
    """

    make: Callable[[Path], None]
    read: Callable[[Path], Any]
    mend: Callable[[Files], None] | None = None
    share: int = 1


# --- good files -----------------------------------------------------------------------


def _demos(episodes: int = 3, length: int = 8, obs_dim: int = 7, action_dim: int = 2):
    from psec_jax.types import Dataset

    generator = np.random.default_rng(0)
    n = episodes * length
    obs = generator.normal(size=(n + 1, obs_dim)).astype(np.float32)
    return Dataset(
        obs=obs[:-1],
        action=generator.uniform(-1, 1, (n, action_dim)).astype(np.float32),
        reward=np.ones(n, np.float32),
        cost=np.arange(n, dtype=np.float32) % 2,
        next_obs=obs[1:],
        terminal=np.zeros(n, bool),
        timeout=np.arange(n) % length == length - 1,
    )


def _make_library(folder: Path) -> None:
    import dataclasses

    import jax
    import tiny

    from psec_jax import gating
    from psec_jax.library import SkillLibrary
    from psec_jax.types import Normaliser

    library = SkillLibrary.create(folder)
    normaliser = Normaliser(np.zeros(tiny.OBS_DIM), np.ones(tiny.OBS_DIM))
    card = {
        "name": "stand",
        "obs_dim": tiny.OBS_DIM,
        "action_dim": tiny.ACTION_DIM,
        "network": dataclasses.asdict(tiny.NETWORK),
        "process": dataclasses.asdict(tiny.PROCESS),
        "env": "gymnasium:Hopper-v5",
        "data": _data_card(),
    }
    library.add_base(tiny.base(), normaliser, card)
    for seed, name in enumerate(("walk", "run")):
        library.add_skill(name, tiny.skill(seed), {"alpha": 16.0, "env": card["env"]})
    for head in ("constant", "linear"):
        form = gating.GateConfig(head=head, widths=(8,))
        params = gating.init_gate(
            form, jax.random.key(0), tiny.OBS_DIM, jax.numpy.ones(2)
        )
        gate = {"skills": ["walk", "run"], "level": "parameter"}
        fields = {"gate": dataclasses.asdict(form), "returns": {"mean": 1.0}}
        library.add_gate(head, jax.tree.map(np.asarray, params), gate | fields)
    (folder / ".lock").unlink()


def _data_card() -> dict[str, Any]:
    counts = {"transitions": 24, "trajectories": 3}
    return {"source": "a.hdf5", "fingerprint": "0" * 16, **counts}


def _read_library(folder: Path) -> None:
    from experiments import report
    from launch import library as shell
    from psec_jax import policy
    from psec_jax.errors import InputError
    from psec_jax.library import SkillLibrary

    library = SkillLibrary.open(folder)
    shell.list_entries(library)
    for kind, name in library.entries():
        with contextlib.suppress(InputError):
            shell.show(library, f"{kind}/{name}")
    report.build(str(folder), gates=[])
    problems = library.verify()
    for gate in library.gates():
        policy.compose(folder, gate=gate)
    if problems:
        raise InputError(problems[0])


def _mend_library(files: Files) -> None:
    """Hashes and fingerprints as if the product had written the changed files."""
    import safetensors.numpy

    from psec_jax import tree

    for name in [n for n in files if n.endswith(".json")]:
        arrays = files[name.removesuffix("json") + "safetensors"]
        try:
            card = json.loads(files[name])
            card["sha256"] = hashlib.sha256(arrays).hexdigest()
            with contextlib.suppress(Exception):
                flat = safetensors.numpy.load(arrays)
                layout = {n: [list(x.shape), str(x.dtype)] for n, x in flat.items()}
                card["tensors"] = layout
                card["fingerprint"] = tree.fingerprint(tree.unflatten(flat))
            card.pop("card_sha256", None)
            text = json.dumps(card, sort_keys=True).encode()
            card["card_sha256"] = hashlib.sha256(text).hexdigest()
            files[name] = json.dumps(card).encode()
        except (ValueError, TypeError, AttributeError, RecursionError):
            continue


def _make_critics(folder: Path) -> None:
    import jax

    from psec_jax.agents import critic_file, critics
    from psec_jax.types import Normaliser

    params = critics.init(
        critics.CriticConfig(("reward", "safety"), widths=(8, 8)),
        jax.random.key(0),
        3,
        2,
    ).trained
    card = {"kinds": ["reward", "safety"], "obs_dim": 3, "action_dim": 2, "steps": 2}
    identity = Normaliser(np.zeros(3, np.float32), np.ones(3, np.float32))
    critic_file.save(folder, params, identity, card | {"data": {}, "summary": {}})


def _read_critics(folder: Path) -> None:
    from psec_jax.agents import critic_file

    critic_file.load(folder).brief()


def _mend_critics(files: Files) -> None:
    import safetensors.numpy

    from psec_jax import tree

    (name,) = files
    with contextlib.suppress(Exception):
        length = int.from_bytes(files[name][:8], "little")
        head = json.loads(files[name][8 : 8 + length])
        flat = safetensors.numpy.load(files[name])
        card = json.loads(head["__metadata__"]["card"])
        card["fingerprint"] = tree.fingerprint(tree.unflatten(flat))
        files[name] = safetensors.numpy.save(flat, {"card": json.dumps(card)})


def _make_hdf5(folder: Path, name: str = "set.hdf5") -> None:
    from psec_jax.data import d4rl

    path = folder / name
    d4rl.save(path, _demos(), {"environment": "gymnasium:Hopper-v5", "seed": 3})
    # As another author writes it: packed, without our checksum.
    import h5py

    with h5py.File(folder / "other.hdf5", "w") as file:
        for key, field in d4rl.KEYS.items():
            array = getattr(_demos(), key, None)
            if isinstance(field, str) and array is not None:
                packed = {"compression": "gzip", "chunks": (8, *array.shape[1:])}
                file.create_dataset(field, data=array, **packed)
        file.attrs["author"] = "somebody"


def _read_hdf5(folder: Path) -> None:
    from psec_jax import data
    from psec_jax.errors import InputError

    refused = None
    for path in sorted(folder.iterdir()):
        try:
            data.environment(path)
            data.read(path, clip_actions=True, with_costs=True)
        except InputError as error:
            refused = error
    if refused:
        raise refused


def _make_set(folder: Path) -> None:
    from psec_jax.data import d4rl, dsrl

    task = dsrl.task("OfflineBallRun-v0")
    attrs = {"made_by": "psec_jax", "task": "OfflineBallRun-v0"}
    name = dsrl.made_name("OfflineBallRun-v0")
    attrs["environment"] = task.spec
    d4rl.save(folder / name, _demos(), attrs, costs=True)
    shutil.copy(folder / name, folder / "renamed.hdf5")


def _make_npz(folder: Path) -> None:
    for i, save in enumerate((np.savez, np.savez_compressed)):
        generator = np.random.default_rng(i)
        save(
            folder / f"episode_{i}.npz",
            observation=generator.normal(size=(9, 4)).astype(np.float32),
            action=generator.uniform(-1, 1, (9, 2)).astype(np.float32),
            reward=np.ones((9, 1)),
            discount=np.ones(9),
        )


def _read_npz(folder: Path) -> None:
    from psec_jax import data

    data.read(folder)


def _make_minari(folder: Path) -> None:
    import h5py

    data = folder / "data"
    data.mkdir()
    box = {"type": "Box", "dtype": "float32", "shape": [2]}
    bounded = {"low": [-1.0, -2.0], "high": [1.0, 2.0]}
    part = {"low": [-1e30, -1e30], "high": [1e30, 1e30]}
    spaces = {"a": box | part, "b": box | part}
    metadata = {
        "dataset_id": "mine/walks-v0",
        "minari_version": "0.5.3",
        "data_format": "hdf5",
        "total_episodes": 2,
        "total_steps": 6,
        "observation_space": json.dumps({"type": "Dict", "subspaces": spaces}),
        "action_space": json.dumps(box | bounded),
        "env_spec": json.dumps(
            {"id": "Walk-v0", "entry_point": f"{CANARY}:make", "kwargs": {"x": 1}}
        ),
    }
    (data / "metadata.json").write_text(json.dumps(metadata))
    generator = np.random.default_rng(0)
    with h5py.File(data / "main_data.hdf5", "w") as file:
        for i in range(2):
            episode = file.create_group(f"episode_{i}")
            episode.attrs["id"] = i
            for name in "ab":
                episode[f"observations/{name}"] = generator.normal(size=(4, 2))
            episode["actions"] = generator.uniform(-1, 1, (3, 2)).astype(np.float32)
            episode["rewards"] = np.ones(3)
            episode["terminations"] = np.zeros(3, bool)
            episode["truncations"] = np.arange(3) == 2
            episode["infos/cost"] = np.ones(3)


def _read_minari(folder: Path) -> None:
    from psec_jax import data

    data.environment(folder)
    data.read(folder)


def _make_run(folder: Path) -> None:
    from psec_jax.files import write_json

    write_json(folder / "config.json", {"stage": "base", "config": {"seed": 0}})
    write_json(folder / "result.json", {"summary": {"steps": 2}, "returns": None})
    lines = [json.dumps({"step": i, "loss/base": 0.5, "time/s": 1}) for i in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))


def _read_run(folder: Path) -> None:
    from psec_jax.files import read_json, recover
    from psec_jax.runtime import metrics
    from psec_jax.runtime.run import Run

    recover(folder)
    run = Run(folder, "base", read_json(folder / "config.json"))
    run.result()
    metrics.read(run)
    metrics.newest(run)


def _make_results(folder: Path) -> None:
    made = {"cores": 2, "cpu": "a processor", "jax": "1", "commit": "abc"}
    budget = {"base": {"steps": 2, "batch_size": 8}}
    for method in ("Base", "PSEC"):
        for seed in (0, 1):
            raw = {"setting": "S->W", "method": method, "seed": seed, "preset": "quick"}
            raw |= {"budget": budget, "config_fingerprint": "0" * 12, "versions": made}
            raw |= {"env": "x", "evaluation_seed": 3, "mean": 2.0, "lengths": [5, 5]}
            raw |= {"returns": [1.0 + seed, 3.0], "costs": [0.0, 0.0]}
            with open(folder / "table2.jsonl", "a") as lines:
                lines.write(json.dumps(raw) + "\n")


def _read_results(folder: Path) -> None:
    from experiments import report

    report.returns(folder)


def _make_released(folder: Path) -> None:
    import lzma

    packed = Path(__file__).parent / "released" / "composition.pickle.xz"
    (folder / "model.pickle").write_bytes(lzma.decompress(packed.read_bytes()))


def _read_released(folder: Path) -> None:
    from psec_jax import released

    released.read(folder / "model.pickle")


READERS = {
    "library": Reader(_make_library, _read_library, _mend_library, 3),
    "critics": Reader(_make_critics, _read_critics, _mend_critics, 3),
    "hdf5": Reader(_make_hdf5, _read_hdf5, share=5),
    "set": Reader(_make_set, _read_hdf5, share=2),
    "npz": Reader(_make_npz, _read_npz, share=4),
    "minari": Reader(_make_minari, _read_minari, share=3),
    "run": Reader(_make_run, _read_run, share=2),
    "results": Reader(_make_results, _read_results, share=2),
    "released": Reader(_make_released, _read_released, share=3),
}

# --- changes --------------------------------------------------------------------------

NUMBERS = (0, 1, 2, 255, 2**16, 2**31 - 1, 2**31, 2**32, 2**40, 2**63, 2**64 - 1)
VALUES: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1.5,
    1e308,
    10**30,
    "",
    "x",
    "\x1b[2J\x07\u202e\ud800",
    "../" * 20 + "etc/passwd",
    "gymnasium:evil.module:X-v0",
    "1",
    [],
    {},
    [[]],
    [1, "x", None],
    {"mean": "x"},
    {"a": {"b": [1]}},
    "a" * 100_000,
    "²",
)


def _flips(random: Random, data: bytes) -> bytes:
    out = bytearray(data)
    for _ in range(int(random.choice([1, 1, 2, 8, 64]))):
        if out:
            out[random.integers(len(out))] ^= 1 << int(random.integers(8))
    return bytes(out)


def _cut(random: Random, data: bytes) -> bytes:
    return data[: random.integers(len(data) + 1)]


def _splice(random: Random, data: bytes) -> bytes:
    a, b, c = np.sort(random.integers(0, len(data) + 1, 3))
    at = int(random.integers(len(data) + 1))
    part = data[a:b] if random.integers(2) else data[b:c]
    keep = int(random.integers(2)) * len(part)  # inserted, or written over
    return data[:at] + part + data[at + keep :]


def _size(random: Random, data: bytes) -> bytes:
    width = int(random.choice([1, 2, 4, 8]))
    at = int(random.integers(max(len(data) - width, 1)))
    number = int(random.choice(np.array(NUMBERS, dtype=object))) % 256**width
    return data[:at] + number.to_bytes(width, "little") + data[at + width :]


def _fill(random: Random, data: bytes) -> bytes:
    a, b = np.sort(random.integers(0, len(data) + 1, 2))
    b = min(b, a + 64)
    return data[:a] + bytes([int(random.choice([0, 255]))]) * int(b - a) + data[b:]


def _swap_json(random: Random, data: bytes) -> bytes:
    """One value anywhere in a JSON text, also in texts that are JSON themselves."""
    try:
        value = json.loads(data)
    except ValueError:
        return _flips(random, data)
    node, parent, key = value, None, None
    while isinstance(node, (dict, list)) and node and (random.random() < 0.8):
        keys = list(node) if isinstance(node, dict) else range(len(node))
        parent, key = node, keys[int(random.integers(len(keys)))]
        node = node[key]
    if parent is None:
        return json.dumps(VALUES[int(random.integers(len(VALUES)))]).encode()
    if isinstance(node, str) and node[:1] in ("{", "["):
        parent[key] = _swap_json(random, node.encode()).decode(errors="replace")
    elif isinstance(parent, dict) and random.random() < 0.2:
        del parent[key]
    elif random.random() < 0.05:
        parent[key] = functools.reduce(lambda x, _: [x], range(200), 1)
    else:
        parent[key] = VALUES[int(random.integers(len(VALUES)))]
    text = json.dumps(value)
    if random.random() < 0.02:
        text = "[" * 100_000 + text
    return text.encode()


def _swap_line(random: Random, data: bytes) -> bytes:
    """One value in one line of JSON."""
    lines = data.splitlines()
    at = int(random.integers(len(lines)))
    lines[at] = _swap_json(random, lines[at])
    return b"\n".join(lines)


def _swap_arrays(random: Random, data: bytes) -> bytes:
    """Another shape, type, name or value of one array of a safetensors file."""
    import safetensors.numpy

    try:
        length = int.from_bytes(data[:8], "little")
        head = json.loads(data[8 : 8 + length])
        flat = safetensors.numpy.load(data)
    except Exception:  # noqa: BLE001 - whatever a damaged file gives
        return _flips(random, data)
    metadata = head.get("__metadata__")
    if metadata and random.random() < 0.5:
        text = metadata["card"].encode()
        metadata = {"card": _swap_json(random, text).decode(errors="replace")}
        return safetensors.numpy.save(flat, metadata)
    name = sorted(flat)[int(random.integers(len(flat)))]
    array, choice = flat[name], int(random.integers(8))
    changed = {
        0: lambda: array.reshape(-1),
        1: lambda: array[..., :0] if array.ndim else array.reshape(1),
        2: lambda: array.astype(random.choice(["int32", "float64", "bool", "uint8"])),
        3: lambda: np.full_like(array, np.nan) if array.dtype.kind == "f" else array,
        4: lambda: np.concatenate([array, array]) if array.ndim else array,
        5: lambda: array[None],
    }.get(choice)
    if changed:
        flat[name] = np.ascontiguousarray(changed())
    elif choice == 6:
        del flat[name]
    else:
        odd = ("x", f"{name}/x", "/", "a/" * 100 + "b", "\x1b", name + "\u202e")
        flat[odd[int(random.integers(len(odd)))]] = flat.pop(name)
    return safetensors.numpy.save(flat, metadata)


def _swap_hdf5(random: Random, data: bytes) -> bytes:
    """Another structure of a HDF5 file: links, external storage, types, sizes."""
    import h5py

    stream = io.BytesIO(data)
    outside = os.path.abspath(__file__)
    with h5py.File(stream, "r+") as file:
        names: list[str] = []
        try:
            file.visititems(
                lambda n, x: names.append(n) if isinstance(x, h5py.Dataset) else None
            )
            name = names[int(random.integers(len(names)))]
            old, value = file[name], file[name][()]
        except Exception:  # noqa: BLE001 - a change before this one damaged it
            return data
        del file[name]
        choice = int(random.integers(18))
        if choice == 0:
            file[name] = h5py.SoftLink("/" + names[0])
        elif choice == 1:
            file[name] = h5py.ExternalLink(outside, "/x")
        elif choice == 2:
            space = h5py.h5s.create_simple(value.shape)
            plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            plist.set_external(outside.encode(), 0, max(value.nbytes, 1))
            kind = h5py.h5t.py_create(value.dtype)
            h5py.h5d.create(file.id, name.encode(), kind, space, plist)
        elif choice == 3:
            layout = h5py.VirtualLayout(value.shape, value.dtype)
            layout[...] = h5py.VirtualSource(outside, "x", value.shape)
            file.create_virtual_dataset(name, layout)
        elif choice == 4:
            rows = int(random.choice([10**6, 10**8, 10**11, 2**62]))
            shape = (rows, *value.shape[1:])
            with contextlib.suppress(ValueError):
                packed = {"chunks": (64, *value.shape[1:]), "compression": "gzip"}
                file.create_dataset(name, shape, value.dtype, **packed)
        elif choice == 5:
            with contextlib.suppress(ValueError):
                file.create_dataset(name, (10**5, *value.shape[1:]), value.dtype)
        elif choice == 6:
            file.create_dataset(
                name, data=["x"] * len(value), dtype=h5py.string_dtype()
            )
        elif choice == 7:
            file[name] = np.zeros(len(value), [("a", "f4"), ("b", "S3")])
        elif choice == 8:
            file.create_dataset(name, (len(value),), h5py.ref_dtype)
        elif choice == 9:
            file[name] = h5py.Empty("f")
        elif choice == 10:
            file[name] = value.reshape(-1)[0]
        elif choice == 11:
            file[name] = value[None]
        elif choice == 12:
            kinds = ["f2", "f8", "i1", "u8", "c8", "S4", "?"]
            with contextlib.suppress(ValueError, TypeError):
                file[name] = value.astype(random.choice(kinds))
        elif choice == 13:
            file.create_group(name)
        elif choice == 14:
            file[name] = value[: int(random.integers(len(value) + 1))]
        elif choice == 15:
            file.create_dataset(name, (len(value),), h5py.vlen_dtype(np.int8))
        elif choice == 16:
            filled = value.astype(np.float64)
            filled.reshape(-1)[0] = random.choice([np.nan, np.inf, 1e300, -5])
            file[name] = filled
        if choice > 11 and name not in file:
            file[name] = old
        odd = (
            h5py.Empty("f"),
            np.zeros(3, [("a", "f4")]),
            np.bytes_(b"\xff\xfe"),
            "x\x1b",
            np.zeros((0, 3)),
            np.float16(np.nan),
            np.arange(9),
            1,
        )
        keys = ("environment", "task", "made_by", "odd", "max_steps", "action_units")
        if random.random() < 0.4:
            key = str(random.choice(keys))
            file.attrs[key] = odd[int(random.integers(len(odd)))]
    return stream.getvalue()


def _swap_pickle(random: Random, data: bytes) -> bytes:
    """Other instructions in the first 2,000 bytes, which build the first arrays."""
    out, start = bytearray(data), bytes(data)
    for _ in range(int(random.choice([1, 1, 2, 4]))):
        opcodes = [ord(op.code) for op in pickletools.opcodes]
        out[random.integers(2000)] = int(random.choice(opcodes))
    names = (b"numpy", b"ndarray", b"dtype", b"jax._src.array", b"f4", b"score_model")
    if random.random() < 0.3:
        name = names[int(random.integers(len(names)))]
        other = names[int(random.integers(len(names)))][: len(name)]
        at = start.find(name)
        out[at : at + len(name)] = other.ljust(len(name), b".")
    return bytes(out)


def _swap_zip(random: Random, data: bytes) -> bytes:
    """Another structure of a zip file: headers, packing, names, sizes."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            members = {name: file.read(name) for name in file.namelist()}
    except Exception:  # noqa: BLE001 - whatever a damaged file gives
        return _flips(random, data)
    name = sorted(members)[int(random.integers(len(members)))]
    content, choice = members[name], int(random.integers(8))
    stream = io.BytesIO()
    kinds = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2)
    kind = (*kinds, zipfile.ZIP_LZMA)[int(random.integers(4))]
    if choice == 0:
        members[name] = _flips(random, content[:128]) + content[128:]
    elif choice == 1:
        shape = str(random.choice(["(9, 999999999999)", "(-9, -4)", "(0,)", "()", "("]))
        members[name] = re.sub(rb"\([^)]*\)", shape.encode(), content, count=1)
    elif choice == 2:
        dtype = str(
            random.choice(["|O", "<U5", "<M8[s]", "V9", "<f2", "<c8", "x", ">i8"])
        )
        members[name] = re.sub(rb"'[<>|][a-z]\d+'", f"'{dtype}'".encode(), content)
    elif choice == 3:
        members[name] = content + bytes(int(random.choice([1, 10**6, 3 * 10**7])))
    elif choice == 4:
        members[name] = _cut(random, content)
    elif choice == 5:
        nested = b"{'descr': " + b"(" * 5000 + b"}"
        length = len(nested).to_bytes(2, "little")
        members[name] = b"\x93NUMPY\x01\x00" + length + nested
    elif choice == 6:
        members[f"\x1b{name}"] = members.pop(name)
    with zipfile.ZipFile(stream, "w", kind) as file:
        for member, text in members.items():
            file.writestr(member, text)
    out = bytearray(stream.getvalue())
    if choice == 7:  # marked as encrypted, in both of its headers
        for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
            at = bytes(out).find(mark)
            out[at + offset] |= 1
    return bytes(out)


PLAIN = (_flips, _flips, _cut, _splice, _size, _size, _fill)
SWAPS = {
    ".json": _swap_json,
    ".jsonl": _swap_line,
    ".safetensors": _swap_arrays,
    ".hdf5": _swap_hdf5,
    ".npz": _swap_zip,
    ".pickle": _swap_pickle,
}


# What h5py raises where a file was changed before.
FAILURES = (OSError, RuntimeError, LookupError, ValueError, TypeError, MemoryError)


def change(random: Random, name: str, data: bytes) -> bytes:
    """A damaged or hostile form of one file."""
    swap = SWAPS.get(Path(name).suffix)
    if swap and random.random() < 0.5:
        with contextlib.suppress(
            OSError, RuntimeError, KeyError, ValueError, TypeError
        ):
            return swap(random, data)
    return PLAIN[int(random.integers(len(PLAIN)))](random, data)


# --- the worker -----------------------------------------------------------------------


class Outside(Exception):
    """Something outside the case's folder was opened, written or started."""


class Guard:
    """Watches what the worker opens, writes and starts while `folder` is set."""

    STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork")

    def __init__(self) -> None:
        self.folder: str | None = None
        self.seen: list[str] = []
        self.allowed = tuple(
            {
                os.path.realpath(p)
                for p in (sys.prefix, sys.base_prefix, "/proc/meminfo")
            }
            | {str(Path(__file__).resolve().parents[1])}
        )
        sys.addaudithook(self)

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        if event == "subprocess.Popen" and "hdf5 import _serve" in str(args[1]):
            return  # the process that reads HDF5 files
        if event in self.STARTS or event == "socket.connect":
            self.seen.append(f"{event} {args!r:.200}")
        elif event == "open" and isinstance(args[0], (str, bytes)):
            path = os.path.realpath(os.fsdecode(args[0]))
            inside = path.startswith(self.folder)
            writes = isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
            inside |= path == os.devnull  # of a process that is started
            if not inside and (writes or not path.startswith(self.allowed)):
                self.seen.append(f"open {path}")
        elif event == "import" and CANARY in str(args[0]):
            self.seen.append(f"import {args[0]}")


def damaged(random: Random, reader: Reader, good: Files) -> Files:
    """The files of a case; a value of None stands for something that is no file."""
    files = dict(good)
    for _ in range(int(random.choice([1, 1, 1, 2]))):
        name = sorted(files)[int(random.integers(len(files)))]
        files[name] = change(random, name, files[name])
    if reader.mend and random.random() < 0.7:
        reader.mend(files)
    return files


def no_file(random: Random, path: Path, spare: Path) -> None:
    """A pipe, a folder, a link or nothing in the place of a file."""
    path.unlink()
    choice = int(random.integers(5))
    if choice == 0:
        os.mkfifo(path)
    elif choice == 1:
        path.mkdir()
    elif choice == 2:
        path.symlink_to(spare)
    elif choice == 3:
        path.symlink_to("/dev/zero")


def work(seed: int, start: int, stop: int, step: int, names: list[str]) -> None:
    """Run cases start, start + step, ...; one line on stdout before and after each."""
    from psec_jax.errors import InputError

    out = os.fdopen(os.dup(1), "w", buffering=1)
    sys.stdout = io.StringIO()
    guard = Guard()
    shares = [n for n in names for _ in range(READERS[n].share)]
    with tempfile.TemporaryDirectory(dir=os.environ.get("FUZZ_DIR")) as top:
        goods: dict[str, Files] = {}
        for name in names:
            folder = Path(top, name)
            folder.mkdir()
            READERS[name].make(folder)
            READERS[name].read(folder)  # whatever is imported late is imported now
            goods[name] = {
                str(p.relative_to(folder)): p.read_bytes()
                for p in sorted(folder.rglob("*"))
                if p.is_file()
            }
        rest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        case = start
        out.write("ready\n")
        while case < stop:
            random = np.random.default_rng([seed, case])
            name = shares[int(random.integers(len(shares)))]
            reader, good = READERS[name], goods[name]
            files = damaged(random, reader, good)
            folder = Path(top, name)
            for file, content in files.items():
                if content != good[file]:
                    (folder / file).write_bytes(content)
            if random.random() < 0.02:
                file = sorted(files)[int(random.integers(len(files)))]
                no_file(random, folder / file, Path(__file__))
            sys.stdout, sys.stderr = io.StringIO(), io.StringIO()
            out.write(f"start {case} {name}\n")
            rest = max(rest, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
            guard.folder, guard.seen = os.path.realpath(folder), []
            began, fault = time.monotonic(), ""
            try:
                reader.read(folder)
                result = "read"
            except InputError as error:
                result = "refused"
                line = " ".join(str(error).split())
                if not line.isprintable() or len(line) > 20_000:
                    result, fault = "words", repr(line)[:200]
            except Exception:  # noqa: BLE001 - a fault, whatever it is
                result, fault = "traceback", traceback.format_exc()
            finally:
                guard.folder = None
            shown = sys.stdout.getvalue() + sys.stderr.getvalue()
            if any(not c.isprintable() and c != "\n" for c in shown):
                result, fault = "words", repr(shown)[:200]
            if guard.seen:
                result, fault = "outside", "; ".join(guard.seen)
            now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            if (now - rest) * 1024 > MEMORY:
                result, fault = "memory", f"{(now - rest) / 1e6:.2f} GB"
            seconds = time.monotonic() - began
            out.write(f"end {case} {result} {seconds:.2f} {json.dumps(fault)}\n")
            _restore(folder, good, files)
            case += step


def _restore(folder: Path, good: Files, files: Files) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        name = str(path.relative_to(folder))
        if path.is_symlink() or (not path.is_dir() and name not in good):
            path.unlink()
        elif name in good and not path.is_file():
            path.rmdir() if path.is_dir() else path.unlink()
    for name, content in good.items():
        path = folder / name
        if files[name] != content or not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


# --- the parent -----------------------------------------------------------------------


class Report(NamedTuple):
    """What came of the cases.

    Attributes:
      counts: (reader, result) -> cases.
      faults: (case, reader, result, what) of each case that was a fault.
      slowest: seconds of the slowest case.
    """

    counts: collections.Counter[tuple[str, str]]
    faults: list[tuple[int, str, str, str]]
    slowest: float

    @property
    def cases(self) -> int:
        """How many were run."""
        return sum(self.counts.values())

    def table(self) -> str:
        """One line for each reader."""
        results = ("read", "refused", "fault")
        rows = [("reader", "cases", *results)]
        for reader in sorted({reader for reader, _ in self.counts}):
            mine = {r: n for (who, r), n in self.counts.items() if who == reader}
            total = sum(mine.values())
            good = [mine.get(name, 0) for name in results[:2]]
            rows.append((reader, *map(str, (total, *good, total - sum(good)))))
        return "\n".join("  ".join(cell.rjust(8) for cell in row) for row in rows)


def run(
    cases: int,
    seed: int = 0,
    first: int = 0,
    seconds: float = float("inf"),
    workers: int = 1,
    names: list[str] | None = None,
) -> Report:
    """Run cases in worker processes, in each every `workers`-th one."""
    names = names or list(READERS)
    report = Report(collections.Counter(), [], 0.0)
    end = float("inf")
    todo = [(first + i, first + cases, workers) for i in range(workers)]
    with contextlib.suppress(KeyboardInterrupt), contextlib.ExitStack() as stack:
        streams = [
            stack.enter_context(
                contextlib.closing(_cases(seed, start, stop, step, names))
            )
            for start, stop, step in todo
        ]
        while streams and time.monotonic() < end:
            for stream in list(streams):
                try:
                    case, name, result, took, fault = next(stream)
                except StopIteration:
                    streams.remove(stream)
                    continue
                if not report.counts:  # to start takes long
                    end = time.monotonic() + seconds
                report.counts[name, result] += 1
                report = report._replace(slowest=max(report.slowest, took))
                if result not in ("read", "refused"):
                    report.faults.append((case, name, result, fault))
    return report


def _cases(
    seed: int, case: int, stop: int, step: int, names: list[str]
) -> Iterator[tuple[int, str, str, float, str]]:
    """The results of cases, one by one; a worker that dies or hangs is replaced."""
    while case < stop:
        arguments = [str(x) for x in (seed, case, stop, step)]
        root = str(Path(__file__).resolve().parents[1])
        path = os.pathsep.join([root, os.path.dirname(os.path.abspath(__file__))])
        worker = subprocess.Popen(
            [sys.executable, __file__, "--work", *arguments, ",".join(names)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
        )
        assert worker.stdout is not None
        try:
            if _line(worker, 300) != "ready":
                raise RuntimeError(
                    f"a fuzz worker does not start; see {sys.executable} {__file__} "
                    f"--work {' '.join(arguments)} {','.join(names)}"
                )
            while case < stop:
                began = _line(worker, 60)
                name = began.split()[2] if began else "?"
                ended = _line(worker, SECONDS) if began else None
                if ended is None:
                    died = worker.poll()
                    what = "hang" if died is None else f"died ({died})"
                    yield case, name, what, float(SECONDS), what
                    case += step
                    break
                _, _, result, took, fault = ended.split(" ", 4)
                yield case, name, result, float(took), json.loads(fault)
                case += step
        finally:
            worker.kill()
            worker.stdout.close()
            worker.wait()


def _line(worker: subprocess.Popen, seconds: float) -> str | None:
    """The next line of a worker; None after so many seconds, or where it has ended."""
    stream = worker.stdout
    text = b""
    end = time.monotonic() + seconds
    while not text.endswith(b"\n"):
        left = end - time.monotonic()
        if left <= 0 or not select.select([stream], [], [], left)[0]:
            return None
        part = os.read(stream.fileno(), 1)
        if not part:
            worker.wait()
            return None
        text += part
    return text.decode().strip()


def main() -> int:
    """Run what the flags say; 1 where there was a fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--only", type=int, help="run this case alone")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--readers", help=f"some of {','.join(READERS)}")
    flags = parser.parse_args()
    names = flags.readers.split(",") if flags.readers else None
    first, cases = flags.first, flags.cases
    if flags.only is not None:
        first, cases = flags.only, 1
    report = run(cases, flags.seed, first, flags.seconds, flags.workers, names)
    for case, name, result, fault in report.faults:
        print(f"case {case} ({name}): {result}\n{fault}\n")
    print(report.table())
    print(
        f"{report.cases:,} cases of seed {flags.seed}, {len(report.faults)} faults, "
        f"slowest {report.slowest:.2f} s"
    )
    return bool(report.faults)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        work(*map(int, sys.argv[2:6]), sys.argv[6].split(","))
    else:
        sys.exit(main())
