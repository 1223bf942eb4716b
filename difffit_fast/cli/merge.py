"""``difffit merge``: base and delta become an ordinary DiT checkpoint, computed in float32."""

from __future__ import annotations

import argparse
from pathlib import Path

# What of the delta's metadata still holds for the merged model, and helps whoever samples from it.
KEPT = ("class_names", "image_size", "vae", "objective", "step", "architecture")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ckpt", help="the base of the delta (default: the one that its run's settings name)")
    parser.add_argument(
        "--delta", required=True, help="delta, e.g. results/000-DiT-XL-2/checkpoints/0024000.safetensors"
    )
    parser.add_argument("--out", required=True, help="file to write, .pt or .safetensors")
    parser.add_argument("--overwrite", action="store_true", help="replace --out if it exists")


def run(args: argparse.Namespace) -> int:
    from .._files import check_target, write_torch
    from ..errors import DiffFitError

    out = Path(args.out)
    if out.suffix not in (".pt", ".pth", ".safetensors"):
        raise DiffFitError(f"--out must end in .pt or .safetensors; got {args.out}")
    if out.exists() and not args.overwrite:
        raise DiffFitError(f"--out {out} exists; give --overwrite to replace it")
    check_target(out, "--out")
    from ..models.header import record_in_state_dict, write_model_file
    from ..models.load import load_model

    loaded = load_model(args.ckpt, args.delta, merge=True)  # float32: nothing is rounded before the merge
    state, model = loaded.model.state_dict(), loaded.model
    header = {key: loaded.header[key] for key in KEPT if key in loaded.header}
    header |= {"config": model.config, "pos_embed_scale": model.pos_embed_scale}
    if out.suffix == ".safetensors":
        write_model_file(out, "model", state, header)
    else:
        record_in_state_dict(state, header)
        write_torch(out, state)
    print(f"{out}: DiT of {sum(t.numel() for t in state.values()):,} parameters, {out.stat().st_size / 2**20:.1f} MiB")
    return 0
