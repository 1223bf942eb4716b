"""The house: which module may import which. The floors stand in CONTRIBUTING.md, and nowhere else."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "difffit_fast"


def floors() -> dict[str, int]:
    """Name of a file or folder of the package -> its floor, counted from below."""
    block = re.search(r"```floors\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.DOTALL)
    return {name: floor for floor, line in enumerate(block[1].splitlines()) for name in line.split()}


def modules() -> dict[str, Path]:
    """Dotted names of all modules; the Triton kernels are ``difffit_fast.kernels``."""
    found = {}
    for folder, name in ((ROOT / PACKAGE, PACKAGE), (ROOT / "kernels", f"{PACKAGE}.kernels")):
        for path in sorted(folder.rglob("*.py")):
            words = [name, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(words[:-1] if words[-1] == "__init__" else words)] = path
    return found


def imports(module: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of the package that ``module`` imports, anywhere in it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            found |= {f"{source}.{a.name}" if f"{source}.{a.name}" in known else source for a in node.names}
        elif isinstance(node, ast.Constant) and module != PACKAGE:  # a name for importlib
            found.add(node.value)
    return {name for name in found if name in known and name != module}


def room(module: str) -> str:
    """The file or folder of the package that a module lies in; "" for the package itself."""
    return ".".join(module.split(".")[1:2])


KNOWN = modules()
GRAPH = {module: imports(module, path, KNOWN) for module, path in KNOWN.items()}


def test_every_room_has_a_floor() -> None:
    assert {room(module) for module in KNOWN} - {""} == set(floors())


def test_nobody_imports_from_above_or_from_a_neighbour() -> None:
    floor = floors()
    wrong = [
        f"{module} imports {other}"
        for module, others in GRAPH.items()
        for other in others
        if room(module) and room(other) and room(module) != room(other) and floor[room(other)] >= floor[room(module)]
    ]
    assert not wrong


def test_there_is_no_circle_between_files() -> None:
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for other in sorted(GRAPH[module]):
                if KNOWN[other].name != "__init__.py":  # a folder's front door only passes its own rooms on
                    walk(other, [*path, module])
            done.add(module)

    for module in GRAPH:
        walk(module, [])


def test_names_that_are_looked_up_are_there() -> None:
    """The package imports nothing until it is asked for; whatever it promises exists."""
    import difffit_fast

    for name in difffit_fast.__all__:
        assert getattr(difffit_fast, name) is not None
