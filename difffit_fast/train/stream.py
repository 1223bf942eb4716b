"""The endless stream of training samples, and all that is random about each of them.

Epochs are permutations of the data, laid end to end; *position* counts through them. Step s takes the next
``global_batch_size`` positions, whatever the epoch's end, so every step has the full batch and the whole state of the
data is one number. What is random at a position (the visit of the image, timestep, noise, whether its label is dropped)
comes from ``(global_seed, position)`` alone: the same for any number of processes, workers and accumulated parts, and
after a resume.
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing.queues
import os
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .._devices import usable_cpus
from .._words import first_line
from ..data.base import TrainingData, visit_rng, visit_seed
from ..errors import DiffFitError
from .config import DEFAULT_WORKERS

# Tags that keep the streams of random numbers apart.
_SHUFFLE, _DRAWS, _VALIDATION, _SPLIT = 0x5348, 0x4452, 0x5641, 0x5350

Batch = dict[str, Tensor]


class TrainStream(Dataset):
    """Samples by position.

    Args:
        data: the training data.
        seed: the run's global seed.
        noise_shape: (C, H, W) of what the diffusion model sees: the data's own, or the latents' of a VAE.
        drop_prob: how often a label becomes the null class.
        null_class: its index, ``num_classes``.
        indices: the part of the data to train on; all of it by default.
        encode: also draw the noise of a VAE sample (``"encode"``).
        classes: the model's class for each label of the data; the label itself by default.
    """

    def __init__(
        self,
        data: TrainingData,
        seed: int,
        noise_shape: Sequence[int],
        drop_prob: float,
        null_class: int,
        indices: np.ndarray | None = None,
        encode: bool = False,
        classes: Sequence[int] | None = None,
    ) -> None:
        self.data = data
        self.classes = classes
        self.seed = seed
        self.noise_shape = tuple(noise_shape)
        self.drop_prob = drop_prob
        self.null_class = null_class
        self.indices = np.arange(len(data)) if indices is None else indices
        self.encode = encode
        self._orders: dict[int, np.ndarray] = {}

    def order(self, epoch: int) -> np.ndarray:
        """The data indices of an epoch, in order."""
        if epoch not in self._orders:
            if len(self._orders) > 1:  # a batch spans two epochs, seldom more
                self._orders.pop(min(self._orders))
            shuffle = visit_rng(visit_seed(self.seed, _SHUFFLE, epoch))
            self._orders[epoch] = self.indices[shuffle.permutation(len(self.indices))]
        return self._orders[epoch]

    def load(self, position: int, into: Batch, row: int) -> None:
        """Fill ``row`` of a batch with the sample at ``position``."""
        epoch, place = divmod(position, len(self.indices))
        index = int(self.order(epoch)[place])
        into["x"][row], label = self.data.load(index, visit_seed(self.seed, epoch, index))
        rng = visit_rng(visit_seed(self.seed, _DRAWS, position))
        into["u"][row] = rng.random()
        into["y"][row] = self.null_class if rng.random() < self.drop_prob else self.class_of(label)
        _normal(rng, into["noise"][row])
        if self.encode:
            _normal(rng, into["encode"][row])

    def class_of(self, label: int) -> int:
        """The model's class that a label of the data means."""
        if self.classes is None:
            return label
        if not 0 <= label < len(self.classes):
            raise DiffFitError(f"the data names {len(self.classes)} classes, and has an image with the label {label}")
        return self.classes[label]

    def __getitems__(self, positions: Sequence[int]) -> Batch:
        """The samples at ``positions``: ``x`` (N, C, H, W), ``y`` (N,) long with dropped labels, ``u`` (N,) in [0, 1)
        for the timestep (float64), ``noise`` (N, C, H, W) and ``encode`` for a VAE on the fly; else float32."""
        n = len(positions)
        batch = {
            "x": torch.empty(n, self.data.channels, self.data.size, self.data.size),
            "y": torch.empty(n, dtype=torch.long),
            "u": torch.empty(n, dtype=torch.float64),
            "noise": torch.empty(n, *self.noise_shape),
        }
        if self.encode:
            batch["encode"] = torch.empty(n, *self.noise_shape)
        for row, position in enumerate(positions):
            self.load(position, batch, row)
        return batch

    def first_non_finite(self, position: int, count: int) -> str | None:
        """The name of the first of ``count`` samples from ``position`` on whose data is not finite; None: all are."""
        for place in range(max(0, position), position + count):
            epoch, row = divmod(place, len(self.indices))
            index = int(self.order(epoch)[row])
            x, _ = self.data.load(index, visit_seed(self.seed, epoch, index))
            if not bool(torch.isfinite(x).all()):
                files = getattr(self.data, "files", None)
                return files[index] if files else f"image {index}"
        return None

    def batch_bytes(self, count: int) -> int:
        """What a batch of ``count`` samples takes."""
        values = self.data.channels * self.data.size**2 + (1 + self.encode) * math.prod(self.noise_shape)
        return count * (4 * values + 16)

    def __len__(self) -> int:
        return len(self.indices)


