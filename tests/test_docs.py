"""The Python of docs/diffusers.md runs as it stands, on tiny models in place of the published ones."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytest.importorskip("accelerate")

import diffusers
import zoo

ROOT = Path(__file__).resolve().parent.parent


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp = (nn.ModuleDict({name: nn.Linear(8, 8)}) for name in ("wo", "out"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp["out"](self.attn["wo"](x))


class Loader:
    """Two batches for SD3, in the dtype that the model of the snippet computes in."""

    def __init__(self, names: dict[str, Any]) -> None:
        self.names = names

    def __iter__(self) -> Any:
        for _ in range(2):
            given = zoo.inputs("SD3Transformer2DModel")
            x, *text = (
                given[key].to(self.names["model"].dtype)
                for key in ("hidden_states", "encoder_hidden_states", "pooled_projections")
            )
            yield (x, *text, given["timestep"], torch.randn(x.shape))


def test_every_snippet_of_the_page_on_diffusers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def from_hub(name: str) -> Any:
        def load(path: str, *, subfolder: str, torch_dtype: torch.dtype = torch.float32) -> nn.Module:
            assert "/" in path and subfolder == "transformer"
            return zoo.make(name).to(torch_dtype)

        return load

    monkeypatch.chdir(tmp_path)
    stock = diffusers.SD3Transformer2DModel.from_pretrained
    for name in ("SD3Transformer2DModel", "Flux2Transformer2DModel"):
        monkeypatch.setattr(getattr(diffusers, name), "from_pretrained", from_hub(name))
    names: dict[str, Any] = {"other": nn.Sequential(Block(), Block())}
    names["loader"] = Loader(names)
    snippets = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "diffusers.md").read_text(encoding="utf-8"), re.DOTALL
    )
    assert len(snippets) == 7
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of added biases and of dtypes: tested elsewhere
            for snippet in snippets:
                exec(compile(snippet, "docs/diffusers.md", "exec"), names)
    finally:
        torch.set_num_threads(threads)
    assert type(stock("merged")) is diffusers.SD3Transformer2DModel
    assert {"style.safetensors", "state", "adapter", "merged"} <= {p.name for p in tmp_path.iterdir()}
    assert type(names["merged"]) is diffusers.SD3Transformer2DModel
    gammas = {n for n, _ in names["other"].named_trainable_parameters() if n.endswith("gamma")}
    assert gammas == {f"{i}.{end}.gamma" for i in (0, 1) for end in ("attn.wo", "mlp.out")}
