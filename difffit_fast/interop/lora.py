"""A delta of :func:`difffit_fast.apply_difffit` in the files of LoRA: what ComfyUI and LyCORIS read.

What is written is the difference between the merged model and its base, module by module:

| what trained | layout "comfyui" | layout "lycoris" |
|---|---|---|
| γ of a linear or convolution | ``dora_scale`` and a low-rank part of zeros | ``diff`` where its bias changes too |
| bias | ``diff_b`` | ``diff_b`` beside a ``diff`` |
| norm | ``w_norm``, ``b_norm``; a bias alone ``diff_b`` | ``w_norm``, ``b_norm``; LayerNorm only |
| modulation that an added LayerNorm folds into | ``diff``, ``diff_b`` | the same |
| class table, tables of a modulation | ``diff`` | refused |
| bias of a module that has none | refused | refused |

γ scales the rows of W, and DoRA's scale is the length that a row is to have: ``dora_scale`` = γ·(‖row‖ + ε), with the ε that the
loaders add to the length. They scale the weight alone, so ``diff_b`` = γ·b_new − b. LyCORIS takes either a low-rank part or a
bias of a module, and no bias without a ``diff``: a ``diff`` of zeros has one element there, which is spread over the weight.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._files import check_target, write_safetensors
from .._words import first_few
from ..apply import apply_difffit
from ..apply.delta import read_applied
from ..apply.merging import held_modules
from ..apply.modules import class_of
from ..errors import DiffFitError
from ..models.merge import fold_norm, scale_rows

LAYOUTS = {"comfyui": "transformer", "lycoris": "lycoris"}
EPS = torch.finfo(torch.float32).eps
# Classes whose modules ComfyUI knows by their names in diffusers, behind "transformer."; other names are its own.
_NAMED = (
    "SD3Transformer2DModel", "FluxTransformer2DModel", "Flux2Transformer2DModel", "QwenImageTransformer2DModel",
    "PixArtTransformer2DModel", "AuraFlowTransformer2DModel",
)  # fmt: skip
# What ComfyUI holds joined or in another order. It finds a weight's part by these names, and no bias's.
_PARTS = r"(.*\.)?(to_[qkv]|add_[qkv]_proj|proj_mlp|norm_out\.linear)\.diff_b"
_JOINED = ("SD3Transformer2DModel", "FluxTransformer2DModel")
_LINEARS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass
class Change:
    """What a delta makes of one module.

    Attributes:
        after: the merged parameters by name, float64.
        gamma: the γ that is all that changes its weight, (N,); None where there is none or the weight changes otherwise.
    """

    path: str
    module: nn.Module
    before: dict[str, Tensor | None]
    after: dict[str, Tensor]
    gamma: Tensor | None


def export_lora(
    model: nn.Module,
    delta: str | os.PathLike[str],
    file: str | os.PathLike[str],
    *,
    layout: str = "comfyui",
    prefix: str | None = None,
    overwrite: bool = False,
) -> dict[str, Tensor]:
    """Write a delta that ``apply_difffit(model, ...).save_delta`` made as a .safetensors file in the format of LoRA, float32.

    Args:
        model: the base, as it came from diffusers; it is left as it was.
        delta: of any of its configurations.
        file: to be made, ``.safetensors``.
        layout: "comfyui" or "lycoris", see above. Modules have their names in diffusers, after the prefix; in "lycoris" with
            "_" for ".".
        prefix: None: "transformer" for "comfyui", "lycoris" for "lycoris".
        overwrite: replace a file that is there.

    Returns:
        What was written, by key.

    Warns:
        UserWarning: under the names of diffusers ComfyUI passes over keys of the file; each is named there, too, by its log.

    Raises:
        DeltaMismatchError: the delta is of another class or another base.
        DiffFitError: the file exists, or something in the delta has no place in the format.

    Source: DoRA, Liu et al., ICML 2024 (arXiv 2402.09353); the keys: docs/model-files.md.
    """
    if layout not in LAYOUTS:
        raise DiffFitError(f"expected a layout of {', '.join(LAYOUTS)}; got {layout}")
    file = Path(file)
    if file.suffix != ".safetensors":
        raise DiffFitError(f"expected a file that ends in .safetensors; got {file}")
    if file.exists() and not overwrite:
        raise DiffFitError(f"{file} exists")
    check_target(file, "file")
    prefix = LAYOUTS[layout] if prefix is None else prefix
    tensors: dict[str, Tensor] = {}
    with_delta = _with_delta(model, delta)
    try:
        for change in _changes(with_delta):
            name = ".".join(filter(None, (prefix, change.path)))
            name = name.replace(".", "_") if layout == "lycoris" else name
            for key, value in _written(change, layout).items():
                tensors[f"{name}.{key}"] = value.to("cpu", torch.float32).contiguous()
    finally:
        with_delta.unload()
    if not tensors:
        raise DiffFitError(f"{delta} changes nothing in its base: there is nothing to write")
    if layout == "comfyui" and prefix == LAYOUTS[layout]:
        _warn_unread({cls.__name__ for cls in type(model).__mro__}, tensors)
    write_safetensors(file, tensors, {"format": "pt", "modelspec.title": file.stem, "difffit.layout": layout})
    return tensors


def _warn_unread(classes: set[str], tensors: dict[str, Tensor]) -> None:
    """Say which keys ComfyUI does not find: nothing is lost without a word."""
    if not classes & set(_NAMED):
        lost, why = list(tensors), "knows this class under names of its own only, or not at all"
    else:
        lost = [key for key in tensors if key.endswith("_table.diff")]
        lost += [key for key in tensors if classes & set(_JOINED) and re.fullmatch(_PARTS, key)]
        why = "joins or reorders these parameters, or has them under names of its own"
    if lost:
        warnings.warn(
            f"ComfyUI passes over {len(lost)} of {len(tensors)} keys ({first_few(lost)}): it {why}; a merged model "
            "has all of them",
            stacklevel=3,
        )


def _with_delta(model: nn.Module, delta: str | os.PathLike[str]) -> Any:
    """``model`` with DiffFit applied as the delta says, and the delta in it; taken out again if it does not fit."""
    _, header = read_applied(delta)
    ready = apply_difffit(model, header["difffit"], add_bias=header["add_bias"], branch_ends=header.get("branch_ends"))
    try:
        ready.load_delta(delta)
    except BaseException:
        ready.unload()
        raise
    return ready


@torch.no_grad()
def _changes(model: Any) -> Iterator[Change]:
    """The modules that merging would change, each with its values before and after, before anything is rounded."""
    modules = dict(model.named_modules())
    folded: dict[str, tuple[Tensor, Tensor]] = {}
    for fold in model._difffit_applied.folds:
        norm, linear = modules[fold.norm]._parameters, modules[fold.linear]._parameters
        if fold.linear not in folded:
            folded[fold.linear] = linear["weight"].detach().double(), linear["bias"].detach().double()
        if _is_identity(norm["weight"], norm["bias"]):
            continue
        values = tuple(t.clone() for t in folded[fold.linear])
        for shift, scale in fold.pairs:
            fold_norm(*values, norm["weight"], norm["bias"], shift, scale)
        folded[fold.linear] = values
    away = {fold.norm for fold in model._difffit_applied.folds}
    for path, module, held in held_modules(model):
        if path in away:
            continue
        parameters = module._parameters
        gamma = parameters.get("gamma")
        before = {n: held.base.get(n, p) for n, p in parameters.items() if n != "gamma"}
        after = {n: p.detach().double() for n, p in parameters.items() if p is not None and n != "gamma"}
        moved = path in folded and not torch.equal(folded[path][0], after["weight"])
        if path in folded:
            after["weight"], after["bias"] = folded[path]
        if gamma is not None and not bool((gamma == 1).all()):
            after = {n: t.clone() for n, t in after.items()}
            scale_rows(after["weight"], after.get("bias"), gamma.detach().double())
        else:
            gamma = None
        yield Change(path, module, before, after, None if gamma is None or moved else gamma.detach().double())


def _is_identity(weight: Tensor, bias: Tensor | None) -> bool:
    return bool((weight == 1).all()) and (bias is None or not bool(bias.any()))


def _written(change: Change, layout: str) -> dict[str, Tensor]:
    """The keys behind the name of a module, and their values."""
    moved = {}
    for name, after in change.after.items():
        before = change.before.get(name)
        difference = after if before is None else after - before.detach().double()
        if not bool(difference.any()):
            continue
        if before is None:
            raise DiffFitError(
                f"{change.path}.{name} was added to the model (add_bias=True): the format of LoRA has no place for a bias where "
                "the model has none; merge the delta, or train with a configuration without biases"
            )
        moved[name] = difference
    if not moved:
        return {}
    kind = class_of(change.module)
    linear, norm = issubclass(kind, _LINEARS), "norm" in kind.__name__.lower()
    odd = [name for name in moved if name not in ("weight", "bias")]
    if layout == "lycoris" and (odd or not (linear or issubclass(kind, (nn.LayerNorm, nn.GroupNorm)))):
        name = odd[0] if odd else next(iter(moved))
        where = f"{change.path}.{name}" if change.path else name
        raise DiffFitError(
            f"LyCORIS changes linears, convolutions, LayerNorm and GroupNorm, and no {kind.__name__}: {where} has no place in "
            'its layout; layout="comfyui" has one'
        )
    keys = {f"{name}.diff": moved.pop(name) for name in odd}
    weight, bias = moved.pop("weight", None), moved.pop("bias", None)
    if layout == "lycoris":
        return keys | _lycoris(change, weight, bias, linear)
    if norm and weight is not None and not linear:
        keys["w_norm"] = weight
        if bias is not None:
            keys["b_norm"] = bias
        return keys
    if weight is not None:
        keys |= _dora(change) if change.gamma is not None else {"diff": weight}
    if bias is not None:
        keys["diff_b"] = bias
    return keys


def _lycoris(change: Change, weight: Tensor | None, bias: Tensor | None, linear: bool) -> dict[str, Tensor]:
    """The same where a module is one thing: low-rank, a difference, or a norm, told by its weight's key."""
    if not linear:
        own = change.after["weight"]
        return {"w_norm": torch.zeros_like(own) if weight is None else weight} | (
            {} if bias is None else {"b_norm": bias}
        )
    if bias is None and change.gamma is not None:
        return _dora(change)
    zero = torch.zeros([1] * change.after["weight"].dim(), dtype=torch.float64)
    return {"diff": zero if weight is None else weight} | ({} if bias is None else {"diff_b": bias})


def _dora(change: Change) -> dict[str, Tensor]:
    """γ as the length of each row, (N, 1, ...), with a low-rank part of zeros."""
    weight, gamma = change.before["weight"], change.gamma
    assert weight is not None and gamma is not None
    ones = [1] * (weight.dim() - 1)
    length = weight.detach().double().flatten(1).norm(dim=1)
    return {
        "dora_scale": (gamma * (length + EPS)).view(-1, *ones),
        "lora_up.weight": torch.zeros(weight.shape[0], 1, *ones[1:]),
        "lora_down.weight": torch.zeros(1, *weight.shape[1:]),
        "alpha": torch.ones(()),
    }
