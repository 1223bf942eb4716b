"""Many deltas on one base: each sample of a batch wears its own."""

from __future__ import annotations

import contextlib
import copy
import re
from pathlib import Path

import pytest
import torch
from optest import rooms
from safetensors.torch import load_file
from test_fast_dit import SMALL, shake
from torch import Tensor, nn

from difffit_fast import DiffFitError, DiT, FastDiffFitDiT
from difffit_fast.errors import DeltaMismatchError
from difffit_fast.models.adapt import TABLE
from difffit_fast.models.deltas import OWN
from difffit_fast.ops import use_kernels

BASE = {**SMALL, "num_classes": 6}
CLASSES = {"food": 3, "art": 9, "birds": 6, "cars": 2, "glyphs": 5, "maps": 4, "toys": 7, "trees": 6}
WORN = ["food", None, "art", "birds", "food", "cars", None, "glyphs", "maps", "toys", "trees"]


def base_dit() -> DiT:
    torch.manual_seed(5)
    return shake(DiT(**BASE))


def make_delta(dit: DiT, path: Path, classes: int, seed: int, preset: str = "paper", **kwargs) -> Path:
    """A delta that was trained, as far as anyone can see."""
    with pytest.warns() if classes != dit.num_classes else contextlib.nullcontext():
        model = FastDiffFitDiT.from_dit(dit, num_classes=classes, difffit=preset)
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.trainable_parameters():
            p.add_(0.1 * torch.randn_like(p))
    model.save_delta(path, **kwargs)
    return path


@pytest.fixture(scope="module")
def dit() -> DiT:
    return base_dit()


