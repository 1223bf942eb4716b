"""``difffit bench``: the speed of a training step, against the best baselines, on this machine (``benchmarks/speed.py``)."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from ..errors import DiffFitError

SCRIPT = Path("benchmarks") / "speed.py"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="DiT-XL/2 and its kin")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--dtype", choices=("fp32", "bf16"))
    parser.add_argument("--device")
    parser.add_argument(
        "--modes", nargs="+", help="modes of benchmarks/speed.py, or all (default: ours and the best baselines)"
    )
    parser.add_argument("--steps", type=int, help="so many rounds, instead of until the ratios are settled")
    parser.add_argument("--seconds", type=float, help="time for everything (170); 0: no limit")
    parser.add_argument("--json", metavar="PATH", help="write the measurements there")


def run(args: argparse.Namespace) -> int:
    """Hand over to ``benchmarks/speed.py``."""
    script = find_script()
    command = [sys.executable, str(script)]
    for name in ("model", "image_size", "batch_size", "dtype", "device", "modes", "steps", "seconds", "json"):
        value = getattr(args, name)
        if value is not None:
            command += [f"--{name.replace('_', '-')}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return subprocess.run(command, check=False).returncode


def find_script() -> Path:
    """``benchmarks/speed.py`` of the source tree: here, or beside the package where it is installed in place.

    Raises:
        DiffFitError: neither; the benchmarks are not part of the installed package.
    """
    for root in (Path.cwd(), Path(__file__).resolve().parents[2]):
        if (root / SCRIPT).is_file():
            return root / SCRIPT
    raise DiffFitError(
        f"{SCRIPT} is not here: the benchmarks come with the source tree; run this in a clone of the repository"
    )
