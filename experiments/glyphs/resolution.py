"""From 24 to 48 pixels by DiffFit: coordinates of the positional table at half their steps ("scaled") or counted ("native").

    python experiments/glyphs/render.py --out DIR --size 48               the same fonts as the base's, twice as large
    python experiments/glyphs/resolution.py --data DIR                    run what is missing, then write the report
    python experiments/glyphs/resolution.py --data DIR --budget-seconds 600   begin no run after that; the next call goes on
    python experiments/glyphs/resolution.py --report                      only make table and plot anew

As the paper goes from 256 to 512 pixels on the base's own domain: the base of the package, four times as many patches, the
fonts that it knows. Samples are drawn before and after. A line of ``docs/experiments/resolution.jsonl`` is one run; the settings
are in ``resolution.yaml``.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # reporting.py, which all experiments share

import torch
import yaml
from alphabet import load
from domains import DOCS, HERE, Images, sampled_labels, save_strip, thinned
from measures import READER, Instrument, frechet, letters_read
from reporting import Interval, Results, interval, paired, replace_block, save_figure, seeds_said, table, verdict
from torch import Tensor, nn

from difffit_fast import Sampler
from difffit_fast._files import sha256
from difffit_fast.errors import DiffFitError
from difffit_fast.models.bases import model_path
from difffit_fast.models.checkpoint import read_model
from difffit_fast.models.header import write_model_file
from difffit_fast.models.load import load_model
from difffit_fast.train import TrainConfig, Trainer
from difffit_fast.train.track import read_metrics

read = functools.cache(load)  # tens of thousands of files
Spec = dict[str, Any]
Runs = dict[str, dict[int, dict[str, Any]]]  # kind -> seed -> line
WHEN = ("before", "after")
SAMPLES = "resolution_samples.png"
MEASURES = {"frechet": "Fréchet distance", "letters": "letters read"}


def key_of(spec: Spec) -> str:
    digest = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:10]
    return f"{spec['kind']}/seed{spec['seed']}/{digest}"


def specs(plan: Spec, base: str) -> Iterator[Spec]:
    """Every run, seed by seed; ``base`` is the SHA-256 of the base's file."""
    shared = {name: value for name, value in plan.items() if name not in ("seeds", "kinds")}
    for seed in plan["seeds"]:
        for kind in plan["kinds"]:
            yield {"base": base, "kind": kind, "seed": seed, **shared}


# -- one run -----------------------------------------------------------------------------------------------------------
def enlarged(base: str, size: int, kind: str, out: Path) -> float:
    """Write the base for images of ``size`` pixels to ``out``; the scale of its coordinates."""
    file = read_model(model_path(base)).adapt(image_size=size, pos_embed=kind)
    header = {
        "config": file.config, "pos_embed_scale": file.pos_embed_scale, "class_names": file.header["class_names"],
        "image_size": file.image_size, "vae": file.header["vae"], "objective": file.objective,
    }  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    write_model_file(out, "model", file.state, header)
    return float(header["pos_embed_scale"])