@pytest.fixture(scope="module")
def paths(dit: DiT, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("deltas")
    return {name: make_delta(dit, folder / f"{name}.safetensors", n, i) for i, (name, n) in enumerate(CLASSES.items())}


def mixed_batch(worn: list[str | None], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(11)
    n = len(worn)
    x = torch.randn(n, 4, BASE["input_size"], BASE["input_size"], dtype=torch.float64).to(dtype)
    classes = [BASE["num_classes"] if name is None else CLASSES[name] for name in worn]
    y = torch.tensor([int(torch.randint(0, c + 1, ())) for c in classes])  # the null class among them
    return x, torch.randint(0, 1000, (n,)), y


def separate(dit: DiT, paths: dict[str, Path], name: str | None, **kwargs) -> FastDiffFitDiT:
    if name is None:
        return FastDiffFitDiT.from_dit(dit, **kwargs)
    with pytest.warns() if CLASSES[name] != dit.num_classes else contextlib.nullcontext():
        model = FastDiffFitDiT.from_dit(dit, num_classes=CLASSES[name], **kwargs)
    model.load_delta(paths[name])
    return model


def error(value: Tensor, true: Tensor) -> float:
    return float((value.double() - true).abs().max() / true.abs().max())


# -- numbers -----------------------------------------------------------------------------------------------------------
def truth(
    dit: DiT, paths: dict[str, Path], worn: list[str | None], loss: Tensor
) -> tuple[Tensor, dict[str, dict[str, Tensor]]]:
    """Output and gradients of every delta's parameters, each sample by a model of its own, in float64."""
    x, t, y = mixed_batch(worn, torch.float64)
    grads: dict[str, dict[str, Tensor]] = {}
    rows = {}
    for name in dict.fromkeys(worn):
        model = separate(dit.double(), paths, name).double().eval()
        at = torch.tensor([i for i, other in enumerate(worn) if other == name])
        part = model(x[at], t[at], y[at])
        (part * loss.double()[at]).sum().backward()
        rows |= dict(zip(at.tolist(), part.detach(), strict=True))
        if name is not None:
            grads[name] = {n: p.grad for n, p in model.named_trainable_parameters() if p.grad is not None}
    dit.float()
    return torch.stack([rows[i] for i in range(len(worn))]), grads


def by_name(model: FastDiffFitDiT, name: str) -> dict[str, Tensor]:
    delta = model.deltas[name]
    assert delta.vectors.grad is not None and delta.classes.grad is not None and model.deltas.layout is not None
    return {**model.deltas.layout.unflatten(delta.vectors.grad), TABLE: delta.classes.grad}


@pytest.mark.parametrize("room", rooms())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_of_eight_deltas_and_none_is_eight_models_and_the_base(
    dit: DiT, paths: dict[str, Path], dtype: torch.dtype, room: str
) -> None:
    with use_kernels(room):
        check_eight_deltas_and_none(dit, paths, dtype)


def check_eight_deltas_and_none(dit: DiT, paths: dict[str, Path], dtype: torch.dtype) -> None:
    x, t, y = mixed_batch(WORN)
    compute = None if dtype == torch.float32 else dtype
    model = FastDiffFitDiT.from_dit(dit, compute_dtype=compute).eval()
    model.load_deltas(paths)
    for name in paths:
        model.deltas[name].requires_grad_()
    loss = torch.randn(len(x), model.out_channels, *x.shape[2:])
    true, grads = truth(dit, paths, WORN, loss)
    out = model(x, t, y, delta=WORN)
    (out * loss).sum().backward()
    single, own = {}, {}
    for name in dict.fromkeys(WORN):  # what the path of one model reaches in this dtype
        one = separate(dit, paths, name, compute_dtype=compute).eval()
        at = torch.tensor([i for i, other in enumerate(WORN) if other == name])
        part = one(x[at], t[at], y[at])
        (part * loss[at]).sum().backward()
        single |= dict(zip(at.tolist(), part.detach(), strict=True))
        own[name] = {n: p.grad for n, p in one.named_trainable_parameters()}
    whole = torch.stack([single[i] for i in range(len(WORN))])
    allowed = 1e-6 if compute is None else 1.5 * error(whole, true)
    for i in range(len(WORN)):
        assert error(out[i], true[i]) < 4 * allowed
    assert error(out, true) < allowed
    assert all(p.grad is None for n, p in model.named_parameters() if not n.startswith("deltas."))
    for name, wanted in grads.items():
        found = by_name(model, name)
        assert set(found) == set(wanted)
        for key, true_grad in wanted.items():
            reached = error(own[name][key], true_grad) if true_grad.any() else 0
            assert error(found[key], true_grad) < max(1e-5, 1.5 * reached + (0 if compute is None else 0.02)), (
                name,
                key,
            )


def test_the_gradient_of_a_delta_that_nobody_wears_is_zero_and_twice_is_the_same_bits(
    dit: DiT, paths: dict[str, Path]
) -> None:
    model = FastDiffFitDiT.from_dit(dit).train()
    model.load_deltas(paths)
    for name in paths:
        model.deltas[name].requires_grad_()
    worn = ["art", "food", "art", None, "art"]
    found = []
    for _ in range(2):
        model.zero_grad()
        torch.manual_seed(3)  # of the dropped labels
        model(*mixed_batch(worn), delta=worn).square().sum().backward()
        found.append({n: p.grad.clone() for n, p in model.deltas.named_parameters()})
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])
    for name in paths:
        assert bool(by_name(model, name)["blocks.1.mlp.fc1.bias"].any()) == (name in worn)
        assert bool(by_name(model, name)[TABLE].any()) == (name in worn)


