"""From 256 to 512 pixels, re-enacted from 8 to 16: scaled against native coordinates of the position table.

    python experiments/resolution.py             run what is missing, then plot and write docs/experiments.md
    python experiments/resolution.py --report    only plot and write

DiffFit tunes its 512-pixel model from a 256-pixel one with a position table at halved coordinates, so that it spans the
range that the model has seen. Here a pixel DiT is pre-trained on 8 × 8 versions of 16 × 16 patches of real pictures (each
16 × 16 patch averaged over 2 × 2 pixels) and then tuned by DiffFit on the patches themselves, once with either kind of
coordinates, everything else equal. The loss on validation images is taken before the first step and along the way.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import small
import torch
from reporting import Results, interval, paired, replace_block, save_figure, table, verdict

from difffit_fast import FastDiffFitDiT
from difffit_fast.errors import DiffFitError

HERE = Path(__file__).resolve().parent
LOW, HIGH = 8, 16
MODEL = {"input_size": LOW, "patch_size": 2, "in_channels": 1, "hidden_size": 48, "depth": 4, "num_heads": 4}
PRETRAIN = {"steps": 600, "batch": 32, "lr": 1e-3}
FINETUNE = {"steps": 80, "batch": 32, "lr": 1e-2}
POINTS = (0, 5, 10, 20, 40, 80)  # steps at which the loss is taken
KINDS = ("scaled", "native")
MOST_VALIDATION = 160


def data() -> tuple[small.Images, small.Images]:
    """The same patches of all pictures at low and at high resolution."""
    images, labels, _ = small.patches(HIGH)
    high = small.split(images, labels, 0, int(labels.max()) + 1)
    high.val, high.val_labels = high.val[:MOST_VALIDATION], high.val_labels[:MOST_VALIDATION]
    pool = torch.nn.functional.avg_pool2d
    return small.Images(pool(high.train, 2), high.train_labels, pool(high.val, 2), high.val_labels, high.classes), high


def run(kind: str, seed: int, settings: dict[str, Any], cache: Path, low: small.Images, high: small.Images) -> dict:
    """One fine-tuning: validation loss by step."""
    digest = "-".join(f"{settings['pretrain'][k]:g}" for k in ("steps", "batch", "lr"))
    path = cache / f"resolution-seed{seed}-{digest}.safetensors"
    small.pretrained(path, low, MODEL, seed=seed, **settings["pretrain"])
    model = FastDiffFitDiT.from_pretrained(path, image_size=HIGH, pos_embed=kind, num_heads=MODEL["num_heads"])
    losses: dict[int, float] = {}

    def watch(step: int) -> None:
        if step in settings["points"]:
            model.eval()
            losses[step] = small.validation_loss(model, high)["loss"]

    watch(0)
    small.train(model, high, seed=seed + 1000, watch=watch, **settings["finetune"])
    return {"losses": losses, "pos_embed_scale": model.pos_embed_scale, "low_loss": low_loss(path, low)}


def low_loss(path: Path, low: small.Images) -> float:
    """Loss of the pre-trained model at its own resolution."""
    model = FastDiffFitDiT.from_pretrained(path, num_heads=MODEL["num_heads"]).eval()
    return small.validation_loss(model, low)["loss"]


def key_of(kind: str, seed: int, settings: dict[str, Any]) -> str:
    return f"{kind}/seed{seed}/{json.dumps(settings, sort_keys=True)}"


def report(results: Results, settings: dict[str, Any], seeds: list[int], folder: Path, page: Path) -> None:
    """Plot, and the marked part of the page."""
    found = {
        kind: {s: results.runs[k] for s in seeds if (k := key_of(kind, s, settings)) in results.runs} for kind in KINDS
    }
    if not all(found.values()):
        raise DiffFitError("there are no runs of both kinds to report yet")
    at = {
        kind: {step: {s: {"loss": r["losses"][str(step)]} for s, r in runs.items()} for step in settings["points"]}
        for kind, runs in found.items()
    }
    plot(at, folder / "resolution.png")
    rows = []
    for step in settings["points"]:
        difference = paired(at["scaled"][step], at["native"][step], "loss")
        cells = [str(interval([r["loss"] for r in at[kind][step].values()])) for kind in KINDS]
        rows.append([step, *cells, str(difference), verdict(difference)])
    low = interval([r["low_loss"] for r in found["scaled"].values()])
    text = (
        f"Pre-training {settings['pretrain']['steps']} steps at {LOW} × {LOW}, fine-tuning {settings['finetune']['steps']} "
        f"steps at {HIGH} × {HIGH} and a learning rate of {settings['finetune']['lr']:g}, {len(found['scaled'])} seeds. "
        f"At its own resolution the pre-trained model has a loss of {low}.\n\n"
        + table(["step", *KINDS, "scaled − native", "“scaled is better”"], rows)
        + f"\n\n![Validation loss with scaled and native coordinates]({folder.name}/resolution.png)"
    )
    replace_block(page, "resolution", text)


def plot(at: dict[str, dict[int, dict[int, dict[str, float]]]], path: Path) -> None:
    def draw(plt: Any) -> Any:
        figure, axis = plt.subplots(figsize=(6, 3.6))
        for kind, color in zip(KINDS, ("tab:red", "tab:blue"), strict=True):
            found = {step: interval([r["loss"] for r in by_seed.values()]) for step, by_seed in at[kind].items()}
            halves = [f.half if f.half < math.inf else 0 for f in found.values()]
            means = [f.mean for f in found.values()]
            axis.errorbar(
                list(found), means, yerr=halves, fmt="o-", color=color, capsize=3, label=f"{kind} coordinates"
            )
        axis.set_xlabel("fine-tuning steps (0: the pre-trained weights as they are)")
        axis.set_ylabel("validation loss")
        axis.set_title(f"From {LOW} × {LOW} to {HIGH} × {HIGH} pixels, DiffFit", fontsize=10)
        axis.legend()
        axis.grid(alpha=0.3)
        figure.tight_layout()
        return figure

    save_figure(path, draw)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--results", type=Path, default=HERE.parent / "docs" / "experiments")
    parser.add_argument("--cache", type=Path, default=HERE.parent / "build" / "experiments")
    parser.add_argument("--docs", type=Path, default=HERE.parent / "docs" / "experiments.md", help="page of the report")
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0 .. N - 1")
    parser.add_argument("--pretrain-steps", type=int, default=PRETRAIN["steps"])
    parser.add_argument("--steps", type=int, default=FINETUNE["steps"], help="fine-tuning steps")
    parser.add_argument("--report", action="store_true", help="no runs, only the report")
    args = parser.parse_args(argv)
    settings = {
        "model": MODEL, "pretrain": {**PRETRAIN, "steps": args.pretrain_steps},
        "finetune": {**FINETUNE, "steps": args.steps}, "points": sorted({p for p in POINTS if p < args.steps} | {args.steps}),
    }  # fmt: skip
    seeds = list(range(args.seeds))
    results = Results(args.results / "resolution.jsonl")
    try:
        missing = [(s, k) for s in seeds for k in KINDS if key_of(k, s, settings) not in results.runs]
        if missing and not args.report:
            low, high = data()
            for seed, kind in missing:
                done = run(kind, seed, settings, args.cache, low, high)
                spec = {"kind": kind, "seed": seed, **settings}
                losses = {str(step): loss for step, loss in done["losses"].items()}
                results.add({"key": key_of(kind, seed, settings), **done, "losses": losses, "spec": spec})
                print(f"seed {seed} {kind}: " + ", ".join(f"{k}: {v:.4f}" for k, v in losses.items()), flush=True)
        report(results, settings, seeds, args.results, args.docs)
    except (DiffFitError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
