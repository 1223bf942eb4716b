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
    """A text stream that falls silent when it cannot be written to, where the stream itself would raise.

    Everything but writing is the stream's own.

    Attributes:
        loss: why text was lost that somebody may still wait for, such as a full disk; None where nobody reads any more.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._silent = False
        self.loss: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        if not self._silent:
            with self._listening():
                try:
                    self._stream.write(text)
                except UnicodeEncodeError as error:  # a stream of somebody else's, which is left as it is
                    self._stream.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        if not self._silent:
            with self._listening():
                self._stream.flush()

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        try:
            yield
        except BlockingIOError:  # a terminal that is too slow loses a line
            pass
        except ValueError:  # the stream was closed
            self._silent = True
        except OSError as error:
            self._silent = True
            self.loss = None if error.errno in _GONE else error
            # What is left in buffers goes nowhere when the process ends, and what libraries print themselves.
            with contextlib.suppress(OSError, ValueError, AttributeError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)


@contextlib.contextmanager
def voices() -> Iterator[tuple[Voice, Voice]]:
    """Standard output and error as :class:`Voice`; what their alphabet lacks is written as escapes, as in ``\\xe9``."""
    _keep_descriptors()
    before = sys.stdout, sys.stderr
    opened = []
    for name, stream in zip(("stdout", "stderr"), before, strict=True):
        if stream is None:  # closed from the start (>&-)
            stream = open(os.devnull, "w")  # noqa: SIM115 (closed below)
            opened.append(stream)
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, Voice(stream))
    ours = sys.stdout, sys.stderr
    try:
        yield ours
    finally:
        for stream in ours:
            stream.flush()
        sys.stdout, sys.stderr = before
        for stream in opened:
            stream.close()


def _keep_descriptors() -> None:
    """Open what of 0, 1 and 2 is closed, lest a checkpoint get that number and a library print into it."""
    with contextlib.suppress(OSError):
        while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass
        os.close(descriptor)
