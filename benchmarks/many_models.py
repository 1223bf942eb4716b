"""The models of many.py and the batch that they share: what each sample of it wears, forward passes and training steps."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from machine import DTYPES
from modes import base_state, make_batch, make_optimizer
from torch import Tensor, nn

from difffit_fast import DiT, FastDiffFitDiT
from difffit_fast.models.difffit import DELTAS

LORA_TARGETS = r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(fc1|fc2))"
Forward = Callable[[], Tensor]


def shape(args: argparse.Namespace) -> dict[str, Any]:
    """The DiT's constructor arguments."""
    return dict(
        input_size=args.side, patch_size=2, in_channels=4, hidden_size=args.width, depth=args.depth,
        num_heads=args.width // 64 or 1, mlp_ratio=4.0, class_dropout_prob=0.1, num_classes=args.classes, learn_sigma=True,
    )  # fmt: skip


@dataclass
class Many:
    """A model with its deltas, the batch, and what each sample of it wears.

    Attributes:
        names: of the deltas; sample n wears number n mod K.
        files: the delta files, by name.
        index, strength: of the samples, (N,).
    """

    model: FastDiffFitDiT
    names: list[str]
    files: dict[str, Path]
    batch: dict[str, Tensor]
    index: Tensor
    strength: Tensor

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """x (N, 4, side, side), t (N,), y (N,)."""
        return self.batch["x"], self.batch["t"], self.batch["y"]

    @property
    def worn(self) -> list[str]:
        return [self.names[i] for i in self.index.tolist()]


def make_many(args: argparse.Namespace, folder: Path) -> Many:
    """A base with random weights, K deltas on it that lie in ``folder``, the first of them in the model's own parameters too."""
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    config = shape(args)
    with device:
        model = FastDiffFitDiT(**config, compute_dtype=None if dtype == torch.float32 else dtype).eval()
    model.load_state_dict(base_state(config, device))
    names = [f"d{i}" for i in range(args.domains)]
    g = torch.Generator(device).manual_seed(2)
    for name in names:
        delta = model.add_delta(name)
        with torch.no_grad():
            for p in (delta.vectors, delta.classes):
                p.add_(0.1 * torch.randn(p.shape, generator=g, device=device))
        model.save_delta(folder / f"{name}.safetensors", delta=name)
        model.drop_delta(name)
    files = {name: folder / f"{name}.safetensors" for name in names}
    model.load_deltas(files)
    model.deltas.requires_grad_()
    model.load_delta(files[names[0]])
    n = args.batch_size
    index = torch.arange(n, device=device) % args.domains
    return Many(model, names, files, make_batch(config, n, device), index, torch.linspace(0.5, 1.25, n, device=device))


def ours(many: Many, method: str) -> Forward:
    """A forward pass through the model with its deltas, -> (N, 8, side, side)."""
    wears: dict[str, dict[str, Any]] = {
        "one": {"delta": many.names[0]}, "own": {}, "mixed": {"delta": many.index},
        "mixed-strength": {"delta": many.index, "strength": many.strength},
    }  # fmt: skip
    return lambda: many.model(*many.inputs, **wears[method])


def merged(many: Many, dtype: torch.dtype) -> tuple[Forward, list[DiT]]:
    """K models in turn, each with the samples that wear its delta."""
    models = [many.model.merge(delta=name).to(dtype) for name in many.names]
    places = [(many.index == k).nonzero().flatten() for k in range(len(models))]

    def forward() -> Tensor:
        x, t, y = many.inputs
        out = torch.empty(len(x), models[0].out_channels, *x.shape[2:], dtype=x.dtype, device=x.device)
        for model, at in zip(models, places, strict=True):
            out[at] = model(x[at].to(dtype), t[at], y[at]).to(x.dtype)
        return out

    return forward, models


def lora(args: argparse.Namespace, many: Many) -> tuple[Forward, Any]:
    """PEFT's model of a plain DiT with an adapter for each domain, none of them zero, and a forward pass of a mixed batch."""
    import peft

    config, dtype, device = shape(args), DTYPES[args.dtype], torch.device(args.device)
    with device:
        dit = DiT(**config)
    dit.load_state_dict(base_state(config, device))
    # Ten times the usual scale: behind the nearly closed gates of random weights a domain would hardly show.
    made = peft.LoraConfig(r=args.rank, lora_alpha=10 * args.rank, target_modules=LORA_TARGETS, init_lora_weights=False)
    # As it stands, PEFT would keep adapters of half precision in float32, and cast to and fro.
    model = peft.get_peft_model(dit.to(dtype), made, many.names[0], autocast_adapter_dtype=False)
    for name in many.names[1:]:
        model.add_adapter(name, made, autocast_adapter_dtype=False)
    model = model.to(device).eval()
    x, t, y = many.inputs
    worn = many.worn
    return lambda: model(x.to(dtype), t, y, adapter_names=worn), model


@dataclass
class Step:
    """One training step of what the batch wears."""

    forward: Forward
    trainable: list[nn.Parameter]

    def __post_init__(self) -> None:
        self.optimizer = make_optimizer(self.trainable, self.trainable[0].device)

    def forward_backward(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.forward().float().square().mean().backward()

    def __call__(self) -> None:
        self.forward_backward()
        self.optimizer.step()


def make_step(many: Many, method: str) -> Step:
    model = many.model
    if method == "own":
        trainable = [p for n, p in model.named_parameters() if p.requires_grad and not n.startswith(DELTAS)]
    else:
        worn = many.names[:1] if method == "one" else many.names
        trainable = [p for name in worn for p in model.deltas[name].parameters()]
    return Step(ours(many, method), trainable)
