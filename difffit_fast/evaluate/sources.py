"""Where images come from: a folder, an ADM ``.npz``, a tensor. All are read in batches, never as a whole."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .._bounds import FROM_ONE, SIDE, check_whole
from .._files import stamp
from ..data.listing import list_images
from ..data.pixels import ImageError, read_pixels
from ..errors import DiffFitError
from .archives import Member, archive, keys_of, member

__all__ = ["ArraySource", "FolderSource", "ImageSource", "NpzSource", "open_images"]


class ImageSource(Protocol):
    """Images in a fixed order.

    Attributes:
        name: for messages.
        fingerprint: changes when the images do, as far as names, sizes and times of files tell; None: never cached.
        notes: what was left out, and why; of unreadable images when they have been read.
    """

    name: str
    fingerprint: str | None
    notes: list[str]

    def __len__(self) -> int: ...

    def batches(self, batch_size: int) -> Iterator[list[Tensor]]:
        """Lists of uint8 images [3, H, W]."""
        ...


def open_images(images: Any, image_size: int | None = None, num_images: int | None = None) -> ImageSource:
    """A source over ``images``: a folder, a ``.npz`` file, or a tensor or array of images.

    Args:
        images: a folder is searched as :func:`~difffit_fast.data.listing.list_images` says, by class or flat; a ``.npz`` file
            holds ``arr_0``, uint8 [N, H, W, 3]; a tensor is [N, C, H, W], uint8 or float in [-1, 1]; an array is uint8
            [N, H, W, C]. C 1 or 3.
        image_size: crop the images of a folder to this square, as ADM crops its training data. None: as they are.
        num_images: take the first so many only.
    """
    if image_size is not None:
        check_whole("image_size", image_size, SIDE)
    if num_images is not None:
        check_whole("num_images", num_images, FROM_ONE)
    if isinstance(images, Tensor | np.ndarray):
        source: ImageSource = ArraySource(images, num_images)
    elif isinstance(images, str | os.PathLike):
        path = Path(images)
        if path.is_dir():
            source = FolderSource(path, image_size, num_images)
        elif path.suffix == ".npz" and path.is_file():
            source = NpzSource(path, num_images)
        elif path.exists():
            raise DiffFitError(f"{path} is neither a folder of images nor a .npz file")
        else:
            raise DiffFitError(f"{path} does not exist")
    else:
        raise DiffFitError(f"images must be a folder, a .npz file, a tensor or an array; got {type(images).__name__}")
    if num_images is not None and len(source) < num_images:
        raise DiffFitError(f"{source.name} holds {len(source)} images; {num_images} were asked for")
    return source


class FolderSource:
    """All images under a folder, in the order of their relative paths; unreadable ones are left out, named in ``notes``."""

    def __init__(self, root: Path, image_size: int | None = None, num_images: int | None = None) -> None:
        self.name, self.root, self.image_size = str(root), root, image_size
        listing = list_images(root)
        found = sorted([*listing.flat, *(name for names in listing.classes.values() for name in names)])
        self.notes = [f"{root}: {note}" for note in listing.notes]
        self.files = [root / name for name in found[:num_images]]
        if not self.files:
            raise DiffFitError(f"the folder {root} holds no images")
        digest = hashlib.sha256(f"{image_size}".encode())
        for file in self.files:
            digest.update(_line(file.relative_to(root).as_posix(), *stamp(file.stat())))
        self.fingerprint: str | None = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.files)

    def batches(self, batch_size: int) -> Iterator[list[Tensor]]:
        bad: list[ImageError] = []
        with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
            chunks = [self.files[i : i + batch_size] for i in range(0, len(self.files), batch_size)]
            ahead = [pool.submit(self._read, file) for file in chunks[0]]
            for number in range(len(chunks)):
                current, ahead = ahead, []
                if number + 1 < len(chunks):  # decoded while the network works on the current ones
                    ahead = [pool.submit(self._read, file) for file in chunks[number + 1]]
                pixels = [future.result() for future in current]
                bad += [found for found in pixels if isinstance(found, ImageError)]
                if good := [
                    torch.from_numpy(found).permute(2, 0, 1) for found in pixels if isinstance(found, np.ndarray)
                ]:
                    yield good
        if bad:
            self.notes.append(f"{self.root}: left out {len(bad)} unreadable images (the first: {bad[0]})")

    def _read(self, file: Path) -> np.ndarray | ImageError:
        try:
            return read_pixels(file, self.image_size).copy()
        except ImageError as error:
            return ImageError(f"{file.relative_to(self.root).as_posix()}: {error}")


class NpzSource:
    """``arr_0`` of an ADM ``.npz``: uint8 [N, H, W, 3], read from the archive batch by batch."""

    def __init__(self, path: Path, num_images: int | None = None) -> None:
        self.name, self.path = str(path), path
        with _arr_0(path) as (_, shape, fortran, dtype):
            pass
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran:
            raise DiffFitError(f"arr_0 of {path} must be uint8 [N, H, W, 3]; it is {dtype} {list(shape)}")
        if 0 in shape:
            raise DiffFitError(f"arr_0 of {path} is empty: {list(shape)}")
        self.shape = shape
        self.count = shape[0] if num_images is None else min(shape[0], num_images)
        self.notes: list[str] = []
        self.fingerprint: str | None = hashlib.sha256(_line(path.name, *stamp(path.stat()), self.count)).hexdigest()

    def __len__(self) -> int:
        return self.count

    def batches(self, batch_size: int) -> Iterator[list[Tensor]]:
        _, height, width, channels = self.shape
        size = height * width * channels
        with _arr_0(self.path) as (file, *_):
            for start in range(0, self.count, batch_size):
                n = min(batch_size, self.count - start)
                data = file.read(n * size)
                if len(data) != n * size:
                    raise DiffFitError(f"{self.path} ends after {start + len(data) // size} of {self.shape[0]} images")
                pixels = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(n, height, width, channels)
                yield list(pixels.permute(0, 3, 1, 2))


class ArraySource:
    """Images in memory."""

    fingerprint = None

    def __init__(self, images: Tensor | np.ndarray, num_images: int | None = None) -> None:
        self.name = "the given images"
        self.notes: list[str] = []
        x = images
        if isinstance(x, np.ndarray):
            if x.dtype != np.uint8 or x.ndim != 4:
                raise DiffFitError(f"an array of images must be uint8 [N, H, W, C]; got {x.dtype} {list(x.shape)}")
            x = torch.from_numpy(np.ascontiguousarray(x)).permute(0, 3, 1, 2)
        if x.dim() != 4 or x.shape[1] not in (1, 3):
            raise DiffFitError(f"images must have shape [N, C, H, W] with C 1 or 3; got {list(x.shape)}")
        if 0 in x.shape:
            raise DiffFitError(f"there are no images: shape {list(x.shape)}")
        if x.dtype != torch.uint8 and not x.is_floating_point():
            raise DiffFitError(f"images must be uint8, or floating point in [-1, 1]; got {x.dtype}")
        self.images = x.detach()[:num_images]

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, batch_size: int) -> Iterator[list[Tensor]]:
        if self.images.is_floating_point():
            self._look_at_range()
        for x in self.images.split(batch_size):
            if x.is_floating_point():
                x = (x.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8)  # as samples are written to files
            yield list(x.expand(-1, 3, -1, -1))

    def _look_at_range(self) -> None:
        """Refuse what is not finite; note what looks like another range than [-1, 1], which samples leave by a little."""
        low, high = (float(value) for value in self.images.aminmax())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise DiffFitError("some of the given images are NaN or infinite")
        if low >= 0 or high > 2 or low < -2:
            self.notes = [
                f"the given images have values from {low:.3g} to {high:.3g}; expected are -1 (black) to 1 (white)"
            ]


def _line(name: str, *numbers: int) -> bytes:
    """A name that need not be UTF-8, and what is known of it."""
    return ("\0".join((name, *map(str, numbers))) + "\n").encode("utf-8", "surrogateescape")


@contextlib.contextmanager
def _arr_0(path: Path) -> Iterator[Member]:
    """The images of an archive, open."""
    with archive(path) as opened:
        if "arr_0" not in (keys := keys_of(opened)):
            found = ", ".join(sorted(keys)) or "nothing"
            raise DiffFitError(f"{path} holds {found}; images are expected under the key arr_0")
        with member(opened, "arr_0") as found:
            yield found
