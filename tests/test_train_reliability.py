"""What may happen to a run: values that are not finite, torn and changed checkpoints, readers and workers that go away."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from training import Process, digits, flags

from difffit_fast import _devices
from difffit_fast._processes import LostProcessError
from difffit_fast.cli import main
from difffit_fast.cli.terminal import Voice, voices
from difffit_fast.errors import DiffFitError
from difffit_fast.train import TrainConfig, Trainer, stream
from difffit_fast.train.checkpoint import CheckpointFolder
from difffit_fast.train.interrupt import Interrupt
from difffit_fast.train.readback import NonFiniteLossError
from difffit_fast.train.track import Tracker

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return digits(tmp_path_factory.mktemp("images"))


def words(images: Path, out: Path, **settings: object) -> list[str]:
    return ["train", *flags(data_path=images, results_dir=out, **settings)]


def trainer_of(images: Path, out: Path, **settings: object) -> Trainer:
    from training import SETTINGS

    return Trainer(**{**SETTINGS, "data_path": str(images), "results_dir": str(out), **settings})


def all_finite(folder: Path) -> bool:
    files = list(folder.rglob("*.safetensors"))
    return bool(files) and all(t.isfinite().all() for file in files for t in load_file(file).values())


# -- values that are not finite ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("method", ["difffit", "full", "lora"])
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_reaches_no_checkpoint(
    images: Path, tmp_path: Path, method: str, bad: float, clip: float
) -> None:
    """The loss is finite all the time."""
    if method == "lora":
        pytest.importorskip("peft")
    trainer = trainer_of(images, tmp_path, method=method, max_steps=8, ckpt_every=2, max_grad_norm=clip)
    name, parameter = list(trainer.parameters.items())[3]
    parameter.register_hook(lambda grad: grad * bad if trainer.step == 4 else grad)
    with pytest.raises(NonFiniteLossError) as caught:
        trainer.train()
    message = str(caught.value)
    assert "the norm of the gradients became" in message and "at step 5" in message
    assert f"the gradient of {name}" in message and "the checkpoint of step 4 is kept" in message
    assert all_finite(trainer.folder / "checkpoints")
    again = trainer_of(images, tmp_path, method=method, max_steps=8, ckpt_every=2, max_grad_norm=clip, resume="auto")
    assert again.train().step == 8 and again.folder == trainer.folder and all_finite(trainer.folder / "checkpoints")


def test_a_value_that_is_not_finite_is_not_saved(images: Path, tmp_path: Path) -> None:
    """However it came about."""
    trainer = trainer_of(images, tmp_path, max_steps=4, ckpt_every=2)
    update = trainer.ema.update
    name = list(trainer.parameters)[2]

    def broken() -> None:
        update()
        if trainer.step == 3:
            trainer.ema.tensors[name].fill_(math.inf)

    trainer.ema.update = broken
    with pytest.raises(NonFiniteLossError, match=rf"ema/{name} is not finite after step 4.*of step 2 is kept"):
        trainer.train()
    assert CheckpointFolder(trainer.folder / "checkpoints").steps() == [2] and all_finite(
        trainer.folder / "checkpoints"
    )


def test_the_image_that_is_not_finite_is_named(images: Path, tmp_path: Path) -> None:
    trainer = trainer_of(images, tmp_path, max_steps=12, ckpt_every=1)
    load = trainer.stream.data.load
    trainer.stream.data.load = lambda index, seed: (load(index, seed)[0] * (math.nan if index == 5 else 1), 0)
    with pytest.raises(NonFiniteLossError, match=rf"the data of {trainer.stream.data.files[5]} is not finite"):
        trainer.train()


def test_a_checkpoint_that_is_not_finite_is_passed_over(
    images: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """Earlier versions wrote such ones."""
    assert main(words(images, tmp_path, max_steps=4, ckpt_every=2)) == 0
    (run,) = tmp_path.iterdir()
    folder = CheckpointFolder(run / "checkpoints")
    file = folder.state_path(4) / "tensors.safetensors"
    tensors = load_file(file)
    tensors["value/blocks.0.attn.proj.bias"][0] = math.nan
    save_file(tensors, file)
    state = folder.state_path(4) / "state.json"
    info = json.loads(state.read_text())
    from difffit_fast._files import sha256

    info["sha256"]["tensors"] = sha256(file)
    state.write_text(json.dumps(info))
    assert main(words(images, tmp_path, max_steps=6, ckpt_every=2, resume="auto")) == 0
    told = capfd.readouterr().err
    assert "passing over the checkpoint of step 4" in told and "blocks.0.attn.proj.bias is not finite" in told
    assert "Resumed from step 2" in told and all_finite(run / "checkpoints")


# -- checkpoints -------------------------------------------------------------------------------------------------------
def write(folder: CheckpointFolder, step: int) -> None:
    folder.save(step, lambda path: path.write_bytes(b"delta"), {"a": torch.ones(3)}, {"position": step})


def tear(folder: CheckpointFolder, step: int) -> None:
    file = folder.state_path(step) / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-3])


def test_torn_checkpoints_do_not_count_and_the_newest_stays(tmp_path: Path) -> None:
    write(CheckpointFolder(tmp_path), 50)
    tear(CheckpointFolder(tmp_path), 50)
    folder = CheckpointFolder(tmp_path, keep=1)
    for step in (10, 20, 30):
        write(folder, step)
        assert folder.newest().step == step and folder.steps() == [step, 50]
    write(folder, 60)
    assert folder.steps() == [60]
    write(folder, 70)
    folder = CheckpointFolder(tmp_path, keep=2)
    tear(folder, 70)
    write(folder, 80)
    assert folder.steps() == [70, 80]  # of two to keep only one is whole: the torn one may go when there is another
    write(folder, 90)
    assert folder.steps() == [80, 90]


def test_the_one_just_written_stays_beside_a_longer_run(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=1)
    write(folder, 90)
    write(folder, 10)
    assert {10, 90} == set(folder.steps())
    write(folder, 20)
    assert folder.steps() == [20, 90]


@pytest.mark.parametrize("change", [("position", 24), ("updates", 1), ("window", [1.0]), ("step", 3)])
def test_a_changed_state_is_found_out(images: Path, tmp_path: Path, change: tuple[str, object]) -> None:
    assert main(words(images, tmp_path, max_steps=2, ckpt_every=1)) == 0
    (run,) = tmp_path.iterdir()
    folder = CheckpointFolder(run / "checkpoints")
    state = folder.state_path(2) / "state.json"
    info = json.loads(state.read_text())
    state.write_text(json.dumps({**info}))  # laid out otherwise, the same
    assert folder.read(2).info["position"] == 16
    state.write_text(json.dumps({**info, change[0]: change[1]}))
    with pytest.raises(DiffFitError, match="state.json is damaged"):
        folder.read(2)
    assert folder.newest().step == 1
    info["sha256"].pop("state")  # as earlier versions wrote it
    state.write_text(json.dumps(info))
    assert folder.read(2).step == 2


def test_a_checkpoint_under_another_name_is_found_out(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    for step in (2, 4):
        write(folder, step)
    os.rename(folder.state_path(4), folder.state_path(8))
    os.rename(folder.delta_path(4), folder.delta_path(8))
    with pytest.raises(DiffFitError, match=r"0000008.state is not what its name says: it holds step 4"):
        CheckpointFolder(tmp_path).read(8)
    assert CheckpointFolder(tmp_path).newest().step == 2


def test_a_rescue_does_not_write_again_what_is_saved(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writing begins by removing: a kill then would take the only whole checkpoint."""
    trainer = trainer_of(images, tmp_path, max_steps=2, ckpt_every=2, keep_checkpoints=1)
    trainer.train()
    calls = []
    monkeypatch.setattr(trainer.state, "save_alone", lambda *arguments: calls.append(arguments) or Path("there"))
    monkeypatch.setattr(trainer.tracker, "say", lambda text: None)
    assert "step 2 is saved" in str(trainer._rescue(LostProcessError("gone"))) and not calls
    trainer.step = 3
    assert "step 3 is saved" in str(trainer._rescue(LostProcessError("gone"))) and len(calls) == 1


