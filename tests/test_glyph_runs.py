"""The base of the glyphs and the experiments with it: what ships, what is run, what is reported."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from difffit_fast import DiT, load_model
from difffit_fast.errors import DiffFitError
from difffit_fast.models.header import write_model_file
from difffit_fast.sample.images import save_png
from difffit_fast.train.config import TrainConfig

ROOT = Path(__file__).resolve().parent.parent
GLYPHS = ROOT / "experiments" / "glyphs"
if not GLYPHS.is_dir():
    pytest.skip("the experiments are not part of this installation", allow_module_level=True)
sys.path[:0] = [str(GLYPHS), str(GLYPHS.parent)]
pytest.importorskip("matplotlib")

import base  # noqa: E402
import domains  # noqa: E402
import eight_bit  # noqa: E402
import gamma  # noqa: E402
import guidance  # noqa: E402
import plan as planning  # noqa: E402
import resolution  # noqa: E402
from alphabet import LETTERS, Glyphs, folder_of  # noqa: E402
from reporting import Results  # noqa: E402

PLAN = yaml.safe_load((GLYPHS / "domains.yaml").read_text(encoding="utf-8"))


def glyphs(fonts: list[str]) -> Glyphs:
    n = len(fonts) * 52
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 1, 24, 24), dtype=torch.uint8, generator=generator)
    return Glyphs(images, torch.arange(52).repeat(len(fonts)), [f for font in fonts for f in [font] * 52], "letters")


# -- the base ----------------------------------------------------------------------------------------------------------
def test_the_recipe_of_the_base_is_one_that_the_trainer_takes() -> None:
    settings = yaml.safe_load((GLYPHS / "base.yaml").read_text(encoding="utf-8"))
    config = TrainConfig(**settings, feature_path="features")
    assert config.method == "full" and config.ckpt is None and config.flip == "none" and config.vae == "none"


def test_what_ships_is_the_averaged_model_in_half_the_bytes(tmp_path: Path) -> None:
    dit = DiT(input_size=24, patch_size=4, in_channels=1, hidden_size=64, depth=2, num_heads=2, num_classes=52)
    torch.nn.init.normal_(dit.final_layer.linear.weight, std=0.1)
    run = tmp_path / "run"
    for step in (9, 12):
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)
        header = {
            "config": dit.config,
            "pos_embed_scale": 1.0,
            "class_names": list(LETTERS),
            "step": step,
            "vae": "none",
        }
        write_model_file(run / "checkpoints" / f"{step:07d}.safetensors", "model", dit.state_dict(), header)
    assert base.newest(run).stem == "0000012"
    base.pack(base.newest(run), tmp_path / "glyphs.safetensors")
    loaded = load_model(tmp_path / "glyphs.safetensors")
    assert loaded.class_names == list(LETTERS) and loaded.header["step"] == 12 and loaded.header["vae"] == "none"
    for name, tensor in dit.state_dict().items():
        got = loaded.model.state_dict()[name]
        exact = name == "pos_embed"
        torch.testing.assert_close(got, tensor, rtol=0 if exact else 2**-8, atol=0)
    assert (tmp_path / "glyphs.safetensors").stat().st_size < 0.6 * base.newest(run).stat().st_size
    with pytest.raises(DiffFitError, match="no checkpoint in"):
        base.newest(tmp_path)


def measured(**changes: float) -> dict:
    adapted = {"letters": 0.85, "letters_real": 0.9}
    found = {
        "letters": 0.97, "letters_real": 0.99, "val_loss": 0.0201, "least_val_loss": 0.02, "loss_shown": 0.02,
        "loss_not_shown": 0.0205, "copies": 0.01, "adapted_20": dict(adapted), "adapted_300": dict(adapted),
    }  # fmt: skip
    for key, value in changes.items():
        if key.startswith("adapted"):
            found[key] = {**adapted, "letters": value}
        else:
            found[key] = value
    return found


def test_every_part_of_the_gate_can_shut_it() -> None:
    assert all(base.gate(measured()).values())
    for change in (
        {"letters": 0.94}, {"val_loss": 0.0203}, {"loss_not_shown": 0.0231}, {"copies": 0.04}, {"adapted_20": 0.8},
        {"adapted_300": 0.8},
    ):  # fmt: skip
        assert list(base.gate(measured(**change)).values()).count(False) == 1, change


def test_the_card_says_what_was_measured_and_what_was_not_passed() -> None:
    found = measured(letters=0.9)
    report = {
        "measured": found, "gate": base.gate(found), "parameters": 1_881_120, "architecture": "DiT-custom", "images": 50180,
        "families": 430, "licences": "OFL-1.1 417", "step": 20000, "batch": 64,
    }  # fmt: skip
    text = base.card(report)
    for part in (
        "1.88 M parameters",
        "90.0%; 99.0%",
        "50,180 glyphs",
        "OFL-1.1 417",
        "≥ 95% | **no** |",
    ):
        assert part in text, part


def test_the_shipped_base_is_the_one_that_was_measured() -> None:
    report = ROOT / "docs" / "experiments" / "glyphs_base.json"
    if not base.FOLDER.is_dir():
        pytest.skip("no base ships")
    from difffit_fast._files import sha256

    found = json.loads(report.read_text(encoding="utf-8"))
    assert sha256(base.FOLDER / "glyphs.safetensors") == found["sha256"] and all(found["gate"].values())
    assert (base.FOLDER / "glyphs.md").read_text(encoding="utf-8") == base.card(found)


# -- the runs ----------------------------------------------------------------------------------------------------------
def test_nothing_is_chosen_on_what_is_reported(tmp_path: Path) -> None:
    """Tuning looks at families of another part, with a seed that no other run has."""
    tuning = list(planning.tuning_specs(PLAN, "base"))
    assert {spec["seed"] for spec in tuning}.isdisjoint(PLAN["seeds"]) and all(
        spec["sampling"] is None for spec in tuning
    )
    assert not planning.chosen(PLAN, "base", Results(tmp_path / "none.jsonl")).keys() & {
        ("difffit", "20"),
        ("full", "20"),
    }
    results = Results(tmp_path / "runs.jsonl")
    for spec in tuning:
        best = spec["lr"] == PLAN["methods"][spec["name"]]["rates"][1]
        curve = [[step, 1 - 0.1 * best - 0.01 * (step == 200)] for step in (0, *PLAN["steps"])]
        results.runs[planning.key_of(spec)] = {"curve": curve}
    chosen = planning.chosen(PLAN, "base", results)
    for name, method in PLAN["methods"].items():
        rate = method["rates"][0 if method.get("care") == "none" else 1]
        assert chosen[name, "20"] == (rate, 200), name
    specs = list(planning.comparison_specs(PLAN, "base", chosen))
    keys = [planning.key_of(spec) for spec in specs]
    assert len(set(keys)) == len(keys) and set(keys).isdisjoint(map(planning.key_of, tuning))
    assert {spec["seed"] for spec in specs} == set(PLAN["seeds"])


def test_halves_of_a_font_share_no_letter_and_have_both_cases() -> None:
    shown, asked = domains.halves(glyphs(["hand-400"]))
    assert len(shown) == len(asked) == 26 and not set(shown.labels.tolist()) & set(asked.labels.tolist())
    for part in (shown, asked):
        assert sum(part.labels < 26) == 13
        assert {LETTERS[i].lower() for i in part.labels[:13]} != {LETTERS[i] for i in part.labels[13:]}


def test_labels_that_are_sampled_are_those_that_are_asked_for() -> None:
    few = glyphs(["hand-400"]).where(torch.tensor([3, 7, 30]))
    assert domains.sampled_labels(few, 7).tolist() == [3, 7, 30, 3, 7, 30, 3]


def test_few_are_drawn_by_the_seed() -> None:
    everything = glyphs(["hand-400", "quill-400"])
    first, again, other = (domains.thinned(everything, 20, seed) for seed in (1000, 1000, 1001))
    assert torch.equal(first.images, again.images) and not torch.equal(first.labels, other.labels) and len(first) == 20


# -- guidance ----------------------------------------------------------------------------------------------------------
GUIDED = yaml.safe_load((GLYPHS / "guidance.yaml").read_text(encoding="utf-8"))


def test_guidance_is_reported_with_who_wins(tmp_path: Path) -> None:
    pairs = list(guidance.combinations(GUIDED))
    assert pairs[0] == ("none", 1.0) and len(pairs) == len(set(pairs)) == 1 + 2 * (len(GUIDED["scales"]) - 1)
    results, page = Results(tmp_path / "guidance.jsonl"), tmp_path / "page.md"
    page.write_text("<!-- guidance: begin -->\n<!-- guidance: end -->\n")
    with pytest.raises(DiffFitError, match="there are no samples to report yet"):
        guidance.write(GUIDED, "base", results, tmp_path, page)
    better = {"handwriting": "source", "blackletter": "cfg", "inline": None}
    for seed in GUIDED["seeds"][:3]:
        for domain in GUIDED["domains"]:
            spec = guidance.spec_of(GUIDED, "base", domain, seed)
            for kind, scale in pairs:
                distance = 20 + abs(scale - 2) - 5 * (kind == better[domain]) + 0.1 * seed * (1 + (kind == "cfg"))
                measures = {"frechet": distance, "letters": 0.8, "style": None, "memorised": 0.0}
                key = guidance.key_of_samples(spec, kind, scale)
                results.add({"key": key, "domain": domain, "seed": seed, "kind": kind, "scale": scale, **measures})
    guidance.write(GUIDED, "base", results, tmp_path, page)
    text = page.read_text()
    assert "handwriting: guidance from the base (2) is better" in text
    assert "blackletter: guidance from the base (2) is worse" in text
    assert "inline: guidance from the base (2) cannot be told apart" in text
    assert (tmp_path / "guidance.png").stat().st_size > 10_000 and "| from the base | 5 |" in text


# -- twice the resolution -----------------------------------------------------------------------------------------------
def test_twice_the_resolution_runs_and_reports(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for part, fonts in (("train", ("a-400", "b-400")), ("val", ("c-400",))):
        for character in LETTERS:
            folder = tmp_path / "data" / "base" / part / folder_of(character)
            folder.mkdir(parents=True)
            for font in fonts:
                save_png(
                    torch.randint(0, 256, (48, 48), dtype=torch.uint8, generator=generator).numpy(),
                    folder / f"{font}.png",
                )
    tiny = {"seeds": [0], "kinds": ["scaled", "native"], "size": 48, "shown": 30, "held_out": 52, "batch": 4, "lr": 1e-3,
            "steps": 2, "points": [0, 2], "sampling": {"images": 66, "steps": 1, "cfg_scale": 2.0}}  # fmt: skip
    plan, page = tmp_path / "plan.yaml", tmp_path / "page.md"
    plan.write_text(yaml.safe_dump(tiny))
    page.write_text("before\n<!-- resolution: begin -->STALE<!-- resolution: end -->after\n")
    arguments = ["--plan", plan, "--results", tmp_path, "--page", page, "--cache", tmp_path / "cache"]
    assert resolution.main([*map(str, arguments), "--data", str(tmp_path / "data")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "resolution.jsonl").read_text().splitlines()]
    assert {line["spec"]["kind"]: line["pos_embed_scale"] for line in lines} == {"scaled": 0.5, "native": 1.0}
    assert all(set(line["losses"]) == {"0", "2"} for line in lines)
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {
        f"{kind}-{when}.png" for kind in ("scaled", "native") for when in ("before", "after")
    }
    text = page.read_text()
    assert text.startswith("before\n") and "STALE" not in text and "| loss at step 2 |" in text
    plan.write_text(yaml.safe_dump({**tiny, "size": 24}))
    assert resolution.main([*map(str, arguments), "--data", str(tmp_path / "data")]) == 2


# -- γ on the base ------------------------------------------------------------------------------------------------------
def test_moments_are_those_of_all_rows_and_the_worst_noise_costs_what_the_formula_says() -> None:
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(2000, 8, generator=generator, dtype=torch.float64) + 0.3
    seen = gamma.Moments(generator)
    for part in A.view(40, 50, 8).split(16):
        seen.see(torch.nn.Identity(), (), part)
    assert seen.rows == 2000
    torch.testing.assert_close(seen.gram, A.T @ A)
    got = gamma._bound(seen, {"spread": 2.0, "eta": 0.1, "max_steps": 20000}, generator)
    least = torch.linalg.svdvals(A)[-1] ** 2 / (2000 * A.var(0, correction=0).min())
    assert got["independence"] == pytest.approx(float(least))
    assert got["worst_at_end"] == pytest.approx(1 / (4 * (2 * float(least)) ** 0.5), rel=1e-6)
    assert got["worst"] == pytest.approx(got["worst_at_end"], rel=1e-6) and got["random_at_end"] < got["worst_at_end"]


def test_gamma_comes_nearer_to_the_truth_by_training() -> None:
    spec = {"first": 0, "end": 1000, "spread": 2.0, "seed": 0, "steps": 6, "batch": 8, "lr": 1e-2, "looks": 16}
    found = gamma.recovery("glyphs", spec, gamma.load(gamma.IMAGES))
    assert found["trained"] == 6 * 2 * 128 and found["prediction"] < 0.95 and found["gamma"] < 1


# -- the pages ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("script", "stored", "page"),
    [
        (domains, "glyphs", "experiments"),
        (guidance, "guidance", "experiments"),
        (resolution, "resolution", "experiments"),
        (gamma, "gamma", "experiments_theory"),
        (eight_bit, "eight_bit", "eight-bit"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_pages_say_what_the_stored_runs_say(tmp_path: Path, script: Any, stored: str, page: str) -> None:
    """The block of the page, made anew from the stored runs, is the same."""
    docs = ROOT / "docs"
    if not (docs / "experiments" / f"{stored}.jsonl").exists():
        pytest.skip("nothing was run, or the documentation is not part of this installation")
    shutil.copytree(docs / "experiments", tmp_path / "experiments")
    copied = tmp_path / f"{page}.md"
    shutil.copy(docs / f"{page}.md", copied)
    arguments = ["--report", "--results", tmp_path / "experiments", "--page", copied]
    assert script.main(list(map(str, arguments))) == 0
    assert copied.read_text(encoding="utf-8") == (docs / f"{page}.md").read_text(encoding="utf-8")
