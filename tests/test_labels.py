"""Training images of a few classes, validation images of others: what a label means to the model."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from training import SETTINGS, TINY

from difffit_fast.data.extract import ExtractConfig, Extraction
from difffit_fast.diffusion import create_diffusion
from difffit_fast.errors import DiffFitError
from difffit_fast.models.adapt import TABLE
from difffit_fast.models.checkpoint import read_model
from difffit_fast.models.header import read_header, write_model_file
from difffit_fast.models.load import load_model
from difffit_fast.models.random_base import random_dit
from difffit_fast.sample import Sampler
from difffit_fast.train import Trainer
from difffit_fast.train.stream import TrainStream
from difffit_fast.train.track import read_metrics

BASE = ["e", "b", "d", "a", "c", "F"]  # in an order that no listing has
SEEN = ["b", "d"]
NULL = -1


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of six letters; what it predicts depends on the letter."""
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    dit = random_dit(dict(input_size=16, in_channels=3, num_classes=6, **TINY), seed=5)
    with torch.no_grad():
        dit.y_embedder.embedding_table.weight.mul_(100)
    write_model_file(path, "model", dit.state_dict(), {"config": dit.config, "class_names": BASE, "objective": "ddpm"})
    return path


def images(folder: Path, names: list[str], each: int = 3) -> Path:
    """Pixels tell the class: image i of the k-th letter has the gray value 40 k + i."""
    for name in names:
        (folder / name).mkdir(parents=True)
        for i in range(each):
            gray = 40 * ((ord(name[-1].lower()) - ord("a")) % 6) + i
            Image.fromarray(np.full((16, 16, 3), gray, np.uint8)).save(folder / name / f"{i}.png")
    return folder


