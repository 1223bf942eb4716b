"""``difffit prepare`` on small archives with the internal layout of the real ones."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import io
import os
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from difffit_fast.cli import prepare as cli
from difffit_fast.data import ImageFolder
from difffit_fast.data.prepare import DATASETS, Split, prepare
from difffit_fast.data.prepare.archives import unpack
from difffit_fast.data.prepare.flowers import FLOWER_NAMES
from difffit_fast.data.prepare.layout import safe_name
from difffit_fast.errors import DiffFitError


def _jpeg(key):
    """A tiny JPEG that differs from one key to the next."""
    colour = tuple(hashlib.sha256(key.encode()).digest()[:3])
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def _archive(path, files):
    """Pack ``{name: bytes}`` as the kind of archive its name says."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as bundle:
            for name, data in files.items():
                bundle.writestr(name, data)
    else:
        with tarfile.open(path, "w" if path.suffix == ".tar" else "w:gz") as tar:
            for name, data in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def _images(names):
    return {name: _jpeg(name) for name in names}


def _mat(**values):
    scipy_io = pytest.importorskip("scipy.io")
    buffer = io.BytesIO()
    scipy_io.savemat(buffer, values)
    return buffer.getvalue()


# ---------------------------------------------------------------- makers: root -> {split: (classes, train, test)}


def _food101(root):
    lists = {"train": ["apple_pie/1", "apple_pie/2", "waffles/10"], "test": ["apple_pie/3", "waffles/11"]}
    files = _images(f"food-101/images/{name}.jpg" for names in lists.values() for name in names)
    files |= {f"food-101/meta/{part}.txt": "\n".join(names).encode() for part, names in lists.items()}
    files |= {"food-101/meta/classes.txt": b"apple_pie\nwaffles\n", "food-101/README.txt": b"."}
    _archive(root / "food-101.tar.gz", files)
    return {"official": (2, 3, 2)}


def _sun397(root):
    names = [
        "/a/abbey/sun_a.jpg",
        "/a/abbey/sun_b.jpg",
        "/a/apartment_building/outdoor/sun_c.jpg",
        "/a/apartment_building/outdoor/sun_d.jpg",
        "/z/zen_garden/sun_e.jpg",
        "/z/zen_garden/sun_f.jpg",
        "/z/zen_garden/sun_g.jpg",
    ]
    classes = b"/a/abbey\n/a/apartment_building/outdoor\n/z/zen_garden\n"
    _archive(root / "SUN397.tar.gz", _images("SUN397" + n for n in names) | {"SUN397/ClassName.txt": classes})
    lists = {"ClassName.txt": classes}
    for k in (1, 2):
        lists[f"Training_{k:02d}.txt"] = "\n".join(names[k - 1 : 6 : 2]).encode()
        lists[f"Testing_{k:02d}.txt"] = "\n".join(names[2 - k : 6 : 2]).encode()
    _archive(root / "Partitions.zip", lists)
    return {"partition-01": (3, 3, 3), "partition-02": (3, 3, 3), "all": (3, 7, 0)}


def _df20m(root):
    header = "gbifID,genus,species,scientificName,class_id,image_path\n"
    train = (
        '1,Amanita,Amanita muscaria,"Amanita muscaria (L.) Lam., 1783",0.0,1-1.JPG\n'
        "2,Amanita,Amanita muscaria,Amanita muscaria (L.) Lam.,0.0,1-2.JPG\n"
        "3,Amanita,,Amanita Pers.,0.0,1-3.JPG\n"
        "4,Boletus,Boletus edulis,Boletus edulis Bull.,1.0,2-1.JPG\n"
    )
    test = "5,Boletus,Boletus edulis,Boletus edulis Bull.,1.0,2-2.JPG\n6,Unknown,,,,9-9.JPG\n"
    files = _images(f"DF20M/{name}.JPG" for name in ("1-1", "1-2", "1-3", "2-1", "2-2"))
    _archive(root / "DF20M-images.tar.gz", files)
    tables = {"DF20M-train_metadata_PROD.csv": train, "DF20M-public_test_metadata_PROD.csv": test}
    _archive(root / "DF20M-metadata.zip", {name: (header + text).encode() for name, text in tables.items()})
    return {"official": (2, 4, 1)}