@pytest.mark.parametrize("preset", ["paper", "minimax", "block", "bitfit"])
@pytest.mark.parametrize("compute", [None, torch.bfloat16])
def test_one_delta_for_all_is_that_model_bit_for_bit(
    dit: DiT, tmp_path: Path, preset: str, compute: torch.dtype | None
) -> None:
    path = make_delta(dit, tmp_path / "art.safetensors", 9, 1, preset)
    with pytest.warns():
        one = FastDiffFitDiT.from_dit(dit, num_classes=9, difffit=preset, compute_dtype=compute)
    one.load_delta(path)
    model = FastDiffFitDiT.from_dit(dit, difffit=preset, compute_dtype=compute)
    model.load_deltas({"art": path})
    x, t, _ = mixed_batch(["art"] * 4)
    y = torch.tensor([0, 8, 4, 9])
    for worn in ("art", ["art"] * 4):
        assert torch.equal(model.eval()(x, t, y, delta=worn), one.eval()(x, t, y))
        torch.manual_seed(2)
        dropped = one.train()(x, t, y)
        torch.manual_seed(2)
        assert torch.equal(model.train()(x, t, y, delta=worn), dropped)
    torch.manual_seed(0)
    base = FastDiffFitDiT.from_dit(dit, difffit=preset, compute_dtype=compute).eval()
    inputs = mixed_batch([None] * 4)
    assert torch.equal(model.eval()(*inputs, delta=None), base(*inputs))
    assert torch.equal(model(*inputs), base(*inputs))  # its own parameters are what they were


@pytest.mark.parametrize("gamma_blocks", [0, 1, -1, "all"])
@pytest.mark.parametrize("gamma", [("qkv",), ("proj", "mlp"), ("attn",), ("qkv", "proj", "attn", "mlp")])
@pytest.mark.parametrize("more", [{}, {"bias": False}, {"affine_norm": False, "time_embedder_bias": True}])
def test_every_set_of_trainables(dit: DiT, tmp_path: Path, gamma: tuple, gamma_blocks: int | str, more: dict) -> None:
    config = {"gamma": gamma, "gamma_blocks": gamma_blocks, **more}
    names = {name: make_delta(dit, tmp_path / f"{name}.safetensors", 6, i, config) for i, name in enumerate("ab")}
    model = FastDiffFitDiT.from_dit(dit, difffit=config).eval()
    model.load_deltas(names)
    worn = ["a", None, "b"]
    x, t, y = mixed_batch([None] * 3)
    out = model(x, t, y, delta=worn)
    for i, name in enumerate(worn):
        one = FastDiffFitDiT.from_dit(dit, difffit=config).eval()
        if name is not None:
            one.load_delta(names[name])
        alone = one(x[i : i + 1], t[i : i + 1], y[i : i + 1])[0]
        torch.testing.assert_close(out[i], alone, rtol=1e-4, atol=1e-5)


# -- strength ----------------------------------------------------------------------------------------------------------
def test_strength_goes_from_the_base_to_the_delta_and_beyond(dit: DiT, paths: dict[str, Path]) -> None:
    model = FastDiffFitDiT.from_dit(dit).eval()
    model.load_deltas(paths)
    x, t, _ = mixed_batch(["birds"] * 3)
    y = torch.tensor([0, 5, 6])
    base, full = model(x, t, y, delta=None), model(x, t, y, delta="birds")
    assert torch.equal(
        model(x, t, y, delta="birds", strength=0), base
    )  # birds has as many classes: each goes with its number
    assert torch.equal(model(x, t, y, delta="birds", strength=1), full)
    assert torch.equal(model(x, t, y, delta="birds", strength={"birds": 0.0}), base)
    mixed = ["birds", "trees", "birds"]
    each = model(x, t, y, delta=mixed, strength=[0.0, 1.0, 0.4])
    assert torch.equal(model(x, t, y, delta=mixed, strength=0), model(x, t, y, delta=torch.tensor([-1, -1, -1])))
    nobody = model(x, t, y, delta=torch.tensor([-1, -1, -1]))
    assert torch.equal(model(x, t, y, delta=mixed, strength={"birds": 0.0, "trees": 0.0}), nobody)
    for s in (0.4, 1.7, -0.5):
        moved = copy.deepcopy(dit).double()
        want = FastDiffFitDiT.from_dit(moved)
        state = load_file(paths["birds"])
        with torch.no_grad():
            for name, p in want.named_trainable_parameters():
                p.add_(s * (state[name].double() - p))
        found = model(x, t, y, delta="birds", strength=s)
        true = want.double().eval()(x.double(), t, y)
        assert error(found, true) < 1e-6
        merged = model.merge(delta="birds", strength=s).eval()
        assert error(merged(x, t, y), true) < 1e-5
        assert error(model(x, t, y, delta=["birds"] * 3, strength=torch.tensor([s, s, s])), true) < 1e-6
    with torch.no_grad():
        want = model(x, t, y, delta="birds", strength=0.4)
    assert error(each[2:], want[2:].double()) < 1e-6


