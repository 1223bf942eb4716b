"""Training data that ``difffit extract`` has cached: VAE moments, or cropped pixels."""

from __future__ import annotations

import os
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._files import sha256
from ..errors import DiffFitError
from .base import BadImage, check_index, visit_rng
from .pixels import to_signed
from .shards import open_shard, read_index


class LatentCache:
    """A feature folder as :class:`~difffit_fast.data.base.TrainingData`.

    Nothing random is stored: a visit picks the image or its mirror image and draws the VAE's noise afresh, both from
    the visit's seed. Opening checks the index and every shard's size; a shard's checksum is compared, and its tensors'
    types and shapes, when it is first touched (the checksum once for all worker processes together).

    Args:
        path: the folder that ``difffit extract`` wrote.
        flip: use the mirror image in half of the visits.
        verify: compare checksums. Turn it off only for a folder just verified.

    Attributes:
        vae: how the VAE was called at extraction (``"none"`` for pixels).
        scale, shift: of the latents, see :func:`difffit_fast.data.vae.sample_moments`.

    Raises:
        DiffFitError: the folder is no complete cache, or a file is missing, cut short or changed.
    """

    def __init__(self, path: str | os.PathLike[str], flip: bool = True, verify: bool = True) -> None:
        self.path = Path(path)
        self.flip = bool(flip)
        self.verify = bool(verify)
        self._index = index = read_index(self.path)
        self.class_names = index.class_names
        self.num_classes = len(self.class_names)
        self.kind = index.layout.kind
        self.channels, self.size = index.layout.channels, index.layout.size
        self.image_size, self.vae = index.image_size, index.vae
        self.scale, self.shift = index.scale, index.shift
        self.labels, self.files = index.labels, index.files
        self._shards = index.shards
        self._ends = list(accumulate(shard["count"] for shard in self._shards))
        self._check_sizes()
        self._verified = torch.zeros(len(self._shards), dtype=torch.uint8).share_memory_()
        self._slices: dict[int, Any] = {}  # shard number -> lazily read tensor; each process opens its own

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"LatentCache({str(self.path)!r}, {len(self)} images, {self.num_classes} classes, {self.kind})"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_slices": {}}

    def load(self, index: int, seed: int) -> tuple[Tensor, int]:
        """One visit: ``(x float32 [channels, size, size], label)``; latents scaled, pixels in [-1, 1]."""
        index = check_index(index, len(self))
        stored = self.stored(index)
        label = int(self.labels[index])
        rng = visit_rng(seed)
        # Drawn whether or not it is used: the noise of a visit does not depend on ``flip``.
        mirror = rng.random() < 0.5 and self.flip
        if self.kind == "pixels":
            return to_signed(stored[:, :, ::-1] if mirror else stored), label
        # difffit_fast.data.vae.sample_moments in NumPy, which stays on the calling thread: see pixels.to_signed.
        mean, logvar = np.split(stored[int(mirror)].astype(np.float32), 2)
        x = rng.standard_normal(mean.shape, dtype=np.float32)
        x *= np.exp(0.5 * logvar)
        x += mean
        if self.shift:
            x -= np.float32(self.shift)
        x *= np.float32(self.scale)
        return torch.from_numpy(x), label

    def stored(self, index: int) -> np.ndarray:
        """What the cache holds of image ``index``: moments (2, 2C, h, w), or pixels uint8 (C, H, W)."""
        index = check_index(index, len(self))
        shard = bisect_right(self._ends, index)
        row = index - (self._ends[shard - 1] if shard else 0)
        return self._shard(shard)[row : row + 1][0]

    def report(self) -> list[BadImage]:
        """The damaged images that extraction left out."""
        return list(self._index.bad)

    def verify_all(self) -> None:
        """Compare every shard's checksum and labels now rather than at first touch."""
        for shard in range(len(self._shards)):
            self._shard(shard)

    def _check_sizes(self) -> None:
        for shard in self._shards:
            path = self.path / shard["file"]
            try:
                size = path.stat().st_size
            except OSError as error:
                raise DiffFitError(f"the shard {path} is missing; run difffit extract again to restore it") from error
            if size != shard["bytes"]:
                raise DiffFitError(
                    f"the shard {path} has {size} bytes where {shard['bytes']} are expected; "
                    "delete it and index.json, and run difffit extract again"
                )

    def _shard(self, number: int) -> Any:
        if number not in self._slices:
            entry = self._shards[number]
            path = self.path / entry["file"]
            if self.verify and not self._verified[number]:
                try:
                    digest = sha256(path)
                except OSError as error:
                    raise DiffFitError(f"the shard {path} cannot be read: {error}") from error
                if digest != entry["sha256"]:
                    raise DiffFitError(
                        f"the shard {path} has changed since extraction (its sha256 differs); "
                        "delete it and index.json, and run difffit extract again"
                    )
                self._verified[number] = 1
            handle = open_shard(path, self._index.layout, self._index.source[number], entry["count"], "numpy")
            first = self._ends[number] - entry["count"]
            if handle.get_tensor("labels").tolist() != self.labels[first : self._ends[number]].tolist():
                raise DiffFitError(f"the labels in the shard {path} are not those of the index")
            self._slices[number] = handle.get_slice(self.kind)
        return self._slices[number]
