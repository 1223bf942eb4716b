"""What a FastDiffFitDiT trains besides the class table, as its forward pass reads it: vectors, those of all layers side by side.

They come from the model's own modules (:func:`own_vectors`), or from one flat vector in which a delta that was loaded beside
others keeps them (:class:`Layout`). There a leading dimension (N,) is one for each sample, and everything that is made of them
here (:func:`block_biases`, :func:`join_vectors`) has it as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops.modulation import modulation
from ..ops.stacked import stacked_linear, stacked_matvec
from .difffit import neutral


class Vectors(NamedTuple):
    """``…`` is nothing, or N: one for each sample. L blocks, of which n, from number ``first`` on, have γ."""

    patch: Tensor  # bias of the patch embedding, (…, D)
    time1: Tensor  # biases of the timestep embedding, (…, D)
    time2: Tensor
    qkv: Tensor  # biases of the blocks' linears, (…, L, 3, D)
    proj: Tensor  # (…, L, D)
    fc1: Tensor  # (…, L, F)
    fc2: Tensor  # (…, L, D)
    modulation: Tensor  # biases of all modulation layers, (…, 6·L + 2, D)
    last: Tensor  # bias of the last linear, (…, p·p·C)
    norm: Tensor | None  # weight and bias of every LayerNorm, (…, 2·L + 1, 2, D)
    gamma_qkv: Tensor | None  # (…, n, 3, D)
    gamma_proj: Tensor | None  # (…, n, D)
    gamma_attn: Tensor | None
    gamma_mlp: Tensor | None
    first: int


class BlockBiases(NamedTuple):
    """What acts on the channels inside the blocks, of all layers."""

    qkv: tuple[Tensor, ...]  # of each block, (1 or N, 1 or 3, D): ops.attention.qkv_vectors
    fc1: tuple[Tensor, ...]  # of each block, (…, F)
    fc1_cast: (
        tuple[Tensor, ...] | tuple[None, ...]
    )  # the same in the compute dtype, without gradient, where it is one for all
    branch: Tensor  # of the last linear of each branch, (…, 2·L, D): behind the attention, behind the MLP, ...


def modulation_linears(model: Any) -> list[nn.Linear]:
    return [b.adaLN_modulation[1] for b in (*model.blocks, model.final_layer)]


def proj_weights(model: Any) -> list[nn.Parameter]:
    return [b.attn.proj.weight for b in model.blocks]


def _with_gamma(model: Any) -> range:
    """The numbers of the blocks that have γ; they follow one another."""
    blocks = [i for i in range(model.depth) if model.difffit.block_has_gamma(i, model.depth)]
    return range(blocks[0], blocks[-1] + 1) if blocks else range(0)


def own_vectors(model: Any) -> Vectors:
    """Those of the modules of ``model``, a FastDiffFitDiT."""
    blocks, d = model.blocks, model.hidden_size
    linears = modulation_linears(model)
    norm = None
    if model.difffit.affine_norm:
        norms = [norm for b in blocks for norm in (b.norm1, b.norm2)] + [model.final_layer.norm_final]
        norm = torch.stack([p for module in norms for p in (module.weight, module.bias)]).view(-1, 2, d)
    scaled = _with_gamma(model)
    sites = model.difffit.gamma if scaled else ()
    some = [blocks[i] for i in scaled]
    return Vectors(
        patch=model.x_embedder.proj.bias,
        time1=model.t_embedder.mlp[0].bias,
        time2=model.t_embedder.mlp[2].bias,
        qkv=torch.stack([b.attn.qkv.bias for b in blocks]).view(-1, 3, d),
        proj=torch.stack([b.attn.proj.bias for b in blocks]),
        fc1=torch.stack([b.mlp.fc1.bias for b in blocks]),
        fc2=torch.stack([b.mlp.fc2.bias for b in blocks]),
        modulation=torch.cat([linear.bias for linear in linears]).view(-1, d),
        last=model.final_layer.linear.bias,
        norm=norm,
        gamma_qkv=torch.stack([b.attn.gamma1 for b in some]).view(-1, 3, d) if "qkv" in sites else None,
        gamma_proj=torch.stack([b.attn.gamma2 for b in some]) if "proj" in sites else None,
        gamma_attn=torch.stack([b.gamma1 for b in some]) if "attn" in sites else None,
        gamma_mlp=torch.stack([b.gamma2 for b in some]) if "mlp" in sites else None,
        first=scaled.start,
    )


# -- what the layers take ----------------------------------------------------------------------------------------------
def block_biases(model: Any, vectors: Vectors, dtype: torch.dtype) -> BlockBiases:
    """What acts inside the blocks, computed in ``dtype``."""
    query, value = vectors.qkv[..., 0, :], vectors.qkv[..., 2, :]
    acting, value = _attention_vectors(query, value, vectors)
    # The value bias passes through the attention unchanged: it is added behind it, as a part of proj's.
    each = vectors.qkv.dim() == 4
    wanted = value.transpose(0, 1) if each else value
    moved = stacked_matvec(wanted.to(dtype), proj_weights(model))
    proj = vectors.proj + (moved.transpose(0, 1) if each else moved)
    fc1 = vectors.fc1.unbind(-2)
    cast: Any = (None,) * len(fc1) if vectors.fc1.dim() == 3 else vectors.fc1.detach().to(dtype).unbind(-2)
    return BlockBiases(acting, fc1, cast, torch.stack([proj, vectors.fc2], -2).flatten(-3, -2))


def _attention_vectors(query: Tensor, value: Tensor, vectors: Vectors) -> tuple[tuple[Tensor, ...], Tensor]:
    """What acts on qkv in each block, and the value biases (…, L, D) times their γ."""

    def by_block(acting: Tensor) -> list[Tensor]:  # (…, l, 1 or 3, D)
        return [a if a.dim() == 3 else a[None] for a in acting.unbind(-3)]

    gamma, depth = vectors.gamma_qkv, query.shape[-2]
    if gamma is None:
        return tuple(by_block(query[..., None, :])), value
    n, first = gamma.shape[-3], vectors.first
    sizes = [
        first,
        n,
        depth - first - n,
    ]  # split, and not sliced: one copy in the backward, however many layers there are
    gamma_q, gamma_k, gamma_v = gamma.unbind(-2)
    (before, own, after), (value0, value1, value2) = query.split(sizes, -2), value.split(sizes, -2)
    acting = by_block(torch.stack([own, gamma_q * gamma_k, gamma_v], -2))
    acting = by_block(before[..., None, :]) + acting + by_block(after[..., None, :])
    value1 = value1 * gamma_v
    return tuple(acting), value1 if n == depth else torch.cat([value0, value1, value2], -2)


def join_vectors(
    model: Any, vectors: Vectors, condition: Tensor, beta: Tensor, dtype: torch.dtype
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Scale and shift of the first LayerNorm (2, N, D), and for each join gate, bias, scale, shift (4, N, D).

    ``condition``: (N, D), SiLU of which the modulation layers take. ``beta``: :attr:`BlockBiases.branch`.
    """
    n, d = condition.shape[0], model.hidden_size
    weights = [linear.weight for linear in modulation_linears(model)]
    m = stacked_linear(nn.functional.silu(condition).to(dtype), weights).view(n, -1, d)
    planes = modulation(m, vectors.modulation, vectors.norm, _branch_gamma(vectors), beta)
    first, *joints = planes.split([2] + [4] * (2 * model.depth))
    return first, tuple(joints)


