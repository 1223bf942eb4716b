"""What has been done to a model's modules since it was made.

FastDiffFitDiT reads the parameters of its modules and does not call them. That is right as long as the modules are those
that it was made with and nobody listens to them: :meth:`AsBuilt.change` looks, at every forward. What has been done may be
meant to be seen at once (a hook), may be the work of any tool (PEFT, quantisation, offloading, sharding, parametrisation),
and is not told to anyone.
"""

from __future__ import annotations

import operator
from itertools import chain, compress, repeat
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.module import _has_any_global_hook

from ..errors import DiffFitError
from ..ops._register import frozen_weight_error
from ..ops.weights import PLAIN
from .difffit import DiffFitConfig

_ORDINARY = frozenset((*PLAIN, FakeTensor))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_WANTS_GRADIENT = operator.attrgetter("requires_grad")


class _Module(NamedTuple):
    path: str
    siblings: dict[str, nn.Module | None]  # of its parent; the parent itself would make a circle
    key: str
    module: nn.Module
    kind: type[nn.Module]


class _Parameter(NamedTuple):
    name: str
    owner: dict[str, nn.Parameter | None]
    key: str
    frozen: bool


class _Quick:
    """The same in lists, so that one look at some hundred modules, at every forward, takes no loop in Python."""

    def __init__(self, modules: list[_Module], parameters: list[_Parameter]) -> None:
        below = [module.module for module in modules]
        frozen = {(id(p.owner), p.key) for p in parameters if p.frozen}
        self._parents = _distinct([module.siblings for module in modules])
        self._owners = _distinct([p.owner for p in parameters])
        self._below = below
        self._kinds = [module.kind for module in modules]
        self._children = _values(self._parents)
        self._parameter_kinds = list(map(type, _values(self._owners)))
        self._frozen = [(id(owner), key) in frozen for owner in self._owners for key in owner]
        self._hooks = [getattr(module, hooks) for module in below for hooks in _HOOKS]
        self._attributes = list(map(vars, below))

    def untouched(self) -> bool:
        parameters = _values(self._owners)
        return not (
            self._children != _values(self._parents)
            or self._kinds != list(map(type, self._below))
            or self._parameter_kinds != list(map(type, parameters))
            or any(map(_WANTS_GRADIENT, compress(parameters, self._frozen)))
            or any(self._hooks)
            or any(map(operator.contains, self._attributes, repeat("forward")))
            or _has_any_global_hook()
        )


class AsBuilt:
    """The modules below ``model`` and its parameters as they are now, to be compared with what they are later.

    ``difffit`` tells which parameters are frozen. Copies and pickles of a model carry theirs with them.
    """

    def __init__(self, model: nn.Module, difffit: DiffFitConfig) -> None:
        named = list(model.named_modules())
        self._modules = [
            _Module(f"{path}.{key}" if path else key, parent._modules, key, module, type(module))
            for path, parent in named
            for key, module in parent._modules.items()
            if module is not None
        ]
        self._parameters = [
            _Parameter(name, module._parameters, key, not difffit.trains(name))
            for path, module in named
            for key, p in module._parameters.items()
            if p is not None
            for name in (f"{path}.{key}" if path else key,)
        ]
        self._quick: _Quick | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_quick": None}

    @property
    def names(self) -> list[str]:
        """Of the parameters."""
        return [p.name for p in self._parameters]

    @torch.compiler.assume_constant_result
    def change(self) -> str | None:
        """What a forward that calls no module would miss, in words; None where it would miss nothing.

        Raises:
            RuntimeError: a frozen parameter wants a gradient.
        """
        if self._untouched():
            return None
        for name, owner, key, frozen in self._parameters:
            p = owner.get(key)
            if frozen and p is not None and p.requires_grad:
                raise frozen_weight_error(name)
        return self.other_model() or self._listener()

    def _untouched(self) -> bool:
        """Whether everything is exactly as it was: True is certain, False needs another look."""
        if self._quick is None:
            if self.other_model() is not None:
                return False
            self._quick = _Quick(self._modules, self._parameters)
        return self._quick.untouched()

    def other_model(self) -> str | None:
        """What makes these modules compute something else than they were made to, in words: it cannot be merged or saved as
        the parameters of this model."""
        for path, siblings, key, module, kind in self._modules:
            found = siblings.get(key)
            if found is not module:
                return f"{path} is another module now, {'none' if found is None else _kind(found)}"
            if type(module) is not kind:
                return f"{path} has become a {_kind(module)}"
        for name, owner, key, _ in self._parameters:
            kind = type(owner.get(key))
            if kind not in _ORDINARY:
                return f"{name} is {'gone' if kind is type(None) else f'a {kind.__name__}'}"
        return None

    def _listener(self) -> str | None:
        for path, _, _, module, _ in self._modules:
            if any(getattr(module, hooks) for hooks in _HOOKS):
                return f"{path} has a hook"
            own = module.__dict__.get("forward")  # a tool that has put back what it replaced leaves the class's there
            if own is not None and getattr(own, "__func__", None) is not type(module).forward:
                return f"the forward of {path} was replaced"
        return "all modules have a hook" if _has_any_global_hook() else None

    def check_whole(self, what: str) -> None:
        """Raise unless the parameters are there, ordinary and with values, and nothing else is computed with them.

        Raises:
            DiffFitError: ``what`` ("the model cannot be merged") and why.
        """
        why = self.other_model()
        for name, owner, key, _ in self._parameters:
            if why is None and owner[key].device.type == "meta":  # type: ignore[union-attr]
                why = f"{name} has no values: it is on the device meta (offloaded, or never loaded)"
        if why is not None:
            raise DiffFitError(f"{what}: {why}")


def _distinct(dictionaries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return list({id(dictionary): dictionary for dictionary in dictionaries}.values())


def _values(dictionaries: list[dict[str, Any]]) -> list[Any]:
    return list(chain.from_iterable(map(dict.values, dictionaries)))


def _kind(module: nn.Module) -> str:
    kind = type(module)
    return f"{kind.__module__.split('.')[0]} {kind.__qualname__}"
