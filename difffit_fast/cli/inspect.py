"""``difffit inspect``: what a checkpoint, a delta, a run folder or a folder of features is."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .._files import read_yaml, safetensors_metadata
from ..errors import DiffFitError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", help="checkpoint, delta, run folder, or features that difffit extract made")
    parser.add_argument("--json", action="store_true", help="for machines")


def run(args: argparse.Namespace) -> int:
    facts = describe(Path(args.path))
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
    if path.suffix == ".safetensors":
        metadata = safetensors_metadata(path)
        if metadata.get("format") == "difffit_fast-delta":
            return _delta(path)
        if metadata.get("format") == "difffit_fast-trainables":
            return _trainables(path, metadata)
    return _checkpoint(path)


def _delta(path: Path) -> dict[str, Any]:
    from ..difffit.config import DiffFitConfig
    from ..difffit.delta import read_delta

    tensors, metadata = read_delta(path)
    config = metadata.pop("config")
    preset = DiffFitConfig.resolve(metadata.pop("difffit"))
    base = metadata.pop("base_hash")
    names = metadata.pop("class_names", None)
    for key in ("format", "version"):
        metadata.pop(key)
    return {
        "kind": "delta of difffit_fast",
        "file": _size(path),
        "trainable parameters": sum(t.numel() for t in tensors.values()),
        "preset": preset.name if preset.name != "custom" else preset.to_json(),
        **_sizes(config),
        "base hash": base,
        **metadata,
        "class names": names,
    }


def _trainables(path: Path, metadata: dict[str, Any]) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        count = sum(_count(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118 (not a mapping)
    metadata = {key: value for key, value in metadata.items() if key not in ("format", "version")}
    return {"kind": "trainables", "file": _size(path), "trainable parameters": count, **metadata}


def _checkpoint(path: Path) -> dict[str, Any]:
    from ..difffit.checkpoint import infer_config, load_dit_state_dict, pixels_per_cell
    from ..models.dit import DIT_SIZES

    state = load_dit_state_dict(path)
    metadata = safetensors_metadata(path) if path.suffix == ".safetensors" else {}
    recorded = metadata.get("config")
    hidden = state["x_embedder.proj.weight"].shape[0]
    heads = {sizes["hidden_size"]: sizes["num_heads"] for sizes in DIT_SIZES.values()}
    known = isinstance(recorded, dict) or hidden in heads
    config = recorded if isinstance(recorded, dict) else infer_config(state, num_heads=heads.get(hidden, 1))
    if not known:
        config = {**config, "num_heads": "not recorded"}
    gammas = sum(".gamma" in key for key in state)
    return {
        "kind": "DiT with DiffFit's parameters, not merged" if gammas else "DiT checkpoint",
        "file": _size(path),
        "parameters": sum(t.numel() for t in state.values()),
        **_sizes(config),
        "image size": config["input_size"] * pixels_per_cell(config["in_channels"]),
        "dtypes": sorted({str(t.dtype).removeprefix("torch.") for t in state.values()}),
        "tensors": len(state),
        **{key: metadata[key] for key in ("step", "method", "objective", "vae", "class_names") if key in metadata},
    }


def _folder(path: Path) -> dict[str, Any]:
    from ..data.shards import INDEX_FILE
    from ..train.runs import CONFIG_FILE

    if (path / CONFIG_FILE).is_file() and (path / "checkpoints").is_dir():
        return _run(path)
    if (path / INDEX_FILE).is_file():
        from ..data import LatentCache

        cache = LatentCache(path)
        return {
            "kind": f"cached {cache.kind}", "images": len(cache), "classes": cache.num_classes,
            "image size": cache.image_size, "shape": [cache.channels, cache.size, cache.size], "vae": cache.vae,
            "unreadable images": len(cache.report()), "class names": cache.class_names,
        }  # fmt: skip
    raise DiffFitError(f"{path} is neither a run folder nor a folder of cached features")


def _run(path: Path) -> dict[str, Any]:
    from ..train.checkpoint import CheckpointFolder
    from ..train.runs import CONFIG_FILE
    from ..train.track import read_metrics

    torn: list[str] = []
    folder = CheckpointFolder(path / "checkpoints")
    newest = folder.newest(torn.append)
    metrics = read_metrics(path)
    losses = [line["loss"] for line in metrics if "loss" in line]
    return {
        "kind": "run",
        "checkpoints": [step for step in folder.steps() if folder.state_path(step).is_dir()],
        "resumes from": newest.step if newest else "the beginning",
        "delta": str(newest.delta) if newest else None,
        "last loss": losses[-1] if losses else None,
        "torn": torn,
        **read_yaml(path / CONFIG_FILE),
    }


def _sizes(config: dict[str, Any]) -> dict[str, Any]:
    from ..models.dit import DIT_SIZES

    name = next(
        (
            n
            for n, s in DIT_SIZES.items()
            if s["hidden_size"] == config["hidden_size"] and s["depth"] == config["depth"]
        ),
        None,
    )
    model = f"DiT-{name}/{config['patch_size']}" if name else "DiT of its own size"
    return {"model": model, "classes": config["num_classes"], **{k: v for k, v in config.items() if k != "num_classes"}}


def _count(shape: list[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _size(path: Path) -> str:
    return f"{path.stat().st_size / 2**20:.2f} MiB"


def _text(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list):
        shown = ", ".join(map(str, value[:12]))
        return f"{shown}, … ({len(value)})" if len(value) > 12 else shown or "none"
    return str(value)
