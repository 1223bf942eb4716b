"""What is printed, where nobody may be listening: a reader that goes away, or a terminal with another alphabet, ends nothing."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Any

_GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO)  # a reader that left, a terminal that was closed


class Voice:
    """A text stream that falls silent when its reader goes, where the stream itself would raise.

    Everything but writing is the stream's own.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._gone = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        if not self._gone:
            with self._listening():
                self._stream.write(text)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        if not self._gone:
            with self._listening():
                self._stream.flush()

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        try:
            yield
        except ValueError:  # the stream was closed
            self._gone = True
        except OSError as error:
            if error.errno not in _GONE:
                raise
            self._gone = True
            # What is left in buffers goes nowhere when the process ends, and what libraries print themselves.
            with contextlib.suppress(OSError, ValueError, AttributeError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)


@contextlib.contextmanager
def voices() -> Iterator[None]:
    """Standard output and error as :class:`Voice`; what their alphabet lacks is written as escapes, as in ``\\xe9``."""
    before = sys.stdout, sys.stderr
    opened = []
    for name, stream in zip(("stdout", "stderr"), before, strict=True):
        if stream is None:  # closed from the start (>&-)
            stream = open(os.devnull, "w")  # noqa: SIM115 (closed below)
            opened.append(stream)
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, Voice(stream))
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = before
        for stream in opened:
            stream.close()
