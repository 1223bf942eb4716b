"""The console command ``difffit``: one verb per job, each in the module of its name.

A verb's module offers ``add_arguments(parser)`` and ``run(args) -> int`` and is imported only when it is called for. What
the user must mend ends in one sentence on stderr and exit code 2, wherever it was found.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from .._words import nearest
from ..errors import DiffFitError
from .terminal import voices

VERBS = {
    "train": "fine-tune a DiT on a folder of images by class",
    "extract": "cache what the VAE makes of the images, for faster training",
    "sample": "make images from a model, with a delta or without",
    "mix": "make one delta of several on one base: their weighted sum",
    "export": "write a model, or base and delta in one, for others: an ordinary DiT, diffusers, a hub",
    "inspect": "say what a checkpoint, a delta or a run is",
    "check": "find what is wrong, left out or suspicious in images, a model file, features or a run",
    "bench": "measure the speed of a training step on this machine",
    "eval": "FID, precision, recall and more between sets of images and a reference",
    "prepare": "bring a data set's downloaded archive into folders by class",
}


class UsageError(DiffFitError):
    """A command line that does not parse."""


class Parser(argparse.ArgumentParser):
    """An argument parser that raises instead of printing its usage and leaving."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, formatter_class=_Formatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, but an unknown flag is answered with the nearest known one."""
        parsed, rest = self.parse_known_args(args, namespace)
        unknown = next((word for word in rest if word.startswith("-")), None)
        if unknown is not None:
            flags = [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]
            known = nearest(unknown.split("=")[0], flags)
            raise UsageError(f"unknown flag {unknown}; the nearest known one is {known} (see {self.prog} --help)")
        if rest:
            self.error(f"unexpected argument {rest[0]!r}")
        return parsed


class _Formatter(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=110)


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``difffit`` with ``argv`` (default: the process's) and return its exit code.

    0: done; 1: the job ended badly (a lost process, a loss that is not a number, an output that could not be printed);
    2: the user's to mend. Whether anybody reads what is printed changes neither the job nor its code.
    """
    with voices() as (output, complaints):
        code = _main(argv)
        output.flush()
        if output.loss is not None and code == 0:
            print(f"difffit: done, but what was to be printed is lost: {_sentence(output.loss)}", file=complaints)
            code = 1
        return code


def _main(argv: Sequence[str] | None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    program = "difffit"
    debug = "--debug" in arguments
    try:
        if not arguments or arguments[0] in ("-h", "--help", "help"):
            print(_overview())
            return 0 if arguments else 2
        if arguments[0] == "--version":
            from .. import __version__

            print(f"difffit_fast {__version__}")
            return 0
        verb = arguments[0]
        if verb not in VERBS:
            raise UsageError(f"unknown command {verb!r}; the nearest known one is {nearest(verb, VERBS)!r}")
        program = f"difffit {verb}"
        module = importlib.import_module(f"{__name__}.{verb}")
        parser = Parser(prog=program, description=VERBS[verb][0].upper() + VERBS[verb][1:] + ".")
        parser.add_argument("--debug", action="store_true", help="show where an error came from")
        module.add_arguments(parser)
        with _plain_warnings(program):
            return module.run(parser.parse_args(arguments[1:]))
    except SystemExit as stop:  # --help
        return stop.code if isinstance(stop.code, int) else 0
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130
    except (DiffFitError, OSError) as error:
        if debug:
            traceback.print_exc()
        print(f"{program}: {_sentence(error)}", file=sys.stderr)
        return getattr(error, "exit_code", 2)


def _overview() -> str:
    lines = ["usage: difffit <command> [flags]", "", "commands:"]
    lines += [f"  {verb:<9} {what}" for verb, what in VERBS.items()]
    return "\n".join([*lines, "", "difffit <command> --help tells the flags of each."])


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{where}"
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def _plain_warnings(program: str) -> Iterator[None]:
    """Warnings as sentences, without the line of code that gave them."""

    def show(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
        print(f"{program}: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield
