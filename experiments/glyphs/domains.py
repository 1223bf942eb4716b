"""Methods of fine-tuning on domains of letters that the base has never seen.

    python experiments/glyphs/domains.py --data DIR                       run what is missing, then write the report
    python experiments/glyphs/domains.py --data DIR --only handwriting    runs whose key contains this text
    python experiments/glyphs/domains.py --data DIR --budget-seconds 600  start no run after ten minutes; call it again to go on
    python experiments/glyphs/domains.py --report                         only make tables, plots and the page anew

``DIR`` is what ``render.py`` made; the measuring instrument is the reader that comes with the demo. A run adapts the base to a
few images by ``difffit_fast.train.Trainer``, and measures it on families of that style that nothing else has seen: the loss,
letters and style as the reader sees them, the Fréchet distance in its features, how many samples are copies, and the loss on the
base's own domain. Its result, with its whole configuration, is one line of ``docs/experiments/glyphs.jsonl``; a run whose line
exists is not repeated. The settings are in ``domains.yaml``.
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # reporting.py, which all experiments share

import domains_report
import torch
import yaml
from alphabet import ALPHABETS, Glyphs, load
from domains_report import file_name
from measures import READER, Instrument
from plan import Spec, care_of, chosen, comparison_specs, key_of, tuning_specs
from reporting import Results
from torch import Tensor, nn

from difffit_fast import FastDiffFitDiT, Sampler, __version__
from difffit_fast._files import sha256
from difffit_fast.data.base import visit_rng
from difffit_fast.errors import DiffFitError
from difffit_fast.models.bases import model_path
from difffit_fast.models.load import load_model
from difffit_fast.sample.images import save_png
from difffit_fast.train import TrainConfig, Trainer
from difffit_fast.train.track import read_metrics

HERE = Path(__file__).resolve().parent
DOCS = HERE.parent.parent / "docs"
MOST_WATCHED = 1024  # images of a loss


class Images:
    """Glyphs as the trainer's data: never mirrored, classes in the order of their alphabet."""

    channels, flip = 1, False

    def __init__(self, glyphs: Glyphs) -> None:
        self.glyphs = glyphs
        self.class_names = list(ALPHABETS[glyphs.alphabet])
        self.num_classes = len(self.class_names)
        self.size = self.image_size = glyphs.images.shape[-1]

    def __len__(self) -> int:
        return len(self.glyphs)

    def load(self, index: int, seed: int) -> tuple[Tensor, int]:
        return self.glyphs.images[index].float() / 127.5 - 1, int(self.glyphs.labels[index])

    def report(self) -> list[Any]:
        return []


# -- what is shown, and what is measured on ----------------------------------------------------------------------------
def thinned(glyphs: Glyphs, count: int, seed: int) -> Glyphs:
    """At most ``count`` of the images, drawn by the seed, in their order."""
    drawn = visit_rng(seed).permutation(len(glyphs))[:count]
    return glyphs.where(torch.from_numpy(drawn).sort().values)


def halves(glyphs: Glyphs) -> tuple[Glyphs, Glyphs]:
    """Every other letter of each case, and the rest: A C E … b d f …, and B D F … a c e …"""
    even = (glyphs.labels + (glyphs.labels >= 26)) % 2 == 0
    return glyphs.where(even), glyphs.where(~even)


def material(data: Path, spec: Spec) -> tuple[Glyphs, Glyphs]:
    """What a run is shown, and what it is measured on: held-out families, or those of the reader while it is tuned."""
    domain, shown = spec["domain"], spec["shown"]
    if domain.startswith("half of "):
        family = domain.removeprefix("half of ")
        fonts = load(data / "domains" / "handwriting" / "held-out")
        return halves(fonts.where(torch.tensor([name == family for name in fonts.families])))
    part = "held-out" if spec["sampling"] else "reader"
    everything = load(data / "domains" / domain / "shown")
    few = everything if shown == "all" else thinned(everything, shown, 1000 + spec["seed"])
    return few, thinned(load(data / "domains" / domain / part), MOST_WATCHED, 0)


