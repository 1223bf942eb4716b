"""What the small experiments share: real 8 × 8 images, a pixel DiT for them, its training and its measures.

Both sets of images ship inside packages, so nothing is downloaded:

    digits    scikit-learn's handwritten digits; source classes 0–4, target classes 5–9
    patches   8 × 8 patches of real pictures, the label is the picture they are cut from; source: the two photographs of
              scikit-learn (each in an upper and a lower half); target: matplotlib's portrait, MRI slice and terrain model

Images are (N, 1, 8, 8) float32 in [-1, 1].
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from difffit_fast import DiT
from difffit_fast._extras import require
from difffit_fast._files import write_safetensors
from difffit_fast.diffusion import create_diffusion
from difffit_fast.evaluate import RunningStatistics, frechet_distance
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


@dataclass
class Task:
    """Source and target classes of one set, and features to compare images in."""

    name: str
    source: Images
    target: Images
    features: nn.Module
    accuracy: float  # of the classifier that the features come from, on validation images


# -- images ------------------------------------------------------------------------------------------------------------


def digits() -> tuple[Tensor, Tensor, int]:
    """Images, labels, and how many of the classes (the first ones) are the source's."""
    data = require("sklearn.datasets", "eval", "the digits").load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    return images, torch.tensor(data.target, dtype=torch.long), 5


def patches(side: int = SIDE) -> tuple[Tensor, Tensor, int]:
    """As :func:`digits`: patches of pictures, source classes first."""
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
    return F.avg_pool2d(picture[None, None], factor)[0, 0]


SETS: dict[str, Callable[[], tuple[Tensor, Tensor, int]]] = {"digits": digits, "patches": patches}


def split(images: Tensor, labels: Tensor, first: int, last: int, val_fraction: float = 0.2) -> Images:
    """The classes first .. last - 1, renumbered from 0, shuffled and divided."""
    keep = ((labels >= first) & (labels < last)).nonzero()[:, 0]
    keep = keep[torch.randperm(len(keep), generator=torch.Generator().manual_seed(DATA_SEED))]
    n = int(len(keep) * val_fraction)
    val, train = keep[:n], keep[n:]
    return Images(images[train], labels[train] - first, images[val], labels[val] - first, last - first)


def load_task(name: str) -> Task:
    """Read a set and train its classifier (a second or two)."""
    images, labels, boundary = SETS[name]()
    everything = split(images, labels, 0, int(labels.max()) + 1)
    features, accuracy = train_classifier(everything)
    source = split(images, labels, 0, boundary)
    target = split(images, labels, boundary, int(labels.max()) + 1)
    return Task(name, source, target, features, accuracy)


# -- features ----------------------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """Images (N, 1, 8, 8) -> logits; :meth:`features` (N, 32) is what the Fréchet distance is taken in."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.GELU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.GELU(),
            nn.Flatten(), nn.Linear(32 * SIDE * SIDE // 4, 32), nn.GELU(),
        )  # fmt: skip
        self.head = nn.Linear(32, classes)

    def features(self, x: Tensor) -> Tensor:
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def train_classifier(images: Images, steps: int = 500, batch: int = 64) -> tuple[Classifier, float]:
    """A classifier of all classes, source and target; always the same one. Returns it and its validation accuracy."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(DATA_SEED)
        model = Classifier(images.classes)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for index in batches(len(images.train), batch, steps, torch.Generator().manual_seed(DATA_SEED)):
            loss = F.cross_entropy(model(images.train[index]), images.train_labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval().requires_grad_(False)
    return model, float((model(images.val).argmax(1) == images.val_labels).float().mean())


def distance(features: nn.Module, samples: Tensor, real: Tensor) -> float:
    """Fréchet distance between two sets of images in the classifier's features."""
    found = []
    with torch.no_grad():
        for images in (samples, real):
            statistics = RunningStatistics()
            statistics.update(features.features(images))
            found += [statistics.mean, statistics.covariance]
    return frechet_distance(*found)


# -- the model and its training ----------------------------------------------------------------------------------------


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


@dataclass
class Trained:
    """What a training loop reports."""

    losses: list[float]
    cpu_ms_per_step: float  # median
    saved_bytes: int  # kept for the backward pass of one step, parameters not counted


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
) -> Trained:
    """AdamW on what requires gradients, DiT's loss; leaves the averaged parameters in the model, in eval mode.

    ``watch`` is called with the number of steps done after each of them, with the raw parameters in place.
    """
    diffusion = create_diffusion()
    generator = torch.Generator().manual_seed(seed)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([p for _, p in named], lr=lr, weight_decay=0.0)
    ema = EMA(named, ema_decay)
    model.train()
    losses, times, saved = [], [], 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # label dropout
        for i, index in enumerate(batches(len(images.train), batch, steps, generator)):
            start = time.process_time()
            x, y = images.train[index], images.train_labels[index]
            t = diffusion.sample_timesteps(len(x), generator=generator)
            noise = torch.randn(x.shape, generator=generator)
            with SavedBytes(model, active=i == 0) as counter:
                loss = diffusion.training_losses(model, x, t, {"y": y}, noise)["loss"].mean()
            saved = counter.bytes or saved
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ema.update()
            losses.append(loss.item())
            times.append(time.process_time() - start)
            if watch:
                watch(i + 1)
                model.train()
    if steps:
        ema.exchange()
    model.eval()
    return Trained(losses, 1000 * float(np.median(times)) if times else 0.0, saved)


class SavedBytes:
    """Count the bytes that the forward pass keeps for the backward pass: each storage once, parameters left out."""

    def __init__(self, model: nn.Module, active: bool = True) -> None:
        self.bytes = 0
        self._seen = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self._held: list[Tensor] = []  # so that no address is used twice
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda t: t) if active else None

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self._held.append(tensor.detach())
            self.bytes += storage.nbytes()
        return tensor

    def __enter__(self) -> SavedBytes:
        if self._hooks:
            self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._hooks:
            self._hooks.__exit__(*error)
        self._held.clear()


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


def with_new_classes(state: dict[str, Tensor], model: dict[str, Any], classes: int, seed: int) -> DiT:
    """The pre-trained DiT with a new class table, N(0, 0.02), that keeps the row of the null class."""
    dit = DiT(**model, num_classes=classes)
    rows = 0.02 * torch.randn(classes, dit.hidden_size, generator=torch.Generator().manual_seed(seed))
    key = "y_embedder.embedding_table.weight"
    dit.load_state_dict({**state, key: torch.cat([rows, state[key][-1:]])})
    return dit


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


@torch.no_grad()
def sample(model: nn.Module, images: Images, n: int, steps: int, seed: int) -> Tensor:
    """``n`` images by DDIM without guidance, classes as often as in the training images."""
    generator = torch.Generator().manual_seed(seed)
    y = images.train_labels[torch.randint(0, len(images.train_labels), (n,), generator=generator)]
    shape = (n, *images.train.shape[1:])
    noise = torch.randn(shape, generator=generator)
    options = {"clip_denoised": True, "model_kwargs": {"y": y}}
    return create_diffusion(str(steps)).ddim_sample_loop(model, shape, noise, **options).clamp(-1, 1)
