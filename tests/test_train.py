"""The training system in one process: settings, stream, average, checkpoints, the loop."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import signal
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from training import SETTINGS, TINY, digits

from difffit_fast import DiT, FastDiffFitDiT
from difffit_fast.data import ImageFolder
from difffit_fast.errors import DiffFitError
from difffit_fast.train import NonFiniteLossError, TrainConfig, Trainer, pace
from difffit_fast.train.checkpoint import CheckpointFolder
from difffit_fast.train.ema import EMA
from difffit_fast.train.schedule import rate_factor
from difffit_fast.train.stream import TrainStream, ValidationStream, batches, hold_out, share
from difffit_fast.train.track import read_metrics


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return digits(tmp_path_factory.mktemp("digits"))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def settings(images: Path, folder: Path, **changes: object) -> dict:
    return {
        **SETTINGS,
        "data_path": str(images),
        "results_dir": str(folder),
        "ckpt_every": 4,
        "max_steps": 8,
        **changes,
    }


def train(images: Path, folder: Path, **changes: object):
    frozen = changes.get("method") != "full" and not changes.get("ckpt")
    with pytest.warns(UserWarning, match="frozen weights are random") if frozen else contextlib.nullcontext():
        trainer = Trainer(**settings(images, folder, **changes))
    return trainer, trainer.train()


# ---------------------------------------------------------------------------------------------------------- settings


def test_flags_beat_the_file_and_the_file_beats_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("lr: 5e-4\nglobal-batch-size: 16\nmax_steps: 7\nmodel_args: {depth: 3}\n")
    config = TrainConfig.load(file, {"global_batch_size": 4})
    assert (config.lr, config.global_batch_size, config.max_steps, config.log_every) == (5e-4, 4, 7, 100)
    assert config.model_args == {"depth": 3}
    assert TrainConfig.load(file, {"epochs": 2}).max_steps is None  # a flag beats its rival in the file
    config.save(tmp_path / "saved.yaml")
    assert TrainConfig.load(tmp_path / "saved.yaml") == config


def test_default_learning_rates_and_steps() -> None:
    methods = ("difffit", "bitfit", "adapter", "full", "lora")
    for images, rates in ((20, (3e-4, 3e-4, 3e-4, 1e-5, 3e-4)), (51, (1e-3, 1e-3, 1e-3, 1e-4, 1e-3))):
        assert tuple(TrainConfig(method=method).learning_rate(images) for method in methods) == rates
    assert TrainConfig(method="full", lr=0.5).learning_rate(1) == 0.5
    steps = {images: TrainConfig().total_steps(images) for images in (1, 200, 5_000, 75_750)}
    assert steps == {1: 200, 200: 200, 5_000: 5_000, 75_750: 24_000}
    assert TrainConfig(global_batch_size=256).total_steps(75_750) == 3_000
    assert TrainConfig(global_batch_size=7).total_steps(1) == 915 and TrainConfig(max_steps=3).total_steps(9) == 3
    assert TrainConfig(epochs=2, global_batch_size=8).total_steps(9) == 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rate": 1}, "unknown setting 'learning_rate'.*nearest known one"),
        ({"globalbatchsize": 1}, "nearest known one is 'global_batch_size'"),
        ({"lr": "fast"}, "--lr must be a number; got 'fast'"),
        ({"lr": 0}, "--lr must be positive; got 0"),
        ({"lr": float("nan")}, "--lr must be positive; got nan"),
        ({"max_steps": 2.5}, "--max-steps must be a whole number; got 2.5"),
        ({"tensorboard": 1}, "--tensorboard must be true or false; got 1"),
        ({"objective": "edm"}, "--objective must be one of ddpm, flow; got 'edm'"),
        ({"ema_decay": 1.0}, "--ema-decay must be at least 0 and less than 1; got 1.0"),
        ({"max_steps": 3, "epochs": 3}, "not both"),
        ({"accumulate": 33}, "--accumulate must be at most --global-batch-size; got 33 and 32"),
        ({"fsdp": True}, "--fsdp is for --method full"),
    ],
)
def test_settings_that_cannot_be(values: dict, message: str) -> None:
    with pytest.raises(DiffFitError, match=message):
        TrainConfig.from_dict(values).validate()


# ------------------------------------------------------------------------------------------------------------ stream


class Numbers:
    """Data whose every sample tells its index and the seed of its visit."""

    class_names = ("a", "b")
    num_classes, channels, size, image_size = 2, 1, 2, 2

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def load(self, index: int, seed: int) -> tuple[torch.Tensor, int]:
        return torch.full((1, 2, 2), float(index)), index % 2


def stream(count: int = 7, **options: object) -> TrainStream:
    return TrainStream(Numbers(count), 5, (1, 2, 2), drop_prob=options.pop("drop_prob", 0.0), null_class=2, **options)


def test_every_epoch_shows_every_image_once_whatever_the_batch_size() -> None:
    seen = torch.cat([b["x"][:, 0, 0, 0] for b in batches(stream(), 0, 7, 3)]).int().tolist()  # 21 = three epochs of 7
    epochs = [seen[i : i + 7] for i in (0, 7, 14)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


@pytest.mark.parametrize(("world", "workers"), [(1, 2), (2, 0), (3, 0)])
def test_a_sample_is_the_same_for_any_number_of_processes_and_workers(world: int, workers: int) -> None:
    whole = list(batches(stream(drop_prob=0.4), 10, 2, 8))
    parts = [
        list(batches(stream(drop_prob=0.4), 10, 2, 8, rank=rank, world=world, num_workers=workers))
        for rank in range(world)
    ]
    for step in range(2):
        for key, value in whole[step].items():
            assert torch.equal(torch.cat([parts[rank][step][key] for rank in range(world)]), value), key


def test_labels_are_dropped_as_often_as_asked_and_draws_are_what_they_claim() -> None:
    batch = stream(drop_prob=0.25).__getitems__(range(4000))
    assert abs(float((batch["y"] == 2).float().mean()) - 0.25) < 0.03
    assert abs(float(batch["u"].mean()) - 0.5) < 0.02 and float(batch["u"].min()) >= 0 and float(batch["u"].max()) < 1
    assert abs(float(batch["noise"].mean())) < 0.03 and abs(float(batch["noise"].std()) - 1) < 0.02
    flat = batch["noise"].flatten(1)
    assert len({tuple(row) for row in flat.tolist()}) == 4000  # no two samples share their noise


def test_shares_and_splits() -> None:
    assert [list(share(7, r, 3)) for r in range(3)] == [[0, 1, 2], [3, 4], [5, 6]]
    train_part, held = hold_out(10, 0.25, seed=3)
    assert sorted([*train_part, *held]) == list(range(10)) and len(held) == 2
    assert np.array_equal(hold_out(10, 0.25, seed=3)[1], held)
    assert not np.array_equal(hold_out(1000, 0.25, seed=4)[1], hold_out(1000, 0.25, seed=3)[1])


def test_validation_samples_are_fixed_and_their_timesteps_even() -> None:
    data = ValidationStream(Numbers(64), 5, (1, 2, 2), drop_prob=0.0, null_class=2)
    first, again = data.__getitems__(range(64)), data.__getitems__(range(64))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert torch.equal(first["x"][:, 0, 0, 0].int(), torch.arange(64, dtype=torch.int32))
    assert (first["y"] < 2).all()
    assert torch.histc(first["u"].float(), bins=8, min=0, max=1).min() >= 5  # 8 in each, give or take


# ----------------------------------------------------------------------------------------------------------- average


def test_the_average_follows_its_formula() -> None:
    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    ema = EMA([("p", parameter)], decay=0.9)
    expected = parameter.detach().clone()
    for n in range(1, 200):
        with torch.no_grad():
            parameter.copy_(torch.tensor([math.sin(n), n / 10], dtype=torch.float64))
        ema.update()
        decay = min(0.9, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * parameter.detach()
    torch.testing.assert_close(ema.tensors["p"], expected, rtol=1e-12, atol=1e-12)
    assert ema.decay_at(1) == 2 / 11 and ema.decay_at(10**6) == 0.9
    value, average = parameter.detach().clone(), ema.tensors["p"].clone()
    ema.exchange()
    assert torch.equal(parameter, average) and torch.equal(ema.tensors["p"], value)


def test_looks_do_not_count_into_the_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 10.0
    monkeypatch.setattr(pace, "time", SimpleNamespace(perf_counter=lambda: now))
    run = pace.Pace(step=100)
    assert run.rate(100) == 0
    now = 14.0
    with run.stopped():
        now = 50.0
    now = 51.0
    assert run.rate(110) == 2.0  # ten steps in 4 + 1 seconds
    run.restart(110)
    now = 52.0
    assert run.rate(113) == 3.0


# ------------------------------------------------------------------------------------------------------- checkpoints


def write(folder: CheckpointFolder, step: int, value: float = 1.0) -> None:
    folder.save(step, lambda path: path.write_bytes(b"delta"), {"a": torch.full((3,), value)}, {"position": step})


def test_checkpoints_are_kept_by_count_and_leave_nothing_else(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints", keep=2)
    for step in (10, 20, 30, 40):
        write(folder, step)
    names = ["0000030.safetensors", "0000030.state", "0000040.safetensors", "0000040.state"]
    assert sorted(os.listdir(folder.path)) == names
    assert folder.newest().step == 40 and folder.newest().info["position"] == 40
    assert torch.equal(folder.newest().tensors()["a"], torch.ones(3))
    write(folder, 40, 2.0)  # again, over the old one
    assert torch.equal(folder.newest().tensors()["a"], torch.full((3,), 2.0))


@pytest.mark.parametrize("damage", ["no state", "cut tensors", "changed delta", "no delta", "empty json", "no tensors"])
def test_a_torn_checkpoint_is_passed_over(tmp_path: Path, damage: str) -> None:
    folder = CheckpointFolder(tmp_path, keep=0)
    write(folder, 10)
    write(folder, 20)
    state, delta = folder.state_path(20), folder.delta_path(20)
    if damage == "no state":
        for path in (*state.iterdir(), state):
            os.utime(path, (1, 1))
        state.rename(tmp_path / ".tmp-0000020.state.77")  # by an earlier version
    elif damage == "cut tensors":
        file = state / "tensors.safetensors"
        file.write_bytes(file.read_bytes()[:-5])
    elif damage == "changed delta":
        delta.write_bytes(b"Delta")
    elif damage == "no delta":
        delta.unlink()
    elif damage == "empty json":
        (state / "state.json").write_text("")
    else:
        (state / "tensors.safetensors").unlink()
    told: list[str] = []
    assert folder.newest(told.append).step == 10
    assert len(told) == 1 and "step 20" in told[0]
    folder.prune()
    assert not any(name.startswith(".tmp") for name in os.listdir(tmp_path))


# -------------------------------------------------------------------------------------------------------------- loop


def test_a_run_writes_what_it_promises(images: Path, tmp_path: Path) -> None:
    trainer, result = train(
        images, tmp_path, val_fraction=0.25, val_every=4, sample_every=8, num_sampling_steps=2, tensorboard=True,
        log_every=2, keep_checkpoints=1,
    )  # fmt: skip
    assert result.folder == tmp_path / "000-DiT-custom" and result.step == 8 and math.isfinite(result.loss)
    assert sorted(os.listdir(result.folder / "checkpoints")) == ["0000008.safetensors", "0000008.state"]
    log = (result.folder / "log.txt").read_text()
    assert "(step=0000002) Train Loss: " in log and "Train Steps/Sec: " in log and "(step=0000004) Val Loss: " in log
    assert yaml.safe_load((result.folder / "config.yaml").read_text())["num_classes"] == 3
    metrics = read_metrics(result.folder)
    assert [m["step"] for m in metrics if "loss" in m] == [2, 4, 6, 8]
    assert [m["step"] for m in metrics if "val_loss" in m] == [0, 4, 8]
    assert (result.folder / "samples" / "0000008.png").stat().st_size > 100
    assert list((result.folder / "tensorboard").iterdir())
    # The delta holds the averaged weights, the state the raw ones; neither holds frozen weights.
    state = CheckpointFolder(result.folder / "checkpoints").newest().tensors()
    for name, p in trainer.model.named_trainable_parameters():
        assert torch.equal(state[f"value/{name}"], p) and torch.equal(state[f"ema/{name}"], trainer.ema.tensors[name])
    assert "value/blocks.0.attn.qkv.weight" not in state
    metadata = trainer.model.load_delta(result.delta)
    assert metadata["step"] == 8 and metadata["class_names"] == ["digit0", "digit1", "digit2"]
    for name, p in trainer.model.named_trainable_parameters():
        assert torch.equal(p, trainer.ema.tensors[name])


def test_training_lowers_the_validation_loss_and_validation_disturbs_nothing(images: Path, tmp_path: Path) -> None:
    common = dict(max_steps=40, ckpt_every=100, lr=1e-2, log_every=40)
    one, result = train(images, tmp_path / "a", val_path=str(images), val_every=20, **common)
    losses = {m["step"]: m["val_loss"] for m in read_metrics(result.folder) if "val_loss" in m}
    assert losses.keys() == {0, 20, 40} and losses[40] < losses[20] < losses[0] < 1.3
    other, _ = train(images, tmp_path / "b", **common)
    for p, q in zip(one.parameters.values(), other.parameters.values(), strict=True):
        assert torch.equal(p, q)


def test_compiled_code_does_not_depend_on_who_looked_before(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of several sizes, some of them for validation: each has code of its own, none is made for any size."""
    compiled: list[tuple[int, bool]] = []  # images, and whether it trains; 0: any number

    def noting(graph: torch.fx.GraphModule, inputs: list) -> object:
        sizes = [
            x.shape[0] for x in inputs if isinstance(x, torch.Tensor) and x.dim() == 4 and x.shape[1:] == (3, 16, 16)
        ]
        symbols = any(isinstance(x, torch.SymInt) for x in inputs)
        compiled.append((0 if symbols else sizes[0], torch.is_grad_enabled()))
        return graph.forward

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **options: compile_(model, backend=noting, **options))
    torch._dynamo.reset()
    train(images, tmp_path, compile=True, accumulate=3, val_path=str(images), val_samples=7, val_every=1, max_steps=2)
    assert sorted(compiled) == [(1, False), (2, False), (2, True), (3, True)]


