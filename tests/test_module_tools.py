"""What PyTorch's tools, and those around it, do to a module: FastDiffFitDiT afterwards is what a plain model is, or says why not.

Each thing is done to a FastDiffFitDiT and to the same model of ordinary modules. Afterwards their outputs and gradients are
compared, and that forward, ``state_dict`` and ``merge`` still speak of one model.
"""

from __future__ import annotations

import copy
import io
import os
import pickle
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from test_fast_dit import shake
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.utils.flop_counter import FlopCounterMode

from difffit_fast import DiffFitError, DiT, FastDiffFitDiT
from difffit_fast.models.dit import DiTBlock
from difffit_fast.models.plain_difffit import PlainDiffFitDiT
from difffit_fast.models.vectors import modulation_linears, proj_weights
from difffit_fast.ops.weights import together

SIZES = dict(input_size=8, patch_size=2, hidden_size=48, depth=2, num_heads=3, num_classes=5)
CHANGED = "the modules are called one by one"
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64

# What is called one by one says so; each test that means it to be so asks for it.
pytestmark = pytest.mark.filterwarnings("error:.*called one by one", "ignore:.*weight_norm.*:FutureWarning")


def models(**more: Any) -> tuple[PlainDiffFitDiT, FastDiffFitDiT]:
    plain = shake(PlainDiffFitDiT(**SIZES)).eval()
    fast = FastDiffFitDiT(**SIZES, **more).eval()
    fast.load_state_dict(plain.state_dict())
    return plain, fast


def inputs(dtype: torch.dtype = F32) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(3, 4, 8, 8, generator=g).to(dtype)
    return x, torch.randint(0, 1000, (3,), generator=g), torch.randint(0, 6, (3,), generator=g)


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(*inputs())


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Of what trains, by name without wrappers; a key bias, whose gradient is rounding noise, is left out."""
    model.zero_grad()
    model(*inputs()).square().mean().backward()
    found = {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.grad is not None}
    for name, grad in found.items():
        if name.endswith("qkv.bias") or name.endswith("qkv.base_layer.bias"):
            grad[48:96] = 0
    return found


def same(fast: nn.Module, plain: nn.Module, tolerance: float = 1e-5, grads: bool = True) -> None:
    """Outputs and gradients are those of the plain model."""
    want, got = output(plain), output(fast)
    assert (got - want).norm() <= tolerance * want.norm(), f"{(got - want).norm() / want.norm():.1e}"
    if grads:
        wanted, found = gradients(plain), gradients(fast)
        assert wanted.keys() == found.keys()
        for name, grad in wanted.items():
            assert (found[name] - grad).norm() <= 10 * tolerance * grad.norm().clamp_min(1e-6), name


def one_model(fast: FastDiffFitDiT, plain: PlainDiffFitDiT) -> None:
    """And so is what is saved and merged."""
    same(fast, plain)
    torch.testing.assert_close(output(fast.merge()), output(plain), rtol=1e-4, atol=1e-4)
    theirs = plain.state_dict()
    assert all(torch.equal(p, theirs[name]) for name, p in fast.state_dict().items())


def lies_together(fast: FastDiffFitDiT) -> bool:
    weights = [linear.weight for linear in modulation_linears(fast)]
    return together(weights) is not None and together(proj_weights(fast)) is not None


# -- saved and loaded --------------------------------------------------------------------------------------------------
def through_safetensors(fast: nn.Module, folder: Path) -> nn.Module:
    save_model(fast, str(folder / "m.safetensors"))
    assert os.path.getsize(folder / "m.safetensors") < 4 * sum(p.numel() for p in fast.parameters()) + 20_000
    twin = FastDiffFitDiT(**SIZES).eval()
    assert load_model(twin, str(folder / "m.safetensors")) == (set(), [])
    return twin


def through_save_file(fast: nn.Module, folder: Path) -> nn.Module:
    save_file(fast.state_dict(), folder / "m.safetensors")
    twin = FastDiffFitDiT(**SIZES).eval()
    twin.load_state_dict(load_file(folder / "m.safetensors"))
    return twin


def through_torch_save(fast: nn.Module, folder: Path) -> nn.Module:
    torch.save(fast.state_dict(), folder / "m.pt")
    twin = FastDiffFitDiT(**SIZES).eval()
    twin.load_state_dict(torch.load(folder / "m.pt"))
    return twin


def through_a_whole_module(fast: nn.Module, folder: Path) -> nn.Module:
    torch.save(fast, folder / "m.pt")
    return torch.load(folder / "m.pt", weights_only=False)


def through_mapped_memory(fast: nn.Module, folder: Path) -> nn.Module:
    torch.save(fast.state_dict(), folder / "m.pt")
    with torch.device("meta"):
        twin = FastDiffFitDiT(**SIZES).eval()
    twin.load_state_dict(torch.load(folder / "m.pt", mmap=True), assign=True)
    return twin


def through_accelerate(fast: nn.Module, folder: Path) -> nn.Module:
    accelerator = pytest.importorskip("accelerate").Accelerator(cpu=True)
    model = accelerator.prepare(fast)
    accelerator.save_state(str(folder))
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    accelerator.load_state(str(folder))
    return accelerator.unwrap_model(model)


def through_accelerate_shards(fast: nn.Module, folder: Path) -> nn.Module:
    accelerate = pytest.importorskip("accelerate")
    accelerate.Accelerator(cpu=True).save_model(fast, str(folder), max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    twin = FastDiffFitDiT(**SIZES).eval()
    accelerate.load_checkpoint_in_model(twin, str(folder))
    return twin


SAVED = [
    through_safetensors, through_save_file, through_torch_save, through_a_whole_module, through_mapped_memory,
    through_accelerate, through_accelerate_shards, lambda fast, _: copy.deepcopy(fast),
    lambda fast, _: pickle.loads(pickle.dumps(fast)),
]  # fmt: skip


@pytest.mark.parametrize("way", SAVED, ids=lambda way: way.__name__)
def test_saved_and_loaded(way: Callable[[nn.Module, Path], nn.Module], tmp_path: Path) -> None:
    plain, fast = models()
    twin = way(fast, tmp_path)
    one_model(twin, plain)
    assert lies_together(twin)


def test_a_part_is_saved_without_its_neighbours() -> None:
    """A parameter's file holds its values, not the memory it lies in."""
    _, fast = models()
    for part in (fast.blocks[1].adaLN_modulation[1], fast.blocks[0].attn.proj):
        buffer = io.BytesIO()
        torch.save(part.state_dict(), buffer)
        assert buffer.tell() < sum(p.nbytes for p in part.parameters()) + 4_000


