"""Looking at the averaged weights during training: the sampler of the grids, and the Fréchet distance of samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import DiffFitError
from ..sample import Sampler
from .config import TrainConfig


def make_sampler(model: nn.Module, config: TrainConfig, space: Any, autocast: torch.dtype | None) -> Sampler:
    """The sampler that the settings ask for; guided where the model has a null class."""
    ddpm = config.objective == "ddpm"
    steps = min(config.num_sampling_steps, 1000) if ddpm else config.num_sampling_steps
    scale = config.cfg_scale if model.has_null_class else 1.0
    return Sampler(model, "ddpm" if ddpm else "euler", steps, scale, vae=space, autocast=autocast)


class FrechetMonitor:
    """Fréchet distance of ``fid_samples`` samples, always from the same noise, to the reference; its statistics once.

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
        self.count, self.seed = config.fid_samples, config.global_seed

    def __call__(self, sampler: Sampler, num_classes: int) -> tuple[str, float]:
        """The metric's name ("fid", or "fd" in other features than Inception's) and its value."""
        labels = [i % num_classes for i in range(self.count)]
        result = self.evaluate(sampler.sample(labels, self.seed))
        name = self.evaluate.metrics[0]
        return name, float(result[name])
