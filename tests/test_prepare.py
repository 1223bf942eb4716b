"""``difffit prepare`` on small archives with the internal layout of the real ones."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import io
import os
import shutil
import stat
import subprocess
import tarfile
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from dataset_twins import CLASSES, MAKERS, archive, cars_in_one, food101, jpeg

from difffit_fast.cli import prepare as cli
from difffit_fast.data import ImageFolder
from difffit_fast.data.prepare import DATASETS, Split, prepare
from difffit_fast.data.prepare.archives import Source, unpack
from difffit_fast.data.prepare.flowers import FLOWER_NAMES
from difffit_fast.data.prepare.layout import safe_name
from difffit_fast.errors import DiffFitError


@pytest.fixture
def small(monkeypatch):
    """Make a dataset's small twin in a folder and set the known totals to its own."""

    def make(name, root, maker=None):
        root.mkdir(parents=True, exist_ok=True)
        totals = (maker or MAKERS[name])(root)
        splits = {split: Split("small", total) for split, total in totals.items()}
        monkeypatch.setitem(DATASETS, name, dataclasses.replace(DATASETS[name], splits=splits))
        return totals

    return make


def _tree(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


# ---------------------------------------------------------------- the eight


def test_all_eight_are_there_and_their_totals_add_up():
    assert sorted(DATASETS) == sorted(MAKERS)
    assert len(FLOWER_NAMES) == len(set(FLOWER_NAMES)) == 102
    for dataset in DATASETS.values():
        assert dataset.home.startswith("https://")
    flowers, caltech = DATASETS["flowers102"].splits, DATASETS["caltech101"].splits
    assert sum(flowers["train+val"].totals[1:]) == flowers["all"].totals[1] == 8189
    assert sum(caltech["30-per-class"].totals[1:]) == caltech["all"].totals[1] == 8677
    assert caltech["30-per-class"].totals[1] == 101 * 30
    assert DATASETS["food101"].splits["official"].totals == (101, 101 * 750, 101 * 250)
    assert DATASETS["sun397"].splits["partition-01"].totals == (397, 397 * 50, 397 * 50)


@pytest.mark.parametrize("name", MAKERS)
def test_from_archives_to_image_folders(name, small, tmp_path):
    root = tmp_path / "downloads"
    totals = small(name, root)
    for split, (classes, train, test) in totals.items():
        out, info = prepare(name, root, tmp_path / split, split)
        assert (info["classes"], info["train"], info["test"], info["complete"]) == (classes, train, test, True)
        assert info["class_names"] == CLASSES[name]
        data = ImageFolder(out / "train", 8)
        assert data.class_names == CLASSES[name] and len(data) == train
        assert (out / "test").exists() == (test > 0)
        if test:
            assert len(ImageFolder(out / "test", 8)) == test
        for i in range(len(data)):
            data.load(i, 0)
        assert data.report() == []
        names = {path.relative_to(out).parts[0] for path in out.iterdir()}
        assert names <= {"train", "test", "files.sha256", "dataset.json"}
    assert not list(tmp_path.glob("*.partial"))
    first = next(iter(totals))
    assert prepare(name, root)[0] == root / "prepared" / name  # the defaults
    assert _tree(root / "prepared" / name) == _tree(tmp_path / first)


@pytest.mark.parametrize("name", MAKERS)
def test_each_has_a_recipe_that_the_trainer_accepts(name):
    from difffit_fast.train.config import TrainConfig

    path = Path(__file__).parent.parent / "examples" / "recipes" / f"{name}.yaml"
    config = TrainConfig.load(path)
    split = next(iter(DATASETS[name].splits))
    assert config.num_classes == DATASETS[name].splits[split].totals[0]
    assert (config.max_steps, config.global_batch_size, config.learning_rate(10_000)) == (24_000, 32, 1e-3)
    assert (config.method, config.difffit, config.model, config.image_size) == ("difffit", "paper", "DiT-XL/2", 256)
    assert (config.num_sampling_steps, config.cfg_scale) == (50, 1.5)
    assert config.data_path == f"prepared/{name}/train"
    text = path.read_text()
    assert f"--split {split} " in text and "--num-fid-samples 10000" in text


def _check_parts(out, expected):
    got = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*.[jJ][pP][gG]")}
    assert got == {path: jpeg(key) for path, key in expected.items()}


def test_every_image_lands_in_its_part_and_class(small, tmp_path):
    small("food101", tmp_path / "f")
    _check_parts(
        prepare("food101", tmp_path / "f")[0],
        {
            "train/apple_pie/1.jpg": "food-101/images/apple_pie/1.jpg",
            "train/apple_pie/2.jpg": "food-101/images/apple_pie/2.jpg",
            "train/waffles/10.jpg": "food-101/images/waffles/10.jpg",
            "test/apple_pie/3.jpg": "food-101/images/apple_pie/3.jpg",
            "test/waffles/11.jpg": "food-101/images/waffles/11.jpg",
        },
    )
    small("flowers102", tmp_path / "o")
    one, last = "001.pink_primrose", "102.blackberry_lily"
    where = {1: f"train/{one}", 2: f"train/{last}", 3: f"train/{one}", 4: f"train/{last}"}
    where |= {5: f"test/{one}", 6: f"test/{last}"}
    expected = {f"{folder}/image_0000{i}.jpg": f"jpg/image_0000{i}.jpg" for i, folder in where.items()}
    _check_parts(prepare("flowers102", tmp_path / "o")[0], expected)
    small("cub200", tmp_path / "c")
    out = prepare("cub200", tmp_path / "c")[0]
    assert [path.name for path in (out / "test").rglob("*.jpg")] == ["Black_Footed_Albatross_0001_1.jpg"]
    small("stanford-cars", tmp_path / "s")
    hummer, ram = CLASSES["stanford-cars"]
    _check_parts(
        prepare("stanford-cars", tmp_path / "s")[0],
        {
            f"train/{hummer}/00001.jpg": "cars_train/00001.jpg",
            f"train/{ram}/00002.jpg": "cars_train/00002.jpg",
            f"train/{ram}/00003.jpg": "cars_train/00003.jpg",
            f"test/{ram}/00001.jpg": "cars_test/00001.jpg",
            f"test/{hummer}/00002.jpg": "cars_test/00002.jpg",
        },
    )


def test_cars_in_their_other_form(small, tmp_path):
    small("stanford-cars", tmp_path, cars_in_one)
    out, info = prepare("stanford-cars", tmp_path)
    assert (info["classes"], info["train"], info["test"]) == (2, 3, 2)
    assert info["class_names"] == CLASSES["stanford-cars"]
    assert (out / "test" / CLASSES["stanford-cars"][0] / "000004.jpg").exists()


def test_caltech_draws_the_same_30_wherever_it_runs(small, tmp_path):
    small("caltech101", tmp_path / "a")
    small("caltech101", tmp_path / "b")
    first, second = (prepare("caltech101", tmp_path / x, split="30-per-class")[0] for x in "ab")
    assert (first / "files.sha256").read_text() == (second / "files.sha256").read_text()
    assert len(list((first / "train" / "Faces").iterdir())) == 30


@pytest.mark.parametrize("name", MAKERS)
def test_from_extracted_folders(name, small, tmp_path):
    root, extracted = tmp_path / "archives", tmp_path / "extracted"
    small(name, root)
    want = _tree(prepare(name, root)[0])
    extracted.mkdir()
    for path in root.iterdir():
        if path.suffix == ".mat":
            shutil.copy(path, extracted)
        elif path.is_file():
            unpack(path, extracted)
    before = _tree(extracted)
    out, _ = prepare(name, extracted, tmp_path / "out")
    assert _tree(out) == want
    assert _tree(extracted) == before  # linked, not moved


def test_hard_links_or_copies(small, tmp_path, monkeypatch):
    small("artbench10", tmp_path)
    unpack(tmp_path / "artbench-10-imagefolder-split.tar", tmp_path)
    linked = prepare("artbench10", tmp_path, tmp_path / "linked")[0] / "train/ukiyo_e/x_0.jpg"
    copied = prepare("artbench10", tmp_path, tmp_path / "copied", copy=True)[0] / "train/ukiyo_e/x_0.jpg"
    assert (linked.stat().st_nlink, copied.stat().st_nlink) == (2, 1)

    def no_links(*args):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", no_links)
    other = prepare("artbench10", tmp_path, tmp_path / "other")[0] / "train/ukiyo_e/x_0.jpg"
    assert other.read_bytes() == copied.read_bytes() and other.stat().st_nlink == 1


# ---------------------------------------------------------------- verification


def test_a_second_run_verifies(small, tmp_path):
    small("food101", tmp_path)
    out, info = prepare("food101", tmp_path)
    listing = (out / "files.sha256").read_text()
    assert listing == "".join(
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(out).as_posix()}\n"
        for path in sorted(out.rglob("*.jpg"))
    )
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "-c", "--quiet", "files.sha256"], cwd=out, check=True)
    (tmp_path / "food-101.tar.gz").unlink()  # no longer needed
    assert prepare("food101", tmp_path) == (out, info)

    image = out / "train/apple_pie/1.jpg"
    whole = image.read_bytes()
    image.write_bytes(whole[:-1] + b"x")
    with pytest.raises(DiffFitError, match=r"1 files are changed, the first is train/apple_pie/1\.jpg"):
        prepare("food101", tmp_path)
    image.unlink()
    with pytest.raises(DiffFitError, match=r"1 files are missing, the first is train/apple_pie/1\.jpg"):
        prepare("food101", tmp_path)
    image.write_bytes(whole)
    (out / "test/waffles/new.jpg").write_bytes(b"")
    with pytest.raises(DiffFitError, match=r"not in the listing, the first is test/waffles/new\.jpg"):
        prepare("food101", tmp_path)


