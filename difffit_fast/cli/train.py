"""``difffit train``: every setting of :class:`~difffit_fast.train.TrainConfig` as a flag."""

from __future__ import annotations

import argparse
from typing import Any

from .._files import parse_yaml
from .._words import shown
from ..errors import DiffFitError
from ..train.config import TrainConfig
from ..train.settings import Setting, flag, settings_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags; one that is not given leaves no trace, so that the configuration file keeps its say."""
    parser.add_argument("--config", help="YAML file of these settings; flags override it")
    groups: dict[str, Any] = {}
    for name, setting in settings_of(TrainConfig).items():
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": _help(setting)}
        if setting.kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif setting.kind is dict:
            options |= {"nargs": "+", "metavar": "KEY=VALUE"}
        elif setting.choices:
            options["choices"] = setting.choices
        else:
            options |= {"type": setting.kind, "metavar": {int: "N", float: "X"}.get(setting.kind, "TEXT")}
        if setting.group not in groups:
            groups[setting.group] = parser.add_argument_group(setting.group)
        groups[setting.group].add_argument(flag(name), **options)


def run(args: argparse.Namespace) -> int:
    """Train; 0 when done, 128 + n when signal n ended it (after a checkpoint)."""
    config = read_config(args)
    from ..train.trainer import Trainer

    result = Trainer(config).train()
    return 128 + result.signal if result.signal else 0


def read_config(args: argparse.Namespace) -> TrainConfig:
    """Defaults, then ``--config``, then the flags that were given."""
    settings = settings_of(TrainConfig)
    given = {key: value for key, value in vars(args).items() if key in settings}
    pairs = {key: _pairs(key, words) for key, words in given.items() if settings[key].kind is dict}
    return TrainConfig.load(args.config, given | pairs)


def _pairs(name: str, words: list[str]) -> dict[str, Any]:
    pairs = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not (key and equals and value):
            raise DiffFitError(f"{flag(name)} expects key=value; got {word!r}")
        pairs[key.replace("-", "_")] = parse_yaml(value, f"{flag(name)} {shown(word)}")
    return pairs


def _help(setting: Setting) -> str:
    text = setting.help.replace("%", "%%")
    if "default" in text or setting.kind is dict or setting.default is None or setting.default is False:
        return text
    return f"{text} (default: {setting.default})"