def losses_of(folder: Path) -> list[tuple[int, float]]:
    return [(m["step"], m["val_loss"]) for m in read_metrics(folder) if "val_loss" in m]


@pytest.mark.parametrize(("every", "steps"), [(100, [0, 5]), (5, [0, 5]), (2, [0, 2, 4, 5]), (3, [0, 3, 5])])
def test_validation_before_the_first_step_and_after_the_last(
    images: Path, tmp_path: Path, every: int, steps: list[int]
) -> None:
    with pytest.warns(UserWarning):
        trainer = Trainer(**settings(images, tmp_path, val_path=str(images), val_every=every, max_steps=5, lr=1e-2))
    model = trainer.model.eval()
    batch = trainer.validation.__getitems__(range(24))
    with torch.no_grad():
        expected = trainer.objective.losses(model, batch).mean().item()
    folder = trainer.train().folder
    assert [step for step, _ in losses_of(folder)] == steps
    assert losses_of(folder)[0][1] == pytest.approx(expected, rel=1e-5)
    log = (folder / "log.txt").read_text()
    assert f"(step=0000000) Val Loss: {expected:.4f} (24 images)" in log
    assert log.index("Val Loss") < log.index("(step=0000001) Train Loss")
    assert log.count("Val Loss") == len(steps)
    model.eval()
    trainer.ema.exchange()
    with torch.no_grad():
        assert losses_of(folder)[-1][1] == pytest.approx(trainer.objective.losses(model, batch).mean().item(), rel=1e-5)


