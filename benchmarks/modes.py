"""The modes of speed.py: what a step is in each of them."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from difffit_fast import DiT, FastDiffFitDiT
from difffit_fast.baselines.plain_difffit import PlainDiffFitDiT

MODES = (
    "full", "full-compile", "full-tf32", "frozen", "frozen-compile", "lora", "fast", "fast-compile", "fast-graph",
)  # fmt: skip
EMA_DECAY = 0.9999
LORA_RANK = 16


@dataclass
class Mode:
    step: Callable[[], None]
    trainable_parameters: int
    checkpoint_bytes: int


def available_modes(device: torch.device) -> list[str]:
    cuda_only = {"full-tf32", "fast-graph"}
    lora = importlib.util.find_spec("peft") is not None
    return [m for m in MODES if (device.type == "cuda" or m not in cuda_only) and (m != "lora" or lora)]


def _randomise(model: nn.Module) -> None:
    """adaLN-Zero starts with closed gates; real fine-tuning starts from weights that are not zero."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() >= 2 and not p.any():
                p.copy_(torch.randn(p.shape, generator=g) * 0.02)


def _build_model(name: str, config: dict[str, Any], dtype: torch.dtype, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    kind = name.split("-")[0]
    with device:  # on a GPU the initial values of hundreds of millions of parameters take no time
        if kind == "fast":
            model: nn.Module = FastDiffFitDiT(**config, compute_dtype=None if dtype == torch.float32 else dtype)
        elif kind == "frozen":
            model = PlainDiffFitDiT(**config)
        else:
            model = DiT(**config)
    _randomise(model)
    if kind == "lora":
        import peft

        targets = ["qkv", "proj", "fc1", "fc2"]
        model = peft.get_peft_model(model, peft.LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=targets))
        for n, p in model.named_parameters():
            p.requires_grad_("lora_" in n or "embedding_table" in n)
    return model


def _stored_bytes(model: nn.Module) -> int:
    """What has to be kept to use the result: the delta file, or the trained tensors in float32."""
    if isinstance(model, FastDiffFitDiT):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "delta.safetensors"
            model.save_delta(path)
            return path.stat().st_size
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen_too = isinstance(model, DiT) and not isinstance(model, PlainDiffFitDiT)
    return 4 * (sum(p.numel() for p in model.parameters()) if frozen_too else trainable)


def build_mode(
    name: str, config: dict[str, Any], dtype: torch.dtype, device: torch.device, batch: dict[str, Tensor]
) -> Mode:
    """Model, fused AdamW and EMA of the trainables, and a function that does one training step."""
    model = _build_model(name, config, dtype, device).to(device).train()
    stored = _stored_bytes(model)
    forward_backward, update = step_parts(name, model, dtype, device, batch)

    def step() -> None:
        forward_backward()
        update()

    if name.endswith("-graph"):
        from difffit_fast.graph import capture

        step = capture(step)
    return Mode(step, sum(p.numel() for p in model.parameters() if p.requires_grad), stored)


def step_parts(
    name: str, model: nn.Module, dtype: torch.dtype, device: torch.device, batch: dict[str, Tensor]
) -> tuple[Callable[[], None], Callable[[], None]]:
    """The two halves of a training step: forward and backward; fused AdamW and EMA of the trainables."""
    params = [p for p in model.parameters() if p.requires_grad]
    ema = [p.detach().clone() for p in params]
    graph = name.endswith("-graph")
    lr = torch.tensor(1e-4, device=device) if graph else 1e-4
    optimizer = torch.optim.AdamW(params, lr=lr, weight_decay=0.0, fused=True, capturable=graph)
    forward = torch.compile(model) if name.endswith("-compile") else model
    tf32 = name == "full-tf32"
    autocast = dtype if dtype != torch.float32 and not name.startswith("fast") and not tf32 else None

    def forward_backward() -> None:
        if tf32:
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            out = forward(batch["x"], batch["t"], batch["y"])
        loss = torch.nn.functional.mse_loss(out.float(), batch["target"])
        loss.backward()
        if tf32:
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=not graph)
        torch._foreach_lerp_(ema, params, 1 - EMA_DECAY)

    return forward_backward, update
