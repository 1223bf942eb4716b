"""Crash points: a process that dies, as by a power cut of its own, at its n-th change to the files below a folder.

What was written and not yet flushed is lost with it, so files are torn as well as missing.
"""

from __future__ import annotations

import os
import sys
from typing import Any

CODE = 77  # what it exits with
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod"}


def install(below: str, at: int, report: str) -> None:
    """Die at change number ``at``, from 1 on; keep the number of changes so far in the file ``report``.

    Changes are what Python itself is about to do: an audit hook sees them whatever library asks, before they happen.
    """
    seen = 0
    busy = False

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen, busy
        if busy or not (event == "open" or event in _CHANGES) or not arguments:
            return
        path = arguments[0]
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & _WRITING):
            return
        if not isinstance(path, (str, bytes, os.PathLike)) or not os.path.abspath(os.fsdecode(path)).startswith(below):
            return
        seen += 1
        if seen >= at:
            os._exit(CODE)
        busy = True
        with open(report, "w") as file:
            file.write(str(seen))
        busy = False

    sys.addaudithook(hook)
