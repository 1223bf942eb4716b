"""One delta made of several on one base: their weighted sum, in a file like any delta's.

With weights w_i, W = Σ w_i, of every vector that the deltas hold

    base + Σ w_i·(delta_i − base)  =  Σ w_i·delta_i + (1 − W)·base

γ and LayerNorm of a base are at the identity, so its biases alone have to be read, and only where W is not 1. Classes are
united by name, in the order in which they come. The row of a class is the mean of the rows that the deltas have for it,
weighted by their w_i; where W is not 1, it is base + W·(mean − base), of the base's row that goes with the class. So one
delta of weight s is that delta at strength s (:mod:`.deltas`).
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import os
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import DeltaMismatchError, DiffFitError
from .adapt import TABLE
from .checkpoint import image_pixels
from .classes import match_names
from .delta import check_alike, check_delta, check_tensors, read_delta, tells_scale
from .deltas import base_rows
from .difffit import is_extra, neutral
from .fast_dit import FastDiffFitDiT
from .header import OF_MODELS, write_model_file
from .load import base_of

_ROUNDING = 1e-6  # of weights that were written as decimals: a sum that is nearer to 1 or, by their size, to 0 is that


@dataclass(frozen=True)
class _Part:
    path: str
    weight: float
    tensors: dict[str, Tensor]
    header: dict[str, Any]

    @property
    def count(self) -> int:
        return self.header["config"]["num_classes"]

    @property
    def names(self) -> list[str] | None:
        return self.header.get("class_names")

    @property
    def has_null_class(self) -> bool:
        return self.header["config"]["class_dropout_prob"] > 0


@dataclass(frozen=True)
class _Classes:
    """Of the mix: their names where they are known, how many, and for each part the row that it has for each, or None."""

    names: list[str] | None
    count: int
    rows: list[list[int | None]]


@dataclass(frozen=True)
class _Base:
    vectors: dict[str, Tensor]
    classes: Tensor  # a row for each of the mix's table


@torch.no_grad()
def mix_deltas(
    parts: Sequence[tuple[str | os.PathLike[str], float | None]],
    out: str | os.PathLike[str],
    *,
    ckpt: str | os.PathLike[str] | None = None,
    weights: str = "ema",
) -> dict[str, Any]:
    """Write the weighted sum of ``parts``, deltas of one base, as a delta; see this module for what it is.

    The same parts give the same bytes. Sums are taken in float64 and written in float32.

    Args:
        parts: (file, weight) of each; None for every weight: 1 / n.
        out: ``.safetensors`` file to write, beside and renamed.
        ckpt: the base, read only where the weights do not sum to 1 (None: the one that the run of a part names).
        weights: "ema" or "model" where ``ckpt`` has both, or the name of a set.

    Returns:
        What the file records: ``config``, ``class_names``, ``mixed`` ([name of the file, weight] of each part), and of
        what the parts recorded that in which they agree.

    Raises:
        DeltaMismatchError: two of the deltas were made for other sizes, trainables or bases; the message names both sides.
        DiffFitError: weights that are none or missing in part, classes that cannot be united, a file that cannot be read,
            a base that is needed and not known, or a sum that leaves float32's range.
    """
    chosen = _weights(parts)
    read = [_Part(os.fspath(path), w, *read_delta(path)) for (path, _), w in zip(parts, chosen, strict=True)]
    _check(read)
    total = math.fsum(chosen)
    whole = abs(total - 1) <= _ROUNDING
    if whole:
        read = [dataclasses.replace(part, weight=part.weight / total) for part in read]
    trained = TABLE in read[0].tensors
    classes = _unite(read, trained)
    header = _header(read, classes)
    header["mixed"] = [[Path(part.path).name, w] for part, w in zip(read, chosen, strict=True)]
    table = _mean_rows(read, classes) if trained else None
    base = None
    if not whole and not all(map(is_extra, read[0].tensors)):
        base = _read_base(read, ckpt, weights, total, header)
    mixed = {}
    for name in sorted(read[0].tensors):
        if name == TABLE:
            assert table is not None
            value = table if base is None else base.classes + total * (table - base.classes)
        else:
            value = sum(part.weight * part.tensors[name].double() for part in read)
            if not whole:
                value = value + (1 - total) * (neutral(name) if base is None else base.vectors[name])
        mixed[name] = value.float()
        if not bool(torch.isfinite(mixed[name]).all()):
            raise DiffFitError(f"the weights are too large: {name} of the sum is beyond float32's range")
    if not Path(out).parent.is_dir():
        raise DiffFitError(f"the folder for the delta does not exist: {Path(out).parent}")
    write_model_file(out, "delta", mixed, {**header, "difffit": dataclasses.asdict(header["difffit"])})
    return header


def _weights(parts: Sequence[tuple[Any, Any]]) -> list[float]:
    """Of each part; 1 / n where none has one."""
    if not parts:
        raise DiffFitError("there is nothing to mix: give one delta with its weight, or several")
    without = [os.fspath(path) for path, weight in parts if weight is None]
    if without and len(without) < len(parts):
        raise DiffFitError(f"every delta has a weight or none has; {without[0]} has none, and others have")
    if without and len(parts) == 1:
        raise DiffFitError(f"one delta is mixed with its base, by a weight; {without[0]} has none")
    if without:
        return [1 / len(parts)] * len(parts)
    for path, weight in parts:
        real = isinstance(weight, numbers.Real) and not isinstance(weight, bool)
        if not real or not -sys.float_info.max <= weight <= sys.float_info.max:
            raise DiffFitError(f"a weight must be a finite number; that of {os.fspath(path)} is {weight!r:.60}")
    return [float(weight) for _, weight in parts]


def _check(parts: Sequence[_Part]) -> None:
    """Raise unless they belong to the same models, and each holds what it says."""
    for part in parts:
        with torch.device("meta"):
            model = FastDiffFitDiT(**part.header["config"], difffit=part.header["difffit"])
        own = {name: p for name, p in model.named_parameters() if model.difffit.trains(name)}
        check_tensors(own, part.tensors, part.path)
    for one, other in combinations(parts, 2):
        check_alike(other.header, one.header, other.path, one.path)
        a, b = (image_pixels(part.header, part.header["config"], part.path) for part in (one, other))
        if a != b:
            raise DeltaMismatchError(f"{other.path} was made for images of {b} pixels; {one.path} has {a}")


# -- classes -----------------------------------------------------------------------------------------------------------
def _unite(parts: Sequence[_Part], trained: bool) -> _Classes:
    """The classes of all parts, as :func:`.classes.match_names` compares names; row by row where nothing is named."""
    for part in parts:
        twice = [name for name, times in Counter(part.names or ()).items() if times > 1]
        if twice:
            raise DiffFitError(f"{part.path} has two classes of the name {twice[0]!r}: which is which is not known")
    named = [part for part in parts if part.names is not None]
    first = named[0] if named else parts[0]
    if len(named) == len(parts) and trained:
        return _by_name(parts)
    # Row i goes with row i: where names are missing, and where the table is the base's.
    if other := next((part for part in parts if part.count != first.count), None):
        why = "it does not train the class table" if not trained else "one of the two has no class names"
        raise DiffFitError(
            f"{other.path} has {other.count} classes, {first.path} {first.count}: as many are needed, since {why}"
        )
    if other := next((part for part in named if part.names != first.names), None):
        why = "the class table is not trained" if not trained else "another delta has no class names"
        raise DiffFitError(
            f"{other.path} and {first.path} name their classes differently, and {why}: which rows belong together is not known"
        )
    rows: list[list[int | None]] = [list(range(first.count)) for _ in parts]
    return _Classes(first.names, first.count, rows)


def _by_name(parts: Sequence[_Part]) -> _Classes:
    names: list[str] = []
    rows: list[list[int | None]] = []
    for part in parts:
        theirs = part.names or []
        found = match_names(names, theirs)
        own: list[int | None] = [None] * len(names)
        for row, place in enumerate(found):
            if place is None:
                names.append(theirs[row])
                own.append(row)
            else:
                own[place] = row
        rows.append(own)
    return _Classes(names, len(names), [own + [None] * (len(names) - len(own)) for own in rows])


def _mean_rows(parts: Sequence[_Part], classes: _Classes) -> Tensor:
    """The class table, (rows, D) float64: of each class, and of the null class, the weighted mean of those that have it."""
    null: list[int | None] = [part.count if part.has_null_class else None for part in parts]
    places = [[own[i] for own in classes.rows] for i in range(classes.count)]
    if any(place is not None for place in null):
        places.append(null)
    table = []
    for i, place in enumerate(places):
        known = [(part, row) for part, row in zip(parts, place, strict=True) if row is not None]
        total = math.fsum(part.weight for part, _ in known)
        if abs(total) <= _ROUNDING * max(abs(part.weight) for part, _ in known):
            which = "the null class" if i == classes.count else f"class {i}"
            if i < classes.count and classes.names is not None:
                which = f"the class {classes.names[i]!r}"
            raise DiffFitError(
                f"the weights of the deltas that have {which} sum to 0, so its row, their weighted mean, is none"
            )
        table.append(sum(part.weight / total * part.tensors[TABLE][row].double() for part, row in known))
    return torch.stack(table)  # type: ignore[arg-type]


# -- the base, and what the file records -------------------------------------------------------------------------------
def _read_base(
    parts: Sequence[_Part], ckpt: str | os.PathLike[str] | None, weights: str, total: float, header: dict[str, Any]
) -> _Base:
    """What the parts have in their place in the base.

    Raises:
        DiffFitError: it is not known, or not theirs.
    """
    model, why = None, None
    for part in parts[:1] if ckpt is not None else parts:
        try:
            model = base_of(ckpt, part.path, part.header, weights)
            break
        except DiffFitError as error:
            if ckpt is not None:
                raise
            why = why or error
    if model is None:
        raise DiffFitError(
            f"the weights sum to {total:g}, and what is missing to 1 is the base's, whose biases no delta holds; {why}"
        ) from why
    for part in parts:
        check_delta(model, part.header, part.path, classes=False)
    base = model.deltas.prepare(model)
    assert model.deltas.layout is not None
    vectors = {name: v.double() for name, v in model.deltas.layout.unflatten(base.vectors).items()}
    config = header["config"]
    rows = config["num_classes"] + (config["class_dropout_prob"] > 0)
    partners = base_rows(base, config["num_classes"], rows, header["class_names"])
    return _Base(vectors, base.classes[partners].double())


def _header(parts: Sequence[_Part], classes: _Classes) -> dict[str, Any]:
    """What the mix records, but for what it was mixed from; ``difffit`` as :func:`.delta.read_delta` gives it."""
    headers = [part.header for part in parts]
    first = headers[0]
    tells_base = next((h for h in headers if h.get("base_hashes") is not None), first)
    tells_size = next((h for h in headers if h.get("image_size") is not None), first)
    config = {**first["config"], "num_classes": classes.count}
    config["class_dropout_prob"] = next(
        (p.header["config"]["class_dropout_prob"] for p in parts if p.has_null_class), 0.0
    )
    agreed = {key: first[key] for key in OF_MODELS if first.get(key) is not None and _all_same(headers, key)}
    return {
        **agreed,
        "config": config,
        "difffit": first["difffit"],
        "pos_embed_scale": next(filter(tells_scale, headers), first)["pos_embed_scale"],
        "class_names": classes.names,
        "class_rows": first.get("class_rows"),
        "base_hash": tells_base["base_hash"],
        "base_hashes": tells_base.get("base_hashes"),
        "random_base": _random_base(parts, config),
        "objective": next((h["objective"] for h in headers if h.get("objective") is not None), None),
        "image_size": tells_size.get("image_size"),
    }


def _all_same(headers: Sequence[dict[str, Any]], key: str) -> bool:
    return all(header.get(key) == headers[0].get(key) for header in headers)


def _random_base(parts: Sequence[_Part], config: dict[str, Any]) -> int | None:
    """The seed of the random base, where the mix finds it again by that: it is drawn for a number of classes."""
    seed = parts[0].header.get("random_base")
    if seed is None or not _all_same([part.header for part in parts], "random_base"):
        return None
    rows = config["num_classes"], config["class_dropout_prob"] > 0
    if all((part.count, part.has_null_class) == rows for part in parts):
        return seed
    warnings.warn(
        f"the base is random weights that are drawn for the {parts[0].count} classes of {parts[0].path}; the mix has "
        f"{rows[0]} and cannot find them again by their seed: load it into a model of that base",
        stacklevel=4,
    )
    return None
