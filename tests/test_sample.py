"""Sampling: seeding, guidance, decoders, grids, folders that are resumed and shared, and the command line."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from difffit_fast import DiT, FastDiffFitDiT, Sampler
from difffit_fast.cli import sample as cli
from difffit_fast.data.vae import LatentSpace
from difffit_fast.diffusion import FlowMatching, create_diffusion
from difffit_fast.errors import DeltaMismatchError, DiffFitError
from difffit_fast.models.load import load_model
from difffit_fast.sample import sample_to_folder, save_grid, to_uint8, write_npz
from difffit_fast.sample.folder import image_labels, png_path, sampler_settings
from difffit_fast.sample.sampler import image_generators, resolve_labels

SIZES = dict(input_size=8, hidden_size=24, depth=2, num_heads=2, num_classes=5)


def random_model(seed: int = 0, kind=DiT, **overrides) -> DiT:
    torch.manual_seed(seed)
    model = kind(**{**SIZES, "in_channels": 3, **overrides})
    for parameter in model.parameters():
        if parameter.requires_grad or kind is DiT:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """The models here are too small for threads to do anything but wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model() -> DiT:
    return random_model()


# ------------------------------------------------------------------------------------------------------- sampler


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpm++", "unipc", "euler", "heun", "dopri5", "sde"])
def test_an_image_depends_on_seed_and_index_alone(model, name):
    if name in ("dpm++", "unipc"):
        pytest.importorskip("diffusers")
    labels = [0, 1, 2, 3, 4]
    together = Sampler(model, name, 6, cfg_scale=2.0, batch_size=5, eta=1.0).sample(labels, seed=3)
    assert together.shape == (5, 3, 8, 8) and together.abs().max() <= 1 and together.std() > 0.1
    in_pairs = Sampler(model, name, 6, cfg_scale=2.0, batch_size=2, eta=1.0).sample(labels, seed=3)
    torch.testing.assert_close(in_pairs, together, rtol=0, atol=1e-3)
    alone = Sampler(model, name, 6, cfg_scale=2.0, eta=1.0).sample([3], seed=3, indices=[3])
    torch.testing.assert_close(alone, together[3:4], rtol=0, atol=1e-3)
    other = Sampler(model, name, 6, cfg_scale=2.0, eta=1.0).sample(labels, seed=4)
    assert (other - together).abs().amax((1, 2, 3)).min() > 0.05
    assert (together[0] - together[1]).abs().max() > 0.05


def test_against_the_loops_written_out(model):
    """The sampler is the loop of create_diffusion over forward_with_cfg, as the public scripts have it."""
    y = torch.tensor([1, 4])
    noise = torch.stack([torch.randn(3, 8, 8, generator=g) for g in image_generators(7, [0, 1])])
    ours = Sampler(model, "ddim", 8, cfg_scale=3.0, cfg_channels="all").sample(y, seed=7)
    kwargs = dict(y=torch.cat([y, torch.full_like(y, 5)]), cfg_scale=3.0, cfg_channels="all")
    with torch.no_grad():
        doubled = create_diffusion("8").ddim_sample_loop(
            model.eval().forward_with_cfg,
            (4, 3, 8, 8),
            torch.cat([noise, noise]),
            model_kwargs=kwargs,
            clip_denoised=True,
        )
    torch.testing.assert_close(ours, doubled[:2].clamp(-1, 1), rtol=0, atol=1e-3)
    ours = Sampler(model, "heun", 5, cfg_scale=1).sample(y, seed=7)
    with torch.no_grad():
        plain = FlowMatching().ode_sample_loop(
            model, (2, 3, 8, 8), noise, num_steps=5, method="heun", model_kwargs=dict(y=y)
        )
    torch.testing.assert_close(ours, plain.clamp(-1, 1), rtol=0, atol=1e-3)


def test_guidance_changes_images_and_one_is_none(model):
    def images(scale):
        return Sampler(model, "ddim", 5, cfg_scale=scale).sample([0, 1], seed=0)

    assert (images(1) - images(4)).abs().max() > 0.01
    torch.testing.assert_close(images(1), images(1 + 1e-6), rtol=0, atol=1e-3)


