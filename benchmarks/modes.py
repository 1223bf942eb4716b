"""The modes of speed.py: what a training step is in each of them.

The first word of a name is what trains: ``full`` everything, ``frozen`` DiffFit's parameters in plain PyTorch, ``lora``,
``fast`` ours, ``fast-fp8`` and ``fast-int8`` ours with the frozen weights of its blocks multiplied in eight bits. The others say
how it runs: ``compile`` as a whole by torch.compile, ``blocks`` block by block (one block
is compiled and serves them all), ``graph`` captured in a CUDA graph with optimizer and EMA, ``tf32``; eager without.

All kinds start from the same weights and compute the same function (γ is 1, LayerNorm's scale and shift the identity).
Modes of one kind train the same model, optimizer state and EMA in turn, so that every way to run it fits beside the others.
"""

from __future__ import annotations

import copy
import importlib.util
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from difffit_fast import DiT, FastDiffFitDiT
from difffit_fast.baselines.plain_difffit import PlainDiffFitDiT
from difffit_fast.ops import eight_bit

FULL = ("full", "full-blocks", "full-compile", "full-graph", "full-blocks-graph")  # what "the best full" is taken from
FROZEN = ("frozen", "frozen-blocks", "frozen-compile", "frozen-graph", "frozen-blocks-graph")
OURS = ("fast", "fast-compile", "fast-graph")
# Ours, but not the same numbers: compared with OURS, and never in their place.
EIGHT_BIT = {"fp8": ("fast-fp8", "fast-fp8-graph"), "int8": ("fast-int8", "fast-int8-graph")}
MODES = (*FULL, "full-tf32", *FROZEN, "lora", *OURS, *EIGHT_BIT["fp8"], *EIGHT_BIT["int8"])
WAYS = ("compile", "blocks", "graph", "tf32")
EMA_DECAY = 0.9999
LORA_RANK = 16
LORA_PREFIX = "base_model.model."


def available_modes(device: torch.device) -> list[str]:
    return [m for m in MODES if why_not(m, device) is None]


def why_not(name: str, device: torch.device) -> str | None:
    """What a mode needs that is not here, or None."""
    if device.type != "cuda" and {"graph", "tf32"} & set(ways(name)):
        return "needs CUDA"
    if name == "lora" and importlib.util.find_spec("peft") is None:
        return "needs peft"
    kind = frozen_dtype(name)
    return None if kind == "bf16" else eight_bit.refusal(kind, device)


def ways(name: str) -> list[str]:
    """How a mode runs: the words behind its kind."""
    return [word for word in name.split("-") if word in WAYS]


def kind_of(name: str) -> str:
    return "-".join(word for word in name.split("-") if word not in WAYS)


def is_ours(name: str) -> bool:
    """Whether a mode or kind trains a FastDiffFitDiT."""
    return name.split("-")[0] == "fast"


def frozen_dtype(name: str) -> str:
    """That of a mode's or a kind's frozen weights, as FastDiffFitDiT calls it."""
    return next((kind for kind in EIGHT_BIT if kind in name.split("-")), "bf16")


def compiles(name: str) -> bool:
    return bool({"compile", "blocks"} & set(ways(name)))


# -- data ----------------------------------------------------------------------------------------------------------------
def make_batch(config: dict[str, Any], batch_size: int, device: torch.device, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    side, channels = config["input_size"], config["in_channels"]
    out = 2 * channels if config["learn_sigma"] else channels
    batch = {
        "x": torch.randn(batch_size, channels, side, side, generator=g),
        "t": torch.randint(0, 1000, (batch_size,), generator=g),
        "y": torch.randint(0, config["num_classes"], (batch_size,), generator=g),
        "target": torch.randn(batch_size, out, side, side, generator=g),
    }
    return {k: v.to(device) for k, v in batch.items()}


# -- the weights ---------------------------------------------------------------------------------------------------------
def base_state(config: dict[str, Any], device: torch.device) -> dict[str, Tensor]:
    """The weights that every kind starts from: the same values on every call on one device.

    adaLN-Zero starts with closed gates and zero biases; real fine-tuning starts from weights that are not zero.
    """
    torch.manual_seed(0)
    with device:  # on a GPU the initial values of hundreds of millions of parameters take no time
        dit = DiT(**config)
    g = torch.Generator(device).manual_seed(1)
    with torch.no_grad():
        for p in dit.parameters():
            if not p.any():
                p.normal_(0, 0.02, generator=g)
    return dit.state_dict()


def _build_model(kind: str, config: dict[str, Any], dtype: torch.dtype, device: torch.device) -> nn.Module:
    base = base_state(config, device)
    with device:
        if is_ours(kind):
            compute_dtype = None if dtype == torch.float32 else dtype
            model: nn.Module = FastDiffFitDiT(**config, compute_dtype=compute_dtype, frozen_dtype=frozen_dtype(kind))
        elif kind == "frozen":
            model = PlainDiffFitDiT(**config)
        else:
            model = DiT(**config)
    model.load_state_dict(base, strict=kind in ("full", "lora"))  # γ and LayerNorm are not in it and stay the identity
    if kind == "lora":
        import peft

        targets = ["qkv", "proj", "fc1", "fc2"]
        model = peft.get_peft_model(model, peft.LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=targets))
        for n, p in model.named_parameters():
            p.requires_grad_("lora_" in n or "embedding_table" in n)
    return model.to(device).train()


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


