"""The scripts in examples/ run as they stand, in small."""

from __future__ import annotations

import runpy
import sys
import warnings
from pathlib import Path

import pytest
import torch

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
