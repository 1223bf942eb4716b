"""Which base a delta was made on: hashes of all that it builds on and does not hold itself.

| part | what | |
|---|---|---|
| ``weights`` | the weight matrices, without the class table | always |
| ``biases`` | those that are not trained | the timestep embedding's under "paper", all under ``bias=False`` |
| ``classes`` | the class table | where it is not trained |
| ``positions`` | the positional table | where it is not the sine-cosine table of the recorded scale |

Values are rounded to bfloat16 before they are hashed, so that a base has one hash whether it is held, or was stored, in
float32 or bfloat16. A second hash, of the values rounded to float16 and then to bfloat16, is what a base stored in float16
has: by it that is told from another base, in both directions. Of two roundings of one base, in bfloat16 and in float16,
neither follows from the other: they are two bases.

Before ``base_hashes`` was recorded, ``base_hash`` was all: the first hash of ``weights``.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..ops.weights import checksum
from .difffit import DELTAS
from .dit import DiT, sincos_pos_embed

PARTS = ("weights", "biases", "classes", "positions")
_SAME_POSITION = 3e-3  # what bfloat16 does to a sine


def base_hashes(model: DiT) -> dict[str, list[str]]:
    """Two hashes, of the values in bfloat16 and of those in float16, for each part of ``model``, a FastDiffFitDiT, that it has.

    They are computed again only where a value has changed.
    """
    parts = _parts(model)
    contents = {part: {name: _content(p) for name, p in tensors.items()} for part, tensors in parts.items()}
    key = {part: list(zip(found, _numbers(found.values()), strict=True)) for part, found in contents.items()}
    cached = model.__dict__.get("_base_hashes")
    if cached is None or cached[0] != key:
        found = {part: [_hash(tensors), _hash(tensors, torch.float16)] for part, tensors in parts.items()}
        model.__dict__["_base_hashes"] = cached = (key, found)
    return cached[1]


def other_base(header: Mapping[str, Any], model: DiT, source: str) -> str | None:
    """In which part ``model`` has another base than the delta of this header, "weights", "biases"...; None where it has the same.

    Warns where the two differ by a rounding to float16, and where the delta is too old to tell all of it.
    """
    return differing_part(header, recorded_base(model), source, "the model")


def recorded_base(model: DiT) -> dict[str, Any]:
    """The entries of a header that say which base ``model``, a FastDiffFitDiT, is on.

    ``base_hash`` is the first hash of the weight matrices: the same whether the base is held in float32 or bfloat16, and
    under every preset. ``base_hashes``: see :func:`base_hashes`.
    """
    hashes = base_hashes(model)
    return {"base_hash": hashes["weights"][0], "base_hashes": hashes}


def differing_part(header: Mapping[str, Any], other: Mapping[str, Any], source: str, other_source: str) -> str | None:
    """:func:`other_base` between two headers, or what :func:`recorded_base` says of a model."""
    theirs, mine = header.get("base_hashes"), other.get("base_hashes")
    if theirs is None or mine is None:
        if header["base_hash"] != other["base_hash"]:
            return "weights"
        known = theirs or mine or PARTS
        if rest := [part for part in PARTS[1:] if part in known]:
            old, whose = (source, other_source) if theirs is None else (other_source, source)
            warnings.warn(
                f"{old} was written by an earlier version, which recorded the weights of its base only: whether its "
                f"{' and '.join(rest)} are {whose}'s is not known",
                stacklevel=4,
            )
        return None
    for part in PARTS:
        ours, others = set(mine.get(part, ())), set(theirs.get(part, ()))
        if ours != others and not ours & others:
            return part
    if rounded := [part for part in mine if mine[part][0] != theirs[part][0]]:
        warnings.warn(
            f"{source}: the {' and '.join(rounded)} of its base are {other_source}'s, rounded to float16 in one of the two",
            stacklevel=4,
        )
    return None


def _parts(model: DiT) -> dict[str, dict[str, Tensor]]:
    parts: dict[str, dict[str, Tensor]] = {}
    for name, p in sorted(model.named_parameters()):
        if name.startswith(DELTAS):
            continue
        trained = model.difffit.trains(name)
        if name.startswith("y_embedder."):
            part = None if trained else "classes"
        elif name == "pos_embed":
            part = None if _is_sincos(p.detach(), model.pos_embed_scale) else "positions"
        elif name.endswith(".weight") and p.dim() >= 2:
            part = "weights"
        else:
            part = None if trained else "biases"
        if part is not None:
            parts.setdefault(part, {})[name] = p.detach()
    return parts


def _is_sincos(table: Tensor, scale: float) -> bool:
    side = round(table.shape[1] ** 0.5)
    return torch.allclose(
        table[0].cpu().float(), sincos_pos_embed(table.shape[2], side, scale), rtol=0, atol=_SAME_POSITION
    )


def _hash(tensors: Mapping[str, Tensor], first: torch.dtype | None = None) -> str:
    digest = hashlib.sha256()
    for name, p in tensors.items():
        rounded = (p if first is None else p.to(first)).to(torch.bfloat16).cpu().contiguous()
        digest.update(name.encode())
        digest.update(rounded.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def _content(p: Tensor) -> Tensor:
    """A number, () int64, that another content does not have: what was written through ``.data`` left no other trace."""
    rows = checksum(p[:, None] if p.dim() < 2 else p.flatten(0, -2))
    return (rows * (2 * torch.arange(len(rows), device=rows.device) * 0x9E3779B97F4A7C1 + 1)).sum()


def _numbers(contents: Iterable[Tensor]) -> list[int]:
    return torch.stack(list(contents)).tolist()
