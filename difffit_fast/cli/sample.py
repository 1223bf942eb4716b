"""``difffit sample``: a grid of images, or thousands for an FID."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .._bounds import ANY, BATCH, IMAGES, SEED, SIDE, STEPS, Bounds, check_number, check_whole
from .._devices import choose_device
from .._files import check_target, sha256
from .._processes import World
from ..data.vae import vae_of
from ..errors import DiffFitError
from ..models.bases import model_path
from ..models.delta import read_delta
from ..models.frozen_dtype import DEFAULT_KEEP, FROZEN_DTYPES, patterns, summary
from ..models.sizes import model_name
from ..sample.guidance import EVERYWHERE, KINDS
from ..sample.sampler import SAMPLERS, SAMPLERS_OF

FLOW_DEFAULT = "euler"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``difffit sample`` to ``parser``; names and meanings are those of DiT's ``sample*.py``."""
    add = parser.add_argument
    add(
        "--ckpt",
        help="DiT or SiT checkpoint, or a base of the package by name (default with --delta: that of its run)",
    )
    add(
        "--delta",
        nargs="+",
        metavar="[NAME=]PATH",
        help="what fine-tuning wrote, applied to the checkpoint; several lie beside each other in one model, by the names of "
        "their files or others",
    )
    add(
        "--strength",
        nargs="+",
        metavar="[NAME=]NUMBER",
        help="of the deltas: 1 as trained, 0 the base (default: 1)",
    )
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
    add(
        "--guidance",
        choices=KINDS,
        default="cfg",
        help="away from: cfg the null class, source the base without the delta",
    )
    add(
        "--guidance-interval",
        nargs=2,
        type=float,
        default=EVERYWHERE,
        metavar=("LOW", "HIGH"),
        help="noise levels where guidance is on: 0 the image, 1 noise (default: 0 1)",
    )
    add("--cfg-channels", default="first3", help="channels that are guided: first3 (as published), all, or a count")
    add(
        "--class-labels",
        nargs="+",
        metavar="CLASS",
        help="names or numbers, in turn; where names are numbers: #3 or name:3; of several deltas DELTA:CLASS, or CLASS for each "
        "(default: spread over the classes)",
    )
    add("--seed", "--global-seed", type=int, default=0, help="image i depends on it and on i alone (default: 0)")
    add("--num-images", type=int, help="images in the grid, of each delta (default: one per label, else 8)")
    add("--output", "-o", default="sample.png", help="the grid's file")
    add("--num-fid-samples", type=int, help="write so many PNG files and an ADM .npz instead of a grid")
    add("--sample-dir", default="samples", help="where the folder of PNG files is made")
    add("--per-proc-batch-size", type=int, default=32, help="images at a time in each process")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="arithmetic of the model")
    add(
        "--frozen-dtype",
        choices=FROZEN_DTYPES,
        default="bf16",
        help="products of the blocks' weights: bf16 (as --precision says), fp8, int8, or auto, what is fastest on the device",
    )
    add(
        "--frozen-keep",
        default=",".join(DEFAULT_KEEP),
        help="what of the blocks' linears stays out of it, with commas (default: %(default)s)",
    )
    add("--tf32", action=argparse.BooleanOptionalAction, default=True, help="TF32 matrix products on GPUs")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")


def run(args: argparse.Namespace) -> int:
    """Sample as ``args`` say; 0 when done. Raises :class:`DiffFitError` for what the user must mend."""
    _check(args)
    world = World.join(args.device, timeout=24 * 3600.0) if args.num_fid_samples is not None else World()
    try:
        device = choose_device(args.device, world.local_rank)
        torch.backends.cuda.matmul.allow_tf32 = args.tf32
        deltas = _deltas(args)
        sampler = _make_sampler(args, deltas, device)
        if args.num_fid_samples is not None:
            _sample_folders(args, sampler, deltas, world)
        else:
            _sample_grid(args, sampler, deltas)
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
    if args.merge and (args.delta is None or len(args.delta) > 1):
        raise DiffFitError(
            f"--merge folds a --delta into the weights, and there {'are several' if args.delta else 'is none'}"
        )
    if args.strength and args.delta is None:
        raise DiffFitError("--strength is that of a --delta, and there is none")
    if args.guidance == "source" and (args.delta is None or args.merge):
        raise DiffFitError("--guidance source goes away from the base, and needs a --delta beside it, without --merge")
    if args.num_fid_samples is None:
        check_target(args.output, "--output")


def _deltas(args: argparse.Namespace) -> dict[str, Path]:
    """The deltas by name. A name is what stands before "=", else the file's without its ending."""
    found: dict[str, Path] = {}
    for text in args.delta or ():
        name, equals, path = text.partition("=")
        if not equals or Path(text).exists():
            name, path = Path(text).stem, text
        if name in ("name", "base") and len(args.delta) > 1:
            raise DiffFitError(f"a delta cannot be called {name!r}, which means something else: OTHER={path}")
        if name in found:
            raise DiffFitError(f"two deltas are called {name!r}, {found[name]} and {path}; name them: NAME={path}")
        found[name] = Path(path)
    return found