def _caltech101(root):
    names = [f"{name}/image_{i:04d}.jpg" for name in ("accordion", "Faces", "Faces_easy") for i in range(1, 33)]
    names += [f"BACKGROUND_Google/image_{i:04d}.jpg" for i in range(1, 4)]
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as tar:
        for name in names:
            for file, data in (
                (f"101_ObjectCategories/{name}", _jpeg(name)),
                (f"101_ObjectCategories/._{name[-4:]}", b""),
            ):
                info = tarfile.TarInfo(file)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    outer = {
        "caltech-101/101_ObjectCategories.tar.gz": inner.getvalue(),
        "caltech-101/Annotations.tar": b"not needed",
        "__MACOSX/caltech-101/._Annotations.tar": b"fork",
    }
    _archive(root / "caltech-101.zip", outer)
    return {"all": (3, 96, 0), "30-per-class": (3, 90, 6)}


def _cub200(root):
    names = [
        "001.Black_footed_Albatross/Black_Footed_Albatross_0001_1.jpg",
        "001.Black_footed_Albatross/Black_Footed_Albatross_0002_2.jpg",
        "200.Common_Yellowthroat/Common_Yellowthroat_0001_1.jpg",
        "200.Common_Yellowthroat/Common_Yellowthroat_0002_2.jpg",
    ]
    base = "CUB_200_2011"
    files = _images(f"{base}/images/{name}" for name in names)
    files |= {
        f"{base}/images.txt": "".join(f"{i} {name}\n" for i, name in enumerate(names, 1)).encode(),
        f"{base}/train_test_split.txt": b"1 0\n2 1\n3 1\n4 1\n",
        f"{base}/image_class_labels.txt": b"1 1\n2 1\n3 200\n4 200\n",
        "attributes.txt": b"1 has_bill_shape::curved\n",
    }
    _archive(root / "CUB_200_2011.tgz", files)
    return {"official": (2, 3, 1)}


def _artbench10(root):
    base = "artbench-10-imagefolder-split"
    names = [f"train/{style}/x_{i}.jpg" for style in ("art_nouveau", "ukiyo_e") for i in range(3)]
    _archive(
        root / f"{base}.tar", _images(f"{base}/{n}" for n in [*names, "test/art_nouveau/y.jpg", "test/ukiyo_e/y.jpg"])
    )
    return {"official": (2, 6, 2)}


def _flowers102(root):
    _archive(root / "102flowers.tgz", _images(f"jpg/image_{i:05d}.jpg" for i in range(1, 7)))
    (root / "imagelabels.mat").write_bytes(_mat(labels=np.array([[1, 102, 1, 102, 1, 102]], np.uint8)))
    sets = {"trnid": [[1, 2]], "valid": [[3, 4]], "tstid": [[5, 6]]}
    (root / "setid.mat").write_bytes(_mat(**{key: np.array(value, np.uint16) for key, value in sets.items()}))
    return {"train+val": (2, 4, 2), "train": (2, 2, 2), "all": (2, 6, 0)}


CAR_NAMES = ["AM General Hummer SUV 2000", "Ram C/V Cargo Van Minivan 2012"]


def _records(rows, fields):
    table = np.empty((1, len(rows)), dtype=[(field, object) for field in fields])
    for i, row in enumerate(rows):
        table[0, i] = row
    return table


def _names(names):
    cells = np.empty((1, len(names)), dtype=object)
    cells[0, :] = names
    return cells


