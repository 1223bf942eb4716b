"""Training data: image folders, cached latents, the VAE.

>>> data = open_data(path="images", image_size=256)                          # doctest: +SKIP
>>> x, label = data.load(0, visit_seed(global_seed=0, epoch=0, index=0))     # doctest: +SKIP
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from ..errors import DiffFitError
from .base import BadImage, TrainingData, visit_rng, visit_seed
from .image_folder import ImageFolder
from .latent_cache import LatentCache
from .vae import LatentSpace, PixelSpace, load_vae, sample_moments

__all__ = [
    "BadImage",
    "ImageFolder",
    "LatentCache",
    "LatentSpace",
    "PixelSpace",
    "TrainingData",
    "load_vae",
    "open_data",
    "sample_moments",
    "visit_rng",
    "visit_seed",
]


def open_data(
    path: str | os.PathLike[str] | None = None,
    feature_path: str | os.PathLike[str] | None = None,
    image_size: int | None = None,
    *,
    flip: bool = True,
    class_names: Sequence[str] | None = None,
    channels: int = 3,
) -> TrainingData:
    """The training data at ``path`` (a folder of images by class) or ``feature_path`` (what ``difffit extract`` wrote).

    Exactly one of the two. ``image_size`` is needed for images; for features it is checked against theirs when given.
    ``class_names`` are the order of an image folder's classes where other data records one; its images are read with
    ``channels`` 3 (RGB) or 1 (gray).

    Raises:
        DiffFitError: none or both are given, the size is missing or differs, or the data cannot be opened.
    """
    if (path is None) == (feature_path is None):
        given = "neither" if path is None else "both"
        raise DiffFitError(f"expected either --data-path (images) or --feature-path (cached features), got {given}")
    if feature_path is not None:
        cache = LatentCache(feature_path, flip=flip)
        if image_size is not None and image_size != cache.image_size:
            raise DiffFitError(
                f"the features in {cache.path} were extracted at {cache.image_size} pixels, "
                f"but the image size is {image_size}"
            )
        return cache
    if image_size is None:
        raise DiffFitError("the image size is needed to read images; give --image-size")
    return ImageFolder(path, image_size, flip=flip, class_names=class_names, channels=channels)
