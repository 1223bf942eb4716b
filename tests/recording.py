"""A CUDA graph for the CPU: the operations of a function, recorded once and replayed on the same memory.

As on a GPU, what a replay does was settled when it was recorded: the operations, the numbers of the host among their
arguments, and the memory that they read and write. Python does not run again, and nothing but a tensor that was there
before can bring anything new in. And as in a capture, what waits for the device or brings the host's data is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from difffit_fast.models.dit import LabelEmbedder

aten = torch.ops.aten
# Reading a value, sizes that depend on values, and tensors made of the host's data.
WAITING = {
    aten._local_scalar_dense.default, aten.item.default, aten.is_nonzero.default, aten.equal.default,
    aten.nonzero.default, aten.masked_select.default, aten._unique2.default, aten.unique_dim.default,
    aten.repeat_interleave.Tensor, aten.lift_fresh.default, aten.bincount.default,
}  # fmt: skip

BY_INDEX = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}  # with a mask, the size depends on it


class WaitsError(RuntimeError):
    """On a GPU this would wait for the device."""


class NoWaiting(TorchDispatchMode):
    """Refuses operations that would wait for a GPU, though on a CPU nothing does."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masks = func in BY_INDEX and any(t.dtype in (torch.bool, torch.uint8) for t in _tensors(args[1]))
        if (func in WAITING or masks) and not _labels_are_checked():
            raise WaitsError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


def _labels_are_checked() -> bool:
    """On the CPU alone the label embedder looks at the labels."""
    frame = sys._getframe(2)
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), LabelEmbedder):
            return True
        frame = frame.f_back
    return False


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class _Recording(NoWaiting):
    """The operations that run inside, each with its arguments and the results that are memory of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict, list[Tensor | None]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if func in WAITING:  # the labels were looked at
            return out
        given = {_memory(t) for t in _tensors((args, kwargs))}
        fresh = [None if _memory(t) in given or not t.numel() else t.detach() for t in _tensors(out)]
        # The memory itself: a parameter that is given other memory later must not be followed.
        args, kwargs = tree_map_only(Tensor, Tensor.detach, (args, kwargs or {}))
        self.calls.append((func, args, kwargs, fresh))
        return out


def spoil(tensor: Tensor) -> None:
    """Fill with what nobody can take for a result."""
    tensor.fill_(float("nan") if tensor.is_floating_point() else 1 if tensor.dtype == torch.bool else 1 << 40)


class Recorder:
    """Stands in for :func:`difffit_fast.graph.capture`.

    Attributes:
        captures, replays: how often.
        before_replay: called first by every replay.
    """

    def __init__(self) -> None:
        self.captures = self.replays = 0
        self.before_replay: Callable[[], None] = lambda: None

    @torch.no_grad()
    def _replay(self, calls: list) -> None:
        self.replays += 1
        self.before_replay()
        for func, args, kwargs, fresh in calls:
            for place, value in zip(fresh, _tensors(func(*args, **kwargs)), strict=True):
                if place is not None:
                    place.copy_(value)

    def __call__(self, step: Callable[[], Any], warmup: int = 3) -> Callable[[], Any]:
        for _ in range(warmup):
            step()
        with _Recording() as recording:
            result = step()
        with torch.no_grad():  # a capture computes nothing
            for *_, fresh in recording.calls:
                for place in fresh:
                    if place is not None:
                        spoil(place)
        self.captures += 1

        def replay() -> Any:
            self._replay(recording.calls)
            return result

        return replay
