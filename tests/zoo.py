"""Every diffusers transformer of the registry, tiny, with random weights, and inputs for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

N = 2  # samples


def _draw(*shape: int) -> Tensor:
    return torch.randn(*shape)


def _dit() -> dict[str, Any]:
    return dict(hidden_states=_draw(N, 4, 8, 8), timestep=torch.tensor([3, 700]), class_labels=torch.tensor([1, 4]))


def _pixart() -> dict[str, Any]:
    return dict(
        hidden_states=_draw(N, 4, 8, 8), timestep=torch.tensor([3, 700]), encoder_hidden_states=_draw(N, 5, 12),
        encoder_attention_mask=torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
    )  # fmt: skip


def _sd3() -> dict[str, Any]:
    return dict(
        hidden_states=_draw(N, 4, 8, 8), timestep=torch.tensor([3, 700]), encoder_hidden_states=_draw(N, 5, 12),
        pooled_projections=_draw(N, 10),
    )  # fmt: skip


def _ids(rows: int, columns: int) -> Tensor:
    return torch.stack([torch.arange(rows * columns) // columns, torch.arange(rows * columns) % columns], 1).float()


def _flux() -> dict[str, Any]:
    image = torch.cat([torch.zeros(16, 1), _ids(4, 4)], 1)
    return dict(
        hidden_states=_draw(N, 16, 6), timestep=torch.tensor([0.1, 0.7]), encoder_hidden_states=_draw(N, 5, 12),
        pooled_projections=_draw(N, 10), img_ids=image, txt_ids=torch.zeros(5, 3), guidance=torch.tensor([1.0, 3.5]),
    )  # fmt: skip


def _flux2() -> dict[str, Any]:
    image = torch.cat([torch.zeros(16, 1), _ids(4, 4), torch.zeros(16, 1)], 1)
    text = torch.cat([torch.zeros(5, 3), torch.arange(5.0)[:, None]], 1)
    return dict(
        hidden_states=_draw(N, 16, 6), timestep=torch.tensor([0.1, 0.7]), encoder_hidden_states=_draw(N, 5, 12),
        img_ids=image.expand(N, -1, -1), txt_ids=text.expand(N, -1, -1), guidance=torch.tensor([1.0, 3.5]),
    )  # fmt: skip


def _qwen() -> dict[str, Any]:
    return dict(
        hidden_states=_draw(N, 16, 8), timestep=torch.tensor([0.1, 0.7]), encoder_hidden_states=_draw(N, 5, 12),
        encoder_hidden_states_mask=torch.ones(N, 5, dtype=torch.long), img_shapes=[(1, 4, 4)] * N,
    )  # fmt: skip


def _wan() -> dict[str, Any]:
    return dict(
        hidden_states=_draw(N, 4, 2, 4, 4), timestep=torch.tensor([3, 700]), encoder_hidden_states=_draw(N, 5, 12)
    )


def _sana() -> dict[str, Any]:
    return dict(
        hidden_states=_draw(N, 4, 4, 4), timestep=torch.tensor([3, 700]), encoder_hidden_states=_draw(N, 5, 12),
        encoder_attention_mask=torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
    )  # fmt: skip


def _z_image() -> dict[str, Any]:
    return dict(
        x=[_draw(4, 1, 8, 8), _draw(4, 1, 8, 8)], t=torch.tensor([0.1, 0.7]), cap_feats=[_draw(5, 12), _draw(7, 12)]
    )


def _lumina2() -> dict[str, Any]:
    return dict(
        hidden_states=_draw(N, 4, 8, 8), timestep=torch.tensor([0.1, 0.7]), encoder_hidden_states=_draw(N, 5, 12),
        encoder_attention_mask=torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
    )  # fmt: skip


def _aura() -> dict[str, Any]:
    return dict(
        hidden_states=_draw(N, 4, 8, 8), timestep=torch.tensor([0.1, 0.7]), encoder_hidden_states=_draw(N, 5, 12)
    )


# Class -> constructor arguments, what makes its inputs, and options of apply_difffit without which it trains no bias.
ZOO: dict[str, tuple[dict[str, Any], Callable[[], dict[str, Any]], dict[str, Any]]] = {
    "DiTTransformer2DModel": (
        dict(num_attention_heads=3, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=4, sample_size=8,
             num_embeds_ada_norm=5), _dit, {}),
    "PixArtTransformer2DModel": (
        dict(num_attention_heads=3, attention_head_dim=16, num_layers=4, cross_attention_dim=48, caption_channels=12,
             sample_size=8), _pixart, {}),
    "SD3Transformer2DModel": (
        dict(sample_size=8, in_channels=4, out_channels=4, num_layers=4, attention_head_dim=16, num_attention_heads=3,
             joint_attention_dim=12, caption_projection_dim=48, pooled_projection_dim=10, pos_embed_max_size=8,
             dual_attention_layers=(0,), qk_norm="rms_norm"), _sd3, {}),
    "FluxTransformer2DModel": (
        dict(in_channels=6, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=3,
             joint_attention_dim=12, pooled_projection_dim=10, guidance_embeds=True, axes_dims_rope=(4, 6, 6)), _flux, {}),
    "Flux2Transformer2DModel": (
        dict(in_channels=6, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=3,
             joint_attention_dim=12, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4)), _flux2,
        dict(add_bias=True)),
    "QwenImageTransformer2DModel": (
        dict(in_channels=8, out_channels=2, num_layers=4, attention_head_dim=16, num_attention_heads=3,
             joint_attention_dim=12, axes_dims_rope=(4, 6, 6)), _qwen, {}),
    "WanTransformer3DModel": (
        dict(num_attention_heads=3, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=12, freq_dim=16,
             ffn_dim=96, num_layers=4, rope_max_seq_len=8), _wan, {}),
    "SanaTransformer2DModel": (
        dict(in_channels=4, out_channels=4, num_attention_heads=3, attention_head_dim=16, num_layers=4,
             num_cross_attention_heads=3, cross_attention_head_dim=16, cross_attention_dim=48, caption_channels=12,
             sample_size=4), _sana, {}),
    "ZImageTransformer2DModel": (
        dict(in_channels=4, dim=48, n_layers=2, n_refiner_layers=1, n_heads=3, n_kv_heads=3, cap_feat_dim=12,
             axes_dims=[4, 6, 6], axes_lens=[64, 8, 8]), _z_image, {}),
    "Lumina2Transformer2DModel": (
        dict(sample_size=8, in_channels=4, hidden_size=48, num_layers=2, num_refiner_layers=1, num_attention_heads=3,
             num_kv_heads=1, multiple_of=16, axes_dim_rope=(4, 6, 6), axes_lens=(64, 8, 8), cap_feat_dim=12), _lumina2, {}),
    "AuraFlowTransformer2DModel": (
        dict(sample_size=8, in_channels=4, num_mmdit_layers=2, num_single_dit_layers=2, attention_head_dim=16,
             num_attention_heads=3, joint_attention_dim=12, caption_projection_dim=48, pos_embed_max_size=16), _aura,
        dict(add_bias=True)),
}  # fmt: skip


def make(name: str, seed: int = 0, **changes: Any) -> nn.Module:
    """A tiny model of this class, every parameter of it alive: none is zero, and biases are not small."""
    import diffusers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(diffusers, name)(**{**ZOO[name][0], **changes})
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.05 * torch.randn_like(p))
            _alike(model)
    return model.eval()


def _alike(model: nn.Module) -> None:
    """What a DiT's checkpoint holds once, diffusers keeps in every block, with equal values."""
    blocks = getattr(model, "transformer_blocks", [])
    for block in list(blocks)[1:]:
        if getattr(getattr(block, "norm1", None), "emb", None) is not None:
            block.norm1.emb.load_state_dict(blocks[0].norm1.emb.state_dict())


def inputs(name: str, seed: int = 1) -> dict[str, Any]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ZOO[name][1]()


def run(model: nn.Module, arguments: dict[str, Any]) -> Tensor:
    """The output as one tensor."""
    out = model(**arguments, return_dict=False)
    out = out[0] if isinstance(out, tuple) else out
    return torch.stack(list(out)) if isinstance(out, (list, tuple)) else out
