"""What people call on the diffusion of the public DiT code: the same steps and numbers, against NumPy in float64.

``World`` is written from the papers' formulas (DDPM: Ho et al. 2020; improved DDPM: Nichol & Dhariwal 2021; DDIM: Song et al.
2021; guidance: Dhariwal & Nichol 2021) and from what is known of improved-diffusion's choices, in scalars and without tables.
"""

from __future__ import annotations

import inspect
import itertools
import math
import random

import numpy as np
import pytest
import torch

from difffit_fast.diffusion import create_diffusion
from difffit_fast.diffusion.schedule import respaced_steps

F64 = torch.float64
RESPACINGS = ["", "250", "ddim25", "10,15,20", "7", "2", "1"]


# ------------------------------------------------------------------------------------------------------------ steps


def kept(total: int, counts: list[int]) -> set[int]:
    """Equal sections, the first ones longer by one where there is a rest; each walked from its first step with a fixed
    fractional stride, whose running sum is rounded half to even."""
    bounds = [0, *itertools.accumulate(total // len(counts) + (i < total % len(counts)) for i in range(len(counts)))]
    steps: set[int] = set()
    for first, end, count in zip(bounds, bounds[1:], counts, strict=False):
        stride = (end - first - 1) / (count - 1) if count > 1 else 1
        walk = itertools.islice(itertools.accumulate(itertools.repeat(stride), initial=0.0), count)
        steps |= {first + round(position) for position in walk}
    return steps


def test_every_count_keeps_the_public_steps() -> None:
    other = 0
    for count in range(1, 1001):
        steps = respaced_steps(1000, str(count))
        assert len(steps) == count and steps == sorted(kept(1000, [count]))
        stride = 999 / (count - 1) if count > 1 else 1
        other += steps != [round(i * stride) for i in range(count)]
    assert other == 278  # so many would keep other steps if positions were not added up


def test_other_totals_and_lists_keep_the_public_steps() -> None:
    pick = random.Random(0)
    for _ in range(2000):
        total, parts = pick.randint(1, 1500), pick.randint(1, 6)
        parts = min(parts, total)
        counts = [pick.randint(0, total // parts) for _ in range(parts)]
        if any(counts):
            steps = respaced_steps(total, ",".join(map(str, counts)))
            assert steps == sorted(kept(total, counts)) == respaced_steps(total, counts)
    assert create_diffusion("0,10").steps[0] == 500


def test_every_fixed_stride_keeps_the_public_steps() -> None:
    strides = {len(range(0, 1000, stride)): stride for stride in range(999, 0, -1)}  # the smallest wins
    for count in range(2, 1001):
        if count in strides:
            assert respaced_steps(1000, f"ddim{count}") == list(range(0, 1000, strides[count]))
        else:
            with pytest.raises(ValueError, match="no fixed stride"):
                respaced_steps(1000, f"ddim{count}")


def test_names_of_the_public_code() -> None:
    arguments = inspect.signature(create_diffusion).parameters
    assert list(arguments) == [
        "timestep_respacing", "noise_schedule", "use_kl", "sigma_small", "predict_xstart", "learn_sigma",
        "rescale_learned_sigmas", "diffusion_steps",
    ]  # fmt: skip
    assert {name: p.default for name, p in arguments.items() if name != "timestep_respacing"} == dict(
        noise_schedule="linear", use_kl=False, sigma_small=False, predict_xstart=False, learn_sigma=True,
        rescale_learned_sigmas=False, diffusion_steps=1000,
    )  # fmt: skip
    diffusion = create_diffusion("ddim25")
    assert diffusion.num_timesteps == 25 and diffusion.timestep_map == list(range(0, 1000, 40))
    assert diffusion.use_timesteps == set(diffusion.timestep_map)


# -------------------------------------------------------------------------------------------------------- reference


class World:
    """One step t of a respaced linear schedule, in floats."""

    def __init__(self, respacing: str, t: int) -> None:
        acp = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[create_diffusion(respacing).steps]
        self.t, self.n = t, len(acp)
        self.a, self.a_prev = acp[t], acp[t - 1] if t else 1.0
        self.a_next = acp[t + 1] if t + 1 < self.n else 0.0
        self.beta = 1 - self.a / self.a_prev
        self.variance = self.beta * (1 - self.a_prev) / (1 - self.a)
        self.clipped = self.variance
        if t == 0:  # no variance: that of the next step stands in for its logarithm, or beta where there is no next
            beta = 1 - acp[1] / acp[0] if self.n > 1 else 0.0
            self.clipped = beta * (1 - acp[0]) / (1 - acp[1]) if self.n > 1 else self.beta

    def noised(self, x0, noise):
        return math.sqrt(self.a) * x0 + math.sqrt(1 - self.a) * noise

    def x0(self, xt, eps):
        return (xt - math.sqrt(1 - self.a) * eps) / math.sqrt(self.a)

    def eps(self, xt, x0):
        return (xt - math.sqrt(self.a) * x0) / math.sqrt(1 - self.a)

    def posterior_mean(self, x0, xt):
        alpha = 1 - self.beta
        return (math.sqrt(self.a_prev) * self.beta * x0 + math.sqrt(alpha) * (1 - self.a_prev) * xt) / (1 - self.a)

    def log_variance(self, v, small):
        if v is not None:
            return (v + 1) / 2 * math.log(self.beta) + (1 - v) / 2 * math.log(self.clipped)
        return math.log(self.clipped if small or self.t == 0 else self.beta)

    def bits(self, x0, xt, pred, log_var):
        """The term of the bound, of one image."""
        if self.t:
            difference = self.posterior_mean(x0, xt) - self.posterior_mean(pred, xt)
            ratio = self.variance / np.exp(log_var)
            nats = 0.5 * (ratio - 1 - np.log(ratio) + difference**2 / np.exp(log_var))
        else:

            def cdf(x):
                return 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

            std = np.exp(log_var / 2)
            upper = np.where(x0 > 0.999, 1, cdf((x0 - pred + 1 / 255) / std))
            lower = np.where(x0 < -0.999, 0, cdf((x0 - pred - 1 / 255) / std))
            nats = -np.log(np.maximum(upper - lower, 1e-12))
        return nats.mean() / math.log(2)


def batch(respacing: str, channels: int = 2) -> tuple[torch.Tensor, ...]:
    """Data (with values in the outermost bins), noise, a model's outputs, and t: the first, the last, some between."""
    n = create_diffusion(respacing).num_timesteps
    t = torch.tensor([0, min(1, n - 1), n // 3, n // 2, n - 1])
    g = torch.Generator().manual_seed(0)
    shape = (len(t), channels, 3, 3)
    x = (torch.randn(shape, generator=g, dtype=F64) * 0.7).clamp(-1, 1)
    noise = torch.randn(shape, generator=g, dtype=F64)
    output = torch.randn(shape, generator=g, dtype=F64)
    v = torch.rand(shape, generator=g, dtype=F64) * 2.4 - 1.2
    return x, noise, output, v, t


@pytest.mark.parametrize("learn_sigma", [True, False])
@pytest.mark.parametrize("predict_xstart", [True, False])
@pytest.mark.parametrize(("use_kl", "rescale"), [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("sigma_small", [True, False])
@pytest.mark.parametrize("respacing", RESPACINGS)
def test_losses(respacing, sigma_small, use_kl, rescale, predict_xstart, learn_sigma) -> None:
    diffusion = create_diffusion(
        respacing, use_kl=use_kl, sigma_small=sigma_small, predict_xstart=predict_xstart, learn_sigma=learn_sigma,
        rescale_learned_sigmas=rescale,
    )  # fmt: skip
    x, noise, output, v, t = batch(respacing)
    output = output * 0.1 + (x if predict_xstart else noise)

    def model(x_t, steps, y):
        assert steps.tolist() == [diffusion.steps[i] for i in t] and y == 7
        return torch.cat([output, v], 1) if learn_sigma else output

    losses = diffusion.training_losses(model, x, t, dict(y=7), noise)
    assert set(losses) == ({"loss"} if use_kl else {"loss", "mse", "vb"} if learn_sigma else {"loss", "mse"})
    for i, step in enumerate(t.tolist()):
        world = World(respacing, step)
        x0, e, out = x[i].numpy(), noise[i].numpy(), output[i].numpy()
        xt = world.noised(x0, e)
        pred = out if predict_xstart else world.x0(xt, out)
        bits = world.bits(x0, xt, pred, world.log_variance(v[i].numpy() if learn_sigma else None, sigma_small))
        found = {key: value[i].item() for key, value in losses.items()}
        if use_kl:
            assert found["loss"] == pytest.approx(bits * world.n, rel=1e-8, abs=1e-12)
            continue
        mse = ((out - (x0 if predict_xstart else e)) ** 2).mean()
        assert found["mse"] == pytest.approx(mse, rel=1e-12)
        vb = bits * (world.n / 1000 if rescale else 1) if learn_sigma else 0.0
        assert found.get("vb", 0.0) == pytest.approx(vb, rel=1e-8, abs=1e-12)
        assert found["loss"] == pytest.approx(mse + vb, rel=1e-8)


def test_at_a_thousand_steps_the_scale_of_the_bound_is_one_to_the_bit() -> None:
    x, noise, output, v, t = (part.float() if part.is_floating_point() else part for part in batch(""))
    plain, rescaled = (
        create_diffusion("", rescale_learned_sigmas=rescale).training_losses(
            lambda x, t: torch.cat([output, v], 1), x, t, None, noise
        )
        for rescale in (False, True)
    )
    assert all(torch.equal(plain[key], rescaled[key]) for key in ("loss", "mse", "vb"))


@pytest.mark.parametrize("predict_xstart", [True, False])
def test_what_each_loss_teaches(predict_xstart) -> None:
    """The bound beside the squared error teaches the variance, the bound alone the mean as well; by finite differences."""
    x, noise, output, v, t = batch("50")
    output = (output * 0.1 + (x if predict_xstart else noise)).requires_grad_()
    v = v.requires_grad_()

    def losses(use_kl: bool, shift: torch.Tensor | float = 0.0):
        diffusion = create_diffusion("50", use_kl=use_kl, predict_xstart=predict_xstart)
        return diffusion.training_losses(lambda x, t: torch.cat([output + shift, v], 1), x, t, None, noise)

    means, variances = torch.autograd.grad(losses(False)["vb"].sum(), [output, v], allow_unused=True)
    assert (means is None or not means.any()) and variances.any()
    means, variances = torch.autograd.grad(losses(True)["loss"].sum(), [output, v])
    direction = torch.randn(output.shape, dtype=F64, generator=torch.Generator().manual_seed(1))
    step = 1e-6
    slope = (losses(True, step * direction)["loss"] - losses(True, -step * direction)["loss"]).sum() / (2 * step)
    torch.testing.assert_close((means * direction).sum(), slope, rtol=1e-5, atol=1e-5)
    assert variances.any()


@pytest.mark.parametrize("respacing", RESPACINGS)
def test_what_is_known_of_a_step(respacing) -> None:
    diffusion = create_diffusion(respacing)
    x, noise, *_, t = batch(respacing)
    x_t = diffusion.q_sample(x, t, noise)
    q = diffusion.q_mean_variance(x, t)
    posterior = diffusion.q_posterior_mean_variance(x, x_t, t)
    assert all(part.shape == x.shape for part in (*q, *posterior))
    for i, step in enumerate(t.tolist()):
        world = World(respacing, step)
        x0, xt = x[i].numpy(), world.noised(x[i].numpy(), noise[i].numpy())
        ones = np.ones_like(x0)
        np.testing.assert_allclose(x_t[i], xt, rtol=1e-12)
        expected = math.sqrt(world.a) * x0, (1 - world.a) * ones, math.log(1 - world.a) * ones
        for ours, theirs in zip(q, expected, strict=True):
            np.testing.assert_allclose(ours[i], theirs, rtol=1e-9)
        expected = world.posterior_mean(x0, xt), world.variance * ones, math.log(world.clipped) * ones
        for ours, theirs in zip(posterior, expected, strict=True):
            np.testing.assert_allclose(ours[i], theirs, rtol=1e-8, atol=1e-14)


def close(ours: torch.Tensor, theirs: np.ndarray, what: tuple) -> None:
    scale = max(1.0, np.abs(theirs).max())
    np.testing.assert_allclose(ours, theirs, rtol=1e-7, atol=1e-9 * scale, err_msg=str(what))


def halve(x: torch.Tensor) -> torch.Tensor:
    return x / 2 + 0.1


def pull(x: torch.Tensor, t: torch.Tensor, y: float) -> torch.Tensor:
    """A gradient that depends on the step that the model knows."""
    return (y - x) * (1 + t.to(x.dtype).view(-1, 1, 1, 1) / 1000)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("denoised_fn", [None, halve])
@pytest.mark.parametrize("cond_fn", [None, pull])
@pytest.mark.parametrize("learn_sigma, sigma_small", [(True, False), (False, False), (False, True)])
@pytest.mark.parametrize("predict_xstart", [True, False])
@pytest.mark.parametrize("respacing", ["", "50", "7", "1"])
def test_steps_of_the_samplers(respacing, predict_xstart, learn_sigma, sigma_small, cond_fn, denoised_fn, clip) -> None:
    diffusion = create_diffusion(
        respacing, predict_xstart=predict_xstart, learn_sigma=learn_sigma, sigma_small=sigma_small
    )
    _, noise, output, v, t = batch(respacing)
    x_t = noise * 1.3
    options = dict(clip_denoised=clip, denoised_fn=denoised_fn, model_kwargs=dict(y=0.5))

    def model(x, steps, y):
        return torch.cat([output, v], 1) if learn_sigma else output

    def generator():
        return torch.Generator().manual_seed(5)

    drawn = torch.randn(x_t.shape, generator=generator(), dtype=F64).numpy()
    p = diffusion.p_mean_variance(model, x_t, t, **options)
    assert list(p) == ["mean", "variance", "log_variance", "pred_xstart", "eps"] and p.mean is p["mean"]
    ancestral = diffusion.p_sample(model, x_t, t, cond_fn=cond_fn, generator=generator(), **options)
    ddim = {
        eta: diffusion.ddim_sample(model, x_t, t, cond_fn=cond_fn, eta=eta, generator=generator(), **options)
        for eta in (0.0, 0.7)
    }
    reverse = diffusion.ddim_reverse_sample(model, x_t, t, cond_fn=cond_fn, **options)
    for i, step in enumerate(t.tolist()):
        world = World(respacing, step)
        xt, out = x_t[i].numpy(), output[i].numpy()
        pred = out if predict_xstart else world.x0(xt, out)
        pred = pred if denoised_fn is None else pred / 2 + 0.1
        pred = np.clip(pred, -1, 1) if clip else pred
        log_var = world.log_variance(v[i].numpy() if learn_sigma else None, sigma_small) * np.ones_like(xt)
        variance = np.full_like(xt, world.variance) if not learn_sigma and sigma_small else np.exp(log_var)
        mean, eps = world.posterior_mean(pred, xt), world.eps(xt, pred)

        for key, theirs in dict(mean=mean, variance=variance, log_variance=log_var, pred_xstart=pred, eps=eps).items():
            close(p[key][i], theirs, (key, step))
        gradient = np.zeros_like(xt)
        if cond_fn is not None:
            gradient = (0.5 - xt) * (1 + diffusion.steps[step] / 1000)
        sample = mean + variance * gradient + (np.exp(log_var / 2) * drawn[i] if step else 0)
        close(ancestral["sample"][i], sample, ("DDPM", step))
        close(ancestral["pred_xstart"][i], pred, ("x_0 of DDPM", step))
        eps = eps - math.sqrt(1 - world.a) * gradient
        pred = world.x0(xt, eps)
        close(
            reverse["sample"][i], math.sqrt(world.a_next) * pred + math.sqrt(1 - world.a_next) * eps, ("reverse", step)
        )
        for eta, out_ in ddim.items():
            sigma = eta * math.sqrt((1 - world.a_prev) / (1 - world.a) * (1 - world.a / world.a_prev))
            sample = math.sqrt(world.a_prev) * pred + math.sqrt(max(1 - world.a_prev - sigma**2, 0)) * eps
            close(out_["sample"][i], sample + (sigma * drawn[i] if step else 0), ("DDIM", eta, step))
            close(out_["pred_xstart"][i], pred, ("x_0 of DDIM", eta, step))


@pytest.mark.parametrize("respacing", ["20", "1", "3,4"])
def test_the_bound_in_all_its_terms(respacing) -> None:
    diffusion = create_diffusion(respacing)
    x, _, _, _, _ = batch(respacing)

    def model(x, t, y):
        eps = x * 0.9 + 0.05 * y
        return torch.cat([eps, torch.sin(3 * x) + t.to(x.dtype).view(-1, 1, 1, 1) / 1000], 1)

    def generators():
        return [torch.Generator().manual_seed(i) for i in range(len(x))]

    found = diffusion.calc_bpd_loop(model, x, clip_denoised=True, model_kwargs=dict(y=1.0), generator=generators())
    assert set(found) == {"total_bpd", "prior_bpd", "vb", "xstart_mse", "mse"}
    draws, n = generators(), diffusion.num_timesteps
    assert found["vb"].shape == found["mse"].shape == found["xstart_mse"].shape == (len(x), n)
    for i in range(len(x)):
        total, x0 = 0.0, x[i].numpy()
        for column, step in enumerate(range(n)[::-1]):
            world = World(respacing, step)
            noise = torch.randn(x.shape[1:], generator=draws[i], dtype=F64).numpy()
            xt = world.noised(x0, noise)
            out = model(torch.from_numpy(xt)[None], torch.tensor([diffusion.steps[step]]), 1.0)[0].numpy()
            pred = np.clip(world.x0(xt, out[:2]), -1, 1)
            bits = world.bits(x0, xt, pred, world.log_variance(out[2:], False))
            assert found["vb"][i, column].item() == pytest.approx(bits, rel=1e-8)
            assert found["xstart_mse"][i, column].item() == pytest.approx(((pred - x0) ** 2).mean(), rel=1e-9)
            mse = ((world.eps(xt, pred) - noise) ** 2).mean()
            assert found["mse"][i, column].item() == pytest.approx(mse, rel=1e-7, abs=1e-12)
            total += bits
        last = World(respacing, n - 1)
        prior = (0.5 * (1 - last.a - 1 - math.log(1 - last.a) + last.a * x0**2)).mean() / math.log(2)
        assert found["prior_bpd"][i].item() == pytest.approx(prior, rel=1e-7)
        assert found["total_bpd"][i].item() == pytest.approx(total + prior, rel=1e-8)


# ------------------------------------------------------------------------------------------------------------ loops


def smooth(x: torch.Tensor, t: torch.Tensor, y: float = 0.0) -> torch.Tensor:
    time = (t.to(x.dtype) / 1000).view(-1, 1, 1, 1)
    return torch.cat([x * (1 - 0.3 * time) + 0.2 * torch.sin(3 * x + time) + y, torch.tanh(x)], 1)


@pytest.mark.parametrize("kind", ["p", "ddim"])
def test_loops_and_their_steps(kind) -> None:
    diffusion = create_diffusion("12")
    noise = torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    loop, steps = getattr(diffusion, f"{kind}_sample_loop"), getattr(diffusion, f"{kind}_sample_loop_progressive")
    options = dict(
        clip_denoised=False, denoised_fn=halve, cond_fn=pull, model_kwargs=dict(y=0.1), device="cpu", progress=False
    )

    def generator():
        return torch.Generator().manual_seed(1)

    outs = list(steps(smooth, noise.shape, noise, generator=generator(), **options))
    assert len(outs) == 12 and all(set(out) == {"sample", "pred_xstart"} for out in outs)
    assert torch.equal(outs[-1]["sample"], loop(smooth, noise.shape, noise, generator=generator(), **options))
    x = noise
    g = generator()
    for t, out in zip(range(12)[::-1], outs, strict=True):
        step = diffusion.p_sample if kind == "p" else diffusion.ddim_sample
        x = step(smooth, x, torch.tensor([t, t]), False, halve, pull, dict(y=0.1), generator=g)["sample"]
        assert torch.equal(x, out["sample"])


def test_loops_keep_no_graph_and_find_the_device() -> None:
    model = torch.nn.Conv2d(1, 2, 1)
    model.forward = lambda x, t: torch.nn.Conv2d.forward(model, x)
    sample = create_diffusion("3").p_sample_loop(model, (1, 1, 2, 2))
    assert not sample.requires_grad and sample.shape == (1, 1, 2, 2)


def test_reversed_ddim_comes_back() -> None:
    diffusion = create_diffusion()
    x = start = torch.randn(2, 1, 4, 4, dtype=F64, generator=torch.Generator().manual_seed(0)) * 0.5
    model = gaussian(0.0, 0.5)
    for t in range(999):
        x = diffusion.ddim_reverse_sample(model, x, torch.tensor([t, t]))["sample"]
    assert abs(x.std() - 1) < 0.2
    for t in range(1, 1000)[::-1]:
        x = diffusion.ddim_sample(model, x, torch.tensor([t, t]))["sample"]
    torch.testing.assert_close(x, start, atol=0.02, rtol=0)
    with pytest.raises(ValueError, match="only eta=0 can be reversed, DDIM is random otherwise; got 0.5"):
        diffusion.ddim_reverse_sample(model, x, torch.tensor([1, 1]), eta=0.5)


def gaussian(mean: float, std: float):
    """The best model of data N(mean, std^2): E[eps | x_t], and the posterior's variance."""
    acp = torch.from_numpy(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))

    def model(x, t):
        a = acp[t].view(-1, 1, 1, 1)
        eps = (1 - a).sqrt() * (x - a.sqrt() * mean) / (a * std**2 + 1 - a)
        return torch.cat([eps, torch.ones_like(eps)], 1).to(x)

    return model


@pytest.mark.parametrize("kind", ["p", "ddim"])
def test_guidance_by_a_gradient_samples_the_posterior(kind) -> None:
    """Data N(0, 1), of which y = x + N(0, s^2) was seen: x given y is N(y, s^2) / (1 + s^2)."""
    s, y = 0.5, 1.2
    acp = torch.from_numpy(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))

    def gradient(x, t):
        a = acp[t].view(-1, 1, 1, 1)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            log_p = -0.5 * (y - a.sqrt() * x) ** 2 / (1 - a + s**2)
            return torch.autograd.grad(log_p.sum(), x)[0]

    loop = getattr(create_diffusion("250"), f"{kind}_sample_loop")
    sample = loop(gaussian(0.0, 1.0), (2, 1, 100, 100), cond_fn=gradient, generator=torch.Generator().manual_seed(0))
    assert abs(sample.mean() - y / (1 + s**2)) < 0.02
    assert abs(sample.std() - s / math.sqrt(1 + s**2)) < 0.02


@pytest.mark.parametrize("sigma_small", [True, False])
def test_a_model_of_x0_samples_a_gaussian(sigma_small) -> None:
    acp = torch.from_numpy(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))

    def model(x, t):
        a = acp[t].view(-1, 1, 1, 1)
        return (0.6 + a.sqrt() * 0.16 * (x - a.sqrt() * 0.6) / (a * 0.16 + 1 - a)).to(x)

    diffusion = create_diffusion("250", sigma_small=sigma_small, predict_xstart=True, learn_sigma=False)
    sample = diffusion.p_sample_loop(model, (2, 1, 100, 100), generator=torch.Generator().manual_seed(0))
    assert abs(sample.mean() - 0.6) < 0.02 and abs(sample.std() - 0.4) < 0.02


def test_the_bound_of_the_best_model_is_the_entropy() -> None:
    x = 0.3 + 0.12 * torch.randn(64, 1, 8, 8, dtype=F64, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    found = create_diffusion("200").calc_bpd_loop(gaussian(0.3, 0.12), x)
    bits = math.log2(0.12 * math.sqrt(2 * math.pi * math.e)) + math.log2(127.5)
    assert found["total_bpd"].mean().item() == pytest.approx(bits, rel=0.1)
    assert found["prior_bpd"].max() < 1e-3
