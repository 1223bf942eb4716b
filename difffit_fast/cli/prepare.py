"""``difffit prepare``: a dataset's downloaded archives to image folders."""

from __future__ import annotations

import argparse
import sys

from ..data.prepare import DATASETS, prepare
from ..errors import DiffFitError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``difffit prepare`` to ``parser``."""
    parser.add_argument("name", nargs="?", metavar="NAME", help=f"one of {', '.join(DATASETS)}")
    parser.add_argument("--root", help="folder with the downloaded archives, or the folders they unpack to")
    parser.add_argument("--out", help="folder to write (default: ROOT/prepared/NAME); verified if it is there already")
    parser.add_argument("--split", help="which images train (default: the first that --list shows)")
    parser.add_argument("--allow-incomplete", action="store_true", help="take what is there when images are missing")
    parser.add_argument("--copy", action="store_true", help="copy images rather than hard-linking them")
    parser.add_argument("--list", action="store_true", help="show the datasets, their home pages, splits and sizes")


def run(args: argparse.Namespace) -> int:
    """Prepare or verify as ``args`` say; 0 when done. Raises :class:`DiffFitError` for what the user must mend."""
    if args.list:
        print(table())
        return 0
    if not args.name or not args.root:
        raise DiffFitError("expected difffit prepare NAME --root DIR; difffit prepare --list shows the names")
    out, info = prepare(
        args.name, args.root, args.out, args.split, allow_incomplete=args.allow_incomplete, copy=args.copy
    )
    incomplete = "" if info["complete"] else " (incomplete)"
    print(
        f"{out}: {info['title']}, split {info['split']}, {info['classes']} classes, "
        f"{info['train']} training and {info['test']} test images{incomplete}"
    )
    for note in info.get("left_out", ()):
        print(note, file=sys.stderr)
    print(f"train with: difffit train --data-path {out / 'train'} --num-classes {info['classes']}")
    return 0


def table() -> str:
    """The datasets with their splits, as text."""
    lines = []
    for name, dataset in DATASETS.items():
        lines.append(f"{name}: {dataset.title}, {dataset.home}")
        for split, (description, (classes, train, test)) in dataset.splits.items():
            lines.append(f"    --split {split}: {classes} classes, {train} + {test} images; {description}")
    return "\n".join(lines)
