"""Several deltas on one base, side by side: each sample of a batch wears its own, or none.

A delta is vectors and a class table, and the weights that all matrix products read are the base's; so a batch of many domains
costs what a batch of one does. For sample n with delta k, of strength s,

    v_n = base + s·(delta_k − base)           of every vector and of the class row

which is the base at s = 0 and the delta at s = 1, both bit for bit. The class of a delta is the base's of the same name (or
number, where their classes are as many and nothing is named); one that the base does not know is the base's null class, or
where it has none the mean of its classes.
"""

from __future__ import annotations

import enum
import math
import numbers
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import quote

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._words import nearest
from ..errors import DiffFitError
from .adapt import TABLE, class_table, null_row
from .checkpoint import ModelFile
from .classes import choose_rows
from .delta import check_delta, check_tensors, read_delta
from .difffit import is_extra, neutral
from .dit import label_dropout, transformed
from .header import OF_MODELS
from .vectors import Layout


class Own(enum.Enum):
    """Stands for what a model itself holds, where a delta can be named."""

    OWN = "own"


OWN: Final = Own.OWN
Wearing = str | None | Own | Sequence[str | None] | Tensor  # what the samples of a batch wear
Strength = float | Sequence[float] | Mapping[str, float] | Tensor | None


@dataclass(frozen=True)
class Base:
    """What a delta replaces, as it was before any: parameters by name, and the class table with the names of its classes."""

    state: dict[str, Tensor]
    classes: Tensor
    count: int
    names: tuple[str, ...] | None

    @classmethod
    def of_file(cls, file: ModelFile, trains: Any) -> Base | None:
        """That of a model file; None where γ or an affine LayerNorm says that it was fine-tuned."""
        if file.is_difffit:
            return None
        state = {name: p.detach().clone() for name, p in file.state.items() if name != TABLE and trains(name)}
        names = None if file.class_names is None else tuple(file.class_names)
        return cls(state, file.state[TABLE].detach().clone(), file.config["num_classes"], names)


class _Worn(nn.Module):
    """What the base and a delta have in common."""

    vectors: Tensor
    classes: Tensor
    base_rows: Tensor
    num_classes: int
    has_null_class: bool

    def sizes(self, model: Any) -> dict[str, Any]:
        """The arguments of a DiT that go with its class table rather than with that of ``model``."""
        return {
            "num_classes": self.num_classes,
            "class_dropout_prob": (model.class_dropout_prob or 0.1) if self.has_null_class else 0.0,
        }


class Delta(_Worn):
    """One delta that a model has at hand.

    Attributes:
        vectors: (P,), laid out by :class:`.vectors.Layout`.
        classes: its class table, (rows, D).
        base_rows: the row of the base's class table that each of its own goes with, (rows,).
        num_classes, class_names, has_null_class: of the table.
        header: what its file records.
    """

    vectors: nn.Parameter

    def __init__(
        self,
        vectors: Tensor,
        classes: Tensor,
        base_rows: Tensor,
        count: int,
        header: dict[str, Any],
        trained: bool = True,
    ) -> None:
        super().__init__()
        self.vectors = nn.Parameter(vectors, requires_grad=False)
        if trained:
            self.classes = nn.Parameter(classes, requires_grad=False)
        else:
            self.register_buffer("classes", classes, persistent=False)
        self.register_buffer("base_rows", base_rows, persistent=False)
        self.num_classes = count
        self.header = header

    @property
    def has_null_class(self) -> bool:
        return len(self.classes) > self.num_classes

    @property
    def class_names(self) -> list[str] | None:
        return self.header.get("class_names")