# -- readers that go away ----------------------------------------------------------------------------------------------
def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "difffit_fast", *arguments]


@pytest.mark.parametrize("progress", [False, True])
def test_a_reader_that_goes_away_ends_no_run(images: Path, tmp_path: Path, progress: bool) -> None:
    """difffit train ... 2>&1 | head -1"""
    run = subprocess.Popen(
        command(*words(images, tmp_path, max_steps=12, ckpt_every=4, progress=progress)),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert run.stdout.readline()
    run.stdout.close()
    assert run.wait(120) == 0
    (folder,) = tmp_path.iterdir()
    assert CheckpointFolder(folder / "checkpoints").newest().step == 12
    log = (folder / "log.txt").read_text()
    assert "(step=0000012)" in log and "Done!" in log


def test_streams_that_are_closed_from_the_start(images: Path, tmp_path: Path) -> None:
    line = " ".join(map(str, command(*words(images, tmp_path, max_steps=2))))
    assert subprocess.run(["sh", "-c", f"{line} <&- >&- 2>&-"], check=False, timeout=120).returncode == 0
    (folder,) = tmp_path.iterdir()
    assert CheckpointFolder(folder / "checkpoints").newest().step == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("closed", [(1,), (2,), (0, 1, 2)])
def test_no_file_gets_the_number_of_a_closed_stream(closed: tuple[int, ...]) -> None:
    """A library that prints would write into it."""
    child = os.fork()
    if child == 0:
        for number in closed:
            os.close(number)
        sys.stdout = sys.stderr = None
        with voices():
            print("nobody", file=sys.stdout)
            os._exit(os.open(os.devnull, os.O_RDONLY))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) > 2


