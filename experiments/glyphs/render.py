"""Images of the characters of some 400 pinned fonts, in folders that ``difffit`` reads.

    python experiments/glyphs/render.py --out DIR              24 × 24 pixels; npm fetches the fonts into DIR/npm, once
    python experiments/glyphs/render.py --out DIR --size 48    the same at another resolution, into another DIR
    python experiments/glyphs/render.py --out DIR --npm DIR2/npm   with fonts that lie there

What it writes, where a <class> is ``upper_A`` … ``lower_z``, ``0`` … ``9`` or a Greek letter, and a <font> is
``<family>-<weight>[-italic]``:

    DIR/base/train/<class>/<font>.png              serif, sans, mono and slab, up to five fonts a family
    DIR/base/val/<class>/<font>.png                the same of families that are held out
    DIR/domains/<style>/<part>/<class>/<font>.png  parts: shown, held-out (one font a family), reader (see fonts.yaml)
    DIR/domains/digits/..., DIR/domains/greek/...  new classes, in the fonts of the base; held-out: its held-out families
    DIR/demo/<class>/<font>.png                    one hand, in no domain
    DIR/manifest.json                              counts, fonts, licences, what was left out and why, SHA-256 of the pixels

Ink is 255 on 0. Of 24 pixels capitals take 13, the baseline lies below the 18th row, and the ink is centred across: so
its height and place tell c from C. A font that is too large for its box is shrunk as a whole. Drawn four times as large
and averaged. The bytes hang on the recipe and the versions of Pillow and FreeType alone, which the manifest names.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from alphabet import ALPHABETS, LETTERS, folder_of
from PIL import Image, ImageDraw, ImageFont, features
from PIL import __version__ as pillow_version
from recipe import BASE, RECIPE, STYLES, Family, attribution, install, number_of, package_folder, read_recipe

from difffit_fast._extras import require
from difffit_fast._files import sha256, write_json
from difffit_fast.errors import DiffFitError

SIDE = 24
CAPITALS, BASELINE = 13.0, 18.0  # pixels of 24
WIDEST, HIGHEST, DEEPEST = 23.0, 17.5, 6.0  # what fits in the box, of 24
OVERSAMPLING = 4
DRAFT = 400  # font size at which a font is measured

WEIGHTS = ("300-normal", "400-normal", "700-normal", "900-normal", "400-italic")
PLAIN = "400-normal"
SAME = 0.02  # RMS difference of all letters, ink in [0, 1], below which two fonts count as one

Images = dict[str, np.ndarray]  # of one font, by character


# -- one font ----------------------------------------------------------------------------------------------------------
@dataclass
class Font:
    """A font and what was drawn of it.

    Attributes:
        name: ``<family>-<weight>[-italic]``.
        files: by alphabet; of the Greek letters it may be another file.
        images: (S, S) uint8 by character.
    """

    family: Family
    name: str
    files: dict[str, Path]
    images: Images = field(default_factory=dict)

    def vector(self) -> np.ndarray:
        """All letters, float32 in [0, 1]."""
        return np.concatenate([self.images[c].reshape(-1) for c in LETTERS]).astype(np.float32) / 255


@functools.lru_cache(maxsize=8)
def _glyph_names(path: Path) -> dict[int, str]:
    with require("fontTools.ttLib", "eval", "the tables of fonts").TTFont(path, lazy=True) as table:
        return table.getBestCmap() or {}


def covered(path: Path, characters: str) -> str:
    """Those of ``characters`` that the font has a glyph for, by its own table."""
    names = _glyph_names(path)
    return "".join(c for c in characters if names.get(ord(c), ".notdef") != ".notdef")


def open_font(path: Path, size: float) -> ImageFont.FreeTypeFont:
    # The basic layout is in every Pillow and needs no library that a machine may lack.
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


def fitting_size(path: Path, side: int, others: Iterable[tuple[Path, str]] = ()) -> float:
    """The font size, in pixels, at which capitals have their height, or the largest at which all letters fit the box.

    Args:
        path: the file of the Latin letters.
        others: other files of the font, and their characters that have to fit as well.

    Raises:
        DiffFitError: H has no height.
    """
    font = open_font(path, DRAFT)
    boxes = [font.getbbox(c, anchor="ls") for c in covered(path, LETTERS)]
    for other, characters in others:
        drawn = open_font(other, DRAFT)
        boxes += [drawn.getbbox(c, anchor="ls") for c in characters]
    capital = -font.getbbox("H", anchor="ls")[1]
    if capital <= 0:
        raise DiffFitError("its H is empty")
    width = max(1, *(right - left for left, _, right, _ in boxes))
    up = max(1, *(-top for _, top, _, _ in boxes))
    down = max(1, *(bottom for *_, bottom in boxes))
    return DRAFT * side / SIDE * min(CAPITALS / capital, WIDEST / width, HIGHEST / up, DEEPEST / down)


def draw(path: Path, characters: str, size: float, side: int) -> Images:
    """Characters at a font size, (side, side) uint8 each; those that are empty or drawn as an unknown one are left out."""
    font = open_font(path, size * OVERSAMPLING)
    unknown = _drawn(font, "\uffff", side)  # no character, so no font has it
    found = {c: _drawn(font, c, side) for c in covered(path, characters)}
    return {c: image for c, image in found.items() if image.max() > 32 and not np.array_equal(image, unknown)}


def _drawn(font: ImageFont.FreeTypeFont, character: str, side: int) -> np.ndarray:
    large = side * OVERSAMPLING
    left, _, right, _ = font.getbbox(character, anchor="ls")
    image = Image.new("L", (large, large), 0)
    place = (round((large - left - right) / 2), round(BASELINE / SIDE * large))
    ImageDraw.Draw(image).text(place, character, fill=255, font=font, anchor="ls")
    return np.asarray(image.resize((side, side), Image.Resampling.BOX))


def lower_case_is_capitals(images: Images) -> bool:
    """Whether the small letters are the capitals again, as large or smaller.

    The letters whose two cases differ in every alphabet with two cases are compared, cut to their ink and scaled to one
    size.
    """
    pairs = [(c, c.lower()) for c in "ABDEGHNQRT" if c in images and c.lower() in images]
    if not pairs:
        return False
    return float(np.median([_likeness(images[a], images[b]) for a, b in pairs])) > 0.8


def _likeness(a: np.ndarray, b: np.ndarray) -> float:
    """The correlation of two images once they are cut to their ink and scaled to 16 × 16."""
    x, y = (_cut(image).astype(np.float64).reshape(-1) for image in (a, b))
    x, y = x - x.mean(), y - y.mean()
    return float(x @ y / max(1e-9, np.sqrt((x @ x) * (y @ y))))


def _cut(image: np.ndarray) -> np.ndarray:
    rows, columns = np.where(image > 32)
    part = image[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    return np.asarray(Image.fromarray(part).resize((16, 16), Image.Resampling.BILINEAR))


# -- all fonts ---------------------------------------------------------------------------------------------------------
@dataclass
class Skipped:
    """What was left out, and why."""

    reasons: list[dict[str, str]] = field(default_factory=list)

    def add(self, font: str, reason: str) -> None:
        self.reasons.append({"font": font, "reason": reason})


def fonts_of(family: Family, npm: Path) -> Iterator[Font]:
    """The fonts of a family that are drawn: up to five, but of a style's families that are measured the plainest only."""
    folder = package_folder(family, npm) / "files"
    ending = f"{family.name}-latin-"
    there = sorted(path.stem[len(ending) :] for path in folder.glob(f"{ending}[0-9]*.woff"))
    if family.role in STYLES and family.part != "reader":
        plain = [w for w in there if w.endswith("-normal")] or there
        wanted = [PLAIN] if PLAIN in there else plain[:1]
    else:
        wanted = [w for w in WEIGHTS if w in there] or there[:1]
    for weight in (w for w in wanted if w != family.without):
        files = {"letters": folder / f"{ending}{weight}.woff", "digits": folder / f"{ending}{weight}.woff"}
        greek = folder / f"{family.name}-greek-{weight}.woff"
        if greek.exists():
            files["greek"] = greek
        yield Font(family, f"{family.name}-{weight.removesuffix('-normal')}", files)


