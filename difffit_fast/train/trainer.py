"""The training loop.

One step, on every process: take the next part of the global batch, forward and backward in ``accumulate`` parts, add up
gradients over the processes, AdamW on the trainables, their average. Nothing in it waits for the device: on CUDA the
loss of a step is read while the next one runs.
"""

from __future__ import annotations

import contextlib
import math
import signal
import time
import warnings
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._devices import choose_device
from .._processes import LostProcessError, World
from ..data.base import TrainingData, visit_seed
from ..errors import DiffFitError
from ..models.delta import base_hash, read_delta
from ..models.dit import LabelEmbedder
from ..models.sizes import model_name
from ..sample import Sampler, save_grid
from .checkpoint import (
    CheckpointFolder,
    generators_aside,
    generators_state,
    pack,
    seed_generators,
    set_generators_state,
    unpack,
)
from .config import TrainConfig
from .ema import EMA
from .interrupt import Interrupt
from .monitor import FrechetMonitor, make_sampler
from .objective import choose_precision, validation_loss
from .output import write_output
from .runs import CONFIG_FILE, RunLock, Start, find_start, new_run_folder
from .setup import assemble
from .stream import Batch, batches, share
from .track import Tracker, open_trackers


class NonFiniteLossError(DiffFitError):
    """The loss became infinite or not a number."""

    exit_code = 1


