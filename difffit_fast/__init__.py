"""difffit_fast: fast DiffFit fine-tuning of diffusion transformers.

>>> from difffit_fast import FastDiffFitDiT                       # doctest: +SKIP
>>> model = FastDiffFitDiT.from_pretrained("DiT-XL-2-256x256.pt", num_classes=101)   # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Public name -> the module that defines it. Nothing heavy is imported until it is asked for.
_EXPORTS = {
    "DiT": "difffit_fast.models.dit",
    "DiT_models": "difffit_fast.models.dit",
    "FastDiffFitDiT": "difffit_fast.models.fast_dit",
    "FastDiffFitDiT_models": "difffit_fast.models.fast_dit",
    "DiffFitConfig": "difffit_fast.models.difffit",
    "build_info": "difffit_fast._ext",
    "kernel_report": "difffit_fast.ops",
    "DiffFitError": "difffit_fast.errors",
    "apply_difffit": "difffit_fast.apply",
    "load_model": "difffit_fast.models.load",
    "create_diffusion": "difffit_fast.diffusion",
    "Trainer": "difffit_fast.train",
    "TrainConfig": "difffit_fast.train",
    "Sampler": "difffit_fast.sample",
}

__all__ = sorted(_EXPORTS) + ["__version__"]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        value = getattr(importlib.import_module(_EXPORTS[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'difffit_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
