"""The two statements about γ in the DiffFit paper, re-enacted where everything can be computed.

    python experiments/theory.py [--out docs/experiments] [--seeds 5] [--quick]

1. *Theorem 2.* Features A = f(E Wᵀ + B), [m, D], m = D² ln D rows; y = A γ* + noise with ‖noise‖ = η √m ‖γ*‖. Gradient
   descent on ‖A γ − y‖² from γ = 1 is to end within (4√2 η / √V_min) ‖γ*‖ of γ*, V_min the least variance of a feature. The
   proof needs features that are nearly independent, σ_min(A)² ≥ m V_min / 2; here with W orthogonal and with W Gaussian.
2. *Theorem 1.* Source Q = N(0, S), target P = diag(γ*) Q. The source's noise prediction is known exactly and linear,
   ε_Q(x, t) = σ (α² S + σ² I)⁻¹ x. Only γ is trained, as ε_γ(x, t) = γ⁻¹ ⊙ ε_Q(γ⁻¹ ⊙ x, t), which is right for γ = γ* as σ → 0.
   Is it found (as 1/γ, the factor that is trained), at which noise, from how many samples; and how far from P is what the
   tuned model then samples?

Everything is float64 and drawn from recorded seeds. Results go to ``theory.json`` after every case, so that a run that was
ended goes on where it stopped; the plot goes to ``theory.png``. Under a minute on one core.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from difffit_fast._files import replacing, write_text
from difffit_fast.errors import DiffFitError
from difffit_fast.evaluate.frechet import gaussian_distance

F64 = torch.float64
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
}
SLACK = 4 * math.sqrt(2)  # of the theorem's bound


def default_config(quick: bool = False, seeds: int = 5) -> dict[str, Any]:
    """All that decides the numbers."""
    return {
        "seeds": list(range(2 if quick else seeds)),
        "dims": [8] if quick else [16, 32],
        "etas": [0.01, 0.1],
        "max_steps": 20_000 if quick else 100_000,
        "source_dim": 6 if quick else 16,
        "condition": 10.0,
        "timesteps": [1, 30, 300, 900] if quick else [1, 5, 15, 40, 80, 150, 300, 500, 700, 1000],
        "samples": [1_000, 100_000],
        "small_noise": 100,
        "train_timesteps": 20 if quick else 50,
    }


# --- Theorem 2 ---


def features(dim: int, activation: str, weights: str, seed: int) -> Tensor:
    """A [m, D]: standard normal E, W orthogonal or i.i.d. N(0, 1/D), one bias per feature."""
    g = torch.Generator().manual_seed(seed)
    m = math.ceil(dim**2 * math.log(dim))
    W = torch.randn(dim, dim, generator=g, dtype=F64) / math.sqrt(dim)
    if weights == "orthogonal":
        W = torch.linalg.qr(W)[0]
    B = 0.5 * torch.randn(dim, generator=g, dtype=F64)
    E = torch.randn(m, dim, generator=g, dtype=F64)
    return ACTIVATIONS[activation](E @ W.T + B)


def descend(gram: Tensor, right: Tensor, max_steps: int, tolerance: float = 1e-11) -> tuple[Tensor, int]:
    """Gradient descent on ‖A γ − y‖² from γ = 1 for every column y of Y [m, k]; step 1/σ_max².

    ``gram`` is Aᵀ A [D, D] and ``right`` Aᵀ Y [D, k]: all that it sees. Stops when a step moves γ by less than
    ``tolerance``, relative, in every column. Returns γ [D, k] and the steps.
    """
    rate = 1 / float(torch.linalg.eigvalsh(gram)[-1])
    shrink, shift = torch.eye(len(gram), dtype=F64) - rate * gram, rate * right
    gamma = torch.ones_like(right)
    for step in range(1, max_steps + 1):
        before, gamma = gamma, torch.addmm(shift, shrink, gamma)
        if step % 50 == 0 and bool(((gamma - before).norm(dim=0) < tolerance * gamma.norm(dim=0)).all()):
            return gamma, step
    return gamma, max_steps


def bound_case(dim: int, activation: str, weights: str, seed: int, etas: list[float], max_steps: int) -> list[dict]:
    """One feature matrix; every noise level and both kinds of noise."""
    A = features(dim, activation, weights, seed)
    m = len(A)
    v_min = float(A.var(dim=0).min())
    U, S, _ = torch.linalg.svd(A, full_matrices=False)
    g = torch.Generator().manual_seed(1000 + seed)
    target = 1 + 0.5 * torch.randn(dim, generator=g, dtype=F64)
    random = torch.randn(m, generator=g, dtype=F64)
    noises = {"random": random / random.norm(), "worst": U[:, -1]}
    kinds = [(kind, eta) for kind in noises for eta in etas]
    Y = [A @ target + noises[kind] * (eta * math.sqrt(m) * target.norm()) for kind, eta in kinds]
    gammas, steps = descend(A.T @ A, A.T @ torch.stack(Y, dim=1), max_steps)
    return [
        {
            "noise": kind,
            "eta": eta,
            "error": float((gamma - target).norm() / target.norm()),
            "bound": SLACK * eta / math.sqrt(v_min),
            "independence": float(S[-1] ** 2) / (m * v_min),  # the proof asks for 1/2
            "steps": steps,
        }
        for (kind, eta), gamma in zip(kinds, gammas.T, strict=True)
    ]


# --- Theorem 1 on Gaussians ---


def schedule() -> tuple[Tensor, Tensor]:
    """α_t and σ_t of DiT's diffusion for t = 0 (no noise) ... 1000: 1000 linear betas from 1e-4 to 0.02."""
    kept = torch.cat([torch.ones(1, dtype=F64), (1 - torch.linspace(1e-4, 0.02, 1000, dtype=F64)).cumprod(0)])
    return kept.sqrt(), (1 - kept).sqrt()


