"""A DiT of which a baseline trains a part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..models.dit import DiT


class BaselineDiT(DiT):
    """A :class:`~difffit_fast.models.dit.DiT` that knows which of its parameters are trained.

    Attributes:
        method: name of the baseline.
        method_options: its options, as JSON can hold them.
    """

    method: str
    method_options: dict[str, Any]

    @classmethod
    def adopt(cls, dit: DiT, method: str, options: dict[str, Any]) -> BaselineDiT:
        """Take over the modules of ``dit``, without copying a tensor; ``dit`` is not to be used afterwards."""
        with torch.device("meta"):
            model = cls(**dit.config)
        for name, child in dit.named_children():
            setattr(model, name, child)
        model.pos_embed = dit.pos_embed
        model.train(dit.training)
        model.method, model.method_options = method, dict(options)
        model.pos_embed_scale, model.classes, model.objective = dit.pos_embed_scale, dit.classes, dit.objective
        return model

    def train_only(self, trains: Callable[[str], bool]) -> BaselineDiT:
        """Let exactly the parameters whose name ``trains`` accepts require gradients."""
        for name, p in self.named_parameters():
            p.requires_grad_(trains(name))
        self.keep_trainables_wide()
        return self

    @torch.no_grad()
    def keep_trainables_wide(self) -> None:
        """Trainables in at least float32, whatever the frozen weights are kept in: updates are too small for 16 bits."""
        for p in self.trainable_parameters():
            if p.dtype in (torch.bfloat16, torch.float16):
                p.data = p.data.float()


def new_like(parameter: nn.Parameter, *shape: int) -> nn.Parameter:
    """An uninitialised trainable of ``shape`` on the device of ``parameter``, in float32 or wider."""
    dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    return nn.Parameter(torch.empty(*shape, device=parameter.device, dtype=dtype))


def is_class_embedding(name: str) -> bool:
    """Every method trains the class table, null class included: the target's classes are new."""
    return name.startswith("y_embedder.")
