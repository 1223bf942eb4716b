"""Two processes over gloo against one: the same losses; and what happens when one of them dies."""

from __future__ import annotations

import signal
import socket
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training import TINY, Process, digits, flags

from difffit_fast import DiT
from difffit_fast.train.best import read_best
from difffit_fast.train.checkpoint import CheckpointFolder
from difffit_fast.train.track import read_metrics

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = digits(tmp_path_factory.mktemp("digits"))
    torch.manual_seed(3)
    base = DiT(input_size=16, in_channels=3, num_classes=3, **TINY)
    for p in base.parameters():
        if p.requires_grad and p.dim() > 1:
            torch.nn.init.normal_(p, std=0.05)
    torch.save(base.state_dict(), folder.parent / "base.pt")
    return folder


def launch(count: int, words: list[str], logs: Path, **variables: str) -> list[Process]:
    """``count`` processes as torchrun would start them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count), **variables}
    logs.mkdir(exist_ok=True)
    return [
        Process(words, logs / f"{rank}.txt", RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in range(count)
    ]


def finish(processes: list[Process], timeout: float = 150) -> tuple[list[int], list[str]]:
    """Exit codes and outputs."""
    results = [process.wait(timeout) for process in processes]
    return [code for code, _ in results], [output for _, output in results]


def wait_for_lines(folder: Path, count: int, processes: list[Process]) -> None:
    while len(read_metrics(folder)) < count and all(process.running for process in processes):
        time.sleep(0.005)


def words(images: Path, folder: Path, **changes: object) -> list[str]:
    settings = {
        "ckpt": images.parent / "base.pt",
        "data_path": images,
        "results_dir": folder,
        "model_args": {"num_heads": 2},
    }
    return ["train", *flags(**{**settings, "ckpt_every": 25, "max_steps": 50, **changes})]


def losses(folder: Path, key: str = "loss") -> list[float]:
    return [m[key] for m in read_metrics(folder / "000-DiT-custom") if key in m]


def test_two_processes_see_the_losses_of_one(images: Path, tmp_path: Path) -> None:
    """Fifty steps, float32, a global batch that does not divide by two, a validation set that does not either."""
    common = {"global_batch_size": 7, "val_path": images, "val_samples": 21, "val_every": 25, "max_grad_norm": 1.0,
              "best_by": "val"}  # fmt: skip
    for count in (1, 2):
        codes, outputs = finish(launch(count, words(images, tmp_path / str(count), **common), tmp_path / "logs"))
        assert codes == [0] * count, outputs
    one, two = losses(tmp_path / "1"), losses(tmp_path / "2")
    assert len(one) == 50
    assert two == pytest.approx(one, rel=1e-6)
    assert losses(tmp_path / "2", "val_loss") == pytest.approx(losses(tmp_path / "1", "val_loss"), rel=1e-6)
    assert len(losses(tmp_path / "2", "val_loss")) == 3
    best = read_best(tmp_path / "2" / "000-DiT-custom" / "checkpoints" / "best.safetensors")
    assert best.loss == min(losses(tmp_path / "2", "val_loss"))


def test_two_processes_that_replay_graphs_equal_two_that_do_not(images: Path, tmp_path: Path) -> None:
    """Shares of four and three images, in two pieces each: the same checkpoints, byte for byte."""
    common = {"global_batch_size": 7, "accumulate": 2, "max_grad_norm": 0.1, "max_steps": 6, "ckpt_every": 3}
    for name, variables in (("eager", {}), ("recorded", {"RECORDED": "1"})):
        started = launch(2, words(images, tmp_path / name, **common), tmp_path / "logs", **variables)
        codes, outputs = finish(started)
        assert codes == [0, 0] and ("instead of a graph" in outputs[0]) == bool(variables), outputs
    assert losses(tmp_path / "eager") == losses(tmp_path / "recorded") and len(losses(tmp_path / "eager")) == 6
    for step in (3, 6):
        file = f"000-DiT-custom/checkpoints/{step:07d}.state/tensors.safetensors"
        assert (tmp_path / "eager" / file).read_bytes() == (tmp_path / "recorded" / file).read_bytes()


@pytest.mark.parametrize("dead", [1, 0])
def test_a_dead_process_ends_the_job_and_leaves_a_checkpoint(images: Path, tmp_path: Path, dead: int) -> None:
    processes = launch(2, words(images, tmp_path, max_steps=100_000, ckpt_every=5, dist_timeout=30), tmp_path / "logs")
    folder = tmp_path / "000-DiT-custom"
    wait_for_lines(folder, 8, processes)
    processes[dead].signal(signal.SIGKILL)
    codes, outputs = finish(processes, timeout=60)
    survivor = 1 - dead
    assert codes[survivor] == 1, outputs[survivor]
    assert "another process of this job died or did not answer" in outputs[survivor]
    assert "--resume auto" in outputs[survivor] and "Traceback" not in outputs[survivor]
    newest = CheckpointFolder(folder / "checkpoints").newest()
    last = read_metrics(folder)[-1]["step"]
    assert newest is not None
    if dead == 1:  # the first process saves what it has
        assert newest.step >= last and f"step {newest.step} is saved" in outputs[0]


def test_one_process_told_to_stop_stops_both(images: Path, tmp_path: Path) -> None:
    processes = launch(2, words(images, tmp_path, max_steps=100_000, ckpt_every=50_000), tmp_path / "logs")
    folder = tmp_path / "000-DiT-custom"
    wait_for_lines(folder, 3, processes)
    processes[1].signal(signal.SIGTERM)
    codes, outputs = finish(processes, timeout=60)
    assert codes == [128 + signal.SIGTERM] * 2, outputs
    newest = CheckpointFolder(folder / "checkpoints").newest()
    assert newest.step == read_metrics(folder)[-1]["step"]
    assert len(newest.info["generators"]) == 2


def test_an_error_on_one_process_ends_both(images: Path, tmp_path: Path) -> None:
    codes, outputs = finish(launch(2, words(images, tmp_path / "runs", global_batch_size=1), tmp_path / "logs"))
    assert codes == [2, 2]
    assert all("--global-batch-size must be at least the number of processes" in output for output in outputs)
    assert not (tmp_path / "runs").exists()


def test_sharded_full_fine_tuning_matches_one_process(images: Path, tmp_path: Path) -> None:
    """FSDP2 of --method full: the same losses and a whole checkpoint, which a resume takes up."""
    looked = {"val_path": images, "val_every": 2, "best_by": "val"}
    for count in (1, 2):
        common = {"method": "full", "max_steps": 6, "ckpt_every": 3, "fsdp": count == 2, **looked}
        codes, outputs = finish(launch(count, words(images, tmp_path / str(count), **common), tmp_path / "logs"))
        assert codes == [0] * count, outputs
    assert losses(tmp_path / "2") == pytest.approx(losses(tmp_path / "1"), rel=1e-5)
    again = words(images, tmp_path / "again", **common, gradient_checkpointing=True)
    codes, outputs = finish(launch(2, again, tmp_path / "logs"))  # blocks are gathered once more, in the backward pass
    assert codes == [0, 0], outputs
    file = "000-DiT-custom/checkpoints/0000006.state/tensors.safetensors"
    assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "2" / file).read_bytes()
    tensors = [CheckpointFolder(tmp_path / n / "000-DiT-custom" / "checkpoints").newest().tensors() for n in "12"]
    assert tensors[0].keys() == tensors[1].keys()
    for name, value in tensors[0].items():
        torch.testing.assert_close(tensors[1][name], value, rtol=1e-3, atol=1e-5)
    best = [tmp_path / n / "000-DiT-custom" / "checkpoints" / "best.safetensors" for n in "12"]
    assert read_best(best[0]).step == read_best(best[1]).step > 0
    assert read_best(best[1]).loss == pytest.approx(read_best(best[0]).loss, rel=1e-5)
    averages = {name: value for name, value in load_file(best[1]).items() if not name.endswith("pos_embed")}
    assert averages.keys() == {name.removeprefix("ema/") for name in tensors[1] if name.startswith("ema/")}
    for name, value in load_file(best[0]).items():
        torch.testing.assert_close(load_file(best[1])[name], value, rtol=1e-3, atol=1e-5)
