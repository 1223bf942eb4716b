"""Gaussian diffusion: what DiT is trained and sampled with, by default with noise prediction and a learned variance.

    q(x_t | x_0) = N(sqrt(acp_t) x_0, (1 - acp_t) I)                                     Ho et al. 2020, eq. 4
    loss = mean (eps - eps_hat)^2 + vb                                                   Nichol & Dhariwal 2021, eq. 16
    log variance = v' log beta_t + (1 - v') log posterior_variance_t,  v' = (v + 1) / 2  eq. 15

The mean in ``vb`` is held fixed: it teaches the variance only.

Names, arguments, keys and numbers of the methods are those of improved-diffusion and what came of it (guided-diffusion,
DiT), with two differences: ``clip_denoised`` is off unless it is asked for, and ``generator`` makes the noise per image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .noise import Generators, randn, with_progress
from .schedule import TABLES, make_betas, make_tables, respaced_steps

Model = Callable[..., Tensor]
TensorMap = Callable[[Tensor], Tensor]


class Prediction(dict[str, Tensor]):
    """What a model says about one step: ``mean``, ``variance``, ``log_variance`` of p(x_{t-1} | x_t), ``pred_xstart`` and
    ``eps``, each (N, C, H, W), as keys and as attributes."""

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class GaussianDiffusion:
    """Losses and samplers over a subset ``steps`` of the timesteps of a noise schedule.

    Timesteps given to the methods count within the subset, 0 .. num_timesteps - 1; the model always receives the
    original ones, so respacing needs no other change. A model is any callable ``model(x, t, **model_kwargs)`` that
    returns (N, 2C, H, W) with ``learn_sigma`` (noise, then v) and (N, C, H, W) without; ``model.forward_with_cfg`` is
    one. The other arguments are those of :func:`create_diffusion`.

    Options of what samples, everywhere the same:

    - ``clip_denoised`` (False) clamps the predicted x_0 to [-1, 1]: good for pixels, wrong for latents;
    - ``denoised_fn`` is applied to the predicted x_0 before that;
    - ``cond_fn(x, t, **model_kwargs)`` returns the gradient of log p(y | x_t) with respect to x (N, C, H, W), t being
      original timesteps, and guides the sample (Dhariwal & Nichol 2021); it takes its gradient under ``torch.enable_grad()``;
    - ``generator`` draws the noise: one, or a list with one per image; None: PyTorch's global one.

    Attributes: ``num_timesteps``, ``steps`` (original timesteps kept; the public code calls it ``timestep_map``, as a set
    ``use_timesteps``), ``betas`` (of the subset), ``original_betas``, ``original_num_steps``, and the
    arguments (``predict_xstart`` as ``predicts_xstart``).
    """

    def __init__(
        self,
        betas: Tensor,
        steps: Sequence[int] | None = None,
        learn_sigma: bool = True,
        *,
        use_kl: bool = False,
        sigma_small: bool = False,
        predict_xstart: bool = False,
        rescale_learned_sigmas: bool = False,
    ) -> None:
        if betas.dim() != 1 or not ((betas > 0) & (betas < 1)).all():
            raise ValueError("betas must be a vector of numbers between 0 and 1")
        self.original_betas = betas.double().cpu()
        self.original_num_steps = len(betas)
        self.learn_sigma, self.sigma_small, self.predicts_xstart = learn_sigma, sigma_small, predict_xstart
        self.use_kl, self.rescale_learned_sigmas = use_kl, rescale_learned_sigmas
        self.steps = sorted(set(range(len(betas)) if steps is None else steps))
        acp = torch.cumprod(1 - self.original_betas, dim=0)[self.steps]
        self.betas = 1 - acp / torch.cat([acp.new_ones(1), acp[:-1]])
        self.num_timesteps = len(self.steps)
        self._float64_tables = make_tables(self.betas)
        self._cache: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._step_cache: dict[torch.device, Tensor] = {}

    @property
    def timestep_map(self) -> list[int]:
        return self.steps

    @property
    def use_timesteps(self) -> set[int]:
        return set(self.steps)

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

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and log variance of q(x_t | x_0), each shaped like ``x_start`` (N, ...)."""
        std = self.table("sqrt_one_minus_acp", t, x_start).expand_as(x_start)
        return self.table("sqrt_acp", t, x_start) * x_start, std**2, 2 * std.log()

    def q_posterior_mean_variance(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and log variance of q(x_{t-1} | x_t, x_0), each shaped like ``x_t`` (N, ...).

        At t = 0 the variance is 0; its logarithm is there that of t = 1.
        """
        mean = self.table("posterior_mean_x0", t, x_t) * x_start + self.table("posterior_mean_xt", t, x_t) * x_t
        variance, log_variance = self.table("posterior_variance", t, x_t), self.table("log_variance_min", t, x_t)
        return mean, variance.expand_as(mean), log_variance.expand_as(mean)

    def training_losses(
        self,
        model: Model,
        x_start: Tensor,
        t: Tensor,
        model_kwargs: dict[str, Any] | None = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Losses per image, (N,) each, float32: ``loss``; ``mse`` and, with ``learn_sigma``, ``vb``.

        vb_t is one term of the variational bound in bits per dimension (:meth:`calc_bpd_loop`), n = ``num_timesteps``:

            loss = mse + vb,  vb = vb_t                by default: what DiT was trained with
            loss = mse + vb,  vb = vb_t n / 1000       ``rescale_learned_sigmas``: L_hybrid with lambda = 0.001, whose vb is
                                                       n vb_t = L_vlb on average (Nichol & Dhariwal 2021, eq. 16)
            loss = n vb_t                              ``use_kl``, and no other key: L_vlb

        At n = 1000 the first two are the same. The mse is that of the noise, or of x_0 with ``predict_xstart``; the mean in
        its vb takes no gradient, that of ``use_kl`` does.
        """
        noise = torch.randn_like(x_start) if noise is None else noise
        x_t = self.q_sample(x_start, t, noise)
        output, v = self._split(model(x_t, self.model_timesteps(t), **(model_kwargs or {})), x_start)
        if self.use_kl:
            return {"loss": self._vb_bits(x_start, x_t, t, noise, output, v) * self.num_timesteps}
        losses = {"mse": _mean_flat(((x_start if self.predicts_xstart else noise) - output) ** 2)}
        losses["loss"] = losses["mse"]
        if v is not None:
            losses["vb"] = self._vb_bits(x_start, x_t, t, noise, output.detach(), v)
            if self.rescale_learned_sigmas:
                losses["vb"] = losses["vb"] * (self.num_timesteps / 1000)
            losses["loss"] = losses["mse"] + losses["vb"]
        return losses

    def _vb_bits(
        self, x_start: Tensor, x_t: Tensor, t: Tensor, noise: Tensor, output: Tensor, v: Tensor | None
    ) -> Tensor:
        """vb_t (N,) of what the model made of ``x_t``."""
        # Both means are posterior means with another x_0, and x_0 errs by what eps errs times a known factor.
        factor, error = self.table("posterior_mean_x0", t, output), x_start - output
        if not self.predicts_xstart:
            factor, error = factor * self.table("sqrt_recip_acp_minus_one", t, output), noise - output
        pred_xstart = output if self.predicts_xstart else self.predict_xstart(x_t, t, output)
        return self._bound(x_start, t, pred_xstart, factor * error, self._log_variance(v, t, output))

    def _bound(self, x_start: Tensor, t: Tensor, pred_xstart: Tensor, difference: Tensor, log_var: Tensor) -> Tensor:
        """KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) in bits per dimension, (N,); at t = 0 -log p(x_0 | x_1).

        ``difference``: of the means of q and p. At t = 0 the mean of p is the predicted x_0.
        """
        kl = _normal_kl(difference, self.table("log_variance_min", t, log_var), log_var)
        nll = -discretized_gaussian_log_likelihood(x_start, pred_xstart, 0.5 * log_var)
        return torch.where(t == 0, _mean_flat(nll), _mean_flat(kl)) / math.log(2)

    def calc_bpd_loop(
        self,
        model: Model,
        x_start: Tensor,
        clip_denoised: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        *,
        progress: bool = False,
        generator: Generators = None,
    ) -> dict[str, Tensor]:
        """The variational bound on -log2 p(x_0) per dimension, all its terms, without gradients (Ho et al. 2020, eq. 5).

        ``x_start`` (N, C, H, W) are 8-bit values scaled to [-1, 1]. Returns ``total_bpd`` (N,), the sum of ``prior_bpd``
        (N,), KL(q(x_T | x_0) || N(0, I)), and ``vb`` (N, num_timesteps); and of the same shape as the latter the
        mean-squared errors ``xstart_mse`` of x_0 and ``mse`` of the noise. Columns run from t = num_timesteps - 1 down to 0.
        """
        terms: dict[str, list[Tensor]] = {"vb": [], "xstart_mse": [], "mse": []}
        with torch.no_grad():
            for i in with_progress(range(self.num_timesteps)[::-1], progress, "bound"):
                t = torch.full((x_start.shape[0],), i, device=x_start.device, dtype=torch.long)
                noise = randn(x_start.shape, generator, x_start.device, x_start.dtype)
                p = self.p_mean_variance(model, self.q_sample(x_start, t, noise), t, clip_denoised, None, model_kwargs)
                error = x_start - p.pred_xstart
                difference = self.table("posterior_mean_x0", t, x_start) * error
                terms["vb"].append(self._bound(x_start, t, p.pred_xstart, difference, p.log_variance))
                terms["xstart_mse"].append(_mean_flat(error**2))
                terms["mse"].append(_mean_flat((p.eps - noise) ** 2))
            last = torch.full((x_start.shape[0],), self.num_timesteps - 1, device=x_start.device, dtype=torch.long)
            mean, _, log_variance = self.q_mean_variance(x_start, last)
            prior = _mean_flat(_normal_kl(mean, log_variance, torch.zeros_like(mean))) / math.log(2)
        columns = {name: torch.stack(values, dim=1) for name, values in terms.items()}
        return {"total_bpd": columns["vb"].sum(1) + prior, "prior_bpd": prior, **columns}

    # ------------------------------------------------------------------------------------------------- sampling

    def predict_xstart(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_0 that x_t and the noise imply, (N, C, H, W)."""
        return self.table("sqrt_recip_acp", t, x_t) * x_t - self.table("sqrt_recip_acp_minus_one", t, x_t) * eps

    def predict_eps(self, x_t: Tensor, t: Tensor, x_start: Tensor) -> Tensor:
        """The noise that x_t and x_0 imply, (N, C, H, W)."""
        return (self.table("sqrt_recip_acp", t, x_t) * x_t - x_start) / self.table("sqrt_recip_acp_minus_one", t, x_t)

    def p_mean_variance(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = False,
        denoised_fn: TensorMap | None = None,
        model_kwargs: dict[str, Any] | None = None,
    ) -> Prediction:
        """The model's p(x_{t-1} | x_t) and the x_0 it stands on."""
        output, v = self._split(model(x, self.model_timesteps(t), **(model_kwargs or {})), x)
        x_start = output if self.predicts_xstart else self.predict_xstart(x, t, output)
        if denoised_fn is not None:
            x_start = denoised_fn(x_start)
        if clip_denoised:
            x_start = x_start.clamp(-1, 1)
        changed = self.predicts_xstart or clip_denoised or denoised_fn is not None
        log_variance = self._log_variance(v, t, x)
        small = v is None and self.sigma_small  # of which the logarithm at t = 0 is another's
        return Prediction(
            mean=self.q_posterior_mean_variance(x_start, x, t)[0],
            variance=self.table("posterior_variance", t, x).expand_as(x) if small else log_variance.exp(),
            log_variance=log_variance,
            pred_xstart=x_start,
            eps=self.predict_eps(x, t, x_start) if changed else output,
        )

    def condition_mean(
        self, cond_fn: Model, p_mean_var: Prediction, x: Tensor, t: Tensor, model_kwargs: dict[str, Any] | None = None
    ) -> Tensor:
        """The mean of p(x_{t-1} | x_t, y): mean + variance · cond_fn (Dhariwal & Nichol 2021, algorithm 1)."""
        return p_mean_var["mean"] + p_mean_var["variance"] * self._gradient(cond_fn, x, t, model_kwargs)

    def condition_score(
        self, cond_fn: Model, p_mean_var: Prediction, x: Tensor, t: Tensor, model_kwargs: dict[str, Any] | None = None
    ) -> Prediction:
        """``p_mean_var`` as of a model that knows y: eps - sqrt(1 - acp_t) · cond_fn (the same, algorithm 2, for DDIM)."""
        gradient = self._gradient(cond_fn, x, t, model_kwargs)
        eps = p_mean_var["eps"] - self.table("sqrt_one_minus_acp", t, x) * gradient
        x_start = self.predict_xstart(x, t, eps)
        mean = self.q_posterior_mean_variance(x_start, x, t)[0]
        return Prediction({**p_mean_var, "mean": mean, "pred_xstart": x_start, "eps": eps})

    def p_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = False,
        denoised_fn: TensorMap | None = None,
        cond_fn: Model | None = None,
        model_kwargs: dict[str, Any] | None = None,
        generator: Generators = None,
    ) -> dict[str, Tensor]:
        """One ancestral (DDPM) step: ``{"sample": x_{t-1}, "pred_xstart": x_0}``; no noise is added at t = 0."""
        p = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        mean = p.mean if cond_fn is None else self.condition_mean(cond_fn, p, x, t, model_kwargs)
        noise = randn(x.shape, generator, x.device, x.dtype) * _nonzero(t, x)
        return {"sample": mean + (0.5 * p.log_variance).exp() * noise, "pred_xstart": p.pred_xstart}

    def ddim_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = False,
        denoised_fn: TensorMap | None = None,
        cond_fn: Model | None = None,
        model_kwargs: dict[str, Any] | None = None,
        eta: float = 0.0,
        generator: Generators = None,
    ) -> dict[str, Tensor]:
        """One DDIM step (Song et al. 2021, eq. 12 and 16); ``eta`` 0 is deterministic, 1 has DDPM's noise."""
        p = self._ddim_prediction(model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs)
        acp, acp_prev = self.table("acp", t, x), self.table("acp_prev", t, x)
        sigma = eta * ((1 - acp_prev) / (1 - acp) * (1 - acp / acp_prev)).sqrt()
        sample = acp_prev.sqrt() * p.pred_xstart + (1 - acp_prev - sigma**2).clamp(min=0).sqrt() * p.eps
        if eta:
            sample = sample + sigma * _nonzero(t, x) * randn(x.shape, generator, x.device, x.dtype)
        return {"sample": sample, "pred_xstart": p.pred_xstart}

    def ddim_reverse_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = False,
        denoised_fn: TensorMap | None = None,
        cond_fn: Model | None = None,
        model_kwargs: dict[str, Any] | None = None,
        eta: float = 0.0,
    ) -> dict[str, Tensor]:
        """One DDIM step towards the noise, ``{"sample": x_{t+1}, "pred_xstart": x_0}`` (Song et al. 2021, eq. 14).

        Only the deterministic path can be gone back: another ``eta`` than 0 raises ``ValueError``.
        """
        if eta:
            raise ValueError(f"only eta=0 can be reversed, DDIM is random otherwise; got {eta}")
        p = self._ddim_prediction(model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs)
        acp_next = self.table("acp_next", t, x)
        return {
            "sample": acp_next.sqrt() * p.pred_xstart + (1 - acp_next).sqrt() * p.eps,
            "pred_xstart": p.pred_xstart,
        }

    def p_sample_loop(self, model: Model, shape: Sequence[int], noise: Tensor | None = None, **options: Any) -> Tensor:
        """Sample (N, C, H, W) by DDPM from x_T = ``noise`` (drawn if None), without gradients.

        Options: those of :meth:`p_sample`, ``device`` (None: of ``noise``, else of ``model`` where it is a module, else the
        CPU) and ``progress`` (a bar).
        """
        for out in self.p_sample_loop_progressive(model, shape, noise, **options):
            noise = out["sample"]
        return noise

    def p_sample_loop_progressive(
        self, model: Model, shape: Sequence[int], noise: Tensor | None = None, **options: Any
    ) -> Iterator[dict[str, Tensor]]:
        """What :meth:`p_sample` returns at each step; see :meth:`p_sample_loop`."""
        return self.sample_loop_progressive(self.p_sample, model, shape, noise, **options)

    def ddim_sample_loop(
        self, model: Model, shape: Sequence[int], noise: Tensor | None = None, eta: float = 0.0, **options: Any
    ) -> Tensor:
        """Sample by DDIM; options as for :meth:`p_sample_loop`."""
        for out in self.ddim_sample_loop_progressive(model, shape, noise, eta=eta, **options):
            noise = out["sample"]
        return noise

    def ddim_sample_loop_progressive(
        self, model: Model, shape: Sequence[int], noise: Tensor | None = None, eta: float = 0.0, **options: Any
    ) -> Iterator[dict[str, Tensor]]:
        """What :meth:`ddim_sample` returns at each step; see :meth:`p_sample_loop`."""
        return self.sample_loop_progressive(self.ddim_sample, model, shape, noise, eta=eta, **options)

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
        if noise is None and device is None and isinstance(model, nn.Module):
            device = next((p.device for p in model.parameters()), None)
        x = randn(shape, generator, device) if noise is None else noise.to(device)
        for i in with_progress(range(self.num_timesteps)[::-1], progress):
            t = torch.full((shape[0],), i, device=x.device, dtype=torch.long)
            with torch.no_grad():
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

    def _ddim_prediction(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool,
        denoised_fn: TensorMap | None,
        cond_fn: Model | None,
        model_kwargs: dict[str, Any] | None,
    ) -> Prediction:
        p = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        return p if cond_fn is None else self.condition_score(cond_fn, p, x, t, model_kwargs)

    def _gradient(self, cond_fn: Model, x: Tensor, t: Tensor, model_kwargs: dict[str, Any] | None) -> Tensor:
        gradient = cond_fn(x, self.model_timesteps(t), **(model_kwargs or {}))
        return gradient if gradient.dtype == torch.float64 else gradient.float()

    def _log_variance(self, v: Tensor | None, t: Tensor, like: Tensor) -> Tensor:
        """Of p(x_{t-1} | x_t), shaped like ``like``: between the two bounds as ``v`` says, or one of them without."""
        if v is None:
            return self.table("log_variance_min" if self.sigma_small else "log_variance_fixed", t, like).expand_as(like)
        fraction = (v + 1) / 2
        return fraction * self.table("log_variance_max", t, v) + (1 - fraction) * self.table("log_variance_min", t, v)


