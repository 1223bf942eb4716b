"""Files: written so that a kill at any moment leaves the old one or the new one, never half of one; and read with one
sentence for what is wrong with them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import DiffFitError

TEMPORARY = ".tmp-"  # names that begin so are leftovers of a killed process, and never read

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def beside(path: Path) -> Path:
    """A temporary name in the folder of ``path``, where a rename is atomic."""
    return path.with_name(f"{TEMPORARY}{path.name}.{os.getpid()}")


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside ``path`` to write to: flushed to the disk and renamed when all went well, else removed.

    >>> with replacing(tmp_path / "numbers.txt") as temporary:          # doctest: +SKIP
    ...     temporary.write_text("1 2 3")
    """
    path = Path(path)
    temporary = beside(path)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode("utf-8"))


def write_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """A safetensors file whose bytes depend on its content alone (the library's own order of metadata does not repeat).

    Tensors of any of the format's usual dtypes, on any device; they are written one after another, so that no second
    copy of them all is held.
    """
    header: dict[str, object] = {}
    if metadata:
        header["__metadata__"] = dict(sorted(metadata.items()))
    start = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, start + size],
        }  # fmt: skip
        start += size
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of eight
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            flat = tensor.detach().to("cpu").contiguous().reshape(-1)
            if flat.numel():
                file.write(memoryview(flat.view(torch.uint8).numpy()))


def write_torch(path: Path, value: object) -> None:
    """``torch.save`` beside ``path``, and renamed."""
    with replacing(path) as temporary:
        torch.save(value, temporary)


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def safetensors_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The metadata of a ``.safetensors`` file.

    Raises:
        DiffFitError: the file cannot be read as one.
    """
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise DiffFitError(f"cannot read {path}: {error}") from error


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A YAML mapping of settings, or a :class:`DiffFitError` that says what is wrong with the file."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DiffFitError(f"cannot read the configuration {path}: {reason}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not YAML"
        raise DiffFitError(f"the configuration {path} is not valid YAML{where}: {problem}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise DiffFitError(f"the configuration {path} must hold keys and values; it holds a {type(values).__name__}")
    return values
