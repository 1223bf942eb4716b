"""LoRA through PEFT: W + (alpha / rank)·B·A, A and B trained (Hu et al., ICLR 2022).

The paper's LoRA rows adapt the fused qkv projections only and train no bias: 4·D·rank parameters per block. That is a weak
LoRA; ``targets="all"`` adapts every linear map of the blocks and the final layer, and ``bias=True`` trains their biases too.
"""

from __future__ import annotations

from torch import nn

from .._extras import require
from ..errors import DiffFitError
from ..models.dit import DiT
from .base import BaselineDiT, is_class_embedding

TARGETS = ("qkv", "all")


def add_lora(
    dit: DiT, *, rank: int = 8, alpha: float | None = None, targets: str = "qkv", bias: bool = False
) -> BaselineDiT:
    """Low-rank updates, trained with the class embedding.

    Args:
        rank: width of the update; the paper has 8 and 16.
        alpha: numerator of its factor alpha / rank; ``rank`` if None, a factor of one.
        targets: "qkv", or "all" linear maps of the blocks and the final layer.
        bias: train the biases of blocks, patch embedding and final layer as well.

    Raises:
        DiffFitError: PEFT is not installed, or an option makes no sense.
    """
    if targets not in TARGETS:
        raise DiffFitError(f"targets must be one of {', '.join(TARGETS)}; got {targets!r}")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise DiffFitError(f"rank must be a whole number of at least 1; got {rank!r}")
    peft = require("peft", "peft", "LoRA")
    alpha = rank if alpha is None else alpha
    options = {"rank": rank, "alpha": alpha, "targets": targets, "bias": bias}
    model = BaselineDiT.adopt(dit, "lora", options)
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and name.startswith(("blocks.", "final_layer."))
        and (targets == "all" or name.endswith(".qkv"))
    ]
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=names, lora_dropout=0.0, bias="none")
    peft.inject_adapter_in_model(config, model)
    return model.train_only(lambda name: ".lora_" in name or is_class_embedding(name) or (bias and _bias(name)))


def _bias(name: str) -> bool:
    return name.endswith(".bias") and not name.startswith("t_embedder.")
