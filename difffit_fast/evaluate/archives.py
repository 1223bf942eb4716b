"""Arrays in ``.npz`` archives: what one claims to be is compared with what is stored before anything is made of it."""

from __future__ import annotations

import contextlib
import math
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from ..errors import DiffFitError


class Member(NamedTuple):
    """An open array of an archive; ``file`` stands at its data."""

    file: IO[bytes]
    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype


@contextlib.contextmanager
def archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """The archive at ``path``; whatever goes wrong with it becomes a :class:`DiffFitError`."""
    try:
        with zipfile.ZipFile(path) as opened:
            yield opened
    except DiffFitError:
        raise
    except FileNotFoundError as error:
        raise DiffFitError(f"{path} does not exist") from error
    except zipfile.BadZipFile as error:
        raise DiffFitError(f"{path} is not a .npz file, or damaged: {error}") from error
    except Exception as error:  # zipfile and NumPy raise a different kind for each sort of damage
        raise DiffFitError(f"{path} is damaged: {error}") from error


@contextlib.contextmanager
def member(opened: zipfile.ZipFile, key: str) -> Iterator[Member]:
    """The array ``key``, no data read yet.

    Raises:
        DiffFitError: its shape is none, or claims more or less data than the archive does.
    """
    path, name = opened.filename, f"{key}.npy"
    with opened.open(name) as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
        if dtype.hasobject:
            raise DiffFitError(f"{key} of {path} holds Python objects, which are not read; expected numbers")
        if any(isinstance(n, bool) or n < 0 for n in shape):
            raise DiffFitError(f"{key} of {path} claims the shape {list(shape)}")
        claimed, stored = math.prod(shape) * dtype.itemsize, opened.getinfo(name).file_size - file.tell()
        if claimed != stored:
            raise DiffFitError(f"{key} of {path} claims {dtype} {list(shape)}, {claimed} bytes; there are {stored}")
        yield Member(file, shape, fortran, dtype)


def keys_of(opened: zipfile.ZipFile) -> set[str]:
    """The names of the arrays."""
    return {name.removesuffix(".npy") for name in opened.namelist()}
