"""DiffFit in plain PyTorch: frozen weights, autograd, no kernels. What FastDiffFitDiT is compared with.

The same parameters, names and function as :class:`~difffit_fast.models.fast_dit.FastDiffFitDiT`, written as one would
write it on top of a DiT: affine LayerNorm, γ multiplied where the method says, biases trained, the rest frozen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..models.difffit import DiffFitConfig
from ..models.dit import LN_EPS, DiT, modulate


def _scaled(x: Tensor, gamma: Tensor | None) -> Tensor:
    return x if gamma is None else x * gamma


class PlainDiffFitDiT(DiT):
    """DiT with DiffFit's parameters in ordinary modules; arguments as FastDiffFitDiT's ``difffit``."""

    def __init__(self, *args: Any, difffit: str | DiffFitConfig = "paper", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.difffit = config = DiffFitConfig.resolve(difffit)
        d = self.hidden_size
        for i, block in enumerate(self.blocks):
            sites = config.gamma if config.block_has_gamma(i, self.depth) else ()
            block.attn.gamma1 = nn.Parameter(torch.ones(3 * d)) if "qkv" in sites else None
            block.attn.gamma2 = nn.Parameter(torch.ones(d)) if "proj" in sites else None
            block.gamma1 = nn.Parameter(torch.ones(d)) if "attn" in sites else None
            block.gamma2 = nn.Parameter(torch.ones(d)) if "mlp" in sites else None
            if config.affine_norm:
                block.norm1, block.norm2 = nn.LayerNorm(d, eps=LN_EPS), nn.LayerNorm(d, eps=LN_EPS)
        if config.affine_norm:
            self.final_layer.norm_final = nn.LayerNorm(d, eps=LN_EPS)
        for name, p in self.named_parameters():
            p.requires_grad_(config.trains(name))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y, self.training)
        for block in self.blocks:
            x = self.call_block(self._block, block, x, c)
        return self.output(self.final_layer(x, c))

    def _block(self, block: nn.Module, x: Tensor, c: Tensor) -> Tensor:
        attn = block.attn
        n, t, d = x.shape
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = block.adaLN_modulation(c).chunk(6, dim=1)
        h = modulate(block.norm1(x), shift_msa, scale_msa)
        qkv = _scaled(attn.qkv(h), attn.gamma1)
        q, k, v = qkv.view(n, t, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
        o = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, d)
        x = x + gate_msa[:, None] * _scaled(_scaled(attn.proj(o), attn.gamma2), block.gamma1)
        h = modulate(block.norm2(x), shift_mlp, scale_mlp)
        return x + gate_mlp[:, None] * _scaled(block.mlp(h), block.gamma2)
