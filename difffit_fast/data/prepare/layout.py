"""Write the image-folder layout with a hash listing, and verify one written before.

::

    out/
        train/<class>/<image>    test/<class>/<image>    (test only where the split has one)
        files.sha256             "<sha256>  train/<class>/<image>" per line; ``sha256sum -c files.sha256`` checks it too
        dataset.json             name, split, home page, classes, counts
"""

from __future__ import annotations

import os
import re
import shutil
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from ..._files import is_left, owner, read_json, sha256, write_json
from ...errors import DiffFitError

LISTING = "files.sha256"
INFO = "dataset.json"
MARKER = ".difffit-prepare"  # tells a half-made folder of ours, which may be removed, from anything else


class Item(NamedTuple):
    """One image: ``"train"`` or ``"test"``, its class folder, the file to take, and the name it gets."""

    part: str
    class_name: str
    source: Path
    name: str

    @classmethod
    def of(cls, part: str, class_name: str, base: Path, path: str) -> Item:
        """The image at ``path`` below ``base``, as a list or an archive names it; the only way that items are made.

        Raises:
            DiffFitError: ``path`` leaves ``base``, by itself or through a link, or is no name of a file.
        """
        source = inside(base, path)
        return cls(part, safe_name(class_name), source, source.name)


def inside(base: Path, path: str) -> Path:
    """``base / path``, which has to lie below ``base`` when all links are followed too; ``base`` may itself be a link.

    Raises:
        DiffFitError: it does not, or ``path`` is no name of a file.
    """
    parts = path.split("/")
    if path.startswith("/") or parts[-1] in ("", ".", "..") or any(ord(c) < 32 for c in path) or ".." in parts:
        raise DiffFitError(f"a list or an archive names {path!r}; expected a relative path to a file below {base}")
    found = base / path
    real = os.path.realpath(found)
    if Path(os.path.realpath(base)) not in Path(real).parents:
        raise DiffFitError(f"{found} is a link to {real}, outside of {base}; put the file itself there")
    return found


def safe_name(name: str) -> str:
    """A class name as a folder name on every file system; the usual names stay as they are.

    >>> safe_name("Ram C/V Cargo Van Minivan 2012")
    'Ram_C-V_Cargo_Van_Minivan_2012'
    """
    name = unicodedata.normalize("NFC", name).strip()
    name = re.sub(r'[<>:"/\\|?*\x00-\x1f]', "-", name)
    name = re.sub(r"\s+", "_", name).strip(". ")
    if not name:
        raise DiffFitError("a class has an empty name")
    return name


def counts(items: Iterable[Item]) -> tuple[int, int, int]:
    """``(classes, training images, test images)``."""
    items = list(items)
    train = sum(item.part == "train" for item in items)
    return len({item.class_name for item in items}), train, len(items) - train


def begin(out: Path) -> Path:
    """An empty folder beside ``out`` to build in; what a killed run left there is removed."""
    partial = out.with_name(out.name + ".partial")
    if partial.is_symlink() or (partial.exists() and not partial.is_dir()):
        raise DiffFitError(f"{partial} is in the way: a folder to build in is expected there; move it away")
    if partial.exists():
        if not any((partial / name).exists() for name in (MARKER, INFO)) and any(partial.iterdir()):
            raise DiffFitError(f"{partial} is in the way and was not made by difffit prepare; move it away")
        marker = partial / MARKER
        at_work = marker.read_text(encoding="utf-8", errors="replace") if marker.is_file() else ""
        if at_work and not is_left(at_work, partial):
            raise DiffFitError(f"another difffit prepare is at work in {partial}; wait for it, or remove that folder")
        shutil.rmtree(partial)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise DiffFitError(f"the folder {partial} cannot be made: {error.strerror or error}") from error
    (partial / MARKER).write_text(owner(), encoding="utf-8")
    return partial


def place(items: list[Item], partial: Path, movable: Any, copy: bool = False) -> None:
    """Put every image below ``partial``: moved if ``movable(source)``, else hard-linked, else copied."""
    taken: set[str] = set()
    sources: dict[Path, str] = {}
    for item in tqdm(items, desc="place", unit="file"):
        relative = f"{item.part}/{item.class_name}/{item.name}"
        if relative.casefold() in taken:
            raise DiffFitError(f"two images would both become {relative}")
        taken.add(relative.casefold())
        if sources.setdefault(item.source, relative) != relative:
            raise DiffFitError(f"{item.source} is listed twice, as {sources[item.source]} and as {relative}")
        target = partial / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        if movable(item.source):
            os.replace(item.source, target)
            continue
        if not copy:
            try:
                os.link(os.path.realpath(item.source), target)  # of a link: the file it leads to
                continue
            except OSError:  # another file system, or one without links
                pass
        shutil.copyfile(item.source, target)


def finish(partial: Path, out: Path, info: dict[str, Any]) -> None:
    """List and hash what ``partial`` holds, then rename it to ``out``: that name means "complete"."""
    files = _images(partial)
    lines = [f"{sha256(partial / name)}  {name}\n" for name in tqdm(files, desc="hash", unit="file")]
    (partial / LISTING).write_text("".join(lines), encoding="utf-8", errors="surrogateescape")
    write_json(partial / INFO, info)
    (partial / MARKER).unlink()
    try:
        os.replace(partial, out)  # on POSIX also over an empty folder
    except OSError as error:
        raise DiffFitError(f"{partial} cannot be renamed to {out}: {error.strerror or error}") from error


def verify(out: Path) -> dict[str, Any]:
    """Compare the images below ``out`` with its listing; returns ``dataset.json``.

    Raises:
        DiffFitError: a file is missing, changed or not listed; the first of each kind is named.
    """
    info = read_json(out / INFO)
    try:
        text = (out / LISTING).read_text(encoding="utf-8", errors="surrogateescape")
        listed = {line[66:]: line[:64] for line in text.split("\n") if line}  # a name may hold U+2028
    except OSError as error:
        raise DiffFitError(f"{out / LISTING} cannot be read: {error.strerror or error}") from error
    present = set(_images(out))
    missing = sorted(set(listed) - present)
    extra = sorted(present - set(listed))
    changed = [
        name
        for name in tqdm(sorted(present & set(listed)), desc="verify", unit="file")
        if sha256(out / name) != listed[name]
    ]
    for what, names in (("missing", missing), ("changed", changed), ("not in the listing", extra)):
        if names:
            raise DiffFitError(
                f"{out} differs from {LISTING}: {len(names)} files are {what}, the first is {names[0]}; "
                "remove the folder and run difffit prepare again"
            )
    return info


def _images(folder: Path) -> list[str]:
    return sorted(
        path.relative_to(folder).as_posix()
        for part in ("train", "test")
        for path in (folder / part).rglob("*")
        if path.is_file()
    )
