"""Feature extractors: what turns images into the vectors that are compared.

Three come by name, anything else as a callable from uint8 images [n, 3, H, W] to features [n, D].
"""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._extras import require
from ..errors import DiffFitError
from .inception import INPUT_SIZE, WEIGHTS_SHA256, load_inception, random_inception
from .resize import tf1_resize

__all__ = ["FEATURES", "Extractor", "get_extractor"]

DINOV2_ENV = "DIFFFIT_FAST_DINOV2"
FEATURES = {
    "inception": "InceptionV3 of FID; needs its published weights",
    "random-inception": "InceptionV3 with seeded random weights; ranks, but is no FID",
    "dinov2": "class token of a local DINOv2 in the format of transformers",
}


@dataclass
class Extractor:
    """Images to features.

    Attributes:
        name: ``inception``, ``random-inception``, ``dinov2`` or the callable's own.
        label: what a report calls the features: says whether the numbers are the standard ones.
        identity: equal for two extractors if and only if their features can be compared; None where nobody can tell, so
            that nothing is cached.
        prepare: uint8 images [n, 3, H, W] to the network's input; images of one size.
        network: that input to ``{"pool": [n, D]}``, with ``"spatial"`` and ``"logits"`` where there are such.
        outputs: the names that ``network`` returns.
        common_input: whether inputs of images of different sizes can be batched together after ``prepare``.
    """

    name: str
    label: str
    identity: str | None
    prepare: Callable[[Tensor], Tensor]
    network: Callable[[Tensor], dict[str, Tensor]]
    outputs: tuple[str, ...] = ("pool",)
    common_input: bool = True

    def __call__(self, images: list[Tensor], device: torch.device) -> dict[str, Tensor]:
        """Features of uint8 ``images`` [3, H, W], each of any size, in their order."""
        if not images:
            raise DiffFitError("no images to extract features from")
        groups: dict[torch.Size, list[int]] = {}
        for i, image in enumerate(images):
            groups.setdefault(image.shape, []).append(i)
        order = [i for members in groups.values() for i in members]
        with torch.inference_mode(), _exact_convolutions(device):
            stacks = [torch.stack([images[i] for i in members]).to(device) for members in groups.values()]
            inputs = [self.prepare(stack) for stack in stacks]
            if self.common_input:
                inputs = [torch.cat(inputs)]
            parts = [self.network(x) for x in inputs]
            back = torch.tensor(order, device="cpu").argsort()
            merged = {}
            for name in self.outputs:
                values = torch.cat([self._checked(part[name], len(x)) for part, x in zip(parts, inputs, strict=True)])
                merged[name] = values[back.to(values.device)]
        return merged

    def _checked(self, features: Any, count: int) -> Tensor:
        if not isinstance(features, Tensor) or features.dim() != 2 or len(features) != count:
            what = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise DiffFitError(
                f"the features {self.name!r} must be a tensor [{count}, D] for {count} images; got {what}"
            )
        if features.is_complex() or not features.shape[1]:
            what = f"{features.dtype} {tuple(features.shape)}"
            raise DiffFitError(f"the features {self.name!r} must be real and at least one; got {what}")
        return features.float() if not features.is_floating_point() else features


def get_extractor(
    features: str | Callable[[Tensor], Tensor] | Extractor = "inception",
    *,
    device: torch.device | str = "cpu",
    inception_weights: str | os.PathLike[str] | None = None,
    check_weights: bool = True,
    dinov2_path: str | os.PathLike[str] | None = None,
    seed: int = 0,
) -> Extractor:
    """The extractor of that name, or one around a callable.

    Args:
        features: a name of :data:`FEATURES`; or a callable (an ``nn.Module`` too) from uint8 images [n, 3, H, W] on
            ``device`` to features [n, D]. A function whose statistics are to be cached has an attribute ``identity``, a
            text that changes when it does; a module is known by its class and weights.
        inception_weights, check_weights: see :func:`difffit_fast.evaluate.inception.load_inception`.
        dinov2_path: folder of a DINOv2 saved by transformers; default ``$DIFFFIT_FAST_DINOV2``.
        seed: of ``random-inception``.
    """
    device = torch.device(device)
    if isinstance(features, Extractor):
        return features
    if features == "inception":
        network, digest = load_inception(inception_weights, check_weights)
        published = digest.startswith(WEIGHTS_SHA256)
        label = "Inception" if published else f"Inception, weights {digest[:8]} (NOT the published ones: not FID)"
        return _inception(network.to(device), "inception", label, f"inception:{digest}")
    if features == "random-inception":
        label = f"random-weight Inception, seed {seed} (NOT FID: ranks only)"
        return _inception(random_inception(seed).to(device), features, label, f"random-inception:{seed}")
    if features == "dinov2":
        return _dinov2(dinov2_path or os.environ.get(DINOV2_ENV), device)
    if isinstance(features, str):
        raise DiffFitError(f"unknown features {features!r}; expected one of {', '.join(FEATURES)}, or a callable")
    if callable(features):
        return _custom(features, device)
    raise DiffFitError(f"features must be a name or a callable; got {type(features).__name__}")


