"""The published sizes and their names, in both families that share them: DiT (predicts noise) and SiT (velocity)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .._words import nearest
from ..errors import DiffFitError

DIT_SIZES: dict[str, dict[str, int]] = {
    "XL": dict(depth=28, hidden_size=1152, num_heads=16),
    "L": dict(depth=24, hidden_size=1024, num_heads=16),
    "B": dict(depth=12, hidden_size=768, num_heads=12),
    "S": dict(depth=12, hidden_size=384, num_heads=6),
}
PATCH_SIZES = (2, 4, 8)
OBJECTIVES = {"DiT": "ddpm", "SiT": "flow"}  # what the models of a family are trained for
MODEL_NAMES = tuple(f"{family}-{size}/{p}" for family in OBJECTIVES for size in DIT_SIZES for p in PATCH_SIZES)
HEADS = {sizes["hidden_size"]: sizes["num_heads"] for sizes in DIT_SIZES.values()}  # by width


def model_sizes(name: str) -> dict[str, int]:
    """``"SiT-XL/2"`` -> ``depth, hidden_size, num_heads, patch_size``.

    Raises:
        DiffFitError: an unknown name; the nearest known one is named.
    """
    if name not in MODEL_NAMES:
        raise DiffFitError(
            f"the model must be DiT- or SiT-, XL, L, B or S, /2, /4 or /8; got {name!r}, nearest is {nearest(name, MODEL_NAMES)}"
        )
    size, patch = name[4:].split("/")
    return {**DIT_SIZES[size], "patch_size": int(patch)}


def model_objective(name: str | None) -> str | None:
    """``"SiT-XL/2"`` -> "flow", ``"DiT-S/4"`` -> "ddpm"; None without a name."""
    return None if name is None else OBJECTIVES[name[:3]]


def model_name(config: Mapping[str, Any], objective: str | None = None) -> str:
    """The published name of constructor arguments, such as "DiT-XL/2", or "DiT-custom"."""
    family = "SiT" if objective == "flow" else "DiT"
    for size, known in DIT_SIZES.items():
        if config.get("patch_size") in PATCH_SIZES and all(config.get(key) == value for key, value in known.items()):
            return f"{family}-{size}/{config['patch_size']}"
    return f"{family}-custom"
