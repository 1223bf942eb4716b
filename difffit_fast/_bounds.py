"""Which numbers a setting can be; every command and the functions behind it refuse the same ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ._words import shown
from .errors import DiffFitError


@dataclass(frozen=True)
class Bounds:
    """The numbers from ``low`` (itself left out where ``open``) up to, and not including, ``below``."""

    low: float
    below: float = math.inf
    open: bool = False

    def objection(self, value: float) -> str | None:
        """What ``value`` fails to be, as in "must be ..."; None where it is within. NaN never is."""
        if self.low == -math.inf == -self.below:
            return None if math.isfinite(value) else "finite"
        from_low = (
            "positive" if self.open and not self.low else f"{'more than' if self.open else 'at least'} {self.low}"
        )
        to_high = "finite" if self.below == math.inf else f"less than {self.below}"
        if not (value > self.low or (value == self.low and not self.open)):
            return from_low
        return None if value < self.below else f"{from_low} and {to_high}"


# Whole numbers end where 64 bits do; seeds have no sign.
FROM_ONE, FROM_ZERO, SEED = Bounds(1, 1 << 63), Bounds(0, 1 << 63), Bounds(0, 1 << 64)
NOT_NEGATIVE, POSITIVE, FRACTION = Bounds(0), Bounds(0, open=True), Bounds(0, below=1)
ANY = Bounds(-math.inf, open=True)
# Far beyond what anybody means.
STEPS, BATCH, IMAGES = Bounds(1, 10**5), Bounds(1, 1 << 20), Bounds(1, 10**9)
SIDE, GUIDANCE = Bounds(1, 1 << 16), Bounds(0, 1000)
CLASS_COUNT, WORKERS, GRID = Bounds(1, 10**7), Bounds(0, 1 << 10), Bounds(1, 10**4)


def check_whole(what: str, value: Any, bounds: Bounds) -> None:
    """Raise a :class:`DiffFitError` unless ``value`` is a whole number within ``bounds``."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise DiffFitError(f"{what} must be a whole number; got {shown(value)}")
    check_number(what, value, bounds)


def check_number(what: str, value: Any, bounds: Bounds) -> None:
    """Raise a :class:`DiffFitError` unless ``value`` is a number within ``bounds``; NaN never is."""
    if isinstance(value, bool) or not (hasattr(value, "__index__") or hasattr(value, "__float__")):
        raise DiffFitError(f"{what} must be a number; got {shown(value)}")
    if objection := bounds.objection(value):
        raise DiffFitError(f"{what} must be {objection}; got {shown(value)}")