def test_a_state_dict_is_the_parameters_memory() -> None:
    plain, fast = models()
    for model in (plain, fast):
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.mul_(1.1)
    one_model(fast, plain)


def test_a_plain_dit_is_a_whole_model_whose_extras_are_at_the_identity(tmp_path: Path) -> None:
    """However its state dict arrives: γ and LayerNorm of what was trained before are gone."""
    dit = shake(DiT(**SIZES)).eval()
    save_model(dit, str(tmp_path / "dit.safetensors"))

    def ddp(fast: nn.Module) -> None:
        nn.ModuleDict({"module": fast}).load_state_dict({f"module.{k}": v for k, v in dit.state_dict().items()})

    for load in (
        lambda fast: fast.load_state_dict(dit.state_dict()),
        lambda fast: fast.load_state_dict(dit.state_dict(), strict=False),
        lambda fast: load_model(fast, str(tmp_path / "dit.safetensors")),
        ddp,
    ):
        _, fast = models()
        load(fast)
        torch.testing.assert_close(output(fast), output(dit), rtol=1e-4, atol=1e-5)


def test_a_part_of_a_state_dict_leaves_the_rest() -> None:
    plain, fast = models()
    part = {name: p.clone() for name, p in shake(copy.deepcopy(plain)).state_dict().items() if "gamma1" in name}
    for model in (plain, fast):
        assert len(model.load_state_dict(part, strict=False).missing_keys) == len(plain.state_dict()) - len(part)
    one_model(fast, plain)


# -- without values at first -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("compute_dtype", [None, BF16])
@pytest.mark.parametrize("assign", [True, False])
def test_from_the_device_meta(assign: bool, compute_dtype: torch.dtype | None) -> None:
    """Materialised by ``assign=True``, or by ``to_empty``, whose memory holds anything."""
    dit = shake(DiT(**SIZES)).eval()
    with torch.device("meta"):
        fast = FastDiffFitDiT(**SIZES, compute_dtype=compute_dtype).eval()
    if not assign:
        fast.to_empty(device="cpu")
        for p in fast.parameters():
            p.data.fill_(torch.nan)
    fast.load_state_dict(dit.state_dict(), assign=assign)
    torch.testing.assert_close(output(fast), output(dit), rtol=0.1, atol=1e-5 if compute_dtype is None else 0.05)
    for name, p in fast.named_parameters():
        assert p.device.type == "cpu" and p.requires_grad == fast.difffit.trains(name)
        if fast.difffit.trains(name):
            assert p.dtype == F32
        elif name.endswith(".weight"):
            assert p.dtype == (compute_dtype or F32)
    assert lies_together(fast)


