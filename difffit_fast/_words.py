"""Small help with words in messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(word: str, known: Iterable[str]) -> str:
    """The member of ``known`` that looks most like ``word``."""
    return difflib.get_close_matches(word, list(known), n=1, cutoff=0.0)[0]


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its kind where it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
