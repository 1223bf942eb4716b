"""The delta: the trainable parameters in a .safetensors file, under a header that says what they belong to (:mod:`.header`)."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import DeltaMismatchError, DiffFitError
from .base_hash import differing_part, recorded_base
from .difffit import DiffFitConfig
from .dit import DiT
from .header import VERSION, read_header, write_model_file
from .state_dict import check_finite


def save_delta(
    model: DiT,
    path: str | os.PathLike[str],
    *,
    delta: str | None = None,
    tensors: Mapping[str, Tensor] | None = None,
    class_names: Sequence[str] | None = None,
    **metadata: Any,
) -> None:
    """Write the trainables of ``model``, a FastDiffFitDiT, beside ``path`` and rename, so that a broken write leaves nothing.

    The same model gives the same bytes, whichever of its parameters require gradients (an average's, say, do not).

    Args:
        delta: of those beside the model's own, the name of the one that is written in their place; what its file recorded
            of the domain (``vae``, ``step``, ...) goes on, where ``metadata`` says nothing else.
        tensors: values to write in place of these, by parameter name (an EMA, say).
        class_names: names of the classes, in label order (default: those that the model was made with).
        metadata: anything JSON can hold (step, image_size, base name, ...).

    Raises:
        DiffFitError: ``tensors`` does not name exactly the trainable parameters, the folder is missing, or the model's modules
            have been made into something else (see :meth:`.as_built.AsBuilt.check_whole`).
    """
    model.as_built.check_whole("the delta cannot be saved")
    config = model.config
    if delta is None:
        own = {name: p.detach() for name, p in _trainables(model).items()}
    else:
        own, config, recorded = model.deltas.to_save(delta, model)
        class_names = recorded.pop("class_names", None) if class_names is None else class_names
        metadata = {**recorded, **metadata}
    if tensors is not None:
        if set(tensors) != set(own):
            odd = sorted(set(tensors) ^ set(own))[0]
            raise DiffFitError(f"tensors must name exactly the trainable parameters; {odd} is in only one of the two")
        own = {name: tensors[name].detach() for name in own}
    chosen = model.classes
    if class_names is None and chosen is not None and delta is None:
        class_names = chosen.names
    if class_names is not None and len(class_names) != config["num_classes"]:
        raise DiffFitError(f"class_names must name {config['num_classes']} classes; got {len(class_names)}")
    path = Path(path)
    if not path.parent.is_dir():
        raise DiffFitError(f"the folder for the delta does not exist: {path.parent}")
    header = {
        "config": config,
        "difffit": dataclasses.asdict(model.difffit),
        "pos_embed_scale": model.pos_embed_scale,
        "class_names": None if class_names is None else list(class_names),
        "class_rows": untrained_rows(model),
        **recorded_base(model),
        "random_base": model.random_base,
        "objective": model.objective,
        **metadata,
    }
    write_model_file(path, "delta", {n: t.to("cpu", torch.float32) for n, t in own.items()}, header)


def read_delta(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a delta file, without a model; ``header["difffit"]`` is a :class:`DiffFitConfig`.

    Raises:
        DiffFitError: the file is missing, unreadable, or no delta.
    """
    path = Path(path)
    if not path.is_file():
        raise DiffFitError(f"delta not found: {path}")
    try:
        header = read_header(path)
    except DiffFitError as error:
        raise DiffFitError(f"{path} cannot be used as a delta: {error}") from error
    if header.get("kind") != "delta":
        raise DiffFitError(f"{path} is not a delta of difffit_fast: its metadata does not say so")
    if header.get("model_class") is not None:
        raise DiffFitError(f"{path} is a delta of a {header['model_class']}; apply_difffit's load_delta reads it")
    if missing := [key for key in ("config", "difffit", "base_hash", "pos_embed_scale") if header.get(key) is None]:
        raise DiffFitError(f"{path} cannot be used: its metadata lacks {missing[0]}")
    if missing := sorted({f.name for f in dataclasses.fields(DiffFitConfig)} - set(header["difffit"])):
        raise DiffFitError(f"{path} cannot be used: difffit in its metadata lacks {missing[0]}")
    header["difffit"] = DiffFitConfig.resolve(header["difffit"])
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise DiffFitError(f"cannot read delta {path}: {error}") from error
    _check_sizes(tensors, header, str(path))
    check_finite(tensors, str(path))
    return tensors, header


def _check_sizes(tensors: Mapping[str, Tensor], header: Mapping[str, Any], source: str) -> None:
    """Raise unless the sizes that a delta claims are those of its tensors, before anything is made of these sizes."""
    depth, hidden = header["config"]["depth"], header["config"]["hidden_size"]
    numbers = {name.split(".")[1] for name in tensors if name.startswith("blocks.")}
    if odd := sorted(numbers - {str(i) for i in range(depth)}):
        raise DeltaMismatchError(
            f"{source} has a block {odd[0]!r:.40}; its metadata says that there are {depth}, numbered from 0"
        )
    for name, tensor in tensors.items():
        if name.endswith(".attn.proj.bias") and tensor.shape != (hidden,):
            raise DeltaMismatchError(
                f"{source}: {name} is {tuple(tensor.shape)}; its metadata says that the width is {hidden}"
            )
    everywhere = header["difffit"].bias or header["difffit"].affine_norm  # something of every block is trained
    if (everywhere or header.get("random_base") is not None) and len(numbers) < depth:
        raise DeltaMismatchError(f"{source} has {len(numbers)} blocks; its metadata says {depth}")


def check_delta(model: DiT, header: Mapping[str, Any], path: str, *, classes: bool = True) -> None:
    """Raise unless a delta of this header belongs to ``model``, a FastDiffFitDiT.

    Args:
        path: of the delta, for messages.
        classes: whether it must have as many classes as the model.

    Raises:
        DeltaMismatchError: it was made for another size, set of trainables, image size or base.
        DiffFitError: the model's modules have been made into something else.
    """
    model.as_built.check_whole(f"{path} cannot be loaded")
    mine = {
        "version": VERSION,
        "config": model.config,
        "difffit": model.difffit,
        "pos_embed_scale": model.pos_embed_scale,
        "class_rows": untrained_rows(model),
        "objective": model.objective,
    }
    _check_made_for(header, mine, path, "the model", classes)
    _check_base(header, recorded_base(model), path, "the model")


def check_alike(header: Mapping[str, Any], other: Mapping[str, Any], path: str, other_path: str) -> None:
    """Raise unless the deltas of two headers belong to the same models, whatever their classes; ``path``, for messages.

    Raises:
        DeltaMismatchError: as :func:`check_delta`.
    """
    _check_made_for(header, other, path, other_path, classes=False)
    _check_base(header, other, path, other_path)


def _check_made_for(header: Mapping[str, Any], mine: Mapping[str, Any], path: str, whose: str, classes: bool) -> None:
    """Compare all but the base of two headers; ``mine`` is that of ``whose``, which may be "the model"."""
    config, own = header["config"], mine["config"]
    for key, label in (
        ("hidden_size", "width"), ("depth", "depth"), ("num_heads", "number of heads"), ("patch_size", "patch size"),
        ("in_channels", "input channels"), ("mlp_ratio", "MLP ratio"), ("learn_sigma", "learn_sigma"),
        ("num_classes", "number of classes"), ("input_size", "input size"),
    ):  # fmt: skip
        if (classes or key != "num_classes") and config[key] != own[key]:
            raise DeltaMismatchError(f"{path} was made for {label} {config[key]}; {whose} has {label} {own[key]}")
    objectives = header.get("objective"), mine.get("objective")
    if None not in objectives and objectives[0] != objectives[1]:
        raise DeltaMismatchError(f"{path} was made for the objective {objectives[0]}; {whose} has {objectives[1]}")
    theirs, ours = header["difffit"], mine["difffit"]
    if theirs != ours:
        raise DeltaMismatchError(
            f"{path} was made with difffit={theirs.name} {theirs.to_json()}; {whose} has {ours.name} {ours.to_json()}"
        )
    scales = header["pos_embed_scale"], mine["pos_embed_scale"]
    if scales[0] != scales[1] and tells_scale(header) and tells_scale(mine):
        raise DeltaMismatchError(f"{path} was made with positions scaled by {scales[0]}; {whose} has {scales[1]}")
    if (rows := header.get("class_rows")) != (own_rows := mine.get("class_rows")):
        raise DeltaMismatchError(
            f"{path} was made with {_row_words(rows)} of its base's class table; {whose} has {_row_words(own_rows)}"
        )


def tells_scale(header: Mapping[str, Any]) -> bool:
    """Whether its ``pos_embed_scale`` is that of the positions: version 1 recorded the scale of a table that it had made
    itself, and 1 for any that came with the base."""
    return not (header["version"] == 1 and header["pos_embed_scale"] == 1)


def _check_base(header: Mapping[str, Any], mine: Mapping[str, Any], path: str, whose: str) -> None:
    if part := differing_part(header, mine, path, whose):
        a, b = (
            h["base_hash"] if part == "weights" else h["base_hashes"].get(part, ["none"])[0] for h in (header, mine)
        )
        raise DeltaMismatchError(
            f"{path} was made on another base: its {part} have the hash {a[:12]}…, {whose}'s {b[:12]}…"
        )


@torch.no_grad()
def load_delta(model: DiT, path: str | os.PathLike[str]) -> dict[str, Any]:
    """Load a delta into ``model``, a FastDiffFitDiT, and return its metadata. Nothing is changed when it does not belong.

    Raises:
        DeltaMismatchError: the delta was made for another size, class count, set of trainables, image size or base; the
            message names both sides.
        DiffFitError: the file cannot be read, or the model's modules have been made into something else.
    """
    tensors, metadata = read_delta(path)
    check_delta(model, metadata, str(path))
    model.deltas.see(model)  # what the base was, before it is no longer there
    put_trainables(_trainables(model), tensors, str(path))
    if model.classes is not None and metadata.get("class_names") is not None:
        model.classes = dataclasses.replace(model.classes, names=tuple(metadata["class_names"]))
    return metadata


def untrained_rows(model: DiT) -> list[int | None] | None:
    """The rows of the base's class table that ``model``, a FastDiffFitDiT, has; None where it has all in their order, or
    where the table is trained and so in the delta."""
    trained = model.difffit.class_embedding or model.classes is None
    return None if trained else model.classes.moved


def _row_words(rows: list[int | None] | None) -> str:
    return "all rows" if rows is None else f"the rows {', '.join(map(str, rows[:4]))}{', …' if len(rows) > 4 else ''}"


def _trainables(model: DiT) -> dict[str, torch.nn.Parameter]:
    """What DiffFit trains, whether it requires gradients at the moment or not."""
    return {name: p for name, p in model.named_parameters() if model.difffit.trains(name)}


def check_tensors(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise unless ``tensors`` can be the values of the trainable parameters ``own``, all of them and no other.

    Raises:
        DeltaMismatchError: a name is missing or not trained by this model, or a shape differs.
        DiffFitError: a tensor is not of floating numbers, or not finite.
    """
    if odd := sorted(set(own) ^ set(tensors)):
        where = "is missing from the file" if odd[0] in own else "is not trained by this model"
        raise DeltaMismatchError(f"{source} does not fit: {odd[0]} {where}")
    for name, p in own.items():
        if p.shape != tensors[name].shape:
            raise DeltaMismatchError(
                f"{source} does not fit: {name} has the shape {tuple(tensors[name].shape)}, the model {tuple(p.shape)}"
            )
    check_finite(tensors, source)


@torch.no_grad()
def put_trainables(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy ``tensors`` into the trainable parameters ``own`` of a model; nothing is changed where that cannot be."""
    check_tensors(own, tensors, source)
    for name, p in own.items():
        p.copy_(tensors[name])
