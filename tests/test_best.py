"""The best of a run: the weights of the smallest validation loss, whatever happens to the run."""

from __future__ import annotations

import json
import math
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training import SETTINGS, digits

from difffit_fast.cli import main
from difffit_fast.errors import DiffFitError
from difffit_fast.models.header import read_header, write_model_file
from difffit_fast.models.load import load_model
from difffit_fast.train import NonFiniteLossError, TrainConfig, Trainer, looks
from difffit_fast.train.best import Best, improves, read_best
from difffit_fast.train.track import read_metrics

pytestmark = pytest.mark.filterwarnings("ignore")
# A rate too high: from step 4 on it gets worse.
KEEPING = {"val_every": 1, "best_by": "val", "ckpt_every": 2, "max_steps": 6, "lr": 0.3}
BEST = 3


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return digits(tmp_path_factory.mktemp("digits"))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def make(images: Path, out: Path, **changes: object) -> Trainer:
    watched = {} if "val_fraction" in changes else {"val_path": str(images)}
    where = {"data_path": str(images), "results_dir": str(out), **watched}
    return Trainer(**{**SETTINGS, **where, **KEEPING, **changes})


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing disturbed."""
    torch.set_num_threads(1)
    return make(images, tmp_path_factory.mktemp("whole")).train().folder


def val_losses(folder: Path) -> dict[int, float]:
    return {m["step"]: m["val_loss"] for m in read_metrics(folder) if "val_loss" in m}


def best_of(folder: Path) -> Path:
    return folder / "checkpoints" / "best.safetensors"


def stopping(trainer: Trainer, at: int) -> Callable:
    """As if the process died after step ``at`` and all that belongs to it."""
    fetch = trainer._fetch

    def dying(source: object) -> dict:
        if trainer.step == at:
            raise KeyboardInterrupt
        return fetch(source)

    trainer._fetch = dying
    with pytest.raises(KeyboardInterrupt):
        trainer.train()


# -- which step it is --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("losses", "best"),
    [
        ([5, 3, math.nan, 4, 2, -math.inf, 2, 9], 4),  # what is no number never is the best, nor is an equal of it
        ([1, 2, 3, 4, 5, 6, 7, 8], 0),
        ([math.nan, math.inf, 9, 8, 7, 6, 5, 4], 7),
        ([math.nan] * 8, None),
    ],
)
def test_the_smallest_loss_is_the_best(
    images: Path, tmp_path: Path, losses: list[float], best: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = iter(losses)
    monkeypatch.setattr(looks, "validation_loss", lambda *_: float(next(told)))
    result = make(images, tmp_path, max_steps=7, ckpt_every=1, keep_checkpoints=20).train()
    assert next(told, None) is None
    log = (result.folder / "log.txt").read_text()
    if best is None:
        assert result.best is None and not best_of(result.folder).exists() and "The smallest" not in log
        return
    assert result.best == best_of(result.folder)
    header = read_header(result.best)
    assert (header["step"], header["val_loss"]) == (best, losses[best])
    assert f"The smallest validation loss is {losses[best]:.4f}, of step {best}: {result.best}" in log.splitlines()[-2]
    assert log.splitlines()[-1].endswith("Done!")
    if best:
        theirs = load_file(result.folder / "checkpoints" / f"{best:07d}.safetensors")
        ours = load_file(result.best)
        assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in theirs)
        del header["val_loss"], header["val_set"]
        assert header == read_header(result.folder / "checkpoints" / f"{best:07d}.safetensors")


def test_improvement() -> None:
    best = Best(3, 0.5, "set")
    assert improves(0.4, best) and improves(7.0, None)
    assert not any(improves(loss, best) for loss in (0.5, 0.6, math.nan, math.inf, -math.inf))
    assert not any(improves(loss, None) for loss in (math.nan, math.inf))


def test_it_is_no_checkpoint_and_no_count_removes_it(images: Path, tmp_path: Path, whole: Path) -> None:
    losses = val_losses(whole)
    assert min(losses, key=losses.get) == BEST and losses.keys() == set(range(7))
    result = make(images, tmp_path, keep_checkpoints=1).train()
    assert sorted(os.listdir(result.folder / "checkpoints")) == [
        "0000006.safetensors", "0000006.state", "best.safetensors",
    ]  # fmt: skip
    assert read_best(result.best).step == BEST and read_best(result.best).loss == losses[BEST]
    assert result.best.read_bytes() == best_of(whole).read_bytes()
    plain = make(images, tmp_path / "plain", best_by="none").train()
    assert plain.best is None and not best_of(plain.folder).exists()
    assert plain.delta.read_bytes() == result.delta.read_bytes()


def test_nothing_is_kept_by_a_loss_that_is_not_there(images: Path, tmp_path: Path) -> None:
    with pytest.raises(DiffFitError, match="--best-by val needs validation data: give --val-path or --val-fraction"):
        Trainer(**{**SETTINGS, "data_path": str(images), "results_dir": str(tmp_path), "best_by": "val"})
    with pytest.raises(DiffFitError, match="--best-by must be one of none, val; got 'loss'"):
        TrainConfig(best_by="loss").validate()
    assert TrainConfig.from_dict({"best_by": None}).best_by == "none"
    assert TrainConfig(best_by="val").differences({"best_by": "none"}) == {}  # a run may go on with it


def test_averages_that_are_not_finite_are_not_kept(images: Path, tmp_path: Path) -> None:
    trainer = make(images, tmp_path, ckpt_every=100, val_every=2, lr=1e-3)
    update, name = trainer.ema.update, "y_embedder.embedding_table.weight"

    def broken() -> None:
        update()
        trainer.ema.tensors[name][-1] = math.nan  # the null class, which no validation sample is of

    trainer.ema.update = broken
    with pytest.raises(NonFiniteLossError, match=rf"ema/{name} is not finite after step 2, which is not saved"):
        trainer.train()
    assert read_best(best_of(trainer.folder)).step == 0


# -- going on ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dies", range(1, 6))
def test_a_run_that_died_leaves_the_same_best(images: Path, tmp_path: Path, whole: Path, dies: int) -> None:
    """Also between a best and the next checkpoint, and before the first."""
    stopping(make(images, tmp_path), dies)
    trainer = make(images, tmp_path, resume="auto")
    result = trainer.train()
    assert result.folder == trainer.folder and len(list(tmp_path.iterdir())) == 1
    assert result.best.read_bytes() == best_of(whole).read_bytes()
    assert val_losses(result.folder) == val_losses(whole)


def test_a_worse_step_does_not_take_the_place_after_a_resume(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(looks, "validation_loss", lambda *_: 5.0)
    make(images, tmp_path, max_steps=3).train()
    monkeypatch.setattr(looks, "validation_loss", lambda *_: 6.0)
    result = make(images, tmp_path, resume="auto").train()
    assert result.step == 6 and (read_best(result.best).step, read_best(result.best).loss) == (0, 5.0)
    assert "loss is 5.0000, of step 0" in (result.folder / "log.txt").read_text()
    done = make(images, tmp_path, resume="auto").train()
    assert done.best == result.best and done.step == 6


def test_what_other_images_chose_does_not_count(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(looks, "validation_loss", lambda *_: 5.0)
    make(images, tmp_path, max_steps=3).train()
    monkeypatch.setattr(looks, "validation_loss", lambda *_: 6.0)
    result = make(images, tmp_path, resume="auto", val_samples=20).train()
    assert (read_best(result.best).step, read_best(result.best).loss) == (4, 6.0)
    log = (result.folder / "log.txt").read_text()
    assert log.count("was chosen by other validation images: the best is chosen anew") == 1


def test_streams_of_the_same_images_are_told_from_others(images: Path, tmp_path: Path) -> None:
    streams = [
        make(images, tmp_path, **change).validation for change in ({}, {}, {"val_samples": 5}, {"global_seed": 1})
    ]
    assert streams[0].hash == streams[1].hash and len({s.hash for s in streams}) == 3
    other = shutil.copytree(images, tmp_path / "moved")
    where = {"val_path": str(other)}
    assert make(images, tmp_path, **where).validation.hash == streams[0].hash
    next((other / "digit1").iterdir()).rename(other / "digit1" / "zzz.png")
    assert make(images, tmp_path, **where).validation.hash != streams[0].hash


def test_a_damaged_one_is_chosen_anew(images: Path, tmp_path: Path, whole: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / whole.name)
    best_of(folder).write_bytes(best_of(folder).read_bytes()[:40])
    result = make(images, tmp_path, max_steps=7, resume="auto").train()
    assert result.folder == folder and read_best(result.best).step == 7
    assert "the best is chosen anew" in (folder / "log.txt").read_text()


def test_a_run_that_goes_on_elsewhere_takes_its_best_along(images: Path, tmp_path: Path, whole: Path) -> None:
    for checkpoint, knows in ((4, True), (2, False)):
        resume = str(whole / "checkpoints" / f"{checkpoint:07d}.safetensors")
        result = make(images, tmp_path / str(checkpoint), resume=resume).train()
        assert result.folder != whole and list(val_losses(result.folder)) == list(range(checkpoint + 1, 7))
        assert result.best.read_bytes() == best_of(whole).read_bytes()
        log = (result.folder / "log.txt").read_text()
        assert ("is of step 3, which this run has yet to come to: the best is chosen anew" in log) != knows


def test_nobody_can_go_on_from_it(images: Path, tmp_path: Path, whole: Path) -> None:
    for best in (best_of(whole), tmp_path / "checkpoints" / "best.safetensors"):
        with pytest.raises(DiffFitError, match=r"holds weights and no optimizer's state.*expected the run folder, "):
            make(images, tmp_path, resume=str(best)).train()


# -- what it is good for -----------------------------------------------------------------------------------------------
def test_it_can_be_used_as_a_delta_is(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    best = best_of(whole)
    loaded = load_model(None, best)
    tensors = load_file(best)
    for name, p in loaded.model.named_trainable_parameters():
        assert torch.equal(p, tensors[name])
    assert loaded.header["val_loss"] == read_best(best).loss and loaded.class_names == ["digit0", "digit1", "digit2"]
    words = ["--delta", str(best), "--num-sampling-steps", "2", "--device", "cpu", "-o", str(tmp_path / "grid.png")]
    assert main(["sample", *words]) == 0 and (tmp_path / "grid.png").is_file()
    assert main(["check", str(best)]) == 0 and main(["inspect", "--json", str(best)]) == 0
    facts = json.loads(capsys.readouterr().out.partition("{")[2].join("{ "))
    assert facts["validation loss"] == read_best(best).loss and facts["step"] == read_best(best).step


@pytest.mark.parametrize(("method", "kind"), [("full", "model"), ("lora", "trainables")])
def test_every_method_has_its_own_kind_of_it(images: Path, tmp_path: Path, method: str, kind: str) -> None:
    if method == "lora":
        pytest.importorskip("peft")
    result = make(images, tmp_path, method=method, max_steps=2, lr=1e-3).train()
    assert read_header(result.best)["kind"] == kind and read_best(result.best).step in (0, 1, 2)
    assert main(["check", str(result.best)]) == 0
    if method == "full":
        assert load_model(result.best).header["val_loss"] == read_best(result.best).loss


def test_a_run_is_checked_and_described_with_it(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = shutil.copytree(whole, tmp_path / "run")
    best = read_best(best_of(folder))
    assert main(["inspect", str(folder)]) == 0
    told = capsys.readouterr().out
    assert f"step {best.step}, validation loss {best.loss:.4f}: {best_of(folder)}" in told
    assert main(["check", str(folder)]) == 0
    assert f"best step {best.step} (validation loss {best.loss:.4f})" in capsys.readouterr().out
    tensors, header = load_file(best_of(folder)), read_header(best_of(folder))
    del header["val_loss"]
    said = {key: value for key, value in header.items() if key not in ("kind", "format", "version")}
    write_model_file(best_of(folder), "delta", tensors, said)
    assert main(["check", str(folder)]) == 1 and main(["inspect", str(folder)]) == 0
    assert capsys.readouterr().out.count("is no best of a run: its metadata lacks val_loss") == 2
    tensors["blocks.0.attn.proj.bias"][0] = math.nan
    write_model_file(best_of(folder), "delta", tensors, {**said, "val_loss": 1.0})
    assert main(["check", str(folder)]) == 1
    assert "best.safetensors" in capsys.readouterr().out
    with pytest.raises(DiffFitError, match="val_loss in its metadata should be from"):
        write_model_file(best_of(folder), "delta", tensors, {**said, "val_loss": math.nan})


def test_a_share_of_the_data_chooses_it_too(images: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = make(images, tmp_path, val_fraction=0.25, max_steps=2, sample_every=1, num_sampling_steps=1).train()
    losses = val_losses(result.folder)
    assert read_best(result.best).loss == min(losses.values()) and losses.keys() == {0, 1, 2}
