"""A folder to publish: the delta, or the whole model, and a card that says what it is and how to use it."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import Any

import yaml

from .._files import new_folder, read_yaml, write_text
from ..errors import DiffFitError
from ..models.checkpoint import read_model
from ..models.delta import read_delta
from ..models.header import OF_MODELS, write_model_file
from ..models.load import RUN_SETTINGS, load_model
from ..models.sizes import model_name
from ..train.track import read_metrics

RECIPE = (
    "method", "difffit", "lr", "lr_schedule", "warmup_steps", "global_batch_size", "max_steps", "ema_decay", "weight_decay",
    "max_grad_norm", "flip", "precision", "global_seed",
)  # fmt: skip
MOST_CLASSES = 40  # named one by one


def export_card(
    ckpt: str | os.PathLike[str] | None,
    delta: str | os.PathLike[str] | None,
    folder: str | os.PathLike[str],
    *,
    license: str | None = None,
    base_model: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write ``delta.safetensors``, or without a delta ``model.safetensors``, and ``README.md``, with what the run tells: its
    settings, its last numbers and its newest grid of samples.

    Args:
        ckpt: the base of the delta, which is named and not copied, or the model.
        delta: what to publish; None: the model.
        folder: to be made.
        license: of what is published. None: the card says that nobody has said.
        base_model: where others find the base.
        overwrite: replace a folder that is there.

    Raises:
        DiffFitError: there is nothing to publish, or ``folder`` has something in it.
    """
    if ckpt is None and delta is None:
        raise DiffFitError("expected a checkpoint or a delta to publish; got neither")
    run = None if delta is None else Path(delta).resolve().parent.parent
    settings = read_yaml(run / RUN_SETTINGS) if run is not None and (run / RUN_SETTINGS).is_file() else {}
    if delta is not None and ckpt is not None:
        load_model(ckpt, delta)  # else the card could name a base that it does not belong to
    with new_folder(folder, overwrite=overwrite) as out:
        if delta is None:
            file = read_model(ckpt)
            file.check_keys(file.skeleton())
            header = {key: file.header[key] for key in OF_MODELS if key in file.header}
            if header.get("vae") and Path(header["vae"]).is_dir():
                del header["vae"]  # a folder of this machine
            header |= {"config": file.config, "pos_embed_scale": file.pos_embed_scale, "objective": file.objective}
            write_model_file(out / "model.safetensors", "model", file.state, header)
            header |= {"architecture": file.name, "image_size": file.image_size}
        else:
            _, header = read_delta(delta)
            shutil.copyfile(delta, out / "delta.safetensors")
        # A run goes on after the step that is published: nothing later is of it.
        last = header.get("step", math.inf)
        grids = sorted((run / "samples").glob("[0-9]*.png")) if run is not None else []
        grids = [grid for grid in grids if grid.stem.isdecimal() and int(grid.stem) <= last]
        if grids:
            shutil.copyfile(grids[-1], out / "samples.png")
        metrics = [line for line in read_metrics(run) if line["step"] <= last] if settings else []
        base = base_model or (Path(str(ckpt or settings.get("ckpt") or "")).name if delta is not None else "")
        write_text(
            out / "README.md",
            card(header, settings, metrics, license, base_model, base, bool(grids), Path(folder).name),
        )


def card(
    header: dict[str, Any], settings: dict[str, Any], metrics: list[dict[str, Any]], license: str | None,
    base_model: str | None, base: str, samples: bool, name: str,
) -> str:  # fmt: skip
    """The text of ``README.md``, with the front matter that hubs read."""
    is_delta = header.get("kind") == "delta"
    architecture = header.get("architecture") or model_name(header["config"], header.get("objective"))
    front: dict[str, Any] = {"library_name": "difffit_fast", "pipeline_tag": "unconditional-image-generation"}
    front |= {"license": license} if license else {}
    front |= {"base_model": base_model, "base_model_relation": "adapter"} if base_model and is_delta else {}
    front["tags"] = ["diffusion-transformer", *(["difffit"] if is_delta else [])]
    lines = ["---", yaml.safe_dump(front, sort_keys=False, allow_unicode=True).rstrip(), "---", "", f"# {name}", ""]
    if is_delta:
        lines.append(
            f"A delta of {header.get('step', '?')} steps of DiffFit on {architecture}: biases, scales γ and what else trained, "
            f"to be put on its base{f' {base}' if base else ''}."
        )
        hashed = header.get("base_hash")
        lines += ["", f"It belongs to the base with the hash `{hashed}` and is refused by others." if hashed else ""]
    else:
        lines.append(f"{architecture}, an ordinary checkpoint.")
    pixels, vae = header.get("image_size"), _public(header.get("vae"))
    facts = [
        ["images", f"{pixels} × {pixels} pixels" if pixels else "not recorded"],
        ["autoencoder", {"none": "none, pixels"}.get(vae, vae) or "not recorded"],
        ["classes", _classes(header)],
        ["license", license or "**not said**; it has to respect the base's"],
    ]
    if is_delta:
        facts.insert(0, ["base", base_model or base or "not recorded"])
    lines += ["", "| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in facts)]
    if samples:
        lines += ["", "![Samples of the run](samples.png)"]
    last = _last(metrics)
    if last:
        lines += ["", "## Measured", "", "| | value | at step |", "|---|---|---|"]
        lines += [f"| {key} | {value:.4g} | {step} |" for key, (value, step) in last.items()]
    if settings:
        lines += [
            "",
            "## Recipe",
            "",
            "```yaml",
            *(f"{k}: {settings[k]}" for k in RECIPE if settings.get(k) is not None),
            "```",
        ]
    file = "delta.safetensors" if is_delta else "model.safetensors"
    given = f"--ckpt {base or 'BASE'} --delta {file}" if is_delta else f"--ckpt {file}"
    lines += ["", "## Use", "", "```", "pip install difffit_fast", f"difffit sample {given}", "```", ""]
    return "\n".join(lines)


def _public(vae: str | None) -> str | None:
    """The name of an autoencoder as others can use it: a folder of this machine has only its name."""
    return f"a folder, {Path(vae).resolve().name}" if vae and Path(vae).is_dir() else vae


def _classes(header: dict[str, Any]) -> str:
    names, count = header.get("class_names"), header["config"]["num_classes"]
    if not names:
        return str(count)
    more = f" and {len(names) - MOST_CLASSES} more" if len(names) > MOST_CLASSES else ""
    return f"{count}: " + ", ".join(_plain(name) for name in names[:MOST_CLASSES]) + more


def _plain(name: str) -> str:
    """A name that breaks no table."""
    return " ".join(name.split()).replace("|", "\\|")


def _last(metrics: list[dict[str, Any]]) -> dict[str, tuple[float, int]]:
    """The last value of each number that says how good a model is, and its step."""
    found: dict[str, tuple[float, int]] = {}
    for line in metrics:
        for key in ("val_loss", "fid", "fd"):
            if key in line:
                found[key] = line[key], line["step"]
    return found
