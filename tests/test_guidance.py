"""Guidance away from the null class or from the base, in an interval of noise levels, with a delta for each sample."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_deltas import BASE, CLASSES, base_dit, make_delta
from test_fast_dit import shake
from torch import Tensor

from difffit_fast import DiffFitError, DiT, FastDiffFitDiT, Sampler, load_model
from difffit_fast.cli import main
from difffit_fast.sample import Target, sample_to_folders, save_grid
from difffit_fast.sample.guidance import Guidance, Predictor

DDPM, FLOW = ("ddpm", "ddim"), ("euler", "heun", "dopri5", "sde")


@pytest.fixture(scope="module")
def dit() -> DiT:
    return base_dit()


@pytest.fixture(scope="module")
def paths(dit: DiT, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("deltas")
    return {
        name: make_delta(dit, folder / f"{name}.safetensors", CLASSES[name], i, step=100 * i, vae="none")
        for i, name in enumerate(("food", "birds"), 1)
    }


@pytest.fixture
def model(dit: DiT, paths: dict[str, Path]) -> FastDiffFitDiT:
    model = FastDiffFitDiT.from_dit(dit).eval()
    model.load_deltas(paths)
    return model


def inputs(n: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(4)
    return torch.randn(n, 4, BASE["input_size"], BASE["input_size"]), torch.full((n,), 300)


def sampler(model: DiT, name: str = "ddim", scale: float = 2.0, **kwargs) -> Sampler:
    return Sampler(model, name, 4, scale, **kwargs)


@torch.no_grad()
@pytest.mark.parametrize("channels", ["first3", "all", 1])
def test_the_formula_with_a_delta_for_each_sample(model: FastDiffFitDiT, channels: str | int) -> None:
    x, t = inputs(3)
    y, worn = torch.tensor([1, 5, 0]), ["food", "birds", None]
    count = {"first3": 3, "all": 4, 1: 1}[channels]
    null = torch.tensor([3, 6, 6])
    ours = model(x, t, y, delta=worn)
    for kind, other in (
        ("cfg", model(x, t, null, delta=worn)),
        ("source", model(x, t, torch.full((3,), 6), delta=None)),
    ):
        found = Predictor(model, Guidance(kind, 2.5, channels), y, worn)(x, t, 0.3)
        want = ours.clone()
        want[:, :count] = other[:, :count] + 2.5 * (ours - other)[:, :count]
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(found[:, :count], ours[:, :count], atol=1e-2)


@torch.no_grad()
def test_the_models_own_parameters_are_guided_away_from_the_base(dit: DiT, paths: dict[str, Path]) -> None:
    own = FastDiffFitDiT.from_dit(dit).eval()
    own.load_delta(paths["birds"])
    beside = FastDiffFitDiT.from_dit(dit).eval()
    beside.load_deltas({"birds": paths["birds"]})
    x, t = inputs(2)
    y = torch.tensor([0, 4])
    Guidance("source").check(own)  # which takes the base apart
    found = Predictor(own, Guidance("source", 3.0), y)(x, t, 0.0)
    torch.testing.assert_close(
        found, Predictor(beside, Guidance("source", 3.0), y, ["birds"] * 2)(x, t, 0.0), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", [*DDPM, *FLOW])
@pytest.mark.parametrize("kind", ["cfg", "source"])
def test_on_every_sampler_scale_one_is_none_and_a_delta_of_strength_zero_the_base(
    model: FastDiffFitDiT, name: str, kind: str
) -> None:
    model.objective = "flow" if name in FLOW else None
    labels, worn = [0, 5, 2], ["birds", "birds", "food"]
    none = sampler(model, name, guidance="none").sample(labels, 1, delta=worn, decode=False)
    one = sampler(model, name, 1.0, guidance=kind).sample(labels, 1, delta=worn, decode=False)
    assert torch.equal(one, none)
    guided = sampler(model, name, 2.0, guidance=kind).sample(labels, 1, delta=worn, decode=False)
    assert not torch.allclose(guided, none, atol=1e-2)
    off = sampler(model, name, 2.0, guidance=kind).sample([0, 5, 2], 1, delta="birds", strength=0, decode=False)
    base = sampler(model, name, 2.0, guidance="cfg").sample([0, 5, 2], 1, delta=None, decode=False)
    torch.testing.assert_close(off, base, rtol=1e-3, atol=1e-3)
    nowhere = sampler(model, name, 2.0, guidance=kind, guidance_interval=(0.0, 0.0))
    if name == "dopri5":
        return  # its steps end where they like
    found = nowhere.sample(labels, 1, delta=worn, decode=False)
    if name in (*DDPM, "heun"):  # their last step is at the noise level 0
        assert not torch.equal(found, guided)
    else:
        torch.testing.assert_close(found, none, rtol=1e-4, atol=1e-4)


def test_the_interval_is_of_noise_levels(model: FastDiffFitDiT) -> None:
    levels: list[tuple[float, int]] = []

    def watched(low: float, high: float, name: str) -> list[tuple[float, int]]:
        levels.clear()
        model.objective = "flow" if name in FLOW else None
        kept = sampler(model, name, 2.0, guidance_interval=(low, high))
        forward = model.forward

        def look(x: Tensor, t: Tensor, *args, **kwargs) -> Tensor:
            level = 1 - float(t[0]) if name in FLOW else float(t[0]) / 1000
            levels.append((level, len(x)))
            return forward(x, t, *args, **kwargs)

        model.forward = look  # type: ignore[method-assign]
        try:
            kept.sample([0, 1], decode=False)
        finally:
            del model.forward
        return list(levels)

    for name in ("ddim", "euler"):
        seen = watched(0.3, 0.8, name)
        assert {len_ for level, len_ in seen if 0.3 <= level <= 0.8} == {4}
        assert {len_ for level, len_ in seen if not 0.3 <= level <= 0.8} == {2}
        assert len(seen) == 4


def test_images_do_not_depend_on_what_the_others_of_the_batch_wear(model: FastDiffFitDiT) -> None:
    one = sampler(model).sample([1, 2], 3, indices=[0, 1], delta="food", decode=False)
    mixed = sampler(model).sample(
        [4, 1, 0, 2], 3, indices=[7, 0, 8, 1], delta=["birds", "food", None, "food"], decode=False
    )
    torch.testing.assert_close(mixed[[1, 3]], one, rtol=1e-3, atol=1e-3)
    by_name = sampler(model).sample([1, 1], 3, delta=["food", "birds"], strength=[1.0, 0.5], decode=False)
    torch.testing.assert_close(by_name[0], one[0], rtol=1e-3, atol=1e-3)


BAD = [
    (dict(guidance="both"), {}, "guidance must be one of cfg, source, none; got 'both'"),
    (dict(guidance_interval=(0.8, 0.2)), {}, "two noise levels, 0 .image. to 1 .noise., the lower first"),
    (dict(guidance_interval=(0.1, float("nan"))), {}, "two noise levels"),
    (dict(guidance_interval=(0.5,)), {}, "two noise levels"),
    ({}, dict(delta="foot"), "there is no delta 'foot'; the nearest is 'food'"),
    ({}, dict(delta=["food"]), "expected one delta per label, 2; got 1"),
    ({}, dict(delta="food", strength=float("nan")), "strength must be finite; got nan"),
    ({}, dict(delta="food", strength=[1.0]), "expected one strength per label, 2; got 1"),
    ({}, dict(strength=0.5), "strength is that of a delta"),
    ({}, dict(delta="food", labels=[0, 3]), "the delta 'food': class labels must be in 0..2; got 3"),
]


@pytest.mark.parametrize(("made", "asked", "message"), BAD)
def test_bad_input_is_one_sentence(model: FastDiffFitDiT, made: dict, asked: dict, message: str) -> None:
    asked = dict(asked)
    with pytest.raises(DiffFitError, match=message):
        sampler(model, **made).sample(asked.pop("labels", [0, 1]), **asked)


def test_source_guidance_needs_a_base(dit: DiT, paths: dict[str, Path]) -> None:
    with pytest.raises(DiffFitError, match="source guidance needs the base beside what was learnt.*this is a DiT"):
        Sampler(dit, "ddim", 4, 2.0, guidance="source")
    with pytest.raises(DiffFitError, match="delta= needs a FastDiffFitDiT with deltas loaded; this is a DiT"):
        Sampler(dit, "ddim", 4, 2.0).sample([0], delta="food")
    trained = FastDiffFitDiT(**BASE)
    with torch.no_grad():
        trained.blocks[0].gamma1.fill_(2)
    with pytest.raises(DiffFitError, match="the base cannot be told from what was trained on it"):
        Sampler(trained, "ddim", 4, 2.0, guidance="source")
    no_null = FastDiffFitDiT(**{**BASE, "class_dropout_prob": 0.0})
    with pytest.raises(DiffFitError, match="the base has no null class, which source guidance goes away from"):
        Sampler(no_null, "ddim", 4, 2.0, guidance="source")


# -- files and the command line ------------------------------------------------------------------------------------------
COMMON = ("--sampler", "ddim", "--num-sampling-steps", "3", "--device", "cpu", "--cfg-scale", "2")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base of pixels, and two deltas with names."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(1)
    dit = shake(DiT(**{**BASE, "in_channels": 3}))
    torch.save(dit.state_dict(), folder / "base.pt")
    found = {"ckpt": folder / "base.pt"}
    for i, (name, names) in enumerate({"food": ["soup", "sushi"], "art": ["oil", "ink", "chalk"]}.items(), 1):
        with pytest.warns():
            model = FastDiffFitDiT.from_dit(dit, class_names=names)
        with torch.no_grad():
            for p in model.trainable_parameters():
                p.add_(0.1 * torch.randn_like(p))
        found[name] = folder / f"{name}.safetensors"
        model.save_delta(found[name], step=100 * i, vae="none", image_size=BASE["input_size"])
    return found


def run(files: dict[str, Path], *words: object) -> int:
    return main(["sample", "--ckpt", str(files["ckpt"]), *(str(word) for word in words), *COMMON])


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_one_grid_of_several_deltas(files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    deltas = ("--delta", files["food"], files["art"])
    assert run(files, *deltas, "--class-labels", "food:sushi", "art:chalk", "base:3", "-o", tmp_path / "a.png") == 0
    grid = pixels(tmp_path / "a.png")
    loaded = load_model(files["ckpt"], {"food": files["food"], "art": files["art"]})
    worn = ["food", "art", None]
    wanted = Sampler(loaded.model, "ddim", 3, 2.0).sample(["sushi", "chalk", 3], delta=worn)
    save_grid(wanted, tmp_path / "b.png")
    assert np.abs(grid - pixels(tmp_path / "b.png")).max() <= 1
    assert run(files, *deltas, "--num-images", "2", "-o", tmp_path / "c.png") == 0
    assert "rows: food, art" in capsys.readouterr().out
    both = pixels(tmp_path / "c.png")
    assert both.shape == (2 * (8 + 2) + 2, 2 * (8 + 2) + 2, 3)
    assert run(files, "--delta", files["art"], "--num-images", "2", "-o", tmp_path / "d.png") == 0
    assert np.abs(both[10:] - pixels(tmp_path / "d.png")).max() <= 1  # the second row, from the same noise


def test_strength_and_source_guidance_of_one_delta(files: dict[str, Path], tmp_path: Path) -> None:
    food = ("--delta", f"f={files['food']}", "--class-labels", "soup", "sushi")
    for name, more in {
        "full": (), "one": ("--strength", "1"), "half": ("--strength", "f=0.5"), "merged": ("--strength", "0.5", "--merge"),
        "source": ("--guidance", "source"), "none": ("--guidance", "none"),
        "nowhere": ("--guidance-interval", "1", "1"), "source none": ("--guidance", "source", "--guidance-interval", "1", "1"),
    }.items():  # fmt: skip
        assert run(files, *food, *more, "-o", tmp_path / f"{name}.png") == 0
    found = {path.stem: pixels(path) for path in tmp_path.glob("*.png")}
    for a, b in (("full", "one"), ("half", "merged"), ("none", "nowhere"), ("none", "source none")):
        assert np.abs(found[a] - found[b]).max() <= 1, (a, b)
    for a, b in (("full", "half"), ("full", "source"), ("full", "none"), ("source", "none")):
        assert np.abs(found[a] - found[b]).max() > 1, (a, b)


def test_folders_of_several_deltas_are_those_of_each(files: dict[str, Path], tmp_path: Path) -> None:
    more = ("--num-fid-samples", "3", "--sample-dir", tmp_path / "many", "--per-proc-batch-size", "4")
    assert run(files, "--delta", files["food"], files["art"], *more) == 0
    more = ("--num-fid-samples", "3", "--sample-dir", tmp_path / "one")
    for name in ("food", "art"):
        assert run(files, "--delta", files[name], *more) == 0
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert sorted(path.name for path in (tmp_path / "many").iterdir()) == names and len(names) == 4
    for one in sorted((tmp_path / "one").rglob("*.png")):
        other = tmp_path / "many" / one.parent.name / one.name
        assert np.abs(pixels(one) - pixels(other)).max() <= 1
    for one in (tmp_path / "one").rglob("sampling.json"):
        said = json.loads(one.read_text())
        assert said == json.loads((tmp_path / "many" / one.parent.name / one.name).read_text())
        assert said["step"] == (100 if "food" in one.parent.name else 200)
    # what was begun by one command goes on in the other
    (next((tmp_path / "many").rglob("000001.png"))).unlink()
    assert (
        run(files, "--delta", files["food"], files["art"], "--num-fid-samples", "3", "--sample-dir", tmp_path / "many")
        == 0
    )
    assert run(files, "--delta", files["food"], "--num-fid-samples", "4", "--sample-dir", tmp_path / "many") == 0


def test_a_folder_does_not_mix_guidance(files: dict[str, Path], tmp_path: Path) -> None:
    loaded = load_model(files["ckpt"], {"food": files["food"]})
    for kind, interval in (("cfg", (0.0, 1.0)), ("source", (0.0, 1.0)), ("cfg", (0.2, 1.0))):
        made = Sampler(loaded.model, "ddim", 3, 2.0, guidance=kind, guidance_interval=interval)
        folder = tmp_path / f"{kind}{interval[0]}"
        sample_to_folders(made, [Target(folder, "food")], 1, npz=False, progress=False)
        plain = Sampler(loaded.model, "ddim", 3, 2.0)
        if kind == "cfg" and interval == (0.0, 1.0):
            sample_to_folders(plain, [Target(folder, "food")], 1, npz=False, progress=False)
            continue
        with pytest.raises(DiffFitError, match="was begun with guidance"):
            sample_to_folders(plain, [Target(folder, "food")], 1, npz=False, progress=False)
    with pytest.raises(DiffFitError, match="each set of samples needs a folder of its own"):
        sample_to_folders(plain, [Target(tmp_path / "a", "food")] * 2, 1)


WRONG = {
    "two deltas are called 'food'": ("--delta", "{food}", "food={art}"),
    "--strength must be a number, or NAME=NUMBER; got 'x'": ("--delta", "{food}", "--strength", "x"),
    "--strength must be finite; got nan": ("--delta", "{food}", "--strength", "nan"),
    "there is no delta 'art'; there are food": ("--delta", "{food}", "--strength", "art=1"),
    "--strength takes one number, or NAME=NUMBER for each delta": ("--delta", "{food}", "--strength", "1", "2"),
    "--strength is that of a --delta, and there is none": ("--strength", "1"),
    "--guidance source goes away from the base": ("--guidance", "source"),
    "--merge folds a --delta into the weights, and there are several": ("--delta", "{food}", "{art}", "--merge"),
    "the delta 'art': there is no class 'sushi'": ("--delta", "{food}", "{art}", "--class-labels", "sushi"),
    "a delta cannot be called 'base'": ("--delta", "base={food}", "{art}"),
    "delta not found": ("--delta", "{food}", "nothing.safetensors"),
    "the lower first; got (0.9, 0.1)": ("--delta", "{food}", "--guidance-interval", "0.9", "0.1"),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_the_command_line_refuses(
    files: dict[str, Path], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word.format(**files) for word in WRONG[message]]
    assert run(files, *words) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_deltas_of_runs_on_different_bases(files: dict[str, Path], tmp_path: Path) -> None:
    for name in ("food", "art"):
        folder = tmp_path / name / "checkpoints"
        folder.mkdir(parents=True)
        (folder.parent / "config.yaml").write_text(f"ckpt: {name}.pt\n")
        (folder / f"{name}.safetensors").write_bytes(files[name].read_bytes())
    paths = {name: tmp_path / name / "checkpoints" / f"{name}.safetensors" for name in ("food", "art")}
    with pytest.raises(
        DiffFitError, match=r"the settings of the runs name different bases, food.pt for .* and art.pt for"
    ):
        load_model(None, paths)
    (tmp_path / "art" / "config.yaml").write_text("ckpt: food.pt\n")
    with pytest.raises(DiffFitError, match=r"checkpoint not found: food.pt, which .* names as the base"):
        load_model(None, paths)
    for name in ("food", "art"):
        (tmp_path / name / "config.yaml").write_text(f"ckpt: {files['ckpt']}\n")
    loaded = load_model(None, paths)
    assert loaded.model.deltas.names == ["food", "art"] and loaded.header["vae"] == "none"
    assert loaded.model.num_classes == BASE["num_classes"] and "step" not in loaded.header