@pytest.mark.parametrize("verb", ["inspect", "check"])
def test_a_terminal_with_another_alphabet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    name = tmp_path / "modèle-模型-\udce8.safetensors"  # the last as Python reads a byte that is not UTF-8
    name.write_bytes(b"")
    heard = io.BytesIO()
    for name_of in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name_of, io.TextIOWrapper(heard, encoding="ascii", errors="strict"))
    assert main([verb, str(name)]) == 2
    assert rb"mod\xe8le-\u6a21\u578b-\udce8" in heard.getvalue()


def test_a_stream_that_cannot_be_set_gets_escapes_too() -> None:
    class Plain(io.StringIO):
        encoding = "ascii"

        def write(self, text: str) -> int:
            text.encode("ascii")
            return super().write(text)

    stream = Plain()
    Voice(stream).write("é")
    assert stream.getvalue() == r"\xe9"


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, 1), (errno.EDQUOT, 1), (errno.EPIPE, 0), (errno.EIO, 0)])
def test_what_cannot_be_printed_ends_nothing_and_a_full_disk_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, number: int, code: int
) -> None:
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(sys, "stdout", Broken())
    assert main(["--version"]) == code
    assert ("what was to be printed is lost" in capsys.readouterr().err) == bool(code)


def test_a_slow_terminal_loses_a_line_and_hears_the_next() -> None:
    class Slow(io.StringIO):
        busy = True

        def write(self, text: str) -> int:
            if self.busy:
                raise BlockingIOError(errno.EAGAIN, "busy")
            return super().write(text)

    stream = Slow()
    voice = Voice(stream)
    voice.write("a")
    stream.busy = False
    voice.write("b")
    assert stream.getvalue() == "b" and voice.loss is None


def test_a_name_that_is_not_utf8_in_the_log(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, TrainConfig(progress=False), 0, 1)
    tracker.say("unreadable: mod\udce8le.png")
    tracker.close()
    assert r"mod\udce8le.png" in (tmp_path / "log.txt").read_text(encoding="utf-8")


# -- signals and workers -----------------------------------------------------------------------------------------------
def test_a_hang_up_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupt() as interrupt:
            os.kill(os.getpid(), signal.SIGHUP)
        assert interrupt.number == 0 and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("free", "wanted", "workers"),
    [(64, 4, 4), (64, 100, 31), (9, 4, 4), (8, 4, 3), (3, 4, 1), (2.9, 4, 0), (0, 4, 0), (0, 0, 0)],
)
def test_workers_follow_the_shared_memory(
    monkeypatch: pytest.MonkeyPatch, free: float, wanted: int, workers: int
) -> None:
    usage = SimpleNamespace(free=int(free * 2**20))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage if path == "/dev/shm" else 1 / 0)
    monkeypatch.setattr(stream, "usable_cpus", lambda: 200)
    count, told = stream.affordable_workers(wanted, 2**20)
    assert count == workers and (told is None) == (count == wanted)
    if told:
        assert f"{free:.0f} MB free" in told


