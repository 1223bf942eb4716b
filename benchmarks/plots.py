#!/usr/bin/env python
"""The tables of the README and of docs/many.md, and all plots, from the files under benchmarks/results/ and from nothing else.

    python benchmarks/plots.py              # rewrite the tables between the markers and every plot
    python benchmarks/plots.py --check      # write nothing; fail if a table is not what the files say

``speed``, between the lines <!-- speed:begin --> and <!-- speed:end -->: one row for each ``speed*.json`` that
``speed.py`` wrote to its end. ``apply``: one row for each model of an ``apply*.json`` of ``apply.py``. ``demo``: what
``make demo ARGS="--publish"`` wrote to ``demo.json``, with its figure. ``many``, in docs/many.md: a table for each
``many*.json`` of ``many.py``. A plot lies beside the file it shows: ``speed*.png``, ``ops.png`` and ``demo.png``, which the
demo draws.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from modes import FROZEN, FULL, OURS

from difffit_fast._files import replacing, write_text

ROOT = Path(__file__).resolve().parent.parent
COLOURS = {"full": "tab:gray", "frozen": "tab:orange", "lora": "tab:purple", "fast": "tab:blue"}


# -- the tables --------------------------------------------------------------------------------------------------------
def device_of(result: dict[str, Any]) -> str:
    """The device of a row, without how many of its threads ran: "AMD EPYC, 2 threads, AVX512" is "AMD EPYC, AVX512"."""
    return ", ".join(part for part in result["device"].split(", ") if not part.endswith(" threads"))


def load(results: Path, pattern: str) -> list[tuple[Path, dict[str, Any]]]:
    """All result files of this name under ``results``, in the order of their paths."""
    return [(path, json.loads(path.read_text())) for path in sorted(results.rglob(pattern))]


def fastest(modes: dict[str, Any], names: Iterable[str]) -> str | None:
    present = [n for n in names if n in modes]
    return min(present, key=lambda n: modes[n]["step_ms"]["median"]) if present else None


def speed_table(files: list[tuple[Path, dict[str, Any]]], root: Path = ROOT) -> str:
    """A Markdown table, one row a file: best full fine-tuning, best frozen PyTorch, ours, and their ratios."""
    if not files:
        return "Not measured yet: `python benchmarks/speed.py --json benchmarks/results/<device>/speed.json`."
    head = (
        "| device | model | best full fine-tuning | best frozen PyTorch | ours | faster than full | than frozen "
        "| step / floor | peak memory, full → ours | measured |"
    )
    lines = [head, "|" + "---|" * (head.count("|") - 1)]
    for path, result in files:
        modes, ratios = result["modes"], result["ratios"]
        full, frozen, ours = (fastest(modes, names) for names in (FULL, FROZEN, OURS))
        memory = _memory(modes, full and [m for m in FULL if m in modes], ours)
        model = f"{result['model']}, {result['image_size']} px, batch {result['batch_size']}, {result['dtype']}"
        where = os.path.relpath(path, root).replace(os.sep, "/")
        cells = [
            f"{device_of(result)}, PyTorch {result['torch']}", model,
            *(_milliseconds(modes, name) for name in (full, frozen, ours)),
            _ratio(ratios, "vs_best_full"), _ratio(ratios, "vs_best_frozen"),
            f"{ratios['step_over_floor']:.2f}" if "step_over_floor" in ratios else "",
            memory, f"[{result['date'][:10]}]({where})",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _milliseconds(modes: dict[str, Any], name: str | None) -> str:
    return f"{modes[name]['step_ms']['median']:.1f} ms ({name})" if name else ""


def _ratio(ratios: dict[str, Any], key: str) -> str:
    r = ratios.get(key)
    return f"**{r['ratio']:.2f}×** ({r['round_p10']:.2f}–{r['round_p90']:.2f})" if r else ""


def _memory(modes: dict[str, Any], full: list[str] | None, ours: str | None) -> str:
    theirs = [b for b in (modes[m]["peak_memory_bytes"] for m in full or []) if b]
    mine = modes[ours]["peak_memory_bytes"] if ours else None
    return f"{min(theirs) / 2**30:.2f} → {mine / 2**30:.2f} GiB" if theirs and mine else ""


def demo_block(files: list[tuple[Path, dict[str, Any]]], root: Path = ROOT) -> str:
    """The newest demo: its figure, its table and the sentence that says who wins."""
    if not files:
        return 'Not measured yet: `make demo ARGS="--publish"`.'
    path, result = max(files, key=lambda file: file[1]["date"])
    where = os.path.relpath(path, root).replace(os.sep, "/")
    head = [
        "", "loss, letters not shown", "letters read", "copies", "loss, base's own fonts", "seconds", "kB to keep",
    ]  # fmt: skip
    lines = [head, ["---"] * len(head)]
    for title, row in result["table"]:
        loss, own = (f"{row[key]:.4f}" if key in row else "" for key in ("loss", "loss_own"))
        copies = f"{row['memorised']:.0%}" if "memorised" in row else ""
        cost = [f"{row['seconds']:.0f}", f"{row['bytes'] / 1000:,.0f}"] if "seconds" in row else ["", ""]
        lines.append([title, loss, f"{row['letters']:.0%}", copies, own, *cost])
    speed = ", ".join(f"{name} {value:.0f}" for name, value in result["images_per_second_median"].items())
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return (
        f"![Letters shown, letters not shown, and samples of every model]({where.removesuffix('.json')}.png)\n\n{table}\n\n"
        f"{result['verdict']} Images a second: {speed} ([{result['date'][:10]}]({where}), {result['device']})."
    )


MODELS = {"dit": "DiTTransformer2DModel", "pixart": "PixArtTransformer2DModel", "sd3": "SD3Transformer2DModel"}
OTHERS = {"frozen": "the same, frozen PyTorch", "lora": "PEFT LoRA, rank 16", "ia3": "PEFT IA3"}


def apply_table(files: list[tuple[Path, dict[str, Any]]], root: Path = ROOT) -> str:
    """A Markdown table, one row a model: ms per step and peak memory of ours, and the others' as multiples of it."""
    if not files:
        return "Not measured yet: `python benchmarks/apply.py --json benchmarks/results/<device>/apply-<dtype>.json`."
    lines = [["device", "model", "ours", *OTHERS.values(), "measured"], ["---"] * (4 + len(OTHERS))]
    for path, result in files:
        where = os.path.relpath(path, root).replace(os.sep, "/")
        shape = f"width {result['width']}, {result['depth']} blocks, batch {result['batch_size']}, {result['dtype']}"
        for model, measured in result["models"].items():
            modes, ratios = measured["modes"], measured["ratios"]
            lines.append([
                f"{device_of(result)}, PyTorch {result['torch']}", f"{MODELS[model]}, {shape}",
                f"{modes['ours']['step_ms']['median']:.1f} ms, {_mebibytes(modes, 'ours')}" if "ours" in modes else "",
                *(f"{_ratio(ratios, f'vs_{name}')}, {_mebibytes(modes, name)}" if name in modes else "" for name in OTHERS),
                f"[{result['date'][:10]}]({where})",
            ])  # fmt: skip
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _mebibytes(modes: dict[str, Any], name: str) -> str:
    peak = modes[name]["peak_memory_bytes"]
    return f"{peak / 2**20:.0f} MiB" if peak else "memory not measured"


