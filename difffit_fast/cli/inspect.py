"""``difffit inspect``: what a checkpoint, a delta, a run folder or a folder of features is."""

from __future__ import annotations

import argparse
import json
import math
import warnings
from pathlib import Path
from typing import Any

from safetensors import safe_open

from .._files import read_yaml
from ..data import LatentCache
from ..data.shards import INDEX_FILE
from ..errors import DiffFitError
from ..models.bases import model_path
from ..models.checkpoint import image_pixels, read_model
from ..models.delta import read_delta
from ..models.foreign import LeftOutWarning
from ..models.header import read_header
from ..models.load import RUN_SETTINGS
from ..models.sizes import model_name
from ..models.state_dict import is_safetensors
from ..train.best import read_best
from ..train.checkpoint import CheckpointFolder
from ..train.track import read_metrics


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", help="checkpoint, delta, run folder, or features that difffit extract made")
    parser.add_argument("--json", action="store_true", help="for machines")


def run(args: argparse.Namespace) -> int:
    facts = describe(model_path(args.path))
    if args.json:
        print(json.dumps(facts, indent=1))
    else:
        width = max(len(key) for key in facts)
        for key, value in facts.items():
            print(f"{key:<{width}}  {_text(value)}")
    return 0


def describe(path: Path) -> dict[str, Any]:
    """Facts about ``path``, in reading order, as JSON can hold them.

    Raises:
        DiffFitError: nothing is there, or nothing that is known here.
    """
    if not path.exists():
        raise DiffFitError(f"there is no {path}")
    if path.is_dir():
        return _folder(path)
    if path.is_file() and is_safetensors(path):
        kind = read_header(path).get("kind")
        if kind == "delta":
            return _delta(path)
        if kind == "trainables":
            return _trainables(path)
    return _checkpoint(path)


def _delta(path: Path) -> dict[str, Any]:
    tensors, header = read_delta(path)
    preset, config = header["difffit"], header["config"]
    return {
        "kind": "delta of difffit_fast",
        "file": _size(path),
        "trainable parameters": sum(t.numel() for t in tensors.values()),
        "preset": preset.name if preset.name != "custom" else preset.to_json(),
        "model": model_name(config, header.get("objective")),
        **_model(config, header["pos_embed_scale"], image_pixels(header, config, str(path))),
        "base hash": header["base_hash"],
        **_rest(header),
    }


def _trainables(path: Path) -> dict[str, Any]:
    header = read_header(path)
    with safe_open(path, "pt") as file:
        count = sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118 (not a mapping)
    facts: dict[str, Any] = {"kind": "trainables", "file": _size(path), "trainable parameters": count}
    if header.get("config"):
        facts["model"] = model_name(header["config"], header.get("objective"))
        facts |= _model(
            header["config"], header.get("pos_embed_scale"), image_pixels(header, header["config"], str(path))
        )
    return {**facts, **_rest(header)}


def _checkpoint(path: Path) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LeftOutWarning)  # it is told below
        file = read_model(path)
    if not file.is_difffit:
        file.check_keys(file.skeleton())
    name, names = file.weights
    return {
        "kind": "DiT with DiffFit's parameters, not merged" if file.is_difffit else "DiT checkpoint",
        "file": _size(path),
        "parameters": sum(t.numel() for t in file.state.values()),
        "model": file.name,
        **_model(file.config, file.pos_embed_scale, file.image_size),
        "objective": file.objective,
        "weights": f"{name} (of {', '.join(names)})" if len(names) > 1 else name or None,
        "recorded": sorted(file.recorded) or None,
        "dtypes": sorted({str(t.dtype).removeprefix("torch.") for t in file.state.values()}),
        "tensors": len(file.state),
        **({"left out": list(file.left_out)} if file.left_out else {}),
        **{key: value for key, value in _rest(file.header).items() if key != "objective"},
    }


def _model(config: dict[str, Any], pos_embed_scale: float | None, image_size: int) -> dict[str, Any]:
    """What training and sampling will use."""
    return {
        "classes": config["num_classes"],
        "null class": config["class_dropout_prob"] > 0,
        "image size": image_size,
        **{key: value for key, value in config.items() if key != "num_classes"},
        "num_heads": "not recorded" if config["num_heads"] is None else config["num_heads"],
        "positions": "not sine-cosine" if pos_embed_scale is None else f"scaled by {pos_embed_scale:g}",
    }


def _rest(header: dict[str, Any]) -> dict[str, Any]:
    """The entries of a header that are not told otherwise."""
    told = (
        "format",
        "kind",
        "version",
        "config",
        "difffit",
        "base_hash",
        "base_hashes",
        "pos_embed_scale",
        "image_size",
        "architecture",
        "val_set",
    )
    names = {
        "class_names": "class names",
        "class_rows": "class rows of the base",
        "val_loss": "validation loss",
        "mixed": "mixed from",
    }
    words = {"mixed": lambda mixed: [f"{weight:g} of {name}" for name, weight in mixed]}
    return {names.get(key, key): words.get(key, _as_it_is)(value) for key, value in header.items() if key not in told}


def _as_it_is(value: Any) -> Any:
    return value


def _folder(path: Path) -> dict[str, Any]:
    if (path / RUN_SETTINGS).is_file() and (path / "checkpoints").is_dir():
        return _run(path)
    if (path / INDEX_FILE).is_file():
        cache = LatentCache(path)
        return {
            "kind": f"cached {cache.kind}", "images": len(cache), "classes": cache.num_classes,
            "image size": cache.image_size, "shape": [cache.channels, cache.size, cache.size], "vae": cache.vae,
            "unreadable images": len(cache.report()), "class names": cache.class_names,
        }  # fmt: skip
    try:
        return _checkpoint(path)
    except DiffFitError as error:
        raise DiffFitError(f"{path} is neither a run folder nor a folder of cached features; and {error}") from error


def _run(path: Path) -> dict[str, Any]:
    torn: list[str] = []
    folder = CheckpointFolder(path / "checkpoints")
    newest = folder.newest(torn.append)
    best = None
    if folder.best_path.is_file():
        try:
            best = read_best(folder.best_path)
        except DiffFitError as error:
            torn.append(str(error))
    metrics = read_metrics(path)
    losses = [line["loss"] for line in metrics if "loss" in line]
    return {
        "kind": "run",
        "checkpoints": [step for step in folder.steps() if folder.state_path(step).is_dir()],
        "resumes from": newest.step if newest else "the beginning",
        "delta": str(newest.delta) if newest else None,
        "last loss": losses[-1] if losses else None,
        "best": f"step {best.step}, validation loss {best.loss:.4f}: {folder.best_path}" if best else None,
        "torn": torn,
        **read_yaml(path / RUN_SETTINGS),
    }


def _size(path: Path) -> str:
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    return f"{sum(file.stat().st_size for file in files) / 2**20:.2f} MiB{' in all files of the folder' if path.is_dir() else ''}"


def _text(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list):
        shown = ", ".join(map(str, value[:12]))
        return f"{shown}, … ({len(value)})" if len(value) > 12 else shown or "none"
    return str(value)