class Kind:
    """Model, optimizer state and EMA of one kind of fine-tuning."""

    def __init__(self, name: str, config: dict[str, Any], dtype: torch.dtype, device: torch.device) -> None:
        self.config, self.device = config, device
        self.model = _build_model(name, config, dtype, device)
        self.trainable = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.ema = [p.detach().clone() for p in self.trainable.values()]
        self.state: Any = defaultdict(dict)  # AdamW's, for every optimizer of this kind
        self._stored: int | None = None

    def optimizer(self, capturable: bool) -> torch.optim.Optimizer:
        optimizer = make_optimizer(list(self.trainable.values()), self.device, capturable)
        optimizer.state = self.state
        return optimizer

    def stored_bytes(self) -> int:
        """Computed once: it reads all frozen weights to name them."""
        if self._stored is None:
            self._stored = _stored_bytes(self.model)
        return self._stored

    def held_bytes(self) -> int:
        """Of everything that lives between two steps, gradients excepted."""
        held = [*self.model.parameters(), *self.model.buffers(), *self.ema]
        held += [t for state in self.state.values() for t in state.values() if isinstance(t, Tensor)]
        return sum({t.data_ptr(): t.nbytes for t in held}.values())

    @torch.no_grad()
    def reset(self) -> None:
        """Trainable parameters as they were at first."""
        base = base_state(self.config, self.device)
        for name, p in self.trainable.items():
            name = name.removeprefix(LORA_PREFIX)
            if name in base:
                p.copy_(base[name])
            elif ".lora_" not in name:  # γ and LayerNorm's
                p.fill_(0.0 if name.endswith("bias") else 1.0)

    def clear_gradients(self) -> None:
        for p in self.trainable.values():
            p.grad = None


# -- the step ------------------------------------------------------------------------------------------------------------
@dataclass
class Mode:
    """One training step, and what the last one gave."""

    kind: Kind
    step: Callable[[], None]
    output: Callable[[], Tensor]
    gradients: Callable[[], dict[str, Tensor | None]]

    @property
    def trainable_parameters(self) -> int:
        return sum(p.numel() for p in self.kind.trainable.values())

    @property
    def checkpoint_bytes(self) -> int:
        return self.kind.stored_bytes()


def _by_blocks(model: nn.Module) -> nn.Module:
    """The same parameters in modules of their own, whose block is compiled."""
    twin = copy.deepcopy(model, {id(t): t for t in [*model.parameters(), *model.buffers()]})
    for block in twin.blocks:
        block.compile()
    return twin


def make_optimizer(params: list[Tensor], device: torch.device, capturable: bool = False) -> torch.optim.Optimizer:
    lr = torch.tensor(1e-4, device=device) if capturable else 1e-4
    return torch.optim.AdamW(params, lr=lr, weight_decay=0.0, fused=True, capturable=capturable)


def step_parts(
    forward: Callable[..., Tensor],
    optimizer: torch.optim.Optimizer,
    ema: list[Tensor],
    params: list[Tensor],
    autocast: torch.dtype | None,
    device: torch.device,
    batch: dict[str, Tensor],
    last: dict[str, Tensor],
    cache_casts: bool = True,
) -> tuple[Callable[[], None], Callable[[], None]]:
    """The two halves of a training step: forward and backward; fused AdamW and EMA. The output is left in ``last``."""

    def forward_backward() -> None:
        optimizer.zero_grad(set_to_none=True)  # in a graph, too: gradients live in its pool and nothing is added up
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None, cache_enabled=cache_casts):
            out = forward(batch["x"], batch["t"], batch["y"])
        loss = torch.nn.functional.mse_loss(out.float(), batch["target"])
        loss.backward()
        last["output"] = out.detach()

    def update() -> None:
        optimizer.step()
        torch._foreach_lerp_(ema, params, 1 - EMA_DECAY)

    return forward_backward, update


def build_mode(
    name: str,
    config: dict[str, Any],
    dtype: torch.dtype,
    device: torch.device,
    batch: dict[str, Tensor],
    kinds: dict[str, Kind] | None = None,
) -> Mode:
    """A function that does one training step; with ``kinds`` on the model that other modes of its kind train, too."""
    kinds = {} if kinds is None else kinds
    kind = kinds.get(kind_of(name)) or kinds.setdefault(kind_of(name), Kind(kind_of(name), config, dtype, device))
    how = ways(name)
    graph, tf32 = "graph" in how, "tf32" in how
    forward: Callable[..., Tensor] = _by_blocks(kind.model) if "blocks" in how else kind.model
    if "compile" in how:
        forward = torch.compile(kind.model)
    autocast = dtype if dtype != torch.float32 and not is_ours(name) and not tf32 else None
    params, last = list(kind.trainable.values()), {}
    forward_backward, update = step_parts(
        forward, kind.optimizer(graph), kind.ema, params, autocast, device, batch, last, cache_casts=not graph
    )

    def step() -> None:
        if tf32:
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        forward_backward()
        update()
        if tf32:
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

    gradients = lambda: {n: p.grad for n, p in kind.trainable.items()}  # noqa: E731
    if graph:
        from difffit_fast.graph import capture

        step = capture(step)
        captured = gradients()  # where every replay writes them
        gradients = lambda: captured  # noqa: E731
    return Mode(kind, step, lambda: last["output"], gradients)
