"""``difffit extract``: cache VAE moments or cropped pixels of an image folder for training."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from typing import Any

import torch
from tqdm import tqdm

from .._devices import choose_device
from ..data.extract import ExtractConfig, Extraction
from ..errors import DiffFitError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``difffit extract`` to ``parser``."""
    parser.add_argument("--data-path", required=True, help="folder with one sub-folder of images per class")
    parser.add_argument(
        "--features-path",
        "--feature-path",
        dest="features_path",
        required=True,
        help="folder to write; resumed if begun",
    )
    parser.add_argument("--vae", default="ema", help="ema, mse, a diffusers folder, a hub name, or none for pixels")
    parser.add_argument("--image-size", type=int, default=256, help="side of the square crop, pixels")
    parser.add_argument("--channels", type=int, default=3, choices=(1, 3), help="of pixels: 3 for RGB, 1 for gray")
    parser.add_argument("--batch-size", type=int, default=16, help="images encoded at once, per process")
    parser.add_argument("--num-workers", type=int, default=4, help="decoding threads per process")
    parser.add_argument("--shard-size", type=int, default=1024, help="images per file")
    parser.add_argument(
        "--precision",
        default="fp32",
        choices=("fp32", "bf16", "fp16"),
        help="of the encoder; other than fp32 halves the files",
    )
    parser.add_argument(
        "--num-processes", type=int, default=1, help="processes to start here (or start this with torchrun)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")


def run(args: argparse.Namespace) -> int:
    """Extract as ``args`` say; 0 when done. Raises :class:`DiffFitError` for what the user must mend."""
    if args.num_processes < 1:
        raise DiffFitError(f"--num-processes must be at least 1, got {args.num_processes}")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and args.num_processes > 1:
        raise DiffFitError("--num-processes and torchrun both start processes; use one of them")
    if args.num_processes > 1:
        return _run_children(args)
    extraction = Extraction(_config(args, int(os.environ.get("LOCAL_RANK", 0))))
    if not _is_complete(extraction, rank == 0):
        share = range(rank, extraction.num_shards, world)
        total = sum(len(extraction.shard_range(number)) for number in share)
        with tqdm(total=total, unit="img", desc="extract", disable=rank != 0, smoothing=0.1) as bar:
            extraction.run(rank, world, bar.update)
        extraction.finish()
    if rank == 0:
        _tell(extraction)
    return 0


def _config(args: argparse.Namespace, local_rank: int) -> ExtractConfig:
    return ExtractConfig(
        data_path=args.data_path,
        features_path=args.features_path,
        image_size=args.image_size,
        vae=args.vae,
        channels=args.channels,
        shard_size=args.shard_size,
        precision=args.precision,
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        device=str(choose_device(args.device, local_rank)),
    )


def _is_complete(extraction: Extraction, tell: bool = True) -> bool:
    """Whether nothing is left to do; says which images have changed since they were extracted."""
    missing = extraction.missing()
    if extraction.changed and tell:
        count, first = len(extraction.changed), extraction.changed[0]
        print(
            f"{count} images have changed since they were extracted, the first is {first}; "
            f"{len(missing)} of {extraction.num_shards} shards are made anew",
            file=sys.stderr,
        )
    return not missing and extraction.is_complete()


def _tell(extraction: Extraction) -> None:
    """Say what has been written, and name the images that were left out."""
    out = extraction.out
    if not extraction.is_complete():
        print(f"this process is done; {len(extraction.missing())} shards of {out} are still with the others")
        return
    from ..data.latent_cache import LatentCache

    cache = LatentCache(out)
    print(f"{out}: {len(cache)} images, {cache.num_classes} classes, {extraction.num_shards} shards ({cache.kind})")
    for note in extraction.folder.notes:
        print(note, file=sys.stderr)
    for file, reason in cache.report():
        print(f"left out, unreadable: {file}: {reason}", file=sys.stderr)
    if cache.report():
        print(f"{len(cache.report())} unreadable images were left out", file=sys.stderr)


def _run_children(args: argparse.Namespace) -> int:
    """Start ``--num-processes`` children, show their common progress, and end all if one fails."""
    extraction = Extraction(_config(args, 0))  # checks everything once, before any child starts
    if _is_complete(extraction):
        _tell(extraction)
        return 0
    context = multiprocessing.get_context("spawn")
    counter, errors = context.Value("q", 0), context.SimpleQueue()
    children = [
        context.Process(target=_child, args=(args, rank, os.getpid(), counter, errors))
        for rank in range(args.num_processes)
    ]
    try:
        for child in children:
            child.start()
        with tqdm(total=len(extraction.folder), unit="img", desc="extract", smoothing=0.1) as bar:
            while any(child.is_alive() for child in children):
                next(child for child in children if child.is_alive()).join(timeout=0.2)
                bar.update(counter.value - bar.n)
                if any(child.exitcode for child in children):
                    break
            bar.update(counter.value - bar.n)
    finally:
        for child in children:
            if child.is_alive():
                child.terminate()
        for child in children:
            child.join()
    failed = [(rank, child.exitcode) for rank, child in enumerate(children) if child.exitcode]
    if failed:
        if not errors.empty():
            raise DiffFitError(errors.get())
        rank, code = failed[0]
        how = f"was killed by signal {-code}" if code < 0 else f"failed with exit code {code}"
        raise DiffFitError(
            f"extraction process {rank} {how}; run the same command again to go on from the finished shards"
        )
    extraction.finish()
    _tell(extraction)
    return 0


def _child(args: argparse.Namespace, rank: int, parent: int, counter: Any, errors: Any) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // args.num_processes))

    def progress(images: int) -> None:
        if os.getppid() != parent:  # the parent was killed: nobody waits for this any more
            os._exit(1)
        with counter.get_lock():
            counter.value += images

    try:
        Extraction(_config(args, rank)).run(rank, args.num_processes, progress)
    except DiffFitError as error:
        errors.put(str(error))
        sys.exit(2)
