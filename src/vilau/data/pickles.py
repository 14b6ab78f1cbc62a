"""Old pickle shards, read as data: a small stack machine that knows containers, text, bytes and numbers, no code.

A pickle is a program, and Python's own reader runs it. This one follows the instructions that build plain data and
stops at all others: names of modules are never imported but compared with a short list (numpy's arrays, numbers and
types, an ordered mapping, Python 2's bytes), and what they stand for is rebuilt here. A shard is held in memory whole.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

MAX_SHARD_BYTES = 8_000_000_000
_MARK = object()


class UnsafePickle(ValueError):
    """A pickle holds something that is not plain data. Nothing of it was run."""


@dataclass(frozen=True)
class _Name:
    """A name of a module's member, which is only ever compared."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class _Type:
    """A numpy type being rebuilt."""

    def __init__(self, code: str) -> None:
        self.code = code

    def dtype(self) -> np.dtype[Any]:
        kind = np.dtype(self.code)
        if kind.kind not in "biufcSU" or kind.hasobject:
            raise UnsafePickle(f"arrays of type {self.code!r} are not read; numbers and fixed text are")
        return kind

    def build(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) < 7 or any(part is not None for part in state[2:5]):
            raise UnsafePickle("a numpy type with fields or sub-arrays is not read")
        if state[1] in ("<", ">") and self.code[:1] not in "<>":
            self.code = state[1] + self.code


