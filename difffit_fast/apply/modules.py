"""What a module of someone else's becomes while DiffFit trains in it: a subclass of its own class, swapped in place.

The module object stays the same, with its name, hooks, children and keys. Its trainables lie under the names that its code
reads (``bias``, ``weight``, ``scale_shift_table``; ``gamma`` is new), in float32 at least: updates are too small for 16 bits.
Whoever reads them gets the dtype that the parameter had before, so a model loaded in bfloat16 computes as it did. Swapping
the class of a module is what ``torch.nn.utils.parametrize`` and FSDP2 do; unlike the former, no key changes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops._register import frozen_weight_error
from ..ops.frozen_gelu import frozen_gelu
from ..ops.frozen_linear import frozen_linear

PLAIN = (Tensor, nn.Parameter)


def is_plain(p: Any) -> bool:
    """Whether ``p`` is an ordinary tensor of floating numbers of 16 bits or more: not quantised, no subclass."""
    return type(p) in PLAIN and p.is_floating_point() and p.element_size() >= 2


def wide(dtype: torch.dtype) -> torch.dtype:
    """What a trainable of this dtype is kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def class_of(module: nn.Module) -> type[nn.Module]:
    """The class of a module, whatever DiffFit has made of it."""
    held = module.__dict__.get("_difffit")
    return type(module) if held is None else held.was


@dataclass
class Held:
    """What :class:`Reading` keeps beside a module, hidden from its parameters.

    Attributes:
        was: the module's class before.
        dtypes: the trainables by name, and the dtype each is read in.
        base: the parameters that were there before under these names; None where the name was there without a value.
    """

    was: type[nn.Module]
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    base: dict[str, nn.Parameter | None] = field(default_factory=dict)


class Reading:
    """A mixin for a module that holds trainables: wide in memory, read in the dtype that the module computes in."""

    _difffit: Held
    _difffit_made_of: tuple[type, type, tuple[str, ...]]

    def _difffit_value(self, name: str) -> Tensor | None:
        """The parameter ``name`` as it trains."""
        return self._parameters.get(name)  # type: ignore[attr-defined]

    def _difffit_own(self) -> dict[str, Tensor]:
        """Those of this module's own parameters that train, by name."""
        return {name: self._parameters[name] for name in self._difffit.dtypes}  # type: ignore[attr-defined]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move or cast as any module does; trainables follow to a device, and to no dtype below float32."""
        dtypes = self._difffit.dtypes
        before = {name: p.detach() for name, p in self._difffit_own().items()}
        super()._apply(fn, recurse)  # type: ignore[misc]
        for name in dtypes:
            dtypes[name] = fn(torch.empty(0, dtype=dtypes[name])).dtype
        for name, old in before.items():
            p = self._parameters[name]  # type: ignore[attr-defined]
            if p.element_size() < 4:
                p.data = p.data.to(old.dtype) if old.is_meta else old.to(p.device)
                if p.grad is not None:
                    p.grad = p.grad.to(p.dtype)
        return self

    def __reduce_ex__(self, protocol: Any) -> tuple:
        """Copies and pickles name what the class is made of: it has no name of its own to be found under."""
        _, _, *state = super().__reduce_ex__(protocol)
        return (_new, self._difffit_made_of, *state)


def _new(cls: type, how: type, names: tuple[str, ...]) -> Any:
    made = adapted(cls, how, names)
    return made.__new__(made)


def _reader(name: str) -> property:
    def read(self: Any) -> Tensor | None:
        value = self._difffit_value(name)
        dtype = self._difffit.dtypes.get(name)
        return value if value is None or dtype is None or value.dtype == dtype else value.to(dtype)

    return property(read)


@functools.cache
def adapted(cls: type, how: type, names: tuple[str, ...]) -> type:
    """The subclass of the module class ``cls`` that reads ``names`` as ``how``, a :class:`Reading`, says.

    It bears the name of ``cls``: what looks classes up by name (policies of sharding, blocks to compile) finds it.
    """
    body: dict[str, Any] = {name: _reader(name) for name in names}
    body |= {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "_difffit_made_of": (cls, how, names)}
    return type(cls.__name__, (how, cls), body)


def _operands(module: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """x and the frozen weight of a linear, as they are to be multiplied.

    Raises:
        RuntimeError: the weight is to be trained.
    """
    weight = module._parameters["weight"]
    if weight.requires_grad and torch.is_grad_enabled():
        raise frozen_weight_error("the weight of a linear layer")
    # Detached: what is kept for the backward pass stays what it is when a tool that offloads puts other data into the
    # parameter meanwhile.
    weight = weight.detach()
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        return x.to(dtype), weight.to(dtype)
    return x, weight


def _linear(module: Any, x: Tensor) -> Tensor:
    """γ·(x·Wᵀ + b) with a frozen W, bit for bit the product of ``F.linear`` where that is made in float32."""
    bias, gamma = module._difffit_value("bias"), module._difffit_value("gamma")
    if type(module._parameters["weight"]) not in PLAIN:  # quantised or sharded: it knows best how to multiply itself
        y = F.linear(x, module._parameters["weight"], module.bias)
        return y if gamma is None else (y * gamma).to(y.dtype)
    x, weight = _operands(module, x)
    if gamma is None and x.element_size() >= 4:
        # PyTorch's own keeps nothing but the weight either and sums the bias gradient in float32; Python in the backward
        # pass costs more than it could save there.
        return F.linear(x, weight, bias)
    return frozen_linear(x, weight, bias, gamma)


class FrozenLinear(nn.Linear):
    """``nn.Linear`` with a frozen weight: no gradient of the weight is computed and no input kept for one.

    x (..., in_features) -> (..., out_features), in the dtype of the weight (or autocast's). Keys are ``weight`` and ``bias``.
    """

    def forward(self, x: Tensor) -> Tensor:
        return _linear(self, x)


class FrozenScaledLinear(nn.Module):
    """:class:`FrozenLinear` times ``gamma`` (out_features,), the end of a branch: x -> γ·(x·Wᵀ + b).

    Not an ``nn.Linear``, since γ·(W x + b) is not what its ``weight`` and ``bias`` say: a tool that would compute with these
    alone, or add to them, does not take it for one.
    """

    in_features: int
    out_features: int

    def forward(self, x: Tensor) -> Tensor:
        return _linear(self, x)

    def extra_repr(self) -> str:
        bias = self._parameters.get("bias") is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}"


class ScaledConv2d(nn.Module):
    """A frozen ``nn.Conv2d`` times ``gamma``, one factor a channel: x (N, C, H, W) -> (N, out_channels, H', W')."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)  # type: ignore[arg-type]
        gamma = self._difffit_value("gamma")  # type: ignore[operator]
        return y if gamma is None else (y * gamma[:, None, None]).to(y.dtype)


def _hooked(module: nn.Module) -> bool:
    """Whether something is to happen when ``module`` is called, beside its own forward."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in module.__dict__  # the latter: tools that offload


class GeluReading(Reading):
    """For a module of diffusers that is a linear ``proj`` and the tanh GELU: both in one operation."""

    proj: FrozenLinear

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., in) -> (..., out); by way of ``proj`` itself where it is not what it was, or has hooks."""
        proj = self.proj
        plain = isinstance(proj, FrozenLinear) and type(proj._parameters["weight"]) in PLAIN
        if not plain or _hooked(proj):
            return super().forward(hidden_states)  # type: ignore[misc]
        return frozen_gelu(*_operands(proj, hidden_states), proj._difffit_value("bias"))
