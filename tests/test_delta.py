"""What trains (exact counts), the delta, the merge and reading checkpoints."""

from __future__ import annotations

import argparse
import copy
import os
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from test_fast_dit import PRESETS, SMALL, batch, shake

from difffit_fast import DiffFitConfig, DiffFitError, DiT, DiT_models, FastDiffFitDiT
from difffit_fast.errors import DeltaMismatchError
from difffit_fast.models.base_hash import base_hashes
from difffit_fast.models.checkpoint import model_of
from difffit_fast.models.delta import read_delta
from difffit_fast.models.merge import merge
from difffit_fast.models.state_dict import read_weights

HEADS = dict(num_heads=3)


# -- counts --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("preset", "count"), [("paper", 832_928), ("minimax", 703_904), ("block", 671_648), ("bitfit", 607_136)]
)
def test_counts_of_the_presets_for_xl2_at_101_classes(preset: str, count: int) -> None:
    with torch.device("meta"):
        model = DiT_models["DiT-XL/2"](num_classes=101)
        fast = FastDiffFitDiT(**model.config, difffit=preset)
    assert fast.num_trainable == count
    assert sum(p.numel() for p in fast.trainable_parameters()) == count


@pytest.mark.parametrize(("classes", "count"), [(10, 728_096), (200, 946_976), (397, 1_173_920), (1000, 1_868_576)])
def test_counts_of_the_paper_preset_for_other_datasets(classes: int, count: int) -> None:
    with torch.device("meta"):
        assert FastDiffFitDiT(num_classes=classes).num_trainable == count


def test_gamma_blocks() -> None:
    def blocks_with_gamma(**kwargs) -> list[int]:
        model = FastDiffFitDiT(**SMALL, difffit=DiffFitConfig(**kwargs))
        return sorted({int(n.split(".")[1]) for n, _ in model.named_trainable_parameters() if "gamma" in n})

    assert blocks_with_gamma() == [0, 1]
    assert blocks_with_gamma(gamma_blocks="all") == [0, 1, 2, 3]
    assert blocks_with_gamma(gamma_blocks=3) == [0, 1, 2]
    assert blocks_with_gamma(gamma_blocks=-1) == [3]
    assert blocks_with_gamma(gamma_blocks=0) == []
    assert blocks_with_gamma(gamma=()) == []


def test_config_errors_and_round_trip() -> None:
    with pytest.raises(DiffFitError, match="one of paper, minimax, block, bitfit; got 'papre'"):
        FastDiffFitDiT(**SMALL, difffit="papre")
    with pytest.raises(DiffFitError, match="gamma sites must be among qkv, proj, attn, mlp; got fc1"):
        DiffFitConfig(gamma=("fc1",))
    with pytest.raises(DiffFitError, match="gamma_blocks"):
        DiffFitConfig(gamma_blocks="third")
    with pytest.raises(DiffFitError, match="unknown DiffFit option 'gamma_block'"):
        DiffFitConfig.resolve({"gamma_block": 3})
    odd = DiffFitConfig(gamma=("mlp",), gamma_blocks=-2, affine_norm=False)
    assert DiffFitConfig.from_json(odd.to_json()) == odd and odd.name == "custom"
    assert DiffFitConfig().name == "paper"


# -- a drop-in -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("preset", PRESETS)
def test_public_state_dict_loads_strictly_and_starts_as_the_base(preset: str) -> None:
    dit = shake(DiT(**SMALL)).eval()
    fast = FastDiffFitDiT(**SMALL, difffit=preset).eval()
    fast.load_state_dict(dit.state_dict())
    inputs = batch()
    torch.testing.assert_close(fast(*inputs), dit(*inputs), rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="unexpected keys: odd.weight"):
        fast.load_state_dict({**dit.state_dict(), "odd.weight": torch.ones(1)})


