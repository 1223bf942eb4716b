"""The Python interface in ten lines, for a notebook: your model, your data, train, sample.

python examples/python_api.py
"""

import argparse
from pathlib import Path

from digit_images import write_digit_images

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--work-dir", type=Path, default=Path("example_output"))
parser.add_argument("--steps", type=int, default=30)
args = parser.parse_args()
folder = write_digit_images(args.work_dir / "digits")

# --- the ten lines ---
from difffit_fast import FastDiffFitDiT, Sampler, Trainer  # noqa: E402
from difffit_fast.data import ImageFolder  # noqa: E402

data = ImageFolder(folder, image_size=16, flip=False)  # a mirrored 2 is no 2
model = FastDiffFitDiT(input_size=16, in_channels=3, patch_size=4, hidden_size=48, depth=2, num_heads=2, num_classes=4)
# with pre-trained weights: model = FastDiffFitDiT.from_pretrained("DiT-XL-2-256x256.pt", num_classes=data.num_classes)
trainer = Trainer(model=model, data=data, vae="none", max_steps=args.steps, results_dir=args.work_dir / "api",
                  global_batch_size=16, num_workers=0)  # fmt: skip
result = trainer.train()
model.load_delta(result.delta)  # the averaged weights
images = Sampler(model, num_sampling_steps=10, cfg_scale=2.0).sample([0, 1, 2, 3])
# ---------------------

print(f"{model.num_trainable:,} parameters trained, {result.delta.stat().st_size:,} bytes in {result.delta}")
print(f"images {tuple(images.shape)}")
