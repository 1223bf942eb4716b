"""Bases that come with the package, reached by name: ``--ckpt glyphs``."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "bases"
SUFFIX = ".safetensors"


def base_names() -> list[str]:
    """The names of the bases that come with the package, sorted."""
    return sorted(path.stem for path in FOLDER.glob(f"*{SUFFIX}"))


def model_path(path: str | os.PathLike[str]) -> Path:
    """The file that ``path`` means: the base of that name where it is text that names one, else the path itself.

    >>> model_path("some/file.pt").as_posix()
    'some/file.pt'

    A file of such a name is given as ``./glyphs`` (or as a :class:`~pathlib.Path`); a warning says so where there is one.
    """
    if not isinstance(path, str) or path not in base_names():
        return Path(path)
    if Path(path).exists():
        warnings.warn(
            f"{path} is taken for the base that comes with the package; the {path} in this folder is ./{path}",
            stacklevel=2,
        )
    return FOLDER / f"{path}{SUFFIX}"