def test_extra_keys_have_the_names_of_existing_difffit_checkpoints() -> None:
    extra = set(FastDiffFitDiT(**SMALL).state_dict()) - set(DiT(**SMALL).state_dict())
    d = SMALL["hidden_size"]
    shapes = {n: tuple(p.shape) for n, p in FastDiffFitDiT(**SMALL).named_parameters()}
    for i in range(2):
        assert shapes[f"blocks.{i}.attn.gamma1"] == (3 * d,) and shapes[f"blocks.{i}.attn.gamma2"] == (d,)
        assert shapes[f"blocks.{i}.gamma1"] == shapes[f"blocks.{i}.gamma2"] == (d,)
    norms = {f"blocks.{i}.norm{k}.{w}" for i in range(4) for k in (1, 2) for w in ("weight", "bias")}
    norms |= {"final_layer.norm_final.weight", "final_layer.norm_final.bias"}
    gammas = {f"blocks.{i}.{g}" for i in range(2) for g in ("attn.gamma1", "attn.gamma2", "gamma1", "gamma2")}
    assert extra == norms | gammas


# -- merge ---------------------------------------------------------------------------------------------------------
CONFIGS = [*PRESETS, DiffFitConfig(gamma=("qkv", "mlp"), gamma_blocks=-3), DiffFitConfig(gamma=("proj",), bias=False)]


@pytest.mark.parametrize("preset", CONFIGS, ids=str)
def test_merge_equals_run_time_and_loads_anywhere(preset: str | DiffFitConfig) -> None:
    fast = shake(FastDiffFitDiT(**SMALL, difffit=preset)).double().eval()
    inputs = batch(dtype=torch.float64)
    merged = merge(fast, torch.float64)
    torch.testing.assert_close(merged(*inputs), fast(*inputs), rtol=1e-10, atol=1e-10)
    assert type(merged) is DiT and set(merged.state_dict()) == set(DiT(**SMALL).state_dict())
    DiT(**SMALL).load_state_dict(merged.state_dict())
    before = fast.state_dict()["blocks.0.attn.qkv.weight"].clone()
    with torch.no_grad():
        merged.blocks[0].attn.qkv.weight.zero_()
    assert torch.equal(fast.blocks[0].attn.qkv.weight, before), "the merged model shares memory with its source"


def test_merge_in_float32() -> None:
    fast = shake(FastDiffFitDiT(**SMALL)).eval()
    inputs = batch()
    torch.testing.assert_close(fast.merge()(*inputs), fast(*inputs), rtol=1e-3, atol=1e-4)


# -- the delta -----------------------------------------------------------------------------------------------------
def trained(base: DiT, **kwargs) -> FastDiffFitDiT:
    fast = FastDiffFitDiT.from_dit(base, **kwargs)
    with torch.no_grad():
        for p in fast.trainable_parameters():
            p.add_(0.1 * torch.randn_like(p))
    return fast.eval()


def test_delta_round_trip_is_exact_and_small(tmp_path) -> None:
    base = shake(DiT(**SMALL))
    fast = trained(base)
    path = tmp_path / "delta.safetensors"
    fast.save_delta(path, class_names=list("abcde"), step=7)
    assert os.listdir(tmp_path) == ["delta.safetensors"]
    tensors, metadata = read_delta(path)
    assert sum(t.numel() for t in tensors.values()) == fast.num_trainable
    assert path.stat().st_size < 4 * fast.num_trainable + 20_000
    assert metadata["class_names"] == list("abcde") and metadata["step"] == 7 and metadata["config"] == fast.config
    other = FastDiffFitDiT.from_dit(base).eval()
    assert other.load_delta(path)["step"] == 7
    inputs = batch()
    assert torch.equal(other(*inputs), fast(*inputs))


def test_a_delta_of_a_float32_base_loads_onto_the_same_base_in_bf16(tmp_path) -> None:
    base = shake(DiT(**SMALL))
    trained(base).save_delta(tmp_path / "d.safetensors")
    half = FastDiffFitDiT.from_dit(base, compute_dtype=torch.bfloat16)
    half.load_delta(tmp_path / "d.safetensors")
    half.save_delta(tmp_path / "d2.safetensors")
    one, two = (read_delta(tmp_path / n)[0] for n in ("d.safetensors", "d2.safetensors"))
    assert all(torch.equal(one[n], two[n]) for n in one)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(hidden_size=96), "width 48; the model has width 96"),
        (dict(depth=3), "depth 4; the model has depth 3"),
        (dict(num_classes=6), "number of classes 5; the model has number of classes 6"),
        (dict(input_size=16), "input size 8; the model has input size 16"),
        (dict(difffit="block"), "difffit=paper .*; the model has block"),
        (dict(), r"another base: its weights have the hash [0-9a-f]{12}…, the model's [0-9a-f]{12}…"),
    ],
)
def test_a_delta_for_something_else_is_refused_and_changes_nothing(tmp_path, change: dict, message: str) -> None:
    trained(shake(DiT(**SMALL))).save_delta(tmp_path / "d.safetensors")
    other = shake(FastDiffFitDiT(**{**SMALL, **change}))
    before = {n: p.clone() for n, p in other.state_dict().items()}
    with pytest.raises(DeltaMismatchError, match=message):
        other.load_delta(tmp_path / "d.safetensors")
    assert all(torch.equal(p, before[n]) for n, p in other.state_dict().items())