def test_a_run_that_goes_on_looks_at_no_step_twice(images: Path, tmp_path: Path) -> None:
    looked = {"val_path": str(images), "val_every": 100, "max_steps": 6, "ckpt_every": 100}
    _, whole = train(images, tmp_path / "whole", **looked)
    with pytest.warns(UserWarning):
        trainer = Trainer(**settings(images, tmp_path, **looked))
    fetch = trainer._fetch

    def told_to_stop(source: object) -> dict:
        if trainer.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return fetch(source)

    trainer._fetch = told_to_stop
    result = trainer.train()
    assert result.step == 4 and [step for step, _ in losses_of(result.folder)] == [0]
    _, resumed = train(images, tmp_path, **looked, resume="auto")
    assert resumed.folder == result.folder and losses_of(resumed.folder) == losses_of(whole.folder)
    assert (resumed.folder / "log.txt").read_text().count("Val Loss") == 2
    shutil.rmtree(resumed.folder / "checkpoints")  # nothing to go on from: from the beginning, in the same folder
    _, again = train(images, tmp_path, **looked, resume="auto")
    assert again.folder == result.folder and losses_of(again.folder) == losses_of(whole.folder)


def test_accumulation_and_clipping(images: Path, tmp_path: Path) -> None:
    _, whole = train(images, tmp_path / "a", max_steps=3)
    _, parts = train(images, tmp_path / "b", max_steps=3, accumulate=3)  # 8 images in parts of 3, 3 and 2
    a, b = ([m["loss"] for m in read_metrics(r.folder)] for r in (whole, parts))
    assert a == pytest.approx(b, rel=1e-5)
    trainer = Trainer(**settings(images, tmp_path, max_grad_norm=1e-3), model=tiny())
    norms, before = [], []
    step, update = trainer.optimizer.step, trainer.stepper.update

    def norm() -> float:
        return math.sqrt(sum(float(p.grad.double().square().sum()) for p in trainer.parameters.values()))

    def spy() -> None:
        norms.append(norm())
        step()

    trainer.optimizer.step = spy
    trainer.stepper.update = lambda number: (before.append(norm()), update(number))
    folder = trainer.train().folder
    assert len(norms) == 8 and max(norms) == pytest.approx(1e-3, rel=1e-3)
    assert [m["grad_norm"] for m in read_metrics(folder)] == pytest.approx(before, rel=1e-5) and min(before) > 2e-3