def draw_letters(font: Font, side: int) -> str | None:
    """Draw a font's letters into ``font.images``; the reason if it is not to be used."""
    path = font.files["letters"]
    if missing := len(LETTERS) - len(covered(path, LETTERS)):
        return f"{missing} letters are missing"
    try:
        images = draw(path, LETTERS, fitting_size(path, side), side)
    except (OSError, DiffFitError) as error:
        return f"it cannot be drawn: {error}"
    if len(images) < len(LETTERS):
        return f"{len(LETTERS) - len(images)} letters are empty"
    if font.family.capitals or lower_case_is_capitals(images):
        if font.family.role not in STYLES or font.family.demo:
            return "its small letters are capitals"
        images = {c: image for c, image in images.items() if c.isupper()}
    font.images = images
    return None


def draw_new_classes(font: Font, alphabet: str, side: int) -> Images:
    """A font's digits or Greek letters, at the size of its letters; those that do not fit shrink all of them."""
    path = font.files.get(alphabet)
    if path is None:
        return {}
    characters = covered(path, ALPHABETS[alphabet])
    if len(characters) < len(ALPHABETS[alphabet]):
        return {}
    images = draw(path, characters, fitting_size(font.files["letters"], side, [(path, characters)]), side)
    return images if len(images) == len(characters) else {}


