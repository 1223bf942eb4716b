"""Which row of a base's class table a class of the data starts from: by name, and where the names leave it open, by place."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher

from .._words import first_few
from ..errors import DiffFitError

CLASSES = ("match", "keep", "new")
_DOTTED, _NUMBERED = re.compile(r"^\d+\.\s*(?=[^\W\d])"), re.compile(r"^\d+[\s._-]+(?=[^\W\d])")


@dataclass(frozen=True)
class ClassRows:
    """The rows of a class table, by those of the base's.

    Attributes:
        names: of the classes, in the order of the rows; None where they are not known.
        rows: of the base's table, one a class; None for a class that is new.
        like: the base's row that a new class starts from; None for the mean of them all, and for all that are not new.
        count: the classes of the base.
        drawn: whether new rows are drawn from N(0, 0.02) instead, as in DiT's initialisation.
        said: what was done, in one line.
    """

    names: tuple[str, ...] | None
    rows: tuple[int | None, ...]
    like: tuple[int | None, ...]
    count: int
    drawn: bool = False
    said: str = ""

    @property
    def new(self) -> int:
        """How many classes are new."""
        return self.rows.count(None)

    @property
    def moved(self) -> list[int | None] | None:
        """``rows``; None where they are the base's, all and in their order."""
        return None if self.rows == tuple(range(self.count)) else list(self.rows)

    def after(self, first: ClassRows | None) -> ClassRows:
        """The same by the rows of the base that ``first`` began with, where these are of the table that it made."""
        if first is None:
            return self
        if self.moved is None:
            return first if self.names is None else replace(first, names=self.names)
        rows = tuple(None if row is None else first.rows[row] for row in self.rows)
        return replace(self, rows=rows, count=first.count)


def choose_rows(
    base: Sequence[str] | None, count: int, names: Sequence[str] | None, classes: int, mode: str = "match"
) -> ClassRows:
    """The rows for ``classes`` classes of a base that has ``count``.

    ``match``: a class takes the row of its name (:func:`match_names`); another one is new and starts from the row of the
    name most like its own (:func:`closest_row`), or from the mean of the base's rows. Where one of the
    two has no names: the base's rows in their order if there are as many, else all new and drawn from N(0, 0.02).
    ``keep``: no class is new. All have a row by name, or there are as many as in the base and each takes the row of its
    number, which must not be another class's by name. ``new``: all are new and drawn.

    Args:
        base, names: names of the base's classes and of the new ones, in the order of their rows; None: not known.

    Raises:
        DiffFitError: another mode, names that are not as many as the classes, or nothing to ``keep``.
    """
    if mode not in CLASSES:
        raise DiffFitError(f"classes must be one of {', '.join(CLASSES)}; got {mode!r}")
    if names is not None and len(names) != classes:
        raise DiffFitError(f"class_names must name {classes} classes; got {len(names)}")
    if base is not None and len(base) != count:
        base = None  # they name some other table
    told = None if names is None else tuple(names)
    unknown = (None,) * classes
    if mode == "new":
        return ClassRows(told, unknown, unknown, count, True, f"classes: {classes} new, their rows drawn at random")
    if base is not None and names is not None:
        rows = match_names(base, names)
        if mode == "match" or None not in rows:
            return _by_name(base, names, rows)
    if mode == "keep":
        _check_kept(base, count, names, classes)
    if mode == "keep" or classes == count:
        why = "the base records no names; " if base is None and names is not None else ""
        said = f"classes: {why}row i of the base for class i, {count} of {count}"
        return ClassRows(told, tuple(range(count)), unknown, count, False, said)
    why = "the base records no names and" if base is None else "the base"
    said = f"classes: {classes} new, their rows drawn at random: {why} has {count}"
    return ClassRows(told, unknown, unknown, count, True, said)


def match_names(base: Sequence[str], names: Sequence[str]) -> tuple[int | None, ...]:
    """The base's row for each name, None where it has none: by the names as they are, then as folders (:func:`class_of`), then
    as :func:`plain` has them, then without the number that they begin with (``001.Albatross``).

    A name that occurs twice in one of the lists, as they are compared, says nothing; no row is taken twice.
    """
    if list(base) == list(names):
        return tuple(range(len(names)))
    rows: list[int | None] = [None] * len(names)
    for form in (_as_they_are, _as_folders, _plain, _without_numbers):
        theirs, ours = form(base), form(names)
        known = {name: row for row, name in enumerate(theirs) if name}
        often = {name for part in (theirs, ours) for name, times in Counter(part).items() if times > 1}
        taken = set(rows)
        for i, name in enumerate(ours):
            row = known.get(name)
            if rows[i] is None and name not in often and row not in taken:
                rows[i] = row
    return tuple(rows)


