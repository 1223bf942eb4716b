"""DiT in plain PyTorch: the reference that everything else is compared with.

Diffusion transformer with adaLN-Zero conditioning (Peebles & Xie, "Scalable Diffusion Models with Transformers",
ICCV 2023). Parameter names, shapes and the function computed are those of the public DiT checkpoints, so their state
dicts load with ``strict=True``. Written from the paper and the published key layout; nothing here is tuned for speed.

Letters in shapes: N images, C channels, H = W = input_size, p patch size, T = (H / p)^2 tokens, D hidden size.

One block, with six vectors (shift, scale, gate for each branch) computed from the condition c = t_embed + y_embed:

    x = x + gate_msa * Attention(LN(x) * (1 + scale_msa) + shift_msa)
    x = x + gate_mlp * MLP(LN(x) * (1 + scale_mlp) + shift_mlp)
"""

from __future__ import annotations

import json
import math
import numbers
import re
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .._words import shown
from .classes import ClassRows
from .foreign import is_foreign, parts, say_left_out
from .sizes import MODEL_NAMES, PATCH_SIZES, model_objective, model_sizes

FREQUENCY_DIM = 256  # width of the sinusoidal timestep features
LN_EPS = 1e-6
STATE_DICT_KEY = "difffit_fast"  # in a state dict's metadata: what it says about itself (see .header)


# ------------------------------------------------------------------------------------------------ fixed embeddings


def timestep_embedding(t: Tensor, dim: int = FREQUENCY_DIM, max_period: float = 10000.0) -> Tensor:
    """Sinusoidal features of the timestep: ``[cos(t * w_i) | sin(t * w_i)]``, w_i = max_period^(-i / (dim / 2)).

    ``t`` (N,) of any integer or float dtype; fractions are allowed. Returns (N, dim) float32, whatever the dtype of the
    model, since t * w reaches 1000 radians. An odd ``dim`` gets a zero as its last column.
    """
    half = dim // 2
    freqs = torch.exp(torch.arange(half, dtype=torch.float32, device=t.device) * (-math.log(max_period) / half))
    angles = t[:, None].float() * freqs
    features = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return F.pad(features, (0, 1)) if dim % 2 else features


def sincos_pos_embed(dim: int, grid_size: int, scale: float = 1.0) -> Tensor:
    """Two-dimensional sine-cosine table of patch positions: (grid_size^2, dim) float32, row-major patches.

    The first half of the channels encodes the column, the second half the row; each half is ``[sin | cos]`` of
    ``position * 10000^(-i / (dim / 4))``. Positions are the integers 0 .. grid_size - 1 times ``scale``: a scale of 0.5
    makes a 512-pixel table span the coordinates of a 256-pixel one (DiffFit, section on 512 x 512).
    """
    if dim % 4:
        raise ValueError(f"a 2-D sine-cosine table needs a width divisible by 4, got {dim}")
    quarter = dim // 4
    omega = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(grid_size, dtype=torch.float64)[:, None] * scale * omega
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (grid_size, dim / 2)
    columns = axis.repeat(grid_size, 1)
    rows = axis.repeat_interleave(grid_size, dim=0)
    return torch.cat([columns, rows], dim=1).float()