@dataclass
class TrainResult:
    """What a run left: its folder, the last step, the delta written there, the mean loss since the last line of the
    log, and the signal that ended it early (0: none)."""

    folder: Path
    step: int
    delta: Path
    loss: float
    signal: int = 0


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
            self._prepare(config, model, data, val_data)
        except DiffFitError as caught:
            error = caught
        self.world.agree(error)

    def _prepare(
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
        precision, self._precision_note = choose_precision(config.precision, self.device)
        parts = assemble(config.replace(precision=precision), self.device, model, data, val_data)
        self.config, self.objective, self.stream = parts.config, parts.objective, parts.stream
        self.validation, self.space, self.class_names = parts.validation, parts.space, parts.class_names
        self.total_steps = parts.total_steps
        self.model = parts.model.to(self.device)
        self.name = self._name_of_model()
        if self.config.fsdp:
            self._shard()
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise DiffFitError("the model has no trainable parameter")
        self.forward = torch.compile(self.model) if self.config.compile else self.model
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=self.config.learning_rate, weight_decay=self.config.weight_decay, fused=True
        )
        self.ema = EMA(self.parameters.items(), self.config.ema_decay)
        looks = self.config.fid_every and (self.world.main or self.config.fsdp)
        self.monitor = FrechetMonitor(self.config, self.device) if looks else None
        if looks and self.space is None:
            raise DiffFitError("--fid-every needs a decoder: images or --vae with its weights")
        self.step = 0
        self.position = 0  # samples seen
        self._window: list[float] = []  # losses since the last line of the log
        self._interrupt = Interrupt()
        self._heard = False  # several processes: all know that one was told to stop
        self._lock: RunLock | None = None
        self._begun = False

    def _name_of_model(self) -> str:
        if hasattr(self.model, "hidden_size"):
            return model_name(vars(self.model), self.config.objective)
        return self.config.model or type(self.model).__name__

    def _shard(self) -> None:
        """FSDP2: weights, gradients and optimizer state spread over the processes, block by block."""
        if self.world.size == 1:
            raise DiffFitError("--fsdp needs several processes; start them with torchrun")
        from torch.distributed.fsdp import fully_shard

        for block in self.model.blocks:
            fully_shard(block)
        fully_shard(self.model, reshard_after_forward=True, ignored_params={self.model.pos_embed})

    # -- the run -------------------------------------------------------------------------------------------------------
    def train(self) -> TrainResult:
        """Train to the last step, or go on from where ``resume`` says, and write checkpoints and logs.

        Raises:
            NonFiniteLossError: the loss is not a number any more; the last checkpoint is kept.
            LostProcessError: another process died; the first process has written a checkpoint of the last whole step.
            DiffFitError: the run cannot be resumed or written.
        """
        if self._begun:
            raise DiffFitError("this Trainer has trained already; make another one, with resume to go on")
        self._begun = True
        start: Start = self.world.main_first(lambda: find_start(self.config, self.name))
        self._restore(start)
        if start.checkpoint is not None and self.step >= self.total_steps:
            folder = start.checkpoint.delta.parent.parent
            if self.world.main:
                warnings.warn(f"{folder} is finished already, at step {self.step}; nothing to do", stacklevel=2)
            self.world.leave()
            return TrainResult(folder, self.step, start.checkpoint.delta, math.nan)
        self.folder: Path = self.world.main_first(lambda: self._open_folder(start))
        self.checkpoints = CheckpointFolder(self.folder / "checkpoints", self.config.keep_checkpoints)
        if self.world.main:
            self.checkpoints.sweep()
            self.config.save(self.folder / CONFIG_FILE)  # of the newest part of the run
        self.tracker = Tracker(self.folder if self.world.main else None, self.config, self.step, self.total_steps)
        try:
            self._introduce(start)
            with self._interrupt, self._label_dropout_off():
                self._loop()
        except LostProcessError as error:
            raise self._rescue(error) from error
        finally:
            self.tracker.close()
            if self._lock is not None:
                self._lock.release()
            self.world.leave()
        loss = sum(self._last_window) / len(self._last_window) if self._last_window else math.nan
        delta = self.checkpoints.delta_path(self.step)
        return TrainResult(self.folder, self.step, delta, loss, self._interrupt.number)

    def _open_folder(self, start: Start) -> Path:
        folder = start.folder or new_run_folder(self.config, self.name)
        self._lock = RunLock(folder)
        return folder

    def _loop(self) -> None:
        self.model.train()
        config = self.config
        self._last_window: list[float] = []
        self._unread: deque[tuple[int, Tensor, Any]] = deque()
        self._clock, self._clock_step = time.perf_counter(), self.step
        saved = self.step if self.step else -1
        source = batches(
            self.stream, self.position, self.total_steps - self.step, config.global_batch_size, rank=self.world.rank,
            world=self.world.size, num_workers=config.num_workers, pin_memory=self.device.type == "cuda",
        )  # fmt: skip
        with contextlib.closing(source):
            while self.step < self.total_steps and not self._stopping:
                batch = self._fetch(source)
                self._one_step(batch)
                self.step += 1
                self.position += config.global_batch_size
                if self._due(config.log_every):
                    self._log()
                if self.validation is not None and self._due(config.val_every):
                    self._validate()
                if config.sample_every and self._due(config.sample_every):
                    self._sample()
                if config.fid_every and self._due(config.fid_every):
                    self._measure()
                if self._due(config.ckpt_every):
                    self._save()
                    saved = self.step
        self._read_back(0)
        if saved != self.step:
            self._save()
        if self._window:
            self._last_window = self._window
        self._farewell()

    def _due(self, every: int) -> bool:
        return self.step % every == 0

    # -- one step ------------------------------------------------------------------------------------------------------
    def _fetch(self, source: Iterator[Batch]) -> Batch:
        batch = next(source)
        return {key: value.to(self.device, non_blocking=True) for key, value in batch.items()}

    def _one_step(self, batch: Batch) -> None:
        total = torch.zeros((), device=self.device)
        mine = len(batch["y"])
        pieces = min(self.config.accumulate, mine)
        for piece in range(pieces):
            rows = share(mine, piece, pieces)
            part = batch if pieces == 1 else {k: v[rows.start : rows.stop] for k, v in batch.items()}
            losses = self._forward(part)
            self._backward(losses.sum())
            total += losses.detach().sum()
        self._exchange(total)
        self._update()
        self.ema.update()

    def _forward(self, batch: Batch) -> Tensor:
        return self.objective.losses(self.forward, batch)

    def _backward(self, loss: Tensor) -> None:
        # Every process divides by the global batch size and gradients are added: uneven shares weigh as they should.
        # FSDP averages over the processes instead.
        scale = (self.world.size if self.config.fsdp else 1) / self.config.global_batch_size
        (loss * scale).backward()

    def _exchange(self, total: Tensor) -> None:
        """Add up gradients, the loss and the wish to stop; then look at them, on CUDA one step late."""
        numbers = torch.stack([total, torch.tensor(float(self._interrupt.number), device=self.device)])
        if self.world.size > 1:
            gradients = []
            if not self.config.fsdp:
                for p in self.parameters.values():
                    if p.grad is None:
                        p.grad = torch.zeros_like(p)
                    gradients.append(p.grad)
            self.world.sum_([*gradients, numbers])
        ready = None
        if self.device.type == "cuda":
            numbers = torch.empty(2, pin_memory=True).copy_(numbers, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
        self._unread.append((self.step + 1, numbers, ready))
        self._read_back(1 if ready is not None else 0)

    def _read_back(self, leave: int) -> None:
        """Look at the numbers of all steps but the ``leave`` newest; all processes see the same at the same step."""
        while len(self._unread) > leave:
            step, numbers, ready = self._unread.popleft()
            if ready is not None:
                ready.synchronize()
            loss_sum, wish = numbers.tolist()
            loss = loss_sum / self.config.global_batch_size
            if not math.isfinite(loss):
                raise self._non_finite(step, loss)
            self._window.append(loss)
            self.tracker.step(self._speed(), loss)
            if wish and not self._interrupt.number:  # another process was told to stop
                self._interrupt.number = signal.SIGTERM
            self._heard = bool(wish)

    def _update(self) -> None:
        config = self.config
        if config.max_grad_norm > 0:
            nn.utils.clip_grad_norm_(self.parameters.values(), config.max_grad_norm)
        warm = min(1.0, (self.step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * warm
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    # -- stopping ------------------------------------------------------------------------------------------------------
    @property
    def _stopping(self) -> bool:
        """Alone, a signal counts at once; among several processes, when all have heard of it at the same step."""
        return bool(self._interrupt.number) if self.world.size == 1 else self._heard

    @contextlib.contextmanager
    def _label_dropout_off(self) -> Iterator[None]:
        """Labels are dropped in the stream, where it does not depend on how a batch is shared out."""
        embedders = [m for m in self.model.modules() if isinstance(m, LabelEmbedder)]
        kept = [m.dropout_prob for m in embedders]
        for m in embedders:
            m.dropout_prob = 0.0
        try:
            yield
        finally:
            for m, prob in zip(embedders, kept, strict=True):
                m.dropout_prob = prob

    def _non_finite(self, step: int, loss: float) -> NonFiniteLossError:
        steps = [s for s in self.checkpoints.steps() if s < step]
        kept = f"the checkpoint of step {steps[-1]} is kept" if steps else "there is no checkpoint yet"
        return NonFiniteLossError(
            f"the loss became {loss} at step {step}; {kept} in {self.folder}; try a lower --lr, --max-grad-norm 1 or "
            "--precision fp32"
        )

    def _rescue(self, error: LostProcessError) -> LostProcessError:
        """A peer is gone. The first process still holds the state after the last whole step."""
        hint = "start the job again with --resume auto"
        if self.world.main and not self.config.fsdp and self.step > 0:
            with contextlib.suppress(DiffFitError):
                self._write(self.step, self._pack(), [generators_state()])
                return LostProcessError(f"{error}; step {self.step} is saved in {self.folder}; {hint}")
        return LostProcessError(f"{error}; {hint} to go on from the last checkpoint")

    # -- checkpoints ---------------------------------------------------------------------------------------------------
    def _save(self) -> None:
        self._read_back(0)  # never a checkpoint after a loss that is not a number
        tensors = self._pack() if self.world.main or self.config.fsdp else {}
        generators = self.world.gather(generators_state())
        if self.world.main:
            self._write(self.step, tensors, generators)

    def _pack(self) -> dict[str, Tensor]:
        return pack(self.parameters, self.ema, self.optimizer)

    def _write(self, step: int, tensors: dict[str, Tensor], generators: list[Any]) -> None:
        averages = {k.removeprefix("ema/"): v for k, v in tensors.items() if k.startswith("ema/")}
        config = self.config
        metadata = {
            "class_names": self.class_names, "step": step, "image_size": config.image_size, "vae": config.vae,
            "objective": config.objective, "method": config.method, "architecture": self.name,
            "method_options": config.method_args or None,
        }  # fmt: skip
        info = {
            "position": self.position, "updates": self.ema.updates, "window": self._window, "generators": generators,
            "config": config.to_dict(),
        }  # fmt: skip
        try:
            path = self.checkpoints.save(
                step, lambda path: write_output(self.model, averages, path, metadata), tensors, info
            )
        except OSError as error:
            raise DiffFitError(f"cannot write the checkpoint of step {step}: {error}") from error
        self.tracker.say(f"Saved checkpoint to {path}")

    def _restore(self, start: Start) -> None:
        """Put a checkpoint's state into model, average, optimizer and generators; or seed them."""
        rank, world = self.world.rank, self.world.size
        error = None
        if start.checkpoint is None:
            seed_generators(visit_seed(self.config.global_seed, 0, rank) % (1 << 63))
        else:
            info = start.checkpoint.info
            try:
                self._compare_base(start.checkpoint.delta)
                unpack(start.checkpoint.tensors(), self.parameters, self.ema, self.optimizer, info["updates"])
                self.step, self.position = start.checkpoint.step, info["position"]
                self._window = list(info["window"])
                generators = info["generators"]
                if len(generators) == world:
                    set_generators_state(generators[rank])
                else:
                    seed_generators(visit_seed(self.config.global_seed, self.step, rank) % (1 << 63))
            except (OSError, KeyError) as caught:
                error = DiffFitError(
                    f"cannot read {start.checkpoint.folder} (all processes must see --results-dir): {caught}"
                )
            except DiffFitError as caught:
                error = caught
        self.world.agree(error)

    def _compare_base(self, delta: Path) -> None:
        if hasattr(self.model, "save_delta"):
            theirs = read_delta(delta)[1].get("base_hash")
            if theirs != base_hash(self.model):
                base = f"--ckpt {self.config.ckpt}" if self.config.ckpt else "the random one of this seed"
                raise DiffFitError(f"cannot resume {delta}: it was trained on another base than {base}")

    # -- telling -------------------------------------------------------------------------------------------------------
    def _introduce(self, start: Start) -> None:
        for message in start.messages:
            self.tracker.say(message)
        if self.step:
            self.tracker.say(f"Resumed from step {self.step} of {self.folder}")
        else:
            self.tracker.say(f"Experiment directory created at {self.folder}")
        if self._precision_note:
            self.tracker.say(self._precision_note)
        total = sum(p.numel() for p in self.model.parameters())
        trained = sum(p.numel() for p in self.parameters.values())
        share_of_all = f"{100 * trained / total:.3f} %"
        self.tracker.say(f"{self.name} parameters: {total:,}, of which {trained:,} are trained ({share_of_all})")
        self.tracker.say(
            f"Dataset contains {len(self.stream):,} images of {self.stream.data.num_classes} classes; training to step "
            f"{self.total_steps} with {self.config.global_batch_size} images a step on {self.world.size} process(es)"
        )

    def _speed(self) -> float | None:
        steps = self.step - self._clock_step
        seconds = time.perf_counter() - self._clock
        return steps * self.config.global_batch_size / seconds if steps and seconds > 0 else None

    def _log(self) -> None:
        self._read_back(0)
        loss = sum(self._window) / len(self._window)
        rate = (self.step - self._clock_step) / (time.perf_counter() - self._clock)
        self.tracker.say(f"(step={self.step:07d}) Train Loss: {loss:.4f}, Train Steps/Sec: {rate:.2f}")
        self.tracker.numbers(
            self.step, loss=loss, lr=self.optimizer.param_groups[0]["lr"], epoch=self.position / len(self.stream),
            images_per_second=rate * self.config.global_batch_size,
        )  # fmt: skip
        self._last_window, self._window = self._window, []
        self._restart_clock()

    def _restart_clock(self) -> None:
        self._clock, self._clock_step = time.perf_counter(), self.step

    @contextlib.contextmanager
    def _with_averages(self) -> Iterator[None]:
        """The averaged weights in the model, in eval mode, and the clock stopped."""
        begin = time.perf_counter()
        self.ema.exchange()
        self.model.eval()
        try:
            with generators_aside():
                yield
        finally:
            self.model.train()
            self.ema.exchange()
            self._clock += time.perf_counter() - begin

    def _validate(self) -> None:
        """The loss of the averaged weights on the fixed validation set."""
        size = max(1, self.config.global_batch_size // self.world.size // self.config.accumulate)
        with self._with_averages():
            loss = validation_loss(self.objective, self.forward, self.validation, self.world, size, self.device)
        self.tracker.say(f"(step={self.step:07d}) Val Loss: {loss:.4f} ({len(self.validation)} images)")
        self.tracker.numbers(self.step, val_loss=loss)

    def _sample(self) -> None:
        """A grid from the averaged weights at fixed seeds; by the first process, or all where weights are sharded."""
        if self.space is None or not (self.world.main or self.config.fsdp):
            return
        path = self.folder / "samples" / f"{self.step:07d}.png"
        with self._with_averages():
            images = self._sampler().sample(
                [i % self.model.num_classes for i in range(self.config.num_samples)], self.config.global_seed
            )
        if self.world.main:
            path.parent.mkdir(exist_ok=True)
            save_grid(images, path)
            self.tracker.say(f"(step={self.step:07d}) Samples in {path}")
            self.tracker.image(self.step, path)

    def _sampler(self) -> Sampler:
        return make_sampler(self.model, self.config, self.space, self.objective.autocast)

    def _measure(self) -> None:
        """The Fréchet distance of samples from the averaged weights; by the first process, or all where sharded."""
        if self.monitor is None:
            return
        with self._with_averages():
            name, value = self.monitor(self._sampler(), self.model.num_classes)
        if self.world.main:
            self.tracker.say(f"(step={self.step:07d}) {name.upper()}: {value:.3f} ({self.config.fid_samples} samples)")
            self.tracker.numbers(self.step, **{name: value})

    def _farewell(self) -> None:
        report = getattr(self.stream.data, "report", list)()
        if report:
            self.tracker.say(f"{len(report)} unreadable images were passed over, the first: {report[0].file}")
        if self._interrupt.number:
            name = signal.Signals(self._interrupt.number).name
            self.tracker.say(f"Stopped by {name} after step {self.step}; --resume auto goes on from there")
        else:
            self.tracker.say("Done!")
