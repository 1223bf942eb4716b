"""Every command that a page, a header or a message tells a person to type is one that the program takes.

A command of its own line, in a fenced block of a page or in the head of a script or a YAML file, is parsed as it stands, by
``difffit``'s own parser or by the script that it names, which is left as soon as it has read its arguments. What is named
in passing (```difffit sample --ckpt glyphs```, ``--best-by val``) need not be whole; its flags and their values must exist.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import io
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from difffit_fast.cli import VERBS, Parser
from difffit_fast.cli.train import read_config
from difffit_fast.errors import DiffFitError

ROOT = Path(__file__).resolve().parent.parent
# Flags of others, which our pages name.
FOREIGN = {
    "--dist", "--force-reinstall", "--index-url", "--ipc", "--maxprocesses", "--mixed_precision", "--no-build-isolation",
    "--no-deps", "--nproc_per_node", "--reinstall-package", "--shm-size",
}  # fmt: skip


def written(*patterns: str) -> list[Path]:
    """The files of these patterns that are kept in the repository, or all where there is no repository."""
    try:
        listing = ["git", "ls-files", "--", *patterns]
        said = subprocess.run(listing, cwd=ROOT, capture_output=True)
        names = said.stdout.decode().split("\n") if said.returncode == 0 else []
    except FileNotFoundError:
        names = []
    found = [ROOT / name for name in names if name and (ROOT / name).is_file()]
    if not found:
        found = [path for pattern in patterns for path in ROOT.rglob(pattern) if ".venv" not in path.parts]
    return sorted(path for path in found if ROOT / "tests" not in path.parents)


def prose(path: Path) -> str:
    """What a person reads in a file: a page, the comments of a YAML file, the docstrings of a script."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return text
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    return "\n\n".join(ast.get_docstring(n) or "" for n in ast.walk(ast.parse(text)) if isinstance(n, kinds))


def commands(path: Path) -> Iterator[str]:
    """The commands that have a line of their own, continued lines joined, what is said behind them cut off."""
    by = r"python3?|torchrun(?: \S+)*? -m|accelerate launch(?: \S+)*?"
    begins = rf"[ #]*(?:[A-Z_]+=\S+ +)*(?:(?:{by}) +(?=\S+\.py|difffit_fast )|(?=difffit +[a-z]+ ))"
    lines = re.sub(r" *\\\n[ #]*", " ", prose(path)).splitlines()
    for line in lines:
        if (begin := re.match(begins, line)) and (path.suffix != ".md" or not line.startswith("#")):
            rest = re.sub(r"^(\S+ +[a-z]+) +", r"\1 ", line[begin.end() :])  # difffit eval    samples
            yield re.split(r" {2,}#|(?<=\S) {2,}(?=[^-\s])", rest)[0].rstrip()


def mentions(path: Path) -> Iterator[str]:
    for command in re.findall(r"`(difffit [a-z]+ [^`]*)`", prose(path)):
        yield " ".join(command.split())


class Read(BaseException):
    """The script has read its arguments."""


@cache
def verb_parser(verb: str) -> Parser:
    parser = Parser(prog=f"difffit {verb}")
    importlib.import_module(f"difffit_fast.cli.{verb}").add_arguments(parser)
    return parser


def parse_verb(words: list[str], whole: bool = True) -> None:
    verb, *rest = words
    assert verb in VERBS, f"no command difffit {verb}"
    parser = verb_parser(verb)
    needed = [action for action in parser._actions if action.required]
    for action in needed:
        action.required = whole
    positional = [action for action in parser._actions if not action.option_strings]
    counts = [action.nargs for action in positional]
    for action in positional:
        action.nargs = action.nargs if whole else "*"
    try:
        args = parser.parse_args(rest)
        if verb == "train" and not re.search(r"--config (?!e)", " ".join(rest)):
            if args.config:
                args.config = str(ROOT / args.config)
            read_config(args)
    finally:
        for action in needed:
            action.required = True
        for action, count in zip(positional, counts, strict=True):
            action.nargs = count


