"""``difffit export``: a model, or base and delta, in the files that others read."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

# What of the delta's metadata still holds for the merged model, and helps whoever samples from it.
KEPT = ("class_names", "image_size", "vae", "objective", "step", "architecture")
TARGETS = {
    "dit": "an ordinary DiT checkpoint, .pt or .safetensors, with the delta folded in (computed in float32)",
    "diffusers": "a folder that DiTPipeline reads, with the delta folded in",
    "hub": "a folder to publish: the delta (without one: the model) and a card",
    "lora": "of a transformer of diffusers: a .safetensors file that ComfyUI or LyCORIS reads",
    "peft": "of a transformer of diffusers: an adapter folder that PEFT reads",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--to", required=True, choices=TARGETS, help="; ".join(f"{name}: {what}" for name, what in TARGETS.items()))
    add("--ckpt", help="the model, or the base of the delta (default: the one that the delta's run names)")
    add("--delta", help="delta, e.g. results/000-DiT-XL-2/checkpoints/0024000.safetensors")
    add("--out", required=True, help="file or folder to write")
    add("--overwrite", action="store_true", help="replace --out if it exists")
    add(
        "--vae",
        help="to diffusers: folder of the autoencoder, which is copied (default: that of training, if a folder)",
    )
    add("--layout", choices=("comfyui", "lycoris"), help="to lora: whose keys to write (default: comfyui)")
    add("--license", help="to hub: of what is published; it has to respect the base's")
    add("--base-model", help="to hub: where others find the base, such as facebook/DiT-XL-2-256")


def run(args: argparse.Namespace) -> int:
    from ..errors import DiffFitError

    if args.ckpt is None and args.delta is None:
        raise DiffFitError("--ckpt or --delta is needed: what to export")
    for flag, value, to in (
        ("--vae", args.vae, "diffusers"), ("--layout", args.layout, "lora"),
        ("--license", args.license, "hub"), ("--base-model", args.base_model, "hub"),
    ):  # fmt: skip
        if value is not None and args.to != to:
            raise DiffFitError(f"{flag} is for --to {to}; got --to {args.to}")
    {"dit": _dit, "diffusers": _diffusers, "hub": _hub, "lora": _lora, "peft": _peft}[args.to](args, Path(args.out))
    return 0


def _merged(args: argparse.Namespace) -> tuple[Any, dict[str, Any], Any]:
    """The ordinary DiT in float32 (nothing is rounded before the merge), what its header keeps, and its source."""
    from ..models.load import load_model

    loaded = load_model(args.ckpt, args.delta, merge=args.delta is not None)
    return loaded.model, {key: loaded.header[key] for key in KEPT if key in loaded.header}, loaded


def _dit(args: argparse.Namespace, out: Path) -> None:
    from .._files import check_target, write_torch
    from ..errors import DiffFitError
    from ..models.header import record_in_state_dict, write_model_file

    if out.suffix not in (".pt", ".pth", ".safetensors"):
        raise DiffFitError(f"--out must end in .pt or .safetensors; got {args.out}")
    if out.exists() and not args.overwrite:
        raise DiffFitError(f"--out {out} exists; give --overwrite to replace it")
    check_target(out, "--out")
    model, header, _ = _merged(args)
    state = model.state_dict()
    header |= {"config": model.config, "pos_embed_scale": model.pos_embed_scale}
    if out.suffix == ".safetensors":
        write_model_file(out, "model", state, header)
    else:
        record_in_state_dict(state, header)
        write_torch(out, state)
    print(f"{out}: DiT of {sum(t.numel() for t in state.values()):,} parameters, {out.stat().st_size / 2**20:.1f} MiB")


def _diffusers(args: argparse.Namespace, out: Path) -> None:
    from ..interop import export_pipeline

    model, header, loaded = _merged(args)
    vae = args.vae
    if vae is None and (Path(header.get("vae") or "") / "config.json").is_file():
        vae = header["vae"]
    export_pipeline(
        model, out, class_names=header.get("class_names"), objective=loaded.objective, vae=vae, overwrite=args.overwrite
    )
    more = "" if vae else ", vae=AutoencoderKL.from_pretrained(...)"
    print(f'{out}: DiTPipeline.from_pretrained("{out}", trust_remote_code=True{more})')


def _hub(args: argparse.Namespace, out: Path) -> None:
    from ..interop import export_card

    export_card(args.ckpt, args.delta, out, license=args.license, base_model=args.base_model, overwrite=args.overwrite)
    print(f"{out}: look at README.md, then: hf upload NAME {out}")


def _applied(args: argparse.Namespace) -> tuple[Any, str]:
    """The transformer of diffusers in --ckpt, a folder of it or of its pipeline, and the delta."""
    from .._extras import require
    from .._files import read_json
    from ..apply.delta import read_applied
    from ..errors import DiffFitError

    if args.ckpt is None or args.delta is None:
        raise DiffFitError(
            f"--to {args.to} needs --ckpt, a folder of a transformer of diffusers, and --delta, what apply_difffit trained in it"
        )
    _, header = read_applied(args.delta)
    found = next((f for f in (Path(args.ckpt), Path(args.ckpt) / "transformer") if (f / "config.json").is_file()), None)
    if found is None:
        raise DiffFitError(f"--ckpt {args.ckpt} is no folder of diffusers with a transformer: no config.json")
    require("diffusers", "vae", f"--to {args.to}")
    import diffusers

    name = read_json(found / "config.json").get("_class_name")
    cls = getattr(diffusers, str(name), None)
    if cls is None or name != header["model_class"]:
        raise DiffFitError(f"{args.delta} was made for {header['model_class']}; {found} holds {name}")
    return cls.from_pretrained(found), args.delta


def _lora(args: argparse.Namespace, out: Path) -> None:
    from ..interop import export_lora

    model, delta = _applied(args)
    written = export_lora(model, delta, out, layout=args.layout or "comfyui", overwrite=args.overwrite)
    print(f"{out}: {len(written)} tensors, {out.stat().st_size / 2**20:.1f} MiB")


def _peft(args: argparse.Namespace, out: Path) -> None:
    from ..interop import export_peft

    model, delta = _applied(args)
    export_peft(model, delta, out, overwrite=args.overwrite)
    print(f'{out}: import difffit_fast.peft; PeftModel.from_pretrained(transformer, "{out}")')