def test_mode_and_gradients_are_left_as_they_were(model):
    model.train()
    sampler = Sampler(model, "ddim", 2, cfg_scale=2.0)
    first = sampler.sample([0], seed=0)
    assert model.training and not first.requires_grad
    assert torch.equal(first, sampler.sample([0], seed=0))  # no label dropout
    model(torch.randn(1, 3, 8, 8), torch.tensor([3]), torch.tensor([0])).sum().backward()
    model.zero_grad()
    assert sampler.sample([], seed=0).numel() == 0


def test_fast_model_samples_what_its_merge_does():
    fast = random_model(kind=FastDiffFitDiT)
    for name, parameter in fast.named_parameters():
        if ".gamma" in name or (".norm" in name and name.endswith("weight")):
            torch.nn.init.normal_(parameter, mean=1.0, std=0.1)
        elif name.endswith("adaLN_modulation.1.weight") or name == "final_layer.linear.weight":
            torch.nn.init.normal_(parameter, std=0.1)
    ours = Sampler(fast, "ddim", 4, cfg_scale=2.0).sample([0, 3], seed=1)
    merged = Sampler(fast.merge(), "ddim", 4, cfg_scale=2.0).sample([0, 3], seed=1)
    assert ours.std() > 0.1
    torch.testing.assert_close(ours, merged, rtol=0, atol=1e-3)


def test_precision_and_custom_schedule(model):
    full = Sampler(model, "ddim", 4, cfg_scale=2.0).sample([0], seed=1)
    half = Sampler(model, "ddim", 4, cfg_scale=2.0, autocast=torch.bfloat16).sample([0], seed=1)
    assert 0 < (full - half).abs().max() < 0.2
    cosine = Sampler(model, "ddim", 4, cfg_scale=2.0, diffusion=create_diffusion("", "cosine")).sample([0], seed=1)
    assert (full - cosine).abs().max() > 0.01


def tiny_vae() -> LatentSpace:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), norm_num_groups=4, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    return LatentSpace(vae, "tiny")


def test_decoding_latents():
    latent_model, vae = random_model(in_channels=4, input_size=4), tiny_vae()
    sampler = Sampler(latent_model, "ddim", 3, cfg_scale=2.0, vae=vae)
    images, latents = sampler.sample([0, 1]), sampler.sample([0, 1], decode=False)
    assert images.shape == (2, 3, 32, 32) and latents.shape == (2, 4, 4, 4)
    with torch.no_grad():
        expected = vae.model.decode(latents / 0.18215).sample.clamp(-1, 1)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-4)
    with pytest.raises(DiffFitError, match=r"makes 4 channels, but there is no VAE"):
        Sampler(latent_model, "ddim", 3).sample([0])
    with pytest.raises(DiffFitError, match="makes 3 channels, but the VAE has 4"):
        Sampler(random_model(), "ddim", 3, vae=vae).sample([0])


def test_labels():
    names = ["apple pie", "beignets", "7"]
    assert resolve_labels(["beignets", 2, "0", "7"], 3, names).tolist() == [1, 2, 0, 2]
    assert resolve_labels(torch.tensor([1, 0]), 3).dtype == torch.long
    for labels, given, message in (
        (["beignet"], names, "no class 'beignet'; the nearest known one is 'beignets'"),
        (["pie"], None, "carries no class names"),
        ([3], names, r"class labels must be in 0\.\.2; got 3"),
        ([-1], None, "got -1"),
    ):
        with pytest.raises(DiffFitError, match=message):
            resolve_labels(labels, 3, given)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(sampler="plms"), "ddpm, ddim, dpm.., unipc, euler, heun, dopri5, sde; got 'plms'"),
        (dict(num_sampling_steps=0), "num_sampling_steps must be at least 1"),
        (dict(num_sampling_steps=1001), "at most 1000 steps; got 1001"),
        (dict(cfg_scale=-1.0), "cfg_scale"),
        (dict(cfg_channels=4), "cfg_channels must be"),
        (dict(eta=2.0), "eta"),
    ],
)
def test_sampler_errors(model, arguments, message):
    with pytest.raises(DiffFitError, match=message):
        Sampler(model, **arguments)