def test_a_class_that_the_base_does_not_know_goes_with_its_null_class(dit: DiT, paths: dict[str, Path]) -> None:
    model = FastDiffFitDiT.from_dit(dit).eval()
    model.load_deltas(paths)
    x, t, _ = mixed_batch(["food"] * 4)
    nothing = torch.full((4,), BASE["num_classes"])
    for y in (torch.tensor([0, 1, 2, 3]),):
        assert torch.equal(model(x, t, y, delta="food", strength=0), model(x, t, nothing, delta=None))


def test_classes_of_one_name_go_together(dit: DiT, tmp_path: Path) -> None:
    names = ["ant", "bee", "cat", "dog", "eel", "fox"]
    known = FastDiffFitDiT.from_dit(dit, class_names=names)
    base = FastDiffFitDiT.from_dit(dit, class_names=names).merge()
    base.classes = known.classes
    with pytest.warns(UserWarning, match="1 new"):
        model = FastDiffFitDiT.from_dit(base, class_names=["fox", "gnu"])
    model.save_delta(tmp_path / "a.safetensors")
    serving = FastDiffFitDiT.from_dit(base).eval()
    serving.load_deltas({"a": tmp_path / "a.safetensors"})
    assert serving.deltas["a"].base_rows.tolist() == [5, 6, 6]
    x, t, _ = mixed_batch([None] * 3)
    found = serving(x, t, torch.tensor([0, 1, 2]), delta="a", strength=0)
    assert torch.equal(found, serving(x, t, torch.tensor([5, 6, 6]), delta=None))


def test_merge_takes_a_strength(dit: DiT, paths: dict[str, Path]) -> None:
    one = separate(dit, paths, "birds").eval()
    x, t, y = mixed_batch(["birds"] * 3)
    assert error(one.merge(strength=0).eval()(x, t, y), dit.eval()(x, t, y).double()) < 1e-6
    assert error(one.merge(strength=1).eval()(x, t, y), one(x, t, y).double()) < 1e-5
    many = FastDiffFitDiT.from_dit(dit).eval()
    many.load_deltas(paths)
    art = many.merge(delta="art")
    assert art.num_classes == 9
    x, t, y = mixed_batch(["art"] * 3)
    assert error(art.eval()(x, t, y), many(x, t, y, delta="art").double()) < 1e-5
    with pytest.raises(DiffFitError, match="strength must be finite; got nan"):
        many.merge(strength=float("nan"))


# -- the base ----------------------------------------------------------------------------------------------------------
def test_the_base_is_what_it_was_before_any_delta(dit: DiT, paths: dict[str, Path]) -> None:
    x, t, y = mixed_batch([None] * 3)
    want = dit.eval()(x, t, y)
    for model in (separate(dit, paths, "art"), separate(dit, paths, "birds")):
        model.load_deltas({"food": paths["food"]})
        torch.testing.assert_close(model.eval()(x, t, y, delta=None), want, rtol=1e-4, atol=1e-5)
    made = FastDiffFitDiT(**BASE)
    made.load_state_dict(dit.state_dict())
    made.load_delta(paths["birds"])  # the first one: what was there is the base
    made.load_deltas({"food": paths["food"]})
    torch.testing.assert_close(made.eval()(x, t, y, delta=None), want, rtol=1e-4, atol=1e-5)


def test_a_base_that_cannot_be_told_is_an_error(dit: DiT, paths: dict[str, Path]) -> None:
    made = FastDiffFitDiT(**BASE)
    made.load_state_dict(dit.state_dict())
    with torch.no_grad():
        made.blocks[0].gamma1.add_(0.5)
    with pytest.raises(DiffFitError, match="the base cannot be told from what was trained on it"):
        made.load_deltas({"food": paths["food"]})
    assert made.deltas.names == []