class _Array:
    """A numpy array being rebuilt."""

    def __init__(self) -> None:
        self.value: np.ndarray | None = None

    def build(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5 or not isinstance(state[2], _Type):
            raise UnsafePickle("a numpy array whose state is not read")
        _, shape, kind, fortran, data = state
        self.value = _array(data, kind, shape, "F" if fortran else "C")


def _array(data: Any, kind: Any, shape: Any, order: Any) -> np.ndarray:
    if isinstance(data, str):
        data = data.encode("latin-1")
    if not isinstance(data, bytes | bytearray) or not isinstance(kind, _Type) or order not in ("C", "F"):
        raise UnsafePickle("a numpy array of something else than bytes is not read")
    try:
        return np.frombuffer(bytes(data), kind.dtype()).reshape(shape, order=order)
    except (TypeError, ValueError) as error:
        raise ValueError(f"an array's bytes do not fit its shape: {error}") from error


def _new_type(code: Any, *_: Any) -> _Type:
    if isinstance(code, _Name):
        raise UnsafePickle(f"a numpy type made from {code} is not read")
    built = _Type(str(code))
    built.dtype()
    return built


def _scalar(kind: Any, data: Any) -> Any:
    return _array(data, kind, (), "C").item()


def _new_array(kind: Any, *_: Any) -> _Array:
    if kind != _Name("numpy", "ndarray"):
        raise UnsafePickle(f"an array of class {kind} is not read")
    return _Array()


def _bytes(text: Any = "", encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise UnsafePickle("bytes made by another encoding than latin-1 are not read")
    return text.encode("latin-1")


def _mapping(items: Any = ()) -> dict[Any, Any]:
    return dict(items)


_CALLS: dict[str, Callable[..., Any]] = {
    "numpy.dtype": _new_type,
    "collections.OrderedDict": _mapping,
    "_codecs.encode": _bytes,
    "builtins.bytes": _bytes,
    "__builtin__.bytes": _bytes,
}
for _module in ("numpy.core", "numpy._core"):
    _CALLS[f"{_module}.multiarray._reconstruct"] = _new_array
    _CALLS[f"{_module}.multiarray.scalar"] = _scalar
    _CALLS[f"{_module}.numeric._frombuffer"] = _array
_KNOWN = frozenset(_CALLS) | {"numpy.ndarray"}

_NUMBERS = ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT")
_TEXTS = ("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8")
_VALUES = frozenset({*_NUMBERS, *_TEXTS, "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"})
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
    "MARK": lambda: _MARK,
}
_FROM_MARK: dict[str, Callable[[Sequence[Any]], Any]] = {
    "LIST": list,
    "TUPLE": tuple,
    "DICT": lambda items: dict(_pairs(items)),
    "FROZENSET": frozenset,
}
_INTO: dict[str, tuple[type, Callable[[Any, Sequence[Any]], Any]]] = {
    "APPENDS": (list, lambda target, items: target.extend(items)),
    "SETITEMS": (dict, lambda target, items: target.update(_pairs(items))),
    "ADDITEMS": (set, lambda target, items: target.update(items)),
}
_SKIPPED = frozenset({"PROTO", "FRAME"})


def load_pickle(data: bytes) -> Any:
    """Return the plain data of a pickle of any protocol; numpy arrays and numbers as such.

    Raises:
        UnsafePickle: it asks for anything else; nothing was imported or run.
        ValueError: it is damaged.
    """
    machine = _Machine(len(data))
    try:
        for opcode, argument, _ in pickletools.genops(io.BytesIO(data)):
            if machine.step(opcode.name, argument):
                return _finish(machine.stack[-1], {})
    except UnsafePickle:
        raise
    except (ValueError, KeyError, IndexError, TypeError, EOFError, OverflowError, RecursionError) as error:
        raise ValueError(f"the pickle is damaged: {error or type(error).__name__}") from error
    raise ValueError("the pickle is damaged: it ends early")


class _Machine:
    """The stack and memory of a pickle of ``size`` bytes."""

    def __init__(self, size: int) -> None:
        self.stack: list[Any] = []
        self.memory: dict[int, Any] = {}
        self.size, self.made = size, 0

    def step(self, name: str, argument: Any) -> bool:
        """Follow one instruction; True at the end.

        Raises:
            UnsafePickle: one that is not for plain data.
        """
        stack = self.stack
        if name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name]())
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memory[argument] = stack[-1]
        elif name == "MEMOIZE":
            self.memory[len(self.memory)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memory[argument])
        elif name in _FROM_MARK:
            stack.append(_FROM_MARK[name](self._to_mark()))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(tuple(self._pop(int(name[-1]))))
        elif name in _INTO or name in ("APPEND", "SETITEM"):
            self._fill(name)
        elif name in ("GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD"):
            self._name_or_call(name, argument)
        elif name == "POP":
            stack.pop()
        elif name == "POP_MARK":
            self._to_mark()
        elif name == "DUP":
            stack.append(stack[-1])
        elif name not in _SKIPPED and name != "STOP":
            raise UnsafePickle(f"the pickle holds the instruction {name}, which is not for plain data")
        return name == "STOP"

    def _pop(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise ValueError("it takes more than it made")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def _to_mark(self) -> list[Any]:
        for index in range(len(self.stack) - 1, -1, -1):
            if self.stack[index] is _MARK:
                items = self.stack[index + 1 :]
                del self.stack[index:]
                return items
        raise ValueError("a mark is missing")

    def _fill(self, name: str) -> None:
        items = self._pop(1 if name == "APPEND" else 2) if name in ("APPEND", "SETITEM") else self._to_mark()
        wanted, fill = _INTO[name if name in _INTO else f"{name}S"]
        if type(self.stack[-1]) is not wanted:
            raise UnsafePickle(f"the pickle puts items into a {type(self.stack[-1]).__name__}")
        fill(self.stack[-1], items)

    def _name_or_call(self, name: str, argument: Any) -> None:
        if name == "BUILD":
            state = self.stack.pop()
            if not isinstance(self.stack[-1], _Type | _Array):
                raise UnsafePickle("the pickle sets the state of an object that is not numpy's")
            self.stack[-1].build(state)
        elif name == "REDUCE":
            call, arguments = self._pop(2)
            if not isinstance(call, _Name) or str(call) not in _CALLS or not isinstance(arguments, tuple):
                raise UnsafePickle(f"the pickle calls {call}: only plain data and numpy arrays are read")
            made = _CALLS[str(call)](*arguments)
            self.made += len(made) if isinstance(made, bytes | dict) else 0
            if self.made > self.size:  # bytes in a pickle stand there once
                raise UnsafePickle("the pickle makes more out of its content than it holds")
            self.stack.append(made)
        else:
            module, member = argument.split(" ", 1) if name == "GLOBAL" else self._pop(2)
            if not isinstance(module, str) or not isinstance(member, str) or f"{module}.{member}" not in _KNOWN:
                raise UnsafePickle(f"the pickle names {module}.{member}: only plain data and numpy arrays are read")
            self.stack.append(_Name(module, member))


def _pairs(items: Sequence[Any]) -> list[tuple[Any, Any]]:
    if len(items) % 2:
        raise ValueError("a key has no value")
    return list(zip(items[::2], items[1::2], strict=True))


def _finish(value: Any, done: dict[int, tuple[Any, Any]]) -> Any:
    """Put arrays in the place of what they were rebuilt in; lists and mappings keep their identity."""
    if isinstance(value, _Array):
        if value.value is None:
            raise ValueError("an array without content")
        return value.value
    if isinstance(value, _Name | _Type):
        raise UnsafePickle(f"the pickle holds {value if isinstance(value, _Name) else 'a numpy type'} as data")
    if id(value) in done:
        return done[id(value)][1]
    if isinstance(value, list | dict):
        done[id(value)] = (value, value)  # the first keeps it alive, so that no other gets its id
        for key in range(len(value)) if isinstance(value, list) else list(value):
            value[key] = _finish(value[key], done)
    elif isinstance(value, tuple | set | frozenset):
        finished = type(value)(_finish(item, done) for item in value)
        done[id(value)] = (value, finished)
        return finished
    return value


def read_shard(path: Path) -> list[dict[str, Any]]:
    """Return the records of a pickle shard: a list of mappings.

    Raises:
        UnsafePickle: it holds more than plain data.
        ValueError: it cannot be read, is damaged, or holds something else.
    """
    try:
        if path.stat().st_size > MAX_SHARD_BYTES:
            raise ValueError(f"{path} has {path.stat().st_size} bytes, more than {MAX_SHARD_BYTES}: it is read whole")
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    try:
        value = load_pickle(data)
    except UnsafePickle as error:
        raise UnsafePickle(f"{path} is refused: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(value, list) or not all(isinstance(record, dict) for record in value):
        raise ValueError(f"{path} holds a {type(value).__name__}, not a list of mappings")
    return value