def test_no_null_class_no_guidance():
    bare = random_model(class_dropout_prob=0.0)
    with pytest.raises(DiffFitError, match="without a null class"):
        Sampler(bare, "ddim", 3)
    assert Sampler(bare, "ddim", 3, cfg_scale=1).sample([4]).shape == (1, 3, 8, 8)


# -------------------------------------------------------------------------------------------------------- images


def test_to_uint8_is_the_public_rounding():
    values = torch.tensor([-1.0, -0.5, 0.0, 0.999, 1.0, 2.0]).view(1, 1, 1, 6)
    assert to_uint8(values).ravel().tolist() == [0, 64, 128, 255, 255, 255]
    assert to_uint8(torch.rand(2, 3, 4, 5)).shape == (2, 4, 5, 3)


def test_grid(tmp_path):
    images = torch.stack([torch.full((3, 4, 6), v) for v in (-1.0, 0.0, 1.0)])
    save_grid(images, tmp_path / "grid.png")
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (2 + 2 * 6, 2 + 2 * 8, 3)
    assert (grid[2:6, 2:8] == 0).all() and (grid[2:6, 10:16] == 128).all() and (grid[8:12, 10:16] == 255).all()
    save_grid(images[:, :1], tmp_path / "row.png", columns=3, padding=0)
    assert np.asarray(Image.open(tmp_path / "row.png")).shape == (4, 18)
    with pytest.raises(ValueError, match=r"1 or 3"):
        save_grid(torch.zeros(1, 4, 2, 2), tmp_path / "no.png")
    assert sorted(os.listdir(tmp_path)) == ["grid.png", "row.png"]


# ------------------------------------------------------------------------------------------------------- folders


def fid_sampler(model, batch_size=4):
    return Sampler(model, "ddim", 2, cfg_scale=1.5, batch_size=batch_size)


def begun(sampler, seed):
    return json.loads(json.dumps({**sampler_settings(sampler), "seed": seed, "labels": None}))


def read_folder(folder: Path, n: int) -> np.ndarray:
    return np.stack([np.asarray(Image.open(png_path(folder, i))) for i in range(n)])


def test_folder_and_npz(model, tmp_path):
    npz = sample_to_folder(fid_sampler(model), tmp_path / "a", 10, seed=5, progress=False)
    assert npz == tmp_path / "a.npz"
    with np.load(npz) as data:
        assert data.files == ["arr_0"] and data["arr_0"].dtype == np.uint8 and data["arr_0"].shape == (10, 8, 8, 3)
        assert np.array_equal(data["arr_0"], read_folder(tmp_path / "a", 10))
    labels = image_labels(fid_sampler(model), 10, None, 5)
    direct = to_uint8(fid_sampler(model, 10).sample(labels, seed=5))
    assert np.abs(direct.astype(int) - read_folder(tmp_path / "a", 10)).max() <= 1


