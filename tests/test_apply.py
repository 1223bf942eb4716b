"""apply_difffit on every registered transformer of diffusers, tiny and with random weights, against the plain model."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers")

import zoo
from safetensors import safe_open
from safetensors.torch import save_file

from difffit_fast import DiffFitConfig, DiffFitError, DiT, FastDiffFitDiT, apply_difffit
from difffit_fast.apply.families import FAMILIES
from difffit_fast.apply.modules import FrozenLinear, FrozenScaledLinear, GeluReading, ScaledConv2d
from difffit_fast.errors import DeltaMismatchError

NAMES = sorted(zoo.ZOO)
ONE = "SD3Transformer2DModel"  # where one class is enough
QKV = ("qkv", "proj", "attn", "mlp")


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def applied(name: str, config: str | DiffFitConfig = "paper", moved: float = 0.0, **changes: Any) -> Any:
    """An applied model, its trainables moved away from where they begin."""
    model = apply_difffit(zoo.make(name, **changes), config, **zoo.ZOO[name][2])
    return move(model, moved) if moved else model


def move(model: Any, by: float, seed: int = 5) -> Any:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.trainable_parameters():
            p.add_(by * torch.randn(p.shape, generator=g).to(p))
    return model


def merged(model: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of added biases: their own test
        return copy.deepcopy(model).merge_()


@torch.no_grad()
def run(model: nn.Module, arguments: dict[str, Any]) -> Tensor:
    return zoo.run(model, arguments)


def off(a: Tensor, b: Tensor) -> float:
    return float(((a.double() - b.double()).norm() / b.double().norm()).detach())


def emulated(name: str, model: Any, **changes: Any) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """The plain model with the trainables of ``model`` in ordinary modules, γ multiplied behind them; and these by name."""
    plain = zoo.make(name, **changes).requires_grad_(False)
    twins: dict[int, nn.Parameter] = {}
    for path, module in model.named_modules():
        held = module.__dict__.get("_difffit")
        for leaf in held.dtypes if held else ():
            p = module._parameters[leaf]
            twin = twins.setdefault(id(p), nn.Parameter(p.detach().clone()))
            target = plain.get_submodule(path)
            if leaf == "gamma":
                shape = (-1, 1, 1) if isinstance(target, nn.Conv2d) else (-1,)
                target.register_forward_hook(lambda m, args, y, g=twin, shape=shape: (y * g.view(shape)).to(y.dtype))
            else:
                target._parameters[leaf] = twin
    return plain, {n: twins[id(p)] for n, p in model.named_trainable_parameters()}


def gradients(model: nn.Module, parameters: dict[str, nn.Parameter], arguments: dict[str, Any]) -> dict[str, Tensor]:
    out = zoo.run(model, arguments)
    out.backward(torch.linspace(-1, 1, out.numel()).view_as(out).to(out))
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in parameters.items()}


# -- every class -----------------------------------------------------------------------------------------------------
def test_the_zoo_has_every_registered_class() -> None:
    assert set(NAMES) == set(FAMILIES)


@pytest.mark.parametrize("config", ["paper", "block"])
@pytest.mark.parametrize("name", NAMES)
def test_the_output_is_unchanged_at_insertion(name: str, config: str) -> None:
    """Bit for bit: the same products in the same order, γ = 1, LayerNorm's weight 1 and bias 0, added biases 0."""
    arguments = zoo.inputs(name)
    want = run(zoo.make(name), arguments)
    model = applied(name, config)
    assert torch.equal(run(model, arguments), want)
    assert type(model).__name__ == name and isinstance(model, type(zoo.make(name)))
    assert all(p.requires_grad for p in model.trainable_parameters())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == model.num_trainable


@pytest.mark.parametrize("config", ["paper", "minimax", "bitfit"])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_all_trainables_are_those_of_autograd_on_the_plain_model(name: str, config: str) -> None:
    arguments, model = zoo.inputs(name), applied(name, config, moved=0.1)
    plain, twins = emulated(name, model)
    got = gradients(model, dict(model.named_trainable_parameters()), arguments)
    want = gradients(plain, twins, arguments)
    assert len(got) > 8
    largest = max(float(g.norm()) for g in want.values())
    for key in want:
        error = float((got[key] - want[key]).norm())
        assert error <= 2e-6 * float(want[key].norm()) + 1e-6 * largest, (key, error)
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert frozen and all(model.get_parameter(n).grad is None for n in frozen)