def without_twins(fonts: list[Font], skipped: Skipped) -> list[Font]:
    """Leave out fonts of the base that another one repeats: a held-out one's in training, or one before it."""
    base = [f for f in fonts if f.family.folder.startswith("base/")]
    order = sorted(base, key=lambda f: f.family.role == BASE)  # held-out fonts first: they stay
    if not order:
        return fonts
    vectors = np.stack([f.vector() for f in order])
    squares = (vectors**2).sum(1)
    distances = np.sqrt(np.maximum(squares[:, None] + squares - 2 * vectors @ vectors.T, 0) / vectors.shape[1])
    dropped: set[str] = set()
    for i, font in enumerate(order):
        if twins := [k for k in range(i) if order[k].name not in dropped and distances[i, k] < SAME]:
            dropped.add(font.name)
            skipped.add(font.name, f"it is drawn like {order[twins[0]].name}")
    return [f for f in fonts if not (f.name in dropped and f.family.folder.startswith("base/"))]


def digits_and_greek(fonts: list[Font], side: int) -> Iterator[tuple[str, str, Images]]:
    """Folder, name and images of the new classes in the plain fonts of the base.

    Held-out are the base's held-out families, which rarely have Greek letters: of these also a third of the others. The rest
    are shown or the reader's. Kin stay together; the hash of their name decides.
    """
    for font in fonts:
        if font.family.folder.startswith("base/") and font.name == f"{font.family.name}-400":
            parts = {"digits": ("shown", "reader"), "greek": ("shown", "reader", "held-out")}
            for alphabet, choice in parts.items():
                part = choice[number_of(f"{alphabet} {font.family.kin}") % len(choice)]
                if images := draw_new_classes(font, alphabet, side):
                    folder = f"domains/{alphabet}/{part if font.family.role == BASE else 'held-out'}"
                    yield folder, font.name, images


