"""Each class of the data starts from the base's row of its name, and a label means one class."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from training import SETTINGS, TINY

from difffit_fast import FastDiffFitDiT
from difffit_fast.errors import DeltaMismatchError, DiffFitError
from difffit_fast.models.adapt import TABLE
from difffit_fast.models.checkpoint import model_of, read_model
from difffit_fast.models.classes import ClassRows, choose_rows, closest_row, match_names
from difffit_fast.models.difffit import DiffFitConfig
from difffit_fast.models.dit import DiT
from difffit_fast.models.header import read_header, record_in_state_dict
from difffit_fast.models.load import load_model
from difffit_fast.sample.sampler import resolve_labels
from difffit_fast.train import TrainConfig, Trainer
from difffit_fast.train.methods import build_model

BASE = ["cat", "golden retriever", "red fox", "crème brûlée", "sunflower"]
MEAN = 2.0
NULL = 5.0
NFD = "cre\u0300me bru\u0302le\u0301e"


def base_file(path: Path, names: list[str] | None = BASE) -> Path:
    """A checkpoint of five classes; row i of its class table holds the number i."""
    dit = DiT(input_size=16, in_channels=3, num_classes=5, **TINY)
    with torch.no_grad():
        dit.y_embedder.embedding_table.weight.copy_(torch.arange(6.0)[:, None].expand(6, 48))
    state = dit.state_dict()
    record_in_state_dict(state, {"config": dit.config, "class_names": names})
    torch.save(state, path / "base.pt")
    return path / "base.pt"


def images(folder: Path, names: list[str]) -> Path:
    for name in names:
        (folder / name).mkdir(parents=True)
        for i in range(2):
            Image.fromarray(np.full((16, 16, 3), 90 * i, np.uint8)).save(folder / name / f"{i}.png")
    return folder


def trainer(base: Path | None, data: Path, **changes: object) -> Trainer:
    settings = {**SETTINGS, "model_args": {"num_heads": 2}, "data_path": str(data), "global_batch_size": 2, **changes}
    settings = {"results_dir": str(data.parent / "runs"), **settings} | ({} if base is None else {"ckpt": str(base)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Trainer(**settings)


def rows_of(model: torch.nn.Module) -> list[float]:
    table = model.state_dict()[TABLE]
    assert bool((table == table[:, :1]).all())
    return table[:, 0].tolist()


# -- names ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("base", "names", "rows"),
    [
        (["a", "b", "c"], ["a", "b", "c"], (0, 1, 2)),
        (["a", "b", "c"], ["c", "a", "b"], (2, 0, 1)),  # a permutation
        (["a", "b", "c"], ["b", "c"], (1, 2)),  # a subset
        (["a", "c"], ["a", "b", "c"], (0, None, 1)),  # a superset
        (["a", "b"], ["x", "y"], (None, None)),
        (["Golden_Retriever", "red-fox"], ["red  fox", "golden retriever"], (1, 0)),
        (["crème"], ["cre\u0300me"], (0,)),
        (["001.Crow", "002.Gull"], ["gull", "crow"], (1, 0)),
        (["crow", "gull"], ["001.Crow", "dove", "2. gull"], (0, None, 1)),
        (["12-crow", "13-gull"], ["gull"], (1,)),
        (["3-wheeler", "wheeler", "cat"], ["4-wheeler", "cat"], (None, 2)),  # a number that is part of the name
        (["1", "2", "10"], ["1", "10", "2"], (0, 2, 1)),
        (["cat", "dog"], ["Cat", "cat"], (None, 0)),  # two alike: as they are, or not at all
        (["cat", "CAT"], ["Cat"], (None,)),
        (["crane", "dog", "crane"], ["crane", "dog"], (None, 1)),
        (["crane", "dog", "crane"], ["crane", "dog", "crane"], (0, 1, 2)),
        (["_", "a"], ["-", "a"], (None, 1)),
        (["straße"], ["STRASSE"], (0,)),
        (["A", "a", "B"], ["lower_a", "upper_A", "upper_B"], (1, 0, 2)),  # letters by the names of their folders
        (["upper_A", "lower_a"], ["a", "A"], (1, 0)),
        (["A", "a"], ["a", "lower_a"], (1, None)),
        ([], ["a"], (None,)),
    ],
)
def test_rows_by_name(base: list[str], names: list[str], rows: tuple[int | None, ...]) -> None:
    assert match_names(base, names) == rows


def test_no_row_is_taken_twice_and_only_by_a_name_that_is_its_own() -> None:
    stems = ["cat", "Cat", "001.cat", "1-cat", "dog", "7", "cat_", "dog cat", ""]
    generator = np.random.default_rng(0)
    for _ in range(300):
        base = list(generator.choice(stems, generator.integers(0, 6)))
        names = list(generator.choice(stems, generator.integers(1, 6)))
        rows = [row for row in match_names(base, names) if row is not None]
        assert len(rows) == len(set(rows))
        for name in set(names):
            if base.count(name) == names.count(name) == 1 and name:
                assert match_names(base, names)[names.index(name)] == base.index(name)


@pytest.mark.parametrize(
    ("name", "row"),
    [("labrador retriever", 1), ("Arctic-Fox", 2), ("flower", 4), ("car", None), ("of", None), ("catalogue", None), ("99", None)],
)  # fmt: skip
def test_a_new_class_starts_from_the_name_with_most_words_in_common(name: str, row: int | None) -> None:
    assert closest_row(BASE, name) == row


def test_what_was_done_is_said_in_one_line() -> None:
    said = choose_rows(BASE, 5, ["cat", "Sunflower", "labrador retriever", "bus"], 4).said
    assert said == (
        "classes: 2 of 4 by name ('sunflower' for 'Sunflower'), 2 new ('labrador retriever' from 'golden retriever', "
        "'bus' from the mean); 3 of the base's are dropped ('golden retriever', 'red fox', 'crème brûlée')"
    )
    assert choose_rows(BASE, 5, BASE, 5).said == "classes: 5 of 5 by name"
    assert choose_rows(None, 2, ["a", "b"], 2).said == (
        "classes: the base records no names; row i of the base for class i, 2 of 2"
    )


@pytest.mark.parametrize(
    ("base", "names", "count", "message"),
    [
        (BASE, ["cat", "dog"], 2, r"there are 2 classes and the base has 5; only the base has 'golden retriever', .*only "
         r"the new ones 'dog'"),
        (None, ["cat", "dog"], 2, "there are 2 classes and the base has 5"),
        (None, None, 6, "there are 6 classes and the base has 5"),
        (BASE, ["red fox", "b", "c", "d", "e"], 5, "only the base has 'cat'"),  # class 0 has row 2 by name
    ],
)  # fmt: skip
def test_nothing_is_kept_that_does_not_fit(
    base: list[str] | None, names: list[str] | None, count: int, message: str
) -> None:
    with pytest.raises(DiffFitError, match=message):
        choose_rows(base, 5, names, count, "keep")


def test_kept_rows() -> None:
    assert choose_rows(BASE, 5, ["sunflower", "cat"], 2, "keep").rows == (4, 0)
    assert choose_rows(BASE, 5, ["cat", "b", "c", "d", "e"], 5, "keep").moved is None  # renamed
    assert choose_rows(None, 5, list("abcde"), 5, "keep").moved is None
    with pytest.raises(DiffFitError, match="one of match, keep, new; got 'old'"):
        choose_rows(None, 5, None, 5, "old")
    with pytest.raises(DiffFitError, match="class_names must name 3 classes; got 2"):
        choose_rows(None, 5, ["a", "b"], 3)


# -- tables --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("names", "rows"),
    [
        (BASE, [0, 1, 2, 3, 4]),
        (["cat", NFD, "golden retriever", "red_fox", "sunflower"], [0, 3, 1, 2, 4]),
        (["cat", "red fox"], [0, 2]),
        (["bus", "cat", "labrador retriever"], [MEAN, 0, 1]),
    ],
)
@pytest.mark.parametrize("method", ["difffit", "full", "lora", "class_embedding"])
def test_every_method_trains_the_rows_of_the_names(
    method: str, names: list[str], rows: list[float], tmp_path: Path
) -> None:
    if method == "lora":
        pytest.importorskip("peft")
    config = TrainConfig(ckpt=str(base_file(tmp_path)), method=method, model_args={"num_heads": 2})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = build_model(
            config, channels=3, input_size=16, num_classes=len(names), dtype=torch.float32, class_names=names
        )
    assert rows_of(model) == [*rows, NULL]


def test_a_run_records_its_classes_in_the_order_of_the_rows(tmp_path: Path) -> None:
    data = images(tmp_path / "data", ["red fox", "cat", "zebra"])
    run = trainer(base_file(tmp_path), data, ema_decay=0.0)
    assert run.model.state_dict()[TABLE][:, 0].tolist() == [0, 2, MEAN, NULL]
    result = run.train()
    said = "classes: 2 of 3 by name, 1 new ('zebra' from the mean); 3 of the base's are dropped"
    assert said in (result.folder / "log.txt").read_text()
    loaded = load_model(None, result.delta)
    assert loaded.class_names == ["cat", "red fox", "zebra"]
    assert loaded.model.state_dict()[TABLE][:3].mean(1).tolist() == pytest.approx([0, 2, MEAN], abs=0.01)


def test_without_names_the_number_decides_as_ever(tmp_path: Path) -> None:
    file, tables = read_model(base_file(tmp_path, names=None)), []
    same = file.adapt(class_names=list("abcde"))
    assert torch.equal(same.state[TABLE], file.state[TABLE]) and same.class_names == list("abcde")
    for options in ({"class_names": list("abc")}, {"num_classes": 3}):
        torch.manual_seed(3)
        with pytest.warns(UserWarning, match="has 5 classes and 3 were asked for: the class embedding is made anew"):
            tables.append(file.adapt(**options).state[TABLE])
    torch.manual_seed(3)
    drawn = torch.empty(3, 48).normal_(std=0.02)
    assert all(torch.equal(table[:3], drawn) and bool((table[3] == NULL).all()) for table in tables)
    with pytest.warns(UserWarning, match="classes: 5 new, their rows drawn at random"):
        drawn = read_model(base_file(tmp_path)).adapt(class_names=BASE, classes="new").state[TABLE]
    assert drawn[:5].std().item() == pytest.approx(0.02, rel=0.2) and bool((drawn[5] == NULL).all())


def test_rows_chosen_twice_are_still_those_of_the_file(tmp_path: Path) -> None:
    file = read_model(base_file(tmp_path)).adapt(class_names=["sunflower", "red fox", "cat"])
    again = file.adapt(class_names=["cat", "sunflower"])
    assert again.classes == ClassRows(("cat", "sunflower"), (0, 4), (None, None), 5, False, again.classes.said)
    assert again.state[TABLE][:, 0].tolist() == [0, 4, NULL]
    assert model_of(again.dit()).adapt(class_names=["sunflower"]).classes.rows == (4,)


# -- a class table that is not trained ---------------------------------------------------------------------------------
def test_a_delta_without_the_class_table_remembers_its_rows(tmp_path: Path) -> None:
    base, frozen = base_file(tmp_path), DiffFitConfig(class_embedding=False)
    names = ["sunflower", "cat"]
    model = FastDiffFitDiT.from_pretrained(base, class_names=names, difffit=frozen)
    assert rows_of(model) == [4, 0, NULL]
    model.save_delta(tmp_path / "d.safetensors")
    assert read_header(tmp_path / "d.safetensors")["class_rows"] == [4, 0]
    loaded = load_model(base, tmp_path / "d.safetensors")
    assert rows_of(loaded.model) == [4, 0, NULL] and loaded.class_names == names
    with pytest.raises(DeltaMismatchError, match=r"made with the rows 4, 0 .*; the model has the rows 0, 4"):
        FastDiffFitDiT.from_pretrained(base, class_names=names[::-1], difffit=frozen).load_delta(
            tmp_path / "d.safetensors"
        )
    with pytest.warns(UserWarning), pytest.raises(DiffFitError, match="1 of 2 classes have no row in .*base.pt"):
        FastDiffFitDiT.from_pretrained(base, class_names=["cat", "bus"], difffit=frozen)
    plain = FastDiffFitDiT.from_pretrained(base, difffit=frozen)
    plain.save_delta(tmp_path / "old.safetensors")
    assert "class_rows" not in read_header(tmp_path / "old.safetensors")  # as files always were
    assert rows_of(load_model(base, tmp_path / "old.safetensors").model) == [0, 1, 2, 3, 4, NULL]


# -- resuming ------------------------------------------------------------------------------------------------------
def test_a_run_goes_on_only_with_its_own_classes(tmp_path: Path) -> None:
    base, names = base_file(tmp_path), ["cat", "red fox"]
    data = images(tmp_path / "data", names)
    first = trainer(base, data).train()
    config = (first.folder / "config.yaml").read_text()
    assert "\nclasses: match\n" in config
    (first.folder / "config.yaml").write_text(
        config.replace("\nclasses: match\n", "\n")
    )  # as earlier versions wrote it
    again = trainer(base, data, resume="auto", max_steps=2).train()
    assert again.folder == first.folder and again.step == 2
    other = trainer(base, data, resume="auto", max_steps=2, classes="new").train()
    assert other.folder != first.folder
    (data / "cat").rename(data / "sunflower")
    with pytest.raises(
        DiffFitError, match=r"cannot resume .*: the data has .*; class 0 was 'cat' and is 'red fox' now"
    ):
        trainer(base, data, resume=str(first.folder), max_steps=3).train()


def test_a_model_of_ones_own_with_other_classes_is_refused(tmp_path: Path) -> None:
    data, base = images(tmp_path / "data", ["cat", "red fox"]), base_file(tmp_path)
    model = FastDiffFitDiT.from_pretrained(base, class_names=["red fox", "cat"])
    with pytest.raises(DiffFitError, match="class 0 of the model is 'red fox', and class 0 of the data is 'cat'"):
        trainer(None, data, model=model, model_args={})
    larger = FastDiffFitDiT.from_pretrained(base, class_names=["cat", "red fox", "sunflower"])
    assert trainer(None, data, model=larger, model_args={}).parts.class_names == ["cat", "red fox", "sunflower"]


# -- settings that contradict the data ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_args": {**TINY, "num_classes": 7}}, "--model-args has num_classes=7, but by the data it is 2"),
        ({"model_args": {**TINY, "num_classes": 7}, "num_classes": 4}, "num_classes=7, but by --num-classes it is 4"),
        ({"model_args": {**TINY, "input_size": 32}}, "--model-args has input_size=32, but by the data it is 16"),
        ({"model_args": {**TINY, "in_channels": 4}}, "--model-args has in_channels=4, but by the data it is 3"),
        ({"model_args": TINY, "num_heads": 4}, "--model-args has num_heads=2, but by --num-heads it is 4"),
        ({"model_args": TINY, "classes": "keep"}, "--classes keep keeps the rows of a checkpoint; give --ckpt"),
    ],
)
def test_sizes_that_the_data_contradicts_are_refused(changes: dict, message: str, tmp_path: Path) -> None:
    data = images(tmp_path / "data", ["a", "b"])
    with pytest.raises(DiffFitError, match=message):
        trainer(None, data, **changes)
    agreeing = {"model_args": {**TINY, "num_classes": 2, "input_size": 16, "in_channels": 3}, "num_heads": 2}
    assert trainer(None, data, **agreeing).model.num_classes == 2


# -- labels --------------------------------------------------------------------------------------------------------
NUMBERS = ["1", "2", "3"]


@pytest.mark.parametrize(
    ("labels", "names", "numbers"),
    [
        (["#0", "#2", "name:3", 1], NUMBERS, [0, 2, 2, 1]),
        (["0", "1", "2"], ["0", "1", "2"], [0, 1, 2]),  # both readings are one
        (["3"], NUMBERS, [2]),  # there is no class 3
        (["1", "cat"], ["dog", "cat"], [1, 1]),
        ([NFD], ["crème brûlée"], [0]),
        (["name:#1", "#0"], ["#1", "x"], [0, 0]),
        ([np.int64(1), "1"], None, [1, 1]),
        (
            ["lower_a", "upper_A", "name:lower_a", "a"],
            ["A", "a", "b"],
            [1, 0, 1, 1],
        ),  # letters by the names of their folders
        (["a", "lower_a"], ["upper_A", "lower_a"], [1, 1]),
        (["lower_a", "a"], ["a", "lower_a"], [1, 0]),
    ],
)
def test_labels_that_mean_one_class(labels: list, names: list[str] | None, numbers: list[int]) -> None:
    assert resolve_labels(labels, 3, names).tolist() == numbers


@pytest.mark.parametrize(
    ("label", "names", "message"),
    [
        ("1", NUMBERS, r"'1' can mean #0 \(named '1'\) or #1 \(named '2'\); say #NUMBER or name:NAME"),
        ("0", NUMBERS, "no class is named '0'; where the names are numbers, class 0 is written '#0'"),
        ("crane", ["crane", "x", "crane"], r"can mean #0 .* or #2"),
        ("#1", ["#1", "x"], r"can mean #0 \(named '#1'\) or #1 \(named 'x'\)"),
        ("name:y", ["name:y", "y"], "can mean #0 .* or #1"),
        ("#3", None, r"in 0\.\.2; got 3"),
        ("name:z", NUMBERS, "there is no class 'name:z'"),
        ("lower_A", ["A", "a"], "there is no class 'lower_A'"),
        ("1_0", None, "carries no class names"),
        (2.7, None, "must be a whole number or a name; got 2.7"),
        (True, None, "got True"),
        (None, None, "got None"),
    ],
)
def test_labels_that_do_not(label: object, names: list[str] | None, message: str) -> None:
    with pytest.raises(DiffFitError, match=message):
        resolve_labels([label], 3, names)
