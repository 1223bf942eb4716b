"""The theory experiment: its pieces against closed forms, its two findings at a small size, and that it resumes."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch

from difffit_fast.errors import DiffFitError

spec = importlib.util.spec_from_file_location("theory", Path(__file__).parents[1] / "experiments" / "theory.py")
theory = importlib.util.module_from_spec(spec)
spec.loader.exec_module(theory)

TINY = {
    **theory.default_config(quick=True),
    "seeds": [0],
    "dims": [4],
    "source_dim": 3,
    "max_steps": 2000,
    "timesteps": [1, 300],
    "train_timesteps": 5,
}


def test_descent_finds_the_least_squares_solution():
    A, y = torch.randn(40, 5, dtype=theory.F64), torch.randn(40, 2, dtype=theory.F64)
    gamma, steps = theory.descend(A.T @ A, A.T @ y, 100_000)
    torch.testing.assert_close(gamma, torch.linalg.lstsq(A, y).solution, rtol=1e-8, atol=1e-8)
    assert steps < 100_000


def test_worst_noise_costs_what_the_formula_says():
    """Noise along the smallest singular vector moves γ by ‖noise‖ / σ_min: the error over the bound is 1 / (4√2 √s)."""
    for row in theory.bound_case(8, "relu", "orthogonal", 0, [0.1], 100_000):
        if row["noise"] == "worst":
            assert row["error"] / row["bound"] == pytest.approx(1 / (4 * math.sqrt(2 * row["independence"])), rel=1e-4)


def test_the_bound_holds_for_orthogonal_weights_and_can_fail_for_gaussian_ones():
    orthogonal = theory.bound_case(16, "identity", "orthogonal", 2, [0.1], 100_000)
    gaussian = theory.bound_case(16, "identity", "gaussian", 2, [0.1], 100_000)
    assert all(row["error"] < row["bound"] and row["independence"] > 0.5 for row in orthogonal)
    worst = next(row for row in gaussian if row["noise"] == "worst")
    assert worst["independence"] < 1 / 32
    assert worst["error"] > worst["bound"]


def test_the_source_net_is_the_conditional_mean_of_the_noise():
    S, _ = theory.source_and_target(3, 10.0, 0)
    alpha, sigma = theory.schedule()
    assert (float(alpha[0]), float(sigma[0])) == (1.0, 0.0)
    assert float(alpha[500] ** 2 + sigma[500] ** 2) == pytest.approx(1)
    second, cross = theory.moments(S, alpha[300], sigma[300], None, 0)
    net = theory.noise_net(S, alpha[300], sigma[300])
    torch.testing.assert_close(net, torch.linalg.solve(second, cross).T)  # regression of ε on x
    drawn = theory.moments(S, alpha[300], sigma[300], 200_000, 0)
    torch.testing.assert_close(drawn[0], second, rtol=0, atol=0.02)
    torch.testing.assert_close(drawn[1], cross, rtol=0, atol=0.02)


def test_gamma_is_recovered_at_small_noise_only():
    rows = theory.recovery_case({**TINY, "samples": []}, 0)
    small, large = (row["error"] for row in rows)
    assert small < 1e-3
    assert large > 0.05


def test_the_exact_model_samples_its_distribution():
    S, _ = theory.source_and_target(4, 10.0, 1)
    alpha, sigma = theory.schedule()
    nets = theory.noise_net(S, alpha[1:], sigma[1:])
    torch.testing.assert_close(theory.sampled_covariance(nets, alpha, sigma), S, rtol=0.05, atol=2e-3)


def test_it_runs_resumes_and_refuses_other_settings(tmp_path, monkeypatch):
    whole = theory.run(tmp_path / "whole", TINY)
    theory.plot(whole, tmp_path / "whole" / "theory.png")
    assert (tmp_path / "whole" / "theory.png").stat().st_size > 10_000
    # A run that lost half of its cases computes those only, and ends with the same numbers.
    part = json.loads((tmp_path / "whole" / "theory.json").read_text())
    lost = list(part["cases"])[::2]
    for key in lost:
        del part["cases"][key]
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "theory.json").write_text(json.dumps(part))
    computed = []
    original = theory.cases
    monkeypatch.setattr(
        theory, "cases", lambda c: {k: (lambda k=k, f=f: (computed.append(k), f())[1]) for k, f in original(c).items()}
    )
    again = theory.run(tmp_path / "part", TINY)
    assert computed == lost
    assert again["summary"] == whole["summary"]
    with pytest.raises(DiffFitError, match="other settings"):
        theory.run(tmp_path / "part", {**TINY, "etas": [0.2]})
