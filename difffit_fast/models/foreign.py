"""Parts that others keep beside a DiT among its keys, and that it does not need; known by the first word of their keys.

Only what is listed here is left out, and that is said. Whatever else a file has beside a DiT's keys may belong to the
function that was trained, and is refused.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable

FOREIGN = {
    "projectors": "the projectors of REPA",  # Yu et al. 2025: they align hidden states with another encoder's, in training
}


class LeftOutWarning(UserWarning):
    """A foreign part was left out; what describes a file tells it otherwise."""


def is_foreign(key: str) -> bool:
    """Whether a key, without what leads to the model, is of a part in :data:`FOREIGN`."""
    return key.split(".")[0] in FOREIGN


def parts(keys: Iterable[str]) -> list[str]:
    """The foreign parts among ``keys``: "the projectors of REPA: 18 tensors under projectors.*"."""
    counts = Counter(key.split(".")[0] for key in keys if is_foreign(key))
    return [
        f"{FOREIGN[root]}: {count} tensor{'s' if count > 1 else ''} under {root}.*" for root, count in counts.items()
    ]


def say_left_out(found: Iterable[str], source: str, stacklevel: int = 2) -> None:
    """Warn, once for all of them, that the :func:`parts` that were found are left out."""
    if told := "; ".join(part.replace(":", " are left out:", 1) for part in found):
        warnings.warn(f"{source}: {told}", LeftOutWarning, stacklevel=stacklevel + 1)
