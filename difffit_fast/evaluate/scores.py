"""Inception Score, and improved precision and recall."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import DiffFitError

__all__ = ["InceptionScore", "Manifold", "precision_recall"]


class InceptionScore:
    """exp(E_x KL(p(y|x) ‖ p(y))) (Salimans et al., 2016), streaming, in splits of ``split_size`` images.

    As ADM's evaluator has it: the mean over consecutive splits of 5,000, the last one as large as it comes out. The score
    of few images is biased downwards, and so is that of images in the order of their classes: shuffle them.
    """

    def __init__(self, split_size: int = 5000) -> None:
        if split_size < 1:
            raise DiffFitError(f"split_size must be at least 1; got {split_size}")
        self.split_size = split_size
        self._scores: list[float] = []
        self._count = 0
        self._sum: Tensor | None = None  # Σ p
        self._negentropy = 0.0  # Σ Σ p log p

    def update(self, logits: Tensor) -> None:
        """Add images by their ``logits`` [n, classes], before the softmax."""
        if logits.dim() != 2:
            raise DiffFitError(f"logits must have shape [n, classes]; got {tuple(logits.shape)}")
        if not torch.isfinite(logits).all():
            raise DiffFitError("some logits are NaN or infinite")
        logits = logits.detach().cpu().to(torch.float64)
        while len(logits):
            part, logits = logits.split([room := min(len(logits), self.split_size - self._count), len(logits) - room])
            log_p = part.log_softmax(dim=1)
            p = log_p.exp()
            self._sum = p.sum(0) if self._sum is None else self._sum + p.sum(0)
            self._negentropy += float((p * log_p).sum())
            self._count += room
            if self._count == self.split_size:
                self._scores.append(self._close())
                self._count, self._sum, self._negentropy = 0, None, 0.0

    def _close(self) -> float:
        assert self._sum is not None
        marginal = self._sum / self._count
        return float((self._negentropy / self._count - torch.xlogy(marginal, marginal).sum()).exp())

    def result(self) -> tuple[float, float]:
        """Mean and standard deviation over the splits (0 for one split)."""
        scores = self._scores + ([self._close()] if self._count else [])
        if not scores:
            raise DiffFitError("the Inception Score needs at least one image")
        values = torch.tensor(scores, dtype=torch.float64)
        return float(values.mean()), float(values.std(correction=0))


@dataclass(frozen=True)
class Manifold:
    """The union of balls around the points of a reference, each reaching to the point's k-th nearest neighbour.

    Attributes:
        points: features [M, D] without their mean.
        centre: their mean, [D].
        radii: squared, float64 [M].
    """

    points: Tensor
    centre: Tensor
    radii: Tensor
    k: int

    @classmethod
    def of(cls, reference: Tensor, k: int = 3, block: int = 2048) -> Manifold:
        """That of features [M, D]; ``block``: see :func:`precision_recall`.

        Raises:
            DiffFitError: as :func:`precision_recall`.
        """
        _check_features(reference, "reference", k)
        if k < 1:
            raise DiffFitError(f"k must be at least 1; got {k}")
        if reference.device.type == "mps":
            reference = reference.cpu()
        # Distances do not see a common shift; without the mean they lose fewer digits.
        centre = reference.to(torch.float64).mean(0).to(reference.dtype)
        points = reference - centre
        return cls(points, centre, _radii(points, k, block), k)


def precision_recall(
    samples: Tensor, reference: Tensor | Manifold, k: int = 3, block: int = 2048
) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al., 2019).

    Precision: the share of samples on the reference's manifold. Recall: the share of the reference on the samples'.

    Args:
        samples: features [N, D].
        reference: features [M, D]; or their manifold of this k, where several sets are compared with it.
        block: rows held at once; memory is that of the features and a few block × block distances, float64.

    Raises:
        DiffFitError: shapes that do not fit, features that are not finite, fewer than k + 1 points.
    """
    _check_features(samples, "samples", k)
    known = reference if isinstance(reference, Manifold) else Manifold.of(reference, k, block)
    if known.k != k:
        raise DiffFitError(f"the reference's manifold is of k = {known.k}; k = {k} was asked for")
    if samples.shape[1] != known.points.shape[1]:
        raise DiffFitError(f"samples and reference have {samples.shape[1]} and {known.points.shape[1]} dimensions")
    samples = samples.to(known.points.device) - known.centre
    precision = _share_inside(samples, known.points, known.radii, block)
    recall = _share_inside(known.points, samples, _radii(samples, k, block), block)
    return precision, recall


def _check_features(x: Tensor, name: str, k: int) -> None:
    if x.dim() != 2:
        raise DiffFitError(f"features of the {name} must have shape [n, D]; got {tuple(x.shape)}")
    if len(x) <= k:
        raise DiffFitError(f"precision and recall with k = {k} need at least {k + 1} images; the {name} are {len(x)}")
    if not torch.isfinite(x).all():
        raise DiffFitError(f"features of the {name} are NaN or infinite")


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """[n, m] in float64; what is below the rounding of its terms is 0, so that equal points are at distance 0."""
    a, b = a.to(torch.float64), b.to(torch.float64)
    norms = a.square().sum(1)[:, None] + b.square().sum(1)[None, :]
    d2 = torch.addmm(norms, a, b.T, alpha=-2)
    return d2.masked_fill_(d2 < 1e-12 * norms, 0.0)


def _radii(x: Tensor, k: int, block: int) -> Tensor:
    """[N]: squared distance of every point to its k-th nearest neighbour, itself not counted."""
    radii = []
    for i in range(0, len(x), block):
        rows = x[i : i + block]
        nearest = None
        for j in range(0, len(x), block):
            d2 = _squared_distances(rows, x[j : j + block])
            if i == j:
                d2.fill_diagonal_(float("inf"))
            candidates = d2 if nearest is None else torch.cat([nearest, d2], dim=1)
            nearest = candidates.topk(min(k, candidates.shape[1]), dim=1, largest=False).values
        radii.append(nearest[:, k - 1])
    return torch.cat(radii)


def _share_inside(points: Tensor, centres: Tensor, radii: Tensor, block: int) -> float:
    """The share of ``points`` that lie in any of the balls."""
    inside = 0
    for i in range(0, len(points), block):
        rows = points[i : i + block]
        hit = torch.zeros(len(rows), dtype=torch.bool, device=points.device)
        for j in range(0, len(centres), block):
            hit |= (_squared_distances(rows, centres[j : j + block]) <= radii[j : j + block]).any(dim=1)
        inside += int(hit.sum())
    return inside / len(points)
