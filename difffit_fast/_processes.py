"""Several processes: who they are, and the few words they exchange.

Gradients of the trainables are summed in flat pieces after the backward pass: 3 MB a step for DiffFit, which is not
worth overlapping, and exact for uneven shares because every process divides by the global batch size. (Full
fine-tuning on several GPUs has gigabytes to exchange: ``--fsdp`` overlaps them.)
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ._words import first_line
from .errors import DiffFitError

BUCKET_BYTES = 64 << 20


class LostProcessError(DiffFitError):
    """Another process of the job died, or did not answer in time."""

    exit_code = 1


@dataclass
class World:
    """This process among its peers. ``size`` 1 needs no process group."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    owns_group: bool = False
    local_size: int = 1  # of the peers, those on this machine

    @classmethod
    def join(cls, device: str, timeout: float) -> World:
        """Join the group that torchrun describes in the environment, or one that exists already."""
        if dist.is_available() and dist.is_initialized():
            return cls._joined(owns_group=False)
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        if not dist.is_available():
            raise DiffFitError("this PyTorch was built without torch.distributed; run one process")
        cuda = torch.cuda.is_available() and not device.startswith("cpu")
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(seconds=timeout))
        except (RuntimeError, ValueError) as error:
            raise DiffFitError(f"cannot join the other processes: {_reason(error)}") from error
        return cls._joined(owns_group=True)

    @classmethod
    def _joined(cls, owns_group: bool) -> World:
        rank, size = dist.get_rank(), dist.get_world_size()
        local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", size))
        return cls(rank, size, local_rank, owns_group, local_size)

    @property
    def main(self) -> bool:
        return self.rank == 0

    def leave(self) -> None:
        """Leave a group that :meth:`join` entered."""
        if self.owns_group and dist.is_initialized():
            dist.destroy_process_group()
            self.owns_group = False

    # -- words ---------------------------------------------------------------------------------------------------------
    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Add up tensors over the processes, in place, in pieces of equal dtype and limited size.

        Raises:
            LostProcessError: a peer is gone. ``tensors`` are then unchanged, or some of them.
        """
        if self.size == 1:
            return
        for bucket in _buckets(tensors):
            alone = len(bucket) == 1 and bucket[0].is_contiguous()
            flat = bucket[0] if alone else torch.cat([t.reshape(-1) for t in bucket])
            with self._listening():
                dist.all_reduce(flat)
            if not alone:
                parts = flat.split([t.numel() for t in bucket])
                torch._foreach_copy_(list(bucket), [part.view_as(t) for part, t in zip(parts, bucket, strict=True)])

    def gather(self, value: Any) -> list[Any]:
        """Every process's ``value`` (anything that pickles), in the order of ranks, on all of them."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with self._listening():
            dist.all_gather_object(values, value)
        return values

    def from_main(self, value: Any) -> Any:
        """The first process's ``value``, on all of them."""
        if self.size == 1:
            return value
        box = [value]
        with self._listening():
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def main_first(self, action: Any) -> Any:
        """Let the first process do ``action()`` and give its result to all; if it fails there, all fail alike."""
        result, error = None, None
        if self.main:
            try:
                result = action()
            except DiffFitError as caught:
                error = str(caught)
        result, error = self.from_main((result, error))
        if error is not None:
            raise DiffFitError(error)
        return result

    def agree(self, error: DiffFitError | None) -> None:
        """Fail on all processes alike if one has found an error."""
        if self.size == 1:
            if error is not None:
                raise error
            return
        found = next((text for text in self.gather(None if error is None else str(error)) if text is not None), None)
        if found is not None:
            raise DiffFitError(found) from error

    def _listening(self) -> _Listening:
        return _Listening()


class _Listening:
    """Turns what a backend raises when a peer has gone into one clear sentence."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, RuntimeError):  # DistBackendError is one
            reason = _reason(error)
            raise LostProcessError(f"another process of this job died or did not answer ({reason})") from error


def _reason(error: BaseException) -> str:
    line = first_line(error)
    return line.split("] ", 1)[-1] if line.startswith("[") else line


def _buckets(tensors: Iterable[Tensor]) -> Iterable[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        nbytes = tensor.numel() * tensor.element_size()
        if bucket and (tensor.dtype != bucket[0].dtype or size + nbytes > BUCKET_BYTES):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += nbytes
    if bucket:
        yield bucket