@pytest.mark.parametrize("name", NAMES)
def test_merge_computes_the_same_in_the_stock_class(name: str) -> None:
    arguments, model = zoo.inputs(name), applied(name, moved=0.1)
    before = run(model, arguments)
    result = merged(model)
    assert off(run(result, arguments), before) <= 1e-6
    stock = zoo.make(name)
    assert [type(m) for m in result.modules()] == [type(m) for m in stock.modules()]
    if not zoo.ZOO[name][2]:  # nothing was added
        stock.load_state_dict(result.state_dict(), strict=True)
        assert torch.equal(run(stock, arguments), run(result, arguments))
    assert all(p.requires_grad for p in result.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_unload_gives_the_very_model_back(name: str) -> None:
    model = zoo.make(name)
    model.get_parameter(next(n for n, _ in model.named_parameters())).requires_grad_(False)
    parameters, flags = dict(model.named_parameters()), {n: p.requires_grad for n, p in model.named_parameters()}
    state = {key: value.clone() for key, value in model.state_dict().items()}
    classes, keys = [type(m) for m in model.modules()], [set(m.__dict__) for m in model.modules()]
    move(apply_difffit(model, **zoo.ZOO[name][2]), 0.1)
    assert model.unload() is model
    assert [type(m) for m in model.modules()] == classes and [set(m.__dict__) for m in model.modules()] == keys
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(p is parameters[n] and p.requires_grad == flags[n] for n, p in model.named_parameters())
    apply_difffit(model, **zoo.ZOO[name][2])  # and it can be applied again


@pytest.mark.parametrize("name", NAMES)
def test_delta_round_trip(name: str, tmp_path: Path) -> None:
    arguments, model = zoo.inputs(name), applied(name, moved=0.1)
    model.save_delta(tmp_path / "d.safetensors", step=7)
    other = applied(name)
    assert other.load_delta(tmp_path / "d.safetensors")["step"] == 7
    assert torch.equal(run(other, arguments), run(model, arguments))
    other.save_delta(tmp_path / "e.safetensors", step=7)
    assert (tmp_path / "d.safetensors").read_bytes() == (tmp_path / "e.safetensors").read_bytes()
    assert (tmp_path / "d.safetensors").stat().st_size < 4 * model.num_trainable + 40_000


@pytest.mark.parametrize("name", NAMES)
def test_under_gradient_checkpointing(name: str) -> None:
    arguments, model = zoo.inputs(name), applied(name, moved=0.1)
    parameters = dict(model.named_trainable_parameters())
    want = {n: g.clone() for n, g in gradients(model, parameters, arguments).items()}
    model.zero_grad()
    model.enable_gradient_checkpointing()
    got = gradients(model, parameters, arguments)
    assert all(torch.equal(got[n], want[n]) for n in want)


@pytest.mark.parametrize("name", NAMES)
def test_loaded_in_bf16(name: str) -> None:
    """The trainables are float32, the model computes in bf16, no worse than it did; casting and moving keep it so."""
    arguments = zoo.inputs(name)
    truth = run(zoo.make(name), arguments)
    half = to_half(arguments)
    plain = halved(name)
    model = apply_difffit(halved(name), **zoo.ZOO[name][2])
    out = run(model, half)
    # Not bit for bit: where a CPU has no bf16 products, ours are made in float32 and rounded once.
    assert out.dtype == torch.bfloat16 and off(out, truth) <= 1.5 * off(run(plain, half), truth)
    assert {p.dtype for p in model.trainable_parameters()} == {torch.float32}
    assert model.dtype == plain.dtype == torch.bfloat16
    grads = gradients(model, dict(model.named_trainable_parameters()), half)
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads.values())
    model.unload()
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in model.state_dict().items())