def test_another_split_or_foreign_files_are_not_overwritten(small, tmp_path):
    small("caltech101", tmp_path)
    prepare("caltech101", tmp_path)
    with pytest.raises(DiffFitError, match="holds caltech101 with split all, not caltech101 with split 30-per-class"):
        prepare("caltech101", tmp_path, split="30-per-class")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(DiffFitError, match="was not made by difffit prepare"):
        prepare("caltech101", tmp_path, tmp_path / "mine")
    (tmp_path / "new.partial").mkdir()
    (tmp_path / "new.partial" / "thesis.tex").touch()
    with pytest.raises(DiffFitError, match="is in the way"):
        prepare("caltech101", tmp_path, tmp_path / "new")
    assert (tmp_path / "new.partial" / "thesis.tex").exists()


def test_a_killed_run_is_started_over(small, tmp_path):
    small("food101", tmp_path)
    partial = tmp_path / "prepared" / "food101.partial"
    (partial / "train" / "apple_pie").mkdir(parents=True)
    (partial / ".difffit-prepare").touch()
    (partial / "train" / "apple_pie" / "half.jpg").write_bytes(b"half")
    out, info = prepare("food101", tmp_path)
    assert info["complete"] and not (out / "train/apple_pie/half.jpg").exists() and not partial.exists()