def test_training_from_scratch_freezes_nothing_and_warns_of_nothing(images: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = Trainer(**settings(images, tmp_path, method="full", max_steps=1, global_seed=3)).train()
    said = "no --ckpt: the model is trained from scratch, from seed 3"
    assert (result.folder / "log.txt").read_text().count(said) == 1
    for changes in ({"ckpt": str(result.delta), "model_args": {}, "method": "full"}, {}):
        _, other = train(images, tmp_path / "others", max_steps=1, **changes)
        assert "from scratch" not in (other.folder / "log.txt").read_text()


def test_warm_up(images: Path, tmp_path: Path) -> None:
    _, result = train(images, tmp_path, warmup_steps=4, lr=0.01, max_steps=6)
    assert [m["lr"] for m in read_metrics(result.folder)] == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01])


def test_schedules_have_their_published_values() -> None:
    assert [rate_factor(step, 0, 4, "constant") for step in range(4)] == [1, 1, 1, 1]
    assert [rate_factor(step, 2, 6, "linear") for step in range(7)] == [0.5, 1, 1, 0.75, 0.5, 0.25, 0]
    torch.manual_seed(0)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9)
    for step in range(9):
        assert rate_factor(step + 3, 3, 12, "cosine") == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()
    assert rate_factor(99, 3, 12, "cosine") == pytest.approx(0, abs=1e-12)
    assert rate_factor(0, 5, 5, "cosine") == 0.2 and rate_factor(4, 5, 3, "linear") == 1


