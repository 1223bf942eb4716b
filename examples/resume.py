"""A run that stops half-way and goes on, bit for bit as if it had not.

    python examples/resume.py

The same happens after Ctrl-C, SIGTERM or kill -9: start the job again with --resume auto.
"""

import argparse
from pathlib import Path

from digit_images import write_digit_images

from difffit_fast import TrainConfig, Trainer

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--work-dir", type=Path, default=Path("example_output"))
parser.add_argument("--steps", type=int, default=20)
args = parser.parse_args()

settings = TrainConfig(
    data_path=str(write_digit_images(args.work_dir / "digits")),
    vae="none",
    image_size=16,
    flip="none",  # a mirrored 2 is no 2
    model_args={"depth": 2, "hidden_size": 48, "num_heads": 2, "patch_size": 4},
    global_batch_size=8,
    num_workers=0,
    ckpt_every=5,
    log_every=5,
    precision="fp32",
    progress=False,
)
straight = Trainer(settings, results_dir=args.work_dir / "straight", max_steps=args.steps).train()

Trainer(settings, results_dir=args.work_dir / "resumed", max_steps=args.steps // 2).train()
resumed = Trainer(settings, results_dir=args.work_dir / "resumed", max_steps=args.steps, resume="auto").train()

same = straight.delta.read_bytes() == resumed.delta.read_bytes()
print(f"{resumed.delta} and {straight.delta}: {'the same bytes' if same else 'different bytes'}")
raise SystemExit(0 if same else 1)
