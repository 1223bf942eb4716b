"""``apply_difffit``: DiffFit in a transformer of diffusers, in place, with the methods that a FastDiffFitDiT has."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .._words import first_few
from ..errors import DiffFitError
from ..models.difffit import DiffFitConfig
from ..models.dit import DiT
from .delta import base_hash, delta_header, put_delta, write_delta
from .merging import held_modules, merge_modules, put_back
from .modules import GeluReading, Held, Reading, adapted
from .plan import BASE, Fold, Plan, Site, class_for, first_values, is_gelu, is_linear, make_plan

_WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "OptimizedModule", "PeftModel")


@dataclass
class Applied:
    """What an applied model remembers: what was asked for, and how it was."""

    difffit: DiffFitConfig
    add_bias: bool
    branch_ends: list[str] | None
    folds: list[Fold]
    frozen_before: frozenset[str]  # parameters that did not require gradients when the model came in
    hashed: tuple[Any, str] | None = field(default=None)


class DiffFitModel(Reading):
    """What :func:`apply_difffit` adds to the class of a model."""

    _difffit_applied: Applied

    # -- what trains ---------------------------------------------------------------------------------------------------
    def named_trainable_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters that optimizer, EMA and file hold, each parameter once."""
        seen = set()
        for path, module, held in held_modules(self):  # type: ignore[arg-type]
            for name in held.dtypes:
                p = module._parameters[name]  # type: ignore[attr-defined]
                if id(p) not in seen:
                    seen.add(id(p))
                    yield f"{path}.{name}" if path else name, p

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """Exactly what optimizer and EMA should hold."""
        return (p for _, p in self.named_trainable_parameters())

    @property
    def num_trainable(self) -> int:
        """Number of trainable parameters."""
        return sum(p.numel() for p in self.trainable_parameters())

    @property
    def difffit(self) -> DiffFitConfig:
        """What trains, as the configuration that was given."""
        return self._difffit_applied.difffit

    # -- the delta -----------------------------------------------------------------------------------------------------
    def _difffit_header(self) -> dict[str, Any]:
        applied, own = self._difffit_applied, dict(self.named_trainable_parameters())
        mine = {id(p) for p in own.values()}
        key = tuple((p.data_ptr(), p._version) for p in self.parameters() if id(p) not in mine)  # type: ignore[attr-defined]
        if applied.hashed is None or applied.hashed[0] != key:
            applied.hashed = key, base_hash(self, own)  # type: ignore[arg-type]
        return delta_header(
            type(self).__name__, applied.difffit, applied.add_bias, applied.branch_ends, applied.hashed[1]
        )

    def save_delta(
        self, path: str | os.PathLike[str], *, tensors: Mapping[str, Tensor] | None = None, **metadata: Any
    ) -> None:
        """Write the trainables and what they belong to; the same model gives the same bytes.

        Args:
            tensors: values to write in place of the model's own, by parameter name (an EMA, say).
            metadata: anything JSON can hold (step, the name of the base, ...).

        Raises:
            DiffFitError: ``tensors`` does not name exactly the trainable parameters, or the folder is missing.
        """
        write_delta(path, dict(self.named_trainable_parameters()), tensors, {**self._difffit_header(), **metadata})

    def load_delta(self, path: str | os.PathLike[str]) -> dict[str, Any]:
        """Load what :meth:`save_delta` wrote and return its metadata. Nothing is changed when it does not belong.

        Raises:
            DeltaMismatchError: it was made for another class, configuration or base; the message names both sides.
            DiffFitError: no such file, or not finite.
        """
        return put_delta(path, dict(self.named_trainable_parameters()), self._difffit_header())

    # -- the way back --------------------------------------------------------------------------------------------------
    def merge_(self) -> nn.Module:
        """Fold the trainables into the ordinary parameters, in place: the model, of its own class again, computes the same.

        γ goes into the rows of the linear that it scales, added LayerNorms into their modulation, exactly but for one
        rounding to the dtype that the model is held in. Biases that ``add_bias`` added stay: a warning says so, since
        no stock file of the class can hold them.
        """
        added = merge_modules(self, self._difffit_applied.folds)  # type: ignore[arg-type]
        _finish(self)
        if added:
            warnings.warn(
                f"{len(added)} linears of the merged {type(self).__name__} have biases that the class does not make "
                f"({first_few(added)}): it runs, and torch.save keeps it whole, but from_pretrained cannot load its weights",
                stacklevel=2,
            )
        return self  # type: ignore[return-value]

    def unload(self) -> nn.Module:
        """Take DiffFit out again: the very model that came in, bit for bit, with its classes and its requires_grad."""
        for _, module, held in list(held_modules(self)):  # type: ignore[arg-type]
            put_back(module, held)  # type: ignore[arg-type]
        _finish(self)
        return self  # type: ignore[return-value]