def test_the_base_hash_follows_the_weights(tmp_path) -> None:
    base = shake(DiT(**SMALL))
    fast = trained(base)
    fast.save_delta(tmp_path / "d.safetensors")
    with torch.no_grad():
        fast.blocks[3].mlp.fc2.weight[0, 0] += 1
    with pytest.raises(DeltaMismatchError, match="base"):
        fast.load_delta(tmp_path / "d.safetensors")


FROZEN_BIASES = DiffFitConfig(bias=False)
FROZEN_CLASSES = DiffFitConfig(class_embedding=False)
# What a delta builds on and does not hold: a configuration, and the parameter that another base has otherwise.
BUILT_ON = {
    "weights": ("paper", "blocks.3.mlp.fc2.weight"),
    "biases of the timestep embedding": ("paper", "t_embedder.mlp.0.bias"),
    "biases": (FROZEN_BIASES, "blocks.1.attn.proj.bias"),
    "classes": (FROZEN_CLASSES, "y_embedder.embedding_table.weight"),
    "positions": ("paper", "pos_embed"),
}
# What it replaces: these may differ.
REPLACED = {
    "biases": ("paper", "blocks.1.attn.proj.bias"),
    "biases of the timestep embedding": ("bitfit", "t_embedder.mlp.0.bias"),
    "classes": (FROZEN_BIASES, "y_embedder.embedding_table.weight"),
}


def base_and_another(name: str) -> tuple[DiT, DiT]:
    one = shake(DiT(**SMALL)).eval()
    other = DiT(**SMALL).eval()
    other.load_state_dict(one.state_dict())
    with torch.no_grad():
        other.get_parameter(name).add_(0.3 * torch.randn_like(other.get_parameter(name)))
    return one, other


@pytest.mark.parametrize("what", BUILT_ON)
def test_another_base_is_refused_by_whatever_the_delta_does_not_hold(tmp_path, what: str) -> None:
    difffit, name = BUILT_ON[what]
    one, other = base_and_another(name)
    fast = trained(one, difffit=difffit)
    fast.save_delta(tmp_path / "d.safetensors")
    again = FastDiffFitDiT.from_dit(one, difffit=difffit).eval()
    again.load_delta(tmp_path / "d.safetensors")
    assert torch.equal(again(*(inputs := batch())), fast(*inputs))
    with pytest.raises(DeltaMismatchError, match=f"another base: its {what.split()[0]} have the hash"):
        FastDiffFitDiT.from_dit(other, difffit=difffit).load_delta(tmp_path / "d.safetensors")


@pytest.mark.parametrize("what", REPLACED)
def test_what_the_delta_replaces_may_differ(tmp_path, what: str) -> None:
    difffit, name = REPLACED[what]
    one, other = base_and_another(name)
    fast = trained(one, difffit=difffit)
    fast.save_delta(tmp_path / "d.safetensors")
    again = FastDiffFitDiT.from_dit(other, difffit=difffit).eval()
    again.load_delta(tmp_path / "d.safetensors")
    assert torch.equal(again(*(inputs := batch())), fast(*inputs))


