"""Many samples for an FID: numbered PNG files in a folder, then one ADM-format ``.npz``.

A folder can be begun by one number of processes, killed, and finished by another: image i depends on the seed and i
alone, files that are there and whole are kept, and ``sampling.json`` refuses to mix settings.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from .._bounds import IMAGES, SEED, check_whole
from .._files import read_json, replacing, sweep, write_json
from .._processes import World
from ..data.pixels import ImageError, read_pixels
from ..data.vae import PixelSpace
from ..errors import DiffFitError
from ..models.deltas import OWN, Own
from .guidance import EVERYWHERE
from .images import is_whole_png, png_kind, save_png, to_uint8
from .sampler import Sampler, resolve_labels

SETTINGS_FILE = "sampling.json"


@dataclass(frozen=True)
class Target:
    """A folder of samples, and what is special about them.

    Attributes:
        settings: recorded in ``sampling.json`` beside the sampler's own; what a continuation must not change.
        delta, strength: what the samples wear, see :meth:`.sampler.Sampler.sample`.
    """

    folder: Path
    delta: str | Own | None = OWN
    strength: float | None = None
    settings: Mapping[str, Any] | None = None


def sample_to_folder(
    sampler: Sampler,
    folder: str | os.PathLike[str],
    num_images: int,
    *,
    labels: Sequence[int | str] | None = None,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    processes: World | None = None,
    progress: bool = True,
    npz: bool = True,
) -> Path | None:
    """Fill ``folder`` with ``000000.png`` ... and write ``<folder>.npz`` from them; returns the latter's path.

    Args:
        num_images: how many.
        labels: the classes, in turn (image i has ``labels[i % len(labels)]``); None: drawn at random for each image.
        settings: recorded in ``sampling.json`` beside the sampler's own; what a continuation must not change.
        processes: this process among those that share the work.
        npz: whether to write the ``.npz`` file; the first process does when all are done.

    Raises:
        DiffFitError: the folder was begun with other settings, or cannot be written.
    """
    target = Target(Path(folder), settings=settings)
    return sample_to_folders(
        sampler, [target], num_images, labels=labels, seed=seed, processes=processes, progress=progress, npz=npz
    )[0]


def sample_to_folders(
    sampler: Sampler,
    targets: Sequence[Target],
    num_images: int,
    *,
    labels: Sequence[int | str] | None = None,
    seed: int = 0,
    processes: World | None = None,
    progress: bool = True,
    npz: bool = True,
) -> list[Path | None]:
    """The same for several deltas of one model at once: image i of every folder is of the same batch and noise, where they
    have as many classes of the same class, too. Arguments as of :func:`sample_to_folder`.

    Raises:
        DiffFitError: two folders are one, one was begun with other settings, or cannot be written.
    """
    processes = processes or World()
    check_whole("the number of images", num_images, IMAGES)
    check_whole("the seed", seed, SEED)
    sampler.check_decoder()
    if len({target.folder for target in targets}) < len(targets):
        raise DiffFitError(
            f"each set of samples needs a folder of its own; got {', '.join(str(t.folder) for t in targets)}"
        )
    y = [image_labels(sampler, num_images, labels, seed, target.delta) for target in targets]
    for target in targets:
        mine = {
            **sampler_settings(sampler, target.delta),
            "seed": seed,
            "labels": None if labels is None else list(labels),
        }
        processes.main_first(lambda t=target, mine=mine: _prepare(t.folder, {**mine, **(t.settings or {})}))
    todo: list[tuple[int, int]] = []  # image, target
    error = None
    try:
        todo = [
            (i, k)
            for i in range(processes.rank, num_images, processes.size)
            for k, target in enumerate(targets)
            if not _is_sample(sampler, png_path(target.folder, i))
        ]
    except DiffFitError as caught:
        error = caught
    processes.agree(error)
    with tqdm(total=len(todo), unit="img", desc="sample", disable=not progress or processes.rank != 0) as bar:
        try:
            for start in range(0, len(todo), sampler.batch_size):
                part = todo[start : start + sampler.batch_size]
                worn = _worn([targets[k] for _, k in part])
                samples = sampler.sample([y[k][i] for i, k in part], seed, indices=[i for i, _ in part], **worn)
                for (i, k), pixels in zip(part, to_uint8(samples), strict=True):
                    save_png(pixels, png_path(targets[k].folder, i))
                bar.update(len(part))
        except OSError as caught:
            error = DiffFitError(f"cannot write samples into {caught.filename}: {caught.strerror or caught}")
    processes.agree(error)
    written: list[Path | None] = []
    for target in targets:
        path = target.folder.with_name(target.folder.name + ".npz") if npz else None
        if path is not None:
            files = [png_path(target.folder, i) for i in range(num_images)]
            processes.main_first(lambda files=files, path=path: write_npz(files, path, progress=progress))
        written.append(path)
    return written


def _worn(targets: Sequence[Target]) -> dict[str, Any]:
    """Arguments of :meth:`.sampler.Sampler.sample`, for one image of each of these."""
    if targets[0].delta is OWN:
        return {}
    each = [1.0 if target.strength is None else target.strength for target in targets]
    none = all(target.strength is None for target in targets)
    return {"delta": [target.delta for target in targets], "strength": None if none else each}


def png_path(folder: Path, index: int) -> Path:
    """``folder/000123.png``."""
    return folder / f"{index:06d}.png"


def other_images(folder: Path, num_images: int) -> list[Path]:
    """PNG files in ``folder`` besides the first ``num_images`` samples."""
    mine = {png_path(folder, i).name for i in range(num_images)}
    return sorted(path for path in folder.glob("*.png") if path.name not in mine)


def _is_sample(sampler: Sampler, path: Path) -> bool:
    """Whether ``path`` is a whole file as the sampler makes them; a torn or missing one is made (again).

    Raises:
        DiffFitError: a whole PNG of another size or mode: not made here, so not replaced either.
    """
    if not is_whole_png(path):
        return False
    side = sampler.model.input_size * sampler.vae.factor
    gray = isinstance(sampler.vae, PixelSpace) and sampler.model.in_channels == 1
    expected, found = (side, side, 8, 0 if gray else 2), png_kind(path)
    if found != expected:
        raise DiffFitError(
            f"{path} is {_kind(*found)}; the samples are {_kind(*expected)}. Move it away, or use another folder"
        )
    return True


def _kind(width: int, height: int, bits: int, colours: int) -> str:
    names = {0: "gray", 2: "RGB", 3: "of a palette", 4: "gray with alpha", 6: "RGB with alpha"}
    return f"{width}x{height}, {names.get(colours, f'of colour type {colours}')}, {bits} bits"


def image_labels(
    sampler: Sampler, num_images: int, labels: Sequence[int | str] | None, seed: int, delta: str | Own | None = OWN
) -> list[int]:
    """The class of every image: ``labels`` in turn, or uniform over the classes (of the delta), from ``seed`` alone."""
    own = delta is OWN
    num_classes = sampler.model.num_classes if own else sampler.model.deltas.of(delta).num_classes
    names = sampler.class_names if own else sampler.model.deltas.of(delta).class_names
    if labels is None:
        return np.random.default_rng((seed, 0x6C61)).integers(0, num_classes, num_images).tolist()
    if not len(labels):
        raise DiffFitError("the list of class labels is empty")
    resolved = resolve_labels(labels, num_classes, names).tolist()
    return [resolved[i % len(resolved)] for i in range(num_images)]


def sampler_settings(sampler: Sampler, delta: str | Own | None = OWN) -> dict[str, Any]:
    """What of a sampler decides the images, which wear this delta."""
    config = sampler.model.config
    if delta is not OWN:
        config |= sampler.model.deltas.of(delta).sizes(sampler.model)
    names = ["sampler", "num_sampling_steps", "cfg_scale", "cfg_channels", "eta"]
    names += ["rtol", "atol"] if sampler.sampler == "dopri5" else []
    guidance = sampler.guidance
    special = {"guidance": guidance.kind} if guidance.kind != "cfg" else {}
    special |= {"guidance_interval": list(guidance.interval)} if guidance.interval != EVERYWHERE else {}
    return {
        **special,
        **{name: getattr(sampler, name) for name in names},
        "model": config,
        "vae": sampler.vae.name,
        "vae_sha256": sampler.vae.fingerprint(),
        "precision": str(sampler.autocast or "model"),
    }


def _prepare(folder: Path, settings: dict[str, Any]) -> None:
    """Make the folder, or compare ``settings`` with those it was begun with; sweep what killed processes left."""
    settings = json.loads(json.dumps(settings))
    path = folder / SETTINGS_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            if any(folder.glob("[0-9]*.png")):
                raise DiffFitError(
                    f"{folder} holds images but no {SETTINGS_FILE}: not begun by this command, not touched"
                )
            write_json(path, settings)
        before = read_json(path)
        sweep(folder)
    except OSError as error:
        raise DiffFitError(f"cannot write samples into {folder}: {error.strerror or error}") from error
    for key in ("vae_sha256", "step"):  # earlier versions recorded neither
        before.setdefault(key, settings.get(key))
    for key in sorted(set(before) | set(settings)):
        if before.get(key) != settings.get(key):
            raise DiffFitError(
                f"{folder} was begun with {key} {before.get(key)}; now it is {settings.get(key)}. "
                "Use another folder, or the same settings to go on"
            )


def write_npz(files: Iterable[str | os.PathLike[str]], path: str | os.PathLike[str], progress: bool = False) -> None:
    """Images of one size -> an ADM-format file: ``arr_0`` uint8 (N, H, W, 3), one image in memory at a time.

    The same images give the same bytes.
    """
    files, path = [Path(file) for file in files], Path(path)
    if not files:
        raise DiffFitError("there are no images to write")
    height, width, _ = _read_rgb(files[0]).shape
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(files), height, width, 3)}
    try:
        with (
            replacing(path) as temporary,
            zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, allowZip64=True) as archive,
            archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as out,
        ):
            np.lib.format.write_array_header_1_0(out, header)
            for file in tqdm(files, desc="npz", unit="img", disable=not progress):
                pixels = _read_rgb(file)
                if pixels.shape != (height, width, 3):
                    raise DiffFitError(f"{file} is {pixels.shape[1]}x{pixels.shape[0]}, the others {width}x{height}")
                out.write(pixels.tobytes())
    except OSError as error:
        raise DiffFitError(f"cannot write {path}: {error.strerror or error}") from error


def _read_rgb(path: Path) -> np.ndarray:
    try:
        return read_pixels(path, None)
    except ImageError as error:
        raise DiffFitError(f"cannot read the image {path}: {error}") from error
