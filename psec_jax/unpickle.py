"""Reads a pickle of a tree of arrays, and runs nothing that is in it.

A pickle is a program for a stack machine, which imports and calls what the program
names. This module is a machine of its own: it knows the instructions that build dicts,
tuples and numbers, and the four names that stand for an array. They are marks here, and
what they stand for is never called. Any other name or instruction is refused.
"""

import pickletools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from psec_jax.errors import InputError
from psec_jax.files import read_bytes

MAX_BYTES = 2**31  # of a file
MAX_DEPTH = 32  # of dicts in one another
MAX_LEAVES = 10**5
_JAX_ARRAY = "jax._src.array._reconstruct_array"
_ARRAY = "numpy.core.multiarray._reconstruct"
_CLASS = "numpy.ndarray"
_DTYPE = "numpy.dtype"
NAMES = (_JAX_ARRAY, _ARRAY, _CLASS, _DTYPE)
_DTYPES = ("f2", "f4", "f8", "i4", "i8", "u4", "b1")
# An instruction that leaves its own argument on the stack.
_PLAIN = (
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("SHORT_BINUNICODE", "BINUNICODE", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Name(str):
    """One of `NAMES`."""


class _Dtype:
    """What the name of a type was called with; `type` once its state is known."""

    def __init__(self, code: str) -> None:
        self.code = code
        self.type: np.dtype | None = None


class _Array:
    """An array whose state may still follow."""

    def __init__(self) -> None:
        self.value: np.ndarray | None = None


class _Mark:
    """Where a tuple or the items of a dict begin on the stack."""


def read_tree(path: str | Path) -> dict[str, Any]:
    """The leaves of a pickled tree of dicts by their "/"-joined paths.

    Args:
      path: the file; arrays of NumPy or JAX, numbers and texts are read.

    Returns:
      Arrays as NumPy's, which cannot be written to; other leaves as they are.

    Raises:
      InputError: any other name or instruction than such a tree needs, or a damaged or
        too large file.
    """
    data = read_bytes(path, MAX_BYTES)
    try:
        value = _Machine(str(path)).run(data)
    except (ValueError, OverflowError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is no pickle, or a damaged one: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds {_kind(value)}, expected a dict")
    return _leaves(str(path), value)


class _Machine:
    """Runs the instructions that are known; every other one is refused."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        """What the program leaves at its end."""
        for instruction, argument, position in pickletools.genops(data):
            name = instruction.name
            if name == "STOP":
                break
            try:
                self.step(name, argument)
            except (IndexError, KeyError) as error:
                raise InputError(
                    f"{self.source}: byte {position}: {name} needs what is not there"
                ) from error
        value = self.stack.pop() if self.stack else None
        if self.stack:
            raise InputError(f"{self.source}: ends with {len(self.stack)} values left")
        return value

    def step(self, name: str, argument: Any) -> None:
        """One instruction."""
        stack, memo = self.stack, self.memo
        if name in ("PROTO", "FRAME"):
            return
        if name in _PLAIN:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "MARK":
            stack.append(_Mark)
        elif name in _TUPLES:
            count = _TUPLES[name]
            stack.append(tuple(self.pop() for _ in range(count))[::-1])
        elif name == "TUPLE":
            stack.append(tuple(self.pop_to_mark()))
        elif name == "MEMOIZE":
            memo[len(memo)] = self.top()
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = self.top()
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in ("SETITEM", "SETITEMS"):
            value = [self.pop(), self.pop()][::-1] if name == "SETITEM" else None
            self.set_items(self.pop_to_mark() if value is None else value)
        elif name in ("GLOBAL", "STACK_GLOBAL", "INST"):
            stack.append(self.name(argument))
        elif name == "REDUCE":
            arguments, what = self.pop(), self.pop()
            stack.append(self.made(what, arguments))
        elif name == "BUILD":
            state = self.pop()
            self.set_state(self.top(), state)
        else:
            raise InputError(
                f"{self.source}: instruction {name} refused, a tree of arrays needs "
                "none"
            )

    def top(self) -> Any:
        """The last value of the stack."""
        if self.stack[-1] is _Mark:
            raise IndexError
        return self.stack[-1]

    def pop(self) -> Any:
        """The last value, which leaves the stack."""
        value = self.top()
        del self.stack[-1]
        return value

    def pop_to_mark(self) -> list[Any]:
        """The values behind the last mark, which leave the stack with it."""
        values = []
        while self.stack[-1] is not _Mark:
            values.append(self.stack.pop())
        self.stack.pop()
        return values[::-1]

    def set_items(self, items: list[Any]) -> None:
        """Put pairs into the dict at the top."""
        target = self.top()
        keys, values = items[::2], items[1::2]
        if not isinstance(target, dict) or len(keys) != len(values):
            raise InputError(f"{self.source}: items for {_kind(target)}")
        for key, value in zip(keys, values, strict=True):
            if type(key) is not str or "/" in key:
                raise InputError(f"{self.source}: {_kind(key)} as a key, expected text")
            target[key] = value

    def name(self, argument: Any) -> _Name:
        """A name that is admitted.

        Raises:
          InputError: any other; it is said.
        """
        if argument is None:  # of STACK_GLOBAL
            attribute, module = self.pop(), self.pop()
        else:
            module, _, attribute = argument.partition(" ")
        if type(module) is not str or type(attribute) is not str:
            raise InputError(f"{self.source}: a name that is no text")
        name = f"{module}.{attribute}"
        if name not in NAMES:
            raise InputError(
                f"{self.source}: asks for {name:.200}, which is refused; admitted are "
                f"{', '.join(NAMES)}"
            )
        return _Name(name)

    def made(self, what: Any, arguments: Any) -> Any:
        """What a name stands for with these arguments.

        Raises:
          InputError: not what an array is written as.
        """
        if not isinstance(what, _Name) or not isinstance(arguments, tuple):
            raise InputError(f"{self.source}: a call of {_kind(what)}")
        count = len(arguments)
        if what == _DTYPE and count == 3 and arguments[0] in _DTYPES:
            return _Dtype(arguments[0])
        if what == _ARRAY and count == 3 and _is(arguments[0], _CLASS):
            return _Array()
        if what == _JAX_ARRAY and count == 4 and _is(arguments[0], _ARRAY):
            array = self.made(arguments[0], arguments[1])
            self.set_state(array, arguments[2])
            return array
        raise InputError(f"{self.source}: {what} of other arguments than an array's")

    def set_state(self, target: Any, state: Any) -> None:
        """Complete a type or an array.

        Raises:
          InputError: anything else, or numbers that do not fill the shape.
        """
        parts = state if isinstance(state, tuple) else ()
        if isinstance(target, _Dtype) and len(parts) == 8:
            order = parts[1]
            if type(order) is str and order in ("<", "|", "="):
                target.type = np.dtype(f"<{target.code}")
                return
        if isinstance(target, _Array) and len(parts) == 5:
            target.value = self.array(*parts[1:])
            return
        raise InputError(f"{self.source}: a state that is not an array's")

    def array(self, shape: Any, dtype: Any, fortran: Any, content: Any) -> np.ndarray:
        """An array of its bytes."""
        if (
            not isinstance(dtype, _Dtype)
            or dtype.type is None
            or not isinstance(shape, tuple)
            or not all(type(n) is int and 0 <= n < 2**31 for n in shape)
            or not isinstance(content, bytes)
        ):
            raise InputError(f"{self.source}: an array without a shape or numbers")
        expected = dtype.type.itemsize
        for n in shape:
            expected *= n
        if len(content) != expected:
            raise InputError(
                f"{self.source}: {len(content)} bytes for an array of {expected}"
            )
        flat = np.frombuffer(content, dtype.type)
        return flat.reshape(shape, order="F" if fortran is True else "C")


def _is(value: Any, name: str) -> bool:
    return isinstance(value, _Name) and value == name


def _kind(value: Any) -> str:
    """What a value is; its contents may nest without an end."""
    if isinstance(value, _Name):
        return str(value)
    return f"text {value!r:.40}" if type(value) is str else type(value).__name__


def _leaves(source: str, root: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves by path, walked without recursion: dicts may hold themselves."""
    flat: dict[str, Any] = {}
    level: list[tuple[str, Any]] = [("", root)]
    for _ in range(MAX_DEPTH):
        following: list[tuple[str, Any]] = []
        for path, value in level:
            if not isinstance(value, dict):
                flat[path.removeprefix("/")] = _leaf(source, value)
                continue
            following += [(f"{path}/{key}", child) for key, child in value.items()]
            if len(following) + len(flat) > MAX_LEAVES:
                raise InputError(f"{source}: more than {MAX_LEAVES} values")
        level = following
        if not level:
            return flat
    raise InputError(f"{source}: dicts more than {MAX_DEPTH} deep")


def _leaf(source: str, value: Any) -> Any:
    if isinstance(value, _Array):
        value = value.value
        if value is None:
            raise InputError(f"{source}: an array without numbers")
    elif value is not None and type(value) not in (int, float, bool, str):
        raise InputError(f"{source}: holds {_kind(value)}, expected arrays and numbers")
    return value
