"""From a batch to the loss of each image: encode; pick the timestep, ask the model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._devices import has_fast
from .._processes import World
from ..data.vae import LatentSpace, sample_moments
from ..diffusion import FlowMatching, create_diffusion
from .stream import Batch, ValidationStream, share

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Objective:
    """The training loss, ``losses(model, encode(batch)) -> (N,)`` float32.

    ``ddpm``: DiT's, at the timestep floor(1000 u). ``flow``: SiT's, at the time u.

    Args:
        learn_sigma: whether the model predicts a variance as well.
        vae: encodes the pixels of a batch; None where they are what the model sees.
        autocast: run the model under autocast in this dtype; None for a model that sees to its arithmetic itself.
    """

    def __init__(
        self, name: str, learn_sigma: bool, vae: LatentSpace | None = None, autocast: torch.dtype | None = None
    ) -> None:
        self.name = name
        self.vae = vae
        self.autocast = autocast
        self.diffusion: Any = FlowMatching() if name == "flow" else create_diffusion(learn_sigma=learn_sigma)

    def encode(self, batch: Batch) -> Batch:
        """The batch with ``x`` (N, C, H, W) as the model sees it: the latents of its pixels where there is a VAE."""
        if self.vae is None:
            return batch
        x = sample_moments(self.vae.encode(batch["x"]), batch["encode"], self.vae.scale, self.vae.shift)
        return {**{key: value for key, value in batch.items() if key != "encode"}, "x": x}

    def losses(self, model: Callable[..., Tensor], batch: Batch) -> Tensor:
        """The loss of each image of an encoded batch, (N,) float32. Nothing in it is random, or waits for the device."""
        x, noise = batch["x"], batch["noise"]
        if self.name == "flow":
            t = batch["u"].float()
        else:
            t = (batch["u"] * self.diffusion.num_timesteps).long()
        with self.precision(x.device):
            return self.diffusion.training_losses(model, x, t, {"y": batch["y"]}, noise=noise)["loss"]

    def precision(self, device: torch.device) -> Any:
        """The context to call the model in."""
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(device.type, self.autocast)


@torch.no_grad()
def validation_loss(
    objective: Objective,
    model: Callable[..., Tensor],
    stream: ValidationStream,
    world: World,
    batch_size: int,
    device: torch.device,
) -> float:
    """The mean loss over ``stream``, each process working on its share, weighted by how many images that is."""
    mine = share(len(stream), world.rank, world.size)
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for first in range(mine.start, mine.stop, batch_size):
        batch = stream.__getitems__(range(first, min(first + batch_size, mine.stop)))
        losses = objective.losses(model, objective.encode({key: value.to(device) for key, value in batch.items()}))
        total[0] += losses.double().sum()
        total[1] += len(losses)
    world.sum_([total])
    return float(total[0] / total[1])


def choose_precision(name: str, device: torch.device) -> tuple[str, str | None]:
    """The precision that ``name`` means on a device, and what the user should hear about it, once."""
    fast = has_fast(torch.bfloat16, device)
    where = "this CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)
    if name == "auto":
        return ("bf16", None) if fast else ("fp32", f"{where} does not compute in bf16: training in fp32")
    if name == "bf16" and not fast:
        return name, f"{where} does not compute in bf16, only emulates it: --precision fp32 will be faster"
    return name, None
