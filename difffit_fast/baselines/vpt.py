"""VPT-deep: learned tokens in front of the image's, new ones in every block (Jia et al., ECCV 2022).

    x = block([prompt_i, x]) without its first P tokens

Prompts (P, D) are drawn as in VPT, uniform with the variance of a Xavier initialisation of the patch embedding. P·D
parameters per block. The paper's table gives 2.81 M for DiT-XL/2, which no whole number of tokens makes; 84 comes nearest.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..errors import DiffFitError
from ..models.dit import DiT, DiTBlock
from .base import BaselineDiT, is_class_embedding, new_like


class PromptedBlock(DiTBlock):
    """A block that sees ``prompt`` (P, D) before its tokens x (N, T, D) and returns (N, T, D)."""

    prompt: nn.Parameter

    @classmethod
    def adopt(cls, block: DiTBlock, prompt: nn.Parameter) -> PromptedBlock:
        model = cls.__new__(cls)
        nn.Module.__init__(model)
        for name, child in block.named_children():
            setattr(model, name, child)
        model.prompt = prompt
        return model.train(block.training)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        prompt = self.prompt.to(x.dtype).expand(x.shape[0], -1, -1)
        return super().forward(torch.cat([prompt, x], dim=1), c)[:, self.prompt.shape[0] :]


def add_prompts(dit: DiT, *, tokens: int = 84) -> BaselineDiT:
    """``tokens`` prompts before every block, trained with the class embedding."""
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise DiffFitError(f"tokens must be a whole number of at least 1; got {tokens!r}")
    model = BaselineDiT.adopt(dit, "vpt", {"tokens": tokens})
    bound = math.sqrt(6 / (3 * dit.patch_size**2 + dit.hidden_size))
    for i, block in enumerate(model.blocks):
        prompt = new_like(block.attn.qkv.weight, tokens, dit.hidden_size)
        nn.init.uniform_(prompt, -bound, bound)
        model.blocks[i] = PromptedBlock.adopt(block, prompt)
    return model.train_only(lambda name: name.endswith(".prompt") or is_class_embedding(name))
