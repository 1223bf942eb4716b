"""DiT as its authors compute it, for diffusers.

What diffusers' own class cannot be told by its configuration: the exponents of the timestep frequencies are divided by their
number (``downscale_freq_shift`` 0, not 1), and the coordinates of the table of positions may be scaled. Rows of the class table
are those that ``DiTPipeline`` asks for: 1000 is the null class, classes from 1000 on lie one row further.
"""

from diffusers import DiTTransformer2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import get_2d_sincos_pos_embed


class OriginalDiTTransformer2DModel(DiTTransformer2DModel):
    """``DiTTransformer2DModel`` with the function of the original DiT; its state dict has the same keys and shapes.

    Args:
        num_classes: without the null class.
        class_dropout_prob: how often training drops a label; 0: there is no null class, and no guidance.
        pos_embed_scale: of the coordinates of the table of positions.
        downscale_freq_shift: subtracted from the number of timestep frequencies.
        all others: of ``DiTTransformer2DModel``.
    """

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        in_channels: int = 4,
        out_channels: int = 8,
        num_layers: int = 28,
        attention_bias: bool = True,
        sample_size: int = 32,
        patch_size: int = 2,
        activation_fn: str = "gelu-approximate",
        num_embeds_ada_norm: int = 1000,
        norm_type: str = "ada_norm_zero",
        norm_elementwise_affine: bool = False,
        norm_eps: float = 1e-6,
        num_classes: int = 1000,
        class_dropout_prob: float = 0.1,
        pos_embed_scale: float = 1.0,
        downscale_freq_shift: int = 0,
    ) -> None:
        super().__init__(
            num_attention_heads=num_attention_heads, attention_head_dim=attention_head_dim, in_channels=in_channels,
            out_channels=out_channels, num_layers=num_layers, attention_bias=attention_bias, sample_size=sample_size,
            patch_size=patch_size, activation_fn=activation_fn, num_embeds_ada_norm=num_embeds_ada_norm,
            norm_type=norm_type, norm_elementwise_affine=norm_elementwise_affine, norm_eps=norm_eps,
        )  # fmt: skip
        for block in self.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = downscale_freq_shift
            block.norm1.emb.class_embedder.dropout_prob = class_dropout_prob
        side = sample_size // patch_size
        table = get_2d_sincos_pos_embed(
            self.inner_dim, side, base_size=side, interpolation_scale=1 / pos_embed_scale, output_type="pt"
        )
        self.pos_embed.pos_embed.copy_(table.float()[None])
