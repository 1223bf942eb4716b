"""From a file to the state dict of a DiT, whatever training code has put around it.

A checkpoint may be a bare state dict or hold several under names (``ema``, ``model``, ``state_dict``, ...), at any depth;
keys may carry the names of wrappers anywhere (DDP, FSDP, torch.compile whole or by region, activation checkpointing,
``AveragedModel``, Lightning, Fabric, DeepSpeed), and of the module that held the model. So nothing is looked up by a list
of known layouts: the one key that every DiT has tells where a set of weights begins (:func:`weight_sets`).

Nothing in a file is run. Objects of unknown classes (a ``pathlib.Path`` among the arguments, a NumPy scalar, a pickled
module) are replaced by inert :class:`StandIn` objects, which are reported where weights were expected.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .._files import read_json, safetensors_metadata
from .._words import first_line, shown
from ..errors import DiffFitError
from .bases import base_names, model_path
from .diffusers_keys import PIPELINE_FILE, from_diffusers, is_diffusers, read_config
from .dit import STATE_DICT_KEY
from .foreign import is_foreign, parts, say_left_out
from .header import decode_header

ANCHOR = "x_embedder.proj.weight"
ROOTS = frozenset({"x_embedder", "t_embedder", "y_embedder", "pos_embed", "blocks", "final_layer"})
WRAPPERS = frozenset({
    "module", "_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module", "_forward_module",
})  # fmt: skip
COUNTER = "n_averaged"  # of an average of weights; no part of the model
INDEX_FILES = (
    "model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors.index.json",
    "pytorch_model.bin.index.json",
    "diffusion_pytorch_model.bin.index.json",
)
WEIGHT_FILES = (
    "model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "pytorch_model.bin",
    "diffusion_pytorch_model.bin",
)
FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Weights:
    """The state dict of one set of weights, and what the file says beside it.

    Attributes:
        state: tensors under DiT's keys (and γ, LayerNorm where a DiffFit model was saved unmerged).
        source: the file, for messages.
        name: which set it is, "" for a bare state dict.
        names: all sets in the file.
        header: strings of a header, see :mod:`.header`; empty where there is none.
        arguments: of the training script (``args``, ``hyper_parameters``), empty where there are none.
        left_out: the foreign parts beside the DiT, in words, see :mod:`.foreign`.
    """

    state: dict[str, Tensor]
    source: str
    name: str = ""
    names: tuple[str, ...] = ("",)
    header: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()


def read_weights(path: str | os.PathLike[str], weights: str = "ema") -> Weights:
    """The weights of a DiT in a file, on the CPU, as they were stored.

    Args:
        path: ``.pt`` and its kin, ``.safetensors``, the index of a sharded checkpoint, a folder that holds one of these, or
            the name of a base of the package (:mod:`.bases`).
        weights: which set to take where the file has several: "ema" (averaged, else the others), "model" (not averaged),
            or the name of one.

    Raises:
        DiffFitError: the file is missing, unreadable, holds no DiT, or values that are not finite.
    """
    path = _file(model_path(path))
    if path.name.endswith(".index.json"):
        content, strings = _read_shards(path)
    elif is_safetensors(path):
        content, strings = _read_safetensors(path), safetensors_metadata(path)
    else:
        content, strings = _read_torch(path), {}
    if isinstance(content, Mapping) and is_diffusers(content):
        content, strings = from_diffusers(content, read_config(path), str(path))
    found = find_weights(content, str(path), weights, strings)
    if key := next((key for key, tensor in found.state.items() if tensor.device.type == "meta"), None):
        raise DiffFitError(f"{path}: {key} has a shape but no values (it was saved on the device meta)")
    return found


def find_weights(
    content: Any, source: str = "the state dict", weights: str = "ema", strings: Mapping[str, Any] | None = None
) -> Weights:
    """As :func:`read_weights`, for what a file holds."""
    if (kind := decode_header(strings or {}, source).get("kind", "model")) != "model":
        what = "a delta" if kind == "delta" else "the trainables of a method"
        raise DiffFitError(f"{source} is {what}, not a checkpoint; a delta is given beside its base (--delta)")
    if isinstance(content, StandIn):
        raise DiffFitError(
            f"{source} holds a pickled object of the class {content.name} instead of weights, and objects are not "
            "unpickled here; save its state_dict() with torch.save, and give that file"
        )
    if not isinstance(content, Mapping):
        raise DiffFitError(f"{source} holds a {type(content).__name__}, not a state dict")
    sets = weight_sets(content, source)
    name = _choose(sets, content, source, weights)
    found = sets[name]
    check_finite(found.state, source)
    left_out = tuple(parts(found.foreign))
    say_left_out(left_out, source)
    header = dict(strings or {}) or _header_beside(found.containers, source)
    return Weights(found.state, source, name, tuple(sorted(sets)), header, _arguments(content), left_out)


# -- sets of weights ---------------------------------------------------------------------------------------------------
@dataclass
class _Set:
    state: dict[str, Tensor]
    averaged: bool
    containers: list[Mapping[Any, Any]]
    foreign: list[str]


def weight_sets(content: Mapping[Any, Any], source: str) -> dict[str, _Set]:
    """Every set of DiT weights in a checkpoint, by the names that lead to it ("" where none does).

    Raises:
        DiffFitError: there is none, or a key that belongs to no DiT stands among its keys.
    """
    tensors = list(_tensors(content, (), content, Counter(), source))
    places: dict[str, list[tuple[str, Tensor, Mapping[Any, Any]]]] = {}
    by_path: dict[str, tuple[Tensor, Mapping[Any, Any]]] = {}
    for words, tensor, container in tensors:
        path = ".".join(word for word in words if word not in WRAPPERS)
        if path in by_path:
            raise DiffFitError(f"{source} holds {path} twice, under different wrappers")
        by_path[path] = tensor, container
    starts = {path[: -len(ANCHOR)] for path in by_path if path == ANCHOR or path.endswith("." + ANCHOR)}
    if not starts:
        raise DiffFitError(_no_dit(content, by_path, source))
    for path, (tensor, container) in by_path.items():
        start = max((s for s in starts if path.startswith(s)), key=len, default=None)
        if start is not None:
            places.setdefault(start, []).append((path[len(start) :], tensor, container))
    sets = {}
    for start, members in places.items():
        homes = [container for key, _, container in members if key == ANCHOR]
        for home in homes:
            if odd := [key for key, value in home.items() if not isinstance(key, str) and isinstance(value, Tensor)]:
                raise DiffFitError(f"{source} is not a DiT: it has a tensor under {shown(odd[0])}, which is no name")
        state, foreign, averaged = {}, [], _is_averaged(start)
        for key, tensor, container in members:
            root = key.split(".")[0]
            if root in ROOTS:
                state[key] = tensor
            elif any(container is home for home in homes):  # what lies elsewhere (an optimizer) is not the model's
                averaged |= root == COUNTER
                if is_foreign(key):
                    foreign.append(key)
                elif root != COUNTER:
                    raise DiffFitError(f"{source} is not a DiT: it has the unknown key {start}{key}{_hint(key)}")
        sets[start.rstrip(".")] = _Set(state, averaged, homes, foreign)
    return sets


def _tensors(
    value: Any, words: tuple[str, ...], container: Mapping[Any, Any], visits: Counter[int], source: str
) -> Iterator[tuple[tuple[str, ...], Tensor, Mapping[Any, Any]]]:
    """Every tensor in nested mappings, with the words of its path and the mapping that holds it."""
    if isinstance(value, Tensor):
        yield words, value, container
    elif isinstance(value, Mapping) and len(words) < 64:
        visits[id(value)] += 1
        if visits[id(value)] > 64:  # a few kilobytes of them can stand for more paths than anyone can walk
            raise DiffFitError(f"{source} holds the same dictionary over and over; the file is broken")
        for key, inner in value.items():
            if isinstance(key, str):
                yield from _tensors(inner, (*words, *key.split(".")), value, visits, source)


def _is_averaged(start: str) -> bool:
    """Whether the names that lead to a set say that it is an average: ema, ema_model, params_ema, averaged ..."""
    words = [part for word in start.lower().split(".") for part in re.split(r"[_\W]", word)]
    return "online" not in words and any(word in ("ema", "averaged", "average", "shadow", "swa") for word in words)


def _choose(sets: Mapping[str, _Set], content: Mapping[Any, Any], source: str, weights: str) -> str:
    if weights in sets:
        return weights
    if weights not in ("ema", "model"):
        raise DiffFitError(f"{source} has no weights called {weights!r}; it has {', '.join(map(repr, sorted(sets)))}")
    wanted = [name for name, found in sets.items() if found.averaged == (weights == "ema")]
    if weights == "ema" and not wanted and _has_unnamed_average(content):
        warnings.warn(
            f"{source}: its averaged weights are a list without names, which cannot be told apart; the others are used",
            stacklevel=2,
        )
    if weights == "model" and not wanted:
        warnings.warn(f"{source} holds averaged weights only; they are used", stacklevel=2)
    names = wanted or list(sets)
    if len(names) > 1:
        plain = [name for name in names if name in ("ema", "model", "state_dict", "")]
        if len(plain) == 1:
            return plain[0]
        raise DiffFitError(
            f"{source} holds several sets of weights: {', '.join(map(repr, sorted(sets)))}; say which one is meant "
            "(weights=..., --weights)"
        )
    return names[0]


def _has_unnamed_average(value: Any, depth: int = 0) -> bool:
    if not isinstance(value, Mapping) or depth > 3:
        return False
    return isinstance(value.get("shadow_params"), list) or any(
        _has_unnamed_average(v, depth + 1) for key, v in value.items() if isinstance(key, str)
    )


def _no_dit(content: Mapping[Any, Any], tensors: Mapping[str, Any], source: str) -> str:
    objects = [f"{key} (a pickled {value.name})" for key, value in content.items() if isinstance(value, StandIn)]
    if not tensors and objects:
        return (
            f"{source} holds pickled objects instead of weights: {', '.join(objects)}; objects are not unpickled here: save "
            "their state_dict() with torch.save, and give that file"
        )
    known = ", ".join(list(tensors)[:3]) or f"no tensors, but {', '.join(map(str, list(content)[:5])) or 'nothing'}"
    hint = next((_hint(key) for key in tensors if _hint(key)), "")
    return f"{source} is not a DiT: it has no {ANCHOR} (it has {known}){hint}"


def _hint(key: str) -> str:
    """What a foreign key tells, and what to do."""
    if "lora_" in key or "base_layer" in key:
        return "; it looks like a model with LoRA layers: merge them first (PEFT: merge_and_unload)"
    if "_flat_param" in key:
        return "; it was saved by FSDP with flattened parameters: save it with StateDictType.FULL_STATE_DICT"
    if key.startswith("transformer_blocks."):
        return "; it looks like a transformer of diffusers: give its folder, with config.json"
    if "decoder" in key or key.startswith("encoder."):
        return "; it looks like an autoencoder"
    return ""


_REPEATED = 64 << 20  # bytes by which a view may repeat what is stored


def check_finite(state: Mapping[str, Tensor], source: str) -> None:
    """Raise :class:`DiffFitError` unless every tensor is dense, of floating numbers of at least 16 bits, and finite."""
    for key, tensor in state.items():
        dense = tensor.layout == torch.strided and not tensor.is_nested
        if not dense or tensor.is_quantized or tensor.dtype not in FLOATING:
            kind = "nested" if tensor.is_nested else tensor.dtype if dense else tensor.layout
            raise DiffFitError(
                f"{source}: {key} is {str(kind).removeprefix('torch.')}; weights must be dense, float64, float32, "
                "bfloat16 or float16 (a quantised checkpoint has to be dequantised first)"
            )
        claimed, there = tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
        if claimed > there + _REPEATED and tensor.device.type != "meta":
            raise DiffFitError(
                f"{source}: {key} claims {claimed:,} bytes, the same {there:,} over and over; the file is broken"
            )
        if tensor.device.type != "meta" and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise DiffFitError(
                f"{source}: {key} holds {bad} of {tensor.numel()} values that are NaN or infinite; the file is broken"
            )


# -- what else the file says -------------------------------------------------------------------------------------------
def _header_beside(containers: list[Mapping[Any, Any]], source: str) -> dict[str, Any]:
    """The header that a state dict carries in its metadata.

    Raises:
        DiffFitError: what stands there under this package's name is no header of a model.
    """
    for container in containers:
        metadata = getattr(container, "_metadata", None)
        for entry in metadata.values() if isinstance(metadata, Mapping) else []:
            text = entry.get(STATE_DICT_KEY) if isinstance(entry, Mapping) else None
            if text is None:
                continue
            try:
                said = json.loads(text)
            except (TypeError, ValueError, RecursionError):
                said = None
            if not isinstance(said, dict) or said.setdefault("kind", "model") != "model":
                raise DiffFitError(
                    f"{source}: what its state dict says of itself is no header of a model: {shown(text)}"
                )
            # strings of a whole header, or values of a model's own
            return {k: v if isinstance(v, str) else json.dumps(v) for k, v in said.items()}
    return {}


def _arguments(content: Mapping[Any, Any]) -> dict[str, Any]:
    """The arguments of the training script that are numbers or text."""
    for key in ("args", "hyper_parameters", "hparams", "config"):
        value = content.get(key)
        value = vars(value) if isinstance(value, argparse.Namespace) else value
        if isinstance(value, Mapping):
            return {str(k): v for k, v in value.items() if isinstance(v, (str, int, float))}
    return {}


# -- reading -----------------------------------------------------------------------------------------------------------
def _file(path: Path) -> Path:
    """The file to read for ``path``, which may be a folder with one checkpoint in it."""
    if path.is_file():
        return path
    if not path.is_dir():
        where = "" if path.is_absolute() else f" (from the folder {Path.cwd()})"
        bases = base_names() if path.parent == Path() and not path.suffix else []
        named = f"; the bases that come with the package are {', '.join(bases)}" if bases else ""
        raise DiffFitError(f"checkpoint not found: {path}{where}{named}")
    if (path / PIPELINE_FILE).is_file() or (path / "transformer").is_dir():
        path = path / "transformer"  # of a pipeline of diffusers
    for name in (*INDEX_FILES, *WEIGHT_FILES):
        if (path / name).is_file():
            return path / name
    if (path / ".metadata").is_file():
        raise DiffFitError(
            f"{path} is a distributed checkpoint; bring it into one file first: "
            "python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE.pt"
        )
    if any(path.glob("*mp_rank_*")) or any(path.glob("*zero_pp_rank_*")):
        raise DiffFitError(
            f"{path} is a checkpoint of DeepSpeed; bring it into one file first with its zero_to_fp32.py"
        )
    raise DiffFitError(f"{path} is a folder without a checkpoint; expected a file, or a folder with {WEIGHT_FILES[0]}")


def is_safetensors(path: Path) -> bool:
    """Whether a file is ``.safetensors`` or what ``torch.save`` writes, by its content and not by its name.

    Raises:
        DiffFitError: it is neither, or was cut short.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(64)
    except OSError as error:
        raise DiffFitError(f"cannot read {path}: {error.strerror or error}") from error
    if not head:
        raise DiffFitError(f"cannot read checkpoint {path}: it is empty")
    if len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32:  # a length, then JSON
        return True
    if head.startswith(b"PK"):
        _check_archive(path)
    elif not head.startswith(b"\x80"):  # a pickle, of an old PyTorch
        hint = ", but a pointer of Git LFS: fetch the file itself (git lfs pull)" if b"git-lfs" in head else ""
        raise DiffFitError(f"cannot read checkpoint {path}: it is neither .safetensors nor written by torch.save{hint}")
    return False


