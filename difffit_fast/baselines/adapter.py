"""AdaptFormer: a small bottleneck beside (or behind) every MLP (Chen et al., NeurIPS 2022, equations 2 and 3).

    parallel:    mlp(h) + scale · up(relu(down(h)))
    sequential:  f + scale · up(relu(down(f))),  f = mlp(h)

h (N, T, D) is the modulated LayerNorm that the MLP reads, so the branch's gate acts on the adapter as well. ``up`` starts
at zero: the model starts as the pre-trained one. 2·b·D + b + D parameters per block, b the bottleneck.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import DiffFitError
from ..models.dit import DiT, Mlp
from .base import BaselineDiT, is_class_embedding, new_like

MODES = ("parallel", "sequential")


class Adapter(nn.Module):
    """scale · up(relu(down(x))), x (N, T, D) of any float dtype -> the same."""

    def __init__(self, like: nn.Parameter, width: int, bottleneck: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.down, self.up = _linear(like, width, bottleneck), _linear(like, bottleneck, width)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for tensor in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(tensor)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(F.linear(x, self.down.weight.to(x.dtype), self.down.bias.to(x.dtype)))
        return self.scale * F.linear(hidden, self.up.weight.to(hidden.dtype), self.up.bias.to(hidden.dtype))


class AdaptedMlp(nn.Module):
    """A frozen MLP, under its own keys ``fc1`` and ``fc2``, with an ``adapter``."""

    def __init__(self, mlp: Mlp, bottleneck: int, scale: float, mode: str) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = mlp.fc1, mlp.act, mlp.fc2
        self.mode = mode
        self.adapter = Adapter(mlp.fc1.weight, mlp.fc1.in_features, bottleneck, scale)

    def forward(self, x: Tensor) -> Tensor:
        f = self.fc2(self.act(self.fc1(x)))
        return f + self.adapter(x if self.mode == "parallel" else f).to(f.dtype)


def add_adapters(dit: DiT, *, bottleneck: int = 64, scale: float = 0.1, mode: str = "parallel") -> BaselineDiT:
    """Adapters in every block, trained with the class embedding.

    Args:
        bottleneck: width of the adapter; the paper's 64.
        scale: constant factor of its output; AdaptFormer's 0.1.
        mode: "parallel" or "sequential".
    """
    if mode not in MODES:
        raise DiffFitError(f"mode must be one of {', '.join(MODES)}; got {mode!r}")
    if isinstance(bottleneck, bool) or not isinstance(bottleneck, int) or bottleneck < 1:
        raise DiffFitError(f"bottleneck must be a whole number of at least 1; got {bottleneck!r}")
    model = BaselineDiT.adopt(dit, "adapter", {"bottleneck": bottleneck, "scale": scale, "mode": mode})
    for block in model.blocks:
        block.mlp = AdaptedMlp(block.mlp, bottleneck, scale, mode)
    return model.train_only(lambda name: ".adapter." in name or is_class_embedding(name))


def _linear(like: nn.Parameter, width_in: int, width_out: int) -> nn.Linear:
    """An uninitialised linear map with float32 parameters on the device of ``like``."""
    with torch.device("meta"):
        linear = nn.Linear(width_in, width_out)
    linear.weight, linear.bias = new_like(like, width_out, width_in), new_like(like, width_out)
    return linear
