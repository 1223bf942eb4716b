"""Looking at the averaged weights while they train: validation loss, grids of samples, Fréchet distance."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from .._processes import World
from ..errors import DiffFitError
from ..sample import Sampler, save_grid
from .config import TrainConfig
from .ema import EMA
from .generators import generators_aside
from .objective import validation_loss
from .setup import Parts
from .track import Tracker


class Looks:
    """What is due at a step is looked at; training goes on as if nobody had looked.

    The validation loss is every process's work. Samples are the first process's, or that of all where the weights are
    sharded.

    Raises:
        DiffFitError: the Fréchet distance is asked for and something it needs is missing.
    """

    def __init__(self, parts: Parts, ema: EMA, world: World) -> None:
        self.parts, self.config, self.ema, self.world = parts, parts.config, ema, world
        self._takes_part = world.main or self.config.fsdp
        self._frechet: FrechetDistance | None = None
        if self.config.fid_every and self._takes_part:
            self._frechet = FrechetDistance(self.config, parts.device)
            if parts.space is None:
                raise DiffFitError("--fid-every needs a decoder: images or --vae with its weights")

    def __call__(self, step: int, folder: Path, tracker: Tracker) -> float | None:
        """Take every look that is due after ``step``; what is seen goes to ``tracker``, pictures to ``folder``.

        Returns the validation loss, on all processes, where it was due: after the last step it always is.
        """

        def due(every: int) -> bool:
            return every > 0 and step % every == 0

        last = step == self.parts.total_steps
        loss = self.validate(step, tracker) if last or due(self.config.val_every) else None
        if self.parts.space is not None and self._takes_part and due(self.config.sample_every):
            self._sample(step, folder / "samples" / f"{step:07d}.png", tracker)
        if self._frechet is not None and due(self.config.fid_every):
            self._measure(step, self._frechet, tracker)
        return loss

    @contextlib.contextmanager
    def _averages(self) -> Iterator[None]:
        """The averaged weights in the model, in eval mode; generators are left as they were."""
        self.ema.exchange()
        self.parts.model.eval()
        try:
            with generators_aside():
                yield
        finally:
            self.parts.model.train()
            self.ema.exchange()

    def validate(self, step: int, tracker: Tracker) -> float | None:
        """The loss on the fixed validation set; None without one."""
        parts, config = self.parts, self.config
        if parts.validation is None:
            return None
        size = max(1, config.global_batch_size // self.world.size // config.accumulate)
        with self._averages():
            loss = validation_loss(parts.objective, parts.forward, parts.validation, self.world, size, parts.device)
        tracker.say(f"(step={step:07d}) Val Loss: {loss:.4f} ({len(parts.validation)} images)")
        tracker.numbers(step, val_loss=loss)
        return loss

    def _sample(self, step: int, path: Path, tracker: Tracker) -> None:
        """A grid of every class in turn that training images are of, at fixed seeds."""
        labels = self._in_turn(self.config.num_samples)
        with self._averages():
            images = self._sampler().sample(labels, self.config.global_seed)
        if self.world.main:
            path.parent.mkdir(exist_ok=True)
            save_grid(images, path)
            tracker.say(f"(step={step:07d}) Samples in {path}")
            tracker.image(step, path)

    def _measure(self, step: int, frechet: FrechetDistance, tracker: Tracker) -> None:
        """The Fréchet distance of samples of every class in turn that training images are of."""
        with self._averages():
            name, value = frechet(self._sampler(), self._in_turn(self.config.fid_samples))
        if self.world.main:
            tracker.say(f"(step={step:07d}) {name.upper()}: {value:.3f} ({self.config.fid_samples} samples)")
            tracker.numbers(step, **{name: value})

    def _in_turn(self, count: int) -> list[int]:
        return [self.parts.shown[i % len(self.parts.shown)] for i in range(count)]

    def _sampler(self) -> Sampler:
        """The sampler that the settings ask for; guided where the model has a null class."""
        model, config = self.parts.model, self.config
        ddpm = config.objective == "ddpm"
        steps = min(config.num_sampling_steps, 1000) if ddpm else config.num_sampling_steps
        scale = config.cfg_scale if model.has_null_class else 1.0
        autocast = self.parts.objective.autocast
        return Sampler(model, "ddpm" if ddpm else "euler", steps, scale, vae=self.parts.space, autocast=autocast)


class FrechetDistance:
    """Fréchet distance of samples, always from the same noise, to the reference; its statistics once.

    Raises:
        DiffFitError: no reference to compare with, no Inception weights, or a reference that cannot be read.
    """

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        from ..evaluate import Evaluator
        from ..evaluate.features import resolve_features

        reference = config.fid_reference or config.data_path
        if reference is None:
            raise DiffFitError("--fid-every needs --fid-reference, a folder of images or an .npz, or --data-path")
        options = {"inception_weights": config.inception_weights} if config.fid_features == "inception" else {}
        self.evaluate = Evaluator(
            reference, resolve_features(config.fid_features), device=device, image_size=config.image_size, **options
        )
        self.seed = config.global_seed

    def __call__(self, sampler: Sampler, labels: Sequence[int]) -> tuple[str, float]:
        """The metric's name ("fid", or "fd" in other features than Inception's) and its value for samples of ``labels``."""
        result = self.evaluate(sampler.sample(labels, self.seed))
        name = self.evaluate.metrics[0]
        return name, float(result[name])