DOMAINS = {
    "one": "one domain for all samples", "own": "the model's own parameters", "mixed": "a domain for each sample",
    "mixed-strength": "the same, a strength for each", "merged": "merged models in turn",
    "lora": "PEFT LoRA, rank {rank}, an adapter for each",
}  # fmt: skip
KEPT = {"merged": "merged", "lora": "lora"}  # what a domain of that method is; a delta otherwise


def many_tables(files: list[tuple[Path, dict[str, Any]]], root: Path = ROOT) -> str:
    """A Markdown table for each file, one row a method: times, as multiples of one domain's, memory, bytes of a domain."""
    if not files:
        return "Not measured yet: `python benchmarks/many.py --json benchmarks/results/<device>/many-<dtype>.json`."
    return "\n\n".join(_many_table(path, result, root) for path, result in files)


def _many_table(path: Path, result: dict[str, Any], root: Path) -> str:
    where = os.path.relpath(path, root).replace(os.sep, "/")
    expected, tokens = result["prediction"], (result["side"] // 2) ** 2
    head = (
        f"{device_of(result)}, PyTorch {result['torch']}, width {result['width']}, {result['depth']} blocks, "
        f"{tokens} tokens, batch {result['batch_size']} in {result['domains']} domains, {result['dtype']} "
        f"([{result['date'][:10]}]({where})). Before measuring, products alone: a domain for each sample "
        f"{expected['mixed_flops_times_one']:.4f} × one, LoRA {expected['lora_flops_times_one']:.3f} × one; vectors laid "
        f"side by side {expected['mixed_stacked_bytes'] / 1e6:.1f} MB, gathered {expected['mixed_gathered_bytes'] / 1e6:.1f} MB."
    )
    several = ["inference", "× one", "peak memory", "training step", "× one", "peak memory"]
    columns = ["", *several, "a domain more: file", "memory"]
    lines = [columns, ["---"] * len(columns)]
    for name, title in DOMAINS.items():
        if name not in result["inference"]["modes"]:
            continue
        size = result["domain_bytes"].get(KEPT.get(name, "delta"))
        kept = [f"{size[key] / 1e6:.3f} MB" if size else "" for key in ("disk", "memory")]
        cells = [cell for phase in ("inference", "training") for cell in _many_cells(result[phase], name)]
        lines.append([title.format(rank=result["rank"]), *cells, *kept])
    return head + "\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _many_cells(phase: dict[str, Any], name: str) -> list[str]:
    """Milliseconds, the multiple of ``one`` with its interval, and the peak of a method; nothing where it was not measured."""
    if name not in phase["modes"]:
        return [""] * 3
    row, ratio = phase["modes"][name], phase["ratios"].get(name)
    says = row["problem"] or ""
    if ratio:
        low, high = ratio["interval"] or (ratio["round_p10"], ratio["round_p90"])
        says = f"**{ratio['round_median']:.2f}** ({low:.2f}–{high:.2f})"
    return [f"{row['batch_ms']['median']:.1f} ms", says, _mebibytes(phase["modes"], name)]


def insert(text: str, block: str, content: str) -> str:
    """``text`` with the lines between the markers of ``block`` replaced.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    begin, end = f"<!-- {block}:begin -->", f"<!-- {block}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"expected one line {begin} and after it one line {end}")
    before, rest = text.split(begin)
    return f"{before}{begin}\n\n{content}\n\n{end}{rest.split(end)[1]}"


# -- plots -------------------------------------------------------------------------------------------------------------
def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install difffit_fast[eval]") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(figure: Any, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format=path.suffix[1:])
    _pyplot().close(figure)


def plot_speed(result: dict[str, Any], path: Path) -> None:
    """Milliseconds of a step in every mode, with the 10th to 90th percentile, and the floor of a frozen step."""
    plt = _pyplot()
    names = list(result["modes"])
    spread = [result["modes"][n]["step_ms"] for n in names]
    median = [s["median"] for s in spread]
    error = [
        [m - s["p10"] for m, s in zip(median, spread, strict=True)],
        [s["p90"] - m for m, s in zip(median, spread, strict=True)],
    ]
    figure, axes = plt.subplots(figsize=(7, 0.45 * len(names) + 1.6), layout="constrained")
    axes.barh(names, median, xerr=error, color=[COLOURS.get(n.split("-")[0], "tab:gray") for n in names], capsize=3)
    if "frozen_ms" in result["floor"]:
        axes.axvline(result["floor"]["frozen_ms"], color="black", linestyle="--", linewidth=1)
        axes.text(result["floor"]["frozen_ms"], 1.01, " floor", fontsize=8, transform=axes.get_xaxis_transform())
    for i, m in enumerate(median):
        axes.text(0, i, f" {m:.1f}", va="center", color="white", fontsize=9)
    axes.invert_yaxis()
    axes.set_xlabel("ms per step")
    what = f"{result['model']}, {result['image_size']} px, batch {result['batch_size']}, {result['dtype']}"
    axes.set_title(f"{what}\n{result['device']}, PyTorch {result['torch']}, {result['date'][:10]}", fontsize=9, pad=14)
    _save(figure, path)


def plot_ops(record: dict[str, Any], path: Path) -> None:
    """For every kernel GB/s over the number of images, at the widest D and first dtype measured; the copy as ceiling."""
    rows = record["rows"]
    if not rows:
        return
    plt = _pyplot()
    width, dtype = max(r["D"] for r in rows), rows[0]["dtype"]
    rows = [r for r in rows if r["D"] == width and r["dtype"] == dtype]
    kernels = list(dict.fromkeys(r["kernel"] for r in rows))
    columns = min(4, len(kernels))
    lines = -(-len(kernels) // columns)
    figure, grid = plt.subplots(
        lines, columns, figsize=(3.4 * columns, 2.7 * lines), squeeze=False, layout="constrained"
    )
    for axes, kernel in zip(grid.flat, kernels, strict=False):
        mine = [r for r in rows if r["kernel"] == kernel]
        rate, unit = ("tflops", "TFLOP/s") if any(r["tflops"] for r in mine) else ("gbs", "GB/s")
        for variant in dict.fromkeys(r["variant"] for r in mine):
            points = sorted((r["B"], r[rate]) for r in mine if r["variant"] == variant)
            if not any(y for _, y in points):
                continue
            style = {"color": "tab:blue", "linewidth": 2} if variant == "ours" else {"linewidth": 1}
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=variant, **style)
        if rate == "gbs":
            axes.axhline(record["copy_gbs"], color="black", linestyle="--", linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set_title(kernel, fontsize=9)
        axes.set_ylabel(unit, fontsize=8)
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=6)
    for axes in grid.flat[len(kernels) :]:
        axes.set_visible(False)
    figure.supxlabel("images", fontsize=8)
    head = f"{record['device']}, PyTorch {record['torch']}, {record['date'][:10]}: D = {width}, {dtype}; dashed: large copy"
    figure.suptitle(head, fontsize=9)
    _save(figure, path)


# -- the command -------------------------------------------------------------------------------------------------------
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where many.md lies")
    parser.add_argument("--check", action="store_true", help="fail if a table is out of date; write nothing")
    args = parser.parse_args(argv)
    speed = [(path, result) for path, result in load(args.results, "speed*.json") if result.get("complete", True)]
    applied = [(path, result) for path, result in load(args.results, "apply*.json") if result["complete"]]
    many = [(path, result) for path, result in load(args.results, "many*.json") if result["complete"]]
    demo = load(args.results, "demo.json")
    pages: dict[Path, dict[str, Callable[[Path], str]]] = {
        args.readme: {
            "speed": lambda root: speed_table(speed, root),
            "demo": lambda root: demo_block(demo, root),
            "apply": lambda root: apply_table(applied, root),
        },
        args.docs / "many.md": {"many": lambda root: many_tables(many, root)},
    }
    changed: dict[Path, str] = {}
    for page, blocks in pages.items():
        try:
            text = new = page.read_text()
            for block, content in blocks.items():
                new = insert(new, block, content(page.resolve().parent))
        except (OSError, ValueError) as error:
            print(f"{page}: {error}", file=sys.stderr)
            return 1
        if new != text:
            changed[page] = new
    if args.check:
        for page in changed:
            print(f"{page}: a table of it is not what {args.results} says; run python benchmarks/plots.py")
        return int(bool(changed))
    for page, text in changed.items():
        write_text(page, text)
    for path, result in speed:
        plot_speed(result, path.with_suffix(".png"))
    ops = load(args.results, "ops.json")
    for path, record in ops:
        plot_ops(record, path.with_suffix(".png"))
    print(
        f"{' and '.join(map(str, pages))}: {len(speed) + len(applied) + len(many)} files in tables; "
        f"{len(speed) + len(ops)} plots under {args.results}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