def _check_archive(path: Path) -> None:
    """Raise unless a zip archive is one of ``torch.save``."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.split("/", 1)[-1] for name in archive.namelist()}
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except Exception as error:  # names that are no text, sizes beyond 64 bits, and more
        raise DiffFitError(f"cannot read checkpoint {path}: it is damaged or was cut short ({error})") from error
    if "constants.pkl" in names:
        raise DiffFitError(
            f"cannot read checkpoint {path}: it is a TorchScript archive; save the state_dict() of torch.jit.load with torch.save"
        )
    if "data.pkl" not in names:
        raise DiffFitError(f"cannot read checkpoint {path}: it is a zip archive, but not one of torch.save")
    if unpacked > 16 * path.stat().st_size + _REPEATED:  # torch.save compresses nothing
        raise DiffFitError(f"cannot read checkpoint {path}: its {path.stat().st_size:,} bytes unpack to {unpacked:,}")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise DiffFitError(f"cannot read checkpoint {path}: {first_line(error)}") from error


def _read_shards(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """A checkpoint in several files, by its index."""
    index = read_json(path).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
        raise DiffFitError(
            f"{path} is not the index of a sharded checkpoint: weight_map should lead from keys to files"
        )
    names = sorted(set(index.values()))
    if outside := [name for name in names if not name or Path(name).name != name]:
        raise DiffFitError(f"{path} names the shard {shown(outside[0])}, which does not lie beside it")
    content: dict[str, Any] = {}
    strings: dict[str, str] = {}
    for name in names:
        shard = path.with_name(name)
        if not _is_file(shard):
            raise DiffFitError(f"{path} names the shard {name:.80}, which is missing")
        part = _read_shard(shard, strings)
        if lost := sorted(key for key, home in index.items() if home == name and key not in part):
            raise DiffFitError(f"{path} names {shown(lost[0])} in {name}, which does not hold it")
        if twice := [key for key in part if key in content]:
            raise DiffFitError(f"{path}: two of its shards hold {shown(twice[0])}")
        content |= part
    return content, strings


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long for a file
        return False


def _read_shard(shard: Path, strings: dict[str, str]) -> Mapping[str, Any]:
    """What one of several files holds; its metadata joins ``strings``."""
    if is_safetensors(shard):
        strings |= safetensors_metadata(shard)
        return _read_safetensors(shard)
    part = _read_torch(shard)
    if not isinstance(part, Mapping):
        raise DiffFitError(f"{shard} holds a {type(part).__name__}, not a state dict")
    return part


class StandIn:
    """An inert object in place of one whose class is not loaded; it remembers the class's name and nothing is run."""

    name = "object"

    def __new__(cls, *args: Any, **kwargs: Any) -> StandIn:
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __hash__(self) -> int:
        return id(self)


