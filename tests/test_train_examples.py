"""The scripts in examples/ run as they stand, in small."""

from __future__ import annotations

import runpy
import sys
import warnings
from pathlib import Path

import pytest
import torch
from training import digits

from difffit_fast import FastDiffFitDiT, create_diffusion, load_model
from difffit_fast.data import ImageFolder

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.mark.parametrize(
    ("script", "words", "left"),
    [
        ("train_from_images.py", ["--steps", "4"], "samples.png"),
        ("resume.py", ["--steps", "8"], "resumed/000-DiT-custom/checkpoints/0000008.safetensors"),
        ("sample_and_merge.py", ["--steps", "3"], "merged.pt"),
        ("python_api.py", ["--steps", "4"], "api/000-DiT-custom/checkpoints/0000004.safetensors"),
        ("diffusers_class_conditional.py", ["--steps", "2"], "pipeline/model_index.json"),
        ("diffusers_text_to_image.py", ["--steps", "2", "--gradient-checkpointing"], "text_to_image.safetensors"),
    ],
)
def test_example(script: str, words: list[str], left: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if script.startswith("diffusers"):
        pytest.importorskip("diffusers")
        pytest.importorskip("accelerate")
    torch.set_num_threads(1)
    monkeypatch.setattr(sys, "argv", [script, "--work-dir", str(tmp_path), *words])
    monkeypatch.syspath_prepend(str(EXAMPLES))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        except SystemExit as stop:
            assert not stop.code
    assert (tmp_path / left).is_file()


def run_many(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(sys, "argv", ["train_many.py", *words])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the delta")  # digits are classes that the base does not know
        runpy.run_path(str(EXAMPLES / "train_many.py"), run_name="__main__")


@torch.no_grad()
def losses(model: torch.nn.Module, data: ImageFolder, **worn: object) -> float:
    """The mean of every image at four timesteps, with the same noise for every model."""
    samples = [data.load(i, 0) for i in range(len(data))] * 4
    x, y = torch.stack([x for x, _ in samples]), torch.tensor([label for _, label in samples])
    g = torch.Generator().manual_seed(1)
    t, noise = torch.randint(0, 1000, (len(x),), generator=g), torch.randn(x.shape, generator=g)
    return float(create_diffusion().training_losses(model, x, t, {"y": y, **worn}, noise=noise)["loss"].mean())


def test_several_domains_in_one_run_are_files_that_each_fit_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    folders = {"hand": EXAMPLES / "hand" / "shown", "digits": digits(tmp_path / "images", classes=2, each=6)}
    words = ["--data", *(f"{name}={folder}" for name, folder in folders.items()), "--out", str(tmp_path / "out")]
    run_many(monkeypatch, *words, "--steps", "40", "--batch", "17", "--lr", "3e-3")
    assert "digits: ImageFolder" in capsys.readouterr().out
    assert {path.stem for path in (tmp_path / "out").iterdir()} == set(folders)
    base = FastDiffFitDiT.from_pretrained("glyphs").eval()
    for name, folder in folders.items():
        file, data = tmp_path / "out" / f"{name}.safetensors", ImageFolder(folder, 24, flip=False, channels=1)
        loaded = load_model("glyphs", file)
        assert loaded.class_names == data.class_names
        assert (loaded.header["step"], loaded.header["vae"], loaded.image_size) == (40, "none", 24)
        base.load_deltas({name: file})
        trained, before = losses(loaded.model, data), losses(base, data, delta=name, strength=0.0)
        assert trained < 0.95 * before
        assert trained == losses(base, data, delta=name)


def test_several_domains_want_names_that_files_can_have(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    for words, said in (
        (["a=x", "a=y"], "a name of its own"),
        (["a=x", "b=y", "--batch", "1"], "at least one sample of each"),
        (["../a=x"], "a name that a file can have"),
        (["x"], "expected name=FOLDER"),
    ):
        with pytest.raises(SystemExit):
            run_many(monkeypatch, "--data", *words)
        assert said in capsys.readouterr().err
