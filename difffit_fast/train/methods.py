"""From settings to a model: the base, and what of it the method trains."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from .. import baselines
from .._words import nearest
from ..errors import DiffFitError
from ..models.checkpoint import ModelFile, read_model
from ..models.dit import DIT_ARGUMENTS, DiT
from ..models.random_base import random_dit, seeded
from ..models.sizes import model_objective, model_sizes
from .config import TrainConfig
from .settings import flag

DEFAULT_MODEL = "DiT-XL/2"


def read_base(config: TrainConfig) -> ModelFile | None:
    """The checkpoint of ``config``, compared with what the settings say it is; None without one.

    Raises:
        DiffFitError: unknown names, a file that cannot be read, or one that contradicts the settings.
    """
    if config.model is not None:
        model_sizes(config.model)
    if unknown := [key for key in config.model_args if key not in DIT_ARGUMENTS]:
        close = nearest(unknown[0], DIT_ARGUMENTS)
        raise DiffFitError(f"unknown --model-args {unknown[0]!r}; the nearest known is {close!r}")
    if config.ckpt is None:
        return None
    file = read_model(config.ckpt).expect(name=config.model, flag="--model")
    heads = config.num_heads if config.num_heads is not None else config.model_args.get("num_heads")
    file = file.expect(num_heads=heads)
    return file.expect(flag="--model-args", **{k: v for k, v in config.model_args.items() if k != "num_heads"})


def objective_of(config: TrainConfig, base: ModelFile | None, model: nn.Module | None = None) -> str:
    """What the model learns to predict: as the settings say, else as the checkpoint records, else by the model's family.

    ``model``: one that was given instead of a checkpoint.

    Raises:
        DiffFitError: the settings contradict the model.
    """
    given = getattr(model, "objective", None)
    known = base.objective if base is not None else given or model_objective(config.model)
    if config.objective and known and config.objective != known:
        what = config.ckpt if base is not None else "the model" if given else f"--model {config.model}"
        raise DiffFitError(f"--objective {config.objective} was asked for, but {what} predicts by {known}")
    return config.objective or known or "ddpm"


def build_model(
    config: TrainConfig,
    *,
    channels: int,
    input_size: int,
    num_classes: int,
    dtype: torch.dtype,
    base: ModelFile | None = None,
    class_names: Sequence[str] | None = None,
) -> nn.Module:
    """The model that ``config`` asks for, on the CPU, with exactly its trainables requiring gradients.

    Its random parts (a base without --ckpt, new class rows, adapters) come from ``config.global_seed``.

    Args:
        channels: channels of what the diffusion model sees (4 latents, 3 pixels, 1 gray).
        input_size: its side.
        num_classes: classes of the model.
        dtype: arithmetic of the frozen weights.
        base: what :func:`read_base` gave, where it was called already.
        class_names: of the model, in the order of its labels; ``config.classes`` says what they have to do with the base's.

    Raises:
        DiffFitError: unknown model or method, or a checkpoint that does not fit.
    """
    _check_model_args(config, num_classes=num_classes, input_size=input_size, in_channels=channels)
    file = base if base is not None else read_base(config)
    objective = objective_of(config, file)
    with seeded(config.global_seed), _value_errors():
        if file is None:
            dit = _random_base(config, objective, channels, input_size, num_classes)
        else:
            if file.config["in_channels"] != channels:
                raise DiffFitError(
                    f"the checkpoint {config.ckpt} takes {file.config['in_channels']} channels, but the data gives "
                    f"{channels} (--vae {config.vae}; pixels have 3, gray ones 1, and the usual latents 4)"
                )
            # A row for dropped labels stays; one is made where dropping is asked for and there is none.
            null = file.has_null_class or bool(config.class_dropout_prob)
            if not null and config.class_dropout_prob is None:
                warnings.warn(
                    f"{config.ckpt} has no null class: labels are not dropped, and samples will not be guided "
                    "(--class-dropout-prob 0.1 adds one)",
                    stacklevel=2,
                )
            dit = file.predicting(objective).adapt(
                num_classes=num_classes, input_size=input_size, null_class=null, class_names=class_names,
                classes=config.classes,
            ).dit()  # fmt: skip
            if config.class_dropout_prob:
                dit.class_dropout_prob = dit.y_embedder.dropout_prob = config.class_dropout_prob
        model = _with_method(dit, config, dtype)
    if file is None and not trains_whole(model):
        warnings.warn(
            "no --ckpt: the frozen weights are random, made from the seed; this is for trying things out", stacklevel=2
        )
    return model


def trains_whole(model: nn.Module) -> bool:
    """Whether everything that a DiT can train is trained: all but the table of positions."""
    return all(p.requires_grad or name == "pos_embed" for name, p in model.named_parameters())


def _check_model_args(config: TrainConfig, **known: int) -> None:
    """Raise where ``--model-args`` says otherwise than data and other settings, which the model follows."""
    known |= {"num_heads": config.num_heads, "class_dropout_prob": config.class_dropout_prob}
    for key, value in known.items():
        if value is not None and config.model_args.get(key, value) != value:
            why = flag(key) if getattr(config, key, None) is not None else "the data"
            raise DiffFitError(f"--model-args has {key}={config.model_args[key]}, but by {why} it is {value}")


def _random_base(config: TrainConfig, objective: str, channels: int, input_size: int, num_classes: int) -> DiT:
    if config.classes == "keep":
        raise DiffFitError("--classes keep keeps the rows of a checkpoint; give --ckpt")
    sizes = {"class_dropout_prob": 0.1, **model_sizes(config.model or DEFAULT_MODEL), **config.model_args}
    if config.class_dropout_prob is not None:
        sizes["class_dropout_prob"] = config.class_dropout_prob
    if config.num_heads is not None:
        sizes["num_heads"] = config.num_heads
    sizes |= dict(input_size=input_size, in_channels=channels, num_classes=num_classes)
    return random_dit(sizes, config.global_seed, alive=config.method != "full", objective=objective)


def _with_method(base: DiT, config: TrainConfig, dtype: torch.dtype) -> nn.Module:
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
def _value_errors() -> Iterator[None]:
    """What a model's constructor objects to is for the user to mend."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise DiffFitError(f"the model cannot be built: {error}") from error
