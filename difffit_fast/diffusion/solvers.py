"""Fast solvers from diffusers (extra ``vae``): DPM-Solver++ and UniPC, for 10 to 30 steps where DDPM needs 250."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._extras import require
from .gaussian import GaussianDiffusion
from .noise import Generators, randn, with_progress

SOLVERS = {
    "dpm++": "DPMSolverMultistepScheduler",  # Lu et al. 2022, second order, multistep
    "unipc": "UniPCMultistepScheduler",  # Zhao et al. 2023, second order
}


def make_scheduler(solver: str, diffusion: GaussianDiffusion) -> Any:
    """The diffusers scheduler called ``solver`` on the noise schedule of ``diffusion`` (its respacing is not used)."""
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {solver!r}")
    diffusers = require("diffusers", "vae", f"the sampler {solver!r}")
    betas = diffusion.original_betas.float().numpy()
    return getattr(diffusers, SOLVERS[solver])(
        num_train_timesteps=len(betas), trained_betas=betas, solver_order=2, timestep_spacing="linspace"
    )


def solver_sample_loop(
    solver: str,
    diffusion: GaussianDiffusion,
    model: Callable[..., Tensor],
    shape: Sequence[int],
    noise: Tensor | None = None,
    *,
    num_steps: int = 20,
    model_kwargs: dict[str, Any] | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
    generator: Generators = None,
) -> Tensor:
    """Sample (N, C, H, W) with ``"dpm++"`` or ``"unipc"``, deterministic given ``noise``; ignores learned variance."""
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    scheduler = make_scheduler(solver, diffusion)
    x = randn(shape, generator, device) if noise is None else noise.to(device)
    scheduler.set_timesteps(num_steps, device=x.device)
    for step in with_progress(list(scheduler.timesteps), progress):
        t = torch.full((x.shape[0],), int(step), device=x.device, dtype=torch.long)
        eps = model(x, t, **(model_kwargs or {}))[:, : x.shape[1]]
        x = scheduler.step(eps.to(x.dtype), step, x, return_dict=False)[0]
    return x