def class_of(folder: str) -> str:
    """The class whose images a folder of this name holds: the name itself, but A for ``upper_A`` and a for ``lower_a``.

    Folders whose names differ in nothing but case are one folder on many file systems, so single letters have a second way
    to be written.

    >>> class_of("upper_A"), class_of("lower_a"), class_of("upper_arm")
    ('A', 'a', 'upper_arm')
    """
    case, _, letter = folder.partition("_")
    if len(letter) == 1 and ((case == "upper" and letter.isupper()) or (case == "lower" and letter.islower())):
        return letter
    return folder


def composed(name: str) -> str:
    """``name`` with its accents composed (NFC): file systems differ in that, and no one sees it."""
    return unicodedata.normalize("NFC", name)


def plain(name: str) -> str:
    """A class's name without what spelling adds: Unicode composed (NFC), lower case, one space for ``_``, ``-`` and spaces."""
    folded = composed(composed(name).casefold())
    return " ".join(re.split(r"[\s_-]+", folded)).strip()


def closest_row(base: Sequence[str], name: str) -> int | None:
    """The row of the name in ``base`` most like ``name``; None where nothing is alike.

    Most alike is the largest share of common words (of three letters or more) in all words of both; a word of four letters
    or more that lies in another counts half. Among equals, the greatest likeness of the letters, then the first.
    """
    words = _words(name)
    shares = [_share(words, _words(other)) for other in base]
    best = max(shares, default=0.0)
    if not best:
        return None
    text = plain(name)
    equals = [row for row, share in enumerate(shares) if share == best]
    return max(equals, key=lambda row: (SequenceMatcher(None, text, plain(base[row]), False).ratio(), -row))


def _as_they_are(names: Sequence[str]) -> list[str]:
    return list(names)


def _as_folders(names: Sequence[str]) -> list[str]:
    return [class_of(name) for name in names]


def _plain(names: Sequence[str]) -> list[str]:
    return [plain(name) for name in names]


def _without_numbers(names: Sequence[str]) -> list[str]:
    """Plain names without leading numbers: ``001.`` anywhere, ``3-`` only where every name has one (not ``3-wheeler``)."""
    number = _NUMBERED if all(_NUMBERED.match(name) for name in names) else _DOTTED
    return _plain([number.sub("", name) for name in names])


def _words(name: str) -> frozenset[str]:
    return frozenset(word for word in re.findall(r"[^\W\d_]+", plain(name)) if len(word) >= 3)


def _share(words: frozenset[str], others: frozenset[str]) -> float:
    common = words & others
    within = any((a in b or b in a) and min(len(a), len(b)) >= 4 for a in words - common for b in others - common)
    return (len(common) + 0.5 * within) / max(1, len(words | others))


def _by_name(base: Sequence[str], names: Sequence[str], rows: tuple[int | None, ...]) -> ClassRows:
    like = tuple(closest_row(base, name) if row is None else None for name, row in zip(names, rows, strict=True))
    found = [(name, base[row]) for name, row in zip(names, rows, strict=True) if row is not None]
    said = f"classes: {len(found)} of {len(names)} by name"
    if other := [f"{theirs!r} for {ours!r}" for ours, theirs in found if ours != theirs]:
        said += f" ({first_few(other)})"
    if new := [
        f"{name!r} from {'the mean' if source is None else repr(base[source])}"
        for name, row, source in zip(names, rows, like, strict=True)
        if row is None
    ]:
        said += f", {len(new)} new ({first_few(new)})"
    if left := [repr(name) for row, name in enumerate(base) if row not in set(rows)]:
        said += f"; {len(left)} of the base's are dropped ({first_few(left)})"
    return ClassRows(tuple(names), rows, like, len(base), False, said)


def _check_kept(base: Sequence[str] | None, count: int, names: Sequence[str] | None, classes: int) -> None:
    """Raise unless row i of the base can be class i's: as many, and none of the names says otherwise."""
    rows = (None,) * classes if base is None or names is None else match_names(base, names)
    if classes == count and all(row in (None, i) for i, row in enumerate(rows)):
        return
    told = (
        f"keeping the base's class table makes no class new, but there are {classes} classes and the base has {count}"
    )
    if base is not None and names is not None:
        ours = [repr(name) for name, row in zip(names, rows, strict=True) if row is None]
        theirs = [repr(name) for row, name in enumerate(base) if row not in rows]
        told += f"; only the base has {first_few(theirs) or 'none'}, only the new ones {first_few(ours) or 'none'}"
    raise DiffFitError(f"{told} (classes: match or new makes rows for them)")
