"""A run that is killed and resumed ends with the bytes of one that was not."""

from __future__ import annotations

import os
import signal
import time
import warnings
from pathlib import Path

import pytest
import torch
from training import SETTINGS, Process, digits, flags

from difffit_fast.data.extract import ExtractConfig, Extraction
from difffit_fast.errors import DiffFitError
from difffit_fast.models.header import read_header
from difffit_fast.train import TrainConfig, Trainer
from difffit_fast.train.source import open_source
from difffit_fast.train.track import read_metrics

STEPS = 12


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return digits(tmp_path_factory.mktemp("digits"))


def run(images: Path, folder: Path, **changes: object) -> Path:
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = {
            **SETTINGS,
            "data_path": str(images),
            "results_dir": str(folder),
            "ckpt_every": 3,
            "max_steps": STEPS,
        }
        return Trainer(**{**settings, "log_every": 2, "resume": "auto", **changes}).train().folder


@pytest.fixture(scope="module")
def uninterrupted(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(images, tmp_path_factory.mktemp("uninterrupted"))


def assert_same_bytes(folder: Path, other: Path) -> None:
    for name in (f"{STEPS:07d}.safetensors", f"{STEPS:07d}.state/tensors.safetensors"):
        assert (folder / "checkpoints" / name).read_bytes() == (other / "checkpoints" / name).read_bytes(), name
    assert not [name for name in os.listdir(folder / "checkpoints") if name.startswith(".")]
    kept = [{k: m[k] for k in ("step", "loss", "lr")} for m in read_metrics(folder)]
    assert kept == [{k: m[k] for k in ("step", "loss", "lr")} for m in read_metrics(other)]


def test_killed_twice_from_outside(images: Path, uninterrupted: Path, tmp_path: Path) -> None:
    words = ["train", *flags(data_path=images, results_dir=tmp_path, ckpt_every=3, max_steps=STEPS, log_every=2,
                             resume="auto")]  # fmt: skip
    folder = tmp_path / "000-DiT-custom"
    for least in (4, 8):
        process = Process(words, tmp_path.parent / "log.txt")
        while not any(m["step"] >= least for m in read_metrics(folder)) and process.running:
            time.sleep(0.002)
        process.signal(signal.SIGKILL)
        process.wait()
    code, output = Process(words, tmp_path.parent / "log.txt").wait()
    assert code == 0, output
    assert "Resumed from step" in output or "finished already" in output
    assert_same_bytes(folder, uninterrupted)


def killed_at(call: int, images: Path, folder: Path) -> bool:
    """Train in a child that kills itself when it is about to put its ``call``-th file under its name."""
    child = os.fork()
    if child == 0:
        try:
            count = 0
            for name in ("replace", "rename", "fsync"):
                real = getattr(os, name)

                def counting(*args: object, real: object = real) -> object:
                    nonlocal count
                    count += 1
                    if count == call:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return real(*args)

                setattr(os, name, counting)
            run(images, folder, keep_checkpoints=2)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_write(images: Path, uninterrupted: Path, tmp_path: Path) -> None:
    """One run, killed again and again at every kind of moment of a checkpoint: before a flush, before a rename."""
    kills = 0
    for call in (1, 2, 4, 5, 7, 8, 9, 10, 12, 14, 17, 21):
        kills += killed_at(call, images, tmp_path)
    assert kills >= 8
    folder = run(images, tmp_path, keep_checkpoints=2)
    assert folder.name == "000-DiT-custom" and len(list(tmp_path.glob("[0-9]*"))) == 1
    assert_same_bytes(folder, uninterrupted)


def test_another_number_of_workers_changes_nothing(images: Path, uninterrupted: Path, tmp_path: Path) -> None:
    run(images, tmp_path, max_steps=5)
    assert_same_bytes(run(images, tmp_path, num_workers=2, ckpt_every=4), uninterrupted)


def test_a_run_goes_on_with_its_own_classes_only(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = tmp_path / "numbers"
    numbers.mkdir()
    for source, name in zip(sorted(images.iterdir()), ("1", "2", "10"), strict=True):
        (numbers / name).symlink_to(source)
    monkeypatch.setattr("difffit_fast.data.listing.class_order", sorted)  # as before numbers went by value
    folder = run(numbers, tmp_path / "runs", max_steps=3)
    delta = folder / "checkpoints" / "0000003.safetensors"
    assert read_header(delta)["class_names"] == ["1", "10", "2"]  # what samples are labelled by
    monkeypatch.undo()
    before = delta.read_bytes()
    with pytest.raises(DiffFitError, match="the same classes in another order; class 1 was '10' and is '2' now"):
        run(numbers, tmp_path / "runs", max_steps=6)
    assert delta.read_bytes() == before
    (numbers / "2").rename(numbers / "3")
    with pytest.raises(DiffFitError, match="other classes; class 1 was '10' and is '3' now"):
        run(numbers, tmp_path / "runs", max_steps=6)


def test_validation_follows_the_recorded_order_of_the_training_data(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = tmp_path / "numbers"
    numbers.mkdir()
    for source, name in zip(sorted(images.iterdir()), ("1", "2", "10"), strict=True):
        (numbers / name).symlink_to(source)
    (numbers / "notes.txt").touch()
    with monkeypatch.context() as patch:
        patch.setattr("difffit_fast.data.listing.class_order", sorted)
        extraction = Extraction(ExtractConfig(str(numbers), str(tmp_path / "f"), image_size=16, vae="none"))
        extraction.run()
        extraction.finish()
    config = TrainConfig(**{**SETTINGS, "feature_path": str(tmp_path / "f"), "val_path": str(numbers)})
    source = open_source(config.validate(), torch.device("cpu"), None, None)
    assert source.data.class_names == source.validation.class_names == ["1", "10", "2"]
    folder = run(numbers, tmp_path / "runs", max_steps=1)
    log = (folder / "log.txt").read_text()
    assert log.count("left out: 1 files without an image's name ending (the first: notes.txt)") == 1
    assert log.count("class 1 is '2', not '10' as text sorts") == 1
