"""The folder of a run: its settings, every checkpoint, its log."""

from __future__ import annotations

import math
from pathlib import Path

from .._files import TEMPORARY, is_leftover
from ..errors import DiffFitError
from ..models.bases import model_path
from ..models.load import RUN_SETTINGS
from ..train.best import read_best
from ..train.checkpoint import CheckpointFolder
from ..train.config import TrainConfig
from ..train.track import read_metrics
from .kinds import kind_of
from .models import check_checkpoint, check_delta, check_trainables
from .report import Report, check_values


def check_run(path: Path, report: Report) -> None:
    """Settings that load, checkpoints that are whole and finite, losses that are numbers, paths that are there."""
    try:
        config = TrainConfig.load(path / RUN_SETTINGS, {})
    except DiffFitError as error:
        report.wrong("settings that are refused", str(error))
    else:
        for name in ("data_path", "feature_path", "ckpt"):
            value = getattr(config, name, None)
            if value and not (model_path(value) if name == "ckpt" else Path(value)).exists():
                report.suspicious("paths of its settings that are not there (from this folder)", f"{name}: {value}")
    folder = CheckpointFolder(path / "checkpoints")
    _check_checkpoints(folder, report)
    if folder.best_path.is_file():
        _check_best(folder.best_path, report)
    metrics = read_metrics(path)
    for line in metrics:
        for key, value in line.items():
            if isinstance(value, float) and not math.isfinite(value):
                report.wrong("numbers of its log that are not finite", f"{key} of step {line.get('step')}")
    if not metrics:
        report.suspicious("no step was logged", "metrics.jsonl")
    for leftover in sorted(filter(is_leftover, path.rglob(f"{TEMPORARY}*"))):
        report.suspicious("half-written files of processes that were killed", str(leftover.relative_to(path)))


def _check_checkpoints(folder: CheckpointFolder, report: Report) -> None:
    steps = folder.steps()
    report.facts["checkpoints"] = len(steps)
    whole = []
    for step in steps:
        try:
            checkpoint = folder.read(step)
        except DiffFitError as error:
            report.wrong("checkpoints that are torn or damaged", str(error))
            continue
        whole.append(step)
        check_values(((f"{name} of step {step}", t) for name, t in checkpoint.tensors().items()), report)
        _check_delta_of(checkpoint.delta, f"step {step}", report)
    report.facts["resumes from"] = f"step {whole[-1]}" if whole else "the beginning"
    if steps and not whole:
        report.wrong("no checkpoint is whole", str(folder.path))
    if not steps:
        report.suspicious("no checkpoint yet", str(folder.path))


def _check_best(path: Path, report: Report) -> None:
    try:
        best = read_best(path)
    except DiffFitError as error:
        report.wrong("refused", str(error))
        return
    report.facts["best"] = f"step {best.step} (validation loss {best.loss:.4f})"
    _check_delta_of(path, path.name, report)


def _check_delta_of(path: Path, whose: str, report: Report) -> None:
    inner = Report(str(path), kind_of(path))
    checks = {"delta": check_delta, "trainables": check_trainables, "checkpoint": check_checkpoint}
    try:
        checks[inner.kind](path, inner)
    except DiffFitError as error:
        inner.wrong("refused", str(error))
    for finding in inner.findings:
        report.add(finding.level, finding.what, [f"{text} ({whose})" for text in finding.examples])