def _inception(network: nn.Module, name: str, label: str, identity: str) -> Extractor:
    def prepare(images: Tensor) -> Tensor:
        return tf1_resize(images, INPUT_SIZE).sub_(128).mul_(1 / 128)

    return Extractor(
        name, label, identity, prepare, lambda x: network(x)._asdict(), outputs=("pool", "spatial", "logits")
    )


def _dinov2(path: str | os.PathLike[str] | None, device: torch.device) -> Extractor:
    """The class token after the last normalisation, images resized to 224 × 224 (bicubic, antialiased)."""
    if not path:
        raise DiffFitError(
            "features 'dinov2' need a local DINOv2: name its folder (config.json and weights, as transformers saves "
            f"them, e.g. facebook/dinov2-large) with --dinov2-path or {DINOV2_ENV}; nothing is downloaded"
        )
    transformers = require("transformers", "eval", "DINOv2 features")
    try:
        network = transformers.AutoModel.from_pretrained(os.fspath(path), local_files_only=True)
    except (OSError, ValueError) as error:
        raise DiffFitError(f"no DINOv2 could be loaded from {os.fspath(path)}: {str(error).splitlines()[0]}") from error
    kind = getattr(network.config, "model_type", "?")
    if not kind.startswith("dinov2"):
        raise DiffFitError(f"{os.fspath(path)} holds a model of type {kind!r}; expected dinov2")
    network = network.to(device).eval().requires_grad_(False)
    mean = torch.tensor([0.485, 0.456, 0.406], device=device)[
        :, None, None
    ]  # of ImageNet, which DINOv2 was trained with
    std = torch.tensor([0.229, 0.224, 0.225], device=device)[:, None, None]

    def prepare(images: Tensor) -> Tensor:
        x = F.interpolate(images.float(), size=(224, 224), mode="bicubic", antialias=True, align_corners=False)
        return (x.clamp(0, 255) / 255 - mean) / std

    def run(x: Tensor) -> dict[str, Tensor]:
        return {"pool": network(pixel_values=x).last_hidden_state[:, 0]}

    label = f"DINOv2 ({os.path.basename(os.path.normpath(path))})"
    return Extractor("dinov2", label, f"dinov2:{_digest(network)}", prepare, run)


def _digest(network: nn.Module) -> str:
    """SHA-256 of a network's parameters and buffers, so that moving its file changes nothing."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        if isinstance(tensor, Tensor):
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _custom(function: Callable[[Tensor], Tensor], device: torch.device) -> Extractor:
    name = getattr(function, "name", None) or getattr(function, "__name__", None) or type(function).__name__
    identity = getattr(function, "identity", None)
    if isinstance(function, nn.Module):
        function = function.to(device).eval()
        identity = identity or f"{type(function).__qualname__}:{_digest(function)}"
    return Extractor(
        str(name),
        f"features {name!r}",
        None if identity is None else f"custom:{identity}",
        prepare=lambda images: images,
        network=lambda x: {"pool": function(x)},
        common_input=False,
    )


def _exact_convolutions(device: torch.device) -> Any:
    """Convolutions in float32 proper: TF32, which PyTorch allows by default on CUDA, shifts the third digit of an FID."""
    if device.type != "cuda":
        return nullcontext()
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)


def resolve_features(name: str) -> Any:
    """``package.module:function`` as the function, found from the working folder too; any other name as it is."""
    module, colon, attribute = name.partition(":")
    if not colon:
        return name
    sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise DiffFitError(f"--features {name}: {error}") from error
    finally:
        sys.path.remove(os.getcwd())
    if not callable(found):
        raise DiffFitError(f"--features {name}: expected a callable; it is a {type(found).__name__}")
    return found