@pytest.mark.parametrize(
    ("cpus", "processes", "wanted", "workers", "said"),
    [
        (1, 1, None, 0, None), (2, 1, None, 1, None), (3, 1, None, 2, None), (5, 1, None, 4, None), (64, 1, None, 4, None),
        (8, 4, None, 1, None), (8, 8, None, 0, None), (64, 4, None, 4, None), (2, 1, 0, 0, None), (2, 1, 1, 1, None),
        (2, 1, 4, 1, "1 data workers instead of 4: of 2 CPU(s) training takes one"),
        (1, 1, 4, 0, "a thread of this process instead of 4 data workers: of 1 CPU(s) training takes one"),
        (64, 1, 20, 20, None),
        (8, 2, 6, 3, "3 data workers instead of 6: 2 processes train on 8 CPUs"),
    ],
)  # fmt: skip
def test_workers_follow_the_cpus(
    monkeypatch: pytest.MonkeyPatch, cpus: int, processes: int, wanted: int | None, workers: int, said: str | None
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**40))
    monkeypatch.setattr(stream, "usable_cpus", lambda: cpus)
    assert stream.affordable_workers(wanted, 2**20, processes) == (workers, said)


def test_of_cpus_and_shared_memory_the_scarcer_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=6 * 2**20))
    monkeypatch.setattr(stream, "usable_cpus", lambda: 4)
    count, told = stream.affordable_workers(8, 2**20)  # memory for two, CPUs for three
    assert count == 2 and told.startswith("2 data workers instead of 8: /dev/shm has 6 MB free")
    count, told = stream.affordable_workers(None, 2**20, processes=2)  # four of six batches in use: for one in each
    assert count == 1 and told is None
    assert stream.affordable_workers(None, 2**21, processes=2) == (0, stream.affordable_workers(None, 2**21, 2)[1])


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000"}, 8),
        ({"cpu.max": "300000 100000"}, 3),
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "10000 100000"}, 1),
        ({"cpu.max": "1600000 100000"}, 8),
        ({"cpu.max": "nonsense"}, 8),
        ({"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
    ],
)
def test_the_cpus_of_a_container(
    files: dict[str, str], cpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(_devices, "_CONTROL_GROUPS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert _devices.usable_cpus() == cpus


def test_a_run_says_that_it_takes_fewer_workers(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert main(words(images, tmp_path, max_steps=2, num_workers=3)) == 0
    assert "a thread of this process instead of 3 data workers" in capfd.readouterr().err
    (folder,) = tmp_path.iterdir()
    assert "num_workers: 3" in (folder / "config.yaml").read_text()


def test_a_run_takes_as_many_workers_as_there_are_cpus_for(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "usable_cpus", lambda: 2)
    for wanted, said in ((None, False), (1, False), (4, True)):
        trainer = trainer_of(images, tmp_path, num_workers=wanted, max_steps=2)
        assert trainer.parts.num_workers == 1 and trainer.config.num_workers == wanted
        assert any("1 data workers instead of 4" in note for note in trainer.parts.notes) == said
    assert trainer.train().step == 2


class Full:
    """As of a full /dev/shm: it cannot be handed over."""

    def __reduce__(self) -> tuple:
        raise OSError(28, "No space left on device")


class Killed:
    def __len__(self) -> int:
        return 8

    def __getitems__(self, positions: list[int]) -> object:
        os.kill(os.getpid(), signal.SIGKILL)


class Unsendable(Killed):
    def __getitems__(self, positions: list[int]) -> object:
        return Full()


@pytest.mark.parametrize("kind", [Killed, Unsendable])
def test_workers_that_die_end_the_run_with_a_sentence(kind: type) -> None:
    with pytest.raises(DiffFitError, match="the data cannot be read on: .*--num-workers 0 needs neither"):
        next(stream.batches(kind(), 0, 2, 4, num_workers=1))


def test_a_sample_of_kills(images: Path, tmp_path: Path) -> None:
    """A terminal that closes: a checkpoint, and the same end as without it."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main(words(images, whole, max_steps=40, ckpt_every=100)) == 0
    run = Process(words(images, broken, max_steps=40, ckpt_every=100), tmp_path / "log")
    while run.running and "(step=0000005)" not in (run.log.read_text() if run.log.exists() else ""):
        pass
    run.signal(signal.SIGHUP)
    code, told = run.wait()
    assert code in (128 + signal.SIGHUP, 0) and ("Stopped by SIGHUP" in told or code == 0)
    assert main(words(images, broken, max_steps=40, ckpt_every=100, resume="auto")) == 0
    ends = [load_file(next(out.iterdir()) / "checkpoints/0000040.safetensors") for out in (whole, broken)]
    # One thread there, several here: the last bits of sums.
    for name, value in ends[0].items():
        np.testing.assert_allclose(value, ends[1][name], atol=1e-4)
