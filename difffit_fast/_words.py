"""Small help with words in messages."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from typing import Any


def nearest(word: str, known: Iterable[str]) -> str:
    """The member of ``known`` that looks most like ``word``."""
    return difflib.get_close_matches(word, list(known), n=1, cutoff=0.0)[0]


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its kind where it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def shown(value: Any) -> str:
    """``value`` in a sentence; not all of the digits of a number that nobody can have meant."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"a number of about {round(value.bit_length() * math.log10(2))} digits"
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:60]} ... {text[-20:]}"


def first_few(words: Sequence[str]) -> str:
    """The first three of ``words``."""
    return ", ".join(words[:3]) + (", …" if len(words) > 3 else "")
