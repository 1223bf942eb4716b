"""``difffit extract`` and ``LatentCache``: numbers, resuming after a kill, several processes, damage."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

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
        ({"labels": index["labels"][:-1]}, "is damaged"),
        ({"labels": [7] * len(index["labels"])}, "outside its 3 classes"),
        ({"shards": None}, "is damaged"),
    ):
        (out / "index.json").write_text(json.dumps(index | change))
        with pytest.raises(DiffFitError, match=message):
            LatentCache(out)
    (out / "index.json").write_text(json.dumps(index | {"labels": index["labels"][1:] + index["labels"][:1]}))
    with pytest.raises(DiffFitError, match="are not those of the index"):
        LatentCache(out).verify_all()
    for text in ("{", "[]"):
        (out / "index.json").write_text(text)
        with pytest.raises(DiffFitError, match="JSON"):
            LatentCache(out)
