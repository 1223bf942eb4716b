"""The eight datasets: where they live, what their archives look like inside, which splits there are, how many images.

A reader turns the pieces that :class:`Source` finds into a list of :class:`Item`; it does not touch the images. Labels
in training are the order of the sorted class folders, so names keep the number where the dataset gives one.
"""

from __future__ import annotations

import csv
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..._extras import require
from ...errors import DiffFitError
from ..listing import list_images
from .archives import Source
from .flowers import FLOWER_NAMES
from .layout import Item, inside


class Split(NamedTuple):
    """What a split is, and its known totals ``(classes, training images, test images)``."""

    description: str
    totals: tuple[int, int, int]


@dataclass(frozen=True)
class Dataset:
    """One dataset; the first of its splits is the default."""

    title: str
    home: str
    splits: dict[str, Split]
    read: Callable[[Source, str], list[Item]]


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DiffFitError(f"the list {path} cannot be read: {error}") from error


def _nth(values: Sequence[Any], number: int) -> Any:
    """``values`` counted from 1, as MATLAB counts: 0 is not the last of them."""
    if number < 1:
        raise IndexError(f"number {number} where they begin at 1")
    return values[number - 1]


def _mat(path: Path) -> dict[str, Any]:
    """A MATLAB file, through scipy."""
    io = require("scipy.io", "prepare", "MATLAB files")
    try:
        return io.loadmat(path, squeeze_me=True)
    except Exception as error:  # scipy raises many kinds for damaged files
        raise DiffFitError(f"the MATLAB file {path} cannot be read: {error}") from error


# ---------------------------------------------------------------- Food-101


def _food101(source: Source, split: str) -> list[Item]:
    base = source.find("meta/train.txt", ("food-101.tar.gz", "food-101*.t*", "food*101*.zip"))
    return [
        Item.of(part, line.split("/")[0], base / "images", f"{line}.jpg")
        for part in ("train", "test")
        for line in _lines(base / "meta" / f"{part}.txt")
    ]


# ---------------------------------------------------------------- SUN397


def _sun_class(path: str) -> str:
    """``/a/apartment_building/outdoor`` -> ``apartment_building-outdoor``."""
    return "-".join(path.strip("/").split("/")[1:])


def _sun397(source: Source, split: str) -> list[Item]:
    base = source.find("a/abbey", ("SUN397.tar.gz", "SUN397*.t*", "SUN397*.zip"))
    if split == "all":
        letters = source.listed(list_images(base))
        return [
            Item.of("train", _sun_class(path.rpartition("/")[0]), base, path)
            for letter, paths in letters.items()
            for path in paths
            if len(letter) == 1
        ]
    number = split.removeprefix("partition-")
    try:
        lists = source.find(f"Training_{number}.txt", ("Partitions.zip", "Partitions*.zip", "SUN397*Partitions*"))
    except DiffFitError as error:
        raise DiffFitError(f"{error}; or pass --split all, which needs no partition lists") from None
    return [
        Item.of(part, _sun_class(line.rpartition("/")[0]), base, line.strip("/"))
        for part, name in (("train", "Training"), ("test", "Testing"))
        for line in _lines(lists / f"{name}_{number}.txt")
    ]


# ---------------------------------------------------------------- Danish Fungi 2020 mini


def _df20m(source: Source, split: str) -> list[Item]:
    lists = source.find("DF20M-train_metadata_PROD.csv", ("DF20M-metadata.zip", "DF20M*metadata*"))
    rows = [
        (part, row)
        for part, file in (("train", "DF20M-train_metadata_PROD.csv"), ("test", "DF20M-public_test_metadata_PROD.csv"))
        for row in _table(lists / file, ("image_path", "class_id"))
        if row["class_id"].strip()
    ]
    if not rows:
        raise DiffFitError(f"the tables in {lists} list no image")
    first = inside(lists, Path(rows[0][1]["image_path"]).name).name
    images = source.find(first, ("DF20M-images.tar.gz", "DF20M-images*", "DF20M_300*", "DF20M*.t*", "DF20M*.zip"))
    # A class is its id. Its name is the species most of its rows give; a few rows are determined less precisely.
    names: dict[int, Counter[str]] = {}
    for _, row in rows:
        name = (row.get("species") or row.get("scientificName") or "").strip()
        names.setdefault(_class_id(row), Counter()).update([name] if name else [])
    best = {key: votes.most_common(1)[0][0] if votes else f"class_{key:03d}" for key, votes in names.items()}
    twice = {name for name, count in Counter(best.values()).items() if count > 1}
    best = {key: f"{name} {key:03d}" if name in twice else name for key, name in best.items()}
    return [Item.of(part, best[_class_id(row)], images, Path(row["image_path"]).name) for part, row in rows]


