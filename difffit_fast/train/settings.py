"""What a setting is. Its field declares everything about it, once; flags, files, checks and resuming read it there."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import typing
from dataclasses import dataclass, field, fields
from typing import Any

from .._bounds import Bounds
from .._words import shown
from ..errors import DiffFitError

_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "keys and values"}


@dataclass(frozen=True)
class Setting:
    """One setting, as its field declares it.

    Attributes:
        group: the heading of ``--help`` that it stands under.
        help: what it is, for ``--help``.
        steers: whether what is computed at a step depends on it. One that steers makes another run of a run; the others
            may change when a run goes on.
        bounds: of a number.
        choices: what a text can be, besides the default.
        rival: the setting that cannot be given together with this one.
        part_of_model: whether the tensors of a checkpoint mean something else without it.
        null: what a null in a file stands for, where None is not a value.
        unrecorded: what runs did that were written before this was a setting; None where nothing is known.
        name, kind, optional, default: the field's own; ``optional`` where it may be None.
    """

    group: str
    help: str
    steers: bool
    bounds: Bounds | None = None
    choices: tuple[str, ...] | None = None
    rival: str | None = None
    part_of_model: bool = False
    null: Any = None
    unrecorded: Any = None
    name: str = ""
    kind: type = str
    optional: bool = False
    default: Any = None

    def coerce(self, value: Any) -> Any:
        """``value`` in the setting's type: YAML reads 1e-3 as text and 1 as an integer.

        Raises:
            DiffFitError: it is of another type.
        """
        if value is None:
            value = self.null
        if value is None and self.optional:
            return None
        if isinstance(value, bool) and "on" in (self.choices or ()):
            value = "on" if value else "off"  # YAML reads these words as true and false
        if self.kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
            try:
                return float(value)
            except OverflowError:
                return math.inf if value > 0 else -math.inf  # a whole number that no float reaches
            except ValueError:
                pass
        if self.kind is int and isinstance(value, float) and value.is_integer():
            return int(value)
        if self.kind is str and isinstance(value, os.PathLike):
            return os.fspath(value)
        if isinstance(value, self.kind) and not (self.kind is int and isinstance(value, bool)):
            return dict(value) if self.kind is dict else value
        expected = f"one of {', '.join(self.choices)}" if self.choices else _KINDS[self.kind]
        raise DiffFitError(f"{flag(self.name)} must be {expected}; got {shown(value)}")

    def check(self, value: Any) -> None:
        """Compare a value of the right type with choices and bounds.

        Raises:
            DiffFitError: it is not among them.
        """
        if self.choices and value not in (*self.choices, self.default):
            raise DiffFitError(f"{flag(self.name)} must be one of {', '.join(self.choices)}; got {value!r}")
        objection = self.bounds.objection(value) if self.bounds and value is not None else None
        if objection:
            raise DiffFitError(f"{flag(self.name)} must be {objection}; got {shown(value)}")


def option(group: str, default: Any, help: str, *, steers: bool, **declared: Any) -> Any:
    """A dataclass field that is a :class:`Setting`; ``declared`` are further attributes of it."""
    metadata = {"setting": Setting(group, help, steers, **declared)}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


@functools.cache
def settings_of(cls: type) -> dict[str, Setting]:
    """The settings that a dataclass declares, by name, in its order."""
    hints = typing.get_type_hints(cls)
    found = {}
    for f in fields(cls):
        members = typing.get_args(hints[f.name])
        found[f.name] = dataclasses.replace(
            f.metadata["setting"],
            name=f.name,
            kind=next((t for t in members if t is not type(None)), hints[f.name]),
            optional=type(None) in members,
            default=f.default if f.default is not dataclasses.MISSING else f.default_factory(),
        )
    return found


def flag(name: str) -> str:
    """The flag of a setting: ``data_path`` -> ``--data-path``."""
    return "--" + name.replace("_", "-")