def create_diffusion(
    timestep_respacing: str | int | Sequence[int] | None = "",
    noise_schedule: str = "linear",
    use_kl: bool = False,
    sigma_small: bool = False,
    predict_xstart: bool = False,
    learn_sigma: bool = True,
    rescale_learned_sigmas: bool = False,
    diffusion_steps: int = 1000,
) -> GaussianDiffusion:
    """The diffusion of DiT: ``create_diffusion("")`` to train, ``create_diffusion("250")`` to sample in 250 steps.

    Arguments and their order are those of the public DiT code.

    Args:
        timestep_respacing: which steps are kept, see :func:`~difffit_fast.diffusion.schedule.respaced_steps`.
        noise_schedule: see :func:`~difffit_fast.diffusion.schedule.make_betas`.
        use_kl: train on the variational bound alone; goes before ``rescale_learned_sigmas``.
        sigma_small: without ``learn_sigma``, the variance of a step is the posterior's and not beta_t.
        predict_xstart: the model predicts x_0 and not the noise.
        learn_sigma: the model also predicts a variance, in as many channels again.
        rescale_learned_sigmas: weigh ``vb`` by the number of steps, see :meth:`GaussianDiffusion.training_losses`.
        diffusion_steps: of the whole schedule.

    Raises:
        ValueError: an unknown schedule, or steps that cannot be kept.
    """
    betas = make_betas(noise_schedule, diffusion_steps)
    return GaussianDiffusion(
        betas, respaced_steps(diffusion_steps, timestep_respacing), learn_sigma, use_kl=use_kl, sigma_small=sigma_small,
        predict_xstart=predict_xstart, rescale_learned_sigmas=rescale_learned_sigmas,
    )  # fmt: skip


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
