"""Bringing the weights of a DiT to other classes and another image size: its class table and its positional table."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import DiffFitError
from .classes import ClassRows
from .dit import sincos_pos_embed

COORDINATES = ("scaled", "native")
TABLE = "y_embedder.embedding_table.weight"


def class_table(table: Tensor, chosen: ClassRows, null_class: bool) -> Tensor:
    """The class table with the rows ``chosen`` among those of ``table``; the null class keeps its row, and is the mean of the
    old classes where there was none. Values that stay in their place stay in their dtype.

    Args:
        table: the old one, (``chosen.count`` rows and perhaps the null class's, D).
        null_class: whether the new one has a row for it.
    """
    old = chosen.count
    if chosen.moved is None:
        if null_class == (table.shape[0] > old):
            return table
        rows = table[:old]
    elif chosen.drawn:
        rows = torch.empty(len(chosen.rows), table.shape[1], dtype=torch.float32).normal_(std=0.02)
    else:
        starts = [like if row is None else row for row, like in zip(chosen.rows, chosen.like, strict=True)]
        known = torch.cat([table[:old].float(), table[:old].float().mean(0, keepdim=True)])
        rows = known[[old if start is None else start for start in starts]]
    return torch.cat([rows.float(), null_row(table, old)]) if null_class else rows


def null_row(table: Tensor, classes: int) -> Tensor:
    """The null class's row (1, D), float32; the mean of the classes where the table has none."""
    return (table[classes:] if table.shape[0] > classes else table.mean(0, keepdim=True)).float()


def coordinate_scale(old: int, new: int, scale: float, coordinates: str | float) -> float:
    """The scale of a new positional table's coordinates, for a side of ``new`` in place of ``old`` cells.

    "scaled" spans the range that the old table (of scale ``scale``) spanned, DiffFit's way from 256 to 512 pixels;
    "native" counts patches, as in the public 512-pixel model; a number is the scale itself.
    """
    if isinstance(coordinates, (int, float)):
        return float(coordinates)
    if coordinates not in COORDINATES:
        raise DiffFitError(f"pos_embed must be {' or '.join(map(repr, COORDINATES))}; got {coordinates!r}")
    return scale * old / new if coordinates == "scaled" else 1.0


def find_scale(table: Tensor) -> float | None:
    """The scale of the coordinates of a sine-cosine table (T, D), T a square; None where it is no such table."""
    if table.device.type == "meta":
        return 1.0
    side, dim = math.isqrt(table.shape[0]), table.shape[1]
    table = table.float()
    if torch.allclose(table, sincos_pos_embed(dim, side), atol=2e-2):
        return 1.0
    if side < 2 or dim % 4:
        return None
    first = torch.atan2(table[1, 0], table[1, dim // 4]).item()  # the angle of column 1 at frequency 1
    if not 0 < first < math.pi:
        return None
    nearest = round(first * side) / side  # scales are ratios of sides
    for scale in (nearest, first):
        if scale > 0 and torch.allclose(table, sincos_pos_embed(dim, side, scale), atol=2e-2):
            return scale
    return None
