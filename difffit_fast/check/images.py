"""A folder of images by class: what training would see of it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from .._files import sha256
from ..data.image_folder import ImageFolder
from ..data.pixels import ImageError, read_pixels
from ..errors import DiffFitError
from .features import check_classes, report_twin
from .report import Report

ELONGATED = 3.0  # sides in such a ratio: the square crop shows a third


def check_images(path: Path, report: Report, image_size: int) -> None:
    """Every image decoded; sizes, modes, twins and classes."""
    folder = ImageFolder(path, image_size, flip=False)
    report.facts |= {"images": len(folder), "classes": folder.num_classes, "for": f"{image_size} px"}
    for reason, paths in folder.listing.left_out.items():
        report.left_out(reason, *paths)
    seen: dict[str, int] = {}
    modes: Counter[str] = Counter()
    whole: Counter[int] = Counter()
    for index in tqdm(range(len(folder)), desc="check", unit="img", leave=False):
        name = folder.files[index]
        try:
            read_pixels(folder.root / name, image_size)
            _look(folder.root / name, name, image_size, modes, report)
        except (ImageError, DiffFitError) as error:
            report.wrong("images that cannot be read (they are left out)", f"{name}: {error}")
            continue
        label = int(folder.labels[index])
        whole[label] += 1
        first = seen.setdefault(sha256(folder.root / name), index)
        if first != index:
            report_twin(folder.files[first], name, folder.labels[first] == label, report)
    check_classes(whole, folder.class_names, report)
    if len(modes) > 1:
        told = ", ".join(f"{count} {mode}" for mode, count in modes.most_common())
        report.suspicious("images of different modes (all become RGB)", told)


def _look(path: Path, name: str, image_size: int, modes: Counter[str], report: Report) -> None:
    """What the head of a readable file tells, where Pillow reads it as it is."""
    try:
        with Image.open(path) as image:
            (width, height), mode, frames = image.size, image.mode, getattr(image, "n_frames", 1)
    except Exception:  # Pillow's plugins raise many kinds
        return
    modes[mode] += 1
    if min(width, height) < image_size:
        report.suspicious("images smaller than the training size (they are enlarged)", f"{name} ({width} x {height})")
    if max(width, height) > ELONGATED * min(width, height):
        report.suspicious("images of which the square crop shows less than a third", f"{name} ({width} x {height})")
    if frames > 1:
        report.suspicious("images of several frames (the first is used)", f"{name} ({frames})")
