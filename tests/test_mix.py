"""``difffit mix``: several deltas of one base in one."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_fast_dit import SMALL, shake
from torch import Tensor

from difffit_fast import DiffFitError, DiT, FastDiffFitDiT, load_model
from difffit_fast._files import safetensors_metadata
from difffit_fast.cli import main
from difffit_fast.cli.mix import read_part
from difffit_fast.errors import DeltaMismatchError
from difffit_fast.models.adapt import TABLE
from difffit_fast.models.delta import read_delta
from difffit_fast.models.difffit import is_extra, neutral
from difffit_fast.models.mix import mix_deltas
from difffit_fast.models.random_base import random_dit

BASE = {**SMALL, "num_classes": 3}
KNOWN = ["ant", "bee", "cat"]


def make(
    dit: DiT, path: Path, seed: int, names: list[str] | None = None, classes: int | None = None, **options: Any
) -> Path:
    """A delta that was trained, as far as anyone can see."""
    header = {key: options.pop(key) for key in ("step", "vae", "image_size") if key in options}
    count = classes if names is None else len(names)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes that are new
        model = FastDiffFitDiT.from_dit(dit, num_classes=count, **options)
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.trainable_parameters():
            p.add_(0.1 * torch.randn_like(p))
    path.parent.mkdir(exist_ok=True)
    model.save_delta(path, class_names=names, **header)
    return path


@pytest.fixture(scope="module")
def dit() -> DiT:
    torch.manual_seed(5)
    return shake(DiT(**BASE))


@pytest.fixture(scope="module")
def folder(dit: DiT, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mix")
    save_file({k: v.contiguous() for k, v in dit.state_dict().items()}, folder / "base.safetensors")
    make(dit, folder / "a.safetensors", 1, KNOWN, step=7, vae="ema", image_size=64)
    make(dit, folder / "b.safetensors", 2, KNOWN, step=7, vae="mse", image_size=64)
    make(dit, folder / "c.safetensors", 3, ["Cat", "dog"], step=8, vae="ema")
    make(dit, folder / "plain.safetensors", 4)
    make(dit, folder / "plain2.safetensors", 5)
    make(dit, folder / "four.safetensors", 6, classes=4)
    return folder


def tensors(path: Path) -> dict[str, Tensor]:
    return load_file(path)


def inputs(classes: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(3)
    return (
        torch.randn(4, 4, SMALL["input_size"], SMALL["input_size"]),
        torch.arange(4) * 300,
        torch.arange(4) % (classes + 1),
    )


# -- numbers -----------------------------------------------------------------------------------------------------------
def test_two_halves_are_the_mean(folder: Path, tmp_path: Path) -> None:
    a, b = folder / "a.safetensors", folder / "b.safetensors"
    header = mix_deltas([(a, 0.5), (b, 0.5)], tmp_path / "m.safetensors")
    assert header["mixed"] == [["a.safetensors", 0.5], ["b.safetensors", 0.5]]
    found, one, two = tensors(tmp_path / "m.safetensors"), tensors(a), tensors(b)
    assert set(found) == set(one)
    for name, value in found.items():
        assert torch.equal(value, ((one[name].double() + two[name].double()) / 2).float()), name
    mix_deltas([(a, None), (b, None)], tmp_path / "n.safetensors")
    mix_deltas([(a, 0.5), (b, 0.5)], tmp_path / "o.safetensors")
    first, *others = ((tmp_path / f"{x}.safetensors").read_bytes() for x in "mno")
    assert all(other == first for other in others)


def test_a_sum_of_another_size_takes_the_rest_from_the_base(dit: DiT, folder: Path, tmp_path: Path) -> None:
    a, b = folder / "a.safetensors", folder / "b.safetensors"
    mix_deltas([(a, 0.9), (b, 0.6)], tmp_path / "m.safetensors", ckpt=folder / "base.safetensors")
    found, one, two, base = tensors(tmp_path / "m.safetensors"), tensors(a), tensors(b), dit.state_dict()
    for name, value in found.items():
        if is_extra(name):
            origin = torch.full_like(value, neutral(name)).double()
        else:
            origin = base[name].double()
        want = origin + 0.9 * (one[name].double() - origin) + 0.6 * (two[name].double() - origin)
        assert (value - want).abs().max() < 1e-6, name
        assert (value - (0.9 * one[name] + 0.6 * two[name])).abs().max() > 1e-3 or not origin.any(), name


@pytest.mark.parametrize("strength", [0.4, 1.7, -0.5])
@pytest.mark.parametrize("name", ["a", "plain", "four", "c"])
def test_one_delta_of_a_weight_is_that_delta_at_this_strength(
    dit: DiT, folder: Path, tmp_path: Path, name: str, strength: float
) -> None:
    path = folder / f"{name}.safetensors"
    mix_deltas([(path, strength)], tmp_path / "m.safetensors", ckpt=folder / "base.safetensors")
    model = FastDiffFitDiT.from_dit(dit).eval()
    model.load_deltas({"one": path, "mix": tmp_path / "m.safetensors"})
    x, t, y = inputs(model.deltas["one"].num_classes)
    want = model(x, t, y, delta="one", strength=strength)
    assert (model(x, t, y, delta="mix") - want).abs().max() < 1e-6 * want.abs().max()
    assert (model(x, t, y, delta="one") - want).abs().max() > 1e-3 * want.abs().max()


def test_thirds_that_were_rounded_are_a_whole(folder: Path, tmp_path: Path) -> None:
    paths = [folder / f"{name}.safetensors" for name in ("a", "b", "b")]
    mix_deltas([(path, 0.3333333) for path in paths], tmp_path / "m.safetensors")
    want = (tensors(paths[0])["blocks.0.gamma1"].double() + 2 * tensors(paths[1])["blocks.0.gamma1"].double()) / 3
    assert (tensors(tmp_path / "m.safetensors")["blocks.0.gamma1"] - want).abs().max() < 1e-7
    with pytest.raises(DiffFitError, match=r"sum to 0\.999, .* the base's"):
        mix_deltas([(path, 0.333) for path in paths], tmp_path / "n.safetensors")


# -- classes -----------------------------------------------------------------------------------------------------------
def test_classes_are_united_by_name(folder: Path, tmp_path: Path) -> None:
    a, c = folder / "a.safetensors", folder / "c.safetensors"
    header = mix_deltas([(a, 0.25), (c, 0.75)], tmp_path / "m.safetensors")
    assert header["class_names"] == ["ant", "bee", "cat", "dog"] and header["config"]["num_classes"] == 4
    table, one, two = (tensors(path)[TABLE].double() for path in (tmp_path / "m.safetensors", a, c))
    want = torch.stack([one[0], one[1], 0.25 * one[2] + 0.75 * two[0], two[1], 0.25 * one[3] + 0.75 * two[2]])
    assert torch.equal(table, want.float().double())
    header = mix_deltas([(c, 0.75), (a, 0.25)], tmp_path / "n.safetensors")
    assert header["class_names"] == ["Cat", "dog", "ant", "bee"]
    assert torch.equal(tensors(tmp_path / "n.safetensors")[TABLE].double(), want[[2, 3, 0, 1, 4]].float().double())


def test_without_names_row_goes_with_row(folder: Path, tmp_path: Path) -> None:
    one, two, a = (folder / f"{name}.safetensors" for name in ("plain", "plain2", "a"))
    header = mix_deltas([(one, 0.5), (two, 0.5)], tmp_path / "m.safetensors")
    assert header["class_names"] is None
    mean = ((tensors(one)[TABLE].double() + tensors(two)[TABLE].double()) / 2).float()
    assert torch.equal(tensors(tmp_path / "m.safetensors")[TABLE], mean)
    assert mix_deltas([(one, 0.5), (a, 0.5)], tmp_path / "n.safetensors")["class_names"] == KNOWN


def test_the_null_class_is_the_mean_of_those_that_there_are(dit: DiT, folder: Path, tmp_path: Path) -> None:
    a, none = folder / "a.safetensors", make(dit, tmp_path / "none.safetensors", 8, KNOWN, class_dropout_prob=0)
    config = mix_deltas([(none, 0.5), (a, 0.5)], tmp_path / "m.safetensors")["config"]
    assert config["class_dropout_prob"] == 0.1
    found = tensors(tmp_path / "m.safetensors")[TABLE]
    assert len(found) == 4 and torch.equal(found[3], tensors(a)[TABLE][3])


# -- the file ----------------------------------------------------------------------------------------------------------
def test_the_header_keeps_what_all_agree_on_and_what_was_mixed(folder: Path, tmp_path: Path) -> None:
    mix_deltas([(folder / "a.safetensors", 0.7), (folder / "b.safetensors", 0.3)], tmp_path / "m.safetensors")
    header = read_delta(tmp_path / "m.safetensors")[1]
    theirs = read_delta(folder / "a.safetensors")[1]
    assert header["step"] == 7 and header["image_size"] == 64 and "vae" not in header
    assert header["mixed"] == [["a.safetensors", 0.7], ["b.safetensors", 0.3]]
    for key in ("config", "difffit", "base_hash", "base_hashes", "pos_embed_scale", "class_names"):
        assert header[key] == theirs[key], key
    mix_deltas([(folder / "a.safetensors", 1), (folder / "c.safetensors", 1e-9)], tmp_path / "n.safetensors")
    header = read_delta(tmp_path / "n.safetensors")[1]
    assert "step" not in header and header["vae"] == "ema" and header["image_size"] == 64


def test_it_loads_like_any_delta(dit: DiT, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    a, c, out, base = (
        str(folder / x) for x in ("a.safetensors", "c.safetensors", "out.safetensors", "base.safetensors")
    )
    assert main(["mix", f"{a}=0.7", f"{c}=0.3", "--out", out]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{out}: 0.7 of a.safetensors + 0.3 of c.safetensors; 4 classes, ")
    model = FastDiffFitDiT.from_dit(dit).eval()
    model.load_deltas({"mix": out})
    x, t, y = inputs(4)
    want = model(x, t, y, delta="mix")
    with pytest.warns(UserWarning, match="4 were asked for"):
        alone = FastDiffFitDiT.from_dit(dit, num_classes=4).eval()
    assert alone.load_delta(out)["class_names"] == ["ant", "bee", "cat", "dog"]
    torch.testing.assert_close(alone(x, t, y), want)
    torch.testing.assert_close(load_model(base, out).model(x, t, y), want)
    assert main(["inspect", out]) == 0
    assert "mixed from            0.7 of a.safetensors, 0.3 of c.safetensors\n" in capsys.readouterr().out
    assert main(["check", out]) == 0
    grid = tmp_path / "grid.png"
    words = ["--vae", "none", "--num-sampling-steps", "2", "--class-labels", "dog", "ant", "--output", str(grid)]
    pixels = shake(DiT(**{**BASE, "in_channels": 3}))
    save_file({k: v.contiguous() for k, v in pixels.state_dict().items()}, tmp_path / "pixels.safetensors")
    parts = [str(make(pixels, tmp_path / f"{i}.safetensors", i, names)) for i, names in enumerate((KNOWN, ["dog"]))]
    assert main(["mix", *parts, "--out", str(tmp_path / "p.safetensors")]) == 0
    given = ["--ckpt", str(tmp_path / "pixels.safetensors"), "--delta", str(tmp_path / "p.safetensors")]
    assert main(["sample", *given, "--num-heads", str(SMALL["num_heads"]), *words]) == 0 and grid.is_file()
    assert main(["mix", *parts, "--out", str(tmp_path / "p.safetensors")]) == 2
    assert "give --overwrite" in capsys.readouterr().err
    assert main(["mix", *parts, "--out", str(tmp_path / "p.safetensors"), "--overwrite"]) == 0


def test_the_base_is_found_by_the_run(dit: DiT, folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    delta = make(dit, run / "checkpoints" / "0000001.safetensors", 1, KNOWN)
    (run / "config.yaml").write_text(f"ckpt: {folder / 'base.safetensors'}\n")
    for parts in ([(delta, 0.5)], [(folder / "b.safetensors", 0.25), (delta, 0.5)]):
        mix_deltas(parts, tmp_path / "m.safetensors")
        mix_deltas(parts, tmp_path / "n.safetensors", ckpt=folder / "base.safetensors")
        assert (tmp_path / "m.safetensors").read_bytes() == (tmp_path / "n.safetensors").read_bytes()
    (run / "config.yaml").write_text(f"ckpt: {tmp_path / 'gone.pt'}\n")
    with pytest.raises(DiffFitError, match=r"weights sum to 0\.5, .*; checkpoint not found: .*gone\.pt"):
        mix_deltas([(delta, 0.5)], tmp_path / "o.safetensors")


def test_a_random_base_is_found_by_its_seed_while_the_classes_are_as_many(tmp_path: Path) -> None:
    dit = random_dit(BASE, 11)
    a, b, c = (
        make(dit, tmp_path / f"{i}.safetensors", i, names) for i, names in enumerate((KNOWN, KNOWN, ["x", "y", "z"]))
    )
    mix_deltas([(a, 0.9), (b, 0.6)], tmp_path / "m.safetensors")
    x, t, y = inputs()
    model = FastDiffFitDiT.from_dit(dit).eval()
    model.load_deltas({"mix": tmp_path / "m.safetensors"})
    torch.testing.assert_close(load_model(None, tmp_path / "m.safetensors").model(x, t, y), model(x, t, y, delta="mix"))
    with pytest.warns(UserWarning, match="drawn for the 3 classes of .*; the mix has 6"):
        mix_deltas([(a, 0.5), (c, 0.5)], tmp_path / "n.safetensors")
    model.load_deltas({"six": tmp_path / "n.safetensors"})
    assert model.deltas["six"].num_classes == 6 and "random_base" not in model.deltas["six"].header


def test_of_another_rounding_of_the_base_one_warning(dit: DiT, folder: Path, tmp_path: Path) -> None:
    half = DiT(**BASE)
    half.load_state_dict({k: v.half().float() for k, v in dit.state_dict().items()})
    made = make(half, tmp_path / "half.safetensors", 1, KNOWN)
    with pytest.warns(UserWarning, match="rounded to float16 in one of the two") as told:
        mix_deltas([(folder / "a.safetensors", 0.5), (made, 0.5)], tmp_path / "m.safetensors")
    assert len(told) == 1


def test_an_earlier_version_tells_less_of_its_base(dit: DiT, folder: Path, tmp_path: Path) -> None:
    strings = safetensors_metadata(folder / "a.safetensors")
    del strings["base_hashes"]
    save_file(tensors(folder / "a.safetensors"), tmp_path / "old.safetensors", {**strings, "version": "1"})
    for parts in (("old", "b"), ("b", "old")):
        paths = [(tmp_path if name == "old" else folder) / f"{name}.safetensors" for name in parts]
        with pytest.warns(
            UserWarning, match=r"old\.safetensors was written by an earlier version.* b\.safetensors's|old"
        ):
            mix_deltas([(path, 0.5) for path in paths], tmp_path / "m.safetensors")
        assert "base_hashes" in read_delta(tmp_path / "m.safetensors")[1]


def test_a_table_that_is_not_trained_is_the_bases(dit: DiT, folder: Path, tmp_path: Path) -> None:
    preset = dict(class_embedding=False)
    a, b = (make(dit, tmp_path / f"{i}.safetensors", i, difffit=preset) for i in range(2))
    mix_deltas([(a, 1.5), (b, -0.2)], tmp_path / "m.safetensors", ckpt=folder / "base.safetensors")
    assert TABLE not in tensors(tmp_path / "m.safetensors")
    model = FastDiffFitDiT.from_dit(dit, difffit=preset)
    model.load_delta(tmp_path / "m.safetensors")


# -- bad input ---------------------------------------------------------------------------------------------------------
Parts = Callable[[Path, Path, DiT], list[tuple[Path, Any]]]


def _of(*given: Any) -> Parts:
    return lambda folder, tmp, dit: [
        (folder / f"{name}.safetensors", w) for name, w in zip(given[::2], given[1::2], strict=True)
    ]


def _with(*args: Any, **options: Any) -> Parts:
    def parts(folder: Path, tmp: Path, dit: DiT) -> list[tuple[Path, Any]]:
        return [(folder / "a.safetensors", 0.5), (make(dit, tmp / "odd" / "odd.safetensors", *args, **options), 0.5)]

    return parts


def _other_base(folder: Path, tmp: Path, dit: DiT) -> list[tuple[Path, Any]]:
    other = make(shake(DiT(**BASE)), tmp / "odd" / "other.safetensors", 1, KNOWN)
    return [(folder / "a.safetensors", 0.5), (other, 0.5)]


def _other_size(folder: Path, tmp: Path, dit: DiT) -> list[tuple[Path, Any]]:
    other = DiT(**{**BASE, "depth": BASE["depth"] + 1})
    return [(folder / "a.safetensors", 0.5), (make(other, tmp / "odd" / "deep.safetensors", 1, KNOWN), 0.5)]


def _lacking(folder: Path, tmp: Path, dit: DiT) -> list[tuple[Path, Any]]:
    found = tensors(folder / "a.safetensors")
    del found["blocks.0.gamma1"]
    (tmp / "odd").mkdir()
    save_file(found, tmp / "odd" / "less.safetensors", safetensors_metadata(folder / "a.safetensors"))
    return [(folder / "a.safetensors", 0.5), (tmp / "odd" / "less.safetensors", 0.5)]


BAD: dict[str, Parts] = {
    "there is nothing to mix": lambda folder, tmp, dit: [],
    r"every delta has a weight or none has; .*b\.safetensors has none": _of("a", 0.5, "b", None),
    r"one delta is mixed with its base, by a weight; .*a\.safetensors has none": _of("a", None),
    r"a weight must be a finite number; that of .*b\.safetensors is nan": _of("a", 0.5, "b", float("nan")),
    r"a weight must be a finite number; that of .*a\.safetensors is -inf": _of("a", -float("inf"), "b", 1.0),
    r"a weight must be a finite number; that of .*a\.safetensors is 1000": _of("a", 10**400),
    r"a weight must be a finite number; that of .*a\.safetensors is True": _of("a", True),
    r"delta not found: .*nothing\.safetensors": _of("a", 0.5, "nothing", 0.5),
    r"base\.safetensors is not a delta of difffit_fast": _of("a", 0.5, "base", 0.5),
    r"weights sum to 0\.75, and what is missing to 1 is the base's, .*; the base of .*a\.safetensors is not known: .* --ckpt":
        _of("a", 0.75),
    r"other\.safetensors was made on another base: its weights have the hash .*a\.safetensors's": _other_base,
    r"deep\.safetensors was made for depth \d; .*a\.safetensors has depth": _other_size,
    r"odd\.safetensors was made with difffit=block .*; .*a\.safetensors has paper": _with(1, KNOWN, difffit="block"),
    r"less\.safetensors does not fit: blocks\.0\.gamma1 is missing": _lacking,
    r"odd\.safetensors was made for images of 32 pixels; .*a\.safetensors has 64": _with(1, KNOWN, image_size=32),
    r"odd\.safetensors has two classes of the name 'bee'": _with(1, ["ant", "bee", "bee"]),
    r"four\.safetensors has 4 classes, .*plain\.safetensors 3: as many are needed": _of("plain", 0.5, "four", 0.5),
    r"four\.safetensors has 4 classes, .*a\.safetensors 3: .*no class names": _of("a", 0.5, "four", 0.5),
    r"odd\.safetensors and .*a\.safetensors name their classes differently, and another delta has no class names":
        lambda folder, tmp, dit: [*_with(1, ["bee", "ant", "cat"])(folder, tmp, dit), (folder / "plain.safetensors", 0.5)],
    "the weights of the deltas that have the class 'ant' sum to 0": _of("a", 0.0, "c", 1.0),
    "the weights of the deltas that have class 0 sum to 0": _of("plain", 0.3, "plain2", -0.3),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_bad_parts_are_one_sentence_and_write_nothing(dit: DiT, folder: Path, tmp_path: Path, message: str) -> None:
    out = tmp_path / "out" / "m.safetensors"
    out.parent.mkdir()
    with pytest.raises(DiffFitError, match=message):
        mix_deltas(BAD[message](folder, tmp_path, dit), out)
    assert not list(out.parent.iterdir())


def test_a_base_of_others_is_refused(folder: Path, tmp_path: Path) -> None:
    other = shake(DiT(**BASE))
    save_file({k: v.contiguous() for k, v in other.state_dict().items()}, tmp_path / "other.safetensors")
    with pytest.raises(DeltaMismatchError, match=r"a\.safetensors was made on another base"):
        mix_deltas([(folder / "a.safetensors", 0.5)], tmp_path / "m.safetensors", ckpt=tmp_path / "other.safetensors")


def test_weights_beyond_float32_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DiffFitError, match=r"the weights are too large: .* beyond float32's range"):
        mix_deltas([(folder / "a.safetensors", 1e300)], tmp_path / "m.safetensors", ckpt=folder / "base.safetensors")
    assert not list(tmp_path.iterdir())


def test_what_a_header_says_of_the_mix_is_looked_at(folder: Path, tmp_path: Path) -> None:
    strings = safetensors_metadata(folder / "a.safetensors")
    for odd in ([["a", "b"]], [["a", 1.0, 2]], [["a", None]], ["a"], "a"):
        save_file(tensors(folder / "a.safetensors"), tmp_path / "m.safetensors", {**strings, "mixed": json.dumps(odd)})
        with pytest.raises(DiffFitError, match="mixed in its metadata should be"):
            read_delta(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    ("word", "part"),
    [
        ("a.safetensors=0.7", ("a.safetensors", 0.7)), ("a.safetensors", ("a.safetensors", None)),
        ("x=1/a=b.safetensors", ("x=1/a=b.safetensors", None)), ("x=1/a=b.safetensors=-1e-3", ("x=1/a=b.safetensors", -1e-3)),
        ("a=", ("a=", None)), ("0.5", ("0.5", None)), ("a==2", ("a=", 2.0)),
    ],
)  # fmt: skip
def test_the_weight_is_the_number_behind_the_last_sign(word: str, part: tuple[str, float | None]) -> None:
    assert read_part(word) == part


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a=nan", "--out", "m.safetensors"], "a weight must be a finite number; that of a is nan"),
        (["=0.5", "--out", "m.safetensors"], "expected DELTA=WEIGHT; '=0.5' names no delta"),
        (["a=0.5", "--out", "m.pt"], "--out must end in .safetensors; got m.pt"),
        (["a=0.5", "--out", "none/m.safetensors"], "the folder of --out does not exist"),
        (["--out", "m.safetensors"], "the following arguments are required"),
        (["a=0.5"], "the following arguments are required: --out"),
    ],
)
def test_the_command_answers_in_one_sentence(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["mix", *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"difffit mix: {message}") and said.count("\n") == 1 and not list(tmp_path.iterdir())
