"""One optimisation step: forward and backward in pieces, gradients added up, clipping, learning rate, AdamW.

Nothing here waits for the device, but for the one step in which forward and backward are captured.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from .._processes import World
from .._words import first_line
from ..errors import DiffFitError
from ..graph import capture
from ..models.dit import LabelEmbedder
from .captured import Capture, CapturedGradients, Result
from .schedule import rate_factor
from .setup import Parts
from .stream import Batch, share


class Stepper:
    """The parts of a step, in the order in which the trainer calls them: gradients, exchange, update.

    Args:
        tell: hears, once, that steps could not be captured after all.

    Attributes:
        capture: what captures forward and backward at the first step; None: they run as they are.
    """

    def __init__(
        self,
        parts: Parts,
        optimizer: torch.optim.Optimizer,
        world: World,
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.config, self.device, self.world, self.tell = parts.config, parts.device, world, tell
        self.model, self.objective, self.total_steps = parts.forward, parts.objective, parts.total_steps
        self.parameters, self.optimizer = parts.parameters, optimizer
        # Every process divides by the global batch size and gradients are added: uneven shares weigh as they should.
        # FSDP averages over the processes instead.
        self.scale = (world.size if self.config.fsdp else 1) / self.config.global_batch_size
        self.capture: Capture | None = capture if parts.captured else None
        self._captured: CapturedGradients | None = None

    def gradients(self, batch: Batch) -> Tensor:
        """Forward and backward of this process's share, in ``accumulate`` pieces; returns the sum of its losses, ().

        The gradients lie at the parameters, as they do without a graph. They and the loss may be the graph's own tensors:
        the next call overwrites them.
        """
        pieces = self._encoded_pieces(batch)
        if self.capture is not None and self._captured is None:
            self._captured = self._try_to_capture(pieces)
        if self._captured is None or not self._captured.fits(pieces):
            self._forget_gradients()
            return self._accumulate(pieces)
        loss, gradients = self._captured(pieces)
        for p, gradient in zip(self.parameters.values(), gradients, strict=True):
            p.grad = gradient
        return loss

    def release(self) -> None:
        """Give the memory of the graph back; the next step would capture again."""
        self._captured = None
        self._forget_gradients()

    def _encoded_pieces(self, batch: Batch) -> list[Batch]:
        mine = len(batch["y"])
        count = min(self.config.accumulate, mine)
        shares = [share(mine, piece, count) for piece in range(count)]
        return [self.objective.encode({k: v[rows.start : rows.stop] for k, v in batch.items()}) for rows in shares]

    def _accumulate(self, pieces: list[Batch]) -> Tensor:
        """Add the gradients of ``pieces`` to what the parameters have; returns the sum of their losses, ()."""
        total = torch.zeros((), device=self.device)
        for piece in pieces:
            losses = self.forward(piece)
            self.backward(losses.sum())
            total += losses.detach().sum()
        return total

    def _loss_and_gradients(self, pieces: list[Batch]) -> Result:
        """What a graph computes; the parameters have no gradients before and after."""
        self._forget_gradients()
        loss = self._accumulate(pieces)
        gradients = [p.grad for p in self.parameters.values()]
        self._forget_gradients()
        return loss, gradients

    def _forget_gradients(self) -> None:
        for p in self.parameters.values():
            p.grad = None

    def _try_to_capture(self, pieces: list[Batch]) -> CapturedGradients | None:
        """Forward and backward of such pieces, captured; None where that fails, and it is not tried again.

        Raises:
            DiffFitError: it fails, and the settings insist on it.
        """
        try:
            return CapturedGradients(self._loss_and_gradients, pieces, self.capture)
        except RuntimeError as error:  # want of memory, for one; what is wrong with the step itself comes again
            reason = first_line(error.__context__ or error)  # the end of a broken capture raises over what broke it
            if self.config.cuda_graph == "on":
                raise DiffFitError(f"--cuda-graph on was asked for, but capturing failed: {reason}") from error
            self.tell(f"steps are not captured in a CUDA graph: capturing failed ({reason})")
            self.capture = None
            return None

    def forward(self, batch: Batch) -> Tensor:
        """The loss of each image of an encoded piece, (N,)."""
        return self.objective.losses(self.model, batch)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a sum of losses."""
        (loss * self.scale).backward()

    def exchange(self, loss: Tensor, wish: int) -> Tensor:
        """Add up gradients over the processes; returns the sums of losses and of wishes to stop and the gradients' norm, (3,),
        on the device.

        Raises:
            LostProcessError: a peer has gone; model and optimizer are as they were after the last step.
        """
        # Filled on the device: a tensor made of the host's number would wait for it. The copy outlives the next replay.
        numbers = torch.stack([loss, torch.full((), float(wish), device=self.device)])
        if self.world.size > 1:
            gradients = []
            if not self.config.fsdp:
                for p in self.parameters.values():
                    if p.grad is None:
                        p.grad = torch.zeros_like(p)
                    gradients.append(p.grad)
            self.world.sum_([*gradients, numbers])
        self._norm = self._gradient_norm()
        return torch.cat([numbers, self._norm.reshape(1)])

    def _gradient_norm(self) -> Tensor:
        """The 2-norm of all gradients, (), whole where they are sharded: not finite where one of them is not."""
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters.values() if p.grad is not None])
        return (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).to(self.device, torch.float32)

    def update(self, step: int) -> None:
        """Clip, set the learning rate of step number ``step`` (from 0 on), and let AdamW take it."""
        config = self.config
        if config.max_grad_norm > 0:
            nn.utils.clip_grads_with_norm_(self.parameters.values(), config.max_grad_norm, self._norm)
        rate = config.lr * rate_factor(step, config.warmup_steps, self.total_steps, config.lr_schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
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
