"""The Fréchet distance between Gaussians, and the streaming mean and covariance it is fed with.

    d² = ‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁ Σ₂)^½)                                  (Dowson and Landau, 1982)

The eigenvalues of Σ₁Σ₂ are those of the symmetric Σ₁^½ Σ₂ Σ₁^½, so two symmetric eigenproblems in float64 replace the
matrix square root of a non-symmetric product: nothing complex appears, and singular covariances need no jitter.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DiffFitError

__all__ = ["RunningStatistics", "frechet_distance"]


class RunningStatistics:
    """Mean and covariance of feature vectors seen in blocks: float64, D² memory however many there are.

    Blocks are merged by the pairwise update of Chan, Golub and LeVeque (1983), which does not cancel when the mean is
    far from zero, as the sum of squares would. The split into blocks changes the result by rounding only.

    Attributes:
        count: vectors seen so far.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean: Tensor | None = None
        self._scatter: Tensor | None = None  # Σ (x − mean)(x − mean)ᵀ

    def update(self, features: Tensor) -> None:
        """Add ``features`` [n, D], any real dtype and device; the statistics live on the device of the first block.

        Raises:
            DiffFitError: not two-dimensional, another D than before, or a value that is not finite.
        """
        if features.dim() != 2:
            raise DiffFitError(f"features must have shape [n, D]; got {tuple(features.shape)}")
        if features.is_complex() or not features.shape[1]:
            raise DiffFitError(f"features must be real and at least one; got {features.dtype} {tuple(features.shape)}")
        if self._mean is not None and features.shape[1] != self._mean.shape[0]:
            raise DiffFitError(f"features have {features.shape[1]} dimensions; the ones before had {len(self._mean)}")
        if features.device.type == "mps":  # no float64 there
            features = features.cpu()
        x = features.detach().to(torch.float64)
        bad = int((~torch.isfinite(x)).any(dim=1).sum())
        if bad:
            raise DiffFitError(f"the features of {bad} of {len(x)} images are NaN or infinite")
        if not len(x):
            return
        mean = x.mean(dim=0)
        centred = x - mean
        self._merge(len(x), mean, centred.T @ centred)

    def merge(self, other: RunningStatistics) -> None:
        """Add what ``other`` has seen."""
        if other._mean is not None and other._scatter is not None:
            if self._mean is not None and other._mean.shape != self._mean.shape:
                raise DiffFitError(f"cannot merge statistics of {len(other._mean)} and {len(self._mean)} dimensions")
            self._merge(other.count, other._mean.clone(), other._scatter.clone())

    def _merge(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        if self._mean is None or self._scatter is None:
            self.count, self._mean, self._scatter = count, mean, scatter
            return
        total = self.count + count
        delta = mean.to(self._mean.device) - self._mean
        self._scatter += scatter.to(self._mean.device)
        self._scatter.addr_(delta, delta, alpha=self.count * count / total)
        self._mean += delta * (count / total)
        self.count = total

    @property
    def mean(self) -> Tensor:
        """[D] float64."""
        if self._mean is None:
            raise DiffFitError("there are no features to take the mean of")
        return self._mean

    @property
    def covariance(self) -> Tensor:
        """[D, D] float64, unbiased (divided by count − 1), as ``numpy.cov`` has it."""
        if self._scatter is None or self.count < 2:
            raise DiffFitError(f"a covariance needs at least 2 images; got {self.count}")
        if not torch.isfinite(self._scatter).all():
            raise DiffFitError("the features are too large: their covariance is infinite")
        return self._scatter / (self.count - 1)


def frechet_distance(mu1: Any, sigma1: Any, mu2: Any, sigma2: Any) -> float:
    """The squared Fréchet (2-Wasserstein) distance between N(mu1, sigma1) and N(mu2, sigma2).

    Args:
        mu1, mu2: [D], tensors, arrays or lists; a number for D = 1.
        sigma1, sigma2: [D, D], symmetric and positive semi-definite up to rounding.

    Returns:
        A float ≥ 0, computed in float64. What is customarily reported as "FID" is this square.

    Raises:
        DiffFitError: shapes that do not fit, values that are not finite, a matrix that is not a covariance.

    Warns:
        UserWarning: a covariance is singular, as one from D or fewer samples always is. The distance between these two
        Gaussians is still right; as an estimate from samples it is biased upwards.
    """
    mu1, sigma1 = check_gaussian(mu1, sigma1, "the first")
    mu2, sigma2 = check_gaussian(mu2, sigma2, "the second")
    if mu1.shape != mu2.shape:
        raise DiffFitError(f"the distributions have {len(mu1)} and {len(mu2)} dimensions; they must have the same")
    ranks = [check_rank(sigma, name) for sigma, name in ((sigma1, "the first"), (sigma2, "the second"))]
    distance = gaussian_distance(mu1, sigma1, mu2, sigma2)
    singular = [f"the {name} has rank {r}" for name, r in zip(("first", "second"), ranks, strict=True) if r < len(mu1)]
    if singular:
        warnings.warn(
            f"singular covariance in {len(mu1)} dimensions: {', '.join(singular)}; a distance estimated from so few "
            "samples is biased upwards",
            stacklevel=2,
        )
    return distance


def check_gaussian(mu: Any, sigma: Any, name: str) -> tuple[Tensor, Tensor]:
    """``mu`` and ``sigma`` as float64 tensors on the CPU ([D] and [D, D]), or a :class:`DiffFitError` that says why not."""
    m, s = (torch.as_tensor(np.asarray(v) if not isinstance(v, Tensor) else v).detach() for v in (mu, sigma))
    if m.is_complex() or s.is_complex():
        raise DiffFitError(f"the mean and covariance of {name} distribution must be real; got {m.dtype} and {s.dtype}")
    m, s = m.cpu().to(torch.float64), s.cpu().to(torch.float64)
    m, s = (m.reshape(1), s.reshape(1, 1)) if m.dim() == 0 and s.numel() == 1 else (m, s)
    if m.dim() != 1 or s.shape != (len(m), len(m)):
        raise DiffFitError(
            f"{name} distribution needs a mean [D] and a covariance [D, D]; got {tuple(m.shape)} and {tuple(s.shape)}"
        )
    if not len(m):
        raise DiffFitError(f"{name} distribution has no dimensions")
    if not (torch.isfinite(m).all() and torch.isfinite(s).all()):
        raise DiffFitError(f"the mean or covariance of {name} distribution is NaN or infinite")
    size = float(s.diagonal().abs().max())
    if float((s - s.T).abs().max()) > 1e-4 * size:
        raise DiffFitError(f"the covariance of {name} distribution is not symmetric")
    return m, s / 2 + s.T / 2  # no sum that could overflow


def gaussian_distance(mu1: Tensor, sigma1: Tensor, mu2: Tensor, sigma2: Tensor) -> float:
    """:func:`frechet_distance` of float64 tensors known to be means and covariances of one size.

    Raises:
        DiffFitError: the numbers are so large that the distance is not one.
    """
    try:
        values, vectors = torch.linalg.eigh(sigma1)
        root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
        product = root @ sigma2 @ root
        cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
        distance = float((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * cross)
    except torch.linalg.LinAlgError:
        distance = math.nan
    if not math.isfinite(distance):
        largest = max(float(x.abs().max()) for x in (mu1, sigma1, mu2, sigma2))
        raise DiffFitError(f"the Fréchet distance is not finite; means and covariances are as large as {largest:.3g}")
    return max(0.0, distance)


def check_rank(sigma: Tensor, name: str) -> int:
    """How many eigenvalues of a symmetric matrix rise above rounding; raises on one clearly below zero."""
    eigenvalues = torch.linalg.eigvalsh(sigma)
    largest = float(eigenvalues.abs().max())
    # Statistics files often hold float32, hence a wide gate for "negative".
    if float(eigenvalues.min()) < -1e-3 * largest:
        raise DiffFitError(
            f"the covariance of {name} distribution has a negative eigenvalue ({float(eigenvalues.min()):.3g}, "
            f"the largest being {largest:.3g}): it is not a covariance"
        )
    return int((eigenvalues > largest * len(eigenvalues) * torch.finfo(torch.float64).eps).sum())
