"""DiffFit as a method of PEFT, held to what PEFT promises of every method for custom models."""

from __future__ import annotations

import copy
import importlib
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")
pytest.importorskip("diffusers")

import peft
import zoo
from peft import PeftModel, get_peft_model
from peft.utils import PeftType, get_peft_model_state_dict
from safetensors import safe_open

from difffit_fast import DiffFitConfig, DiffFitError, apply_difffit
from difffit_fast.peft import DiffFitLayer, DiffFitPeftConfig
from difffit_fast.peft.tuner import register


class Custom(nn.Module):
    """A model that is not from any library."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict(dict(norm=nn.LayerNorm(8), mlp=Mlp())) for _ in range(2))
        self.table = nn.Module()
        self.table.scale_shift_table = nn.Parameter(torch.randn(2, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        shift, scale = self.table.scale_shift_table
        for block in self.blocks:
            x = x + block["mlp"](block["norm"](x) * scale + shift)
        return self.head(x)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.fc1(x)))


def custom() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    torch.manual_seed(0)
    model, x = Custom(), torch.randn(4, 8)
    return model, lambda m: m(x)


def of_diffusers(name: str) -> Callable[[], tuple[nn.Module, Callable[[nn.Module], Tensor]]]:
    return lambda: (zoo.make(name), lambda m: zoo.run(m, zoo.inputs(name)))


MODELS = {
    "custom": custom,
    "DiT": of_diffusers("DiTTransformer2DModel"),
    "PixArt": of_diffusers("PixArtTransformer2DModel"),  # a table on the model itself
    "SD3": of_diffusers("SD3Transformer2DModel"),
    "Sana": of_diffusers("SanaTransformer2DModel"),  # γ on a convolution
}
every_model = pytest.mark.parametrize("which", MODELS)


def trained(which: str, config: DiffFitPeftConfig | None = None, steps: int = 2) -> tuple[Any, nn.Module, Callable]:
    """A PEFT model after a few steps, its base, and how to run them."""
    base, run = MODELS[which]()
    model = get_peft_model(copy.deepcopy(base), config or DiffFitPeftConfig())
    train(model, run, steps)
    return model, base, lambda m: run(m).detach()


def train(model: nn.Module, run: Callable, steps: int = 2) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        run(model).square().mean().backward()
        optimizer.step()


def off(a: Tensor, b: Tensor) -> float:
    return float(((a - b).norm() / b.norm()).detach())


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*config.json.*|.*config file.*")
        yield


# -- the registry ----------------------------------------------------------------------------------------------------
def test_it_is_registered_with_pefts_own_registry() -> None:
    register()  # again, without an error
    assert (
        PeftType("DIFFFIT") is PeftType.DIFFFIT
        and "DIFFFIT" in list(PeftType)
        and DiffFitPeftConfig().peft_type == "DIFFFIT"
    )
    assert peft.get_peft_config({"peft_type": "DIFFFIT", "difffit": "block"}).difffit == "block"
    with pytest.raises(KeyError, match="There is already PEFT method called 'difffit'"):
        from peft.utils import register_peft_method

        register_peft_method(name="difffit", config_cls=DiffFitPeftConfig, model_cls=None)


def test_without_peft_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.startswith("difffit_fast.peft")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(DiffFitError, match=r"peft is needed for DiffFit as one of its methods .*difffit_fast\[peft\]"):
        importlib.import_module("difffit_fast.peft")


def test_config() -> None:
    assert DiffFitPeftConfig(difffit=DiffFitConfig()).difffit == "paper"
    odd = DiffFitPeftConfig(difffit=DiffFitConfig(gamma=("mlp",)))
    assert json.loads(json.dumps(odd.difffit))["gamma"] == ["mlp"] and odd.resolved == DiffFitConfig(gamma=("mlp",))
    with pytest.raises(DiffFitError, match="one of paper, minimax, block, bitfit; got 'papre'"):
        DiffFitPeftConfig(difffit="papre")


# -- one adapter -------------------------------------------------------------------------------------------------------
@every_model
def test_a_new_adapter_changes_nothing_and_alone_trains(which: str) -> None:
    base, run = MODELS[which]()
    want, keys = run(base), set(base.state_dict())
    model = get_peft_model(base, DiffFitPeftConfig())
    assert torch.equal(run(model), want)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable and all(".difffit.difffit_values.default." in n for n in trainable)
    assert keys <= {k.removeprefix("base_model.model.") for k in model.state_dict()}, (
        "the base's keys are what they were"
    )
    run(model).square().mean().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == trainable


@pytest.mark.parametrize("which", ["DiT", "PixArt", "SD3", "Sana"])
def test_it_trains_what_apply_difffit_trains(which: str) -> None:
    for preset in ("paper", "block"):
        model, base, run = trained(which, DiffFitPeftConfig(difffit=preset), steps=1)
        applied = apply_difffit(base, preset)
        applied.zero_grad()
        train(applied, MODELS[which]()[1], 1)
        assert model.get_nb_trainable_parameters()[0] == applied.num_trainable
        assert off(run(model), run(applied)) < 1e-6


@every_model
def test_save_and_load(which: str, tmp_path: Path) -> None:
    model, base, run = trained(which)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "DIFFFIT" and config["difffit"] == "paper"
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        saved = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    assert sum(t.numel() for t in saved.values()) == model.get_nb_trainable_parameters()[0]
    assert all(".difffit.difffit_values." in key for key in saved)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
        lean = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, low_cpu_mem_usage=True, is_trainable=True)
    assert torch.equal(run(loaded), run(model)) and torch.equal(run(lean), run(model))
    assert not any(p.requires_grad for p in loaded.parameters())
    assert {n for n, p in lean.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


@every_model
def test_disable_adapter_is_the_base_exactly(which: str) -> None:
    for half in (False, True) if which != "custom" else (False,):
        base, run = MODELS[which]()
        if half:
            base, arguments = base.bfloat16(), bf16(zoo.inputs(type(base).__name__))
            run = lambda m, arguments=arguments: zoo.run(m, arguments)  # noqa: E731
        model = get_peft_model(copy.deepcopy(base), DiffFitPeftConfig())
        train(model, run)
        assert not torch.equal(run(model), run(base))
        before = run(model)
        with model.disable_adapter():
            assert torch.equal(run(model), run(base))
        assert torch.equal(run(model), before)


def bf16(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: bf16(v) for k, v in value.items()}
    return value.bfloat16() if isinstance(value, Tensor) and value.is_floating_point() else value


@every_model
def test_merge_and_unload(which: str) -> None:
    model, base, run = trained(which)
    want = run(model)
    merged = model.merge_and_unload(safe_merge=True)
    assert off(run(merged), want) <= 1e-6 and not torch.equal(run(merged), run(base))
    assert [type(m) for m in merged.modules()] == [type(m) for m in base.modules()]
    assert list(merged.state_dict()) == list(base.state_dict())
    base.load_state_dict(merged.state_dict())
    assert torch.equal(run(base), run(merged)) and not hasattr(merged, "peft_config")


@every_model
def test_unload_gives_the_base_back(which: str) -> None:
    model, base, run = trained(which)
    result = model.unload()
    assert [type(m) for m in result.modules()] == [type(m) for m in base.modules()]
    assert all(torch.equal(v, base.state_dict()[k]) for k, v in result.state_dict().items())
    assert [set(m.__dict__) for m in result.modules()] == [set(m.__dict__) for m in base.modules()]
    assert torch.equal(run(get_peft_model(result, DiffFitPeftConfig())), run(base))


@every_model
def test_merge_and_unmerge_in_place(which: str) -> None:
    model, base, run = trained(which)
    want = run(model)
    model.merge_adapter()
    assert off(run(model), want) <= 1e-6
    model.unmerge_adapter()
    assert torch.equal(run(model), want)
    assert all(torch.equal(v, model.state_dict()[f"base_model.model.{k}"]) for k, v in base.state_dict().items())
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(run(model), run(base))
    model.merge_adapter()
    assert off(run(model.merge_and_unload()), want) <= 1e-6


def test_a_broken_adapter_is_not_merged_safely() -> None:
    model, base, _ = trained("SD3")
    with torch.no_grad():
        model.get_parameter("base_model.model.proj_out.difffit.difffit_values.default.bias").fill_(torch.nan)
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        model.merge_and_unload(safe_merge=True)
    model.unmerge_adapter()
    assert all(torch.equal(v, model.state_dict()[f"base_model.model.{k}"]) for k, v in base.state_dict().items())


# -- several adapters --------------------------------------------------------------------------------------------------
@every_model
def test_several_adapters(which: str, tmp_path: Path) -> None:
    model, base, run = trained(which)
    first = run(model)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    model.add_adapter("other", DiffFitPeftConfig(difffit="block"))
    assert torch.equal(run(model), first) and model.active_adapters == ["default"]
    assert {n: p.requires_grad for n, p in model.named_parameters() if n in flags} == flags
    model.set_adapter("other")
    assert torch.equal(run(model), run(base)), "a new one begins as the base"
    assert all(".other." in n for n, p in model.named_parameters() if p.requires_grad)
    train(model, MODELS[which]()[1])
    second = run(model)
    model.set_adapter("default")
    assert torch.equal(run(model), first) and not torch.equal(second, first)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    loaded.load_adapter(tmp_path / "other", adapter_name="other")
    assert torch.equal(run(loaded), first)
    loaded.set_adapter("other")
    assert torch.equal(run(loaded), second)
    assert off(run(loaded.merge_and_unload(adapter_names=["default"])), first) <= 1e-6
    model.delete_adapter("default")
    assert torch.equal(run(model), second) and list(model.peft_config) == ["other"]
    assert off(run(model.merge_and_unload()), second) <= 1e-6


def test_one_adapter_at_a_time() -> None:
    model, _, run = trained("DiT")
    model.add_adapter("other", DiffFitPeftConfig())
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(DiffFitError, match="one adapter at a time; active are default, other"):
        run(model)
    with pytest.raises(DiffFitError, match="DiffFit merges one adapter"):
        model.merge_and_unload()


# -- options of PEFT ---------------------------------------------------------------------------------------------------
def test_targets_exclusions_and_modules_to_save(tmp_path: Path) -> None:
    def where(**kwargs: Any) -> set[str]:
        base, _ = MODELS["SD3"]()
        model = get_peft_model(base, DiffFitPeftConfig(**kwargs))
        return {
            n.split(".difffit.")[0].removeprefix("base_model.model.")
            for n, p in model.named_parameters()
            if p.requires_grad
        }

    assert where(target_modules=["ff.net.2", "proj_out"]) == {
        *(f"transformer_blocks.{i}.ff.net.2" for i in range(4)), "proj_out"}  # fmt: skip
    assert where(target_modules=r".*\.0\.attn\.to_q") == {"transformer_blocks.0.attn.to_q"}
    assert "proj_out" in where() and "proj_out" not in where(exclude_modules=["proj_out"])
    with pytest.raises(ValueError, match="not found in the base model"):
        where(target_modules=["nothing"])
    config = DiffFitPeftConfig(modules_to_save=["proj_out"])
    model, base, run = trained("SD3", config)
    assert any(
        n.endswith("proj_out.modules_to_save.default.weight") and p.requires_grad for n, p in model.named_parameters()
    )
    model.save_pretrained(tmp_path)
    assert torch.equal(run(PeftModel.from_pretrained(base, tmp_path)), run(model))
    want = run(model)
    assert off(run(model.merge_and_unload()), want) <= 1e-6


def test_branch_ends_and_added_biases() -> None:
    base, _ = custom()
    model = get_peft_model(base, DiffFitPeftConfig(branch_ends=["head"]))
    assert [n for n, _ in model.named_parameters() if n.endswith("gamma")] == [
        "base_model.model.head.difffit.difffit_values.default.gamma"
    ]
    with pytest.raises(DiffFitError, match="have no biases to train; give add_bias=True"):
        get_peft_model(zoo.make("Flux2Transformer2DModel"), DiffFitPeftConfig())
    arguments = zoo.inputs("Flux2Transformer2DModel")
    model = get_peft_model(zoo.make("Flux2Transformer2DModel"), DiffFitPeftConfig(add_bias=True))
    train(model, lambda m: zoo.run(m, arguments))
    want = zoo.run(model, arguments)
    assert off(zoo.run(model.merge_and_unload(), arguments), want) <= 1e-6


def test_applied_and_adapted_exclude_each_other() -> None:
    with pytest.raises(DiffFitError, match="apply_difffit was applied to this SD3Transformer2DModel"):
        get_peft_model(apply_difffit(zoo.make("SD3Transformer2DModel")), DiffFitPeftConfig())
    model = get_peft_model(zoo.make("SD3Transformer2DModel"), DiffFitPeftConfig())
    with pytest.raises(DiffFitError, match="takes the model itself, before it is wrapped; got PeftModel"):
        apply_difffit(model)
    with pytest.raises(
        DiffFitError, match="DiffFit was applied to this SD3Transformer2DModel before|carries a PEFT adapter"
    ):
        apply_difffit(model.get_base_model())


# -- what else PEFT's models do -------------------------------------------------------------------------------------
def test_injected_without_a_wrapper() -> None:
    base, run = MODELS["DiT"]()
    want = run(base)
    model = peft.inject_adapter_in_model(DiffFitPeftConfig(), base)
    assert model is base and torch.equal(run(model), want) and any(isinstance(m, DiffFitLayer) for m in model.modules())
    state = get_peft_model_state_dict(model)
    train(model, run)
    peft.set_peft_model_state_dict(model, {k: v.clone() for k, v in state.items()})


def test_copies_and_checkpointing_and_compile() -> None:
    model, _, run = trained("DiT")
    twin = copy.deepcopy(model)
    assert torch.equal(run(twin), run(model))
    train(twin, MODELS["DiT"]()[1])
    assert not torch.equal(run(twin), run(model))
    tables = [n for n, _ in twin.named_parameters() if "embedding_table.difffit" in n]
    assert len(tables) == 1, "copies of the class table are one parameter"
    model.get_base_model().enable_gradient_checkpointing()
    want = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(model, MODELS["DiT"]()[1])
    assert any(not torch.equal(p, want[n]) for n, p in model.named_parameters())
    assert torch.equal(run(model), run(twin))
    torch._dynamo.reset()
    base, run = custom()
    small = get_peft_model(base, DiffFitPeftConfig())
    assert torch.allclose(run(torch.compile(small, backend="eager")), run(small))


def test_loaded_in_bf16() -> None:
    base, arguments = zoo.make("PixArtTransformer2DModel").bfloat16(), bf16(zoo.inputs("PixArtTransformer2DModel"))
    model = get_peft_model(base, DiffFitPeftConfig())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    out = zoo.run(model, arguments)
    out.float().square().mean().backward()
    assert out.dtype == torch.bfloat16 and model.dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
