"""What DiffFit trains in a model, found out without touching it.

Of the parameters that are there: biases (also of norms and convolutions), tables that are the biases of a modulation, the
weights of norms (they scale channels, as γ does: not where a configuration has no scales at all), the class table. New are γ
behind branches, zero biases where they are asked for, and an affine LayerNorm where it can be folded into its modulation
again. Everything else stays frozen: matrices, positions, tokens, and by default the biases of what embeds the timestep.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..errors import DiffFitError
from ..models.difffit import DiffFitConfig
from .families import CLASS_EMBEDDERS, HOLDERS, TABLES, TIME_EMBEDDERS, Family, Modulated, Pairs, family_of
from .modules import FrozenLinear, FrozenScaledLinear, ScaledConv2d, class_of, is_plain, wide

# How a trainable begins: as what is there, as one, as zero.
BASE, ONE, ZERO = "base", "one", "zero"


@dataclass
class Site:
    """A module in which something trains: the names of its trainables, and how they begin."""

    path: str
    module: nn.Module
    values: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Fold:
    """An added affine LayerNorm, and the linear into whose rows it folds."""

    norm: str
    linear: str
    pairs: Pairs


@dataclass
class Plan:
    """Attributes:
    sites: in the order of the model's modules.
    ties: a trainable that another one stands for, as (path, name) -> (path, name).
    folds: of affine LayerNorms.
    quantised: linears that keep their own forward.
    """

    sites: dict[str, Site] = field(default_factory=dict)
    ties: dict[tuple[str, str], tuple[str, str]] = field(default_factory=dict)
    folds: list[Fold] = field(default_factory=list)
    quantised: list[str] = field(default_factory=list)

    def add(self, path: str, module: nn.Module, name: str, begin: str) -> None:
        self.sites.setdefault(path, Site(path, module)).values[name] = begin

    def like(self, model: nn.Module, site: Site, name: str) -> Tensor:
        """The tensor whose dtype and device are those that the trainable ``name`` of ``site`` is read in."""
        if site.values[name] == BASE:
            return site.module._parameters[name]
        linear = next((fold.linear for fold in self.folds if fold.norm == site.path), None)
        return (site.module if linear is None else model.get_submodule(linear))._parameters["weight"]


@torch.no_grad()
def first_values(site: Site, name: str, like: Tensor) -> nn.Parameter:
    """A trainable as it begins, in memory of its own."""
    begin, module = site.values[name], site.module
    if begin == BASE:
        return nn.Parameter(like.detach().to(wide(like.dtype), copy=True))
    size = module.normalized_shape[0] if isinstance(module, nn.LayerNorm) else like.shape[0]
    return nn.Parameter(torch.full((size,), float(begin == ONE), dtype=wide(like.dtype), device=like.device))


def class_for(module: nn.Module, gamma: bool) -> type[nn.Module]:
    """The class that serves this module with its weight frozen, with a γ or without."""
    if is_linear(module):
        return FrozenScaledLinear if gamma else FrozenLinear
    return ScaledConv2d if gamma else class_of(module)


def is_linear(module: nn.Module) -> bool:
    """Whether this is PyTorch's own linear layer with an ordinary weight."""
    return class_of(module) is nn.Linear and is_plain(module._parameters["weight"])


def is_conv(module: nn.Module) -> bool:
    return class_of(module) is nn.Conv2d and is_plain(module._parameters["weight"]) and module.padding_mode == "zeros"


def is_gelu(module: nn.Module) -> bool:
    """Whether this is the class of diffusers that is a linear ``proj`` and the tanh GELU behind it."""
    if class_of(module).__name__ != "GELU" or getattr(module, "approximate", None) != "tanh":
        return False
    return is_linear(getattr(module, "proj", None) or module)


