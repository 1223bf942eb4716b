"""Bilinear resizing as TensorFlow 1 did it, which the published FID numbers were computed with.

Output pixel i looks at the input coordinate i · (in / out): no half-pixel shift, no antialiasing. PyTorch's
``interpolate`` has neither of its two modes agree with this, and the difference moves an FID by whole points.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import DiffFitError

__all__ = ["tf1_resize"]


def tf1_resize(images: Tensor, size: int | tuple[int, int]) -> Tensor:
    """``images`` [N, C, H, W] (any dtype) to float32 [N, C, *size], as ``tf.image.resize_bilinear`` of TensorFlow 1.

    Source coordinates, weights and interpolation are float32 and in TensorFlow's order: columns first, then rows.
    """
    if images.dim() != 4 or 0 in images.shape[2:]:
        raise DiffFitError(f"images must have shape [N, C, H, W]; got {tuple(images.shape)}")
    height, width = (size, size) if isinstance(size, int) else size
    x = images.to(torch.float32)
    if tuple(x.shape[2:]) == (height, width):
        return x
    left, right, wx = _neighbours(x.shape[3], width, x.device)
    x0 = x.index_select(3, left)
    x = x0 + (x.index_select(3, right) - x0) * wx
    top, bottom, wy = _neighbours(x.shape[2], height, x.device)
    y0 = x.index_select(2, top)
    return y0 + (x.index_select(2, bottom) - y0) * wy[:, None]


def _neighbours(source: int, target: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The two source indices of every target index and the weight of the second."""
    scale = torch.tensor(source, dtype=torch.float32) / torch.tensor(target, dtype=torch.float32)
    position = torch.arange(target, dtype=torch.float32) * scale
    lower = position.floor()
    # Rounding of i * scale must not step past the last pixel.
    first = lower.long().clamp(max=source - 1)
    second = (first + 1).clamp(max=source - 1)
    return first.to(device), second.to(device), (position - lower).to(device)
