"""A pickle of arrays is read, and nothing in any other one is run."""

import io
import os
import pickle
import struct
import sys

import numpy as np
import pytest

from psec_jax.errors import InputError
from psec_jax.unpickle import MAX_DEPTH, read_tree

MINUS = struct.pack("<i", -1)
DTYPE = b"cnumpy\ndtype\n(X\x02\x00\x00\x00f4\x89\x88tR(K\x03X\x01\x00\x00\x00<NNN"
DTYPE += b"J%sJ%sK\x00tb" % (MINUS, MINUS)
ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85C\x01btR"


class Old(pickle._Pickler):
    """Names as NumPy before 2 writes them, which the authors' code ran with."""

    def save_global(self, obj, name=None):
        if obj.__name__ == "_reconstruct":
            self.write(b"cnumpy.core.multiarray\n_reconstruct\n")
            self.memoize(obj)
            return
        super().save_global(obj, name)

    dispatch = dict(pickle._Pickler.dispatch)
    dispatch[type(np.ndarray)] = save_global


def dumped(value, protocol=4):
    stream = io.BytesIO()
    Old(stream, protocol).dump(value)
    return stream.getvalue()


class Calls:
    """A value that calls something when it is loaded."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


@pytest.fixture
def read(tmp_path):
    def one(data):
        path = tmp_path / "model.pickle"
        path.write_bytes(data)
        return read_tree(path)

    return one


TREE = {
    "a": {
        "kernel": np.arange(6, dtype=np.float32).reshape(2, 3),
        "columns": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "step": np.array(7, np.int32),
    },
    "empty": np.zeros((0, 4), np.float32),
    "flags": np.array([True, False]),
    "rank": 4,
    "rate": 0.5,
    "large": 2**40,
    "name": "x",
    "actor": None,
}


@pytest.mark.parametrize("protocol", [3, 4])
def test_a_tree_of_arrays(read, protocol):
    flat = read(dumped(TREE, protocol))
    inner = {f"a/{name}": leaf for name, leaf in TREE["a"].items()}
    expected = inner | {k: v for k, v in TREE.items() if k != "a"}
    assert flat.keys() == expected.keys()
    for path, leaf in expected.items():
        np.testing.assert_array_equal(flat[path], leaf)
        assert np.asarray(flat[path]).dtype == np.asarray(leaf).dtype


TOUCH = Calls(os.system, "touch it_ran")


def laughs():
    """Nine dicts in each of nine dicts, and so on: 30 in memory, 9^30 in all."""
    inside = {}
    for _ in range(30):
        inside = dict.fromkeys("abcdefghi", inside)
    return dumped(inside)


HOSTILE = {
    "a command": (dumped({"a": TOUCH}), "asks for posix.system"),
    "a command in the older form": (
        b"cposix\nsystem\n(S'touch it_ran'\ntR.",
        "posix.sy",
    ),
    "an instance": (b"(S'touch it_ran'\niposix\nsystem\n.", "STRING refused"),
    "an instance of a name": (b"(iposix\nsystem\n.", "asks for posix.system"),
    "eval": (dumped({"a": Calls(eval, "1/0")}), "asks for builtins.eval"),
    "an attribute of a name that is admitted": (
        b"\x80\x04\x8c\x05numpy\x8c\x0edtype.__init__\x93.",
        "asks for numpy.dtype.__init__",
    ),
    "an import alone": (b"cantigravity\nx\n.", "asks for antigravity.x"),
    "an object of a class": (
        dumped({"a": pickle.PickleError()}),
        "_pickle.PickleError",
    ),
    "control characters": (b"c\x1b[2J\nx\n.", r"asks for \x1b[2J.x"),
    "an extension": (b"\x80\x02\x82\x01.", "instruction EXT1 refused"),
    "a persistent id": (b"Pfile\n.", "instruction PERSID refused"),
    "an object by its class": (b"cnumpy\nndarray\n)\x81.", "NEWOBJ refused"),
    "a state for a name": (b"cnumpy\nndarray\n}b.", "a state that is not an array's"),
    "a call of no name": (b"})R.", "a call of dict"),
    "a call of a class": (b"cnumpy\nndarray\n)R.", "other arguments than an array's"),
    "objects as numbers": (
        DTYPE.replace(b"f4", b"O8") + b".",
        "other arguments than an",
    ),
    "no mark": (b"}u.", "SETITEMS needs what is not there"),
    "a value that is not there": (b"h\x07.", "BINGET needs what is not there"),
    "a mark as a value": (b"}((K\x01u.", "SETITEMS needs what is"),
    "items for no dict": (b")(K\x01K\x01u.", "items for tuple"),
    "a key without a value": (b"}(K\x01u.", "items for dict"),
    "a key that is no text": (b"}(K\x01K\x01u.", "int as a key, expected text"),
    "a path as a key": (b"}(\x8c\x03a/bK\x01u.", "text 'a/b' as a key"),
    "a leaf that is no array": (b"}\x8c\x01a)s.", "holds tuple, expected arrays"),
    "no dict": (b"K\x01.", "holds int, expected a dict"),
    "nothing": (b".", "holds NoneType, expected a dict"),
    "an array without numbers": (b"}\x8c\x01a" + ARRAY + b"s.", "without numbers"),
    "a shape below 0": (
        ARRAY + b"(K\x01J\xff\xff\xff\xff\x85" + DTYPE + b"\x89C\x00tb.",
        "an array without a shape or numbers",
    ),
    "a type without its state": (
        ARRAY + b"(K\x01)" + DTYPE.split(b"(K")[0] + b"\x89C\x00tb.",
        "an array without a shape or numbers",
    ),
    "a huge shape": (
        ARRAY
        + b"(K\x01("
        + b"J\xff\xff\xff\x7f" * 8
        + b"t"
        + DTYPE
        + b"\x89C\x04aaaatb.",
        "4 bytes for an array of",
    ),
    "huge bytes": (
        b"\x8e" + struct.pack("<Q", 2**62) + b".",
        "no pickle, or a damaged",
    ),
    "a huge buffer": (b"\x96" + struct.pack("<Q", 2**62) + b".", "or a damaged one"),
    "a huge number": (b"\x8b" + struct.pack("<i", 2**30) + b".", "or a damaged one"),
    "a long number": (b"I" + b"9" * 100_000 + b"\n.", "or a damaged one"),
    "a huge place in the memo": (b"}r\xff\xff\xff\x7f\x8c\x01aPx\n.", "PERSID refused"),
    "deep tuples": (b")" + b"\x85" * 5_000 + b".", "holds tuple, expected a dict"),
    "a deep leaf": (
        b"}\x8c\x01a)" + b"\x85" * 5_000 + b"s.",
        "holds tuple, expected arrays and numbers",
    ),
    "deep dicts": (
        b"}\x8c\x01a" * 5_000 + b"}" + b"s" * 5_000 + b".",
        f"dicts more than {MAX_DEPTH} deep",
    ),
    "a dict that holds itself": (
        b"}\x94\x8c\x01ah\x00s.",
        f"more than {MAX_DEPTH} deep",
    ),
    "a billion laughs": (laughs(), "more than 100000 values"),
    "half of it": (dumped(TREE)[:-40], "no pickle, or a damaged one"),
    "values left over": (b"}}.", "ends with 1 values left"),
    "no end": (b"}", "no pickle, or a damaged one"),
    "an empty file": (b"", "no pickle, or a damaged one"),
    "a text": (b"not a pickle", "no pickle, or a damaged one"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_everything_else_is_refused(read, tmp_path, monkeypatch, case):
    data, words = HOSTILE[case]
    monkeypatch.chdir(tmp_path)
    modules = set(sys.modules)
    with pytest.raises(InputError) as refused:
        read(data)
    assert words in str(refused.value)
    assert str(refused.value).startswith(f"{tmp_path / 'model.pickle'}")
    assert not (tmp_path / "it_ran").exists()
    assert "antigravity" not in set(sys.modules) - modules


def test_the_hostile_ones_are(tmp_path, monkeypatch):
    """Loaded as usual, the command runs: the table above is not harmless."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(HOSTILE["a command"][0])  # noqa: S301
    assert (tmp_path / "it_ran").exists()
