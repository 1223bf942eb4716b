"""The measuring instrument: a small network that reads which letter an image shows, and in which style.

    python experiments/glyphs/reader.py --data DIR --out DIR/reader.safetensors    train it (minutes on one core) and test it
    python experiments/glyphs/reader.py --data DIR --out DIR/reader.safetensors --test    only test the one that is there

No family is on both sides. It learns from ``base/train`` and from the families of the part ``reader`` of every domain; it
is tested, and measures, on ``base/val`` and on the parts ``held-out`` and ``shown``. So a model that repeats what it was
shown gains nothing by the reader having learned those very glyphs; and what it says of real glyphs of a domain, which it
knows from other families only, is the mark to compare samples with. (A base is trained on ``base/train`` as the reader
is: compare its samples with ``base/val`` as *at most a little* too well read.)

Digits and Greek letters have answers of their own, on the same features: whoever asks says which alphabet it is.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from alphabet import ALPHABETS, LETTERS, Glyphs, load
from recipe import BASE, PARTS, STYLES
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from difffit_fast._files import safetensors_metadata, write_json, write_safetensors
from difffit_fast.errors import DiffFitError

SIDE, BASELINE = 24, 0.75  # of the height
WIDTH = 64  # features
NAMES = (BASE, *STYLES)  # what the style can be
SAME_IN_BOTH_CASES = "COSUVWXZ"  # told by their height alone, which hands do not keep; I and l besides
STEPS, BATCH, RATE = 2500, 128, 3e-3
SHARES = {"base": 0.2, "made up": 0.3, "styles": 0.3, "digits": 0.1, "greek": 0.1}  # of a batch
SEED = 0


# -- the network -------------------------------------------------------------------------------------------------------
@dataclass
class Reading:
    """What the reader makes of N images: scores, the larger the likelier, and the features they are made from.

    Attributes:
        features: (N, 64) float32, each with mean 0 and variance 1 over what it learned from.
        characters: by alphabet, (N, number of its characters) float32.
        style: (N, 8) float32, in the order of :data:`NAMES`.
    """

    features: Tensor
    characters: dict[str, Tensor]
    style: Tensor


class Reader(nn.Module):
    """Images (N, 1, 24, 24) float32, ink is 1 on -1, to a :class:`Reading`."""

    def __init__(self) -> None:
        super().__init__()

        def convolution(inputs: int, outputs: int, kernel: int, stride: int) -> list[nn.Module]:
            layer = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
            return [layer, nn.BatchNorm2d(outputs), nn.ReLU()]

        self.body = nn.Sequential(
            *convolution(1, 24, 5, 2), *convolution(24, 48, 3, 2), *convolution(48, 64, 3, 1), nn.Flatten(),
            nn.Linear(64 * (SIDE // 4) ** 2, WIDTH, bias=False), nn.BatchNorm1d(WIDTH, affine=False),
        )  # fmt: skip
        self.characters = nn.ModuleDict({name: nn.Linear(WIDTH, len(a)) for name, a in ALPHABETS.items()})
        self.style = nn.Linear(WIDTH, len(NAMES))

    def forward(self, images: Tensor) -> Reading:
        features = self.body(images)
        active = F.dropout(F.relu(features), 0.1, self.training)
        return Reading(features, {n: head(active) for n, head in self.characters.items()}, self.style(active))

    @torch.no_grad()
    def read(self, images: Tensor, batch: int = 512) -> Reading:
        """Read N images of any size that :func:`as_input` takes, ``batch`` at a time."""
        found = [self(part) for part in as_input(images).split(batch)]
        characters = {name: torch.cat([f.characters[name] for f in found]) for name in ALPHABETS}
        return Reading(torch.cat([f.features for f in found]), characters, torch.cat([f.style for f in found]))


def as_input(images: Tensor) -> Tensor:
    """Images as the reader takes them, (N, 1, 24, 24) float32 in [-1, 1].

    Args:
        images: (N, 1, S, S) uint8, or floating in [-1, 1] (clamped), S a multiple of 24; larger ones are averaged.

    Raises:
        DiffFitError: another shape or type, or no image.
    """
    side = images.shape[-1] if images.dim() == 4 else 0
    if images.dim() != 4 or images.shape[1:] != (1, side, side) or side % SIDE or not images.numel():
        raise DiffFitError(f"expected images (N, 1, S, S), S a multiple of {SIDE}; got {tuple(images.shape)}")
    if images.dtype == torch.uint8:
        x = images.float() / 127.5 - 1
    elif images.is_floating_point():
        x = images.float().clamp(-1, 1)
    else:
        raise DiffFitError(f"expected images of uint8 or floating type; got {images.dtype}")
    return x if side == SIDE else F.avg_pool2d(x, side // SIDE)


def load_reader(path: Path) -> Reader:
    """The reader in a file, float32, for reading only.

    Raises:
        DiffFitError: the file is not there, or holds another network.
    """
    safetensors_metadata(path)  # says in one sentence what is wrong with a file
    reader = Reader()
    try:
        reader.load_state_dict({name: t.float() for name, t in load_file(path).items()})
    except RuntimeError as error:
        raise DiffFitError(f"{path} does not hold a reader: {str(error).splitlines()[-1].strip()}") from error
    return reader.eval().requires_grad_(False)


def save_reader(reader: Reader, path: Path, note: dict[str, Any]) -> None:
    """Half precision: half a megabyte. The numbers of the note are to be those of the file, so test what was read back."""
    tensors = {n: t.half() for n, t in reader.state_dict().items() if t.is_floating_point()}
    counts = {n: t for n, t in reader.state_dict().items() if not t.is_floating_point()}
    write_safetensors(path, tensors | counts, {"reader": json.dumps(note, sort_keys=True)})


# -- what it learns from -----------------------------------------------------------------------------------------------
@dataclass
class Lessons:
    """The images to learn from: the base's, every style's, and the new classes'."""

    base: Glyphs
    styles: dict[str, Glyphs]
    digits: Glyphs
    greek: Glyphs