def _cars(root):
    """The devkit with separate training and test archives."""
    box = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2")
    labelled = (*box, "class", "fname")
    train = _mat(annotations=_records([(1, 1, 5, 5, k, f"0000{i}.jpg") for i, k in ((1, 1), (2, 2), (3, 2))], labelled))
    test = _mat(annotations=_records([(1, 1, 5, 5, k, f"0000{i}.jpg") for i, k in ((1, 2), (2, 1))], labelled))
    blind = _mat(annotations=_records([(1, 1, 5, 5, "00001.jpg")], (*box, "fname")))
    devkit = {
        "devkit/cars_meta.mat": _mat(class_names=_names(CAR_NAMES)),
        "devkit/cars_train_annos.mat": train,
        "devkit/cars_test_annos.mat": blind,
    }
    _archive(root / "car_devkit.tgz", devkit)
    _archive(root / "cars_train.tgz", _images(f"cars_train/0000{i}.jpg" for i in (1, 2, 3)))
    _archive(root / "cars_test.tgz", _images(f"cars_test/0000{i}.jpg" for i in (1, 2)))
    (root / "cars_test_annos_withlabels.mat").write_bytes(test)
    return {"official": (2, 3, 2), "train": (2, 3, 0)}


def _cars_in_one(root):
    """The other form of the same dataset: one archive, one table."""
    fields = ("relative_im_path", "bbox_x1", "class", "test")
    rows = [(f"car_ims/00000{i}.jpg", 1, k, t) for i, k, t in ((1, 1, 0), (2, 2, 0), (3, 2, 0), (4, 1, 1), (5, 2, 1))]
    (root / "cars_annos.mat").write_bytes(_mat(annotations=_records(rows, fields), class_names=_names(CAR_NAMES)))
    _archive(root / "car_ims.tgz", _images(row[0] for row in rows))
    return {"official": (2, 3, 2), "train": (2, 3, 0)}


MAKERS = {
    "food101": _food101,
    "sun397": _sun397,
    "df20m-mini": _df20m,
    "caltech101": _caltech101,
    "cub200": _cub200,
    "artbench10": _artbench10,
    "flowers102": _flowers102,
    "stanford-cars": _cars,
}

CLASSES = {
    "food101": ["apple_pie", "waffles"],
    "sun397": ["abbey", "apartment_building-outdoor", "zen_garden"],
    "df20m-mini": ["Amanita_muscaria", "Boletus_edulis"],
    "caltech101": ["Faces", "Faces_easy", "accordion"],
    "cub200": ["001.Black_footed_Albatross", "200.Common_Yellowthroat"],
    "artbench10": ["art_nouveau", "ukiyo_e"],
    "flowers102": ["001.pink_primrose", "102.blackberry_lily"],
    "stanford-cars": ["AM_General_Hummer_SUV_2000", "Ram_C-V_Cargo_Van_Minivan_2012"],
}


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
    assert (config.max_steps, config.global_batch_size, config.learning_rate) == (24_000, 32, 1e-3)
    assert (config.method, config.difffit, config.model, config.image_size) == ("difffit", "paper", "DiT-XL/2", 256)
    assert (config.num_sampling_steps, config.cfg_scale) == (50, 1.5)
    assert config.data_path == f"prepared/{name}/train"
    text = path.read_text()
    assert f"--split {split} " in text and "--num-fid-samples 10000" in text


def _check_parts(out, expected):
    got = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*.[jJ][pP][gG]")}
    assert got == {path: _jpeg(key) for path, key in expected.items()}


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
    small("stanford-cars", tmp_path, _cars_in_one)
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
    assert list(tmp_path.rglob("*.partial")) == []


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
    _food101(tmp_path)  # the real totals
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
    archive = tmp_path / "food-101.tar.gz"
    whole = archive.read_bytes()
    archive.write_bytes(whole[:cut])
    with pytest.raises(DiffFitError, match="damaged or incompletely downloaded"):
        prepare("food101", tmp_path)
    flipped = bytearray(whole)
    flipped[-5] ^= 1  # in gzip's checksum
    archive.write_bytes(flipped)
    with pytest.raises(DiffFitError, match="damaged or incompletely downloaded"):
        prepare("food101", tmp_path)
    assert os.listdir(tmp_path / "prepared") == []


@pytest.mark.parametrize(
    "name", ["../escaped.txt", "/tmp/escaped.txt", "a/../../escaped.txt", "C:/escaped.txt", "..\\escaped.txt"]
)
@pytest.mark.parametrize("kind", ["x.tar", "x.tgz", "x.zip"])
def test_archives_cannot_write_outside(tmp_path, name, kind):
    _archive(tmp_path / kind, {"fine.txt": b"fine", name: b"evil"})
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
