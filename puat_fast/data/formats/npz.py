"""Arrays out of .npz files, never a pickled one; large ones part by part."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from puat_fast.data.formats.base import DataError, reason


def read_npz(file: str | Path, raw: IO[bytes], keys: Sequence[str]) -> list[npt.NDArray[Any]]:
    """The arrays of these names. `file` is the name for messages. Raises DataError."""
    try:
        pack = np.load(raw, allow_pickle=False)
        if not isinstance(pack, np.lib.npyio.NpzFile):
            raise DataError(f"{file}: holds one array, expected an .npz with {', '.join(keys)}")
        with pack:
            missing = [key for key in keys if key not in pack]
            if missing:
                found = ", ".join(pack.files) or "nothing"
                raise DataError(f"{file}: no {missing[0]!r} among its arrays ({found}); expected {', '.join(keys)}")
            return [pack[key] for key in keys]
    except Exception as error:  # a broken one raises anything: BadZipFile, NotImplementedError, TokenError ...
        raise broken(file, error) from error


def read_parts(file: Path, key: str, rows: int) -> Iterator[npt.NDArray[Any]]:
    """An array of an .npz, `rows` along its first axis at a time, so that it is never whole in memory. DataError."""
    try:
        with zipfile.ZipFile(file) as pack, pack.open(f"{key}.npy") as stream:
            version = np.lib.format.read_magic(stream)
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = header(stream)
            if dtype.hasobject or fortran or not shape:
                raise DataError(f"{file}: {key!r} is not a plain array in C order")
            size = int(np.prod(shape[1:])) * dtype.itemsize
            for start in range(0, shape[0], rows):
                count = min(rows, shape[0] - start)
                part = _exactly(stream, count * size)
                yield np.frombuffer(part, dtype).reshape(count, *shape[1:])
    except KeyError:
        raise DataError(f"{file}: no {key!r} among its arrays") from None
    except Exception as error:
        raise broken(file, error) from error


def _exactly(stream: IO[bytes], count: int) -> bytes:
    content = stream.read(count)
    if len(content) < count:
        raise EOFError(f"{len(content)} of {count} bytes")
    return content


def broken(file: str | Path, error: Exception) -> DataError:
    """What to say of a file that is no .npz, or not a whole one."""
    if isinstance(error, DataError):
        return error
    return DataError(f"{file}: truncated or not an .npz file ({reason(error)}); get the file anew")