def _stand_in(name: str) -> tuple[type[StandIn], str]:
    return type("StandIn", (StandIn,), {"name": name}), name


def _read_torch(path: Path) -> Any:
    """What ``torch.save`` wrote; unknown classes become stand-ins."""
    allowed: list[Any] = [argparse.Namespace]
    with contextlib.suppress(Exception):  # an old format, or damage: found out below
        allowed += [_stand_in(n) for n in torch.serialization.get_unsafe_globals_in_checkpoint(path) if n != _NAMESPACE]
    for _ in range(100):  # old formats tell their classes one after another
        try:
            # An open file, because by a path torch.load goes by the name's ending.
            with torch.serialization.safe_globals(allowed), open(path, "rb") as file:
                return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises whatever the bytes make its parts raise
            unknown = re.search(r"GLOBAL (\S+) was not an allowed global", str(error))
            if unknown is None or any(isinstance(a, tuple) and a[1] == unknown[1] for a in allowed):
                raise DiffFitError(f"cannot read checkpoint {path}: {_plain(error)}") from error
            allowed += [_stand_in(module + unknown[1]) for module in ("", "builtins.", "__builtin__.")]
    raise DiffFitError(f"cannot read checkpoint {path}: it holds objects of too many unknown classes")


_NAMESPACE = "argparse.Namespace"


def _plain(error: Exception) -> str:
    """PyTorch's reason in one line, without the escape codes and the advice to switch safety off."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    reason = re.search(r"WeightsUnpickler error: *(.+)", text)
    if reason:
        return f"it holds something that is neither weights nor plain values ({reason[1].strip()})"
    return text.strip().splitlines()[0] if text.strip() else type(error).__name__
