"""``difffit sample``: a grid of images, or thousands for an FID."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import torch

from .._bounds import BATCH, IMAGES, SEED, SIDE, STEPS, Bounds, check_whole
from .._devices import choose_device
from .._files import check_target, sha256
from .._processes import World
from ..errors import DiffFitError
from ..models.bases import model_path
from ..models.sizes import model_name
from ..sample.sampler import SAMPLERS, SAMPLERS_OF

FLOW_DEFAULT = "euler"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``difffit sample`` to ``parser``; names and meanings are those of DiT's ``sample*.py``."""
    add = parser.add_argument
    add(
        "--ckpt",
        help="DiT or SiT checkpoint, or a base of the package by name (default with --delta: that of its run)",
    )
    add("--delta", help="what fine-tuning wrote, applied to the checkpoint")
    add("--merge", action="store_true", help="fold the delta into the weights first")
    add("--ema", action=argparse.BooleanOptionalAction, default=True, help="averaged weights, if the file has both")
    add("--weights", metavar="NAME", help="weights of this name, in a file that has several (see difffit inspect)")
    add("--model", metavar="NAME", help="check that the checkpoint is this one: DiT-XL/2, SiT-XL/2 and their kin")
    add("--num-heads", type=int, help="attention heads, for widths other than the published ones")
    add("--image-size", type=int, help="pixels (default: the model's own)")
    add("--num-classes", type=int, help="check that the model has so many classes")
    add("--objective", choices=("ddpm", "flow"), help="what the model predicts: ddpm (DiT) or flow (SiT)")
    add("--vae", help="ema, mse, none, a folder or a hub name (default: that of training, else ema; none for pixels)")
    add("--sampler", help="ddpm, ddim, dpm++, unipc, or for flow euler, heun, dopri5, sde (default: ddpm or euler)")
    add("--num-sampling-steps", type=int, default=250, help="steps (default: 250; dopri5 chooses its own)")
    add("--eta", type=float, default=0.0, help="noise of the ddim sampler, 0 to 1")
    add("--rtol", type=float, default=1e-3, help="relative tolerance of the dopri5 sampler (default: 0.001)")
    add("--atol", type=float, default=1e-6, help="absolute tolerance of the dopri5 sampler (default: 0.000001)")
    add("--cfg-scale", type=float, help="guidance, 1 for none (default: 4.0; with --num-fid-samples 1.5)")
    add("--cfg-channels", default="first3", help="channels that are guided: first3 (as published), all, or a count")
    add(
        "--class-labels",
        nargs="+",
        metavar="CLASS",
        help="names or numbers, in turn; where names are numbers: #3 or name:3 (default: spread over the classes)",
    )
    add("--seed", "--global-seed", type=int, default=0, help="image i depends on it and on i alone (default: 0)")
    add("--num-images", type=int, help="images in the grid (default: one per label, else 8)")
    add("--output", "-o", default="sample.png", help="the grid's file")
    add("--num-fid-samples", type=int, help="write so many PNG files and an ADM .npz instead of a grid")
    add("--sample-dir", default="samples", help="where the folder of PNG files is made")
    add("--per-proc-batch-size", type=int, default=32, help="images at a time in each process")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="arithmetic of the model")
    add("--tf32", action=argparse.BooleanOptionalAction, default=True, help="TF32 matrix products on GPUs")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")


def run(args: argparse.Namespace) -> int:
    """Sample as ``args`` say; 0 when done. Raises :class:`DiffFitError` for what the user must mend."""
    _check(args)
    world = World.join(args.device, timeout=24 * 3600.0) if args.num_fid_samples is not None else World()
    try:
        device = choose_device(args.device, world.local_rank)
        torch.backends.cuda.matmul.allow_tf32 = args.tf32
        sampler = _make_sampler(args, device)
        if args.num_fid_samples is not None:
            _sample_folder(args, sampler, world)
        else:
            _sample_grid(args, sampler)
    except ValueError as error:  # what a model objects to is for the user to mend
        raise DiffFitError(str(error)) from error
    finally:
        world.leave()
    return 0


_BOUNDS = {
    "num_sampling_steps": STEPS, "num_images": Bounds(1, 10_000), "num_fid_samples": IMAGES, "per_proc_batch_size": BATCH,
    "image_size": SIDE, "num_heads": Bounds(1, 1 << 12), "seed": SEED,
}  # fmt: skip


def _check(args: argparse.Namespace) -> None:
    """What can be said before anything is loaded."""
    for name, bounds in _BOUNDS.items():
        if getattr(args, name) is not None:
            check_whole(f"--{name.replace('_', '-')}", getattr(args, name), bounds)
    if args.ckpt is None and args.delta is None:
        raise DiffFitError("nothing to sample from: give --ckpt, or --delta, or both")
    if args.merge and args.delta is None:
        raise DiffFitError("--merge folds a --delta into the weights, and there is none")
    if args.num_fid_samples is None:
        check_target(args.output, "--output")


