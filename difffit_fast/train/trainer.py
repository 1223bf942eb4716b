"""The training loop.

One step, on every process: take the next part of the global batch, forward and backward in ``accumulate`` pieces (on CUDA
replayed from a graph), add up gradients over the processes, AdamW on the trainables, their average. Nothing in it waits
for the device: on CUDA the loss of a step is read while the next one runs.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._devices import choose_device
from .._processes import LostProcessError, World
from ..data.base import TrainingData
from ..errors import DiffFitError
from .best import Best, improves, take_up
from .checkpoint import CheckpointFolder
from .config import TrainConfig
from .ema import EMA
from .interrupt import Interrupt
from .looks import Looks
from .pace import Pace
from .readback import Readback
from .runs import CONFIG_FILE, RunLock, Start, find_start, new_run_folder
from .setup import assemble
from .state import Progress, RunState, first_non_finite
from .step import Stepper, label_dropout_off
from .stream import Batch, batches
from .telling import introduce, say_farewell
from .track import Tracker, open_trackers


@dataclass
class TrainResult:
    """What a run left: its folder, the last step, the delta written there, the mean loss since the last line of the
    log, the signal that ended it early (0: none), and the file of the smallest validation loss, where it was to be kept."""

    folder: Path
    step: int
    delta: Path
    loss: float
    signal: int = 0
    best: Path | None = None


class Trainer:
    """Fine-tunes a DiT.

    >>> trainer = Trainer(data_path="images", vae="none", image_size=32, model="DiT-S/2")       # doctest: +SKIP
    >>> result = trainer.train()                                                                # doctest: +SKIP
    >>> trainer.model.load_delta(result.delta)                                                  # doctest: +SKIP

    Args:
        config: the settings; ``settings`` override them.
        model: the model to train, as it is: a FastDiffFitDiT, or any module with ``forward(x, t, y)`` whose trainable
            parameters require gradients. By default, or where this is a name such as "DiT-XL/2", built from the settings.
        data: the training data itself, in place of a path.
        val_data: validation data itself.

    Everything is opened and checked here; nothing is written before :meth:`train`. The global generators of Python,
    NumPy and PyTorch are seeded by :meth:`train`.

    Raises:
        DiffFitError: settings, data, checkpoint or model that do not fit.
    """

    def __init__(
        self,
        config: TrainConfig | None = None,
        *,
        model: nn.Module | str | None = None,
        data: TrainingData | None = None,
        val_data: TrainingData | None = None,
        **settings: Any,
    ) -> None:
        if isinstance(model, str):  # the setting of that name
            settings["model"], model = model, None
        config = (config or TrainConfig()).replace(**settings).validate()
        self.world = World.join(config.device, config.dist_timeout)
        error = None
        try:
            self._open(config, model, data, val_data)
        except DiffFitError as caught:
            error = caught
        self.world.agree(error)

    def _open(
        self, config: TrainConfig, model: nn.Module | None, data: TrainingData | None, val_data: TrainingData | None
    ) -> None:
        open_trackers(config)
        if config.global_batch_size < self.world.size:
            raise DiffFitError(
                f"--global-batch-size must be at least the number of processes; got {config.global_batch_size} and "
                f"{self.world.size}"
            )
        self.device = choose_device(config.device, self.world.local_rank)
        if self.device.type == "cuda" and config.tf32:
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        self.parts = parts = assemble(config, self.device, self.world, model, data, val_data)
        self.config, self.model, self.parameters = parts.config, parts.model, parts.parameters
        self.objective, self.stream, self.validation = parts.objective, parts.stream, parts.validation
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=self.config.lr, weight_decay=self.config.weight_decay, fused=True
        )
        self.ema = EMA(self.parameters.items(), self.config.ema_decay)
        self.stepper = Stepper(parts, self.optimizer, self.world, lambda text: self.tracker.say(text))
        self.looks = Looks(parts, self.ema, self.world)
        self.state = RunState(parts, self.ema, self.optimizer, self.world)
        self.interrupt = Interrupt()
        self.step = 0
        self.position = 0  # samples seen
        self.best: Best | None = None  # where it is kept
        self._saved = -1  # the step whose checkpoint holds the state as it is; it is not written twice
        self._lock: RunLock | None = None
        self._begun = False

    # -- the run -------------------------------------------------------------------------------------------------------
    def train(self) -> TrainResult:
        """Train to the last step, or go on from where ``resume`` says, and write checkpoints and logs.

        Raises:
            NonFiniteLossError: the loss, a gradient or a trained value is not a number any more; the last checkpoint is kept.
            LostProcessError: another process died; the first process has written a checkpoint of the last whole step.
            DiffFitError: the run cannot be resumed or written.
        """
        if self._begun:
            raise DiffFitError("this Trainer has trained already; make another one, with resume to go on")
        self._begun = True
        start: Start = self.world.main_first(lambda: find_start(self.config, self.parts.name))
        self.step, self.position, window = self.state.restore(start.checkpoint)
        self._saved = self.step if start.checkpoint is not None else -1
        if start.checkpoint is not None and self.step >= self.parts.total_steps:
            folder = start.checkpoint.delta.parent.parent
            if self.world.main:
                warnings.warn(f"{folder} is finished already, at step {self.step}; nothing to do", stacklevel=2)
            self.world.leave()
            best = CheckpointFolder(start.checkpoint.delta.parent).best_path
            kept = best if self.config.best_by == "val" and best.is_file() else None
            return TrainResult(folder, self.step, start.checkpoint.delta, math.nan, best=kept)
        self._enter(start, window)
        try:
            introduce(self.tracker, self.parts, self.world, start, self.folder)
            with self.interrupt, label_dropout_off(self.model):
                self._loop(begins=start.checkpoint is None)
        except LostProcessError as error:
            raise self._rescue(error) from error
        finally:
            self.stepper.release()
            self.tracker.close()
            if self._lock is not None:
                self._lock.release()
            self.world.leave()
        delta, best = self.checkpoints.delta_path(self.step), self.checkpoints.best_path if self.best else None
        return TrainResult(self.folder, self.step, delta, self.readback.last_loss(), self.interrupt.number, best)

    def _enter(self, start: Start, window: list[float]) -> None:
        """Make or take up the run's folder; from here on the run writes."""
        self.folder: Path = self.world.main_first(lambda: self._lock_folder(start))
        self.checkpoints = CheckpointFolder(self.folder / "checkpoints", self.config.keep_checkpoints)
        if self.world.main:
            self.checkpoints.sweep()
            self.config.save(self.folder / CONFIG_FILE)  # of the newest part of the run
        if self.config.best_by == "val":
            self.best = self.world.main_first(lambda: take_up(start, self.checkpoints, self.validation.hash))
        folder = self.folder if self.world.main else None
        resumed_at = None if start.checkpoint is None else self.step
        self.tracker = Tracker(folder, self.config, resumed_at, self.parts.total_steps)
        self.readback = Readback(
            self.config, self.world, self.interrupt, self.checkpoints, window, self._tell_loss, self._blame
        )

    def _lock_folder(self, start: Start) -> Path:
        folder = start.folder or new_run_folder(self.config, self.parts.name)
        self._lock = RunLock(folder)
        return folder

    def _loop(self, begins: bool) -> None:
        config, total = self.config, self.parts.total_steps
        self.model.train()
        if begins:
            self._keep_if_best(self.looks.validate(0, self.tracker))
        self.pace = Pace(self.step)
        source = batches(
            self.stream, self.position, total - self.step, config.global_batch_size, rank=self.world.rank,
            world=self.world.size, num_workers=self.parts.num_workers, pin_memory=self.device.type == "cuda",
        )  # fmt: skip
        with contextlib.closing(source):
            while self.step < total and not self.readback.stopping:
                self._one_step(self._fetch(source))
                self.step += 1
                self.position += config.global_batch_size
                if self.step % config.log_every == 0:
                    self._log()
                with self.pace.stopped():
                    self._keep_if_best(self.looks(self.step, self.folder, self.tracker))
                if self.step % config.ckpt_every == 0:
                    self._save()
        self.readback.catch_up()
        if self._saved != self.step:
            self._save()
        say_farewell(
            self.tracker, self.stream.data, self.step, self.interrupt.number, self.best, self.checkpoints.best_path
        )

    def _fetch(self, source: Iterator[Batch]) -> Batch:
        return {key: value.to(self.device, non_blocking=True) for key, value in next(source).items()}

    def _one_step(self, batch: Batch) -> None:
        loss = self.stepper.gradients(batch)
        numbers = self.stepper.exchange(loss, self.interrupt.number)
        self.readback.push(self.step + 1, numbers)  # before the update: on the CPU a NaN does not reach the weights
        self.stepper.update(self.step)
        self.ema.update()

    # -- keeping -------------------------------------------------------------------------------------------------------
    def _progress(self) -> Progress:
        return Progress(self.step, self.position, self.readback.window)

    def _save(self) -> None:
        self.readback.catch_up()  # never a checkpoint after a loss that is not a number
        path = self.state.save(self.checkpoints, self._progress())
        self._saved = self.step
        self.tracker.say(f"Saved checkpoint to {path}")

    def _keep_if_best(self, val_loss: float | None) -> None:
        if self.config.best_by != "val" or val_loss is None or not improves(val_loss, self.best):
            return
        self.readback.catch_up()  # never weights after a loss that is not a number
        self.best = Best(self.step, val_loss, self.validation.hash)
        path = self.state.save_best(self.checkpoints, self.best)
        self.tracker.say(f"(step={self.step:07d}) The smallest validation loss so far: weights in {path}")

    def _rescue(self, error: LostProcessError) -> LostProcessError:
        """A peer is gone. The first process still holds the state after the last whole step."""
        hint = "start the job again with --resume auto"
        if self.world.main and not self.config.fsdp and self.step > 0:
            with contextlib.suppress(DiffFitError):
                if self._saved != self.step:
                    path = self.state.save_alone(self.checkpoints, self._progress())
                    self.tracker.say(f"Saved checkpoint to {path}")
                return LostProcessError(f"{error}; step {self.step} is saved in {self.folder}; {hint}")
        return LostProcessError(f"{error}; {hint} to go on from the last checkpoint")

    # -- telling -------------------------------------------------------------------------------------------------------
    def _blame(self, step: int) -> str:
        """The first thing that is not finite in a step that was read: an image, a gradient, a trained value."""
        size = self.config.global_batch_size
        image = self.stream.first_non_finite(self.position - (self.step - step + 1) * size, size)
        if image is not None:
            return f"the data of {image} is not finite"
        gradients = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        for what, tensors in (("the gradient of", gradients), ("the value of", self.parameters)):
            name = first_non_finite(tensors)
            if name is not None:
                return f"the first is {what} {name}"
        return ""

    def _tell_loss(self, loss: float) -> None:
        self.tracker.step(self.pace.rate(self.step) * self.config.global_batch_size, loss)

    def _log(self) -> None:
        self.readback.catch_up()
        loss, rate = self.readback.close_window(), self.pace.rate(self.step)
        self.tracker.say(f"(step={self.step:07d}) Train Loss: {loss:.4f}, Train Steps/Sec: {rate:.2f}")
        self.tracker.numbers(
            self.step, loss=loss, lr=self.optimizer.param_groups[0]["lr"], grad_norm=self.readback.grad_norm,
            epoch=self.position / len(self.stream), images_per_second=rate * self.config.global_batch_size,
        )  # fmt: skip
        self.pace.restart(self.step)
