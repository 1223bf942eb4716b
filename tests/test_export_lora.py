"""A delta of apply_difffit in the format of LoRA, read back by the loaders' formulas, and as an adapter of PEFT."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers")

import zoo
from safetensors.torch import load_file

from difffit_fast import DiffFitConfig, DiffFitError, apply_difffit
from difffit_fast.cli import main
from difffit_fast.errors import DeltaMismatchError
from difffit_fast.interop import export_lora, export_peft

pytestmark = pytest.mark.filterwarnings("ignore:ComfyUI passes over")
NAMES = sorted(zoo.ZOO)
NO_BIAS = ("Flux2Transformer2DModel", "AuraFlowTransformer2DModel")  # a bias would be added, which has no place


def config_for(name: str, preset: str = "paper") -> DiffFitConfig:
    config = DiffFitConfig.resolve(preset)
    return dataclasses.replace(config, bias=False, time_embedder_bias=False) if name in NO_BIAS else config


def trained(name: str, path: Path, config: Any, **options: Any) -> tuple[nn.Module, nn.Module]:
    """The base and the merged model; the delta is written to ``path``."""
    base = zoo.make(name)
    model = apply_difffit(copy.deepcopy(base), config, **options)
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.trainable_parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=g))
    model.save_delta(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return base, model.merge_()


def decomposed(weight: Tensor, low_rank: Tensor, dora_scale: Tensor) -> Tensor:
    """DoRA as both loaders compute it where the scale has one element a row: each row gets that length."""
    assert dora_scale.shape == (weight.shape[0], *[1] * (weight.dim() - 1))
    length = weight.flatten(1).norm(dim=1).view_as(dora_scale) + torch.finfo(weight.dtype).eps
    return (weight + low_rank) * (dora_scale / length)


def low_rank(file: dict[str, Tensor], name: str, weight: Tensor) -> Tensor:
    up, down = file.pop(f"{name}.lora_up.weight"), file.pop(f"{name}.lora_down.weight")
    alpha = float(file.pop(f"{name}.alpha"))
    return alpha / down.shape[0] * (up.flatten(1) @ down.flatten(1)).view_as(weight)


def as_comfyui(base: nn.Module, file: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our reading of what ComfyUI does with each name of a weight, and of a parameter that is no weight."""
    state, file = {k: v.clone() for k, v in base.state_dict().items()}, dict(file)
    out = dict(state)
    for key in state:
        name = f"transformer.{key.removesuffix('.weight')}"
        if f"{name}.lora_up.weight" in file:
            scale = file.pop(f"{name}.dora_scale")
            out[key] = decomposed(state[key], low_rank(file, name, state[key]), scale)
        for suffix in ("w_norm", "diff"):
            if f"{name}.{suffix}" in file:
                out[key] = state[key] + file.pop(f"{name}.{suffix}").reshape(state[key].shape)
                if suffix == "w_norm" and f"{name}.b_norm" in file:
                    bias = f"{key.removesuffix('.weight')}.bias"
                    out[bias] = state[bias] + file.pop(f"{name}.b_norm")
        if key.endswith(".weight") and f"{name}.diff_b" in file:
            bias = f"{key.removesuffix('.weight')}.bias"
            out[bias] = state[bias] + file.pop(f"{name}.diff_b")
    assert not file, f"not read: {sorted(file)[:3]}"
    return out