def test_a_sine_cosine_table_is_known_by_its_scale(tmp_path) -> None:
    """Computed elsewhere, or stored in half precision, it is the same."""
    one = DiT(**SMALL)
    with torch.no_grad():
        for name, p in one.named_parameters():
            p.add_(0.1 * torch.randn_like(p) * (name != "pos_embed"))
    trained(one).save_delta(tmp_path / "d.safetensors")
    assert "positions" not in read_delta(tmp_path / "d.safetensors")[1]["base_hashes"]
    with torch.no_grad():
        one.pos_embed.copy_(one.pos_embed.bfloat16())
    FastDiffFitDiT.from_dit(one).load_delta(tmp_path / "d.safetensors")
    with torch.no_grad():
        one.pos_embed.mul_(1.1)
    with pytest.raises(DeltaMismatchError, match="another base: its positions have the hash none"):
        FastDiffFitDiT.from_dit(one).load_delta(tmp_path / "d.safetensors")


def stored(base: DiT, dtype: torch.dtype | None) -> DiT:
    """As it comes out of a file in ``dtype``, in float32."""
    twin = DiT(**SMALL)
    twin.load_state_dict(base.state_dict())
    return twin if dtype is None else twin.to(dtype).float()


F16, BF16 = torch.float16, torch.bfloat16
ROUNDINGS = [  # stored and computed by whom the delta is made, by whom it is used; whether that is said
    ((None, None), (F16, None), True),
    ((F16, None), (None, None), True),
    ((None, None), (None, F16), True),
    ((F16, None), (F16, F16), False),
    ((None, None), (BF16, None), False),
    ((BF16, None), (None, BF16), False),
    ((None, BF16), (F16, None), None),
    ((BF16, None), (F16, None), None),
]


@pytest.mark.parametrize(("made", "used", "said"), ROUNDINGS)
def test_a_base_stored_or_held_in_half_precision_is_told_from_another(tmp_path, made, used, said) -> None:
    """Rounded to float16 in one of the two: known, and said. Rounded to float16 in one and to bfloat16 in the other: refused,
    since neither follows from the other (said: None)."""
    base = shake(DiT(**SMALL))
    trained(stored(base, made[0]), compute_dtype=made[1]).save_delta(tmp_path / "d.safetensors")
    model = FastDiffFitDiT.from_dit(stored(base, used[0]), compute_dtype=used[1])
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        if said is None:
            with pytest.raises(DeltaMismatchError, match="another base: its weights"):
                model.load_delta(tmp_path / "d.safetensors")
        else:
            model.load_delta(tmp_path / "d.safetensors")
    assert any("rounded to float16 in one of the two" in str(w.message) for w in heard) == bool(said)


def without_hashes(path) -> None:
    """The delta as earlier versions wrote it."""
    with safe_open(path, "pt") as file:
        strings = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    del strings["base_hashes"]
    save_file(tensors, path, strings)


def test_a_delta_of_an_earlier_version_is_checked_as_it_was_and_that_is_said(tmp_path) -> None:
    one, other = base_and_another("blocks.3.mlp.fc2.weight")
    fast = trained(one)
    fast.save_delta(path := tmp_path / "d.safetensors")
    without_hashes(path)
    again = FastDiffFitDiT.from_dit(one).eval()
    with pytest.warns(
        UserWarning, match="the weights of its base only: whether its biases and positions are the model's"
    ):
        again.load_delta(path)
    assert torch.equal(again(*(inputs := batch())), fast(*inputs))
    with pytest.raises(DeltaMismatchError, match="another base: its weights have"):
        FastDiffFitDiT.from_dit(other).load_delta(path)


@pytest.mark.parametrize("hashes", ['{"weights": "ab"}', '{"weights": ["ab"]}', '{"weights": [1, 2]}', "[]", '"ab"'])
def test_hashes_that_are_none_are_refused_in_one_sentence(tmp_path, hashes: str) -> None:
    fast = trained(shake(DiT(**SMALL)))
    fast.save_delta(path := tmp_path / "d.safetensors")
    with safe_open(path, "pt") as file:
        strings = {**file.metadata(), "base_hashes": hashes}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    save_file(tensors, path, strings)
    with pytest.raises(DiffFitError, match="base_hashes in its metadata should be"):
        fast.load_delta(path)


