"""Flow matching on the straight path between noise and data: what SiT is trained and sampled with.

    x_t = t x_1 + (1 - t) x_0,   x_0 ~ N(0, I) noise, x_1 data, t in [0, 1]
    velocity = dx_t / dt = x_1 - x_0;   loss = mean (velocity - model)^2

(Lipman et al. 2023; Ma et al. 2024, "SiT".) Sampling goes from t = 0 (noise) to t = 1 (data), along dx/dt = model(x, t) or
along a stochastic equation with the same distribution at every t.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .dopri5 import integrate
from .noise import Generators, randn, with_progress

METHODS = ("euler", "heun")
SAMPLERS = (*METHODS, "dopri5", "sde")


class FlowMatching:
    """Losses and samplers. A model is a callable ``model(x, t, **model_kwargs)`` with t (N,) float in [0, 1].

    It returns the velocity (N, C, H, W), as a :class:`~difffit_fast.models.dit.DiT` with ``objective="flow"`` does. SiT
    checkpoints have DiT's keys and its doubled output channels: of a model that returns all 2C, the second half is dropped here.

    The loops take ``noise`` (drawn if None), ``model_kwargs``, ``device``, ``progress`` (a bar) and ``generator`` (one, or one
    per image). Call them under ``torch.no_grad()``.
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

        ``"euler"`` calls the model once a step (first order), ``"heun"`` twice (second order).
        """
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
        if num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {num_steps}")
        x = randn(shape, generator, device) if noise is None else noise.to(device)

        def velocity(x: Tensor, step: int) -> Tensor:
            return self._velocity(model(x, _times(x, step / num_steps), **(model_kwargs or {})), x)

        for step in with_progress(range(num_steps), progress):
            slope = velocity(x, step)
            if method == "heun":
                slope = (slope + velocity(x + slope / num_steps, step + 1)) / 2
            x = x + slope / num_steps
        return x

    def dopri5_sample_loop(
        self,
        model: Callable[..., Tensor],
        shape: Sequence[int],
        noise: Tensor | None = None,
        *,
        rtol: float = 1e-3,
        atol: float = 1e-6,
        max_steps: int = 1000,
        model_kwargs: dict[str, Any] | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        generator: Generators = None,
    ) -> Tensor:
        """Sample (N, C, H, W) by Dormand-Prince 5(4) in as many steps as the tolerances ask for, six calls each.

        The tolerances are the public SiT code's; the error is that of each image, see
        :func:`~difffit_fast.diffusion.dopri5.integrate`. So an image does not depend on the batch it is in, but for the last
        bits of the model's arithmetic; where these decide whether a step is good enough, it differs within the tolerances.

        Raises:
            ValueError: a tolerance that is not positive.
            DiffFitError: an image did not arrive in ``max_steps`` steps.
        """
        if not (rtol > 0 and atol > 0):
            raise ValueError(f"rtol and atol must be positive, got {rtol} and {atol}")
        x = randn(shape, generator, device) if noise is None else noise.to(device)

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            return self._velocity(model(x, t, **(model_kwargs or {})), x)

        return integrate(velocity, x, rtol, atol, max_steps, progress)

    def sde_sample_loop(
        self,
        model: Callable[..., Tensor],
        shape: Sequence[int],
        noise: Tensor | None = None,
        *,
        num_steps: int = 250,
        diffusion_norm: float = 1.0,
        last_step_size: float = 0.04,
        model_kwargs: dict[str, Any] | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        generator: Generators = None,
    ) -> Tensor:
        """Sample (N, C, H, W) by Euler-Maruyama from the stochastic equation of SiT (Ma et al. 2024, section 2.3):

            dx = (v + w score) dt + sqrt(2 w) dW,   score = (t v - x) / (1 - t) = -E[x_0 | x_t] / (1 - t),   w = norm (1 - t)

        with v the model's velocity, so that the drift is v + norm (t v - x), finite at both ends. Its choices are the public
        code's, whose published numbers it gives: diffusion form "sigma", norm 1, and a last step without noise ("Mean"), of the
        size 0.04. The model is called ``num_steps`` times: at as many equal distances from t = 0 to 1 - ``last_step_size``,
        ends included; noise is drawn after each but the last. A single step is the last one, and of the size 1.

        Raises:
            ValueError: a number out of bounds.
        """
        if num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {num_steps}")
        if not (0 < last_step_size < 1 and diffusion_norm >= 0):
            raise ValueError(
                "last_step_size must lie between 0 and 1 and diffusion_norm must not be negative, got "
                f"{last_step_size} and {diffusion_norm}"
            )
        x = randn(shape, generator, device) if noise is None else noise.to(device)
        last = last_step_size if num_steps > 1 else 1.0
        stride = (1 - last) / max(num_steps - 1, 1)

        def drift(x: Tensor, t: float) -> Tensor:
            v = self._velocity(model(x, _times(x, t), **(model_kwargs or {})), x)
            return v + diffusion_norm * (t * v - x)

        for step in with_progress(range(num_steps - 1), progress):
            t = step * stride
            spread = math.sqrt(2 * diffusion_norm * (1 - t) * stride)
            x = x + stride * drift(x, t) + spread * randn(x.shape, generator, x.device, x.dtype)
        return x + last * drift(x, 1 - last)

    @staticmethod
    def _velocity(output: Tensor, x: Tensor) -> Tensor:
        c = x.shape[1]
        if output.shape[1] not in (c, 2 * c) or output.shape[2:] != x.shape[2:]:
            raise ValueError(
                f"the model must return {c} or {2 * c} channels of {tuple(x.shape[2:])}, got {tuple(output.shape)}"
            )
        output = output[:, :c]
        return output if output.dtype == torch.float64 else output.float()


def _times(x: Tensor, t: float) -> Tensor:
    return torch.full((x.shape[0],), t, device=x.device)
