"""``difffit check``: everything that would be refused, left out or suspicious, in one table."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .._files import check_target, write_text
from ..check import check
from ..models.bases import model_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``difffit check`` to ``parser``."""
    parser.add_argument("path", help="folder of images by class, checkpoint, delta, cached features, or run folder")
    parser.add_argument("--image-size", type=int, default=256, help="pixels that images are to be trained at")
    parser.add_argument("--json", help="write the findings there too; - for the terminal instead of the table")


def run(args: argparse.Namespace) -> int:
    """Check; 1 when something is wrong."""
    if args.json and args.json != "-":
        check_target(args.json, "--json")
    report = check(model_path(args.path), args.image_size)
    text = json.dumps(report.to_dict(), indent=1, allow_nan=False) + "\n"
    if args.json and args.json != "-":
        write_text(Path(args.json), text)
    print(text if args.json == "-" else report.table(), end="" if args.json == "-" else "\n")
    return 0 if report.ok else 1
