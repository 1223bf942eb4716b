"""``difffit mix``: one delta of several on one base."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import DiffFitError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "parts",
        nargs="+",
        metavar="DELTA[=WEIGHT]",
        help="deltas of one base; the weight is the number behind the last '=' (default, for all or none: 1 / n)",
    )
    add("--out", required=True, help=".safetensors file to write")
    add("--overwrite", action="store_true", help="replace --out if it exists")
    add("--ckpt", help="their base, read where the weights do not sum to 1 (default: the one that a delta's run names)")
    add("--weights", metavar="NAME", default="ema", help="of --ckpt, in a file that has several (default: ema)")


def run(args: argparse.Namespace) -> int:
    """Mix as ``args`` say; 0 when done. Raises :class:`DiffFitError` for what the user must mend."""
    from .._files import check_target
    from ..models.mix import mix_deltas

    out = Path(args.out)
    if out.suffix != ".safetensors":
        raise DiffFitError(f"--out must end in .safetensors; got {args.out}")
    if out.exists() and not args.overwrite:
        raise DiffFitError(f"--out {out} exists; give --overwrite to replace it")
    check_target(out, "--out")
    header = mix_deltas([read_part(word) for word in args.parts], out, ckpt=args.ckpt, weights=args.weights)
    parts = " + ".join(f"{weight:g} of {name}" for name, weight in header["mixed"])
    print(f"{out}: {parts}; {header['config']['num_classes']} classes, {out.stat().st_size / 2**20:.1f} MiB")
    return 0


def read_part(word: str) -> tuple[str, float | None]:
    """A file and its weight: the number behind the last ``=``; None where there is no number, and so no weight.

    Raises:
        DiffFitError: a weight of no file.
    """
    path, _, number = word.rpartition("=")
    try:
        weight = float(number)
    except ValueError:
        return word, None
    if not path and "=" in word:
        raise DiffFitError(f"expected DELTA=WEIGHT; {word!r} names no delta")
    return (path, weight) if path else (word, None)
