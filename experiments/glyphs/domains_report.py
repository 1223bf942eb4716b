"""Tables, plots and the reading of experiments/glyphs/domains.py, all of it computed from the stored runs."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from plan import Chosen, Spec, chosen, comparison_specs, key_of, tuning_specs
from reporting import Results, interval, paired, replace_block, save_figure, seeds_said, table, verdict

from difffit_fast._files import write_text
from difffit_fast.errors import DiffFitError

Run = dict[str, Any]
Runs = dict[str, dict[str, dict[str, dict[int, Run]]]]  # images shown -> domain -> method -> seed -> run

LABELS = {
    "none": "the base, not adapted", "difffit": "DiffFit", "difffit_default": "DiffFit, rate 1e-3",
    "difffit_block": "DiffFit, preset block", "difffit_minimax": "DiffFit, preset minimax", "gamma": "γ alone",
    "bitfit": "BitFit", "lora": "LoRA, rank 8", "adapter": "AdaptFormer", "full": "full", "full_default": "full, rate 1e-4",
}  # fmt: skip
AGAINST = (
    "full",
    "full_default",
    "bitfit",
    "lora",
    "adapter",
    "gamma",
    "difffit_block",
    "difffit_minimax",
    "difffit_default",
)
MEASURES = {"loss": "held-out loss", "frechet": "Fréchet distance"}


def compared(plan: Spec, base: str, results: Results) -> Runs:
    """The stored runs of the comparison."""
    found: Runs = {}
    for spec in comparison_specs(plan, base, chosen(plan, base, results)):
        if run := results.runs.get(key_of(spec)):
            domains = found.setdefault(str(spec["shown"]), {}).setdefault(spec["domain"], {})
            domains.setdefault(spec["name"], {})[spec["seed"]] = run
    return found


def ratio(runs: dict[int, Run], base: dict[int, Run], measure: str) -> list[float]:
    """``measure`` of each seed's run over that of the base, not adapted, where both have it."""
    pairs = [(runs[s].get(measure), base[s].get(measure)) for s in sorted(set(runs) & set(base))]
    return [mine / theirs for mine, theirs in pairs if mine is not None and theirs]


def write(plan: Spec, base: str, results: Results, folder: Path, page: Path, samples: Path) -> None:
    """Everything there is to report: plots in ``folder``, and the marked part of ``page``."""
    runs = compared(plan, base, results)
    if not runs:
        raise DiffFitError("there are no runs to report yet")
    folder.mkdir(parents=True, exist_ok=True)
    best = chosen(plan, base, results)
    parts = [setting(plan, runs), care_table(plan, best)]
    if draw_curves(plan, base, results, folder / "glyphs_curves.png"):
        parts.append(f"![Loss over steps of every method and rate]({folder.name}/glyphs_curves.png)")
    for shown, domains in runs.items():
        parts += [loss_table(shown, domains), summary_table(domains), claims(domains)]
        name = f"glyphs_samples_{shown}.png"
        if draw_samples(plan, domains, samples, folder / name) or (folder / name).exists():
            parts.append(f"![Real letters that were not shown, and samples]({folder.name}/{name})")
    replace_block(page, "glyphs", "\n\n".join(parts))
    summary = {shown: {d: _summary(found) for d, found in domains.items()} for shown, domains in runs.items()}
    write_text(folder / "glyphs.json", json.dumps({"plan": plan, "base": base, "summary": summary}, indent=1) + "\n")


def _summary(found: dict[str, dict[int, Run]]) -> dict[str, Any]:
    return {
        name: {m: interval([r[m] for r in by_seed.values()])._asdict() for m in MEASURES}
        for name, by_seed in found.items()
    }


# -- text --------------------------------------------------------------------------------------------------------------
def setting(plan: Spec, runs: Runs) -> str:
    seeds = [len(by_seed) for domains in runs.values() for found in domains.values() for by_seed in found.values()]
    sampling = plan["sampling"]
    return (
        f"{seeds_said(seeds)}; {plan['batch']} images a step; {sampling['images']} samples a run "
        f"({sampling['steps']} DDIM steps, guidance {sampling['cfg_scale']:g}, averaged weights). Held-out loss is DiT's, the "
        "same noise and timesteps for everybody, on families that were neither shown nor used to choose anything."
    )


