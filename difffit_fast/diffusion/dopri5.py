"""Dormand-Prince 5(4): an explicit Runge-Kutta method that chooses its steps, for every image of a batch on its own.

Seven slopes a step, the last of which is the first of the next; the fifth-order result is kept, and its difference from the
embedded fourth-order one estimates the error (Dormand & Prince 1980). First step and step control are those of Hairer,
Nørsett & Wanner, "Solving Ordinary Differential Equations I", section II.4, with the constants of torchdiffeq, the solver of
the public SiT code. That one measures the error over the whole batch, so that an image's steps follow from its neighbours'; here
each has its own time, step and error, and neither waits for nor hurries another.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import DiffFitError
from .noise import with_progress

TIMES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
SAFETY, SLOWEST, FASTEST = 0.9, 0.2, 10.0  # of the factor from one step to the next
LEAST = 1e-8  # a step this small is not taken again


def integrate(
    velocity: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    rtol: float = 1e-3,
    atol: float = 1e-6,
    max_steps: int = 1000,
    progress: bool = False,
) -> Tensor:
    """x(1) from x(0) = ``x`` (N, ...) along dx/dt = ``velocity(x, t)``, t (N,) in [0, 1] of the dtype of ``x``.

    The root mean square over an image of error / (atol + rtol |x|) is at most 1 in every step. ``velocity`` is called for the
    whole batch six times a step, until the last image arrives. An image that no step brings further, because its velocity
    is not finite, becomes NaN; the others go on.

    Raises:
        DiffFitError: an image is not there after ``max_steps`` steps, taken again or not.
    """
    t = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    slope = velocity(x, t.to(x.dtype))
    h = _first_step(velocity, x, slope, rtol, atol)
    for _ in with_progress(range(max_steps), progress):
        rest = 1 - t
        if not bool((rest > 0).any()):
            return x
        h = torch.minimum(h, rest)  # those that have arrived stand still
        slopes, point = [slope], x
        for time, weights in zip(TIMES, STAGES, strict=True):
            point = x + _each(h, x) * _combined(weights, slopes)
            slopes.append(velocity(point, (t + time * h).to(x.dtype)))
        error = _size(_each(h, x) * _combined(ERROR, slopes), x, point, rtol, atol)
        moving, good = rest > 0, error <= 1  # what is not a number is not good
        lost = moving & ~good & (h < LEAST)
        taken = moving & good
        x = torch.where(_each(taken, x), point, x)
        slope = torch.where(_each(taken, x), slopes[-1], slope)
        x = torch.where(_each(lost, x), torch.nan, x)
        t = torch.where(lost | (taken & (h >= rest)), 1.0, torch.where(taken, t + h, t))
        factor = (SAFETY * error**-0.2).nan_to_num(SLOWEST, FASTEST).clamp(SLOWEST, FASTEST)
        h = h * torch.where(good, factor, factor.clamp(max=1.0))
    if bool((t < 1).any()):
        image = int(t.argmin())
        raise DiffFitError(
            f"dopri5 has brought image {image} of {len(x)} to t = {float(t[image]):.4g} of 1 in {max_steps} steps; take a "
            "sampler of fixed steps (euler, heun, sde), less guidance, or larger rtol and atol"
        )
    return x


def _first_step(
    velocity: Callable[[Tensor, Tensor], Tensor], x: Tensor, slope: Tensor, rtol: float, atol: float
) -> Tensor:
    """A step (N,) whose explicit Euler error is a hundredth of the tolerance, or so."""
    size, speed = _size(x, x, x, rtol, atol), _size(slope, x, x, rtol, atol)
    tiny = (size < 1e-5) | (speed < 1e-5)
    trial = torch.where(tiny, 1e-6, 0.01 * size / speed).clamp(max=1.0)
    ahead = velocity(x + _each(trial, x) * slope, trial.to(x.dtype))
    bend = _size(ahead - slope, x, x, rtol, atol) / trial
    most = torch.maximum(speed, bend)
    step = torch.where(most <= 1e-15, (trial * 1e-3).clamp(min=1e-6), (0.01 / most) ** 0.2)
    return torch.minimum(100 * trial, step).nan_to_num(1e-6)


def _size(what: Tensor, x: Tensor, other: Tensor, rtol: float, atol: float) -> Tensor:
    """Root mean square of ``what`` in units of the tolerance, (N,) float64."""
    allowed = atol + rtol * torch.maximum(x.abs(), other.abs())
    return (what / allowed).flatten(1).double().square().mean(1).sqrt()


def _combined(weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    return sum((w * slope for w, slope in zip(weights, slopes, strict=True) if w), torch.zeros_like(slopes[0]))


def _each(value: Tensor, like: Tensor) -> Tensor:
    """One value per image (N,), shaped to broadcast over ``like`` (N, ...)."""
    value = value if value.dtype == torch.bool else value.to(like.dtype)
    return value.view(-1, *[1] * (like.dim() - 1))
