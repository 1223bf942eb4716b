"""``difffit prepare``: the eight datasets of the DiffFit paper, from what a person has downloaded to image folders.

Nothing is downloaded here: most of these datasets ask for the acceptance of terms. See :data:`DATASETS` for splits.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..._words import nearest
from ...errors import DiffFitError
from ..listing import class_order
from . import layout
from .archives import Source
from .datasets import DATASETS, Dataset, Split

__all__ = ["DATASETS", "Dataset", "Split", "prepare"]


def prepare(
    name: str,
    root: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    split: str | None = None,
    *,
    allow_incomplete: bool = False,
    copy: bool = False,
) -> tuple[Path, dict[str, Any]]:
    """Make the image folders of dataset ``name`` from the downloads in ``root``, or verify those made before.

    Args:
        name: a key of :data:`DATASETS`.
        root: folder with the archives or their extracted folders.
        out: folder to write; default ``root/prepared/<name>``. It appears when it is complete.
        split: a key of the dataset's splits; its first one by default.
        allow_incomplete: take what is there when images are missing or the totals differ from the known ones.
        copy: copy images out of an extracted folder rather than hard-linking them.

    Returns:
        ``(out, info)``, ``info`` being the content of ``dataset.json``.

    Raises:
        DiffFitError: unknown name or split, a piece is missing or damaged, totals differ, or ``out`` is in the way.
    """
    if name not in DATASETS:
        raise DiffFitError(
            f"unknown dataset {name!r}; the nearest known one is {nearest(name, DATASETS)!r} (all: {', '.join(DATASETS)})"
        )
    dataset = DATASETS[name]
    split = split or next(iter(dataset.splits))
    if split not in dataset.splits:
        raise DiffFitError(f"{name} has no split {split!r}; expected one of {', '.join(dataset.splits)}")
    root = Path(root)
    if not root.is_dir():
        raise DiffFitError(f"--root {root} is not a folder; expected the one with the downloads from {dataset.home}")
    out = Path(out) if out is not None else root / "prepared" / name
    if (out / layout.INFO).is_file():
        info = layout.verify(out)
        if (info.get("name"), info.get("split")) != (name, split):
            raise DiffFitError(
                f"{out} holds {info.get('name')} with split {info.get('split')}, not {name} with split {split}; "
                "choose another --out"
            )
        return out, info
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DiffFitError(f"{out} exists and was not made by difffit prepare; choose another --out")

    new_parent = not out.parent.exists()
    partial = layout.begin(out)
    try:
        source = Source(root, partial / ".unpacked", dataset.home)
        items = dataset.read(source, split)
        items = _check(dataset, split, items, allow_incomplete)
        layout.place(items, partial, source.is_scratch, copy)
        shutil.rmtree(source.scratch, ignore_errors=True)
        classes, train, test = layout.counts(items)
        info = {
            "name": name,
            "title": dataset.title,
            "split": split,
            "split_description": dataset.splits[split].description,
            "home": dataset.home,
            "classes": classes,
            "train": train,
            "test": test,
            "complete": (classes, train, test) == dataset.splits[split].totals,
            "class_names": class_order({item.class_name for item in items}),
            "left_out": source.notes,
        }
        layout.finish(partial, out, info)
    except OSError as error:
        raise DiffFitError(f"cannot prepare {name} in {partial}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # gone already when all went well
        if new_parent and not out.exists():
            with suppress(OSError):
                out.parent.rmdir()
    return out, info


def _check(dataset: Dataset, split: str, items: list[layout.Item], allow_incomplete: bool) -> list[layout.Item]:
    """The items whose files exist, with the totals checked."""
    present = [item for item in items if item.source.is_file()]
    missing = [item for item in items if not item.source.is_file()]
    if not present:
        raise DiffFitError(f"no image of {dataset.title} was found; see {dataset.home}")
    if allow_incomplete:
        return present
    hint = "download it again, or pass --allow-incomplete to take what is there"
    if missing:
        raise DiffFitError(
            f"{len(missing)} of {len(items)} images of {dataset.title} are missing, "
            f"the first is {missing[0].source}; {hint}"
        )
    got, want = layout.counts(present), dataset.splits[split].totals
    if got != want:
        raise DiffFitError(
            f"{dataset.title} ({split}) should have {want[0]} classes, {want[1]} training and {want[2]} test images, "
            f"but {got[0]}, {got[1]} and {got[2]} were found; {hint}"
        )
    return present
