"""Find the PyTorch of the environment that is installed into, from within a build that is isolated from it.

pip, uv and build compile a package in an environment of their own that holds ``build-system.requires`` and nothing else.
PyTorch is not among these on purpose: the build would then fetch gigabytes, and of the wrong build. Instead the interpreter
of the environment that is installed into is asked where it finds PyTorch, and that place is borrowed, for imports alone.

pip    runs the build with that very interpreter and hides its packages through PYTHONPATH and PYTHONNOUSERSITE.
uv     runs it in a temporary environment; uv's own arguments, variables and folder say which environment it serves.
build  runs it in a temporary environment; the process above is the interpreter of the real one.

What the process above was started with is read from /proc, so on other systems than Linux only pip's case is found, and
DIFFFIT_FAST_PYTHON=/path/to/python names the interpreter in the others.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any, NamedTuple

_ASK = """
import importlib.util, json, sys, sysconfig
spec = importlib.util.find_spec("torch")
print(json.dumps({"soabi": sysconfig.get_config_var("SOABI"), "path": [p for p in sys.path if p], "prefix": sys.prefix,
                  "torch": bool(spec and spec.origin)}))
"""


class Process(NamedTuple):
    """The program that runs this build: how it was called, with which variables, in which folder."""

    arguments: list[str]
    environment: dict[str, str]
    folder: Path


class Borrowed:
    """A finder of last resort: imports from folders that are not on ``sys.path``.

    On ``sys.path`` the folders would also offer their packages' setuptools plugins to this build.
    """

    def __init__(self, folders: list[str]) -> None:
        self.folders = folders

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return PathFinder.find_spec(name, self.folders, target) if path is None else None


def installer() -> Process:
    """The process above this one; where it cannot be seen, one with this process's variables and folder."""
    try:
        process = Path("/proc") / str(os.getppid())
        arguments = [os.fsdecode(part) for part in (process / "cmdline").read_bytes().split(b"\0")[:-1]]
        pairs = [os.fsdecode(part).partition("=") for part in (process / "environ").read_bytes().split(b"\0")]
        return Process(arguments, {name: value for name, _, value in pairs if name}, (process / "cwd").resolve())
    except OSError:
        hidden = ("PYTHONPATH", "PYTHONNOUSERSITE")  # set by pip for the build
        return Process([], {k: v for k, v in os.environ.items() if k not in hidden}, Path.cwd())


def interpreters(above: Process) -> list[Path]:
    """Interpreters that may be the one of the environment that is installed into, the likeliest first."""
    named = os.environ.get("DIFFFIT_FAST_PYTHON")
    if named:
        return [_interpreter(Path(named))]
    if above.arguments and Path(above.arguments[0]).name in ("uv", "uvx", "uv.exe"):
        return _interpreters_of_uv(above)
    found = [Path(sys.executable)]
    if above.arguments and Path(above.arguments[0]).name.startswith("python"):
        found.append(above.folder / above.arguments[0])
    return list(dict.fromkeys(found))


def _interpreters_of_uv(uv: Process) -> list[Path]:
    """In uv's own order: --python, UV_PYTHON, the environment that is active, .venv in the folder or above it."""
    options = _options(uv.arguments)
    folder = uv.folder / options.get("--project", options.get("--directory", "."))
    for asked in (options.get("--python"), uv.environment.get("UV_PYTHON")):
        if asked and (uv.folder / asked).exists():  # a path; otherwise it is a version or a name
            return [_interpreter(uv.folder / asked)]
    variables = ("UV_PROJECT_ENVIRONMENT", "VIRTUAL_ENV", "CONDA_PREFIX")
    environments = [folder / uv.environment[name] for name in variables if uv.environment.get(name)]
    environments += [parent / ".venv" for parent in (folder, *folder.parents)]
    return [_interpreter(environment) for environment in environments if environment.is_dir()]


def _options(arguments: list[str]) -> dict[str, str]:
    """Options that take a value, as ``--name value``, ``--name=value`` or ``-p value``."""
    options: dict[str, str] = {}
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        name, equals, value = argument.partition("=")
        options.setdefault({"-p": "--python"}.get(name, name), value if equals else following)
    return options


def _interpreter(place: Path) -> Path:
    """The interpreter of an environment's folder; an interpreter itself stays what it is."""
    if not place.is_dir():
        return place
    return place / "Scripts" / "python.exe" if os.name == "nt" else place / "bin" / "python"


def ask(python: Path, environment: dict[str, str]) -> dict[str, Any] | None:
    """What an interpreter of the environment sees: ``soabi``, ``prefix``, ``path``, ``torch``; None if it does not run.

    Asking it, rather than reading its folders, leaves .pth files, system and user packages to those who know them.
    """
    try:
        done = subprocess.run([python, "-c", _ASK], env=environment, capture_output=True, text=True, timeout=120)
        return json.loads(done.stdout.splitlines()[-1])
    except (OSError, ValueError, IndexError, subprocess.TimeoutExpired):
        return None


def borrow() -> str:
    """Make ``import torch`` work here. Returns where PyTorch was looked for in vain; empty when there is one."""
    if _there():
        return ""
    above = installer()
    looked: list[str] = []
    for python in interpreters(above):
        seen = ask(python, above.environment)
        if seen is None:
            looked.append(f"{python} does not run")
        elif seen["soabi"] != sysconfig.get_config_var("SOABI"):
            looked.append(f"{seen['prefix']} is for another Python ({seen['soabi']})")
        elif not seen["torch"]:
            looked.append(f"none is installed in {seen['prefix']}")
        else:
            sys.meta_path.append(Borrowed(seen["path"]))
            importlib.invalidate_caches()
            return ""
    return "; ".join(dict.fromkeys(looked)) or "the environment that is installed into could not be found"


def borrowed() -> bool:
    """Whether PyTorch comes from outside the environment of this build."""
    return any(isinstance(finder, Borrowed) for finder in sys.meta_path)


def _there() -> bool:
    spec = importlib.util.find_spec("torch")
    return bool(spec and spec.origin)
