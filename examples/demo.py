#!/usr/bin/env python
"""The main job in small: adapt a pre-trained DiT to new real images, three ways, side by side.

scikit-learn's 1,797 handwritten digits (8 x 8 pixels, shipped inside the package). A small DiT learns 0 to 4; it is then
adapted to 5 to 9 by full fine-tuning, by DiffFit in plain PyTorch with frozen weights, and by FastDiffFitDiT, from the
same checkpoint, seed, batches and noise, one step of each in turn. Writes a table, a sample grid, a loss plot, the delta
and the merged checkpoint to demo_output/.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from difffit_fast import DiT, FastDiffFitDiT, Sampler, build_info, create_diffusion
from difffit_fast.baselines.plain_difffit import PlainDiffFitDiT
from difffit_fast.evaluate import frechet_distance

MODEL = dict(input_size=8, patch_size=2, in_channels=1, hidden_size=128, depth=4, num_heads=4, num_classes=5)
METHODS = {"full": "full fine-tuning", "frozen": "DiffFit, plain PyTorch", "fast": "DiffFit, FastDiffFitDiT"}
LEARNING_RATE = {"full": 5e-4, "frozen": 5e-3, "fast": 5e-3}  # DiffFit's rate is ten times the one for all weights
BATCH, EMA_DECAY = 64, 0.99
diffusion = create_diffusion()


# -- data ----------------------------------------------------------------------------------------------------------
def digits(classes: range) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and held-out images (N, 1, 8, 8) in [-1, 1] with labels from 0."""
    data = load_digits()
    keep = np.isin(data.target, list(classes))
    images = torch.from_numpy(data.images[keep]).float()[:, None] / 8 - 1
    labels = torch.from_numpy(data.target[keep]).long() - classes.start
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    split = int(0.8 * len(order))
    train, held_out = order[:split], order[split:]
    return images[train], labels[train], images[held_out], labels[held_out]


