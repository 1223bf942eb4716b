"""The fine-tuning methods that DiffFit is compared with: what they train, what they compute, their files."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch.nn import functional as F

from difffit_fast import DiT, DiT_models, FastDiffFitDiT, baselines
from difffit_fast.errors import DeltaMismatchError, DiffFitError

SMALL = dict(input_size=8, in_channels=3, hidden_size=32, depth=3, num_heads=2, num_classes=5)
OPTIONS = {
    "full": {}, "difffit": {"gamma_blocks": 1}, "bitfit": {}, "lora": {"rank": 2}, "adapter": {"bottleneck": 4},
    "vpt": {"tokens": 3}, "class_embedding": {},
}  # fmt: skip
EVERY = [*OPTIONS.items(), ("lora", {"rank": 2, "targets": "all", "bias": True}), ("adapter", {"mode": "sequential"})]


def small_dit(dtype: torch.dtype = torch.float32) -> DiT:
    """A DiT that is not the zero function."""
    torch.manual_seed(0)
    dit = DiT(**SMALL)
    for name, p in dit.named_parameters():
        if name != "pos_embed" and p.requires_grad:
            p.data = p.data + 0.05 * torch.randn_like(p)
    return dit.to(dtype).eval()


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 8, 8, generator=generator, dtype=dtype)
    return x, torch.tensor([10, 900]), torch.tensor([0, 5])


@pytest.mark.parametrize(
    ("method", "options", "expected"),
    [
        ("full", {}, 673_799_072),
        ("difffit", {}, 832_928),
        ("bitfit", {}, 607_136),
        ("lora", {"rank": 8}, 1_149_696),
        ("lora", {"rank": 16}, 2_181_888),
        ("adapter", {}, 4_280_320),
        ("adapter", {"mode": "sequential"}, 4_280_320),
        ("vpt", {}, 102 * 1152 + 28 * 84 * 1152),
        ("class_embedding", {}, 102 * 1152),
        # γ on qkv, proj and both branches costs 6·D a block
        ("difffit", {"gamma_blocks": "all"}, 832_928 + 14 * 6 * 1152),
        ("difffit", {"gamma_blocks": 4}, 832_928 - 10 * 6 * 1152),
        ("difffit", {"gamma_blocks": -4}, 832_928 - 10 * 6 * 1152),
    ],
)
def test_parameter_counts_of_the_paper(method, options, expected):
    with torch.device("meta"):
        dit = DiT_models["DiT-XL/2"](num_classes=101)
        model = baselines.apply(method, dit, **options)
    assert model.num_trainable == expected
    assert sum(p.numel() for p in model.trainable_parameters()) == expected


def test_lora_on_all_linear_maps_counts():
    d, r, c = 32, 2, 2 * 2 * 6
    model = baselines.apply("lora", small_dit(), rank=r, targets="all")
    per_block = r * ((d + 3 * d) + (d + d) + (d + 4 * d) + (4 * d + d) + (d + 6 * d))
    final = r * ((d + c) + (d + 2 * d))
    assert model.num_trainable == 3 * per_block + final + 6 * d


@pytest.mark.parametrize(("method", "options"), EVERY)
def test_exactly_the_trainables_train(method, options):
    model = baselines.apply(method, small_dit(torch.float64), **options).train()
    named = dict(model.named_parameters())
    trained = dict(model.named_trainable_parameters())
    assert {n for n, p in named.items() if p.requires_grad} == set(trained) != set()
    before = {n: p.detach().clone() for n, p in named.items()}
    optimizer = torch.optim.SGD(model.trainable_parameters(), lr=1.0)
    for _ in range(2):  # LoRA's A and the adapter's down have no gradient while B and up are zero
        optimizer.zero_grad()
        model(*inputs(torch.float64)).square().mean().backward()
        optimizer.step()
    for name, p in model.named_parameters():
        moved = not torch.equal(p, before[name])
        assert not moved or name in trained, name
        key_bias = name.endswith("qkv.bias")  # the key third never moves, the rest does
        assert moved or name not in trained or key_bias, name
    assert "pos_embed" not in trained and "y_embedder.embedding_table.weight" in trained
    if method not in ("full",):
        assert not any(n.startswith("t_embedder.") and n.endswith("weight") for n in trained)


@pytest.mark.parametrize(("method", "options"), [e for e in EVERY if e[0] != "vpt"])
def test_starts_as_the_pretrained_model(method, options):
    expected = small_dit(torch.float64)(*inputs(torch.float64))
    model = baselines.apply(method, small_dit(torch.float64), **options)
    error = 1e-6 if isinstance(model, FastDiffFitDiT) else 1e-10  # that one is float32
    assert (model(*inputs(torch.float64)) - expected).abs().max() < error * expected.abs().max()
    x, t, y = (torch.cat([v, v]) for v in inputs(torch.float64))
    guided = small_dit(torch.float64).forward_with_cfg(x, t, y, 3.0)
    assert (model.forward_with_cfg(x, t, y, 3.0) - guided).abs().max() < 3 * error * guided.abs().max()


@pytest.mark.parametrize("mode", ["parallel", "sequential"])
def test_adapter_formula(mode):
    model = baselines.apply("adapter", small_dit(torch.float64), bottleneck=4, scale=0.5, mode=mode)
    mlp = model.blocks[1].mlp
    with torch.no_grad():
        for p in mlp.adapter.parameters():
            p.normal_()
    assert {n for n, _ in model.blocks[1].named_parameters() if ".adapter." in n} == {
        "mlp.adapter.down.weight", "mlp.adapter.down.bias", "mlp.adapter.up.weight", "mlp.adapter.up.bias",
    }  # fmt: skip
    h = torch.randn(2, 7, 32, dtype=torch.float64)
    f = mlp.fc2(F.gelu(mlp.fc1(h), approximate="tanh"))
    a = mlp.adapter
    source = h if mode == "parallel" else f
    expected = f + 0.5 * (((source @ a.down.weight.T + a.down.bias).clamp(min=0)) @ a.up.weight.T + a.up.bias)
    assert (mlp(h) - expected).abs().max() < 1e-12 * expected.abs().max()


def test_prompts_are_seen_and_removed():
    base = small_dit(torch.float64)
    model = baselines.apply("vpt", small_dit(torch.float64), tokens=3)
    x, c = torch.randn(2, 16, 32, dtype=torch.float64), torch.randn(2, 32, dtype=torch.float64)
    for before, after in zip(base.blocks, model.blocks, strict=True):
        assert after.prompt.shape == (3, 32)
        expected = before(torch.cat([after.prompt.expand(2, 3, 32), x], 1), c)[:, 3:]
        assert torch.allclose(after(x, c), expected, rtol=0, atol=1e-12)
        assert not torch.allclose(after(x, c), before(x, c), atol=1e-6)
    assert model(*inputs(torch.float64)).shape == (2, 6, 8, 8)


def test_lora_is_a_low_rank_update():
    model = baselines.apply("lora", small_dit(torch.float64), rank=2, alpha=6)
    merged = small_dit(torch.float64)
    with torch.no_grad():
        for block, plain in zip(model.blocks, merged.blocks, strict=True):
            a, b = block.attn.qkv.lora_A["default"].weight, block.attn.qkv.lora_B["default"].weight
            b.normal_(std=0.1)
            plain.attn.qkv.weight += 3 * (b @ a).to(torch.float64)
    expected = merged(*inputs(torch.float64))
    assert (model(*inputs(torch.float64)) - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize(("method", "options"), EVERY)
def test_bf16_base_keeps_trainables_in_float32(method, options):
    model = baselines.apply(method, small_dit(torch.bfloat16), **options).train()
    assert {p.dtype for p in model.trainable_parameters()} == {torch.float32}
    if method not in ("full", "difffit", "bitfit"):
        assert model.blocks[0].attn.proj.weight.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(*inputs())
    out.float().square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.trainable_parameters())
    assert model.y_embedder.embedding_table.weight.grad is not None


@pytest.mark.parametrize(("method", "options"), EVERY)
def test_trainables_through_a_file(method, options, tmp_path):
    torch.manual_seed(3)
    model = baselines.apply(method, small_dit(), **options).eval()
    with torch.no_grad():
        for p in model.trainable_parameters():
            p.add_(0.1 * torch.randn_like(p))
    path = tmp_path / "trained.safetensors"
    baselines.save_trainables(model, path, step=7)
    torch.manual_seed(4)  # other random prompts and A
    other = baselines.apply(method, small_dit(), **options).eval()
    assert not torch.equal(other(*inputs()), model(*inputs()))
    assert baselines.load_trainables(other, path)["step"] == 7
    assert torch.equal(other(*inputs()), model(*inputs()))
    assert path.stat().st_size < 4 * model.num_trainable + 20_000


def test_file_of_another_method_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    baselines.save_trainables(baselines.apply("adapter", small_dit(), bottleneck=4), path)
    model = baselines.apply("vpt", small_dit())
    before = model(*inputs())
    with pytest.raises(DeltaMismatchError, match="is not trained by this model|is missing from the file"):
        baselines.load_trainables(model, path)
    with pytest.raises(DeltaMismatchError, match="has the shape"):
        baselines.load_trainables(baselines.apply("adapter", small_dit(), bottleneck=5), path)
    assert torch.equal(model(*inputs()), before)
    (tmp_path / "b.safetensors").write_bytes(b"nothing")
    with pytest.raises(DiffFitError, match="cannot read"):
        baselines.load_trainables(model, tmp_path / "b.safetensors")


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("lorra", {}, "must be one of full, difffit, .*got 'lorra'"),
        ("lora", {"rank": 0}, "rank must be a whole number of at least 1; got 0"),
        ("lora", {"targets": "q"}, "targets must be one of qkv, all; got 'q'"),
        ("adapter", {"mode": "beside"}, "mode must be one of parallel, sequential"),
        ("adapter", {"bottleneck": 1.5}, "bottleneck must be a whole number"),
        ("vpt", {"tokens": 0}, "tokens must be a whole number of at least 1; got 0"),
        ("difffit", {"gamma_blocks": "some"}, "gamma_blocks must be"),
    ],
)
def test_bad_input_is_named(method, options, message):
    with pytest.raises(DiffFitError, match=message):
        baselines.apply(method, small_dit(), **options)


def test_unknown_option_is_a_type_error():
    with pytest.raises(TypeError, match="ranc"):
        baselines.apply("lora", small_dit(), ranc=8)


def test_missing_peft_names_the_extra(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(DiffFitError, match=r"pip install 'difffit_fast\[peft\]'"):
        baselines.apply("lora", small_dit())


def test_difffit_variants_are_the_fast_model():
    first, last = (baselines.apply("difffit", small_dit(), gamma_blocks=k) for k in (1, -1))
    assert isinstance(first, FastDiffFitDiT)
    assert [b.gamma1 is not None for b in first.blocks] == [True, False, False]
    assert [b.gamma1 is not None for b in last.blocks] == [False, False, True]


def test_trainer_builds_every_method():
    from difffit_fast.train.config import TrainConfig
    from difffit_fast.train.methods import build_model

    for method, options in OPTIONS.items():
        options = {} if method in ("difffit", "bitfit") else options
        config = TrainConfig(
            data_path="nowhere", vae="none", model="DiT-S/8", model_args={"depth": 2, "hidden_size": 32, "num_heads": 2},
            method=method, method_args=options,
        )  # fmt: skip
        with contextlib.nullcontext() if method == "full" else pytest.warns(UserWarning, match="random"):
            model = build_model(config, channels=3, input_size=16, num_classes=4, dtype=torch.float32)
        assert any(p.requires_grad for p in model.parameters())
        if method not in ("full", "difffit", "bitfit"):
            assert model.num_trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
