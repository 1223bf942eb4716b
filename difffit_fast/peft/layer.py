"""One module's adapters: for each its own values of the biases, norms, tables and γ that the module reads.

The base stays where and as it is: no module is wrapped, no key of the base changes. A module with adapters becomes a subclass
of its class (:mod:`..apply.modules`) with a child ``difffit``, from which it reads what the active adapter says, and its own
parameters where none is active.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ..apply.merging import fold_gamma
from ..apply.modules import Reading
from ..errors import DiffFitError


class DiffFitLayer(nn.Module, BaseTunerLayer):
    """The adapters of a module, and of the modules in other blocks that are copies of it.

    Attributes:
        owners: the modules that read from here.
        difffit_values: for each adapter the values by name, float32.
    """

    adapter_layer_names = ("difffit_values",)

    def __init__(self) -> None:
        super().__init__()
        self.__dict__["owners"] = []  # no children of this module, which is a child of theirs
        self.difffit_values = nn.ModuleDict()
        self._disable_adapters = False
        self._active_adapter: list[str] = []
        self.merged_adapters: list[str] = []
        self._before: list[tuple[nn.Module, dict[str, Any]]] = []  # while merged: parameters of the owners

    def get_base_layer(self) -> nn.Module:
        return self.owners[0]

    def update(self, adapter: str, values: dict[str, nn.Parameter], active: list[str], inference_mode: bool) -> None:
        """Add an adapter with these values."""
        self.difffit_values[adapter] = nn.ParameterDict(values)
        self.difffit_values[adapter].requires_grad_(adapter in active and not inference_mode)
        self._active_adapter = list(active)

    def enable_adapters(self, enabled: bool) -> None:
        if not enabled and self.merged:
            self.unmerge()
        super().enable_adapters(enabled)

    def current(self) -> nn.ParameterDict | None:
        """The values of the active adapter; None where the base is to be read.

        Raises:
            DiffFitError: more than one is active: the values of two adapters do not add up.
        """
        if self._disable_adapters or self.merged_adapters:
            return None
        active = [name for name in self.active_adapters if name in self.difffit_values]
        if len(active) > 1:
            raise DiffFitError(f"DiffFit uses one adapter at a time; active are {', '.join(active)}")
        return self.difffit_values[active[0]] if active else None

    # -- merging -------------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put an adapter's values into the parameters of the owners.

        Raises:
            DiffFitError: more than one adapter.
            ValueError: with ``safe_merge``, values that are not finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.difffit_values]
        if not names:
            return
        if len(names) + len(self.merged_adapters) > 1:
            raise DiffFitError(f"DiffFit merges one adapter; asked for are {', '.join(self.merged_adapters + names)}")
        values = self.difffit_values[names[0]]
        if safe_merge and not all(bool(v.isfinite().all()) for v in values.values()):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {names[0]} seems to be broken")
        scaled = ["weight", "bias"] if "gamma" in values else []
        for owner in self.owners:
            kept = {name: owner._parameters.get(name) for name in {*values, *scaled} - {"gamma"}}
            self._before.append((owner, kept))
            for name, p in kept.items():
                new = values[name].detach().to(owner._difffit.dtypes[name]) if name in values else p
                owner._parameters[name] = None if new is None else nn.Parameter(new.clone(), requires_grad=False)
            fold_gamma(owner, values["gamma"] if scaled else None)
        self.merged_adapters.append(names[0])

    def unmerge(self) -> None:
        """Put the owners' parameters back, bit for bit."""
        for owner, kept in self._before:
            for name, p in kept.items():
                now = owner._parameters[name]
                if p is not None and now is not None:
                    p.data = p.data.to(now.device, now.dtype)
                owner._parameters[name] = p
        self._before.clear()
        self.merged_adapters.clear()

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        if adapter_name not in self.difffit_values:
            return
        here = [p.device for owner in self.owners for p in owner._parameters.values() if p is not None]
        values = self.difffit_values[adapter_name]
        if (device or here) and not any(p.is_meta for p in values.values()):
            values.to(device or here[0])


class AdapterReading(Reading):
    """Reads the active adapter's values, or its own parameters where there is none."""

    _difffit_layer: DiffFitLayer

    def _difffit_value(self, name: str) -> Tensor | None:
        values = self._difffit_layer.current()
        if values is not None and name in values:
            return values[name]
        return self._parameters.get(name)  # type: ignore[attr-defined]

    def _difffit_own(self) -> dict[str, Tensor]:
        return {}


class AdapterLinear(AdapterReading):
    """The same for a linear or a convolution: without an adapter it computes exactly what PyTorch's own does."""

    def forward(self, x: Tensor) -> Tensor:
        if self._difffit.was is nn.Linear and self._difffit_layer.current() is None:
            return nn.functional.linear(x, self.weight, self.bias)  # type: ignore[attr-defined]
        return super().forward(x)  # type: ignore[misc]


def layers_of(model: nn.Module) -> Iterator[DiffFitLayer]:
    """The layers with adapters in ``model``."""
    return (module for module in model.modules() if isinstance(module, DiffFitLayer))