def test_other_weights_are_another_base(dit: DiT, paths: dict[str, Path]) -> None:
    model = FastDiffFitDiT.from_dit(dit).eval()
    model.load_deltas({"birds": paths["birds"]})
    other = shake(DiT(**BASE))
    with pytest.warns(UserWarning, match=r"another base is loaded: its deltas \(birds\) are dropped"):
        model.load_state_dict(other.state_dict())
    assert model.deltas.names == []
    with pytest.raises(DeltaMismatchError, match="made on another base"):
        model.load_deltas({"birds": paths["birds"]})
    model.add_delta("new")
    x, t, y = mixed_batch([None] * 3)
    torch.testing.assert_close(model(x, t, y, delta=None), other.eval()(x, t, y), rtol=1e-4, atol=1e-5)


# -- coming and going ----------------------------------------------------------------------------------------------------
def test_load_replace_drop_and_save_again(dit: DiT, paths: dict[str, Path], tmp_path: Path) -> None:
    model = FastDiffFitDiT.from_dit(dit).eval()
    said = model.load_deltas({"a": paths["art"], "v1.5": paths["birds"]})
    assert model.deltas.names == ["a", "v1.5"] and said["a"]["config"]["num_classes"] == 9
    x, t, y = mixed_batch([None] * 2)
    first = model(x, t, y, delta=["a", "v1.5"])
    model.load_deltas({"a": paths["trees"]})
    second = model(x, t, y, delta=["a", "v1.5"])
    assert model.deltas.names == ["a", "v1.5"]
    assert not torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    model.save_delta(tmp_path / "again.safetensors", delta="v1.5", step=7)
    for key, value in load_file(paths["birds"]).items():
        assert torch.equal(load_file(tmp_path / "again.safetensors")[key], value)
    one = FastDiffFitDiT.from_dit(dit).eval()
    assert one.load_delta(tmp_path / "again.safetensors")["step"] == 7
    assert torch.equal(one(x, t, y), model(x, t, y, delta="v1.5"))
    model.drop_delta("a")
    assert model.deltas.names == ["v1.5"] and "a" not in model.deltas
    assert torch.equal(model(x, t, y, delta=["v1.5", None])[0], model(x, t, y, delta=torch.tensor([0, -1]))[0])


def test_state_dict_copies_and_pickles_carry_them(dit: DiT, paths: dict[str, Path], tmp_path: Path) -> None:
    model = FastDiffFitDiT.from_dit(dit).eval()
    public = set(model.state_dict())
    model.load_deltas(paths)
    inputs = mixed_batch(WORN)
    want = model(*inputs, delta=WORN)
    assert set(model.state_dict()) - public == {
        f"deltas.delta_{n}.{part}" for n in paths for part in ("vectors", "classes")
    }
    assert torch.equal(copy.deepcopy(model)(*inputs, delta=WORN), want)
    torch.save(model, tmp_path / "model.pt")
    assert torch.equal(torch.load(tmp_path / "model.pt", weights_only=False)(*inputs, delta=WORN), want)
    again = FastDiffFitDiT.from_dit(dit).eval()
    with pytest.raises(RuntimeError, match="unexpected keys: deltas"):
        again.load_state_dict(model.state_dict())
    for name in paths:
        again.add_delta(name, num_classes=CLASSES[name], classes="new" if CLASSES[name] != 6 else "match")
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(*inputs, delta=WORN), want)
    with pytest.raises(RuntimeError, match="missing keys: deltas"):  # these deltas would be another base's
        again.load_state_dict(dit.state_dict())
    half = copy.deepcopy(model).double()
    assert half(inputs[0].double(), *inputs[1:], delta=WORN).dtype == torch.float64
    assert sum(p.numel() for p in model.trainable_parameters()) == FastDiffFitDiT.from_dit(dit).num_trainable
    assert set(model.merge().state_dict()) == set(dit.state_dict())


