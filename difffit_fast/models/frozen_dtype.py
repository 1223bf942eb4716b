"""Which frozen weights of a FastDiffFitDiT are multiplied in eight bits: its ``frozen_dtype`` and ``frozen_keep``.

The weights of the blocks' four linears can be (:mod:`difffit_fast.ops.eight_bit`); what is small or sensitive is not: embedders,
modulation, the last layer, and what ``frozen_keep`` names.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from ..errors import DiffFitError
from ..ops.eight_bit import WAYS, eight_bit_of, keep_eight_bit, kind_for, refusal

FROZEN_DTYPES = ("bf16", "fp8", "int8", "auto")
DEFAULT_KEEP = ("*.fc2.forward",)  # what GELU gives is worst in eight bits: docs/eight-bit.md


def check_frozen_dtype(frozen_dtype: str, compute_dtype: torch.dtype | None) -> None:
    """Refuse what is no such dtype, and eight bits beside float64."""
    if frozen_dtype not in FROZEN_DTYPES:
        raise DiffFitError(f"frozen_dtype must be one of {', '.join(FROZEN_DTYPES)}; got {frozen_dtype!r}")
    if frozen_dtype != "bf16" and compute_dtype == torch.float64:
        raise DiffFitError(f"frozen_dtype={frozen_dtype!r} has no more than 8 bits; float64 was asked for")


def patterns(text: str) -> tuple[str, ...]:
    """``frozen_keep`` as a command line has it: with commas."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def linears(model: Any) -> Iterator[tuple[str, nn.Linear]]:
    """The blocks' linears by name."""
    for i, block in enumerate(model.blocks):
        for name, linear in (
            ("attn.qkv", block.attn.qkv), ("attn.proj", block.attn.proj), ("mlp.fc1", block.mlp.fc1), ("mlp.fc2", block.mlp.fc2),
        ):  # fmt: skip
            yield f"blocks.{i}.{name}", linear


def chosen(model: Any, keep: Sequence[str]) -> list[tuple[str, nn.Linear, tuple[str, ...]]]:
    """Those that are not kept, with the products that are in eight bits.

    Args:
        keep: what is kept, by name or pattern: ``"*.fc2"``, ``"blocks.0"``, or one product alone, ``"*.fc2.forward"``.

    Raises:
        DiffFitError: a pattern that fits none.
    """
    every = [(name, linear, way) for name, linear in linears(model) for way in WAYS]
    for pattern in keep:
        if not any(_fits(f"{name}.{way}", pattern) for name, _, way in every):
            raise DiffFitError(
                f"frozen_keep: no linear of a block is called {pattern!r}; they are blocks.0.attn.qkv to "
                f"{every[-1][0]}, and patterns such as '*.fc2', 'blocks.0' or '*.fc2.forward' name several"
            )
    left = [one for one in every if not any(_fits(f"{one[0]}.{one[2]}", pattern) for pattern in keep)]
    ways = {name: tuple(way for other, _, way in left if other == name) for name, _, _ in left}
    return [(name, linear, ways[name]) for name, linear in linears(model) if name in ways]


def _fits(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def arrange(model: Any) -> str | None:
    """Let the products be those that ``model.frozen_dtype`` asks for, of the device that the weights are on.

    Returns:
        Why the device does not have them, where it does not, and None.
    """
    every = [linear.weight for _, linear in linears(model)]
    keep_eight_bit(every, None)
    if model.frozen_dtype == "bf16" or every[0].is_meta:
        return None
    device, auto = every[0].device, model.frozen_dtype == "auto"
    kind = kind_for(device) if auto else model.frozen_dtype
    if kind is None:
        return f"{refusal('int8', device)}, and {refusal('fp8', device)}"
    problem = refusal(kind, device)
    if problem is None:
        for name, linear, ways in chosen(model, model.frozen_keep):
            keep_eight_bit([linear.weight], kind, auto=auto, name=name, ways=ways)
    return problem


def complain(model: Any, problem: str) -> None:
    """Say why there are no eight-bit products: an error, or for "auto" a warning."""
    if model.frozen_dtype != "auto":
        raise DiffFitError(
            f"frozen_dtype={model.frozen_dtype!r}: {problem}; DIFFFIT_FAST_EIGHT_BIT=emulate computes the same numbers, slowly"
        )
    warnings.warn(f"frozen_dtype='auto' stays with the compute dtype: {problem}", stacklevel=4)


def report(model: Any) -> dict[str, dict[str, Any]]:
    """What has become of each of the blocks' weights, by name: ``kind`` ("int8", "fp8", or None in the compute dtype), the
    products that are of that kind (``ways``), and, where it was quantized, the relative ``error`` of that.

    Raises:
        DiffFitError: a dtype that was asked for by name is not to be had from the device.
    """
    if model._eight_bit_problem is not None:
        complain(model, model._eight_bit_problem)
    found: dict[str, dict[str, Any]] = {}
    for name, linear in linears(model):
        kept = eight_bit_of(linear.weight)
        if kept is None:
            found[name] = {"kind": None, "ways": (), "error": None}
        else:
            good = kept.good(linear.weight)
            found[name] = {
                "kind": kept.kind if good else None, "ways": kept.ways if good else (), "error": kept.error(linear.weight),
            }  # fmt: skip
    return found


def summary(found: dict[str, dict[str, Any]]) -> str:
    """:func:`report` in a sentence."""
    used = [one["kind"] for one in found.values() if one["kind"]]
    if not used:
        return "no frozen weight is multiplied in eight bits"
    products = sum(len(one["ways"]) for one in found.values())
    errors = {name: one["error"] for name, one in found.items() if one["kind"]}
    worst = max(errors, key=lambda name: errors[name])
    return (
        f"{products} of {len(WAYS) * len(found)} products with the frozen weights of the blocks are in {used[0]}; the worst "
        f"weight is {worst}, off by {errors[worst]:.2%}"
    )
