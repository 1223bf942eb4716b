"""Image files as people have them: modes, ranges, sizes, chunks; what each becomes, or why it is refused."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from difffit_fast.data import ImageFolder
from difffit_fast.data.pixels import ImageError, center_crop, read_pixels, to_rgb
from difffit_fast.errors import DiffFitError

NO_RANGE = "no agreed range"


def png(depth, colour, row, chunks=(), after=()):
    """An 8 x 8 PNG by hand: what Pillow does not write."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, depth, colour, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress((b"\0" + row) * 8))
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            head,
            *(chunk(*c) for c in chunks),
            body,
            *(chunk(*c) for c in after),
            chunk(b"IEND", b""),
        ]
    )


def tiff(bits, sample_format, values, photometric=1):
    """An 8 x 8 gray TIFF by hand."""
    data = values.tobytes()
    tags = [
        (256, 8),
        (257, 8),
        (258, bits),
        (259, 1),
        (262, photometric),
        (273, 0),
        (277, 1),
        (278, 8),
        (279, len(data)),
    ]
    tags.append((339, sample_format))
    start = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, start if tag == 273 else value) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0) + data


def tall(value, dtype):
    return np.full((8, 8), value, dtype)


def packed12(value):
    """Two samples of 12 bits in three bytes."""
    return np.tile(np.array([value >> 4, (value & 15) << 4 | value >> 8, value & 255], np.uint8), 32)


@pytest.mark.parametrize(
    ("data", "gray"),
    [
        (tiff(16, 1, tall(50_000, "<u2")), 195),
        (tiff(16, 1, tall(65_535 - 50_000, "<u2"), photometric=0), 195),  # white is zero
        (tiff(12, 1, packed12(4095)), 255),  # not nearly black
        (tiff(12, 1, packed12(2048)), 128),
        (png(16, 0, struct.pack(">8H", *[50_000] * 8)), 195),
        (png(16, 0, struct.pack(">8H", *[50_000] * 8), [(b"tRNS", struct.pack(">H", 50_000))]), 255),  # transparent
        (png(16, 4, struct.pack(">16H", *[50_000, 65_535] * 8)), 195),
        (b"P5 8 8 65535\n" + struct.pack(">H", 50_000) * 64, 195),
        (b"P5 8 8 4095\n" + struct.pack(">H", 4095) * 64, 255),
        (tiff(32, 1, tall(200, "<u4")), NO_RANGE),
        (tiff(32, 2, tall(200, "<i4")), NO_RANGE),
        (tiff(32, 1, tall(1 << 31, "<u4")), NO_RANGE),
        (tiff(16, 2, tall(200, "<i2")), NO_RANGE),
        (tiff(16, 2, tall(-200, "<i2")), NO_RANGE),
        (tiff(8, 2, tall(100, "i1")), NO_RANGE),
        (tiff(32, 3, tall(0.5, "<f4")), NO_RANGE),
    ],
)
def test_a_file_says_what_its_values_mean_or_is_refused(tmp_path, data, gray):
    (tmp_path / "x").write_bytes(data)
    if gray == NO_RANGE:
        with pytest.raises(ImageError, match=NO_RANGE):
            read_pixels(tmp_path / "x", 8)
    else:
        assert (read_pixels(tmp_path / "x", 8) == gray).all()


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "RGB", "RGBX", "RGBA", "RGBa", "CMYK", "YCbCr", "LAB", "HSV", "LA", "La", "PA"]
)
def test_every_mode_of_eight_bits_becomes_rgb(mode):
    assert to_rgb(Image.new(mode, (4, 4))).mode == "RGB"


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I;16N"])
def test_every_mode_of_sixteen_bits_becomes_rgb(mode):
    assert (np.asarray(to_rgb(Image.frombytes(mode, (4, 4), b"\x80\x80" * 16))) == 128).all()


@pytest.mark.parametrize("suffix", ["gif", "png", "tif", "webp"])
def test_the_first_of_several_frames_is_read(tmp_path, suffix):
    first, second = (Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 0, 255)))
    first.save(tmp_path / f"x.{suffix}", save_all=True, append_images=[second])
    assert np.abs(read_pixels(tmp_path / f"x.{suffix}", 8).astype(int) - [255, 0, 0]).max() <= 2


def test_a_cmyk_jpeg_of_adobe_is_not_inverted(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "x.jpg")
    assert b"Adobe" in (tmp_path / "x.jpg").read_bytes()
    assert np.abs(read_pixels(tmp_path / "x.jpg", 8).astype(int) - [255, 0, 0]).max() <= 2


# ---------------------------------------------------------------- beside the pixels

LONG = zlib.compress(b"x" * (2 << 20))
TEXTS = [(b"zTXt", b"c\0\0" + LONG), (b"iTXt", b"c\0\1\0\0\0" + LONG), (b"iCCP", b"c\0\0" + LONG)]


@pytest.mark.parametrize("chunk", [*TEXTS, (b"zTXt", b"c\0\0" + zlib.compress(b"x" * (900 << 10)))])
def test_text_says_nothing_about_pixels(tmp_path, chunk):
    """Pillow limits the length of a text, and of all texts together; EXIF's orientation is kept."""
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    row = bytes(range(8))
    chunks = [chunk] * (90 if len(chunk[1]) < 1500 else 1)
    (tmp_path / "x.png").write_bytes(png(8, 0, row, [*chunks, (b"eXIf", exif.tobytes()[6:])]))
    assert (read_pixels(tmp_path / "x.png", 8)[:, :, 0] == list(reversed(row))).all()
    if chunk[0] != b"iCCP":
        (tmp_path / "x.png").write_bytes(png(8, 0, row, after=chunks))
        assert (read_pixels(tmp_path / "x.png", 8)[:, :, 0] == list(row)).all()


