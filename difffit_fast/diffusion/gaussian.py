"""Gaussian diffusion with noise prediction and a learned variance: what DiT is trained and sampled with.

    q(x_t | x_0) = N(sqrt(acp_t) x_0, (1 - acp_t) I)                                     Ho et al. 2020, eq. 4
    loss = mean (eps - eps_hat)^2 + vb                                                   Nichol & Dhariwal 2021, eq. 16
    log variance = v' log beta_t + (1 - v') log posterior_variance_t,  v' = (v + 1) / 2  eq. 15

The mean in ``vb`` is held fixed: it teaches the variance only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .noise import Generators, randn, with_progress
from .schedule import TABLES, make_betas, make_tables, respaced_steps

Model = Callable[..., Tensor]


class Prediction(NamedTuple):
    """What a model says about one step; images are (N, C, H, W)."""

    mean: Tensor
    log_variance: Tensor
    pred_xstart: Tensor
    eps: Tensor


class GaussianDiffusion:
    """Losses and samplers over a subset ``steps`` of the timesteps of a noise schedule.

    Timesteps given to the methods count within the subset, 0 .. num_timesteps - 1; the model always receives the
    original ones, so respacing needs no other change. A model is any callable ``model(x, t, **model_kwargs)`` that
    returns (N, 2C, H, W) with ``learn_sigma`` (noise, then v) and (N, C, H, W) without; ``model.forward_with_cfg`` is
    one.

    Attributes: ``num_timesteps``, ``steps`` (original timesteps kept), ``betas`` (of the subset), ``original_betas``,
    ``original_num_steps``, ``learn_sigma``.
    """

    def __init__(self, betas: Tensor, steps: Sequence[int] | None = None, learn_sigma: bool = True) -> None:
        if betas.dim() != 1 or not ((betas > 0) & (betas < 1)).all():
            raise ValueError("betas must be a vector of numbers between 0 and 1")
        self.original_betas = betas.double().cpu()
        self.original_num_steps = len(betas)
        self.learn_sigma = learn_sigma
        self.steps = sorted(set(range(len(betas)) if steps is None else steps))
        acp = torch.cumprod(1 - self.original_betas, dim=0)[self.steps]
        self.betas = 1 - acp / torch.cat([acp.new_ones(1), acp[:-1]])
        self.num_timesteps = len(self.steps)
        self._float64_tables = make_tables(self.betas)
        self._cache: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._step_cache: dict[torch.device, Tensor] = {}

    def table(self, name: str, t: Tensor, like: Tensor) -> Tensor:
        """Row ``name`` of the tables at ``t`` (N,), shaped to broadcast over ``like`` (N, ...); float32 or float64."""
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        key = (like.device, dtype)
        if key not in self._cache:
            with torch.inference_mode(False):  # what is kept must serve training later
                self._cache[key] = self._float64_tables.to(like.device, dtype)
        return self._cache[key][TABLES.index(name)][t].view(-1, *[1] * (like.dim() - 1))

    def model_timesteps(self, t: Tensor) -> Tensor:
        """Positions in the subset -> the timesteps that the model knows."""
        if self.num_timesteps == self.original_num_steps:
            return t
        if t.device not in self._step_cache:
            with torch.inference_mode(False):
                self._step_cache[t.device] = torch.tensor(self.steps, device=t.device)
        return self._step_cache[t.device][t]

    # ------------------------------------------------------------------------------------------------- training

    def sample_timesteps(
        self, n: int, device: torch.device | str | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Uniform timesteps (n,) long, drawn where ``generator`` lives."""
        source = generator.device if generator is not None else device
        return torch.randint(0, self.num_timesteps, (n,), generator=generator, device=source).to(device or source)

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """x_t (N, ...) from x_0: sqrt(acp_t) x_0 + sqrt(1 - acp_t) noise."""
        noise = torch.randn_like(x_start) if noise is None else noise
        return self.table("sqrt_acp", t, x_start) * x_start + self.table("sqrt_one_minus_acp", t, x_start) * noise

    def q_posterior(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of q(x_{t-1} | x_t, x_0)."""
        mean = self.table("posterior_mean_x0", t, x_t) * x_start + self.table("posterior_mean_xt", t, x_t) * x_t
        return mean, self.table("log_variance_min", t, x_t).expand_as(mean)

    def training_losses(
        self,
        model: Model,
        x_start: Tensor,
        t: Tensor,
        model_kwargs: dict[str, Any] | None = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Losses per image, (N,) each, float32: ``loss = mse + vb``; ``mse`` and, with ``learn_sigma``, ``vb``.

        ``vb`` is one term of the variational bound in bits per dimension times num_timesteps / 1000, which makes its
        sum over the steps weigh 0.001 against the mean-squared error, as DiT was trained.
        """
        noise = torch.randn_like(x_start) if noise is None else noise
        x_t = self.q_sample(x_start, t, noise)
        eps, v = self._split(model(x_t, self.model_timesteps(t), **(model_kwargs or {})), x_start)
        losses = {"mse": _mean_flat((noise - eps) ** 2)}
        losses["loss"] = losses["mse"]
        if v is not None:
            losses["vb"] = self._vb_bits(x_start, x_t, t, noise, eps.detach(), v) * (self.num_timesteps / 1000)
            losses["loss"] = losses["mse"] + losses["vb"]
        return losses

    def _vb_bits(self, x_start: Tensor, x_t: Tensor, t: Tensor, noise: Tensor, eps: Tensor, v: Tensor) -> Tensor:
        """KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) in bits per dimension, (N,); at t = 0 -log p(x_0 | x_1)."""
        log_var = self._log_variance(v, t)
        log_q = self.table("log_variance_min", t, v)
        # Both means are posterior means with another x_0, and x_0 errs by what eps errs times a known factor.
        factor = self.table("posterior_mean_x0", t, v) * self.table("sqrt_recip_acp_minus_one", t, v)
        kl = _normal_kl(factor * (noise - eps), log_q, log_var)
        nll = -discretized_gaussian_log_likelihood(x_start, self.predict_xstart(x_t, t, eps), 0.5 * log_var)
        return torch.where(t == 0, _mean_flat(nll), _mean_flat(kl)) / math.log(2)

    # ------------------------------------------------------------------------------------------------- sampling

    def predict_xstart(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_0 that x_t and the noise imply."""
        return self.table("sqrt_recip_acp", t, x_t) * x_t - self.table("sqrt_recip_acp_minus_one", t, x_t) * eps

    def p_mean_variance(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = False,
        model_kwargs: dict[str, Any] | None = None,
    ) -> Prediction:
        """The model's p(x_{t-1} | x_t). ``clip_denoised`` clamps x_0 to [-1, 1]: good for pixels, wrong for latents."""
        eps, v = self._split(model(x, self.model_timesteps(t), **(model_kwargs or {})), x)
        log_var = self.table("log_variance_fixed", t, x).expand_as(x) if v is None else self._log_variance(v, t)
        x_start = self.predict_xstart(x, t, eps)
        if clip_denoised:
            x_start = x_start.clamp(-1, 1)
            eps = (self.table("sqrt_recip_acp", t, x) * x - x_start) / self.table("sqrt_recip_acp_minus_one", t, x)
        return Prediction(self.q_posterior(x_start, x, t)[0], log_var, x_start, eps)

    def p_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        generator: Generators = None,
    ) -> dict[str, Tensor]:
        """One ancestral (DDPM) step: ``{"sample": x_{t-1}, "pred_xstart": x_0}``; no noise is added at t = 0."""
        p = self.p_mean_variance(model, x, t, clip_denoised, model_kwargs)
        noise = randn(x.shape, generator, x.device, x.dtype) * _nonzero(t, x)
        return {"sample": p.mean + (0.5 * p.log_variance).exp() * noise, "pred_xstart": p.pred_xstart}

    def ddim_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        generator: Generators = None,
        eta: float = 0.0,
    ) -> dict[str, Tensor]:
        """One DDIM step (Song et al. 2021, eq. 12 and 16); ``eta`` 0 is deterministic, 1 has DDPM's noise."""
        p = self.p_mean_variance(model, x, t, clip_denoised, model_kwargs)
        acp, acp_prev = self.table("acp", t, x), self.table("acp_prev", t, x)
        sigma = eta * ((1 - acp_prev) / (1 - acp) * (1 - acp / acp_prev)).sqrt()
        sample = acp_prev.sqrt() * p.pred_xstart + (1 - acp_prev - sigma**2).clamp(min=0).sqrt() * p.eps
        if eta:
            sample = sample + sigma * _nonzero(t, x) * randn(x.shape, generator, x.device, x.dtype)
        return {"sample": sample, "pred_xstart": p.pred_xstart}

    def p_sample_loop(self, model: Model, shape: Sequence[int], noise: Tensor | None = None, **options: Any) -> Tensor:
        """Sample (N, C, H, W) by DDPM from x_T = ``noise`` (drawn if None).

        Options: ``clip_denoised`` (False), ``model_kwargs``, ``device`` (of ``noise``, else the CPU), ``progress`` (a
        bar), ``generator`` (one, or one per image). Call it under ``torch.no_grad()``.
        """
        for out in self.sample_loop_progressive(self.p_sample, model, shape, noise, **options):
            noise = out["sample"]
        return noise

    def ddim_sample_loop(
        self, model: Model, shape: Sequence[int], noise: Tensor | None = None, eta: float = 0.0, **options: Any
    ) -> Tensor:
        """Sample by DDIM; options as for :meth:`p_sample_loop`."""
        for out in self.sample_loop_progressive(self.ddim_sample, model, shape, noise, eta=eta, **options):
            noise = out["sample"]
        return noise

    def sample_loop_progressive(
        self,
        step: Callable[..., dict[str, Tensor]],
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        *,
        device: torch.device | str | None = None,
        progress: bool = False,
        generator: Generators = None,
        **options: Any,
    ) -> Iterator[dict[str, Tensor]]:
        """Yield what ``step`` (:meth:`p_sample` or :meth:`ddim_sample`) returns, t from num_timesteps - 1 down to 0."""
        if noise is not None and tuple(noise.shape) != tuple(shape):
            raise ValueError(f"noise must have the shape {tuple(shape)}, got {tuple(noise.shape)}")
        x = randn(shape, generator, device) if noise is None else noise.to(device)
        for i in with_progress(range(self.num_timesteps)[::-1], progress):
            t = torch.full((shape[0],), i, device=x.device, dtype=torch.long)
            out = step(model, x, t, generator=generator, **options)
            yield out
            x = out["sample"]

    # -------------------------------------------------------------------------------------------------- helpers

    def _split(self, output: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Model output -> noise and v (None without learn_sigma), in float32 or more."""
        channels = x.shape[1] * (2 if self.learn_sigma else 1)
        if output.shape != (x.shape[0], channels, *x.shape[2:]):
            raise ValueError(
                f"with learn_sigma={self.learn_sigma} the model must return {(x.shape[0], channels, *x.shape[2:])}, "
                f"got {tuple(output.shape)}"
            )
        output = output if output.dtype == torch.float64 else output.float()
        if not self.learn_sigma:
            return output, None
        eps, v = output.chunk(2, dim=1)
        return eps, v

    def _log_variance(self, v: Tensor, t: Tensor) -> Tensor:
        fraction = (v + 1) / 2
        return fraction * self.table("log_variance_max", t, v) + (1 - fraction) * self.table("log_variance_min", t, v)


def create_diffusion(
    timestep_respacing: str | int | Sequence[int] | None = "",
    noise_schedule: str = "linear",
    learn_sigma: bool = True,
    diffusion_steps: int = 1000,
) -> GaussianDiffusion:
    """The diffusion of DiT: ``create_diffusion()`` to train, ``create_diffusion("250")`` to sample in 250 steps.

    See :func:`~difffit_fast.diffusion.schedule.respaced_steps` for ``timestep_respacing`` and
    :func:`~difffit_fast.diffusion.schedule.make_betas` for ``noise_schedule``.
    """
    betas = make_betas(noise_schedule, diffusion_steps)
    return GaussianDiffusion(betas, respaced_steps(diffusion_steps, timestep_respacing), learn_sigma)


def discretized_gaussian_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log probability of 8-bit values x (scaled to [-1, 1]) under a normal distribution cut into 256 bins.

    The outermost bins reach to infinity. The normal distribution function is the tanh approximation that the published
    models were trained with (Page 1977), off by at most 2e-4.
    """
    inverse_std = torch.exp(-log_std)
    upper = _normal_cdf(inverse_std * (x - mean + 1 / 255))
    lower = _normal_cdf(inverse_std * (x - mean - 1 / 255))
    probability = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return probability.clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _normal_kl(difference: Tensor, log_var_q: Tensor, log_var_p: Tensor) -> Tensor:
    """KL in nats between normals whose means differ by ``difference``."""
    return 0.5 * (log_var_p - log_var_q - 1 + torch.exp(log_var_q - log_var_p) + difference**2 * torch.exp(-log_var_p))


def _mean_flat(x: Tensor) -> Tensor:
    return x.flatten(1).mean(1)


def _nonzero(t: Tensor, like: Tensor) -> Tensor:
    return (t != 0).to(like.dtype).view(-1, *[1] * (like.dim() - 1))