def _branch_gamma(vectors: Vectors) -> Tensor | None:
    """γ of every branch, (…, 2·L, D): the branch's own times that of proj; 1 where there is none, None without any."""
    attn, proj, mlp = vectors.gamma_attn, vectors.gamma_proj, vectors.gamma_mlp
    if attn is None or proj is None:
        attn = proj if attn is None else attn
    else:
        attn = attn * proj
    some = attn if attn is not None else mlp
    if some is None:
        return None
    attn = torch.ones_like(some) if attn is None else attn
    both = torch.stack([attn, torch.ones_like(some) if mlp is None else mlp], -2).flatten(-3, -2)
    depth = vectors.proj.shape[-2]
    before, after = 2 * vectors.first, 2 * depth - both.shape[-2] - 2 * vectors.first
    ones = [both.new_ones(*both.shape[:-2], count, both.shape[-1]) for count in (before, after)]
    return torch.cat([ones[0], both, ones[1]], -2) if before or after else both


# -- flat ----------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Layout:
    """Where the vectors of a delta lie in a flat one, (…, P): by field of :class:`Vectors`, all layers side by side.

    Attributes:
        fields: name of the field, its shape, and the parameters that it holds, in order, with their sizes.
    """

    fields: tuple[tuple[str, tuple[int, ...], tuple[tuple[str, int], ...]], ...]
    first: int

    @classmethod
    def of(cls, model: Any) -> Layout:
        """For what ``model``, a FastDiffFitDiT, trains."""
        sizes = {name: p.numel() for name, p in model.named_parameters() if model.difffit.trains(name)}
        blocks, d = range(model.depth), model.hidden_size
        scaled = _with_gamma(model)
        norms = [f"blocks.{i}.norm{k}" for i in blocks for k in (1, 2)] + ["final_layer.norm_final"]
        wanted: dict[str, tuple[tuple[int, ...], list[str]]] = {
            "patch": ((d,), ["x_embedder.proj.bias"]),
            "time1": ((d,), ["t_embedder.mlp.0.bias"]),
            "time2": ((d,), ["t_embedder.mlp.2.bias"]),
            "qkv": ((-1, 3, d), [f"blocks.{i}.attn.qkv.bias" for i in blocks]),
            "proj": ((-1, d), [f"blocks.{i}.attn.proj.bias" for i in blocks]),
            "fc1": ((model.depth, -1), [f"blocks.{i}.mlp.fc1.bias" for i in blocks]),
            "fc2": ((-1, d), [f"blocks.{i}.mlp.fc2.bias" for i in blocks]),
            "modulation": (
                (-1, d),
                [f"{b}.adaLN_modulation.1.bias" for b in (*(f"blocks.{i}" for i in blocks), "final_layer")],
            ),
            "last": ((-1,), ["final_layer.linear.bias"]),
            "norm": ((-1, 2, d), [f"{norm}.{part}" for norm in norms for part in ("weight", "bias")]),
            "gamma_qkv": ((-1, 3, d), [f"blocks.{i}.attn.gamma1" for i in scaled]),
            "gamma_proj": ((-1, d), [f"blocks.{i}.attn.gamma2" for i in scaled]),
            "gamma_attn": ((-1, d), [f"blocks.{i}.gamma1" for i in scaled]),
            "gamma_mlp": ((-1, d), [f"blocks.{i}.gamma2" for i in scaled]),
        }
        return cls(
            tuple(
                (field, shape, tuple((name, sizes[name]) for name in names))
                for field, (shape, names) in wanted.items()
                if names and all(name in sizes for name in names)
            ),
            scaled.start,
        )

    @property
    def names(self) -> list[str]:
        """Of the parameters, as they lie."""
        return [name for _, _, parts in self.fields for name, _ in parts]

    @property
    def size(self) -> int:
        """P."""
        return sum(size for _, _, parts in self.fields for _, size in parts)

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """(P,) float32 of the parameters by name; what a base lacks of γ and LayerNorm is at the identity."""
        parts = [
            tensors[name].detach().float().flatten() if name in tensors else torch.full((size,), neutral(name))
            for _, _, pieces in self.fields
            for name, size in pieces
        ]
        return torch.cat([part.to(parts[0].device) for part in parts]) if parts else torch.empty(0)

    def unflatten(self, flat: Tensor) -> dict[str, Tensor]:
        """The parameters, (size,) each, as views of ``flat`` (P,)."""
        sizes = [size for _, _, parts in self.fields for _, size in parts]
        return dict(zip(self.names, flat.split(sizes), strict=True))

    def vectors(self, model: Any, flat: Tensor) -> Vectors:
        """Those in ``flat``, (P,) or (N, P); what it does not hold is the model's own."""
        sizes = [sum(size for _, size in parts) for _, _, parts in self.fields]
        pieces = flat.split(sizes, -1)
        found: dict[str, Any] = {
            field: piece.unflatten(-1, shape) if len(shape) > 1 else piece
            for (field, shape, _), piece in zip(self.fields, pieces, strict=True)
        }
        if "time1" not in found:
            found |= {"time1": model.t_embedder.mlp[0].bias, "time2": model.t_embedder.mlp[2].bias}
        if "qkv" not in found:  # no bias is trained
            own = own_vectors(model)
            if flat.dim() == 2:
                each = {
                    field: v.expand(len(flat), *v.shape) for field, v in own._asdict().items() if isinstance(v, Tensor)
                }
                own = own._replace(**each)
            return own._replace(**{field: v for field, v in found.items() if field not in ("time1", "time2")})
        rest = dict.fromkeys(("norm", "gamma_qkv", "gamma_proj", "gamma_attn", "gamma_mlp"))
        return Vectors(**{**rest, **found, "first": self.first})
