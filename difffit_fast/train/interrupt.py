"""Being told to stop: SIGTERM, Ctrl-C and a terminal that closes end a run after the current step, with a checkpoint."""

from __future__ import annotations

import signal
import threading
from typing import Any


class Interrupt:
    """A context in which SIGTERM, SIGINT and SIGHUP set :attr:`number`; a second Ctrl-C raises ``KeyboardInterrupt`` at once.

    A hang-up that is ignored already (``nohup``) stays ignored. Outside the main thread, where Python cannot catch signals,
    nothing is changed.
    """

    def __init__(self) -> None:
        self.number = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            asked = [signal.SIGTERM, signal.SIGINT]
            hang_up = getattr(signal, "SIGHUP", None)  # not on Windows
            if hang_up is not None and signal.getsignal(hang_up) != signal.SIG_IGN:
                asked.append(hang_up)
            self._previous = {n: signal.signal(n, self._note) for n in asked}
        return self

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        if self.number and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number
