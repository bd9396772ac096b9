"""Read the pickles of CIFAR-like datasets without running any code that they name.

A pickle may call whatever it names. Here it can name only the five globals that numpy arrays are written with, and
none of them reaches numpy's own reconstruction: arrays are rebuilt below, from bytes, and only as plain numbers.
"""

from __future__ import annotations

import io
import pickle
from typing import IO, Any

import numpy as np

from puat_fast.data.formats.base import DataError

_TYPES = ("u1", "i4", "i8", "f4", "f8")  # images; labels, where they are an array; ImageNet32's mean image


class _Refused(pickle.UnpicklingError):
    """The pickle names something outside the allow-list."""


class _Dtype:
    """Stands in for numpy.dtype: `dtype('u1', False, True)`, then its state, of which only the byte order counts."""

    def __init__(self, code: str | bytes, *_: Any) -> None:
        self.code = _text(code).lstrip("|<>=")
        self.order = "|"
        if self.code not in _TYPES:
            raise pickle.UnpicklingError(f"an array of type {self.code!r}, expected one of {', '.join(_TYPES)}")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = _text(state[1])


class _Array:
    """Stands in for an array between `_reconstruct(ndarray, (0,), b'b')` and its state."""

    def __init__(self, *_: Any) -> None:
        self.value = np.empty(0, np.uint8)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, raw = state
        self.value = _frombuffer(raw, dtype, shape, "F" if fortran else "C").value


def _frombuffer(raw: Any, dtype: _Dtype, shape: tuple[int, ...], order: Any) -> _Array:
    array = _Array()
    array.value = np.frombuffer(raw, np.dtype(dtype.order + dtype.code)).reshape(shape, order=order)
    return array


def _encode(text: str, encoding: str | bytes = "latin1") -> bytes:
    """Stands in for _codecs.encode, which Python 3 writes bytes with at protocol 2."""
    if _text(encoding) != "latin1":
        raise _Refused(f"_codecs.encode with {_text(encoding)!r}")
    return text.encode("latin1")


def _text(value: str | bytes) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else value


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): "numpy.ndarray",  # only ever an argument of _reconstruct: a name is enough
    ("_codecs", "encode"): _encode,
}
for _core in ("numpy.core", "numpy._core"):  # before and after numpy 2
    _ALLOWED[f"{_core}.multiarray", "_reconstruct"] = _Array
    _ALLOWED[f"{_core}.numeric", "_frombuffer"] = _frombuffer


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise _Refused(f"{module}.{name}")
        return _ALLOWED[module, name]


def load_pickle(data: bytes | IO[bytes], file: str) -> dict[bytes, Any]:
    """The dict in a dataset pickle of Python 2 or 3, keys as bytes, arrays as numpy arrays.

    data: the pickle, or an open file of it: then a large one is not in memory twice. `file` is the name for error
    messages. Raises DataError where the pickle is broken, names code, or is no dict.
    """
    try:
        stream = io.BytesIO(data) if isinstance(data, bytes) else data
        content = _Unpickler(stream, encoding="bytes").load()
    except _Refused as error:
        raise DataError(f"{file}: refuses to run code: the pickle names {error}") from None
    except Exception as error:  # a broken pickle raises anything: EOFError, KeyError, MemoryError ...
        detail = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{file}: truncated or not a dataset pickle ({detail}); get the file anew") from error
    if not isinstance(content, dict):
        raise DataError(f"{file}: holds {type(content).__name__}, expected a pickled dict")
    return {
        key.encode() if isinstance(key, str) else key: value.value if isinstance(value, _Array) else value
        for key, value in content.items()
    }