def _class_id(row: dict[str, str]) -> int:
    try:
        return int(float(row["class_id"]))
    except (ValueError, OverflowError) as error:
        raise DiffFitError(f"class_id should be a number, got {row['class_id']!r} for {row['image_path']}") from error


def _table(path: Path, columns: tuple[str, ...]) -> Iterator[dict[str, str]]:
    try:
        with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
            reader = csv.DictReader(file, restval="")
            absent = [column for column in columns if column not in (reader.fieldnames or ())]
            if absent:
                raise DiffFitError(f"the table {path} has no column {absent[0]}")
            yield from reader
    except (OSError, csv.Error) as error:
        raise DiffFitError(f"the table {path} cannot be read: {error}") from error


# ---------------------------------------------------------------- Caltech-101


def _caltech101(source: Source, split: str) -> list[Item]:
    name = "101_ObjectCategories"
    base = source.find(name, (f"{name}.tar.gz", f"{name}*", "caltech-101.zip", "caltech*101*")) / name
    items: list[Item] = []
    for folder, images in source.listed(list_images(base)).items():
        if folder == "BACKGROUND_Google":  # clutter, not a class: kept in, it shifts every label by one
            continue
        chosen = set(images)
        if split == "30-per-class":
            # Drawn per class by name, so that it depends neither on the machine nor on the other classes.
            chosen = set(random.Random(folder).sample(images, min(30, len(images))))
        items += [Item.of("train" if path in chosen else "test", folder, base, path) for path in images]
    return items


# ---------------------------------------------------------------- CUB-200-2011


def _cub200(source: Source, split: str) -> list[Item]:
    base = source.find("train_test_split.txt", ("CUB_200_2011.tgz", "CUB_200_2011*", "CUB*200*"))
    lines = [line.split() for line in _lines(base / "images.txt")]
    try:
        training = dict(line.split() for line in _lines(base / "train_test_split.txt"))
        return [
            Item.of("train" if training[number] == "1" else "test", path.split("/")[0], base / "images", path)
            for number, path in lines
        ]
    except (KeyError, ValueError) as error:
        raise DiffFitError(f"images.txt and train_test_split.txt in {base} do not belong together: {error}") from error


# ---------------------------------------------------------------- ArtBench-10


def _artbench10(source: Source, split: str) -> list[Item]:
    base = source.find(
        "train/art_nouveau", ("artbench-10-imagefolder-split.tar", "artbench-10-imagefolder-split*", "artbench*split*")
    )
    return [
        Item.of(part, folder, base / part, path)
        for part in ("train", "test")
        if (base / part).is_dir()
        for folder, paths in source.listed(list_images(base / part)).items()
        for path in paths
    ]


# ---------------------------------------------------------------- Oxford Flowers-102


def _flowers102(source: Source, split: str) -> list[Item]:
    base = source.find("jpg/image_00001.jpg", ("102flowers.tgz", "102flowers*", "*flowers*.t*", "*flowers*.zip"))
    labels = _mat(source.find("imagelabels.mat") / "imagelabels.mat")
    ids = _mat(source.find("setid.mat") / "setid.mat")
    train, test = {
        "train+val": (("trnid", "valid"), ("tstid",)),
        "train": (("trnid",), ("tstid",)),
        "all": (("trnid", "valid", "tstid"), ()),
    }[split]
    try:
        by_image = labels["labels"].reshape(-1).tolist()
        chosen = [
            (part, int(number))
            for part, keys in (("train", train), ("test", test))
            for key in keys
            for number in ids[key].reshape(-1).tolist()
        ]
        return [
            Item.of(part, f"{label:03d}.{_nth(FLOWER_NAMES, label)}", base / "jpg", f"image_{number:05d}.jpg")
            for part, number in chosen
            for label in [_nth(by_image, number)]
        ]
    except (KeyError, IndexError, AttributeError, TypeError) as error:
        raise DiffFitError(f"imagelabels.mat and setid.mat are not those of Oxford Flowers-102: {error!r}") from error


