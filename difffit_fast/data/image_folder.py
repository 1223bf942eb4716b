"""A folder of images by class: ``root/<class>/**/<image>``."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import DiffFitError
from .base import BadImage, check_channels, check_image_size, check_index, visit_rng
from .listing import NO_IMAGE, list_images
from .pixels import ImageError, read_pixels, to_signed

logger = logging.getLogger("difffit_fast.data")


class ImageFolder:
    """Images in class folders as :class:`~difffit_fast.data.base.TrainingData`.

    Classes are the sub-folders of ``root`` that :func:`~difffit_fast.data.listing.list_images` finds, in its order. Every
    visit decodes the file afresh, crops it as ADM does and mirrors it in half of the cases.

    An image that turns out damaged is named once in the log, counted, and its place in the epoch is taken by the next
    readable image of the same class: always the same one, so that epochs keep their length and resumed runs their bits.

    Args:
        root: folder with one sub-folder per class.
        image_size: side of the square crop, pixels.
        flip: mirror half of the visits, decided by the visit's seed.
        class_names: an order of the classes that something records, see :func:`~difffit_fast.data.listing.list_images`.
        channels: 3 for RGB, 1 for gray.

    Attributes:
        listing: what was found and what was left out.

    Raises:
        DiffFitError: ``root`` is missing or holds no class folder, a class has no image, a folder is unreadable, or
            ``image_size`` or ``channels`` is no such number.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        image_size: int,
        flip: bool = True,
        class_names: Sequence[str] | None = None,
        channels: int = 3,
    ) -> None:
        self.root = Path(root)
        self.channels = check_channels(channels)
        self.image_size = self.size = check_image_size(image_size)
        self.flip = bool(flip)
        if not self.root.is_dir():
            raise DiffFitError(f"the data path {root} is not a folder; expected one sub-folder of images per class")
        self.listing = list_images(self.root, class_names)
        self.class_names = list(self.listing.classes)
        if not self.class_names:
            raise DiffFitError(
                f"the data path {root} has no sub-folders of images ({len(self.listing.flat)} lie in the folder itself); "
                "expected one sub-folder of images per class"
            )
        self.num_classes = len(self.class_names)
        self.files: list[str] = []  # relative to root, with forward slashes, sorted within each class
        labels: list[int] = []
        starts = [0]
        for label, name in enumerate(self.class_names):
            files = self.listing.classes[name]
            if not files:
                folder = self.listing.folders[name]
                others = sum(path.startswith(f"{folder}/") for path in self.listing.left_out.get(NO_IMAGE, ()))
                what = f" (its {others} files have no image name ending)" if others else ""
                raise DiffFitError(f"the class folder {self.root / folder} holds no image{what}; remove it or fill it")
            self.files += files
            labels += [label] * len(files)
            starts.append(len(self.files))
        self.labels = np.array(labels, dtype=np.int64)
        self._starts = starts
        # Shared between the loader's worker processes, so that each bad image is named once and report() sees all.
        self._bad = torch.zeros(len(self.files), dtype=torch.uint8).share_memory_()

    @property
    def notes(self) -> list[str]:
        """What was left out and why, and the like, a sentence each."""
        return [f"{self.root}: {note}" for note in self.listing.notes]

    def __len__(self) -> int:
        return len(self.files)

    def __repr__(self) -> str:
        return f"ImageFolder({str(self.root)!r}, {len(self)} images, {self.num_classes} classes, {self.image_size} px)"

    def load(self, index: int, seed: int) -> tuple[Tensor, int]:
        """One visit: ``(x float32 [channels, image_size, image_size] in [-1, 1], label)``."""
        pixels = self.pixels(check_index(index, len(self)))
        if self.flip and visit_rng(seed).random() < 0.5:
            pixels = pixels[:, ::-1]
        return to_signed(pixels.transpose(2, 0, 1)), int(self.labels[index])

    def pixels(self, index: int) -> np.ndarray:
        """uint8 ``[image_size, image_size, channels]`` of image ``index``, or of its substitute when it is damaged."""
        label = int(self.labels[index])
        first, end = self._starts[label], self._starts[label + 1]
        for step in range(end - first):
            candidate = first + (index - first + step) % (end - first)
            try:
                return read_pixels(self.root / self.files[candidate], self.image_size, channels=self.channels)
            except ImageError as error:
                if not self._bad[candidate]:
                    self._bad[candidate] = 1
                    logger.warning("skipping the unreadable image %s: %s", self.files[candidate], error)
        raise DiffFitError(f"none of the {end - first} images of class {self.class_names[label]!r} can be read")

    def report(self) -> list[BadImage]:
        """The images found damaged so far, by any worker process, with the reason."""
        return [BadImage(self.files[i], self._reason(i)) for i in self._bad.nonzero().flatten().tolist()]

    def _reason(self, index: int) -> str:
        try:
            read_pixels(self.root / self.files[index], self.image_size)
        except (ImageError, DiffFitError) as error:
            return str(error)
        return "was unreadable when visited, is readable now"
