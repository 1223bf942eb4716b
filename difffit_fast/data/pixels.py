"""From an image file to square uint8 RGB pixels.

The crop is the procedure of ADM (Dhariwal and Nichol, 2021) that DiT and SiT are trained with: halve with a box filter
while the shorter side is at least twice the target, resize with a bicubic filter so that the shorter side fits, cut the
centre. Its exact steps matter: a model tuned on other pixels than the FID reference pays for the difference.
"""

from __future__ import annotations

import errno
import io
import os
import re

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..errors import DiffFitError

# File-system trouble that says nothing about the image: never to be taken for a corrupt file.
_NOT_THE_IMAGES_FAULT = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE}


class ImageError(Exception):
    """This one image cannot be used; the message says why."""


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode Pillow decodes as 8-bit RGB.

    Gray, palette, CMYK, YCbCr: Pillow's conversion. Alpha: laid over white (dropping it would show whatever colour the
    transparent pixels happen to hold). 16 bits per channel: the high byte, rounded. Floating point and wider integers
    have no agreed range and are refused.
    """
    mode = image.mode
    if mode.startswith("I;16") or mode == "I":
        values = np.asarray(image).astype(np.int64)
        if values.size and (values.min() < 0 or values.max() > 65535):
            raise ImageError("32-bit integer pixels outside 0..65535 have no agreed range; save it with 8 or 16 bits")
        gray = ((values * 255 + 32767) // 65535).astype(np.uint8)
        return Image.fromarray(gray).convert("RGB")
    if mode == "F":
        raise ImageError("floating-point pixels have no agreed range; save it with 8 or 16 bits")
    if mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        if mode in ("RGBa", "La"):  # premultiplied alpha converts to its plain twin only
            image = image.convert("RGBA" if mode == "RGBa" else "LA")
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image if mode == "RGB" else image.convert("RGB")


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop of an image to ``size`` x ``size`` pixels."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    # At extreme aspect ratios rounding must not shrink the short side below the crop.
    width, height = (max(size, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def read_pixels(path: str | os.PathLike[str], image_size: int, content: bytes | None = None) -> np.ndarray:
    """Decode, turn upright by its EXIF tag, convert to RGB and crop: uint8 ``[image_size, image_size, 3]``.

    Args:
        content: the bytes of the file, where they have been read already.

    Raises:
        ImageError: the file is not an image that can be used (damaged, cut short, unknown format, no agreed range).
        DiffFitError: the file system failed (too many open files, input/output error): not the image's fault.
    """
    try:
        with Image.open(path if content is None else io.BytesIO(content)) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)
            return np.asarray(center_crop(to_rgb(upright), image_size))
    except ImageError:
        raise
    except MemoryError as error:
        raise DiffFitError(f"out of memory while decoding {os.fspath(path)}") from error
    except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error, and more
        if isinstance(error, OSError) and error.errno in _NOT_THE_IMAGES_FAULT:
            raise DiffFitError(f"cannot read {os.fspath(path)}: {error}") from error
        # Pillow's "cannot identify image file '/long/path'" names the path again; the caller names it already.
        reason = str(error).replace(f" {os.fspath(path)!r}", "")
        reason = re.sub(r" <_io\.BytesIO object at 0x[0-9a-f]+>", "", reason).strip() or type(error).__name__
        raise ImageError(reason) from error


def to_signed(pixels: np.ndarray | Tensor) -> Tensor:
    """uint8 pixels ``[..., 3, H, W]`` as float32 in [-1, 1]: 0 -> -1, 255 -> 1."""
    if isinstance(pixels, Tensor):
        return pixels.to(torch.float32).div_(127.5).sub_(1.0)
    # NumPy's arithmetic stays on the calling thread: a loader must not compete for PyTorch's with the training step.
    signed = np.array(pixels, dtype=np.float32, order="C")
    signed /= 127.5
    signed -= 1.0
    return torch.from_numpy(signed)