def test_new_deltas_are_trained_side_by_side(dit: DiT) -> None:
    model = FastDiffFitDiT.from_dit(dit)
    model.add_delta("a")
    with pytest.warns(UserWarning, match="the delta 'b': classes: 2 new"):
        model.add_delta("b", num_classes=2)
    inputs = *mixed_batch([None] * 6)[:2], torch.tensor([0, 1, 0, 1, 5, 0])
    worn = ["a", "b", "b", "b", "a", None]
    torch.testing.assert_close(model.eval()(*inputs, delta="a"), dit.eval()(*inputs), rtol=1e-4, atol=1e-5)
    optimizer = torch.optim.AdamW(model.deltas.parameters(), lr=3e-3, weight_decay=0)
    before = {n: p.clone() for n, p in model.named_parameters()}
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(*inputs, delta=worn).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    for name, p in model.named_parameters():
        assert torch.equal(before[name], p) != name.startswith("deltas.")


# -- compiled, and what cannot be looked at ------------------------------------------------------------------------------
def test_compiled_without_a_compilation_for_each_mixture(dit: DiT, paths: dict[str, Path]) -> None:
    model = FastDiffFitDiT.from_dit(dit).eval()
    model.load_deltas(paths)
    compilations = 0

    def backend(graph, inputs):
        nonlocal compilations
        compilations += 1
        return graph

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for worn in (WORN, WORN[::-1], ["art"] * len(WORN), [None] * len(WORN)):
        inputs = mixed_batch(worn)
        index = model.deltas.index(worn)
        with torch.no_grad():
            assert torch.equal(compiled(*inputs, delta=index), model(*inputs, delta=index))
            strength = torch.linspace(0, 1.5, len(worn))
            assert index.shape == strength.shape
    assert compilations == 1
    inputs = mixed_batch(WORN)
    odd = inputs[2].clone()
    odd[0] = 4  # food has three classes and the null class
    with torch.no_grad(), pytest.raises(RuntimeError, match="a class label is none of its delta's"):
        compiled(*inputs[:2], odd, delta=model.deltas.index(WORN))


