"""Checkpoints of a run: written beside and renamed, verified when read, kept by count.

    checkpoints/0001000.safetensors    what one samples from: the delta (full: the model), with the averaged weights
    checkpoints/0001000.state/         what else a resume needs; the frozen weights are in neither
        tensors.safetensors            raw trainables, their averages, the optimizer's moments
        state.json                     step, position in the data, generators, settings, checksums of both files
    checkpoints/best.safetensors       with --best-by: as the first, of the best step so far; no checkpoint (:mod:`.best`)

The folder appears last, under its final name, by one rename: a step whose folder is missing or whose checksums do not
match was torn by a kill, and the one before it is used; so is it where values are not finite.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from .._files import beside, remove, sha256, sweep, write_safetensors, write_text
from ..errors import DiffFitError

VERSION = 1
BEST_FILE = "best.safetensors"
_STEP = re.compile(r"^(\d{7,})\.(safetensors|state)$")


@dataclass
class Checkpoint:
    """A verified checkpoint: its step, where the delta lies, and what ``state.json`` says."""

    step: int
    delta: Path
    folder: Path
    info: dict[str, Any]

    def tensors(self) -> dict[str, Tensor]:
        return load_file(self.folder / "tensors.safetensors")


class CheckpointFolder:
    """The checkpoints in ``path``, of which the ``keep`` newest stay (0: all)."""

    def __init__(self, path: str | os.PathLike[str], keep: int = 0) -> None:
        self.path = Path(path)
        self.keep = keep
        self._whole: set[int] = set()  # steps that were written or verified through this object

    def steps(self) -> list[int]:
        """The steps of which anything lies here, in order, whole or not."""
        if not self.path.is_dir():
            return []
        found = (_STEP.match(name) for name in os.listdir(self.path))
        return sorted({int(match[1]) for match in found if match})

    def delta_path(self, step: int) -> Path:
        return self.path / f"{step:07d}.safetensors"

    def state_path(self, step: int) -> Path:
        return self.path / f"{step:07d}.state"

    @property
    def best_path(self) -> Path:
        return self.path / BEST_FILE

    def save_best(self, write: Callable[[Path], None]) -> Path:
        """Let ``write`` put a file in the place of the best so far; no count removes it."""
        self.path.mkdir(parents=True, exist_ok=True)
        write(self.best_path)
        _flush_folder(self.path)
        return self.best_path

    def save(
        self, step: int, write_delta: Callable[[Path], None], tensors: Mapping[str, Tensor], info: Mapping[str, Any]
    ) -> Path:
        """Write the checkpoint of ``step``, then remove those beyond the count; returns the delta's path."""
        self.path.mkdir(parents=True, exist_ok=True)
        delta, final = self.delta_path(step), self.state_path(step)
        folder = beside(final)
        _remove(final)  # of an earlier run through this step
        try:
            folder.mkdir()
            write_delta(delta)
            write_safetensors(folder / "tensors.safetensors", tensors)
            info = {**info, "version": VERSION, "step": step}
            sums = {
                "delta": sha256(delta), "tensors": sha256(folder / "tensors.safetensors"), "state": _state_sum(info),
            }  # fmt: skip
            write_text(folder / "state.json", json.dumps({**info, "sha256": sums}, indent=1))
            os.rename(folder, final)
            _flush_folder(self.path)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        self._whole.add(step)
        self.prune(step)
        return delta

    def prune(self, newest: int | None = None) -> None:
        """Remove what is older than the ``keep`` newest whole checkpoints, and what killed processes left half written.

        Torn ones do not count, so that there is always a whole one; ``newest``, the one just written, stays whatever else
        is there.
        """
        whole = 0
        for step in reversed(self.steps()) if self.keep else ():
            if whole >= self.keep and step != newest:
                _remove(self.state_path(step))
                self.delta_path(step).unlink(missing_ok=True)
            elif self._is_whole(step):
                whole += 1
        self.sweep()

    def _is_whole(self, step: int) -> bool:
        if step not in self._whole:
            with contextlib.suppress(DiffFitError):
                self.read(step)
        return step in self._whole

    def sweep(self) -> None:
        """Remove the temporary files of processes that have died."""
        sweep(self.path)

    def newest(self, tell: Callable[[str], None] = lambda text: None) -> Checkpoint | None:
        """The newest whole checkpoint; ``tell`` hears of each torn one that is passed over."""
        for step in reversed(self.steps()):
            try:
                return self.read(step)
            except DiffFitError as error:
                tell(f"passing over the checkpoint of step {step}: {error}")
        return None

    def read(self, step: int) -> Checkpoint:
        """The checkpoint of ``step``, its checksums compared.

        Raises:
            DiffFitError: it is missing, torn, damaged, or of a later version of this package.
        """
        delta, folder = self.delta_path(step), self.state_path(step)
        if not folder.is_dir():
            raise DiffFitError(f"{folder} is missing: it was not written to its end")
        try:
            info = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            sums = info["sha256"]
            for name, path in (("delta", delta), ("tensors", folder / "tensors.safetensors")):
                if sha256(path) != sums[name]:
                    raise DiffFitError(f"{path} is damaged: its checksum differs from the recorded one")
            # Earlier versions recorded none of the state itself.
            if "state" in sums and sums["state"] != _state_sum(info):
                raise DiffFitError(f"{folder / 'state.json'} is damaged: its checksum differs from the recorded one")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DiffFitError(f"{folder} cannot be read: {error}") from error
        if info.get("version") != VERSION:
            raise DiffFitError(f"{folder} has version {info.get('version')}; this package reads {VERSION}")
        if info.get("step") != step:
            raise DiffFitError(f"{folder} is not what its name says: it holds step {info.get('step')}")
        checkpoint = Checkpoint(step, delta, folder, info)
        for name, tensor in checkpoint.tensors().items():
            if not bool(torch.isfinite(tensor).all()):
                raise DiffFitError(f"{folder / 'tensors.safetensors'} cannot be resumed from: {name} is not finite")
        self._whole.add(step)
        return checkpoint


def _state_sum(info: Mapping[str, Any]) -> str:
    """The checksum of what ``state.json`` says beside checksums, however it is laid out."""
    said = {key: value for key, value in info.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _remove(path: Path) -> None:
    """Remove a file or folder so that at no moment a half-removed one stands under its name."""
    if path.is_dir():
        hidden = beside(path)
        os.rename(path, hidden)
        path = hidden
    remove(path)


def _flush_folder(path: Path) -> None:
    """Make renames in a folder survive a power cut, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
