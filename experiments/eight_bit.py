"""What eight bits cost in quality: gradients by noise level, validation loss after a training, samples.

    python experiments/eight_bit.py --data DIR                       run what is missing, then write the report
    python experiments/eight_bit.py --data DIR --budget-seconds 600  begin no training after ten minutes; the next call goes on
    python experiments/eight_bit.py --report                         only make tables and plot anew

``DIR`` is what ``experiments/glyphs/render.py`` made; the base is the one of the package. A line of
``docs/experiments/eight_bit.jsonl`` is the gradients of one variant, every trainable's against those of the float32 model, by
bins of timesteps; or one training. What the processor has no arithmetic for is emulated, which gives the same numbers. The
settings are in ``eight_bit.yaml``.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "glyphs"))

# ruff: noqa: E402
import domains
import torch
import yaml
from measures import READER, Instrument
from reporting import Interval, Results, interval, paired, replace_block, save_figure, table
from torch import Tensor

from difffit_fast import FastDiffFitDiT, Sampler, create_diffusion
from difffit_fast._files import sha256
from difffit_fast.errors import DiffFitError
from difffit_fast.models.bases import model_path
from difffit_fast.models.frozen_dtype import patterns
from difffit_fast.ops import eight_bit
from difffit_fast.train import TrainConfig, Trainer

DOCS = HERE.parent / "docs"
REFERENCE = "bf16"
Spec = dict[str, Any]


def key_of(kind: str, name: str, spec: Spec) -> str:
    digest = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:10]
    seed = f"/seed{spec['seed']}" if kind == "training" else ""
    return f"{kind}/{name}{seed}/{digest}"


def specs(plan: Spec) -> Iterator[tuple[str, str, Spec]]:
    """Kind, variant and configuration of every run: gradients first, then the groups of trainings, seed by seed."""
    shared = {"base": sha256(model_path(plan["base"])), "domain": plan["domain"]}
    for name, variant in plan["variants"].items():
        yield "gradients", name, {**shared, **variant, **plan["gradients"]}
    trained = {**shared, **plan["training"], "sampling": plan["sampling"]}
    for group in plan["trained"]:
        for seed in plan["seeds"]:
            for name in group:
                yield "training", name, {**trained, **plan["variants"][name], "seed": seed}


@contextlib.contextmanager
def arithmetic(spec: Spec) -> Iterator[None]:
    """Rows are rotated as ``spec`` says, and what this processor does not have is emulated."""
    kind, before = spec["frozen_dtype"], os.environ.get("DIFFFIT_FAST_EIGHT_BIT")
    rotated = dict(eight_bit.ROTATED)
    if kind != REFERENCE:
        eight_bit.ROTATED[kind] = spec["rotated"]
        if eight_bit.refusal(kind, torch.device("cpu")) is not None:
            os.environ["DIFFFIT_FAST_EIGHT_BIT"] = "emulate"
    try:
        yield
    finally:
        eight_bit.ROTATED.update(rotated)
        os.environ.pop("DIFFFIT_FAST_EIGHT_BIT", None)
        if before is not None:
            os.environ["DIFFFIT_FAST_EIGHT_BIT"] = before


# -- gradients ---------------------------------------------------------------------------------------------------------
def gradients(spec: Spec, data: Path) -> dict[str, Any]:
    """By bin: the cosines of all trainables' gradients with those in float32, and the relative error of the prediction."""
    glyphs = domains.thinned(domains.load(data / "domains" / spec["domain"] / "shown"), spec["images"], spec["seed"])
    x, y = glyphs.images.float() / 127.5 - 1, glyphs.labels
    generator = torch.Generator().manual_seed(spec["seed"])
    noise = torch.randn(x.shape, generator=generator)
    of_bin = torch.rand(len(x), generator=generator)
    true = FastDiffFitDiT.from_pretrained("glyphs").eval()
    with arithmetic(spec):
        model = FastDiffFitDiT.from_pretrained(
            "glyphs", compute_dtype=torch.bfloat16, frozen_dtype=spec["frozen_dtype"],
            frozen_keep=patterns(spec.get("keep", "")),
        ).eval()  # fmt: skip
        found, totals = [], ({}, {})
        for number in range(spec["bins"]):
            t = ((number + of_bin) / spec["bins"] * 1000).long().clamp_max(999)
            wanted, prediction = _gradients(true, x, t, y, noise)
            got, ours = _gradients(model, x, t, y, noise)
            for total, part in zip(totals, (wanted, got), strict=True):
                total |= {n: total.get(n, 0.0) + g for n, g in part.items()}
            eps = prediction[:, : x.shape[1]]
            found.append({
                **_cosines(got, wanted), "off": float((ours - prediction).norm() / prediction.norm()),
                "residual": float((eps - noise).norm() / noise.norm()),
            })  # fmt: skip
        errors = [one["error"] for one in model.eight_bit_report().values() if one["kind"]]
    return {"bins": found, "all": _cosines(totals[1], totals[0]), "weight_error": max(errors, default=0.0)}


