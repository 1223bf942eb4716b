"""SiT's samplers: Dormand-Prince with an error of each image's own, and Euler-Maruyama on its stochastic equation."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from difffit_fast import DiT
from difffit_fast.cli import main
from difffit_fast.diffusion import FlowMatching
from difffit_fast.diffusion.dopri5 import ERROR, STAGES, TIMES
from difffit_fast.errors import DiffFitError
from difffit_fast.sample import Sampler

F64 = torch.float64
MU, SIGMA = 0.6, 0.4


def gaussian_velocity(x: Tensor, t: Tensor) -> Tensor:
    """E[x_1 - x_0 | x_t] for data N(MU, SIGMA^2); its flow takes the noise z to MU + SIGMA z."""
    t = t.view(-1, 1, 1, 1)
    slope = (t * SIGMA**2 - (1 - t)) / (t**2 * SIGMA**2 + (1 - t) ** 2)
    return MU + slope * (x - t * MU)


def wavy(x: Tensor, t: Tensor) -> Tensor:
    """A field of which every number stays with its own, so that nothing of an image depends on the batch, not a bit."""
    t = t.view(-1, 1, 1, 1)
    return torch.sin(3 * x + 4 * t) - x * t


def noise(n: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(n, 1, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Counted:
    def __init__(self, field) -> None:
        self.field, self.times = field, []

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.times.append(t.clone())
        return self.field(x, t)


# ----------------------------------------------------------------------------------------------------------- dopri5


def test_the_coefficients_meet_the_order_conditions() -> None:
    """Of order 5 for the result and 4 for the embedded one (Hairer et al., section II.1), as far as quadrature asks for."""
    times = np.array([0.0, *TIMES])
    for row, time in zip(STAGES, TIMES, strict=True):
        assert sum(row) == pytest.approx(time, abs=1e-15)
    weights = np.array([*STAGES[-1], 0.0])
    for power in range(5):
        assert weights @ times**power == pytest.approx(1 / (power + 1), abs=1e-15)
        error = 0 if power < 4 else pytest.approx(np.array(ERROR) @ times**power)
        assert np.array(ERROR) @ times**power == pytest.approx(error, abs=1e-15)
    assert abs(np.array(ERROR) @ times**4) > 1e-4


@pytest.mark.parametrize("rtol", [1e-3, 1e-6, 1e-9])
def test_the_error_follows_the_tolerance(rtol: float) -> None:
    z = noise(4)
    field = Counted(gaussian_velocity)
    x = FlowMatching().dopri5_sample_loop(field, z.shape, z, rtol=rtol, atol=rtol / 1000)
    assert (x - (MU + SIGMA * z)).abs().max() < 20 * rtol
    assert len(field.times) % 6 == 2 and len(field.times) < 300  # two to begin with
    assert all(((t >= 0) & (t <= 1)).all() and t.dtype == F64 for t in field.times)


@pytest.mark.parametrize("seed", range(6))
def test_it_is_scipys(seed: int) -> None:
    """The same method, first step and control as SciPy's RK45, which takes one image at a time."""
    integrate = pytest.importorskip("scipy.integrate")
    z, field = noise(1, seed), Counted(gaussian_velocity)

    def flat(t: float, y: np.ndarray) -> np.ndarray:
        return gaussian_velocity(torch.from_numpy(y).view(z.shape), torch.tensor([t], dtype=F64)).numpy().ravel()

    theirs = integrate.solve_ivp(flat, (0, 1), z.numpy().ravel(), method="RK45", rtol=1e-3, atol=1e-6)
    ours = FlowMatching().dopri5_sample_loop(field, z.shape, z)
    np.testing.assert_allclose(ours.numpy().ravel(), theirs.y[:, -1], rtol=0, atol=1e-9)
    assert len(field.times) == theirs.nfev


