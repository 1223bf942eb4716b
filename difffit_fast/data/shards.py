"""The files of a latent cache, shared by its writer (``extract``) and its reader (``LatentCache``): one schema.

::

    features/
        extract.json                        what was asked for; written first
        shard-00000-of-00012.safetensors    whole or absent: written beside and renamed
        ...
        index.json                          classes, labels, checksums; written last, so its presence means "complete"

A shard holds ``labels`` int64 [n], ``indices`` int64 [n] (position in the source listing), ``digests`` uint8 [m, 32] (SHA-256
of each of the m files that it was made of, the unreadable ones too) and either ``moments`` [n, 2, 2C, h, w] (float32 or
float16; axis 1: the image and its mirror image) or ``pixels`` uint8 [n, C, H, W], whose mirror image costs nothing to make.

Version 1 had no ``digests``, and no checksum of the index itself.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .._files import json_text, read_json, write_json, write_safetensors
from ..errors import DiffFitError
from ..models.classes import class_of
from .base import BadImage

FORMAT = "difffit_fast.features"
VERSION = 2
CONFIG_FILE = "extract.json"
INDEX_FILE = "index.json"
DIGEST_BYTES = hashlib.sha256().digest_size
_CHECKSUM = "sha256"
_METADATA_KEY = "difffit_fast"
_DTYPES = {"fp32": torch.float32, "bf16": torch.float16, "fp16": torch.float16, "uint8": torch.uint8}
_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.uint8: "U8"}

# Entries of the index and of its "config" -> their type in JSON.
_ENTRIES = {
    "config": dict, "class_names": list, "channels": int, "size": int, "scale": float, "shift": float, "shards": list,
    "bad": list, "labels": list, "files": list,
}  # fmt: skip
_SETTINGS = {
    "kind": str, "image_size": int, "precision": str, "vae": str, "vae_sha256": str, "shard_size": int, "num_images": int,
    "listing_sha256": str,
}  # fmt: skip
_SHARD = {"file": str, "count": int, "bytes": int, "sha256": str}


@dataclass(frozen=True)
class Layout:
    """What is stored of an image: ``kind`` "moments" or "pixels", C and H = W of the latent or image, the precision."""

    kind: str
    channels: int
    size: int
    precision: str

    @property
    def dtype(self) -> torch.dtype:
        return _DTYPES[self.precision]

    def shape(self, count: int) -> tuple[int, ...]:
        """Of the tensor of ``count`` images."""
        size = (self.size, self.size)
        return (count, self.channels, *size) if self.kind == "pixels" else (count, 2, 2 * self.channels, *size)


@dataclass(frozen=True)
class Index:
    """A checked ``index.json``: see :class:`~difffit_fast.data.latent_cache.LatentCache` for most of it.

    Attributes:
        shards: ``file``, ``count``, ``bytes`` and ``sha256`` of each.
        source: the range of source images of each shard.
    """

    layout: Layout
    image_size: int
    vae: str
    scale: float
    shift: float
    class_names: list[str]
    labels: np.ndarray
    files: list[str]
    bad: list[BadImage]
    shards: list[dict[str, Any]]
    source: list[range]


# -- shards ------------------------------------------------------------------------------------------------------------
def shard_name(number: int, count: int) -> str:
    return f"shard-{number:05d}-of-{count:05d}.safetensors"


def source_ranges(num_images: int, shard_size: int) -> list[range]:
    """The source images of every shard."""
    return [range(first, min(first + shard_size, num_images)) for first in range(0, num_images, shard_size)]


def write_shard(path: Path, tensors: dict[str, Tensor], note: dict[str, Any]) -> None:
    """Write one shard with ``note`` as its metadata; the same tensors and note give the same bytes."""
    write_safetensors(path, tensors, {_METADATA_KEY: json_text(note, sort_keys=True)})


def open_shard(path: Path, layout: Layout, source: range, count: int | None = None, framework: str = "pt") -> Any:
    """The shard as a ``safe_open`` handle, of which nothing but the header and the indices have been read.

    Args:
        source: the source images that it is made of.
        count: how many images it must hold; None: any number.

    Raises:
        DiffFitError: it is missing or damaged, or its tensors have not the names, types and shapes of the layout.
    """
    try:
        handle = safe_open(path, framework=framework)
        found = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 (not a mapping)
        found = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in found.items()}
    except (OSError, SafetensorError) as error:
        raise DiffFitError(f"the shard {path} cannot be read: {error}") from error
    if count is None:
        shape = found.get("labels", ("", ()))[1]
        count = shape[0] if shape else 0
    dtypes = {_NAMES[layout.dtype]} if count or layout.kind == "pixels" else {"F32", "F16"}  # version 1 was lax here
    expected = {
        "labels": ({"I64"}, (count,)),
        "indices": ({"I64"}, (count,)),
        layout.kind: (dtypes, layout.shape(count)),
    }
    if "digests" in found:
        expected["digests"] = ({"U8"}, (len(source), DIGEST_BYTES))
    for name, (types, shape) in expected.items():
        if name not in found or found[name][0] not in types or found[name][1] != shape:
            dtype, has = found.get(name, ("nothing", ()))
            raise DiffFitError(
                f"the shard {path} should hold {name} of {' or '.join(sorted(types))} {list(shape)}; "
                f"it holds {dtype} {list(has)}"
            )
    indices = np.asarray(handle.get_tensor("indices"))
    if count and (np.any(np.diff(indices) < 1) or indices[0] < source.start or indices[-1] >= source.stop):
        raise DiffFitError(
            f"the shard {path} should hold images {source.start} to {source.stop - 1} in order; it does not"
        )
    return handle


def shard_note(handle: Any, path: Path) -> dict[str, Any]:
    """What :func:`write_shard` noted: ``bad``, the unreadable images with the reasons, and ``shard``, its number."""
    try:
        note = json.loads(handle.metadata()[_METADATA_KEY])
        [BadImage(*entry) for entry in note["bad"]]
        return note
    except (KeyError, TypeError, ValueError) as error:
        raise DiffFitError(f"the shard {path} was not written by difffit extract") from error


# -- the index ---------------------------------------------------------------------------------------------------------
def write_index(folder: Path, entries: Mapping[str, Any]) -> dict[str, Any]:
    """Write the index under its checksum, after the checks that reading makes; returns its content."""
    index = {"format": FORMAT, "version": VERSION, **entries}
    index[_CHECKSUM] = _checksum(index)
    try:
        _parse(index)
    except ValueError as error:
        raise DiffFitError(f"no index can be made for {folder}: {error}") from error
    write_json(folder / INDEX_FILE, index)
    return index


def read_index(folder: Path) -> Index:
    """The index of a feature folder.

    Raises:
        DiffFitError: the folder is no complete cache; an entry is missing or is not what it should be; the checksum is
            another; ``extract.json`` says otherwise.
    """
    path = folder / INDEX_FILE
    if not folder.is_dir():
        raise DiffFitError(f"the feature path {folder} is not a folder; make it with difffit extract")
    if not path.is_file():
        if (folder / CONFIG_FILE).is_file():
            raise DiffFitError(
                f"the extraction into {folder} is not finished; run the same difffit extract again to complete it"
            )
        raise DiffFitError(
            f"{folder} holds no cached features ({INDEX_FILE} is missing); make them with difffit extract"
        )
    value = read_json(path)
    if value.get("format") != FORMAT:
        raise DiffFitError(f"{path} is not an index of cached features")
    check_version(value, path)
    try:
        index = _parse(value)
        if (folder / CONFIG_FILE).is_file():
            _compare(value, read_json(folder / CONFIG_FILE))
    except ValueError as error:
        raise DiffFitError(
            f"{path} is damaged: {error}; delete it, and run the same difffit extract again to restore it"
        ) from error
    return index


def check_version(value: Mapping[str, Any], path: Path) -> None:
    """Raise for a file of another version than those that are read here."""
    version = value.get("version")
    if type(version) is not int or not 1 <= version <= VERSION:
        raise DiffFitError(f"{path} has format version {version!r}, this difffit_fast reads up to version {VERSION}")


def _checksum(index: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in index.items() if key != _CHECKSUM}
    return hashlib.sha256(json_text(rest, sort_keys=True).encode("utf-8")).hexdigest()


def _parse(value: Mapping[str, Any]) -> Index:
    """The entries of an index, every one checked before anything is made of it; a ``ValueError`` for what is wrong."""
    _check_types(value, _ENTRIES)
    config = value["config"]
    _check_types(config, _SETTINGS)
    layout = Layout(config["kind"], value["channels"], value["size"], config["precision"])
    _check_layout(layout, config["image_size"])
    if not math.isfinite(value["scale"]) or value["scale"] == 0 or not math.isfinite(value["shift"]):
        raise ValueError(
            f"scale and shift should be finite, scale not 0; they are {value['scale']} and {value['shift']}"
        )
    names, labels, files = value["class_names"], value["labels"], value["files"]
    _expect(bool(names) and all(type(name) is str for name in names), "class_names should be texts, one at least")
    _expect(len(set(names)) == len(names), "class_names should differ from one another")
    if config["num_images"] < 1 or config["shard_size"] < 1:
        raise ValueError(
            f"num_images and shard_size should be positive; they are {config['num_images']}, {config['shard_size']}"
        )
    source = source_ranges(config["num_images"], config["shard_size"])
    _check_shards(value["shards"], source)
    total = sum(shard["count"] for shard in value["shards"])
    if not len(labels) == len(files) == total or total == 0:
        raise ValueError(f"{len(labels)} labels and {len(files)} files for {total} images in its shards")
    _expect(all(type(label) is int for label in labels), "labels should be integers")
    _expect(min(labels) >= 0 and max(labels) < len(names), f"a label lies outside its {len(names)} classes")
    for label, file in zip(labels, files, strict=True):
        if type(file) is not str or class_of(file.partition("/")[0]) != names[label]:
            raise ValueError(f"the image {file!r} should lie in the folder of its class, {names[label]!r}")
    bad = value["bad"]
    for entry in bad:
        _expect(
            type(entry) in (list, tuple) and [type(word) for word in entry] == [str, str],
            "bad should be pairs of texts",
        )
    if len(bad) + total != config["num_images"]:
        raise ValueError(f"{total} images and {len(bad)} unreadable ones, of {config['num_images']}")
    if value["version"] > 1 and value.get(_CHECKSUM) != _checksum(value):
        raise ValueError("its checksum differs from the recorded one")
    return Index(
        layout, config["image_size"], config["vae"], float(value["scale"]), float(value["shift"]), list(names),
        np.array(labels, dtype=np.int64), list(files), [BadImage(*entry) for entry in bad], list(value["shards"]), source,
    )  # fmt: skip


def _check_types(value: Any, expected: Mapping[str, type]) -> None:
    for key, kind in expected.items():
        found = value.get(key) if isinstance(value, dict) else None
        if type(found) is not kind and not (kind is float and type(found) is int):
            raise ValueError(f"{key} should be {kind.__name__}; it is {found!r:.60}")


def _check_layout(layout: Layout, image_size: int) -> None:
    pixels = layout.kind == "pixels"
    _expect(layout.kind in ("pixels", "moments"), f"kind should be pixels or moments; it is {layout.kind!r:.60}")
    _expect(
        layout.precision in _DTYPES and (layout.precision == "uint8") == pixels,
        f"precision should be {'uint8' if pixels else 'fp32, bf16 or fp16'}; it is {layout.precision!r:.60}",
    )
    _expect(layout.channels > 0 and layout.size > 0, "channels and size should be positive")
    factor, rest = divmod(image_size, layout.size)
    _expect(
        not rest
        and factor > 0
        and not factor & (factor - 1)
        and (not pixels or (factor == 1 and layout.channels in (1, 3))),
        f"{layout.kind} of {layout.channels} x {layout.size} x {layout.size} do not fit images of {image_size} pixels",
    )


def _check_shards(shards: list[Any], source: list[range]) -> None:
    _expect(len(shards) == len(source), f"{len(source)} shards are expected; it names {len(shards)}")
    for number, (shard, images) in enumerate(zip(shards, source, strict=True)):
        _check_types(shard, _SHARD)
        name = shard_name(number, len(source))
        _expect(shard["file"] == name, f"shard {number} should be {name}; it is {shard['file']!r:.60}")
        _expect(
            0 <= shard["count"] <= len(images), f"{name} is made of {len(images)} images and holds {shard['count']}"
        )
        _expect(shard["bytes"] > 0, f"{name} should have bytes; it has {shard['bytes']}")
        _expect(bool(re.fullmatch("[0-9a-f]{64}", shard["sha256"])), f"{name} has no SHA-256")


def _compare(index: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """What index and ``extract.json`` both say must be the same; the VAE's name is only a name."""
    said = {**index["config"], "class_names": index["class_names"]}
    for key in sorted(set(said) & set(config) - {"vae"}):
        if said[key] != config[key]:
            raise ValueError(f"{key} is {said[key]!r:.60}, but {config[key]!r:.60} in {CONFIG_FILE}")


def _expect(fact: bool, otherwise: str) -> None:
    if not fact:
        raise ValueError(otherwise)