def test_a_falling_rate_is_part_of_the_run(images: Path, tmp_path: Path) -> None:
    options = {"lr_schedule": "linear", "warmup_steps": 2, "lr": 0.01, "max_steps": 6, "ckpt_every": 3}
    _, whole = train(images, tmp_path / "whole", **options)
    rates = [row["lr"] for row in read_metrics(whole.folder)]
    assert rates == pytest.approx([0.005, 0.01, 0.01, 0.0075, 0.005, 0.0025])
    result = train(
        images, tmp_path / "parts", **options, resume=str(whole.folder / "checkpoints" / "0000003.safetensors")
    )
    assert result[1].delta.read_bytes() == whole.delta.read_bytes()
    with pytest.raises(DiffFitError, match="--lr-schedule must be one of constant, cosine, linear"):
        TrainConfig(lr_schedule="step").validate()
    longer = TrainConfig(lr_schedule="linear", max_steps=8)
    assert longer.differences(TrainConfig(lr_schedule="linear", max_steps=6).to_dict()) == {"max_steps": (6, 8)}
    assert TrainConfig(max_steps=8).differences(TrainConfig(max_steps=6).to_dict()) == {}
    before = TrainConfig().to_dict()
    del before["lr_schedule"]  # as runs were recorded before there were schedules
    assert TrainConfig().differences(before) == {}
    assert TrainConfig(lr_schedule="cosine").differences(before)["lr_schedule"] == ("constant", "cosine")