class _BaseDelta(_Worn):
    """The base as if it were one; nothing of it is a parameter or in a state dict."""

    def __init__(self, vectors: Tensor, classes: Tensor, count: int, names: tuple[str, ...] | None) -> None:
        super().__init__()
        self.num_classes, self.has_null_class = count, len(classes) > count
        self.class_names = None if names is None else list(names)
        # Behind the last row lies what a class that is not the base's goes with.
        whole = classes if self.has_null_class else torch.cat([classes, null_row(classes, count).to(classes)])
        self.register_buffer("vectors", vectors, persistent=False)
        self.register_buffer("classes", whole, persistent=False)
        self.register_buffer("base_rows", torch.arange(len(whole)), persistent=False)


class Deltas(nn.Module):
    """The deltas that a FastDiffFitDiT has at hand, by name, in the order in which they came; ``base`` is the base itself.

    A delta's number is its place in ``names``, the base's is −1. Parameters and buffers move with the model; those of the
    deltas are in its state dict under ``deltas.``.
    """

    def __init__(self) -> None:
        super().__init__()
        self._known: Base | None = None
        self.base: _BaseDelta | None = None
        self.layout: Layout | None = None
        self._keys: dict[str, str] = {}  # by name, those of the modules

    # -- what there is -------------------------------------------------------------------------------------------------
    @property
    def names(self) -> list[str]:
        return list(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def __bool__(self) -> bool:
        return True

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self._keys

    def __getitem__(self, name: str) -> Delta:
        """The delta of this name.

        Raises:
            DiffFitError: there is none.
        """
        return self._of(name)  # type: ignore[return-value]

    def _of(self, name: str | None) -> _Worn:
        if name is None:
            return self._base()
        if name not in self._keys:
            self._base()
            hint = "names are text"
            if isinstance(name, str):
                hint = f"the nearest is {nearest(name, self.names)!r}" if self._keys else "none has been loaded"
            raise DiffFitError(f"there is no delta {name!r}; {hint}")
        return self._modules[self._keys[name]]  # type: ignore[return-value]

    def _base(self) -> _BaseDelta:
        if self.base is None:
            raise DiffFitError("no delta has been loaded beside the model's own parameters (load_deltas)")
        return self.base

    def of(self, wearing: str | None) -> _Worn:
        """The delta of this name, or the base for None."""
        return self._of(wearing)

    def index(self, wearing: Sequence[str | None]) -> Tensor:
        """Names, None for the base -> their numbers, (N,) long on the device: what a compiled or captured forward takes."""
        numbers_of = {None: -1, **{name: i for i, name in enumerate(self.names)}}
        for name in wearing:
            self._of(name)
        return torch.tensor(
            [numbers_of[name] for name in wearing], dtype=torch.long, device=self._base().vectors.device
        )

    def _every(self) -> list[_Worn]:
        """The base, then the deltas: number + 1."""
        return [self._base(), *(self._modules[key] for key in self._keys.values())]  # type: ignore[list-item]

    # -- the base ------------------------------------------------------------------------------------------------------
    def know(self, base: Base | None) -> None:
        """Remember what the base was before any delta; None where it has become another, which no delta here belongs to."""
        self._known = base
        self.base = None
        for name in self.names:
            del self._modules[self._keys.pop(name)]

    @property
    def knows_base(self) -> bool:
        return self._known is not None

    def prepare(self, model: Any) -> _BaseDelta:
        """The base, taken from the model itself where no file told it and nothing has been trained yet.

        Raises:
            DiffFitError: it cannot be told any more.
        """
        self.see(model)
        if self._known is None:
            raise DiffFitError(
                "the base cannot be told from what was trained on it: γ or LayerNorm are not at the identity. Make the model by "
                "from_pretrained or from_dit, or load the deltas before training"
            )
        like = model.x_embedder.proj.bias
        if self.base is None:
            self.layout = Layout.of(model)
            flat = self.layout.flatten(self._known.state).to(like)
            self.base = _BaseDelta(flat, self._known.classes.to(like), self._known.count, self._known.names)
        return self.base

    def see(self, model: Any) -> None:
        """Before the model's own parameters become those of a delta: remember them, if they are still a base's."""
        if self._known is not None:
            return
        own = {name: p.detach() for name, p in model.named_parameters() if model.difffit.trains(name)}
        if any(p.is_meta or bool((p != neutral(name)).any()) for name, p in own.items() if is_extra(name)):
            return
        table = model.y_embedder.embedding_table.weight.detach().clone()
        state = {name: p.clone() for name, p in own.items() if name != TABLE and not is_extra(name)}
        names = None if model.classes is None else model.classes.names
        self._known = Base(state, table, model.num_classes, names)

    # -- coming and going ----------------------------------------------------------------------------------------------
    def put(self, name: str, delta: Delta) -> None:
        """Add a delta, or replace the one of this name."""
        # In a state dict a dot is a boundary; the prefix keeps clear of what modules have themselves.
        key = self._keys.setdefault(name, "delta_" + quote(name, safe=" ").replace(".", "%2E"))
        self._modules[key] = delta

    def drop(self, name: str) -> None:
        """Let a delta go.

        Raises:
            DiffFitError: there is none of this name.
        """
        self._of(name)
        del self._modules[self._keys.pop(name)]

    def to_save(self, name: str, model: Any) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
        """A delta's tensors by parameter name, the configuration that goes with its classes, and what its file recorded."""
        tensors, delta = wear(model, name)
        if not model.difffit.class_embedding:
            del tensors[TABLE]
        assert isinstance(delta, Delta)
        recorded = {key: delta.header[key] for key in OF_MODELS if delta.header.get(key) is not None}
        return tensors, {**model.config, **delta.sizes(model)}, recorded

    # -- what a batch wears --------------------------------------------------------------------------------------------
    def worn(self, wearing: Wearing, strength: Strength, y: Tensor, dropout: float) -> tuple[Tensor, Tensor]:
        """Vectors, (P,) or for each sample (N, P), and class rows (N, D).

        Args:
            wearing: a delta's name, None for the base, one of these for each sample, or their numbers (N,) long.
            strength: one number, one for each sample (N,), or by name; None: 1.
            y: (N,) class of each sample, of its delta's.
            dropout: probability of the null class.

        Raises:
            DiffFitError: an unknown name or number, another length, a strength that is not finite.
            ValueError: a label that its delta does not have.
        """
        wearing, strength = self._read(wearing, strength, y)
        if isinstance(wearing, Tensor):
            return self._mixed(wearing, strength, y, dropout)
        delta, base = self._of(wearing), self._base()
        _check_labels(y, delta.num_classes, len(delta.classes) if wearing is not None else _rows(base), wearing)
        if dropout > 0:
            _check_dropout(delta.has_null_class, wearing)
            y = label_dropout(y, dropout, delta.num_classes)
        vectors, rows = delta.vectors, F.embedding(y, delta.classes)
        if strength is not None:
            vectors = torch.lerp(base.vectors, vectors, strength)
            rows = torch.lerp(F.embedding(delta.base_rows[y], base.classes), rows, strength)
        return vectors, rows

    def _mixed(self, index: Tensor, strength: Any, y: Tensor, dropout: float) -> tuple[Tensor, Tensor]:
        every, base = self._every(), self._base()
        first, rows_of, null_of = self._tables(every)
        index = index.to(first.device) + 1
        _check_index(index, len(every))
        most = rows_of[index]
        if not _visible(y):
            _assert((y >= 0) & (y < most), "a class label is none of its delta's")
        elif len(odd := ((y < 0) | (y >= most.to(y.device))).nonzero()):
            n, name = int(odd[0]), [None, *self.names][int(index[odd[0]])]
            _check_labels(y[n : n + 1], self._of(name).num_classes, int(most[n]), name)
        if dropout > 0:
            for name, delta in zip([None, *self.names], every, strict=True):
                _check_dropout(delta.has_null_class, name)
            y = label_dropout(y, dropout, null_of[index])
        # Embeddings, and not indices: their gradient is summed in a fixed order.
        vectors = F.embedding(index, torch.stack([delta.vectors for delta in every]))
        place = first[index] + y
        rows = F.embedding(place, torch.cat([delta.classes for delta in every]))
        if strength is not None:
            each = strength[:, None] if isinstance(strength, Tensor) and strength.dim() else strength
            partner = torch.cat([delta.base_rows for delta in every])[place]
            vectors = torch.lerp(base.vectors.expand_as(vectors), vectors, each)
            rows = torch.lerp(F.embedding(partner, base.classes), rows, each)
        return vectors, rows

    def _tables(self, every: list[_Worn]) -> tuple[Tensor, Tensor, Tensor]:
        """For the base and each delta: its first row in the table of all, how many a label may ask for, and the null class.

        They are kept on the device: a captured graph can copy nothing there.
        """
        device = self._base().vectors.device
        key = device, [(len(delta.classes), delta.num_classes) for delta in every]
        cached = self.__dict__.get("_cached_tables")
        if cached is None or cached[0] != key:
            sizes = torch.tensor([len(delta.classes) for delta in every])
            found = sizes.cumsum(0) - sizes, [_rows(delta) for delta in every], [delta.num_classes for delta in every]
            self.__dict__["_cached_tables"] = cached = (key, tuple(torch.as_tensor(x).to(device) for x in found))
        return cached[1]

    def _read(self, wearing: Any, strength: Any, y: Tensor) -> tuple[str | Tensor | None, Any]:
        """A name for all or numbers (N,); and the strength as None, a number, or (N,) beside numbers."""
        n, like = len(y), self._base().vectors
        names: list[str | None] | None = None
        if isinstance(wearing, Tensor):
            if wearing.shape != (n,) or wearing.dtype not in (torch.int64, torch.int32):
                raise DiffFitError(
                    f"delta must be the numbers of {n} deltas, ({n},) torch.long; got {tuple(wearing.shape)} {wearing.dtype}"
                )
        elif wearing is not None and not isinstance(wearing, str):
            if not isinstance(wearing, Sequence):
                raise DiffFitError(f"delta must be a name, None, a list of them or numbers (N,); got {wearing!r:.60}")
            names = list(wearing)
            if len(names) != n:
                raise DiffFitError(f"delta must name one delta for each of {n} samples; got {len(names)}")
        if isinstance(strength, Mapping):
            if isinstance(wearing, Tensor):
                raise DiffFitError("strength by name goes with deltas by name; give one number for each sample")
            for name in strength:
                self._of(name)
            each = [strength.get(name, 1.0) for name in (names if names is not None else [wearing])]  # type: ignore[list-item]
            strength = each if names is not None else each[0]
        strength = _strengths(strength, n, like)
        if names is not None:
            for name in names:
                self._of(name)
            wearing = names[0] if len(set(names)) == 1 else self.index(names)
        if isinstance(strength, Tensor) and strength.dim() and not isinstance(wearing, Tensor):
            wearing = self.index([wearing] * n)
        return wearing, strength


def shown_delta(name: str | None) -> str:
    """How messages call it."""
    return "the base" if name is None else f"the delta {name!r}"


def _rows(delta: _Worn) -> int:
    """Of its class table that labels may ask for."""
    return delta.num_classes + delta.has_null_class


def _visible(y: Tensor) -> bool:
    """Whether its values can be looked at without waiting for a device or stopping a compiler."""
    return y.device.type == "cpu" and type(y) is Tensor and not torch.compiler.is_compiling() and not transformed()


def _assert(condition: Tensor, message: str) -> None:
    torch._assert_async(condition.all(), message)


def _check_labels(y: Tensor, classes: int, rows: int, name: str | None) -> None:
    if not y.numel():
        return
    if not _visible(y):
        _assert((y >= 0) & (y < rows), "a class label is none of its delta's")
        return
    low, high = int(y.min()), int(y.max())
    if low < 0 or high >= rows:
        null = f", the null class is {classes}" if rows > classes else ", there is no null class"
        raise ValueError(f"class labels of {shown_delta(name)} must be in 0..{classes - 1}{null}; got {low}..{high}")


def _check_index(index: Tensor, count: int) -> None:
    if not _visible(index):
        _assert((index >= 0) & (index < count), "a delta's number is out of range")
    elif index.numel() and (int(index.min()) < 0 or int(index.max()) >= count):
        raise DiffFitError(
            f"the numbers of deltas must be in −1..{count - 2} (−1 the base); got {int(index.min()) - 1}..{int(index.max()) - 1}"
        )


def _check_dropout(has_null_class: bool, name: str | None) -> None:
    if not has_null_class:
        raise ValueError(f"labels cannot be dropped: {shown_delta(name)} has no null class")


def _strengths(strength: Any, n: int, like: Tensor) -> float | Tensor | None:
    """One number, or (N,) in the dtype of ``like``; None for 1."""
    if strength is None or (isinstance(strength, numbers.Real) and not isinstance(strength, bool)):
        if strength is not None and not math.isfinite(strength):
            raise DiffFitError(f"strength must be finite; got {strength}")
        return None if strength is None or strength == 1 else float(strength)
    if isinstance(strength, Tensor):
        found = strength.to(like)
    elif isinstance(strength, Sequence) and all(
        isinstance(s, numbers.Real) and not isinstance(s, bool) for s in strength
    ):
        found = torch.tensor([float(s) for s in strength], dtype=like.dtype, device=like.device)
    else:
        raise DiffFitError(f"strength must be a number, one for each sample, or numbers by name; got {strength!r:.60}")
    if found.shape not in ((), (n,)):
        raise DiffFitError(f"strength must be one number, or one for each of {n} samples; got {tuple(found.shape)}")
    if _visible(found) and not bool(torch.isfinite(found).all()):
        raise DiffFitError("strength must be finite; got NaN or infinity")
    return found


# -- loading -----------------------------------------------------------------------------------------------------------
def _check_name(name: Any) -> None:
    if not isinstance(name, str) or not name.strip() or ":" in name or "=" in name:
        raise DiffFitError(f"a delta's name must be text without ':' and '='; got {name!r}")


@torch.no_grad()
def load_deltas(model: Any, paths: Mapping[str, str | os.PathLike[str]]) -> dict[str, dict[str, Any]]:
    """Load deltas beside each other into ``model``, a FastDiffFitDiT; those of the same name are replaced. All or none.

    Returns:
        What each file records.

    Raises:
        DeltaMismatchError: a delta was made for another size, set of trainables or base; the message names both sides.
        DiffFitError: a file cannot be read, a name is none, or what the base was cannot be told.
    """
    deltas: Deltas = model.deltas
    for name in paths:
        _check_name(name)
    base = deltas.prepare(model)
    assert deltas.layout is not None
    made, like = {}, model.x_embedder.proj.bias
    own = {name: p for name, p in model.named_parameters() if model.difffit.trains(name)}
    trained = model.difffit.class_embedding
    for name, path in paths.items():
        tensors, header = read_delta(path)
        check_delta(model, header, str(path), classes=not trained)
        config = header["config"]
        rows = config["num_classes"] + (config["class_dropout_prob"] > 0)
        if trained:
            own[TABLE] = own[TABLE].new_empty(rows, model.hidden_size, device="meta")
        check_tensors(own, tensors, str(path))
        table = tensors[TABLE].to(like) if trained else model.y_embedder.embedding_table.weight.detach().clone()
        partner = base_rows(base, config["num_classes"], rows, header.get("class_names"))
        flat = deltas.layout.flatten(tensors).to(like)
        made[name] = Delta(flat, table, partner.to(like.device), config["num_classes"], header, trained)
    for name, delta in made.items():
        deltas.put(name, delta)
    return {name: delta.header for name, delta in made.items()}


@torch.no_grad()
def add_delta(
    model: Any,
    name: str,
    *,
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
    classes: str = "match",
) -> Delta:
    """A new delta that changes nothing yet, to be trained beside others; its parameters require gradients.

    Args:
        num_classes, class_names, classes: of its domain, as in :meth:`.fast_dit.FastDiffFitDiT.from_pretrained`.

    Raises:
        DiffFitError: a name that is none, or taken; classes that cannot be chosen so, or are not trained.
    """
    deltas: Deltas = model.deltas
    _check_name(name)
    if name in deltas:
        raise DiffFitError(f"there is a delta {name!r} already; drop it first (drop_delta)")
    base = deltas.prepare(model)
    known = base.classes[: _rows(base)]
    if num_classes is None:
        num_classes = base.num_classes if class_names is None else len(class_names)
    chosen = choose_rows(base.class_names, base.num_classes, class_names, num_classes, classes)
    if chosen.new:
        warnings.warn(f"the delta {name!r}: {chosen.said}", stacklevel=3)
    trained = model.difffit.class_embedding
    if not trained and chosen.moved is not None:
        raise DiffFitError(
            f"difffit={model.difffit.name} does not train the class embedding: the classes are the base's"
        )
    table = class_table(known, chosen, base.has_null_class).to(base.classes).clone()
    names = None if chosen.names is None else list(chosen.names)
    partner = base_rows(base, num_classes, len(table), names)
    delta = Delta(base.vectors.clone(), table, partner.to(table.device), num_classes, {"class_names": names}, trained)
    delta.requires_grad_(True)
    deltas.put(name, delta)
    return delta


def wear(model: Any, name: str | Own | None, strength: float = 1.0) -> tuple[dict[str, Tensor], _Worn]:
    """Parameters by name, as a delta file holds them, of a delta that ``model`` has or of its own, at this strength; and it.

    Raises:
        DiffFitError: an unknown delta, a strength that is not finite, or a base that cannot be told.
    """
    deltas: Deltas = model.deltas
    base = deltas.prepare(model)
    assert deltas.layout is not None
    delta = _own(model, base) if name is OWN else deltas.of(name)  # type: ignore[arg-type]
    factor = _strengths(strength, 1, base.vectors)
    vectors, rows = delta.vectors.detach(), delta.classes.detach()[: _rows(delta)]
    if factor is not None:
        vectors = torch.lerp(base.vectors, vectors, factor)
        rows = torch.lerp(base.classes[delta.base_rows[: len(rows)]], rows, factor)
    return {**deltas.layout.unflatten(vectors), TABLE: rows}, delta


def _own(model: Any, base: _BaseDelta) -> Delta:
    """The model's own parameters as a delta."""
    assert model.deltas.layout is not None
    flat = model.deltas.layout.flatten({name: p for name, p in model.named_parameters()}).to(base.vectors)
    names = None if model.classes is None else model.classes.names
    table = model.y_embedder.embedding_table.weight.detach()
    partner = base_rows(base, model.num_classes, len(table), names).to(table.device)
    return Delta(flat, table, partner, model.num_classes, {"class_names": names}, model.difffit.class_embedding)


def base_rows(base: _BaseDelta, count: int, rows: int, names: Sequence[str] | None) -> Tensor:
    """The row of the base's class table that each row of a delta's goes with, (rows,) long; see this module's docstring.

    Args:
        count, rows: classes of the delta, and rows of its table.
        names: of its classes.
    """
    chosen = choose_rows(base.class_names, base.num_classes, names, count, "match").rows
    null = base.num_classes
    return torch.tensor([null if row is None else row for row in chosen] + [null] * (rows - count), dtype=torch.long)
