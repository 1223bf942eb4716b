"""Statistics of a set of images in some features, and the ``.npz`` file they are kept in.

The file has the keys of ADM's reference batches, ``mu, sigma`` (pooled features) and ``mu_s, sigma_s`` (spatial), so it
serves there as well. Ours has two more: ``features``, the pooled features themselves [N, D] where precision and recall
were asked for, and ``difffit_fast``, a JSON text that says which extractor and images it came from.
"""

from __future__ import annotations

import io
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._files import write_bytes
from .._words import shown
from ..errors import DiffFitError
from .archives import archive, keys_of, member
from .frechet import check_gaussian, check_rank

__all__ = ["Statistics", "load_statistics", "save_statistics"]

NOTE, VERSION = "difffit_fast", 1
MOST_FEATURES, MOST_BYTES = 8192, 1 << 32  # of a vector; of one array in a file


@dataclass
class Statistics:
    """What the metrics need to know of one set of images.

    Attributes:
        count: images; 0 where a file does not say.
        mean, covariance: of the pooled features, float64 [D] and [D, D].
        spatial_mean, spatial_covariance: of the spatial features, or None.
        features: pooled features [N, D] float32, or None.
        inception_score: mean and standard deviation over splits, or None.
        identity: of the extractor (see :class:`~difffit_fast.evaluate.features.Extractor`); None where a file does not say.
        fingerprint: of the images; None where there is none.
        size: (height, width) if all images had one size, else None.
    """

    count: int
    mean: Tensor
    covariance: Tensor
    spatial_mean: Tensor | None = None
    spatial_covariance: Tensor | None = None
    features: Tensor | None = None
    inception_score: tuple[float, float] | None = None
    identity: str | None = None
    fingerprint: str | None = None
    size: tuple[int, int] | None = None
    note: dict[str, Any] = field(default_factory=dict)


def save_statistics(statistics: Statistics, path: str | os.PathLike[str]) -> None:
    """Write the ``.npz`` beside ``path`` and rename it."""
    path = Path(path)
    if path.suffix != ".npz":
        raise DiffFitError(f"statistics are kept in a .npz file; got {path}")
    note = {
        "version": VERSION,
        "identity": statistics.identity,
        "fingerprint": statistics.fingerprint,
        "count": statistics.count,
        "size": statistics.size,
    }
    arrays = {"mu": statistics.mean, "sigma": statistics.covariance}
    if statistics.spatial_mean is not None and statistics.spatial_covariance is not None:
        arrays |= {"mu_s": statistics.spatial_mean, "sigma_s": statistics.spatial_covariance}
    if statistics.features is not None:
        arrays["features"] = statistics.features.to(torch.float32)
    buffer = io.BytesIO()
    np.savez(buffer, **{k: v.cpu().numpy() for k, v in arrays.items()}, **{NOTE: np.array(json.dumps(note))})
    try:
        write_bytes(path, buffer.getvalue())
    except OSError as error:
        raise DiffFitError(f"cannot write {path}: {error.strerror or error}") from error


def is_statistics(path: Path) -> bool:
    """Whether ``path`` is a ``.npz`` file with a mean and a covariance."""
    if path.suffix != ".npz" or not path.is_file():
        return False
    try:
        with archive(path) as opened:
            return {"mu", "sigma"} <= keys_of(opened)
    except DiffFitError:  # whoever reads it says why
        return False


# What the note says, and of which types besides None.
_NOTED: dict[str, tuple[type, ...]] = {
    "version": (int,), "identity": (str,), "fingerprint": (str,), "count": (int,), "size": (list,),
}  # fmt: skip