def source_and_target(dim: int, condition: float, seed: int) -> tuple[Tensor, Tensor]:
    """S [d, d] with eigenvalues from 1/condition to 1 in random directions, and γ* [d] log-uniform in [1/2, 2]."""
    g = torch.Generator().manual_seed(2000 + seed)
    Q = torch.linalg.qr(torch.randn(dim, dim, generator=g, dtype=F64))[0]
    S = Q * torch.logspace(-math.log10(condition), 0, dim, dtype=F64) @ Q.T
    return S, 2 ** (2 * torch.rand(dim, generator=g, dtype=F64) - 1)


def noise_net(S: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The exact noise prediction of N(0, S) as a matrix; ``alpha``, ``sigma`` numbers or [T]."""
    a, s = alpha[..., None, None], sigma[..., None, None]
    return s * torch.linalg.inv(a**2 * S + s**2 * torch.eye(len(S), dtype=F64))


def scaled(net: Tensor, gammas: Tensor) -> Tensor:
    """γ_out ⊙ net(γ_in ⊙ ·) as a matrix; ``gammas`` [1, d] uses one for both."""
    return gammas[-1][:, None] * net * gammas[0]


def train_gamma(
    net: Tensor, second: Tensor, cross: Tensor, sigma: Tensor, shared: bool = True, steps: int = 60
) -> tuple[Tensor, float]:
    """Minimise Σ_t E‖ε − A_t x_t‖² / σ_t² over 1/γ from γ = 1 by L-BFGS.

    The loss is quadratic in the data, so its moments are all it sees: ``second`` [T, d, d] = E x xᵀ and ``cross``
    [T, d, d] = E x εᵀ, exact or of samples.

    Returns:
        The factors [1, d] (or [2, d]: input and output apart), and the loss.
    """
    log = torch.zeros(1 if shared else 2, len(net[0]), dtype=F64, requires_grad=True)  # exp keeps the factors positive
    optimizer = torch.optim.LBFGS(
        [log], max_iter=steps, line_search_fn="strong_wolfe", tolerance_grad=1e-12, tolerance_change=1e-15
    )

    def loss() -> Tensor:
        A = scaled(net, log.exp())
        per_step = (A @ second * A).sum((1, 2)) - 2 * (A * cross.mT).sum((1, 2))
        return (per_step / sigma**2).mean()

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    for _ in range(2):
        optimizer.step(closure)
    return log.detach().exp(), float(loss().detach())


def moments(P: Tensor, alpha: Tensor, sigma: Tensor, samples: int | None, seed: int) -> tuple[Tensor, Tensor]:
    """E x xᵀ and E x εᵀ of x = α x₀ + σ ε, x₀ ~ N(0, P): exact, or of so many samples."""
    eye = torch.eye(len(P), dtype=F64)
    if samples is None:
        return alpha**2 * P + sigma**2 * eye, sigma * eye
    g = torch.Generator().manual_seed(3000 + seed)
    x0 = torch.randn(samples, len(P), generator=g, dtype=F64) @ torch.linalg.cholesky(P).T
    noise = torch.randn(samples, len(P), generator=g, dtype=F64)
    x = alpha * x0 + sigma * noise
    return x.T @ x / samples, x.T @ noise / samples


def recovery_case(config: dict[str, Any], seed: int) -> list[dict]:
    """γ trained at a single noise level, for every level and number of samples."""
    S, target = source_and_target(config["source_dim"], config["condition"], seed)
    P = target[:, None] * S * target
    alpha, sigma = schedule()
    rows = []
    for t in config["timesteps"]:
        net = noise_net(S, alpha[t], sigma[t])[None]
        for samples in [None, *config["samples"]]:
            second, cross = moments(P, alpha[t], sigma[t], samples, seed)
            factors, _ = train_gamma(net, second[None], cross[None], sigma[t][None])
            error = float((factors[0] - 1 / target).norm() / (1 / target).norm())
            rows.append({"t": t, "sigma": float(sigma[t]), "samples": samples, "error": error})
    return rows


def sampled_covariance(nets: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Covariance of what DDIM (eta 0, all 1000 steps) samples with the linear noise predictions ``nets`` [1000, d, d]."""
    eye = torch.eye(nets.shape[-1], dtype=F64)
    total = eye
    for t in range(1000, 0, -1):
        A = nets[t - 1]
        total = (alpha[t - 1] / alpha[t] * (eye - sigma[t] * A) + sigma[t - 1] * A) @ total
    return total @ total.T


def sampling_case(config: dict[str, Any], seed: int) -> dict[str, float]:
    """Fréchet distance from P of what each model samples; one set of γ for all noise levels."""
    S, target = source_and_target(config["source_dim"], config["condition"], seed)
    P = target[:, None] * S * target
    alpha, sigma = schedule()
    nets = noise_net(S, alpha[1:], sigma[1:])
    zero = torch.zeros(len(S), dtype=F64)

    def distance(A: Tensor) -> float:
        return gaussian_distance(zero, sampled_covariance(A, alpha, sigma), zero, P)

    result = {"source": distance(nets), "exact": distance(noise_net(P, alpha[1:], sigma[1:]))}
    result["gamma_star"] = distance(scaled(nets, 1 / target[None]))
    for name, last in (("small", config["small_noise"]), ("all", 1000)):
        times = torch.linspace(1, last, config["train_timesteps"]).round().long().unique()
        a, s = alpha[times], sigma[times]
        pairs = [moments(P, x, y, None, seed) for x, y in zip(a, s, strict=True)]
        second, cross = (torch.stack(p) for p in zip(*pairs, strict=True))
        # Unweighted, as noise prediction is trained; for small noise its weight 1/σ² keeps the small levels in play.
        weight = s if name == "small" else torch.ones_like(s)
        for kind, shared in (("one", True), ("two", False)):
            factors, _ = train_gamma(noise_net(S, a, s), second, cross, weight, shared)
            result[f"{kind}_{name}"] = distance(scaled(nets, factors))
    return result


# --- running ---


def cases(config: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """Every case by its key in the results."""
    found: dict[str, Callable[[], Any]] = {}
    for dim in config["dims"]:
        for activation in ACTIVATIONS:
            for weights in ("orthogonal", "gaussian"):
                for seed in config["seeds"]:
                    args = (dim, activation, weights, seed, config["etas"], config["max_steps"])
                    found[f"bound/{dim}/{activation}/{weights}/{seed}"] = lambda args=args: bound_case(*args)
    for seed in config["seeds"]:
        found[f"recovery/{seed}"] = lambda seed=seed: recovery_case(config, seed)
        found[f"sampling/{seed}"] = lambda seed=seed: sampling_case(config, seed)
    return found


def run(out: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Run what ``out/theory.json`` lacks, summarise, and write it; returns its content."""
    path = out / "theory.json"
    out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"config": config, "cases": {}}
    if path.exists():
        report = json.loads(path.read_text(encoding="utf-8"))
        if report["config"] != config:
            raise DiffFitError(f"{path} was written with other settings; remove it or give another --out")
    torch.set_num_threads(1)  # the matrices are small
    for key, case in cases(config).items():
        if key not in report["cases"]:
            report["cases"][key] = case()
            write_text(path, json.dumps(report, indent=1) + "\n")
    report["summary"] = summarise(report)
    write_text(path, json.dumps(report, indent=1) + "\n")
    return report


def summarise(report: dict[str, Any]) -> dict[str, Any]:
    """What the text quotes: largest error over bound per kind of case, means over seeds of the rest."""
    bound: dict[str, dict[str, float]] = {}
    recovery: dict[str, list[float]] = {}
    sampling: dict[str, list[float]] = {}
    for key, result in report["cases"].items():
        part, *rest = key.split("/")
        if part == "bound":
            for row in result:
                entry = bound.setdefault(
                    f"{rest[2]}/{rest[1]}/{row['noise']}", {"max_ratio": 0.0, "violations": 0, "of": 0}
                )
                ratio = row["error"] / row["bound"]
                entry["max_ratio"] = max(entry["max_ratio"], ratio)
                entry["violations"] += ratio >= 1
                entry["of"] += 1
                entry["min_independence"] = min(entry.get("min_independence", math.inf), row["independence"])
        elif part == "recovery":
            for row in result:
                recovery.setdefault(f"{row['samples'] or 'exact'}/{row['t']}", []).append(row["error"])
        else:
            for name, value in result.items():
                sampling.setdefault(name, []).append(value)
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    return {
        "bound": bound,
        "recovery": {k: mean(v) for k, v in recovery.items()},
        "sampling": {k: {"mean": mean(v), "min": min(v), "max": max(v)} for k, v in sampling.items()},
    }


COLOURS = {"identity": "#1b6ca8", "relu": "#d1495b", "gelu": "#3a7d44"}
SAMPLING_NAMES = {
    "source": "source model",
    "one_all": "one γ, all noise levels",
    "one_small": "one γ, small noise",
    "two_all": "γ in and out, all noise levels",
    "two_small": "γ in and out, small noise",
    "gamma_star": "γ = γ*",
}


def plot(report: dict[str, Any], path: Path) -> None:
    """Three panels: the bound, recovery by noise level, distance of the samples."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(16, 4.8), width_ratios=(1.15, 1, 1))
    xs = []
    for key, rows in report["cases"].items():
        if not key.startswith("bound/"):
            continue
        _, _, activation, weights, _ = key.split("/")
        for row in rows:
            xs.append(row["independence"])
            left.scatter(
                row["independence"],
                row["error"] / row["bound"],
                s=26,
                marker="o" if weights == "orthogonal" else "^",
                facecolors=COLOURS[activation] if row["noise"] == "worst" else "none",
                edgecolors=COLOURS[activation],
                linewidths=0.9,
            )
    line = torch.logspace(math.log10(min(xs)) - 0.2, math.log10(max(xs)) + 0.2, 50, dtype=F64)
    left.plot(line, 1 / (SLACK * line.sqrt()), color="0.6", linewidth=1, zorder=0)
    left.axhline(1, color="black", linewidth=1)
    left.axvline(0.5, color="black", linewidth=1, linestyle=":")
    left.set(xscale="log", yscale="log", title="Theorem 2: error of γ over its bound")
    left.set_xlabel("σ_min(A)² / (m V_min)     (dotted: what the proof asks for)")
    left.set_ylabel("‖γ̂ − γ*‖ / bound     (above 1: fails)")
    handle = lambda **style: plt.Line2D([], [], linestyle="", color="0.25", **style)  # noqa: E731
    left.legend(
        [
            *[plt.Line2D([], [], linestyle="", marker="s", color=c) for c in COLOURS.values()],
            handle(marker="o"),
            handle(marker="^"),
            handle(marker="o", markerfacecolor="none"),
            plt.Line2D([], [], color="0.6"),
        ],
        [*COLOURS, "W orthogonal", "W Gaussian", "hollow: random noise", "worst noise, in theory"],
        fontsize=7.5,
        loc="upper right",
        framealpha=1,
    )

    levels = report["config"]["timesteps"]
    sigma = {row["t"]: row["sigma"] for row in report["cases"][f"recovery/{report['config']['seeds'][0]}"]}
    series = [("exact", "exact loss", "black")]
    series += [
        (n, f"{n:,} samples", c) for n, c in zip(report["config"]["samples"], ("#d1495b", "#1b6ca8"), strict=True)
    ]
    for name, label, colour in series:
        runs = [
            [row["error"] for row in report["cases"][f"recovery/{seed}"] if (row["samples"] or "exact") == name]
            for seed in report["config"]["seeds"]
        ]
        values = torch.tensor(runs, dtype=F64)
        x = [sigma[t] for t in levels]
        middle.plot(x, values.mean(0), marker="o", markersize=4, color=colour, label=label)
        middle.fill_between(x, values.amin(0), values.amax(0), color=colour, alpha=0.15, linewidth=0)
    middle.set(xscale="log", yscale="log", title="Theorem 1: γ trained at one noise level")
    middle.set_xlabel("σ of that level (linear schedule, t = 1 … 1000)")
    middle.set_ylabel("‖1/γ̂ − 1/γ*‖ / ‖1/γ*‖     (mean, range over seeds)")
    middle.legend(fontsize=8)

    summary = report["summary"]["sampling"]
    names = list(reversed(SAMPLING_NAMES))
    for y, name in enumerate(names):
        entry = summary[name]
        right.barh(y, entry["mean"], color="0.75" if name in ("source", "gamma_star") else "#1b6ca8", height=0.6)
        right.plot([entry["min"], entry["max"]], [y, y], color="black", linewidth=1.2)
        right.text(entry["max"] * 1.15, y, f"{entry['mean']:.3g}", va="center", fontsize=8)
    right.set_yticks(range(len(names)), [SAMPLING_NAMES[name] for name in names], fontsize=8)
    right.set(xscale="log", xlim=(summary["exact"]["mean"] / 3, 8 * max(summary[name]["max"] for name in names)))
    right.axvline(summary["exact"]["mean"], color="#d1495b", linewidth=1.2, linestyle="--")
    right.set(title="What the tuned model samples")
    right.set_xlabel("Fréchet distance to P  (dashed: exact model of P)")
    for axis in (left, middle, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/experiments"), help="folder for theory.json, theory.png")
    parser.add_argument("--seeds", type=int, default=5, help="repetitions (default: 5)")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    args = parser.parse_args(argv)
    report = run(args.out, default_config(args.quick, args.seeds))
    plot(report, args.out / "theory.png")
    print(json.dumps(report["summary"], indent=1))


if __name__ == "__main__":
    main()
