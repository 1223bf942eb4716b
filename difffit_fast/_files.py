"""Files: written so that a kill at any moment leaves the old one or the new one, never half of one; and read with one
sentence for what is wrong with them.

A file is written under a temporary name beside it, ``.tmp-<name>.<place>-<pid>-<start>-<number>``, that tells whose it is.
``place`` stands for a host since its boot and a pid namespace (containers on one file system repeat each other's pids),
``start`` is when the process began (pids come round). So whoever finds one knows whether its owner lives, and takes a dead
owner's only; an owner in another place cannot be asked, and counts as dead when nothing was written for a day. No lock is
needed, which network file systems may not have.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import os
import re
import shutil
import socket
import stat
import struct
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import DiffFitError

TEMPORARY = ".tmp-"  # names that begin so are being written, or were left by a killed process, and are never read
STALE_SECONDS = 24 * 3600.0  # without a write, after which an owner that cannot be asked counts as dead
_LONGEST = 100  # bytes of a name that a temporary one repeats: with all the rest it stays below any file system's limit
_OWNER = re.compile(r"([0-9a-f]{8})-(\d+)-(\d+)")
_NAME = re.compile(rf"\.({_OWNER.pattern})-\d+$")
_OLD_NAME = re.compile(r"\.(\d+|old)$")  # of versions that told the pid alone, or nothing
_DESCRIPTOR = re.compile(r"/(?:dev|proc/self|proc/(\d+))/fd/(\d+)")

_numbers = itertools.count()
_looked_into: set[Path] = set()

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


# -- whose a temporary file is -----------------------------------------------------------------------------------------
def beside(path: Path) -> Path:
    """A temporary name in the folder of ``path``, where a rename is atomic; another one at every call."""
    return path.with_name(f"{TEMPORARY}{_label(path.name)}.{owner()}-{next(_numbers)}")


def owner() -> str:
    """This process: ``<place>-<pid>-<start>``."""
    return _owner(os.getpid())


@functools.cache
def _owner(pid: int) -> str:
    return f"{_place()}-{pid}-{_started(pid) or 0}"


def _label(name: str) -> str:
    raw = os.fsencode(name)
    return name if len(raw) <= _LONGEST else hashlib.sha256(raw).hexdigest()[:32]


@functools.cache
def _place() -> str:
    boot = namespace = ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    with contextlib.suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
    return hashlib.sha256(f"{socket.gethostname()}\0{boot}\0{namespace}".encode()).hexdigest()[:8]


def _started(pid: int) -> int | None:
    """When a process began, in clock ticks since the boot; None where that cannot be read, 0 for one that has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return 0 if fields[0] in (b"Z", b"X") else int(fields[19])
    except (OSError, IndexError, ValueError):
        return None


def _lives(pid: int) -> bool | None:
    """Whether there is a process of this number here; None where that cannot be asked."""
    if os.name != "posix":  # elsewhere signal 0 is a signal
        return None
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # another user's
        return True
    return _started(pid) != 0


def is_left(owned_by: str, path: Path) -> bool:
    """Whether the owner of the temporary file or folder ``path`` has died; ``owned_by`` is what :func:`owner` told it."""
    match = _OWNER.fullmatch(owned_by)
    if match and match[1] == _place() and (lives := _lives(int(match[2]))) is not None:
        start = int(match[3])
        return not lives or bool(start and (_started(int(match[2])) or start) != start)
    return _age(path) > STALE_SECONDS


def _age(path: Path) -> float:
    """Seconds since the last write to a file, or to anything in a folder."""
    newest = path.lstat().st_mtime
    if path.is_dir() and not path.is_symlink():
        for folder, folders, files in os.walk(path):
            for name in folders + files:
                with contextlib.suppress(OSError):
                    newest = max(newest, os.lstat(os.path.join(folder, name)).st_mtime)
    return time.time() - newest


def _is_left_by_old_version(pid: str, path: Path) -> bool:
    """Of names that tell no place and no start: nothing was written for long, nor by a process that is there now."""
    age = _age(path)
    if age <= STALE_SECONDS or not pid.isdigit() or not _lives(int(pid)):
        return age > STALE_SECONDS
    start = _started(int(pid))
    return start is not None and time.clock_gettime(time.CLOCK_BOOTTIME) - start / os.sysconf("SC_CLK_TCK") < age


def sweep(folder: Path, target: str | None = None) -> None:
    """Remove the temporary files and folders in ``folder`` whose owners have died.

    Args:
        target: take names that older versions of this package left, which tell less, only where they are of this file.
    """
    with contextlib.suppress(OSError):  # not there, or not to be listed
        for name in os.listdir(folder):
            if is_leftover(folder / name, target):
                with contextlib.suppress(OSError):  # another one was quicker
                    remove(folder / name)