def load_lessons(data: Path) -> Lessons:
    styles = {style: load(data / "domains" / style / "reader") for style in STYLES}
    digits, greek = (load(data / "domains" / name / "reader") for name in ("digits", "greek"))
    return Lessons(load(data / "base" / "train"), styles, digits, greek)


def varied(images: Tensor, generator: torch.Generator, slant: float = 0.15, bend: float = 0.03) -> Tensor:
    """Each image a little turned, slanted, bent, scaled and moved, with faint noise.

    What samples and unseen hands have and printed fonts lack. Heights change by less than the cases differ in.

    Args:
        images: (N, 1, S, S) float32 in [-1, 1]; so is what is returned.
        slant: most of it, across per height.
        bend: standard deviation of the place of what lies a third of the image apart, of half its side.
    """
    n = len(images)
    angle, lean = _between(n, -0.1, 0.1, generator), _between(n, -slant, slant, generator)
    wide, high = _between(n, 0.9, 1.1, generator), _between(n, 0.93, 1.07, generator)
    top = torch.stack([wide, lean - angle, _between(n, -0.08, 0.08, generator)], 1)  # at most a pixel of 24
    bottom = torch.stack([angle, high, _between(n, -0.08, 0.08, generator)], 1)
    grid = F.affine_grid(torch.stack([top, bottom], 1), list(images.shape), align_corners=False)
    knots = torch.randn(n, 2, 4, 4, generator=generator) * bend
    grid = grid + F.interpolate(knots, images.shape[-2:], mode="bilinear", align_corners=True).permute(0, 2, 3, 1)
    moved = F.grid_sample(images + 1, grid, align_corners=False) - 1  # what comes in from outside is no ink
    noise = torch.randn(images.shape, generator=generator) * _between(n, 0, 0.1, generator)[:, None, None, None]
    return (moved + noise).clamp(-1, 1)