def as_lycoris(base: nn.Module, file: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our reading of LyCORIS: a module is low-rank, a difference or a norm, and each takes its own keys only."""
    out, file = {k: v.clone() for k, v in base.state_dict().items()}, dict(file)
    for path, module in base.named_modules():
        name = f"lycoris_{path}".replace(".", "_")
        weight, bias = f"{path}.weight", f"{path}.bias"
        if f"{name}.lora_up.weight" in file:
            scale = file.pop(f"{name}.dora_scale")
            out[weight] = decomposed(out[weight], low_rank(file, name, out[weight]), scale)
            continue
        for kinds, w, b in (((nn.Linear, nn.Conv2d), "diff", "diff_b"), ((nn.LayerNorm,), "w_norm", "b_norm")):
            if f"{name}.{w}" in file:
                assert isinstance(module, kinds)
                out[weight] += torch.zeros_like(out[weight]).copy_(file.pop(f"{name}.{w}"))
                if f"{name}.{b}" in file:
                    out[bias] += file.pop(f"{name}.{b}")
    assert not file, f"not read: {sorted(file)[:3]}"
    return out


def equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert set(got) == set(want)
    for key in want:
        scale = want[key].abs().max().clamp(min=1e-3)
        assert float((got[key] - want[key]).abs().max() / scale) < 1e-6, key


@pytest.mark.parametrize("preset", ["paper", "minimax", "bitfit"])
@pytest.mark.parametrize("name", NAMES)
def test_comfyui_reads_the_merged_model(tmp_path: Path, name: str, preset: str) -> None:
    if name in NO_BIAS and preset == "bitfit":
        pytest.skip("nothing but biases would train")
    base, merged = trained(name, tmp_path / "delta.safetensors", config_for(name, preset))
    before = copy.deepcopy(base.state_dict())
    written = export_lora(base, tmp_path / "delta.safetensors", tmp_path / "lora.safetensors")
    file = load_file(tmp_path / "lora.safetensors")
    assert set(file) == set(written) and all(t.dtype == torch.float32 for t in file.values())
    got = as_comfyui(base, file)
    equal(got, merged.state_dict())
    assert all(torch.equal(t, before[key]) for key, t in base.state_dict().items())
    if preset == "paper" and any(key.endswith("dora_scale") for key in file):
        base.load_state_dict(got)
        arguments = zoo.inputs(name)
        with torch.no_grad():
            torch.testing.assert_close(zoo.run(base, arguments), zoo.run(merged, arguments), rtol=1e-4, atol=1e-5)


# Every class whose trainables are biases, γ and LayerNorms under this configuration.
@pytest.mark.parametrize("name", NAMES)
def test_lycoris_reads_the_merged_model_or_it_is_refused(tmp_path: Path, name: str) -> None:
    config = DiffFitConfig(
        gamma=("proj", "mlp"),
        affine_norm=False,
        class_embedding=False,
        bias=name not in NO_BIAS,
        time_embedder_bias=False,
    )
    base, merged = trained(name, tmp_path / "delta.safetensors", config)
    try:
        export_lora(base, tmp_path / "delta.safetensors", tmp_path / "lora.safetensors", layout="lycoris")
    except DiffFitError as error:
        assert "has no place in its layout" in str(error)
        assert name != "DiTTransformer2DModel" and not (tmp_path / "lora.safetensors").exists()
    else:
        equal(as_lycoris(base, load_file(tmp_path / "lora.safetensors")), merged.state_dict())


def test_gamma_alone_is_a_length_of_rows(tmp_path: Path) -> None:
    name = "SD3Transformer2DModel"
    config = DiffFitConfig(
        gamma=("mlp",), affine_norm=False, class_embedding=False, bias=False, time_embedder_bias=False
    )
    base, merged = trained(name, tmp_path / "d.safetensors", config)
    written = export_lora(base, tmp_path / "d.safetensors", tmp_path / "x.safetensors")
    key = "transformer.transformer_blocks.0.ff.net.2"
    want = merged.get_submodule(key.removeprefix("transformer.")).weight.norm(dim=1, keepdim=True)
    torch.testing.assert_close(written[f"{key}.dora_scale"].abs(), want, rtol=1e-5, atol=1e-5)
    assert f"{key}.diff_b" in written and not written[f"{key}.lora_up.weight"].any()  # γ scales the bias, too


@pytest.mark.parametrize("name, some", [("SD3Transformer2DModel", "attn.to_q.diff_b"), ("WanTransformer3DModel", "")])
def test_what_comfyui_passes_over_is_said(tmp_path: Path, name: str, some: str) -> None:
    base, _ = trained(name, tmp_path / "d.safetensors", "block")
    with pytest.warns(UserWarning, match=f"ComfyUI passes over .*{some}"):
        export_lora(base, tmp_path / "d.safetensors", tmp_path / "x.safetensors")


def test_an_added_bias_is_refused(tmp_path: Path) -> None:
    base, _ = trained("Flux2Transformer2DModel", tmp_path / "d.safetensors", "paper", add_bias=True)
    with pytest.raises(DiffFitError, match="no place for a bias where the model has none"):
        export_lora(base, tmp_path / "d.safetensors", tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists() and not hasattr(base, "unload")


def test_another_base_is_refused_and_left_alone(tmp_path: Path) -> None:
    trained("SD3Transformer2DModel", tmp_path / "d.safetensors", "paper")
    other = zoo.make("SD3Transformer2DModel", seed=9)
    for export in (export_lora, export_peft):
        with pytest.raises(DeltaMismatchError, match="base"):
            export(other, tmp_path / "d.safetensors", tmp_path / "x.safetensors")
    assert not hasattr(other, "unload") and not (tmp_path / "x.safetensors").exists()


def test_diffusers_takes_neither_scale_nor_bias(tmp_path: Path) -> None:
    """Its loader of LoRA leaves the scale out with a warning, then refuses what is no low-rank part: so the docs say."""
    pytest.importorskip("peft")
    base, _ = trained("SD3Transformer2DModel", tmp_path / "d.safetensors", "paper")
    export_lora(base, tmp_path / "d.safetensors", tmp_path / "x.safetensors")
    from diffusers import StableDiffusion3Pipeline

    with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):
        pipe = StableDiffusion3Pipeline.__new__(StableDiffusion3Pipeline)
        pipe.load_lora_weights(str(tmp_path), weight_name="x.safetensors")


@pytest.mark.parametrize("name", NAMES)
def test_peft_reads_the_adapter(tmp_path: Path, name: str) -> None:
    pytest.importorskip("peft")
    from peft import PeftModel

    import difffit_fast.peft  # noqa: F401

    base, merged = trained(name, tmp_path / "d.safetensors", "paper", **zoo.ZOO[name][2])
    before, asked = copy.deepcopy(base.state_dict()), [p.requires_grad for p in base.parameters()]
    export_peft(base, tmp_path / "d.safetensors", tmp_path / "adapter")
    assert all(torch.equal(t, before[key]) for key, t in base.state_dict().items())
    assert set(base.state_dict()) == set(before) and asked == [p.requires_grad for p in base.parameters()]
    model, arguments = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval(), zoo.inputs(name)
    with torch.no_grad():
        torch.testing.assert_close(zoo.run(model, arguments), zoo.run(merged, arguments), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("to", ["lora", "peft"])
def test_command(tmp_path: Path, to: str, capsys: pytest.CaptureFixture[str]) -> None:
    base, _ = trained("SD3Transformer2DModel", tmp_path / "d.safetensors", "paper")
    base.save_pretrained(tmp_path / "pipe" / "transformer")
    out = tmp_path / ("x.safetensors" if to == "lora" else "x")
    given = ["export", "--to", to, "--delta", str(tmp_path / "d.safetensors"), "--out", str(out)]
    assert main([*given, "--ckpt", str(tmp_path / "pipe")]) == 0
    assert out.exists() and str(out) in capsys.readouterr().out
    assert main(given) != 0 and "--ckpt" in capsys.readouterr().err
