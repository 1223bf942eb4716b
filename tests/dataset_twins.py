"""Small archives with the internal layout of the eight datasets' real ones, for the tests of ``difffit prepare``.

A maker fills a folder with a dataset's downloads and returns ``{split: (classes, training images, test images)}``.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image


def jpeg(key):
    """A tiny JPEG that differs from one key to the next."""
    colour = tuple(hashlib.sha256(key.encode()).digest()[:3])
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def archive(path, files):
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
    return {name: jpeg(name) for name in names}


def _mat(**values):
    scipy_io = pytest.importorskip("scipy.io")
    buffer = io.BytesIO()
    scipy_io.savemat(buffer, values)
    return buffer.getvalue()


def food101(root):
    lists = {"train": ["apple_pie/1", "apple_pie/2", "waffles/10"], "test": ["apple_pie/3", "waffles/11"]}
    files = _images(f"food-101/images/{name}.jpg" for names in lists.values() for name in names)
    files |= {f"food-101/meta/{part}.txt": "\n".join(names).encode() for part, names in lists.items()}
    files |= {"food-101/meta/classes.txt": b"apple_pie\nwaffles\n", "food-101/README.txt": b"."}
    archive(root / "food-101.tar.gz", files)
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
    archive(root / "SUN397.tar.gz", _images("SUN397" + n for n in names) | {"SUN397/ClassName.txt": classes})
    lists = {"ClassName.txt": classes}
    for k in (1, 2):
        lists[f"Training_{k:02d}.txt"] = "\n".join(names[k - 1 : 6 : 2]).encode()
        lists[f"Testing_{k:02d}.txt"] = "\n".join(names[2 - k : 6 : 2]).encode()
    archive(root / "Partitions.zip", lists)
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
    archive(root / "DF20M-images.tar.gz", files)
    tables = {"DF20M-train_metadata_PROD.csv": train, "DF20M-public_test_metadata_PROD.csv": test}
    archive(root / "DF20M-metadata.zip", {name: (header + text).encode() for name, text in tables.items()})
    return {"official": (2, 4, 1)}


def _caltech101(root):
    names = [f"{name}/image_{i:04d}.jpg" for name in ("accordion", "Faces", "Faces_easy") for i in range(1, 33)]
    names += [f"BACKGROUND_Google/image_{i:04d}.jpg" for i in range(1, 4)]
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as tar:
        for name in names:
            for file, data in (
                (f"101_ObjectCategories/{name}", jpeg(name)),
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
    archive(root / "caltech-101.zip", outer)
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
    archive(root / "CUB_200_2011.tgz", files)
    return {"official": (2, 3, 1)}


def _artbench10(root):
    base = "artbench-10-imagefolder-split"
    names = [f"train/{style}/x_{i}.jpg" for style in ("art_nouveau", "ukiyo_e") for i in range(3)]
    archive(
        root / f"{base}.tar", _images(f"{base}/{n}" for n in [*names, "test/art_nouveau/y.jpg", "test/ukiyo_e/y.jpg"])
    )
    return {"official": (2, 6, 2)}


def _flowers102(root):
    archive(root / "102flowers.tgz", _images(f"jpg/image_{i:05d}.jpg" for i in range(1, 7)))
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
    archive(root / "car_devkit.tgz", devkit)
    archive(root / "cars_train.tgz", _images(f"cars_train/0000{i}.jpg" for i in (1, 2, 3)))
    archive(root / "cars_test.tgz", _images(f"cars_test/0000{i}.jpg" for i in (1, 2)))
    (root / "cars_test_annos_withlabels.mat").write_bytes(test)
    return {"official": (2, 3, 2), "train": (2, 3, 0)}


def cars_in_one(root):
    """The other form of the same dataset: one archive, one table."""
    fields = ("relative_im_path", "bbox_x1", "class", "test")
    rows = [(f"car_ims/00000{i}.jpg", 1, k, t) for i, k, t in ((1, 1, 0), (2, 2, 0), (3, 2, 0), (4, 1, 1), (5, 2, 1))]
    (root / "cars_annos.mat").write_bytes(_mat(annotations=_records(rows, fields), class_names=_names(CAR_NAMES)))
    archive(root / "car_ims.tgz", _images(row[0] for row in rows))
    return {"official": (2, 3, 2), "train": (2, 3, 0)}


MAKERS = {
    "food101": food101,
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
