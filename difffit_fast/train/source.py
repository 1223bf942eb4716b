"""Where samples come from: the data, the autoencoder, and the shape of what the diffusion model sees."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ..data import ImageFolder, LatentSpace, PixelSpace, TrainingData, load_vae, open_data
from ..data.shards import INDEX_FILE
from ..errors import DiffFitError
from .config import TrainConfig


@dataclass
class Source:
    """The data of a run and the autoencoder that goes with it.

    Attributes:
        data, validation: what is trained on, and what is only looked at; None where nothing was named for that.
        vae: the autoencoder's name, "none" for pixels; cached features know what made them.
        encoder: encodes images as they are loaded; None where the data is what the model sees.
        decoder: makes pictures of samples; None where there is nothing to decode them with.
        channels, size: C and H = W of what the model sees.
    """

    data: TrainingData
    validation: TrainingData | None
    vae: str
    encoder: LatentSpace | None
    decoder: LatentSpace | PixelSpace | None
    channels: int
    size: int


def open_source(
    config: TrainConfig,
    device: torch.device,
    data: TrainingData | None,
    validation: TrainingData | None,
    channels: int | None = None,
    image_size: int | None = None,
) -> Source:
    """Open what the settings name, and load the autoencoder where one is needed.

    Args:
        data, validation: the data itself, in place of a path.
        channels: of the model, where it is known: images without an autoencoder are read as gray for a model of one.
        image_size: of the base in pixels, where there is one: the size of images for which no setting names another.

    Raises:
        DiffFitError: something is missing, or does not fit the rest.
    """
    if data is None:
        size = config.image_size if config.feature_path or config.image_size else image_size or 256
        gray = channels == 1 and config.vae.lower() == "none"
        data = open_data(
            config.data_path, config.feature_path, size, flip=config.flip == "horizontal", channels=1 if gray else 3
        )
    elif config.data_path or config.feature_path:
        raise DiffFitError("give the data itself or a path to it, not both")
    elif config.flip == "none" and getattr(data, "flip", False):
        raise DiffFitError("the given data mirrors images, and --flip is none; make it with flip=False")
    if validation is None and config.val_path is not None:
        validation = _open_validation(config.val_path, data)

    vae, encoder = getattr(data, "vae", config.vae), None
    channels, size = data.channels, data.size
    on_pixels = data.size == data.image_size
    if isinstance(data, ImageFolder):
        if vae.lower() != "none":
            encoder = load_vae(vae, device)
            if data.size % encoder.factor:
                raise DiffFitError(f"--image-size must be a multiple of {encoder.factor} for this VAE; got {data.size}")
            channels, size = encoder.channels, data.size // encoder.factor
    elif on_pixels:
        vae = "none"

    decoder: LatentSpace | PixelSpace | None = encoder
    if encoder is None and on_pixels:
        decoder = PixelSpace()
    elif encoder is None and (config.sample_every or config.fid_every):  # cached latents need it for samples alone
        decoder = load_vae(vae, device)
    return Source(data, validation, vae, encoder, decoder, channels, size)


def _open_validation(path: str, data: TrainingData) -> TrainingData:
    cached = (Path(path) / INDEX_FILE).is_file()
    where = {"feature_path": path} if cached else {"path": path}
    other = open_data(
        image_size=data.image_size, flip=False, class_names=data.class_names,
        channels=1 if data.channels == 1 else 3, **where,
    )  # fmt: skip
    if (other.channels, other.size) != (data.channels, data.size):
        raise DiffFitError(
            f"--val-path {path} gives {other.channels} x {other.size} x {other.size} and the training data "
            f"{data.channels} x {data.size} x {data.size}; both must be images or both cached features"
        )
    return other
