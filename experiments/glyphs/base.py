"""Is a trained base good enough to come with the package? Measure it, and if it is, put it there.

    python experiments/glyphs/base.py DIR/run/000-DiT-custom --data DIR
    python experiments/glyphs/base.py --only-figure                       draw the figure anew from what is stored

``DIR`` is what ``render.py`` and ``reader.py`` made; the run is that of ``base.yaml``. What is measured is the very file that
is to ship: the averaged weights of the newest checkpoint, in bfloat16.

The gate, all of it:

1. of samples that are guided the reader reads at least 95 % of the letters;
2. the loss on fonts that were never shown does not rise at the end, and is near that on fonts that were;
3. no more samples are copies of a shown glyph than of real glyphs pass for one by chance, and a few;
4. adapted by DiffFit, as set by default, to 20 and to 300 glyphs of handwriting, its samples are read at least 90 % as often
   as real handwriting of hands that were not shown.

Writes the log and the numbers to ``docs/experiments/glyphs_base.json*``, a figure beside them and, where every part of the
gate is passed, the weights and their card to ``difffit_fast/bases``.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # reporting.py, which all experiments share

import numpy as np
import torch
import yaml
from alphabet import LETTERS, family_of, load
from domains import HERE, Bench, save_strip
from measures import READER, Instrument, letters_read, memorised
from PIL import Image
from plan import make_spec
from reporting import save_figure, table

from difffit_fast import Sampler, __version__
from difffit_fast._files import sha256, write_json, write_text
from difffit_fast.errors import DiffFitError
from difffit_fast.models.bases import FOLDER
from difffit_fast.models.header import read_header, write_model_file
from difffit_fast.models.load import load_model
from difffit_fast.models.state_dict import read_weights
from difffit_fast.sample.images import save_png
from difffit_fast.train.track import METRICS_FILE, read_metrics

DOCS = HERE.parent.parent / "docs" / "experiments"
KEPT = ("config", "pos_embed_scale", "class_names", "image_size", "vae", "objective", "step", "architecture")
SAMPLING = {"images": 520, "steps": 50, "cfg_scale": 2.0}
READ, READ_ADAPTED = 0.95, 0.9  # of samples; of real handwriting
FLAT, GAP = 1.01, 1.15  # last validation loss over the least one; loss on fonts not shown over that on shown ones
COPIES = 0.03  # share of samples; of real glyphs 0.01 pass by definition
SHOWN = (20, 300)
BF16_KEPT = "pos_embed"  # a table of sines, which the loader recognises by its values


def newest(run: Path) -> Path:
    """The last checkpoint of a run."""
    found = sorted((run / "checkpoints").glob("[0-9]*.safetensors"))
    if not found:
        raise DiffFitError(f"no checkpoint in {run / 'checkpoints'}")
    return found[-1]


def pack(checkpoint: Path, out: Path) -> None:
    """The averaged weights, in bfloat16."""
    state, header = read_weights(checkpoint).state, read_header(checkpoint)
    tensors = {name: t.float() if name == BF16_KEPT else t.to(torch.bfloat16) for name, t in state.items()}
    write_model_file(out, "model", tensors, {key: header[key] for key in KEPT if key in header})


# -- the gate ----------------------------------------------------------------------------------------------------------
def measure(path: Path, curve: list[dict[str, Any]], data: Path, strips: Path) -> dict[str, Any]:
    """Every number of the gate, of the base in ``path``; lines of samples go into the folder ``strips``."""
    instrument = Instrument(READER)
    model = load_model(str(path)).model.eval()
    train, val = load(data / "base" / "train"), load(data / "base" / "val")
    labels = torch.arange(len(LETTERS)).repeat(SAMPLING["images"] // len(LETTERS))
    samples = Sampler(model, "ddim", SAMPLING["steps"], SAMPLING["cfg_scale"], batch_size=130).sample(labels, 0)
    losses = [(line["step"], line["val_loss"]) for line in curve if "val_loss" in line]
    some = train.where(torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[: len(val)])
    result: dict[str, Any] = {
        "letters": letters_read(samples, labels, instrument.reader),
        "letters_real": letters_read(val.images, val.labels, instrument.reader),
        "val_loss": losses[-1][1], "least_val_loss": min(loss for _, loss in losses),
        "loss_shown": instrument.loss(model, some, len(some)), "loss_not_shown": instrument.loss(model, val, len(val)),
        "copies": memorised(samples, train.images, val.images, val.families),
    }  # fmt: skip
    say(result)
    plan = yaml.safe_load((HERE / "domains.yaml").read_text(encoding="utf-8"))
    bench = Bench(str(path), data, "cpu")
    rate = plan["methods"]["difffit_default"]["rates"][0]
    for shown in SHOWN:
        spec = make_spec(plan, sha256(path), "difffit_default", "handwriting", shown, 0, rate, plan["default_steps"])
        with tempfile.TemporaryDirectory() as folder:
            run = bench.run(spec, Path(folder) / "run", strips / f"{shown}.png")
        kept = (
            "letters",
            "letters_real",
            "cases",
            "cases_real",
            "loss",
            "loss_shown",
            "loss_own",
            "memorised",
            "frechet",
        )
        result[f"adapted_{shown}"] = {key: run[key] for key in kept}
        say(result[f"adapted_{shown}"])
    save_strip(samples.clamp(-1, 1).add(1).mul(127.5).byte(), labels, strips / "samples.png", across=208)
    return result


def say(values: dict[str, Any]) -> None:
    print(", ".join(f"{key} {value:.4f}" for key, value in values.items() if isinstance(value, float)), flush=True)


def gate(found: dict[str, Any]) -> dict[str, bool]:
    """Each part of the gate by what it asks, and whether it is passed."""
    adapted = {n: found[f"adapted_{n}"] for n in SHOWN}
    return {
        f"letters read of guided samples ≥ {READ:.0%}": found["letters"] >= READ,
        f"last validation loss ≤ {FLAT} × the least": found["val_loss"] <= FLAT * found["least_val_loss"],
        f"loss on fonts not shown ≤ {GAP} × on shown ones": found["loss_not_shown"] <= GAP * found["loss_shown"],
        f"copies ≤ {COPIES:.0%}": found["copies"] <= COPIES,
        **{
            f"adapted to {n} glyphs of handwriting: letters read ≥ {READ_ADAPTED:.0%} of real ones":
            run["letters"] >= READ_ADAPTED * run["letters_real"] for n, run in adapted.items()
        },
    }  # fmt: skip


# -- what is written ---------------------------------------------------------------------------------------------------
def card(report: dict[str, Any]) -> str:
    """The card that lies beside the weights."""
    found, passed = report["measured"], report["gate"]
    drawn = f"{SAMPLING['images']} samples, {SAMPLING['steps']} DDIM steps, guidance {SAMPLING['cfg_scale']:g}"
    rows = [
        [f"letters read ({drawn}); of real ones", f"{found['letters']:.1%}; {found['letters_real']:.1%}"],
        ["loss on fonts shown; not shown", f"{found['loss_shown']:.4f}; {found['loss_not_shown']:.4f}"],
        ["samples that pass for copies", f"{found['copies']:.1%}"],
        *(
            [
                f"adapted by DiffFit to {n} glyphs of handwriting, letters read; of real ones",
                f"{found[f'adapted_{n}']['letters']:.1%}; {found[f'adapted_{n}']['letters_real']:.1%}",
            ]
            for n in SHOWN
        ),
    ]
    return f"""# glyphs