def is_leftover(path: Path, target: str | None = None) -> bool:
    """Whether ``path`` is a temporary file or folder of this package whose owner has died; ``target`` as for :func:`sweep`."""
    if not path.name.startswith(TEMPORARY):
        return False
    match, old = _NAME.search(path.name), _OLD_NAME.search(path.name)
    try:
        if match:
            return is_left(match[1], path)
        if old and target in (None, path.name[len(TEMPORARY) : old.start()]):
            return _is_left_by_old_version(old[1], path)
    except OSError:  # another one has removed it
        pass
    return False


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with all that is in it, as far as it is there and the system lets us."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


# -- writing -----------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], *, new: bool = False) -> Iterator[Path]:
    """A temporary path beside ``path`` to write to: flushed to the disk and renamed when all went well, else removed.

    A link is written through: the file that it names is replaced, with its permissions kept. What is written to a
    character device or a pipe (``/dev/null``, ``/dev/stdout``) goes into it.

    Args:
        new: of several processes that write ``path``, one succeeds (where the file system has hard links).

    Raises:
        DiffFitError: ``path`` is a folder, a block device or a socket.
        FileExistsError: with ``new``, it is there.
        OSError: it cannot be written.

    >>> with replacing(tmp_path / "numbers.txt") as temporary:          # doctest: +SKIP
    ...     temporary.write_text("1 2 3")
    """
    path = Path(path)
    target = _target(path)
    temporary = beside(target or Path(tempfile.gettempdir()) / path.name)
    if temporary.parent not in _looked_into:  # once: a folder may hold very many files
        _looked_into.add(temporary.parent)
        sweep(temporary.parent, target.name if target else "")
    try:
        yield temporary
        if target is None:
            _pour(temporary, path)
            return
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        with contextlib.suppress(OSError):  # nothing was there, or the file system knows no permissions
            temporary.chmod(stat.S_IMODE(target.stat().st_mode))
        if not (new and _link(temporary, target)):
            os.replace(temporary, target)
    except OSError as error:
        if error.filename not in (str(temporary), None):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # the name that the user knows
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside ``path`` to fill: it gets its name when all went well, else it is removed.

    Args:
        overwrite: a folder that is there is replaced, and removed only when the new one is whole.

    Raises:
        DiffFitError: ``path`` is there and has something in it, or is no folder.
        OSError: it cannot be written.
    """
    path = Path(path)
    if path.name in ("", ".."):
        raise DiffFitError(f"expected a folder with a name of its own, to be made; got {str(path)!r}")
    there = path.exists() or path.is_symlink()
    if there and not (path.is_dir() and (overwrite or not any(path.iterdir()))):
        raise DiffFitError(f"{path} is there{' and has something in it' if path.is_dir() else ' and is no folder'}")
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent, path.name)
    temporary = beside(path)
    temporary.mkdir()
    try:
        yield temporary
        old = None
        if there:
            os.rename(path, old := beside(path))
        os.rename(temporary, path)
        if old is not None:
            remove(old)
    finally:
        remove(temporary)


def _link(temporary: Path, target: Path) -> bool:
    """Give a file its name unless another one has it; False where that cannot be done at once."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        raise
    except OSError:
        return False
    return True


def check_target(path: str | os.PathLike[str], flag: str) -> None:
    """Refuse what :func:`replacing` would, before any work is spent; ``flag``: where the user has named it.

    Raises:
        DiffFitError: ``path`` is no name of a file, or its folder does not exist.
    """
    target = _target(Path(path))
    if target is not None and not target.parent.is_dir():
        raise DiffFitError(f"the folder of {flag} does not exist: {target.parent}")


def check_unicode(path: str | os.PathLike[str]) -> None:
    """Refuse a place for ``.safetensors`` files whose name is not UTF-8: the library could not read them again."""
    try:
        os.fspath(path).encode("utf-8")
    except UnicodeEncodeError as error:
        raise DiffFitError(
            f"cannot write {path}: names of .safetensors files and of their folders must be UTF-8"
        ) from error


def _target(path: Path) -> Path | None:
    """The file to replace, links followed; None: something to write into."""
    if _descriptor(path) is not None:
        return None
    real = Path(os.path.realpath(path)) if path.is_symlink() else path
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return real
    if stat.S_ISREG(mode):
        return real
    if stat.S_ISCHR(mode) or stat.S_ISFIFO(mode):
        return None
    what = "a folder" if stat.S_ISDIR(mode) else "a block device" if stat.S_ISBLK(mode) else "a socket"
    raise DiffFitError(f"cannot write {path}: expected the name of a file; it is {what}")


