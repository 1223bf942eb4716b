"""How the learning rate goes over a run."""

from __future__ import annotations

import math
from collections.abc import Callable

# What is left of the rate when a part of the steps after the warm-up, from 0 to 1, is done.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),  # Loshchilov and Hutter, 2017, without restarts
    "linear": lambda done: 1.0 - done,
}


def rate_factor(step: int, warmup: int, total: int, schedule: str) -> float:
    """What the learning rate is multiplied by at step number ``step``, from 0 on, of ``total``.

    It rises linearly over the first ``warmup`` steps to 1, which step ``warmup`` - 1 has, and step ``warmup`` too; then it
    follows ``schedule``, which would be at its end one step after the last.

    >>> [round(rate_factor(step, 2, 6, "linear"), 2) for step in range(6)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    if step < warmup:
        return (step + 1) / warmup
    return SCHEDULES[schedule]((step - warmup) / max(1, total - warmup) if step < total else 1.0)