def _strengths(args: argparse.Namespace, names: Sequence[str]) -> dict[str, float] | None:
    """Of each delta; None where nothing is said."""
    if not args.strength:
        return None
    found: dict[str, float] = {}
    for text in args.strength:
        name, equals, number = text.rpartition("=")
        try:
            strength = float(number)
        except ValueError:
            raise DiffFitError(f"--strength must be a number, or NAME=NUMBER; got {text!r}") from None
        check_number("--strength", strength, ANY)
        if equals and name not in names:
            raise DiffFitError(f"--strength {text}: there is no delta {name!r}; there are {', '.join(names)}")
        if not equals and len(args.strength) > 1:
            raise DiffFitError(
                f"--strength takes one number, or NAME=NUMBER for each delta; got {' '.join(args.strength)}"
            )
        found |= {name: strength} if equals else dict.fromkeys(names, strength)
    return {name: found.get(name, 1.0) for name in names}


def _beside(args: argparse.Namespace, deltas: Mapping[str, Path]) -> bool:
    """Whether the deltas lie beside the model's own parameters, rather than one in their place."""
    return len(deltas) > 1 or args.strength is not None or args.guidance == "source"


def _make_sampler(args: argparse.Namespace, deltas: Mapping[str, Path], device: torch.device) -> Any:
    from ..models.load import in_eight_bit, load_model
    from ..sample import Sampler

    bf16 = torch.bfloat16 if args.precision == "bf16" else None
    beside, eight_bit = _beside(args, deltas), args.frozen_dtype != "bf16"
    loaded = load_model(
        args.ckpt,
        deltas if beside else next(iter(deltas.values()), None),
        merge=args.merge and not beside,
        weights=args.weights or ("ema" if args.ema else "model"),
        name=args.model,
        num_heads=args.num_heads,
        num_classes=args.num_classes,
        image_size=args.image_size,
        compute_dtype=bf16 if not args.merge else None,
        frozen_dtype=args.frozen_dtype if not args.merge else "bf16",
        frozen_keep=patterns(args.frozen_keep),
        device=device,
    )
    model, class_names = loaded.model, loaded.class_names
    if beside and args.merge:
        ((name, strength),) = (_strengths(args, list(deltas)) or {}).items()
        class_names = model.deltas[name].class_names
        model = model.merge(delta=name, strength=strength)
    if eight_bit:
        if args.merge:
            model = in_eight_bit(model, args.frozen_dtype, patterns(args.frozen_keep), bf16)
        print(summary(model.eight_bit_report()), file=sys.stderr)
    _, sampler_name = _objective(args, loaded.objective)
    sampler = Sampler(
        model,
        sampler_name,
        args.num_sampling_steps,
        _cfg_scale(args),
        int(args.cfg_channels) if args.cfg_channels.isdigit() else args.cfg_channels,
        vae=args.vae or _vae(loaded.header, model, deltas),
        guidance=args.guidance,
        guidance_interval=tuple(args.guidance_interval),
        eta=args.eta,
        rtol=args.rtol,
        atol=args.atol,
        batch_size=args.per_proc_batch_size,
        autocast=bf16 if not eight_bit and (not deltas or args.merge) else None,
        class_names=class_names,
        progress=args.num_fid_samples is None,
    )
    sampler.check_decoder()
    return sampler


def _vae(header: Mapping[str, Any], model: Any, deltas: Mapping[str, Path]) -> str:
    """The one of training; of deltas that record several there is none."""
    if "vae" not in header and hasattr(model, "deltas"):
        recorded = {name: model.deltas[name].header.get("vae") for name in model.deltas}
        if len(set(recorded.values())) > 1:
            said = ", ".join(f"{vae} for {name}" for name, vae in recorded.items())
            raise DiffFitError(f"the deltas were trained with different VAEs ({said}); say which: --vae")
    return vae_of(header, model.in_channels)


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


@dataclass(frozen=True)
class _Images:
    """The images of a grid: what is asked for, by which delta, and the numbers that their noise comes from."""

    labels: list[int | str]
    deltas: list[str | None] | None  # None: the model's own parameters
    indices: list[int]
    columns: int | None


