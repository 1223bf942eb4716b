"""The paper's comparison of fine-tuning methods, re-enacted with a small pixel DiT on real 8 × 8 images.

    python experiments/transfer.py                      run what is missing, then write the report
    python experiments/transfer.py --only difffit       runs whose name contains "difffit"
    python experiments/transfer.py --budget-seconds 60  stop starting runs after a minute; call it again to go on
    python experiments/transfer.py --report             only make tables, plots and docs/experiments.md anew

A DiT is pre-trained on the source classes, once per set and seed, and kept in ``--cache``. Each run adapts it to the
target classes by one method. Its result, with its whole configuration, is one line of ``docs/experiments/transfer.jsonl``;
a run whose line exists is not repeated. The settings are in ``transfer.yaml``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import time
from pathlib import Path
from typing import Any

import small
import torch
import transfer_report
import yaml
from reporting import Results
from transfer_plan import chosen_multiples, comparison_specs, key_of, sweep_specs, tuning_specs

from difffit_fast import __version__, baselines
from difffit_fast.errors import DiffFitError

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "docs" / "experiments"
CACHE = HERE.parent / "build" / "experiments"


class Runner:
    """Does runs; keeps image sets and pre-trained models."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.tasks: dict[str, small.Task] = {}

    def task(self, name: str) -> small.Task:
        if name not in self.tasks:
            self.tasks[name] = small.load_task(name)
        return self.tasks[name]

    def base(self, spec: dict[str, Any]) -> dict[str, torch.Tensor]:
        """The pre-trained state dict of a run."""
        parts = {k: spec[k] for k in ("set", "seed", "model", "pretrain")}
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:10]
        path = self.cache / f"{spec['set']}-seed{spec['seed']}-{digest}.safetensors"
        source = self.task(spec["set"]).source
        return small.pretrained(path, source, spec["model"], seed=spec["seed"], **spec["pretrain"])

    def run(self, spec: dict[str, Any], samples_to: Path | None = None) -> dict[str, Any]:
        task, seed = self.task(spec["set"]), spec["seed"]
        base = self.base(spec)
        start = time.perf_counter()
        dit = small.with_new_classes(base, spec["model"], task.target.classes, seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = baselines.apply(spec["method"], dit, **spec["options"])
        trained = small.train(model, task.target, seed=seed + 1000, **spec["finetune"])
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        path = self.cache / f"trainables-{key_of(spec).replace('/', '_')}.safetensors"
        baselines.save_trainables(model, path)
        size = path.stat().st_size
        path.unlink()
        losses = small.validation_loss(model, task.target)
        result = {
            "key": key_of(spec), "val_loss": losses["loss"], "val_mse": losses["mse"],
            "trainable": trainable, "total": sum(p.numel() for p in model.parameters()), "file_bytes": size,
            "saved_bytes": trained.saved_bytes, "cpu_ms_per_step": round(trained.cpu_ms_per_step, 3),
            "last_train_loss": sum(trained.losses[-20:]) / 20 if trained.losses else None,
        }  # fmt: skip
        if spec["sampling"]:
            options = spec["sampling"]
            images = small.sample(model, task.target, options["samples"], options["steps"], seed + 2000)
            result["frechet"] = small.distance(task.features, images, task.target.everything)
            real = task.target.everything  # already in random order
            result["frechet_real"] = small.distance(task.features, real[: len(images)], real[len(images) :])
            result["classifier_accuracy"] = task.accuracy
            if samples_to is not None:
                samples_to.mkdir(parents=True, exist_ok=True)
                torch.save(images[:16].clone(), samples_to / f"{key_of(spec).replace('/', '_')}.pt")
                torch.save(real[:16].clone(), samples_to / f"{spec['set']}-real.pt")
        where = {"torch": torch.__version__, "difffit_fast": __version__, "machine": platform.machine()}
        return {**result, "seconds": round(time.perf_counter() - start, 2), "spec": spec, "made_with": where}


def run_all(plan: dict[str, Any], results: Results, runner: Runner, only: str, budget: float) -> bool:
    """Do what is missing; False if the budget ended first."""
    deadline = time.perf_counter() + budget
    for stage in ("tuning", "comparison", "sweep"):
        if stage == "tuning":
            specs = list(tuning_specs(plan))
        elif stage == "comparison":
            specs = list(comparison_specs(plan, chosen_multiples(plan, results)))
        else:
            specs = list(sweep_specs(plan))
        todo = [s for s in specs if key_of(s) not in results.runs and only in key_of(s)]
        for i, spec in enumerate(todo):
            if time.perf_counter() > deadline:
                return False
            run = runner.run(spec, samples_to=runner.cache / "samples")
            results.add(run)
            quality = f", Fréchet {run['frechet']:.2f}" if "frechet" in run else ""
            print(f"{stage} {i + 1}/{len(todo)} {run['key']}: loss {run['val_loss']:.4f}{quality}", flush=True)
    return True


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--plan", type=Path, default=HERE / "transfer.yaml", help="settings of all runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of results and plots")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of pre-trained models")
    parser.add_argument("--docs", type=Path, default=HERE.parent / "docs" / "experiments.md", help="page of the report")
    parser.add_argument("--only", default="", help="runs whose key contains this text")
    parser.add_argument("--budget-seconds", type=float, default=float("inf"), help="start no run after this time")
    parser.add_argument("--report", action="store_true", help="no runs, only the report")
    args = parser.parse_args(argv)
    try:
        plan = yaml.safe_load(args.plan.read_text(encoding="utf-8"))
        results = Results(args.results / "transfer.jsonl")
        if not args.report:
            args.cache.mkdir(parents=True, exist_ok=True)
            if not run_all(plan, results, Runner(args.cache), args.only, args.budget_seconds):
                print("the time is up; the same command goes on from here")
        transfer_report.write(plan, results, args.results, args.docs, args.cache / "samples")
    except (DiffFitError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