def _cosines(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Any]:
    cosines = {n: float(torch.nn.functional.cosine_similarity(got[n], wanted[n], 0)) for n in wanted}
    worst = min(cosines, key=lambda n: cosines[n])
    return {"median": statistics.median(cosines.values()), "least": cosines[worst], "worst": worst}


def _gradients(
    model: FastDiffFitDiT, x: Tensor, t: Tensor, y: Tensor, noise: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    model.zero_grad()
    seen: list[Tensor] = []

    def remembered(*args: Any, **kwargs: Any) -> Tensor:
        seen.append(model(*args, **kwargs))
        return seen[-1]

    losses = create_diffusion().training_losses(remembered, x, t, {"y": y}, noise=noise)
    losses["loss"].mean().backward()
    trained = {name: p.grad.double().flatten() for name, p in model.named_parameters() if p.grad is not None}
    return trained, seen[0].detach().double()


# -- training ----------------------------------------------------------------------------------------------------------
def training(spec: Spec, data: Path, folder: Path) -> dict[str, Any]:
    """Adapt the base; the loss on families that were not shown, and its samples beside theirs."""
    where = data / "domains" / spec["domain"]
    shown, held_out = domains.load(where / "shown"), domains.thinned(domains.load(where / "held-out"), 1024, 0)
    with arithmetic(spec):
        config = TrainConfig(
            ckpt="glyphs", vae="none", flip="none", lr=spec["lr"], max_steps=spec["steps"], global_batch_size=spec["batch"],
            num_workers=0, precision="bf16", device="cpu", global_seed=spec["seed"], log_every=100, ckpt_every=spec["steps"],
            frozen_dtype=spec["frozen_dtype"], frozen_keep=spec.get("keep", ""), results_dir=str(folder), progress=False,
        )  # fmt: skip
        try:
            trainer = Trainer(config, data=domains.Images(shown))
            trainer.train()
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        trainer.ema.exchange()
        model, instrument = trainer.model.eval(), Instrument(READER)
        labels = domains.sampled_labels(held_out, spec["sampling"]["images"])
        sampler = Sampler(model, "ddim", spec["sampling"]["steps"], spec["sampling"]["cfg_scale"], batch_size=128)
        samples = sampler.sample(labels, spec["seed"])
        measures = instrument.measures(samples, labels, spec["domain"], shown, held_out, held_out)
        found = {"loss": instrument.loss(model, held_out), "loss_shown": instrument.loss(model, shown), **measures}
        model.set_frozen_dtype(REFERENCE)
        return {**found, "loss_in_bf16": instrument.loss(model, held_out)}


def run_all(plan: Spec, results: Results, args: argparse.Namespace) -> bool:
    """Do what is missing; False if the budget ended first."""
    deadline = time.perf_counter() + args.budget_seconds
    for kind, name, spec in specs(plan):
        key = key_of(kind, name, spec)
        if key in results.runs:
            continue
        if time.perf_counter() > deadline:
            return False
        start = time.perf_counter()
        found = gradients(spec, args.data) if kind == "gradients" else training(spec, args.data, args.cache / "run")
        results.add({"key": key, "spec": spec, **found, "seconds": round(time.perf_counter() - start, 1)})
        print(f"{key}: {time.perf_counter() - start:.0f} s", flush=True)
    return True


# -- the report ----------------------------------------------------------------------------------------------------------
def write(plan: Spec, results: Results, folder: Path, page: Path) -> None:
    found: dict[str, dict[str, Any]] = {"gradients": {}, "training": {}}
    for kind, name, spec in specs(plan):
        run = results.runs.get(key_of(kind, name, spec))
        if run is not None and kind == "gradients":
            found[kind][name] = run
        elif run is not None:
            found[kind].setdefault(name, {})[spec["seed"]] = run
    if not found["gradients"]:
        raise DiffFitError("there is nothing to report yet")
    parts = [gradient_table(plan, found["gradients"]), f"![Cosines of gradients over timesteps]({_plot(folder, page)})"]
    if found["training"].get(REFERENCE):
        parts.append(training_table(plan, found["training"]))
    draw(plan, found["gradients"], folder / "eight_bit.png")
    replace_block(page, "eight-bit-quality", "\n\n".join(parts))


def _plot(folder: Path, page: Path) -> str:
    return os.path.relpath(folder / "eight_bit.png", page.parent).replace(os.sep, "/")


def gradient_table(plan: Spec, runs: dict[str, dict[str, Any]]) -> str:
    def cells(of: list[dict[str, Any]]) -> list[str]:
        return [f"{min(one['median'] for one in of):.5f}", f"{min(one['least'] for one in of):.4f}"]

    rows = [
        [name, f"{run['weight_error']:.2%}" if run["weight_error"] else "–", *cells([run["all"]]), run["all"]["worst"],
         *cells(run["bins"][:-1]), *cells(run["bins"][-1:])]
        for name, run in runs.items()
    ]  # fmt: skip
    last = 1000 - 1000 // plan["gradients"]["bins"]
    head = [
        "variant", "worst weight", "all timesteps: median", "least", "of", f"worst bin below {last}: median", "least",
        f"from {last}: median", "least",
    ]  # fmt: skip
    residual = next(iter(runs.values()))["bins"][-1]["residual"]
    return (
        f"**Gradients** of every trainable of the base, {plan['gradients']['images']} glyphs of {plan['domain']} in each of "
        f"{plan['gradients']['bins']} bins of timesteps, against those of the float32 model: cosines, their median over "
        "tensors and the least. All timesteps together are what a training step sees.\n\n" + table(head, rows) + "\n\n"
        f"From t = {last} on the gradient says little: the base predicts the noise there to {residual:.2%} of its size, and the "
        "gradient is that of this remainder. A prediction that is off by a part of it, in bfloat16 already, turns it."
    )


def training_table(plan: Spec, runs: dict[str, dict[int, dict[str, Any]]]) -> str:
    reference, rows = runs[REFERENCE], []

    def against(by_seed: dict[int, dict[str, Any]], which: str) -> str:
        seeds = [s for s in sorted(set(by_seed) & set(reference)) if which in by_seed[s]]
        return _percent(interval([by_seed[s][which] / reference[s]["loss"] - 1 for s in seeds])) if seeds else "–"

    for name, by_seed in runs.items():
        difference = paired(by_seed, reference, "frechet")
        rows.append([
            name, str(len(by_seed)), str(interval([run["loss"] for run in by_seed.values()])),
            *("–" if name == REFERENCE else against(by_seed, which) for which in ("loss", "loss_in_bf16")),
            str(interval([run["frechet"] for run in by_seed.values()])), "–" if name == REFERENCE else str(difference),
            f"{statistics.mean(run['letters'] for run in by_seed.values()):.1%}",
        ])  # fmt: skip
    setting = plan["training"]
    head = ["variant", "seeds", "held-out loss", "against bf16", "its delta used in bf16"]
    head += ["Fréchet distance", "against bf16", "letters read"]
    return (
        f"**Training**: {setting['steps']} steps of {setting['batch']} images at {setting['lr']:g} and sampling, all in that "
        "arithmetic, but for the loss of the delta used in bf16; differences paired by seed, with 95 % intervals.\n\n"
        + table(head, rows)
    )


def _percent(change: Interval) -> str:
    return f"{change.mean:+.2%} ± {change.half:.2%}" if change.n > 1 else f"{change.mean:+.2%} (one run)"


def draw(plan: Spec, runs: dict[str, dict[str, Any]], path: Path) -> None:
    def figure(plt: Any) -> Any:
        fig, axes = plt.subplots(1, 2, figsize=(12, 4), sharex=True)
        for number, (name, run) in enumerate(runs.items()):
            middles = [(i + 0.5) * 1000 / len(run["bins"]) for i in range(len(run["bins"]))]
            for axis, which in zip(axes, ("median", "least"), strict=True):
                values = [1 - one[which] for one in run["bins"]]
                axis.plot(middles, values, label=name, marker="o", markersize=3, color=f"C{number}")
        for axis, which in zip(axes, ("median over tensors", "worst tensor"), strict=True):
            axis.set(yscale="log", xlabel="timestep", title=f"1 − cosine, {which}")
        axes[1].legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
        fig.tight_layout()
        return fig

    save_figure(path, figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder that experiments/glyphs/render.py wrote")
    parser.add_argument("--plan", type=Path, default=HERE / "eight_bit.yaml", help="settings of all runs")
    parser.add_argument("--results", type=Path, default=DOCS / "experiments", help="folder of results and plots")
    parser.add_argument("--page", type=Path, default=DOCS / "eight-bit.md", help="page of the report")
    parser.add_argument("--cache", type=Path, default=Path("build/eight-bit"), help="folder for runs under way")
    parser.add_argument("--budget-seconds", type=float, default=float("inf"), help="begin no run after this time")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="processor cores to use")
    parser.add_argument("--report", action="store_true", help="no runs, only the report")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    try:
        plan = yaml.safe_load(args.plan.read_text(encoding="utf-8"))
        results = Results(args.results / "eight_bit.jsonl")
        if not args.report:
            if args.data is None:
                raise DiffFitError("--data is needed: the folder that experiments/glyphs/render.py wrote")
            if not run_all(plan, results, args):
                print("the time is up; the same command goes on from here")
        write(plan, results, args.results, args.page)
    except (DiffFitError, OSError) as error:
        print(f"eight_bit: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
