"""Training from a graph: the same bits as without one, step by step, on a CPU whose graphs are recordings."""

from __future__ import annotations

import contextlib
import gc
import math
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from recording import NoWaiting, Recorder, WaitsError, spoil
from torch import Tensor, nn
from training import SETTINGS, TINY, digits

from difffit_fast import DiT, FastDiffFitDiT
from difffit_fast.baselines.plain_difffit import PlainDiffFitDiT
from difffit_fast.errors import DiffFitError
from difffit_fast.graph import capture
from difffit_fast.train import NonFiniteLossError, TrainConfig, Trainer
from difffit_fast.train.captured import choose_capture
from difffit_fast.train.generators import generators_state
from difffit_fast.train.track import read_metrics

METHODS = ("difffit", "bitfit", "full", "lora", "adapter", "vpt", "class_embedding")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return digits(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random AutoencoderKL of a factor of two, as diffusers saves it."""
    diffusers = pytest.importorskip("diffusers")
    folder = tmp_path_factory.mktemp("vae")
    torch.manual_seed(2)
    diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, sample_size=16,
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def make(images: Path, folder: Path, model: nn.Module | None = None, **changes: object) -> Trainer:
    settings = {**SETTINGS, "data_path": str(images), "results_dir": str(folder), "ckpt_every": 3, "max_steps": 6}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Trainer(model=model, **{**settings, **changes})


def record(trainer: Trainer) -> Recorder:
    """Let ``trainer`` run from recordings; before each replay the batch itself is spoilt, so that only its copy serves."""
    recorder, seen = Recorder(), []
    encode = trainer.objective.encode

    def watched(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        encoded = encode(batch)
        seen.extend((*batch.values(), *encoded.values()))
        return encoded

    def spoil_batch() -> None:
        for tensor in seen:
            with contextlib.suppress(RuntimeError), torch.inference_mode():
                spoil(tensor)
        seen.clear()

    trainer.objective.encode, recorder.before_replay = watched, spoil_batch
    trainer.stepper.capture = recorder
    return recorder


def watch(trainer: Trainer) -> list[dict[str, Any]]:
    """What a step leaves: gradients, loss, generators, parameters, averages; filled while the trainer runs."""
    steps: list[dict[str, Any]] = []
    update = trainer.stepper.update

    def watched(step: int) -> None:
        steps.append({
            "gradients": {n: None if p.grad is None else p.grad.clone() for n, p in trainer.parameters.items()},
            "generators": generators_state(),
        })  # fmt: skip
        update(step)
        steps[-1]["parameters"] = {n: p.detach().clone() for n, p in trainer.parameters.items()}
        steps[-1]["averages"] = {n: t.clone() for n, t in trainer.ema.tensors.items()}

    trainer.stepper.update = watched
    return steps


def assert_same(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> None:
    assert len(one) == len(other) > 0
    for number, (a, b) in enumerate(zip(one, other, strict=True), 1):
        assert a["generators"] == b["generators"], number
        for kind in ("gradients", "parameters", "averages"):
            assert a[kind].keys() == b[kind].keys()
            for name, value in a[kind].items():
                same = value is b[kind][name] is None or torch.equal(value, b[kind][name])
                assert same, (number, kind, name)


def assert_same_files(one: Path, other: Path, last: int) -> None:
    for name in (f"{last:07d}.safetensors", f"{last:07d}.state/tensors.safetensors"):
        assert (one / "checkpoints" / name).read_bytes() == (other / "checkpoints" / name).read_bytes(), name
    losses = [[(m["step"], m["loss"], m["lr"]) for m in read_metrics(folder) if "loss" in m] for folder in (one, other)]
    assert losses[0] == losses[1] and all(math.isfinite(loss) for _, loss, _ in losses[0])


CASES = {
    **{method: {"method": method} for method in METHODS},
    "flow": {"objective": "flow"},
    "pieces": {"accumulate": 4},
    "uneven pieces, clipped, warmed up": {"accumulate": 3, "max_grad_norm": 1e-2, "warmup_steps": 4},
    "one image a piece": {"accumulate": 5, "global_batch_size": 5, "method": "full"},
    "bf16 under autocast": {"precision": "bf16", "method": "adapter"},
    "bf16": {"precision": "bf16"},
    "looked at": {"val_fraction": 0.25, "val_every": 2, "sample_every": 3, "num_sampling_steps": 2},
}


@pytest.mark.parametrize("case", CASES)
def test_a_captured_run_equals_an_eager_one_bit_for_bit(images: Path, tmp_path: Path, case: str) -> None:
    changes = CASES[case]
    if changes.get("method") == "lora":
        pytest.importorskip("peft")
    eager, captured = make(images, tmp_path / "a", **changes), make(images, tmp_path / "b", **changes)
    recorder, seen = record(captured), (watch(eager), watch(captured))
    one, other = eager.train(), captured.train()
    assert_same(*seen)
    assert_same_files(one.folder, other.folder, 6)
    assert (recorder.captures, recorder.replays) == (1, 6)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_images_are_encoded_outside(images: Path, tmp_path: Path, vae: str, accumulate: int) -> None:
    changes = {"vae": vae, "accumulate": accumulate, "model_args": {**TINY, "patch_size": 2}}
    eager, captured = make(images, tmp_path / "a", **changes), make(images, tmp_path / "b", **changes)
    recorder, seen = record(captured), (watch(eager), watch(captured))
    one, other = eager.train(), captured.train()
    assert_same(*seen)
    assert_same_files(one.folder, other.folder, 6)
    assert (recorder.captures, recorder.replays) == (1, 6)


@pytest.mark.parametrize("change", [{}, {"accumulate": 3, "max_grad_norm": 0.01}], ids=["whole", "pieces"])
def test_a_resumed_captured_run_equals_an_uninterrupted_eager_one(images: Path, tmp_path: Path, change: dict) -> None:
    whole = make(images, tmp_path / "a", max_steps=9, **change).train()
    for last in (3, 6, 9):
        part = make(images, tmp_path / "b", max_steps=last, resume="auto", **change)
        recorder = record(part)
        result = part.train()
        assert (recorder.captures, recorder.replays) == (1, 3)
    assert_same_files(whole.folder, result.folder, 9)
    eager = make(images, tmp_path / "b", max_steps=12, resume="auto", **change).train()  # and the other way round
    whole = make(images, tmp_path / "a", max_steps=12, resume="auto", **change).train()
    assert_same_files(whole.folder, eager.folder, 12)


def test_gradient_checkpointing(images: Path, tmp_path: Path) -> None:
    folders = []
    for name in ("a", "b"):
        model = tiny()
        model.gradient_checkpointing = True
        trainer = make(images, tmp_path / name, model=model)
        if name == "b":
            record(trainer)
        folders.append(trainer.train().folder)
    assert_same_files(*folders, 6)


def tiny() -> FastDiffFitDiT:
    torch.manual_seed(1)
    base = DiT(input_size=16, in_channels=3, num_classes=3, **TINY)
    for p in base.parameters():
        if p.requires_grad and p.dim() > 1:
            torch.nn.init.normal_(p, std=0.05)
    return FastDiffFitDiT.from_dit(base)


# -- batches of other shapes -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_batch_of_another_shape_runs_without_the_graph(images: Path, tmp_path: Path, accumulate: int) -> None:
    """Some steps with fewer images than the others, as a share would be, before and after steps of the usual size."""
    seen = []
    for name in ("a", "b"):
        trainer = make(images, tmp_path / name, accumulate=accumulate)
        recorder = record(trainer) if name == "b" else None
        fetch = trainer._fetch

        def cut(source: Any, trainer: Trainer = trainer, fetch: Callable = fetch) -> dict[str, Tensor]:
            rows = {1: 5, 2: 1, 4: 7}.get(trainer.step, 8)
            return {key: value[:rows] for key, value in fetch(source).items()}

        trainer._fetch = cut
        seen.append((watch(trainer), trainer.train().folder))
    assert_same(seen[0][0], seen[1][0])
    assert_same_files(seen[0][1], seen[1][1], 6)
    assert (recorder.captures, recorder.replays) == (1, 3)


# -- what else a graph must not change ---------------------------------------------------------------------------------
def test_a_parameter_without_a_gradient_stays_without_one(images: Path, tmp_path: Path) -> None:
    seen = []
    for name in ("a", "b"):
        torch.manual_seed(1)
        model = DiT(input_size=16, in_channels=3, num_classes=3, **TINY)
        model.idle = nn.Parameter(torch.ones(3))
        trainer = make(images, tmp_path / name, model=model)
        for parameter in trainer.parameters.values():  # what earlier work left there does not count
            parameter.grad = torch.ones_like(parameter)
        if name == "b":
            record(trainer)
        seen.append(watch(trainer))
        trainer.train()
    assert_same(*seen)
    assert all(step["gradients"]["idle"] is None for step in seen[1])


def test_making_a_graph_draws_no_random_numbers_from_the_run(images: Path, tmp_path: Path) -> None:
    """Not even where the model itself is random: warming up and capturing leave the generators as they were."""
    seen = []
    for name in ("a", "b"):
        torch.manual_seed(1)
        model = DiT(input_size=16, in_channels=3, num_classes=3, **TINY)
        nn.init.normal_(model.final_layer.linear.weight)
        model.final_layer.linear = nn.Sequential(nn.Dropout(0.5), model.final_layer.linear)
        trainer = make(images, tmp_path / name, model=model)
        if name == "b":
            record(trainer)
        seen.append(watch(trainer))
        trainer.train()
    assert_same(*seen)
    assert seen[1][0]["generators"] != seen[1][1]["generators"]


def test_a_loss_that_is_not_a_number_is_noticed(images: Path, tmp_path: Path) -> None:
    trainer = make(images, tmp_path, ckpt_every=2)
    recorder = record(trainer)
    encode = trainer.objective.encode
    trainer.objective.encode = lambda batch: {
        **encode(batch), "noise": batch["noise"] * (math.nan if trainer.step == 4 else 1)
    }  # fmt: skip
    with pytest.raises(NonFiniteLossError, match="nan at step 5 .*; the checkpoint of step 4 is kept"):
        trainer.train()
    assert recorder.replays == 5


def test_the_memory_of_the_graph_is_given_back(images: Path, tmp_path: Path) -> None:
    trainer = make(images, tmp_path)
    record(trainer)
    trainer.train()
    assert trainer.stepper._captured is None and all(p.grad is None for p in trainer.parameters.values())


def test_a_capture_that_fails_is_told_of_and_training_goes_on(images: Path, tmp_path: Path) -> None:
    def failing(step: Callable[[], Any]) -> Callable[[], Any]:
        step()
        failing.calls += 1
        for p in trainer.parameters.values():  # left in the middle of a backward pass
            p.grad = torch.full_like(p, math.nan)
        try:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    failing.calls = 0
    plain = make(images, tmp_path / "a").train()
    trainer = make(images, tmp_path / "b")
    trainer.stepper.capture = failing
    result = trainer.train()
    assert_same_files(plain.folder, result.folder, 6)
    said = (
        "not captured in a CUDA graph: capturing failed (CUDA error: operation not permitted when stream is capturing)"
    )
    assert (result.folder / "log.txt").read_text().count(said) == failing.calls == 1
    trainer = make(images, tmp_path / "c")
    trainer.stepper.capture, trainer.stepper.config.cuda_graph = failing, "on"
    with pytest.raises(
        DiffFitError, match="--cuda-graph on was asked for, but capturing failed: CUDA error: operation"
    ):
        trainer.train()


# -- where it can be -------------------------------------------------------------------------------------------------
CUDA = torch.device("cuda", 0)


class Foreign(nn.Module):
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return x


def with_a_foreign_part() -> nn.Module:
    model = tiny()
    model.blocks[0].mlp = Foreign()
    return model


@pytest.mark.parametrize(
    ("device", "settings", "model", "reason"),
    [
        (CUDA, {}, tiny, None),
        (CUDA, {}, lambda: DiT(input_size=16, in_channels=3, num_classes=3, **TINY), None),
        (CUDA, {}, lambda: PlainDiffFitDiT(input_size=16, in_channels=3, num_classes=3, **TINY), None),
        (torch.device("cpu"), {}, tiny, "the device is cpu"),
        (CUDA, {"fsdp": True, "method": "full"}, tiny, "--fsdp gathers the weights during a step"),
        (CUDA, {"compile": True}, tiny, "--compile leaves it to torch.compile how the model runs"),
        (CUDA, {}, Foreign, "of modules from elsewhere, such as Foreign, it is not known"),
        (CUDA, {}, with_a_foreign_part, "of modules from elsewhere, such as Foreign, it is not known"),
        (CUDA, {}, lambda: nn.Linear(1, 1), "of modules from elsewhere, such as Linear, it is not known"),
    ],
)
def test_where_it_can_be(device: torch.device, settings: dict, model: Callable, reason: str | None) -> None:
    chosen, note = choose_capture(TrainConfig(**settings), device, model())
    assert chosen == (reason is None)
    if reason:
        assert note.startswith(f"steps are not captured in a CUDA graph: {reason}")
        with pytest.raises(DiffFitError, match=f"--cuda-graph on was asked for, but {reason}"):
            choose_capture(TrainConfig(**settings, cuda_graph="on"), device, model())
    else:
        assert "from a CUDA graph" in note
        assert choose_capture(TrainConfig(cuda_graph="on"), device, model()) == (True, note)
    assert choose_capture(TrainConfig(**settings, cuda_graph="off"), device, model()) == (False, None)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_of_ours_can_be_captured(images: Path, tmp_path: Path, method: str) -> None:
    if method == "lora":
        pytest.importorskip("peft")
    assert choose_capture(TrainConfig(), CUDA, make(images, tmp_path, method=method).model)[0]


def test_it_is_said_once_and_insisting_is_an_error(images: Path, tmp_path: Path) -> None:
    result = make(images, tmp_path, max_steps=2).train()
    assert (result.folder / "log.txt").read_text().count("CUDA graph") == 1
    result = make(images, tmp_path, max_steps=2, cuda_graph="off").train()
    assert "CUDA graph" not in (result.folder / "log.txt").read_text()
    with pytest.raises(DiffFitError, match="--cuda-graph on was asked for, but the device is cpu"):
        make(images, tmp_path, cuda_graph="on")


def test_on_and_off_in_a_file(tmp_path: Path) -> None:
    """YAML takes these words for true and false."""
    file = tmp_path / "run.yaml"
    for word in ("on", "off", "auto", "'on'"):
        file.write_text(f"cuda_graph: {word}\n")
        config = TrainConfig.load(file)
        assert config.cuda_graph == word.strip("'")
        config.save(file)
        assert TrainConfig.load(file) == config
    with pytest.raises(DiffFitError, match="--cuda-graph must be one of auto, on, off; got 'never'"):
        TrainConfig(cuda_graph="never").validate()
    assert TrainConfig().differences({"cuda_graph": "off"}) == {}  # a run may go on with or without


# -- the capture itself ----------------------------------------------------------------------------------------------
class FakeCuda:
    """As much of ``torch.cuda`` as capturing asks for; what it is asked goes to ``told``."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.told: list[Any] = []
        self.now = "the stream in use"
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(wait_stream=lambda s: None, name=self.now))
        patch.setattr(torch.cuda, "set_stream", lambda stream: setattr(self, "now", stream.name))
        patch.setattr(torch.cuda, "Stream", lambda: SimpleNamespace(wait_stream=lambda s: None, name="aside"))
        patch.setattr(torch.cuda, "stream", self._stream)
        patch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: self.told.append("replay")))
        patch.setattr(torch.cuda, "graph", self._graph)

    @contextlib.contextmanager
    def _stream(self, stream: SimpleNamespace) -> Iterator[None]:
        before, self.now = self.now, stream.name
        try:
            yield
        finally:
            self.now = before

    @contextlib.contextmanager
    def _graph(self, graph: Any, capture_error_mode: str) -> Iterator[None]:
        self.told.append(capture_error_mode)
        before, self.now = self.now, "the capture's"
        yield  # as PyTorch's, it leaves its stream in use when the end of the capture raises
        self.now = before


