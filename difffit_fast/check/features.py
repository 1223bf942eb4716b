"""Cached features: index, shards, values, labels."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..data import LatentCache
from .report import Report


def check_features(path: Path, report: Report) -> None:
    """Every shard against its checksum, every value, and images that are there twice."""
    cache = LatentCache(path)
    report.facts |= {
        "what": cache.kind, "images": len(cache), "classes": cache.num_classes, "image size": cache.image_size,
        "vae": cache.vae,
    }  # fmt: skip
    cache.verify_all()
    for bad in cache.report():
        report.left_out("images that could not be read", f"{bad.file}: {bad.reason}")
    check_classes(Counter(cache.labels.tolist()), cache.class_names, report)
    seen: dict[bytes, int] = {}
    for index in tqdm(range(len(cache)), desc="check", unit="img", leave=False):
        stored = np.ascontiguousarray(cache.stored(index))
        if stored.dtype.kind == "f" and not np.isfinite(stored).all():
            report.wrong("features with NaN or infinity", cache.files[index])
        first = seen.setdefault(hashlib.blake2b(stored.tobytes(), digest_size=16).digest(), index)
        if first != index:
            report_twin(cache.files[first], cache.files[index], cache.labels[first] == cache.labels[index], report)


def report_twin(first: str, second: str, same_class: bool, report: Report) -> None:
    """Two images with the same content."""
    if same_class:
        report.suspicious("images that occur twice in a class", f"{second} is {first}")
    else:
        report.suspicious("images that occur in two classes", f"{second} is {first}")


def check_classes(counts: Counter[int], names: list[str], report: Report) -> None:
    """How many images each class has."""
    for label, name in enumerate(names):
        if counts[label] == 0:
            report.wrong("classes without an image", repr(name))
        elif counts[label] == 1:
            report.suspicious("classes with one image", repr(name))
    longer = [name for name in names if len(name.strip()) > 1]  # A and a are letters, not two ways to write one name
    for name in sorted(name for name, count in Counter(n.strip().casefold() for n in longer).items() if count > 1):
        report.suspicious("class names that differ in case or spaces only", repr(name))
    most, least = max(counts.values(), default=0), min(counts.values(), default=0)
    if least and most > 100 * least:
        report.suspicious("classes of very unequal size", f"{least} to {most} images")