def test_without_values_it_says_so() -> None:
    with torch.device("meta"):
        fast = FastDiffFitDiT(**SIZES)
    with pytest.raises(DiffFitError, match="the model is on meta and x on cpu"):
        fast(*inputs())
    for use in (fast.merge, lambda: fast.save_delta("d.safetensors")):
        with pytest.raises(DiffFitError, match="has no values: it is on the device meta"):
            use()
    x, t, y = (tensor.to("meta") for tensor in inputs())
    assert fast(x, t, y).shape == (3, 8, 8, 8), "shapes alone can be asked for"


# -- weights replaced and written to -----------------------------------------------------------------------------------
FROZEN = [
    "blocks.1.adaLN_modulation.1.weight", "final_layer.adaLN_modulation.1.weight", "blocks.0.attn.proj.weight",
    "blocks.1.attn.qkv.weight", "blocks.0.mlp.fc1.weight", "blocks.1.mlp.fc2.weight", "x_embedder.proj.weight",
    "t_embedder.mlp.2.weight", "t_embedder.mlp.0.bias", "pos_embed",
]  # fmt: skip


def in_place(model: nn.Module, name: str, new: Tensor) -> None:
    with torch.no_grad():
        model.get_parameter(name).copy_(new)


def through_data(model: nn.Module, name: str, new: Tensor) -> None:
    model.get_parameter(name).data.copy_(new)


def other_data(model: nn.Module, name: str, new: Tensor) -> None:
    model.get_parameter(name).data = new.clone()


def another_parameter(model: nn.Module, name: str, new: Tensor) -> None:
    path, _, key = name.rpartition(".")
    setattr(model.get_submodule(path), key, nn.Parameter(new.clone(), requires_grad=False))


def loaded(model: nn.Module, name: str, new: Tensor) -> None:
    model.load_state_dict({**model.state_dict(), name: new})


def assigned(model: nn.Module, name: str, new: Tensor) -> None:
    model.load_state_dict({name: new.clone()}, strict=False, assign=True)


def through_a_view(model: nn.Module, name: str, new: Tensor) -> None:
    model.get_parameter(name).detach().view(-1)[5:].copy_(new.view(-1)[5:])


def through_numpy(model: nn.Module, name: str, new: Tensor) -> None:
    model.get_parameter(name).detach().numpy()[...] = new.numpy()


WRITES = [in_place, through_data, other_data, another_parameter, loaded, assigned, through_a_view, through_numpy]


@pytest.mark.parametrize("layouts", ["0", "1"])
@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
def test_a_frozen_tensor_replaced_is_replaced_everywhere(write: Callable, layouts: str, monkeypatch) -> None:
    """With oneDNN's layout kept of the weights, and without."""
    monkeypatch.setenv("DIFFFIT_FAST_PACK", layouts)
    plain, fast = models()
    output(fast)
    for name in FROZEN:
        new = 0.2 * torch.randn_like(plain.get_parameter(name))
        write(plain, name, new), write(fast, name, new)
        one_model(fast, plain)


def test_a_row_written_through_data_in_half_precision() -> None:
    """Where oneDNN's layouts are kept by default, and anywhere else."""
    _, fast = models(compute_dtype=BF16)
    output(fast)
    for name in FROZEN[:6]:
        fast.get_parameter(name).data[7].mul_(3)
        twin = FastDiffFitDiT(**SIZES, compute_dtype=BF16).eval()
        twin.load_state_dict(fast.state_dict())
        assert torch.equal(output(fast), output(twin)), name


def test_functional_call() -> None:
    """With all parameters of another model, then its own again."""
    plain, fast = models()
    other = shake(copy.deepcopy(plain), 0.05)
    got = torch.func.functional_call(fast, dict(other.state_dict()), inputs())
    torch.testing.assert_close(got, output(other), rtol=1e-4, atol=1e-5)
    one_model(fast, plain)
    assert lies_together(fast)
    wanting = {name: p.detach().requires_grad_() for name, p in other.named_parameters()}
    with pytest.raises(RuntimeError, match="is frozen in DiffFit and gets no gradient"):
        torch.func.functional_call(fast, wanting, inputs())