def run(base: str, spec: Spec, data: Path, folder: Path) -> dict[str, Any]:
    """Losses by step, and what is read of samples before and after; ``folder`` is gone afterwards but for its pictures."""
    shown = thinned(read(data / "base" / "train"), spec["shown"], 1000 + spec["seed"])
    held_out = thinned(read(data / "base" / "val"), spec["held_out"], 0)
    if (size := shown.images.shape[-1]) != spec["size"]:
        raise DiffFitError(
            f"expected images of {spec['size']} pixels in {data}; got {size} (render.py --size {spec['size']})"
        )
    instrument, checkpoint = Instrument(READER), folder / "enlarged.safetensors"

    def measured(model: nn.Module) -> dict[str, float]:
        labels = sampled_labels(held_out, spec["sampling"]["images"])
        sampler = Sampler(model, "ddim", spec["sampling"]["steps"], spec["sampling"]["cfg_scale"], batch_size=104)
        samples: Tensor = sampler.sample(labels, spec["seed"])
        if spec["seed"] == 0:
            name = folder.parent / f"{spec['kind']}-{WHEN[model is not before]}.png"
            save_strip(samples.clamp(-1, 1).add(1).mul(127.5).byte(), labels, name)
        return {
            "frechet": frechet(samples, held_out.images, instrument.reader),
            "letters": letters_read(samples, labels, instrument.reader),
        }

    try:
        scale = enlarged(base, spec["size"], spec["kind"], checkpoint)
        before = load_model(str(checkpoint)).model.eval()
        first = measured(before)
        config = TrainConfig(
            ckpt=str(checkpoint), vae="none", flip="none", lr=spec["lr"], max_steps=spec["steps"],
            global_batch_size=spec["batch"], num_workers=0, precision="fp32", device="cpu", global_seed=spec["seed"],
            log_every=50, ckpt_every=spec["steps"], val_samples=spec["held_out"], val_every=min(filter(None, spec["points"])),
            results_dir=str(folder / "run"), progress=False,
        )  # fmt: skip
        trainer = Trainer(config, data=Images(shown), val_data=Images(held_out))
        done = trainer.train()
        losses = {str(line["step"]): line["val_loss"] for line in read_metrics(done.folder) if "val_loss" in line}
        trainer.ema.exchange()  # the averaged weights are what one samples from
        return {"losses": losses, "pos_embed_scale": scale, "before": first, "after": measured(trainer.model.eval())}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_all(plan: Spec, results: Results, args: argparse.Namespace) -> bool:
    """Do what is missing; False if the budget ended first."""
    deadline = time.perf_counter() + args.budget_seconds
    for spec in specs(plan, sha256(model_path(args.base))):
        if (key := key_of(spec)) in results.runs:
            continue
        if time.perf_counter() > deadline:
            return False
        start = time.perf_counter()
        found = run(args.base, spec, args.data, args.cache / key.replace("/", "-"))
        results.add({"key": key, "spec": spec, **found, "seconds": round(time.perf_counter() - start, 1)})
        losses = ", ".join(f"{step}: {found['losses'][str(step)]:.4f}" for step in spec["points"])
        print(f"{key}: {losses}; {found['after']['letters']:.0%} read", flush=True)
    return True


# -- the report ----------------------------------------------------------------------------------------------------------
def write(plan: Spec, base: str, results: Results, folder: Path, page: Path, cache: Path) -> None:
    """Table and plots; of the samples, where those of the first seed lie in ``cache``."""
    found: Runs = {kind: {} for kind in plan["kinds"]}
    for spec in specs(plan, base):
        if line := results.runs.get(key_of(spec)):
            found[spec["kind"]][spec["seed"]] = line
    if not all(found.values()):
        raise DiffFitError("there are no runs of both kinds to report yet")
    draw(found, plan["size"], folder / "resolution.png")
    kinds = list(found)
    rows = [
        _row(f"loss at step {step}", found, lambda line, step=step: line["losses"][str(step)])
        for step in plan["points"]
    ]
    for measure, name in MEASURES.items():
        for when in WHEN:
            sign = -1 if measure == "letters" else 1
            rows.append(_row(f"{name}, {when}", found, lambda line, w=when, m=measure: line[w][m], sign))
    text = (
        f"DiffFit, {plan['steps']} steps of {plan['batch']} images at {plan['lr']:g} on {plan['shown']} glyphs of the base's "
        f"own fonts, {seeds_said([len(lines) for lines in found.values()])}. The loss is that on {plan['held_out']} glyphs of "
        f"families that were never shown; before is the base at {plan['size']} pixels; {plan['sampling']['images']} samples.\n\n"
        + table(["", *kinds, f"{kinds[0]} − {kinds[1]}", f"“{kinds[0]} is better”"], rows)
        + f"\n\n![Held-out loss with scaled and native coordinates]({folder.name}/resolution.png)"
    )
    sheet(cache, kinds, folder / SAMPLES)
    if (folder / SAMPLES).exists():
        text += (
            "\n\nSamples of the first seed: the base at twice its resolution as it is, and after the steps. Native coordinates "
            f"put what it knows into a corner.\n\n![Samples before and after, both coordinates]({folder.name}/{SAMPLES})"
        )
    replace_block(page, "resolution", text)