class Writer:
    """Writes images into class folders below a root, and remembers what it wrote."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.fonts: dict[str, list[str]] = defaultdict(list)
        self.counts: Counter[str] = Counter()
        self._pixels: dict[str, bytes] = {}
        self._made: set[Path] = set()

    def write(self, folder: str, name: str, images: Images) -> None:
        self.fonts[folder].append(name)
        for character, image in images.items():
            path = self.root / folder / folder_of(character) / f"{name}.png"
            if path.parent not in self._made:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._made.add(path.parent)
            Image.fromarray(image).save(path)
            self.counts[folder] += 1
            self._pixels[path.relative_to(self.root).as_posix()] = hashlib.sha256(image.tobytes()).digest()

    def digest(self, folder: str = "") -> str:
        """SHA-256 over the paths and pixels of all images below a folder."""
        total = hashlib.sha256()
        for path in sorted(self._pixels):
            if path.startswith(folder):
                total.update(path.encode() + b"\0" + self._pixels[path])
        return total.hexdigest()


def render(families: list[Family], npm: Path, out: Path, side: int = SIDE, recipe: Path = RECIPE) -> dict[str, Any]:
    """Draw and write everything, the manifest last; returns the manifest.

    Images are written below ``out`` under another name and moved when all are there, so that no half of a set is taken
    for it.

    Raises:
        DiffFitError: the images of another recipe lie in ``out``.
    """
    final = [out / name for name in ("base", "domains", "demo")]
    manifest_path = out / "manifest.json"
    if not manifest_path.exists() and (found := [str(p) for p in final if p.exists()]):
        raise DiffFitError(f"{found[0]} is there and was not made by this program; choose another folder")
    skipped, fonts = Skipped(), []
    for family in families:
        candidates = list(fonts_of(family, npm))
        if not candidates:
            skipped.add(family.name, "the package has no Latin .woff file")
        for font in candidates:
            if reason := draw_letters(font, side):
                skipped.add(font.name, reason)
            else:
                fonts.append(font)
    fonts = without_twins(fonts, skipped)

    temporary = out / ".tmp-render"
    shutil.rmtree(temporary, ignore_errors=True)
    writer = Writer(temporary)
    for font in fonts:
        writer.write(font.family.folder, font.name, font.images)
    for folder, name, images in digits_and_greek(fonts, side):
        writer.write(folder, name, images)
    used = {font.family for font in fonts}
    manifest = {
        "complete": True,
        "size": side,
        "recipe": sha256(recipe),
        "made_with": {"pillow": pillow_version, "freetype": features.version("freetype2")},
        "sha256": writer.digest(),
        "sets": {
            folder: {
                "images": writer.counts[folder],
                "fonts": writer.fonts[folder],
                "capitals_only": [f.name for f in fonts if f.family.folder == folder and "a" not in f.images],
                "sha256": writer.digest(f"{folder}/"),
            }
            for folder in sorted(writer.fonts)
        },
        "licences": dict(sorted(Counter(family.licence for family in used).items())),
        "families": {
            family.name: {
                "version": family.version,
                "licence": family.licence,
                "role": family.role,
                "attribution": attribution(family, npm),
            }
            for family in sorted(used, key=lambda family: family.name)
        },
        "skipped": sorted(skipped.reasons, key=lambda entry: entry["font"]),
    }
    write_json(manifest_path, {"complete": False})  # whoever is stopped here may begin again
    for path in final:
        shutil.rmtree(path, ignore_errors=True)
        if (temporary / path.name).exists():
            (temporary / path.name).rename(path)
    temporary.rmdir()
    write_json(manifest_path, manifest)
    return manifest


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the images")
    parser.add_argument("--size", type=int, default=SIDE, help="side of the images, pixels (default: %(default)s)")
    parser.add_argument("--recipe", type=Path, default=RECIPE, help="the fonts (default: fonts.yaml beside this file)")
    parser.add_argument("--npm", type=Path, help="folder of the fonts' packages (default: npm in --out)")
    args = parser.parse_args(argv)
    try:
        families = read_recipe(args.recipe)
        npm = args.npm or args.out / "npm"
        print(f"{len(families)} packages in {npm}", flush=True)
        install(families, npm)
        manifest = render(families, npm, args.out, args.size, args.recipe)
    except (DiffFitError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    for folder, found in manifest["sets"].items():
        print(f"{found['images']:6} images of {len(found['fonts']):3} fonts in {args.out / folder}")
    print(f"{len(manifest['skipped'])} fonts left out; licences {manifest['licences']}; SHA-256 {manifest['sha256']}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