class ValidationStream(TrainStream):
    """A fixed set of samples: the same images, noise and timesteps at every call, no label dropped.

    Timesteps are spread evenly over the samples (stratified), which takes most of the noise out of the comparison.
    """

    @property
    def hash(self) -> str:
        """Which images these are, by number and, where they are files, by name, and which noise: losses on streams with the
        same one can be compared."""
        files = getattr(self.data, "files", None)
        names = [str(files[i]) for i in self.indices] if files else len(self.data)
        told = json.dumps([self.seed, self.indices.tolist(), names])
        return hashlib.sha256(told.encode()).hexdigest()[:16]

    def load(self, position: int, into: Batch, row: int) -> None:
        index = int(self.indices[position])
        into["x"][row], label = self.data.load(index, visit_seed(self.seed, _VALIDATION, index))
        into["y"][row] = self.class_of(label)
        rng = visit_rng(visit_seed(self.seed, _VALIDATION, position + (1 << 40)))
        # A multiplicative walk decouples the timestep from the class, which is sorted in a folder.
        n = len(self.indices)
        into["u"][row] = (((position * 0.6180339887498949) % 1.0) + rng.random() / n) % 1.0
        _normal(rng, into["noise"][row])
        if self.encode:
            _normal(rng, into["encode"][row])


def _normal(rng: np.random.Generator, out: Tensor) -> None:
    rng.standard_normal(out=out.numpy(), dtype=np.float32)


def share(count: int, rank: int, world: int) -> range:
    """The part of ``range(count)`` that ``rank`` of ``world`` processes works on; sizes differ by one at most."""
    small, extra = divmod(count, world)
    start = rank * small + min(rank, extra)
    return range(start, start + small + (rank < extra))


def hold_out(count: int, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split ``range(count)`` at random, by the seed: (to train on, held out), both sorted; at least one image each."""
    order = visit_rng(visit_seed(seed, _SPLIT, count)).permutation(count)
    held = min(max(1, round(count * fraction)), count - 1)
    return np.sort(order[held:]), np.sort(order[:held])


def choose(count: int, most: int, seed: int) -> np.ndarray:
    """At most ``most`` of ``range(count)``, by the seed, sorted."""
    return np.sort(visit_rng(visit_seed(seed, _SPLIT, count + 1)).permutation(count)[:most])


class _Positions:
    """The lists of positions of one process, step after step."""

    def __init__(self, start: int, steps: int, batch_size: int, rank: int, world: int) -> None:
        self.start, self.steps, self.batch_size, self.rank, self.world = start, steps, batch_size, rank, world

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        mine = share(self.batch_size, self.rank, self.world)
        for step in range(self.steps):
            first = self.start + step * self.batch_size
            yield [first + i for i in mine]


def batches(
    stream: TrainStream,
    start: int,
    steps: int,
    batch_size: int,
    *,
    rank: int = 0,
    world: int = 1,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """This process's part of ``steps`` global batches from position ``start`` on, prepared ahead of their use."""
    positions = _Positions(start, steps, batch_size, rank, world)
    if num_workers == 0:
        return _one_thread_ahead(stream, positions, pin_memory)
    loader = DataLoader(
        _Guarded(stream),
        batch_sampler=positions,  # type: ignore[arg-type]
        collate_fn=_whole,
        num_workers=min(num_workers, max(1, steps)),
        pin_memory=pin_memory,
        worker_init_fn=_quiet_worker,
    )
    return _unguarded(loader)


class _Guarded(Dataset):
    """A stream in a worker process, from which an error arrives as its sentence and not as a traceback in text."""

    def __init__(self, stream: TrainStream) -> None:
        self.stream = stream

    def __getitems__(self, positions: Sequence[int]) -> Batch | str:
        try:
            return self.stream.__getitems__(positions)
        except DiffFitError as error:
            return str(error)


def _unguarded(loader: DataLoader) -> Iterator[Batch]:
    iterator = iter(loader)
    while True:
        try:
            batch = next(iterator)
        except StopIteration:
            return
        except RuntimeError as error:  # a worker was killed, for want of memory in most cases
            raise DiffFitError(
                f"the data cannot be read on: {first_line(error)} (a worker that is killed wants memory, or shared memory in "
                f"{SHARED_MEMORY}; --num-workers 0 needs neither)"
            ) from error
        if isinstance(batch, str):
            raise DiffFitError(batch)
        yield batch


def _whole(batch: Any) -> Batch:
    return batch


def _quiet_worker(worker: int) -> None:
    """Leave signals to the parent, which ends its workers after the checkpoint; die rather than lose a batch."""
    for number in (signal.SIGINT, getattr(signal, "SIGHUP", signal.SIGINT)):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_cannot_hand_over)  # type: ignore[assignment]


