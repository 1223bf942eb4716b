"""``difffit eval``: FID and its relatives between two sets of images."""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any

from .._bounds import BATCH, SEED, SIDE, Bounds, check_whole
from .._files import check_target, write_json
from ..errors import DiffFitError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``difffit eval`` to ``parser``."""
    add = parser.add_argument
    add("samples", metavar="SAMPLES", help="folder of images, or ADM .npz (arr_0, uint8 NHWC)")
    add("reference", metavar="REFERENCE", help="the same, or a .npz of statistics (mu, sigma, mu_s, sigma_s)")
    add("--metrics", default="all", help="all, or some of fid,sfid,is,pr,fd (default: all that apply)")
    add(
        "--features",
        default="inception",
        help="inception, random-inception, dinov2, or package.module:function (default: inception); "
        "several with commas",
    )
    add("--batch-size", type=int, default=32, help="images in one pass (default: 32)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    add("--image-size", type=int, help="crop images of folders to this square, as ADM does (default: as they are)")
    add("--num-samples", type=int, help="take only the first so many samples")
    add("--inception-weights", metavar="PATH", help="weights of FID's Inception (default: $DIFFFIT_FAST_INCEPTION)")
    add("--any-inception-weights", action="store_true", help="do not compare the weights' hash with the published one")
    add(
        "--dinov2-path", metavar="PATH", help="folder of a DINOv2 saved by transformers (default: $DIFFFIT_FAST_DINOV2)"
    )
    add("--seed", type=int, default=0, help="of random-inception (default: 0)")
    add("--cache", metavar="PATH", help=".npz for the reference's statistics: used if it fits, else written")
    add("--json", metavar="PATH", help="write the numbers there as well")
    add("--quiet", action="store_true", help="no progress bars")


_BOUNDS = {"batch_size": BATCH, "image_size": SIDE, "num_samples": Bounds(2, 1 << 63), "seed": SEED}


def run(args: argparse.Namespace) -> int:
    """Evaluate as ``args`` say; 0 when done. Raises :class:`DiffFitError` for what the user must mend."""
    from ..evaluate import compare
    from ..evaluate.features import resolve_features

    for name in ("json", "cache"):
        if getattr(args, name):
            check_target(getattr(args, name), f"--{name}")
    for name, bounds in _BOUNDS.items():
        if getattr(args, name) is not None:
            check_whole(f"--{name.replace('_', '-')}", getattr(args, name), bounds)
    names = [name.strip() for name in args.features.split(",")]
    if len(names) > 1 and args.cache:
        raise DiffFitError("--cache keeps the statistics in one kind of features; give one --features with it")
    results: list[dict[str, Any]] = []
    try:
        for name in names:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # the same sentences are in the result's notes
                result = compare(
                    args.samples,
                    args.reference,
                    features=resolve_features(name),
                    metrics=_metrics(args.metrics, name) if len(names) > 1 else args.metrics,
                    batch_size=args.batch_size,
                    device=args.device,
                    image_size=args.image_size,
                    num_samples=args.num_samples,
                    inception_weights=args.inception_weights,
                    check_weights=not args.any_inception_weights,
                    dinov2_path=args.dinov2_path,
                    seed=args.seed,
                    cache=args.cache,
                    progress=not args.quiet and sys.stderr.isatty(),
                )
            results.append(result)
        if args.json:  # before a terminal that can go away
            _write(Path(args.json), args, results)
    finally:  # what is known is said, too, when other features fail
        for result in results:
            print(format_table(result))
            for note in result["notes"]:
                print(f"note: {note}", file=sys.stderr)
    return 0


def _write(path: Path, args: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    from .. import __version__

    report = {"difffit_fast": __version__, "samples": args.samples, "reference": args.reference, "results": results}
    write_json(path, report)


def format_table(result: dict[str, Any]) -> str:
    """The numbers as text, one metric a line."""
    rows = []
    for key, title in (("fid", "FID"), ("sfid", "sFID"), ("fd", "Fréchet distance")):
        if key in result:
            rows.append((title, f"{result[key]:.4f}"))
    if "is" in result:
        rows.append(("Inception Score", f"{result['is']:.4f} ± {result['is_std']:.4f}"))
    rows += [(key.capitalize(), f"{result[key]:.4f}") for key in ("precision", "recall") if key in result]
    width = max(len(title) for title, _ in rows)
    number = result["num_reference"] or "statistics of an unknown number of images"
    head = f"{result['num_samples']} samples against {number}; {result['features']}"
    return "\n".join([head, *(f"  {title:<{width}}  {value:>10}" for title, value in rows)])


def _metrics(asked: str, features: str) -> str:
    """Of the metrics asked for with several kinds of features, those that are defined in this one."""
    if asked == "all" or features == "inception":
        return asked
    mine = [name for name in asked.split(",") if name.strip() not in ("fid", "sfid", "is")]
    if not mine:
        raise DiffFitError(f"none of the metrics {asked} is defined in the features {features!r}; ask for fd or pr too")
    return ",".join(mine)
