"""The delta of an applied model: its trainables in a .safetensors file, under the header of all deltas (``models.header``)."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import DeltaMismatchError, DiffFitError
from ..models.delta import put_trainables
from ..models.difffit import DiffFitConfig
from ..models.header import read_header, write_model_file
from ..models.state_dict import check_finite
from .modules import is_plain


def base_hash(model: nn.Module, trainables: Mapping[str, Tensor]) -> str:
    """SHA-256 of what stays frozen, parameters and persistent buffers, the same for a base held in float32 or in bfloat16.

    What a delta replaces is left out, so that a base whose classes were changed before is still the same base.
    """
    mine = {id(p) for p in trainables.values()}
    digest = hashlib.sha256()
    for name, t in sorted(model.state_dict(keep_vars=True).items()):
        if id(t) not in mine and is_plain(t):
            digest.update(name.encode())
            digest.update(t.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def write_delta(
    path: str | os.PathLike[str],
    own: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor] | None,
    header: Mapping[str, Any],
) -> None:
    """Write the trainables ``own``, or ``tensors`` of these names in their place, as float32, beside ``path`` and renamed.

    Raises:
        DiffFitError: ``tensors`` does not name exactly the trainables, or the folder is missing.
    """
    if tensors is not None and set(tensors) != set(own):
        odd = sorted(set(tensors) ^ set(own))[0]
        raise DiffFitError(f"tensors must name exactly the trainable parameters; {odd} is in only one of the two")
    if not Path(path).parent.is_dir():
        raise DiffFitError(f"the folder for the delta does not exist: {Path(path).parent}")
    values = own if tensors is None else {name: tensors[name] for name in own}
    write_model_file(path, "delta", {n: t.detach().to("cpu", torch.float32) for n, t in values.items()}, header)


def read_applied(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a delta that an applied model wrote; ``header["difffit"]`` is a :class:`DiffFitConfig`.

    Raises:
        DiffFitError: the file is missing, unreadable, or no such delta.
    """
    path = Path(path)
    if not path.is_file():
        raise DiffFitError(f"delta not found: {path}")
    header = read_header(path)
    if header.get("kind") != "delta":
        raise DiffFitError(f"{path} is not a delta of difffit_fast: its metadata does not say so")
    if header.get("model_class") is None:
        raise DiffFitError(f"{path} is a delta of a DiT of this package; FastDiffFitDiT.load_delta reads it")
    if missing := [key for key in ("difffit", "base_hash", "add_bias") if header.get(key) is None]:
        raise DiffFitError(f"{path} cannot be used: its metadata lacks {missing[0]}")
    header["difffit"] = DiffFitConfig.resolve(header["difffit"])
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise DiffFitError(f"cannot read delta {path}: {error}") from error
    check_finite(tensors, str(path))
    return tensors, header


def put_delta(path: str | os.PathLike[str], own: Mapping[str, Tensor], header: Mapping[str, Any]) -> dict[str, Any]:
    """Load a delta into the trainables ``own`` of a model that would write ``header``; nothing is changed if it does not fit.

    Raises:
        DeltaMismatchError: another class, other trainables or another base; the message names both sides.
    """
    tensors, theirs = read_applied(path)
    if theirs["model_class"] != header["model_class"]:
        raise DeltaMismatchError(f"{path} was made for {theirs['model_class']}; the model is a {header['model_class']}")
    config = DiffFitConfig.resolve(header["difffit"])
    if theirs["difffit"] != config:
        raise DeltaMismatchError(
            f"{path} was made with config={theirs['difffit'].name} {theirs['difffit'].to_json()}; the model has "
            f"{config.name} {config.to_json()}"
        )
    for key in ("add_bias", "branch_ends"):
        if theirs.get(key) != header[key]:
            raise DeltaMismatchError(f"{path} was made with {key}={theirs.get(key)}; the model has {key}={header[key]}")
    if theirs["base_hash"] != header["base_hash"]:
        raise DeltaMismatchError(
            f"{path} was made on the base {theirs['base_hash'][:12]}…; the model's base is {header['base_hash'][:12]}…"
        )
    put_trainables(own, tensors, str(path))
    return theirs


def delta_header(
    model_class: str, difffit: DiffFitConfig, add_bias: bool, branch_ends: Any, base: str
) -> dict[str, Any]:
    """What a delta of an applied model says of itself."""
    return {
        "model_class": model_class, "difffit": dataclasses.asdict(difffit), "add_bias": add_bias,
        "branch_ends": branch_ends, "base_hash": base,
    }  # fmt: skip
