"""Sampling: from labels to images, grids, folders and ADM ``.npz`` files.

>>> from difffit_fast import Sampler, load_model
>>> from difffit_fast.sample import save_grid
>>> loaded = load_model("DiT-XL-2-256x256.pt", delta="food101.safetensors")        # doctest: +SKIP
>>> sampler = Sampler(loaded.model, "dpm++", 20, cfg_scale=4.0, vae="ema")         # doctest: +SKIP
>>> save_grid(sampler.sample([3, 14, 15, 92], seed=0), "sample.png")               # doctest: +SKIP
"""

from .folder import Target, sample_to_folder, sample_to_folders, write_npz
from .images import save_grid, save_png, to_uint8
from .sampler import SAMPLERS, Sampler, image_generators, resolve_labels

__all__ = [
    "SAMPLERS",
    "Sampler",
    "Target",
    "image_generators",
    "resolve_labels",
    "sample_to_folder",
    "sample_to_folders",
    "save_grid",
    "save_png",
    "to_uint8",
    "write_npz",
]
