"""From a method's name to a model, and its trainables to a file and back."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ..errors import DiffFitError
from ..models.delta import put_trainables
from ..models.difffit import DiffFitConfig
from ..models.dit import DiT
from ..models.fast_dit import FastDiffFitDiT
from ..models.header import read_header, write_model_file
from .adapter import add_adapters
from .base import BaselineDiT, is_class_embedding
from .lora import add_lora
from .vpt import add_prompts


def full(dit: DiT) -> BaselineDiT:
    """Everything trains except the fixed position table."""
    return BaselineDiT.adopt(dit, "full", {}).train_only(lambda name: name != "pos_embed")


def class_embedding(dit: DiT) -> BaselineDiT:
    """Only the class table trains (the "linear" baseline of a generator)."""
    return BaselineDiT.adopt(dit, "class_embedding", {}).train_only(is_class_embedding)


def difffit(
    dit: DiT,
    *,
    difffit: str | dict[str, Any] | DiffFitConfig = "paper",
    gamma_blocks: str | int | None = None,
    compute_dtype: torch.dtype | None = None,
) -> nn.Module:
    """A FastDiffFitDiT.

    Args:
        difffit: preset, configuration or its dictionary.
        gamma_blocks: overrides which blocks have γ: "half", "all", the first k, or the last k as −k.
        compute_dtype: as in :class:`~difffit_fast.models.fast_dit.FastDiffFitDiT`.
    """
    config = DiffFitConfig.resolve(difffit)
    if gamma_blocks is not None:
        config = dataclasses.replace(config, gamma_blocks=gamma_blocks)
    return FastDiffFitDiT.from_dit(dit, difffit=config, compute_dtype=compute_dtype).train(dit.training)


def bitfit(dit: DiT, *, compute_dtype: torch.dtype | None = None) -> nn.Module:
    """Biases and the class table (Ben Zaken et al., ACL 2022), on the kernels of FastDiffFitDiT."""
    return difffit(dit, difffit="bitfit", compute_dtype=compute_dtype)


METHODS: dict[str, Callable[..., nn.Module]] = {
    "full": full,
    "difffit": difffit,
    "bitfit": bitfit,
    "lora": add_lora,
    "adapter": add_adapters,
    "vpt": add_prompts,
    "class_embedding": class_embedding,
}


def apply(name: str, dit: DiT, **options: Any) -> nn.Module:
    """Make ``dit`` ready to be fine-tuned by a method.

    Args:
        name: one of :data:`METHODS`.
        dit: the pre-trained model, with the class table of the target. It is taken over: use the result instead.
            Random parts of the method come from PyTorch's global generator.
        options: of the method; see its function.

    Raises:
        DiffFitError: unknown method, or an option whose value makes no sense.
        TypeError: an option that the method does not have.
    """
    if name not in METHODS:
        raise DiffFitError(f"the method must be one of {', '.join(METHODS)}; got {name!r}")
    return METHODS[name](dit, **options)


def save_trainables(model: nn.Module, path: str | os.PathLike[str], **metadata: Any) -> None:
    """Write what :func:`apply`'s model trains, as float32 under its own names, to a ``.safetensors`` file.

    ``metadata``: anything JSON can hold. A FastDiffFitDiT is better served by ``model.save_delta``.
    """
    info = {"method": getattr(model, "method", None), "method_options": getattr(model, "method_options", None)}
    tensors = {n: p.detach().float() for n, p in model.named_parameters() if p.requires_grad}
    write_model_file(path, "trainables", tensors, {**info, **metadata})


@torch.no_grad()
def load_trainables(model: nn.Module, path: str | os.PathLike[str]) -> dict[str, Any]:
    """Load what :func:`save_trainables` (or the trainer, for these methods) wrote; returns the metadata.

    ``model`` must come from :func:`apply` with the same method and options, on the same base.

    Raises:
        DiffFitError: not such a file.
        DeltaMismatchError: its tensors are not this model's trainables; nothing has been changed then.
    """
    header = read_header(path)
    if header.get("kind") != "trainables":
        raise DiffFitError(f"{path} holds no trainables of a method: its metadata does not say so")
    try:
        with safe_open(str(path), framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise DiffFitError(f"{path} cannot be read as safetensors: {error}") from error
    put_trainables({n: p for n, p in model.named_parameters() if p.requires_grad}, tensors, str(path))
    return {key: value for key, value in header.items() if key not in ("format", "kind", "version")}