def parse_script(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the script as far as its own parser."""
    script = ROOT / words[0]
    assert script.is_file(), f"no file {words[0]}"
    if "parse_args" not in script.read_text(encoding="utf-8"):
        assert len(words) == 1 or "sys.argv" in script.read_text(encoding="utf-8"), f"{words[0]} takes no arguments"
        return
    stock = argparse.ArgumentParser.parse_args

    def parse_args(self: argparse.ArgumentParser, *given: Any, **more: Any) -> Any:
        stock(self, *given, **more)
        raise Read

    complaint = io.StringIO()
    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        patch.setattr(sys, "argv", [str(script), *words[1:]])
        patch.setattr(sys, "path", [str(script.parent), *sys.path])
        known = set(sys.modules)
        try:
            with contextlib.redirect_stderr(complaint), pytest.raises(Read):
                runpy.run_path(str(script), run_name="__main__")
        except SystemExit:
            raise AssertionError(complaint.getvalue().strip().splitlines()[-1]) from None
        finally:  # experiments and benchmarks have modules of equal names
            for name in set(sys.modules) - known:
                if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(script.parent)):
                    del sys.modules[name]


PAGES = written("*.md", "*.yaml", "*.py")
OWN_LINE = sorted({(command, path) for path in PAGES for command in commands(path)})
IN_PASSING = sorted({(command, path) for path in PAGES for command in mentions(path)})


def name(given: Any) -> str:
    return given.relative_to(ROOT).as_posix() if isinstance(given, Path) else re.sub(r"\W+", " ", given)[:60]


def words_of(command: str) -> list[str]:
    """Words, without the brackets around what may be left out."""
    return shlex.split(re.sub(r"[\[\]]", " ", command))


@pytest.mark.parametrize(("command", "path"), OWN_LINE, ids=name)
def test_a_command_that_is_told_is_taken(command: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, *rest = words_of(command)
    try:
        parse_verb(rest) if first in ("difffit", "difffit_fast") else parse_script([first, *rest], monkeypatch)
    except ImportError as missing:
        pytest.skip(str(missing))
    except (DiffFitError, AssertionError) as error:
        pytest.fail(f"{path.relative_to(ROOT)} tells to type {command!r}: {error}")


@pytest.mark.parametrize(("command", "path"), IN_PASSING, ids=name)
def test_a_command_that_is_named_in_passing_exists(command: str, path: Path) -> None:
    words = words_of(command)[1:]
    if words[-1].startswith("--") and "=" not in words[-1]:
        action = verb_parser(words[0])._option_string_actions.get(words[-1])
        if action is not None and action.nargs != 0:  # only the flag is meant
            del words[-1]
    try:
        parse_verb(words, whole=False)
    except (DiffFitError, AssertionError) as error:
        pytest.fail(f"{path.relative_to(ROOT)} names {command!r}: {error}")


def own_flags() -> set[str]:
    """Those of ``difffit`` and of every script of the repository."""
    found = {"--help", "--debug", "--version"}
    for verb in VERBS:
        found |= set(verb_parser(verb)._option_string_actions)
    for path in written("*.py"):
        found |= set(re.findall(r"\"(--[a-z][a-z0-9-]*)\"", path.read_text(encoding="utf-8")))
    return found


def test_every_flag_that_a_page_names_exists() -> None:
    known, strange = own_flags() | FOREIGN, {}
    for path in written("*.md", "*.yaml", "Makefile"):
        for flag in re.findall(r"(?<![\w<!-])--[a-z][\w-]*", path.read_text(encoding="utf-8")):
            if flag not in known:
                strange.setdefault(flag, path.relative_to(ROOT).as_posix())
    assert not strange, f"flags that nothing takes: {strange}"


def test_every_flag_that_the_package_names_to_its_users_exists() -> None:
    """Errors, warnings, help and docstrings: advice must be possible to follow."""
    known = {"--help", "--debug", "--version"} | FOREIGN
    for verb in VERBS:
        known |= set(verb_parser(verb)._option_string_actions)
    strange = {}
    for path in written("difffit_fast/*.py", "kernels/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*[a-z0-9]", node.value):
                    if flag not in known:
                        strange.setdefault(flag, f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not strange, f"flags that nothing takes: {strange}"
