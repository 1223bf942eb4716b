"""Everything that a run needs, opened and checked before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .._processes import World
from ..data import ImageFolder, LatentSpace, PixelSpace, TrainingData
from ..errors import DiffFitError
from ..models.checkpoint import ModelFile
from ..models.classes import ClassRows
from ..models.sizes import model_name
from .captured import choose_capture
from .config import DEFAULT_STEPS, TrainConfig
from .methods import build_model, objective_of, read_base
from .objective import DTYPES, Objective, choose_precision
from .source import Source, count_classes, open_source
from .stream import TrainStream, ValidationStream, affordable_workers, choose, hold_out


@dataclass
class Parts:
    """The parts of a run.

    Attributes:
        config: the effective settings: every default that depends on data, model or device is filled in.
        name: the model's, which run folders bear.
        model: on the device, and sharded if it is to be; ``forward`` is how to call it, compiled or not.
        parameters: what trains, by name.
        space: decodes samples; None where there is nothing to decode them with.
        num_workers: processes that load data, as many as wished or as there is shared memory for.
        captured: whether forward and backward are to run from a CUDA graph.
        notes: what the user should hear.
    """

    config: TrainConfig
    device: torch.device
    name: str
    model: nn.Module
    forward: Callable[..., Tensor]
    parameters: dict[str, nn.Parameter]
    objective: Objective
    stream: TrainStream
    validation: ValidationStream | None
    space: LatentSpace | PixelSpace | None
    class_names: list[str]
    total_steps: int
    num_workers: int
    captured: bool
    notes: list[str]


def assemble(
    config: TrainConfig,
    device: torch.device,
    world: World,
    model: nn.Module | None = None,
    data: TrainingData | None = None,
    val_data: TrainingData | None = None,
) -> Parts:
    """Open the data, load the VAE, build the model.

    Raises:
        DiffFitError: anything that is missing or does not fit.
    """
    precision, slow = choose_precision(config.precision, device)
    config = config.replace(precision=precision)
    base = read_base(config) if model is None else None
    source = open_source(config, device, data, val_data, _channels(config, model, base))
    num_classes = count_classes(config, model, source.data)
    names = list(source.data.class_names)
    names += (_class_names(model) or [f"class {i}" for i in range(num_classes)])[len(names) :]
    model, objective = _model_and_objective(config, source, names, model, base)
    stream, validation = _streams(config, source, num_classes, _label_dropout(config, model))
    effective = config.replace(
        image_size=source.data.image_size, vae=source.vae, num_classes=num_classes, objective=objective.name,
        lr=config.learning_rate, max_steps=_total_steps(config, len(stream)), epochs=None,
        class_dropout_prob=stream.drop_prob,
    )  # fmt: skip
    chosen = getattr(model, "classes", None) if config.ckpt is not None else None
    classes = chosen.said if chosen is not None else ""
    known = hasattr(model, "hidden_size")
    name = model_name(vars(model), objective.name) if known else config.model or type(model).__name__
    captured, how = choose_capture(config, device, model)
    model = model.to(device)
    if config.fsdp:
        _shard(model, world)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise DiffFitError("the model has no trainable parameter")
    mine = -(-config.global_batch_size // world.size)
    workers, few = affordable_workers(config.num_workers * world.size, stream.batch_bytes(mine))
    workers //= world.size
    return Parts(
        config=effective, device=device, name=name, model=model, parameters=parameters, objective=objective,
        forward=torch.compile(model) if config.compile else model, stream=stream, validation=validation,
        space=source.decoder, class_names=names,
        total_steps=effective.max_steps, num_workers=workers, captured=captured,
        notes=[note for note in (slow, how, classes, few, *_told(source)) if note],
    )  # fmt: skip


def _told(source: Source) -> list[str]:
    """What the data says of itself: images that were left out, and the like."""
    gray = isinstance(source.data, ImageFolder) and source.data.channels == 1
    said = ["the model has one channel: images are read as gray"] if gray else []
    return said + [note for data in (source.data, source.validation) for note in getattr(data, "notes", ())]


# -- model and objective -----------------------------------------------------------------------------------------------


def _channels(config: TrainConfig, model: nn.Module | None, base: ModelFile | None) -> int | None:
    """Channels of what the model sees, as far as anything says so before the data is there."""
    if model is not None:
        return getattr(model, "in_channels", None)
    return base.config["in_channels"] if base is not None else config.model_args.get("in_channels")


def _model_and_objective(
    config: TrainConfig, source: Source, class_names: list[str], model: nn.Module | None, base: ModelFile | None
) -> tuple[nn.Module, Objective]:
    """The model, as it was given or as the settings ask for it, and the loss that suits it."""
    dtype = DTYPES[config.precision]
    config = config.replace(objective=objective_of(config, base, model))
    if model is None:
        model = build_model(
            config, channels=source.channels, input_size=source.size, num_classes=len(class_names), dtype=dtype, base=base,
            class_names=class_names,
        )  # fmt: skip
    elif (own := _class_names(model)) and own != class_names:
        odd = next(i for i, (ours, theirs) in enumerate(zip(own, class_names, strict=True)) if ours != theirs)
        raise DiffFitError(
            f"class {odd} of the model is {own[odd]!r}, and class {odd} of the data is {class_names[odd]!r}"
        )
    sees = source.channels, source.size
    has = getattr(model, "in_channels", sees[0]), getattr(model, "input_size", sees[1])
    if has != sees:
        raise DiffFitError(
            f"the model takes {has[0]} x {has[1]} x {has[1]}, but the data gives {sees[0]} x {sees[1]} x {sees[1]}"
        )
    own_arithmetic = getattr(model, "compute_dtype", None) is not None
    autocast = None if own_arithmetic or dtype == torch.float32 else dtype
    return model, Objective(config.objective, getattr(model, "learn_sigma", True), source.encoder, autocast)


def _class_names(model: nn.Module) -> list[str] | None:
    """The names of the classes that a model was made with, where it knows them."""
    chosen = getattr(model, "classes", None)
    return list(chosen.names) if isinstance(chosen, ClassRows) and chosen.names is not None else None


def _shard(model: nn.Module, world: World) -> None:
    """FSDP2: weights, gradients and optimizer state spread over the processes, block by block."""
    if world.size == 1:
        raise DiffFitError("--fsdp needs several processes; start them with torchrun")
    from torch.distributed.fsdp import fully_shard

    for block in model.blocks:
        fully_shard(block)
    fully_shard(model, reshard_after_forward=True, ignored_params={model.pos_embed})


# -- streams -----------------------------------------------------------------------------------------------------------


def _streams(
    config: TrainConfig, source: Source, num_classes: int, drop_prob: float
) -> tuple[TrainStream, ValidationStream | None]:
    """What is trained on, and the fixed set that the validation loss looks at, if there is to be one."""
    seed, count = config.global_seed, len(source.data)
    shape = (source.channels, source.size, source.size)
    draws = {"null_class": num_classes, "encode": source.encoder is not None, "noise_shape": shape}
    indices, held = None, None
    if source.validation is not None:
        held = choose(len(source.validation), config.val_samples, seed)
    elif config.val_fraction > 0:
        if count < 2:
            raise DiffFitError(f"--val-fraction needs at least two images; the data has {count}")
        indices, held = hold_out(count, config.val_fraction, seed)
        held = held[choose(len(held), config.val_samples, seed)]
    stream = TrainStream(source.data, seed, drop_prob=drop_prob, indices=indices, **draws)
    if held is None:
        return stream, None
    watched = source.validation if source.validation is not None else source.data
    return stream, ValidationStream(watched, seed, drop_prob=0.0, indices=held, **draws)


def _label_dropout(config: TrainConfig, model: nn.Module) -> float:
    """How often labels are dropped: as the settings say, else as the model was made, and never without a null class."""
    asked = config.class_dropout_prob
    if not getattr(model, "has_null_class", True):
        if asked:
            raise DiffFitError(f"--class-dropout-prob is {asked}, but the model has no null class")
        return 0.0
    return getattr(model, "class_dropout_prob", 0.1) if asked is None else asked


def _total_steps(config: TrainConfig, images: int) -> int:
    if config.epochs is not None:
        return max(1, -(-config.epochs * images // config.global_batch_size))
    return config.max_steps or DEFAULT_STEPS