def restyled(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image in a style made up: bolder or finer, a contour, coarse pixels, or as it was; fainter or not.

    There are a thousand fonts in the base and a handful in a style; letters are to be told in styles not seen.

    Args:
        images: (N, 1, 24, 24) float32 in [-1, 1]; so is what is returned.
    """
    n, ink = len(images), (images + 1) / 2
    much = _between(n, 0, 1, generator)[:, None, None, None]
    bold, fine = F.max_pool2d(ink, 3, 1, 1), -F.max_pool2d(-ink, 3, 1, 1)
    coarse = [F.interpolate(F.adaptive_avg_pool2d(ink, k), SIDE).mul(2).clamp(max=1) for k in (8, 12)]
    styles = torch.stack([
        ink, torch.lerp(ink, bold, much), torch.lerp(ink, fine, 0.6 * much), (bold - ink) * (1 + much),
        ink - (0.5 + 0.5 * much) * fine, *coarse,
    ])  # fmt: skip
    which = torch.randint(len(styles), (n,), generator=generator)
    faint = _between(n, 0.6, 1, generator)[:, None, None, None]
    return (styles[which, torch.arange(n)] * faint).clamp(0, 1) * 2 - 1


def shrunk(images: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Half of the images smaller, down to a half, on the same baseline: as fonts are that are shrunk to fit the box.

    Returns:
        The images, and the letters' targets (N, 52): a small C may well be a c.
    """
    n = len(images)
    size = torch.where(_between(n, 0, 1, generator) < 0.5, _between(n, 0.5, 1, generator), 1)
    zero, base = torch.zeros(n), 2 * BASELINE - 1
    rows = torch.stack(
        [torch.stack([1 / size, zero, zero], 1), torch.stack([zero, 1 / size, base - base / size], 1)], 1
    )
    grid = F.affine_grid(rows, list(images.shape), align_corners=False)
    target = F.one_hot(labels, len(LETTERS)).float()
    other = torch.arange(len(LETTERS))
    for letter in SAME_IN_BOTH_CASES:
        other[LETTERS.index(letter)] = LETTERS.index(letter.lower())
    doubtful = (target + F.one_hot(other[labels], len(LETTERS))) / 2
    target = torch.where((size < 0.85)[:, None], doubtful, target)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1, target


def _between(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return torch.rand(count, generator=generator) * (high - low) + low


class _Draw:
    """Glyphs at random from sets: each set as often as every other, and so each glyph within it."""

    def __init__(self, sets: list[Glyphs], generator: torch.Generator) -> None:
        self.sets, self.generator = sets, generator

    def __call__(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Images (N, 1, S, S) float32, labels (N,) and which set each is from (N,)."""
        which = torch.randint(len(self.sets), (count,), generator=self.generator).sort().values
        images, labels = [], []
        for i, glyphs in enumerate(self.sets):
            places = torch.randint(len(glyphs), (int((which == i).sum()),), generator=self.generator)
            images.append(glyphs.images[places])
            labels.append(glyphs.labels[places])
        return as_input(torch.cat(images)), torch.cat(labels), which


def train_reader(
    lessons: Lessons, steps: int = STEPS, batch: int = BATCH, say: Callable[[str], None] = lambda line: None
) -> Reader:
    """A reader trained on ``lessons``: the same bits for the same lessons and number of threads."""
    generator = torch.Generator().manual_seed(SEED)
    base, styles = _Draw([lessons.base], generator), _Draw(list(lessons.styles.values()), generator)
    classes = {name: _Draw([getattr(lessons, name)], generator) for name in ("digits", "greek")}
    counts = {name: max(2, round(share * batch)) for name, share in SHARES.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)  # the weights, and what dropout leaves out
        reader = Reader()
        optimizer = torch.optim.AdamW(reader.parameters(), lr=RATE, weight_decay=2e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
        # A plain glyph counts as little for the style as makes the base no likelier than any other one.
        weight = torch.tensor([counts["styles"] / len(STYLES) / counts["base"]] + [1.0] * len(STYLES))
        for step in range(steps):
            plain, made_up, styled = base(counts["base"]), base(counts["made up"]), styles(counts["styles"])
            others = {name: draw(counts[name]) for name, draw in classes.items()}
            new, target = shrunk(restyled(made_up[0], generator), made_up[1], generator)
            new = varied(new, generator, slant=0.35, bend=0.06)
            real = varied(torch.cat([plain[0], styled[0], *(x for x, _, _ in others.values())]), generator)
            reading = reader(torch.cat([real, new]))
            labels, style = torch.cat([plain[1], styled[1]]), torch.cat([torch.zeros_like(plain[2]), styled[2] + 1])
            loss = _spread(reading.characters["letters"][: len(labels)], labels)
            loss = loss + 0.5 * _spread(reading.characters["letters"][len(real) :], target)
            loss = loss + 0.5 * _spread(reading.style[: len(labels)], style, weight)
            first = len(labels)
            for name, (_, answers, _) in others.items():
                loss = loss + 0.25 * _spread(reading.characters[name][first : first + len(answers)], answers)
                first += len(answers)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if (step + 1) % 500 == 0:
                say(f"step {step + 1} of {steps}: loss {loss.item():.3f}")
    return reader.eval().requires_grad_(False)


def _spread(scores: Tensor, labels: Tensor, weight: Tensor | None = None) -> Tensor:
    return F.cross_entropy(scores, labels, weight, label_smoothing=0.05)


# -- how well it reads -------------------------------------------------------------------------------------------------
def without_case(labels: Tensor) -> Tensor:
    """Letters as places in the alphabet, with the two cases of those that look alike in both taken as one; I and l too."""
    table = torch.arange(len(LETTERS))
    for letter in SAME_IN_BOTH_CASES:
        table[LETTERS.index(letter.lower())] = LETTERS.index(letter)
    table[LETTERS.index("l")] = LETTERS.index("I")
    return table[labels]


def test_reader(reader: Reader, data: Path) -> dict[str, dict[str, float]]:
    """For each set that it has not learned from: how many images, and which share is read right.

    ``letters``: the character; ``cases_merged``: of letters, see :func:`without_case`; ``style``.
    """
    folders = [
        "base/val",
        "demo",
        *(f"domains/{s}/{p}" for s in (*STYLES, "digits", "greek") for p in PARTS if p != "reader"),
    ]
    result = {}
    for folder in folders:
        glyphs = load(data / folder)
        reading = reader.read(glyphs.images)
        found = reading.characters[glyphs.alphabet].argmax(1)
        line = {"images": len(glyphs), "letters": _share(found == glyphs.labels)}
        if glyphs.alphabet == "letters":
            style = NAMES.index({"demo": "handwriting", "base/val": BASE}.get(folder) or folder.split("/")[1])
            line["cases_merged"] = _share(without_case(found) == without_case(glyphs.labels))
            line["style"] = _share(reading.style.argmax(1) == style)
        result[folder] = line
    return result


def _share(right: Tensor) -> float:
    return round(float(right.float().mean()), 4)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder that render.py has written, of 24 pixels")
    parser.add_argument("--out", type=Path, required=True, help="the .safetensors file of the reader")
    parser.add_argument("--steps", type=int, default=STEPS, help="of training (default: %(default)s)")
    parser.add_argument("--test", action="store_true", help="do not train; test the reader in --out")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # another number, other bits
    try:
        if not args.test:
            lessons = load_lessons(args.data)
            start = time.perf_counter()
            reader = train_reader(lessons, args.steps, say=lambda line: print(line, flush=True))
            print(f"trained in {time.perf_counter() - start:.0f} s")
            save_reader(reader, args.out, {"steps": args.steps, "alphabets": ALPHABETS, "styles": NAMES})
        result = test_reader(load_reader(args.out), args.data)
        write_json(args.out.with_suffix(".json"), result)
    except (DiffFitError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    for folder, line in result.items():
        print(
            f"{folder:30}", *(f"{k} {v:.1%}" if k != "images" else f"{v:5} images" for k, v in line.items()), sep="  "
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
