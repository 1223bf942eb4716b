"""From files to a model that can be sampled: a checkpoint, or a base with a delta on top."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._files import read_yaml, safetensors_metadata
from ..difffit.checkpoint import infer_config, load_dit_state_dict, pixels_per_cell
from ..difffit.config import DiffFitConfig
from ..difffit.delta import FORMAT as DELTA_FORMAT
from ..difffit.delta import read_delta
from ..errors import DiffFitError
from ..models.dit import DIT_SIZES, DiT
from ..models.fast_dit import FastDiffFitDiT, resize_pos_embed


@dataclass
class LoadedModel:
    """A model in eval mode, and what its file says about itself.

    ``metadata`` is what training recorded (``class_names, objective, vae, image_size, step``...); empty for public
    checkpoints.
    """

    model: DiT
    metadata: dict[str, Any]

    @property
    def class_names(self) -> list[str] | None:
        return self.metadata.get("class_names")

    @property
    def image_size(self) -> int:
        """Side of the images in pixels."""
        return self.metadata.get("image_size") or self.model.input_size * pixels_per_cell(self.model.in_channels)


def load_model(
    ckpt: str | os.PathLike[str] | None = None,
    delta: str | os.PathLike[str] | None = None,
    *,
    merge: bool = False,
    weights: str = "ema",
    num_heads: int | None = None,
    image_size: int | None = None,
    compute_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> LoadedModel:
    """Load ``ckpt``, or ``ckpt`` with ``delta`` applied on the fly (``merge=True``: folded into an ordinary DiT first).

    Args:
        ckpt: DiT or SiT checkpoint; None with a delta that lies in its run folder, whose settings name the base.
        weights: "ema" or "model", where a checkpoint has both.
        num_heads: for widths that were never published.
        image_size: pixels; another one than the checkpoint's makes a new position table in scaled coordinates.
        compute_dtype: of the frozen weights, with a delta that is not merged.

    Raises:
        DiffFitError: a file is missing, unreadable, no DiT, or does not belong to the other.
    """
    if delta is None:
        if ckpt is None:
            raise DiffFitError("nothing to sample from: give a checkpoint, or a delta")
        model, metadata = _load_checkpoint(ckpt, weights, num_heads, image_size)
    else:
        model, metadata = _load_with_delta(ckpt, delta, num_heads, weights, None if merge else compute_dtype)
        if merge:
            model = model.merge()
    return LoadedModel(model.to(device).eval(), metadata)


def _load_checkpoint(
    ckpt: str | os.PathLike[str], weights: str, num_heads: int | None, image_size: int | None
) -> tuple[DiT, dict[str, Any]]:
    is_safetensors = Path(ckpt).suffix == ".safetensors" and Path(ckpt).is_file()
    metadata = safetensors_metadata(ckpt) if is_safetensors else {}
    if metadata.get("format") == DELTA_FORMAT:
        raise DiffFitError(f"{ckpt} is a delta, not a checkpoint; give it as the delta, beside its base")
    state = dict(load_dit_state_dict(ckpt, prefer=weights))
    recorded = metadata.get("config")  # written by full fine-tuning
    config = recorded if isinstance(recorded, dict) else infer_config(state, num_heads=num_heads)
    if image_size is not None:
        resize_pos_embed(state, config, image_size, pixels_per_cell(config["in_channels"]), "scaled")
    try:
        with torch.device("meta"):
            model = DiT(**config)
    except (TypeError, ValueError) as error:
        raise DiffFitError(f"{ckpt} does not describe a DiT: {error}") from error
    _check_keys(ckpt, model, state)
    model.load_state_dict({key: value.float() for key, value in state.items()}, assign=True)
    return model, metadata


def _check_keys(ckpt: str | os.PathLike[str], model: nn.Module, state: Mapping[str, Any]) -> None:
    own = model.state_dict()
    if odd := sorted(set(own) ^ set(state)):
        what = "lacks" if odd[0] in own else "has the unknown key"
        hint = "; it looks like a DiffFit model that was not merged" if ".gamma" in odd[0] else ""
        raise DiffFitError(f"{ckpt} is not a plain DiT: it {what} {odd[0]}{hint}")
    for key, value in state.items():
        if own[key].shape != value.shape:
            raise DiffFitError(f"{ckpt}: {key} should be {tuple(own[key].shape)}, it is {tuple(value.shape)}")


def _load_with_delta(
    ckpt: str | os.PathLike[str] | None,
    delta: str | os.PathLike[str],
    num_heads: int | None,
    weights: str,
    compute_dtype: torch.dtype | None,
) -> tuple[FastDiffFitDiT, dict[str, Any]]:
    tensors, metadata = read_delta(delta)
    run = None
    if ckpt is None:
        run = run_settings(delta)
        if run is None:
            raise DiffFitError(f"the base of {delta} is not known: it does not lie in its run folder; give --ckpt")
        ckpt = run.get("ckpt")
    config = metadata["config"]
    if ckpt is None:
        model = _random_base(run or {}, config, compute_dtype)
    else:
        state = dict(load_dit_state_dict(ckpt, prefer=weights))
        null_class = config["class_dropout_prob"] > 0
        base = infer_config(state, num_heads=num_heads or config["num_heads"], null_class=null_class)
        cell = pixels_per_cell(base["in_channels"])
        coordinates = "native" if metadata["pos_embed_scale"] == 1 else "scaled"
        scale = resize_pos_embed(state, base, config["input_size"] * cell, cell, coordinates)
        key = "y_embedder.embedding_table.weight"
        if base["num_classes"] != config["num_classes"]:
            if key not in tensors:
                raise DiffFitError(
                    f"{delta} was made for {config['num_classes']} classes without training their embedding; "
                    f"{ckpt} has {base['num_classes']}"
                )
            state[key] = tensors[key]
            base["num_classes"] = config["num_classes"]
        base["class_dropout_prob"] = config["class_dropout_prob"]
        difffit = DiffFitConfig.resolve(metadata["difffit"])
        model = FastDiffFitDiT(**base, difffit=difffit, compute_dtype=compute_dtype)
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise DiffFitError(f"{ckpt} is not a plain DiT: {str(error).splitlines()[0]}") from error
        model.pos_embed_scale = scale
    model.load_delta(delta)
    return model, metadata


def run_settings(delta: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The settings of the run that wrote ``<run>/checkpoints/<step>.safetensors``, or None when it lies elsewhere."""
    path = Path(delta).resolve().parent.parent / "config.yaml"
    if Path(delta).resolve().parent.name != "checkpoints" or not path.is_file():
        return None
    return read_yaml(path)


def _random_base(run: dict[str, Any], config: dict[str, Any], dtype: torch.dtype | None) -> FastDiffFitDiT:
    """The random frozen weights that a run without a checkpoint was made on, from its seed."""
    from ..train.config import TrainConfig
    from ..train.methods import build_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return build_model(
            TrainConfig.from_dict(run),
            channels=config["in_channels"],
            input_size=config["input_size"],
            pixels_per_cell=pixels_per_cell(config["in_channels"]),
            num_classes=config["num_classes"],
            dtype=dtype or torch.float32,
        )


def heads_of(model_name: str) -> dict[str, int]:
    """``"DiT-XL/2"`` (or ``"SiT-XL/2"``) -> depth, hidden_size, num_heads, patch_size."""
    kind, _, patch = model_name.partition("/")
    size = kind.removeprefix("DiT-").removeprefix("SiT-")
    if size not in DIT_SIZES or patch not in ("2", "4", "8"):
        raise DiffFitError(f"the model must be DiT- or SiT-, XL, L, B or S, /2, /4 or /8; got {model_name!r}")
    return {**DIT_SIZES[size], "patch_size": int(patch)}
