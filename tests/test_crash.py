"""Every change to the file system of train, extract, sample, export, eval, mix and prepare is a place to die at; the same
command again finishes, and leaves byte for byte what it leaves undisturbed."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from pathlib import Path

import crash
import pytest
import torch
from dataset_twins import food101
from training import Process, digits, flags

from difffit_fast._files import TEMPORARY

COMMANDS = ("train", "extract", "export", "sample", "eval", "mix", "prepare")
ENDLESS = 10**9


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, a data set's archive, a base and a delta."""
    from difffit_fast import DiT, FastDiffFitDiT
    from difffit_fast.models.header import write_model_file

    root = tmp_path_factory.mktemp("given")
    digits(root / "images", classes=2, each=5)
    (root / "archives").mkdir()
    food101(root / "archives")
    torch.manual_seed(0)
    base = DiT(input_size=8, patch_size=4, in_channels=3, hidden_size=16, depth=1, num_heads=2, num_classes=2)
    write_model_file(
        root / "base.safetensors", "model", base.state_dict(), {"config": base.config, "objective": "flow"}
    )
    FastDiffFitDiT.from_dit(base).save_delta(root / "delta.safetensors", objective="flow", vae="none", image_size=8)
    return root


def words(command: str, given: Path, out: Path) -> list[str]:
    images, base, delta = given / "images", given / "base.safetensors", given / "delta.safetensors"
    lines = {
        "train": ["train", *flags(
            data_path=images, results_dir=out / "runs", max_steps=4, ckpt_every=2, keep_checkpoints=1, resume="auto",
            val_path=images, val_every=1, best_by="val",
        )],
        "extract": ["extract", "--data-path", images, "--features-path", out / "features", "--vae", "none", "--image-size", 16,
                    "--shard-size", 4, "--num-workers", 0, "--device", "cpu"],
        "export": ["export", "--to", "dit", "--ckpt", base, "--delta", delta, "--out", out / "merged.safetensors", "--overwrite"],
        "sample": ["sample", "--ckpt", base, "--delta", delta, "--num-fid-samples", 5, "--sample-dir", out / "samples",
                   "--num-sampling-steps", 2, "--cfg-scale", 1, "--per-proc-batch-size", 2, "--device", "cpu"],
        "eval": ["eval", images / "digit0", images / "digit1", "--features", "training:tiny_features", "--metrics", "fd",
                 "--device", "cpu", "--json", out / "scores.json"],
        "mix": ["mix", "--out", out / "mixed.safetensors", "--overwrite", f"{delta}=0.25", f"{delta}=0.75"],
        "prepare": ["prepare", "food101", "--root", given / "archives", "--out", out / "food101", "--allow-incomplete"],
    }  # fmt: skip
    return list(map(str, lines[command]))


def run(command: str, given: Path, out: Path, at: int = ENDLESS) -> tuple[int, str, int]:
    """Exit code, what was printed, and the number of changes."""
    report = out.with_suffix(".count")
    process = Process(
        words(command, given, out), out.with_suffix(".log"),
        CRASH_BELOW=str(out), CRASH_AT=str(at), CRASH_REPORT=str(report),
    )  # fmt: skip
    code, told = process.wait()
    return code, told, int(report.read_text()) if report.exists() else 0


def tree(out: Path) -> dict[str, str]:
    """What every file holds, by its hash; of logs what does not tell the time."""
    found = {}
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        if path.is_dir() or name.endswith(("log.txt", ".lock", "config.yaml", "extract.json")):
            continue
        content = path.read_bytes()
        if name.endswith("metrics.jsonl"):
            lines = [json.loads(line) for line in content.splitlines()]
            content = json.dumps([{k: v for k, v in line.items() if "second" not in k} for line in lines]).encode()
        if name.endswith("state.json"):
            said = json.loads(content)
            content = json.dumps([said["step"], said["position"], said["updates"], said["sha256"]["tensors"]]).encode()
        found[name] = hashlib.sha256(content).hexdigest()
    return found


def undisturbed(command: str, given: Path, tmp_path: Path) -> tuple[dict[str, str], int]:
    out = tmp_path / "whole"
    out.mkdir()
    code, told, changes = run(command, given, out)
    assert code == 0, told
    assert changes > 1
    return tree(out), changes


def check_point(command: str, given: Path, tmp_path: Path, at: int, want: dict[str, str]) -> None:
    out = tmp_path / "cut"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    code, told, _ = run(command, given, out, at)
    assert code == crash.CODE, f"change {at}: exit code {code}, {told[-500:]}"
    code, told, _ = run(command, given, out)
    assert code == 0, f"after change {at}: {told[-500:]}"
    found = tree(out)
    assert not [name for name in found if TEMPORARY in name], f"after change {at}: left behind {sorted(found)}"
    if command == "train" and found.keys() != want.keys():  # died before the run had a folder, or took another one
        found = {name: value for name, value in found.items() if name in want}
    assert found == want, f"after change {at}: {sorted(k for k in want if found.get(k) != want[k])}"


@pytest.mark.parametrize("command", COMMANDS)
def test_some_crash_points(command: str, given: Path, tmp_path: Path) -> None:
    want, changes = undisturbed(command, given, tmp_path)
    for at in sorted(random.Random(command).sample(range(1, changes + 1), min(2, changes))):
        check_point(command, given, tmp_path, at, want)


@pytest.mark.reliability
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("command", COMMANDS)
def test_every_crash_point(command: str, given: Path, tmp_path: Path) -> None:
    want, changes = undisturbed(command, given, tmp_path)
    for at in range(1, changes + 1):
        check_point(command, given, tmp_path, at, want)