def halved(name: str) -> nn.Module:
    """As from_pretrained loads it: what the class asks to be kept in float32 stays so."""
    model = zoo.make(name)
    kept = getattr(model, "_keep_in_fp32_modules", None) or ()
    for key, p in model.named_parameters():
        if not any(part in key for part in kept):
            p.data = p.data.bfloat16()
    return model


def to_half(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.bfloat16() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {k: v if k in ("img_ids", "txt_ids") else to_half(v) for k, v in value.items()}
    return [to_half(v) for v in value] if isinstance(value, list) and isinstance(value[0], Tensor) else value


# -- what trains -------------------------------------------------------------------------------------------------------
def test_a_dit_trains_what_a_fast_difffit_dit_does() -> None:
    """The same count for the same sizes, less one of the two γ that multiply the same tensor; copies of a table are one."""
    model = applied("DiTTransformer2DModel")
    fast = FastDiffFitDiT(input_size=8, patch_size=2, hidden_size=48, depth=4, num_heads=3, num_classes=5)
    assert model.num_trainable == fast.num_trainable - 2 * 48
    tables = [b.norm1.emb.class_embedder.embedding_table._parameters["weight"] for b in model.transformer_blocks]
    assert all(t is tables[0] for t in tables)
    for preset in ("minimax", "block", "bitfit"):
        ours = applied("DiTTransformer2DModel", preset).num_trainable
        fast = FastDiffFitDiT(input_size=8, hidden_size=48, depth=4, num_heads=3, num_classes=5, difffit=preset)
        assert ours == fast.num_trainable - (2 * 48 if preset == "minimax" else 0), preset


def test_copies_of_a_table_that_differ_train_apart() -> None:
    model = zoo.make("DiTTransformer2DModel")
    with torch.no_grad():
        model.transformer_blocks[2].norm1.emb.class_embedder.embedding_table.weight[0, 0] += 1
    apply_difffit(model)
    names = [n for n, _ in model.named_trainable_parameters() if "embedding_table" in n]
    assert [n.split(".")[1] for n in names] == ["0", "2"]


def names_of(model: Any, ending: str) -> set[str]:
    return {n.removesuffix(ending) for n, _ in model.named_trainable_parameters() if n.endswith(ending)}


GAMMAS = {  # of the first block and the first single block
    "DiTTransformer2DModel": {"transformer_blocks.0.attn1.to_out.0", "transformer_blocks.0.ff.net.2"},
    "PixArtTransformer2DModel": {
        "transformer_blocks.0.attn1.to_out.0", "transformer_blocks.0.attn2.to_out.0", "transformer_blocks.0.ff.net.2"},
    "SD3Transformer2DModel": {
        *(f"transformer_blocks.0.{x}" for x in
          ("attn.to_out.0", "attn.to_add_out", "attn2.to_out.0", "ff.net.2", "ff_context.net.2"))},
    "FluxTransformer2DModel": {
        *(f"transformer_blocks.0.{x}" for x in ("attn.to_out.0", "attn.to_add_out", "ff.net.2", "ff_context.net.2")),
        "single_transformer_blocks.0.proj_out"},
    "Flux2Transformer2DModel": {
        *(f"transformer_blocks.0.{x}" for x in
          ("attn.to_out.0", "attn.to_add_out", "ff.linear_out", "ff_context.linear_out")),
        "single_transformer_blocks.0.attn.to_out"},
    "QwenImageTransformer2DModel": {
        *(f"transformer_blocks.0.{x}" for x in ("attn.to_out.0", "attn.to_add_out", "img_mlp.net.2", "txt_mlp.net.2"))},
    "WanTransformer3DModel": {f"blocks.0.{x}" for x in ("attn1.to_out.0", "attn2.to_out.0", "ffn.net.2")},
    "SanaTransformer2DModel": {
        f"transformer_blocks.0.{x}" for x in ("attn1.to_out.0", "attn2.to_out.0", "ff.conv_point")},
    "ZImageTransformer2DModel": set(),
    "Lumina2Transformer2DModel": set(),
    "AuraFlowTransformer2DModel": {
        *(f"joint_transformer_blocks.0.{x}" for x in
          ("attn.to_out.0", "attn.to_add_out", "ff.out_projection", "ff_context.out_projection")),
        "single_transformer_blocks.0.attn.to_out.0", "single_transformer_blocks.0.ff.out_projection"},
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_gamma_is_behind_every_branch(name: str) -> None:
    model = applied(name, "block")
    found = names_of(model, ".gamma")
    assert {path for path in found if ".0." in path.replace("to_out.0", "to_out").replace("net.0", "net") + "."
            and path.split(".")[1] == "0"} == GAMMAS[name]  # fmt: skip
    for path in found:
        assert isinstance(model.get_submodule(path), (FrozenScaledLinear, ScaledConv2d))
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert linears and all(isinstance(m, FrozenLinear) for m in linears)


def test_gamma_blocks_count_through_all_lists_of_blocks() -> None:
    def blocks(**kwargs: Any) -> set[str]:
        model = applied("FluxTransformer2DModel", DiffFitConfig(**kwargs))
        return {".".join(n.split(".")[:2]) for n in names_of(model, ".gamma")}

    double, single = "transformer_blocks.{}", "single_transformer_blocks.{}"
    assert blocks() == {double.format(0), double.format(1)}
    assert blocks(gamma_blocks=3) == {double.format(0), double.format(1), single.format(0)}
    assert blocks(gamma_blocks=-1) == {single.format(1)}
    assert blocks(gamma_blocks="all") == {x.format(i) for x in (double, single) for i in (0, 1)}
    assert blocks(gamma=()) == set()


def test_sites_of_gamma() -> None:
    def gammas(*sites: str) -> set[str]:
        model = applied(ONE, DiffFitConfig(gamma=sites, gamma_blocks=1))
        return {n.removeprefix("transformer_blocks.0.") for n in names_of(model, ".gamma")}

    out = {"attn.to_out.0", "attn.to_add_out", "attn2.to_out.0"}
    assert gammas("attn") == gammas("proj") == gammas("attn", "proj") == out
    assert gammas("mlp") == {"ff.net.2", "ff_context.net.2"}
    assert gammas("qkv") == {
        *(f"attn.{x}" for x in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")),
        *(f"attn2.{x}" for x in ("to_q", "to_k", "to_v")),
    }


def test_what_a_configuration_leaves_out_stays_frozen() -> None:
    def trained(name: str = ONE, **kwargs: Any) -> list[str]:
        return [n for n, _ in applied(name, DiffFitConfig(**kwargs)).named_trainable_parameters()]

    assert not [n for n in trained() if "timestep_embedder" in n] and [n for n in trained() if "text_embedder" in n]
    assert [n for n in trained(time_embedder_bias=True) if "timestep_embedder" in n]
    assert {n.rpartition(".")[2] for n in trained(bias=False, affine_norm=False)} == {"gamma", "weight"}
    assert not [n for n in trained(gamma=(), affine_norm=False) if "norm_q" in n]
    table = DiffFitConfig(class_embedding=False)
    assert not [n for n, _ in applied("DiTTransformer2DModel", table).named_trainable_parameters() if "embedding" in n]
    tables = [n for n in trained("PixArtTransformer2DModel") if n.endswith("scale_shift_table")]
    assert tables[0] == "scale_shift_table" and len(tables) == 5
    assert not [n for n in trained("ZImageTransformer2DModel") if "pad_token" in n]


def test_kinds() -> None:
    for name in ("Flux2Transformer2DModel", "AuraFlowTransformer2DModel"):
        with pytest.raises(DiffFitError, match=f"the blocks of {name} have no biases to train; give add_bias=True"):
            apply_difffit(zoo.make(name))
        model = apply_difffit(zoo.make(name), DiffFitConfig(bias=False))
        assert not names_of(model, ".bias") and names_of(model, ".gamma")
        linears = [m for m in zoo.make(name).modules() if isinstance(m, nn.Linear)]
        added = applied(name)
        embedders = 2 if name.startswith("Aura") else 4  # of time and guidance: theirs stay without
        assert (
            len([n for n in names_of(added, ".bias") if "norm" not in n or "linear" in n]) == len(linears) - embedders
        )
        with pytest.warns(UserWarning, match=rf"linears of the merged {name} have biases that the class does not make"):
            added.merge_()
    assert names_of(applied("ZImageTransformer2DModel"), "adaLN_modulation.0.bias")
    with pytest.raises(DiffFitError, match="add_bias=True needs a configuration with bias=True"):
        apply_difffit(zoo.make(ONE), DiffFitConfig(bias=False), add_bias=True)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.wo, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(8, 16), "fc2": nn.Linear(16, 8)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.wo(self.attn(self.norm(x)))
        return x + self.mlp["fc2"](torch.relu(self.mlp["fc1"](x)))


class Others(nn.Module):
    """A model that nobody has heard of."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_the_rule_for_others() -> None:
    x = torch.randn(2, 3, 8)
    plain = Others()
    want = plain(x)
    model = apply_difffit(copy.deepcopy(plain), "block")
    assert names_of(model, ".gamma") == {"layers.0.mlp.fc2", "layers.1.mlp.fc2"} and torch.equal(model(x), want)
    model = apply_difffit(copy.deepcopy(plain), DiffFitConfig(gamma_blocks=1), branch_ends=["wo", "mlp.fc2"])
    assert names_of(model, ".gamma") == {"layers.0.wo", "layers.0.mlp.fc2"}
    move(model, 0.1)
    assert off(merged(model)(x), model(x)) < 1e-6
    with pytest.raises(DiffFitError, match="branch_ends names 'attn.wo', which is no linear"):
        apply_difffit(copy.deepcopy(plain), branch_ends=["attn.wo"])
    with pytest.raises(DiffFitError, match="ReLU has nothing that this configuration trains"):
        apply_difffit(nn.ReLU())


# -- what may happen to it -----------------------------------------------------------------------------------------
def test_frozen_linears_keep_nothing_but_their_weight() -> None:
    model = applied("DiTTransformer2DModel")
    linear = model.transformer_blocks[0].ff.net[0].proj
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        linear(torch.randn(2, 5, 48, requires_grad=True))
    assert [t.data_ptr() for t in saved] == [linear.weight.data_ptr()]


def test_hooks_on_the_linear_of_a_gelu_fire() -> None:
    """The module around it computes both in one operation, unless something looks on."""
    model, arguments = applied(ONE, moved=0.1), zoo.inputs(ONE)
    gelu = model.transformer_blocks[0].ff.net[0]
    assert isinstance(gelu, GeluReading) and type(gelu).__name__ == "GELU"
    want, seen = run(model, arguments), []
    before = gelu.proj.register_forward_pre_hook(lambda *_: seen.append("before"))
    after = gelu.proj.register_forward_hook(lambda *_: seen.append("after"))
    assert torch.equal(run(model, arguments), want) and seen == ["before", "after"]
    before.remove()
    after.remove()
    back = gelu.proj.register_full_backward_hook(lambda *_: seen.append("back"))
    gradients(model, {}, arguments)
    assert seen.pop() == "back"
    back.remove()
    gelu.proj.forward = lambda x: seen.append("instead") or type(gelu.proj).forward(gelu.proj, x)
    assert torch.equal(run(model, arguments), want) and seen.pop() == "instead"


def test_a_frozen_weight_that_wants_a_gradient_is_an_error() -> None:
    model, arguments = applied(ONE), zoo.inputs(ONE)
    model.transformer_blocks[1].attn.to_q.weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match="frozen in DiffFit and gets no gradient"):
        zoo.run(model, arguments)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("name", ["PixArtTransformer2DModel", "SanaTransformer2DModel"])
def test_copies_are_whole(name: str, copied: Any) -> None:
    model, arguments = applied(name, moved=0.1), zoo.inputs(name)
    twin = copied(model)
    assert type(twin) is type(model) and torch.equal(run(twin, arguments), run(model, arguments))
    move(twin, 0.1)
    assert not torch.equal(run(twin, arguments), run(model, arguments))
    twin.unload()
    assert torch.equal(run(twin, arguments), run(zoo.make(name), arguments))


def test_casting_and_moving_leave_the_trainables_wide(tmp_path: Path) -> None:
    model, arguments = applied("PixArtTransformer2DModel", moved=0.1), zoo.inputs("PixArtTransformer2DModel")
    values = {n: p.detach().clone() for n, p in model.named_trainable_parameters()}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        model.to(dtype)
        assert all(torch.equal(p, values[n]) for n, p in model.named_trainable_parameters())
        assert model.dtype == model.scale_shift_table.dtype == dtype
        assert model.pos_embed.proj.bias.dtype == dtype and model.transformer_blocks[0].attn1.to_q.weight.dtype == dtype
    half = applied("PixArtTransformer2DModel", moved=0.1).to(torch.bfloat16)
    assert run(half, to_half(arguments)).dtype == torch.bfloat16
    double = applied("PixArtTransformer2DModel", moved=0.1).double()
    arguments = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in arguments.items()}
    assert off(run(merged(double), arguments), run(double, arguments)) < 1e-12
    gradients(double, dict(double.named_trainable_parameters()), arguments)
    double.half()
    assert {p.grad.dtype for p in double.trainable_parameters()} <= {torch.float64, torch.float32}


def test_functional_call_and_replaced_weights() -> None:
    model, arguments = applied(ONE, moved=0.1), zoo.inputs(ONE)
    other = {n: p.detach() * 1.5 for n, p in model.named_parameters()}
    got = torch.func.functional_call(model, other, (), {**arguments, "return_dict": False})[0]
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.copy_(other[n])
    assert torch.equal(got, run(model, arguments))
    linear = model.transformer_blocks[0].ff.net[2]
    linear.weight = nn.Parameter(torch.zeros_like(linear.weight), requires_grad=False)
    assert not torch.equal(run(model, arguments), got.detach())
    assert off(run(merged(model), arguments), run(model, arguments)) < 1e-6


def test_compile() -> None:
    """Without a graph break, loaded in bf16, where every trainable is cast on the way in."""
    name, config = "DiTTransformer2DModel", DiffFitConfig(gamma_blocks="all")
    arguments = to_half(zoo.inputs(name))
    model = move(apply_difffit(zoo.make(name, num_layers=1).bfloat16(), config), 0.1)
    parameters = dict(model.named_trainable_parameters())
    want = {n: g.clone() for n, g in gradients(model, parameters, arguments).items()}
    model.zero_grad()
    torch._dynamo.reset()
    got = gradients(torch.compile(model, backend="aot_eager", fullgraph=True), parameters, arguments)
    assert all(g.dtype == torch.float32 for g in got.values())
    assert all(off(got[n], want[n]) < 0.05 for n in want if want[n].norm() > 1e-2)


def test_autocast() -> None:
    model, arguments = applied(ONE, moved=0.1), zoo.inputs(ONE)
    truth = run(model, arguments)
    plain, _ = emulated(ONE, model)
    with torch.autocast("cpu", torch.bfloat16):
        assert off(run(model, arguments), truth) <= 1.5 * off(run(plain, arguments), truth)


def test_accelerate(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model, arguments = applied("DiTTransformer2DModel"), zoo.inputs("DiTTransformer2DModel")
    accelerator = accelerate.Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=1e-2)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    accelerator.backward(zoo.run(prepared, arguments).square().mean())
    optimizer.step()
    accelerator.save_state(str(tmp_path / "state"))
    after = run(prepared, arguments)
    move(accelerator.unwrap_model(prepared), 0.1)
    assert not torch.equal(run(prepared, arguments), after)
    accelerator.load_state(str(tmp_path / "state"))
    assert torch.equal(run(prepared, arguments), after)
    accelerator.unwrap_model(prepared).save_delta(tmp_path / "d.safetensors")


def test_distributed_data_parallel(tmp_path: Path) -> None:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model, arguments = applied("DiTTransformer2DModel", moved=0.1), zoo.inputs("DiTTransformer2DModel")
        parameters = dict(model.named_trainable_parameters())
        want = {n: g.clone() for n, g in gradients(model, parameters, arguments).items()}
        model.zero_grad()
        got = gradients(nn.parallel.DistributedDataParallel(model), parameters, arguments)
        assert all(torch.equal(got[n], want[n]) for n in want)
    finally:
        torch.distributed.destroy_process_group()


def test_lora_on_top() -> None:
    """PEFT's LoRA finds our linears, and refuses those with a γ, whose weight alone does not say what they compute."""
    peft = pytest.importorskip("peft")
    model, arguments = applied(ONE, moved=0.1), zoo.inputs(ONE)
    before = run(model, arguments)
    config = peft.LoraConfig(r=2, target_modules=["attn.to_q", "proj_out"], init_lora_weights=False)
    lora = peft.get_peft_model(applied(ONE, "bitfit"), config)
    assert off(run(lora.merge_and_unload(), arguments), run(lora, arguments)) < 1e-5
    with pytest.raises(ValueError, match="is not supported"):
        peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["ff.net.2"]))
    assert torch.equal(run(model, arguments), before)


# -- what is refused ---------------------------------------------------------------------------------------------------
class Quantised(nn.Parameter):
    """Stands for the tensor classes of quantisation libraries: multiplies itself, and is no ordinary parameter."""


def test_quantised_linears_are_left_alone() -> None:
    model, arguments = zoo.make(ONE), zoo.inputs(ONE)
    for linear in (model.transformer_blocks[0].ff.net[2], model.transformer_blocks[0].ff.net[0].proj):
        linear.weight = Quantised(linear.weight.detach(), requires_grad=False)
    before = run(model, arguments)
    with pytest.warns(UserWarning, match=r"2 quantised linears \(transformer_blocks.0.ff.net.0.proj, transformer_blo"):
        apply_difffit(model)
    assert torch.equal(run(model, arguments), before)
    assert "transformer_blocks.0.ff.net.2" in names_of(model, ".bias")
    assert "transformer_blocks.0.ff.net.2" not in names_of(model, ".gamma")
    assert off(run(merged(move(model, 0.1)), arguments), run(model, arguments)) < 1e-6


def fused() -> nn.Module:
    model = zoo.make("FluxTransformer2DModel")
    model.fuse_qkv_projections()
    return model


def with_lora() -> nn.Module:
    peft = pytest.importorskip("peft")
    return peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["to_q"]), zoo.make(ONE))


