"""Samples that are not finite are an error that names them; samplers are finite at every number of steps that they accept."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from difffit_fast import DiT
from difffit_fast.cli import main
from difffit_fast.errors import DiffFitError
from difffit_fast.sample import Sampler, save_grid
from difffit_fast.sample.folder import other_images, sample_to_folder
from difffit_fast.sample.sampler import SAMPLERS, NonFiniteSampleError

pytestmark = pytest.mark.filterwarnings("ignore")
SIZES = dict(input_size=4, patch_size=4, in_channels=3, hidden_size=8, depth=0, num_heads=2, num_classes=3)


def model(learn_sigma: bool = True, scale: float = 0.3) -> DiT:
    torch.manual_seed(0)
    made = DiT(**SIZES, learn_sigma=learn_sigma)
    for p in made.parameters():
        torch.nn.init.normal_(p, std=scale)
    return made


def needs(sampler: str) -> None:
    if sampler in ("dpm++", "unipc"):
        pytest.importorskip("diffusers")


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 7, 10, 13, 20, 33, 50, 99, 100, 249, 250])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_is_finite(sampler: str, steps: int) -> None:
    needs(sampler)
    for learn_sigma in (True, False):
        images = Sampler(model(learn_sigma), sampler, steps, 1.0 if steps > 50 else 4.0).sample([0, 2])
        assert images.isfinite().all() and images.abs().max() > 0


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++", "unipc"])
def test_the_most_steps_are_finite_and_one_more_is_refused(sampler: str) -> None:
    needs(sampler)
    most = 1000 if sampler in ("ddpm", "ddim") else 999
    assert Sampler(model(), sampler, most, 1.0).sample([0]).isfinite().all()
    with pytest.raises(DiffFitError, match=rf"{re.escape(sampler)} takes at most {most} steps; got {most + 1}"):
        Sampler(model(), sampler, most + 1, 1.0)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_what_is_not_finite_is_named(sampler: str) -> None:
    needs(sampler)
    broken = model()
    with torch.no_grad():
        broken.y_embedder.embedding_table.weight[2] = math.nan
    made = Sampler(broken, sampler, 5, 1.0, batch_size=2)
    assert made.sample([0, 1]).isfinite().all()
    message = rf"1 of 2 samples are not finite.*image 13 of class 2 \({re.escape(sampler)}, 5 steps, cfg_scale 1\)"
    with pytest.raises(NonFiniteSampleError, match=message):
        made.sample([0, 1, 1, 2], indices=[10, 11, 12, 13])


def test_nothing_of_it_is_drawn(tmp_path: Path) -> None:
    broken = model()
    with torch.no_grad():
        broken.y_embedder.embedding_table.weight[2] = math.inf
    with pytest.raises(NonFiniteSampleError):
        sample_to_folder(
            Sampler(broken, "euler", 2, 1.0, batch_size=1), tmp_path / "out", 3, labels=[0, 1, 2], progress=False
        )
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == ["000000.png", "000001.png"]
    assert not (tmp_path / "out.npz").exists()


def test_a_decoder_that_is_not_finite_is_told_apart() -> None:
    made = Sampler(model(), "euler", 2, 1.0)
    made.vae.decode = lambda latents: latents * math.nan
    with pytest.raises(NonFiniteSampleError, match="the decoder's fault"):
        made.sample([0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cfg_scale": math.nan}, "cfg_scale must be at least 0; got nan"),
        ({"cfg_scale": math.inf}, "cfg_scale must be at least 0 and less than 1000; got inf"),
        ({"cfg_scale": 1e38}, "cfg_scale must be at least 0 and less than 1000; got 1e"),
        ({"cfg_scale": -1}, "cfg_scale must be at least 0; got -1"),
        ({"eta": math.nan, "sampler": "ddim"}, "eta must be at least 0; got nan"),
        ({"rtol": 0.0, "sampler": "dopri5"}, "rtol must be positive; got 0"),
        ({"atol": math.nan, "sampler": "dopri5"}, "atol must be positive"),
        ({"num_sampling_steps": 0}, "num_sampling_steps must be at least 1"),
        ({"num_sampling_steps": 10**12, "sampler": "euler"}, "num_sampling_steps must be at least 1"),
        ({"batch_size": 10**9}, "batch_size must be at least 1 and less than"),
    ],
)
def test_settings_that_nobody_means_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(DiffFitError, match=message):
        Sampler(model(), **arguments)


@pytest.mark.parametrize(
    "words",
    [
        ["--cfg-scale", "nan"], ["--cfg-scale", "1e38"], ["--seed", "-1"], ["--seed", str(1 << 64)], ["--device", "mps"],
        ["--device", "abacus"], ["--num-sampling-steps", "0"], ["--num-images", "-3"], ["--num-images", str(10**12)],
    ],
)  # fmt: skip
def test_the_command_refuses_them_in_one_sentence(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"model": model().state_dict()}, tmp_path / "base.pt")
    common = [
        "sample",
        "--ckpt",
        str(tmp_path / "base.pt"),
        "--num-heads",
        "2",
        "--vae",
        "none",
        "-o",
        str(tmp_path / "x.png"),
    ]
    assert main([*common, *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("difffit sample: ") and said.count("\n") == 1 and "Traceback" not in said
    assert not (tmp_path / "x.png").exists()


class Straight(torch.nn.Module):
    """The velocity of the straight path from the first noise it sees to ``data``: constant, so that every solver is exact."""

    in_channels, input_size, num_classes, has_null_class, learn_sigma = 3, 4, 3, True, False

    def __init__(self, data: torch.Tensor) -> None:
        super().__init__()
        self.data, self.velocity = torch.nn.Parameter(data), None

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if self.velocity is None:
            self.velocity = self.data - x
        return self.velocity


@pytest.mark.parametrize("steps", [1, 2, 3, 60, 1001])
@pytest.mark.parametrize("sampler", ["euler", "heun", "dopri5"])
def test_a_perfect_velocity_is_integrated_exactly(sampler: str, steps: int) -> None:
    data = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    torch.testing.assert_close(Sampler(Straight(data), sampler, steps, 1.0).sample([0]), data, atol=1e-4, rtol=0)


@pytest.mark.parametrize("seed", [-1, 1 << 64, 1.5, math.nan, True, "0", None])
def test_seeds_that_are_none_are_refused(seed: object) -> None:
    with pytest.raises(DiffFitError, match="the seed must be"):
        Sampler(model(), "euler", 2, 1.0).sample([0], seed)
    assert Sampler(model(), "euler", 2, 1.0).sample([0], (1 << 64) - 1).shape == (1, 3, 4, 4)


def test_no_picture_is_drawn_of_what_is_not_finite(tmp_path: Path) -> None:
    images = torch.zeros(3, 3, 4, 4)
    images[1, 0, 0, 0] = math.inf
    with pytest.raises(DiffFitError, match="1 of 3 images have values that are NaN or infinite"):
        save_grid(images, tmp_path / "grid.png")
    assert not list(tmp_path.iterdir())
    save_grid(images.nan_to_num(), tmp_path / "grid.png")


@pytest.mark.parametrize(
    ("mode", "size", "found"),
    [
        ("RGB", 6, "6x6, RGB, 8 bits"), ("L", 4, "4x4, gray, 8 bits"), ("RGBA", 4, "4x4, RGB with alpha, 8 bits"),
        ("P", 4, "4x4, of a palette, [0-9] bits"), ("I;16", 4, "4x4, gray, 16 bits"),
    ],
)  # fmt: skip
def test_a_png_that_was_not_sampled_is_neither_taken_nor_replaced(
    tmp_path: Path, mode: str, size: int, found: str
) -> None:
    folder, sampler = tmp_path / "s", Sampler(model(), "euler", 2, 1.0)
    sample_to_folder(sampler, folder, 2, progress=False, npz=False)
    (folder / "000000.png").unlink()
    Image.new(mode, (size, size)).save(folder / "000001.png")
    stranger = (folder / "000001.png").read_bytes()
    with pytest.raises(DiffFitError, match=f"000001.png is {found}; the samples are 4x4, RGB, 8 bits"):
        sample_to_folder(sampler, folder, 2, progress=False)
    assert (folder / "000001.png").read_bytes() == stranger and not (folder / "000000.png").exists()  # before any work


def test_images_besides_the_samples_are_named(tmp_path: Path) -> None:
    folder, sampler = tmp_path / "s", Sampler(model(), "euler", 2, 1.0)
    sample_to_folder(sampler, folder, 3, progress=False, npz=False)
    Image.new("RGB", (4, 4)).save(folder / "cat.png")
    assert [path.name for path in other_images(folder, 2)] == ["000002.png", "cat.png"]
    with np.load(sample_to_folder(sampler, folder, 2, progress=False)) as file:
        assert len(file["arr_0"]) == 2
    for count in (10**12, 2.5, 0):
        with pytest.raises(DiffFitError, match="the number of images must be"):
            sample_to_folder(sampler, tmp_path / "none", count, progress=False)
    assert not (tmp_path / "none").exists()
