"""``difffit train``: every setting of :class:`~difffit_fast.train.TrainConfig` as a flag."""

from __future__ import annotations

import argparse
import typing
from dataclasses import fields
from typing import Any

import yaml

from ..errors import DiffFitError
from ..train.config import TrainConfig, flag

GROUPS = {
    "data_path": "data", "model": "model", "global_batch_size": "optimisation", "results_dir": "run",
    "fsdp": "several processes (started with torchrun)",
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags; one that is not given leaves no trace, so that the configuration file keeps its say."""
    parser.add_argument("--config", help="YAML file of these settings; flags override it")
    hints = typing.get_type_hints(TrainConfig)
    group: Any = parser
    for f in fields(TrainConfig):
        if f.name in GROUPS:
            group = parser.add_argument_group(GROUPS[f.name])
        kind = next((t for t in typing.get_args(hints[f.name]) if t is not type(None)), hints[f.name])
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": _help(f, kind)}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif kind is dict or hints[f.name] is dict:
            options |= {"nargs": "+", "metavar": "KEY=VALUE"}
        else:
            options |= {"type": kind, "metavar": _metavar(kind)}
            if f.metadata["choices"]:
                options |= {"choices": f.metadata["choices"], "metavar": None}
        group.add_argument(flag(f.name), **options)


def run(args: argparse.Namespace) -> int:
    """Train; 0 when done, 128 + n when signal n ended it (after a checkpoint)."""
    config = read_config(args)
    from ..train.trainer import Trainer

    result = Trainer(config).train()
    return 128 + result.signal if result.signal else 0


def read_config(args: argparse.Namespace) -> TrainConfig:
    """Defaults, then ``--config``, then the flags that were given."""
    known = {f.name for f in fields(TrainConfig)}
    given = {key: value for key, value in vars(args).items() if key in known}
    for key in ("model_args", "method_args"):
        if key in given:
            given[key] = _pairs(key, given[key])
    return TrainConfig.load(args.config, given)


def _pairs(name: str, words: list[str]) -> dict[str, Any]:
    pairs = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not (key and equals and value):
            raise DiffFitError(f"{flag(name)} expects key=value; got {word!r}")
        pairs[key.replace("-", "_")] = yaml.safe_load(value)
    return pairs


def _help(f: Any, kind: type) -> str:
    text = f.metadata["help"].replace("%", "%%")
    if "default" in text or kind is dict or f.default is None or f.default is False:
        return text
    return f"{text} (default: {f.default})"


def _metavar(kind: type) -> str:
    return {int: "N", float: "X"}.get(kind, "TEXT")
