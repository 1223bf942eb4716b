"""From a model with trainables back to an ordinary one: with them folded in (merge), or without them (unload)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..models.merge import fold_norm, scale_rows
from .modules import Held, Reading
from .plan import Fold


def held_modules(model: nn.Module) -> Iterator[tuple[str, Reading, Held]]:
    """The modules in which something trains, or that are frozen in a way of their own, with what is kept beside them."""
    for path, module in model.named_modules():
        if isinstance(module, Reading):
            yield path, module, module._difffit


@torch.no_grad()
def merge_modules(model: nn.Module, folds: list[Fold]) -> list[str]:
    """Fold what is trained into ordinary modules; the paths of linears that keep a bias that they did not have before."""
    modules = dict(model.named_modules())
    for fold in folds:
        norm, linear = modules[fold.norm], modules[fold.linear]
        weight, bias = linear._parameters["weight"].double(), linear._parameters["bias"].double()
        values = norm._parameters["weight"], norm._parameters["bias"]
        for shift, scale in fold.pairs:
            fold_norm(weight, bias, *values, shift, scale)
        linear._parameters["weight"].copy_(weight)
        linear._parameters["bias"].copy_(bias)
        norm._difffit.dtypes.clear()  # put back as it was, below
    added = []
    for path, module, held in list(held_modules(model)):
        fold_gamma(module, module._parameters.pop("gamma", None))
        for name, dtype in held.dtypes.items():
            if name == "gamma":
                continue
            value, before = module._parameters[name].detach().to(dtype), held.base[name]
            if before is None:
                added.append(path)
                held.base[name] = nn.Parameter(value)
            else:
                before.data = value.clone()
        put_back(module, held)
    return added


@torch.no_grad()
def fold_gamma(module: nn.Module, gamma: Tensor | None) -> None:
    """Scale the rows of a linear or a convolution, and its bias, whatever these train in, in place."""
    if gamma is None:
        return
    weight, bias = module._parameters["weight"], module._parameters["bias"]
    rows, values = weight.double(), None if bias is None else bias.double()
    scale_rows(rows, values, gamma)
    weight.copy_(rows)
    if bias is not None:
        bias.copy_(values)


def put_back(module: nn.Module, held: Held) -> None:
    """The module's class and parameters as they were, on the device and in the dtypes that it has now."""
    for name in held.dtypes:
        if name not in held.base:
            module._parameters.pop(name, None)
    for name, before in held.base.items():
        now = module._parameters[name]
        if before is not None and now is not None and name in held.dtypes:
            before.data = before.data.to(now.device, held.dtypes[name])
        module._parameters[name] = before
    del module.__dict__["_difffit"]
    module.__class__ = held.was