def test_damage_behind_a_long_text_is_still_damage(tmp_path):
    whole = png(8, 0, bytes(8), TEXTS[:1])
    for cut in (len(whole) // 2, len(whole) - 28):
        (tmp_path / "x.png").write_bytes(whole[:cut])
        with pytest.raises(ImageError):
            read_pixels(tmp_path / "x.png", 8)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_says_nothing_about_pixels(tmp_path):
    (tmp_path / "x.png").write_bytes(png(8, 0, b"\x4d" * 8, [(b"eXIf", b"II*\0\xff\xff\xff\xff")]))
    assert (read_pixels(tmp_path / "x.png", 8) == 77).all()


# ---------------------------------------------------------------- sizes


def crop_of_the_whole(image, size):
    """The procedure without a bound: everything is resized, then cut."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    width, height = (max(size, round(side * size / min(image.size))) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image.crop((left, top, left + size, top + size))).astype(int)


@pytest.mark.parametrize("sides", [(64, 64), (100, 640), (33, 500), (9, 140), (600, 40), (23, 367), (1, 16)])
def test_ordinary_shapes_are_cropped_as_ever(sides):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*sides, 3), dtype=np.uint8))
    assert np.array_equal(np.asarray(center_crop(image, 24)), crop_of_the_whole(image, 24))


@pytest.mark.parametrize("sides", [(1, 17), (1, 400), (400, 1), (3, 1001), (700, 25), (60, 2000), (2001, 90)])
def test_long_shapes_give_the_same_crop_but_for_rounding(sides):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*sides, 3), dtype=np.uint8))
    assert np.abs(np.asarray(center_crop(image, 24)).astype(int) - crop_of_the_whole(image, 24)).max() <= 2


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1), (2, 30_001), (4097, 16)])
def test_memory_follows_the_crop(size, monkeypatch):
    made = []
    resize = Image.Image.resize

    def watched(self, *args, **kwargs):
        made.append(resize(self, *args, **kwargs))
        return made[-1]

    image = Image.new("RGB", size, (1, 2, 3))
    monkeypatch.setattr(Image.Image, "resize", watched)
    assert (np.asarray(center_crop(image, 64)) == [1, 2, 3]).all()
    assert sum(image.width * image.height for image in made) <= 16 * 64 * 64


# ---------------------------------------------------------------- one bad image is one bad image


def _good(path):
    Image.new("RGB", (8, 8), (9, 9, 9)).save(path)


def test_a_bomb_is_one_bad_image(tmp_path, monkeypatch):
    (tmp_path / "c").mkdir()
    _good(tmp_path / "c" / "good.png")
    Image.new("L", (50, 50)).save(tmp_path / "c" / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ImageError, match="exceeds limit"):
        read_pixels(tmp_path / "c" / "bomb.png", 8)
    data = ImageFolder(tmp_path, 8)
    assert data.load(0, 0)[0].shape == (3, 8, 8)
    assert [bad.file for bad in data.report()] == ["c/bomb.png"]


def test_an_image_for_which_there_is_no_memory_is_one_bad_image(tmp_path, monkeypatch):
    (tmp_path / "c").mkdir()
    _good(tmp_path / "c" / "good.png")
    _good(tmp_path / "c" / "bad.png")
    opened = Image.open

    def short(source, *args, **kwargs):
        if "bad" in str(source):
            raise MemoryError
        return opened(source, *args, **kwargs)

    monkeypatch.setattr(Image, "open", short)
    data = ImageFolder(tmp_path, 8)
    data.load(0, 0)
    assert [tuple(bad) for bad in data.report()] == [("c/bad.png", "there is not enough memory to decode it")]


def test_as_it_is(tmp_path):
    Image.new("RGB", (5, 7), (1, 2, 3)).save(tmp_path / "x.png")
    assert read_pixels(tmp_path / "x.png", None).shape == (7, 5, 3)
    with pytest.raises(ImageError):
        read_pixels(tmp_path / "nothing.png", None)


@pytest.mark.parametrize("size", [(40, 40), (31, 90), (1, 700)])
def test_gray_is_the_luma_and_gray_stays_as_it_is(tmp_path, size):
    values = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "colour.png")
    luma = np.round(values @ np.array([0.299, 0.587, 0.114]))
    gray = read_pixels(tmp_path / "colour.png", None, channels=1)
    assert gray.shape == (*size, 1) and np.abs(gray[..., 0] - luma).max() <= 1
    Image.fromarray(values[..., 0]).save(tmp_path / "gray.png")
    assert (read_pixels(tmp_path / "gray.png", None, channels=1)[..., 0] == values[..., 0]).all()
    cropped = read_pixels(tmp_path / "gray.png", 24, channels=1)
    assert cropped.shape == (24, 24, 1)
    assert (cropped == read_pixels(tmp_path / "gray.png", 24)).all()  # a filter treats every channel alike
    folder = tmp_path / "data"
    (folder / "c").mkdir(parents=True)
    (tmp_path / "gray.png").rename(folder / "c" / "gray.png")
    x, _ = ImageFolder(folder, 24, flip=False, channels=1).load(0, 0)
    assert x.shape == (1, 24, 24) and torch.equal(x, ImageFolder(folder, 24, flip=False).load(0, 0)[0][:1])
    for channels in (0, 2, 4, True, "1"):
        with pytest.raises(DiffFitError, match="3 channels, or 1 where they are gray"):
            ImageFolder(folder, 24, channels=channels)