def train_features(steps: int = 400) -> nn.Sequential:
    """A small classifier of all ten digits; its last hidden layer (before the ReLU) gives the features."""
    torch.manual_seed(0)
    x, y, x_test, y_test = digits(range(10))
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(512, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    for _ in range(steps):
        pick = torch.randint(0, len(x), (128,))
        optimizer.zero_grad()
        F.cross_entropy(net(x[pick]), y[pick]).backward()
        optimizer.step()
    accuracy = (net(x_test).argmax(1) == y_test).float().mean().item()
    print(f"  classifier for the features: {100 * accuracy:.1f} % of the held-out digits right")
    return net.eval()


@torch.no_grad()
def statistics(net: nn.Sequential, images: Tensor) -> tuple[np.ndarray, np.ndarray]:
    features = net[:-2](images).double().numpy()
    return features.mean(0), np.cov(features, rowvar=False)


# -- training ------------------------------------------------------------------------------------------------------
class Run:
    """A model with AdamW and an EMA of what trains."""

    def __init__(self, model: nn.Module, lr: float) -> None:
        self.model = model.train()
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.ema = [p.detach().clone() for p in self.params]
        self.optimizer = torch.optim.AdamW(self.params, lr=lr, weight_decay=0.0, fused=True)
        self.seconds: list[float] = []
        self.validation: list[tuple[int, float]] = []

    def step(self, x: Tensor, y: Tensor, seed: int) -> float:
        torch.manual_seed(seed)  # the same timesteps, noise and dropped labels for every method
        start = time.perf_counter()
        t = torch.randint(0, 1000, (len(x),))
        loss = diffusion.training_losses(self.model, x, t, {"y": y})["loss"].mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        torch._foreach_lerp_(self.ema, self.params, 1 - EMA_DECAY)
        self.seconds.append(time.perf_counter() - start)
        return loss.item()

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the weights and their averages."""
        for p, e in zip(self.params, self.ema, strict=True):
            kept = p.clone()
            p.copy_(e)
            e.copy_(kept)

    @torch.no_grad()
    def validate(self, x: Tensor, y: Tensor) -> float:
        """Loss of the averaged weights on held-out images with fixed timesteps and noise."""
        self.swap()
        self.model.eval()
        generator = torch.Generator().manual_seed(1)
        total = 0.0
        for _ in range(2):
            t = torch.randint(0, 1000, (len(x),), generator=generator)
            noise = torch.randn(x.shape, generator=generator)
            total += diffusion.training_losses(self.model, x, t, {"y": y}, noise=noise)["loss"].mean().item() / 2
        self.model.train()
        self.swap()
        return total


def pretrain(path: Path, steps: int) -> None:
    torch.manual_seed(0)
    x, y, x_val, y_val = digits(range(5))
    run = Run(DiT(**MODEL), lr=2e-3)
    pick = torch.Generator().manual_seed(2)
    for i in (bar := tqdm(range(steps), desc="pre-training on 0-4", unit="step")):
        index = torch.randint(0, len(x), (BATCH,), generator=pick)
        loss = run.step(x[index], y[index], seed=i)
        if i % 50 == 0:
            bar.set_postfix(loss=f"{loss:.3f}")
    print(f"  validation loss on 0-4: {run.validate(x_val, y_val):.4f}")
    run.swap()
    torch.save({"ema": run.model.state_dict()}, path)


def build(method: str, base: Path) -> nn.Module:
    """The pre-trained model with a class table for the new digits, the same one for every method."""
    torch.manual_seed(1)
    fast = FastDiffFitDiT.from_pretrained(base, num_heads=MODEL["num_heads"])
    nn.init.normal_(fast.y_embedder.embedding_table.weight, std=0.02)
    if method == "fast":
        return fast
    model = DiT(**MODEL) if method == "full" else PlainDiffFitDiT(**MODEL)
    own = model.state_dict()
    model.load_state_dict({k: v for k, v in fast.state_dict().items() if k in own})
    return model


def peak_memory(method: str, base: Path) -> int | None:
    """Peak bytes of three steps, in a process of its own, beyond what it held before the model was made."""
    done = subprocess.run(
        [sys.executable, __file__, "--memory-of", method, "--base", str(base)], capture_output=True, text=True
    )
    return int(done.stdout.split()[-1]) if done.returncode == 0 and done.stdout.split() else None


def memory_child(method: str, base: Path) -> None:
    def resident(field: str) -> int:
        text = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) for line in text.splitlines() if line.startswith(field)) * 1024

    x, y, _, _ = digits(range(5, 10))
    torch.ones(8).add_(1)
    before = resident("VmRSS")
    run = Run(build(method, base), LEARNING_RATE[method])
    for i in range(3):
        run.step(x[:BATCH], y[:BATCH], seed=i)
    print(resident("VmHWM") - before)


# -- the comparison ------------------------------------------------------------------------------------------------
def adapt(base: Path, out: Path, steps: int) -> tuple[dict[str, Run], dict[str, dict]]:
    x, y, x_val, y_val = digits(range(5, 10))
    runs = {m: Run(build(m, base), LEARNING_RATE[m]) for m in METHODS}
    every = max(1, steps // 12)
    pick = torch.Generator().manual_seed(3)
    for i in tqdm(range(steps + 1), desc="adapting to 5-9, three methods in turn", unit="step"):
        if i % every == 0 or i == steps:
            for run in runs.values():
                run.validation.append((i, run.validate(x_val, y_val)))
        if i < steps:
            index = torch.randint(0, len(x), (BATCH,), generator=pick)
            for run in runs.values():
                run.step(x[index], y[index], seed=i)
    rows: dict[str, dict] = {}
    for method, run in runs.items():
        run.swap()  # from here on the averages
        seconds = sorted(run.seconds[3:])
        stored = out / ("full.pt" if method == "full" else f"{method}.safetensors")
        if method == "full":
            torch.save(run.model.state_dict(), stored)
        elif method == "fast":
            run.model.save_delta(stored, class_names=[str(d) for d in range(5, 10)], step=steps)
        else:
            torch.save({n: p for n, p in run.model.named_parameters() if p.requires_grad}, stored)
        rows[method] = {
            "images_per_second": BATCH / seconds[len(seconds) // 2],
            "step_ms": {
                q: 1e3 * seconds[int(f * (len(seconds) - 1))] for q, f in (("p10", 0.1), ("p50", 0.5), ("p90", 0.9))
            },
            "peak_memory_bytes": peak_memory(method, base),
            "trainable_parameters": sum(p.numel() for p in run.params),
            "stored_bytes": stored.stat().st_size,
            "validation_loss": run.validation[-1][1],
            "validation_curve": run.validation,
        }
    return runs, rows


def sample_and_score(runs: dict[str, Run], rows: dict[str, dict], net: nn.Sequential, count: int) -> dict[str, Tensor]:
    """Samples of every method from the same noise, and the Fréchet distance of their features to the real digits'."""
    x, y, x_val, y_val = digits(range(5, 10))
    real = statistics(net, torch.cat([x, x_val]))
    labels = torch.cat([y, y_val])[torch.linspace(0, len(y) + len(y_val) - 1, count).long()]
    samples: dict[str, Tensor] = {}
    for method, run in tqdm(runs.items(), desc="sampling", unit="method"):
        sampler = Sampler(run.model, "ddim", num_sampling_steps=20, cfg_scale=1.5, batch_size=250)
        samples[method] = sampler.sample(labels, seed=0, decode=False).clamp(-1, 1)
        rows[method]["frechet"] = frechet_distance(*statistics(net, samples[method]), *real)
    rows["real"] = {"frechet": frechet_distance(*statistics(net, x_val), *real)}
    shown = torch.arange(5).repeat_interleave(3)
    pictures = {"real": torch.stack([x[y == c][k] for c in range(5) for k in range(3)])}
    for method, run in runs.items():
        sampler = Sampler(run.model, "ddim", num_sampling_steps=30, cfg_scale=1.5)
        pictures[method] = sampler.sample(shown, seed=7, decode=False).clamp(-1, 1)
    return pictures


def draw(pictures: dict[str, Tensor], rows: dict[str, dict], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(pictures), 1, figsize=(9, 3.4))
    for axis, (name, images) in zip(axes, pictures.items(), strict=True):
        strip = torch.cat([F.pad(im[0], (0, 1, 0, 0), value=1.0) for im in images], 1)
        axis.imshow(strip.numpy(), cmap="gray_r", vmin=-1, vmax=1, interpolation="nearest")
        axis.set_xticks([]), axis.set_yticks([])
        label = "real digits" if name == "real" else METHODS[name].replace(", ", ",\n")
        axis.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
    figure.suptitle("Adapted from 0-4 to 5-9: samples from the same noise", fontsize=10)
    figure.tight_layout()
    figure.savefig(out / "samples.png", dpi=150)
    plt.close(figure)

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    styles = {"full": "C0-", "frozen": "C1-", "fast": "C2--"}
    for method in METHODS:
        steps, losses = zip(*rows[method]["validation_curve"], strict=True)
        left.plot(steps, losses, styles[method], label=METHODS[method])
        right.plot([s * rows[method]["step_ms"]["p50"] / 1e3 for s in steps], losses, styles[method])
    left.set(xlabel="step", ylabel="validation loss on 5-9", yscale="log")
    right.set(xlabel="seconds of training")
    left.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(out / "loss.png", dpi=150)
    plt.close(figure)


def table(rows: dict[str, dict]) -> str:
    head = f"{'':26}{'images/s':>9}{'ratio':>7}{'peak MiB':>10}{'trainable':>11}{'stored kB':>11}{'val. loss':>11}{'Fréchet':>9}"
    lines = [head]
    full = rows["full"]["images_per_second"]
    for method, title in METHODS.items():
        r = rows[method]
        memory = f"{r['peak_memory_bytes'] / 2**20:.0f}" if r["peak_memory_bytes"] else "-"
        lines.append(
            f"{title:26}{r['images_per_second']:9.0f}{r['images_per_second'] / full:6.2f}x{memory:>10}"
            f"{r['trainable_parameters']:11,}{r['stored_bytes'] / 1e3:11.0f}{r['validation_loss']:11.4f}{r['frechet']:9.2f}"
        )
    lines.append(f"{'held-out real digits':26}{'':59}{rows['real']['frechet']:9.2f}")
    lines.append("Fréchet: distance to the real 5-9 in the features of a small classifier of these digits, not FID.")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo_output"))
    parser.add_argument("--pretrain-steps", type=int, default=1200)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--samples", type=int, default=300)
    parser.add_argument("--memory-of", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--base", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*class embedding is made anew.*")
    if args.memory_of:
        memory_child(args.memory_of, args.base)
        return 0
    start = time.perf_counter()
    info = build_info()
    print(
        f"PyTorch {info['torch']}, {torch.get_num_threads()} threads, C++ kernels: {info['cpu_capability'] or 'not built'}"
    )
    args.out.mkdir(parents=True, exist_ok=True)
    base = args.out / "base.pt"
    net = train_features()
    pretrain(base, args.pretrain_steps)
    runs, rows = adapt(base, args.out, args.steps)
    pictures = sample_and_score(runs, rows, net, args.samples)
    draw(pictures, rows, args.out)

    fast = runs["fast"].model.eval()
    merged = fast.merge()
    torch.save(merged.state_dict(), args.out / "merged.pt")
    x, t, y = torch.randn(8, 1, 8, 8), torch.randint(0, 1000, (8,)), torch.randint(0, 5, (8,))
    with torch.no_grad():
        difference = (merged(x, t, y) - fast(x, t, y)).abs().max().item()
    text = table(rows)
    minutes = (time.perf_counter() - start) / 60
    (args.out / "results.json").write_text(
        json.dumps({"methods": rows, "minutes": minutes, "build": info}, indent=2) + "\n"
    )
    (args.out / "table.txt").write_text(text + "\n")
    print(f"\n{text}\n")
    print(f"merged checkpoint: plain DiT, largest difference from the adapted model {difference:.1e}")
    print(
        f"in {args.out}/: samples.png, loss.png, fast.safetensors (the delta), merged.pt, results.json; {minutes:.1f} minutes"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
