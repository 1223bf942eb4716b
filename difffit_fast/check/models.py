"""Checkpoints, deltas and the trainables of other methods."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..errors import DiffFitError
from ..models.checkpoint import read_model
from ..models.delta import read_delta
from ..models.fast_dit import FastDiffFitDiT
from ..models.foreign import LeftOutWarning
from ..models.header import read_header
from ..models.sizes import model_name
from .report import Report, check_values


def check_delta(path: Path, report: Report) -> None:
    """A delta holds exactly its trainables, and says what is needed to use it."""
    tensors, header = read_delta(path)
    config = header["config"]
    report.facts |= {
        "model": model_name(config, header.get("objective")),
        "classes": config["num_classes"],
        "parameters": sum(t.numel() for t in tensors.values()),
        "step": header.get("step"),
    }
    with torch.device("meta"):
        model = FastDiffFitDiT(**config, difffit=header["difffit"])
    own = dict(model.named_trainable_parameters())
    for name in sorted(set(own) | set(tensors)):
        if name not in tensors:
            report.wrong("trainables that are missing", name)
        elif name not in own:
            report.wrong("tensors that its configuration does not train", name)
        elif own[name].shape != tensors[name].shape:
            report.wrong(
                "tensors of another shape", f"{name} {tuple(tensors[name].shape)}, not {tuple(own[name].shape)}"
            )
    check_values(tensors.items(), report)
    gammas = [t for name, t in tensors.items() if ".gamma" in name]
    if gammas and all(bool((t == 1).all()) for t in gammas):
        report.suspicious("untrained", "every γ is exactly 1")
    _check_header(header, config["num_classes"], report)
    if header.get("random_base") is not None:
        report.suspicious("made on random weights", f"seed {header['random_base']}")


def check_trainables(path: Path, report: Report) -> None:
    """What a method other than DiffFit trained."""
    header = read_header(path)
    with safe_open(path, "pt") as file:
        tensors: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    report.facts |= {"method": header.get("method"), "parameters": sum(t.numel() for t in tensors.values())}
    check_values(tensors.items(), report)
    _check_header(header, (header.get("config") or {}).get("num_classes"), report)


def check_checkpoint(path: Path, report: Report) -> None:
    """A DiT that can be built, whole and finite."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LeftOutWarning)  # it is told below
        file = read_model(path)
    for part in file.left_out:
        report.left_out("parts that are no DiT's", part)
    report.facts |= {
        "model": file.name,
        "classes": file.config["num_classes"],
        "parameters": sum(t.numel() for t in file.state.values()),
        "image size": file.image_size,
    }
    try:
        if not file.is_difffit:
            file.check_keys(file.skeleton())
        file.arguments()
    except DiffFitError as error:
        report.wrong("refused", str(error))
    check_values(file.state.items(), report)
    if file.is_difffit:
        report.suspicious("DiffFit's parameters, not merged", "difffit export --to dit folds them into the weights")
    if file.pos_embed_scale is None:
        report.suspicious("positions that are no sine-cosine table", "another image size cannot be made of them")
    if file.header:
        _check_header(file.header, file.config["num_classes"], report)


def _check_header(header: dict[str, Any], num_classes: int | None, report: Report) -> None:
    """What a file records beside its tensors."""
    names = header.get("class_names")
    if names is None:
        report.suspicious("not recorded", "class names")
    else:
        if num_classes is not None and len(names) != num_classes:
            report.wrong("class names do not fit", f"{len(names)} names for {num_classes} classes")
        for name in sorted(name for name, count in Counter(names).items() if count > 1):
            report.wrong("class names that occur twice", repr(name))
        for name in names:
            if not name.strip():
                report.suspicious("class names without a letter", repr(name))
    for key in ("objective", "image_size", "vae"):
        if header.get(key) is None:
            report.suspicious("not recorded", key)
