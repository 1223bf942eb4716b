"""Cache VAE moments (or cropped pixels) of an image folder, on one process or several, resumable after any kill.

Images are taken in the order of :class:`ImageFolder`; shard k holds the images ``k * shard_size`` onwards, and process
r of R writes the shards k with ``k % R == r``. There is no talk between processes: a shard appears whole by renaming,
and whoever finds all shards present writes the index, which is the same whoever does. So any number of processes,
killed and started again any number of times, leave the same bytes.

A shard holds a digest of every file that it was made of, taken of the bytes that were decoded, and ``extract.json`` one of
all their names, sizes and times. While the latter stays, so do the shards; when it differs, the files are read and hashed,
and the shards whose images have changed are made anew.

On a CPU each image and its mirror image are encoded by one thread, several images at a time: the convolutions of a
library called with several threads sum in an order that depends on their number, and on the batch.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .._files import TEMPORARY, check_unicode, read_json, sha256, stamp, sweep, write_json
from ..errors import DiffFitError
from .base import check_channels
from .image_folder import ImageFolder
from .pixels import ImageError, read_pixels, to_signed
from .shards import (
    CONFIG_FILE,
    DIGEST_BYTES,
    FORMAT,
    INDEX_FILE,
    VERSION,
    Layout,
    check_version,
    open_shard,
    shard_name,
    shard_note,
    source_ranges,
    write_index,
    write_shard,
)
from .vae import DTYPES, LatentSpace, PixelSpace, load_vae


@dataclass(frozen=True)
class ExtractConfig:
    """What to extract, and how.

    The first seven fields decide what is stored. A folder begun with other values is refused, since its shards would not
    fit; the rest may change between runs.
    """

    data_path: str
    features_path: str
    image_size: int = 256
    vae: str = "ema"
    shard_size: int = 1024
    channels: int = 3  # of the pixels: 3 for RGB, 1 for gray, which no VAE takes
    precision: str = "fp32"  # of the encoder; fp32 stores moments as float32, bf16 and fp16 as float16
    batch_size: int = 16
    num_workers: int = 4  # threads that decode images (Pillow releases the interpreter lock)
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("batch_size", "shard_size", "image_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or value <= 0:
                raise DiffFitError(f"--{name.replace('_', '-')} must be a positive integer, got {value!r}")
        check_channels(self.channels)
        if self.channels != 3 and self.vae.lower() != "none":
            raise DiffFitError(f"a VAE takes images of 3 channels; --channels {self.channels} goes with --vae none")
        if self.num_workers < 0:
            raise DiffFitError(f"--num-workers must be zero or more, got {self.num_workers}")
        if self.precision not in DTYPES:
            raise DiffFitError(f"--precision must be one of {', '.join(DTYPES)}, got {self.precision!r}")


class Extraction:
    """One process's view of an extraction: opens the source and the VAE, checks the target folder.

    Raises:
        DiffFitError: the source is no image folder, the image size does not fit the VAE, or the target folder holds
            another configuration's leftovers or foreign files.

    Attributes:
        changed: the images found so far to have changed since they were extracted.
    """

    def __init__(self, config: ExtractConfig) -> None:
        self.config = config
        self.out = Path(config.features_path)
        check_unicode(self.out)
        begun = read_json(self.out / CONFIG_FILE) if (self.out / CONFIG_FILE).is_file() else {}
        self.folder = ImageFolder(
            config.data_path,
            config.image_size,
            flip=False,
            class_names=begun.get("class_names"),
            channels=config.channels,
        )
        self._status = [(self.folder.root / name).stat() for name in self.folder.files]
        self.vae: LatentSpace | PixelSpace = load_vae(config.vae, config.device, config.precision)
        if config.image_size % self.vae.factor:
            raise DiffFitError(
                f"the image size must be a multiple of {self.vae.factor} for this VAE, got {config.image_size}"
            )
        pixels = isinstance(self.vae, PixelSpace)
        precision = "uint8" if pixels else config.precision
        size = config.image_size // self.vae.factor
        self.layout = Layout(
            "pixels" if pixels else "moments", config.channels if pixels else self.vae.channels, size, precision
        )
        self._source = source_ranges(len(self.folder), config.shard_size)
        self.num_shards = len(self._source)
        self.changed: list[str] = []
        self._known: dict[tuple[int, int, int], bool] = {}  # shard as it lies there -> whether it is of these images
        self.settings = self._settings()
        self._claim()

    def _settings(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "kind": self.layout.kind,
            "channels": self.layout.channels,
            "image_size": self.config.image_size,
            "precision": self.layout.precision,
            "vae": self.config.vae,
            "vae_sha256": self.vae.fingerprint(),
            "shard_size": self.config.shard_size,
            "num_images": len(self.folder),
            "listing_sha256": self._listing(lambda status: ()),
            "stamps_sha256": self._listing(stamp),
            "class_names": self.folder.class_names,
        }

    def _listing(self, told: Callable[[os.stat_result], tuple[int, ...]]) -> str:
        """SHA-256 over the images' names and what is told of each one's status."""
        listing = hashlib.sha256()
        for name, status in zip(self.folder.files, self._status, strict=True):
            words = (name, *map(str, told(status)))
            listing.update(("\0".join(words) + "\n").encode("utf-8", "surrogateescape"))
        return listing.hexdigest()

    def _claim(self) -> None:
        """Make the target folder ours, or refuse it."""
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DiffFitError(f"the folder {self.out} cannot be made: {error.strerror or error}") from error
        path = self.out / CONFIG_FILE
        foreign = sorted(entry.name for entry in os.scandir(self.out) if not entry.name.startswith(TEMPORARY))
        if CONFIG_FILE in foreign:
            self._take_up(read_json(path), path)
            return
        if foreign:
            raise DiffFitError(
                f"{self.out} is not empty (it holds {foreign[0]!r}) and was not begun by difffit extract; "
                "choose an empty --features-path"
            )
        self._stamps = self.settings["stamps_sha256"]
        with _writing(self.out):
            try:
                write_json(path, self.settings, new=True)
            except FileExistsError:  # another process was quicker, perhaps with other settings
                self._take_up(read_json(path), path)

    def _take_up(self, found: dict[str, Any], path: Path) -> None:
        """Go on with a folder that was begun with the settings ``found``, or refuse it."""
        check_version(found, path)
        if found["version"] == 1:
            self.settings["listing_sha256"] = self._listing(lambda status: (status.st_size,))
        # The name of the VAE is only a name: its weights are what counts.
        free = ("vae", "version", "stamps_sha256")
        theirs = {"channels": self.layout.channels if self.layout.kind == "moments" else 3} | found  # once not recorded
        different = [key for key in self.settings if key not in free and theirs.get(key) != self.settings[key]]
        if different:
            raise DiffFitError(
                f"{self.out} holds features of another configuration ({self._difference(found, different[0])}); "
                "choose another --features-path or remove it"
            )
        self._stamps = found.get("stamps_sha256")
        self.settings = found | {"stamps_sha256": self.settings["stamps_sha256"]}

    def _difference(self, found: dict[str, Any], key: str) -> str:
        if key in ("listing_sha256", "class_names"):
            return "images were added, removed or renamed since"
        if key == "vae_sha256":
            return f"the VAE {found.get('vae')!r} had other weights than {self.settings['vae']!r}"
        return f"its {key} is {found.get(key)}, now {self.settings[key]} is asked for"

    def is_complete(self) -> bool:
        """Whether all is there, and known to be of the images as they are now."""
        return self._is_recorded() and (self.out / INDEX_FILE).is_file() and not self.missing()

    def _is_recorded(self) -> bool:
        """Whether the folder was finished, or begun, with the images as they are now."""
        return self._stamps == self.settings["stamps_sha256"]

    def missing(self) -> list[int]:
        """Numbers of the shards that are not there, not whole, or of images that have changed since."""
        return [number for number in range(self.num_shards) if not self._is_current(number)]

    def _path(self, number: int) -> Path:
        return self.out / shard_name(number, self.num_shards)

    def _is_current(self, number: int) -> bool:
        path = self._path(number)
        try:
            status = path.stat()
            handle = open_shard(
                path, self.layout, self.shard_range(number)
            )  # compares the header with the file's length
            shard_note(handle, path)
        except (OSError, DiffFitError):
            return False
        if self._is_recorded():
            return True
        key = (number, status.st_ino, status.st_mtime_ns)
        if key not in self._known:
            changed = self._changed_since(handle, number, status.st_mtime_ns)
            self.changed += changed
            self._known[key] = not changed
        return self._known[key]

    def _changed_since(self, handle: Any, number: int, written: int) -> list[str]:
        """The images of a shard that are others now; ``written``: when the shard was, ns since the epoch."""
        names = [self.folder.files[index] for index in self.shard_range(number)]
        if "digests" in handle.keys():  # noqa: SIM118 (not a mapping)
            then = [bytes(row) for row in handle.get_tensor("digests").numpy()]
            return [name for name, digest in zip(names, then, strict=True) if self._digest(name) != digest]
        status = ((name, (self.folder.root / name).stat()) for name in names)  # version 1 can be asked no more
        return [name for name, now in status if max(now.st_mtime_ns, now.st_ctime_ns) > written]

    def _digest(self, name: str) -> bytes:
        try:
            return bytes.fromhex(sha256(self.folder.root / name))
        except OSError:
            return bytes(DIGEST_BYTES)

    def shard_range(self, number: int) -> range:
        """The source images of shard ``number``."""
        return self._source[number]

    def run(self, rank: int = 0, world: int = 1, progress: Callable[[int], None] = lambda images: None) -> None:
        """Write this process's missing shards; ``progress`` is told of every image done (present ones first)."""
        mine = range(rank, self.num_shards, world)
        todo = [number for number in mine if not self._is_current(number)]
        if todo:
            sweep(self.out)
            (self.out / INDEX_FILE).unlink(missing_ok=True)  # of the shards as they were
        progress(
            sum(len(self.shard_range(number)) for number in mine)
            - sum(len(self.shard_range(number)) for number in todo)
        )
        batches = [
            (number, start, indices[start : start + self.config.batch_size])
            for number in todo
            for indices in [self.shard_range(number)]
            for start in range(0, len(indices), self.config.batch_size)
        ]
        with _encoders(self.config.device) as pool:
            self._write_batches(batches, pool, progress)

    def _write_batches(
        self, batches: list[tuple[int, int, range]], pool: Executor | None, progress: Callable[[int], None]
    ) -> None:
        parts: list[dict[str, torch.Tensor]] = []
        bad: list[tuple[str, str]] = []
        digests: list[bytes] = []
        for (number, start, indices), decoded in zip(batches, self._decode([b[2] for b in batches]), strict=True):
            found = [(i, pixels) for i, (pixels, _) in zip(indices, decoded, strict=True)]
            kept = [(i, pixels) for i, pixels in found if isinstance(pixels, np.ndarray)]
            bad += [(self.folder.files[i], reason) for i, reason in found if isinstance(reason, str)]
            digests += [digest for _, digest in decoded]
            if kept:
                parts.append(self._encode(kept, pool))
            progress(len(indices))
            if start + len(indices) == len(self.shard_range(number)):
                self._write(number, parts, bad, digests)
                parts, bad, digests = [], [], []

    def _decode(self, batches: list[range]) -> Iterator[list[tuple[np.ndarray | str, bytes]]]:
        """Pixels (or the reason why there are none) and the file's digest, of each batch; a batch ahead of the encoder."""

        def one(index: int) -> tuple[np.ndarray | str, bytes]:
            path = self.folder.root / self.folder.files[index]
            content, digest = None, bytes(DIGEST_BYTES)
            with suppress(OSError):  # whose fault that is, read_pixels knows
                content = path.read_bytes()
                digest = hashlib.sha256(content).digest()
            try:
                return read_pixels(path, self.config.image_size, content, self.config.channels), digest
            except ImageError as error:
                return str(error), digest

        if self.config.num_workers == 0:
            for batch in batches:
                yield [one(index) for index in batch]
            return
        pool = ThreadPoolExecutor(self.config.num_workers)
        ahead: deque[list[Future[tuple[np.ndarray | str, bytes]]]] = deque()
        try:
            for batch in batches:
                ahead.append([pool.submit(one, index) for index in batch])
                if len(ahead) > 2:
                    yield [future.result() for future in ahead.popleft()]
            while ahead:
                yield [future.result() for future in ahead.popleft()]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _encode(self, kept: list[tuple[int, np.ndarray]], pool: Executor | None) -> dict[str, torch.Tensor]:
        indices = torch.tensor([index for index, _ in kept], dtype=torch.int64)
        pixels = torch.from_numpy(np.stack([p.transpose(2, 0, 1) for _, p in kept]))
        part = {"indices": indices, "labels": torch.from_numpy(self.folder.labels)[indices]}
        if isinstance(self.vae, PixelSpace):
            return part | {"pixels": pixels.contiguous()}
        images = to_signed(pixels).to(self.config.device)
        if pool is None:
            both = torch.stack([self.vae.encode(images), self.vae.encode(images.flip(-1))], dim=1).cpu()
        else:
            both = torch.stack(list(pool.map(self.vae.encode, (torch.stack([x, x.flip(-1)]) for x in images))))
        both = both.to(self.layout.dtype)
        if not torch.isfinite(both).all():
            raise DiffFitError(f"the VAE gave non-finite moments in {self.config.precision}; use --precision fp32")
        return part | {"moments": both}

    def _write(
        self, number: int, parts: list[dict[str, torch.Tensor]], bad: list[tuple[str, str]], digests: list[bytes]
    ) -> None:
        if not parts:  # every image of this shard is damaged
            empty, nothing = (
                torch.zeros(0, dtype=torch.int64),
                torch.zeros(self.layout.shape(0), dtype=self.layout.dtype),
            )
            parts = [{"indices": empty, "labels": empty, self.layout.kind: nothing}]
        tensors = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        tensors["digests"] = torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.uint8).view(-1, DIGEST_BYTES)
        path = self._path(number)
        with _writing(self.out):
            write_shard(path, tensors, {"bad": bad, "shard": number})
            status = path.stat()
        self._known[number, status.st_ino, status.st_mtime_ns] = True

    def finish(self) -> dict[str, Any] | None:
        """Write the index if all shards are present, and return it; ``None`` while others are still at work."""
        if self.missing():
            return None
        labels: list[int] = []
        files: list[str] = []
        bad: list[tuple[str, str]] = []
        shards: list[dict[str, Any]] = []
        for number in range(self.num_shards):
            path = self._path(number)
            handle = open_shard(path, self.layout, self.shard_range(number))
            indices = handle.get_tensor("indices").tolist()
            labels += handle.get_tensor("labels").tolist()
            files += [self.folder.files[index] for index in indices]
            bad += shard_note(handle, path)["bad"]
            shards.append(
                {"file": path.name, "count": len(indices), "bytes": path.stat().st_size, "sha256": sha256(path)}
            )
        empty = sorted(set(range(self.folder.num_classes)) - set(labels))
        if empty:
            raise DiffFitError(f"none of the images of class {self.folder.class_names[empty[0]]!r} can be read")
        index = {
            "config": {
                key: value
                for key, value in self.settings.items()
                if key not in ("class_names", "stamps_sha256", "channels")
            },
            "class_names": self.folder.class_names,
            "channels": self.layout.channels,
            "size": self.config.image_size // self.vae.factor,
            "scale": self.vae.scale,
            "shift": self.vae.shift,
            "shards": shards,
            "bad": bad,
            "labels": labels,
            "files": files,
        }
        with _writing(self.out):
            if not self._is_recorded():
                write_json(self.out / CONFIG_FILE, self.settings)
                self._stamps = self.settings["stamps_sha256"]
            index = write_index(self.out, index)
        sweep(self.out)
        return index


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DiffFitError(
            f"cannot write into {out}: {error.strerror or error}; run the same command again to go on from what is finished"
        ) from error


@contextmanager
def _encoders(device: str) -> Iterator[Executor | None]:
    """On a CPU a pool of encoder threads, as many as PyTorch would use, each of which computes alone; else ``None``."""
    if torch.device(device).type != "cpu":
        yield None
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)