def test_a_model_of_one_channel_trains_on_gray_pixels_and_samples_gray(images: Path, tmp_path: Path) -> None:
    gray = {**TINY, "in_channels": 1}
    trainer, result = train(images, tmp_path, model_args=gray, max_steps=2, sample_every=2, num_sampling_steps=2)
    assert trainer.stream.data.channels == trainer.model.in_channels == 1
    assert Image.open(next((result.folder / "samples").iterdir())).mode == "L"
    assert "the model has one channel: images are read as gray" in (result.folder / "log.txt").read_text()
    whole, _ = train(images, tmp_path / "base", model_args=gray, method="full", max_steps=1)
    file = next((tmp_path / "base").rglob("0000001.safetensors"))
    again = Trainer(**settings(images, tmp_path, model_args={}, ckpt=str(file)))
    assert again.stream.data.channels == 1
    for a, b in zip(
        whole.stream.__getitems__([0, 1]).values(), again.stream.__getitems__([0, 1]).values(), strict=True
    ):
        assert torch.equal(a, b)


def tiny(**kwargs: object) -> FastDiffFitDiT:
    torch.manual_seed(1)
    base = DiT(input_size=16, in_channels=3, num_classes=3, **TINY)
    for p in base.parameters():
        if p.requires_grad and p.dim() > 1:
            torch.nn.init.normal_(p, std=0.05)
    return FastDiffFitDiT.from_dit(base, **kwargs)


@pytest.mark.parametrize(
    ("method", "objective", "counted"),
    [("full", "ddpm", None), ("bitfit", "flow", "bitfit"), ("difffit", "flow", "paper")],
)
def test_methods_and_objectives(images: Path, tmp_path: Path, method: str, objective: str, counted: str | None) -> None:
    trainer, result = train(images, tmp_path, method=method, objective=objective, max_steps=2)
    if counted:
        assert sum(p.numel() for p in trainer.parameters.values()) == tiny(difffit=counted).num_trainable
    else:
        from difffit_fast.models.state_dict import read_weights

        state = read_weights(result.delta).state
        DiT(input_size=16, in_channels=3, num_classes=3, **TINY).load_state_dict(state)
        assert torch.equal(state["blocks.0.attn.qkv.weight"], trainer.ema.tensors["blocks.0.attn.qkv.weight"])