def test_folder_resumes(model, tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    sample_to_folder(fid_sampler(model), whole, 9, seed=5, progress=False)
    folder = tmp_path / "killed"
    sample_to_folder(fid_sampler(model, 3), folder, 6, seed=5, progress=False, npz=False)
    png_path(folder, 1).unlink()
    png_path(folder, 2).write_bytes(png_path(folder, 2).read_bytes()[:-7])  # cut short by something else
    (folder / ".tmp-000007.png.123").write_bytes(b"half")
    os.utime(folder / ".tmp-000007.png.123", (1, 1))  # by an earlier version
    kept = png_path(folder, 0).stat().st_mtime_ns
    sampled = []
    original = Sampler.sample

    def counting(self, labels, seed, *, indices, **kwargs):
        sampled.extend(indices)
        return original(self, labels, seed, indices=indices, **kwargs)

    monkeypatch.setattr(Sampler, "sample", counting)
    sample_to_folder(fid_sampler(model), folder, 9, seed=5, progress=False)
    assert sampled == [1, 2, 6, 7, 8] and png_path(folder, 0).stat().st_mtime_ns == kept
    assert np.abs(read_folder(folder, 9).astype(int) - read_folder(whole, 9)).max() <= 1
    assert not list(folder.glob(".tmp-*"))


def test_folder_refuses_other_settings(model, tmp_path):
    folder = tmp_path / "a"
    sample_to_folder(fid_sampler(model), folder, 2, seed=5, progress=False)
    with pytest.raises(DiffFitError, match="begun with seed 5; now it is 6"):
        sample_to_folder(fid_sampler(model), folder, 2, seed=6, progress=False)
    with pytest.raises(DiffFitError, match=r"begun with cfg_scale 1\.5; now it is 4\.0"):
        sample_to_folder(Sampler(model, "ddim", 2), folder, 2, seed=5, progress=False)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "000000.png").write_bytes(b"")
    with pytest.raises(DiffFitError, match="holds images but no sampling.json"):
        sample_to_folder(fid_sampler(model), tmp_path / "b", 2, progress=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(DiffFitError, match="cannot write samples into"):
        sample_to_folder(fid_sampler(model), tmp_path / "file" / "c", 2, progress=False)


def test_folder_refuses_another_vae_of_the_same_name(tmp_path):
    model, vae = random_model(in_channels=4, input_size=4), tiny_vae()
    folder = tmp_path / "a"
    sample_to_folder(Sampler(model, "ddim", 2, vae=vae), folder, 1, progress=False, npz=False)
    with torch.no_grad():
        vae.model.decoder.conv_in.weight.mul_(2)
    with pytest.raises(DiffFitError, match="begun with vae_sha256"):
        sample_to_folder(Sampler(model, "ddim", 2, vae=vae), folder, 2, progress=False, npz=False)
    settings = json.loads((folder / "sampling.json").read_text())
    del settings["vae_sha256"]  # as an earlier version wrote it
    (folder / "sampling.json").write_text(json.dumps(settings))
    sample_to_folder(Sampler(model, "ddim", 2, vae=vae), folder, 2, progress=False, npz=False)
    (folder / "sampling.json").write_text("[]")
    with pytest.raises(DiffFitError, match="should hold a JSON object"):
        sample_to_folder(Sampler(model, "ddim", 2, vae=vae), folder, 2, progress=False, npz=False)


def test_labels_of_a_folder(model):
    sampler = fid_sampler(model)
    assert image_labels(sampler, 5, [3, 1], 0) == [3, 1, 3, 1, 3]
    drawn = image_labels(sampler, 2000, None, 0)
    assert drawn[:100] == image_labels(sampler, 100, None, 0)  # a longer run continues a shorter one
    assert np.bincount(drawn, minlength=5).min() > 300
    with pytest.raises(DiffFitError, match="empty"):
        image_labels(sampler, 5, [], 0)


class Rank:
    """One of three processes, alone: what the first one does must have been done."""

    size = 3

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def main_first(self, action):
        return action() if self.rank == 0 else None

    def agree(self, error):
        assert error is None


def test_processes_share_the_work(model, tmp_path):
    folder = tmp_path / "shared"
    folder.mkdir()
    (folder / "sampling.json").write_text(json.dumps(begun(fid_sampler(model), seed=5)))
    for rank in (1, 2, 0):
        sample_to_folder(fid_sampler(model), folder, 8, seed=5, processes=Rank(rank), progress=False, npz=rank == 0)
        there = [i for i in range(8) if png_path(folder, i).exists()]
        assert there == {1: [1, 4, 7], 2: [1, 2, 4, 5, 7], 0: list(range(8))}[rank]


def test_npz_errors(tmp_path):
    for i, size in enumerate([(4, 4), (4, 5)]):
        Image.new("RGB", size).save(tmp_path / f"{i}.png")
    with pytest.raises(DiffFitError, match=r"1\.png is 4x5, the others 4x4"):
        write_npz([tmp_path / "0.png", tmp_path / "1.png"], tmp_path / "x.npz")
    with pytest.raises(DiffFitError, match="no images"):
        write_npz([], tmp_path / "x.npz")
    with pytest.raises(DiffFitError, match="cannot read the image"):
        write_npz([tmp_path / "2.png"], tmp_path / "x.npz")
    assert not list(tmp_path.glob("*.npz")) and not list(tmp_path.glob(".tmp*"))
    write_npz([tmp_path / "0.png"], tmp_path / "x.npz")
    first = (tmp_path / "x.npz").read_bytes()
    write_npz([tmp_path / "0.png"], tmp_path / "x.npz")
    assert first == (tmp_path / "x.npz").read_bytes()


# --------------------------------------------------------------------------------------------- files and command


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A base checkpoint of a training script, and a delta on it for three classes of its own."""
    folder = tmp_path_factory.mktemp("files")
    base = random_model(seed=1)
    raw = {key: value + 0.1 for key, value in base.state_dict().items()}
    torch.save({"model": raw, "ema": base.state_dict(), "args": argparse.Namespace(lr=1)}, folder / "base.pt")
    with pytest.warns(UserWarning, match="made anew"):
        fast = FastDiffFitDiT.from_pretrained(folder / "base.pt", num_classes=3, num_heads=2)
    torch.manual_seed(2)
    for parameter in fast.trainable_parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    fast.save_delta(folder / "delta.safetensors", class_names=["ant", "bee", "cat"], vae="none", objective="ddpm")
    torch.save(fast.merge().state_dict(), folder / "merged.pt")
    return folder


def command(*flags) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return parser.parse_args([str(flag) for flag in flags])


def test_load_model(files):
    ema = load_model(files / "base.pt", num_heads=2).model
    raw = load_model(files / "base.pt", num_heads=2, weights="model").model
    torch.testing.assert_close(raw.pos_embed, ema.pos_embed + 0.1)
    assert not ema.training
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([3, 900]), torch.tensor([0, 3])
    truth = load_model(files / "merged.pt", num_heads=2).model(x, t, y)
    for merge in (False, True):
        loaded = load_model(files / "base.pt", files / "delta.safetensors", merge=merge)
        assert isinstance(loaded.model, FastDiffFitDiT) is not merge
        assert loaded.class_names == ["ant", "bee", "cat"] and loaded.image_size == 8
        torch.testing.assert_close(loaded.model(x, t, y), truth, rtol=1e-3, atol=1e-4)
    larger = load_model(files / "base.pt", num_heads=2, image_size=16)
    assert larger.model.input_size == 16 and larger.image_size == 16


def test_load_model_errors(files, tmp_path):
    with pytest.raises(DiffFitError, match="checkpoint not found"):
        load_model(tmp_path / "none.pt")
    torch.save(dict(random_model().state_dict()), tmp_path / "bare.pt")  # no record of the heads
    with pytest.raises(DiffFitError, match="none of the published sizes"):
        load_model(tmp_path / "bare.pt")
    with pytest.raises(DiffFitError, match="is a delta, not a checkpoint"):
        load_model(files / "delta.safetensors")
    with pytest.raises(DiffFitError, match="does not lie in its run folder"):
        load_model(None, files / "delta.safetensors")
    other = random_model(seed=9)
    torch.save(other.state_dict(), tmp_path / "other.pt")
    with pytest.raises(DeltaMismatchError, match="was made on another base"):
        load_model(tmp_path / "other.pt", files / "delta.safetensors")
    odd = dict(other.state_dict(), **{"blocks.0.gamma1": torch.ones(24)})
    torch.save(odd, tmp_path / "odd.pt")
    with pytest.raises(DiffFitError, match=r"unknown key blocks\.0\.gamma1; it looks like a DiffFit model"):
        load_model(tmp_path / "odd.pt", num_heads=2)


def test_delta_finds_the_base_of_its_run(files, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    delta = tmp_path / "checkpoints" / "0000010.safetensors"
    delta.write_bytes((files / "delta.safetensors").read_bytes())
    (tmp_path / "config.yaml").write_text(f"ckpt: {files / 'base.pt'}\n")
    assert load_model(None, delta).model.num_classes == 3


def test_delta_on_the_random_base_of_its_run(tmp_path):
    train = pytest.importorskip("difffit_fast.train.config")
    methods = pytest.importorskip("difffit_fast.train.methods")
    sizes = dict(depth=2, hidden_size=24, num_heads=2)
    config = train.TrainConfig().replace(model="DiT-S/2", model_args=sizes, global_seed=3, precision="fp32")
    with pytest.warns(UserWarning, match="frozen weights are random"):
        fast = methods.build_model(config, channels=3, input_size=8, num_classes=4, dtype=torch.float32)
    (tmp_path / "checkpoints").mkdir()
    delta = tmp_path / "checkpoints" / "0000010.safetensors"
    for parameter in fast.trainable_parameters():
        parameter.data += 0.1
    fast.save_delta(delta)
    config.save(tmp_path / "config.yaml")
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([3, 900]), torch.tensor([0, 4])
    loaded = load_model(None, delta).model
    torch.testing.assert_close(loaded(x, t, y), fast.eval()(x, t, y))


def test_whole_model_of_full_fine_tuning(tmp_path):
    output = pytest.importorskip("difffit_fast.train.output")
    whole = random_model(seed=4)
    weights = {name: p for name, p in whole.named_parameters() if name != "pos_embed"}
    output.write_output(whole, weights, tmp_path / "full.safetensors", dict(class_names=list("abcde"), image_size=8))
    loaded = load_model(tmp_path / "full.safetensors")
    assert loaded.class_names == list("abcde") and loaded.model.config == whole.config
    assert torch.equal(loaded.model.blocks[1].mlp.fc2.weight, whole.blocks[1].mlp.fc2.weight)


def test_command_writes_a_grid(files, tmp_path, capsys):
    out = tmp_path / "grid.png"
    flags = ["--ckpt", files / "base.pt", "--delta", files / "delta.safetensors", "--num-sampling-steps", 3, "-o", out]
    assert cli.run(command(*flags, "--class-labels", "cat", "0", "--sampler", "ddim", "--seed", 4)) == 0
    assert np.asarray(Image.open(out)).shape == (12, 22, 3)
    assert "2 images of 8 x 8" in capsys.readouterr().out
    loaded = load_model(files / "base.pt", files / "delta.safetensors")
    save_grid(Sampler(loaded.model, "ddim", 3, 4.0).sample([2, 0], seed=4), tmp_path / "api.png")
    assert np.array_equal(np.asarray(Image.open(out)), np.asarray(Image.open(tmp_path / "api.png")))
    merged = ["--merge", "--class-labels", "cat", "0", "--sampler", "ddim", "--seed", 4, "-o", tmp_path / "m.png"]
    assert cli.run(command(*flags, *merged)) == 0
    difference = np.asarray(Image.open(tmp_path / "m.png")).astype(int) - np.asarray(Image.open(out))
    assert np.abs(difference).max() <= 1


def test_command_for_flow(files, tmp_path):
    flags = ["--ckpt", files / "base.pt", "--num-heads", 2, "--num-sampling-steps", 2, "-o", tmp_path / "a.png"]
    assert cli.run(command(*flags, "--objective", "flow", "--num-images", 3)) == 0
    assert cli.run(command(*flags, "--sampler", "heun", "--cfg-scale", 1)) == 0
    assert cli.run(command(*flags, "--objective", "flow", "--precision", "bf16", "--num-images", 1)) == 0


BAD = [
    ([], "give --ckpt, or --delta"),
    (["--ckpt", "{base}", "--merge"], "--merge folds a --delta"),
    (["--ckpt", "{base}", "--num-heads", 2, "--num-sampling-steps", 0], "--num-sampling-steps must be at least 1"),
    (["--ckpt", "{base}", "--num-heads", 2, "--num-sampling-steps", 2000], "at most 1000 steps"),
    (["--ckpt", "{base}", "--num-heads", 2, "--sampler", "plms"], "--sampler must be one of"),
    (["--ckpt", "{base}", "--num-heads", 2, "--sampler", "heun", "--objective", "ddpm"], "is not for --objective ddpm"),
    (["--ckpt", "{base}", "--num-heads", 2, "--num-classes", 9], "num_classes 9 was asked for; .* has 5"),
    (["--ckpt", "{base}", "--model", "DiT-S/2"], "DiT-S/2 has .*; .* (has|records) 2"),
    (["--ckpt", "{base}", "--model", "UNet"], "the model must be DiT- or SiT-"),
    (["--ckpt", "{base}", "--num-heads", 5], "num_heads must divide the width 24 of .*; got 5"),
    (["--ckpt", "{base}", "--num-heads", 2, "--class-labels", "5"], r"must be in 0\.\.4; got 5"),
    (["--ckpt", "{base}", "--num-heads", 2, "--class-labels", "dog"], "carries no class names"),
    (["--ckpt", "{base}", "--num-heads", 2, "--cfg-channels", "9"], "cfg_channels must be"),
    (["--ckpt", "{base}", "--num-heads", 2, "--vae", "nowhere"], "no VAE 'nowhere'"),
    (["--ckpt", "{base}", "--num-heads", 2, "--seed", "-1"], "--seed must be at least 0"),
    (["--ckpt", "{base}", "--num-heads", 2, "--device", "cuda:99"], "--device cuda:99"),
    (["--ckpt", "{base}", "--num-heads", 2, "--image-size", 9], "multiple of 2"),
    (["--ckpt", "{base}", "--delta", "{delta}", "--class-labels", "bat"], "nearest known one is 'cat'"),
    (["--ckpt", "{base}", "--delta", "{delta}", "--objective", "flow"], "was trained with --objective ddpm"),
    (["--ckpt", "{base}", "--delta", "{delta}", "--image-size", 16], "made for 8 pixels"),
    (["--ckpt", "{base}", "--num-heads", 2, "-o", "/nowhere/x.png"], "folder of --output does not exist"),
]


@pytest.mark.parametrize("flags, message", BAD, ids=[m for _, m in BAD])
def test_command_errors(files, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    paths = {"base": files / "base.pt", "delta": files / "delta.safetensors"}
    with pytest.raises(DiffFitError, match=message):
        cli.run(command(*(str(flag).format(**paths) for flag in flags)))
    assert os.listdir(tmp_path) == []


def test_command_in_two_processes(files, tmp_path):
    """Two gloo processes fill one folder; the images are those of one process."""
    flags = ["--ckpt", files / "base.pt", "--delta", files / "delta.safetensors", "--num-sampling-steps", 2]
    flags += ["--num-fid-samples", 5, "--per-proc-batch-size", 2, "--device", "cpu", "--sample-dir"]
    assert cli.run(command(*flags, tmp_path / "one")) == 0
    code = (
        "import argparse, sys; from difffit_fast.cli import sample; p = argparse.ArgumentParser(); "
        "sample.add_arguments(p); sys.exit(sample.run(p.parse_args()))"
    )
    processes = []
    for rank in range(2):
        env = dict(os.environ, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
        env |= {"MASTER_PORT": str(29600 + os.getpid() % 300), "OMP_NUM_THREADS": "1"}
        line = [sys.executable, "-c", code, *map(str, flags), str(tmp_path / "two")]
        processes.append(subprocess.Popen(line, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    name = "DiT-custom-base-delta-size-8-vae-none-cfg-1.5-seed-0"
    assert sorted(os.listdir(tmp_path / "two")) == [name, f"{name}.npz"]
    one, two = (read_folder(tmp_path / which / name, 5) for which in ("one", "two"))
    assert np.abs(one.astype(int) - two).max() <= 1
    settings = json.loads((tmp_path / "two" / name / "sampling.json").read_text())
    assert settings["seed"] == 0 and len(settings["delta_sha256"]) == 64
