"""Everything that a run needs, opened and checked before anything is written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data import ImageFolder, LatentSpace, PixelSpace, TrainingData, load_vae, open_data
from ..data.shards import INDEX_FILE
from ..errors import DiffFitError
from .config import DEFAULT_STEPS, TrainConfig
from .methods import build_model, objective_of, read_base
from .objective import DTYPES, Objective
from .stream import TrainStream, ValidationStream, choose, hold_out


@dataclass
class Parts:
    """The parts of a run. ``config`` is the effective one: every default that depends on the data is filled in."""

    config: TrainConfig
    model: nn.Module
    objective: Objective
    stream: TrainStream
    validation: ValidationStream | None
    space: LatentSpace | PixelSpace | None  # decodes samples; None where there is nothing to decode them with
    class_names: list[str]
    total_steps: int


def assemble(
    config: TrainConfig,
    device: torch.device,
    model: nn.Module | None = None,
    data: TrainingData | None = None,
    val_data: TrainingData | None = None,
) -> Parts:
    """Open the data, load the VAE, build the model; ``config.precision`` is decided already.

    Raises:
        DiffFitError: anything that is missing or does not fit.
    """
    if data is None:
        data = _open(config)
    elif config.data_path or config.feature_path:
        raise DiffFitError("give the data itself or a path to it, not both")
    on_pixels = data.size == data.image_size
    vae_name = getattr(data, "vae", config.vae)  # cached features know what made them
    vae = None
    if isinstance(data, ImageFolder):
        vae = load_vae(vae_name, device) if vae_name.lower() != "none" else None  # encodes on the fly
    elif on_pixels:
        vae_name = "none"
    channels, size = data.channels, data.size
    if isinstance(vae, LatentSpace):
        if data.size % vae.factor:
            raise DiffFitError(f"--image-size must be a multiple of {vae.factor} for this VAE; got {data.size}")
        channels, size = vae.channels, data.size // vae.factor
    num_classes = _num_classes(config, model, data)
    val_data = val_data if val_data is not None else _open_validation(config, data)

    dtype = DTYPES[config.precision]
    base = read_base(config) if model is None else None
    config = config.replace(objective=objective_of(config, base))
    if model is None:
        model = build_model(
            config, channels=channels, input_size=size, num_classes=num_classes, dtype=dtype, base=base,
            class_names=data.class_names if num_classes == data.num_classes else None,
        )  # fmt: skip
    _compare_with_data(model, channels, size)
    own_arithmetic = hasattr(model, "compute_dtype") and model.compute_dtype is not None
    autocast = None if own_arithmetic or dtype == torch.float32 else dtype
    objective = Objective(config.objective, getattr(model, "learn_sigma", True), vae, autocast)

    indices, held = None, None
    if val_data is None and config.val_fraction > 0:
        if len(data) < 2:
            raise DiffFitError(f"--val-fraction needs at least two images; the data has {len(data)}")
        indices, held = hold_out(len(data), config.val_fraction, config.global_seed)
    shape = (channels, size, size)
    common: dict[str, Any] = {"null_class": num_classes, "encode": vae is not None, "noise_shape": shape}
    drop = _label_dropout(config, model)
    stream = TrainStream(data, config.global_seed, drop_prob=drop, indices=indices, **common)
    validation = None
    if val_data is not None or held is not None:
        source = val_data if val_data is not None else data
        if held is None:
            held = choose(len(source), config.val_samples, config.global_seed)
        else:
            held = held[choose(len(held), config.val_samples, config.global_seed)]
        validation = ValidationStream(source, config.global_seed, drop_prob=0.0, indices=held, **common)

    names = list(data.class_names) + [f"class {i}" for i in range(data.num_classes, num_classes)]
    total = _total_steps(config, len(stream))
    effective = config.replace(
        image_size=data.image_size, vae=vae_name, num_classes=num_classes, lr=config.learning_rate, max_steps=total,
        epochs=None, class_dropout_prob=drop,
    )  # fmt: skip
    space = vae if vae is not None else _space(config, vae_name, on_pixels and vae is None, device)
    return Parts(effective, model, objective, stream, validation, space, names, total)


def _num_classes(config: TrainConfig, model: nn.Module | None, data: TrainingData) -> int:
    own = getattr(model, "num_classes", None)
    if own is not None and config.num_classes is not None and own != config.num_classes:
        raise DiffFitError(f"the model has {own} classes, but --num-classes is {config.num_classes}")
    count = own or config.num_classes or data.num_classes
    if count < data.num_classes:
        raise DiffFitError(
            f"the data has {data.num_classes} classes, more than the {count} of the model (--num-classes)"
        )
    return count


def _label_dropout(config: TrainConfig, model: nn.Module) -> float:
    """How often labels are dropped: as the settings say, else as the model was made, and never without a null class."""
    asked = config.class_dropout_prob
    if not getattr(model, "has_null_class", True):
        if asked:
            raise DiffFitError(f"--class-dropout-prob is {asked}, but the model has no null class")
        return 0.0
    return getattr(model, "class_dropout_prob", 0.1) if asked is None else asked


def _open(config: TrainConfig) -> TrainingData:
    size = config.image_size if config.feature_path or config.image_size else 256
    return open_data(config.data_path, config.feature_path, size)


def _open_validation(config: TrainConfig, data: TrainingData) -> TrainingData | None:
    if config.val_path is None:
        return None
    cached = (Path(config.val_path) / INDEX_FILE).is_file()
    where = {"feature_path": config.val_path} if cached else {"path": config.val_path}
    other = open_data(image_size=data.image_size, flip=False, **where)
    if list(other.class_names) != list(data.class_names):
        odd = sorted(set(other.class_names) ^ set(data.class_names)) or ["their order"]
        raise DiffFitError(f"--val-path {config.val_path} has other classes than the training data: {odd[0]}")
    if (other.channels, other.size) != (data.channels, data.size):
        raise DiffFitError(
            f"--val-path {config.val_path} gives {other.channels} x {other.size} x {other.size} and the training data "
            f"{data.channels} x {data.size} x {data.size}; both must be images or both cached features"
        )
    return other


def _compare_with_data(model: nn.Module, channels: int, size: int) -> None:
    has = getattr(model, "in_channels", channels), getattr(model, "input_size", size)
    if has != (channels, size):
        raise DiffFitError(
            f"the model takes {has[0]} x {has[1]} x {has[1]}, but the data gives {channels} x {size} x {size}"
        )


def _space(
    config: TrainConfig, vae_name: str, on_pixels: bool, device: torch.device
) -> LatentSpace | PixelSpace | None:
    """What turns samples into pictures; cached latents need the VAE only for this."""
    if on_pixels:
        return PixelSpace()
    return load_vae(vae_name, device) if config.sample_every else None


def _total_steps(config: TrainConfig, images: int) -> int:
    if config.epochs is not None:
        return max(1, -(-config.epochs * images // config.global_batch_size))
    return config.max_steps or DEFAULT_STEPS