def _cannot_hand_over(error: Exception, batch: Any) -> None:
    """The library would print this and go on without the batch, for which the parent would wait for ever."""
    print(f"a data worker cannot hand over its batch: {first_line(error)}", file=sys.stderr, flush=True)
    os._exit(1)


# -- how many workers --------------------------------------------------------------------------------------------------
SHARED_MEMORY = "/dev/shm"
_AHEAD = 2  # batches that the loader asks of every worker in advance


def affordable_workers(wanted: int | None, batch_bytes: int, processes: int = 1) -> tuple[int, str | None]:
    """How many workers a process has CPUs for, and shared memory to hand their batches over, and what to say about it.

    One CPU trains; where there is no other, a thread prepares the batches. Workers put whole batches into shared memory, two
    each at most, and one more is in use; containers often have 64 MB of it.

    Args:
        wanted: workers of a process; None for the default, of which it is not said that there are too few CPUs.
        batch_bytes: what a batch of a process takes.
        processes: that train on this machine.
    """
    count = DEFAULT_WORKERS if wanted is None else wanted
    cpus = usable_cpus()
    by_cpus = min(count, max(0, cpus // processes - 1))
    try:
        free = shutil.disk_usage(SHARED_MEMORY).free
    except OSError:  # a system that does it some other way
        by_memory = count
    else:
        by_memory = min(count, max(0, free // max(1, batch_bytes) - processes) // (_AHEAD * processes))
    if by_memory < by_cpus:
        return by_memory, (
            f"{_instead(by_memory, count)}: {SHARED_MEMORY} has {free / 2**20:.0f} MB free, and a batch takes "
            f"{batch_bytes / 2**20:.1f} (docker run --shm-size, or --ipc=host, gives more)"
        )
    if wanted is None or by_cpus == wanted:
        return by_cpus, None
    of = f"of {cpus} CPU(s) training takes one" if processes == 1 else f"{processes} processes train on {cpus} CPUs"
    return by_cpus, f"{_instead(by_cpus, wanted)}: {of}"


def _instead(count: int, wanted: int) -> str:
    if count:
        return f"{count} data workers instead of {wanted}"
    return f"a thread of this process instead of {wanted} data workers"


def _one_thread_ahead(stream: TrainStream, positions: _Positions, pin_memory: bool) -> Iterator[Batch]:
    def load(where: list[int]) -> Batch:
        batch = stream.__getitems__(where)
        return {key: value.pin_memory() for key, value in batch.items()} if pin_memory else batch

    executor = ThreadPoolExecutor(1, thread_name_prefix="difffit-data")
    try:
        pending = None
        for where in positions:
            following = executor.submit(load, where)
            if pending is not None:
                yield pending.result()
            pending = following
        if pending is not None:
            yield pending.result()
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
