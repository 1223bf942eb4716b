"""The small experiments: images, measures, resumable runs, and a page that says what the stored runs say."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch

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

PAGE = "before\n<!-- resolution: begin -->STALE<!-- resolution: end -->after\n"
MODEL = {"input_size": 8, "patch_size": 4, "in_channels": 1, "hidden_size": 16, "depth": 2, "num_heads": 2}


def test_patches_are_real_images_in_range():
    images, labels, boundary = small.patches()
    assert images.shape[1:] == (1, 8, 8) and len(images) == len(labels) > 1000
    assert -1 <= images.min() < -0.9 and 0.9 < images.max() <= 1
    assert 1 < boundary < labels.max() and torch.bincount(labels).min() > 90


def test_split_divides_without_overlap():
    images, labels, _ = small.patches()
    part = small.split(images, labels, 2, 4)
    assert part.classes == 2 and set(part.train_labels.tolist()) == {0, 1}
    assert len(part.train) + len(part.val) == int(((labels >= 2) & (labels < 4)).sum())
    assert torch.equal(part.train, small.split(images, labels, 2, 4).train)


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


def test_training_leaves_frozen_weights_and_lowers_the_loss():
    images, labels, _ = small.patches()
    part = small.split(images, labels, 0, 2)
    torch.manual_seed(0)
    dit = DiT(**MODEL, num_classes=2)
    frozen = dit.blocks[0].mlp.fc1.weight.requires_grad_(False).clone()
    before = small.validation_loss(dit.eval(), part)["loss"]
    losses = small.train(dit, part, steps=60, batch=16, lr=3e-3, seed=0)
    assert small.validation_loss(dit, part)["loss"] < 0.9 * before
    assert torch.equal(dit.blocks[0].mlp.fc1.weight, frozen)
    assert len(losses) == 60 and not dit.training
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


def test_resolution_runs_and_reports(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    arguments = ["--results", tmp_path, "--cache", tmp_path / "cache", "--docs", page, "--seeds", "1"]
    arguments = [*map(str, arguments), "--pretrain-steps", "4", "--steps", "2"]
    assert resolution.main(arguments) == 0
    lines = [json.loads(line) for line in (tmp_path / "resolution.jsonl").read_text().splitlines()]
    assert {line["spec"]["kind"]: line["pos_embed_scale"] for line in lines} == {"scaled": 0.5, "native": 1.0}
    assert all(set(line["losses"]) == {"0", "2"} for line in lines)
    assert (tmp_path / "resolution.png").stat().st_size > 0 and "| 0 |" in page.read_text()
    assert page.read_text().startswith("before\n") and "STALE" not in page.read_text()


def test_page_without_markers_is_refused(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- resolution: end --> <!-- resolution: begin -->")
    with pytest.raises(DiffFitError, match="must hold"):
        reporting.replace_block(page, "resolution", "text")


def test_page_says_what_the_stored_runs_say(tmp_path):
    """docs/experiments.md, made anew from the stored runs, is the same."""
    stored = ROOT / "docs" / "experiments"
    if not (stored / "resolution.jsonl").exists():
        pytest.skip("the documentation is not part of this installation")
    shutil.copytree(stored, tmp_path / "experiments")
    page = tmp_path / "experiments.md"
    shutil.copy(ROOT / "docs" / "experiments.md", page)
    before = page.read_text()
    options = ["--results", str(tmp_path / "experiments"), "--docs", str(page), "--report"]
    assert resolution.main(options) == 0
    assert page.read_text() == before
