"""What training asks of its data, and how randomness reaches it.

A *visit* is one look at one image during training. Everything random about it (mirror image or not, noise of the VAE
sample) comes from one integer, the visit's seed, which the trainer derives from global seed, epoch and index with
:func:`visit_seed`. So workers carry no state, their number does not matter, and a resumed run sees the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import DiffFitError

_MASK = (1 << 64) - 1


class BadImage(NamedTuple):
    """An image that could not be decoded: its path relative to the root, and why."""

    file: str
    reason: str


@runtime_checkable
class TrainingData(Protocol):
    """A finite, ordered set of labelled images or latents.

    Attributes:
        class_names: name of every class; a label is an index into it.
        num_classes: ``len(class_names)``.
        channels: channels C of ``x``: 3 for pixels, the VAE's latent channels otherwise.
        size: side H = W of ``x``, in pixels or latent cells.
        image_size: side of the image in pixels.
    """

    class_names: list[str]
    num_classes: int
    channels: int
    size: int
    image_size: int

    def __len__(self) -> int: ...

    def load(self, index: int, seed: int) -> tuple[Tensor, int]:
        """One visit of image ``index``: ``(x float32 [C, H, W], label)``. A pure function of its two arguments."""
        ...

    def report(self) -> list[BadImage]:
        """The images found unreadable so far, in order."""
        ...


def visit_seed(global_seed: int, epoch: int, index: int) -> int:
    """A 64-bit seed for one visit, well mixed and the same on every machine (splitmix64 over the three numbers)."""
    state = 0
    for value in (global_seed, epoch, index):
        state = (state + (value & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def visit_rng(seed: int) -> np.random.Generator:
    """The random generator of one visit. NumPy's PCG64: the same numbers on every platform and thread count."""
    return np.random.Generator(np.random.PCG64(int(seed) & _MASK))


def check_index(index: int, length: int) -> int:
    """``index`` if it lies in ``[0, length)``; there are no negative indices here, they would hide a trainer's bug."""
    if not 0 <= index < length:
        raise IndexError(f"image index must be in [0, {length}), got {index}")
    return int(index)


class SeededDataset(Dataset):
    """A :class:`torch.utils.data.Dataset` over :class:`TrainingData` whose keys are pairs ``(index, seed)``.

    Give a ``DataLoader`` a ``batch_sampler`` that yields lists of such pairs and ``collate_fn=collate_visits``; each
    batch then arrives as ``(x float32 [B, C, H, W], y int64 [B])``. The loader hands over the whole list at once, and
    the samples are written straight into the batch tensor: no second copy for stacking.

    >>> loader = DataLoader(SeededDataset(data), batch_sampler=pairs, collate_fn=collate_visits)   # doctest: +SKIP
    """

    def __init__(self, data: TrainingData) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        index, seed = key
        return self.data.load(int(index), int(seed))

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        return load_batch(self.data, keys)


def load_batch(data: TrainingData, keys: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """The visits ``keys`` (pairs of index and seed) as ``(x float32 [B, C, H, W], y int64 [B])``."""
    x = np.empty((len(keys), data.channels, data.size, data.size), dtype=np.float32)
    y = np.empty(len(keys), dtype=np.int64)
    for row, (index, seed) in enumerate(keys):
        sample, y[row] = data.load(int(index), int(seed))
        x[row] = sample.numpy()  # NumPy's copy: see pixels.to_signed
    return torch.from_numpy(x), torch.from_numpy(y)


def collate_visits(batch: Any) -> tuple[Tensor, Tensor]:
    """Collation for :class:`SeededDataset`: passes a finished batch on, stacks a list of samples."""
    if isinstance(batch, tuple):
        return batch
    return torch.stack([x for x, _ in batch]), torch.tensor([y for _, y in batch], dtype=torch.int64)


def check_image_size(image_size: int) -> int:
    """``image_size`` if it is a positive integer, else a :class:`DiffFitError`."""
    if isinstance(image_size, bool) or not isinstance(image_size, int) or image_size <= 0:
        raise DiffFitError(f"the image size must be a positive integer number of pixels, got {image_size!r}")
    return image_size