def care_table(plan: Spec, best: Chosen) -> str:
    """The rate and length that were chosen for each method, and from what."""
    shown = [str(n) for n in plan["shown"]]
    rows = [
        [LABELS.get(name, name), *(f"{best[name, n][0]:g} × {best[name, n][1]}" if (name, n) in best else "–" for n in shown),
         "not chosen: as published" if method.get("care") == "none" else ", ".join(f"{r:g}" for r in method["rates"])]
        for name, method in plan["methods"].items()
    ]  # fmt: skip
    head = ["method", *(f"{n} images: rate × steps" for n in shown), "rates tried"]
    tuning = plan["tuning"]
    return (
        f"How much care was taken. Rate and length are those of the smallest loss on {tuning['domain']} families that are used "
        f"for nothing else, among {', '.join(map(str, plan['steps']))} steps of every rate, with a seed that no other run has; "
        "they are then used on every domain.\n\n" + table(head, rows)
    )


def loss_table(shown: str, domains: dict[str, dict[str, dict[int, Run]]]) -> str:
    """Held-out loss relative to the base that is not adapted."""
    names = [name for name in LABELS if any(name in found for found in domains.values()) and name != "none"]
    cells = {
        d: {n: interval(ratio(found[n], found["none"], "loss")) for n in names if n in found}
        for d, found in domains.items()
    }
    rows = []
    for name in names:
        row = [LABELS[name]]
        for found in cells.values():
            text = str(found[name]) if name in found else "not run"
            smallest = name in found and found[name].mean == min(i.mean for i in found.values())
            row.append(f"**{text}**" if smallest else text)
        rows.append(row)
    title = {"all": "All images shown", "half": "Half of the letters of one font shown"}.get(
        shown, f"{shown} images shown"
    )
    return f"### {title}\n\nHeld-out loss as a part of the base's own; below 1 is learned.\n\n" + table(
        ["method", *cells], rows
    )


def summary_table(domains: dict[str, dict[str, dict[int, Run]]]) -> str:
    """Means over domains and seeds: a table for each set of domains on which some method was run, of all that were run there."""
    where = {name: tuple(d for d, found in domains.items() if name in found and "none" in found) for name in LABELS}
    sets = sorted({own for own in where.values() if own}, key=len, reverse=True)
    head = [
        "method", "loss / base's", "Fréchet / base's", "letters read, of real", "style read", "copies", "loss, base's domain",
        "trained", "kB to keep",
    ]  # fmt: skip
    texts = []
    for own in sets:
        rows = []
        for name in LABELS:
            if not set(own) <= set(where[name]):
                continue
            every = [(domains[domain][name], domains[domain]["none"]) for domain in own]
            every_run = [run for mine, _ in every for run in mine.values()]
            rows.append([
                LABELS[name], _mean(r for mine, base in every for r in ratio(mine, base, "loss")),
                _mean(r for mine, base in every for r in ratio(mine, base, "frechet")),
                _mean((r["letters"] / r["letters_real"] for r in every_run if r.get("letters_real")), "{:.0%}"),
                _mean((r["style"] for r in every_run if r.get("style") is not None), "{:.0%}"),
                _mean((r["memorised"] for r in every_run if r.get("memorised") is not None), "{:.1%}"),
                _mean(r for mine, base in every for r in ratio(mine, base, "loss_own")),
                _mean((r["trainable"] for r in every_run if "trainable" in r), "{:,.0f}"),
                _mean((r["file_bytes"] / 1000 for r in every_run if "file_bytes" in r), "{:,.0f}"),
            ])  # fmt: skip
        scope = "all domains" if len(own) == len(domains) else ", ".join(own)
        texts.append(f"Means over seeds and {scope}.\n\n" + table(head, rows))
    return "\n\n".join(texts)


def _mean(values: Iterable[float], form: str = "{:.3f}") -> str:
    values = list(values)
    return form.format(sum(values) / len(values)) if values else "–"