def letter(x: torch.Tensor) -> str:
    """The letter that an image is of, by its pixels."""
    return "abcdef"[round(float((x.mean() + 1) * 127.5)) // 40]


def cached(folder: Path, into: Path, channels: int = 3) -> Path:
    extraction = Extraction(ExtractConfig(str(folder), str(into), image_size=16, vae="none", channels=channels))
    extraction.run()
    extraction.finish()
    return into


def make(base: Path | None, out: Path, **changes: object) -> Trainer:
    settings = {
        **SETTINGS,
        "model_args": {},
        "global_batch_size": 4,
        "results_dir": str(out),
        "ema_decay": 0.0,
        **changes,
    }
    where = {} if base is None else {"ckpt": str(base)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Trainer(**{**settings, **where})


# The base's row of each of the model's classes.
LISTS = {
    "match": (["b", "d", "F", "a", "c", "e"], [1, 2, 5, 3, 4, 0]),
    "keep": (BASE, [0, 1, 2, 3, 4, 5]),
}


@pytest.mark.parametrize("kind", ["images", "features"])
@pytest.mark.parametrize("mode", LISTS)
@pytest.mark.parametrize("method", ["difffit", "full", "lora"])
def test_validation_on_letters_that_were_not_shown(
    base: Path, tmp_path: Path, method: str, mode: str, kind: str
) -> None:
    if method == "lora":
        pytest.importorskip("peft")
    names, rows = LISTS[mode]
    train, val = images(tmp_path / "train", SEEN), images(tmp_path / "val", sorted(BASE))
    where = {"data_path": str(train), "val_path": str(val)}
    if kind == "features":
        where = {"feature_path": str(cached(train, tmp_path / "f")), "val_path": str(cached(val, tmp_path / "g"))}
    trainer = make(base, tmp_path / "runs", method=method, classes=mode, max_steps=3, lr=0.01, **where)
    assert trainer.parts.class_names == names and trainer.model.num_classes == 6
    table = read_model(base).state[TABLE]
    assert torch.equal(trainer.model.state_dict()[TABLE], table[[*rows, 6]])
    for stream, count in ((trainer.stream, 6), (trainer.validation, 18)):
        batch = stream.__getitems__(range(count))
        kept = batch["y"] != 6  # not dropped
        told = [names[y] for y in batch["y"][kept].tolist()]
        assert [name.lower() for name in told] == [letter(x) for x in batch["x"][kept]]
    # The loss before the first step is that of the base itself, asked by its own labels.
    batch = trainer.validation.__getitems__(range(18))
    y = torch.tensor([BASE.index(names[label]) for label in batch["y"].tolist()])
    dit, diffusion = read_model(base).dit().eval(), create_diffusion()
    with torch.no_grad():
        t = (batch["u"] * 1000).long()
        losses = [
            diffusion.training_losses(dit, batch["x"], t, {"y": labels}, noise=batch["noise"])["loss"].mean().item()
            for labels in (y, (y + 1) % 6)
        ]
    result = trainer.train()
    (first, *_) = [m["val_loss"] for m in read_metrics(result.folder) if "val_loss" in m]
    assert first == pytest.approx(losses[0], rel=1e-5) and losses[1] != pytest.approx(losses[0], rel=1e-3)
    # Rows that nobody was shown are the base's still.
    after = trainer.model.state_dict()[TABLE]
    for label, (name, row) in enumerate(zip(names, rows, strict=True)):
        assert torch.equal(after[label], table[row]) == (name not in SEEN), name
    header = read_header(result.delta)
    assert header["class_names"] == names and header["config"]["num_classes"] == 6
    shown = ", ".join(repr(name) for name in names if name not in SEEN)
    said = f"classes: 4 of 6 have no training image ({', '.join(shown.split(', ')[:3])}, …)"
    log = (result.folder / "log.txt").read_text()
    assert log.count(said) == 1 and "images of 2 classes" in log


def test_the_whole_table_is_kept_for_letters_that_can_still_be_sampled(base: Path, tmp_path: Path) -> None:
    """Without validation data, too; and the delta alone, with its base, gives them."""
    data = images(tmp_path / "data", SEEN)
    settings = {"data_path": str(data), "classes": "keep", "max_steps": 3, "ckpt_every": 2, "lr": 0.01}
    result = make(base, tmp_path / "runs", **settings).train()
    loaded = load_model(base, result.delta)
    assert loaded.class_names == BASE and loaded.model.num_classes == 6
    table, trained = read_model(base).state[TABLE], loaded.model.state_dict()[TABLE]
    assert [torch.equal(a, b) for a, b in zip(trained, table, strict=True)][:6] == [name not in SEEN for name in BASE]
    assert Sampler(loaded.model, "ddim", 2, 1.0, vae="none", class_names=BASE).sample(["F", "a"], 0).shape[0] == 2
    part = make(base, tmp_path / "parts", **{**settings, "max_steps": 2}).train()
    again = make(base, tmp_path / "parts", **settings, resume="auto").train()
    assert again.folder == part.folder and again.delta.read_bytes() == result.delta.read_bytes()
    merged = loaded.model.merge()
    assert torch.equal(merged.state_dict()[TABLE], trained)


def test_names_are_spelled_as_the_data_spells_them(base: Path, tmp_path: Path) -> None:
    data = images(tmp_path / "data", ["001. B", "f"])
    trainer = make(base, tmp_path, data_path=str(data), classes="keep")
    assert trainer.parts.class_names == ["e", "001. B", "d", "a", "c", "f"]
    assert sorted(set(trainer.stream.__getitems__(range(30))["y"].tolist()) - {6}) == [1, 5]
    assert torch.equal(trainer.model.state_dict()[TABLE], read_model(base).state[TABLE])


def test_validation_of_fewer_letters_than_training(base: Path, tmp_path: Path) -> None:
    train, val = images(tmp_path / "train", ["a", "b", "c"]), images(tmp_path / "val", ["c"])
    for where in ({}, {"ckpt": str(base), "model_args": {}}):
        settings = {"model_args": TINY, "data_path": str(train), "val_path": str(val), **where}
        trainer = make(None, tmp_path / "runs", **settings)
        assert trainer.parts.class_names == ["a", "b", "c"]
        assert trainer.validation.__getitems__(range(3))["y"].tolist() == [2, 2, 2]
        assert not any("no training image" in note for note in trainer.parts.notes)


@pytest.mark.parametrize("cached_too", [False, True])
def test_gray_features_are_validated_on_gray_images_and_features(tmp_path: Path, cached_too: bool) -> None:
    train, val = images(tmp_path / "train", ["a", "b", "c"]), images(tmp_path / "val", ["b"])
    features = cached(train, tmp_path / "f", channels=1)
    where = {
        "feature_path": str(features),
        "val_path": str(cached(val, tmp_path / "g", channels=1) if cached_too else val),
    }
    trainer = make(None, tmp_path / "runs", model_args={**TINY, "in_channels": 1}, **where)
    batch = trainer.validation.__getitems__(range(3))
    assert batch["x"].shape == (3, 1, 16, 16) and batch["y"].tolist() == [1, 1, 1]
    assert [letter(x) for x in batch["x"]] == ["b", "b", "b"]


@pytest.mark.parametrize(
    ("extra", "changes", "why"),
    [
        ("a", {"ckpt": None, "model_args": TINY}, "there is no --ckpt that could have a row for it"),
        ("a", {"classes": "new"}, "--classes new makes all rows anew"),
        ("z", {}, "--ckpt .*base.safetensors has none of that name"),
        ("z", {"classes": "keep"}, "--ckpt .*base.safetensors has none of that name"),
    ],
)
def test_a_letter_that_nobody_knows_is_refused(base: Path, tmp_path: Path, extra: str, changes: dict, why: str) -> None:
    train, val = images(tmp_path / "train", SEEN), images(tmp_path / "val", [*SEEN, extra])
    message = f"no training image is of the class '{extra}' of the validation data, and {why}"
    with pytest.raises(DiffFitError, match=message):
        make(base if "ckpt" not in changes else None, tmp_path, data_path=str(train), val_path=str(val), **changes)


def test_a_base_without_names_has_no_row_by_name(base: Path, tmp_path: Path) -> None:
    file = read_model(base)
    write_model_file(tmp_path / "nameless.safetensors", "model", file.state, {"config": file.config})
    train, val = images(tmp_path / "train", list("abcdef")), images(tmp_path / "val", ["g"])
    where = {"data_path": str(train), "val_path": str(val), "classes": "keep"}
    with pytest.raises(DiffFitError, match="class 'g' of the validation data, and --ckpt .* records no names"):
        make(tmp_path / "nameless.safetensors", tmp_path, **where)
    trainer = make(tmp_path / "nameless.safetensors", tmp_path, **{**where, "val_path": None})
    assert trainer.parts.class_names == list("abcdef")  # the base's rows in their order
    assert torch.equal(trainer.model.state_dict()[TABLE], file.state[TABLE])


def test_a_model_of_ones_own_knows_its_letters(base: Path, tmp_path: Path) -> None:
    train, val = images(tmp_path / "train", SEEN), images(tmp_path / "val", ["F", "d"])
    where = {"data_path": str(train), "val_path": str(val)}
    names = [*SEEN, "e", "F"]
    trainer = make(None, tmp_path, model=read_model(base).adapt(class_names=names).dit(), **where)
    assert trainer.parts.class_names == names
    assert trainer.validation.__getitems__(range(6))["y"].tolist() == [3, 3, 3, 1, 1, 1]
    for model in (read_model(base).adapt(class_names=[*SEEN, "e"]).dit(), random_dit(trainer.model.config, 0)):
        with pytest.raises(DiffFitError, match="class 'F' of the validation data, and the model has none of that name"):
            make(None, tmp_path, model=model, **where)


def test_a_number_of_classes_that_the_lists_contradict(base: Path, tmp_path: Path) -> None:
    train, val = images(tmp_path / "train", SEEN), images(tmp_path / "val", ["a", "b"])
    where = {"data_path": str(train), "val_path": str(val)}
    with pytest.raises(DiffFitError, match="the data has 3 classes, more than the 2 of the model"):
        make(base, tmp_path, **where, num_classes=2)
    with pytest.raises(DiffFitError, match="there are 7 classes and the base has 6"):
        make(base, tmp_path, **where, num_classes=7, classes="keep")
    trainer = make(base, tmp_path, **where, num_classes=4)
    assert trainer.parts.class_names == ["b", "d", "a", "class 3"]
    said = "classes: 2 of 4 have no training image ('a', 'class 3')"
    assert trainer.parts.notes.count(said) == 1


def test_samples_of_a_run_are_of_letters_that_it_was_shown(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference of the distance has no others."""
    asked = []
    sample = Sampler.sample
    monkeypatch.setattr(
        Sampler, "sample", lambda self, labels, seed: asked.append(labels) or sample(self, labels, seed)
    )
    train = images(tmp_path / "train", SEEN)
    options = {"sample_every": 1, "num_samples": 3, "fid_every": 1, "fid_samples": 5, "num_sampling_steps": 1}
    trainer = make(
        base, tmp_path, data_path=str(train), classes="keep", **options, fid_features="training:tiny_features"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    assert asked == [[1, 2, 1], [1, 2, 1, 2, 1]]


def test_a_label_without_a_name_is_refused() -> None:
    class Odd:
        channels = size = 1

        def load(self, index: int, seed: int) -> tuple[torch.Tensor, int]:
            return torch.zeros(1, 1, 1), index

        def __len__(self) -> int:
            return 3

    stream = TrainStream(Odd(), 0, (1, 1, 1), 0.0, 9, classes=[5, 3])
    batch = {
        "x": torch.zeros(1, 1, 1, 1),
        "y": torch.zeros(1).long(),
        "u": torch.zeros(1),
        "noise": torch.zeros(1, 1, 1, 1),
    }
    seen = []
    with pytest.raises(DiffFitError, match="the data names 2 classes, and has an image with the label 2"):
        for position in range(3):
            stream.load(position, batch, 0)
            seen.append(int(batch["y"]))
    assert set(seen) <= {5, 3}


def test_weights_of_letters_not_shown_stay_in_full_fine_tuning(base: Path, tmp_path: Path) -> None:
    """Averages and optimizer included: what is written holds the base's rows."""
    data = images(tmp_path / "data", SEEN)
    result = make(base, tmp_path, data_path=str(data), classes="keep", method="full", max_steps=2).train()
    table, written = read_model(base).state[TABLE], load_file(result.delta)[TABLE]
    assert [torch.equal(a, b) for a, b in zip(written, table, strict=True)][:6] == [name not in SEEN for name in BASE]
