"""A DiT in the keys of diffusers' ``DiTTransformer2DModel``, and back.

The two hold the same numbers under other names, but for what each block of diffusers has for itself: a copy of the timestep
embedder and of the class table, which a DiT has once. And they are not quite the same function: for the embedding of a
timestep diffusers divides the exponents of its 128 frequencies by 127, a DiT by 128, as the weights were trained. What is
read here is the DiT; what is written (:mod:`difffit_fast.interop`) carries a small model file that says so to diffusers.

``DiTPipeline`` takes row 1000 of the class table for the null class, always. So a table is written with at least 1,001
rows: the null row is 1000, a class from 1000 on lies one row further, and rows that no class has repeat the null row.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._files import read_json
from .._words import shown
from ..errors import DiffFitError
from .dit import sincos_pos_embed
from .header import encode_header

CONFIG_FILE = "config.json"
PIPELINE_FILE = "model_index.json"
NULL_ROW = 1000  # of the class table, in DiTPipeline
CLASSES = ("DiTTransformer2DModel", "Transformer2DModel", "OriginalDiTTransformer2DModel")  # the last is interop's
MARK = ".norm1.emb.class_embedder.embedding_table.weight"  # of a block's copy of the class table
_TABLE = "y_embedder.embedding_table.weight"

DEFAULTS = {"sample_size": 32, "num_attention_heads": 16}  # of diffusers, where a configuration does not say
ASKED: dict[str, tuple[Any, ...]] = {  # of a configuration that is a DiT's
    "_class_name": CLASSES, "norm_type": ("ada_norm_zero",), "activation_fn": ("gelu-approximate",),
    "norm_elementwise_affine": (False,), "attention_bias": (True,),
}  # fmt: skip
# A block's modules: DiT, diffusers.
_BLOCK = {
    "adaLN_modulation.1": "norm1.linear", "attn.proj": "attn1.to_out.0", "mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2",
}  # fmt: skip
# Those that every block of diffusers has for itself and a DiT has once.
_SHARED = {
    "t_embedder.mlp.0": "norm1.emb.timestep_embedder.linear_1", "t_embedder.mlp.2": "norm1.emb.timestep_embedder.linear_2",
}  # fmt: skip
_ONCE = {
    "x_embedder.proj": "pos_embed.proj", "final_layer.adaLN_modulation.1": "proj_out_1", "final_layer.linear": "proj_out_2",
}  # fmt: skip
_QKV = ("attn1.to_q", "attn1.to_k", "attn1.to_v")


class TimestepFrequenciesWarning(UserWarning):
    """A model of diffusers is read as a DiT, whose timestep frequencies are slightly others."""


def is_diffusers(keys: Mapping[Any, Any]) -> bool:
    """Whether a state dict has the keys of ``DiTTransformer2DModel``."""
    return f"transformer_blocks.0{MARK}" in keys


def row_of(label: int) -> int:
    """The row of a class in the table that ``DiTPipeline`` asks.

    >>> row_of(7), row_of(1000)
    (7, 1001)
    """
    return label + (label >= NULL_ROW)


# -- to diffusers ------------------------------------------------------------------------------------------------------
def to_diffusers(state: Mapping[str, Tensor], num_classes: int) -> dict[str, Tensor]:
    """The state dict of ``DiTTransformer2DModel`` for that of a DiT; ``pos_embed`` is no part of it.

    Args:
        state: of a plain DiT, whose class table has the null row or has not.
        num_classes: without the null class.
    """
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    table = padded_table(state[_TABLE], num_classes)
    found: dict[str, Tensor] = {}
    for kind in ("weight", "bias"):
        for mine, theirs in _ONCE.items():
            found[f"{theirs}.{kind}"] = state[f"{mine}.{kind}"]
        for i in range(depth):
            mine, theirs = f"blocks.{i}.", f"transformer_blocks.{i}."
            for here, there in _BLOCK.items():
                found[f"{theirs}{there}.{kind}"] = state[f"{mine}{here}.{kind}"]
            for here, there in _SHARED.items():
                found[f"{theirs}{there}.{kind}"] = state[f"{here}.{kind}"].clone()
            for there, part in zip(_QKV, state[f"{mine}attn.qkv.{kind}"].chunk(3), strict=True):
                found[f"{theirs}{there}.{kind}"] = part.clone()
    for i in range(depth):
        found[f"transformer_blocks.{i}{MARK}"] = table.clone()
    return found


def padded_table(table: Tensor, num_classes: int) -> Tensor:
    """A class table (N or N + 1, D) as ``DiTPipeline`` asks it, (max(1001, N + 1), D)."""
    null = table[num_classes:] if len(table) > num_classes else torch.zeros_like(table[:1])
    before, after = table[: min(num_classes, NULL_ROW)], table[NULL_ROW:num_classes]
    return torch.cat([before, null.expand(NULL_ROW - len(before), -1), null, after])


def diffusers_config(config: Mapping[str, Any], pos_embed_scale: float) -> dict[str, Any]:
    """``config.json`` of the transformer, for a DiT of these constructor arguments.

    Raises:
        DiffFitError: sizes that diffusers' class cannot have.
    """
    if config["mlp_ratio"] != 4:
        raise DiffFitError(f"diffusers' DiT has an mlp_ratio of 4; this model has {config['mlp_ratio']}")
    heads, channels = config["num_heads"], config["in_channels"]
    return {
        "_class_name": CLASSES[-1],
        "num_attention_heads": heads, "attention_head_dim": config["hidden_size"] // heads, "in_channels": channels,
        "out_channels": channels * (1 + config["learn_sigma"]), "num_layers": config["depth"], "attention_bias": True,
        "sample_size": config["input_size"], "patch_size": config["patch_size"], "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": max(NULL_ROW, config["num_classes"]), "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False, "norm_eps": 1e-6,
        # What the stock class does not know.
        "num_classes": config["num_classes"], "class_dropout_prob": config["class_dropout_prob"],
        "pos_embed_scale": pos_embed_scale, "downscale_freq_shift": 0,
    }  # fmt: skip


# -- from diffusers ----------------------------------------------------------------------------------------------------
def from_diffusers(
    state: Mapping[str, Tensor], config: Mapping[str, Any] | None, source: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state dict of the DiT, and the strings of a header that tell what its configuration tells.

    Args:
        state: of ``DiTTransformer2DModel``.
        config: its configuration, see :func:`read_config`.

    Raises:
        DiffFitError: there is no configuration, or it is of another model; the state has keys of another model, lacks some,
            or its blocks disagree about what a DiT has once.
    """
    if config is None:
        raise DiffFitError(
            f"{source} has the keys of diffusers and no {CONFIG_FILE} beside it, which tells heads and size; give the folder "
            "that save_pretrained wrote"
        )
    rest, said = dict(state), _checked(config, source)

    def take(key: str) -> Tensor:
        if key not in rest:
            raise DiffFitError(f"{source} lacks {key}, which every DiT of diffusers has")
        tensor = rest.pop(key)
        dims = 4 if key == "pos_embed.proj.weight" else 1 if key.endswith(".bias") else 2
        if tensor.layout != torch.strided or tensor.is_nested or tensor.dim() != dims or not tensor.numel():
            raise DiffFitError(f"{source}: {key} should have {dims} dimensions; it is {tuple(tensor.shape)}")
        return tensor

    depth = len({key.split(".")[1] for key in state if key.startswith("transformer_blocks.")})
    found: dict[str, Tensor] = {}
    for kind in ("weight", "bias"):
        for mine, theirs in _ONCE.items():
            found[f"{mine}.{kind}"] = take(f"{theirs}.{kind}")
        for mine, theirs in _SHARED.items():
            found[f"{mine}.{kind}"] = _one(take, depth, f"{theirs}.{kind}", source)
        for i in range(depth):
            mine, theirs = f"blocks.{i}.", f"transformer_blocks.{i}."
            for here, there in _BLOCK.items():
                found[f"{mine}{here}.{kind}"] = take(f"{theirs}{there}.{kind}")
            parts = [take(f"{theirs}{part}.{kind}") for part in _QKV]
            if len({(p.shape[1:], p.dtype) for p in parts}) > 1:
                raise DiffFitError(f"{source}: the {kind}s of {theirs}attn1 do not fit each other")
            found[f"{mine}attn.qkv.{kind}"] = torch.cat(parts)
    table = _one(take, depth, MARK[1:], source)
    rest.pop("pos_embed.pos_embed", None)  # recomputed
    if rest:
        raise DiffFitError(f"{source} is not a DiT of diffusers: it has the unknown key {shown(next(iter(rest)))}")
    classes = said.get("num_classes")
    if classes is not None:
        null = [NULL_ROW] if said.get("class_dropout_prob", 0.1) > 0 else []
        rows = [row_of(i) for i in range(classes)] + null
        if len(table) <= max(rows):
            raise DiffFitError(f"{source} records {classes} classes, but its table has {len(table)} rows")
        table = table[rows]
    found[_TABLE] = table
    patch, width = found["x_embedder.proj.weight"].shape[-1], len(found["x_embedder.proj.bias"])
    scale = float(said.get("pos_embed_scale", 1.0))
    found["pos_embed"] = sincos_pos_embed(width, said["sample_size"] // patch, scale)[None]
    return found, _header(said, found, depth, scale)


def _one(take: Callable[[str], Tensor], depth: int, name: str, source: str) -> Tensor:
    """What all blocks hold under ``name``, which must be the same."""
    first = take(f"transformer_blocks.0.{name}")
    for i in range(1, depth):
        if not torch.equal(first, take(f"transformer_blocks.{i}.{name}")):
            raise DiffFitError(
                f"{source}: block {i} has another {name} than block 0; a DiT has it once, so that this model cannot be one "
                "(it was trained with every block's copy apart)"
            )
    return first


def _checked(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The configuration with the defaults of diffusers, of a kind that a DiT can have.

    Raises:
        DiffFitError: a DiT has none such.
    """
    said = DEFAULTS | {key: value for key, value in config.items() if value is not None}
    for key, allowed in ASKED.items():
        if said.get(key, allowed[0]) not in allowed:
            raise DiffFitError(f"{source} has {key} {shown(said[key])}; a DiT has {' or '.join(map(str, allowed))}")
    numbers = {**dict.fromkeys((*DEFAULTS, "num_classes"), (int, 1, 1 << 20))}
    numbers |= {"pos_embed_scale": ((int, float), 1e-6, 1e6), "class_dropout_prob": ((int, float), 0, 1)}
    for key, (kind, low, high) in numbers.items():
        value = said.get(key, 1)
        if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
            raise DiffFitError(
                f"{source}: {key} in {CONFIG_FILE} should be a number from {low:g} to {high:g}; it is {shown(value)}"
            )
    if said.get("downscale_freq_shift", 1) != 0:
        warnings.warn(
            f"{source}: diffusers divides the exponents of the timestep frequencies by 127, a DiT by 128, as the published "
            "weights were trained; the DiT's are used, so that samples differ a little from DiTPipeline's",
            TimestepFrequenciesWarning, stacklevel=4,
        )  # fmt: skip
    return said


def _header(said: Mapping[str, Any], state: Mapping[str, Tensor], depth: int, scale: float) -> dict[str, str]:
    hidden, channels, patch, _ = state["x_embedder.proj.weight"].shape
    prob = said.get("class_dropout_prob", 0.1)
    config = {
        "input_size": said["sample_size"], "patch_size": patch, "in_channels": channels, "hidden_size": hidden,
        "depth": depth, "num_heads": said["num_attention_heads"], "mlp_ratio": 4.0, "class_dropout_prob": prob,
        "num_classes": said.get("num_classes", len(state[_TABLE]) - (prob > 0)),
        "learn_sigma": len(state["final_layer.linear.bias"]) == 2 * channels * patch * patch,
    }  # fmt: skip
    names = said.get("class_names")
    header = {"config": config, "pos_embed_scale": scale, "objective": "ddpm", "vae": said.get("vae")}
    if names is not None and len(names) == config["num_classes"]:
        header["class_names"] = names
    return encode_header("model", header)


def read_config(weights: Path) -> dict[str, Any] | None:
    """What lies beside the weights of a model of diffusers: its ``config.json``, and of the pipeline around it the names of
    the classes (``class_names``) and the folder of its autoencoder (``vae``); None where there is no configuration."""
    path = weights.parent / CONFIG_FILE
    if not path.is_file():
        return None
    config = read_json(path)
    pipeline = weights.parent.parent
    if (pipeline / PIPELINE_FILE).is_file():
        names = read_json(pipeline / PIPELINE_FILE).get("id2label")
        if isinstance(names, dict):
            count = config.get("num_classes", len(names))
            found = [names.get(str(row_of(i))) for i in range(count)] if isinstance(count, int) else []
            config["class_names"] = found if all(isinstance(name, str) for name in found) else None
        if (pipeline / "vae" / CONFIG_FILE).is_file():
            config["vae"] = str(pipeline / "vae")
    return config
