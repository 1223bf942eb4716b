"""``difffit eval``: FID and its relatives between sets of images and a reference."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .._bounds import BATCH, SEED, SIDE, Bounds, check_whole
from .._files import check_target, read_json, write_json
from .._words import shown
from ..errors import DiffFitError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``difffit eval`` to ``parser``."""
    add = parser.add_argument
    add(
        "samples",
        nargs="+",
        metavar="SAMPLES",
        help="folder of images, or ADM .npz (arr_0, uint8 NHWC); of several, a table says which is best",
    )
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
    add("--json", metavar="PATH", help="write the numbers there as well; of several sets, a list")
    add("--quiet", action="store_true", help="no progress bars")


_BOUNDS = {"batch_size": BATCH, "image_size": SIDE, "num_samples": Bounds(2, 1 << 63), "seed": SEED}


def run(args: argparse.Namespace) -> int:
    """Evaluate as ``args`` say; 0 when done. Raises :class:`DiffFitError` for what the user must mend."""
    for name in ("json", "cache"):
        if getattr(args, name):
            check_target(getattr(args, name), f"--{name}")
    for name, bounds in _BOUNDS.items():
        if getattr(args, name) is not None:
            check_whole(f"--{name.replace('_', '-')}", getattr(args, name), bounds)
    names = [name.strip() for name in args.features.split(",")]
    if len(names) > 1 and args.cache:
        raise DiffFitError("--cache keeps the statistics in one kind of features; give one --features with it")
    found: list[list[dict[str, Any]]] = [[] for _ in args.samples]  # of each set, in each kind of features
    try:
        for name in names:
            metrics = _metrics(args.metrics, name) if len(names) > 1 else args.metrics
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # the same sentences are in the result's notes
                _measure(args, name, metrics, found)
        if args.json:  # before a terminal that can go away
            _write(Path(args.json), args, found)
    finally:  # what is known is said, too, when other features or sets fail
        if len(found) == 1:
            for result in found[0]:
                print(format_table(result))
                for note in result["notes"]:
                    print(f"note: {note}", file=sys.stderr)
        else:
            _say_sets(args.samples, found, len(names))
    return 0


def _measure(args: argparse.Namespace, name: str, metrics: str, found: list[list[dict[str, Any]]]) -> None:
    """Append to ``found`` the result of each set in one kind of features; the reference's statistics are taken once."""
    from ..evaluate import Evaluator
    from ..evaluate.features import resolve_features

    evaluator = Evaluator(
        args.reference,
        features=resolve_features(name),
        metrics=metrics,
        batch_size=args.batch_size,
        device=args.device,
        image_size=args.image_size,
        inception_weights=args.inception_weights,
        check_weights=not args.any_inception_weights,
        dinov2_path=args.dinov2_path,
        seed=args.seed,
        cache=args.cache,
        progress=not args.quiet and sys.stderr.isatty(),
    )
    for samples, results in zip(args.samples, found, strict=True):
        results.append(evaluator(samples, args.num_samples))


def _write(path: Path, args: argparse.Namespace, found: list[list[dict[str, Any]]]) -> None:
    """The report of the set; of several, the list of theirs."""
    from .. import __version__

    reports = [
        {"difffit_fast": __version__, "samples": samples, "reference": args.reference, "results": results}
        for samples, results in zip(args.samples, found, strict=True)
    ]
    write_json(path, reports if len(reports) > 1 else reports[0])


def format_table(result: dict[str, Any]) -> str:
    """The numbers as text, one metric a line."""
    rows = list(_cells(result).items())
    width = max(len(title) for title, _ in rows)
    number = result["num_reference"] or "statistics of an unknown number of images"
    head = f"{result['num_samples']} samples against {number}; {result['features']}"
    return "\n".join([head, *(f"  {title:<{width}}  {value:>10}" for title, value in rows)])


# -- several sets ------------------------------------------------------------------------------------------------------
def _say_sets(samples: Sequence[str], found: list[list[dict[str, Any]]], kinds: int) -> None:
    """For each kind of features the table of the sets that were measured in it, and their notes."""
    told = [_step(path) for path in samples]
    for note in (note for _, note in told if note):
        print(f"note: {note}", file=sys.stderr)
    names = set_names(samples)
    for kind in range(kinds):
        measured = [i for i, results in enumerate(found) if len(results) > kind]
        if not measured:
            break
        print(format_sets([(names[i], told[i][0], found[i][kind]) for i in measured], len(samples)))
        notes = {i: found[i][kind]["notes"] for i in measured}
        common = [note for note in notes[measured[0]] if all(note in others for others in notes.values())]
        own = [
            note if note.startswith(str(Path(samples[i]))) else f"{names[i]}: {note}"
            for i in measured
            for note in notes[i]
            if note not in common
        ]
        for note in dict.fromkeys([*common, *own]):
            print(f"note: {note}", file=sys.stderr)


