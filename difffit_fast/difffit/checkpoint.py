"""Reading DiT checkpoints: bare state dicts, {"ema"}, {"model"} and safetensors, and the sizes their tensors tell."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..errors import DiffFitError
from ..models.dit import DIT_SIZES

PREFIXES = ("module.", "_orig_mod.", "model.")


def load_dit_state_dict(path: str | os.PathLike[str], *, prefer: str = "ema") -> dict[str, Tensor]:
    """The state dict in a checkpoint file, on the CPU.

    Accepts a bare state dict, a dictionary with "ema" and/or "model" (training checkpoints, whose ``argparse.Namespace``
    is allowed under ``weights_only=True``) and ``.safetensors``. Prefixes of DDP and torch.compile are removed.

    Args:
        prefer: which weights to take where a file has both, "ema" or "model".

    Raises:
        DiffFitError: the file is missing, unreadable or holds no DiT.
    """
    path = Path(path)
    if not path.is_file():
        raise DiffFitError(f"checkpoint not found: {path}")
    try:
        if path.suffix == ".safetensors":
            loaded: Any = load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):
                loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever the bytes make its parts raise
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DiffFitError(f"cannot read checkpoint {path}: {first_line}") from error
    return clean_state_dict(loaded, str(path), prefer)


def clean_state_dict(loaded: Any, source: str = "the checkpoint", prefer: str = "ema") -> dict[str, Tensor]:
    """Find the DiT state dict in what a checkpoint holds and remove wrappers' prefixes."""
    for key in (prefer, "ema", "model", "state_dict"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
            break
    if not isinstance(loaded, Mapping):
        raise DiffFitError(f"{source} holds a {type(loaded).__name__}, not a state dict")
    state = {k: v for k, v in loaded.items() if isinstance(v, Tensor)}
    while state and any(all(k.startswith(p) for k in state) for p in PREFIXES):
        state = {k.split(".", 1)[1]: v for k, v in state.items()}
    if "x_embedder.proj.weight" not in state:
        known = ", ".join(list(state)[:3]) or "no tensors"
        raise DiffFitError(f"{source} is not a DiT: it has no x_embedder.proj.weight (it has {known})")
    return state


def infer_config(
    state: Mapping[str, Tensor], *, num_heads: int | None = None, null_class: bool = True
) -> dict[str, Any]:
    """The constructor arguments of the DiT that a state dict belongs to.

    The number of heads leaves no trace in the tensors: it is taken from the published sizes (XL, L, B, S) or must be given.
    The class table is taken to have a null row (all public checkpoints do) unless ``null_class`` is False.
    """
    patch = state["x_embedder.proj.weight"]
    hidden, channels, p = patch.shape[0], patch.shape[1], patch.shape[2]
    depth = 1 + max((int(k.split(".")[1]) for k in state if k.startswith("blocks.")), default=-1)
    if num_heads is None:
        heads = {s["hidden_size"]: s["num_heads"] for s in DIT_SIZES.values()}
        if hidden not in heads:
            raise DiffFitError(
                f"a DiT of width {hidden} is none of the published sizes ({', '.join(map(str, sorted(heads)))}), and the "
                "number of heads cannot be read from its tensors; pass num_heads"
            )
        num_heads = heads[hidden]
    try:
        tokens = state["pos_embed"].shape[1]
        rows = state["y_embedder.embedding_table.weight"].shape[0]
        out_channels = state["final_layer.linear.weight"].shape[0] // (p * p)
        mlp = state["blocks.0.mlp.fc1.weight"].shape[0] / hidden if depth else 4.0
    except KeyError as error:
        raise DiffFitError(f"the state dict lacks {error.args[0]}, which every DiT checkpoint has") from error
    return dict(
        input_size=math.isqrt(tokens) * p,
        patch_size=p,
        in_channels=channels,
        hidden_size=hidden,
        depth=depth,
        num_heads=num_heads,
        mlp_ratio=mlp,
        class_dropout_prob=0.1 if null_class else 0.0,
        num_classes=rows - int(null_class),
        learn_sigma=out_channels == 2 * channels,
    )


def pixels_per_cell(in_channels: int) -> int:
    """Image pixels per input cell: 8 for the four-channel latents of the Stable Diffusion VAE, 1 for pixels."""
    return 8 if in_channels == 4 else 1
