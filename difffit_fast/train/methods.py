"""From settings to a model: the base, and what of it the method trains."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .._words import nearest
from ..difffit.checkpoint import infer_config, load_dit_state_dict
from ..errors import DiffFitError
from ..models.dit import DIT_ARGUMENTS, DIT_SIZES, DiT, DiT_models
from .config import TrainConfig

DEFAULT_MODEL = "DiT-XL/2"


def build_model(
    config: TrainConfig,
    *,
    channels: int,
    input_size: int,
    pixels_per_cell: int,
    num_classes: int,
    dtype: torch.dtype,
) -> nn.Module:
    """The model that ``config`` asks for, on the CPU, with exactly its trainables requiring gradients.

    Its random parts (a base without --ckpt, new class rows, adapters) come from ``config.global_seed``.

    Args:
        channels: channels of what the diffusion model sees (4 latents, 3 pixels).
        input_size: its side.
        pixels_per_cell: image pixels per cell of it, to say sizes in pixels.
        num_classes: classes of the model.
        dtype: arithmetic of the frozen weights.

    Raises:
        DiffFitError: unknown model or method, or a checkpoint that does not fit.
    """
    if config.model is not None and config.model not in DiT_models:
        raise DiffFitError(
            f"--model must be one of {', '.join(DiT_models)}; got {config.model!r}, nearest is "
            f"{nearest(config.model, DiT_models)}"
        )
    with _seeded(config.global_seed), _value_errors():
        base = _base(config, channels, input_size, pixels_per_cell, num_classes)
        return _with_method(base, config, dtype)


def model_name(config: TrainConfig, model: nn.Module) -> str:
    """The published name of a model's sizes, or "DiT-custom"."""
    if config.model is not None and not config.model_args:
        return config.model
    try:
        sizes = {key: getattr(model, key) for key in ("depth", "hidden_size", "num_heads")}
    except AttributeError:
        return config.model or type(model).__name__
    for name, known in DIT_SIZES.items():
        if known == sizes:
            return f"DiT-{name}/{model.patch_size}"
    return "DiT-custom"


def _base(config: TrainConfig, channels: int, input_size: int, cell: int, num_classes: int) -> DiT:
    unknown = [key for key in config.model_args if key not in DIT_ARGUMENTS]
    if unknown:
        close = nearest(unknown[0], DIT_ARGUMENTS)
        raise DiffFitError(f"unknown --model-args {unknown[0]!r}; the nearest known is {close!r}")
    wanted = dict(config.model_args, class_dropout_prob=config.class_dropout_prob)
    if config.ckpt is None:
        warnings.warn(
            "no --ckpt: the frozen weights are random, made from the seed; this is for trying things out",
            stacklevel=4,
        )
        sizes = dict(wanted, input_size=input_size, in_channels=channels, num_classes=num_classes)
        base = DiT_models[config.model or DEFAULT_MODEL](**sizes)
        if config.method != "full":
            _open_gates(base)
        return base
    state = load_dit_state_dict(config.ckpt)
    heads = config.model_args.get("num_heads") or _published(config).get("num_heads")
    found = infer_config(state, num_heads=heads)
    _compare(config, found, channels)
    return _adapted(config, state, found, input_size, num_classes, cell)


@torch.no_grad()
def _open_gates(base: DiT) -> None:
    """A DiT starts as the zero function, which stays one while its weights are frozen: give it some life."""
    linears = [block.adaLN_modulation[1] for block in base.blocks]
    for linear in [*linears, base.final_layer.adaLN_modulation[1], base.final_layer.linear]:
        linear.weight.normal_(std=0.02)


def _published(config: TrainConfig) -> dict[str, int]:
    if config.model is None:
        return {}
    size, patch = config.model.removeprefix("DiT-").split("/")
    return dict(DIT_SIZES[size], patch_size=int(patch))


def _compare(config: TrainConfig, found: dict[str, Any], channels: int) -> None:
    """The checkpoint against --model, --model-args and the data."""
    for key, value in {**_published(config), **config.model_args}.items():
        if key in found and found[key] != value:
            source = "--model-args" if key in config.model_args else f"--model {config.model}"
            raise DiffFitError(f"{source} has {key} {value}, but the checkpoint {config.ckpt} has {found[key]}")
    if found["in_channels"] != channels:
        raise DiffFitError(
            f"the checkpoint {config.ckpt} takes {found['in_channels']} channels, but the data gives {channels} "
            f"(--vae {config.vae}; pixels have 3 and the usual latents 4)"
        )


def _adapted(
    config: TrainConfig, state: dict[str, Any], found: dict[str, Any], input_size: int, num_classes: int, cell: int
) -> DiT:
    """The checkpoint as a plain DiT for this image size and these classes."""
    from ..models.fast_dit import renew_class_table, resize_pos_embed

    state = dict(state)
    scale = resize_pos_embed(state, found, input_size * cell, cell, "scaled")
    if num_classes != found["num_classes"]:
        renew_class_table(state, found["num_classes"], num_classes, True)
        found["num_classes"] = num_classes
    with torch.device("meta"):
        base = DiT(**{**found, "class_dropout_prob": config.class_dropout_prob or 0.1})
    own = base.state_dict()
    wrong = sorted(set(own) ^ set(state)) or [k for k in own if own[k].shape != state[k].shape]
    if wrong:
        raise DiffFitError(
            f"the checkpoint {config.ckpt} is not a plain DiT: {wrong[0]} is missing, unknown or of another shape"
        )
    base.load_state_dict({key: value.float() for key, value in state.items()}, assign=True)
    for parameter in base.parameters():
        parameter.requires_grad_(True)
    base.pos_embed.requires_grad_(False)
    base.__dict__["pos_embed_scale"] = scale
    return base


def _with_method(base: DiT, config: TrainConfig, dtype: torch.dtype) -> nn.Module:
    from .. import baselines

    if config.method == "full" and not config.method_args:
        return base
    options = dict(config.method_args)
    if config.method in ("difffit", "bitfit"):
        options["compute_dtype"] = None if dtype == torch.float32 else dtype
    if config.method == "difffit":
        options.setdefault("difffit", config.difffit)
    try:
        return baselines.apply(config.method, base, **options)
    except TypeError as error:
        raise DiffFitError(f"--method-args do not fit --method {config.method}: {error}") from error


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The global generator at ``seed`` inside, as it was outside."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def _value_errors() -> Iterator[None]:
    """What a model's constructor objects to is for the user to mend."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise DiffFitError(f"the model cannot be built: {error}") from error