# -- one run -----------------------------------------------------------------------------------------------------------
class Bench:
    """Does runs: data, base and instrument are read once."""

    def __init__(self, base: str, data: Path, device: str) -> None:
        self.base, self.data, self.device = base, data, device
        self.instrument = Instrument(READER)
        self.reader = sha256(READER)
        self.own = thinned(load(data / "base" / "val"), MOST_WATCHED, 0)

    def run(self, spec: Spec, folder: Path, pictures: Path | None) -> dict[str, Any]:
        """The results of a run; ``folder`` is for what the trainer writes, and is gone afterwards.

        Args:
            pictures: where to keep a line of samples, and beside it of what was shown and what was not.
        """
        start = time.perf_counter()
        shown, held_out = material(self.data, spec)
        result: dict[str, Any] = {"key": key_of(spec), "spec": spec}
        try:
            if spec["steps"]:
                model, facts = self._adapted(spec, shown, held_out, folder)
                result |= facts
            else:
                model = FastDiffFitDiT.from_dit(load_model(self.base).model).to(self.device).eval()  # the faster way
            result |= self._measured(spec, model, shown, held_out, pictures)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        where = {
            "torch": torch.__version__,
            "difffit_fast": __version__,
            "machine": platform.machine(),
            "device": self.device,
            "reader": self.reader,
        }
        return {**result, "seconds": round(time.perf_counter() - start, 1), "made_with": where}

    def _adapted(self, spec: Spec, shown: Glyphs, held_out: Glyphs, folder: Path) -> tuple[nn.Module, dict[str, Any]]:
        looks = spec["looks"]
        config = TrainConfig(
            ckpt=self.base, vae="none", flip="none", method=spec["method"], method_args=spec["options"], lr=spec["lr"],
            max_steps=spec["steps"], global_batch_size=spec["batch"], num_workers=0, precision="fp32", device=self.device,
            global_seed=spec["seed"], log_every=10, ckpt_every=spec["steps"], val_samples=MOST_WATCHED,
            val_every=min(looks) if looks else spec["steps"], results_dir=str(folder), progress=False,
        )  # fmt: skip
        trainer = Trainer(config, data=Images(shown), val_data=Images(held_out))
        done = trainer.train()
        lines = read_metrics(done.folder)
        rates = [line["images_per_second"] for line in lines if "images_per_second" in line]
        trainer.ema.exchange()  # the averaged weights are what one samples from
        trainable = sum(p.numel() for p in trainer.parameters.values())
        return trainer.model.eval(), {
            "curve": [[line["step"], line["val_loss"]] for line in lines if "val_loss" in line],
            "trainable": trainable, "file_bytes": done.delta.stat().st_size,
            "ms_per_step": round(1000 * spec["batch"] / statistics.median(rates), 3),
        }  # fmt: skip

    def _measured(
        self, spec: Spec, model: nn.Module, shown: Glyphs, held_out: Glyphs, pictures: Path | None
    ) -> dict[str, Any]:
        loss = self.instrument.loss
        result = {"loss": loss(model, held_out), "loss_shown": loss(model, shown)}
        result["loss_own"] = loss(model, self.own) if held_out.alphabet == self.own.alphabet else None
        if spec["sampling"]:
            labels = sampled_labels(held_out, spec["sampling"]["images"])
            sampler = Sampler(
                model,
                "ddim",
                spec["sampling"]["steps"],
                spec["sampling"]["cfg_scale"],
                device=self.device,
                batch_size=128,
            )
            samples = sampler.sample(labels, spec["seed"])
            style = spec["domain"] if spec["domain"] in self.instrument.styles else "handwriting"
            result |= self.instrument.measures(samples, labels, style, shown, held_out, self._others(spec, held_out))
            if pictures is not None:
                save_strip(samples.clamp(-1, 1).add(1).mul(127.5).byte(), labels, pictures)
                save_strip(shown.images, shown.labels, pictures.with_suffix(".shown.png"))
                save_strip(held_out.images, held_out.labels, pictures.with_suffix(".held-out.png"))
        return result

    def _others(self, spec: Spec, held_out: Glyphs) -> Glyphs:
        """Glyphs of several families that were not shown: held out, or where those are of one font, others of its style."""
        if not spec["domain"].startswith("half of "):
            return held_out
        fonts = load(self.data / "domains" / "handwriting" / "held-out")
        return fonts.where(torch.tensor([name not in set(held_out.families) for name in fonts.families]))


def save_strip(images: Tensor, labels: Tensor, path: Path, across: int = 52) -> None:
    """The first images of each class, classes in order, as one PNG of at most ``across`` glyphs."""
    order = labels.argsort(stable=True)
    turn = torch.cat([torch.arange(int(n)) for n in labels.bincount() if n])  # of each image in its class
    chosen = order[turn.argsort(stable=True)][:across]
    chosen = chosen[labels[chosen].argsort(stable=True)]
    path.parent.mkdir(parents=True, exist_ok=True)
    save_png(images[chosen][:, 0].permute(1, 0, 2).flatten(1).numpy(), path)


