"""Merge: fold γ and the affine LayerNorm into weights and biases, exactly, so that an ordinary DiT remains.

γ·(W x + b) = (γW) x + γb; and under the modulation W_scale c + b_scale = scale, LayerNorm's w, b become

    W_scale' = w·W_scale,   b_scale' = w(1 + b_scale) − 1,   W_shift' = W_shift + b·W_scale,   b_shift' = b_shift + b(1 + b_scale)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .difffit import is_extra
from .dit import DiT


def _scale_rows(linear: nn.Linear, *gammas: Tensor | None) -> None:
    for gamma in gammas:
        if gamma is not None:
            linear.weight.mul_(gamma[:, None].to(linear.weight))
            linear.bias.mul_(gamma.to(linear.bias))


def _fold_norm(modulation: nn.Linear, norm: nn.LayerNorm, shift_row: int) -> None:
    """Fold LayerNorm's weight and bias into the shift and scale rows of its modulation (scale follows shift)."""
    d = norm.weight.shape[0]
    shift, scale = slice(shift_row * d, (shift_row + 1) * d), slice((shift_row + 1) * d, (shift_row + 2) * d)
    weight, bias = modulation.weight, modulation.bias
    w, b = norm.weight.to(weight), norm.bias.to(weight)
    weight[shift] += b[:, None] * weight[scale]
    bias[shift] += b * (1 + bias[scale])
    weight[scale] *= w[:, None]
    bias[scale] = w * (1 + bias[scale]) - 1


@torch.no_grad()
def merge(model: DiT, dtype: torch.dtype = torch.float32) -> DiT:
    """A plain :class:`DiT` in ``dtype`` (float32 or float64), on the model's device, that computes what ``model`` does.

    Frozen weights held in bfloat16 come out as those bfloat16 values: to merge without that rounding, load the base with
    ``compute_dtype=None``.

    Raises:
        DiffFitError: the model's modules have been made into something else, or are without values.
    """
    model.as_built.check_whole("the model cannot be merged")
    device = model.pos_embed.device
    with torch.device("meta"):
        dit = DiT(**model.config, objective=model.objective)
    dit = dit.to(dtype).to_empty(device=device)
    own = {name: p for name, p in model.state_dict().items() if not is_extra(name)}
    dit.load_state_dict(own)
    for merged, block in zip(dit.blocks, model.blocks, strict=True):
        _scale_rows(merged.attn.qkv, block.attn.gamma1)
        _scale_rows(merged.attn.proj, block.attn.gamma2, block.gamma1)
        _scale_rows(merged.mlp.fc2, block.gamma2)
        if model.difffit.affine_norm:
            _fold_norm(merged.adaLN_modulation[1], block.norm1, 0)
            _fold_norm(merged.adaLN_modulation[1], block.norm2, 3)
    if model.difffit.affine_norm:
        _fold_norm(dit.final_layer.adaLN_modulation[1], model.final_layer.norm_final, 0)
    dit.pos_embed_scale = model.pos_embed_scale
    return dit.train(model.training)