def own_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of ``model`` by path, without what PEFT has added."""
    modules: dict[str, nn.Module] = {}
    adapters: list[str] = []
    for path, module in model.named_modules():
        if hasattr(module, "adapter_layer_names"):
            adapters.append(f"{path}.")
        elif not path.startswith(tuple(adapters)):
            modules[path] = module
    return modules


def make_plan(
    model: nn.Module, config: DiffFitConfig, *, add_bias: bool = False, branch_ends: Sequence[str] | None = None
) -> Plan:
    """What ``config`` trains in ``model``.

    Args:
        add_bias: give every linear without a bias a zero one.
        branch_ends: the names of the modules behind which γ is to be, or the ends of their paths, instead of those that are
            known for the class (or that its names suggest).

    Raises:
        DiffFitError: biases are to be trained and the blocks have none; ``branch_ends`` names nothing.
    """
    if add_bias and not config.bias:
        raise DiffFitError("add_bias=True needs a configuration with bias=True")
    family, modules, plan = family_of(model), own_modules(model), Plan()
    blocks = _blocks(model, family)
    timed = {path for path, module in modules.items() if type(module).__name__ in TIME_EMBEDDERS}
    for path, module in modules.items():
        in_time = any(f"{path}.".startswith(f"{embedder}.") for embedder in timed)
        parent = modules.get(path.rpartition(".")[0])
        for name in _trained(module, parent, config, in_time):
            plan.add(path, module, name, BASE)
        if is_linear(module):
            if add_bias and module._parameters["bias"] is None and (config.time_embedder_bias or not in_time):
                plan.add(path, module, "bias", ZERO)
        elif issubclass(class_of(module), nn.Linear) and not is_plain(module._parameters.get("weight")):
            plan.quantised.append(path)
    _check_biases(model, plan, blocks, config)
    if config.affine_norm:
        _add_norms(plan, modules, family)
    for path in _scaled(modules, blocks, family, config, branch_ends):
        plan.add(path, modules[path], "gamma", ONE)
    plan.sites = {path: plan.sites[path] for path in modules if path in plan.sites}
    if not plan.sites:
        raise DiffFitError(f"{type(model).__name__} has nothing that this configuration trains: {config.to_json()}")
    if family.tied:
        _tie(plan, blocks, family.tied)
    return plan


def _trained(module: nn.Module, parent: nn.Module | None, config: DiffFitConfig, in_time: bool) -> Iterator[str]:
    """The parameters of this module itself that train."""
    bias = config.bias and (config.time_embedder_bias or not in_time)
    scales = bool(config.gamma) or config.affine_norm
    norm = "norm" in type(module).__name__.lower()
    table = class_of(module) is nn.Embedding and type(parent).__name__ in CLASS_EMBEDDERS
    for name, p in module._parameters.items():
        if p is None or not is_plain(p):
            continue
        if name == "bias" or name.endswith("_bias"):
            trains = bias or (norm and scales)
        elif name.endswith(TABLES):
            trains = config.bias
        elif norm and p.dim() <= 1:
            trains = scales
        else:
            trains = table and config.class_embedding
        if trains:
            yield name


# -- blocks ------------------------------------------------------------------------------------------------------------
def _blocks(model: nn.Module, family: Family) -> list[str]:
    """The paths of the blocks, in the order in which they run."""
    lists = family.blocks or tuple(
        name
        for name, child in model.named_children()
        if isinstance(child, nn.ModuleList)
        and any(_ends(family, path, inner) for block in child for path, inner in block.named_modules())
    )
    found = ((name, getattr(model, name, None)) for name in lists)
    return [f"{name}.{i}" for name, blocks in found if blocks is not None for i in range(len(blocks))]


def _ends(family: Family, path: str, module: nn.Module) -> bool:
    patterns = (family.attention, family.mlp, family.both)
    return (is_linear(module) or is_conv(module)) and any(re.fullmatch(p, path) for p in patterns)


def _check_biases(model: nn.Module, plan: Plan, blocks: list[str], config: DiffFitConfig) -> None:
    if not config.bias or not blocks:
        return
    inside = tuple(f"{block}." for block in blocks)
    ends = ("bias", *TABLES)
    if not any(f"{p}.".startswith(inside) and any(n.endswith(ends) for n in s.values) for p, s in plan.sites.items()):
        raise DiffFitError(
            f"the blocks of {type(model).__name__} have no biases to train; give add_bias=True, which adds zero ones (no "
            "stock file of this class can hold them), or a configuration with bias=False for γ and norms alone"
        )


# -- γ -----------------------------------------------------------------------------------------------------------------
def _scaled(
    modules: dict[str, nn.Module], blocks: list[str], family: Family, config: DiffFitConfig, ends: Sequence[str] | None
) -> Iterator[str]:
    """The paths of the linears and convolutions that get a γ."""
    if not config.gamma:
        return
    sites, found = set(config.gamma), set()
    attention, mlp = bool(sites & {"proj", "attn"}), "mlp" in sites
    patterns = [
        pattern
        for pattern, wanted in (
            (family.attention, attention), (family.mlp, mlp), (family.both, attention or mlp), (family.qkv, "qkv" in sites),
        )
        if wanted
    ]  # fmt: skip
    for path, module in modules.items():
        if not (is_linear(module) or is_conv(module)):
            continue
        index = next((i for i, block in enumerate(blocks) if path.startswith(f"{block}.")), None)
        if ends is not None:
            hits = {end for end in ends if path == end or path.endswith(f".{end}")}
            found |= hits
        else:
            hits = index is not None and any(re.fullmatch(p, path[len(blocks[index]) + 1 :]) for p in patterns)
        if hits and (index is None or config.block_has_gamma(index, len(blocks))):
            yield path
    if lost := [end for end in ends or () if end not in found]:
        raise DiffFitError(f"branch_ends names {lost[0]!r}, which is no linear of the model that could be scaled")


# -- affine LayerNorms -------------------------------------------------------------------------------------------------
def _add_norms(plan: Plan, modules: dict[str, nn.Module], family: Family) -> None:
    """A weight of ones and a bias of zeros for every LayerNorm that has none and can be folded away again."""
    for path, module in modules.items():
        for norm, linear, pairs in _modulated(path, module, modules, family):
            layer, modulation = modules[norm], modules[linear]
            if not (is_linear(modulation) and isinstance(layer, nn.LayerNorm) and len(layer.normalized_shape) == 1):
                continue
            bias_added = linear in plan.sites and "bias" in plan.sites[linear].values
            biased = bias_added or modulation._parameters["bias"] is not None
            bare = layer._parameters["weight"] is None and layer._parameters["bias"] is None
            if not (biased and bare) or modulation.out_features % layer.normalized_shape[0]:
                continue
            plan.add(norm, layer, "weight", ONE)
            if all(shift is not None for shift, _ in pairs):
                plan.add(norm, layer, "bias", ZERO)
            plan.folds.append(Fold(norm, linear, pairs))


def _modulated(
    path: str, module: nn.Module, modules: dict[str, nn.Module], family: Family
) -> Iterator[tuple[str, str, Pairs]]:
    holder = HOLDERS.get(type(module).__name__)
    if holder is not None:
        norm, linear = f"{path}.{holder[0]}", f"{path}.{holder[1]}"
        if isinstance(modules.get(norm), nn.LayerNorm) and linear in modules and is_linear(modules[linear]):
            chunks = modules[linear].out_features // modules[norm].normalized_shape[0]
            if chunks in holder[2]:
                yield norm, linear, holder[2][chunks]
    for row in family.modulated:
        if match := re.fullmatch(re.escape(row.norm).replace(r"\*", r"([^.]+)"), path):
            linear = _filled(row, match.groups())
            if linear in modules:
                yield path, linear, row.pairs


def _filled(row: Modulated, names: tuple[str, ...]) -> str:
    path = row.linear
    for name in names:
        path = path.replace("*", name, 1)
    return path


# -- copies ------------------------------------------------------------------------------------------------------------
def _tie(plan: Plan, blocks: list[str], tied: str) -> None:
    """Let the first block's copy of a trainable stand for those of all blocks that begin with the same values."""
    first: dict[str, tuple[str, str]] = {}
    for block in blocks:
        for path, site in plan.sites.items():
            inside = path[len(block) + 1 :]
            if not path.startswith(f"{block}.") or not re.match(rf"{tied}(\.|$)", inside):
                continue
            for name in site.values:
                source = first.setdefault(f"{inside}.{name}", (path, name))
                if source[0] != path and _equal(plan.sites[source[0]].module, site.module, name):
                    plan.ties[path, name] = source


def _equal(one: nn.Module, other: nn.Module, name: str) -> bool:
    a, b = one._parameters[name], other._parameters[name]
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and a.dtype == b.dtype and (a.is_meta or bool((a == b).all()))