def label_dropout(
    y: Tensor,
    prob: float,
    null_class: int,
    force_drop_ids: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Replace labels by ``null_class``: each with probability ``prob``, or exactly where ``force_drop_ids == 1``.

    ``y`` (N,) long; ``force_drop_ids`` (N,) of 0/1 or bool. Returns (N,) long. This is what trains the unconditional
    half of classifier-free guidance (Ho & Salimans 2022).
    """
    if force_drop_ids is None:
        # Without a generator, none is named: the compiler cannot trace one with a number of images that varies.
        own = {} if generator is None else {"generator": generator}
        drop = torch.rand(y.shape, device=y.device, **own) < prob
    else:
        drop = force_drop_ids == 1
    return torch.where(drop, null_class, y)


def transformed() -> bool:
    """Whether a transform of ``torch.func`` or forward-mode differentiation is running; unknown, and False, to a compiler."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (N, T, D) * (1 + scale) + shift, with one vector (N, D) each per image."""
    return x * (1 + scale[:, None]) + shift[:, None]


# ------------------------------------------------------------------------------------------------------- embedders


def _as_taken(x: Tensor, module: nn.Module) -> Tensor:
    """``x`` in the dtype of the module's weight; as it is where that is not one of floating numbers (a quantised module's)."""
    weight = getattr(module, "weight", None)
    return x.to(weight.dtype) if isinstance(weight, Tensor) and weight.is_floating_point() else x


class PatchEmbed(nn.Module):
    """Image (N, C, H, W) -> tokens (N, T, D): one linear map per p x p patch, written as a strided convolution."""

    def __init__(self, input_size: int, patch_size: int, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.img_size = (input_size, input_size)
        self.patch_size = (patch_size, patch_size)
        self.grid_size = (input_size // patch_size, input_size // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(_as_taken(x, self.proj)).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Timestep (N,) int or float -> (N, D): sinusoidal features through Linear, SiLU, Linear."""

    def __init__(self, hidden_size: int, frequency_embedding_size: int = FREQUENCY_DIM) -> None:
        super().__init__()
        self.frequency_embedding_size = frequency_embedding_size
        self.mlp = nn.Sequential(
            nn.Linear(frequency_embedding_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(_as_taken(timestep_embedding(t, self.frequency_embedding_size), self.mlp[0]))


class LabelEmbedder(nn.Module):
    """Class label (N,) long -> (N, D), with label dropout in training.

    The table has ``num_classes`` rows and, if ``dropout_prob > 0``, one more: the null class, index ``num_classes``.
    """

    def __init__(self, num_classes: int, hidden_size: int, dropout_prob: float) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob
        self.embedding_table = nn.Embedding(num_classes + int(dropout_prob > 0), hidden_size)

    def forward(
        self, y: Tensor, train: bool, force_drop_ids: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        rows = self.embedding_table.num_embeddings
        # On an accelerator the check would wait for the device, and a bad index fails there by itself.
        if (
            y.device.type == "cpu"
            and not torch.compiler.is_compiling()
            and type(y) is Tensor
            and y.numel()
            and not transformed()
        ):
            low, high = int(y.min()), int(y.max())
            if low < 0 or high >= rows:
                null = f", the null class is {rows - 1}" if rows > self.num_classes else ", there is no null class"
                raise ValueError(f"class labels must be in 0..{self.num_classes - 1}{null}; got {low}..{high}")
        if force_drop_ids is not None or (train and self.dropout_prob > 0):
            if rows == self.num_classes:
                raise ValueError("labels cannot be dropped: with class_dropout_prob=0 the model has no null class")
            y = label_dropout(y, self.dropout_prob, self.num_classes, force_drop_ids, generator)
        return self.embedding_table(y)


# ---------------------------------------------------------------------------------------------------------- blocks


class Attention(nn.Module):
    """Multi-head self-attention over tokens (N, T, D); ``qkv`` rows are q, k, v, each head-major."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = hidden_size // num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        qkv = self.qkv(x).view(n, t, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (N, heads, T, head_dim)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, d))


class Mlp(nn.Module):
    """fc2(gelu_tanh(fc1(x)))."""

    def __init__(self, hidden_size: int, mlp_hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, mlp_hidden)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(mlp_hidden, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class DiTBlock(nn.Module):
    """Transformer block with adaLN-Zero: tokens x (N, T, D) and condition c (N, D) -> (N, T, D)."""

    attention_type: type[nn.Module] = Attention

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=LN_EPS)
        self.attn = self.attention_type(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=LN_EPS)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_msa[:, None] * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        return x + gate_mlp[:, None] * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    """Modulated LayerNorm and the linear map to patches: x (N, T, D), c (N, D) -> (N, T, p * p * out_channels)."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=LN_EPS)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


# ----------------------------------------------------------------------------------------------------------- model


class DiT(nn.Module):
    """Class-conditional diffusion transformer; defaults are DiT-XL/2 for 256 x 256 pixels (latents of side 32).

    ``forward(x, t, y)``: x (N, in_channels, input_size, input_size), t (N,) int or float, y (N,) long
    -> (N, out_channels, input_size, input_size), where out_channels = 2 * in_channels if ``learn_sigma`` (the noise
    prediction and the variance interpolation v) and in_channels otherwise. In training mode labels are dropped with
    ``class_dropout_prob``. The null class is ``num_classes``. Raises ``ValueError`` for sizes that do not fit.

    With ``objective="flow"`` it is a SiT (Ma et al. 2024), DiT's twin that predicts a velocity: t lies in [0, 1], and
    ``forward`` returns (N, in_channels, input_size, input_size). ``learn_sigma`` still doubles the channels of the last layer,
    as in the published checkpoints, whose second half nobody trained: it is dropped, as the public code does.

    A state dict may have the parts beside it that :mod:`.foreign` lists, such as REPA's projectors; a warning tells that they
    are left out.

    Attributes:
        objective: what the model is trained to predict: "ddpm", "flow", or None where nobody has said.
        pos_embed_scale: scale of the coordinates of the positional table; see :func:`sincos_pos_embed`.
        random_base: the seed that the weights came from, where they are random and stay so; else None.
        classes: where the rows of the class table came from, in a model made from a file.
        gradient_checkpointing: keep only what enters each block, and compute the block again in the backward pass: less
            memory for more time, the same gradients. Nothing in a block may be random.
    """

    block_type: type[nn.Module] = DiTBlock
    pos_embed_scale: float = 1.0
    random_base: int | None = None
    classes: ClassRows | None = None
    gradient_checkpointing: bool = False

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        *,
        objective: str | None = None,
    ) -> None:
        super().__init__()
        if objective not in (None, "ddpm", "flow"):
            raise ValueError(f"objective must be 'ddpm', 'flow' or None, got {objective!r}")
        self.objective = objective
        self.input_size = input_size
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.out_channels = in_channels * 2 if learn_sigma else in_channels
        self.hidden_size = hidden_size
        self.depth = depth
        self.num_heads = num_heads
        self.mlp_ratio = mlp_ratio
        self.class_dropout_prob = class_dropout_prob
        self.num_classes = num_classes
        self.learn_sigma = learn_sigma
        check_dit_config(self.config)

        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        # A parameter and not a buffer: public checkpoints carry it, and nobody trains it.
        self.pos_embed = nn.Parameter(torch.zeros(1, self.x_embedder.num_patches, hidden_size), requires_grad=False)
        self.blocks = nn.ModuleList([self.block_type(hidden_size, num_heads, mlp_ratio) for _ in range(depth)])
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        self.initialize_weights()

    @property
    def config(self) -> dict[str, Any]:
        """The constructor arguments but ``objective``: ``DiT(**model.config)`` has the same shape."""
        return {name: getattr(self, name) for name in DIT_ARGUMENTS}

    @property
    def has_null_class(self) -> bool:
        """Whether the class table has a row for dropped labels, without which a model cannot be guided."""
        return self.y_embedder.embedding_table.num_embeddings > self.num_classes

    def named_trainable_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters that the optimizer, EMA and file hold: those that require gradients."""
        return ((name, p) for name, p in self.named_parameters() if p.requires_grad)

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """Exactly what optimizer and EMA should hold."""
        return (p for _, p in self.named_trainable_parameters())

    @property
    def num_trainable(self) -> int:
        """Number of trainable parameters, e.g. 832,928 for DiffFit on DiT-XL/2 with 101 classes and the preset "paper"."""
        return sum(p.numel() for p in self.trainable_parameters())

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        # What no tensor tells (heads, null class) travels in the metadata of the state dict, which torch.save keeps.
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata"):
            said = {"config": self.config, "pos_embed_scale": self.pos_embed_scale}
            if self.objective is not None:
                said["objective"] = json.dumps(self.objective)  # text of a header is JSON itself
            destination._metadata[prefix[:-1]][STATE_DICT_KEY] = json.dumps(said, default=lambda number: number.item())

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        found = [key for key in unexpected_keys if key.startswith(prefix) and is_foreign(key[len(prefix) :])]
        for key in found:
            unexpected_keys.remove(key)
        say_left_out(parts(key[len(prefix) :] for key in found), "the state dict")

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Xavier for linear maps, N(0, 0.02) for embeddings and the timestep MLP, zero for what gates a branch or ends
        the network (adaLN-Zero: each block starts as the identity, the model as the zero function)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        patch = self.x_embedder.proj
        nn.init.xavier_uniform_(patch.weight.view(patch.weight.shape[0], -1))  # like a linear map on flattened patches
        nn.init.zeros_(patch.bias)
        self.pos_embed.copy_(sincos_pos_embed(self.hidden_size, self.x_embedder.grid_size[0])[None])
        for module in (self.y_embedder.embedding_table, self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(module.weight, std=0.02)
        for block in self.blocks:
            nn.init.zeros_(block.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def unpatchify(self, x: Tensor) -> Tensor:
        """Tokens (N, T, p * p * out_channels) -> images (N, out_channels, H, W)."""
        return unpatchify(x, self.patch_size, self.out_channels)

    def output(self, x: Tensor) -> Tensor:
        """What the model returns, from the tokens of the last layer: of a SiT the velocity alone."""
        x = self.unpatchify(x)
        return x[:, : self.in_channels] if self.objective == "flow" else x

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        check_dit_inputs(x, t, y, self.in_channels, self.input_size)
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y, self.training)
        for block in self.blocks:
            x = self.call_block(block, x, c)
        return self.output(self.final_layer(x, c))

    def call_block(self, block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``block(*args, **kwargs)``, of which only the arguments are kept where :attr:`gradient_checkpointing` is on."""
        if not (self.gradient_checkpointing and torch.is_grad_enabled()):
            return block(*args, **kwargs)
        # Nothing in a block is random, and in a CUDA graph no generator's state could be read.
        return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    def forward_with_cfg(
        self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float, cfg_channels: str | int = "first3"
    ) -> Tensor:
        """Classifier-free guidance on a doubled batch; see :func:`guided_forward`."""
        return guided_forward(self, x, t, y, cfg_scale, cfg_channels)


DIT_ARGUMENTS = (
    "input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads", "mlp_ratio", "class_dropout_prob",
    "num_classes", "learn_sigma",
)  # fmt: skip


def unpatchify(x: Tensor, patch_size: int, out_channels: int) -> Tensor:
    """Tokens (N, T, p * p * c), T a square, row-major, channels last within a patch -> (N, c, sqrt(T) p, sqrt(T) p)."""
    n, t, p = x.shape[0], x.shape[1], patch_size
    side = math.isqrt(t)
    if side * side != t:
        raise ValueError(f"unpatchify needs a square number of tokens, got {t}")
    x = x.view(n, side, side, p, p, out_channels)
    return torch.einsum("nhwpqc->nchpwq", x).reshape(n, out_channels, side * p, side * p)


def guided_forward(
    model: nn.Module, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float, cfg_channels: str | int = "first3"
) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022): ``uncond + cfg_scale * (cond - uncond)`` in one doubled batch.

    x (2N, C, H, W), of which the first half is used for both; t (2N,); y (2N,), the second half being the null class
    ``model.num_classes``. Returns (2N, out_channels, H, W): the guided channels are equal in both halves, the rest is
    each half's own. ``cfg_channels`` says what is guided: ``"first3"`` (what the public code does, and published
    numbers use), ``"all"`` the in_channels of the prediction, or a count of leading channels.
    """
    if not model.has_null_class:
        raise ValueError("guidance needs a null class, and a model built with class_dropout_prob=0 has none")
    if x.shape[0] % 2:
        raise ValueError(f"guidance expects a doubled batch (conditional half, null half), got {x.shape[0]} images")
    guided = num_guided_channels(cfg_channels, model.in_channels)
    half = x[: x.shape[0] // 2]
    out = model(torch.cat([half, half]), t, y)
    eps = guide(*out.chunk(2), cfg_scale, guided)[:, :guided]
    return torch.cat([torch.cat([eps, eps]), out[:, guided:]], dim=1)


def guide(out: Tensor, other: Tensor, scale: float, channels: int) -> Tensor:
    """``other + scale * (out - other)`` in the first ``channels`` of predictions (N, C, H, W); the rest is that of ``out``."""
    ours, theirs = out[:, :channels], other[:, :channels]
    return torch.cat([theirs + scale * (ours - theirs), out[:, channels:]], dim=1)


def num_guided_channels(cfg_channels: str | int, in_channels: int) -> int:
    """How many leading channels guidance touches: ``"first3"`` -> at most 3, ``"all"`` -> in_channels, or a count."""
    if cfg_channels == "first3":
        return min(3, in_channels)
    if cfg_channels == "all":
        return in_channels
    if isinstance(cfg_channels, int) and 1 <= cfg_channels <= in_channels:
        return cfg_channels
    raise ValueError(f"cfg_channels must be 'first3', 'all' or a count in 1..{in_channels}, got {cfg_channels!r}")


# Far beyond every DiT that there is, and low enough that a few numbers in a file cannot ask for all of a machine's memory.
_LARGEST = {
    "input_size": 1 << 16, "patch_size": 1 << 10, "in_channels": 1 << 12, "hidden_size": 1 << 16, "depth": 1 << 10,
    "num_heads": 1 << 12, "num_classes": 10_000_000, "mlp_ratio": 64,
}  # fmt: skip
_MOST_TOKENS = 1 << 18


def check_dit_config(config: dict[str, Any]) -> None:
    """Raise ``ValueError`` for constructor arguments that make no DiT: of another type, out of bounds, or at odds."""
    for name, value in config.items():
        if name == "learn_sigma":
            kind, fits = "true or false", isinstance(value, bool)
        else:
            real = name in ("mlp_ratio", "class_dropout_prob")
            kind, type_ = ("a number", numbers.Real) if real else ("a whole number", numbers.Integral)
            fits = isinstance(value, type_) and not isinstance(value, bool)
        if not fits:
            raise ValueError(f"{name} must be {kind}, got {shown(value)}")
    for name, most in _LARGEST.items():
        least = 0 if name in ("depth", "mlp_ratio") else 1
        if not least <= config[name] <= most:
            bound = f"at least {least}" if config[name] < least else f"at most {most}"
            raise ValueError(f"{name} must be {bound}, got {shown(config[name])}")
    for name, divisor in (("input_size", "patch_size"), ("hidden_size", "num_heads")):
        if config[name] % config[divisor]:
            raise ValueError(f"{name} must be divisible by {divisor}, got {config[name]} and {config[divisor]}")
    if (tokens := (config["input_size"] // config["patch_size"]) ** 2) > _MOST_TOKENS:
        raise ValueError(
            f"at most {_MOST_TOKENS} patches are possible, got {tokens} of input_size {config['input_size']}"
        )
    if int(config["hidden_size"] * config["mlp_ratio"]) < 1:
        raise ValueError(f"mlp_ratio {config['mlp_ratio']} leaves the MLP without a hidden channel")
    if config["hidden_size"] % 4:
        raise ValueError(f"hidden_size must be divisible by 4 (position table), got {config['hidden_size']}")
    if not 0 <= config["class_dropout_prob"] <= 1:
        raise ValueError(f"class_dropout_prob must be in 0..1, got {config['class_dropout_prob']}")


def check_dit_inputs(x: Tensor, t: Tensor, y: Tensor, in_channels: int, input_size: int) -> None:
    """Raise ``ValueError`` unless x is (N, in_channels, input_size, input_size) and t, y are (N,), y of integers."""
    if x.dim() != 4 or x.shape[1:] != (in_channels, input_size, input_size):
        expected = f"(N, {in_channels}, {input_size}, {input_size})"
        raise ValueError(f"x must have the shape {expected}, got {tuple(x.shape)}")
    if t.shape != x.shape[:1] or y.shape != x.shape[:1]:
        raise ValueError(f"t and y must have the shape ({x.shape[0]},), got {tuple(t.shape)} and {tuple(y.shape)}")
    if y.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"y must hold integer class labels (torch.long), got {y.dtype}")


# ----------------------------------------------------------------------------------------------------------- sizes


M = TypeVar("M", bound=DiT)


def published(kind: type[M]) -> dict[str, Callable[..., M]]:
    """Every published name, the twelve of DiT and the twelve of SiT -> the constructor of a ``kind`` of these sizes.

    It takes ``kind``'s keyword arguments, which go before what the name says. A SiT is a DiT with ``objective="flow"``.
    """

    def constructor(name: str) -> Callable[..., M]:
        said: dict[str, Any] = {**model_sizes(name), "objective": "flow" if model_objective(name) == "flow" else None}

        def build(**kwargs: Any) -> M:
            return kind(**{**said, **kwargs})

        build.__name__ = build.__qualname__ = kind.__name__.removesuffix("DiT") + re.sub(r"\W", "_", name)
        build.__doc__ = f"{name}; keyword arguments as for :class:`{kind.__name__}`."
        return build

    return {name: constructor(name) for name in MODEL_NAMES}


DiT_models: dict[str, Callable[..., DiT]] = published(DiT)
DiT_XL_2, DiT_XL_4, DiT_XL_8 = (DiT_models[f"DiT-XL/{p}"] for p in PATCH_SIZES)
DiT_L_2, DiT_L_4, DiT_L_8 = (DiT_models[f"DiT-L/{p}"] for p in PATCH_SIZES)
DiT_B_2, DiT_B_4, DiT_B_8 = (DiT_models[f"DiT-B/{p}"] for p in PATCH_SIZES)
DiT_S_2, DiT_S_4, DiT_S_8 = (DiT_models[f"DiT-S/{p}"] for p in PATCH_SIZES)
