"""What the experiments on glyphs measure: are samples read, in which style, how far are they from real ones, are they copies.

Images are (N, 1, S, S), S a multiple of 24: uint8 (ink is 255), or floating in [-1, 1] as a model makes them. Every number
of samples is to be read beside the same number of real glyphs of families that were never shown: the reader errs, too.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from alphabet import ALPHABETS, Glyphs
from reader import NAMES, SIDE, Reader, as_input, load_reader, without_case
from torch import Tensor, nn
from torch.nn import functional as F

from difffit_fast.diffusion import create_diffusion
from difffit_fast.errors import DiffFitError
from difffit_fast.evaluate import RunningStatistics, frechet_distance

READER = (
    Path(__file__).resolve().parents[2] / "examples" / "hand" / "reader.safetensors"
)  # as reader.py and hand.py made it
RARE = 0.01  # share of real glyphs that may pass for copies
NOTHING = 1e-5  # a distance that rounding may make of zero


# -- read by the instrument --------------------------------------------------------------------------------------------
def letters_read(
    images: Tensor, labels: Tensor, reader: Reader, alphabet: str = "letters", merge_cases: bool = False
) -> float:
    """The share of the images that the reader takes for what they should be.

    Args:
        images: (N, 1, S, S).
        labels: (N,) long, places in the alphabet.
        alphabet: the only characters that the reader may answer: letters, digits or greek.
        merge_cases: do not tell c from C, nor l from I, see :func:`reader.without_case`.

    Raises:
        DiffFitError: labels that are none of the alphabet's, or not one for each image.
    """
    count = len(ALPHABETS[alphabet])
    if labels.shape != images.shape[:1] or not 0 <= int(labels.min()) <= int(labels.max()) < count:
        raise DiffFitError(f"expected {len(images)} labels in 0 … {count - 1}; got {tuple(labels.shape)}")
    if merge_cases and alphabet != "letters":
        raise DiffFitError(f"only letters have two cases; got {alphabet}")
    found = reader.read(images).characters[alphabet].argmax(1)
    if merge_cases:
        found, labels = without_case(found), without_case(labels)
    return float((found == labels).double().mean())


def style_read(images: Tensor, style: str, reader: Reader) -> float:
    """The mean probability that the reader gives to ``style`` (one of its ``NAMES``, all equally likely before it looks).

    One glyph rarely tells a hand from a plain font: real handwriting does not come near 1, nor the base near 0.
    """
    if style not in NAMES:
        raise DiffFitError(f"expected one of the styles {', '.join(NAMES)}; got {style}")
    return float(reader.read(images).style.double().softmax(1)[:, NAMES.index(style)].mean())


def frechet(images: Tensor, reference: Tensor, reader: Reader) -> float:
    """The squared Fréchet distance between two sets of images in the reader's 64 features, each of variance 1 over its lessons.

    It grows as the sets shrink: compare distances of equally many images to the same reference only. No set of fewer than
    65 images has a covariance of full rank; the warning of that is left out, since references here may have hardly more.
    """
    moments = []
    for each in (images, reference):
        statistics = RunningStatistics()
        statistics.update(reader.read(each).features)
        moments += [statistics.mean, statistics.covariance]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="singular covariance")
        return frechet_distance(*moments)


# -- copies ------------------------------------------------------------------------------------------------------------
def nearest(images: Tensor, others: Tensor, batch: int = 1024) -> Tensor:
    """The distance of each image to the nearest of ``others``, (N,) float32: 0 is the same image, 1 has no ink in common.

    d(a, b) = ‖a − b‖² / (‖a‖² + ‖b‖²) with ink in [0, 1], the least of it over shifts by at most one pixel of 24. It does
    not hang on how much ink there is, as plain differences do, by which thin letters are near to everything.
    """
    a, b = ((as_input(x) + 1) / 2 for x in (images, others))
    result = torch.full((len(a),), torch.inf)
    for there in F.pad(b, (1, 1, 1, 1)).split(batch):
        for down, right in ((down, right) for down in range(3) for right in range(3)):
            moved = there[:, :, down : down + SIDE, right : right + SIDE].flatten(1)
            ink = (moved**2).sum(1)
            for first, here in zip(range(0, len(a), batch), a.flatten(1).split(batch), strict=True):
                total = (here**2).sum(1, keepdim=True) + ink
                distance = (1 - 2 * (here @ moved.T) / total.clamp_min(1e-6)).min(1).values
                result[first : first + batch] = torch.minimum(result[first : first + batch], distance)
    return torch.where(result < NOTHING, 0, result)


def copy_threshold(shown: Tensor, held_out: Tensor, families: Sequence[str], rare: float = RARE) -> float:
    """How much nearer to ``shown`` than to other unseen glyphs one real glyph in a hundred is, by chance.

    Distances alone tell no copies: an l is near to every l, and a g to no other g. So the distance of an image to the
    nearest shown one is divided by that to the nearest ``held_out`` one: glyphs of families that were never shown. For
    each of these themselves, whose nearest is looked for in the other families, the quotient is what chance makes of it;
    the threshold is its ``rare`` quantile. That takes account of how many images were shown as well.

    Args:
        shown: (M, 1, S, S), what the model was trained on.
        held_out: (N, 1, S, S), not too few: with fewer than 1 / ``rare`` the threshold is about their least quotient.
        families: of the held-out ones, (N,); relatives should have one name.
        rare: the share of real glyphs that may pass for copies.

    Raises:
        DiffFitError: not one family for each image, or only one family.
    """
    names = sorted(set(families))
    if len(families) != len(held_out) or len(names) < 2:
        raise DiffFitError(
            f"expected the families of {len(held_out)} images, two at least; got {len(families)}: {names[:3]}"
        )
    own = torch.tensor([names.index(family) for family in families])
    among = torch.empty(len(held_out))
    for i in range(len(names)):
        among[own == i] = nearest(held_out[own == i], held_out[own != i])
    quotients = nearest(held_out, shown) / among.clamp_min(NOTHING)
    return max(NOTHING, float(quotients.double().quantile(rare)))


def memorised(samples: Tensor, shown: Tensor, held_out: Tensor, families: Sequence[str], rare: float = RARE) -> float:
    """The share of samples that are copies of a shown image, by :func:`copy_threshold`.

    A model that has learned the style and no image by heart has about ``rare`` of them; copies have 1, with a little
    noise as well.
    """
    quotients = nearest(samples, shown) / nearest(samples, held_out).clamp_min(NOTHING)
    return float((quotients <= copy_threshold(shown, held_out, families, rare)).double().mean())


# -- the model itself --------------------------------------------------------------------------------------------------
@torch.no_grad()
def denoising_loss(
    model: nn.Module, images: Tensor, labels: Tensor, seed: int = 0, rounds: int = 1, batch: int = 256
) -> float:
    """DiT's loss of a pixel model on ``images``: the same noise and timesteps for the same seed and number of images.

    The timesteps of a round lie one in each of N equal parts of 0 … 999, which takes most of the chance out of their
    mean; which image gets which is drawn anew in every round. The model is left in the mode that it was in.

    Args:
        model: of images (N, 1, S, S) and labels, on any device.
        images: (N, 1, S, S), at the model's size.
        labels: (N,) long, the model's classes.
        rounds: how often each image is seen.
    """
    x = images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images.float()
    if not len(x) or labels.shape != x.shape[:1]:
        raise DiffFitError(f"expected a label for each image; got {len(x)} images and labels {tuple(labels.shape)}")
    diffusion = create_diffusion(learn_sigma=getattr(model, "learn_sigma", True))
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    total, n = 0.0, len(x)
    try:
        for _ in range(rounds):
            part = torch.randperm(n, generator=generator) + torch.rand(n, generator=generator, dtype=torch.float64)
            t = (part / n * diffusion.num_timesteps).long().clamp_max(diffusion.num_timesteps - 1)
            noise = torch.randn(x.shape, generator=generator)
            for each in torch.arange(n).split(batch):
                arrays = (x[each], t[each], labels[each], noise[each])
                x0, at, y, e = (array.to(device) for array in arrays)
                losses = diffusion.training_losses(model, x0, at, {"y": y}, noise=e)["loss"]
                total += float(losses.double().sum())
    finally:
        model.train(training)
    return total / (n * rounds)


# -- all of it ---------------------------------------------------------------------------------------------------------
class Instrument:
    """The measures of a model's samples, with the reader of one file.

    Args:
        path: the reader's file.
    """

    styles = NAMES

    def __init__(self, path: Path) -> None:
        self.reader = load_reader(path)

    def loss(self, model: nn.Module, glyphs: Glyphs, looks: int = 1024) -> float:
        """:func:`denoising_loss` over about ``looks`` looks at the glyphs, always the same ones."""
        return denoising_loss(model, glyphs.images, glyphs.labels, rounds=max(1, round(looks / len(glyphs))))

    def measures(
        self, samples: Tensor, labels: Tensor, style: str, shown: Glyphs, held_out: Glyphs, others: Glyphs
    ) -> dict[str, float | None]:
        """What is read of samples, with what is read of real glyphs beside it (``_real``); None where it means nothing.

        Args:
            samples: (N, 1, S, S), of the alphabet of ``held_out``.
            labels: (N,) long, what was asked for.
            style: one of :attr:`styles`.
            shown: what the model was adapted to.
            held_out: what the samples should be like.
            others: glyphs of several families that were not shown, to tell copies from chance by.
        """
        alphabet = held_out.alphabet
        result: dict[str, float | None] = {
            "letters": letters_read(samples, labels, self.reader, alphabet),
            "letters_real": letters_read(held_out.images, held_out.labels, self.reader, alphabet),
            "style": style_read(samples, style, self.reader),
            "style_real": style_read(held_out.images, style, self.reader),
            "frechet": frechet(samples, held_out.images, self.reader),
            "memorised": memorised(samples, shown.images, others.images, others.families),
        }
        merged = alphabet == "letters"
        for name, images, which in (("cases", samples, labels), ("cases_real", held_out.images, held_out.labels)):
            result[name] = letters_read(images, which, self.reader, merge_cases=True) if merged else None
        return result
