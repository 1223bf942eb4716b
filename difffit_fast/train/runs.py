"""Run folders: ``<results-dir>/NNN-<model>``, as in DiT, and which of them ``--resume`` means."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from .._files import beside, check_unicode, read_yaml, sweep
from ..errors import DiffFitError
from ..models.load import RUN_SETTINGS as CONFIG_FILE
from .checkpoint import BEST_FILE, Checkpoint, CheckpointFolder
from .config import TrainConfig
from .settings import settings_of

_RUN = re.compile(r"^(\d{3,})-(.+)$")


@dataclass
class Start:
    """Where a run begins: its folder (None: a new one), the checkpoint to go on from, and what to say about it."""

    folder: Path | None
    checkpoint: Checkpoint | None
    messages: list[str]


def run_folders(results_dir: str | os.PathLike[str], model: str) -> list[Path]:
    """The run folders of a model, oldest first."""
    root = Path(results_dir)
    if not root.is_dir():
        return []
    found = [(int(m[1]), root / m[0]) for m in map(_RUN.match, os.listdir(root)) if m and m[2] == _safe(model)]
    return [path for _, path in sorted(found)]


def new_run_folder(config: TrainConfig, model: str) -> Path:
    """Make the next ``NNN-<model>`` in the results folder, its settings in it from the first moment on.

    Raises:
        DiffFitError: it cannot be made there.
    """
    root = Path(config.results_dir)
    check_unicode(root)
    try:
        root.mkdir(parents=True, exist_ok=True)
        sweep(root, _safe(model))
        born = beside(root / _safe(model))
        born.mkdir()
        try:
            config.save(born / CONFIG_FILE)
            number = 1 + max((int(m[1]) for m in map(_RUN.match, os.listdir(root)) if m), default=-1)
            while True:
                path = root / f"{number:03d}-{_safe(model)}"
                try:
                    born.rename(path)  # fails where another job was quicker: its folder is not empty
                    return path
                except OSError:
                    if not path.exists():
                        raise
                    number += 1
        finally:
            shutil.rmtree(born, ignore_errors=True)
    except OSError as error:
        raise DiffFitError(f"cannot make a run folder in --results-dir {root}: {error.strerror or error}") from error


def _safe(model: str) -> str:
    return model.replace("/", "-")


def find_start(config: TrainConfig, model: str) -> Start:
    """What ``config.resume`` means.

    ``none``: a new run. ``auto``: the newest run of this model with the same settings, from its newest whole
    checkpoint; a new run if there is none. A path: that run folder, or the checkpoint in it, whatever its learning rate
    was; from a checkpoint that is not the run's newest, the continuation gets a folder of its own.

    Raises:
        DiffFitError: a path that holds no run or no whole checkpoint.
    """
    if config.resume == "none":
        return Start(None, None, [])
    if config.resume == "auto":
        return _newest_alike(config, model)
    path: Path | None = Path(config.resume)
    messages: list[str] = []
    if path.is_dir() and (path / CONFIG_FILE).is_file():
        checkpoint = CheckpointFolder(path / "checkpoints").newest(messages.append)
        if checkpoint is None:
            raise DiffFitError(f"the run {path} holds no whole checkpoint to resume from")
    else:
        step = path.name.split(".")[0]
        if path.name == BEST_FILE:
            raise DiffFitError(
                f"--resume {config.resume}: it holds weights and no optimizer's state, so no run can go on from it; expected "
                f"the run folder, {path.parent.parent}, or a checkpoint with a number"
            )
        if path.parent.name != "checkpoints" or not step.isdigit() or not path.exists():
            raise DiffFitError(
                f"--resume must be none, auto, a run folder or a checkpoint in it (…/checkpoints/0001000.safetensors); "
                f"got {config.resume!r}"
            )
        folder = CheckpointFolder(path.parent)
        checkpoint = folder.read(int(step))
        path = path.parent.parent if checkpoint.step == folder.steps()[-1] else None
    changed = config.differences(checkpoint.info.get("config", {}))
    for name, (theirs, ours) in changed.items():
        if settings_of(TrainConfig)[name].part_of_model:
            raise DiffFitError(f"cannot resume {checkpoint.delta}: its {name} is {theirs}, and {ours} was asked for")
    if changed:
        messages.append(f"settings that differ from the run's: {_listed(changed)}")
    return Start(path, checkpoint, messages)


def _newest_alike(config: TrainConfig, model: str) -> Start:
    others: list[str] = []
    for folder in reversed(run_folders(config.results_dir, model)):
        try:
            theirs = read_yaml(folder / CONFIG_FILE)
        except DiffFitError:  # no run of ours
            continue
        if changed := config.differences(theirs):
            others.append(f"{folder} differs in {_listed(changed)}")
            continue
        messages: list[str] = []
        checkpoint = CheckpointFolder(folder / "checkpoints").newest(messages.append)
        if checkpoint is None:
            messages.append(f"{folder} holds no whole checkpoint yet; it starts from the beginning")
        return Start(folder, checkpoint, messages)
    reason = others[0] if others else f"no run of {model} in {config.results_dir}"
    return Start(None, None, [f"nothing to resume ({reason}); a new run"])


def _listed(changed: Mapping[str, tuple[Any, Any]]) -> str:
    return "; ".join(f"{name}: {theirs} -> {ours}" for name, (theirs, ours) in changed.items())


class RunLock:
    """Only one process trains in a run folder; the lock goes with the process, however it ends."""

    def __init__(self, folder: Path) -> None:
        self._file: IO[str] | None = None
        try:
            import fcntl
        except ImportError:  # not a POSIX system
            return
        self._file = open(folder / ".lock", "w")  # noqa: SIM115 (held for the run)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise DiffFitError(f"another process is training in {folder}") from error
        except OSError:  # a file system without locks
            self.release()

    def release(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None
