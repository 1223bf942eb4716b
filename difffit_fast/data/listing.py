"""What is an image, and of which class: one answer for training, extraction, evaluation, preparation and ``check``."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from PIL import Image

from ..errors import DiffFitError
from ..models.classes import class_of

# What systems and programs leave in folders, in lower case; names that begin with a dot are hidden in any case.
SYSTEM_NAMES = frozenset({
    "$recycle.bin", "recycler", "system volume information", "thumbs.db", "ehthumbs.db", "desktop.ini",  # Windows
    "__macosx", "icon\r", "network trash folder", "temporary items", "thevolumesettingsfolder",  # macOS
    "@eadir", "@tmp", "@sharebin", "@recycle", "@recently-snapshot", "#recycle", "#snapshot",  # network storage
    "lost+found", "__pycache__",
})  # fmt: skip

SYSTEM = "files and folders of the system"
HIDDEN = "hidden files and folders"
NO_IMAGE = "files without an image's name ending"
BESIDE = "images beside the class folders"
BROKEN = "broken links and special files"
CIRCLES = "links back into the folder"
EMPTY = "folders without an image"


@lru_cache(maxsize=1)
def image_suffixes() -> frozenset[str]:
    """The file name endings (lower case, with dot) of every format the installed Pillow can read."""
    Image.init()
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN)


def class_order(names: Iterable[str]) -> list[str]:
    """Names of classes in the order of their labels.

    That of ``sorted`` (the convention of torchvision, DiT and SiT); by value where all of them are decimal numbers.

    >>> class_order(["10", "2", "1"]), class_order(["10", "2", "b"])
    (['1', '2', '10'], ['10', '2', 'b'])
    """
    names = sorted(names)
    if all(name.isascii() and name.isdecimal() for name in names):
        names.sort(key=int)
    return names


@dataclass
class Listing:
    """The images below a folder.

    Attributes:
        root: the folder.
        classes: the images of each class in the order of labels, as sorted paths relative to ``root`` with forward
            slashes. Empty where no sub-folder holds an image and ``root`` itself does: a flat folder.
        folders: the folder of each class.
        flat: the images of a flat folder, sorted; none where there are classes.
        left_out: reason -> the paths, relative to ``root``, that were left out for it; a folder stands for all in it.
    """

    root: Path
    classes: dict[str, list[str]] = field(default_factory=dict)
    folders: dict[str, str] = field(default_factory=dict)
    flat: list[str] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def leave_out(self, reason: str, path: str) -> None:
        self.left_out.setdefault(reason, []).append(path)

    @property
    def notes(self) -> list[str]:
        """What a person should know: what was left out and why, and an order of classes that is not that of text."""
        notes = []
        if self.left_out:
            told = "; ".join(
                f"{len(paths)} {reason} (the first: {min(paths)})" for reason, paths in self.left_out.items()
            )
            notes.append(f"left out: {told}")
        by_value = class_order(self.classes) == list(self.classes)
        for label, (ours, texts) in enumerate(zip(self.classes, sorted(self.classes), strict=True)):
            if by_value and ours != texts:
                notes.append(
                    f"the classes are numbers and ordered by value: class {label} is {ours!r}, not {texts!r} as text sorts"
                )
                break
        return notes


def list_images(root: str | os.PathLike[str], class_names: Sequence[str] | None = None) -> Listing:
    """The images below ``root`` by class: ``root/<class>/**/<image>``, or ``root/<image>`` where no sub-folder has any.

    An image is a file, or a link to one, with a name ending that Pillow reads. A class folder has its class's name, see
    :func:`class_of`. Folders are searched through links, each once in a class, never in circles. Left out, and counted by
    reason: what is hidden or belongs to a system (``@eaDir``, ``Thumbs.db``, ...), other files, links to nothing, and images
    that lie beside class folders.

    Args:
        root: the folder.
        class_names: an order of the classes that something records; taken where it has the names of those found. The
            order is that of :func:`class_order` otherwise.

    Raises:
        DiffFitError: a folder is missing or unreadable, two folders are of one class, or more images lie beside the folders
            than in them.
    """
    root = Path(root)
    listing = Listing(root)
    folders, loose = _entries(listing, "")
    above = _with_parents(root)
    for folder in folders:
        if os.path.realpath(root / folder) in above:
            listing.leave_out(CIRCLES, folder)
        elif (other := listing.folders.setdefault(class_of(folder), folder)) != folder:
            raise DiffFitError(
                f"{root} has two folders of class {class_of(folder)!r}: {other} and {folder}; expected one"
            )
    for name in class_order(listing.folders):
        listing.classes[name] = images_below(listing, listing.folders[name])
    if class_names is not None and sorted(class_names) == sorted(listing.classes):
        listing.classes = {name: listing.classes[name] for name in class_names}
    inside = sum(map(len, listing.classes.values()))
    if loose and not inside:
        for name in listing.classes:
            listing.leave_out(EMPTY, listing.folders[name])
        listing.classes, listing.flat = {}, loose
    elif len(loose) > inside:
        raise DiffFitError(
            f"{root} holds {len(loose)} images beside its folders and {inside} in them; expected all of them in folders of "
            "classes, or none"
        )
    else:
        for path in loose:
            listing.leave_out(BESIDE, path)
    return listing


def images_below(listing: Listing, folder: str) -> list[str]:
    """Sorted paths, relative to the listing's root, of the images below ``folder``; the rest goes to ``left_out``."""
    found: list[str] = []
    seen = _with_parents(listing.root) | _with_parents(listing.root / folder)
    todo = [folder]
    while todo:
        current = todo.pop()
        folders, files = _entries(listing, current)
        found += files
        for name in sorted(folders, reverse=True):
            path = f"{current}/{name}"
            real = os.path.realpath(listing.root / path)
            if real in seen:
                listing.leave_out(CIRCLES, path)
                continue
            seen.add(real)
            todo.append(path)
    return sorted(found)


def _with_parents(folder: Path) -> set[str]:
    real = Path(os.path.realpath(folder))
    return {str(real), *map(str, real.parents)}


def _entries(listing: Listing, folder: str) -> tuple[list[str], list[str]]:
    """Names of the sub-folders of ``root/folder``, and the sorted paths of its images; the rest is left out."""
    path = listing.root / folder
    folders: list[str] = []
    images: list[str] = []
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                relative = f"{folder}/{entry.name}" if folder else entry.name
                if entry.name.casefold() in SYSTEM_NAMES:
                    listing.leave_out(SYSTEM, relative)
                elif entry.name.startswith("."):
                    listing.leave_out(HIDDEN, relative)
                elif (what := _kind(entry)) == "folder":
                    folders.append(entry.name)
                elif what != "file":
                    listing.leave_out(BROKEN, relative)
                elif os.path.splitext(entry.name)[1].lower() in image_suffixes():
                    images.append(relative)
                else:
                    listing.leave_out(NO_IMAGE, relative)
    except OSError as error:
        raise DiffFitError(f"the folder {path} cannot be read: {error.strerror or error}") from error
    return folders, sorted(images)


def _kind(entry: os.DirEntry[str]) -> str | None:
    """What an entry is, or leads to as a link: "folder", "file" or nothing that is read."""
    try:
        return "folder" if entry.is_dir() else "file" if entry.is_file() else None
    except OSError as error:
        if error.errno == errno.ELOOP:  # a link to itself
            return None
        raise
