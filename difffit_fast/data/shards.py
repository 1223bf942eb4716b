"""The files of a latent cache, shared by its writer (``extract``) and its reader (``LatentCache``).

::

    features/
        extract.json                        what was asked for; written first
        shard-00000-of-00012.safetensors    whole or absent: written beside and renamed
        ...
        index.json                          classes, labels, checksums; written last, so its presence means "complete"

A shard holds ``labels`` int64 [n], ``indices`` int64 [n] (position in the source listing) and either ``moments``
[n, 2, 2C, h, w] (float32 or float16; axis 1: the image and its mirror image) or ``pixels`` uint8 [n, 3, H, W], whose
mirror image costs nothing to make.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .._files import json_text, write_safetensors
from ..errors import DiffFitError

FORMAT = "difffit_fast.features"
VERSION = 1
CONFIG_FILE = "extract.json"
INDEX_FILE = "index.json"
_METADATA_KEY = "difffit_fast"


def shard_name(number: int, count: int) -> str:
    return f"shard-{number:05d}-of-{count:05d}.safetensors"


def write_shard(path: Path, tensors: dict[str, Tensor], note: dict[str, Any]) -> None:
    """Write one shard with ``note`` as its metadata; the same tensors and note give the same bytes."""
    write_safetensors(path, tensors, {_METADATA_KEY: json_text(note, sort_keys=True)})


def open_shard(path: Path, framework: str = "pt") -> Any:
    """The shard as a ``safe_open`` handle; :class:`DiffFitError` when it is missing or damaged."""
    try:
        return safe_open(path, framework=framework)
    except (OSError, SafetensorError) as error:
        raise DiffFitError(f"the shard {path} cannot be read: {error}") from error


def shard_note(handle: Any, path: Path) -> dict[str, Any]:
    try:
        return json.loads(handle.metadata()[_METADATA_KEY])
    except (KeyError, TypeError, ValueError) as error:
        raise DiffFitError(f"the shard {path} was not written by difffit extract") from error