# ---------------------------------------------------------------- what can be wrong


@pytest.mark.parametrize("name", MAKERS)
def test_a_missing_archive_names_it_and_the_home_page(name, tmp_path):
    with pytest.raises(DiffFitError) as caught:
        prepare(name, tmp_path)
    assert DATASETS[name].home in str(caught.value)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_a_missing_second_piece_is_named(small, tmp_path):
    small("sun397", tmp_path / "sun")
    (tmp_path / "sun" / "Partitions.zip").unlink()
    with pytest.raises(DiffFitError, match=r"Partitions\.zip.*--split all"):
        prepare("sun397", tmp_path / "sun")
    assert prepare("sun397", tmp_path / "sun", split="all")[1]["train"] == 7
    small("flowers102", tmp_path / "flowers")
    (tmp_path / "flowers" / "setid.mat").write_bytes(b"MATLAB, or not")
    with pytest.raises(DiffFitError, match=r"setid\.mat cannot be read"):
        prepare("flowers102", tmp_path / "flowers")
    (tmp_path / "flowers" / "setid.mat").unlink()
    with pytest.raises(DiffFitError, match=r"does not hold setid\.mat"):
        prepare("flowers102", tmp_path / "flowers")
    small("stanford-cars", tmp_path / "cars")
    (tmp_path / "cars" / "cars_test_annos_withlabels.mat").unlink()
    with pytest.raises(DiffFitError, match=r"cars_test_annos_withlabels\.mat"):
        prepare("stanford-cars", tmp_path / "cars")
    assert prepare("stanford-cars", tmp_path / "cars", split="train")[1]["train"] == 3