def _finish(model: Any) -> None:
    applied = model.__dict__.pop("_difffit_applied")
    for name, p in model.named_parameters(remove_duplicate=False):
        p.requires_grad_(name not in applied.frozen_before and p.is_floating_point())


class DiffusersModel(DiffFitModel):
    """The same for a model of diffusers, whose own methods must not act on half of it."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the model computes in, as before; not that of the trainables, which are kept in float32."""
        read = {id(m._parameters[n]): dtype for _, m, held in held_modules(self) for n, dtype in held.dtypes.items()}  # type: ignore
        keep = getattr(self, "_keep_in_fp32_modules", None) or ()
        for name, p in self.named_parameters():  # type: ignore[attr-defined]
            if p.is_floating_point() and not any(part in name for part in keep):
                return read.get(id(p), p.dtype)
        return super().dtype  # type: ignore[misc]

    def save_pretrained(self, *_: Any, **__: Any) -> None:
        """Refused: a stock file of the class has no place for what trains here."""
        raise DiffFitError(
            f"{type(self).__name__} carries DiffFit's trainables, which its stock file has no place for; save_delta() keeps "
            "them, and merge_() makes an ordinary model that save_pretrained() can write"
        )

    def fuse_qkv_projections(self, *_: Any, **__: Any) -> None:
        """Refused: fused projections would not see what trains in the ones that they were made of."""
        raise DiffFitError(
            "fuse_qkv_projections() makes new linears that would not see DiffFit's trainables; call merge_() or unload() first"
        )


# -- applying ----------------------------------------------------------------------------------------------------------
def apply_difffit(
    model: nn.Module,
    config: str | DiffFitConfig | dict[str, Any] = "paper",
    *,
    add_bias: bool = False,
    branch_ends: Sequence[str] | None = None,
) -> Any:
    """Make a diffusion transformer of diffusers ready for DiffFit, in place.

    Everything is frozen; biases, the tables and biases of modulations, norms, the class embedding and a γ behind every branch
    train, as ``config`` says. The model computes what it did before, bit for bit in float32. Linears compute the gradients
    of their input and bias and no other. Trainables are kept in float32, whatever dtype the model was loaded in, and are read
    in that dtype; moving or casting the model later leaves them in float32.

    Args:
        model: any transformer of diffusers, on any device, in float32, bfloat16, float16 or float64, not yet wrapped by
            DDP, compile or PEFT. What is done with each class: :mod:`difffit_fast.apply.families`.
        config: a preset ("paper", "minimax", "block", "bitfit"), a :class:`DiffFitConfig` or its dictionary. Its γ on proj
            and on the attention branch, which multiply the same tensor, are one here; norms that have a weight train it
            unless the configuration has no scales at all ("bitfit").
        add_bias: give every linear without a bias a zero one, for models that have none (FLUX.2, AuraFlow).
        branch_ends: the modules behind which γ is to be, by name or end of path ("attn.wo"), for classes that
            are not known and whose names do not tell.

    Returns:
        ``model``, whose class is now a subclass of its own with :class:`DiffFitModel`'s ``trainable_parameters()``,
        ``num_trainable``, ``save_delta``, ``load_delta``, ``merge_`` and ``unload``.

    Raises:
        DiffFitError: the model is wrapped, carries adapters, fused projections or hooks, has no biases to train, or DiffFit
            was applied before; nothing has been changed then.

    Source: Xie et al., ICCV 2023 (arXiv 2304.06648), figure 4.
    """
    config = DiffFitConfig.resolve(config)
    _check_model(model)
    plan = make_plan(model, config, add_bias=add_bias, branch_ends=branch_ends)
    _check_hooks(model)
    frozen = frozenset(n for n, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad)
    model.requires_grad_(False)
    _insert(model, plan)
    ends = None if branch_ends is None else list(branch_ends)
    model._difffit_applied = Applied(config, add_bias, ends, plan.folds, frozen)
    if plan.quantised:
        warnings.warn(
            f"{len(plan.quantised)} quantised linears ({first_few(plan.quantised)}) keep their own forward: a bias trains, "
            "and they get no γ, which could not be folded into them",
            stacklevel=2,
        )
    return model


