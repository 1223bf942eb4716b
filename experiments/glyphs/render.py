"""Images of letters from free fonts: the data that the base is trained on, and the domains it is adapted to.

    python experiments/glyphs/render.py --out build/glyphs              24 x 24 pixels
    python experiments/glyphs/render.py --out build/glyphs48 --size 48

The fonts of ``fonts.yaml`` are packages of npm, which is asked for exactly those versions; Pillow reads their files as they
are. What results are folders of images as ``difffit`` reads them::

    OUT/train/upper_A/<family>-<weight>.png      the base's families
    OUT/val/upper_A/...                          those of them that are held out: about one in twelve, by its name
    OUT/domains/<style>/upper_A/...              one font of each family of a style that the base never sees
    OUT/domains/digits/7/..., OUT/domains/greek/upper_Γ/...        new classes, in the families held out and in all that have them
    OUT/manifest.json                            what there is, what was left out and why, and a checksum of all pixels

A glyph is ink (255) on nothing (0), 8 bit, one channel. At 24 pixels its capitals are 13 high, the baseline is row 18, and it
is centred across; a font that would not fit is made smaller as a whole. So a letter's size and height, by which c and C are told
apart, are kept. The same versions of the fonts, Pillow and FreeType give the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from difffit_fast._extras import require
from difffit_fast._files import read_yaml, write_json
from difffit_fast.errors import DiffFitError

HERE = Path(__file__).resolve().parent
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
DIGITS = "0123456789"
GREEK = "ΓΔΘΛΞΠΣΦΨΩαβγδεζηθλμξπρσφψω"  # those that do not look like a Latin letter
BASE_WEIGHTS = ("300-normal", "400-normal", "700-normal", "900-normal", "400-italic")
DOMAIN_WEIGHTS = ("400-normal", "700-normal")  # the first that there is
HELD_OUT = 12  # one family in so many, by the hash of its name
SIDE, CAPITAL, BASELINE = 24, 13.0, 18.0  # at 24 pixels
SAMPLES = 4  # a glyph is drawn so many times larger and averaged
_LARGE = 200  # size at which a font is measured


def folder_of(character: str) -> str:
    """The class folder of a character, told apart by file systems that see no case.

    >>> folder_of("A"), folder_of("a"), folder_of("7")
    ('upper_A', 'lower_a', '7')
    """
    if character.isupper():
        return f"upper_{character}"
    return f"lower_{character}" if character.islower() else character


def is_held_out(family: str) -> bool:
    """Whether a family of the base is one of those that it is not trained on."""
    return int(hashlib.sha256(family.encode()).hexdigest(), 16) % HELD_OUT == 0


# -- one font ----------------------------------------------------------------------------------------------------------
def characters_of(path: Path) -> set[str]:
    """The characters that a font file has a glyph for."""
    fonts = require("fontTools.ttLib", "eval", "the table of a font's characters")
    with fonts.TTFont(path, lazy=True) as font:
        return {chr(code) for code in font.getBestCmap()}


def render(path: Path, characters: Iterable[str], side: int = SIDE, metrics: Path | None = None) -> np.ndarray:
    """The glyphs of a font, uint8 (n, side, side), ink 255.

    Args:
        metrics: the font's file whose Latin letters give the size, where ``path`` holds another alphabet.

    Raises:
        ValueError: a Latin letter has no extent, so that the font cannot be measured.
    """
    size = _LARGE * _scale(metrics or path) * SAMPLES * side / SIDE
    font = ImageFont.truetype(str(path), size)
    baseline = BASELINE * SAMPLES * side / SIDE
    glyphs = []
    for character in characters:
        left, _, right, _ = font.getbbox(character, anchor="ls")
        image = Image.new("L", (side * SAMPLES, side * SAMPLES), 0)
        x = round((side * SAMPLES - (left + right)) / 2)
        ImageDraw.Draw(image).text((x, baseline), character, fill=255, font=font, anchor="ls")
        glyphs.append(np.asarray(image.resize((side, side), Image.Resampling.BOX)))
    return np.stack(glyphs)


def _scale(path: Path) -> float:
    """The factor on the font at ``_LARGE`` for 24 pixels: to the capitals' height, or less where it would not fit."""
    font = ImageFont.truetype(str(path), _LARGE)
    boxes = [font.getbbox(letter, anchor="ls") for letter in LETTERS]
    widths, heights = [b[2] - b[0] for b in boxes], [b[3] - b[1] for b in boxes]
    if min(*widths, *heights) <= 0:
        raise ValueError("a letter without extent")
    capital = -font.getbbox("H", anchor="ls")[1]
    above, below = max(-b[1] for b in boxes), max(1, *(b[3] for b in boxes))
    return min(CAPITAL / capital, (SIDE - 1) / max(widths), (BASELINE - 0.5) / above, (SIDE - BASELINE) / below)


