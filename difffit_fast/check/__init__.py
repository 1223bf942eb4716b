"""What is wrong with a folder of images, a checkpoint, a delta, cached features or a run, all of it, before it costs a night.

A finding is ``wrong`` (refused, damaged, or false results), ``left out`` (not used, by what kind it is) or ``suspicious``
(used as it is; look at it). :func:`check` opens a path by what it is (:mod:`.kinds`) and reads it to its end.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import DiffFitError
from .features import check_features
from .images import check_images
from .kinds import kind_of
from .models import check_checkpoint, check_delta, check_trainables
from .report import LEVELS, Finding, Report
from .run import check_run

__all__ = ["LEVELS", "Finding", "Report", "check", "kind_of"]

_CHECKS = {
    "images": check_images,
    "features": check_features,
    "run": check_run,
    "delta": check_delta,
    "trainables": check_trainables,
    "checkpoint": check_checkpoint,
}


def check(path: Path, image_size: int = 256) -> Report:
    """Read what is at ``path`` to its end.

    Args:
        image_size: pixels that images are to be trained at; smaller ones are suspicious.

    Raises:
        DiffFitError: there is nothing, or nothing that is known here.
    """
    kind = kind_of(path)
    report = Report(str(path), kind)
    try:
        if kind == "images":
            check_images(path, report, image_size)
        else:
            _CHECKS[kind](path, report)
    except DiffFitError as error:
        report.wrong("refused", str(error))
    return report
