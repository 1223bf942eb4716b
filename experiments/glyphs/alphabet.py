"""The characters, the names of their folders, and reading the folders back.

Three alphabets, each a domain of classes of its own, in the order of their labels:

    letters   A … Z, a … z     52 classes
    digits    0 … 9            10
    greek     Γ … Ω, α … ω     28: the Greek letters that no Latin one looks like

File systems that know no case would make one folder of ``a`` and ``A``: a letter lies in ``lower_a`` or ``upper_A``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from difffit_fast.errors import DiffFitError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
DIGITS = "0123456789"
GREEK = "ΓΔΘΛΞΠΣΦΨΩαβγδεζηθλμξπρσφχψω"  # without those that are ABEZHIKMNOPTYX and ikovut again
ALPHABETS = {"letters": LETTERS, "digits": DIGITS, "greek": GREEK}

_FILE = re.compile(r"(?P<family>.+)-(?P<weight>\d+)(?:-italic)?")


def folder_of(character: str) -> str:
    """The folder of a character.

    >>> [folder_of(c) for c in "Aa7γ"]
    ['upper_A', 'lower_a', '7', 'lower_γ']
    """
    if character.isupper():
        return f"upper_{character}"
    return f"lower_{character}" if character.islower() else character


def character_of(folder: str) -> str:
    """The character of a folder; the inverse of :func:`folder_of`."""
    return folder.rpartition("_")[2]


def alphabet_of(characters: Sequence[str]) -> str:
    """The name of the alphabet that all ``characters`` belong to.

    Raises:
        DiffFitError: there is none.
    """
    for name, alphabet in ALPHABETS.items():
        if characters and all(c in alphabet for c in characters):
            return name
    raise DiffFitError(f"expected characters of one of {', '.join(ALPHABETS)}; got {''.join(characters)[:60]!r}")


def family_of(stem: str) -> str:
    """The family in the name of an image or font.

    >>> family_of("jersey-10-400"), family_of("abeezee-400-italic")
    ('jersey-10', 'abeezee')
    """
    match = _FILE.fullmatch(stem)
    if not match:
        raise DiffFitError(f"expected a name <family>-<weight>[-italic]; got {stem!r}")
    return match["family"]


@dataclass
class Glyphs:
    """Images of characters.

    Attributes:
        images: (N, 1, S, S) uint8, ink is 255.
        labels: (N,) long, places in the alphabet.
        fonts: the font of each image, ``<family>-<weight>[-italic]``.
        alphabet: its name.
    """

    images: Tensor
    labels: Tensor
    fonts: list[str]
    alphabet: str

    def __len__(self) -> int:
        return len(self.images)

    @property
    def families(self) -> list[str]:
        """The family of each image."""
        return [family_of(font) for font in self.fonts]

    def where(self, keep: Tensor) -> Glyphs:
        """The images at ``keep``, a mask (N,) bool or places (M,) long."""
        places = keep.nonzero()[:, 0] if keep.dtype == torch.bool else keep
        fonts = [self.fonts[i] for i in places.tolist()]
        return Glyphs(self.images[places], self.labels[places], fonts, self.alphabet)

    @staticmethod
    def joined(parts: Sequence[Glyphs]) -> Glyphs:
        """Sets of one alphabet, one after another."""
        if len(names := {part.alphabet for part in parts}) != 1:
            raise DiffFitError(f"expected sets of one alphabet; got {', '.join(sorted(names)) or 'none'}")
        fonts = [font for part in parts for font in part.fonts]
        images, labels = torch.cat([p.images for p in parts]), torch.cat([p.labels for p in parts])
        return Glyphs(images, labels, fonts, parts[0].alphabet)


def load(folder: Path) -> Glyphs:
    """The images of ``folder/<class>/<font>.png``, class after class, fonts in order.

    Raises:
        DiffFitError: there are none, they are of several sizes, or a class is none of an alphabet.
    """
    classes = {character_of(p.name): p for p in folder.iterdir() if p.is_dir()} if folder.is_dir() else {}
    if not classes:
        raise DiffFitError(f"expected class folders of images in {folder}; there are none (render.py makes them)")
    name = alphabet_of(list(classes))
    alphabet = ALPHABETS[name]
    images, labels, fonts = [], [], []
    for character in sorted(classes, key=alphabet.index):
        for path in sorted(classes[character].glob("*.png")):
            with Image.open(path) as file:
                images.append(np.asarray(file.convert("L")))
            labels.append(alphabet.index(character))
            fonts.append(path.stem)
    if len(sizes := {image.shape for image in images}) != 1:
        raise DiffFitError(f"expected images of one size in {folder}; found {sorted(sizes)[:4] or 'no image'}")
    return Glyphs(torch.from_numpy(np.stack(images))[:, None], torch.tensor(labels), fonts, name)
