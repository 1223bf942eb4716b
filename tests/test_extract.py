"""``difffit extract`` and ``LatentCache``: numbers, resuming after a kill, several processes, damage."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from difffit_fast._files import beside, sha256, write_safetensors
from difffit_fast.cli import extract as cli
from difffit_fast.data import (
    ImageFolder,
    LatentCache,
    TrainingData,
    load_vae,
    open_data,
    visit_rng,
    visit_seed,
)
from difffit_fast.errors import DiffFitError
from difffit_fast.train.stream import TrainStream, batches

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """23 images of three classes, one of them damaged."""
    path = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for name, count in (("ant", 11), ("bee", 7), ("cow", 5)):
        (path / name).mkdir()
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (20, 18, 3), dtype=np.uint8)).save(path / name / f"{i:02d}.png")
    (path / "bee" / "03.png").write_bytes(b"damaged")
    return path


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
    )
    path = tmp_path_factory.mktemp("vae")
    vae.save_pretrained(path)
    return path


def _arguments(images, out, vae="none", **options):
    options = {"image-size": 16, "shard-size": 4, "batch-size": 3, "num-workers": 0, "device": "cpu"} | options
    words = ["--data-path", str(images), "--features-path", str(out), "--vae", str(vae)]
    for key, value in options.items():
        words += [f"--{key}", str(value)]
    return words


def _extract(images, out, vae="none", **options):
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return cli.run(parser.parse_args(_arguments(images, out, vae, **options)))


def _bytes(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


@pytest.fixture(scope="module")
def moments(images, vae_folder, tmp_path_factory):
    """The uninterrupted run of one process that other runs are compared with."""
    out = tmp_path_factory.mktemp("features") / "moments"
    assert _extract(images, out, vae_folder) == 0
    return out


# ---------------------------------------------------------------- numbers


def test_cached_moments_are_those_of_both_mirror_images(images, moments, vae_folder, capsys):
    cache = LatentCache(moments)
    assert isinstance(cache, TrainingData)
    assert (len(cache), cache.num_classes, cache.channels, cache.size, cache.image_size) == (22, 3, 4, 8, 16)
    assert cache.class_names == ["ant", "bee", "cow"]
    assert [entry.file for entry in cache.report()] == ["bee/03.png"]
    assert len(list(moments.glob("shard-*"))) == 6
    folder, vae = ImageFolder(images, 16, flip=False), load_vae(vae_folder)
    row = 0
    for shard in sorted(moments.glob("shard-*")):
        tensors = load_file(shard)
        for index, label, pair in zip(tensors["indices"], tensors["labels"], tensors["moments"], strict=True):
            x, want = folder.load(int(index), 0)
            assert want == label == cache.labels[row] and cache.files[row] == folder.files[int(index)]
            torch.testing.assert_close(pair, vae.encode(torch.stack([x, x.flip(-1)])), rtol=1e-4, atol=1e-5)
            row += 1
    assert row == 22


def test_a_visit_samples_afresh_by_its_seed_alone(moments):
    cache, other = LatentCache(moments), LatentCache(moments)
    tensors = load_file(sorted(moments.glob("shard-*"))[1])  # images 4..7
    seen = set()
    for epoch in range(8):
        seed = visit_seed(3, epoch, 5)
        x, label = cache.load(5, seed)
        assert label == 0 and x.shape == (4, 8, 8) and x.dtype == torch.float32
        rng = visit_rng(seed)
        mirror = int(rng.random() < 0.5)
        noise = rng.standard_normal((4, 8, 8), dtype=np.float32)
        mean, logvar = tensors["moments"][1, mirror].double().numpy().reshape(2, 4, 8, 8)
        want = (mean + np.exp(logvar / 2) * noise) * 0.18215
        np.testing.assert_allclose(x.numpy(), want, rtol=1e-5, atol=1e-6)
        assert torch.equal(x, other.load(5, seed)[0])
        seen.add(mirror)
        still = LatentCache(moments, flip=False).load(5, seed)[0]
        assert torch.equal(still, x) == (mirror == 0)  # the noise is the same, the image is not
    assert seen == {0, 1}
    assert not torch.equal(cache.load(5, 1)[0], cache.load(5, 2)[0])
    with pytest.raises(IndexError):
        cache.load(22, 0)


def test_samples_have_the_moments_they_are_drawn_from(moments):
    cache = LatentCache(moments, flip=False)
    mean, logvar = load_file(sorted(moments.glob("shard-*"))[0])["moments"][0, 0].double().chunk(2)
    draws = torch.stack([cache.load(0, visit_seed(0, e, 0))[0] for e in range(600)]).double() / 0.18215
    z = (draws.mean(0) - mean) / (torch.exp(logvar / 2) / 600**0.5)
    assert z.abs().max() < 5 and abs(z.square().mean() - 1) < 0.5
    ratio = draws.var(0) / torch.exp(logvar)
    assert (ratio - 1).abs().max() < 6 * (2 / 600) ** 0.5


def test_cached_pixels_equal_the_image_folder(images, tmp_path):
    out = tmp_path / "pixels"
    _extract(images, out, **{"num-workers": 3})
    cache, folder = open_data(feature_path=out, image_size=16), ImageFolder(images, 16)
    assert (cache.kind, cache.channels, cache.size, cache.vae) == ("pixels", 3, 16, "none")
    for row, name in enumerate(cache.files):
        index = folder.files.index(name)
        for seed in range(4):
            x, label = cache.load(row, seed)
            want, want_label = folder.load(index, seed)
            assert torch.equal(x, want) and label == want_label
    with pytest.raises(DiffFitError, match="extracted at 16 pixels, but the image size is 32"):
        open_data(feature_path=out, image_size=32)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_stores_half_and_stays_close(images, moments, vae_folder, tmp_path, precision):
    _extract(images, tmp_path / "half", vae_folder, precision=precision)
    half, full = (load_file(sorted(path.glob("shard-*"))[0])["moments"] for path in (tmp_path / "half", moments))
    assert half.dtype == torch.float16
    assert (half.float() - full).abs().max() < 0.05 * full.abs().max()


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_workers_change_nothing(moments, workers):
    cache = LatentCache(moments)
    shape = cache.channels, cache.size, cache.size
    stream, alone = (TrainStream(c, 0, shape, 0.0, c.num_classes) for c in (cache, LatentCache(moments)))
    for step, batch in enumerate(batches(stream, 0, 3, 4, num_workers=workers)):
        want = alone.__getitems__(range(4 * step, 4 * step + 4))
        assert torch.equal(batch["x"], want["x"]) and torch.equal(batch["y"], want["y"])
    assert cache._verified.sum() > 0  # the workers' checks are known to the parent


# ---------------------------------------------------------------- kills, processes, repeats


def _command(arguments, pause=0.0):
    """The command line of an extraction that rests for ``pause`` seconds before each shard."""
    code = (
        "import argparse, sys, time\n"
        "from difffit_fast.cli import extract\n"
        "from difffit_fast.data import extract as work\n"
        "write = work.write_shard\n"
        f"work.write_shard = lambda *args: (time.sleep({pause}), write(*args))\n"
        "if __name__ == '__main__':\n"
        "    parser = argparse.ArgumentParser(); extract.add_arguments(parser)\n"
        "    sys.exit(extract.run(parser.parse_args()))\n"
    )
    return [sys.executable, "-c", code, *arguments]


def _environment():
    return {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.mark.reliability
def test_killed_at_any_time_and_resumed_it_leaves_the_same_bytes(images, moments, vae_folder, tmp_path):
    out = tmp_path / "killed"
    arguments = _arguments(images, out, vae_folder)
    process = subprocess.Popen(
        _command(arguments, pause=0.3), env=_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if len(list(out.glob("shard-*.safetensors"))) >= 2:  # killed wherever it then is
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.0005)
    assert process.wait() == -signal.SIGKILL
    assert not (out / "index.json").exists()
    with pytest.raises(DiffFitError, match="not finished"):
        LatentCache(out)
    # What a kill in the middle of writing leaves, and a shard cut short by a full disk.
    (out / ".tmp-shard-00005-of-00006.safetensors.1").write_bytes(b"half a sh")
    os.utime(out / ".tmp-shard-00005-of-00006.safetensors.1", (1, 1))  # by an earlier version
    first = sorted(out.glob("shard-*.safetensors"))[0]
    first.write_bytes(first.read_bytes()[:-7])
    assert _extract(images, out, vae_folder) == 0
    assert _bytes(out) == _bytes(moments)


def test_resuming_keeps_finished_shards(images, moments, vae_folder, tmp_path):
    out = tmp_path / "resumed"
    out.mkdir()
    for path in moments.iterdir():
        if path.name not in ("index.json", "shard-00002-of-00006.safetensors"):
            (out / path.name).write_bytes(path.read_bytes())
    kept = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    _extract(images, out, vae_folder)
    assert _bytes(out) == _bytes(moments)
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert _extract(images, out, vae_folder) == 0  # nothing left to do
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_neither_threads_nor_batches_change_the_bytes(images, moments, vae_folder, tmp_path):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        _extract(images, tmp_path / "out", vae_folder, **{"batch-size": 2, "num-workers": 2})
    finally:
        torch.set_num_threads(threads)
    assert _bytes(tmp_path / "out") == _bytes(moments)


def test_two_processes_equal_one(images, tmp_path, capsys):
    _extract(images, tmp_path / "one")
    capsys.readouterr()
    _extract(images, tmp_path / "two", **{"num-processes": 2})
    said = capsys.readouterr()
    assert "22 images, 3 classes" in said.out and "bee/03.png" in said.err
    assert _bytes(tmp_path / "two") == _bytes(tmp_path / "one")


def test_ranks_of_torchrun_share_the_shards_without_overlap(images, moments, vae_folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "ranks"
    monkeypatch.setenv("WORLD_SIZE", "2")
    written = []
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        before = set(out.glob("shard-*")) if out.exists() else set()
        assert _extract(images, out, vae_folder) == 0
        written.append({path.name[6:11] for path in set(out.glob("shard-*")) - before})
    assert written == [{"00001", "00003", "00005"}, {"00000", "00002", "00004"}]
    assert _bytes(out) == _bytes(moments)
    with pytest.raises(DiffFitError, match="torchrun both start processes"):
        _extract(images, out, vae_folder, **{"num-processes": 2})


def test_a_failing_child_is_one_sentence(images, tmp_path):
    broken = tmp_path / "images"
    (broken / "only").mkdir(parents=True)
    (broken / "only" / "x.png").write_bytes(b"damaged")
    with pytest.raises(DiffFitError, match="none of the images of class 'only' can be read"):
        _extract(broken, tmp_path / "out")


# ---------------------------------------------------------------- refusals


def test_another_configuration_is_refused(images, moments, vae_folder, tmp_path):
    before = _bytes(moments)
    with pytest.raises(DiffFitError, match=r"its image_size is 16, now 32 is asked for"):
        _extract(images, moments, vae_folder, **{"image-size": 32})
    with pytest.raises(DiffFitError, match=r"its shard_size is 4, now 5"):
        _extract(images, moments, vae_folder, **{"shard-size": 5})
    with pytest.raises(DiffFitError, match=r"its kind is moments, now pixels"):
        _extract(images, moments)
    with pytest.raises(DiffFitError, match=r"its precision is fp32, now fp16"):
        _extract(images, moments, vae_folder, precision="fp16")
    other = tmp_path / "other"
    (other / "ant").mkdir(parents=True)
    Image.new("RGB", (20, 20)).save(other / "ant" / "00.png")
    with pytest.raises(DiffFitError, match="its num_images is 23, now 1"):
        _extract(other, moments, vae_folder)
    assert _bytes(moments) == before

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("precious")
    with pytest.raises(DiffFitError, match=r"not empty \(it holds 'thesis.tex'\)"):
        _extract(images, tmp_path / "full")
    assert os.listdir(tmp_path / "full") == ["thesis.tex"]


def test_another_vae_of_the_same_name_is_refused(images, vae_folder, tmp_path):
    import shutil

    mine = tmp_path / "vae"
    shutil.copytree(vae_folder, mine)
    _extract(images, tmp_path / "out", mine)
    weights = mine / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    next(iter(tensors.values())).mul_(2)
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(DiffFitError, match="had other weights"):
        _extract(images, tmp_path / "out", mine)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image-size": 15}, "multiple of 2"),
        ({"image-size": 0}, "--image-size must be a positive integer"),
        ({"batch-size": 0}, "--batch-size must be a positive integer"),
        ({"shard-size": -1}, "--shard-size must be a positive integer"),
        ({"num-workers": -1}, "--num-workers must be zero or more"),
        ({"num-processes": 0}, "--num-processes must be at least 1"),
    ],
)
def test_bad_flags_leave_nothing_behind(images, vae_folder, tmp_path, options, message):
    with pytest.raises(DiffFitError, match=message):
        _extract(images, tmp_path / "out", vae_folder, **options)
    assert not (tmp_path / "out").exists()


def test_a_changed_or_missing_shard_is_noticed(images, tmp_path):
    out = tmp_path / "out"
    _extract(images, out)
    LatentCache(out).verify_all()
    shard = sorted(out.glob("shard-*"))[2]
    whole = shard.read_bytes()

    changed = bytearray(whole)
    changed[-1] ^= 1
    shard.write_bytes(changed)
    cache = LatentCache(out)  # sizes agree; the checksum is compared at first touch
    cache.load(0, 0)
    with pytest.raises(DiffFitError, match=r"shard-00002.*has changed since extraction"):
        for i in range(len(cache)):
            cache.load(i, 0)

    shard.write_bytes(whole[:-1])
    with pytest.raises(DiffFitError, match=f"has {len(whole) - 1} bytes where {len(whole)} are expected"):
        LatentCache(out)
    shard.unlink()
    with pytest.raises(DiffFitError, match="is missing"):
        LatentCache(out)
    _extract(images, out)  # restores it
    LatentCache(out).verify_all()


def test_a_bad_index_is_noticed(images, tmp_path):
    with pytest.raises(DiffFitError, match="not a folder"):
        LatentCache(tmp_path / "absent")
    with pytest.raises(DiffFitError, match="holds no cached features"):
        LatentCache(tmp_path)
    out = tmp_path / "out"
    _extract(images, out)
    index = json.loads((out / "index.json").read_text())
    for change, message in (
        ({"format": "other"}, "is not an index"),
        ({"version": 99}, "format version 99"),
        ({"version": "2"}, "format version '2'"),
        ({"labels": index["labels"][:-1]}, "21 labels and 22 files"),
        ({"labels": [7] * len(index["labels"])}, "outside its 3 classes"),
        ({"labels": [-1, *index["labels"][1:]]}, "outside its 3 classes"),
        ({"labels": [0.5, *index["labels"][1:]]}, "labels should be integers"),
        ({"labels": [True, *index["labels"][1:]]}, "labels should be integers"),
        ({"labels": index["labels"][1:] + index["labels"][:1]}, "should lie in the folder of its class, 'bee'"),
        ({"class_names": ["bee", "ant", "cow"]}, "should lie in the folder of its class, 'bee'"),
        ({"class_names": ["ant", "bee", "bee"]}, "class_names should differ"),
        ({"class_names": ["ant", "bee", "cow", "dog"]}, "its checksum differs"),
        ({"files": [*index["files"][:-1], "cow/other.png"]}, "its checksum differs"),
        ({"files": [None, *index["files"][1:]]}, "the image None should lie"),
        ({"bad": []}, "22 images and 0 unreadable ones, of 23"),
        ({"bad": [["a"]]}, "bad should be pairs"),
        ({"shards": None}, "shards should be list"),
        ({"shards": index["shards"][:-1]}, "6 shards are expected; it names 5"),
        ({"scale": 0.0}, "scale not 0"),
        ({"scale": "1"}, "scale should be float"),
        ({"scale": 0.5}, "its checksum differs"),
        ({"channels": 2}, "do not fit images of 16 pixels"),
        ({"size": 0}, "channels and size should be positive"),
        ({"size": 32}, "do not fit images of 16 pixels"),
        ({"config": index["config"] | {"image_size": 32}}, "do not fit images of 32 pixels"),
        ({"config": index["config"] | {"kind": "latents"}}, "kind should be pixels or moments"),
        ({"config": index["config"] | {"precision": "fp32"}}, "precision should be uint8"),
        (
            {"config": index["config"] | {"num_images": 1 << 40, "shard_size": 1 << 38}},
            "4 shards are expected; it names 6",
        ),
        ({"config": index["config"] | {"shard_size": 0}}, "should be positive"),
        ({"sha256": None}, "its checksum differs"),
    ):
        (out / "index.json").write_text(json.dumps(index | change))
        with pytest.raises(DiffFitError, match=message):
            LatentCache(out)
    for key, value, message in (
        ("count", -1, "is made of 4 images and holds -1"),
        ("count", 5, "is made of 4 images and holds 5"),
        ("count", 1.0, "count should be int"),
        ("bytes", -1, "should have bytes"),
        ("file", "../shard", "shard 0 should be shard-00000-of-00006.safetensors"),
        ("sha256", "0", "has no SHA-256"),
    ):
        (out / "index.json").write_text(
            json.dumps(index | {"shards": [index["shards"][0] | {key: value}, *index["shards"][1:]]})
        )
        with pytest.raises(DiffFitError, match=message):
            LatentCache(out)
    for text in ('"scale": NaN', '"scale": 1e999', '"shift": -Infinity'):
        key = text.split(":")[0]
        (out / "index.json").write_text(json.dumps(index).replace(f"{key}: {index[key.strip(chr(34))]}", text))
        with pytest.raises(DiffFitError, match="NaN|Infinity|should be finite"):
            LatentCache(out)
    for text in ("{", "[]"):
        (out / "index.json").write_text(text)
        with pytest.raises(DiffFitError, match="JSON"):
            LatentCache(out)


def _as_version_1(out, **changes):
    """The folder as the first version of the format wrote it: no digests, no checksum, sizes in the listing."""
    index = json.loads((out / "index.json").read_text()) | changes
    shards = []
    for entry in index["shards"]:
        path = out / entry["file"]
        with safe_open(path, "pt") as file:
            tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
        tensors.pop("digests", None)
        write_safetensors(path, tensors, metadata)
        shards.append(entry | {"bytes": path.stat().st_size, "sha256": sha256(path)})
    config = json.loads((out / "extract.json").read_text())
    del index["sha256"], config["stamps_sha256"]
    listing = hashlib.sha256()
    for folder in sorted(images_of(out)):
        listing.update(f"{folder[0]}\0{folder[1]}\n".encode())
    old = {"version": 1, "listing_sha256": listing.hexdigest()}
    index |= {"version": 1, "shards": shards, "config": index["config"] | old}
    (out / "index.json").write_text(json.dumps(index, indent=1))
    (out / "extract.json").write_text(json.dumps(config | old, indent=1))
    return index


def images_of(out):
    """(name, size) of the images behind a folder of these tests."""
    root = Path((out.parent / "source").read_text())
    return [(path.relative_to(root).as_posix(), path.stat().st_size) for path in root.rglob("*.png")]


@pytest.fixture
def mine(images, tmp_path):
    """A copy of the images, and their pixels extracted."""
    root, out = tmp_path / "images", tmp_path / "out"
    shutil.copytree(images, root)
    (tmp_path / "source").write_text(str(root))
    _extract(root, out)
    return root, out


def test_caches_of_the_first_version_load_and_can_be_taken_up(mine, tmp_path):
    root, out = mine
    want = LatentCache(out).load(3, 1)[0]
    index = _as_version_1(out)
    old = LatentCache(out)
    old.verify_all()
    assert len(old) == 22 and torch.equal(old.load(3, 1)[0], want)
    for change, message in (
        ({"class_names": ["bee", "ant", "cow"]}, "should lie in the folder of its class"),
        ({"class_names": ["ant", "bee", "cow", "dog"]}, "class_names is .* in extract.json"),
        ({"scale": 0}, "scale not 0"),
        ({"config": index["config"] | {"vae_sha256": "0"}}, "vae_sha256 is '0', but 'none' in extract.json"),
    ):
        (out / "index.json").write_text(json.dumps(index | change))
        with pytest.raises(DiffFitError, match=message):
            LatentCache(out)
    (out / "index.json").write_text(json.dumps(index))
    shards = {path: path.read_bytes() for path in out.glob("shard-*")}
    assert _extract(root, out) == 0  # nothing has changed: the shards stay
    assert {path: path.read_bytes() for path in shards} == shards
    assert json.loads((out / "index.json").read_text())["version"] == 2
    LatentCache(out).verify_all()


@pytest.mark.parametrize("state", ["complete", "begun", "first version"])
def test_images_that_changed_behind_their_names_are_extracted_again(mine, tmp_path, capsys, state):
    root, out = mine
    if state == "begun":
        (out / "index.json").unlink()
        sorted(out.glob("shard-*"))[4].unlink()
    elif state == "first version":
        _as_version_1(out)
    path = root / "ant" / "01.png"
    status, pixels = path.stat(), np.asarray(Image.open(path))
    Image.fromarray(255 - pixels[:10]).save(path)  # shorter,
    path.write_bytes(path.read_bytes().ljust(status.st_size, b"\0"))  # and as long again: decoders stop at its end
    assert path.stat().st_size == status.st_size
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*")}
    capsys.readouterr()
    assert _extract(root, out) == 0
    assert "1 images have changed since they were extracted, the first is ant/01.png" in capsys.readouterr().err
    cache, folder = LatentCache(out), ImageFolder(root, 16)
    cache.verify_all()
    assert torch.equal(cache.load(1, 0)[0], folder.load(1, 0)[0])
    again = [name for name, time_ in before.items() if (out / name).stat().st_mtime_ns != time_]
    assert again == [sorted(before)[0]]  # the others stay
    _extract(root, tmp_path / "fresh")
    if state != "first version":
        assert _bytes(out) == _bytes(tmp_path / "fresh")
    assert _extract(root, out) == 0 and "changed" not in capsys.readouterr().err


def test_content_counts_when_size_and_time_are_the_same(mine, capsys):
    """As ``cp -p`` or an archive that sets times leaves it; and the other way round, new times alone change nothing."""
    root, out = mine
    before = _bytes(out)
    path = root / "cow" / "00.png"
    status, content = path.stat(), path.read_bytes()
    path.write_bytes(content[:-20] + bytes(20))  # damaged now
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert _extract(root, out) == 0
    assert [bad.file for bad in LatentCache(out).report()] == ["bee/03.png", "cow/00.png"]
    path.write_bytes(content)
    assert _extract(root, out) == 0
    for image in root.rglob("*.png"):
        os.utime(image)
    capsys.readouterr()
    assert _extract(root, out) == 0 and "changed" not in capsys.readouterr().err
    after = _bytes(out)
    assert {k: v for k, v in before.items() if k != "extract.json"} == {
        k: v for k, v in after.items() if k != "extract.json"
    }


def test_an_unreadable_image_that_was_mended_is_taken(mine):
    root, out = mine
    damaged = root / "bee" / "03.png"
    damaged.write_bytes((root / "bee" / "02.png").read_bytes())
    _extract(root, out)
    assert len(LatentCache(out)) == 23 and LatentCache(out).report() == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: {"pixels": t["pixels"][:, :1]},
            r"should hold pixels of U8 \[4, 3, 16, 16\]; it holds U8 \[4, 1, 16, 16\]",
        ),
        (lambda t: {"pixels": t["pixels"][..., :8, :8]}, r"it holds U8 \[4, 3, 8, 8\]"),
        (lambda t: {"pixels": t["pixels"].to(torch.int8)}, "it holds I8"),
        (lambda t: {"pixels": t["pixels"][:3]}, r"it holds U8 \[3, 3, 16, 16\]"),
        (lambda t: {"moments": t["pixels"], "pixels": None}, "it holds nothing"),
        (lambda t: {"labels": t["labels"].to(torch.int32)}, "labels of I64"),
        (lambda t: {"labels": t["labels"][:, None]}, r"labels of I64 \[4\]; it holds I64 \[4, 1\]"),
        (lambda t: {"labels": t["labels"] + 1}, "are not those of the index"),
        (lambda t: {"indices": t["indices"].flip(0)}, "images 0 to 3 in order"),
        (lambda t: {"indices": t["indices"] + 1}, "images 0 to 3 in order"),
        (lambda t: {"digests": t["digests"][:1]}, "digests of U8"),
    ],
)
def test_a_shard_of_another_make_is_refused_and_made_again(mine, change, message):
    root, out = mine
    before = _bytes(out)
    path = sorted(out.glob("shard-*"))[0]
    tensors = load_file(path)
    tensors = {key: value.contiguous() for key, value in (tensors | change(tensors)).items() if value is not None}
    save_file(tensors, path, metadata={"difffit_fast": json.dumps({"bad": [], "shard": 0})})
    index = json.loads((out / "index.json").read_text())
    index["shards"][0] |= {"bytes": path.stat().st_size, "sha256": sha256(path)}
    index["version"] = 1  # which has no checksum
    (out / "index.json").write_text(json.dumps(index))
    with pytest.raises(DiffFitError, match=message):
        LatentCache(out).verify_all()
    if "are not those" not in message:
        _extract(root, out)
        assert _bytes(out) == before


def test_names_that_are_not_unicode(images, tmp_path, capfd):
    root, out = tmp_path / "images", tmp_path / "out"
    shutil.copytree(images / "ant", root / os.fsdecode(b"caf\xe9"))
    (root / os.fsdecode(b"caf\xe9") / os.fsdecode(b"\xff\xfe.png")).write_bytes(b"damaged")
    shutil.copytree(images / "cow", root / "kühe\n")
    assert _extract(root, out) == 0
    cache = LatentCache(out)
    cache.verify_all()
    assert cache.class_names == [os.fsdecode(b"caf\xe9"), "kühe\n"] and len(cache) == 16
    assert cache.files[0] == os.fsdecode(b"caf\xe9/00.png")
    assert cache.report()[0].file == os.fsdecode(b"caf\xe9/\xff\xfe.png")
    assert "left out" in capfd.readouterr().err
    before = _bytes(out)
    assert _extract(root, out) == 0 and _bytes(out) == before


def test_a_folder_whose_name_is_not_unicode_is_refused_at_once(images, tmp_path):
    with pytest.raises(DiffFitError, match="must be UTF-8"):
        _extract(images, tmp_path / os.fsdecode(b"\xff"))
    assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------- together, and with no room


def test_of_two_that_begin_one_folder_with_other_settings_the_later_is_refused(images, tmp_path, monkeypatch):
    out = tmp_path / "out"
    _extract(images, out)
    before = _bytes(out)
    scandir = os.scandir  # shows the folder as it was a moment ago
    monkeypatch.setattr(os, "scandir", lambda path: [] if path == out else scandir(path))
    with pytest.raises(DiffFitError, match="its image_size is 16, now 8 is asked for"):
        _extract(images, out, **{"image-size": 8})
    assert _extract(images, out) == 0 and _bytes(out) == before


def test_two_extractions_into_one_folder_at_once(images, tmp_path):
    _extract(images, tmp_path / "one")
    out = tmp_path / "two"
    processes = [
        subprocess.Popen(_command(_arguments(images, out), pause), env=_environment(), stderr=subprocess.PIPE)
        for pause in (0.0, 0.1)
    ]
    assert [(p.communicate()[1][-300:], p.returncode)[1] for p in processes] == [0, 0]
    assert _bytes(out) == _bytes(tmp_path / "one")


def test_who_ends_first_leaves_what_another_one_is_writing(mine):
    root, out = mine
    living = beside(out / "shard-00000-of-00006.safetensors")
    living.write_bytes(b"half a sh")
    sorted(out.glob("shard-*"))[1].unlink()
    _extract(root, out)
    assert living.read_bytes() == b"half a sh"


def test_a_full_disk_is_one_sentence_and_can_be_gone_on_from(images, tmp_path):
    _extract(images, tmp_path / "whole")
    out = tmp_path / "out"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))  # enough for extract.json, for no shard
    try:
        with pytest.raises(DiffFitError, match=r"cannot write into .*File too large; run the same command again"):
            _extract(images, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(out) == ["extract.json"]
    _extract(images, out)
    assert _bytes(out) == _bytes(tmp_path / "whole")