def test_no_image_waits_for_another_or_hurries_it() -> None:
    z = torch.cat([noise(3), 300 * noise(1, 1), torch.zeros(1, 1, 4, 4, dtype=F64)])
    together = FlowMatching().dopri5_sample_loop(wavy, z.shape, z)
    for i in range(5):
        alone = FlowMatching().dopri5_sample_loop(wavy, (1, 1, 4, 4), z[i : i + 1])
        assert torch.equal(alone, together[i : i + 1])


def test_an_image_that_is_lost_takes_none_with_it() -> None:
    z = noise(4, dtype=torch.float32)

    def broken(x: Tensor, t: Tensor) -> Tensor:
        out = wavy(x, t)
        out[1] = torch.where(t[1] > 0.4, torch.inf, out[1])
        out[2] = torch.nan
        return out

    made, whole = (FlowMatching().dopri5_sample_loop(field, z.shape, z) for field in (broken, wavy))
    assert made.dtype == torch.float32 and made[1:3].isnan().all()
    assert torch.equal(made[[0, 3]], whole[[0, 3]])


def test_steps_are_bounded() -> None:
    z = noise(2)

    def stiff(x: Tensor, t: Tensor) -> Tensor:
        return torch.stack([1e6 * (torch.cos(x[0]) - x[0]), x[1]])

    with pytest.raises(DiffFitError, match=r"dopri5 has brought image 0 of 2 to t = \d.* of 1 in 50 steps"):
        FlowMatching().dopri5_sample_loop(stiff, z.shape, z, max_steps=50)
    for bad in (dict(rtol=0.0), dict(atol=-1.0), dict(rtol=math.nan)):
        with pytest.raises(ValueError, match="rtol and atol must be positive"):
            FlowMatching().dopri5_sample_loop(wavy, z.shape, z, **bad)


def test_a_path_without_a_bend_is_one_matter_of_a_few_steps() -> None:
    field = Counted(lambda x, t: torch.ones_like(x))
    x = FlowMatching().dopri5_sample_loop(field, (2, 1, 4, 4), torch.zeros(2, 1, 4, 4))
    torch.testing.assert_close(x, torch.ones_like(x))
    assert len(field.times) < 60
    assert FlowMatching().dopri5_sample_loop(wavy, (0, 1, 4, 4), torch.zeros(0, 1, 4, 4)).shape == (0, 1, 4, 4)


# -------------------------------------------------------------------------------------------------------------- SDE


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 250])
def test_euler_maruyama_written_out(steps: int) -> None:
    """x' = x + (v + w s) dt + sqrt(2 w dt) N, s the score of the model's velocity, w = norm (1 - t); the last without noise."""
    norm, last = (1.0, 0.04) if steps != 10 else (0.7, 0.2)
    field, z = Counted(wavy), noise(2)
    ours = FlowMatching().sde_sample_loop(
        field, z.shape, z, num_steps=steps, diffusion_norm=norm, last_step_size=last,
        generator=[torch.Generator().manual_seed(i) for i in (7, 8)],
    )  # fmt: skip
    draws = [torch.Generator().manual_seed(i) for i in (7, 8)]
    times = np.linspace(0, 1 - last, steps) if steps > 1 else np.zeros(1)
    x = z.numpy()
    for i, t in enumerate(times):
        v = np.sin(3 * x + 4 * t) - x * t
        score = (t * v - x) / (1 - t)
        w = norm * (1 - t)
        final = i == steps - 1
        dt = 1 - t if final else times[1] - times[0]
        fresh = 0 if final else np.stack([torch.randn(1, 4, 4, generator=g, dtype=F64).numpy() for g in draws])
        x = x + (v + w * score) * dt + np.sqrt(2 * w * dt) * fresh
    np.testing.assert_allclose(ours, x, rtol=1e-5, atol=1e-5)  # the model is asked at float32 times
    np.testing.assert_allclose([t[0].item() for t in field.times], times, atol=1e-6)