def test_counts_and_missing_images(small, tmp_path):
    food101(tmp_path)  # the real totals
    with pytest.raises(DiffFitError, match=r"101 classes, 75750 training and 25250 test images, but 2, 3 and 2"):
        prepare("food101", tmp_path)
    out, info = prepare("food101", tmp_path, allow_incomplete=True)
    assert not info["complete"] and info["train"] == 3
    shutil.rmtree(out)

    small("food101", tmp_path)
    unpack(tmp_path / "food-101.tar.gz", tmp_path)
    (tmp_path / "food-101/images/waffles/10.jpg").unlink()
    with pytest.raises(DiffFitError, match=r"1 of 5 images of Food-101 are missing, the first is .*waffles/10\.jpg"):
        prepare("food101", tmp_path)
    assert not out.exists()
    assert prepare("food101", tmp_path, allow_incomplete=True)[1]["train"] == 2


@pytest.mark.parametrize("cut", [0, 10, -40])
def test_a_damaged_archive_is_a_clear_error_and_leaves_nothing(small, tmp_path, cut):
    small("food101", tmp_path)
    packed = tmp_path / "food-101.tar.gz"
    whole = packed.read_bytes()
    packed.write_bytes(whole[:cut])
    with pytest.raises(DiffFitError, match="damaged or incompletely downloaded"):
        prepare("food101", tmp_path)
    flipped = bytearray(whole)
    flipped[-5] ^= 1  # in gzip's checksum
    packed.write_bytes(flipped)
    with pytest.raises(DiffFitError, match="damaged or incompletely downloaded"):
        prepare("food101", tmp_path)
    assert os.listdir(tmp_path) == ["food-101.tar.gz"]


@pytest.mark.parametrize(
    "name", ["../escaped.txt", "/tmp/escaped.txt", "a/../../escaped.txt", "C:/escaped.txt", "..\\escaped.txt"]
)
@pytest.mark.parametrize("kind", ["x.tar", "x.tgz", "x.zip"])
def test_archives_cannot_write_outside(tmp_path, name, kind):
    archive(tmp_path / kind, {"fine.txt": b"fine", name: b"evil"})
    with pytest.raises(DiffFitError, match="unsafe path"):
        unpack(tmp_path / kind, tmp_path / "deep" / "target")
    assert [path.name for path in tmp_path.rglob("*.txt")] == ["fine.txt"]
    assert not Path("/tmp/escaped.txt").exists()


