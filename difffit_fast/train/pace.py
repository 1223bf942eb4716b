"""How fast a run is going."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class Pace:
    """Steps per second since the last :meth:`restart`, without the time spent under :meth:`stopped`."""

    def __init__(self, step: int) -> None:
        self.restart(step)

    def restart(self, step: int) -> None:
        self._begin, self._step = time.perf_counter(), step

    def rate(self, step: int) -> float:
        """Steps per second up to ``step``; 0 where there was none yet."""
        seconds = time.perf_counter() - self._begin
        return (step - self._step) / seconds if seconds > 0 else 0.0

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._begin += time.perf_counter() - begin
