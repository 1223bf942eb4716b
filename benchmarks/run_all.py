"""Every operation at every size into one table: ops.json, ops.csv and, with matplotlib, ops.png.

    python benchmarks/run_all.py                      # benchmarks/results/<device>/ops.*
    python benchmarks/run_all.py --ops adaln residual --batches 32 --seconds 120 --out somewhere

What matters most comes first (bf16, D = 1152, 32 images); the files are written anew after every size.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import torch
from common import RESULTS, complete, exit_code, parser, run_grid, slug
from machine import device_name

OPS = ("residual", "adaln", "frozen_mlp", "modulation", "colsum", "attention", "frozen_linear", "stacked")


def main(argv: list[str] | None = None) -> int:
    p = parser(__doc__)
    p.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS))
    p.add_argument("--out", type=Path, help="folder of the results (benchmarks/results/<device>)")
    options = complete(p.parse_args(argv))
    out = options.out or RESULTS / slug(device_name(torch.device(options.device)))
    options.json = options.json or out / "ops.json"
    record = run_grid({op: importlib.import_module(f"bench_{op}").KERNELS for op in options.ops}, options)
    try:
        from plots import plot_ops

        plot_ops(record, options.json.with_suffix(".png"))
    except ImportError as error:
        print(f"no plot: {error}")
    print(f"\nwritten to {options.json.with_suffix('')}.*")
    return exit_code(record)


if __name__ == "__main__":
    sys.exit(main())