def _images(args: argparse.Namespace, model: Any, names: Sequence[str]) -> _Images:
    """Labels that name no delta are drawn by each of them, from the same noise, a row each."""
    labels = args.class_labels
    if not names:
        labels = _spread(args.num_images, labels, model.num_classes)
        return _Images(labels, None, list(range(len(labels))), None)
    known: dict[str, str | None] = {**{name: name for name in names}, "base": None}
    pairs = [(label.partition(":")[0], label.partition(":")[2]) for label in labels or ()]
    if any(prefix in known and rest for prefix, rest in pairs):
        asked = [
            (known[prefix], rest) if prefix in known and rest else (name, label)
            for (prefix, rest), label in zip(pairs, labels, strict=True)
            for name in (names if not (prefix in known and rest) else names[:1])
        ]
        count = args.num_images or len(asked)
        asked = [asked[i % len(asked)] for i in range(count)]
        return _Images([label for _, label in asked], [name for name, _ in asked], list(range(count)), None)
    rows = [_spread(args.num_images, labels, model.deltas[name].num_classes) for name in names]
    count = len(rows[0])
    worn: list[str | None] = [name for name in names for _ in range(count)]
    everything = [label for row in rows for label in row]
    return _Images(everything, worn, list(range(count)) * len(names), count if len(names) > 1 else None)


def _spread(num_images: int | None, labels: Sequence[str] | None, classes: int) -> list[int | str]:
    count = num_images or (len(labels) if labels else 8)
    if labels:
        return [labels[i % len(labels)] for i in range(count)]
    return [i * classes // count if count <= classes else i % classes for i in range(count)]


def _sample_grid(args: argparse.Namespace, sampler: Any, deltas: Mapping[str, Path]) -> None:
    from ..sample import save_grid

    beside = _beside(args, deltas) and not args.merge
    asked = _images(args, sampler.model, list(deltas) if beside else [])
    worn: dict[str, Any] = {}
    if asked.deltas is not None:
        strengths = _strengths(args, list(deltas))
        each = None if strengths is None else [1.0 if name is None else strengths[name] for name in asked.deltas]
        worn = {"delta": asked.deltas, "strength": each}
    images = sampler.sample(asked.labels, args.seed, indices=asked.indices, **worn)
    try:
        save_grid(images, args.output, columns=asked.columns)
    except (OSError, ValueError) as error:
        raise DiffFitError(f"cannot write {args.output}: {error}") from error
    print(f"{args.output}: {len(images)} images of {images.shape[-1]} x {images.shape[-1]} pixels")
    if asked.columns:
        print("rows: " + ", ".join(deltas))


def _sample_folders(args: argparse.Namespace, sampler: Any, deltas: Mapping[str, Path], world: Any) -> None:
    from ..sample.folder import Target, other_images, sample_to_folders

    beside = _beside(args, deltas) and not args.merge
    strengths = _strengths(args, list(deltas)) or {}
    targets = []
    for name, path in (deltas or {"": None}).items():
        files = {"ckpt": args.ckpt, "delta": path}
        settings: dict[str, Any] = {"ema": args.ema}
        if world.main:
            settings |= {f"{key}_sha256": sha256(model_path(file)) for key, file in files.items() if file}
        if path is not None:
            settings |= {"step": read_delta(path)[1].get("step")}
        if name in strengths:
            settings |= {"strength": strengths[name]}
        folder = Path(args.sample_dir) / folder_name(
            args, sampler, name if path is not None else None, strengths.get(name)
        )
        worn: dict[str, Any] = {"delta": name, "strength": strengths.get(name)} if beside else {}
        targets.append(Target(folder, settings=world.from_main(settings), **worn))
    for target, npz in zip(
        targets,
        sample_to_folders(
            sampler, targets, args.num_fid_samples, labels=args.class_labels, seed=args.seed, processes=world
        ),
        strict=True,
    ):
        if world.main:
            print(f"{target.folder}: {args.num_fid_samples} images\n{npz}: the same for evaluation")
            if others := other_images(target.folder, args.num_fid_samples):
                print(
                    f"note: {target.folder} holds {len(others)} more images (the first: {others[0].name}); the .npz leaves them "
                    "out, evaluating the folder does not",
                    file=sys.stderr,
                )


def folder_name(args: argparse.Namespace, sampler: Any, delta: str | None = None, strength: float | None = None) -> str:
    """``{model}-{ckpt}-size-{pixels}-vae-{vae}-cfg-{scale}-seed-{seed}``, as DiT names it, with the delta's name, and what
    else is not as DiT does it."""
    model, guidance = sampler.model, sampler.guidance
    stems = [Path(args.ckpt).stem] if args.ckpt else []
    stems += [] if delta is None else [delta]
    name = args.model or model_name(model.config, "flow" if sampler.sampler in SAMPLERS_OF["flow"] else "ddpm")
    vae = os.path.basename(os.path.normpath(sampler.vae.name))
    size = model.input_size * sampler.vae.factor
    guided = f"{guidance.kind}-{guidance.scale}" if guidance.kind != "none" else "cfg-1.0"
    if guidance.on and guidance.interval != EVERYWHERE:
        guided += f"-from-{guidance.interval[0]:g}-to-{guidance.interval[1]:g}"
    if strength is not None:
        guided += f"-strength-{strength:g}"
    return f"{name.replace('/', '-')}-{'-'.join(stems)}-size-{size}-vae-{vae}-{guided}-seed-{args.seed}"
