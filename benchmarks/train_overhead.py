"""Where a training step goes: the trainer's own overhead on cached latents.

    python benchmarks/train_overhead.py --json benchmarks/results/train_overhead.json

Real images (scikit-learn's digits, enlarged to 256 pixels) are encoded once by a small VAE of the usual shape (four latent
channels, a factor of eight; its weights are random, which costs the loop the same). Then ``Trainer`` runs as it always
does, with checkpoints and a log, and every part of its step is timed from outside. On CUDA each part is bracketed by a
synchronisation, and none comes from a graph: the shares are right, the step is slower than without.

Overhead is all that is not forward, backward or the optimizer's step: waiting for data, adding up gradients and reading the
loss, the average, logs, checkpoints.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from difffit_fast.data.extract import ExtractConfig, Extraction
from difffit_fast.train import Trainer
from difffit_fast.train.ema import EMA
from difffit_fast.train.readback import Readback
from difffit_fast.train.step import Stepper

PARTS = {
    "wait for the batch, move it": (Trainer, "_fetch"),
    "forward": (Stepper, "forward"),
    "backward": (Stepper, "backward"),
    "add up gradients": (Stepper, "exchange"),
    "read the loss": (Readback, "push"),
    "optimizer step": (Stepper, "update"),
    "EMA": (EMA, "update"),
    "log": (Trainer, "_log"),
    "checkpoint": (Trainer, "_save"),
}
WARM_UP = 5
NOT_OVERHEAD = ("forward", "backward", "optimizer step")


def make_features(folder: Path, image_size: int) -> Path:
    """Cached VAE moments of forty images."""
    import numpy as np
    from diffusers import AutoencoderKL
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    for label in range(4):
        (folder / "images" / str(label)).mkdir(parents=True)
        for i, index in enumerate(np.flatnonzero(digits.target == label)[:10]):
            pixels = Image.fromarray((digits.images[index] * 15.9).astype(np.uint8)).resize((image_size, image_size))
            pixels.save(folder / "images" / str(label) / f"{i}.png")
    torch.manual_seed(0)
    names = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    vae = AutoencoderKL(down_block_types=names[0], up_block_types=names[1], block_out_channels=(8,) * 4,
                        norm_num_groups=4, latent_channels=4)  # fmt: skip
    vae.save_pretrained(folder / "vae")
    config = ExtractConfig(data_path=str(folder / "images"), features_path=str(folder / "features"),
                           image_size=image_size, vae=str(folder / "vae"))  # fmt: skip
    extraction = Extraction(config)
    extraction.run(0, 1, lambda count: None)
    extraction.finish()
    return folder / "features"


class Clock:
    """Seconds spent in each part, a list per step."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.parts: dict[str, float] = defaultdict(float)
        self.steps: list[dict[str, float]] = []
        self._last = 0.0

    def now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = self.now()
            try:
                return function(*args, **kwargs)
            finally:
                self.parts[name] += self.now() - begin

        return timed

    def next_step(self) -> None:
        now = self.now()
        if self._last:
            self.steps.append({**self.parts, "step": now - self._last})
        self.parts.clear()
        self._last = now


def measure(trainer: Trainer) -> list[dict[str, float]]:
    """Train, with a clock around every part."""
    clock = Clock(trainer.device)
    plain = {name: getattr(part, method) for name, (part, method) in PARTS.items()}
    for name, (part, method) in PARTS.items():
        setattr(part, method, clock.around(name, plain[name]))
    fetch = trainer._fetch

    def first(source: Any) -> Any:
        clock.next_step()
        return fetch(source)

    trainer._fetch = first
    try:
        trainer.train()
    finally:
        for name, (part, method) in PARTS.items():
            setattr(part, method, plain[name])
    return clock.steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="DiT-S/2")
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--precision", default="auto", choices=("auto", "bf16", "fp32"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--num-workers", type=int, default=0)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        features = make_features(folder, args.image_size)
        trainer = Trainer(
            feature_path=str(features), model=args.model, precision=args.precision, device=args.device,
            num_workers=args.num_workers, global_batch_size=args.batch_size, max_steps=args.steps, log_every=10,
            ckpt_every=max(20, args.steps // 3), results_dir=str(folder / "results"), progress=False,
            cuda_graph="off",  # which has no parts to time
        )  # fmt: skip
        steps = measure(trainer)[WARM_UP:]  # the first ones warm caches up
    if not steps:
        raise SystemExit(f"nothing to report: fewer than {WARM_UP + 2} steps were run")
    report = {
        "device": torch.cuda.get_device_name() if trainer.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__, "model": args.model, "image_size": args.image_size, "batch_size": args.batch_size,
        "precision": trainer.config.precision, "num_workers": args.num_workers, "steps": len(steps),
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    total = sum(step["step"] for step in steps)
    rows = {name: sum(step.get(name, 0.0) for step in steps) for name in PARTS}
    # A checkpoint belongs to its interval, not to the few steps that were watched: it is listed, and counted per 1000 steps.
    saves = [step["checkpoint"] for step in steps if "checkpoint" in step]
    total -= sum(saves)
    rows.pop("checkpoint")
    rows["the loop itself"] = total - sum(rows.values())
    overhead = sum(value for name, value in rows.items() if name not in NOT_OVERHEAD) / total
    save = statistics.median(saves) if saves else 0.0
    per_step = total / len(steps)
    report |= {
        "step_ms": 1e3 * per_step,
        "parts_ms": {name: 1e3 * value / len(steps) for name, value in rows.items()},
        "checkpoint_ms": 1e3 * save,
        "overhead": overhead,
        "overhead_with_checkpoints_every_1000_steps": overhead + save / 1000 / per_step,
    }
    print(f"{report['model']}, {report['batch_size']} images a step, {report['precision']}, {report['device']}")
    for label, ms in report["parts_ms"].items():
        print(f"  {label:<34} {ms:9.3f} ms {100 * ms / report['step_ms']:7.2f} %")
    print(f"  {'one step':<34} {report['step_ms']:9.3f} ms")
    print(f"  {'one checkpoint':<34} {report['checkpoint_ms']:9.3f} ms")
    print(f"overhead: {100 * overhead:.2f} % (with a checkpoint every 1000 steps "
          f"{100 * report['overhead_with_checkpoints_every_1000_steps']:.2f} %)")  # fmt: skip
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