def _make_sampler(args: argparse.Namespace, device: torch.device) -> Any:
    from ..models.load import load_model
    from ..sample import Sampler

    bf16 = torch.bfloat16 if args.precision == "bf16" else None
    loaded = load_model(
        args.ckpt,
        args.delta,
        merge=args.merge,
        weights=args.weights or ("ema" if args.ema else "model"),
        name=args.model,
        num_heads=args.num_heads,
        num_classes=args.num_classes,
        image_size=args.image_size,
        compute_dtype=bf16,
        device=device,
    )
    model = loaded.model
    _, sampler_name = _objective(args, loaded.objective)
    sampler = Sampler(
        model,
        sampler_name,
        args.num_sampling_steps,
        _cfg_scale(args),
        int(args.cfg_channels) if args.cfg_channels.isdigit() else args.cfg_channels,
        vae=args.vae or loaded.header.get("vae") or ("ema" if model.in_channels == 4 else "none"),
        eta=args.eta,
        rtol=args.rtol,
        atol=args.atol,
        batch_size=args.per_proc_batch_size,
        autocast=bf16 if args.delta is None or args.merge else None,
        class_names=loaded.class_names,
        progress=args.num_fid_samples is None,
    )
    sampler.check_decoder()
    return sampler


def _cfg_scale(args: argparse.Namespace) -> float:
    if args.cfg_scale is not None:
        return args.cfg_scale
    return 4.0 if args.num_fid_samples is None else 1.5


def _objective(args: argparse.Namespace, recorded: str | None) -> tuple[str, str]:
    """Objective and sampler, one implying the other where only one is known."""
    if args.sampler is not None and args.sampler not in SAMPLERS:
        raise DiffFitError(f"--sampler must be one of {', '.join(SAMPLERS)}; got {args.sampler!r}")
    if recorded and args.objective and recorded != args.objective:
        raise DiffFitError(f"the model was trained with --objective {recorded}; {args.objective} was asked for")
    objective = recorded or args.objective
    if objective is None:
        objective = "flow" if args.sampler in SAMPLERS_OF["flow"] else "ddpm"
    sampler = args.sampler or ("ddpm" if objective == "ddpm" else FLOW_DEFAULT)
    fitting = SAMPLERS_OF[objective]
    if sampler not in fitting:
        raise DiffFitError(f"--sampler {sampler} is not for --objective {objective}, which takes {', '.join(fitting)}")
    return objective, sampler


def _sample_grid(args: argparse.Namespace, sampler: Any) -> None:
    from ..sample import save_grid

    classes = sampler.model.num_classes
    count = args.num_images or (len(args.class_labels) if args.class_labels else 8)
    labels = args.class_labels or [i * classes // count if count <= classes else i % classes for i in range(count)]
    labels = [labels[i % len(labels)] for i in range(count)]
    images = sampler.sample(labels, args.seed)
    try:
        save_grid(images, args.output)
    except (OSError, ValueError) as error:
        raise DiffFitError(f"cannot write {args.output}: {error}") from error
    print(f"{args.output}: {count} images of {images.shape[-1]} x {images.shape[-1]} pixels")


def _sample_folder(args: argparse.Namespace, sampler: Any, world: Any) -> None:
    from ..sample.folder import other_images, sample_to_folder

    files = {name: getattr(args, name) for name in ("ckpt", "delta") if getattr(args, name)}
    settings = {f"{name}_sha256": sha256(model_path(path)) for name, path in files.items()} if world.main else {}
    settings = world.from_main(settings)
    folder = Path(args.sample_dir) / folder_name(args, sampler)
    npz = sample_to_folder(
        sampler,
        folder,
        args.num_fid_samples,
        labels=args.class_labels,
        seed=args.seed,
        settings={**settings, "ema": args.ema},
        processes=world,
    )
    if world.main:
        print(f"{folder}: {args.num_fid_samples} images\n{npz}: the same for evaluation")
        if others := other_images(folder, args.num_fid_samples):
            print(
                f"note: {folder} holds {len(others)} more images (the first: {others[0].name}); the .npz leaves them out, "
                "evaluating the folder does not",
                file=sys.stderr,
            )


def folder_name(args: argparse.Namespace, sampler: Any) -> str:
    """``{model}-{ckpt}-size-{pixels}-vae-{vae}-cfg-{scale}-seed-{seed}``, as DiT names it, with the delta's name."""
    model = sampler.model
    stems = [Path(path).stem for path in (args.ckpt, args.delta) if path]
    name = args.model or model_name(model.config, "flow" if sampler.sampler in SAMPLERS_OF["flow"] else "ddpm")
    vae = os.path.basename(os.path.normpath(sampler.vae.name))
    size = model.input_size * sampler.vae.factor
    tail = f"size-{size}-vae-{vae}-cfg-{sampler.cfg_scale}-seed-{args.seed}"
    return f"{name.replace('/', '-')}-{'-'.join(stems)}-{tail}"
