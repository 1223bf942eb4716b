#!/usr/bin/env python
"""The main job in small: a base that knows letters learns a hand of which it is shown twenty.

The base that comes with the package (a DiT of 1.9 M parameters, trained on the fonts of experiments/glyphs) is adapted to
``examples/hand/shown`` three ways: by DiffFit as it is set by default, by full fine-tuning at DiT's own learning rate, and at a
tenth of that, which somebody has to think of. Measured is what a person would want of it: is the loss on the 32 letters
that were *not* shown smaller, are samples legible, are they copies of others, does the base still know what it knew, how many
images a second, how many bytes to keep. Writes a table, a figure and the three results to ``demo_output/``; ``--publish``
puts table and figure under ``benchmarks/results`` and into the README as well.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "experiments" / "glyphs"), str(ROOT / "benchmarks")]

from alphabet import LETTERS, Glyphs, load  # noqa: E402
from common import RESULTS, slug  # noqa: E402
from machine import device_name  # noqa: E402
from measures import Instrument, letters_read, nearest  # noqa: E402

from difffit_fast import Sampler, build_info, create_diffusion  # noqa: E402
from difffit_fast.models.load import load_model  # noqa: E402
from difffit_fast.train import TrainConfig, Trainer  # noqa: E402
from difffit_fast.train.track import read_metrics  # noqa: E402

HAND = ROOT / "examples" / "hand"
BATCH = 32
CAREFUL = 1e-5  # so few images want a smaller rate than the one that a DiT is trained with
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "difffit": ("DiffFit, as set by default", {"method": "difffit"}),
    "full": ("full, DiT's rate 1e-4", {"method": "full", "lr": 1e-4}),
    "full_careful": (f"full, a tenth of that, {CAREFUL:g}", {"method": "full", "lr": CAREFUL}),
}


class Repeated:
    """Glyphs as training data, each so many times: a loss over few images is steadier over many timesteps of each."""

    channels, flip = 1, False

    def __init__(self, glyphs: Glyphs, times: int) -> None:
        self.glyphs, self.times = glyphs, times
        self.class_names, self.num_classes = list(LETTERS), len(LETTERS)
        self.size = self.image_size = glyphs.images.shape[-1]

    def __len__(self) -> int:
        return self.times * len(self.glyphs)

    def load(self, index: int, seed: int) -> tuple[Tensor, int]:
        place = index % len(self.glyphs)
        return self.glyphs.images[place].float() / 127.5 - 1, int(self.glyphs.labels[place])

    def report(self) -> list[Any]:
        return []


def adapt(name: str, base: str, asked: Glyphs, steps: int, out: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Train one of :data:`RUNS`; returns the averaged model and what is known about the run."""
    config = TrainConfig(
        **RUNS[name][1], ckpt=base, data_path=str(HAND / "shown"), image_size=24, vae="none", flip="none", classes="keep",
        max_steps=steps, global_batch_size=BATCH, num_workers=0, precision="fp32", log_every=5, val_every=max(1, steps // 12),
        ckpt_every=steps, results_dir=str(out / name),
    )  # fmt: skip
    trainer = Trainer(config, val_data=Repeated(asked, 4))
    done = trainer.train()
    lines = read_metrics(done.folder)
    rate = statistics.median([line["images_per_second"] for line in lines if "images_per_second" in line])
    trainer.ema.exchange()
    return trainer.model.eval(), {
        "curve": [[line["step"], line["val_loss"]] for line in lines if "val_loss" in line],
        "seconds": steps * BATCH / rate, "trainable": sum(p.numel() for p in trainer.parameters.values()),
        "bytes": done.delta.stat().st_size,
    }  # fmt: skip


# -- images a second ---------------------------------------------------------------------------------------------------
def speeds(base: str, shown: Glyphs, device: torch.device, rounds: int = 12) -> dict[str, list[float]]:
    """Images a second of DiffFit and of full fine-tuning, as it is and compiled, one step of each in turn."""
    from difffit_fast import baselines

    diffusion = create_diffusion()
    steps = {}
    for name in ("DiffFit", "full, eager", "full, compiled"):
        dit = load_model(base, device=device).model.train()
        model = baselines.apply("difffit" if name == "DiffFit" else "full", dit).train()
        model.y_embedder.dropout_prob = 0.0  # as the trainer has it, which drops labels itself
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
        call = torch.compile(model) if name.endswith("compiled") else model
        x = (shown.images[torch.arange(BATCH) % len(shown)].float() / 127.5 - 1).to(device)
        y = shown.labels[torch.arange(BATCH) % len(shown)].to(device)

        def step(call: Any = call, optimizer: Any = optimizer, x: Tensor = x, y: Tensor = y) -> float:
            t, noise = torch.randint(0, 1000, (BATCH,), device=device), torch.randn_like(x)
            start = time.perf_counter()
            diffusion.training_losses(call, x, t, {"y": y}, noise=noise)["loss"].mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            return BATCH / (time.perf_counter() - start)

        for _ in range(2):
            step()
        steps[name] = step
    found: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            found[name].append(step())
    return found


# -- measures and pictures ---------------------------------------------------------------------------------------------
def measure(
    instrument: Instrument, model: nn.Module, shown: Glyphs, asked: Glyphs, own: Glyphs
) -> tuple[dict[str, Any], Tensor]:
    """Losses, letters read and copies of a model, and a sample of every letter.

    Copies are looked for among samples of letters that were not shown: those which are nearer to one that was than any real
    letter of the hand is.
    """
    labels = torch.arange(len(LETTERS)).repeat(4)
    sampler = Sampler(model, "ddim", num_sampling_steps=25, cfg_scale=2.0, batch_size=104)
    samples = sampler.sample(labels, seed=0).cpu()
    found = instrument.measures(samples, labels, "handwriting", shown, asked, own)
    fresh = samples[torch.isin(labels, asked.labels)]
    chance = nearest(asked.images, shown.images).min()  # c and C of one hand are alike
    found["memorised"] = float((nearest(fresh, shown.images) < chance).double().mean())
    found |= {"loss": instrument.loss(model, asked), "loss_own": instrument.loss(model, own)}
    return found, samples[: len(LETTERS)]


def draw(rows: dict[str, dict[str, Any]], strips: dict[str, Tensor], path: Path) -> None:
    """Real letters and samples, a line each, beside the loss on the letters that were not shown."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(12, 4.6))
    grid = figure.add_gridspec(len(strips), 2, width_ratios=[2.1, 1])
    for line, (name, images) in enumerate(strips.items()):
        axis = figure.add_subplot(grid[line, 0])
        rows_of = images.split(26)
        width = max(len(part) for part in rows_of)
        picture = torch.full((24 * len(rows_of), 24 * width), -1.0)
        for i, part in enumerate(rows_of):
            picture[24 * i : 24 * (i + 1), : 24 * len(part)] = part[:, 0].permute(1, 0, 2).flatten(1)
        axis.imshow(picture, cmap="gray_r", vmin=-1, vmax=1, interpolation="nearest")
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
        axis.set(xticks=[], yticks=[])
        for side in axis.spines.values():
            side.set_visible(False)
    axis = figure.add_subplot(grid[:, 1])
    for name, colour in zip(RUNS, ("C0", "C3", "C7"), strict=True):
        axis.plot(*zip(*rows[name]["curve"], strict=True), color=colour, marker=".", label=RUNS[name][0])
    axis.set(xlabel="step", title="loss on the 32 letters that were not shown")
    axis.title.set_fontsize(10)
    axis.legend(frameon=False, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)


def table(lines_of: list[tuple[str, dict[str, Any]]], speed: dict[str, float]) -> str:
    head = f"{'':28}{'loss, not shown':>16}{'letters read':>13}{'copies':>8}{'loss, base':>12}{'seconds':>9}{'kB to keep':>12}"
    lines = [head]
    for title, row in lines_of:
        loss, own = (f"{row[key]:.4f}" if key in row else "" for key in ("loss", "loss_own"))
        copies = f"{row['memorised']:.0%}" if "memorised" in row else ""
        seconds, size = (f"{row['seconds']:.0f}", f"{row['bytes'] / 1e3:,.0f}") if "seconds" in row else ("", "")
        lines.append(f"{title:28}{loss:>16}{row['letters']:13.0%}{copies:>8}{own:>12}{seconds:>9}{size:>12}")
    lines.append("images a second: " + ", ".join(f"{name} {value:.0f}" for name, value in speed.items()))
    return "\n".join(lines)


def verdict(rows: dict[str, dict[str, Any]]) -> str:
    """Who wins, by the loss on the letters that were not shown."""
    order = sorted(RUNS, key=lambda name: rows[name]["loss"])
    first, rest = order[0], [f"{RUNS[name][0]} {rows[name]['loss']:.4f}" for name in order[1:]]
    said = (
        f"Smallest loss on letters that were not shown: {RUNS[first][0]}, {rows[first]['loss']:.4f} ({'; '.join(rest)})"
    )
    worse = [RUNS[name][0] for name in RUNS if rows[name]["loss"] > rows["base"]["loss"]]
    return said + (f"; worse than the base it began from: {', '.join(worse)}." if worse else ".")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo_output"))
    parser.add_argument("--base", default="glyphs", help="the base (default: the one of the package)")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument(
        "--publish", action="store_true", help="also put table and figure into benchmarks/results and README.md"
    )
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*bf16.*")
    start = time.perf_counter()
    info = build_info()
    kernels = info["cpu_capability"] or "not built"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"PyTorch {info['torch']}, {device}, {torch.get_num_threads()} threads, C++ kernels: {kernels}")
    args.out.mkdir(parents=True, exist_ok=True)
    instrument = Instrument(HAND / "reader.safetensors")
    shown, asked, own = (load(HAND / part) for part in ("shown", "asked", "own"))
    rows: dict[str, dict[str, Any]] = {}
    rows["base"], strip = measure(instrument, load_model(args.base, device=device).model, shown, asked, own)
    real = Glyphs.joined([shown, asked])
    rows["real"] = {"letters": letters_read(real.images, real.labels, instrument.reader)}
    strips = {
        "20 letters\nthat are shown": shown.images / 127.5 - 1,
        "32 that are not": asked.images / 127.5 - 1,
        "the base": strip,
    }
    for name, (title, _) in RUNS.items():
        print(f"\n{title}:")
        model, rows[name] = adapt(name, args.base, asked, args.steps, args.out)
        found, strips[title.replace(", ", ",\n")] = measure(instrument, model, shown, asked, own)
        rows[name] |= found
    print("\nimages a second, one step of each in turn (compiling takes a minute)")
    found = speeds(args.base, shown, device)
    speed = {name: statistics.median(values) for name, values in found.items()}
    draw(rows, strips, args.out / "demo.png")
    titles = {
        "base": "the base, not adapted",
        **{name: title for name, (title, _) in RUNS.items()},
        "real": "real letters",
    }
    lines = [(title, rows[name]) for name, title in titles.items()]
    said = verdict(rows)
    minutes = (time.perf_counter() - start) / 60
    result = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": f"{device_name(device)}, PyTorch {torch.__version__}", "table": lines, "verdict": said,
        "images_per_second_median": speed, "images_per_second": found, "steps": args.steps, "batch": BATCH,
        "minutes": round(minutes, 2), "build": info,
    }  # fmt: skip
    text = f"{table(lines, speed)}\n{said}"
    (args.out / "demo.json").write_text(json.dumps(result, indent=1) + "\n")
    (args.out / "table.txt").write_text(text + "\n")
    print(f"\n{text}\n\nin {args.out}/: demo.png, table.txt, demo.json and the runs; {minutes:.1f} minutes")
    if args.publish:
        where = RESULTS / slug(device_name(device).replace(",", ""))
        where.mkdir(parents=True, exist_ok=True)
        for name in ("demo.json", "demo.png"):
            shutil.copyfile(args.out / name, where / name)
        import plots

        return plots.main([])
    return 0


if __name__ == "__main__":
    sys.exit(main())
