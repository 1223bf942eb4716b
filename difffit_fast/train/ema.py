"""The exponential moving average of the trainable parameters, and of nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn


class EMA:
    """Averaged copies of named parameters; sampling uses these.

    After update n (counted from 1) the average has moved by 1 - d_n towards the parameters, with
    d_n = min(decay, (1 + n) / (10 + n)): short runs are averaged over their last tenth or so, instead of keeping
    the starting point for ever.

    Args:
        named_parameters: what to average; copied at once.
        decay: the decay of long runs.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, nn.Parameter]], decay: float = 0.9999) -> None:
        pairs = list(named_parameters)
        self.decay = decay
        self.updates = 0
        self._parameters = [local(p) for _, p in pairs]
        self.tensors: dict[str, Tensor] = {name: p.detach().clone() for name, p in pairs}
        self._values = [local(t) for t in self.tensors.values()]

    def decay_at(self, n: int) -> float:
        """d_n of update n = 1, 2, ..."""
        return min(self.decay, (1 + n) / (10 + n))

    @torch.no_grad()
    def update(self) -> None:
        """One step of the average: ema += (1 - d_n) (parameter - ema)."""
        self.updates += 1
        if self._values:
            torch._foreach_lerp_(self._values, self._parameters, 1 - self.decay_at(self.updates))

    @torch.no_grad()
    def exchange(self) -> None:
        """Swap averages and parameters; call it twice to be where you were."""
        held = [p.clone() for p in self._parameters]
        for parameter, value, old in zip(self._parameters, self._values, held, strict=True):
            parameter.copy_(value)
            value.copy_(old)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], updates: int) -> None:
        """Take over averages that :attr:`tensors` once were."""
        for name, value in self.tensors.items():
            value.copy_(tensors[name])
        self.updates = updates


def local(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that this process holds; any other tensor's own data, detached."""
    detached = tensor.detach()
    return detached.to_local() if hasattr(detached, "to_local") else detached
