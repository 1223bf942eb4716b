"""Image folders, the ADM crop, seeds of visits, and the VAE wrapper."""

from __future__ import annotations

import logging
import math
import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from difffit_fast.data import (
    ImageFolder,
    PixelSpace,
    TrainingData,
    load_vae,
    open_data,
    sample_moments,
    visit_seed,
)
from difffit_fast.data.pixels import ImageError, center_crop, read_pixels, to_rgb, to_signed
from difffit_fast.errors import DiffFitError
from difffit_fast.train.stream import TrainStream, batches


def _noise(rng, height, width, channels=3):
    return rng.integers(0, 256, (height, width, channels) if channels > 1 else (height, width), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path):
    """Two classes of PNG noise: 5 images of ``b_cat`` in a nested folder, 3 of ``a dog``."""
    rng = np.random.default_rng(0)
    for name, count, sub in (("b_cat", 5, "deep/er"), ("a dog", 3, "")):
        (tmp_path / name / sub).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(_noise(rng, 20 + i, 31)).save(tmp_path / name / sub / f"{i}.png")
    return tmp_path


# ---------------------------------------------------------------- the crop


def _box_halve(x):
    """2x2 mean of an even-sized image; Pillow filters rows, then columns, and rounds half up after each."""
    h, w, c = x.shape
    rows = np.floor(x.reshape(h, w // 2, 2, c).mean(2) + 0.5)
    return np.floor(rows.reshape(h // 2, 2, w // 2, c).mean(1) + 0.5).astype(np.uint8)


def _cubic(t, a=-0.5):
    t = abs(t)
    if t < 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0


def _bicubic_weights(n_in, n_out):
    """Antialiased cubic convolution (Keys 1981, a = -1/2), the kernel stretched when shrinking."""
    scale = n_in / n_out
    support = max(scale, 1.0)
    weights = np.zeros((n_out, n_in))
    for i in range(n_out):
        center = (i + 0.5) * scale
        for j in range(n_in):
            weights[i, j] = _cubic((j + 0.5 - center) / support)
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize(("height", "width"), [(96, 128), (64, 64), (64, 92), (28, 33), (7, 5), (33, 16), (160, 224)])
def test_center_crop_equals_an_independent_implementation(height, width):
    size = 16
    x = _noise(np.random.default_rng(height), height, width)
    got = np.asarray(center_crop(Image.fromarray(x), size)).astype(float)
    while min(x.shape[:2]) >= 2 * size:
        x = _box_halve(x)
    h, w = x.shape[:2]
    new_h, new_w = round(h * size / min(h, w)), round(w * size / min(h, w))
    rows = np.einsum("jw,hwc->hjc", _bicubic_weights(w, new_w), x.astype(float)).round().clip(0, 255)
    y = np.einsum("ih,hjc->ijc", _bicubic_weights(h, new_h), rows)
    top, left = (new_h - size) // 2, (new_w - size) // 2
    want = y[top : top + size, left : left + size].clip(0, 255)
    # What is left is the last rounding, and Pillow's fixed-point weights.
    assert np.abs(got - want).mean() < 0.35
    assert np.abs(got - want).max() <= 2


@pytest.mark.parametrize(("height", "width"), [(1, 50), (50, 1), (1, 1), (3000, 5), (17, 1023)])
def test_center_crop_always_gives_the_asked_size(height, width):
    assert center_crop(Image.new("RGB", (width, height)), 24).size == (24, 24)


def test_center_crop_keeps_the_centre():
    image = np.zeros((48, 96, 3), np.uint8)
    image[:, 24:72] = 200  # the central square is uniform
    assert (np.asarray(center_crop(Image.fromarray(image), 48)) == 200).all()


# ---------------------------------------------------------------- modes


def _saved(tmp_path, image, name, **options):
    path = tmp_path / name
    image.save(path, **options)
    return read_pixels(path, 8)


def test_gray_palette_alpha_cmyk_and_16_bit_become_the_expected_rgb(tmp_path):
    gray = Image.new("L", (8, 8), 77)
    assert (_saved(tmp_path, gray, "l.png") == 77).all()
    assert (_saved(tmp_path, Image.new("1", (8, 8), 1), "1.png") == 255).all()

    palette = Image.new("P", (8, 8), 3)
    palette.putpalette([0] * 9 + [10, 20, 30] + [0] * 756)
    assert (_saved(tmp_path, palette, "p.png") == [10, 20, 30]).all()
    assert (_saved(tmp_path, palette, "p_transparent.png", transparency=3) == 255).all()

    assert (_saved(tmp_path, Image.new("RGBA", (8, 8), (200, 0, 0, 255)), "opaque.png") == [200, 0, 0]).all()
    half = _saved(tmp_path, Image.new("RGBA", (8, 8), (255, 0, 0, 51)), "half.png")  # 20 % red over white
    assert np.abs(half.astype(int) - [255, 204, 204]).max() <= 1
    assert (_saved(tmp_path, Image.new("LA", (8, 8), (0, 0)), "la.png") == 255).all()

    cmyk = _saved(tmp_path, Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "c.tif")
    assert np.abs(cmyk.astype(int) - [255, 0, 0]).max() <= 1

    deep = Image.fromarray(np.full((8, 8), 0x8080, np.uint16))
    assert (_saved(tmp_path, deep, "deep.png") == 128).all()
    assert (_saved(tmp_path, Image.fromarray(np.full((8, 8), 65535, np.uint16)), "white.tif") == 255).all()
    with pytest.raises(ImageError, match="no agreed range"):
        to_rgb(Image.fromarray(np.zeros((8, 8), np.float32)))


@pytest.mark.parametrize("suffix", ["jpg", "webp", "bmp", "gif", "ppm", "tif", "png"])
def test_formats(tmp_path, suffix):
    (tmp_path / "c").mkdir()
    Image.new("RGB", (9, 9), (0, 128, 255)).save(tmp_path / "c" / f"x.{suffix}")
    x, _ = ImageFolder(tmp_path, 8).load(0, 0)
    assert (x[:, 4, 4] - torch.tensor([-1.0, 0.0, 1.0])).abs().max() < 0.03


def test_upright_by_exif(tmp_path):
    image = Image.new("RGB", (16, 16))
    image.paste((255, 255, 255), (0, 0, 16, 8))  # bright above
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise: bright on the right
    image.save(tmp_path / "x.png", exif=exif)
    pixels = read_pixels(tmp_path / "x.png", 16)
    assert pixels[:, 8:].min() == 255
    assert pixels[:, :8].max() == 0


def test_to_signed_ends_and_middle():
    x = to_signed(np.array([0, 255, 127], np.uint8))
    assert x.tolist() == pytest.approx([-1.0, 1.0, 127 / 127.5 - 1], abs=1e-7)


# ---------------------------------------------------------------- the folder


def test_image_folder_is_training_data(folder):
    (folder / "a dog" / "notes.txt").write_text("not an image")
    (folder / "a dog" / ".hidden.png").write_bytes(b"x")
    (folder / "b_cat" / ".cache").mkdir()
    data = ImageFolder(folder, 16)
    assert isinstance(data, TrainingData)
    assert data.class_names == ["a dog", "b_cat"]
    assert (len(data), data.num_classes, data.channels, data.size, data.image_size) == (8, 2, 3, 16, 16)
    assert data.labels.tolist() == [0] * 3 + [1] * 5
    assert data.files[3] == "b_cat/deep/er/0.png"
    assert data.notes == [
        f"{folder}: left out: 2 hidden files and folders (the first: a dog/.hidden.png); "
        "1 files without an image's name ending (the first: a dog/notes.txt)"
    ]
    x, y = data.load(3, 7)
    assert x.shape == (3, 16, 16) and x.dtype == torch.float32 and y == 1
    assert x.abs().max() <= 1
    with pytest.raises(IndexError):
        data.load(8, 0)
    with pytest.raises(IndexError):
        data.load(-1, 0)


def test_a_visit_is_a_pure_function_and_mirrors_half_of_the_time(folder):
    data, plain = ImageFolder(folder, 16), ImageFolder(folder, 16, flip=False)
    original = plain.load(0, 0)[0]
    assert torch.equal(original, plain.load(0, 12345)[0])
    mirrored = 0
    for epoch in range(400):
        seed = visit_seed(0, epoch, 0)
        x = data.load(0, seed)[0]
        if not torch.equal(x, original):
            assert torch.equal(x, original.flip(-1))
            mirrored += 1
        if epoch < 10:
            assert torch.equal(x, data.load(0, seed)[0])
    assert abs(mirrored - 200) < 5 * math.sqrt(400) / 2


def test_visit_seed_is_mixed_and_stable():
    seeds = {visit_seed(s, e, i) for s in range(4) for e in range(10) for i in range(100)}
    assert len(seeds) == 4000
    assert all(0 <= seed < 1 << 64 for seed in seeds)
    assert visit_seed(0, 1, 2) != visit_seed(0, 2, 1)
    ones = np.mean([bin(visit_seed(0, 0, i)).count("1") for i in range(1000)])
    assert abs(ones - 32) < 1


def test_a_damaged_image_is_named_counted_and_replaced_by_its_class_mate(folder, caplog):
    good = ImageFolder(folder, 16, flip=False)
    expected = [good.load(i, 0)[0] for i in range(8)]
    whole = (folder / "b_cat/deep/er/4.png").read_bytes()
    (folder / "b_cat/deep/er/4.png").write_bytes(whole[: len(whole) // 2])
    (folder / "b_cat/deep/er/0.png").write_bytes(b"no image at all")
    data = ImageFolder(folder, 16, flip=False)
    assert len(data) == 8 and data.report() == []
    with caplog.at_level(logging.WARNING, logger="difffit_fast.data"):
        x, y = data.load(7, 0)  # 4.png -> 0.png is damaged too -> 1.png
        data.load(7, 0)
    assert y == 1 and torch.equal(x, expected[4])
    assert torch.equal(data.load(3, 0)[0], expected[4])
    assert [entry.file for entry in data.report()] == ["b_cat/deep/er/0.png", "b_cat/deep/er/4.png"]
    assert all(entry.reason for entry in data.report())
    assert sum("4.png" in message for message in caplog.messages) == 1  # named once
    for i in range(3):
        (folder / "a dog" / f"{i}.png").write_bytes(b"")
    with pytest.raises(DiffFitError, match="none of the 3 images of class 'a dog'"):
        ImageFolder(folder, 16).load(0, 0)


def test_the_substitute_does_not_depend_on_what_was_seen_before(folder):
    (folder / "b_cat/deep/er/1.png").write_bytes(b"")
    fresh = ImageFolder(folder, 16).load(4, 5)[0]
    used = ImageFolder(folder, 16)
    for i in range(8):
        used.load(i, i)
    assert torch.equal(fresh, used.load(4, 5)[0])


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_workers_change_nothing_and_report_to_the_parent(folder, workers):
    (folder / "a dog" / "1.png").write_bytes(b"")
    data = ImageFolder(folder, 16)
    stream, alone = (TrainStream(d, 0, (3, 16, 16), 0.0, d.num_classes) for d in (data, ImageFolder(folder, 16)))
    found = list(batches(stream, 0, 2, 8, num_workers=workers))
    assert len(found) == 2
    for step, batch in enumerate(found):
        want = alone.__getitems__(range(8 * step, 8 * step + 8))
        assert batch["x"].shape == (8, 3, 16, 16) and batch["y"].dtype == torch.int64
        assert torch.equal(batch["x"], want["x"]) and torch.equal(batch["y"], want["y"])
    assert [entry.file for entry in data.report()] == ["a dog/1.png"]


def test_a_pickled_folder_is_the_same(folder):
    assert len(pickle.loads(pickle.dumps(ImageFolder(folder, 16)))) == 8


def test_symbolic_links_are_followed_but_never_in_circles(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    Image.new("RGB", (9, 9)).save(other / "linked.png")
    os.symlink(other, folder / "a dog" / "link")
    os.symlink(folder / "a dog", folder / "a dog" / "circle")
    assert ImageFolder(folder, 16).files[:4] == ["a dog/0.png", "a dog/1.png", "a dog/2.png", "a dog/link/linked.png"]


def test_bad_folders_are_clear_errors(folder, tmp_path, monkeypatch):
    with pytest.raises(DiffFitError, match="not a folder"):
        ImageFolder(tmp_path / "missing", 16)
    (tmp_path / "a_file").write_text("x")
    with pytest.raises(DiffFitError, match="not a folder"):
        ImageFolder(tmp_path / "a_file", 16)
    for size in (0, -1, 2.5, True):
        with pytest.raises(DiffFitError, match="positive integer"):
            ImageFolder(folder, size)
    (folder / "empty").mkdir()
    with pytest.raises(DiffFitError, match="empty holds no image"):
        ImageFolder(folder, 16)
    (folder / "empty" / "readme.txt").write_text("x")
    with pytest.raises(DiffFitError, match="1 files have no image name ending"):
        ImageFolder(folder, 16)
    bare = folder / "empty" / "bare"
    bare.mkdir()
    with pytest.raises(DiffFitError, match="no sub-folders"):
        ImageFolder(bare, 16)

    scandir = os.scandir

    def denied(path="."):
        if os.fspath(path).endswith("er"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(DiffFitError, match=r"deep/er cannot be read: Permission denied"):
        ImageFolder(folder, 16)


def test_trouble_of_the_file_system_is_not_taken_for_a_corrupt_image(folder, monkeypatch):
    data = ImageFolder(folder, 16)

    def too_many(*args, **kwargs):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(Image, "open", too_many)
    with pytest.raises(DiffFitError, match="Too many open files"):
        data.load(0, 0)
    assert not data._bad.any()


def test_open_data_asks_for_exactly_one_source(folder):
    assert len(open_data(path=folder, image_size=16)) == 8
    with pytest.raises(DiffFitError, match="got neither"):
        open_data()
    with pytest.raises(DiffFitError, match="got both"):
        open_data(path=folder, feature_path=folder)
    with pytest.raises(DiffFitError, match="image size is needed"):
        open_data(path=folder)


# ---------------------------------------------------------------- the VAE


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    """A random AutoencoderKL of two levels, saved as diffusers does."""
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


def test_vae_encodes_samples_and_decodes_as_diffusers(vae_folder, tmp_path):
    import diffusers

    vae = load_vae(vae_folder)
    assert (vae.channels, vae.factor, vae.scale, vae.shift) == (4, 2, 0.18215, 0.0)
    plain = diffusers.AutoencoderKL.from_pretrained(vae_folder).eval()
    images = torch.randn(3, 3, 16, 16).clamp(-1, 1)
    moments = vae.encode(images)
    assert moments.shape == (3, 8, 8, 8) and moments.dtype == torch.float32
    with torch.no_grad():
        posterior = plain.encode(images).latent_dist
        generator = torch.Generator().manual_seed(3)
        want = posterior.sample(generator=torch.Generator().manual_seed(3)) * 0.18215
        noise = torch.randn(posterior.mean.shape, generator=generator)
        torch.testing.assert_close(sample_moments(moments, noise), want)
        decoded = plain.decode(want / 0.18215).sample.clamp(-1, 1)
    torch.testing.assert_close(vae.decode(want, batch_size=2), decoded, rtol=1e-4, atol=1e-5)

    os.makedirs(tmp_path / "pipeline")
    os.symlink(vae_folder, tmp_path / "pipeline" / "vae")
    assert load_vae(tmp_path / "pipeline").fingerprint() == vae.fingerprint()
    with torch.no_grad():
        next(vae.model.parameters()).add_(1e-3)
    assert load_vae(vae_folder).fingerprint() != vae.fingerprint()


def test_no_vae_is_the_identity():
    space = load_vae("none")
    assert isinstance(space, PixelSpace) and (space.channels, space.factor, space.scale) == (3, 1, 1.0)
    x = torch.linspace(-2, 2, 12).reshape(1, 3, 2, 2)
    assert torch.equal(space.encode(x), x)
    assert torch.equal(space.decode(x), x.clamp(-1, 1))


def test_a_vae_that_is_not_there_is_a_clear_error(tmp_path, monkeypatch):
    pytest.importorskip("diffusers")
    with pytest.raises(DiffFitError, match="precision must be one of"):
        load_vae("none", precision="fp8")
    with pytest.raises(DiffFitError, match="expected ema, mse, none, a folder"):
        load_vae(tmp_path / "absent")
    with pytest.raises(DiffFitError, match="expected ema, mse, none, a folder"):
        load_vae("emma")
    with pytest.raises(DiffFitError, match="holds no VAE"):
        load_vae(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DiffFitError, match="not in that folder"):
        load_vae(tmp_path)
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(DiffFitError, match="without a network"):
        load_vae("nobody/nothing-of-this-name")
