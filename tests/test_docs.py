"""The Python of docs/diffusers.md, docs/many.md and docs/eight-bit.md runs as it stands, on tiny models for those published."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from difffit_fast import DiffFitError, FastDiffFitDiT, create_diffusion, load_model

ROOT = Path(__file__).resolve().parent.parent


def snippets(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.DOTALL)


def run(page: str, names: dict[str, Any]) -> int:
    """Run the snippets of a page one after the other in ``names``, on one thread; how many there were."""
    threads, found = torch.get_num_threads(), snippets(page)
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of added biases, of dtypes, of new classes: tested elsewhere
            for snippet in found:
                exec(compile(snippet, f"docs/{page}", "exec"), names)
    finally:
        torch.set_num_threads(threads)
    return len(found)


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
        import zoo

        for _ in range(2):
            given = zoo.inputs("SD3Transformer2DModel")
            x, *text = (
                given[key].to(self.names["model"].dtype)
                for key in ("hidden_states", "encoder_hidden_states", "pooled_projections")
            )
            yield (x, *text, given["timestep"], torch.randn(x.shape))


def test_every_snippet_of_the_page_on_diffusers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("peft", "accelerate"):
        pytest.importorskip(package)
    diffusers = pytest.importorskip("diffusers")
    import zoo

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
    assert run("diffusers.md", names) == 7
    assert type(stock("merged")) is diffusers.SD3Transformer2DModel
    assert {"style.safetensors", "state", "adapter", "merged"} <= {p.name for p in tmp_path.iterdir()}
    assert type(names["merged"]) is diffusers.SD3Transformer2DModel
    gammas = {n for n, _ in names["other"].named_trainable_parameters() if n.endswith("gamma")}
    assert gammas == {f"{i}.{end}.gamma" for i in (0, 1) for end in ("attn.wo", "mlp.out")}


class Letters:
    """Two batches of two domains of "glyphs"."""

    def __iter__(self) -> Any:
        for _ in range(2):
            yield (
                torch.rand(4, 1, 24, 24) * 2 - 1,
                torch.tensor([0, 2, 0, 1]),
                ["capitals", "capitals", "small", "small"],
            )


def test_every_snippet_of_the_page_on_many_domains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "domains").mkdir()
    made = FastDiffFitDiT.from_pretrained("glyphs")
    classes = {"hand": ["lower_a", "lower_e", "upper_A", "upper_C"], "digits": [f"digit{i}" for i in range(10)]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, names in classes.items():
            made.add_delta(name, class_names=names)
            with torch.no_grad():
                made.deltas[name].vectors.add_(0.05 * torch.randn_like(made.deltas[name].vectors))
            made.save_delta(tmp_path / "domains" / f"{name}.safetensors", delta=name)
    monkeypatch.setattr(torch, "compile", lambda model: model)  # no compiler is needed here: compiled in test_deltas.py
    known: dict[str, Any] = {"loader": Letters()}
    assert run("many.md", known) == 7
    model, image, other = known["model"], known["image"].result(), known["other"].result()
    assert model.deltas.names == ["digits", "hand", "capitals", "small"] and not model.training
    assert {"copy.safetensors", "merged.pt", "capitals.safetensors"} <= {path.name for path in tmp_path.iterdir()}
    assert load_model("merged.pt").model.num_classes == 10
    # What was sampled in one batch with another domain is what it is alone.
    noise = torch.randn((1, 1, 24, 24), generator=torch.Generator().manual_seed(3))
    worn = {"y": torch.tensor([1]), "delta": "digits"}
    alone = create_diffusion("10").ddim_sample_loop(model, noise.shape, noise, model_kwargs=worn)[0]
    torch.testing.assert_close(image, alone, rtol=1e-3, atol=1e-3)
    assert other.shape == image.shape and not torch.allclose(other, image, atol=0.1)
    for words, said in ((("hands", "lower_a"), "nearest is 'hand'"), (("hand", "lower_b"), "not in list")):
        with pytest.raises((DiffFitError, ValueError), match=said):
            known["submit"](*words)
    with pytest.raises(ValueError, match="strength must be finite"):
        known["submit"]("hand", "lower_a", strength=float("nan"))
    # A request that is taken back, and one whose domain goes while it waits, leave the server alive.
    with known["lock"]:
        known["submit"]("digits", "digit0").cancel()
        gone = known["submit"]("capitals", "A")
        model.drop_delta("capitals")
    assert "no delta 'capitals'" in str(gone.exception(60))
    torch.testing.assert_close(known["submit"]("digits", "digit1", seed=3).result(60), alone, rtol=1e-3, atol=1e-3)


def test_every_snippet_of_the_page_on_eight_bits(capsys: pytest.CaptureFixture) -> None:
    assert run("eight-bit.md", {}) == 1
    said = snippets("eight-bit.md")[0].splitlines()[-1].split("# ")[1]
    assert capsys.readouterr().out.strip() == said


def test_the_formulas_of_the_page_on_many_domains() -> None:
    model = FastDiffFitDiT.from_pretrained("glyphs")
    model.add_delta("new")
    config, layout = model.config, model.deltas.layout
    d, blocks = config["hidden_size"], config["depth"]
    last = config["patch_size"] ** 2 * 2 * config["in_channels"]
    assert layout.size == 22 * blocks * d + 5 * d + last
