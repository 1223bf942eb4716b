"""A delta of :func:`difffit_fast.apply_difffit` as an adapter of PEFT, of the method that :mod:`difffit_fast.peft` registers."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import torch
from torch import nn

from .._extras import require
from .._files import new_folder
from ..apply.delta import read_applied
from ..apply.merging import held_modules
from .lora import _with_delta


def export_peft(
    model: nn.Module, delta: str | os.PathLike[str], folder: str | os.PathLike[str], *, overwrite: bool = False
) -> None:
    """Write a folder that ``PeftModel.from_pretrained(model, folder)`` reads, once ``difffit_fast.peft`` is imported.

    Args:
        model: the base, as it came from diffusers; it is left as it was.
        delta: what ``apply_difffit(model, ...).save_delta`` wrote.
        folder: to be made.
        overwrite: replace a folder that is there.

    Raises:
        DeltaMismatchError: the delta is of another class or another base.
        DiffFitError: ``folder`` has something in it.
    """
    require("peft", "peft", "the adapter folder")
    from peft import get_peft_model

    from ..peft import DiffFitPeftConfig

    _, header = read_applied(delta)
    ready: Any = _with_delta(model, delta)
    values = {path: {n: m._parameters[n].detach() for n in held.dtypes} for path, m, held in held_modules(ready)}
    ready.unload()
    asked = {name: p.requires_grad for name, p in model.named_parameters()}
    config = DiffFitPeftConfig(
        difffit=dataclasses.asdict(header["difffit"]),
        add_bias=header["add_bias"],
        branch_ends=header.get("branch_ends"),
    )
    wrapped = get_peft_model(model, config)
    try:
        with torch.no_grad():
            for path, module in model.named_modules():
                layer = module.__dict__.get("_difffit_layer")
                for name, p in layer.difffit_values["default"].items() if layer is not None else ():
                    p.copy_(values[path][name])
        with new_folder(folder, overwrite=overwrite) as out:
            wrapped.save_pretrained(out)
    finally:
        wrapped.unload()
        for name, p in model.named_parameters():
            p.requires_grad_(asked[name])
