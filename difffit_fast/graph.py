"""CUDA graphs: work that is captured once and then replayed without the host's part in it.

The trainer captures forward and backward, the benchmarks a whole step; both do it here.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from .errors import DiffFitError

T = TypeVar("T")


def capture(step: Callable[[], T], warmup: int = 3) -> Callable[[], T]:
    """Capture ``step`` in a CUDA graph and return the function that replays it.

    A replay returns what ``step`` returned while it was captured: the same tensors every time, with new values in them.
    The graph keeps the memory of everything that ``step`` allocates for as long as the returned function is kept, and that keeps
    ``step`` with all it holds (an optimizer's state, say), whose addresses the graph has.

    ``step`` runs ``warmup`` times before, in earnest, so that whatever is chosen, compiled or cached at a first call is
    there. It must read its inputs from tensors that stay where they are (copy new data into them) and must not wait for
    the device. An optimizer in it must have ``capturable=True``. It should drop the gradients before its backward pass
    (``zero_grad(set_to_none=True)``): they then lie in the graph's memory, and a replay overwrites them instead of adding to
    what is there.

    Raises:
        DiffFitError: there is no CUDA device.
        RuntimeError: ``step`` does something that cannot be captured; the current stream is what it was.
    """
    if not torch.cuda.is_available():
        raise DiffFitError("capturing a training step needs a CUDA device, and PyTorch sees none")
    here = torch.cuda.current_stream()
    side = torch.cuda.Stream()
    side.wait_stream(here)
    with torch.cuda.stream(side):
        for _ in range(warmup):
            step()
    here.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    gc.collect()  # what is collected during the capture may ask CUDA for what is not allowed in it, an older graph's end for one
    collecting = gc.isenabled()
    gc.disable()
    try:
        # Threads that pin batches and watch other processes go on calling CUDA; only this one is capturing.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = step()
    finally:
        torch.cuda.set_stream(here)  # a capture that failed would leave its own
        if collecting:
            gc.enable()

    def replay() -> T:
        graph.replay()
        return result

    replay.step = step  # type: ignore[attr-defined]
    return replay