def test_capture_warms_up_aside_and_returns_what_the_step_did(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, streams = FakeCuda(monkeypatch), []

    def step() -> int:
        streams.append(cuda.now)
        return len(streams)

    replay = capture(step)
    assert (replay(), replay()) == (4, 4) and cuda.told == ["thread_local", "replay", "replay"]
    assert streams == ["aside"] * 3 + ["the capture's"] and cuda.now == "the stream in use"


def test_a_capture_that_fails_leaves_the_stream_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)

    def step() -> None:
        if cuda.now == "the capture's":
            raise RuntimeError("not permitted")

    with pytest.raises(RuntimeError, match="not permitted"):
        capture(step)
    assert cuda.now == "the stream in use"


def test_without_a_device_nothing_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DiffFitError, match="needs a CUDA device"):
        capture(lambda: None)


# -- nothing waits for the device --------------------------------------------------------------------------------------
@pytest.mark.parametrize("captured", [False, True], ids=["eager", "captured"])
@pytest.mark.parametrize("case", ["uneven pieces, clipped, warmed up", "flow", *METHODS])
def test_nothing_in_a_step_waits_for_the_device(
    images: Path, tmp_path: Path, case: str, captured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No value is read back and no tensor is made of the host's data; the device itself is watched in test_gpu.py.

    Reading the loss is left out, which on CUDA happens a step late.
    """
    if case == "lora":
        pytest.importorskip("peft")
    trainer = make(images, tmp_path, **CASES[case])
    if captured:
        record(trainer)
    one_step, numbers = trainer._one_step, []

    def refusing(function: Callable) -> Callable:
        def refuse(*args: Any, **kwargs: Any) -> Any:
            if threading.current_thread() is threading.main_thread():  # another one prepares the next batch
                raise WaitsError(f"{function.__name__}: a tensor goes to the host, or comes from it")
            return function(*args, **kwargs)

        return refuse

    def watched(batch: dict[str, Tensor]) -> None:
        push = trainer.readback.push
        with monkeypatch.context() as patch, NoWaiting() if trainer.step else contextlib.nullcontext():
            patch.setattr(trainer.readback, "push", lambda step, sums: numbers.append((step, sums)))
            if trainer.step:
                for name in ("tolist", "numpy", "cpu", "__array__"):
                    patch.setattr(Tensor, name, refusing(getattr(Tensor, name)))
                for name in ("tensor", "as_tensor", "from_numpy", "asarray"):
                    patch.setattr(torch, name, refusing(getattr(torch, name)))
            one_step(batch)
        push(*numbers[-1])

    trainer._one_step = watched
    trainer.train()
    assert len(numbers) == 6 and all(sums.shape == (3,) and sums.isfinite().all() for _, sums in numbers)


@pytest.mark.parametrize(
    "waits",
    [lambda x: x.sum().item(), lambda x: x + torch.tensor(1.0), lambda x: x[x > 0], lambda x: bool(x.any())],
    ids=["item", "tensor", "mask", "bool"],
)
def test_the_watch_sees_what_waits(waits: Callable[[Tensor], Any]) -> None:
    with NoWaiting(), pytest.raises(WaitsError):
        waits(torch.ones(3))


def test_a_recording_takes_nothing_new_but_through_the_tensors_that_were_there() -> None:
    """The stand-in itself: numbers of the host are those of the recording, results keep their memory."""
    slot, factor = torch.tensor([1.0, 2.0], requires_grad=True), [2.0]

    def step() -> tuple[Tensor, Tensor]:
        slot.grad = None
        loss = (slot.square() * factor[0]).sum()
        loss.backward()
        gradient, slot.grad = slot.grad, None
        return loss.detach(), gradient

    replay = Recorder()(step)
    factor[0] = 100.0
    with torch.no_grad():
        slot.copy_(torch.tensor([3.0, 4.0]))
    loss, gradient = replay()
    assert loss.item() == 50 and gradient.tolist() == [12.0, 16.0]
    with torch.no_grad():
        slot.zero_()
    replay()
    assert loss.item() == 0 and gradient.tolist() == [0.0, 0.0]


def test_a_replay_keeps_what_its_graph_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step, and with it an optimizer's state: the graph has their addresses and no reference."""
    cuda = torch.cuda
    nothing = contextlib.nullcontext
    stream = SimpleNamespace(wait_stream=lambda other: None)
    stand_ins = {
        "is_available": lambda: True, "current_stream": lambda: stream, "Stream": lambda: stream, "stream": lambda _: nothing(),
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None), "set_stream": lambda _: None,
        "graph": lambda *_, **__: nothing(gc.isenabled()),
    }  # fmt: skip
    for name, value in stand_ins.items():
        monkeypatch.setattr(cuda, name, value)
    enabled: list[bool] = []

    class Step:
        def __call__(self) -> int:
            enabled.append(gc.isenabled())
            return 7

    step = Step()
    alive = weakref.ref(step)
    replay = capture(step)
    del step
    gc.collect()
    assert replay() == 7 and alive() is not None
    assert enabled == [True, True, True, False] and gc.isenabled()  # nothing is collected while it captures
    del replay
    gc.collect()
    assert alive() is None
