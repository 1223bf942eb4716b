"""Several domains in one run: every batch has samples of all of them, and each ends as a delta file of its own.

    python examples/train_many.py --ckpt glyphs --data hand=examples/hand/shown signs=my_images --out domains

A folder is one of images by class, for a base of pixels, or what ``difffit extract`` wrote, for a base of latents. The frozen
weights are read once for all domains. What comes out is used like any delta: ``difffit sample --ckpt glyphs --delta
domains/hand.safetensors``, or all of them at once (docs/many.md).
"""

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from difffit_fast import DiffFitError, FastDiffFitDiT, create_diffusion
from difffit_fast.data import ImageFolder, LatentCache, TrainingData, visit_seed
from difffit_fast.diffusion import FlowMatching


def open_domain(folder: Path, model: FastDiffFitDiT, flip: bool) -> TrainingData:
    """The images of a domain, as the model sees them."""
    if (folder / "index.json").is_file():
        data: TrainingData = LatentCache(folder, flip=flip)
    elif model.in_channels in (1, 3):
        data = ImageFolder(folder, model.input_size, flip=flip, channels=model.in_channels)
    else:
        raise DiffFitError(f"{folder} is no folder of latents, which this base takes; make one with difffit extract")
    if (data.channels, data.size) != (model.in_channels, model.input_size):
        raise DiffFitError(
            f"{folder} gives {data.channels} x {data.size} x {data.size}, and the base takes "
            f"{model.in_channels} x {model.input_size} x {model.input_size}"
        )
    return data


def visits(data: TrainingData, seed: int) -> Iterator[tuple[Tensor, int]]:
    """x (C, H, W) and its label, without end; each epoch in an order of its own."""
    for epoch in itertools.count():
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(visit_seed(seed, epoch, 0)))
        for index in order.tolist():
            yield data.load(index, visit_seed(seed, epoch, index))


def domain(text: str) -> tuple[str, Path]:
    """``name=FOLDER``."""
    name, equals, folder = text.partition("=")
    if not equals or not folder or not name or Path(name).name != name:
        raise argparse.ArgumentTypeError(f"expected name=FOLDER, with a name that a file can have; got {text!r}")
    return name, Path(folder)


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--ckpt", default="glyphs", help="the base that all domains share")
parser.add_argument("--data", nargs="+", type=domain, required=True, metavar="NAME=FOLDER")
parser.add_argument("--out", type=Path, default=Path("domains"), help="folder for <name>.safetensors")
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--batch", type=int, default=32, help="samples of all domains together")
parser.add_argument("--lr", type=float, default=1e-3)
parser.add_argument("--flip", action="store_true", help="mirror half of the visits")
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()

domains = dict(args.data)
each = args.batch // len(domains)  # samples of a domain in a batch
if len(domains) < len(args.data) or each < 1:
    parser.error("every domain needs a name of its own, and a batch at least one sample of each")

torch.manual_seed(args.seed)
device = "cuda" if torch.cuda.is_available() else "cpu"
model = FastDiffFitDiT.from_pretrained(args.ckpt, compute_dtype=torch.bfloat16 if device == "cuda" else None)
data = {name: open_domain(folder, model, args.flip) for name, folder in domains.items()}
for name, images in data.items():
    print(f"{name}: {images}", *getattr(images, "notes", []), sep="\n  ")
    model.add_delta(name, class_names=images.class_names)
model.to(device).train()  # labels are dropped as guidance wants it

flow = model.objective == "flow"
diffusion = FlowMatching() if flow else create_diffusion(learn_sigma=model.learn_sigma)
optimizer = torch.optim.AdamW(model.deltas.parameters(), lr=args.lr, weight_decay=0.0, fused=True)
worn = model.deltas.index([name for name in data for _ in range(each)])  # (N,): what each sample of a batch wears
streams = {name: visits(images, args.seed) for name, images in data.items()}

for step in range(1, args.steps + 1):
    samples = [next(streams[name]) for name in data for _ in range(each)]
    x = torch.stack([x for x, _ in samples]).to(device)
    y = torch.tensor([label for _, label in samples], device=device)  # of the sample's own domain
    t = torch.rand(len(x)) if flow else torch.randint(0, diffusion.num_timesteps, (len(x),))
    losses = diffusion.training_losses(model, x, t.to(device), {"y": y, "delta": worn})["loss"]
    by_domain = losses.view(len(data), each).mean(1)
    by_domain.sum().backward()  # each delta gets the gradient of its own mean, as if it trained alone
    optimizer.step(), optimizer.zero_grad()
    if step % 50 == 0 or step == args.steps:
        if not by_domain.isfinite().all():
            raise DiffFitError(f"a loss is not finite at step {step}; a smaller --lr may help")
        print(step, "  ".join(f"{name} {loss:.4f}" for name, loss in zip(data, by_domain.tolist(), strict=True)))

args.out.mkdir(parents=True, exist_ok=True)
for name, images in data.items():
    path = args.out / f"{name}.safetensors"
    model.save_delta(
        path, delta=name, step=args.steps, image_size=images.image_size, vae=getattr(images, "vae", "none")
    )
    print(f"{path}: {path.stat().st_size:,} bytes")