def hooked() -> nn.Module:
    hooks = pytest.importorskip("accelerate.hooks")
    model = zoo.make(ONE)
    hooks.add_hook_to_module(model.proj_out, hooks.ModelHook())
    return model


REFUSED = {
    "no model": (lambda: "a pipeline", "takes a model, such as the transformer of a pipeline; got str"),
    "a DiT of ours": (lambda: DiT(input_size=8, hidden_size=48, depth=1, num_heads=3), "use FastDiffFitDiT.from_dit"),
    "wrapped": (lambda: torch.compile(zoo.make(ONE)), "before it is wrapped; got OptimizedModule"),
    "twice": (lambda: applied(ONE), f"was applied to this {ONE} before"),
    "LoRA": (with_lora, "transformer_blocks.0.attn.to_q carries a PEFT adapter"),
    "fused": (fused, r"the projections of transformer_blocks.0.attn are fused \(fuse_qkv_projections\)"),
    "hooks": (hooked, "proj_out has hooks that call its forward of before"),
    "float8": (lambda: zoo.make(ONE).to(torch.float8_e4m3fn), "is held in float8_e4m3fn; apply DiffFit before layerwise"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_sentence(case: str) -> None:
    make, message = REFUSED[case]
    model = make()
    with pytest.raises(DiffFitError, match=message) as raised:
        apply_difffit(model)
    assert "\n" not in str(raised.value)


def test_methods_of_diffusers_that_would_act_on_half_of_it(tmp_path: Path) -> None:
    model = applied(ONE)
    with pytest.raises(DiffFitError, match="merge_\\(\\) makes an ordinary model that save_pretrained\\(\\) can write"):
        model.save_pretrained(tmp_path)
    with pytest.raises(DiffFitError, match="would not see DiffFit's trainables"):
        model.fuse_qkv_projections()
    arguments = zoo.inputs(ONE)
    result = merged(move(model, 0.1))
    result.save_pretrained(tmp_path / "merged")
    loaded = type(result).from_pretrained(tmp_path / "merged")
    assert torch.equal(run(loaded, arguments), run(result, arguments))
    assert off(run(loaded, arguments), run(model, arguments)) < 1e-6


def test_a_delta_of_a_float32_base_loads_onto_the_same_base_in_bf16(tmp_path: Path) -> None:
    applied(ONE, moved=0.1).save_delta(tmp_path / "d.safetensors")
    half = apply_difffit(zoo.make(ONE).bfloat16())
    half.load_delta(tmp_path / "d.safetensors")
    values = dict(applied(ONE, moved=0.1).named_trainable_parameters())
    assert all(torch.equal(p, values[n]) for n, p in half.named_trainable_parameters())


MISMATCHES = {
    "class": ("PixArtTransformer2DModel", {}, "was made for SD3Transformer2DModel; the model is a PixArtTransformer2DModel"),
    "preset": (ONE, dict(config="block"), "was made with config=paper .*; the model has block"),
    "base": (ONE, dict(seed=1), r"was made on the base [0-9a-f]{12}…; the model's base is [0-9a-f]{12}…"),
    "bias": (ONE, dict(add_bias=True), "was made with add_bias=False; the model has add_bias=True"),
    "ends": (ONE, dict(branch_ends=["proj_out"]), r"was made with branch_ends=None; the model has branch_ends=\['proj_out'\]"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISMATCHES)
def test_a_delta_for_something_else_is_refused_and_changes_nothing(case: str, tmp_path: Path) -> None:
    name, options, message = MISMATCHES[case]
    applied(ONE, moved=0.1).save_delta(tmp_path / "d.safetensors")
    options = dict(options)
    other = apply_difffit(zoo.make(name, seed=options.pop("seed", 0)), **options)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(DeltaMismatchError, match=message):
        other.load_delta(tmp_path / "d.safetensors")
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())


def test_delta_errors(tmp_path: Path) -> None:
    model = applied(ONE)
    with pytest.raises(DiffFitError, match="delta not found"):
        model.load_delta(tmp_path / "none.safetensors")
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(DiffFitError, match="is not a delta of difffit_fast"):
        model.load_delta(tmp_path / "other.safetensors")
    with pytest.raises(DiffFitError, match="folder for the delta does not exist"):
        model.save_delta(tmp_path / "no" / "d.safetensors")
    with pytest.raises(DiffFitError, match="exactly the trainable parameters"):
        model.save_delta(tmp_path / "d.safetensors", tensors={"odd": torch.ones(1)})
    fast = FastDiffFitDiT(input_size=8, hidden_size=48, depth=2, num_heads=3, num_classes=5)
    fast.save_delta(tmp_path / "ours.safetensors")
    with pytest.raises(DiffFitError, match="is a delta of a DiT of this package"):
        model.load_delta(tmp_path / "ours.safetensors")
    model.save_delta(tmp_path / "theirs.safetensors")
    with pytest.raises(
        DiffFitError, match="is a delta of a SD3Transformer2DModel; apply_difffit's load_delta reads it"
    ):
        fast.load_delta(tmp_path / "theirs.safetensors")
    with safe_open(tmp_path / "theirs.safetensors", "pt") as file:
        strings, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    for key, value, message in (
        ("proj_out.bias", torch.full((16,), torch.nan), "proj_out.bias holds 16 of 16 values that are NaN"),
        ("proj_out.bias", torch.ones(1), r"proj_out.bias has the shape \(1,\), the model \(16,\)"),
        ("proj_out.weight", torch.ones(1), "proj_out.weight is not trained by this model"),
    ):
        save_file({**tensors, key: value}, tmp_path / "odd.safetensors", strings)
        with pytest.raises(DiffFitError, match=message):
            model.load_delta(tmp_path / "odd.safetensors")


def test_an_average_is_saved_in_place_of_the_model(tmp_path: Path) -> None:
    model = applied(ONE, moved=0.1)
    average = {n: p.detach() / 2 for n, p in model.named_trainable_parameters()}
    model.save_delta(tmp_path / "d.safetensors", tensors=average)
    model.load_delta(tmp_path / "d.safetensors")
    assert all(torch.equal(p, average[n]) for n, p in model.named_trainable_parameters())