def test_the_score_is_that_of_the_noised_data() -> None:
    """(t v - x) / (1 - t) of the best velocity is the gradient of log N(t MU, t^2 SIGMA^2 + (1 - t)^2)."""
    x = noise(3)
    for t in (0.0, 0.3, 0.96):
        v = gaussian_velocity(x, torch.full((3,), t, dtype=F64))
        score = -(x - t * MU) / (t**2 * SIGMA**2 + (1 - t) ** 2)
        torch.testing.assert_close((t * v - x) / (1 - t), score)


def test_it_recovers_a_gaussian() -> None:
    g = torch.Generator().manual_seed(0)
    sample = FlowMatching().sde_sample_loop(gaussian_velocity, (2, 1, 100, 100), num_steps=250, generator=g)
    assert abs(sample.mean() - MU) < 0.01 and abs(sample.std() - SIGMA) < 0.02
    g = torch.Generator().manual_seed(0)
    plain = FlowMatching().sde_sample_loop(
        gaussian_velocity, (2, 1, 100, 100), num_steps=250, diffusion_norm=0.0, generator=g
    )
    start = torch.randn(2, 1, 100, 100, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(plain, MU + SIGMA * start, rtol=0, atol=0.05)  # without noise, the ordinary equation


def test_noise_is_each_images_own() -> None:
    def sample(seeds: list[int]) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return FlowMatching().sde_sample_loop(wavy, (len(seeds), 1, 4, 4), num_steps=9, generator=generators)

    assert torch.equal(sample([1, 2, 3])[2:], sample([3]))


def test_sde_errors() -> None:
    for bad in (dict(num_steps=0), dict(last_step_size=0.0), dict(last_step_size=1.0), dict(diffusion_norm=-1.0)):
        with pytest.raises(ValueError, match=f"{next(iter(bad))} must"):
            FlowMatching().sde_sample_loop(wavy, (1, 1, 2, 2), **bad)


# ------------------------------------------------------------------------------------------------------ the command


def base(folder: Path) -> Path:
    torch.manual_seed(0)
    model = DiT(input_size=4, patch_size=2, in_channels=3, hidden_size=24, depth=1, num_heads=2, num_classes=3)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    torch.save(model.state_dict(), folder / "base.pt")
    return folder / "base.pt"


@pytest.mark.parametrize("sampler", ["dopri5", "sde"])
def test_command(sampler: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sample", "--ckpt", str(base(tmp_path)), "--sampler", sampler, "--num-sampling-steps", "4"]
    assert main([*words, "-o", str(tmp_path / "a.png"), "--num-images", "2"]) == 0
    assert main([*words, "-o", str(tmp_path / "a.png"), "--objective", "ddpm"]) == 2
    assert f"--sampler {sampler} is not for --objective ddpm" in capsys.readouterr().err
    folder = [*words, "--num-fid-samples", "3", "--sample-dir", str(tmp_path / "s")]
    assert main(folder) == 0
    (settings,) = (tmp_path / "s").glob("SiT-custom-*/sampling.json")
    said = json.loads(settings.read_text())
    assert said["sampler"] == sampler and ("rtol" in said) == (sampler == "dopri5")
    assert main([*folder, "--rtol", "0.01"]) == (2 if sampler == "dopri5" else 0)
    assert main([*words, "--rtol", "0", "-o", str(tmp_path / "b.png")]) == 2
    assert "rtol must be positive; got 0" in capsys.readouterr().err


def test_tolerances_reach_the_solver() -> None:
    torch.manual_seed(0)
    model = DiT(input_size=4, patch_size=2, in_channels=3, hidden_size=24, depth=1, num_heads=2, num_classes=3)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.15)

    def sample(rtol: float) -> Tensor:
        return Sampler(model, "dopri5", 1, 1.0, rtol=rtol, atol=rtol / 1000).sample([0, 1])

    loose, tight = ((sample(rtol) - sample(1e-6)).abs().max() for rtol in (0.1, 1e-3))
    assert tight < 0.3 * loose < 0.3