def test_two_models_that_share_their_frozen_parameters() -> None:
    plain, fast = models()
    twin = copy.deepcopy(fast, {id(p): p for p in fast.parameters() if not p.requires_grad})
    assert all(p is q for p, q in zip(fast.parameters(), twin.parameters(), strict=True) if not p.requires_grad)
    one_model(twin, plain)
    one_model(fast, plain)
    assert lies_together(twin)


# -- moved, cast, shared -----------------------------------------------------------------------------------------------
def test_moved_and_cast_there_and_back() -> None:
    plain, fast = models()
    for move in (
        lambda m: m.double().float(), lambda m: m.to("cpu"), lambda m: m.to(memory_format=torch.contiguous_format),
        lambda m: m.cpu(), lambda m: m.requires_grad_(False).train().eval(), lambda m: m.share_memory(),
    ):  # fmt: skip
        trains = {name: p.requires_grad for name, p in plain.named_parameters()}
        for model in (plain, fast):
            move(model)
            for name, p in model.named_parameters():
                p.requires_grad_(trains[name])
        one_model(fast, plain)
    assert all(p.is_shared() for p in fast.parameters()), "and stays shared"


@pytest.mark.parametrize("autocast", [None, BF16, F16])
@pytest.mark.parametrize("dtype", [BF16, F16, F32, F64])
@pytest.mark.parametrize("changed", [False, True])
def test_every_dtype_under_every_autocast(dtype: torch.dtype, autocast: torch.dtype | None, changed: bool) -> None:
    """No worse than the plain model under autocast, whose stream is float32; float64 stays float64, as in PyTorch."""
    plain, fast = models()
    truth = output(copy.deepcopy(plain).double()).float()
    fast.to(dtype)
    x, t, y = inputs(dtype)
    with warnings.catch_warnings(), torch.autocast("cpu", autocast or BF16, enabled=autocast is not None):
        warnings.simplefilter("ignore")
        hook = fast.blocks[0].register_forward_hook(lambda *_: None) if changed else None
        with torch.no_grad():
            got = fast(x, t, y)
    assert got.dtype == dtype and bool(hook) == changed
    unit = {BF16: 2**-8, F16: 2**-11, F32: 1e-6, F64: 1e-6}
    computed = dtype if dtype == F64 or autocast is None else autocast
    assert (got.float() - truth).norm() <= 4 * max(unit[dtype], unit[computed]) * truth.norm()


@pytest.mark.parametrize("compute_dtype", [BF16, F16])
def test_a_compute_dtype_with_modules_called_one_by_one(compute_dtype: torch.dtype) -> None:
    plain, fast = models(compute_dtype=compute_dtype)
    before = output(fast)
    fast.blocks[1].mlp.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match=CHANGED):
        after = output(fast)
    truth = output(plain)
    assert (after - truth).norm() <= 1.5 * (before - truth).norm()
    assert len(gradients(fast)) == len(gradients(plain))


def test_a_compute_dtype_that_pytorch_cannot_mix_is_an_error_only_there() -> None:
    _, fast = models(compute_dtype=F64)
    output(fast)
    fast.blocks[1].mlp.register_forward_hook(lambda *_: None)
    with (
        pytest.warns(UserWarning, match=CHANGED),
        pytest.raises(
            DiffFitError, match=r"one by one \(blocks.1.mlp has a hook\), .* have torch.float32, torch.float64"
        ),
    ):
        fast(*inputs())


# -- hooks -------------------------------------------------------------------------------------------------------------
def test_hooks_of_every_module_see_what_a_plain_models_see() -> None:
    plain, fast = models()
    seen: list[dict[str, Tensor]] = [{}, {}]
    handles = [
        module.register_forward_hook(lambda _, __, out, seen=seen[i], name=name: seen.update({name: out}))
        for i, model in enumerate((plain, fast))
        for name, module in model.named_modules()
    ]
    with pytest.warns(UserWarning, match=f"x_embedder has a hook: {CHANGED}"):
        same(fast, plain)
    assert seen[0].keys() == seen[1].keys() and len(seen[0]) > 30
    for name, want in seen[0].items():
        torch.testing.assert_close(seen[1][name], want, rtol=1e-4, atol=1e-5, msg=name)
    for handle in handles:
        handle.remove()
    seen[1].clear()
    one_model(fast, plain)
    assert not seen[1] and fast.as_built.change() is None


