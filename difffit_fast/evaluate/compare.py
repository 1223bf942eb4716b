"""Samples against a reference: one call for a number, one object where the reference is used again and again."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .._bounds import BATCH, SIDE, check_whole
from .._devices import choose_device
from ..errors import DiffFitError
from .features import Extractor, get_extractor
from .frechet import RunningStatistics, gaussian_distance
from .scores import InceptionScore, Manifold, precision_recall
from .sources import ImageSource, open_images
from .statistics import Statistics, is_statistics, load_statistics, save_statistics

__all__ = ["METRICS", "Evaluator", "collect", "compare"]

METRICS = {
    "fid": "Fréchet distance of pooled Inception features",
    "sfid": "Fréchet distance of spatial Inception features",
    "is": "Inception Score of the samples",
    "pr": "improved precision and recall, k = 3",
    "fd": "Fréchet distance in any features",
}
_INCEPTION_ONLY = {"fid": "fd", "sfid": "", "is": ""}  # and what to ask for instead
_K = 3


def compare(samples: Any, reference: Any, features: Any = "inception", **options: Any) -> dict[str, Any]:
    """Compare two sets of images; ``difffit eval`` measures the same by an :class:`Evaluator`.

    >>> compare("samples", "VIRTUAL_imagenet256_labeled.npz", metrics="all")["fid"]        # doctest: +SKIP

    Args:
        samples: a folder, an ADM ``.npz``, a tensor [N, C, H, W] (uint8, or float in [-1, 1]) or an array uint8 NHWC.
        reference: the same, or a ``.npz`` of statistics (ADM's ``mu, sigma, mu_s, sigma_s`` are used as they are), or
            :class:`Statistics`, or an :class:`Evaluator`, in which case nothing else may be given.
        features, options: see :class:`Evaluator`; ``num_samples`` takes only the first so many samples.

    Returns:
        ``fid``, ``sfid``, ``is``, ``is_std``, ``precision``, ``recall``, ``fd``: floats, those asked for; ``features``: what
        they were measured in; ``num_samples``, ``num_reference`` (0: unknown); ``notes``: what a reader must know.
    """
    num_samples = options.pop("num_samples", None)
    if isinstance(reference, Evaluator):
        if options or features != "inception":
            raise DiffFitError("with an Evaluator as reference its own settings hold; give no others")
        return reference(samples, num_samples)
    return Evaluator(reference, features, **options)(samples, num_samples)


class Evaluator:
    """Metrics against one reference, whose statistics are taken once.

    Args:
        reference, features: see :func:`compare` and :func:`~difffit_fast.evaluate.features.get_extractor`.
        metrics: names of :data:`METRICS`; ``"all"``: those that the features and the reference allow; None: the Fréchet
            distance alone (``fid`` for Inception, else ``fd``).
        batch_size: images in one pass.
        device: of the network; None: CUDA where there is one.
        image_size: crop images of folders to this square as ADM crops its training data (both sets).
        cache: ``.npz`` file for the reference's statistics: used if it fits images and features, written if not.
        progress: show bars.
        inception_weights, check_weights, dinov2_path, seed: see ``get_extractor``.
    """

    def __init__(
        self,
        reference: Any,
        features: str | Callable[[Tensor], Tensor] | Extractor = "inception",
        *,
        metrics: str | Sequence[str] | None = None,
        batch_size: int = 32,
        device: torch.device | str | None = None,
        image_size: int | None = None,
        cache: str | os.PathLike[str] | None = None,
        progress: bool = False,
        **extractor_options: Any,
    ) -> None:
        check_whole("batch_size", batch_size, BATCH)
        if image_size is not None:
            check_whole("image_size", image_size, SIDE)
        self.device = choose_device(device)
        names = _metric_names(metrics, features)
        self.extractor = get_extractor(features, device=self.device, **extractor_options)
        self.batch_size, self.image_size, self.progress = batch_size, image_size, progress
        self._given: ImageSource | None = None  # the images of the reference, where there are any
        self._manifold: Manifold | None = None  # of its features, once precision and recall were asked for
        self.reference = self._reference(reference, names, cache)
        if metrics == "all":
            names = [name for name in names if not self._lacking(name)]
        for name in names:
            if lacking := self._lacking(name):
                raise DiffFitError(
                    f"the metric {name!r} needs {lacking} of the reference, which its file does not hold"
                )
        self.metrics = tuple(names)

    def __call__(self, samples: Any, num_samples: int | None = None) -> dict[str, Any]:
        """The metrics of ``samples``, as :func:`compare` returns them."""
        reference = self.reference
        source = open_images(samples, self.image_size, num_samples)
        taken = self._collect(source, self.metrics, "samples")
        result: dict[str, Any] = {}
        for name in self.metrics:
            if name in ("fid", "fd"):
                result[name] = _frechet(taken.mean, taken.covariance, reference.mean, reference.covariance)
            elif name == "sfid":
                result[name] = _frechet(
                    taken.spatial_mean, taken.spatial_covariance, reference.spatial_mean, reference.spatial_covariance
                )
            elif name == "is" and taken.inception_score is not None:
                result["is"], result["is_std"] = taken.inception_score
            elif name == "pr" and taken.features is not None and reference.features is not None:
                if self._manifold is None:
                    self._manifold = Manifold.of(reference.features.to(self.device), _K)
                result["precision"], result["recall"] = precision_recall(
                    taken.features.to(self.device), self._manifold, _K
                )
        if odd := [name for name, value in result.items() if not math.isfinite(value)]:
            raise DiffFitError(f"{', '.join(odd)} of {source.name} are NaN or infinite; look at the features")
        given = self._given.notes if self._given is not None else []
        notes = list(dict.fromkeys([*source.notes, *given, *self._notes(taken)]))
        for note in notes:
            warnings.warn(note, stacklevel=2)
        return {
            **result,
            "features": self.extractor.label,
            "num_samples": taken.count,
            "num_reference": reference.count,
            "notes": notes,
        }

    def _notes(self, taken: Statistics) -> list[str]:
        notes = []
        D = len(taken.mean)
        if {"fid", "sfid", "fd"} & set(self.metrics):
            for what, count in (("samples", taken.count), ("reference images", self.reference.count)):
                if 0 < count <= D:
                    notes.append(
                        f"{count} {what} for {D} features: their covariance is singular and the distance biased upwards; "
                        "compare it only with distances from as many images"
                    )
        if taken.fingerprint is not None and taken.fingerprint == self.reference.fingerprint:
            notes.append("samples and reference are the same images: the numbers say nothing about either")
        if self._given is not None and self.reference.count < len(self._given):
            notes.append(
                f"the reference is of {self.reference.count} of its {len(self._given)} images, those that can be read"
            )
        if taken.size and self.reference.size and taken.size != self.reference.size:
            a, b = ("x".join(map(str, size)) for size in (taken.size, self.reference.size))
            notes.append(f"samples are {a}, the reference {b} pixels: part of the distance is that of the sizes")
        elif taken.size is None:
            notes.append("the samples are of several sizes, each resized on its own")
        if "NOT" in self.extractor.label:
            notes.append(f"measured in the features of {self.extractor.label}")
        return notes

    def _lacking(self, metric: str) -> str:
        if metric == "sfid" and self.reference.spatial_mean is None:
            return "spatial statistics (mu_s, sigma_s)"
        if metric == "pr" and self.reference.features is None:
            return "images or features"
        return ""

    def _collect(self, source: ImageSource, metrics: Sequence[str], name: str) -> Statistics:
        return collect(
            source,
            self.extractor,
            metrics,
            batch_size=self.batch_size,
            device=self.device,
            progress=name if self.progress else None,
        )

    def _reference(self, reference: Any, metrics: Sequence[str], cache: str | os.PathLike[str] | None) -> Statistics:
        metrics = [name for name in metrics if name != "is"]  # of the samples alone
        if isinstance(reference, Statistics):
            self._check_identity(reference, "the given statistics")
            return reference
        if isinstance(reference, str | os.PathLike) and is_statistics(Path(reference)):
            return self._from_file(Path(reference), metrics)
        source = self._given = open_images(reference, self.image_size)
        if cache is None:
            return self._collect(source, metrics, "reference")
        cache = Path(cache)
        if source.fingerprint is None or self.extractor.identity is None:
            what = "images in memory" if source.fingerprint is None else f"features {self.extractor.name!r}"
            raise DiffFitError(f"statistics of {what} cannot be cached: nothing tells whether they have changed")
        if cache.exists():
            known = load_statistics(cache)
            if not known.note:
                raise DiffFitError(f"the cache {cache} exists and was not written by this program; it is left as it is")
            same = (known.identity, known.fingerprint) == (self.extractor.identity, source.fingerprint)
            if same and not (
                ("sfid" in metrics and known.spatial_mean is None) or ("pr" in metrics and known.features is None)
            ):
                return known
        statistics = self._collect(source, metrics, "reference")
        save_statistics(statistics, cache)
        return statistics

    def _from_file(self, path: Path, metrics: Sequence[str]) -> Statistics:
        statistics = load_statistics(path)
        try:
            source = open_images(path)
        except DiffFitError:
            source = None
        if source is not None and self.extractor.name != "inception" and statistics.identity is None:
            return self._collect(source, metrics, "reference")  # ADM's file: its mu and sigma are Inception's
        self._check_identity(statistics, str(path))
        if "pr" in metrics and statistics.features is None and source is not None:
            images = self._collect(source, ["pr"], "reference")
            statistics.features, statistics.size = images.features, images.size
        return statistics

    def _check_identity(self, statistics: Statistics, name: str) -> None:
        mine, theirs = self.extractor.identity, statistics.identity
        if theirs is None and self.extractor.name == "inception":
            theirs = mine  # a file of another evaluator holds statistics in the published features
        if theirs is None or theirs != mine:
            raise DiffFitError(
                f"{name} holds statistics in the features {theirs or 'of Inception'}; these are {mine or self.extractor.name}"
            )


def collect(
    source: ImageSource,
    extractor: Extractor,
    metrics: Sequence[str],
    *,
    batch_size: int = 32,
    device: torch.device | str = "cpu",
    progress: str | None = None,
) -> Statistics:
    """One pass over ``source``: the statistics that ``metrics`` need.

    Memory does not grow with the number of images, except for ``pr``, which keeps the pooled features (N · D · 4 bytes).
    """
    device = torch.device(device)
    pool, spatial, score = RunningStatistics(), RunningStatistics(), InceptionScore()
    kept: list[Tensor] = []
    sizes: set[tuple[int, int]] = set()
    with tqdm(total=len(source), unit="img", desc=progress, disable=progress is None) as bar:
        for images in source.batches(batch_size):
            sizes |= {(image.shape[1], image.shape[2]) for image in images}
            found = extractor(images, device)
            try:
                pool.update(found["pool"])
                if "sfid" in metrics:
                    spatial.update(found["spatial"])
                if "is" in metrics:
                    score.update(found["logits"])
            except DiffFitError as error:
                raise DiffFitError(f"{source.name}: {error}") from error
            if "pr" in metrics:
                kept.append(found["pool"].to("cpu", torch.float32))
            bar.update(len(images))
    if pool.count < 2:
        raise DiffFitError(f"{source.name} holds {pool.count} image; at least 2 are needed for a covariance")
    if kept and pool.count <= _K:
        raise DiffFitError(f"{source.name} holds {pool.count} images; precision and recall need at least {_K + 1}")
    if kept and not all(torch.isfinite(part).all() for part in kept):
        raise DiffFitError(f"{source.name}: the features are too large for float32")
    return Statistics(
        count=pool.count,
        mean=pool.mean.cpu(),
        covariance=pool.covariance.cpu(),
        spatial_mean=spatial.mean.cpu() if spatial.count else None,
        spatial_covariance=spatial.covariance.cpu() if spatial.count else None,
        features=torch.cat(kept) if kept else None,
        inception_score=score.result() if "is" in metrics else None,
        identity=extractor.identity,
        fingerprint=source.fingerprint,
        size=sizes.pop() if len(sizes) == 1 else None,
    )


def _metric_names(metrics: str | Sequence[str] | None, features: Any) -> list[str]:
    inception = features == "inception" or (isinstance(features, Extractor) and features.name == "inception")
    if metrics is None:
        return ["fid"] if inception else ["fd"]
    if metrics == "all":
        return ["fid", "sfid", "is", "pr"] if inception else ["fd", "pr"]
    names = [m.strip() for m in metrics.split(",")] if isinstance(metrics, str) else list(metrics)
    for name in names:
        if name not in METRICS:
            raise DiffFitError(f"unknown metric {name!r}; expected some of {', '.join(METRICS)}")
        if name in _INCEPTION_ONLY and not inception:
            instead = f"; ask for {_INCEPTION_ONLY[name]!r} instead" if _INCEPTION_ONLY[name] else ""
            raise DiffFitError(f"the metric {name!r} is defined in the features 'inception' only{instead}")
    if not names:
        raise DiffFitError(f"no metrics were asked for; expected some of {', '.join(METRICS)}")
    return list(dict.fromkeys(names))


def _frechet(mu1: Tensor | None, sigma1: Tensor | None, mu2: Tensor | None, sigma2: Tensor | None) -> float:
    assert mu1 is not None and sigma1 is not None and mu2 is not None and sigma2 is not None
    if mu1.shape != mu2.shape:
        raise DiffFitError(f"the samples have {len(mu1)} features, the reference {len(mu2)}")
    return gaussian_distance(mu1, sigma1, mu2, sigma2)
