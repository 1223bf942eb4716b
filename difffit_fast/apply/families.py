"""What is known of each diffusers transformer by the name of its class, and the rule for all others.

| class | γ behind | affine LayerNorm added, folded into |
|---|---|---|
| DiTTransformer2DModel | attention, MLP | all, each block's own modulation |
| PixArtTransformer2DModel | self- and cross-attention, MLP | none: one modulation for all blocks; each block's table trains |
| SD3Transformer2DModel | attention of image and text (and the second one), both MLPs | all |
| FluxTransformer2DModel | the same; in single blocks attention and MLP at once | all |
| Flux2Transformer2DModel | the same | none: one modulation for all blocks |
| QwenImageTransformer2DModel | attention and MLP of image and text | all |
| WanTransformer3DModel | self- and cross-attention, MLP | none: as PixArt |
| SanaTransformer2DModel | self- and cross-attention, and the convolution that ends its MLP | none: as PixArt |
| ZImageTransformer2DModel | the weight of the RMSNorm behind each branch is its γ | the last one (a weight only) |
| Lumina2Transformer2DModel | as Z-Image | the last one (a weight only) |
| AuraFlowTransformer2DModel | attention and MLP of image and text | all, where ``add_bias`` gives the modulation a bias |
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

Pairs = tuple[tuple[int | None, int], ...]  # chunks of a modulation that are shift (or none) and scale


@dataclass(frozen=True)
class Modulated:
    """A LayerNorm x̂·(1 + scale) + shift whose scale and shift are chunks of what a linear of its own gives.

    ``norm`` and ``linear`` are paths in the model; ``*`` stands for one name, the same in both.
    """

    norm: str
    linear: str
    pairs: Pairs


@dataclass(frozen=True)
class Family:
    """Where the branches of a class of transformers end. Patterns are regular expressions for paths inside of a block.

    Attributes:
        blocks: the lists of blocks, in the order in which they run; empty: every list of the model that has branches.
        attention, mlp: the last linear (or convolution) of the branches.
        both: the last linear of an attention and an MLP that are computed side by side.
        qkv: the linears that make queries, keys and values.
        modulated: LayerNorms whose modulation is not in the module that holds them (for those: :data:`HOLDERS`).
        tied: modules that every block has a copy of, with equal values: what trains in them is one parameter.
    """

    blocks: tuple[str, ...] = ("transformer_blocks",)
    attention: str = (
        r"(.*\.)?(to_out\.0|to_out|to_add_out|attn\.(proj|out_proj)|\w+_attn_proj|\w+_attention\.out_layer)"
    )
    mlp: str = (
        r"(.*\.)?(ff|ffn|ff_context|mlp|\w+_mlp|feed_forward)\."
        r"(net\.2|linear_out|out_projection|out_layer|fc2|down_proj|down)"
    )
    both: str = r"proj_out"
    qkv: str = r"(.*\.)?(to_q|to_k|to_v|add_q_proj|add_k_proj|add_v_proj|qkv|q_proj|k_proj|v_proj)"
    modulated: tuple[Modulated, ...] = ()
    tied: str = ""


NOWHERE = r"(?!)"
SHIFT_SCALE: Pairs = ((0, 1),)
MLP_SHIFT_SCALE: Pairs = ((3, 4),)


def _second(block: str, norm: str, linear: str) -> Modulated:
    """The LayerNorm before the MLP, which the modulation of the one before the attention serves as well."""
    return Modulated(f"{block}.*.{norm}", f"{block}.*.{linear}", MLP_SHIFT_SCALE)


_JOINT = (
    _second("transformer_blocks", "norm2", "norm1.linear"),
    _second("transformer_blocks", "norm2_context", "norm1_context.linear"),
)
_BY_NORM = Family(
    blocks=("noise_refiner", "context_refiner", "siglip_refiner", "layers"), attention=NOWHERE, mlp=NOWHERE
)

FAMILIES: dict[str, Family] = {
    "DiTTransformer2DModel": Family(
        modulated=(
            _second("transformer_blocks", "norm3", "norm1.linear"),
            Modulated("norm_out", "proj_out_1", SHIFT_SCALE),
        ),
        tied=r"norm1\.emb",
    ),
    "PixArtTransformer2DModel": Family(),
    "SD3Transformer2DModel": Family(modulated=_JOINT),
    "FluxTransformer2DModel": Family(blocks=("transformer_blocks", "single_transformer_blocks"), modulated=_JOINT),
    "Flux2Transformer2DModel": Family(
        blocks=("transformer_blocks", "single_transformer_blocks"),
        attention=r"attn\.(to_out\.0|to_add_out)",
        both=r"attn\.to_out",
    ),
    "QwenImageTransformer2DModel": Family(
        modulated=tuple(
            Modulated(f"transformer_blocks.*.{stream}_norm{k}", f"transformer_blocks.*.{stream}_mod.1", pairs)
            for stream in ("img", "txt")
            for k, pairs in ((1, SHIFT_SCALE), (2, MLP_SHIFT_SCALE))
        ),
    ),
    "WanTransformer3DModel": Family(blocks=("blocks",)),
    "SanaTransformer2DModel": Family(mlp=r"ff\.conv_point"),
    "ZImageTransformer2DModel": Family(
        blocks=_BY_NORM.blocks,
        attention=NOWHERE,
        mlp=NOWHERE,
        modulated=(Modulated("all_final_layer.*.norm_final", "all_final_layer.*.adaLN_modulation.1", ((None, 0),)),),
    ),
    "Lumina2Transformer2DModel": _BY_NORM,
    "AuraFlowTransformer2DModel": Family(
        blocks=("joint_transformer_blocks", "single_transformer_blocks"),
        modulated=(
            _second("joint_transformer_blocks", "norm2", "norm1.linear"),
            _second("joint_transformer_blocks", "norm2_context", "norm1_context.linear"),
            _second("single_transformer_blocks", "norm2", "norm1.linear"),
        ),
    ),
}
OTHERS = Family(blocks=())

# Modules of diffusers that hold a LayerNorm and the linear that modulates it: their names there, and shift and scale by the
# number of chunks that the linear gives.
HOLDERS: dict[str, tuple[str, str, dict[int, Pairs]]] = {
    "AdaLayerNormZero": ("norm", "linear", {6: SHIFT_SCALE}),
    "AdaLayerNormZeroSingle": ("norm", "linear", {3: SHIFT_SCALE}),
    "SD35AdaLayerNormZeroX": ("norm", "linear", {9: ((0, 1), (6, 7))}),
    "AdaLayerNormContinuous": ("norm", "linear", {2: ((1, 0),)}),
    "LuminaLayerNormContinuous": ("norm", "linear_1", {1: ((None, 0),)}),
}
TIME_EMBEDDERS = ("TimestepEmbedding", "TimestepEmbedder")  # the MLPs that embed a number: timestep, guidance, size
CLASS_EMBEDDERS = ("LabelEmbedding", "LabelEmbedder")
TABLES = ("scale_shift_table", "modulate_table")  # ends of the names of loose parameters that are a modulation's biases


def family_of(model: nn.Module) -> Family:
    """The row of the class of ``model``, or of one that it derives from; :data:`OTHERS` where there is none."""
    return next((FAMILIES[cls.__name__] for cls in type(model).__mro__ if cls.__name__ in FAMILIES), OTHERS)
