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

from .._files import read_json, sha256
from ..errors import DiffFitError
from .base import BadImage, check_index, visit_rng
from .pixels import to_signed
from .shards import CONFIG_FILE, FORMAT, INDEX_FILE, VERSION, open_shard


class LatentCache:
    """A feature folder as :class:`~difffit_fast.data.base.TrainingData`.

    Nothing random is stored: a visit picks the image or its mirror image and draws the VAE's noise afresh, both from
    the visit's seed. Opening checks the index and every shard's size; a shard's checksum is compared when it is first
    touched, once for all worker processes together.

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
        self.index = _read_index(self.path)
        index = self.index
        try:
            self.class_names: list[str] = list(index["class_names"])
            self.num_classes = len(self.class_names)
            self.kind: str = index["config"]["kind"]
            self.image_size = int(index["config"]["image_size"])
            self.channels = int(index["channels"])
            self.size = int(index["size"])
            self.vae: str = index["config"]["vae"]
            self.scale = float(index["scale"])
            self.shift = float(index["shift"])
            self.labels = np.array(index["labels"], dtype=np.int64)
            self.files: list[str] = list(index["files"])
            self._shards: list[dict[str, Any]] = list(index["shards"])
            self._ends = list(accumulate(int(shard["count"]) for shard in self._shards))
            self._bad = [BadImage(*entry) for entry in index["bad"]]
        except (KeyError, TypeError, ValueError) as error:
            raise DiffFitError(f"{self.path / INDEX_FILE} is damaged: {error!r}") from error
        total = self._ends[-1] if self._ends else 0
        if not len(self.labels) == len(self.files) == total or total == 0:
            raise DiffFitError(
                f"{self.path / INDEX_FILE} is damaged: {len(self.labels)} labels and {len(self.files)} files "
                f"for {total} images in its shards"
            )
        if self.labels.min() < 0 or self.labels.max() >= self.num_classes:
            raise DiffFitError(
                f"{self.path / INDEX_FILE} is damaged: a label lies outside its {self.num_classes} classes"
            )
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
        """What the cache holds of image ``index``: moments (2, 2C, h, w), or pixels uint8 (3, H, W)."""
        index = check_index(index, len(self))
        shard = bisect_right(self._ends, index)
        row = index - (self._ends[shard - 1] if shard else 0)
        return self._shard(shard)[row : row + 1][0]

    def report(self) -> list[BadImage]:
        """The damaged images that extraction left out."""
        return list(self._bad)

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
            handle = open_shard(path, "numpy")
            first = self._ends[number] - int(entry["count"])
            if handle.get_tensor("labels").tolist() != self.labels[first : self._ends[number]].tolist():
                raise DiffFitError(f"the labels in the shard {path} are not those of the index")
            self._slices[number] = handle.get_slice(self.kind)
        return self._slices[number]


def _read_index(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise DiffFitError(f"the feature path {path} is not a folder; make it with difffit extract")
    if not (path / INDEX_FILE).is_file():
        if (path / CONFIG_FILE).is_file():
            raise DiffFitError(
                f"the extraction into {path} is not finished; run the same difffit extract again to complete it"
            )
        raise DiffFitError(f"{path} holds no cached features ({INDEX_FILE} is missing); make them with difffit extract")
    index = read_json(path / INDEX_FILE)
    if index.get("format") != FORMAT:
        raise DiffFitError(f"{path / INDEX_FILE} is not an index of cached features")
    if index.get("version") != VERSION:
        raise DiffFitError(
            f"{path / INDEX_FILE} has format version {index.get('version')!r}, "
            f"this difffit_fast reads version {VERSION}"
        )
    return index