def _row(name: str, found: Runs, value: Any, sign: int = 1) -> list[str]:
    """``sign`` −1 where more is better."""
    first, second = ({seed: {"it": value(line)} for seed, line in lines.items()} for lines in found.values())
    cells = [str(interval([each["it"] for each in one.values()])) for one in (first, second)]
    difference = paired(first, second, "it")
    if difference is None:
        return [name, *cells, "–", "–"]
    return [name, *cells, str(difference), verdict(Interval(sign * difference.mean, difference.half, difference.n))]


def draw(found: Runs, size: int, path: Path) -> None:
    def figure(plt: Any) -> Any:
        fig, axis = plt.subplots(figsize=(6.4, 3.8))
        for kind, color in zip(found, ("tab:red", "tab:blue"), strict=True):
            lines = list(found[kind].values())
            steps = sorted(int(step) for step in lines[0]["losses"])
            values = [interval([line["losses"][str(step)] for line in lines]) for step in steps]
            half = [v.half if v.n > 1 else 0 for v in values]
            axis.errorbar(
                steps, [v.mean for v in values], half, fmt="o-", color=color, capsize=3, label=f"{kind} coordinates"
            )
        axis.set(xlabel="steps (0: the base as it is)", ylabel="held-out loss", yscale="log")
        axis.set_title(f"From 24 to {size} pixels, DiffFit", fontsize=10)
        axis.grid(alpha=0.3, which="both")
        axis.legend(frameon=False)
        fig.tight_layout()
        return fig

    save_figure(path, figure)


def sheet(cache: Path, kinds: list[str], path: Path) -> None:
    """The capitals of every kind, before and after; nothing where samples are not all there."""
    files = {(kind, when): cache / f"{kind}-{when}.png" for kind in kinds for when in WHEN}
    if not all(file.exists() for file in files.values()):
        return

    def figure(plt: Any) -> Any:
        fig, axes = plt.subplots(len(files), 1, figsize=(12, 2.6))
        for axis, ((kind, when), file) in zip(axes, files.items(), strict=True):
            image = plt.imread(file)
            axis.imshow(image[:, : image.shape[1] // 2], cmap="gray", interpolation="nearest")
            axis.set_ylabel(f"{kind}, {when}", rotation=0, ha="right", va="center", fontsize=8)
            axis.set(xticks=[], yticks=[])
        fig.subplots_adjust(left=0.1, right=0.995, top=0.99, bottom=0.01, hspace=0.06)
        return fig

    save_figure(path, figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder that render.py wrote, of the size of the plan")
    parser.add_argument("--base", default="glyphs", help="the base (default: the one of the package)")
    parser.add_argument("--plan", type=Path, default=HERE / "resolution.yaml", help="settings of all runs")
    parser.add_argument("--results", type=Path, default=DOCS / "experiments", help="folder of results and plots")
    parser.add_argument("--page", type=Path, default=DOCS / "experiments.md", help="page of the report")
    parser.add_argument("--cache", type=Path, default=Path("build/glyph-resolution"), help="folder for runs under way")
    parser.add_argument("--budget-seconds", type=float, default=float("inf"), help="begin no run after this time")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="processor cores to use")
    parser.add_argument("--report", action="store_true", help="no runs, only the report")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    try:
        plan = yaml.safe_load(args.plan.read_text(encoding="utf-8"))
        results, base = Results(args.results / "resolution.jsonl"), sha256(model_path(args.base))
        if not args.report:
            if args.data is None:
                raise DiffFitError(f"--data is needed: the folder that render.py --size {plan['size']} wrote")
            if not run_all(plan, results, args):
                print("the time is up; the same command goes on from here")
        write(plan, base, results, args.results, args.page, args.cache)
    except (DiffFitError, OSError) as error:
        print(f"resolution: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