# -- bad input -----------------------------------------------------------------------------------------------------------
BAD = {
    "there is no delta 'foot'; the nearest is 'food'": dict(delta="foot"),
    "there is no delta 'arts'; the nearest is 'art'": dict(delta=["food", "arts", None]),
    "there is no delta 3; names are text": dict(delta=[3, 3, 3]),
    "delta must name one delta for each of 3 samples; got 2": dict(delta=["food", "art"]),
    "delta must be the numbers of 3 deltas, (3,) torch.long; got (2,) torch.int64": dict(delta=torch.tensor([0, 1])),
    "delta must be the numbers of 3 deltas, (3,) torch.long; got (3,) torch.float32": dict(delta=torch.ones(3)),
    "the numbers of deltas must be in −1..7 (−1 the base); got 0..8": dict(delta=torch.tensor([0, 8, 1])),
    "delta must be a name, None, a list of them or numbers (N,); got 3": dict(delta=3),
    "strength must be finite; got nan": dict(delta="food", strength=float("nan")),
    "strength must be finite; got inf": dict(delta="food", strength={"food": float("inf")}),
    "strength must be finite": dict(delta=["food", "art", None], strength=[1.0, float("nan"), 0.0]),
    "strength must be one number, or one for each of 3 samples; got (2,)": dict(delta="food", strength=[1.0, 2.0]),
    "strength must be a number, one for each sample, or numbers by name; got 'all'": dict(delta="food", strength="all"),
    "there is no delta 'foo'; the nearest is 'food'": dict(delta="food", strength={"foo": 1.0}),
    "strength by name goes with deltas by name": dict(delta=torch.tensor([0, 0, 0]), strength={"food": 1.0}),
    "strength is that of a delta that load_deltas has loaded; say which (delta=...)": dict(strength=0.5),
    "class labels of the delta 'food' must be in 0..2, the null class is 3; got 5..5": dict(
        delta=["food", "art", None], y=[5, 0, 0]
    ),
    "class labels of the delta 'art' must be in 0..8, the null class is 9; got -1..3": dict(delta="art", y=[-1, 0, 3]),
    "class labels of the base must be in 0..5, the null class is 6; got 7..7": dict(
        delta=["food", "art", None], y=[0, 0, 7]
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_one_sentence(dit: DiT, paths: dict[str, Path], message: str) -> None:
    model = FastDiffFitDiT.from_dit(dit).eval()
    model.load_deltas(paths)
    arguments = dict(BAD[message])
    x, t, _ = mixed_batch([None] * 3)
    y = torch.tensor(arguments.pop("y", [0, 1, 2]))
    with pytest.raises((DiffFitError, ValueError), match=re.escape(message)):
        model(x, t, y, **arguments)


def test_bad_deltas_change_nothing(dit: DiT, paths: dict[str, Path], tmp_path: Path) -> None:
    model = FastDiffFitDiT.from_dit(dit).eval()
    x, t, y = mixed_batch([None] * 2)
    with pytest.raises(DiffFitError, match="no delta has been loaded beside the model's own parameters"):
        model(x, t, y, delta="food")
    with pytest.raises(DiffFitError, match="no delta has been loaded"):
        model(x, t, y, delta=None)
    model.load_deltas({"food": paths["food"]})
    want = model(x, t, y, delta=["food", None])
    other = make_delta(shake(DiT(**BASE)), tmp_path / "other.safetensors", 6, 0)
    block = make_delta(dit, tmp_path / "block.safetensors", 6, 0, "block")
    for path, message in (
        (other, "was made on another base: its weights"),
        (block, "was made with difffit=block"),
        (tmp_path / "none.safetensors", "delta not found"),
    ):
        with pytest.raises(DiffFitError, match=message):
            model.load_deltas({"art": paths["art"], "food": path})
        assert model.deltas.names == ["food"] and torch.equal(model(x, t, y, delta=["food", None]), want)
    for name in ("", " ", "a:b", "a=b", 3):
        with pytest.raises(DiffFitError, match="a delta's name must be text"):
            model.load_deltas({name: paths["art"]})
    with pytest.raises(DiffFitError, match="there is no delta 'art'"):
        model.drop_delta("art")
    with pytest.raises(DiffFitError, match="there is a delta 'food' already"):
        model.add_delta("food")


def test_names_that_modules_have_are_names(dit: DiT, paths: dict[str, Path]) -> None:
    model = FastDiffFitDiT.from_dit(dit).eval()
    names = ["train", "base", "layout", "norm.1", "γ", "weight", "y_embedder.", "a b", "%2E"]
    model.load_deltas(dict.fromkeys(names, paths["birds"]))
    assert model.deltas.names == names
    x, t, y = mixed_batch(["birds"] * 9)
    assert torch.allclose(model(x, t, y, delta=names), model(x, t, y, delta="train"), atol=1e-5)
    again = FastDiffFitDiT.from_dit(dit)
    assert again.deltas.names == [] and model.num_trainable == again.num_trainable


def test_modules_that_are_called_one_by_one_wear_nothing(dit: DiT, paths: dict[str, Path]) -> None:
    model = FastDiffFitDiT.from_dit(dit).eval()
    model.load_deltas(paths)
    x, t, y = mixed_batch([None] * 2)
    model.blocks[0].register_forward_hook(lambda *_: None)
    with pytest.raises(DiffFitError, match="delta= is not possible where the modules are called one by one"):
        model(x, t, y, delta="birds")
    model.blocks[1].mlp.fc1 = nn.Identity()
    with pytest.raises(DiffFitError, match=r"is another module now"):
        model.load_deltas({"art": paths["art"]})


def test_own_is_the_default(dit: DiT, paths: dict[str, Path]) -> None:
    model = separate(dit, paths, "birds").eval()
    inputs = mixed_batch(["birds"] * 2)
    assert torch.equal(model(*inputs, delta=OWN), model(*inputs))
