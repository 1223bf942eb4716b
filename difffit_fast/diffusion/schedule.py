"""Noise schedules, the choice of a subset of their steps, and the tables that follow from them.

Notation of Ho et al. 2020 ("DDPM"): beta_t, alpha_t = 1 - beta_t, acp_t = alpha_0 ... alpha_t ("alphas_cumprod").
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor


def make_betas(noise_schedule: str, steps: int) -> Tensor:
    """beta_0 .. beta_{steps-1}, float64.

    ``"linear"``: 1e-4 to 0.02 at 1000 steps (DDPM), scaled to keep acp_T at other counts. ``"cosine"`` (also called
    ``"squaredcos_cap_v2"``): acp = cos^2 with offset 0.008, beta at most 0.999 (Nichol & Dhariwal 2021, eq. 17).
    """
    if steps < 1:
        raise ValueError(f"diffusion_steps must be at least 1, got {steps}")
    if noise_schedule == "linear":
        scale = 1000 / steps
        return torch.linspace(scale * 1e-4, scale * 0.02, steps, dtype=torch.float64)
    if noise_schedule in ("cosine", "squaredcos_cap_v2"):
        times = torch.arange(steps + 1, dtype=torch.float64) / steps
        acp = torch.cos((times + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - acp[1:] / acp[:-1]).clamp(max=0.999)
    raise ValueError(f"noise_schedule must be 'linear' or 'cosine', got {noise_schedule!r}")


def respaced_steps(num_timesteps: int, respacing: str | int | Iterable[int] | None) -> list[int]:
    """The increasing list of original timesteps that are kept.

    ``""`` or None keeps all. ``"250"`` takes 250, evenly spread with both ends (the protocol of published FIDs).
    ``"10,15,20"`` cuts the range into three equal parts, the first ones longer by one where it does not divide, and takes
    that many from each. ``"ddim50"`` takes 50 with one fixed stride from 0 (DDIM's), the smallest that gives so many.

    They are the very steps that ``space_timesteps`` of improved-diffusion (Nichol & Dhariwal 2021) and its heirs keeps:
    a part of m steps of which k are taken is walked from its first with the stride (m - 1) / (k - 1), added up in floating
    point and rounded half to even. Of the counts from 1 to 1000, 278 would keep other steps if the position i were i times
    the stride.

    Raises:
        ValueError: text of another form, more steps than there are, none, or a ``"ddimN"`` that no stride gives.
    """
    if respacing is None or respacing == "":
        return list(range(num_timesteps))
    if isinstance(respacing, str) and respacing.startswith("ddim"):
        (wanted,) = _parse_counts(respacing[4:])
        for stride in range(1, num_timesteps + 1):
            steps = list(range(0, num_timesteps, stride))
            if len(steps) == wanted:
                return steps
        raise ValueError(f"no fixed stride gives {wanted} of {num_timesteps} steps, which {respacing!r} asks for")
    counts = _parse_counts(respacing)
    size, extra = divmod(num_timesteps, len(counts))
    kept: list[int] = []
    start = 0
    for part, count in enumerate(counts):
        length = size + (part < extra)
        if not (0 if any(counts) else 1) <= count <= length:
            raise ValueError(f"cannot take {count} of the {length} steps of a part (timestep_respacing={respacing!r})")
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0
        for _ in range(count):
            kept.append(start + round(position))
            position += stride  # not i * stride: the sums round otherwise
        start += length
    return kept


def _parse_counts(respacing: str | int | Iterable[int]) -> list[int]:
    try:
        if isinstance(respacing, str):
            return [int(part) for part in respacing.split(",")]
        return [respacing] if isinstance(respacing, int) else [int(part) for part in respacing]
    except ValueError:
        raise ValueError(f"timestep_respacing must be like '250', 'ddim50' or '10,15,20', got {respacing!r}") from None


TABLES = (
    "sqrt_acp", "sqrt_one_minus_acp", "sqrt_recip_acp", "sqrt_recip_acp_minus_one", "acp", "acp_prev", "acp_next",
    "posterior_mean_x0", "posterior_mean_xt", "posterior_variance", "log_variance_min", "log_variance_max",
    "log_variance_fixed",
)  # fmt: skip


def make_tables(betas: Tensor) -> Tensor:
    """Everything a loss or a sampler reads, (len(TABLES), steps) float64, rows in the order of ``TABLES``.

    The posterior q(x_{t-1} | x_t, x_0) is N(posterior_mean_x0 * x_0 + posterior_mean_xt * x_t, posterior_variance)
    (DDPM eq. 6, 7). ``log_variance_min`` is the log of that variance; at t = 0, where it is zero, that of t = 1 stands.
    ``log_variance_max`` is log beta_t. A learned variance lies between the two; ``log_variance_fixed`` is what a model
    without one uses: beta_t, with the posterior's at t = 0. ``acp_prev`` begins with 1, ``acp_next`` ends with 0.
    """
    acp = torch.cumprod(1 - betas, dim=0)
    acp_prev = torch.cat([acp.new_ones(1), acp[:-1]])
    variance = betas * (1 - acp_prev) / (1 - acp)
    variance_min = torch.cat([variance[1:2] if len(betas) > 1 else betas[:1], variance[1:]])
    values = dict(
        sqrt_acp=acp.sqrt(),
        sqrt_one_minus_acp=(1 - acp).sqrt(),
        sqrt_recip_acp=acp.rsqrt(),
        sqrt_recip_acp_minus_one=(1 / acp - 1).sqrt(),
        acp=acp,
        acp_prev=acp_prev,
        acp_next=torch.cat([acp[1:], acp.new_zeros(1)]),
        posterior_mean_x0=betas * acp_prev.sqrt() / (1 - acp),
        posterior_mean_xt=(1 - acp_prev) * (1 - betas).sqrt() / (1 - acp),
        posterior_variance=variance,
        log_variance_min=variance_min.log(),
        log_variance_max=betas.log(),
        log_variance_fixed=torch.cat([variance_min[:1], betas[1:]]).log(),
    )
    return torch.stack([values[name] for name in TABLES])
