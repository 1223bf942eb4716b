"""What the device knows of past steps, loss, gradients' norm and the wish to stop: on CUDA read while the next step runs."""

from __future__ import annotations

import math
import signal
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._processes import World
from ..errors import DiffFitError
from .checkpoint import CheckpointFolder
from .config import TrainConfig
from .interrupt import Interrupt


class NonFiniteLossError(DiffFitError):
    """The loss, a gradient or a trained value became infinite or not a number."""

    exit_code = 1


class Readback:
    """The numbers of steps, in order; all processes read the same ones at the same step.

    Args:
        window: losses since the last line of the log, of the run that goes on.
        tell: hears each loss as it is read.
        blame: says of a step whose numbers are not finite which image or tensor it was, or nothing ("").

    Attributes:
        window: losses since :meth:`close_window`, of all steps that were read.
        grad_norm: the norm of the gradients, before clipping, of the newest step that was read; NaN before the first.
    """

    def __init__(
        self,
        config: TrainConfig,
        world: World,
        interrupt: Interrupt,
        checkpoints: CheckpointFolder,
        window: list[float],
        tell: Callable[[float], None],
        blame: Callable[[int], str] = lambda step: "",
    ) -> None:
        self.window, self.tell, self.blame = window, tell, blame
        self.grad_norm = math.nan
        self._batch_size, self._alone = config.global_batch_size, world.size == 1
        self._interrupt, self._checkpoints = interrupt, checkpoints
        self._unread: deque[tuple[int, Tensor, Any]] = deque()
        self._closed: list[float] = []
        self._heard = False

    def push(self, step: int, numbers: Tensor) -> None:
        """Take a step's numbers (:meth:`.step.Stepper.exchange`), and read what has come; on CUDA that of the step before.

        Raises:
            NonFiniteLossError: a loss or the norm of the gradients that was read is infinite or not a number.
        """
        ready = None
        if numbers.device.type == "cuda":
            numbers = torch.empty(3, pin_memory=True).copy_(numbers, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
        self._unread.append((step, numbers, ready))
        self.catch_up(leave=1 if ready is not None else 0)

    def catch_up(self, leave: int = 0) -> None:
        """Read the numbers of all steps but the ``leave`` newest; raises as :meth:`push` does."""
        while len(self._unread) > leave:
            step, numbers, ready = self._unread.popleft()
            if ready is not None:
                ready.synchronize()
            loss_sum, wish, norm = numbers.tolist()
            loss = loss_sum / self._batch_size
            for what, value in (("the loss", loss), ("the norm of the gradients", norm)):
                if not math.isfinite(value):
                    raise self._non_finite(step, what, value)
            self.window.append(loss)
            self.grad_norm = norm
            self.tell(loss)
            if wish and not self._interrupt.number:  # another process was told to stop
                self._interrupt.number = signal.SIGTERM
            self._heard = bool(wish)

    @property
    def stopping(self) -> bool:
        """Alone, a signal counts at once; among several processes, when all have heard of it at the same step."""
        return bool(self._interrupt.number) if self._alone else self._heard

    def close_window(self) -> float:
        """The mean loss of the window, and a new one."""
        self._closed, self.window = self.window, []
        return sum(self._closed) / len(self._closed)

    def last_loss(self) -> float:
        """The mean loss of the window, or of the one before where it is empty; NaN before the first step."""
        losses = self.window or self._closed
        return sum(losses) / len(losses) if losses else math.nan

    def _non_finite(self, step: int, what: str, value: float) -> NonFiniteLossError:
        newest = self._checkpoints.newest()
        kept = f"the checkpoint of step {newest.step} is kept" if newest else "there is no whole checkpoint"
        who = self.blame(step)
        return NonFiniteLossError(
            f"{what} became {value} at step {step}{f' ({who})' if who else ''}; {kept} in {self._checkpoints.path.parent}; try "
            "a lower --lr, --max-grad-norm 1 or --precision fp32"
        )
