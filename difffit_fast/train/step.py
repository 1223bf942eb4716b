"""One optimisation step: forward and backward in parts, gradients added up, clipping, learning rate, AdamW.

Nothing here waits for the device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .._processes import World
from ..models.dit import LabelEmbedder
from .setup import Parts
from .stream import Batch, share


class Stepper:
    """The parts of a step, in the order in which the trainer calls them: gradients, exchange, update.

    ``forward`` and ``backward`` of a part of the batch see the same shapes at every step, and nothing of the host.
    """

    def __init__(self, parts: Parts, optimizer: torch.optim.Optimizer, world: World) -> None:
        self.config, self.device, self.world = parts.config, parts.device, world
        self.model, self.objective = parts.forward, parts.objective
        self.parameters, self.optimizer = parts.parameters, optimizer
        # Every process divides by the global batch size and gradients are added: uneven shares weigh as they should.
        # FSDP averages over the processes instead.
        self.scale = (world.size if self.config.fsdp else 1) / self.config.global_batch_size

    def gradients(self, batch: Batch) -> Tensor:
        """Forward and backward of this process's share, in ``accumulate`` parts; returns the sum of its losses, ()."""
        total = torch.zeros((), device=self.device)
        mine = len(batch["y"])
        pieces = min(self.config.accumulate, mine)
        for piece in range(pieces):
            rows = share(mine, piece, pieces)
            part = batch if pieces == 1 else {k: v[rows.start : rows.stop] for k, v in batch.items()}
            losses = self.forward(part)
            self.backward(losses.sum())
            total += losses.detach().sum()
        return total

    def forward(self, batch: Batch) -> Tensor:
        """The loss of each image, (N,)."""
        return self.objective.losses(self.model, batch)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a sum of losses."""
        (loss * self.scale).backward()

    def exchange(self, loss: Tensor, wish: int) -> Tensor:
        """Add up gradients over the processes; returns the sums of losses and of wishes to stop, (2,), on the device.

        Raises:
            LostProcessError: a peer has gone; model and optimizer are as they were after the last step.
        """
        numbers = torch.stack([loss, torch.tensor(float(wish), device=self.device)])
        if self.world.size > 1:
            gradients = []
            if not self.config.fsdp:
                for p in self.parameters.values():
                    if p.grad is None:
                        p.grad = torch.zeros_like(p)
                    gradients.append(p.grad)
            self.world.sum_([*gradients, numbers])
        return numbers

    def update(self, step: int) -> None:
        """Clip, set the learning rate of step number ``step`` (from 0 on), and let AdamW take it."""
        config = self.config
        if config.max_grad_norm > 0:
            nn.utils.clip_grad_norm_(self.parameters.values(), config.max_grad_norm)
        warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * warm
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


@contextlib.contextmanager
def label_dropout_off(model: nn.Module) -> Iterator[None]:
    """Labels are dropped in the stream, where it does not depend on how a batch is shared out."""
    embedders = [m for m in model.modules() if isinstance(m, LabelEmbedder)]
    kept = [m.dropout_prob for m in embedders]
    for m in embedders:
        m.dropout_prob = 0.0
    try:
        yield
    finally:
        for m, prob in zip(embedders, kept, strict=True):
            m.dropout_prob = prob
