"""Flow matching on the straight path between noise and data: what SiT is trained and sampled with.

    x_t = t x_1 + (1 - t) x_0,   x_0 ~ N(0, I) noise, x_1 data, t in [0, 1]
    velocity = dx_t / dt = x_1 - x_0;   loss = mean (velocity - model)^2

(Lipman et al. 2023; Ma et al. 2024, "SiT".) Sampling integrates dx/dt = model(x, t) from t = 0 (noise) to t = 1 (data).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .noise import Generators, randn, with_progress

METHODS = ("euler", "heun")


class FlowMatching:
    """Losses and ODE samplers. A model is a callable ``model(x, t, **model_kwargs)`` with t (N,) float in [0, 1].

    SiT checkpoints have DiT's keys and its doubled output channels; the second half is not used and is dropped here.
    """

    def sample_timesteps(
        self, n: int, device: torch.device | str | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Uniform times (n,) float32 in [0, 1), drawn where ``generator`` lives."""
        source = generator.device if generator is not None else device
        return torch.rand(n, generator=generator, device=source).to(device or source)

    def interpolate(self, x_data: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """x_t and its velocity, both shaped like ``x_data`` (N, ...); t (N,)."""
        time = t.to(x_data.dtype).view(-1, *[1] * (x_data.dim() - 1))
        return time * x_data + (1 - time) * noise, x_data - noise

    def training_losses(
        self,
        model: Callable[..., Tensor],
        x_start: Tensor,
        t: Tensor,
        model_kwargs: dict[str, Any] | None = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """``{"loss", "mse"}``, (N,) each: the mean-squared error of the velocity. ``x_start`` is the data."""
        if not t.is_floating_point():
            raise ValueError(f"flow matching needs times in [0, 1] of a floating dtype, got {t.dtype}")
        noise = torch.randn_like(x_start) if noise is None else noise
        x_t, velocity = self.interpolate(x_start, t, noise)
        output = self._velocity(model(x_t, t, **(model_kwargs or {})), x_start)
        mse = ((velocity - output) ** 2).flatten(1).mean(1)
        return {"loss": mse, "mse": mse}

    def ode_sample_loop(
        self,
        model: Callable[..., Tensor],
        shape: Sequence[int],
        noise: Tensor | None = None,
        *,
        num_steps: int = 50,
        method: str = "euler",
        model_kwargs: dict[str, Any] | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        generator: Generators = None,
    ) -> Tensor:
        """Sample (N, C, H, W) in ``num_steps`` equal steps from t = 0 to 1.

        ``"euler"`` calls the model once a step (first order), ``"heun"`` twice (second order). Call it under
        ``torch.no_grad()``.
        """
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
        if num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {num_steps}")
        x = randn(shape, generator, device) if noise is None else noise.to(device)

        def velocity(x: Tensor, step: int) -> Tensor:
            t = torch.full((x.shape[0],), step / num_steps, device=x.device)
            return self._velocity(model(x, t, **(model_kwargs or {})), x)

        for step in with_progress(range(num_steps), progress):
            slope = velocity(x, step)
            if method == "heun":
                slope = (slope + velocity(x + slope / num_steps, step + 1)) / 2
            x = x + slope / num_steps
        return x

    @staticmethod
    def _velocity(output: Tensor, x: Tensor) -> Tensor:
        c = x.shape[1]
        if output.shape[1] not in (c, 2 * c) or output.shape[2:] != x.shape[2:]:
            raise ValueError(
                f"the model must return {c} or {2 * c} channels of {tuple(x.shape[2:])}, got {tuple(output.shape)}"
            )
        output = output[:, :c]
        return output if output.dtype == torch.float64 else output.float()