A class-conditional DiT of {report["parameters"] / 1e6:.2f} M parameters ({report["architecture"]}) that draws the 52 letters
A … Z, a … z, 24 × 24 pixels, gray, ink is light. A base for tests, demonstrations and experiments of fine-tuning, small
enough for any CPU: `difffit sample --ckpt glyphs`, `difffit train --ckpt glyphs --data-path letters --vae none --flip none`.

- **Trained on** {report["images"]:,} glyphs of {report["families"]} families of fonts ({report["licences"]}), rendered by
  `experiments/glyphs/render.py`; no font is part of this file. {report["step"]:,} steps of {report["batch"]} images,
  by `difffit train` with `experiments/glyphs/base.yaml`; weights averaged, stored in bfloat16.
- **Not for** setting text: it knows no words, no spacing and no other script.
- **License**: Apache-2.0.

## Measured

{table(["of this very file", ""], rows)}

## What was asked of it

{table(["", "passed"], [[what, "yes" if yes else "**no**"] for what, yes in passed.items()])}
"""


def draw(folder: Path) -> None:
    """The log as a figure."""
    lines = [json.loads(line) for line in (folder / "glyphs_base.jsonl").read_text(encoding="utf-8").splitlines()]

    def figure(plt: Any) -> Any:
        drawn, axis = plt.subplots(figsize=(6, 3.4))
        for key, label in (("loss", "shown, mean of 200 steps"), ("val_loss", "fonts not shown, averaged weights")):
            points = [(line["step"], line[key]) for line in lines if key in line and line["step"]]
            axis.plot(*zip(*points, strict=True), marker="." if key == "val_loss" else None, linewidth=1, label=label)
        axis.set(xlabel="step", ylabel="loss", yscale="log")
        axis.legend(frameon=False)
        drawn.tight_layout()
        return drawn

    save_figure(folder / "glyphs_base.png", figure)


def draw_sheet(strips: Path, path: Path, side: int = 24, across: int = 26) -> None:
    """Samples of the base, what was shown, samples of the adapted models and real glyphs, one under another."""
    rows: list[np.ndarray] = []
    for name in ("samples", *(f"{n}{part}" for n in SHOWN for part in (".shown", "")), f"{SHOWN[0]}.held-out"):
        strip = np.asarray(Image.open(strips / f"{name}.png").convert("L"))
        for start in range(0, strip.shape[1], side * across):
            row = np.full((side + 2, side * across), 96, np.uint8)
            part = strip[:, start : start + side * across]
            row[:side, : part.shape[1]] = part
            rows.append(row)
        rows.append(np.full((6, side * across), 96, np.uint8))
    save_png(np.concatenate(rows).repeat(2, 0).repeat(2, 1), path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", help="folder of the run of base.yaml")
    parser.add_argument("--data", type=Path, help="folder that render.py and reader.py wrote")
    parser.add_argument("--only-figure", action="store_true", help="draw the stored log anew")
    args = parser.parse_args(argv)
    try:
        if args.only_figure:
            draw(DOCS)
            return 0
        if args.run is None or args.data is None:
            raise DiffFitError("expected the folder of a run and --data")
        checkpoint = newest(args.run)
        curve = read_metrics(args.run)
        candidate = args.data / "glyphs.safetensors"
        pack(checkpoint, candidate)
        header, manifest = read_header(candidate), json.loads((args.data / "manifest.json").read_text("utf-8"))
        settings = yaml.safe_load((args.run / "config.yaml").read_text(encoding="utf-8"))
        families = {family_of(font) for font in manifest["sets"]["base/train"]["fonts"]}
        licences = Counter(manifest["families"][family]["licence"] for family in families)
        strips = args.data / "base-strips"
        found = measure(candidate, curve, args.data, strips)
        draw_sheet(strips, DOCS / "glyphs_base_sheet.png")
        report = {
            "sha256": sha256(candidate), "data": manifest["sha256"], "measured": found, "gate": gate(found),
            "step": header["step"], "batch": settings["global_batch_size"], "architecture": header["architecture"],
            "parameters": sum(t.numel() for t in read_weights(candidate).state.values()),
            "images": manifest["sets"]["base/train"]["images"], "families": len(families),
            "licences": ", ".join(f"{name} {count}" for name, count in sorted(licences.items())),
            "made_with": {"torch": torch.__version__, "difffit_fast": __version__},
        }  # fmt: skip
        write_json(DOCS / "glyphs_base.json", report)
        write_text(DOCS / "glyphs_base.jsonl", (args.run / METRICS_FILE).read_text(encoding="utf-8"))
        draw(DOCS)
        for what, yes in report["gate"].items():
            print(f"{'passed' if yes else 'FAILED'}  {what}")
        if not all(report["gate"].values()):
            print(f"not shipped; the candidate is {candidate}")
            return 1
        FOLDER.mkdir(exist_ok=True)
        (FOLDER / "glyphs.safetensors").write_bytes(candidate.read_bytes())
        write_text(FOLDER / "glyphs.md", card(report))
    except (DiffFitError, OSError) as error:
        print(f"base: {error}", file=sys.stderr)
        return 2
    print(f"shipped: {FOLDER / 'glyphs.safetensors'}, {candidate.stat().st_size / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