def _descriptor(path: Path) -> int | None:
    """The open file of this process that a name such as ``/dev/stdout`` stands for."""
    name = os.path.abspath(path)
    for _ in range(40):  # as many links as Linux follows
        match = _DESCRIPTOR.fullmatch(name)
        if match and match[1] in (None, str(os.getpid())):
            return int(match[2])
        try:
            name = os.path.normpath(os.path.join(os.path.dirname(name), os.readlink(name)))
        except OSError:
            return None
    return None


def _pour(source: Path, path: Path) -> None:
    """The bytes of ``source`` into a device, a pipe, or an open file, behind what was printed there before."""
    if sys.stdout is not None:
        sys.stdout.flush()
    descriptor = _descriptor(path)
    opened = os.open(path, os.O_WRONLY) if descriptor is None else os.dup(descriptor)
    with open(source, "rb") as file, open(opened, "wb") as out:
        shutil.copyfileobj(file, out)


def write_bytes(path: Path, content: bytes, *, new: bool = False) -> None:
    with replacing(path, new=new) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str, *, new: bool = False) -> None:
    """UTF-8; ``new`` as for :func:`replacing`.

    Raises:
        DiffFitError: a name of a file that is not UTF-8 is in it.
    """
    try:
        content = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DiffFitError(
            f"cannot write {path}: {text[error.start - 20 : error.end]!r} is not valid Unicode"
        ) from error
    write_bytes(path, content, new=new)


def json_text(value: Any, **options: Any) -> str:
    """JSON that can be written as UTF-8 whatever is in it: of a name that is not UTF-8 the odd bytes are escaped.

    ``json.loads`` gives the same name back.
    """
    return json.dumps(value, ensure_ascii=False, **options).encode("utf-8", "backslashreplace").decode("utf-8")


def write_json(path: Path, value: Any, *, new: bool = False) -> None:
    write_text(path, json_text(value, indent=1) + "\n", new=new)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; a :class:`DiffFitError` names the file when it is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
    except (OSError, ValueError, RecursionError) as error:
        raise DiffFitError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise DiffFitError(f"{path} should hold a JSON object, not a {type(value).__name__}")
    return value


def _no_number(name: str) -> float:
    raise ValueError(f"it holds {name} where a number is expected")


def write_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """A safetensors file whose bytes depend on its content alone (the library's own order of metadata does not repeat).

    Tensors of any of the format's usual dtypes, on any device; they are written one after another, so that no second
    copy of them all is held.

    Raises:
        DiffFitError: ``path`` is not UTF-8, see :func:`check_unicode`, or no name of a file.
    """
    check_unicode(path)
    header: dict[str, object] = {}
    if metadata:
        header["__metadata__"] = dict(sorted(metadata.items()))
    start = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, start + size],
        }  # fmt: skip
        start += size
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of eight
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            flat = tensor.detach().to("cpu").contiguous().reshape(-1)
            if flat.numel():
                file.write(memoryview(flat.view(torch.uint8).numpy()))


def write_torch(path: Path, value: object) -> None:
    """``torch.save`` beside ``path``, and renamed; the same value, the same bytes."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(value, file)  # not to the temporary name, which it would record
        except RuntimeError as error:  # an assertion of its own, over what the system said
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise


def stamp(status: os.stat_result) -> tuple[int, int, int]:
    """What tells without reading that a file is the one it was: size, and the times of its last write and last change.

    The former time can be set, by ``cp -p`` or an archive; the latter cannot. It moves with permissions and links, too: a
    stamp that differs does not say that the content does.
    """
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def safetensors_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The metadata of a ``.safetensors`` file.

    Raises:
        DiffFitError: the file cannot be read as one.
    """
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise DiffFitError(f"cannot read {path}: {error}") from error


def parse_yaml(text: str, source: str) -> Any:
    """The value of a YAML text, of plain types; ``source`` begins the message of the :class:`DiffFitError` that it is none."""
    try:
        return yaml.safe_load(text)
    except (
        Exception
    ) as error:  # dates without a 13th month, numbers of 5,000 digits, brackets without end: each its own
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or (str(error) or type(error).__name__).splitlines()[0]
        raise DiffFitError(f"{source} is not valid YAML{where}: {problem}") from error


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A YAML mapping of settings, or a :class:`DiffFitError` that says what is wrong with the file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DiffFitError(f"cannot read the configuration {path}: {reason}") from error
    values = parse_yaml(text, f"the configuration {path}")
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise DiffFitError(f"the configuration {path} must hold keys and values; it holds a {type(values).__name__}")
    return values