def test_hooks_that_change_what_passes() -> None:
    plain, fast = models()
    for model in (plain, fast):
        model.blocks[0].attn.register_forward_hook(lambda _, __, out: 2 * out)
        model.blocks[1].mlp.fc1.register_forward_pre_hook(lambda _, args: (args[0] + 1,))
        model.blocks[1].attn.proj.register_full_backward_hook(lambda _, grads, __: (0.5 * grads[0],))
    with pytest.warns(UserWarning, match=CHANGED):
        same(fast, plain)


def test_hooks_of_the_model_itself_and_of_parameters_cost_nothing() -> None:
    plain, fast = models()
    calls: list[object] = []
    fast.register_forward_hook(lambda *_: calls.append("forward"))
    fast.blocks[0].gamma1.register_hook(lambda grad: calls.append(grad))
    same(fast, plain)
    assert len(calls) == 3 and fast.as_built.change() is None


def test_hooks_on_all_modules() -> None:
    plain, fast = models()
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        with pytest.warns(UserWarning, match=f"all modules have a hook: {CHANGED}"):
            output(fast)
    finally:
        handle.remove()
    assert len(seen) == len(list(fast.modules())) - 2  # the lists of blocks and of deltas are not called
    one_model(fast, plain)
    counts = []
    for model in (plain, fast):
        with warnings.catch_warnings(), FlopCounterMode(display=False) as counter:
            warnings.simplefilter("ignore")
            output(model)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_what_is_done_is_said_once() -> None:
    _, fast = models()
    fast.blocks[0].register_forward_hook(lambda *_: None)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        output(fast), output(fast)
    assert [str(w.message) for w in heard] == [
        "blocks.0 has a hook: the modules are called one by one, with a plain DiT's numbers and speed"
    ]
    assert heard[0].filename == __file__


# -- modules replaced and wrapped --------------------------------------------------------------------------------------
class Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class Around(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x) + 0.1 * x


def weight_norm(model: nn.Module) -> None:
    nn.utils.weight_norm(model.blocks[0].attn.qkv)
    model.blocks[0].attn.qkv.requires_grad_(False)
    model.blocks[0].attn.qkv.bias.requires_grad_(True)


def another_forward(model: nn.Module) -> None:
    mlp = model.blocks[1].mlp
    mlp.forward = lambda x: mlp.fc2(torch.relu(mlp.fc1(x)))


DONE: dict[str, Callable[[nn.Module], object]] = {
    "parametrized": lambda m: parametrize.register_parametrization(m.blocks[1].mlp.fc1, "weight", Twice()),
    "modulation parametrized": lambda m: parametrize.register_parametrization(
        m.blocks[1].adaLN_modulation[1], "weight", Twice()
    ),
    "weight norm": weight_norm,
    "pruned": lambda m: prune.l1_unstructured(m.blocks[0].mlp.fc1, "weight", amount=0.5),
    "another activation": lambda m: setattr(m.blocks[0].mlp, "act", nn.ReLU()),
    "another GELU": lambda m: setattr(m.blocks[0].mlp, "act", nn.GELU()),
    "another norm": lambda m: setattr(m.blocks[0], "norm1", nn.Identity()),
    "another linear": lambda m: m.blocks[1].mlp.__setattr__("fc2", copy.deepcopy(m.blocks[0].mlp.fc2)),
    "without a bias": lambda m: setattr(m.final_layer.linear, "bias", None),
    "wrapped": lambda m: setattr(m.blocks[0].attn, "proj", Around(m.blocks[0].attn.proj)),
    "a block wrapped": lambda m: m.blocks.__setitem__(1, torch.compile(m.blocks[1], backend="eager")),
    "a block taken twice": lambda m: m.blocks.__setitem__(1, m.blocks[0]),
    "embedder wrapped": lambda m: setattr(m.x_embedder, "proj", nn.Sequential(m.x_embedder.proj)),
    "another forward": another_forward,
}


@pytest.mark.parametrize("name", DONE)
def test_replaced_and_wrapped(name: str) -> None:
    plain, fast = models()
    for model in (plain, fast):
        torch.manual_seed(3)
        DONE[name](model)
    with pytest.warns(UserWarning, match=CHANGED):
        same(fast, plain)
    for what, use in (("merged", fast.merge), ("delta cannot be saved", lambda: fast.save_delta("d.safetensors"))):
        if name != "another forward":
            with pytest.raises(DiffFitError, match=rf"{what}.*: (blocks|x_embedder|final_layer)\S* (is|has become) "):
                use()


