"""From a folder of images by class to a delta and a grid of samples.

    python examples/train_from_images.py                         # digits, a toy model without pre-trained weights
    python examples/train_from_images.py --data-path my_images   # yours

For real work give a pre-trained checkpoint and the VAE: see the command line in the README, which does the same.
"""

import argparse
from pathlib import Path

from difffit_fast import Sampler, Trainer
from difffit_fast.sample import save_grid

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--data-path", type=Path, help="folder with one sub-folder of images per class")
parser.add_argument("--work-dir", type=Path, default=Path("example_output"))
parser.add_argument("--steps", type=int, default=200)
args = parser.parse_args()

flip = "horizontal"
if args.data_path is None:
    from digit_images import write_digit_images

    args.data_path = write_digit_images(args.work_dir / "digits")
    flip = "none"  # a mirrored 2 is no 2

trainer = Trainer(
    data_path=args.data_path,
    vae="none",  # train on the pixels themselves
    image_size=16,
    flip=flip,
    model="DiT-S/4",
    model_args={"depth": 4, "hidden_size": 96, "num_heads": 4},  # small enough for any CPU
    method="full",  # there is no pre-trained base here; with ckpt=..., leave this out and DiffFit is used
    lr=1e-3,
    global_batch_size=32,
    num_workers=0,
    max_steps=args.steps,
    log_every=50,
    results_dir=args.work_dir / "results",
)
result = trainer.train()

trainer.ema.exchange()  # the averaged weights are the ones to sample from
images = Sampler(trainer.model, num_sampling_steps=25, cfg_scale=1.5).sample([0, 1, 2, 3] * 4, seed=0)
save_grid(images, args.work_dir / "samples.png")
print(f"{result.delta} after {result.step} steps, loss {result.loss:.3f}; samples in {args.work_dir / 'samples.png'}")
