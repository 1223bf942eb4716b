"""The command ``difffit``: what it does, and how it answers what the user must mend."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training import TINY, digits, flags

from difffit_fast import DiT, FastDiffFitDiT
from difffit_fast.cli import VERBS, main
from difffit_fast.models.state_dict import read_weights


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return digits(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="module")
def base(images: Path) -> Path:
    torch.manual_seed(3)
    model = DiT(input_size=16, in_channels=3, num_classes=3, **TINY)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.05)
    torch.save({"model": model.state_dict(), "ema": model.state_dict()}, images.parent / "base.pt")
    return images.parent / "base.pt"


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def test_train_merge_inspect(images: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = flags(ckpt=base, data_path=images, results_dir=tmp_path, max_steps=3, lr=0.1, model_args={"num_heads": 2})
    assert main(["train", *words]) == 0
    delta = tmp_path / "000-DiT-custom" / "checkpoints" / "0000003.safetensors"
    model = FastDiffFitDiT.from_pretrained(base, num_heads=2)
    model.load_delta(delta)
    x, t, y = torch.randn(3, 3, 16, 16), torch.tensor([10, 500, 999]), torch.tensor([0, 1, 3])
    expected = model.eval()(x, t, y)
    for name in ("merged.pt", "merged.safetensors"):
        out = tmp_path / name
        assert main(["export", "--to", "dit", "--ckpt", str(base), "--delta", str(delta), "--out", str(out)]) == 0
        plain = DiT(input_size=16, in_channels=3, num_classes=3, **TINY).eval()
        plain.load_state_dict(read_weights(out).state)
        torch.testing.assert_close(plain(x, t, y), expected, rtol=1e-4, atol=1e-5)
    capsys.readouterr()
    assert main(["inspect", "--json", str(delta)]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["trainable parameters"] == model.num_trainable and facts["classes"] == 3 and facts["step"] == 3
    assert facts["class names"] == ["digit0", "digit1", "digit2"] and len(facts["base hash"]) == 64
    for path, kind in ((base, "DiT checkpoint"), (tmp_path / "merged.safetensors", "DiT checkpoint"),
                       (tmp_path / "000-DiT-custom", "run")):  # fmt: skip
        assert main(["inspect", str(path)]) == 0
        assert capsys.readouterr().out.split("\n")[0].split(maxsplit=1)[1] == kind
    assert load_file(tmp_path / "merged.safetensors").keys() == plain.state_dict().keys()


def test_help_names_every_verb_and_imports_nothing_heavy(capsys: pytest.CaptureFixture) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(verb in text for verb in VERBS)
    for verb in ("train", "export", "inspect", "bench"):
        assert main([verb, "--help"]) == 0
        assert "--debug" in capsys.readouterr().out
    assert main([]) == 2
    assert main(["--version"]) == 0


def test_as_a_module() -> None:
    root = str(Path(__file__).resolve().parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "difffit_fast", "inspect", "/nowhere"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "difffit inspect: there is no /nowhere\n")


def test_config_file_and_flags(images: Path, tmp_path: Path) -> None:
    import yaml

    (tmp_path / "run.yaml").write_text("max_steps: 9\nlr: 2e-3\nckpt_every: 1\n")
    words = flags(data_path=images, results_dir=tmp_path / "runs", config=tmp_path / "run.yaml", max_steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main(["train", *words]) == 0
    saved = yaml.safe_load((tmp_path / "runs" / "000-DiT-custom" / "config.yaml").read_text())
    assert (saved["max_steps"], saved["lr"], saved["ckpt_every"], saved["keep_checkpoints"]) == (1, 2e-3, 1, 5)


# ------------------------------------------------------------------------------------------------------- bad inputs


def _empty_class(folder: Path) -> Path:
    (digits(folder, 1, 1) / "empty").mkdir()
    return folder


def _write(path: Path, data: bytes | str) -> Path:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def _delta_of_another_base(folder: Path) -> Path:
    torch.manual_seed(9)
    FastDiffFitDiT(input_size=16, in_channels=3, num_classes=3, **TINY).save_delta(folder / "other.safetensors")
    return folder / "other.safetensors"


Case = Callable[[Path, Path, Path], list]

# What is wrong -> (the command, given images, base and an empty folder; what the sentence says).
BAD: dict[str, tuple[Case, str]] = {
    "no data": (lambda i, b, f: ["train"], "expected either --data-path"),
    "both kinds of data": (lambda i, b, f: ["train", "--data-path", i, "--feature-path", f], "got both"),
    "missing folder": (lambda i, b, f: ["train", *flags(data_path=f / "none")], "is not a folder"),
    "a file for a folder": (lambda i, b, f: ["train", *flags(data_path=b)], "is not a folder"),
    "no classes": (lambda i, b, f: ["train", *flags(data_path=f)], "has no sub-folders"),
    "empty class": (lambda i, b, f: ["train", *flags(data_path=_empty_class(f / "x"))], "holds no image"),
    "features not extracted": (lambda i, b, f: ["train", "--feature-path", f], "holds no cached features"),
    "unknown flag": (lambda i, b, f: ["train", "--batch-size", "3"], "nearest known one is --global-batch-size"),
    "a word for a number": (lambda i, b, f: ["train", "--lr", "high"], "invalid float value: 'high'"),
    "unknown setting": (
        lambda i, b, f: ["train", "--config", _write(f / "c.yaml", "max_step: 1")],
        "unknown setting 'max_step' in .*nearest known one is 'max_steps'",
    ),
    "broken YAML": (lambda i, b, f: ["train", "--config", _write(f / "c.yaml", "lr: [1")], "not valid YAML"),
    "no such config": (lambda i, b, f: ["train", "--config", f / "c.yaml"], "cannot read the configuration"),
    "unknown model": (lambda i, b, f: ["train", *flags(data_path=i, model="DiT-XXL/2")], "nearest is DiT-XL/2"),
    "unknown method": (lambda i, b, f: ["train", *flags(data_path=i, method="magic")], "magic"),
    "unknown preset": (lambda i, b, f: ["train", *flags(data_path=i, difffit="papers")], "paper, minimax, block, bitfit"),
    "negative rate": (lambda i, b, f: ["train", *flags(data_path=i, lr=-1)], "--lr must be positive; got -1"),
    "too few classes": (
        lambda i, b, f: ["train", *flags(data_path=i, num_classes=2)], "the data has 3 classes, more than the 2"
    ),
    "size and patch": (lambda i, b, f: ["train", *flags(data_path=i, image_size=18)], "divisible by patch_size"),
    "no such checkpoint": (lambda i, b, f: ["train", *flags(data_path=i, ckpt=f / "no.pt")], "checkpoint not found"),
    "not a checkpoint": (
        lambda i, b, f: ["train", *flags(data_path=i, ckpt=_write(f / "x.pt", b"nonsense"))], "cannot read checkpoint"
    ),
    "another model's checkpoint": (
        lambda i, b, f: ["train", *flags(data_path=i, ckpt=b, model="DiT-S/2", model_args={"num_heads": 6})],
        "--model DiT-S/2 has .*; .* records 2",
    ),
    "no such VAE": (lambda i, b, f: ["train", *flags(data_path=i, vae=f / "vae")], "no VAE"),
    "nothing to resume": (lambda i, b, f: ["train", *flags(data_path=i, resume=f / "run")], "--resume must be none, auto"),
    "no such device": (lambda i, b, f: ["train", *flags(data_path=i, device="tpu0")], "--device"),
    "batch and accumulation": (
        lambda i, b, f: ["train", *flags(data_path=i, accumulate=9)], "--accumulate must be at most --global-batch-size"
    ),
    "results folder is a file": (
        lambda i, b, f: ["train", *flags(data_path=i, results_dir=_write(f / "r", ""))], "cannot make a run folder"
    ),
    "validation of other classes": (
        lambda i, b, f: ["train", *flags(data_path=i, val_path=digits(f / "v", 4, 1))],
        "no training image is of the class 'digit3' of the validation data, and there is no --ckpt that could have a row",
    ),
    "delta missing": (
        lambda i, b, f: ["export", "--to", "dit", "--ckpt", b, "--delta", f / "d", "--out", f / "o.pt"], "delta not found"
    ),
    "delta of another base": (
        lambda i, b, f: ["export", "--to", "dit", "--ckpt", b, "--delta", _delta_of_another_base(f), "--out", f / "o.pt"],
        "was made on another base: its weights have the hash .*, the model.s",
    ),
    "checkpoint given as delta": (
        lambda i, b, f: ["export", "--to", "dit", "--ckpt", b, "--delta", b, "--out", f / "o.pt"], "delta"
    ),
    "merge to an odd ending": (
        lambda i, b, f: ["export", "--to", "dit", "--ckpt", b, "--delta", b, "--out", f / "o.bin"],
        "must end in .pt or .safetensors",
    ),
    "merge over a file": (
        lambda i, b, f: ["export", "--to", "dit", "--ckpt", b, "--delta", b, "--out", _write(f / "o.pt", "")], "--overwrite"
    ),
    "inspect a picture": (lambda i, b, f: ["inspect", i / "digit0" / "000.png"], "cannot read checkpoint"),
    "unknown verb": (lambda i, b, f: ["tain"], "nearest known one is 'train'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_answered_by_one_sentence(
    case: str, images: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    command, message = BAD[case]
    monkeypatch.chdir(tmp_path)
    words = [str(word) for word in command(images, base, tmp_path)]
    before = {path: path.read_bytes() if path.is_file() else None for path in tmp_path.rglob("*")}
    capsys.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        code = main(words)
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if "random, made from the seed" not in line]
    assert code == 2, captured.err
    assert len(lines) == 1 and lines[0].startswith("difffit"), lines
    assert re.search(message, lines[0]), lines[0]
    assert "Traceback" not in captured.err + captured.out
    assert {path: path.read_bytes() if path.is_file() else None for path in tmp_path.rglob("*")} == before


def test_debug_shows_where_an_error_came_from(capsys: pytest.CaptureFixture) -> None:
    assert main(["inspect", "--debug", "/nowhere"]) == 2
    assert "Traceback" in capsys.readouterr().err
