"""DiffFit in plain PyTorch: a DiT whose modules carry γ and affine LayerNorm, frozen weights, autograd, no kernels.

Written as one would write it on top of a DiT: γ multiplied where the method says, biases trained, the rest frozen. It is
what :class:`~.fast_dit.FastDiffFitDiT` is compared with, and what that one falls back to where its modules have been changed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .as_built import AsBuilt
from .difffit import DELTAS, DiffFitConfig, is_extra, neutral
from .dit import LN_EPS, Attention, DiT, DiTBlock, modulate


def _scaled(x: Tensor, gamma: Tensor | None) -> Tensor:
    return x if gamma is None else x * gamma


class AffineNorm(nn.LayerNorm):
    """LayerNorm with weight and bias, in the dtype of x (..., D): a float32 stream stays so in a model held in half precision."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size, eps=LN_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class DiffFitAttention(Attention):
    """Attention whose projections may carry γ: ``gamma1`` (3D,) on qkv, ``gamma2`` (D,) on proj; tokens (N, T, D)."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__(hidden_size, num_heads)
        self.register_parameter("gamma1", None)
        self.register_parameter("gamma2", None)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        qkv = _scaled(self.qkv(x), self.gamma1).view(n, t, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (N, heads, T, head_dim)
        o = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, d)
        return _scaled(self.proj(o), self.gamma2)


class DiffFitBlock(DiTBlock):
    """A DiT block whose branches may carry γ (D,): ``gamma1`` on the attention, ``gamma2`` on the MLP."""

    attention_type = DiffFitAttention

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__(hidden_size, num_heads, mlp_ratio)
        self.register_parameter("gamma1", None)
        self.register_parameter("gamma2", None)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        branch = self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        x = x + gate_msa[:, None] * _scaled(branch, self.gamma1)
        branch = self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))
        return x + gate_mlp[:, None] * _scaled(branch, self.gamma2)


class PlainDiffFitDiT(DiT):
    """DiT with DiffFit's parameters in ordinary modules; ``difffit`` as FastDiffFitDiT's, further arguments as DiT's.

    A state dict that has all of a DiT's own tensors is a whole model: what it lacks of γ and LayerNorm is at the identity,
    and is set to it, also where the parameters had no values yet (on the device "meta").
    """

    block_type = DiffFitBlock

    def __init__(self, *args: Any, difffit: str | DiffFitConfig = "paper", **kwargs: Any) -> None:
        config = DiffFitConfig.resolve(difffit)
        super().__init__(*args, **kwargs)
        self.difffit = config
        d = self.hidden_size
        for i, block in enumerate(self.blocks):
            sites = config.gamma if config.block_has_gamma(i, self.depth) else ()
            for site, owner, key, size in (
                ("qkv", block.attn, "gamma1", 3 * d),
                ("proj", block.attn, "gamma2", d),
                ("attn", block, "gamma1", d),
                ("mlp", block, "gamma2", d),
            ):
                if site in sites:
                    setattr(owner, key, nn.Parameter(torch.ones(size)))
        if config.affine_norm:
            for block in self.blocks:
                block.norm1, block.norm2 = AffineNorm(d), AffineNorm(d)
            self.final_layer.norm_final = AffineNorm(d)
        for name, p in self.named_parameters():
            p.requires_grad_(config.trains(name))
        self.as_built = AsBuilt(self, config)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Here, and not in load_state_dict, which is not called where this model is a part of another module (DDP, say).
        own = {name: p for name, p in self.named_parameters() if not name.startswith(DELTAS)}
        if all(prefix + name in state_dict for name in own if not is_extra(name)):
            device = state_dict[prefix + "pos_embed"].device
            for name, p in own.items():
                if prefix + name not in state_dict:
                    state_dict[prefix + name] = torch.full(p.shape, neutral(name), dtype=p.dtype, device=device)
        super()._load_from_state_dict(state_dict, prefix, *args)