def test_the_hash_sees_what_leaves_no_other_trace() -> None:
    fast = FastDiffFitDiT.from_dit(shake(DiT(**SMALL)))
    before = base_hashes(fast)
    assert base_hashes(fast) is before, "computed once"
    for write in (
        lambda p: p.data.add_(0.5),
        lambda p: p.data[0].mul_(1.5),
        lambda p: p.data.copy_(p.data.flip(0)),
        lambda p: setattr(p, "data", p.data * 3),
    ):
        write(fast.blocks[1].attn.qkv.weight)
        after = base_hashes(fast)
        assert after["weights"][0] != before["weights"][0] and after["biases"] == before["biases"]
        before = after


def test_a_delta_does_not_depend_on_what_requires_gradients(tmp_path) -> None:
    """An average, say, is a copy without gradients."""
    fast = trained(shake(DiT(**SMALL)))
    fast.save_delta(tmp_path / "one.safetensors")
    average = copy.deepcopy(fast).requires_grad_(False)
    average.save_delta(tmp_path / "two.safetensors")
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    average.load_delta(tmp_path / "one.safetensors")


def test_delta_errors(tmp_path) -> None:
    fast = FastDiffFitDiT(**SMALL)
    with pytest.raises(DiffFitError, match="delta not found"):
        fast.load_delta(tmp_path / "none.safetensors")
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    with pytest.raises(DiffFitError, match="cannot be used as a delta: cannot read"):
        fast.load_delta(tmp_path / "junk.safetensors")
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(DiffFitError, match="is not a delta of difffit_fast"):
        fast.load_delta(tmp_path / "other.safetensors")
    with pytest.raises(DiffFitError, match="folder for the delta does not exist"):
        fast.save_delta(tmp_path / "no" / "d.safetensors")
    with pytest.raises(DiffFitError, match="class_names must name 5 classes; got 2"):
        fast.save_delta(tmp_path / "d.safetensors", class_names=["a", "b"])
    with pytest.raises(DiffFitError, match="exactly the trainable parameters"):
        fast.save_delta(tmp_path / "d.safetensors", tensors={"odd": torch.ones(1)})
    assert not (tmp_path / "d.safetensors").exists()


