"""Merge: fold γ and the affine LayerNorm into weights and biases, exactly, so that an ordinary DiT remains.

γ·(W x + b) = (γW) x + γb; and under the modulation W_scale c + b_scale = scale, LayerNorm's w, b become

    W_scale' = w·W_scale,   b_scale' = w(1 + b_scale) − 1,   W_shift' = W_shift + b·W_scale,   b_shift' = b_shift + b(1 + b_scale)
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .deltas import OWN, Own, wear
from .difffit import DELTAS, is_extra
from .dit import DiT


def scale_rows(weight: Tensor, bias: Tensor | None, gamma: Tensor) -> None:
    """Fold γ (N,) into the linear that it scales, in place: weight (N, ...) and bias (N,)."""
    weight.mul_(gamma.to(weight).view(-1, *[1] * (weight.dim() - 1)))
    if bias is not None:
        bias.mul_(gamma.to(bias))


def fold_norm(
    weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor | None, shift: int | None, scale: int
) -> None:
    """Fold LayerNorm's weight w and bias b, (D,), into the rows of its modulation, in place.

    ``shift`` and ``scale`` are the numbers of the chunks of D rows in weight (k·D, K) and bias (k·D,); without a shift there
    is no ``norm_bias`` either.
    """
    w = norm_weight.to(weight)
    d = w.shape[0]
    rows = slice(scale * d, (scale + 1) * d)
    if shift is not None and norm_bias is not None:
        b, shifts = norm_bias.to(weight), slice(shift * d, (shift + 1) * d)
        weight[shifts] += b[:, None] * weight[rows]
        bias[shifts] += b * (1 + bias[rows])
    weight[rows] *= w[:, None]
    bias[rows] = w * (1 + bias[rows]) - 1


@torch.no_grad()
def merge(
    model: DiT, dtype: torch.dtype = torch.float32, *, delta: str | Own | None = OWN, strength: float = 1.0
) -> DiT:
    """A plain :class:`DiT` in ``dtype`` (float32 or float64), on the model's device, that computes what ``model`` does.

    Args:
        model: a FastDiffFitDiT.
        delta: of those that load_deltas has brought, in place of the model's own parameters; None for the base.
        strength: of the delta or the model's own parameters: 1 as they are, 0 the base; see :mod:`.deltas`.

    Frozen weights held in bfloat16 come out as those bfloat16 values: to merge without that rounding, load the base with
    ``compute_dtype=None``.

    Raises:
        DiffFitError: the model's modules have been made into something else, or are without values; an unknown delta, a
            strength that is not finite, or one other than 1 of what the base cannot be told from any more.
    """
    model.as_built.check_whole("the model cannot be merged")
    device, config = model.pos_embed.device, model.config
    values = {name: p for name, p in model.state_dict().items() if not name.startswith(DELTAS)}
    if delta is not OWN or strength != 1:
        changed, worn = wear(model, delta, strength)
        values |= changed
        config |= worn.sizes(model)
    with torch.device("meta"):
        dit = DiT(**config, objective=model.objective)
    dit = dit.to(dtype).to_empty(device=device)
    dit.load_state_dict({name: p for name, p in values.items() if not is_extra(name)})
    for i, merged in enumerate(dit.blocks):
        for linear, key in (
            (merged.attn.qkv, "attn.gamma1"),
            (merged.attn.proj, "attn.gamma2"),
            (merged.attn.proj, "gamma1"),
            (merged.mlp.fc2, "gamma2"),
        ):
            if (gamma := values.get(f"blocks.{i}.{key}")) is not None:
                scale_rows(linear.weight, linear.bias, gamma)
        if model.difffit.affine_norm:
            _fold(merged.adaLN_modulation[1], values, f"blocks.{i}.norm1", 0)
            _fold(merged.adaLN_modulation[1], values, f"blocks.{i}.norm2", 3)
    if model.difffit.affine_norm:
        _fold(dit.final_layer.adaLN_modulation[1], values, "final_layer.norm_final", 0)
    dit.pos_embed_scale = model.pos_embed_scale
    return dit.train(model.training)


def _fold(modulation: nn.Linear, values: Mapping[str, Tensor], norm: str, shift: int) -> None:
    fold_norm(modulation.weight, modulation.bias, values[norm + ".weight"], values[norm + ".bias"], shift, shift + 1)
