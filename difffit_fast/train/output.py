"""The file of a step that one samples from, whatever the method was; it holds the averaged weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..models.dit import DIT_ARGUMENTS
from ..models.header import write_model_file


def write_output(model: nn.Module, tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, Any]) -> None:
    """Write ``tensors`` (the average of every trainable, by name) for ``model``.

    A FastDiffFitDiT gives a delta that ``load_delta`` reads. A DiT that trains as a whole gives a state dict under the
    public keys, which every DiT reader takes. Any other model gives its trainables under their names.

    Args:
        metadata: anything JSON can hold: step, class names, how the run was made.
    """
    tensors = {name: tensor.detach() for name, tensor in tensors.items()}
    if hasattr(model, "save_delta"):
        model.save_delta(path, tensors=tensors, **metadata)
        return
    named = dict(model.named_parameters())
    whole = all(name in tensors or name == "pos_embed" for name in named)
    if whole:
        rest = {n: p.detach() for n, p in named.items() if n not in tensors} | dict(model.named_buffers())
        tensors = {**tensors, **{n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in rest.items()}}
    values = dict(metadata)
    if all(hasattr(model, key) for key in DIT_ARGUMENTS):  # any module may be trained
        values["config"] = {key: getattr(model, key) for key in DIT_ARGUMENTS}
        values["pos_embed_scale"] = getattr(model, "pos_embed_scale", None)
    kind = "model" if whole else "trainables"
    write_model_file(path, kind, {name: t.to(torch.float32) for name, t in tensors.items()}, values)
