"""Being told to stop: SIGTERM and Ctrl-C end a run after the current step, with a checkpoint."""

from __future__ import annotations

import signal
import threading
from typing import Any


class Interrupt:
    """A context in which SIGTERM and SIGINT set :attr:`number`; a second Ctrl-C raises ``KeyboardInterrupt`` at once.

    Outside the main thread, where Python cannot catch signals, nothing is changed.
    """

    def __init__(self) -> None:
        self.number = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._previous = {n: signal.signal(n, self._note) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        if self.number and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number
