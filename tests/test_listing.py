"""What is an image of which class, for every command."""

from __future__ import annotations

import json
import os

import pytest
import torch
from PIL import Image

from difffit_fast.check import check
from difffit_fast.cli import main
from difffit_fast.data import ImageFolder, LatentCache, open_data
from difffit_fast.data.extract import ExtractConfig, Extraction
from difffit_fast.data.listing import class_order, list_images
from difffit_fast.errors import DiffFitError
from difffit_fast.evaluate.sources import open_images

SYSTEM_FOLDERS = ["@eaDir", "__MACOSX", "$RECYCLE.BIN", "lost+found", "System Volume Information", "#recycle", "@EADIR"]
HIDDEN_FOLDERS = [".ipynb_checkpoints", ".Trashes", ".git"]


def picture(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (value, value, value)).save(path)


@pytest.fixture
def tree(tmp_path):
    """Two classes of two images, amid what systems, people and programs leave."""
    root = tmp_path / "images"
    good = ["cat/1.png", "cat/2.png", "dog/deep/er/3.png", "dog/linked.png"]
    for name in good[:3]:
        picture(root / name)
    picture(tmp_path / "elsewhere.png")
    os.symlink(tmp_path / "elsewhere.png", root / "dog/linked.png")
    for junk in SYSTEM_FOLDERS + HIDDEN_FOLDERS:
        picture(root / junk / "a.png")
        picture(root / "cat" / junk / "b.png")
    for name in ("Thumbs.db", "desktop.ini", ".DS_Store", "._1.png", "notes.txt"):
        (root / name).touch()
        (root / "cat" / name).touch()
    picture(root / "stray.png")
    os.symlink(root / "nothing", root / "cat" / "gone.png")
    os.symlink("self.png", root / "cat" / "self.png")
    os.mkfifo(root / "cat" / "pipe.png")
    os.symlink(root, root / "dog" / "up")
    os.symlink(root / "dog", root / "dog" / "deep" / "round")
    os.symlink(tmp_path, root / "higher")
    return root, good


def test_every_command_sees_the_same_images(tree, tmp_path, capsys):
    root, good = tree
    assert ImageFolder(root, 8).files == good
    assert ImageFolder(root, 8).class_names == ["cat", "dog"]
    assert [path.relative_to(root).as_posix() for path in open_images(root).files] == good
    flags = ["--data-path", str(root), "--features-path", str(tmp_path / "f"), "--vae", "none", "--image-size", "8"]
    assert main(["extract", *flags]) == 0
    assert LatentCache(tmp_path / "f").files == good
    said = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert len(said) == 1 and "1 images beside the class folders (the first: stray.png)" in said[0]
    report = check(root, image_size=8).to_dict()
    assert report["facts"]["images"] == 4
    told = {finding["what"]: finding["count"] for finding in report["findings"] if finding["level"] == "left out"}
    assert told == {reason: len(paths) for reason, paths in list_images(root).left_out.items()}


def test_what_is_left_out_is_counted_by_reason(tree):
    root, _ = tree
    left_out = list_images(root).left_out
    assert {reason: len(paths) for reason, paths in left_out.items()} == {
        "files and folders of the system": 2 * (len(SYSTEM_FOLDERS) + 2),
        "hidden files and folders": 2 * (len(HIDDEN_FOLDERS) + 2),
        "files without an image's name ending": 2,
        "images beside the class folders": 1,
        "broken links and special files": 3,
        "links back into the folder": 3,
    }
    (note,) = ImageFolder(root, 8).notes
    assert note.startswith(f"{root}: left out: ") and "3 links back into the folder (the first: dog/deep/round)" in note


def test_a_flat_folder_is_for_evaluation(tmp_path):
    for name in ("b.png", "a.png"):
        picture(tmp_path / name)
    (tmp_path / "logs").mkdir()
    listing = list_images(tmp_path)
    assert (listing.flat, listing.classes) == (["a.png", "b.png"], {})
    assert listing.left_out == {"folders without an image": ["logs"]}
    assert len(open_images(tmp_path)) == 2
    with pytest.raises(DiffFitError, match=r"no sub-folders of images \(2 lie in the folder itself\)"):
        ImageFolder(tmp_path, 8)
    picture(tmp_path / "logs" / "c.png")
    for opened in (open_images, lambda path: ImageFolder(path, 8)):
        with pytest.raises(DiffFitError, match="2 images beside its folders and 1 in them"):
            opened(tmp_path)


def test_a_folder_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(DiffFitError, match="cannot be read"):
        list_images(tmp_path / "missing")


# ---------------------------------------------------------------- the order of classes


