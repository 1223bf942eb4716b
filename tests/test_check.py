"""``difffit check``: one finding of every kind, the exit code, and that it reads everything."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from training import digits, flags

from difffit_fast import DiT, FastDiffFitDiT
from difffit_fast._files import owner, write_safetensors
from difffit_fast.check import Report, check
from difffit_fast.cli import main
from difffit_fast.errors import DiffFitError
from difffit_fast.models.header import read_header, write_model_file

SIZES = dict(input_size=8, patch_size=4, in_channels=3, hidden_size=16, depth=2, num_heads=2, num_classes=3)
RECORDED = dict(class_names=["a", "b", "c"], image_size=8, objective="ddpm", vae="none")


def found(report: Report, level: str) -> dict[str, list[str]]:
    return {finding.what: finding.examples for finding in report.findings if finding.level == level}


@pytest.fixture
def model() -> FastDiffFitDiT:
    torch.manual_seed(0)
    model = FastDiffFitDiT(**SIZES)
    with torch.no_grad():
        for _, p in model.named_trainable_parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


@pytest.fixture
def delta(model: FastDiffFitDiT, tmp_path: Path) -> Path:
    model.save_delta(tmp_path / "delta.safetensors", step=7, **RECORDED)
    return tmp_path / "delta.safetensors"


def rewrite(path: Path, **tensors: torch.Tensor | None) -> None:
    """The same file with other tensors; None takes one away."""
    kept = {key: value for key, value in {**load_file(path), **tensors}.items() if value is not None}
    header = {k: v for k, v in read_header(path).items() if k not in ("format", "kind", "version")}
    write_model_file(path, "delta", kept, header)


# -- model files -----------------------------------------------------------------------------------------------------
def test_a_good_delta_has_no_findings(delta: Path) -> None:
    report = check(delta)
    assert report.ok and not report.findings and report.kind == "delta"
    assert report.facts["classes"] == 3 and report.facts["step"] == 7


@pytest.mark.parametrize(
    ("tensors", "what"),
    [
        ({"blocks.0.attn.qkv.bias": None}, "trainables that are missing"),
        ({"blocks.0.attn.qkv.weight": torch.ones(48, 16)}, "tensors that its configuration does not train"),
        ({"blocks.1.attn.qkv.bias": torch.ones(47)}, "tensors of another shape"),
        ({"blocks.1.attn.qkv.bias": torch.full((48,), float("nan"))}, "tensors with NaN or infinity"),
        ({"blocks.1.attn.qkv.bias": torch.ones(48, dtype=torch.int32)}, "tensors that are not floating"),
    ],
)
def test_a_delta_that_is_not_exactly_its_trainables(delta: Path, tensors: dict, what: str) -> None:
    rewrite(delta, **tensors)
    report = check(delta)
    assert not report.ok
    wrong = found(report, "wrong")
    name = next(iter(tensors))
    assert any(name in example for example in (wrong.get(what) or wrong["refused"]))


def test_a_delta_to_look_at(model: FastDiffFitDiT, tmp_path: Path) -> None:
    fresh = FastDiffFitDiT(**SIZES)
    path = tmp_path / "fresh.safetensors"
    fresh.save_delta(path, class_names=["a", "a ", " "])
    report = check(path)
    looked = found(report, "suspicious")
    assert report.ok and set(looked["not recorded"]) == {"objective", "image_size", "vae"}
    assert "untrained" in looked and looked["class names without a letter"] == ["' '"]
    with torch.no_grad():
        model.blocks[0].gamma1[3] = 2e5
    model.save_delta(path, **RECORDED)
    assert found(check(path), "suspicious") == {"tensors with values above 1000": ["blocks.0.gamma1 (2e+05)"]}


def test_checkpoints(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = DiT(**SIZES).state_dict()
    torch.save(state, tmp_path / "good.pt")
    report = check(tmp_path / "good.pt")
    assert report.kind == "checkpoint" and found(report, "wrong").keys() <= {
        "refused"
    }  # no number of heads is recorded
    del state["blocks.1.mlp.fc2.bias"]
    torch.save(state, tmp_path / "lacks.pt")
    refused = found(check(tmp_path / "lacks.pt"), "wrong")["refused"]
    assert "blocks.1.mlp.fc2.bias" in refused[0]
    state["blocks.0.mlp.fc2.bias"][2] = float("inf")
    write_safetensors(tmp_path / "bad.safetensors", state)
    assert "blocks.0.mlp.fc2.bias" in str(found(check(tmp_path / "bad.safetensors"), "wrong"))


def test_what_is_nothing(tmp_path: Path) -> None:
    with pytest.raises(DiffFitError, match="there is no"):
        check(tmp_path / "nowhere")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(DiffFitError, match="neither .safetensors nor written by torch.save"):
        check(tmp_path / "text")


# -- images and features ---------------------------------------------------------------------------------------------
@pytest.fixture
def images(tmp_path: Path) -> Path:
    return digits(tmp_path / "images", classes=3, each=4)


def test_good_images_have_no_findings(images: Path) -> None:
    report = check(images, 16)
    assert report.findings == [] and report.facts == {"images": 12, "classes": 3, "for": "16 px"}


def test_images_one_finding_of_every_kind(images: Path) -> None:
    shutil.copy(images / "digit0/000.png", images / "digit0/twin.png")
    shutil.copy(images / "digit0/001.png", images / "digit1/twin.png")
    (images / "digit2/bad.png").write_bytes((images / "digit2/000.png").read_bytes()[:40])
    (images / "digit2/notes.txt").write_text("x")
    for name in ("alone", "Digit0"):
        (images / name).mkdir()
    Image.fromarray(np.zeros((8, 40, 3), np.uint8)).save(images / "alone/long.png")
    Image.fromarray(np.full((16, 16), 7, np.uint8)).save(images / "Digit0/a.png")
    frames = [Image.fromarray(np.full((16, 16), 30 * i, np.uint8)) for i in range(3)]
    frames[0].save(images / "Digit0/moving.gif", save_all=True, append_images=frames[1:])
    report = check(images, 16)
    assert not report.ok
    (wrong,) = found(report, "wrong").items()
    assert "cannot be read" in wrong[0] and wrong[1][0].startswith("digit2/bad.png: ")
    assert len(found(report, "left out")) == 1
    looked = found(report, "suspicious")
    assert looked["images that occur twice in a class"] == ["digit0/twin.png is digit0/000.png"]
    assert looked["images that occur in two classes"] == ["digit1/twin.png is digit0/001.png"]
    assert looked["classes with one image"] == ["'alone'"]
    assert looked["class names that differ in case or spaces only"] == ["'digit0'"]
    text = str(looked)
    for part in ("alone/long.png (40 x 8)", "less than a third", "moving.gif (3)", "different modes"):
        assert part in text, part


def test_features(images: Path, tmp_path: Path) -> None:
    shutil.copy(images / "digit0/001.png", images / "digit1/twin.png")
    (images / "digit2/bad.png").write_bytes(b"")
    words = ["extract", "--data-path", images, "--features-path", tmp_path / "f", "--vae", "none", "--image-size", 16]
    assert main([*map(str, words), "--shard-size", "5", "--device", "cpu"]) == 0
    report = check(tmp_path / "f")
    assert report.ok and report.kind == "features" and report.facts["images"] == 13
    assert found(report, "suspicious") == {"images that occur in two classes": ["digit1/twin.png is digit0/001.png"]}
    assert "digit2/bad.png" in str(found(report, "left out"))
    shard = sorted((tmp_path / "f").glob("shard-*"))[1]
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(content)
    report = check(tmp_path / "f")
    assert not report.ok and shard.name in str(found(report, "wrong"))
    (tmp_path / "f/index.json").unlink()
    assert "not finished" in str(found(check(tmp_path / "f"), "wrong"))


# -- runs, and the command -------------------------------------------------------------------------------------------
def test_runs(images: Path, tmp_path: Path) -> None:
    settings = dict(data_path=images, results_dir=tmp_path / "runs", max_steps=2, ckpt_every=1)
    assert main(["train", *flags(**settings)]) == 0
    (run,) = (tmp_path / "runs").iterdir()
    report = check(run)
    assert report.ok and report.kind == "run" and report.facts == {"checkpoints": 2, "resumes from": "step 2"}
    file = run / "checkpoints/0000002.state/tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    left = f"checkpoints/.tmp-left.{owner().split('-')[0]}-4194305-1-0"  # of a process that cannot be
    for name in (left, f"checkpoints/.tmp-living.{owner()}-0"):
        (run / name).write_text("x")
    with open(run / "metrics.jsonl", "a") as log:
        log.write(json.dumps({"step": 3, "loss": float("nan")}) + "\n")
    report = check(run)
    wrong = found(report, "wrong")
    assert not report.ok and report.facts["resumes from"] == "step 1"
    assert "0000002" in str(wrong["checkpoints that are torn or damaged"])
    assert wrong["numbers of its log that are not finite"] == ["loss of step 3"]
    (leftovers,) = [names for what, names in found(report, "suspicious").items() if "half-written" in what]
    assert leftovers == [left]


def test_the_command(delta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(delta)]) == 0
    assert "nothing found" in capsys.readouterr().out
    rewrite(delta, **{"blocks.0.attn.qkv.bias": torch.full((48,), float("nan"))})
    assert main(["check", str(delta), "--json", str(tmp_path / "report.json")]) == 1
    out = capsys.readouterr().out
    assert "blocks.0.attn.qkv.bias" in out and "wrong" in out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["ok"] is False and report["findings"][0]["level"] == "wrong"
    assert main(["check", str(delta), "--json", "-"]) == 1
    assert json.loads(capsys.readouterr().out) == report
    assert main(["check", str(tmp_path / "nowhere")]) == 2


def test_findings_of_a_kind_are_counted_together() -> None:
    report = Report("x", "images")
    for i in range(10):
        report.suspicious("small", f"{i}.png")
    report.wrong("broken")
    assert [(f["level"], f["count"], f["examples"]) for f in report.to_dict()["findings"]] == [
        ("wrong", 1, []),
        ("suspicious", 10, ["0.png", "1.png", "2.png"]),
    ]
    assert "2.png …" in report.table() and report.table().index("broken") < report.table().index("small")
