"""Which classes the model has, in which order, and which of them a label of the data means: by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from .._words import first_few
from ..data import TrainingData
from ..data.listing import class_order
from ..errors import DiffFitError
from ..models.checkpoint import ModelFile
from ..models.classes import ClassRows, match_names
from .config import TrainConfig


@dataclass(frozen=True)
class Classes:
    """The classes of a run.

    Attributes:
        names: of the model's classes, in the order of the rows of its class table.
        training, validation: the model's class for each label of that data.
    """

    names: list[str]
    training: list[int]
    validation: list[int]

    @property
    def shown(self) -> list[int]:
        """The classes that training images are of."""
        return sorted(set(self.training))

    @property
    def said(self) -> str:
        """Which classes no training image is of; "" where there are none."""
        rest = [repr(name) for label, name in enumerate(self.names) if label not in set(self.training)]
        return f"classes: {len(rest)} of {len(self.names)} have no training image ({first_few(rest)})" if rest else ""


def choose_classes(
    config: TrainConfig,
    data: TrainingData,
    validation: TrainingData | None = None,
    model: nn.Module | None = None,
    base: ModelFile | None = None,
) -> Classes:
    """The classes of the model: those of the training data, then those of the validation data that are not among them and
    have a row in the checkpoint by name, then as many without images as ``--num-classes`` asks for. With ``--classes keep``
    those of the checkpoint, all in their order, where all of the data's are among them by name. A given ``model`` has its
    own.

    Raises:
        DiffFitError: a class of the validation data has neither training images nor a row, or numbers contradict each other.
    """
    ours = list(data.class_names)
    others = [] if validation is None else class_order(set(validation.class_names) - set(ours))
    rows: list[int | None] = list(range(len(ours)))
    if model is not None:
        names = ours + (class_names_of(model) or [])[len(ours) :]
        rows += [names.index(name) if name in names else None for name in others]
    else:
        names, known = ours + others, _named_rows(config, base)
        found = match_names(known, names)
        rows += [None if found[label] is None else label for label in range(len(ours), len(names))]
        if config.classes == "keep" and None not in found:
            names, rows = list(known), list(found)
            for row, name in zip(found, ours + others, strict=True):
                names[row] = name  # as the data spells it
    if None in rows:
        raise DiffFitError(
            f"no training image is of the class {(ours + others)[rows.index(None)]!r} of the validation data, and "
            f"{_why_no_row(config, model, base)}"
        )
    names += [f"class {i}" for i in range(len(names), _count(config, model, len(names)))]
    labels = dict(zip(ours + others, rows, strict=True))
    training = rows[: len(ours)]
    if validation is None or list(validation.class_names) == ours:
        return Classes(names, training, training)
    return Classes(names, training, [labels[name] for name in validation.class_names])


def class_names_of(model: nn.Module) -> list[str] | None:
    """The names of the classes that a model was made with, where it knows them."""
    chosen = getattr(model, "classes", None)
    return list(chosen.names) if isinstance(chosen, ClassRows) and chosen.names is not None else None


def _named_rows(config: TrainConfig, base: ModelFile | None) -> Sequence[str]:
    """The names of the rows that classes can start from."""
    return (base.class_names or []) if base is not None and config.classes != "new" else []


def _why_no_row(config: TrainConfig, model: nn.Module | None, base: ModelFile | None) -> str:
    if model is not None:
        return "the model has none of that name"
    if base is None:
        return "there is no --ckpt that could have a row for it"
    if config.classes == "new":
        return "--classes new makes all rows anew"
    return (
        f"--ckpt {config.ckpt} has none of that name" if base.class_names else f"--ckpt {config.ckpt} records no names"
    )


def _count(config: TrainConfig, model: nn.Module | None, named: int) -> int:
    """The classes of the model: its own number, or what the settings say, or those that have names; never fewer than these."""
    own = getattr(model, "num_classes", None)
    if own is not None and config.num_classes is not None and own != config.num_classes:
        raise DiffFitError(f"the model has {own} classes, but --num-classes is {config.num_classes}")
    count = own or config.num_classes or named
    if count < named:
        raise DiffFitError(f"the data has {named} classes, more than the {count} of the model (--num-classes)")
    return count