def test_class_order():
    assert class_order(["10", "2", "1"]) == ["1", "2", "10"]
    assert class_order(["10", "2", "1", "a"]) == ["1", "10", "2", "a"]
    assert class_order(["002", "010", "1"]) == ["1", "002", "010"]
    assert class_order(["1", "01", "2"]) == ["01", "1", "2"]  # of one value: as text
    assert class_order(["-1", "-2", "3"]) == sorted(["-1", "-2", "3"])
    assert class_order(["1", "٣", "20"]) == sorted(["1", "٣", "20"])


@pytest.fixture
def numbers(tmp_path):
    for name in ("1", "2", "10"):
        picture(tmp_path / "numbers" / name / "x.png", int(name))
    return tmp_path / "numbers"


def test_numbers_are_ordered_by_value_and_it_is_said(numbers, tmp_path):
    data = ImageFolder(numbers, 8)
    assert data.class_names == ["1", "2", "10"]
    assert [data.pixels(i)[0, 0, 0] for i in range(3)] == [1, 2, 10] and data.labels.tolist() == [0, 1, 2]
    assert [note for note in data.notes if "class 1 is '2', not '10'" in note]
    for name in ("01", "02", "10"):
        picture(tmp_path / "padded" / name / "x.png")
    assert ImageFolder(tmp_path / "padded", 8).notes == []


def test_an_order_that_is_recorded_stays(numbers):
    old = ImageFolder(numbers, 8, class_names=["1", "10", "2"])
    assert old.class_names == ["1", "10", "2"] and old.files == ["1/x.png", "10/x.png", "2/x.png"]
    assert [old.pixels(i)[0, 0, 0] for i in range(3)] == [1, 10, 2] and old.notes == []
    assert ImageFolder(numbers, 8, class_names=["1", "10", "3"]).class_names == ["1", "2", "10"]
    assert open_data(path=numbers, image_size=8, class_names=["10", "2", "1"]).class_names == ["10", "2", "1"]


def test_an_old_extraction_goes_on_in_its_order(numbers, tmp_path, monkeypatch):
    """Features begun when the order was that of text are finished, verified and loaded as they are."""
    config = ExtractConfig(str(numbers), str(tmp_path / "f"), image_size=8, vae="none", shard_size=1)
    monkeypatch.setattr("difffit_fast.data.listing.class_order", sorted)
    old = Extraction(config)
    old.run(0, 2)  # every other shard
    monkeypatch.undo()
    for _ in range(2):
        new = Extraction(config)
        new.run()
        assert new.finish() is not None
    cache = LatentCache(tmp_path / "f")
    assert cache.class_names == ["1", "10", "2"]
    assert [int(cache.stored(i)[0, 0, 0]) for i in range(3)] == [1, 10, 2] and cache.labels.tolist() == [0, 1, 2]
    assert json.loads((tmp_path / "f" / "extract.json").read_text())["class_names"] == ["1", "10", "2"]


def test_letters_have_a_name_that_every_file_system_tells_apart(tmp_path, capsys):
    names = ["lower_a", "upper_A", "B", "upper_arm", "lower_Z", "upper_Γ", "upper_1"]
    for value, name in enumerate(names):
        picture(tmp_path / "x" / name / "0.png", value)
    classes = sorted(["a", "A", "B", "upper_arm", "lower_Z", "Γ", "upper_1"])
    data = ImageFolder(tmp_path / "x", 8, flip=False)
    assert data.class_names == classes
    assert {data.class_names[label]: int(data.pixels(i)[0, 0, 0]) for i, label in enumerate(data.labels)} == {
        "a": 0, "A": 1, "B": 2, "upper_arm": 3, "lower_Z": 4, "Γ": 5, "upper_1": 6
    }  # fmt: skip
    config = ["--features-path", str(tmp_path / "f"), "--vae", "none", "--image-size", "8", "--channels", "1"]
    assert main(["extract", "--data-path", str(tmp_path / "x"), *config]) == 0
    cache = LatentCache(tmp_path / "f", flip=False)
    assert cache.class_names == classes and cache.files == data.files and cache.channels == 1
    assert all(torch.equal(cache.load(i, 0)[0], data.load(i, 0)[0][:1]) for i in range(len(data)))
    assert check(tmp_path / "f").ok and not [f for f in check(tmp_path / "f").findings if "case" in f.what]
    with pytest.raises(DiffFitError, match="its channels is 1, now 3"):
        Extraction(ExtractConfig(str(tmp_path / "x"), str(tmp_path / "f"), image_size=8, vae="none"))
    with pytest.raises(DiffFitError, match="--channels 1 goes with --vae none"):
        ExtractConfig(str(tmp_path / "x"), str(tmp_path / "g"), image_size=8, channels=1)
    picture(tmp_path / "x" / "A" / "0.png")
    with pytest.raises(DiffFitError, match="two folders of class 'A'"):
        list_images(tmp_path / "x")
