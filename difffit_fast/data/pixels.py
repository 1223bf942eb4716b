"""From an image file to square uint8 pixels, RGB or gray.

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
from PIL import ExifTags, Image
from torch import Tensor

from ..errors import DiffFitError

# File-system trouble that says nothing about the image: never to be taken for a corrupt file.
_NOT_THE_IMAGES_FAULT = {errno.EMFILE, errno.ENFILE, errno.EIO, errno.ESTALE}

# TIFF tags: bits per sample, what zero means, format of samples.
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT, _SIGNED = 258, 262, 339, 2
_DEEP_FORMATS = {None, "PNG", "PPM", "TIFF", "JPEG2000"}  # gray of more than 8 bits, whose range is known
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # of EXIF's orientation
_TEXT_CHUNKS = {b"tEXt", b"zTXt", b"iTXt", b"iCCP"}
_STRETCH = 16  # from such a ratio of sides on, what is beside the crop is not resized


class ImageError(Exception):
    """This one image cannot be used; the message says why."""


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode Pillow decodes as 8-bit RGB.

    Gray, palette, CMYK, YCbCr: Pillow's conversion. Alpha: laid over white (dropping it would show whatever colour the
    transparent pixels happen to hold). Up to 16 bits per channel: the high byte, rounded. Floating-point, signed and
    32-bit pixels have no agreed range and are refused.

    Raises:
        ImageError: the file does not say what its values mean.
    """
    mode = image.mode
    if getattr(image, "format", None) == "TIFF" and _SIGNED in _tag(image, _SAMPLE_FORMAT):
        raise ImageError("signed pixels have no agreed range; save it with 8 or 16 bits without sign")
    if mode.startswith("I"):
        return _deep_gray(image).convert("RGB")
    if mode == "F":
        raise ImageError("floating-point pixels have no agreed range; save it with 8 or 16 bits")
    if mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        if mode in ("RGBa", "La"):  # premultiplied alpha converts to its plain twin only
            image = image.convert("RGBA" if mode == "RGBa" else "LA")
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image if mode == "RGB" else image.convert("RGB")


def _deep_gray(image: Image.Image) -> Image.Image:
    """Gray of 9 to 16 bits, which Pillow opens in the modes I;16 and, from some formats, I: 8 bits."""
    kind = getattr(image, "format", None)
    bits = max(_tag(image, _BITS), default=16) if kind == "TIFF" else 16
    if bits > 16 or kind not in _DEEP_FORMATS or (image.mode == "I" and kind not in ("PNG", "PPM")):
        raise ImageError("32-bit integer pixels have no agreed range; save it with 8 or 16 bits")
    values = np.asarray(image).astype(np.uint32)
    white = (1 << bits) - 1
    transparent = values == image.info["transparency"] if isinstance(image.info.get("transparency"), int) else None
    values *= 255
    values += white // 2
    values //= white
    if kind == "TIFF" and 0 in _tag(image, _PHOTOMETRIC):  # white is zero; of 16 bits Pillow leaves them so
        values = 255 - values
    if transparent is not None:
        values[transparent] = 255
    return Image.fromarray(values.astype(np.uint8))


def _tag(image: Image.Image, number: int) -> tuple[int, ...]:
    value = getattr(image, "tag_v2", {}).get(number, ())
    return value if isinstance(value, tuple) else (value,)


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop of an image to ``size`` x ``size`` pixels.

    Where one side is more than 16 times the other, only the crop is resized, so that memory does not grow with what is cut
    off: nearly the same pixels (Pillow may take its two passes in the other order, which rounds differently at sharp edges).
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    # At extreme aspect ratios rounding must not shrink the short side below the crop.
    width, height = (max(size, round(side * scale)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    if max(width, height) > _STRETCH * size:
        x, y = image.width / width, image.height / height
        right, bottom = min(image.width, (left + size) * x), min(image.height, (top + size) * y)
        return image.resize((size, size), Image.Resampling.BICUBIC, box=(left * x, top * y, right, bottom))
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    return image.crop((left, top, left + size, top + size))


def read_pixels(
    path: str | os.PathLike[str], image_size: int | None, content: bytes | None = None, channels: int = 3
) -> np.ndarray:
    """Decode the first frame, convert to RGB or gray, turn upright by the EXIF tag and crop: the one reader of image files.

    Returns:
        uint8 ``[image_size, image_size, channels]``, or ``[H, W, channels]`` as it is where ``image_size`` is None.

    Args:
        content: the bytes of the file, where they have been read already.
        channels: 3 for RGB, 1 for gray (the luma of ITU-R BT.601; what is gray stays as it is).

    Raises:
        ImageError: the file is not an image that can be used (damaged, cut short, unknown format, no agreed range, larger
            than Pillow's limit or than memory).
        DiffFitError: the file system failed (too many open files, input/output error): not the image's fault.
    """
    try:
        try:
            return _read(path if content is None else io.BytesIO(content), image_size, channels)
        except ValueError:  # of Pillow's limits on text, which says nothing about the pixels
            png = _without_text(path, content)
            if png is None:
                raise
            return _read(io.BytesIO(png), image_size, channels)
    except ImageError:
        raise
    except MemoryError as error:
        raise ImageError("there is not enough memory to decode it") from error
    except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error, and more
        if isinstance(error, OSError) and error.errno in _NOT_THE_IMAGES_FAULT:
            raise DiffFitError(f"cannot read {os.fspath(path)}: {error}") from error
        # Pillow's "cannot identify image file '/long/path'" names the path again; the caller names it already.
        reason = str(error).replace(f" {os.fspath(path)!r}", "")
        reason = re.sub(r" <_io\.BytesIO object at 0x[0-9a-f]+>", "", reason).strip() or type(error).__name__
        raise ImageError(reason) from error


def _read(source: str | os.PathLike[str] | io.BytesIO, image_size: int | None, channels: int) -> np.ndarray:
    with Image.open(source) as image:
        image.load()
        upright = to_rgb(image)
        if channels == 1:
            upright = upright.convert("L")
        turn = _TURNS.get(_orientation(image))
        if turn is not None:
            upright = upright.transpose(turn)
        pixels = np.asarray(upright if image_size is None else center_crop(upright, image_size))
        return pixels[..., None] if channels == 1 else pixels


def _orientation(image: Image.Image) -> object:
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged EXIF raises many kinds; the pixels are as they are
        return None


def _without_text(path: str | os.PathLike[str], content: bytes | None) -> bytes | None:
    """A PNG without its chunks of text and its colour profile, which are not used; None if there are none, or no PNG."""
    if content is None:
        with open(path, "rb") as file:
            content = file.read()
    data = memoryview(content)
    if data[:8] != b"\x89PNG\r\n\x1a\n":
        return None
    kept, start = [data[:8]], 8
    while start + 12 <= len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        if bytes(data[start + 4 : start + 8]) not in _TEXT_CHUNKS:
            kept.append(data[start:end])
        start = end
    stripped = b"".join(kept)
    return stripped if len(stripped) < len(data) else None


def to_signed(pixels: np.ndarray | Tensor) -> Tensor:
    """uint8 pixels ``[..., C, H, W]`` as float32 in [-1, 1]: 0 -> -1, 255 -> 1."""
    if isinstance(pixels, Tensor):
        return pixels.to(torch.float32).div_(127.5).sub_(1.0)
    # NumPy's arithmetic stays on the calling thread: a loader must not compete for PyTorch's with the training step.
    signed = np.array(pixels, dtype=np.float32, order="C")
    signed /= 127.5
    signed -= 1.0
    return torch.from_numpy(signed)
