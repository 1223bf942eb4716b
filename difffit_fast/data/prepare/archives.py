"""Find a dataset's pieces in the folder a person downloaded them to, unpacking archives safely where needed."""

from __future__ import annotations

import fnmatch
import glob
import lzma
import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from ...errors import DiffFitError
from ..listing import SYSTEM_NAMES, Listing
from .layout import INFO, MARKER

_DAMAGED = (
    tarfile.TarError,
    zipfile.BadZipFile,
    EOFError,
    zlib.error,
    lzma.LZMAError,
    NotImplementedError,
    RuntimeError,
    UnicodeError,
)


class Source:
    """The download folder of one dataset.

    Args:
        root: where the archives or the extracted folders are, at most two folders deep.
        scratch: an empty folder of ours, to unpack into.
        home: the dataset's web page, for messages.
    """

    def __init__(self, root: Path, scratch: Path, home: str) -> None:
        self.root, self.scratch, self.home = root, scratch, home
        self.notes: list[str] = []  # what readers left out of the folders they listed
        self._unpacked: dict[Path, Path] = {}

    def find(self, marker: str, archives: tuple[str, ...] = ()) -> Path:
        """The folder that holds ``marker`` (a relative path), extracted already or unpacked now.

        Args:
            marker: a file or folder that tells the piece from others, such as ``meta/train.txt``.
            archives: name patterns of the archives it may be in, the likeliest first.

        Raises:
            DiffFitError: it is nowhere; the message says what to download, and from where.
        """
        found = self.look(marker, archives)
        if found is None:
            wanted = f"the archive {archives[0]} (or the folder it unpacks to, with {marker})" if archives else marker
            raise DiffFitError(f"{self.root} does not hold {wanted}; download it from {self.home}")
        return found

    def look(self, marker: str, archives: tuple[str, ...] = ()) -> Path | None:
        """As :meth:`find`, but ``None`` when it is nowhere."""
        for base in (self.root, *self._unpacked.values()):
            found = _search(base, marker)
            if found is not None:
                return found
        for pattern in archives:
            for base in (self.root, *list(self._unpacked.values())):
                for archive in _files_like(base, pattern):
                    if archive not in self._unpacked:
                        self._unpacked[archive] = self.scratch / str(len(self._unpacked))
                        unpack(archive, self._unpacked[archive])
                        return self.look(marker, archives)  # the archive may hold an archive
        return None

    def listed(self, listing: Listing) -> dict[str, list[str]]:
        """The classes of ``listing``; what it left out is noted."""
        self.notes += [f"{listing.root.name}: {note}" for note in listing.notes]
        return listing.classes

    def is_scratch(self, path: Path) -> bool:
        """Whether ``path`` was unpacked here, so that it may be moved rather than linked."""
        return not path.is_symlink() and Path(os.path.realpath(self.scratch)) in Path(os.path.realpath(path)).parents


def _search(base: Path, marker: str) -> Path | None:
    if base.name == marker and base.is_dir():  # the folder itself was given
        return base.parent
    depth = marker.count("/")
    for prefix in ("", "*/", "*/*/"):
        for hit in sorted(base.glob(prefix + glob.escape(marker))):
            found = hit.parents[depth]
            if not any(
                (folder / name).exists() for folder in (found, *_between(base, found)) for name in (INFO, MARKER)
            ):
                return found
    return None


def _between(base: Path, found: Path) -> list[Path]:
    """The folders above ``found`` up to and without ``base``: where results of earlier runs are told from downloads."""
    return [folder for folder in found.parents if base in folder.parents]


def _files_like(base: Path, pattern: str) -> list[Path]:
    files = [path for prefix in ("*", "*/*") for path in sorted(base.glob(prefix)) if path.is_file()]
    return [path for path in files if fnmatch.fnmatch(path.name.lower(), pattern.lower())]


def unpack(archive: Path, target: Path) -> None:
    """Unpack the regular files of a tar (any compression) or zip archive below ``target``.

    A member that would land elsewhere (absolute, or with ``..``) is refused. Links and devices are not made, so no
    later member can be written through one; what a system added (:data:`SYSTEM_NAMES`, the forks of macOS) is left out.

    Raises:
        DiffFitError: the archive is damaged, cut short, no archive, or holds a refused name.
    """
    target.mkdir(parents=True, exist_ok=True)
    size = archive.stat().st_size
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as bundle:
                for info in tqdm(bundle.infolist(), desc=f"unpack {archive.name}", unit="file"):
                    link = stat.S_ISLNK(info.external_attr >> 16)
                    if not info.is_dir() and not link and (destination := _inside(target, info.filename, archive)):
                        with bundle.open(info) as member, open(destination, "wb") as out:
                            shutil.copyfileobj(member, out, 1 << 20)
            return
        bar = {"total": size, "desc": f"unpack {archive.name}", "unit": "B", "unit_scale": True}
        with (
            open(archive, "rb") as file,
            tqdm.wrapattr(file, "read", **bar) as stream,
            tarfile.open(fileobj=stream, mode="r:*") as tar,
        ):
            for info in tar:
                if info.isreg() and (destination := _inside(target, info.name, archive)):
                    with tar.extractfile(info) as member, open(destination, "wb") as out:  # type: ignore[union-attr]
                        shutil.copyfileobj(member, out, 1 << 20)
            while tar.fileobj.read(1 << 20):  # to the end, where the checksum of the whole is compared
                pass
    except _DAMAGED as error:
        raise DiffFitError(f"the archive {archive} is damaged or incompletely downloaded: {error}") from error
    except OSError as error:
        if error.errno is None:  # gzip's own complaints
            raise DiffFitError(f"the archive {archive} is damaged or incompletely downloaded: {error}") from error
        raise DiffFitError(f"cannot unpack {archive} into {target}: {error.strerror}") from error


def _inside(target: Path, name: str, archive: Path) -> Path | None:
    """Where the member ``name`` goes, its folder made; ``None`` to leave it out."""
    path = PurePosixPath(name.replace("\\", "/"))
    if not path.parts:  # the folder itself
        return None
    if path.is_absolute() or ".." in path.parts or ":" in path.parts[0] or "\0" in name:
        raise DiffFitError(f"the archive {archive} holds the unsafe path {name!r}; it was not unpacked any further")
    if path.name.startswith("._") or any(part.casefold() in SYSTEM_NAMES for part in path.parts):
        return None
    destination = target / path
    os.makedirs(destination.parent, exist_ok=True)
    return destination
