"""The small experiments: images, measures, resumable runs, and a page that says what the stored runs say."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml

from difffit_fast import DiT
from difffit_fast.errors import DiffFitError

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "experiments"))
if not (ROOT / "experiments").is_dir():
    pytest.skip("the experiments are not part of this installation", allow_module_level=True)
for extra in ("sklearn", "scipy", "matplotlib"):
    pytest.importorskip(extra)

import reporting  # noqa: E402
import resolution  # noqa: E402
import small  # noqa: E402
import transfer  # noqa: E402
import transfer_plan  # noqa: E402

PAGE = """before
<!-- transfer: begin -->
STALE
<!-- transfer: end -->
<!-- resolution: begin --><!-- resolution: end -->after
"""
TINY = {
    "seeds": [0, 1],
    "sets": ["digits"],
    "model": {"input_size": 8, "patch_size": 4, "in_channels": 1, "hidden_size": 16, "depth": 2, "num_heads": 2},
    "pretrain": {"steps": 3, "batch": 8, "lr": 1e-3},
    "finetune": {"steps": 2, "batch": 8},
    "sampling": {"samples": 40, "steps": 2},
    "methods": {
        "none": {"method": "class_embedding", "steps": 0},
        "full": {"method": "full"},
        "difffit": {"method": "difffit"},
        "difffit_last": {"method": "difffit", "gamma_blocks": -1},
    },
    "tuning": {"set": "digits", "seed": 9, "multiples": [1, 10], "shared": {"difffit_last": "difffit"}},
    "sweep": {"method": "difffit", "set": "digits", "multiples": [1, 10]},
}


@pytest.fixture
def quick(monkeypatch):
    """A classifier of ten steps."""
    trained = small.train_classifier
    monkeypatch.setattr(small, "train_classifier", lambda images: trained(images, steps=10))


def test_sets_are_real_images_in_range():
    for name, make in small.SETS.items():
        images, labels, boundary = make()
        assert images.shape[1:] == (1, 8, 8) and len(images) == len(labels) > 1000
        assert -1 <= images.min() < -0.9 and 0.9 < images.max() <= 1
        assert 1 < boundary < labels.max()
        assert torch.bincount(labels).min() > 90, name


def test_split_divides_without_overlap():
    images, labels, _ = small.digits()
    part = small.split(images, labels, 5, 10)
    assert part.classes == 5 and set(part.train_labels.tolist()) == set(range(5))
    assert len(part.train) + len(part.val) == int((labels >= 5).sum())
    assert torch.equal(part.train, small.split(images, labels, 5, 10).train)


def test_high_and_low_resolution_are_the_same_patches():
    low, high = resolution.data()
    assert low.train.shape[2:] == (8, 8) and high.train.shape[2:] == (16, 16)
    i = 11
    assert torch.allclose(low.train[i, 0, 2, 3], high.train[i, 0, 4:6, 6:8].mean(), atol=1e-6)
    assert torch.equal(low.train_labels, high.train_labels)


def test_batches_pass_over_everything_before_anything_twice():
    found = list(small.batches(10, 3, 7, torch.Generator().manual_seed(0)))
    assert len(found) == 7 and all(len(index) == 3 for index in found)
    for epoch in (found[:3], found[3:6]):
        assert len(set(torch.cat(epoch).tolist())) == 9


def test_saved_bytes_of_two_linear_maps():
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))
    x = torch.randn(11, 5)
    with small.SavedBytes(model) as counter:
        model(x)
    assert counter.bytes == 4 * 11 * (5 + 7)  # x and the output of tanh; the weights are not counted
    model.requires_grad_(False)
    with small.SavedBytes(model) as counter:
        model(x)
    assert counter.bytes == 0


def test_new_classes_keep_the_rest():
    old = DiT(**TINY["model"], num_classes=3)
    state = {k: v + 0.1 for k, v in old.state_dict().items()}
    new = small.with_new_classes(state, TINY["model"], 6, seed=1)
    key = "y_embedder.embedding_table.weight"
    assert new.state_dict()[key].shape == (7, 16)
    assert torch.equal(new.state_dict()[key][-1], state[key][-1])
    assert all(torch.equal(v, state[k]) for k, v in new.state_dict().items() if k != key)


def test_training_leaves_frozen_weights_and_lowers_the_loss():
    images, labels, _ = small.digits()
    part = small.split(images, labels, 0, 2)
    torch.manual_seed(0)
    dit = DiT(**TINY["model"], num_classes=2)
    frozen = dit.blocks[0].mlp.fc1.weight.requires_grad_(False).clone()
    before = small.validation_loss(dit.eval(), part)["loss"]
    trained = small.train(dit, part, steps=60, batch=16, lr=3e-3, seed=0)
    assert small.validation_loss(dit, part)["loss"] < 0.9 * before
    assert torch.equal(dit.blocks[0].mlp.fc1.weight, frozen)
    assert len(trained.losses) == 60 and trained.saved_bytes > 0 and not dit.training
    assert small.validation_loss(dit, part) == small.validation_loss(dit, part)  # the same noise every time


def test_interval_is_students():
    from scipy import stats

    values = [1.0, 2.5, 2.0, 4.0, 3.5]
    low, high = stats.t.interval(0.95, 4, loc=sum(values) / 5, scale=stats.sem(values))
    found = reporting.interval(values)
    assert found.mean - found.half == pytest.approx(low) and found.mean + found.half == pytest.approx(high)
    assert reporting.interval([3.0]).half == math.inf


def test_verdicts():
    interval = reporting.Interval
    assert reporting.verdict(interval(-2.0, 1.0, 5)) == "holds"
    assert reporting.verdict(interval(2.0, 1.0, 5)) == "the reverse"
    assert reporting.verdict(interval(-2.0, 2.5, 5)) == "undecided"
    assert reporting.verdict(interval(-2.0, math.inf, 1)) == "undecided"
    first, second = {0: {"m": 1.0}, 1: {"m": 2.0}}, {1: {"m": 2.5}, 0: {"m": 1.5}, 7: {"m": 99.0}}
    assert reporting.paired(first, second, "m") == (-0.5, 0.0, 2)


def test_settings_make_the_key():
    spec = transfer_plan.make_spec(TINY, "difffit", "digits", 0, 1)
    other = transfer_plan.make_spec({**TINY, "finetune": {"steps": 3, "batch": 8}}, "difffit", "digits", 0, 1)
    assert transfer_plan.key_of(spec) == transfer_plan.key_of(json.loads(json.dumps(spec)))
    assert transfer_plan.key_of(spec) != transfer_plan.key_of(other)


def test_runs_stop_go_on_and_report(tmp_path, quick, capsys):
    plan, page, results = tmp_path / "plan.yaml", tmp_path / "page.md", tmp_path / "results"
    plan.write_text(yaml.safe_dump(TINY))
    page.write_text(PAGE)
    arguments = ["--plan", plan, "--results", results, "--cache", tmp_path / "cache", "--docs", page]
    arguments = list(map(str, arguments))
    with pytest.raises(SystemExit):  # no time, so nothing to report
        transfer.main([*arguments, "--budget-seconds", "0"])
    assert "no runs to report" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        transfer.main([*arguments, "--only", "seed9"])
    file = results / "transfer.jsonl"
    assert len(file.read_text().splitlines()) == 4  # two learning rates of full and difffit
    assert transfer.main(arguments) == 0
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    chosen = transfer_plan.chosen_multiples(TINY, reporting.Results(file))
    assert set(chosen) == set(TINY["methods"]) and chosen["difffit_last"] == chosen["difffit"]
    assert len(lines) == 4 + 8 + 2  # tuning, comparison, and of the sweep what the comparison has not
    for line in lines:
        assert line["spec"]["seed"] in (0, 1, 9) and math.isfinite(line["val_loss"])
        assert line["key"] == transfer_plan.key_of(line["spec"])
        if line["spec"]["sampling"]:
            assert line["frechet"] > 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "STALE" not in text
    assert "| DiffFit, γ in the first half |" in text and "not run" in text  # BitFit is not in this plan
    for name in ("transfer.png", "transfer_lr.png", "transfer_samples.png", "transfer.json"):
        assert (results / name).stat().st_size > 0
    stamp = file.stat().st_mtime_ns
    assert transfer.main(arguments) == 0 and file.stat().st_mtime_ns == stamp  # nothing is run twice
    assert page.read_text() == text


def test_resolution_runs_and_reports(tmp_path, quick):
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    arguments = ["--results", tmp_path, "--cache", tmp_path / "cache", "--docs", page, "--seeds", "1"]
    arguments = [*map(str, arguments), "--pretrain-steps", "4", "--steps", "2"]
    assert resolution.main(arguments) == 0
    lines = [json.loads(line) for line in (tmp_path / "resolution.jsonl").read_text().splitlines()]
    assert {line["spec"]["kind"]: line["pos_embed_scale"] for line in lines} == {"scaled": 0.5, "native": 1.0}
    assert all(set(line["losses"]) == {"0", "2"} for line in lines)
    assert (tmp_path / "resolution.png").stat().st_size > 0 and "| 0 |" in page.read_text()


def test_page_without_markers_is_refused(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- transfer: end --> <!-- transfer: begin -->")
    with pytest.raises(DiffFitError, match="must hold"):
        reporting.replace_block(page, "transfer", "text")


def test_page_says_what_the_stored_runs_say(tmp_path):
    """docs/experiments.md, made anew from the stored runs, is the same."""
    stored = ROOT / "docs" / "experiments"
    if not (stored / "transfer.jsonl").exists():
        pytest.skip("the documentation is not part of this installation")
    shutil.copytree(stored, tmp_path / "experiments")
    page = tmp_path / "experiments.md"
    shutil.copy(ROOT / "docs" / "experiments.md", page)
    before = page.read_text()
    options = ["--results", str(tmp_path / "experiments"), "--docs", str(page), "--report"]
    assert transfer.main([*options, "--cache", str(tmp_path / "none")]) == 0
    assert resolution.main(options) == 0
    assert page.read_text() == before