@pytest.mark.parametrize("name", ["parametrized", "weight norm", "pruned"])
def test_what_is_taken_back_is_forgotten(name: str) -> None:
    plain, fast = models()
    undo: dict[str, Callable[[nn.Module], object]] = {
        "parametrized": lambda m: parametrize.remove_parametrizations(m.blocks[1].mlp.fc1, "weight"),
        "weight norm": lambda m: nn.utils.remove_weight_norm(m.blocks[0].attn.qkv).weight.requires_grad_(False),
        "pruned": lambda m: prune.remove(m.blocks[0].mlp.fc1, "weight"),
    }
    for model in (plain, fast):
        DONE[name](model)
        undo[name](model)
    one_model(fast, plain)
    assert fast.as_built.change() is None


def test_activation_checkpointing_by_wrappers_and_our_own() -> None:
    wrapper = pytest.importorskip("torch.distributed.algorithms._checkpoint.checkpoint_wrapper")
    plain, fast = models()
    fast.blocks[0].register_forward_hook(lambda *_: None)
    fast.gradient_checkpointing = True
    with pytest.warns(UserWarning, match=CHANGED):
        same(fast, plain)
    _, fast = models()
    fast.load_state_dict(plain.state_dict())
    wrapper.apply_activation_checkpointing(fast, check_fn=lambda module: isinstance(module, DiTBlock))
    with pytest.warns(UserWarning, match=CHANGED):
        same(fast, plain, grads=False)
    assert fast.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.filterwarnings("ignore")
def test_quantised_dynamically() -> None:
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("needs fbgemm")
    plain, fast = (torch.ao.quantization.quantize_dynamic(model, {nn.Linear}) for model in models())
    with pytest.warns(UserWarning, match=rf"t_embedder.mlp.0 is another module now, torch Linear: {CHANGED}"):
        assert torch.equal(output(fast), output(plain))
    with pytest.raises(DiffFitError, match=r"cannot be merged: t_embedder.mlp.0 is another module now, torch "):
        fast.merge()


def test_a_tensor_of_another_kind() -> None:
    class Kind(Tensor):
        pass

    plain, fast = models()
    for model in (plain, fast):
        p = model.blocks[0].mlp.fc1.weight
        model.blocks[0].mlp.fc1.weight = nn.Parameter(p.detach().as_subclass(Kind), requires_grad=False)
    with pytest.warns(UserWarning, match=f"blocks.0.mlp.fc1.weight is a Kind: {CHANGED}"):
        same(fast, plain)


# -- PEFT --------------------------------------------------------------------------------------------------------------
def lora(**more: Any) -> Any:
    targets = ["qkv", "attn.proj", "fc1", "fc2"]
    return pytest.importorskip("peft").LoraConfig(r=4, target_modules=targets, init_lora_weights=False, **more)


def adapted(config: Any, *pair: nn.Module) -> list[nn.Module]:
    import peft

    made = []
    for model in pair:
        torch.manual_seed(5)
        made.append(peft.get_peft_model(model, config))
    return made


