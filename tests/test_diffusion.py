"""Diffusion and flow matching: closed forms, a Gaussian world whose best model is known, and diffusers' schedulers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from difffit_fast.diffusion import FlowMatching, GaussianDiffusion, create_diffusion, randn, solver_sample_loop
from difffit_fast.diffusion.gaussian import discretized_gaussian_log_likelihood
from difffit_fast.diffusion.schedule import make_betas, respaced_steps

F64 = torch.float64


def acp_linear(steps: int = 1000) -> np.ndarray:
    return np.cumprod(1 - np.linspace(1e-4, 0.02, steps))


# ------------------------------------------------------------------------------------------- schedules, respacing


def test_schedules():
    np.testing.assert_allclose(make_betas("linear", 1000).numpy(), np.linspace(1e-4, 0.02, 1000), rtol=1e-12)
    assert make_betas("linear", 500)[-1] == 0.04
    cosine = make_betas("cosine", 1000)
    acp = torch.cumprod(1 - cosine, 0)
    expected = [math.cos((i / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(1, 1001)]
    np.testing.assert_allclose(
        acp[:990], np.array(expected[:990]) / math.cos(0.008 / 1.008 * math.pi / 2) ** 2, rtol=1e-9
    )
    assert cosine.max() <= 0.999
    with pytest.raises(ValueError, match="'linear' or 'cosine', got 'sigmoid'"):
        make_betas("sigmoid", 10)


def test_respacing():
    assert respaced_steps(10, "") == respaced_steps(10, None) == list(range(10))
    assert respaced_steps(1000, "250") == respaced_steps(1000, 250) == respaced_steps(1000, [250])
    assert respaced_steps(1000, "250") == [round(i) for i in np.linspace(0, 999, 250)]
    assert respaced_steps(1000, "ddim50") == list(range(0, 1000, 20))
    parts = respaced_steps(300, "10,15,20")
    assert len(parts) == 45
    assert [sum(lo <= s < lo + 100 for s in parts) for lo in (0, 100, 200)] == [10, 15, 20]
    assert respaced_steps(5, "1,1") == [0, 3]
    for bad, message in (
        ("ddim37", "no fixed stride"),
        ("20", "cannot take 20"),
        ("0", "cannot take 0"),
        ("x", "like"),
    ):
        with pytest.raises(ValueError, match=message):
            respaced_steps(10, bad)


def test_the_model_sees_original_timesteps():
    diffusion = create_diffusion("10", learn_sigma=False)
    seen = []

    def model(x, t):
        seen.append(t.clone())
        return x

    diffusion.p_sample_loop(model, (2, 1, 2, 2))
    assert [int(t[0]) for t in seen] == respaced_steps(1000, "10")[::-1]
    assert all(t.dtype == torch.long and t.shape == (2,) for t in seen)
    acp = torch.cumprod(1 - diffusion.betas, 0).numpy()
    np.testing.assert_allclose(acp, acp_linear()[diffusion.steps], rtol=1e-10)


# --------------------------------------------------------------------------------------------------------- losses


def test_q_sample_moments():
    diffusion = create_diffusion()
    acp = acp_linear()
    x = torch.full((3, 1, 200, 200), 0.7)
    t = torch.tensor([0, 400, 999])
    noised = diffusion.q_sample(x, t, torch.randn(x.shape, generator=torch.Generator().manual_seed(0)))
    for image, step in zip(noised, t.tolist(), strict=True):
        std = math.sqrt(1 - acp[step])
        assert abs(image.mean() - 0.7 * math.sqrt(acp[step])) < 0.02 * std
        assert abs(image.std() / std - 1) < 0.02


def test_perfect_prediction_has_no_loss():
    """The true noise, and v = -1 (the posterior's own variance): both terms are zero at every t > 0."""
    diffusion = create_diffusion()
    x, noise = torch.randn(6, 2, 4, 4, dtype=F64), torch.randn(6, 2, 4, 4, dtype=F64)
    t = torch.tensor([1, 2, 10, 300, 900, 999])
    losses = diffusion.training_losses(lambda x, t: torch.cat([noise, -torch.ones_like(noise)], 1), x, t, noise=noise)
    assert losses["loss"].shape == (6,)
    assert losses["loss"].abs().max() < 1e-12


@pytest.mark.parametrize("respacing", ["", "50"])
def test_losses_against_first_principles(respacing):
    """The KL between the two normals and the binned likelihood, step by step in NumPy."""
    diffusion = create_diffusion(respacing)
    t = torch.tensor([0, 0, 1, diffusion.num_timesteps // 2, diffusion.num_timesteps - 1])
    g = torch.Generator().manual_seed(0)
    x = torch.rand(5, 2, 3, 3, generator=g, dtype=F64) * 2 - 1
    x[0].clamp_(min=0.5).round_()  # the outermost bin
    x[1].round_(decimals=0)
    noise = torch.randn(x.shape, generator=g, dtype=F64)
    output = torch.cat([noise + 0.1 * torch.randn(x.shape, generator=g, dtype=F64)] * 2, 1)
    output[:, 2:] = torch.rand(x.shape, generator=g, dtype=F64) * 2 - 1
    output[:2, 2:] = 1  # a wide decoder at t = 0, to have finite terms
    losses = diffusion.training_losses(lambda x, t, y: output, x, t, dict(y=None), noise)

    acp = acp_linear()[respaced_steps(1000, respacing)]
    acp_prev = np.append(1.0, acp[:-1])
    beta = 1 - acp / acp_prev
    variance = beta * (1 - acp_prev) / (1 - acp)
    variance[0] = variance[1]
    for i, s in enumerate(t.tolist()):
        x0, e, (eps, v) = x[i].numpy(), noise[i].numpy(), output[i].numpy().reshape(2, *x.shape[1:])
        xt = math.sqrt(acp[s]) * x0 + math.sqrt(1 - acp[s]) * e
        log_var = (v + 1) / 2 * math.log(beta[s]) + (1 - v) / 2 * math.log(variance[s])
        pred = (xt - math.sqrt(1 - acp[s]) * eps) / math.sqrt(acp[s])
        c0, ct = (
            math.sqrt(acp_prev[s]) * beta[s] / (1 - acp[s]),
            math.sqrt(1 - beta[s]) * (1 - acp_prev[s]) / (1 - acp[s]),
        )
        mean, true_mean = c0 * pred + ct * xt, c0 * x0 + ct * xt
        if s:
            ratio = variance[s] / np.exp(log_var)
            vb = 0.5 * (ratio - 1 - np.log(ratio) + (mean - true_mean) ** 2 / np.exp(log_var))
        else:
            cdf = torch.distributions.Normal(torch.from_numpy(mean), torch.from_numpy(np.exp(log_var / 2))).cdf
            upper, lower = cdf(x[i] + 1 / 255).numpy(), cdf(x[i] - 1 / 255).numpy()
            upper, lower = np.where(x0 > 0.999, 1, upper), np.where(x0 < -0.999, 0, lower)
            vb = -np.log(np.maximum(upper - lower, 1e-12))
        expected = vb.mean() / math.log(2)
        # the distribution function is an approximation at t = 0
        tolerance = dict(rel=1e-9) if s else dict(rel=0.02, abs=1e-3)
        assert losses["vb"][i].item() == pytest.approx(expected, **tolerance)
        assert losses["mse"][i].item() == pytest.approx(((eps - e) ** 2).mean(), rel=1e-12)
    torch.testing.assert_close(losses["loss"], losses["mse"] + losses["vb"])


def test_the_bound_teaches_the_variance_only():
    diffusion = create_diffusion()
    x, noise = torch.randn(4, 2, 4, 4), torch.randn(4, 2, 4, 4)
    output = torch.randn(4, 4, 4, 4, requires_grad=True)
    losses = diffusion.training_losses(lambda x, t: output, x, torch.tensor([0, 1, 500, 999]), noise=noise)
    (grad,) = torch.autograd.grad(losses["vb"].sum(), output, retain_graph=True)
    assert grad[:, :2].abs().max() == 0 and (grad[:, 2:].abs().amax((1, 2, 3)) > 0).all()
    (grad,) = torch.autograd.grad(losses["mse"].sum(), output)
    torch.testing.assert_close(grad[:, :2], 2 * (output[:, :2] - noise).detach() / 32)
    assert grad[:, 2:].abs().max() == 0


def test_losses_in_other_settings():
    x, t = torch.randn(2, 1, 4, 4), torch.tensor([3, 900])
    plain = create_diffusion(learn_sigma=False).training_losses(lambda x, t: x, x, t)
    assert set(plain) == {"loss", "mse"}
    half = create_diffusion().training_losses(lambda x, t: torch.cat([x, x], 1).bfloat16(), x, t)
    assert half["loss"].dtype == torch.float32 and half["loss"].isfinite().all()
    with pytest.raises(ValueError, match=r"learn_sigma=True the model must return \(2, 2, 4, 4\), got \(2, 1, 4, 4\)"):
        create_diffusion().training_losses(lambda x, t: x, x, t)
    with pytest.raises(ValueError, match="betas"):
        GaussianDiffusion(torch.tensor([0.1, 1.5]))


def test_tables_made_while_sampling_serve_training():
    diffusion = create_diffusion()
    x = torch.randn(2, 1, 4, 4)
    with torch.inference_mode():
        diffusion.q_sample(x, torch.tensor([1, 2]))
    scale = torch.ones((), requires_grad=True)
    losses = diffusion.training_losses(lambda x, t: scale * torch.cat([x, x], 1), x, torch.tensor([1, 2]))
    losses["loss"].mean().backward()
    assert scale.grad.isfinite()


def test_binned_likelihood_sums_to_one():
    values = torch.arange(256, dtype=F64) / 127.5 - 1
    total = discretized_gaussian_log_likelihood(
        values, torch.tensor(0.3, dtype=F64), torch.tensor(-2.0, dtype=F64)
    ).exp()
    assert abs(total.sum() - 1) < 1e-9


def test_sample_timesteps():
    g = torch.Generator().manual_seed(0)
    t = create_diffusion("10").sample_timesteps(5000, generator=g)
    assert t.dtype == torch.long and set(t.tolist()) == set(range(10))
    t = FlowMatching().sample_timesteps(5000, generator=g)
    assert t.min() >= 0 and t.max() < 1 and abs(t.mean() - 0.5) < 0.02


# ----------------------------------------------------------------------- a world of known answers: Gaussian data


MU, SIGMA = 0.6, 0.4


def gaussian_eps_model(learned: bool = True, steps: list[int] | None = None, mu: float = MU, sigma: float = SIGMA):
    """The best model of data N(mu, sigma^2), in closed form: the noise E[eps | x_t] and, where ``learned``, the v that
    gives p(x_{t-1} | x_t) its true variance within the subset ``steps``: the posterior's, and what x_0 leaves open."""
    acp = torch.from_numpy(acp_linear())
    steps = list(range(1000)) if steps is None else steps
    previous = torch.ones(1000, dtype=F64)
    previous[steps[1:]] = acp[steps[:-1]]

    def model(x, t, y=None):
        a, a_prev = acp[t].view(-1, 1, 1, 1), previous[t].view(-1, 1, 1, 1)
        total = a * sigma**2 + 1 - a
        eps = (1 - a).sqrt() * (x - a.sqrt() * mu) / total
        if not learned:
            return eps.to(x)
        beta = 1 - a / a_prev
        posterior = beta * (1 - a_prev) / (1 - a)
        variance = posterior + (a_prev.sqrt() * beta / (1 - a)) ** 2 * sigma**2 * (1 - a) / total
        v = 2 * (variance / posterior).log() / (beta / posterior).log() - 1
        v = torch.where(t.view(-1, 1, 1, 1) == steps[0], 1.0, v)
        return torch.cat([eps, v.expand_as(eps)], 1).to(x)

    return model


def check_moments(samples, tolerance=0.01):
    assert abs(samples.mean().item() - MU) < tolerance
    assert abs(samples.std().item() - SIGMA) < tolerance


SHAPE = (2, 1, 100, 100)


@pytest.mark.parametrize("steps", [5, 50])
def test_ddpm_with_the_true_variance_is_exact_at_any_number_of_steps(steps):
    diffusion = create_diffusion(steps)
    g = torch.Generator().manual_seed(0)
    check_moments(diffusion.p_sample_loop(gaussian_eps_model(True, diffusion.steps), SHAPE, generator=g))


def test_ddpm_with_a_fixed_variance():
    g = torch.Generator().manual_seed(0)
    check_moments(
        create_diffusion("250", learn_sigma=False).p_sample_loop(gaussian_eps_model(False), SHAPE, generator=g)
    )


@pytest.mark.parametrize("eta, tolerance", [(0.0, 0.02), (0.5, 0.02), (1.0, 0.03)])
def test_ddim_recovers_a_gaussian(eta, tolerance):
    g = torch.Generator().manual_seed(0)
    sample = create_diffusion("100").ddim_sample_loop(gaussian_eps_model(), SHAPE, eta=eta, generator=g)
    check_moments(sample, tolerance)


@pytest.mark.parametrize("solver", ["dpm++", "unipc"])
def test_solvers_recover_a_gaussian(solver):
    pytest.importorskip("diffusers")
    g = torch.Generator().manual_seed(0)
    sample = solver_sample_loop(solver, create_diffusion(), gaussian_eps_model(), SHAPE, num_steps=25, generator=g)
    check_moments(sample, 0.02)


def test_bound_of_the_best_model_is_the_entropy():
    """Summed over the steps, the bound of the best model approaches the entropy of the data in 8-bit bins."""
    torch.manual_seed(0)
    diffusion = create_diffusion()
    x = 0.3 + 0.12 * torch.randn(1000, 1, 4, 4, dtype=F64)  # narrow enough to stay inside [-1, 1]
    model = gaussian_eps_model(mu=0.3, sigma=0.12)
    t = torch.arange(1000)
    total = diffusion.training_losses(model, x, t)["vb"].sum().item()
    bits = math.log2(0.12 * math.sqrt(2 * math.pi * math.e)) + math.log2(127.5)
    assert total == pytest.approx(bits, rel=0.05)


def test_clip_denoised():
    diffusion = create_diffusion("50", learn_sigma=False)
    x = torch.randn(2, 1, 4, 4) * 3
    t = torch.tensor([40, 49])
    step = diffusion.p_sample(lambda x, t: 0 * x, x, t, clip_denoised=True)
    assert step["pred_xstart"].abs().max() == 1
    prediction = diffusion.p_mean_variance(lambda x, t: 0 * x, x, t, clip_denoised=True)
    torch.testing.assert_close(diffusion.q_sample(prediction.pred_xstart, t, prediction.eps), x, rtol=1e-4, atol=1e-4)


def test_no_noise_in_the_last_step():
    diffusion = create_diffusion("50")
    x, t = torch.randn(2, 1, 4, 4), torch.zeros(2, dtype=torch.long)
    outs = [diffusion.p_sample(gaussian_eps_model(), x, t)["sample"] for _ in range(2)]
    assert torch.equal(*outs)


# ------------------------------------------------------------------------------------------------------ diffusers


def learned_model(x, t):
    """Any smooth function with something like noise in front and v in [-1, 1] behind."""
    time = (t.float() / 1000).view(-1, 1, 1, 1)
    eps = x * (1 - 0.3 * time) + 0.2 * torch.sin(3 * x.flip(-1) + time)
    return torch.cat([eps, torch.tanh(x + time)], 1)


@pytest.mark.parametrize("steps", [10, 250, 1000])
def test_ddpm_equals_diffusers(steps):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDPMScheduler(
        1000, 1e-4, 0.02, "linear", variance_type="learned_range", clip_sample=False, timestep_spacing="linspace"
    )
    theirs.set_timesteps(steps)
    diffusion = create_diffusion(str(steps))
    assert theirs.timesteps.tolist() == diffusion.steps[::-1]
    x = y = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    g1, g2 = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    for i, step in list(enumerate(theirs.timesteps))[-50:]:
        t = torch.full((2,), steps - 1 - i)
        ours = diffusion.p_sample(learned_model, x, t, generator=g1)
        if i == steps - 1:  # diffusers draws nothing in the last step
            g2 = g1
        expected = theirs.step(learned_model(y, step.repeat(2)), step, y, generator=g2)
        torch.testing.assert_close(ours["sample"], expected.prev_sample, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours["pred_xstart"], expected.pred_original_sample, rtol=1e-4, atol=1e-4)
        x = y = expected.prev_sample


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_ddim_equals_diffusers(eta):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDIMScheduler(
        1000, 1e-4, 0.02, "linear", timestep_spacing="leading", set_alpha_to_one=True, clip_sample=False
    )
    theirs.set_timesteps(50)
    noise = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    g1, g2 = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    x = noise
    for step in theirs.timesteps:
        x = theirs.step(learned_model(x, step.repeat(2))[:, :2], step, x, eta=eta, generator=g2).prev_sample
    ours = create_diffusion("ddim50").ddim_sample_loop(learned_model, noise.shape, noise, eta=eta, generator=g1)
    torch.testing.assert_close(ours, x, rtol=1e-3, atol=1e-3)


def test_solvers_agree_with_many_ddim_steps():
    pytest.importorskip("diffusers")
    noise = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    model = gaussian_eps_model()
    truth = create_diffusion().ddim_sample_loop(model, noise.shape, noise)
    for solver in ("dpm++", "unipc"):
        ours = solver_sample_loop(solver, create_diffusion(), model, noise.shape, noise, num_steps=30)
        torch.testing.assert_close(ours, truth, rtol=0, atol=0.05)
    with pytest.raises(ValueError, match=r"dpm\+\+, unipc, got 'plms'"):
        solver_sample_loop("plms", create_diffusion(), model, noise.shape, noise)


# -------------------------------------------------------------------------------------------------- flow matching


def test_flow_losses():
    flow = FlowMatching()
    x, noise = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    t = torch.tensor([0.0, 0.3, 1.0])
    seen = {}

    def model(x_t, t, y):
        seen.update(x_t=x_t, t=t, y=y)
        return torch.cat([x - noise + 0.5, torch.full_like(x, 100.0)], 1)  # the second half is not used

    losses = flow.training_losses(model, x, t, dict(y=7), noise)
    torch.testing.assert_close(losses["loss"], torch.full((3,), 0.25))
    assert torch.equal(seen["t"], t) and seen["y"] == 7
    assert torch.equal(seen["x_t"][0], noise[0]) and torch.equal(seen["x_t"][2], x[2])
    torch.testing.assert_close(seen["x_t"][1], 0.3 * x[1] + 0.7 * noise[1])
    with pytest.raises(ValueError, match="floating dtype, got"):
        flow.training_losses(model, x, t.long())


def gaussian_velocity(x, t, y=None):
    """E[x_1 - x_0 | x_t] for data N(MU, SIGMA^2)."""
    t = t.view(-1, 1, 1, 1)
    slope = (t * SIGMA**2 - (1 - t)) / (t**2 * SIGMA**2 + (1 - t) ** 2)
    return MU + slope * (x - t * MU)


@pytest.mark.parametrize("method, order", [("euler", 1), ("heun", 2)])
def test_flow_order_of_convergence(method, order):
    """The exact flow of a Gaussian world is the straight map noise -> MU + SIGMA * noise."""
    flow, noise = FlowMatching(), torch.randn(2, 1, 8, 8, dtype=F64)

    def error(steps):
        x = flow.ode_sample_loop(gaussian_velocity, noise.shape, noise, num_steps=steps, method=method)
        return (x - (MU + SIGMA * noise)).abs().max().item()

    coarse, fine = error(40), error(80)
    assert fine < 0.03 and coarse / fine == pytest.approx(2**order, rel=0.15)


def test_flow_times_and_errors():
    flow, seen = FlowMatching(), []

    def model(x, t):
        seen.append(t[0].item())
        return torch.cat([torch.ones_like(x)] * 2, 1)

    out = flow.ode_sample_loop(model, (2, 1, 2, 2), torch.zeros(2, 1, 2, 2), num_steps=4, method="euler")
    assert seen == [0.0, 0.25, 0.5, 0.75] and torch.equal(out, torch.ones(2, 1, 2, 2))
    seen.clear()
    flow.ode_sample_loop(model, (2, 1, 2, 2), num_steps=1, method="heun")
    assert seen == [0.0, 1.0]
    with pytest.raises(ValueError, match="euler, heun, got 'rk4'"):
        flow.ode_sample_loop(model, (2, 1, 2, 2), method="rk4")
    with pytest.raises(ValueError, match="num_steps"):
        flow.ode_sample_loop(model, (2, 1, 2, 2), num_steps=0)


# ---------------------------------------------------------------------------------------------------------- noise


def test_noise_per_image():
    def generators(seeds):
        return [torch.Generator().manual_seed(s) for s in seeds]

    together = randn((3, 2, 2), generators([5, 6, 7]))
    assert torch.equal(together[2], randn((1, 2, 2), generators([7]))[0])
    assert randn((0, 2, 2), []).shape == (0, 2, 2)
    with pytest.raises(ValueError, match="one generator per image, 3; got 2"):
        randn((3, 2), generators([1, 2]))
    diffusion = create_diffusion("10")
    batch = diffusion.p_sample_loop(gaussian_eps_model(), (3, 1, 2, 2), generator=generators([1, 2, 3]))
    alone = diffusion.p_sample_loop(gaussian_eps_model(), (1, 1, 2, 2), generator=generators([3]))
    assert torch.equal(batch[2:], alone)
    with pytest.raises(ValueError, match="noise must have the shape"):
        diffusion.p_sample_loop(gaussian_eps_model(), (3, 1, 2, 2), torch.zeros(1, 1, 2, 2))


def test_progress_bar(capsys):
    create_diffusion("5").p_sample_loop(gaussian_eps_model(), (1, 1, 2, 2), progress=True)
    assert "sampling" in capsys.readouterr().err
