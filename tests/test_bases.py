"""Bases that come with the package: by name wherever a checkpoint is named, and never in place of a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from training import TINY, digits, flags

from difffit_fast import DiT
from difffit_fast.cli import main
from difffit_fast.errors import DiffFitError
from difffit_fast.models import bases
from difffit_fast.models.bases import base_names, model_path
from difffit_fast.models.checkpoint import read_model
from difffit_fast.models.header import write_model_file
from difffit_fast.models.load import load_model


@pytest.fixture
def letters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base called letters, in bfloat16, and an empty working folder."""
    folder = tmp_path / "bases"
    folder.mkdir()
    torch.manual_seed(0)
    model = DiT(**TINY, input_size=16, in_channels=1, num_classes=3)
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.1)
    state = {key: value.bfloat16() for key, value in model.state_dict().items()}
    header = {
        "config": model.config,
        "pos_embed_scale": 1.0,
        "class_names": ["digit0", "digit1", "digit2"],
        "vae": "none",
    }
    write_model_file(folder / "letters.safetensors", "model", state, {**header, "image_size": 16, "objective": "ddpm"})
    monkeypatch.setattr(bases, "FOLDER", folder)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return folder / "letters.safetensors"


def test_a_name_means_the_base_and_a_path_a_file(letters: Path) -> None:
    assert base_names() == ["letters"] and model_path("letters") == letters
    assert model_path("./letters") == model_path(Path("letters")) == Path("letters")
    assert read_model("letters").class_names == ["digit0", "digit1", "digit2"]
    with pytest.raises(DiffFitError, match="checkpoint not found: leters.*come with the package are letters"):
        read_model("leters")
    with pytest.raises(DiffFitError, match=r"not found: some/letters \(from the folder [^)]*\)$"):
        read_model("some/letters")
    Path("letters").mkdir()  # images, say
    with pytest.warns(UserWarning, match=r"letters in this folder is \./letters"):
        assert model_path("letters") == letters


def test_every_command_takes_the_name(letters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = digits(tmp_path / "images")
    few = {"num_sampling_steps": 2, "device": "cpu"}
    words = [x for key, value in few.items() for x in ("--" + key.replace("_", "-"), str(value))]
    assert main(["sample", "--ckpt", "letters", "--class-labels", "digit1", "-o", "base.png", *words]) == 0
    run = flags(data_path=images, ckpt="letters", max_steps=2, flip="none", results_dir="runs", model_args={})
    run.remove("--model-args")
    assert main(["train", *run]) == 0
    delta = next(Path("runs").rglob("0000002.safetensors"))
    assert main(["sample", "--delta", str(delta), "--class-labels", "digit1", "-o", "delta.png", *words]) == 0
    assert torch.equal(
        load_model(None, delta).model.x_embedder.proj.weight, read_model(letters).dit().x_embedder.proj.weight
    )
    assert (
        main(["export", "--to", "dit", "--ckpt", "letters", "--delta", str(delta), "--out", "merged.safetensors"]) == 0
    )
    fid = ["--num-fid-samples", "3", "--sample-dir", "fid", "--cfg-scale", "1"]
    assert main(["sample", "--ckpt", "letters", *fid, *words]) == 0
    assert main(["check", "letters"]) == 0
    assert main(["check", str(delta.parent.parent), "--json", "found.json"]) == 0
    assert not [f for f in json.loads(Path("found.json").read_text())["findings"] if "paths" in f["what"]]
    capsys.readouterr()
    assert main(["inspect", "letters", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["class names"] == ["digit0", "digit1", "digit2"]
