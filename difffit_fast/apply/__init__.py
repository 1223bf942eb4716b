"""DiffFit for the transformers of diffusers, in place.

>>> from difffit_fast import apply_difffit
>>> model = apply_difffit(PixArtTransformer2DModel.from_pretrained(..., torch_dtype=torch.bfloat16))  # doctest: +SKIP
>>> optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=1e-3, weight_decay=0.0)  # doctest: +SKIP
>>> model.save_delta("style.safetensors"); model.merge_(); model.save_pretrained("merged")  # doctest: +SKIP
"""

from .model import DiffFitModel, apply_difffit

__all__ = ["DiffFitModel", "apply_difffit"]
