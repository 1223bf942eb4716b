"""Random numbers that do not depend on the device or on how images are batched."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator] | None
T = TypeVar("T")


def randn(
    shape: Sequence[int],
    generator: Generators = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal noise of ``shape`` (N, ...).

    ``generator`` may be one generator or a list of N, one per image: then image i depends on its own generator alone,
    not on the batch it is in. Numbers are drawn where the generator lives (a CPU generator gives the same numbers for
    every device) and moved to ``device``.
    """
    shape = tuple(shape)
    if generator is None:
        return torch.randn(shape, device=device, dtype=dtype)
    if isinstance(generator, torch.Generator):
        return torch.randn(shape, generator=generator, device=generator.device, dtype=dtype).to(device)
    if len(generator) != shape[0]:
        raise ValueError(f"expected one generator per image, {shape[0]}; got {len(generator)}")
    if not generator:
        return torch.empty(shape, device=device, dtype=dtype)
    rows = [torch.randn(shape[1:], generator=g, device=g.device, dtype=dtype) for g in generator]
    return torch.stack(rows).to(device)


def with_progress(steps: Sequence[T], progress: bool, description: str = "sampling") -> Iterable[T]:
    """``steps`` with a tqdm bar around them, or as they are."""
    if not progress:
        return steps
    from tqdm import tqdm

    return tqdm(steps, desc=description, unit="step", leave=False)
