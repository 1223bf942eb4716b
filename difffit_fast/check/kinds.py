"""What a path is."""

from __future__ import annotations

from pathlib import Path

from ..data.shards import CONFIG_FILE, INDEX_FILE
from ..errors import DiffFitError
from ..models.header import read_header
from ..models.load import RUN_SETTINGS
from ..models.state_dict import INDEX_FILES, WEIGHT_FILES, is_safetensors


def kind_of(path: Path) -> str:
    """ "run", "features", "images", "delta", "trainables" or "checkpoint".

    Raises:
        DiffFitError: nothing is there, or a file that is none of them.
    """
    if not path.exists():
        raise DiffFitError(f"there is no {path}")
    if path.is_dir():
        return _folder(path)
    if is_safetensors(path):
        kind = read_header(path).get("kind")
        if kind in ("delta", "trainables"):
            return kind
    return "checkpoint"


def _folder(path: Path) -> str:
    if (path / RUN_SETTINGS).is_file() and (path / "checkpoints").is_dir():
        return "run"
    if (path / INDEX_FILE).is_file() or (path / CONFIG_FILE).is_file():
        return "features"
    if any((path / name).is_file() for name in (*INDEX_FILES, *WEIGHT_FILES)):
        return "checkpoint"
    return "images"
