"""Guidance away from the null class against guidance away from the base, on domains of letters that the base has never seen.

    python experiments/glyphs/guidance.py --data DIR                       run what is missing, then write the report
    python experiments/glyphs/guidance.py --data DIR --budget-seconds 600  begin no model after ten minutes; the next call goes on
    python experiments/glyphs/guidance.py --report                         only make table and plot anew

``DIR`` as for ``domains.py``. For every domain and seed one model is adapted by DiffFit to a few images, and sampled from with
each kind and scale of guidance, the same noise for all. A line of ``docs/experiments/guidance.jsonl`` is one set of samples,
measured as ``domains.py`` measures. The settings are in ``guidance.yaml``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # reporting.py, which all experiments share

import domains
import yaml
from plan import Spec, key_of
from reporting import Interval, Results, interval, paired, replace_block, save_figure, seeds_said, table, verdict

from difffit_fast import Sampler
from difffit_fast._files import sha256
from difffit_fast.errors import DiffFitError
from difffit_fast.models.bases import model_path

MEASURES = {"frechet": "Fréchet distance", "letters": "letters read", "style": "style read", "memorised": "copies"}
NONE = "none"


def combinations(plan: Spec) -> Iterator[tuple[str, float]]:
    """Kind and scale of every set of samples; a scale of 1 is no guidance, and is drawn once."""
    if 1 in plan["scales"]:
        yield NONE, 1.0
    for kind in plan["kinds"]:
        for scale in plan["scales"]:
            if scale != 1:
                yield kind, float(scale)


def spec_of(plan: Spec, base: str, domain: str, seed: int) -> Spec:
    """The run of ``domains.py`` that makes the model."""
    return {
        "base": base, "domain": domain, "shown": plan["shown"], "seed": seed, "name": "difffit", "method": "difffit",
        "options": {}, "lr": plan["lr"], "steps": plan["steps"], "batch": plan["batch"], "sampling": plan["sampling"],
        "looks": [],
    }  # fmt: skip


def key_of_samples(spec: Spec, kind: str, scale: float) -> str:
    digest = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:10]
    return f"{spec['domain']}/{spec['shown']}/seed{spec['seed']}/{kind}/{scale:g}/{digest}"


def run(spec: Spec, wanted: list[tuple[str, float]], cache: Path) -> list[dict[str, Any]]:
    """Adapt the base once, and measure its samples for each kind and scale."""
    bench = domains._bench
    assert bench is not None
    folder = cache / domains.file_name(key_of(spec))
    shown, held_out = domains.material(bench.data, spec)
    try:
        model, _ = bench._adapted(spec, shown, held_out, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    labels = domains.sampled_labels(held_out, spec["sampling"]["images"])
    found = []
    for kind, scale in wanted:
        start = time.perf_counter()
        sampler = Sampler(
            model, "ddim", spec["sampling"]["steps"], scale, guidance=kind, device=bench.device, batch_size=128
        )
        samples = sampler.sample(labels, spec["seed"])
        measures = bench.instrument.measures(samples, labels, spec["domain"], shown, held_out, held_out)
        found.append(
            {"key": key_of_samples(spec, kind, scale), "domain": spec["domain"], "seed": spec["seed"], "kind": kind,
             "scale": scale, "spec": spec, **measures, "seconds": round(time.perf_counter() - start, 1)}
        )  # fmt: skip
    return found


def run_all(plan: Spec, base: str, results: Results, args: argparse.Namespace) -> bool:
    """Do what is missing, seed by seed; False if the budget ended first."""
    deadline = time.perf_counter() + args.budget_seconds
    jobs = []
    for seed in plan["seeds"]:
        for domain in plan["domains"]:
            spec = spec_of(plan, base, domain, seed)
            if todo := [pair for pair in combinations(plan) if key_of_samples(spec, *pair) not in results.runs]:
                jobs.append((spec, todo))
    context, begin = multiprocessing.get_context("spawn"), (args.base, args.data, args.device)
    with ProcessPoolExecutor(args.workers, context, initializer=domains._begin, initargs=begin) as pool:
        while jobs and time.perf_counter() < deadline:
            now, jobs = jobs[: args.workers], jobs[args.workers :]
            for future in [pool.submit(run, *job, args.cache) for job in now]:
                for line in future.result():
                    results.add(line)
                    print(f"{line['key']}: Fréchet {line['frechet']:.1f}, {line['letters']:.0%} read", flush=True)
    return not jobs


# -- the report ----------------------------------------------------------------------------------------------------------
Found = dict[tuple[str, float], dict[int, dict[str, Any]]]  # kind, scale -> seed -> line


def compared(plan: Spec, base: str, results: Results) -> dict[str, Found]:
    """By domain."""
    found: dict[str, Found] = {}
    for domain in plan["domains"]:
        for kind, scale in combinations(plan):
            for seed in plan["seeds"]:
                line = results.runs.get(key_of_samples(spec_of(plan, base, domain, seed), kind, scale))
                if line is not None:
                    found.setdefault(domain, {}).setdefault((kind, scale), {})[seed] = line
    return found


def write(plan: Spec, base: str, results: Results, folder: Path, page: Path) -> None:
    found = compared(plan, base, results)
    if not found:
        raise DiffFitError("there are no samples to report yet")
    seeds = [len(lines) for of in found.values() for lines in of.values()]
    parts = [
        f"DiffFit on {plan['shown']} images ({plan['steps']} steps of {plan['batch']} at {plan['lr']:g}), "
        f"{seeds_said(seeds)}; {plan['sampling']['images']} samples each, {plan['sampling']['steps']} DDIM steps, the same noise "
        "for all kinds and scales of a seed."
    ]
    for domain, of in found.items():
        rows = [
            [_name(kind), f"{scale:g}", *(_cell(lines, measure) for measure in MEASURES)]
            for (kind, scale), lines in of.items()
        ]
        parts.append(f"**{domain}**\n\n" + table(["guidance", "scale", *MEASURES.values()], rows))
    parts.append(sentence(found))
    draw(found, folder / "guidance.png")
    parts.append(f"![Fréchet distance and letters read over the scale]({folder.name}/guidance.png)")
    replace_block(page, "guidance", "\n\n".join(parts))


def _name(kind: str) -> str:
    return {"cfg": "from the null class", "source": "from the base", NONE: "none"}[kind]


def _cell(lines: dict[int, dict[str, Any]], measure: str) -> str:
    values = [line[measure] for line in lines.values() if line[measure] is not None]
    if not values:
        return "–"
    found = interval(values)
    if measure == "frechet":
        return str(found)
    return f"{found.mean:.1%} ± {found.half:.1%}" if found.n > 1 else f"{found.mean:.1%}"


def best_of(of: Found, kind: str) -> tuple[float, dict[int, dict[str, Any]]] | None:
    """The scale of the smallest mean Fréchet distance, and its lines."""
    mine = {scale: lines for (k, scale), lines in of.items() if k == kind}
    if not mine:
        return None
    scale = min(mine, key=lambda s: interval([line["frechet"] for line in mine[s].values()]).mean)
    return scale, mine[scale]


def sentence(found: dict[str, Found]) -> str:
    """Who wins, each kind at its best scale, paired by seed."""
    said = []
    for domain, of in found.items():
        best = {kind: best_of(of, kind) for kind in ("cfg", "source")}
        if best["cfg"] is None or best["source"] is None:
            continue
        (ours, source), (theirs, cfg) = best["source"], best["cfg"]
        difference: Interval | None = paired(source, cfg, "frechet")
        if difference is None:
            continue
        word = {"holds": "is better", "the reverse": "is worse", "undecided": "cannot be told apart"}[
            verdict(difference)
        ]
        said.append(
            f"{domain}: guidance from the base ({ours:g}) {word} by Fréchet distance from that of the null class ({theirs:g}), "
            f"{difference}"
        )
    if not said:
        return "Not enough has been run to compare the two."
    return "Each at its best scale, difference paired by seed, below 0 for the base: " + "; ".join(said) + "."


def draw(found: dict[str, Found], path: Path) -> None:
    def figure(plt: Any) -> Any:
        fig, axes = plt.subplots(2, len(found), figsize=(4 * len(found), 6), squeeze=False, sharex=True)
        for column, (domain, of) in enumerate(found.items()):
            for row, measure in enumerate(("frechet", "letters")):
                axis = axes[row][column]
                for kind in ("cfg", "source"):
                    scales = sorted(scale for k, scale in of if k in (kind, NONE))
                    values = [
                        interval([line[measure] for line in of[kind if (kind, s) in of else NONE, s].values()])
                        for s in scales
                    ]
                    half = [v.half if v.n > 1 else 0 for v in values]
                    axis.errorbar(scales, [v.mean for v in values], half, label=_name(kind), marker="o", capsize=2)
                axis.set(title=domain if row == 0 else "", ylabel=MEASURES[measure] if column == 0 else "")
            axes[1][column].set_xlabel("scale")
        axes[0][0].legend(frameon=False)
        fig.tight_layout()
        return fig

    save_figure(path, figure)


def main(argv: list[str] | None = None) -> int:
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder that render.py wrote")
    parser.add_argument("--base", default="glyphs", help="the base (default: the one of the package)")
    parser.add_argument("--plan", type=Path, default=here / "guidance.yaml", help="settings of all runs")
    parser.add_argument(
        "--results", type=Path, default=domains.DOCS / "experiments", help="folder of results and plots"
    )
    parser.add_argument("--page", type=Path, default=domains.DOCS / "experiments.md", help="page of the report")
    parser.add_argument(
        "--cache", type=Path, default=Path("build/glyph-guidance"), help="folder for runs that are under way"
    )
    parser.add_argument("--budget-seconds", type=float, default=float("inf"), help="begin no model after this time")
    parser.add_argument("--workers", type=int, default=2, help="models at once, each on one core (default: 2)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--report", action="store_true", help="no runs, only the report")
    args = parser.parse_args(argv)
    try:
        plan = yaml.safe_load(args.plan.read_text(encoding="utf-8"))
        results, base = Results(args.results / "guidance.jsonl"), sha256(model_path(args.base))
        if not args.report:
            if args.data is None:
                raise DiffFitError("--data is needed: the folder that render.py wrote")
            if not run_all(plan, base, results, args):
                print("the time is up; the same command goes on from here")
        write(plan, base, results, args.results, args.page)
    except (DiffFitError, OSError) as error:
        print(f"guidance: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
