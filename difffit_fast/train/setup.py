"""Everything that a run needs, opened and checked before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from .._processes import World
from ..data import ImageFolder, LatentSpace, PixelSpace, TrainingData
from ..data.vae import vae_of
from ..errors import DiffFitError
from ..models.checkpoint import ModelFile
from ..models.dit import DiT
from ..models.fast_dit import FastDiffFitDiT
from ..models.frozen_dtype import patterns
from ..models.sizes import model_name
from .captured import choose_capture
from .config import TrainConfig
from .labels import Classes, choose_classes, class_names_of
from .methods import build_model, objective_of, read_base, trains_whole
from .objective import DTYPES, Objective, choose_precision
from .source import Source, open_source
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
        class_names: of the model; ``shown``: those of them that training images are of, by number.
        num_workers: processes that load data, as many as wished or as there are CPUs and shared memory for.
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
    shown: list[int]
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
    given = model is not None
    size = base.image_size if base is not None else None
    channels = _channels(config, model, base)
    if config.vae == "auto":
        config = config.replace(vae=vae_of({} if base is None else base.header, channels))
    source = open_source(config, device, data, val_data, channels, size)
    classes = choose_classes(config, source.data, source.validation, model, base)
    model, objective = _model_and_objective(config, source, classes.names, model, base)
    stream, validation = _streams(config, source, classes, _label_dropout(config, model))
    if config.best_by == "val" and validation is None:
        raise DiffFitError("--best-by val needs validation data: give --val-path or --val-fraction; got neither")
    effective = config.replace(
        image_size=source.data.image_size, vae=source.vae, num_classes=len(classes.names), objective=objective.name,
        lr=config.learning_rate(len(stream)), max_steps=config.total_steps(len(stream)), epochs=None,
        class_dropout_prob=stream.drop_prob,
    )  # fmt: skip
    origin = "" if given else _origin(config, model)
    known = hasattr(model, "hidden_size")
    name = model_name(vars(model), objective.name) if known else config.model or type(model).__name__
    if config.gradient_checkpointing:
        _checkpoint_blocks(model)
    captured, how = choose_capture(config, device, model)
    model = model.to(device)
    if config.fsdp:
        _shard(model, world)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise DiffFitError("the model has no trainable parameter")
    mine = -(-config.global_batch_size // world.size)
    workers, few = affordable_workers(config.num_workers, stream.batch_bytes(mine), world.local_size)
    return Parts(
        config=effective, device=device, name=name, model=model, parameters=parameters, objective=objective,
        forward=torch.compile(model, dynamic=False) if config.compile else model, stream=stream, validation=validation,
        space=source.decoder, class_names=classes.names, shown=classes.shown,
        total_steps=effective.max_steps, num_workers=workers, captured=captured,
        notes=[note for note in (slow, how, origin, classes.said, few, *_told(source)) if note],
    )  # fmt: skip


def _told(source: Source) -> list[str]:
    """What the data says of itself: images that were left out, and the like."""
    gray = isinstance(source.data, ImageFolder) and source.data.channels == 1
    said = ["the model has one channel: images are read as gray"] if gray else []
    return said + [note for data in (source.data, source.validation) for note in getattr(data, "notes", ())]


# -- model and objective -----------------------------------------------------------------------------------------------


def _origin(config: TrainConfig, model: nn.Module) -> str:
    """Where the classes of a model that was made here start from, or that all of it starts from nothing."""
    if config.ckpt is not None:
        return model.classes.said
    return (
        f"no --ckpt: the model is trained from scratch, from seed {config.global_seed}" if trains_whole(model) else ""
    )


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
    elif (own := class_names_of(model)) and own != class_names:
        odd = next(i for i, (ours, theirs) in enumerate(zip(own, class_names, strict=True)) if ours != theirs)
        raise DiffFitError(
            f"class {odd} of the model is {own[odd]!r}, and class {odd} of the data is {class_names[odd]!r}"
        )
    _set_frozen_dtype(config, model)
    sees = source.channels, source.size
    has = getattr(model, "in_channels", sees[0]), getattr(model, "input_size", sees[1])
    if has != sees:
        raise DiffFitError(
            f"the model takes {has[0]} x {has[1]} x {has[1]}, but the data gives {sees[0]} x {sees[1]} x {sees[1]}"
        )
    own_arithmetic = getattr(model, "compute_dtype", None) is not None
    autocast = None if own_arithmetic or dtype == torch.float32 else dtype
    return model, Objective(config.objective, getattr(model, "learn_sigma", True), source.encoder, autocast)


def _set_frozen_dtype(config: TrainConfig, model: nn.Module) -> None:
    if config.frozen_dtype == "bf16":
        return
    if not isinstance(model, FastDiffFitDiT):
        raise DiffFitError(
            f"--frozen-dtype {config.frozen_dtype} is for frozen weights, of --method difffit and bitfit; got {config.method}"
        )
    model.set_frozen_dtype(config.frozen_dtype, patterns(config.frozen_keep))


def _checkpoint_blocks(model: nn.Module) -> None:
    """Let every block be computed again in the backward pass, where that gives the same gradients."""
    if not isinstance(model, DiT):
        raise DiffFitError(f"--gradient-checkpointing is for models of this package, not for {type(model).__name__}")
    for name, module in model.blocks.named_modules():
        if isinstance(module, _DropoutNd) and module.p > 0:
            raise DiffFitError(
                "--gradient-checkpointing computes blocks twice, and expected the same both times, but "
                f"blocks.{name} is random: {module}"
            )
    model.gradient_checkpointing = True


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
    config: TrainConfig, source: Source, classes: Classes, drop_prob: float
) -> tuple[TrainStream, ValidationStream | None]:
    """What is trained on, and the fixed set that the validation loss looks at, if there is to be one."""
    seed, count = config.global_seed, len(source.data)
    shape = (source.channels, source.size, source.size)
    draws = {"null_class": len(classes.names), "encode": source.encoder is not None, "noise_shape": shape}
    indices, held = None, None
    if source.validation is not None:
        held = choose(len(source.validation), config.val_samples, seed)
    elif config.val_fraction > 0:
        if count < 2:
            raise DiffFitError(f"--val-fraction needs at least two images; the data has {count}")
        indices, held = hold_out(count, config.val_fraction, seed)
        held = held[choose(len(held), config.val_samples, seed)]
    stream = TrainStream(source.data, seed, drop_prob=drop_prob, indices=indices, classes=classes.training, **draws)
    if held is None:
        return stream, None
    watched = source.validation if source.validation is not None else source.data
    return stream, ValidationStream(watched, seed, drop_prob=0.0, indices=held, classes=classes.validation, **draws)


def _label_dropout(config: TrainConfig, model: nn.Module) -> float:
    """How often labels are dropped: as the settings say, else as the model was made, and never without a null class."""
    asked = config.class_dropout_prob
    if not getattr(model, "has_null_class", True):
        if asked:
            raise DiffFitError(f"--class-dropout-prob is {asked}, but the model has no null class")
        return 0.0
    return getattr(model, "class_dropout_prob", 0.1) if asked is None else asked