@pytest.mark.parametrize(
    ("method", "options"), [("lora", {"rank": 2}), ("adapter", {}), ("difffit", {"gamma_blocks": 1})]
)
def test_baselines_train_and_their_files_load(images: Path, tmp_path: Path, method: str, options: dict) -> None:
    if method == "lora":
        pytest.importorskip("peft")
    trainer, result = train(images, tmp_path, method=method, method_args=options, max_steps=2, ckpt_every=1)
    again, resumed = train(images, tmp_path, method=method, method_args=options, max_steps=3, resume="auto")
    assert resumed.folder == result.folder and resumed.step == 3
    if method != "difffit":
        from difffit_fast.baselines import load_trainables

        assert load_trainables(again.model, resumed.delta).get("method_options") == (options or None)
    for name, p in trainer.model.named_parameters():
        if p.requires_grad and "lora_B" in name:
            assert p.abs().sum() > 0


def test_own_model_and_data(images: Path, tmp_path: Path) -> None:
    model, data = tiny(), ImageFolder(images, 16)
    before = {name: p.clone() for name, p in model.named_parameters()}
    result = Trainer(model=model, data=data, vae="none", **{k: SETTINGS[k] for k in ("device", "precision", "progress")},
                     max_steps=2, num_workers=0, global_batch_size=4, results_dir=str(tmp_path)).train()  # fmt: skip
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and changed <= {name for name, _ in model.named_trainable_parameters()}
    assert model.y_embedder.dropout_prob == 0.1  # switched off in training only
    assert result.delta.is_file()


def test_from_a_checkpoint_with_other_classes_and_another_size(images: Path, tmp_path: Path) -> None:
    base = DiT(input_size=8, in_channels=3, num_classes=5, **TINY)
    torch.save({"ema": base.state_dict()}, tmp_path / "base.pt")
    config = settings(images, tmp_path, ckpt=str(tmp_path / "base.pt"), model_args={"num_heads": 2}, max_steps=1)
    with pytest.warns(UserWarning, match="class embedding is made anew"):
        trainer = Trainer(**config)
    assert trainer.model.num_classes == 3 and trainer.model.input_size == 16 and trainer.model.pos_embed_scale == 0.5
    assert torch.equal(trainer.model.blocks[1].mlp.fc1.weight, base.blocks[1].mlp.fc1.weight)
    with pytest.warns(UserWarning):
        again = Trainer(**config)
    table = "y_embedder.embedding_table.weight"
    assert torch.equal(
        trainer.model.state_dict()[table], again.model.state_dict()[table]
    )  # new rows come from the seed


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])  # there read one step late
def test_a_loss_that_is_not_a_number_stops_the_run_and_keeps_the_checkpoint(
    images: Path, tmp_path: Path, device: str
) -> None:
    with pytest.warns(UserWarning):
        trainer = Trainer(**settings(images, tmp_path, device=device))
    encode = trainer.objective.encode  # outside of what a GPU captures
    trainer.objective.encode = lambda batch: {
        **encode(batch), "noise": batch["noise"] * (math.nan if trainer.step == 5 else 1)
    }  # fmt: skip
    with pytest.raises(
        NonFiniteLossError, match=r"the loss became nan at step 6 \(.*\); the checkpoint of step 4 is kept"
    ):
        trainer.train()
    assert CheckpointFolder(trainer.folder / "checkpoints").newest().step == 4


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_run_after_a_checkpoint(images: Path, tmp_path: Path, number: int) -> None:
    with pytest.warns(UserWarning):
        trainer = Trainer(**settings(images, tmp_path))
    losses = trainer.objective.losses

    def interrupted(model: object, batch: dict) -> torch.Tensor:
        if trainer.step == 2:
            os.kill(os.getpid(), number)
        return losses(model, batch)

    trainer.objective.losses = interrupted
    if number == signal.SIGHUP:  # which nohup has the tests ignore, and the trainer then, too
        before_all = signal.signal(number, signal.SIG_DFL)
    before = signal.getsignal(number)
    result = trainer.train()
    assert (result.signal, result.step) == (number, 3) and signal.getsignal(number) is before
    if number == signal.SIGHUP:
        signal.signal(number, before_all)
    assert CheckpointFolder(trainer.folder / "checkpoints").newest().step == 3


