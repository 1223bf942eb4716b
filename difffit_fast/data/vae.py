"""The image autoencoder: diffusers' ``AutoencoderKL``, or none.

Both classes speak the same four words (``channels``, ``factor``, ``encode``, ``decode``), so whoever samples or
extracts does not ask which one it holds.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._extras import require
from ..errors import DiffFitError

SCALING_FACTOR = 0.18215  # of the Stable Diffusion VAE: 1 / standard deviation of its latents (Rombach et al., 2022)
NAMES = {"ema": "stabilityai/sd-vae-ft-ema", "mse": "stabilityai/sd-vae-ft-mse"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def sample_moments(moments: Tensor, noise: Tensor, scale: float = SCALING_FACTOR, shift: float = 0.0) -> Tensor:
    """A latent from VAE moments: ``(mean + exp(logvar / 2) * noise - shift) * scale``, float32.

    Args:
        moments: ``[..., 2C, h, w]``, mean and log-variance along the channels.
        noise: standard normal, ``[..., C, h, w]``.
    """
    mean, logvar = moments.to(torch.float32).chunk(2, dim=-3)
    return torch.exp(0.5 * logvar).mul_(noise).add_(mean).sub_(shift).mul_(scale)


class PixelSpace:
    """No autoencoder: the diffusion model works on the pixels themselves (``--vae none``)."""

    name = "none"
    channels = 3
    factor = 1
    scale = 1.0
    shift = 0.0

    def fingerprint(self) -> str:
        """Tells two autoencoders apart; this one is always the same."""
        return "none"

    def encode(self, images: Tensor) -> Tensor:
        """Images float ``[N, 3, H, W]`` in [-1, 1]: the identity."""
        return images

    def decode(self, latents: Tensor) -> Tensor:
        """``[N, 3, H, W]`` clamped to [-1, 1]."""
        return latents.clamp(-1, 1)

    def to(self, device: torch.device | str) -> PixelSpace:
        return self


class LatentSpace:
    """An ``AutoencoderKL`` with the scale of its latents.

    Attributes:
        name: how it was asked for.
        channels: latent channels (4 for Stable Diffusion's).
        factor: pixels per latent cell along a side (8 for Stable Diffusion's).
        scale, shift: a latent z becomes ``(z - shift) * scale`` for the diffusion model.
    """

    def __init__(self, model: torch.nn.Module, name: str) -> None:
        self.model = model.eval().requires_grad_(False)
        self.name = name
        config = model.config
        self.channels = int(config.latent_channels)
        self.factor = 2 ** (len(config.block_out_channels) - 1)
        self.scale = float(getattr(config, "scaling_factor", None) or SCALING_FACTOR)
        self.shift = float(getattr(config, "shift_factor", None) or 0.0)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def to(self, device: torch.device | str) -> LatentSpace:
        self.model.to(device)
        return self

    def fingerprint(self) -> str:
        """sha256 over names, shapes and float32 values of all weights: the same model under any name or path."""
        digest = hashlib.sha256()
        for key, value in sorted(self.model.state_dict().items()):
            digest.update(f"{key}{tuple(value.shape)}".encode())
            digest.update(value.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
        return digest.hexdigest()

    @torch.inference_mode()
    def encode(self, images: Tensor) -> Tensor:
        """Images ``[N, 3, H, W]`` in [-1, 1] to moments float32 ``[N, 2 * channels, H / factor, W / factor]``.

        The mean and the log-variance (clamped to [-30, 20] as diffusers does), unscaled; see :func:`sample_moments`.
        """
        posterior = self.model.encode(images.to(self.device, self.dtype)).latent_dist
        return torch.cat([posterior.mean, posterior.logvar], dim=1).to(torch.float32)

    @torch.inference_mode()
    def decode(self, latents: Tensor, batch_size: int = 8) -> Tensor:
        """The diffusion model's latents ``[N, channels, h, w]`` to images float32 ``[N, 3, H, W]`` in [-1, 1].

        Works through ``batch_size`` latents at a time: decoding needs far more memory than the diffusion model.
        """
        size = self.factor
        out = torch.empty(len(latents), 3, latents.shape[2] * size, latents.shape[3] * size, device=latents.device)
        for start in range(0, len(latents), batch_size):
            z = latents[start : start + batch_size].to(self.device, torch.float32) / self.scale + self.shift
            out[start : start + batch_size] = self.model.decode(z.to(self.dtype)).sample.to(out.device, torch.float32)
        return out.clamp_(-1, 1)


def vae_of(header: Mapping[str, Any], channels: int | None) -> str:
    """Name of the autoencoder of a model, where nobody says: that of its training, else by what it sees.

    Args:
        header: what the model's file records.
        channels: of what the model sees; None where that is not known.
    """
    return header.get("vae") or ("ema" if channels in (None, 4) else "none")


def load_vae(
    name_or_path: str | os.PathLike[str], device: torch.device | str = "cpu", precision: str = "fp32"
) -> LatentSpace | PixelSpace:
    """The autoencoder called ``name_or_path``.

    Args:
        name_or_path: ``"ema"`` or ``"mse"`` (``stabilityai/sd-vae-ft-*``), a local directory in diffusers' layout
            (or one with such a ``vae`` sub-folder), a hub name ``owner/model``, or ``"none"`` for pixels.
        precision: ``"fp32"``, ``"bf16"`` or ``"fp16"``: the data type of its weights.

    Raises:
        DiffFitError: diffusers is not installed, or there are no such weights here and none can be fetched.
    """
    if precision not in DTYPES:
        raise DiffFitError(f"the precision must be one of {', '.join(DTYPES)}, got {precision!r}")
    name = os.fspath(name_or_path)
    if name.lower() == "none":
        return PixelSpace()
    source = NAMES.get(name, name)
    local = Path(source).expanduser()
    options: dict[str, object] = {"torch_dtype": DTYPES[precision]}
    if local.is_dir():
        if not (local / "config.json").is_file():
            if not (local / "vae" / "config.json").is_file():
                raise DiffFitError(
                    f"the folder {local} holds no VAE: expected config.json and weights as diffusers saves them"
                )
            options["subfolder"] = "vae"
        source = str(local)
    elif local.is_absolute() or source.startswith((".", "~")) or source.count("/") != 1:
        raise DiffFitError(
            f"no VAE {name!r}: expected ema, mse, none, a folder that exists, or a hub name such as {NAMES['ema']}"
        )
    diffusers = require("diffusers", "vae", "the VAE")
    try:
        try:  # what is on this disk already needs no network, and no waiting for one that is down
            model = diffusers.AutoencoderKL.from_pretrained(source, local_files_only=True, **options)
        except Exception:
            if local.is_dir():
                raise
            model = diffusers.AutoencoderKL.from_pretrained(source, **options)
    except Exception as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        where = "in that folder" if local.is_dir() else "in the local cache, and the hub did not give it"
        raise DiffFitError(
            f"the VAE {source!r} could not be loaded: not {where} ({first_line}); "
            "without a network, download it elsewhere and pass its folder to --vae"
        ) from error
    return LatentSpace(model, name).to(device)