# -- all fonts ---------------------------------------------------------------------------------------------------------
def install(fonts: dict[str, list[str]], folder: Path) -> Path:
    """The packages of ``fonts`` (family -> version, licence) below ``folder``, by npm; returns where they lie."""
    there = folder / "node_modules" / "@fontsource"
    missing = [family for family in fonts if not (there / family / "package.json").is_file()]
    if missing:
        npm = shutil.which("npm")
        if npm is None:
            raise DiffFitError(f"npm is needed to fetch {len(missing)} fonts, and is not there; install Node.js")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "package.json").write_text('{"private": true}\n', encoding="utf-8")
        packages = [f"@fontsource/{family}@{version}" for family, (version, _) in fonts.items()]
        quiet = ["--no-save", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
        if subprocess.run([npm, "install", *quiet, *packages], cwd=folder).returncode:
            raise DiffFitError(f"npm could not install the fonts into {folder}; its message is above")
    return there


class Renderer:
    """Renders families into folders of images, and keeps what to say about them."""

    def __init__(self, packages: Path, out: Path, side: int) -> None:
        self.packages, self.out, self.side = packages, out, side
        self.fonts: list[dict[str, Any]] = []
        self.left_out: dict[str, str] = {}
        self.digest = hashlib.sha256()

    def family(
        self, family: str, part: str, characters: str, weights: Iterable[str], only_first: bool, subset: str
    ) -> None:
        """Every weight of a family that has the characters, or the first such, into ``OUT/<part>``."""
        done = 0
        for weight in weights:
            path = self.packages / family / "files" / f"{family}-{subset}-{weight}.woff"
            if not path.is_file() or (only_first and done):
                continue
            reason = self._font(path, family, weight, part, characters)
            if reason:
                self.left_out[f"{part}/{family}-{weight}"] = reason
            done += not reason
        if not done:
            self.left_out.setdefault(f"{part}/{family}", f"no {subset} font that can be used")

    def _font(self, path: Path, family: str, weight: str, part: str, characters: str) -> str:
        """Render one font; why not, where it is left out."""
        if lacking := [c for c in characters if c not in characters_of(path)]:
            return f"it lacks {lacking[0]}" + (f" and {len(lacking) - 1} more" if lacking[1:] else "")
        latin = self.packages / family / "files" / f"{family}-latin-{weight}.woff"
        try:
            glyphs = render(path, characters, self.side, latin if latin.is_file() else None)
        except (OSError, ValueError) as error:
            return str(error)
        if not glyphs.reshape(len(glyphs), -1).any(1).all():
            return "a glyph without ink"
        if characters == LETTERS and np.abs(glyphs[:26].astype(int) - glyphs[26:52]).mean() < 8:
            return "capitals only"
        for character, glyph in zip(characters, glyphs, strict=True):
            folder = self.out / part / folder_of(character)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(glyph).save(folder / f"{family}-{weight}.png", compress_level=1)
        self.digest.update(f"{part}/{family}-{weight}".encode() + glyphs.tobytes())
        self.fonts.append({"family": family, "weight": weight, "part": part, "glyphs": len(glyphs)})
        return ""


def make(out: Path, side: int, packages: Path | None = None) -> dict[str, Any]:
    """Render everything into ``out``; returns the manifest."""
    styles: dict[str, dict[str, list[str]]] = read_yaml(HERE / "fonts.yaml")
    fonts = {family: entry for families in styles.values() for family, entry in families.items()}
    here = install(fonts, packages or out / "npm")
    renderer = Renderer(here, out, side)
    for style, families in styles.items():
        for family in families:
            if style == "base":
                part = "val" if is_held_out(family) else "train"
                renderer.family(family, part, LETTERS, BASE_WEIGHTS, False, "latin")
                if part == "val":
                    renderer.family(family, "domains/digits", DIGITS, BASE_WEIGHTS, False, "latin")
                renderer.family(family, "domains/greek", GREEK, DOMAIN_WEIGHTS, True, "greek")
            else:
                renderer.family(family, f"domains/{style}", LETTERS, DOMAIN_WEIGHTS, True, "latin")
    parts = Counter()
    for font in renderer.fonts:
        parts[font["part"]] += font["glyphs"]
    manifest = {
        "side": side, "images": dict(parts), "families": len({font["family"] for font in renderer.fonts}),
        "licences": dict(Counter(licence for _, licence in fonts.values())), "sha256": renderer.digest.hexdigest(),
        "pillow": Image.__version__, "fonts": renderer.fonts,
        "left_out": {name: why for name, why in renderer.left_out.items() if not name.startswith("domains/greek")},
    }  # fmt: skip
    write_json(out / "manifest.json", manifest)
    return manifest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--size", type=int, default=SIDE, help="side of the images, a multiple of 24 (default: 24)")
    parser.add_argument("--packages", type=Path, help="where npm installs the fonts (default: OUT/npm)")
    args = parser.parse_args()
    if args.size < SIDE or args.size % SIDE:
        parser.error(f"--size must be a positive multiple of {SIDE}; got {args.size}")
    try:
        manifest = make(args.out, args.size, args.packages)
    except DiffFitError as error:
        print(f"render: {error}", file=sys.stderr)
        return 2
    for part, count in manifest["images"].items():
        print(f"{part}: {count} images of {sum(f['part'] == part for f in manifest['fonts'])} fonts")
    print(f"{len(manifest['left_out'])} fonts left out; pixels {manifest['sha256'][:16]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
