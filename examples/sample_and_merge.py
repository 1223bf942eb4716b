"""From a base and a delta: sample on the fly, or merge into an ordinary DiT checkpoint that any other tool reads.

python examples/sample_and_merge.py                                             # makes a toy base and delta first
python examples/sample_and_merge.py --ckpt DiT-XL-2-256x256.pt --delta my.safetensors --vae ema
"""

import argparse
from pathlib import Path

import torch

from difffit_fast import DiT, FastDiffFitDiT, Sampler, Trainer, load_model
from difffit_fast.sample import save_grid

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--ckpt", type=Path)
parser.add_argument("--delta", type=Path)
parser.add_argument("--vae", default="none")
parser.add_argument("--steps", type=int, default=25, help="sampling steps")
parser.add_argument("--work-dir", type=Path, default=Path("example_output"))
args = parser.parse_args()
args.work_dir.mkdir(parents=True, exist_ok=True)
heads = None

if args.delta is None:
    from digit_images import write_digit_images

    heads = 2  # of the toy; published widths are recognised
    args.ckpt = args.work_dir / "base.pt"
    torch.manual_seed(0)
    base = DiT(input_size=16, patch_size=4, in_channels=3, hidden_size=48, depth=2, num_heads=heads, num_classes=4)
    torch.save(base.state_dict(), args.ckpt)
    model = FastDiffFitDiT.from_pretrained(args.ckpt, num_heads=heads)
    args.delta = Trainer(
        model=model, data_path=write_digit_images(args.work_dir / "digits"), vae="none", image_size=16, flip="none",
        num_workers=0, global_batch_size=8, max_steps=10, results_dir=args.work_dir / "results", progress=False,
    ).train().delta  # fmt: skip

# On the fly: the frozen weights stay as they are, deltas can be exchanged.
tuned = load_model(args.ckpt, args.delta, num_heads=heads)
labels = [0, 1, 2, 3]
options = {"num_sampling_steps": args.steps, "cfg_scale": 2.0, "vae": args.vae}
images = Sampler(tuned.model, **options).sample(labels, seed=1)
save_grid(images, args.work_dir / "on_the_fly.png")

# Merged: an ordinary DiT, nothing to pay at sampling time.
merged = tuned.model.merge()
torch.save(merged.state_dict(), args.work_dir / "merged.pt")
again = Sampler(merged, **options).sample(labels, seed=1)
print(f"largest difference between the two: {(images - again).abs().max():.1e} of a range of 2")
print(f"merged checkpoint: {args.work_dir / 'merged.pt'}")
