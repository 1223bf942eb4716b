"""CUDA graphs: a whole training step, forward, backward, optimizer and EMA, captured once and replayed."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .errors import DiffFitError


def capture(step: Callable[[], None], warmup: int = 3) -> Callable[[], None]:
    """Capture ``step`` in a CUDA graph and return the function that replays it.

    ``step`` must read its inputs from tensors that stay where they are (copy new data into them), must not synchronise
    and needs an optimizer with ``capturable=True``. Gradients either keep their memory (``zero_grad(set_to_none=False)``) or are
    dropped inside ``step``, before the backward: then every replay writes them anew into the graph's own memory.
    It runs ``warmup`` times before the capture, as ordinary steps.

    Raises:
        DiffFitError: there is no CUDA device.
    """
    if not torch.cuda.is_available():
        raise DiffFitError("capturing a training step needs a CUDA device, and PyTorch sees none")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warmup):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
