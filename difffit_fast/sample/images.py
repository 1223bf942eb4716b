"""Images in [-1, 1] to 8-bit pixels, PNG files and grids."""

from __future__ import annotations

import math
import os
import struct
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .._files import replacing
from ..errors import DiffFitError


def to_uint8(images: Tensor) -> np.ndarray:
    """Images (N, C, H, W) in [-1, 1] -> uint8 (N, H, W, C).

    ``127.5 x + 128``, cut off below the point and clamped to 0..255: the rounding of the public evaluation scripts.

    Raises:
        DiffFitError: a value is NaN or infinite; it would become a black or a white pixel.
    """
    if bad := int((~torch.isfinite(images)).flatten(1).any(1).sum()) if images.numel() else 0:
        raise DiffFitError(f"{bad} of {len(images)} images have values that are NaN or infinite")
    pixels = (images.detach().float() * 127.5 + 128).clamp(0, 255).byte()
    return pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def save_png(pixels: np.ndarray, path: str | os.PathLike[str]) -> None:
    """Write uint8 (H, W, 3), (H, W, 1) or (H, W) beside ``path`` and rename, so that a file that exists is whole."""
    path = Path(path)
    image = Image.fromarray(pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels)
    with replacing(path) as temporary:
        image.save(temporary, format="PNG")


def is_whole_png(path: Path) -> bool:
    """Whether ``path`` begins and ends as a PNG does: cheap, and enough to find a file that was cut short."""
    try:
        with open(path, "rb") as file:
            head = file.read(8)
            file.seek(-12, os.SEEK_END)
            tail = file.read(8)
    except OSError:
        return False
    return head == b"\x89PNG\r\n\x1a\n" and tail[4:] == b"IEND"


def png_kind(path: Path) -> tuple[int, int, int, int]:
    """Width, height, bits and colour type (0 gray, 2 RGB) that the head of a PNG states."""
    with open(path, "rb") as file:
        head = file.read(26)
    if head[12:16] != b"IHDR" or len(head) < 26:
        raise DiffFitError(f"{path} is not a PNG that can be read: it does not begin with its size")
    return struct.unpack(">IIBB", head[16:26])


def save_grid(
    images: Tensor, path: str | os.PathLike[str], columns: int | None = None, padding: int = 2, background: int = 255
) -> None:
    """Write images (N, C, H, W) in [-1, 1], C 1 or 3, as one PNG, row by row; by default near square."""
    if images.dim() != 4 or images.shape[1] not in (1, 3) or not len(images):
        raise ValueError(f"a grid needs images (N, 1 or 3, H, W), N at least 1, got {tuple(images.shape)}")
    pixels = to_uint8(images)
    n, h, w, c = pixels.shape
    columns = min(n, columns or math.ceil(math.sqrt(n)))
    rows = math.ceil(n / columns)
    grid = np.full((rows * (h + padding) + padding, columns * (w + padding) + padding, c), background, dtype=np.uint8)
    for i, image in enumerate(pixels):
        top, left = padding + (i // columns) * (h + padding), padding + (i % columns) * (w + padding)
        grid[top : top + h, left : left + w] = image
    save_png(grid, path)