# ---------------------------------------------------------------- Stanford Cars


def _cars(source: Source, split: str) -> list[Item]:
    parts = ("train",) if split == "train" else ("train", "test")
    annotated = source.look("cars_annos.mat")
    try:
        if annotated is not None:  # one table for all images, paths "car_ims/000001.jpg"
            table = _mat(annotated / "cars_annos.mat")
            names = table["class_names"].reshape(-1).tolist()
            base = source.find("car_ims", ("car_ims.tgz", "car_ims*"))
            rows = [
                (("train", "test")[int(row["test"])], int(row["class"]), base, str(row["relative_im_path"]))
                for row in table["annotations"].reshape(-1)
            ]
        else:
            rows = []
            meta = source.find("cars_meta.mat", ("car_devkit.tgz", "car_devkit*", "*devkit*"))
            names = _mat(meta / "cars_meta.mat")["class_names"].reshape(-1).tolist()
            for part, file in (("train", "cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
                if part not in parts:
                    continue
                table = _mat(source.find(file) / file)  # the devkit's own cars_test_annos.mat has no classes
                base = source.find(f"cars_{part}/00001.jpg", (f"cars_{part}.tgz", f"cars_{part}*"))
                rows += [
                    (part, int(row["class"]), base / f"cars_{part}", str(row["fname"]))
                    for row in table["annotations"].reshape(-1)
                ]
        return [
            Item.of(part, _nth(names, number), folder, path) for part, number, folder, path in rows if part in parts
        ]
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        raise DiffFitError(f"the tables of Stanford Cars in {source.root} cannot be understood: {error!r}") from error


DATASETS: dict[str, Dataset] = {
    "food101": Dataset(
        "Food-101",
        "https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/",
        {"official": Split("750 training and 250 test images per class", (101, 75_750, 25_250))},
        _food101,
    ),
    "sun397": Dataset(
        "SUN397",
        "https://vision.princeton.edu/projects/2010/SUN/",
        {
            f"partition-{k:02d}": Split(f"official partition {k}: 50 + 50 images per class", (397, 19_850, 19_850))
            for k in range(1, 11)
        }
        | {"all": Split("every image for training", (397, 108_754, 0))},
        _sun397,
    ),
    "df20m-mini": Dataset(
        "Danish Fungi 2020 mini (DF20M)",
        "https://sites.google.com/view/danish-fungi-dataset",
        {"official": Split("the public training and test tables", (182, 32_753, 3_640))},
        _df20m,
    ),
    "caltech101": Dataset(
        "Caltech-101",
        "https://data.caltech.edu/records/mzrjq-6wc02",
        {
            "all": Split(
                "every image for training, without BACKGROUND_Google; there is no official split", (101, 8_677, 0)
            ),
            "30-per-class": Split("30 images per class, drawn with a fixed seed, for training", (101, 3_030, 5_647)),
        },
        _caltech101,
    ),
    "cub200": Dataset(
        "CUB-200-2011",
        "https://www.vision.caltech.edu/datasets/cub_200_2011/",
        {"official": Split("train_test_split.txt", (200, 5_994, 5_794))},
        _cub200,
    ),
    "artbench10": Dataset(
        "ArtBench-10",
        "https://github.com/liaopeiyuan/artbench",
        {"official": Split("5000 training and 1000 test images per style, 256 px", (10, 50_000, 10_000))},
        _artbench10,
    ),
    "flowers102": Dataset(
        "Oxford Flowers-102",
        "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
        {
            "train+val": Split("training and validation sets together; the test set", (102, 2_040, 6_149)),
            "train": Split("the training set alone, 10 images per class; the test set", (102, 1_020, 6_149)),
            "all": Split("every image for training", (102, 8_189, 0)),
        },
        _flowers102,
    ),
    "stanford-cars": Dataset(
        "Stanford Cars",
        "https://ai.stanford.edu/~jkrause/cars/car_dataset.html",
        {
            "official": Split("the official training and test sets", (196, 8_144, 8_041)),
            "train": Split("the training set alone; needs no test labels", (196, 8_144, 0)),
        },
        _cars,
    ),
}