def set_names(samples: Sequence[str]) -> list[str]:
    """The name of each folder or .npz; where two are the same, the path as it was given."""
    paths = [Path(os.path.abspath(path)) for path in samples]
    names = [path.stem if path.suffix == ".npz" else path.name for path in paths]
    return [path if names.count(name) > 1 else name for path, name in zip(samples, names, strict=True)]


def _step(samples: str) -> tuple[int | None, str | None]:
    """The step that ``sampling.json`` records for a folder, or for the .npz that was made of it; a note if it cannot be read."""
    from ..sample.folder import SETTINGS_FILE

    path = Path(samples)
    settings = (path.with_suffix("") if path.suffix == ".npz" else path) / SETTINGS_FILE
    if not settings.is_file():
        return None, None
    try:
        step = read_json(settings).get("step")
    except DiffFitError as error:
        return None, str(error)
    if step is not None and (type(step) is not int or not 0 <= step < 1 << 63):
        return None, f"step in {settings} should be a whole number of steps; it is {shown(step)}"
    return step, None


def format_sets(sets: Sequence[tuple[str, int | None, dict[str, Any]]], asked: int) -> str:
    """One row a set (its name, its step, what was measured), and a last line that says which is best.

    Args:
        asked: how many sets there should be; where some could not be measured, none is called best.
    """
    result = sets[0][2]
    columns = [title for _, title, _ in _COLUMNS if title in _cells(result)]
    steps = any(step is not None for _, step, _ in sets)
    rows = [["set", *(["step"] if steps else []), "samples", *columns]]
    for name, step, result in sets:
        cells = _cells(result)
        number = "-" if step is None else str(step)
        rows.append([name, *([number] if steps else []), str(result["num_samples"]), *(cells[c] for c in columns)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join([f"  {row[0]:<{widths[0]}}", *(f"{cell:>{w}}" for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    number = result["num_reference"] or "statistics of an unknown number of images"
    head = f"{asked} sets of samples against {number}; {result['features']}"
    return "\n".join([head, *lines, *_best(sets, asked)])


_COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("fid", "FID", "{fid:.4f}"), ("sfid", "sFID", "{sfid:.4f}"), ("fd", "Fréchet distance", "{fd:.4f}"),
    ("is", "Inception Score", "{is:.4f} ± {is_std:.4f}"), ("precision", "Precision", "{precision:.4f}"),
    ("recall", "Recall", "{recall:.4f}"),
)  # fmt: skip


def _cells(result: dict[str, Any]) -> dict[str, str]:
    """The numbers as text, by title."""
    return {title: text.format(**result) for key, title, text in _COLUMNS if key in result}


def _best(sets: Sequence[tuple[str, int | None, dict[str, Any]]], asked: int) -> list[str]:
    """The line on the smallest FID, or the smallest Fréchet distance where there is no FID; none where there is neither."""
    key = next((key for key in ("fid", "fd") if key in sets[0][2]), None)
    if key is None:
        return []
    title = {key: title for key, title, _ in _COLUMNS}[key]
    if len(sets) < asked:
        return [f"no set is called best by {title}: {len(sets)} of {asked} sets were measured"]
    numbers = [round(result[key], 4) for _, _, result in sets]  # as they are printed
    smallest = min(numbers)
    best = [
        name if step is None else f"{name} (step {step})"
        for (name, step, _), number in zip(sets, numbers, strict=True)
        if number == smallest
    ]
    line = f"best by {title}: {' and '.join(best)}, {smallest:.4f}{' each' if len(best) > 1 else ''}"
    counts = [result["num_samples"] for _, _, result in sets]
    if min(counts) < max(counts):
        line += (
            f"; the sets have {min(counts)} to {max(counts)} samples, on which the distance depends: "
            f"--num-samples {min(counts)} compares as many of each"
        )
    return [line]


def _metrics(asked: str, features: str) -> str:
    """Of the metrics asked for with several kinds of features, those that are defined in this one."""
    if asked == "all" or features == "inception":
        return asked
    mine = [name for name in asked.split(",") if name.strip() not in ("fid", "sfid", "is")]
    if not mine:
        raise DiffFitError(f"none of the metrics {asked} is defined in the features {features!r}; ask for fd or pr too")
    return ",".join(mine)
