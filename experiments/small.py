"""Small real images, a pixel DiT for them, its training and its loss.

The images are patches of pictures that ship inside packages (the photographs of scikit-learn, each in an upper and a lower half,
and matplotlib's portrait, MRI slice and terrain model), so nothing is downloaded; the label is the picture that one is cut from.
They are (N, 1, S, S) float32 in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from difffit_fast import DiT
from difffit_fast._extras import require
from difffit_fast._files import write_safetensors
from difffit_fast.diffusion import create_diffusion
from difffit_fast.train.ema import EMA

SIDE = 8
MOST_PATCHES = 400  # of one picture
DATA_SEED = 0  # splits, the classifier, validation noise: the same for every run


@dataclass
class Images:
    """Images (N, C, H, W) of classes 0 .. classes - 1, divided for training and validation."""

    train: Tensor
    train_labels: Tensor
    val: Tensor
    val_labels: Tensor
    classes: int

    @property
    def everything(self) -> Tensor:
        return torch.cat([self.train, self.val])


# -- images ------------------------------------------------------------------------------------------------------------


def patches(side: int = SIDE) -> tuple[Tensor, Tensor, int]:
    """Images, labels, and how many of the classes (the first ones) are photographs."""
    photos = require("sklearn.datasets", "eval", "its photographs").load_sample_images().images
    source = []
    for photo in photos:  # (427, 640, 3)
        grey = _shrink(torch.tensor(photo, dtype=torch.float32).mean(-1), 2)
        source += list(_normalised(grey).chunk(2))
    target = [_normalised(picture) for picture in _matplotlib_pictures()]
    images, labels = [], []
    for label, picture in enumerate(source + target):
        cut = picture.unfold(0, side, side).unfold(1, side, side).reshape(-1, 1, side, side)
        cut = cut[cut.flatten(1).std(1) > 0.02]  # empty sky and the black around a head teach nothing
        cut = cut[torch.randperm(len(cut), generator=torch.Generator().manual_seed(DATA_SEED))[:MOST_PATCHES]]
        images.append(cut)
        labels.append(torch.full((len(cut),), label))
    return torch.cat(images), torch.cat(labels), len(source)


def _matplotlib_pictures() -> list[Tensor]:
    """A portrait (600 × 512), an MRI slice (256 × 256) and heights of a terrain (344 × 403), as grey images."""
    sample = require("matplotlib.cbook", "eval", "its sample pictures").get_sample_data
    image = require("PIL.Image", "eval", "the portrait")
    with sample("grace_hopper.jpg") as file:
        portrait = np.asarray(image.open(file).convert("L"), dtype=np.float32)
    with sample("s1045.ima.gz") as file:
        mri = np.frombuffer(file.read(), np.uint16).reshape(256, 256).astype(np.float32)
    terrain = np.asarray(sample("jacksboro_fault_dem.npz")["elevation"], dtype=np.float32)
    return [_shrink(torch.tensor(portrait), 2), torch.tensor(mri), torch.tensor(terrain)]


def _normalised(picture: Tensor) -> Tensor:
    """To [-1, 1], from the first to the 99th percentile."""
    low, high = torch.quantile(picture, 0.01), torch.quantile(picture, 0.99)
    return ((picture - low) / (high - low) * 2 - 1).clamp(-1, 1)


def _shrink(picture: Tensor, factor: int) -> Tensor:
    return nn.functional.avg_pool2d(picture[None, None], factor)[0, 0]


def split(images: Tensor, labels: Tensor, first: int, last: int, val_fraction: float = 0.2) -> Images:
    """The classes first .. last - 1, renumbered from 0, shuffled and divided."""
    keep = ((labels >= first) & (labels < last)).nonzero()[:, 0]
    keep = keep[torch.randperm(len(keep), generator=torch.Generator().manual_seed(DATA_SEED))]
    n = int(len(keep) * val_fraction)
    val, train = keep[:n], keep[n:]
    return Images(images[train], labels[train] - first, images[val], labels[val] - first, last - first)


def batches(n: int, batch: int, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """``steps`` index batches, epoch after epoch in a new order, the incomplete rest of an epoch left out."""
    batch = min(batch, n)
    done = 0
    while True:
        for index in torch.randperm(n, generator=generator).split(batch):
            if done == steps:
                return
            if len(index) == batch:
                done += 1
                yield index


def train(
    model: nn.Module,
    images: Images,
    *,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
    ema_decay: float = 0.98,
    watch: Callable[[int], None] | None = None,
) -> list[float]:
    """The losses of AdamW on what requires gradients; leaves the averaged parameters in the model, in eval mode.

    ``watch`` is called with the number of steps done after each of them, with the raw parameters in place.
    """
    diffusion = create_diffusion()
    generator = torch.Generator().manual_seed(seed)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([p for _, p in named], lr=lr, weight_decay=0.0)
    ema = EMA(named, ema_decay)
    model.train()
    losses = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # label dropout
        for i, index in enumerate(batches(len(images.train), batch, steps, generator)):
            x, y = images.train[index], images.train_labels[index]
            t = diffusion.sample_timesteps(len(x), generator=generator)
            noise = torch.randn(x.shape, generator=generator)
            loss = diffusion.training_losses(model, x, t, {"y": y}, noise)["loss"].mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ema.update()
            losses.append(loss.item())
            if watch:
                watch(i + 1)
                model.train()
    if steps:
        ema.exchange()
    model.eval()
    return losses


def pretrained(path: Path, images: Images, model: dict[str, Any], *, seed: int, **options: Any) -> dict[str, Tensor]:
    """State dict of a DiT trained on ``images``, from ``path`` if it lies there."""
    if not path.exists():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            dit = DiT(**model, num_classes=images.classes)
        train(dit, images, seed=seed, **options)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_safetensors(path, {k: v.contiguous() for k, v in dit.state_dict().items()})
    return load_file(path)


# -- measures ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def validation_loss(model: nn.Module, images: Images, levels: int = 4) -> dict[str, float]:
    """DiT's loss on the validation images at ``levels`` stratified timesteps each, the same noise every time."""
    diffusion = create_diffusion()
    generator = torch.Generator().manual_seed(DATA_SEED)
    n = len(images.val)
    total: dict[str, float] = {}
    for level in range(levels):
        t = ((torch.rand(n, generator=generator) + level) * diffusion.num_timesteps / levels).long()
        noise = torch.randn(images.val.shape, generator=generator)
        losses = diffusion.training_losses(model, images.val, t, {"y": images.val_labels}, noise)
        for key, value in losses.items():
            total[key] = total.get(key, 0.0) + float(value.mean()) / levels
    return total