def _note(text: str, path: Path) -> dict[str, Any]:
    """The note, its entries compared with :data:`_NOTED`."""
    try:
        note = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DiffFitError(f"{path}: its note is not JSON: {error}") from error
    if not isinstance(note, dict):
        raise DiffFitError(f"{path}: its note should be a JSON object; it is {text[:40]!r}")
    for key, types in _NOTED.items():
        value = note.get(key)
        if value is not None and (not isinstance(value, types) or isinstance(value, bool)):
            raise DiffFitError(f"{path}: {key} in its note should be {types[0].__name__}; it is {value!r:.60}")
    if not 0 <= (note.get("count") or 0) < 1 << 63:
        raise DiffFitError(f"{path}: count in its note should be a number of images; it is {shown(note['count'])}")
    if (note.get("version") or VERSION) != VERSION:
        raise DiffFitError(f"{path} is of version {shown(note['version'])}; this program reads version {VERSION}")
    size = note.get("size")
    if size is not None and (len(size) != 2 or not all(type(n) is int and 0 < n < 1 << 31 for n in size)):
        raise DiffFitError(f"{path}: size in its note should be a height and a width; it is {size!r:.60}")
    return note


def _features(values: np.ndarray, width: int, path: Path) -> Tensor:
    """Features (N, width) float32."""
    fits = values.ndim == 2 and len(values) and values.shape[1] == width and values.dtype.kind == "f"
    with np.errstate(over="ignore"):
        single = values.astype(np.float32, copy=False) if fits else values
    if not fits or not np.isfinite(single).all():
        expected = f"finite floating numbers of float32's range (N, {width})"
        raise DiffFitError(f"{path}: its features should be {expected}; they are {values.dtype} {values.shape}")
    return torch.from_numpy(single)


def _check_claims(path: Path) -> set[str]:
    """The keys of a file of statistics, none of which claims more than is stored, or than is read."""
    with archive(path) as opened:
        keys = keys_of(opened)
        if not {"mu", "sigma"} <= keys:
            found = ", ".join(sorted(keys)) or "nothing"
            raise DiffFitError(f"{path} holds {found}; statistics are expected under the keys mu and sigma")
        for key in sorted(keys & {"mu", "sigma", "mu_s", "sigma_s", "features", NOTE}):
            with member(opened, key) as (_, shape, _, dtype):
                width = max(shape[1:] if key == "features" else shape, default=0)
                if width > MOST_FEATURES or math.prod(shape) * dtype.itemsize > MOST_BYTES:
                    raise DiffFitError(
                        f"{path}: {key} is {dtype} {list(shape)}; at most {MOST_FEATURES} features and {MOST_BYTES} bytes "
                        "are read"
                    )
    return keys


def _gaussian(mean: np.ndarray, covariance: np.ndarray, name: str) -> tuple[Tensor, Tensor]:
    """A mean and a matrix that is a covariance."""
    mu, sigma = check_gaussian(mean, covariance, name)
    check_rank(sigma, name)
    return mu, sigma


def load_statistics(path: str | os.PathLike[str]) -> Statistics:
    """Read statistics written here, by ADM's or by other evaluators (``mu, sigma`` and, if there, ``mu_s, sigma_s``).

    Raises:
        DiffFitError: no such file, keys missing, or values that are no mean and covariance.
    """
    path = Path(path)
    keys = _check_claims(path)
    if len(halves := keys & {"mu_s", "sigma_s"}) == 1:
        raise DiffFitError(f"{path} holds {halves.pop()} without its partner; mu_s and sigma_s belong together")
    try:
        with np.load(path, allow_pickle=False) as file:
            mean, covariance = _gaussian(file["mu"], file["sigma"], f"{path}:")
            spatial = _gaussian(file["mu_s"], file["sigma_s"], f"{path} (spatial):") if "mu_s" in keys else (None, None)
            features = _features(file["features"], len(mean), path) if "features" in keys else None
            note = _note(str(file[NOTE]), path) if NOTE in keys else {}
    except DiffFitError:
        raise
    except Exception as error:  # NumPy raises a different kind for each sort of damage
        raise DiffFitError(f"{path} cannot be read as statistics: {error}") from error
    count, size = note.get("count") or 0, note.get("size")
    if features is not None and count and len(features) != count:
        raise DiffFitError(f"{path} holds the features of {len(features)} images; its note says {count}")
    return Statistics(
        count=count,
        mean=mean,
        covariance=covariance,
        spatial_mean=spatial[0],
        spatial_covariance=spatial[1],
        features=features,
        identity=note.get("identity"),
        fingerprint=note.get("fingerprint"),
        size=tuple(size) if size else None,
        note=note,
    )