@pytest.mark.parametrize("more", [{}, {"modules_to_save": ["embedding_table"]}, {"use_dora": True}], ids=str)
def test_lora(more: dict[str, Any]) -> None:
    """It acts, trains, can be switched off, and merges into the weights; then the model is fast again."""
    plain, fast = models()
    before = output(fast)
    config = lora(**more)
    a, b = adapted(config, plain, fast)
    with pytest.warns(UserWarning, match=rf"is another module now, peft (Linear|ModulesToSaveWrapper): {CHANGED}"):
        same(b, a)
    assert (output(b) - before).norm() > 0.1 * before.norm(), "it has an effect"
    assert sum("lora_" in name for name in gradients(b)) >= 16
    with b.disable_adapter():
        torch.testing.assert_close(output(b), before, rtol=1e-4, atol=1e-5)
    with pytest.raises(DiffFitError, match="cannot be merged: .* is another module now, peft "):
        fast.merge()
    with pytest.raises(DiffFitError, match="delta cannot be saved: .* is another module now, peft "):
        fast.save_delta("d.safetensors")
    if not more:
        a, b = a.merge_and_unload(), b.merge_and_unload()
        assert b is fast and fast.as_built.change() is None
        torch.testing.assert_close(output(b), output(a), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(output(b.merge()), output(a), rtol=1e-4, atol=1e-4)


def test_lora_in_half_precision_merges_into_the_weights_that_are_multiplied() -> None:
    """It writes to them through ``.data``."""
    _, fast = models(compute_dtype=BF16)
    output(fast)
    (model,) = adapted(lora(), fast)
    model.merge_and_unload()
    twin = FastDiffFitDiT(**SIZES, compute_dtype=BF16).eval()
    twin.load_state_dict(fast.state_dict())
    assert torch.equal(output(fast), output(twin))


def test_injected_adapters() -> None:
    peft = pytest.importorskip("peft")
    plain, fast = models()
    for model in (plain, fast):
        torch.manual_seed(5)
        peft.inject_adapter_in_model(lora(), model)
    with pytest.warns(UserWarning, match=CHANGED):
        same(fast, plain)


# -- offloading --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_and_taken_back(where: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    plain, fast = models()
    if where == "cpu":
        accelerate.cpu_offload(fast, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(fast, str(tmp_path), execution_device=torch.device("cpu"))
    assert fast.blocks[0].attn.qkv.weight.device.type == "meta"
    with pytest.warns(UserWarning, match=f"the forward of .* was replaced: {CHANGED}"):
        same(fast, plain, grads=False)
    with pytest.raises(DiffFitError, match="cannot be merged: .* has no values: it is on the device meta"):
        fast.merge()
    if where == "cpu":
        accelerate.hooks.remove_hook_from_module(fast, recurse=True)
        assert fast.as_built.change() is None
        one_model(fast, plain)


def test_dispatched_to_one_device() -> None:
    accelerate = pytest.importorskip("accelerate")
    plain, fast = models()
    accelerate.dispatch_model(fast, {"": "cpu"})
    one_model(fast, plain)


# -- transforms, compilers, averages -----------------------------------------------------------------------------------
def test_transforms_of_torch_func() -> None:
    plain, fast = models()
    x, t, y = inputs()
    trained = {name: p.detach() for name, p in fast.named_trainable_parameters()}

    def loss(model: nn.Module) -> Callable[[dict[str, Tensor]], Tensor]:
        return lambda p: torch.func.functional_call(model, p, (x, t, y)).square().mean()

    got, want = (torch.func.grad(loss(model))(trained) for model in (fast, plain))
    for name, grad in want.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-4, atol=1e-5)
    each = torch.func.vmap(lambda *one: fast(*(tensor[None] for tensor in one))[0])(x, t, y)
    torch.testing.assert_close(each, output(plain), rtol=1e-4, atol=1e-5)


def test_a_second_derivative_is_refused() -> None:
    _, fast = models()
    (grad,) = torch.autograd.grad(fast(*inputs()).square().mean(), [fast.blocks[0].gamma1], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice|does not require grad"):
        grad.sum().backward()


def test_compiled_sees_what_is_replaced() -> None:
    """Without a graph break, in our operations; another tensor and another module do not go by unseen."""
    plain, fast = models()
    targets: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True, backend=backend)
    same(compiled, plain, grads=False)
    assert targets.count("difffit_fast.block.default") == SIZES["depth"]
    for write in (other_data, another_parameter, through_data):
        for name in FROZEN[:4]:
            new = 0.2 * torch.randn_like(plain.get_parameter(name))
            write(plain, name, new), write(fast, name, new)
        same(compiled, plain, grads=False)
    targets.clear()
    for model in (plain, fast):
        torch.manual_seed(3)
        model.blocks[1].attn.qkv = nn.Linear(48, 144)
    same(compiled, plain, grads=False)
    assert "difffit_fast.block.default" not in targets
    torch._dynamo.reset()


def test_compiled_asks_again_after_a_change() -> None:
    """A frozen weight that is to train, a forward of its own, adapters: as eager, also after compilation."""
    peft = pytest.importorskip("peft")
    torch._dynamo.reset()
    _, fast = models()
    compiled = torch.compile(fast, backend="eager")
    gradients(compiled)
    fast.blocks[0].mlp.fc1.weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match="frozen"):
        gradients(compiled)
    fast.blocks[0].mlp.fc1.weight.requires_grad_(False)
    gradients(compiled)

    plain, fast = models()
    compiled = torch.compile(fast, backend="eager")
    same(compiled, plain, grads=False)
    for model in (plain, fast):
        torch.manual_seed(4)
        config = peft.LoraConfig(r=2, target_modules=["fc1"], init_lora_weights=False)
        peft.inject_adapter_in_model(config, model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        same(compiled, plain, grads=False)
    torch._dynamo.reset()


@pytest.mark.parametrize("objective", ["flow", "ddpm"])
def test_a_sit_called_one_by_one_is_one(objective: str) -> None:
    plain = shake(PlainDiffFitDiT(**SIZES, objective=objective)).eval()
    fast = FastDiffFitDiT(**SIZES, objective=objective).eval()
    fast.load_state_dict(plain.state_dict())
    for model in (plain, fast):
        model.blocks[0].mlp.act = nn.ReLU()
    with pytest.warns(UserWarning, match=CHANGED):
        same(fast, plain)
    assert output(fast).shape[1] == (4 if objective == "flow" else 8)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_foreign_parts_beside_a_plain_dit(assign: bool, inside: bool) -> None:
    """As REPA saves them; where the model is a part of another module, too."""
    dit = shake(DiT(**SIZES))
    state = {**dit.state_dict(), "projectors.0.weight": torch.ones(2)}
    fast = FastDiffFitDiT(**SIZES)
    module = nn.Sequential(fast) if inside else fast
    with pytest.warns(UserWarning, match="projectors of REPA are left out"):
        result = module.load_state_dict({("0." if inside else "") + k: v for k, v in state.items()}, assign=assign)
    assert not result.unexpected_keys and not result.missing_keys
    x, t, y = inputs()
    with torch.no_grad():
        torch.testing.assert_close(fast.eval()(x, t, y), dit.eval()(x, t, y), rtol=1e-4, atol=1e-4)


def test_averages() -> None:
    plain, fast = models()
    averages = [torch.optim.swa_utils.AveragedModel(model) for model in (plain, fast)]
    for model, average in zip((plain, fast), averages, strict=True):
        torch.manual_seed(4)
        for p in model.trainable_parameters():
            p.data.add_(0.1 * torch.randn_like(p))
        average.update_parameters(model)
    same(averages[1].module, averages[0].module)
    ema = copy.deepcopy(fast)
    for (name, p), q in zip(ema.named_parameters(), fast.parameters(), strict=True):
        p.data.lerp_(q.data, 0.5) if fast.difffit.trains(name) else None
    one_model(ema, plain)


# -- several processes -------------------------------------------------------------------------------------------------
def distributed(rank: int, folder: str) -> None:
    """Two processes with half of the batch each: gradients and shards are those of one process with all of it."""
    from torch.distributed.checkpoint import state_dict
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    plain, _ = models()
    mine = slice(2 * rank, 2 * rank + 2)
    x, t, y = (torch.cat([tensor, tensor[:1]]) for tensor in inputs())
    plain(x, t, y).square().mean().backward()
    want = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}

    def compare(model: nn.Module, fast: nn.Module) -> None:
        model(x[mine], t[mine], y[mine]).square().mean().backward()
        for name, p in fast.named_parameters():
            if p.requires_grad:
                grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
                torch.testing.assert_close(grad, want[name], rtol=1e-3, atol=1e-5, msg=name)

    def fresh() -> FastDiffFitDiT:
        fast = FastDiffFitDiT(**SIZES).eval()
        fast.load_state_dict(plain.state_dict())
        return fast

    fast = fresh()
    compare(nn.parallel.DistributedDataParallel(fast), fast)
    assert fast.as_built.change() is None
    for blocks in (False, True):
        fast = fresh()
        for block in fast.blocks if blocks else ():
            fully_shard(block)
        fully_shard(fast)
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            compare(fast, fast)
        assert any(CHANGED in str(w.message) for w in heard) == blocks
        try:
            fast.merge()
            raise AssertionError("a sharded model cannot be merged as it is")
        except DiffFitError as error:
            assert "FSDP" in str(error) or "DTensor" in str(error)
        whole = state_dict.get_model_state_dict(fast, options=state_dict.StateDictOptions(full_state_dict=True))
        assert all(torch.equal(whole[name], p) for name, p in plain.state_dict().items())
    torch.distributed.destroy_process_group()


@pytest.mark.reliability
@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_two_processes_with_ddp_and_fsdp(tmp_path: Path) -> None:
    sys.modules.setdefault("test_module_tools", sys.modules[__name__])
    torch.multiprocessing.spawn(distributed, (str(tmp_path),), 2)
