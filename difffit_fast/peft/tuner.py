"""The tuner that PEFT makes of a configuration: it puts adapters into a model, and takes them out again."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, check_target_module_exists
from peft.utils import register_peft_method
from torch import nn

from ..apply.modules import Held, Reading, adapted
from ..apply.plan import Site, class_for, first_values, make_plan
from ..errors import DiffFitError
from ..models.merge import fold_norm
from .config import NAME, DiffFitPeftConfig, peft_type
from .layer import AdapterLinear, AdapterReading, DiffFitLayer, layers_of


class DiffFitTuner(BaseTuner):
    """DiffFit's :class:`~peft.tuners.tuners_utils.BaseTuner`; made by ``get_peft_model``."""

    prefix = f"{NAME}_"
    tuner_layer_cls = DiffFitLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    # -- adapters in ---------------------------------------------------------------------------------------------------
    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT does it, for the modules that the configuration trains something in."""
        config: DiffFitPeftConfig = self.peft_config[adapter_name]
        if any(isinstance(m, Reading) and not isinstance(m, AdapterReading) for m in model.modules()):
            raise DiffFitError(f"apply_difffit was applied to this {type(model).__name__}; call its unload() first")
        plan = make_plan(model, config.resolved, add_bias=config.add_bias, branch_ends=config.branch_ends)
        self._plan, self._wanted = plan, {path: _is_target(config, path) for path in plan.sites}
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            if self._wanted.get(""):  # the model itself, which PEFT passes over
                self._attach(plan.sites[""], adapter_name, config)
        finally:
            del self._plan, self._wanted

    def _prepare_adapter_config(self, peft_config: DiffFitPeftConfig, model_config: dict) -> DiffFitPeftConfig:
        return peft_config

    def _check_target_module_exists(self, peft_config: DiffFitPeftConfig, key: str) -> Any:
        return self._wanted.get(key, False)

    def _create_and_replace(
        self, peft_config: DiffFitPeftConfig, adapter_name: str, target: nn.Module, target_name: str, parent: nn.Module,
        current_key: str, parameter_name: str | None = None,
    ) -> None:  # fmt: skip
        self._attach(self._plan.sites[current_key], adapter_name, peft_config)

    def _attach(self, site: Site, adapter: str, config: DiffFitPeftConfig) -> None:
        module = site.module
        first = self._first_copy(site)
        layer = module.__dict__.get("_difffit_layer")
        if layer is None:
            layer = first.__dict__["_difffit_layer"] if first is not None else DiffFitLayer()
            layer.owners.append(module)
            module.__dict__["_difffit_layer"] = layer
            if first is None:
                module.add_module(NAME, layer)
        likes = {name: self._plan.like(self.model, site, name) for name in site.values}
        _adapt(module, {name: like.dtype for name, like in likes.items()})
        if adapter not in layer.difffit_values:
            values = {name: first_values(site, name, like) for name, like in likes.items()}
            layer.update(adapter, values, self.active_adapters, config.inference_mode)

    def _first_copy(self, site: Site) -> nn.Module | None:
        """The module of the first block that this one is a copy of, in all that trains in it."""
        sources = {self._plan.ties.get((site.path, name), (site.path, name))[0] for name in site.values}
        path = sources.pop() if len(sources) == 1 else site.path
        first = self._plan.sites[path].module
        return first if path != site.path and "_difffit_layer" in first.__dict__ else None

    # -- adapters out --------------------------------------------------------------------------------------------------
    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        layers = list(layers_of(self.model))
        chosen = list(adapter_names or self.active_adapters)
        if merge and len(chosen) > 1:
            raise DiffFitError(f"DiffFit merges one adapter; asked for are {', '.join(chosen)}")
        if merge and safe_merge:
            for layer in layers:  # before anything is changed
                layer.merge(safe_merge=True, adapter_names=chosen)
        for layer in layers:
            if layer.merged:
                layer.unmerge()
        if merge and chosen:
            self._fold_norms(chosen[0])
            for layer in layers:
                layer.merge(adapter_names=chosen)
        for layer in layers:
            for owner in layer.owners:
                _give_back(owner)
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)

    @torch.no_grad()
    def _fold_norms(self, adapter: str) -> None:
        """Fold an adapter's affine LayerNorms into their modulation, so that the stock class remains."""
        config: DiffFitPeftConfig = self.peft_config[adapter]
        plan = make_plan(self.model, config.resolved, add_bias=config.add_bias, branch_ends=config.branch_ends)
        for fold in plan.folds:
            norm, linear = self.model.get_submodule(fold.norm), self.model.get_submodule(fold.linear)
            values, others = _values(norm, adapter), _values(linear, adapter)
            bias = others["bias"] if "bias" in others else linear._parameters["bias"]
            if "weight" not in values or bias is None:
                continue
            weight, biases = linear._parameters["weight"].double(), bias.double()
            for shift, scale in fold.pairs:
                fold_norm(weight, biases, values["weight"], values.get("bias"), shift, scale)
            linear._parameters["weight"].copy_(weight)
            bias.copy_(biases)
            del norm.__dict__["_difffit_layer"].difffit_values[adapter]


def _values(module: nn.Module, adapter: str) -> Any:
    """What an adapter has for a module, by name."""
    layer = module.__dict__.get("_difffit_layer")
    return layer.difffit_values[adapter] if layer is not None and adapter in layer.difffit_values else {}


def _is_target(config: DiffFitPeftConfig, path: str) -> Any:
    """What PEFT says of a module, where no ``target_modules`` means all."""
    if config.target_modules is None:
        config = copy.copy(config)
        config.target_modules = ".*"
    return check_target_module_exists(config, path)


def _adapt(module: nn.Module, reads: dict[str, torch.dtype]) -> None:
    """Let ``module`` read what adapters say of these names, beside those of adapters before."""
    held = module.__dict__.get("_difffit") or Held(type(module))
    held.dtypes |= reads
    cls = class_for(module, "gamma" in held.dtypes)
    how = AdapterReading if cls is held.was else AdapterLinear
    module.__dict__["_difffit"] = held
    module.__class__ = adapted(cls, how, tuple(sorted(held.dtypes)))


def _give_back(module: nn.Module) -> None:
    """The module's class and children as they were; its parameters are what they are."""
    if NAME in module._modules:
        del module._modules[NAME]
    del module.__dict__["_difffit_layer"]
    module.__class__ = module.__dict__.pop("_difffit").was


def register() -> None:
    """Register DiffFit with PEFT, once."""
    if peft_type() not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(name=NAME, config_cls=DiffFitPeftConfig, model_cls=DiffFitTuner)