def claims(domains: dict[str, dict[str, dict[int, Run]]]) -> str:
    """DiffFit against every other, paired by seed: on how many domains it is better, worse, or neither can be said."""
    rows = []
    for other in AGAINST:
        row = [f"DiffFit against {LABELS[other]}"]
        for measure in MEASURES:
            words: dict[str, list[str]] = {"holds": [], "the reverse": [], "undecided": []}
            for domain, found in domains.items():
                difference = paired(found.get("difffit", {}), found.get(other, {}), measure)
                if difference is not None:
                    words[verdict(difference)].append(domain)
            better, worse, neither = (len(words[word]) for word in ("holds", "the reverse", "undecided"))
            if better or worse or neither:
                row.append(f"better on {better}, worse on {worse}, undecided on {neither}")
        if len(row) > 1:
            rows.append(row)
    text = "Differences paired by seed; better or worse where the 95 % interval of the difference excludes 0.\n\n"
    return text + table(["", *(f"by {label}" for label in MEASURES.values())], rows)


# -- pictures ----------------------------------------------------------------------------------------------------------
def draw_curves(plan: Spec, base: str, results: Results, path: Path) -> bool:
    """The loss over steps of the runs that rates and lengths were chosen from; False if there are none."""
    found: dict[str, list[tuple[Spec, Run]]] = {}
    for spec in tuning_specs(plan, base):
        if run := results.runs.get(key_of(spec)):
            found.setdefault(str(spec["shown"]), []).append((spec, run))
    if not found:
        return False
    found = {str(shown): found[str(shown)] for shown in plan["shown"] if str(shown) in found}

    def draw(plt: Any) -> Any:
        figure, axes = plt.subplots(1, len(found), figsize=(4.2 * len(found), 4), squeeze=False, sharey=True)
        colours = dict(zip(plan["methods"], plt.rcParams["axes.prop_cycle"].by_key()["color"], strict=False))
        for axis, (shown, runs) in zip(axes[0], found.items(), strict=True):
            for spec, run in runs:
                rates = sorted(plan["methods"][spec["name"]]["rates"])
                style = (":", *("-" if len(rates) == 3 else ("-", "-.")), "--")[rates.index(spec["lr"])]
                label = LABELS[spec["name"]] if style == "-" else None
                axis.plot(
                    *zip(*run["curve"], strict=True), style, color=colours.get(spec["name"]), label=label, linewidth=1
                )
            axis.set(title=f"{shown} images", xlabel="step")
        axes[0][0].set_ylabel(f"loss on {plan['tuning']['domain']} that was not shown")
        axes[0][0].legend(frameon=False, fontsize=7)
        figure.supxlabel("from the lowest rate to the highest: dotted, solid, (dash-dotted,) dashed", fontsize=8)
        figure.tight_layout()
        return figure

    save_figure(path, draw)
    return True


def draw_samples(plan: Spec, domains: dict[str, dict[str, dict[int, Run]]], folder: Path, path: Path) -> bool:
    """For each domain what was shown, real letters that were not, and the samples of some methods; False if none are kept."""
    seed = plan["seeds"][0]
    lines: list[tuple[str, np.ndarray]] = []
    for domain, found in domains.items():
        for name in ("none", "difffit", "full", "full_default"):
            run = found.get(name, {}).get(seed)
            file = folder / f"{file_name(run['key'])}.png" if run else None
            if file is None or not file.exists():
                continue
            if name == "none":
                for part in ("shown", "held-out"):
                    if (strip := file.with_suffix(f".{part}.png")).exists():
                        lines.append((f"{domain}: {part}", np.asarray(Image.open(strip).convert("L"))))
            lines.append((LABELS[name], np.asarray(Image.open(file).convert("L"))))
    if not lines:
        return False

    def draw(plt: Any) -> Any:
        heights = [strip.shape[0] for _, strip in lines]
        figure, axes = plt.subplots(
            len(lines), 1, figsize=(11, sum(heights) / 62), squeeze=False, gridspec_kw={"height_ratios": heights}
        )
        for axis, (label, strip) in zip(axes[:, 0], lines, strict=True):
            axis.imshow(255 - strip, cmap="gray", vmin=0, vmax=255, interpolation="nearest", aspect="equal")
            axis.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=7)
            axis.set(xticks=[], yticks=[])
            for side in axis.spines.values():
                side.set_visible(False)
        widest = max(len(label) for label, _ in lines)
        margin = max(0, (widest - 26) * 0.005)  # the layout does not count on long labels of axes without ticks
        figure.tight_layout(h_pad=0.1, rect=(margin, 0, 1, 1))
        return figure

    save_figure(path, draw)
    return True


def file_name(key: str) -> str:
    return key.replace("/", "_").replace(" ", "-")