def _check_model(model: Any) -> None:
    """Raise for what cannot be taken over."""
    kind = type(model).__name__
    if not isinstance(model, nn.Module):
        raise DiffFitError(f"apply_difffit takes a model, such as the transformer of a pipeline; got {kind}")
    if kind in _WRAPPERS:
        raise DiffFitError(f"apply_difffit takes the model itself, before it is wrapped; got {kind}")
    if isinstance(model, DiT):
        raise DiffFitError(f"apply_difffit is for models of diffusers; for a {kind} use FastDiffFitDiT.from_dit")
    for path, module in model.named_modules():
        if isinstance(module, Reading):
            raise DiffFitError(f"DiffFit was applied to this {kind} before; call its unload() or merge_() first")
        if hasattr(module, "adapter_layer_names"):
            raise DiffFitError(f"{path} carries a PEFT adapter; merge or unload it before DiffFit is applied")
        if getattr(module, "fused_projections", False) is True:
            raise DiffFitError(
                f"the projections of {path} are fused (fuse_qkv_projections), beside the ones that they were made of; call "
                "unfuse_qkv_projections() before DiffFit is applied"
            )
    if name := next((n for n, p in model.named_parameters() if p.is_floating_point() and p.element_size() < 2), None):
        raise DiffFitError(
            f"{name} is held in {str(next(p for n, p in model.named_parameters() if n == name).dtype)[6:]}; apply DiffFit "
            "before layerwise casting is enabled, to a model of 16 bits or more"
        )


def _check_hooks(model: nn.Module) -> None:
    """Raise where a tool has put a forward of its own on a linear, which would go on calling the old one."""
    for path, module in model.named_modules():
        if is_linear(module) and "forward" in module.__dict__:
            raise DiffFitError(
                f"{path} has hooks that call its forward of before (offloading, a device map, layerwise casting); apply "
                "DiffFit first, then these"
            )


def _insert(model: nn.Module, plan: Plan) -> None:
    """Put the trainables of ``plan`` where they belong, and swap the classes of the modules."""
    made: dict[tuple[str, str] | int, nn.Parameter] = {}  # by place, and by what they begin as: shared stays shared
    for path, module in list(model.named_modules()):
        site = plan.sites.get(path) or Site(path, module)
        if not (site.values or is_linear(module) or is_gelu(module) or module is model):
            continue
        held = Held(type(module))
        for name, begin in site.values.items():
            if name in module._parameters:
                held.base[name] = module._parameters[name]
            like = plan.like(model, site, name)
            keys = [plan.ties.get((path, name), (path, name)), *([id(like)] if begin == BASE else [])]
            p = next((made[key] for key in keys if key in made), None)
            if p is None:
                p = first_values(site, name, like)
                made |= dict.fromkeys(keys, p)
            module._parameters[name] = p
            held.dtypes[name] = like.dtype
        how = GeluReading if is_gelu(module) else Reading
        if module is model:
            how = DiffusersModel if hasattr(type(module), "save_pretrained") else DiffFitModel
        cls = class_for(module, "gamma" in site.values)
        module.__dict__["_difffit"] = held
        module.__class__ = adapted(cls, how, tuple(sorted(site.values)))
