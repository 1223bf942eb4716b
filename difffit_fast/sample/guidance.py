"""Guidance: away from a second prediction, and further along than the model's own goes.

    ε = ε_other + w·(ε − ε_other)          ε the model's prediction for the class, w the scale, 1 for no guidance

| kind | ε_other | |
|---|---|---|
| ``cfg`` | the same model's, without a class | classifier-free guidance (Ho & Salimans 2022) |
| ``source`` | the base's, without a class: no delta is worn | domain guidance (Zhong et al., ICLR 2025) |
| ``none`` | | one prediction, half the time |

Domain guidance ("Domain Guidance: A Simple Transfer Approach for a Pre-trained Diffusion Model") goes away from where the
fine-tuned model came from, ε + (w − 1)·(ε − ε_base) in its own words, whose unconditional prediction has seen far more images.
Both predictions are two halves of one batch. A limited interval of noise levels (Kynkäänniemi et al., "Applying Guidance in a
Limited Interval Improves Sample and Distribution Quality in Diffusion Models", NeurIPS 2024) leaves guidance out elsewhere, and
half the time with it. A noise level is 0 for the image and 1 for noise: t / 1000 of DiT's timesteps, 1 − t of SiT's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._bounds import GUIDANCE, check_number
from ..errors import DiffFitError
from ..models.deltas import OWN, Own
from ..models.dit import guide, num_guided_channels

KINDS = ("cfg", "source", "none")
EVERYWHERE = (0.0, 1.0)


@dataclass(frozen=True)
class Guidance:
    """What is done to a model's prediction.

    Attributes:
        kind: of :data:`KINDS`.
        scale: w.
        channels: which of the prediction are guided, see :func:`.dit.num_guided_channels`.
        interval: lowest and highest noise level where they are, both included.
    """

    kind: str = "cfg"
    scale: float = 4.0
    channels: str | int = "first3"
    interval: tuple[float, float] = EVERYWHERE

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise DiffFitError(f"guidance must be one of {', '.join(KINDS)}; got {self.kind!r}")
        check_number("cfg_scale", self.scale, GUIDANCE)
        low, high = self.interval if len(self.interval) == 2 else (1, 0)
        if not 0 <= low <= high <= 1:
            raise DiffFitError(
                f"the interval of guidance must be two noise levels, 0 (image) to 1 (noise), the lower first; got {self.interval}"
            )

    @property
    def on(self) -> bool:
        return self.kind != "none" and self.scale != 1

    def at(self, level: float) -> bool:
        """Whether there is any at this noise level."""
        return self.on and self.interval[0] <= level <= self.interval[1]

    def check(self, model: nn.Module) -> None:
        """Raise unless ``model`` can be guided so.

        Raises:
            DiffFitError: channels that it does not have, no null class, or no base beside what it has learnt.
        """
        if not self.on:
            return
        try:
            num_guided_channels(self.channels, model.in_channels)
        except ValueError as error:
            raise DiffFitError(str(error)) from error
        if self.kind == "cfg":
            if not model.has_null_class:
                raise DiffFitError("this model was trained without a null class and cannot be guided; use cfg_scale=1")
        elif not hasattr(model, "deltas"):
            raise DiffFitError(
                f"source guidance needs the base beside what was learnt: a FastDiffFitDiT with a delta, not merged; this is a "
                f"{type(model).__name__}"
            )
        elif not model.deltas.prepare(model).has_null_class:
            raise DiffFitError("the base has no null class, which source guidance goes away from; use guidance='cfg'")


class Predictor:
    """A model as a function of x (N, ...) and t (N,), for the classes y (N,), guidance inside.

    Args:
        wearing: the delta of each sample, or of all; OWN for the model's own parameters.
        strength: of each delta.
    """

    def __init__(
        self,
        model: Any,
        guidance: Guidance,
        y: Tensor,
        wearing: Sequence[str | None] | Own = OWN,
        strength: Sequence[float] | None = None,
    ) -> None:
        self.model, self.guidance, self.y = model, guidance, y
        self.apart = False  # whether the other prediction is of the base, and not of the same parameters
        self.alone, self.both = {}, {}
        n = len(y)
        if wearing is OWN:
            self.other = torch.full_like(y, model.num_classes)
            if guidance.on and guidance.kind == "source":
                self.apart, self.other = True, torch.full_like(y, model.deltas.of(None).num_classes)
            return
        others = [None] * n if guidance.kind == "source" else list(wearing)
        self.other = y.new_tensor([model.deltas.of(name).num_classes for name in others])
        self.alone = _worn(model, list(wearing), strength)
        self.both = _worn(model, [*wearing, *others], None if strength is None else [*strength, *strength])

    def __call__(self, x: Tensor, t: Tensor, level: float) -> Tensor:
        """The prediction (N, out_channels, H, W); ``level``: of the noise."""
        if not self.guidance.at(level):
            return self.model(x, t, self.y, **self.alone)
        scale, channels = self.guidance.scale, self.guidance.channels
        if self.apart:
            out, other = self.model(x, t, self.y), self.model(x, t, self.other, delta=None)
        else:
            y = torch.cat([self.y, self.other])
            out, other = self.model(torch.cat([x, x]), torch.cat([t, t]), y, **self.both).chunk(2)
        return guide(out, other, scale, num_guided_channels(channels, self.model.in_channels))


def _worn(model: Any, wearing: list[str | None], strength: list[float] | None) -> dict[str, Any]:
    """Arguments of a forward pass: one name where it is the same for all, which costs nothing, else numbers on the device."""
    found: dict[str, Any] = {"delta": wearing[0] if len(set(wearing)) == 1 else model.deltas.index(wearing)}
    if strength is not None:
        same = len(set(strength)) == 1
        like = model.deltas.of(None).vectors
        found["strength"] = strength[0] if same else torch.tensor(strength, dtype=like.dtype, device=like.device)
    return found
