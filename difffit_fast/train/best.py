"""The best of a run by its validation loss: ``checkpoints/best.safetensors``, which says itself what it is the best by."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

from .._files import replacing
from ..errors import DiffFitError
from ..models.header import read_header
from .checkpoint import CheckpointFolder
from .runs import Start


@dataclass(frozen=True)
class Best:
    """A step whose averaged weights were kept, and their validation loss on ``val_set`` (:attr:`ValidationStream.hash`)."""

    step: int
    loss: float
    val_set: str


def improves(loss: float, best: Best | None) -> bool:
    """Whether ``loss`` is a number, and smaller than the best so far."""
    return math.isfinite(loss) and (best is None or loss < best.loss)


def read_best(path: Path) -> Best:
    """What the file of the best says of itself.

    Raises:
        DiffFitError: it cannot be read, or is not such a file.
    """
    header = read_header(path)
    if missing := [key for key in ("step", "val_loss", "val_set") if header.get(key) is None]:
        raise DiffFitError(f"{path} is no best of a run: its metadata lacks {missing[0]}")
    return Best(header["step"], float(header["val_loss"]), header["val_set"])


def take_up(start: Start, folder: CheckpointFolder, val_set: str) -> Best | None:
    """The best so far of a run that goes on; where it goes on in a folder of its own, the file is copied there.

    A run that begins knows none: what an earlier attempt left in its folder is removed. One that goes on keeps the file as
    it is, also where it is of a step that is done again: the same bits come again, or a smaller loss takes its place.
    What other validation images chose, or cannot be read, is passed over with a message: any loss is better.
    """
    if start.checkpoint is None:
        folder.best_path.unlink(missing_ok=True)
        return None
    old = CheckpointFolder(start.checkpoint.delta.parent).best_path
    if not old.is_file():
        return None
    try:
        best = read_best(old)
        if best.val_set != val_set:
            raise DiffFitError(f"{old} was chosen by other validation images")
        if old != folder.best_path:
            if best.step > start.checkpoint.step:
                raise DiffFitError(f"{old} is of step {best.step}, which this run has yet to come to")
            folder.path.mkdir(parents=True, exist_ok=True)
            with replacing(folder.best_path) as temporary:
                shutil.copyfile(old, temporary)
    except DiffFitError as error:
        start.messages.append(f"{error}: the best is chosen anew")
        return None
    return best
