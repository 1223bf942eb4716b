"""Forward and backward of a step from a CUDA graph: where that can be, and the tensors that a replay reads and writes.

Everything else stays outside: encoding, the exchange between processes, clipping, the learning rate, AdamW, the average.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DiffFitError
from ..models.dit import DiT
from .config import TrainConfig
from .generators import generators_aside
from .stream import Batch

# From a function to one that replays it and returns the same tensors every time: difffit_fast.graph.capture.
Capture = Callable[[Callable[[], Any]], Callable[[], Any]]
# The loss, () float32, and the gradient of each parameter, None where there is none.
Result = tuple[Tensor, list[Tensor | None]]

_KNOWN_PACKAGES = ("difffit_fast", "torch", "peft")


def choose_capture(config: TrainConfig, device: torch.device, model: nn.Module) -> tuple[bool, str | None]:
    """Whether steps are captured, and what the user should hear about it, once.

    Raises:
        DiffFitError: ``cuda_graph`` is "on" where nothing can be captured.
    """
    if config.cuda_graph == "off":
        return False, None
    reason = _why_not(config, device, model)
    if reason is None:
        return (
            True,
            "forward and backward run from a CUDA graph, which keeps their memory (--cuda-graph off: they do not)",
        )
    if config.cuda_graph == "on":
        raise DiffFitError(f"--cuda-graph on was asked for, but {reason}")
    return False, f"steps are not captured in a CUDA graph: {reason}"


def _why_not(config: TrainConfig, device: torch.device, model: nn.Module) -> str | None:
    if device.type != "cuda":
        return f"the device is {device}"
    if config.fsdp:
        return "--fsdp gathers the weights during a step"
    if config.compile:
        return "--compile leaves it to torch.compile how the model runs"
    foreign = [type(m) for m in model.modules() if type(m).__module__.split(".")[0] not in _KNOWN_PACKAGES]
    if not isinstance(model, DiT) or foreign:
        kind = foreign[0] if foreign else type(model)
        return f"of modules from elsewhere, such as {kind.__name__}, it is not known whether they can be"
    return None


class CapturedGradients:
    """Loss and gradients of a batch in pieces, from one graph for pieces of these shapes.

    Nothing of a run's state is changed by making it.

    Args:
        compute: from pieces to their loss and gradients. It begins and ends without gradients at the parameters.
        pieces: the first ones; the slots are made from them.
        capture: :func:`difffit_fast.graph.capture`, or what stands in for it.
    """

    def __init__(self, compute: Callable[[list[Batch]], Result], pieces: list[Batch], capture: Capture) -> None:
        self._slots = [{key: value.clone() for key, value in piece.items()} for piece in pieces]
        self._kind = _kind(pieces)
        with generators_aside():
            self._replay = capture(lambda: compute(self._slots))

    def fits(self, pieces: list[Batch]) -> bool:
        """Whether these pieces have the number, keys, shapes and dtypes of the captured ones."""
        return _kind(pieces) == self._kind

    def __call__(self, pieces: list[Batch]) -> Result:
        """Loss and gradients of ``pieces``; the tensors are the graph's, and the next call overwrites them."""
        for slot, piece in zip(self._slots, pieces, strict=True):
            for key, value in piece.items():
                slot[key].copy_(value, non_blocking=True)
        return self._replay()


def _kind(pieces: list[Batch]) -> list[dict[str, Any]]:
    return [{key: (value.shape, value.dtype) for key, value in piece.items()} for piece in pieces]