def test_links_in_archives_are_not_made(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            link = tarfile.TarInfo("link")
            link.type, link.linkname = kind, str(outside)
            tar.addfile(link)
        info = tarfile.TarInfo("link/evil.txt")
        info.size = 4
        tar.addfile(info, io.BytesIO(b"evil"))
    unpack(tmp_path / "x.tar", tmp_path / "target")
    assert list(outside.iterdir()) == []
    assert (tmp_path / "target/link/evil.txt").read_bytes() == b"evil"


def test_links_in_zip_archives_are_not_made_either(tmp_path):
    link = zipfile.ZipInfo("link.jpg")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as bundle:
        bundle.writestr(link, "/etc/passwd")
        bundle.writestr(".", b"")  # a name of no parts
        bundle.writestr("fine.txt", b"fine")
    unpack(tmp_path / "x.zip", tmp_path / "target")
    assert [path.name for path in (tmp_path / "target").iterdir()] == ["fine.txt"]


def _name_also(root, dataset, path):
    """One more entry, with ``path``, in an extracted dataset's list."""
    if dataset == "stanford-cars":
        io = pytest.importorskip("scipy.io")
        file = next(file for file in root.rglob("cars_*annos.mat") if "test" not in file.name)
        table = io.loadmat(file)
        key = "relative_im_path" if "cars_annos" in file.name else "fname"
        table["annotations"][0, 0][key] = f"{path}.jpg"
        io.savemat(file, {name: value for name, value in table.items() if not name.startswith("__")})
        return
    name, line = {
        "food101": ("train.txt", path),
        "sun397": ("Training_01.txt", f"{path}.jpg"),
        "cub200": ("images.txt", f"1 {path}.jpg"),
        "df20m-mini": ("DF20M-train_metadata_PROD.csv", f"1,Amanita,,,0.0,{path}.jpg"),
    }[dataset]
    file = next(root.rglob(name))
    file.write_text(file.read_text() + f"\n{line}\n")


@pytest.mark.parametrize("path", ["a/../../../../victim", "a/../../victim", "{absolute}", "a/link"])
@pytest.mark.parametrize("dataset", ["food101", "sun397", "cub200", "stanford-cars", "cars_in_one", "df20m-mini"])
def test_no_list_can_name_a_file_elsewhere(dataset, path, small, tmp_path):
    """Whatever reads the list, what it names outside is neither taken nor moved; through a link neither."""
    maker = cars_in_one if dataset == "cars_in_one" else None
    dataset = "stanford-cars" if maker else dataset
    victim = tmp_path / "victim.jpg"
    victim.write_bytes(jpeg("victim"))
    root = tmp_path / "downloads"
    small(dataset, root, maker)
    for packed in [file for file in root.iterdir() if file.suffix in (".tgz", ".gz", ".zip")]:
        unpack(packed, root)
        packed.unlink()
    folder = next(root.rglob("*.[jJ][pP][gG]")).parent
    base = {"food101": root / "food-101/images", "sun397": root / "SUN397", "cub200": root / "CUB_200_2011/images"}
    (base.get(dataset, folder) / "a").mkdir(exist_ok=True)
    (base.get(dataset, folder) / "a" / "link.jpg").symlink_to(victim)
    _name_also(root, dataset, path.replace("{absolute}", str(victim.with_suffix(""))))
    before = _tree(tmp_path)
    expected = r"expected a relative path|is a link to|images of .* missing"
    with pytest.raises(DiffFitError, match=expected):
        prepare(dataset, root, tmp_path / "out")
    assert _tree(tmp_path) == before
    with suppress(DiffFitError):
        prepare(dataset, root, tmp_path / "out", allow_incomplete=True)
    after = _tree(tmp_path)
    assert [name for name, data in after.items() if data == jpeg("victim")] == [
        name for name, data in before.items() if data == jpeg("victim")
    ]


def test_only_what_was_unpacked_here_is_moved(small, tmp_path):
    """A failure in the last step deletes what was made and nothing else; extracted folders keep their images."""
    small("food101", tmp_path)
    unpack(tmp_path / "food-101.tar.gz", tmp_path / "elsewhere")
    (tmp_path / "food-101").symlink_to(tmp_path / "elsewhere" / "food-101")  # the base itself may be a link
    before = _tree(tmp_path / "elsewhere")
    prepare("food101", tmp_path)
    assert _tree(tmp_path / "elsewhere") == before
    source = Source(tmp_path, tmp_path / "scratch", "home")
    (tmp_path / "scratch" / "0").mkdir(parents=True)
    (tmp_path / "scratch" / "0" / "own.jpg").touch()
    (tmp_path / "scratch" / "0" / "link.jpg").symlink_to(tmp_path / "food-101.tar.gz")
    assert source.is_scratch(tmp_path / "scratch" / "0" / "own.jpg")
    assert not source.is_scratch(tmp_path / "scratch" / "0" / "link.jpg")
    assert not source.is_scratch(tmp_path / "scratch" / ".." / "food-101.tar.gz")


def test_an_image_of_both_parts_is_refused(small, tmp_path):
    small("food101", tmp_path)
    unpack(tmp_path / "food-101.tar.gz", tmp_path)
    with open(tmp_path / "food-101/meta/test.txt", "a") as file:
        file.write("\napple_pie/1\n")
    with pytest.raises(DiffFitError, match=r"is listed twice, as train/apple_pie/1\.jpg and as test/apple_pie/1\.jpg"):
        prepare("food101", tmp_path, allow_incomplete=True)


def test_a_link_in_an_extracted_folder_gives_the_file_it_leads_to(small, tmp_path):
    small("food101", tmp_path)
    unpack(tmp_path / "food-101.tar.gz", tmp_path)
    image = next((tmp_path / "food-101/images/apple_pie").iterdir())
    stored = image.rename(tmp_path / "food-101/images/stored")
    image.symlink_to("../stored")
    out, _ = prepare("food101", tmp_path)
    placed = next(path for path in out.rglob(image.name) if path.parent.name == "apple_pie")
    assert not placed.is_symlink() and placed.read_bytes() == stored.read_bytes()
    assert placed.relative_to(out).as_posix() in (out / "files.sha256").read_text()


@pytest.mark.parametrize("kind", ["link", "file"])
def test_what_is_in_the_way_of_the_partial_folder_stays(kind, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/.difffit-prepare").touch()
    partial = tmp_path / "out.partial"
    partial.symlink_to("elsewhere") if kind == "link" else partial.write_text("mine")
    before = _tree(tmp_path)
    with pytest.raises(DiffFitError, match="is in the way"):
        prepare("food101", tmp_path, tmp_path / "out")
    assert _tree(tmp_path) == before


def test_a_name_in_a_zip_that_is_no_text_is_said(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as bundle:
        bundle.writestr("é.txt", b"x")
    data = (tmp_path / "x.zip").read_bytes()
    (tmp_path / "x.zip").write_bytes(data.replace("é".encode(), b"\xff\xff"))
    with pytest.raises(DiffFitError, match="damaged"):
        unpack(tmp_path / "x.zip", tmp_path / "target")


def test_a_class_number_of_zero_is_not_the_last_class(small, tmp_path):
    io = pytest.importorskip("scipy.io")
    small("flowers102", tmp_path)
    io.savemat(tmp_path / "imagelabels.mat", {"labels": np.array([[0, 102, 1, 102, 1, 102]], np.uint8)})
    with pytest.raises(DiffFitError, match="not those of Oxford Flowers"):
        prepare("flowers102", tmp_path, allow_incomplete=True)


def test_names_are_safe():
    assert safe_name("apple_pie") == "apple_pie"
    assert safe_name("001.Black_footed_Albatross") == "001.Black_footed_Albatross"
    assert safe_name('a<b>:"|?*\\c\x00') == "a-b-------c-"
    assert safe_name(" ..x.. ") == "x"
    with pytest.raises(DiffFitError, match="empty name"):
        safe_name(" . ")


def test_two_classes_of_one_name_stay_apart(small, tmp_path):
    small("df20m-mini", tmp_path)
    header = "species,class_id,image_path\n"
    shutil.rmtree(tmp_path / "prepared", ignore_errors=True)
    (tmp_path / "DF20M-train_metadata_PROD.csv").write_text(
        header + "Boletus,0,1-1.JPG\nBoletus,1,1-2.JPG\n,2,1-3.JPG\n"
    )
    (tmp_path / "DF20M-public_test_metadata_PROD.csv").write_text(header)
    names = prepare("df20m-mini", tmp_path, allow_incomplete=True)[1]["class_names"]
    assert names == ["Boletus_000", "Boletus_001", "class_002"]
    (tmp_path / "DF20M-train_metadata_PROD.csv").write_text("species,image_path\n")
    with pytest.raises(DiffFitError, match="no column class_id"):
        prepare("df20m-mini", tmp_path, tmp_path / "other")


def test_the_command(small, tmp_path, capsys):
    small("cub200", tmp_path)
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)

    def run(*words):
        return cli.run(parser.parse_args([str(word) for word in words]))

    assert run("cub200", "--root", tmp_path) == 0
    assert "2 classes, 3 training and 1 test images" in capsys.readouterr().out
    assert run("--list") == 0
    text = capsys.readouterr().out
    assert all(name in text for name in DATASETS) and "20" in text
    for words, message in (
        (("cub200",), "expected difffit prepare NAME --root DIR"),
        (("cub", "--root", tmp_path), "nearest known one is 'cub200'"),
        (("cub200", "--root", tmp_path / "absent"), "is not a folder"),
        (("cub200", "--root", tmp_path, "--split", "third"), "no split 'third'; expected one of official"),
    ):
        with pytest.raises(DiffFitError, match=message):
            run(*words)


def test_what_systems_leave_is_no_class(small, tmp_path, capsys):
    small("artbench10", tmp_path / "r")
    (packed,) = (tmp_path / "r").iterdir()
    unpack(packed, tmp_path / "r")
    packed.unlink()
    train = next((tmp_path / "r").rglob("train"))
    for name in ("@eaDir", "ukiyo_e/@eaDir"):
        (train / name).mkdir()
        (train / name / "x.jpg").write_bytes(jpeg(name))
    (train / "ukiyo_e" / "notes.txt").touch()
    out, info = prepare("artbench10", tmp_path / "r", tmp_path / "out")
    assert info["complete"] and (info["classes"], info["train"], info["test"]) == (2, 6, 2)
    assert info["left_out"] == [
        "train: left out: 2 files and folders of the system (the first: @eaDir); "
        "1 files without an image's name ending (the first: ukiyo_e/notes.txt)"
    ]
    words = argparse.Namespace(
        list=False,
        name="artbench10",
        root=str(tmp_path / "r"),
        out=str(out),
        split=None,
        allow_incomplete=False,
        copy=False,
    )
    assert cli.run(words) == 0
    assert "left out: 2 files and folders of the system" in capsys.readouterr().err
