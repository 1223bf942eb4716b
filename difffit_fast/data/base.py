"""What training asks of its data, and how randomness reaches it.

A *visit* is one look at one image during training. Everything random about it (mirror image or not, noise of the VAE
sample) comes from one integer, the visit's seed, which the trainer derives from global seed, epoch and index with
:func:`visit_seed`. So workers carry no state, their number does not matter, and a resumed run sees the same bits.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

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
        channels: channels C of ``x``: 3 for pixels (1 for gray ones), the VAE's latent channels otherwise.
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


def check_image_size(image_size: int) -> int:
    """``image_size`` if it is a positive integer, else a :class:`DiffFitError`."""
    if isinstance(image_size, bool) or not isinstance(image_size, int) or image_size <= 0:
        raise DiffFitError(f"the image size must be a positive integer number of pixels, got {image_size!r}")
    return image_size


def check_channels(channels: int) -> int:
    """``channels`` if images can be read with so many: 1 or 3; else a :class:`DiffFitError`."""
    if isinstance(channels, bool) or channels not in (1, 3):
        raise DiffFitError(f"pixels have 3 channels, or 1 where they are gray; got {channels!r}")
    return channels