def sampled_labels(glyphs: Glyphs, count: int) -> Tensor:
    """(count,) long: the classes that are asked for, in turn."""
    classes = glyphs.labels.unique()
    return classes.repeat(-(-count // len(classes)))[:count]


# -- all runs ----------------------------------------------------------------------------------------------------------
_bench: Bench | None = None


def _begin(base: str, data: Path, device: str) -> None:
    """In a worker process: one thread, so that several runs share the cores without waiting for each other."""
    global _bench
    torch.set_num_threads(1)
    _bench = Bench(base, data, device)


def _run(spec: Spec, cache: Path, pictures: bool) -> dict[str, Any]:
    assert _bench is not None
    name = file_name(key_of(spec))
    return _bench.run(spec, cache / name, cache / "samples" / f"{name}.png" if pictures else None)


def stages(plan: Spec, base: str, results: Results) -> Iterator[list[Spec]]:
    """The runs of each stage, which knows what those before it have chosen: by number of images, tuning and the first seeds;
    then the other seeds."""
    tuning = list(tuning_specs(plan, base))
    first = plan["seeds"][: plan["first_seeds"]]
    for shown in plan["tuning"]["shown"]:
        yield [spec for spec in tuning if spec["shown"] == shown]
        specs = comparison_specs(plan, base, chosen(plan, base, results))
        yield [spec for spec in specs if care_of(spec["shown"]) == str(shown) and spec["seed"] in first]
    yield list(comparison_specs(plan, base, chosen(plan, base, results)))


def run_all(plan: Spec, results: Results, args: argparse.Namespace) -> bool:
    """Do what is missing; False if the budget ended first."""
    deadline = time.perf_counter() + args.budget_seconds
    base = sha256(model_path(args.base))
    context = multiprocessing.get_context("spawn")
    begin = (args.base, args.data, args.device)
    with ProcessPoolExecutor(args.workers, context, initializer=_begin, initargs=begin) as pool:
        for specs in stages(plan, base, results):
            todo = [spec for spec in specs if key_of(spec) not in results.runs and args.only in key_of(spec)]
            left, running, done = iter(todo), set(), 0
            while True:
                while len(running) < args.workers and time.perf_counter() < deadline:
                    if (spec := next(left, None)) is None:
                        break
                    running.add(pool.submit(_run, spec, args.cache, spec["seed"] == plan["seeds"][0]))
                if not running:
                    break
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    results.add(run := future.result())
                    done += 1
                    letters = f", {run['letters']:.0%} read" if "letters" in run else ""
                    print(
                        f"{done}/{len(todo)} {run['key']}: loss {run['loss']:.4f}{letters}, {run['seconds']:.0f} s",
                        flush=True,
                    )
            if done < len(todo):
                return False
    return True


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder that render.py wrote")
    parser.add_argument("--base", default="glyphs", help="the base (default: the one of the package)")
    parser.add_argument("--plan", type=Path, default=HERE / "domains.yaml", help="settings of all runs")
    parser.add_argument("--results", type=Path, default=DOCS / "experiments", help="folder of results and plots")
    parser.add_argument("--page", type=Path, default=DOCS / "experiments.md", help="page of the report")
    parser.add_argument(
        "--cache", type=Path, default=Path("build/glyph-runs"), help="folder for runs that are under way"
    )
    parser.add_argument("--only", default="", help="runs whose key contains this text")
    parser.add_argument("--budget-seconds", type=float, default=float("inf"), help="start no run after this time")
    parser.add_argument("--workers", type=int, default=2, help="runs at once, each on one core (default: 2)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--report", action="store_true", help="no runs, only the report")
    args = parser.parse_args(argv)
    try:
        plan = yaml.safe_load(args.plan.read_text(encoding="utf-8"))
        results = Results(args.results / "glyphs.jsonl")
        if not args.report:
            if args.data is None:
                raise DiffFitError("--data is needed: the folder that render.py wrote")
            if not run_all(plan, results, args):
                print("the time is up; the same command goes on from here")
        base = sha256(model_path(args.base))
        domains_report.write(plan, base, results, args.results, args.page, args.cache / "samples")
    except (DiffFitError, OSError) as error:
        print(f"domains: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
