"""From files to a model that can be used: a checkpoint, or a base with a delta on top."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .._files import read_yaml
from .._words import shown
from ..errors import DiffFitError
from .bases import model_path
from .checkpoint import ModelFile, image_pixels, read_model
from .delta import read_delta
from .dit import DiT
from .fast_dit import FastDiffFitDiT
from .frozen_dtype import DEFAULT_KEEP
from .random_base import random_dit, seeded

RUN_SETTINGS = "config.yaml"  # in a run's folder, beside its "checkpoints"


@dataclass
class LoadedModel:
    """A model in eval mode, and what its file says about itself.

    ``header`` is what training recorded (``class_names, objective, vae, image_size, step``...); empty for public
    checkpoints. ``objective`` is None where no file tells.
    """

    model: DiT
    header: dict[str, Any]
    objective: str | None
    image_size: int

    @property
    def class_names(self) -> list[str] | None:
        return self.header.get("class_names")


def load_model(
    ckpt: str | os.PathLike[str] | None = None,
    delta: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]] | None = None,
    *,
    merge: bool = False,
    weights: str = "ema",
    name: str | None = None,
    num_heads: int | None = None,
    num_classes: int | None = None,
    image_size: int | None = None,
    compute_dtype: torch.dtype | None = None,
    frozen_dtype: str = "bf16",
    frozen_keep: Sequence[str] = DEFAULT_KEEP,
    device: torch.device | str = "cpu",
) -> LoadedModel:
    """Load ``ckpt``, or ``ckpt`` with ``delta`` applied on the fly (``merge=True``: folded into an ordinary DiT first).

    Args:
        ckpt: any DiT or SiT checkpoint, or the name of a base of the package; None with a delta that lies in its run folder,
            whose settings name the base.
        delta: a delta; or several by name, which lie beside each other on the base (see :mod:`.deltas`). ``merge`` is for one,
            ``num_classes`` then that of the base, and the header holds what all of them record alike.
        weights: "ema" or "model" where a checkpoint has both, or the name of a set.
        name: published name that the model should have, such as "SiT-XL/2".
        num_heads: for widths that were never published, in files that do not record it.
        num_classes: that the model should have.
        image_size: pixels; another one than a checkpoint's makes a new positional table in scaled coordinates; with a
            delta it must be the delta's.
        compute_dtype: of the frozen weights, with a delta that is not merged, or with ``frozen_dtype``.
        frozen_dtype: "fp8", "int8" or "auto": products of the blocks in eight bits, as of
            :class:`~difffit_fast.models.fast_dit.FastDiffFitDiT`, which any model then is.
        frozen_keep: linears that stay out of it.

    Raises:
        DiffFitError: a file is missing, unreadable, no DiT, contradicts what was asked for, or does not belong to the other.
    """
    if isinstance(delta, Mapping):
        if merge:
            raise DiffFitError("deltas beside each other cannot be merged into one model; load one, and merge it")
        found = _load_deltas(ckpt, delta, weights, name, num_heads, num_classes, image_size, compute_dtype)
    else:
        found = _load_one(ckpt, delta, merge, weights, name, num_heads, num_classes, image_size, compute_dtype)
    model = (
        found.model if frozen_dtype == "bf16" else in_eight_bit(found.model, frozen_dtype, frozen_keep, compute_dtype)
    )
    return replace(found, model=model.to(device).eval())


def in_eight_bit(
    model: DiT, frozen_dtype: str, frozen_keep: Sequence[str], compute_dtype: torch.dtype | None
) -> FastDiffFitDiT:
    """The model, or one made of it, whose products are those of ``frozen_dtype``."""
    if not isinstance(model, FastDiffFitDiT):
        model = (
            FastDiffFitDiT.from_dit(model, compute_dtype=compute_dtype).to(model.pos_embed.device).train(model.training)
        )
    model.set_frozen_dtype(frozen_dtype, frozen_keep)
    return model


def _load_one(
    ckpt: str | os.PathLike[str] | None,
    delta: str | os.PathLike[str] | None,
    merge: bool,
    weights: str,
    name: str | None,
    num_heads: int | None,
    num_classes: int | None,
    image_size: int | None,
    compute_dtype: torch.dtype | None,
) -> LoadedModel:
    if delta is None:
        if ckpt is None:
            raise DiffFitError("nothing to load: give a checkpoint, or a delta")
        file = read_model(ckpt, weights).expect(name=name, num_heads=num_heads, num_classes=num_classes)
        file = file.adapt(image_size=image_size)
        model, header, objective, pixels = file.dit(), file.header, file.objective, file.image_size
    else:
        header = read_delta(delta)[1]
        pixels = image_pixels(header, header["config"], str(delta))
        objective = header.get("objective")
        said = ModelFile({}, header["config"], str(delta), objective, 1.0, pixels, header, frozenset(header["config"]))
        said = said.expect(name=name, num_heads=num_heads, num_classes=num_classes)
        if image_size not in (None, pixels):
            raise DiffFitError(f"image_size {image_size} was asked for; {delta} was made for {pixels} pixels")
        model = base_of(ckpt, delta, header, weights, None if merge else compute_dtype)
        model.load_delta(delta)
        model = model.merge() if merge else model
        objective = said.objective
    return LoadedModel(model, header, objective, pixels)


def _load_deltas(
    ckpt: str | os.PathLike[str] | None,
    deltas: Mapping[str, str | os.PathLike[str]],
    weights: str,
    name: str | None,
    num_heads: int | None,
    num_classes: int | None,
    image_size: int | None,
    compute_dtype: torch.dtype | None,
) -> LoadedModel:
    """A base with several deltas beside each other; the first one says what the base is loaded as."""
    if not deltas:
        raise DiffFitError("there are no deltas to load")
    headers = {path: read_delta(path)[1] for path in deltas.values()}
    first, header = next(iter(headers.items()))
    pixels = image_pixels(header, header["config"], str(first))
    if image_size not in (None, pixels):
        raise DiffFitError(f"image_size {image_size} was asked for; {first} was made for {pixels} pixels")
    if ckpt is None:
        bases = {path: _ckpt_of(path, said) for path, said in headers.items()}
        for path, base in bases.items():
            if base != bases[first]:
                raise DiffFitError(
                    f"the settings of the runs name different bases, {_shown_base(*bases[first])} for {first} and "
                    f"{_shown_base(*base)} for {path}; give --ckpt"
                )
    model = base_of(ckpt, first, header, weights, compute_dtype, own_classes=True)
    said = ModelFile({}, model.config, str(ckpt), model.objective, 1.0, pixels, recorded=frozenset(model.config))
    said.expect(name=name, num_heads=num_heads, num_classes=num_classes)
    model.load_deltas(deltas)
    common = {key: value for key, value in header.items() if all(h.get(key) == value for h in headers.values())}
    objective = next((h["objective"] for h in headers.values() if h.get("objective") is not None), model.objective)
    return LoadedModel(model, common, objective, pixels)


def _shown_base(ckpt: str | None, seed: int) -> str:
    return f"random weights of seed {seed}" if ckpt is None else str(ckpt)


def base_of(
    ckpt: str | os.PathLike[str] | None,
    delta: str | os.PathLike[str],
    header: dict[str, Any],
    weights: str = "ema",
    compute_dtype: torch.dtype | None = None,
    *,
    own_classes: bool = False,
) -> FastDiffFitDiT:
    """The base of a delta, as the model that the delta is made for and is not loaded into yet.

    Args:
        ckpt: the base; None: the one that the settings of the delta's run name, or the random weights that it was made on.
        header: of the delta.
        own_classes: keep the base's classes, for a delta that lies beside it, in place of the delta's.

    Raises:
        DiffFitError: there is none, or it cannot be the delta's; whether it is the one tells loading the delta.
    """
    config, difffit = header["config"], header["difffit"]
    found_by = ""
    if ckpt is None:
        ckpt, seed = _ckpt_of(delta, header)
        found_by = (
            f", which {Path(delta).resolve().parent.parent / RUN_SETTINGS} names as the base of {delta}; give --ckpt"
        )
    if ckpt is None:
        base = random_dit(config, seed, objective=header.get("objective"))
        return FastDiffFitDiT.from_dit(base, difffit=difffit, compute_dtype=compute_dtype)
    if found_by and not model_path(ckpt).exists():
        raise DiffFitError(f"checkpoint not found: {ckpt}{found_by}")
    file = read_model(ckpt, weights)
    with warnings.catch_warnings(), seeded(0):
        warnings.simplefilter("ignore")  # said when the delta was made; its class table replaces the random one
        file = file.expect(num_heads=config["num_heads"])
        null = config["class_dropout_prob"] > 0
        if not own_classes or "class_dropout_prob" not in file.recorded:
            file = file.with_null_class(null)
        if header.get("class_rows") is not None:
            file = file.with_class_rows(header["class_rows"], header.get("class_names"))
        changed = file.config["num_classes"] != config["num_classes"]
        if changed and not difffit.class_embedding and not own_classes:
            raise DiffFitError(
                f"{delta} was made for {config['num_classes']} classes without training their embedding; "
                f"{ckpt} has {file.config['num_classes']}"
            )
        classes: dict[str, Any] = {}
        if not own_classes:
            classes = {"num_classes": config["num_classes"], "class_dropout_prob": config["class_dropout_prob"]}
        return FastDiffFitDiT._of_file(
            file, input_size=config["input_size"], pos_embed=header["pos_embed_scale"], difffit=difffit,
            compute_dtype=compute_dtype, objective=header.get("objective"), **classes,
        )  # fmt: skip


def _ckpt_of(delta: str | os.PathLike[str], header: dict[str, Any]) -> tuple[str | None, int]:
    """The checkpoint that a delta was trained on, by the settings of its run; or None and the seed of random weights."""
    if header.get("random_base") is not None:
        return None, header["random_base"]
    folder = Path(delta).resolve().parent
    settings = folder.parent / RUN_SETTINGS
    if folder.name != "checkpoints" or not settings.is_file():
        raise DiffFitError(f"the base of {delta} is not known: it does not lie in its run folder; give --ckpt")
    run = read_yaml(settings)
    ckpt, seed = run.get("ckpt"), run.get("global_seed", 0)
    if ckpt is not None and (not isinstance(ckpt, str) or not ckpt):
        raise DiffFitError(f"ckpt in {settings} should be a path or null; it is {shown(ckpt)}; give --ckpt")
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 1 << 64:
        raise DiffFitError(f"global_seed in {settings} should be a whole number of 64 bits; it is {shown(seed)}")
    return ckpt, seed