def test_resume_chooses_the_run_with_the_same_settings(images: Path, tmp_path: Path) -> None:
    _, first = train(images, tmp_path, max_steps=4)
    _, second = train(images, tmp_path, max_steps=4, lr=1e-4, resume="auto")
    assert second.folder.name == "001-DiT-custom"
    assert "lr: 0.0003 -> 0.0001" in (second.folder / "log.txt").read_text()
    _, third = train(images, tmp_path, max_steps=6, resume="auto")
    assert third.folder == first.folder and third.step == 6
    assert "Resumed from step 4" in (first.folder / "log.txt").read_text()
    assert [m["step"] for m in read_metrics(first.folder)] == [1, 2, 3, 4, 5, 6]
    _, branch = train(
        images, tmp_path, max_steps=5, lr=1e-4, resume=str(first.folder / "checkpoints/0000004.safetensors")
    )
    assert branch.folder.name == "002-DiT-custom" and branch.step == 5  # not over the newer checkpoint
    with pytest.warns(UserWarning, match="finished already"):
        done = Trainer(**settings(images, tmp_path, max_steps=6, resume="auto")).train()
    assert done.delta == third.delta


def test_cached_features_train_too(images: Path, tmp_path: Path) -> None:
    from difffit_fast.data.extract import ExtractConfig, Extraction

    cache = tmp_path / "features"
    extraction = Extraction(ExtractConfig(data_path=str(images), features_path=str(cache), image_size=16, vae="none"))
    extraction.run(0, 1, lambda count: None)
    extraction.finish()
    results = []
    for name, where in (("a", {"data_path": str(images)}), ("b", {"data_path": None, "feature_path": str(cache)})):
        changes = {**where, "image_size": None if name == "b" else 16, "max_steps": 2, "class_dropout_prob": 0.0}
        with pytest.warns(UserWarning):
            trainer = Trainer(**{**settings(images, tmp_path / name), **changes})
        assert trainer.config.image_size == 16 and trainer.config.vae == "none"
        results.append(read_metrics(trainer.train().folder))
    assert len(results[1]) == 2


def test_state_json_names_step_position_and_every_generator(images: Path, tmp_path: Path) -> None:
    _, result = train(images, tmp_path, max_steps=2)
    info = json.loads((result.folder / "checkpoints" / "0000002.state" / "state.json").read_text())
    assert info["step"] == 2 and info["position"] == 16 and info["updates"] == 2
    assert set(info["generators"][0]) >= {"python", "numpy", "torch"}


def test_frechet_distance_during_training(images, tmp_path) -> None:
    """The distance is logged when due, needs a reference, and does not disturb the training."""
    options = {"fid_samples": 4, "fid_features": "training:tiny_features", "num_sampling_steps": 2, "max_steps": 2}
    watched = Trainer(**{**SETTINGS, **options}, data_path=str(images), results_dir=str(tmp_path / "a"), fid_every=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # four samples make a singular covariance
        result = watched.train()
    assert re.search(r"\(step=0000002\) FD: \d+\.\d+ \(4 samples\)", (result.folder / "log.txt").read_text())
    plain = Trainer(**{**SETTINGS, **options}, data_path=str(images), results_dir=str(tmp_path / "b")).train()
    assert plain.delta.read_bytes() == result.delta.read_bytes()
