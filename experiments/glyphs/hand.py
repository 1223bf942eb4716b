"""Make examples/hand, the data of the demo, from what render.py and reader.py wrote.

python experiments/glyphs/hand.py --data DIR

shown/    20 glyphs of one hand, what the demo adapts to
asked/    its other 32
own/      four glyphs of every letter from fonts that the base was not shown: what it should not forget
reader.safetensors, README.md
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from alphabet import LETTERS, family_of, folder_of

from difffit_fast._files import write_text
from difffit_fast.errors import DiffFitError

OUT = Path(__file__).resolve().parent.parent.parent / "examples" / "hand"
SHOWN, OWN = 20, 4


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that render.py and reader.py wrote")
    parser.add_argument("--out", type=Path, default=OUT, help="folder to write, anew (default: examples/hand)")
    args = parser.parse_args(argv)
    manifest = json.loads((args.data / "manifest.json").read_text(encoding="utf-8"))
    if manifest["size"] != 24:
        raise DiffFitError(f"expected glyphs of 24 pixels; {args.data} has {manifest['size']}")
    shutil.rmtree(args.out, ignore_errors=True)
    (hand,) = {path.name for path in (args.data / "demo").glob("*/*.png")}
    shown = set(torch.randperm(len(LETTERS), generator=torch.Generator().manual_seed(0))[:SHOWN].tolist())
    generator = torch.Generator().manual_seed(1)
    stems = {hand.removesuffix(".png")}
    for i, letter in enumerate(LETTERS):
        folder = folder_of(letter)
        copy(args.data / "demo" / folder / hand, args.out / ("shown" if i in shown else "asked") / folder)
        files = sorted((args.data / "base" / "val" / folder).glob("*.png"))
        for k in torch.randperm(len(files), generator=generator)[:OWN].tolist():
            copy(files[k], args.out / "own" / folder)
            stems.add(files[k].stem)
    copy(args.data / "reader.safetensors", args.out)
    families = sorted({family_of(stem) for stem in stems})
    rows = [f"- {name}, {(f := manifest['families'][name])['licence']}: {f['attribution']}" for name in families]
    write_text(
        args.out / "README.md",
        "# Letters\n\n"
        f"24 × 24 pixels, gray. `shown` and `asked` are one hand, {family_of(hand.removesuffix('.png'))}; `own` are fonts that "
        "the base `glyphs` was not\nshown. `reader.safetensors` reads letters. Made by `experiments/glyphs/hand.py`. "
        "The fonts that these are pictures of:\n\n" + "\n".join(rows) + "\n",
    )
    return 0


def copy(file: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, folder / file.name)


if __name__ == "__main__":
    raise SystemExit(main())
