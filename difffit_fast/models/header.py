"""What every model file of this package says about itself: one schema, written and read here and nowhere else.

A header is strings under names, as ``.safetensors`` keeps them; a ``.pt`` carries the same, as one string, in the metadata
that PyTorch keeps beside a state dict (``state_dict._metadata[""]["difffit_fast"]``), where no reader of plain state dicts
stumbles over it.

========================= ================================================================================================
``format``, ``kind``      "pt" and "model": a whole DiT; "difffit_fast-delta" and "delta": DiffFit's trainables;
                          "difffit_fast-trainables" and "trainables": those of another method
``version``               of this schema
``base_hash``             of the frozen weights that a delta belongs to; more in ``base_hashes``, see :mod:`.base_hash`
all others                JSON, see :data:`FIELDS`; a caller may add more
========================= ================================================================================================

Version 1 had no ``kind``; whole models then had the format "difffit_fast-model", or "pt" where they were merged.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .._files import safetensors_metadata, write_safetensors
from .._words import shown
from ..errors import DiffFitError
from .dit import DIT_ARGUMENTS, STATE_DICT_KEY, check_dit_config

VERSION = 2
FORMATS = {"model": "pt", "delta": "difffit_fast-delta", "trainables": "difffit_fast-trainables"}
_KINDS = {**{name: kind for kind, name in FORMATS.items()}, "difffit_fast-model": "model"}

# Name -> the types its value may have, besides None.
FIELDS: dict[str, tuple[type, ...]] = {
    "config": (dict,),  # the DiT's constructor arguments
    "pos_embed_scale": (int, float),  # of the coordinates of the positional table
    "objective": (str,),  # "ddpm" or "flow"
    "class_names": (list,),
    "class_rows": (
        list,
    ),  # of the base's class table, where a delta does not train it and has not all of them in order
    "image_size": (int,),  # pixels
    "vae": (str,),
    "step": (int,),
    "val_loss": (int, float),  # of the best of a run: the smallest so far
    "val_set": (str,),  # and of which images it is the mean, as a hash
    "architecture": (str,),  # "DiT-XL/2"
    "method": (str,),
    "method_options": (dict,),
    "difffit": (dict,),  # what a delta trains
    "base_hashes": (dict,),  # of a delta: what else of its base it builds on, see .base_hash
    "model_class": (str,),  # of a delta for a model that is no DiT of this package, instead of config
    "add_bias": (bool,),  # whether linears without a bias got one there
    "branch_ends": (list,),  # where γ was put there, if it was said
    "random_base": (int,),  # the seed that the base's random weights came from, where it was no checkpoint
    "mixed": (list,),  # of a delta that is the weighted sum of others: [name of the file, weight] of each
}
# Numbers have bounds, both included.
BOUNDS: dict[str, tuple[float, float]] = {
    "pos_embed_scale": (1e-6, 1e6), "image_size": (1, 1 << 20), "step": (0, (1 << 63) - 1),
    "val_loss": (-sys.float_info.max, sys.float_info.max),
    "random_base": (0, (1 << 64) - 1),
}  # fmt: skip
# What training knew that holds for the whole model too, once a delta is merged into it.
OF_MODELS = ("class_names", "image_size", "vae", "objective", "step", "architecture")
_PLAIN = ("format", "kind", "version", "base_hash")


def encode_header(kind: str, values: Mapping[str, Any]) -> dict[str, str]:
    """The strings of a header; values that are None are left out.

    Raises:
        DiffFitError: a value of the wrong type.
    """
    values = {key: value for key, value in values.items() if value is not None}
    check_header(values, "the header to be written")
    strings = {"format": FORMATS[kind], "kind": kind, "version": str(VERSION)}
    return strings | {key: value if key in _PLAIN else _json(value) for key, value in values.items()}


def _json(value: Any) -> str:
    return json.dumps(value, default=lambda number: number.item())  # NumPy's


def decode_header(strings: Mapping[str, Any], source: str) -> dict[str, Any]:
    """A header's values; ``kind`` is in it where the file is one of this package's, ``version`` is a number.

    Raises:
        DiffFitError: a later version, or an entry that is not what the schema says.
    """
    values: dict[str, Any] = {}
    for key, text in strings.items():
        if key in _PLAIN or not isinstance(text, str):
            values[key] = text
            continue
        try:
            values[key] = json.loads(text, object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:
            if key in FIELDS:
                why = f" ({error})" if isinstance(error, _TwiceError) else ""
                raise DiffFitError(f"{source}: {key} in its metadata is not JSON{why}: {text[:60]!r}") from None
            values[key] = text
    kind = values.get("kind", _KINDS.get(values.get("format", "")))
    if kind not in FORMATS:
        return values
    values["kind"] = kind
    try:
        values["version"] = int(values.get("version", 1))
    except (TypeError, ValueError):
        raise DiffFitError(f"{source}: its metadata has the version {shown(values['version'])}, not a number") from None
    if values["version"] < 1:
        raise DiffFitError(f"{source}: its metadata has the version {values['version']}; versions are counted from 1")
    if values["version"] > VERSION:
        raise DiffFitError(f"{source} has version {values['version']}; this package reads up to {VERSION}")
    check_header(values, source)
    return values


class _TwiceError(ValueError):
    pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object in which no key stands twice: which of the two was meant, nobody knows."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _TwiceError("a key stands twice in it")
    return found


def check_header(values: Mapping[str, Any], source: str) -> None:
    """Raise :class:`DiffFitError` for an entry of the wrong type, or sizes that make no DiT."""
    for key, types in FIELDS.items():
        value = values.get(key)
        if value is not None and (not isinstance(value, types) or (isinstance(value, bool) and bool not in types)):
            raise DiffFitError(f"{source}: {key} in its metadata should be {types[0].__name__}; it is {value!r:.60}")
        low, high = BOUNDS.get(key, (-math.inf, math.inf))
        if key in BOUNDS and value is not None and not low <= value <= high:
            raise DiffFitError(f"{source}: {key} in its metadata should be from {low} to {high}; it is {shown(value)}")
    hashes = values.get("base_hashes")
    if hashes is not None and not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)
        for pair in hashes.values()
    ):
        raise DiffFitError(f"{source}: base_hashes in its metadata should be pairs of text; it is {hashes!r:.60}")
    mixed = values.get("mixed")
    if mixed is not None and not all(
        isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) and _is_finite(pair[1]) for pair in mixed
    ):
        raise DiffFitError(f"{source}: mixed in its metadata should be pairs of text and number; it is {mixed!r:.60}")
    names = values.get("class_names")
    if names is not None and not all(isinstance(name, str) for name in names):
        raise DiffFitError(f"{source}: class_names in its metadata should be text; it is {names!r:.60}")
    if values.get("objective") not in (None, "ddpm", "flow"):
        raise DiffFitError(f"{source}: objective in its metadata should be ddpm or flow; it is {values['objective']!r}")
    config = values.get("config")
    if config is None:
        return
    if odd := sorted(set(config) ^ set(DIT_ARGUMENTS)):
        what = "has the unknown argument" if odd[0] in config else "lacks"
        raise DiffFitError(f"{source}: config in its metadata {what} {odd[0]}")
    try:
        check_dit_config(config)
    except ValueError as error:
        raise DiffFitError(f"{source}: config in its metadata makes no DiT: {error}") from error
    if names is not None and len(names) != config["num_classes"]:
        raise DiffFitError(f"{source}: its metadata has {len(names)} class_names for {config['num_classes']} classes")


def _is_finite(value: Any) -> bool:
    """Whether it is a finite number, of JSON's kinds."""
    return type(value) in (int, float) and -sys.float_info.max <= value <= sys.float_info.max


def record_in_state_dict(state: Any, values: Mapping[str, Any]) -> None:
    """Let a state dict that ``module.state_dict()`` made carry a whole header, through ``torch.save`` and back."""
    state._metadata[""][STATE_DICT_KEY] = json.dumps(encode_header("model", values))


def read_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The header of a ``.safetensors`` file; without ``kind`` where it is not one of this package's.

    Raises:
        DiffFitError: the file cannot be read as one, or its header is not what the schema says.
    """
    return decode_header(safetensors_metadata(path), str(path))


def write_model_file(
    path: str | os.PathLike[str], kind: str, tensors: Mapping[str, Tensor], values: Mapping[str, Any]
) -> None:
    """Write ``tensors`` under a header to a ``.safetensors`` file, beside and renamed; the same content, the same bytes."""
    write_safetensors(path, tensors, encode_header(kind, values))
