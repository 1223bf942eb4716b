"""Tables, plots and the reading of experiments/transfer.py, all of it computed from the stored runs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reporting import Results, interval, paired, replace_block, save_figure, table, verdict
from transfer_plan import chosen_multiples, comparison_specs, key_of, make_spec

from difffit_fast._files import write_text
from difffit_fast.errors import DiffFitError

LABELS = {
    "none": "not fine-tuned", "class_embedding": "class embedding only", "full": "full", "bitfit": "BitFit",
    "difffit": "DiffFit, γ in the first half", "difffit_all": "DiffFit, γ in all blocks",
    "difffit_last": "DiffFit, γ in the last half", "lora_qkv": "LoRA, qkv, rank 8", "adapter": "AdaptFormer adapter",
    "vpt": "VPT-deep",
}  # fmt: skip
METRICS = {"frechet": "Fréchet distance", "val_loss": "validation loss"}
ORDER_CLAIMS = [  # what the paper's Table 1 and its ablation of depth say: the first is better than the second
    ("difffit", "full"), ("difffit", "bitfit"), ("difffit", "adapter"), ("difffit", "vpt"), ("difffit", "lora_qkv"),
    ("difffit", "difffit_all"), ("difffit", "difffit_last"),
]  # fmt: skip
PAPER_RATES = (10, 1)  # ten times the pre-training rate is better than that rate


Runs = dict[str, dict[str, dict[int, dict[str, Any]]]]  # set -> method -> seed -> run


def compared(plan: dict[str, Any], results: Results) -> Runs:
    """The stored runs of the comparison."""
    found: Runs = {image_set: {} for image_set in plan["sets"]}
    for spec in comparison_specs(plan, chosen_multiples(plan, results)):
        if run := results.runs.get(key_of(spec)):
            found[spec["set"]].setdefault(spec["name"], {})[spec["seed"]] = run
    return found


def swept(plan: dict[str, Any], results: Results) -> dict[float, dict[int, dict[str, Any]]]:
    """Multiple of the pre-training rate -> seed -> run."""
    found: dict[float, dict[int, dict[str, Any]]] = {}
    sweep = plan["sweep"]
    for multiple in sweep["multiples"]:
        for seed in plan["seeds"]:
            if run := results.runs.get(key_of(make_spec(plan, sweep["method"], sweep["set"], seed, multiple))):
                found.setdefault(multiple, {})[seed] = run
    return found


# -- text --------------------------------------------------------------------------------------------------------------


def write(plan: dict[str, Any], results: Results, folder: Path, page: Path, samples: Path) -> None:
    """Everything there is to report: plots and a summary in ``folder``, and the marked part of ``page``."""
    runs, sweep = compared(plan, results), swept(plan, results)
    if not any(runs.values()):
        raise DiffFitError("there are no runs to report yet")
    folder.mkdir(parents=True, exist_ok=True)
    summary = {
        s: {
            m: {k: interval([r[k] for r in by_seed.values()])._asdict() for k in METRICS}
            for m, by_seed in found.items()
        }
        for s, found in runs.items()
    }
    write_text(folder / "transfer.json", json.dumps({"plan": plan, "summary": summary}, indent=1) + "\n")
    plot_comparison(runs, folder / "transfer.png")
    if sweep:
        plot_sweep(plan, sweep, folder / "transfer_lr.png")
    pictures = plot_samples(plan, runs, samples, folder / "transfer_samples.png")
    parts = [
        setting(plan, runs), quality_table(plan, results, runs),
        f"![Fréchet distance and validation loss of every method]({folder.name}/transfer.png)",
        cost_table(runs), claims(plan, runs, sweep),
    ]  # fmt: skip
    if sweep:
        parts += [f"![DiffFit against its learning rate]({folder.name}/transfer_lr.png)"]
    if pictures or (folder / "transfer_samples.png").exists():
        parts += [f"![Real images and samples]({folder.name}/transfer_samples.png)"]
    replace_block(page, "transfer", "\n\n".join(parts))


def setting(plan: dict[str, Any], runs: Runs) -> str:
    model, pre, fine, sampling = (plan[k] for k in ("model", "pretrain", "finetune", "sampling"))
    counts = {s: min((len(r) for r in found.values()), default=0) for s, found in runs.items()}
    accuracy = {s: next(iter(next(iter(f.values())).values()))["classifier_accuracy"] for s, f in runs.items() if f}
    real = {s: floor(found) for s, found in runs.items() if found}
    return (
        f"Model: depth {model['depth']}, width {model['hidden_size']}, patch {model['patch_size']}, float32. "
        f"Pre-training: {pre['steps']} steps of {pre['batch']} images at a learning rate of {pre['lr']:g}. Fine-tuning: "
        f"{fine['steps']} steps of {fine['batch']}. Each distance is taken between {sampling['samples']} samples "
        f"({sampling['steps']} DDIM steps, no guidance, averaged weights) and all real images of the target classes. "
        + " ".join(
            f"On {s}, {counts[s]} seeds; the classifier is right on {accuracy[s]:.0%} of its validation images, and two "
            f"parts of the real images are {real[s]:.2f} apart, which is about the floor of the distance."
            for s in accuracy
        )
    )


def quality_table(plan: dict[str, Any], results: Results, runs: Runs) -> str:
    chosen = chosen_multiples(plan, results)
    rows = []
    for method in plan["methods"]:
        cells = [LABELS.get(method, method), f"{chosen[method]:g}×" if method in chosen and method != "none" else "–"]
        for found in runs.values():
            for metric in METRICS:
                by_seed = found.get(method, {})
                cells.append(str(interval([r[metric] for r in by_seed.values()])) if by_seed else "not run")
        rows.append(cells)
    head = ["method", "learning rate", *(f"{s}: {label}" for s in runs for label in METRICS.values())]
    text = "Means over seeds ± half the 95 % confidence interval; smaller is better.\n\n" + table(head, rows)
    grid = plan["tuning"]["multiples"]
    edge = [
        f"{LABELS.get(m, m)} ({chosen[m]:g}×)"
        for m, options in plan["methods"].items()
        if m in chosen and options.get("steps") != 0 and chosen[m] in (min(grid), max(grid))
    ]
    if edge:
        text += (
            f"\n\nAt the edge of the grid of learning rates, so that a better one may lie outside: {', '.join(edge)}."
        )
    return text


def cost_table(runs: Runs) -> str:
    image_set, found = next((s, f) for s, f in runs.items() if f)
    rows = []
    for method, by_seed in found.items():
        run = next(iter(by_seed.values()))
        if method != "none":
            cpu = float(np.median([r["cpu_ms_per_step"] for r in by_seed.values()]))
            share = run["trainable"] / full_size(found, run)
            cells = [
                f"{run['trainable']:,}",
                f"{share:.2%}",
                f"{run['file_bytes']:,}",
                f"{run['saved_bytes'] / 1e6:.2f}",
            ]
            rows.append([LABELS.get(method, method), *cells, f"{cpu:.0f}"])
    head = ["method", "trained", "of full", "file, bytes", "kept for backward, MB", "CPU ms per step"]
    return (
        f"What it costs ({image_set}). The times are medians of processor time; at this width they are the overhead of "
        "many small operations, taken on a machine that did other work too: they say nothing about real models, for which see "
        "[performance](performance.md). What is kept for the backward pass is counted exactly.\n\n" + table(head, rows)
    )


def full_size(found: dict[str, dict[int, dict]], run: dict[str, Any]) -> int:
    full = next(iter(found.get("full", {}).values()), None)
    return full["trainable"] if full else run["total"]


def claims(plan: dict[str, Any], runs: Runs, sweep: dict[float, dict[int, dict]]) -> str:
    """Each claim as a paired difference per set and measure, and what follows from it."""
    rows, tally = [], {"holds": 0, "the reverse": 0, "undecided": 0}

    def row(text: str, where: str, first: dict[int, dict], second: dict[int, dict]) -> None:
        cells = []
        for metric in METRICS:
            difference = paired(first, second, metric)
            word = "not run" if difference is None else verdict(difference)
            cells.append("not run" if difference is None else f"**{word}** ({difference})")
            if metric == "frechet" and word in tally:
                tally[word] += 1
        rows.append([text, where, *cells])

    for first, second in ORDER_CLAIMS:
        for image_set, found in runs.items():
            text = f"{LABELS[first] if 'difffit' in second else 'DiffFit'} is better than {LABELS[second]}"
            row(text, image_set, found.get(first, {}), found.get(second, {}))
    high, low = PAPER_RATES
    text = f"DiffFit learns better at {high}× the pre-training rate than at {low}×"
    row(text, plan["sweep"]["set"], sweep.get(high, {}), sweep.get(low, {}))
    head = ["claim of the paper", "on", *(f"by {label}" for label in METRICS.values())]
    lines = [f"By Fréchet distance {sum(tally.values())} comparisons were made: the claim holds in {tally['holds']}, "]
    lines += [
        f"the reverse is seen in {tally['the reverse']}, and {tally['undecided']} cannot be decided with these seeds."
    ]
    return (
        "Which claims hold here. Differences are paired by seed (the same pre-trained model, batches and noise); a claim "
        "*holds* where the whole 95 % interval is on its side, *the reverse* where it is on the other, and is *undecided* "
        "where the interval contains zero. The intervals are not corrected for their number.\n\n"
        + table(head, rows) + "\n\n" + "".join(lines) + "\n\n" + reading(runs, sweep)
    )  # fmt: skip


def reading(runs: Runs, sweep: dict[float, dict[int, dict]]) -> str:
    """Plain sentences: the order of methods on each set, and the best learning rate."""
    lines = []
    for image_set, found in runs.items():
        means = {m: interval([r["frechet"] for r in by_seed.values()]).mean for m, by_seed in found.items()}
        order = sorted((m for m in means if m != "none"), key=means.__getitem__)
        if order:
            lines.append(
                f"- {image_set}, from the smallest mean distance to the largest: "
                + ", ".join(f"{LABELS.get(m, m)} ({means[m]:.3g})" for m in order)
                + (f"; without fine-tuning {means['none']:.3g}." if "none" in means else ".")
                + f" The best is {means[order[0]] / floor(found):.0f} times as far as two parts of the real images."
            )
    if sweep:
        best = {}
        for metric, label in METRICS.items():
            means = {k: interval([r[metric] for r in by_seed.values()]).mean for k, by_seed in sweep.items()}
            best[label] = min(means, key=means.__getitem__)
        text = " and ".join(f"by {label} at {multiple:g}×" for label, multiple in best.items())
        lines.append(f"- In the sweep DiffFit is best {text} the pre-training rate.")
    return "\n".join(lines)


def floor(found: dict[str, dict[int, dict]]) -> float:
    """Distance between two parts of the real images of a set; the same in all its runs."""
    return next(iter(next(iter(found.values())).values()))["frechet_real"]


# -- plots -------------------------------------------------------------------------------------------------------------


def plot_comparison(runs: Runs, path: Path) -> None:
    """One row per set, one panel per measure: mean and interval of every method."""

    def draw(plt: Any) -> Any:
        sets = [s for s, found in runs.items() if found]
        figure, axes = plt.subplots(len(sets), 2, figsize=(11, 0.6 + 3.3 * len(sets)), squeeze=False, sharey="row")
        for line, image_set in zip(axes, sets, strict=True):
            methods = list(runs[image_set])[::-1]
            for axis, (metric, label) in zip(line, METRICS.items(), strict=True):
                for i, method in enumerate(methods):
                    values = [r[metric] for r in runs[image_set][method].values()]
                    mean, half, _ = interval(values)
                    color = (
                        "tab:red" if method.startswith("difffit") else "tab:gray" if method == "none" else "tab:blue"
                    )
                    axis.plot(values, [i] * len(values), ".", color=color, alpha=0.35, markersize=5)
                    axis.errorbar(mean, i, xerr=half if half < math.inf else 0, fmt="o", color=color, capsize=3)
                axis.set_yticks(range(len(methods)), [LABELS.get(m, m) for m in methods])
                axis.set_title(f"{image_set}: {label}", fontsize=10)
                axis.grid(axis="x", alpha=0.3)
        figure.supxlabel("mean over seeds, 95 % confidence interval, and every seed; smaller is better", fontsize=9)
        figure.tight_layout()
        return figure

    save_figure(path, draw)


def plot_sweep(plan: dict[str, Any], sweep: dict[float, dict[int, dict]], path: Path) -> None:
    def draw(plt: Any) -> Any:
        figure, axes = plt.subplots(1, 2, figsize=(9, 3.3))
        for axis, (metric, label) in zip(axes, METRICS.items(), strict=True):
            found = [interval([r[metric] for r in by_seed.values()]) for by_seed in sweep.values()]
            halves = [f.half if f.half < math.inf else 0 for f in found]
            axis.errorbar(list(sweep), [f.mean for f in found], yerr=halves, fmt="o-", color="tab:red", capsize=3)
            axis.set_xscale("log")
            axis.set_xticks(list(sweep), [f"{m:g}×" for m in sweep])
            axis.minorticks_off()
            axis.set_xlabel("learning rate, multiples of pre-training's")
            axis.set_title(f"DiffFit on {plan['sweep']['set']}: {label}", fontsize=10)
            axis.grid(alpha=0.3)
        figure.tight_layout()
        return figure

    save_figure(path, draw)


def plot_samples(plan: dict[str, Any], runs: Runs, folder: Path, path: Path) -> bool:
    """The first samples of some methods; False if none are kept in ``folder`` (they are with the cache)."""
    rows = []
    for image_set, found in runs.items():
        for method in ("real", "none", "full", "bitfit", "difffit"):
            if method == "real":
                file = folder / f"{image_set}-real.pt"
            else:
                run = next(iter(found.get(method, {}).values()), None)
                file = folder / f"{run['key'].replace('/', '_')}.pt" if run else folder / "none"
            if file.exists():
                label = "real" if method == "real" else LABELS[method]
                rows.append((f"{image_set}: {label}", torch.load(file, weights_only=True)))
    if not rows:
        return False

    def draw(plt: Any) -> Any:
        figure, axes = plt.subplots(len(rows), 1, figsize=(9, 0.72 * len(rows) + 0.2), squeeze=False)
        for axis, (label, images) in zip(axes[:, 0], rows, strict=True):
            strip = torch.nn.functional.pad(images[:, 0], (0, 1), value=1).permute(1, 0, 2).flatten(1)
            axis.imshow(strip, cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
            axis.set_title(label, fontsize=8, loc="left", pad=2)
            axis.axis("off")
        figure.tight_layout()
        return figure

    save_figure(path, draw)
    return True