HOSTILE = {
    "a frozen weight": ({"blocks.0.attn.qkv.weight": torch.zeros(144, 48)}, "qkv.weight is not trained by this model"),
    "the positions": ({"pos_embed": torch.zeros(1, 16, 48)}, "pos_embed is not trained by this model"),
    "NaN": ({"blocks.0.mlp.fc1.bias": torch.full((192,), torch.nan)}, "fc1.bias holds 192 of 192 values that are NaN"),
    "infinity": ({"blocks.0.gamma1": torch.full((48,), torch.inf)}, "gamma1 holds 48 of 48 values"),
    "integers": ({"blocks.0.gamma1": torch.ones(48, dtype=torch.int32)}, "gamma1 is int32; weights must be"),
    "booleans": ({"blocks.0.gamma1": torch.ones(48, dtype=torch.bool)}, "gamma1 is bool; weights must be"),
    "another shape": ({"blocks.0.gamma1": torch.ones(1)}, r"gamma1 has the shape \(1,\), the model \(48,\)"),
    "one too few": ({"blocks.0.gamma1": None}, "blocks.0.gamma1 is missing from the file"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_delta_holds_exactly_the_trainables_floating_and_finite(name: str, tmp_path) -> None:
    changes, message = HOSTILE[name]
    model = FastDiffFitDiT.from_dit(shake(DiT(**SMALL)))
    model.save_delta(tmp_path / "d.safetensors")
    with safe_open(tmp_path / "d.safetensors", "pt") as file:
        strings = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    tensors = {key: value for key, value in {**tensors, **changes}.items() if value is not None}
    save_file(tensors, tmp_path / "d.safetensors", strings)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(DiffFitError, match=message):
        model.load_delta(tmp_path / "d.safetensors")
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


# -- checkpoints ---------------------------------------------------------------------------------------------------
def test_every_kind_of_checkpoint_file(tmp_path) -> None:
    state, ema = DiT(**SMALL).state_dict(), shake(DiT(**SMALL)).state_dict()
    args = argparse.Namespace(model="DiT-S/2", lr=1e-4)
    torch.save(state, tmp_path / "bare.pt")
    torch.save({"ema": ema, "model": state, "opt": {}, "args": args}, tmp_path / "train.pt")
    torch.save({"model": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "ddp.pt")
    save_file(state, tmp_path / "s.safetensors")
    for name, want in (("bare.pt", state), ("train.pt", ema), ("ddp.pt", state), ("s.safetensors", state)):
        got = read_weights(tmp_path / name).state
        assert set(got) == set(want) and all(torch.equal(got[k], want[k]) for k in want), name
    assert torch.equal(read_weights(tmp_path / "train.pt", "model").state["pos_embed"], state["pos_embed"])
    model = FastDiffFitDiT.from_pretrained(tmp_path / "train.pt", **HEADS)
    assert model.config == DiT(**SMALL).config
    torch.testing.assert_close(model.blocks[1].mlp.fc1.weight.data, ema["blocks.1.mlp.fc1.weight"])


@pytest.mark.parametrize("name", sorted(DiT_models))
def test_sizes_are_inferred_for_all_twelve(name: str) -> None:
    with torch.device("meta"):
        model = DiT_models[name](input_size=32, num_classes=10, learn_sigma=name.startswith("DiT-XL"))
    assert model_of(dict(model.state_dict())).config == model.config  # a plain dictionary carries no record


def test_new_class_count_remakes_the_table_keeps_the_null_class_and_says_so(tmp_path) -> None:
    dit = shake(DiT(**SMALL))
    torch.save(dit.state_dict(), tmp_path / "c.pt")
    with pytest.warns(UserWarning, match="has 5 classes and 9 were asked for: the class embedding is made anew"):
        model = FastDiffFitDiT.from_pretrained(tmp_path / "c.pt", num_classes=9, **HEADS)
    table = model.y_embedder.embedding_table.weight
    assert table.shape[0] == 10 and model.num_classes == 9
    assert torch.equal(table[9], dit.y_embedder.embedding_table.weight[5])
    assert table[:9].std().item() == pytest.approx(0.02, rel=0.2)


def test_another_image_size_scales_the_coordinates(tmp_path) -> None:
    torch.save(DiT(**SMALL).state_dict(), tmp_path / "c.pt")  # latents of 8: 64 pixels
    scaled = FastDiffFitDiT.from_pretrained(tmp_path / "c.pt", image_size=128, **HEADS)
    native = FastDiffFitDiT.from_pretrained(tmp_path / "c.pt", image_size=128, pos_embed="native", **HEADS)
    small = DiT(**SMALL).pos_embed.view(4, 4, -1)
    assert scaled.input_size == 16 and scaled.pos_embed_scale == 0.5 and native.pos_embed_scale == 1.0
    torch.testing.assert_close(scaled.pos_embed.view(8, 8, -1)[::2, ::2], small)
    torch.testing.assert_close(native.pos_embed.view(8, 8, -1)[:4, :4], small)
    scaled.save_delta(tmp_path / "d.safetensors")
    with pytest.raises(DeltaMismatchError, match=r"scaled by 0.5; the model has 1.0"):
        native.load_delta(tmp_path / "d.safetensors")
    for size, message in ((100, "multiple of 16"), (0, "multiple of 16"), ((128, 64), "images are square")):
        with pytest.raises(DiffFitError, match=message):
            FastDiffFitDiT.from_pretrained(tmp_path / "c.pt", image_size=size, **HEADS)


def test_checkpoint_errors(tmp_path) -> None:
    with pytest.raises(DiffFitError, match="checkpoint not found"):
        read_weights(tmp_path / "none.pt")
    (tmp_path / "junk.pt").write_bytes(b"junk")
    with pytest.raises(DiffFitError, match="cannot read checkpoint"):
        read_weights(tmp_path / "junk.pt")
    torch.save({"conv.weight": torch.ones(2)}, tmp_path / "other.pt")
    with pytest.raises(DiffFitError, match=r"is not a DiT: .*it has conv.weight"):
        read_weights(tmp_path / "other.pt")
    torch.save(dict(DiT(**SMALL).state_dict()), tmp_path / "c.pt")
    with pytest.raises(DiffFitError, match="a DiT of width 48, which is none of the published sizes"):
        FastDiffFitDiT.from_pretrained(tmp_path / "c.pt")
