"""Real images to try things out on: scikit-learn's handwritten digits as PNG files in class folders."""

from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits


def write_digit_images(folder: Path, classes: tuple[int, ...] = (0, 1, 2, 3), size: int = 16) -> Path:
    """``folder/<digit>/<number>.png``, about 180 images of each class; what exists already is left alone."""
    digits = load_digits()
    for label in classes:
        target = folder / str(label)
        if target.is_dir():
            continue
        target.mkdir(parents=True)
        for i, index in enumerate(np.flatnonzero(digits.target == label)):
            pixels = Image.fromarray((digits.images[index] * 15.9).astype(np.uint8))
            pixels.resize((size, size), Image.Resampling.BICUBIC).convert("RGB").save(target / f"{i:04d}.png")
    return folder


if __name__ == "__main__":
    import sys

    print(f"digits in {write_digit_images(Path(sys.argv[1] if len(sys.argv) > 1 else 'digits'))}/")
