"""Evaluation: distances against closed forms and independent implementations, the network's shape, files, the command."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tracemalloc
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import difffit_fast.evaluate as ev
from difffit_fast.cli import main
from difffit_fast.errors import DiffFitError
from difffit_fast.evaluate import inception
from difffit_fast.evaluate.compare import collect
from difffit_fast.evaluate.sources import open_images


class TinyFeatures(nn.Module):
    """Eleven features of uint8 images of any size; stands for a network where speed matters."""

    num_features = 11

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.weight = nn.Parameter(torch.randn(11, 3 * 16, generator=generator) / 8)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = nn.functional.adaptive_avg_pool2d(images.float() / 127.5 - 1, 4).flatten(1)
        return torch.tanh(x @ self.weight.T)


def two_gaussians(dim: int, seed: int = 0) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((2, dim, dim))
    mu1, mu2 = rng.standard_normal((2, dim))
    return mu1, a @ a.T / dim, mu2, b @ b.T / dim + np.eye(dim) * 0.1


@pytest.fixture(scope="module")
def image_folders(tmp_path_factory):
    """Two folders of crops of real photographs (scikit-learn's), in class folders, some gray."""
    photos = pytest.importorskip("sklearn.datasets").load_sample_images().images
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for name, photo, count in (("samples", photos[0], 24), ("reference", photos[1], 30)):
        for i in range(count):
            top, left = rng.integers(0, 427 - 96), rng.integers(0, 640 - 96)
            folder = root / name / str(i % 2)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(photo[top : top + 96, left : left + 96]).resize((64, 64)).save(folder / f"{i:03d}.png")
    return root / "samples", root / "reference"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file with the keys of the published weights, holding random ones."""
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    state = {k: v for k, v in ev.random_inception(5).state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(state, path)
    return path


# --- Fréchet distance ---


def test_frechet_diagonal_is_the_closed_form():
    mu1, mu2 = torch.tensor([0.0, 1.0, -2.0]), torch.tensor([1.0, 1.0, 1.0])
    s1, s2 = torch.tensor([1.0, 4.0, 9.0]), torch.tensor([4.0, 4.0, 0.25])
    expected = float((mu1 - mu2).square().sum() + (s1.sqrt() - s2.sqrt()).square().sum())
    assert ev.frechet_distance(mu1, s1.diag(), mu2, s2.diag()) == pytest.approx(expected, rel=1e-12)
    assert ev.frechet_distance(mu1.numpy(), s1.diag().numpy(), mu2.numpy(), s2.diag().numpy()) == pytest.approx(
        expected
    )


def test_frechet_of_commuting_covariances():
    rng = np.random.default_rng(1)
    q, _ = np.linalg.qr(rng.standard_normal((20, 20)))
    a, b = rng.uniform(0.1, 5, (2, 20))
    mu = rng.standard_normal(20)
    got = ev.frechet_distance(mu, q * a @ q.T, mu + 1, q * b @ q.T)
    assert got == pytest.approx(20 + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum(), rel=1e-10)


def test_frechet_of_equal_distributions_is_zero_and_it_is_symmetric():
    mu1, s1, mu2, s2 = two_gaussians(50)
    assert ev.frechet_distance(mu1, s1, mu1, s1) < 1e-9
    assert ev.frechet_distance(mu1, s1, mu2, s2) == pytest.approx(ev.frechet_distance(mu2, s2, mu1, s1), rel=1e-10)


@pytest.mark.parametrize("dim", [1, 37, 199])
def test_frechet_against_scipy_sqrtm(dim):
    linalg = pytest.importorskip("scipy.linalg")
    mu1, s1, mu2, s2 = two_gaussians(dim)
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(s1 + s2 - 2 * np.real(linalg.sqrtm(s1 @ s2)))
    assert ev.frechet_distance(mu1, s1, mu2, s2) == pytest.approx(expected, rel=1e-6)


def test_frechet_of_a_rank_deficient_covariance_warns_and_is_exact():
    q, _ = np.linalg.qr(np.random.default_rng(2).standard_normal((6, 6)))
    a, b = np.array([3.0, 1, 0, 0, 0, 0]), np.array([1.0, 4, 2, 0, 0, 0])
    with pytest.warns(UserWarning, match="first has rank 2, the second has rank 3"):
        got = ev.frechet_distance(np.zeros(6), q * a @ q.T, np.zeros(6), q * b @ q.T)
    # Square roots of what rounding leaves at the zero eigenvalues set the accuracy here.
    assert got == pytest.approx(((np.sqrt(a) - np.sqrt(b)) ** 2).sum(), abs=1e-6)


def test_frechet_of_points_is_the_distance_of_the_points():
    with pytest.warns(UserWarning, match="rank 0"):
        assert ev.frechet_distance([1.0, 2.0], np.zeros((2, 2)), [4.0, 6.0], np.zeros((2, 2))) == pytest.approx(25)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0.0], [[1.0]], [0.0, 0.0], np.eye(2)), "1 and 2 dimensions"),
        (([0.0, 0.0], np.eye(3), [0.0, 0.0], np.eye(2)), r"a mean \[D\] and a covariance \[D, D\]"),
        (([0.0, np.nan], np.eye(2), [0.0, 0.0], np.eye(2)), "NaN or infinite"),
        (([0.0, 0.0], -np.eye(2), [0.0, 0.0], np.eye(2)), "negative eigenvalue"),
        (([0.0, 0.0], [[1.0, 0.5], [0.0, 1.0]], [0.0, 0.0], np.eye(2)), "not symmetric"),
        (([], np.zeros((0, 0)), [], np.zeros((0, 0))), "no dimensions"),
    ],
)
def test_frechet_refuses(arguments, message):
    with pytest.raises(DiffFitError, match=message):
        ev.frechet_distance(*arguments)


# --- streaming statistics ---


@pytest.mark.parametrize("sizes", [[1] * 17 + [5, 0, 978], [1000], [999, 1]])
def test_streaming_statistics_equal_those_of_the_whole(sizes):
    x = torch.randn(1000, 13, generator=torch.Generator().manual_seed(0)) * 3 + 1e4
    running = ev.RunningStatistics()
    for block in x.split(sizes):
        running.update(block)
    whole = x.double().numpy()
    assert running.count == 1000
    np.testing.assert_allclose(running.mean, whole.mean(0), rtol=1e-13)
    np.testing.assert_allclose(running.covariance, np.cov(whole, rowvar=False), rtol=1e-8, atol=1e-9)


def test_merged_statistics_equal_those_of_the_whole():
    x = torch.randn(301, 7, generator=torch.Generator().manual_seed(1)).double()
    parts = [ev.RunningStatistics() for _ in range(3)]
    for part, block in zip(parts, x.split([100, 200, 1]), strict=True):
        part.update(block)
    total = ev.RunningStatistics()
    for part in parts:
        total.merge(part)
    np.testing.assert_allclose(total.covariance, np.cov(x.numpy(), rowvar=False), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(parts[1].mean, x[100:300].mean(0), rtol=1e-12)  # left as it was


def test_fifty_thousand_features_take_constant_memory():
    dim, running, generator = 64, ev.RunningStatistics(), torch.Generator().manual_seed(0)
    kept = lambda: {name: tuple(v.shape) for name, v in vars(running).items() if isinstance(v, torch.Tensor)}  # noqa: E731
    tracemalloc.start()
    for step in range(500):
        running.update(torch.randn(100, dim, generator=generator))
        if step == 0:
            shapes, (first, _) = kept(), tracemalloc.get_traced_memory()
    last, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert running.count == 50_000
    assert kept() == shapes == {"_mean": (dim,), "_scatter": (dim, dim)}
    assert last - first < 100_000  # Python's own; a list of tensors would show here
    assert float((running.covariance - torch.eye(dim)).abs().max()) < 0.05


def test_statistics_refuse():
    running = ev.RunningStatistics()
    with pytest.raises(DiffFitError, match="at least 2 images; got 0"):
        _ = running.covariance
    with pytest.raises(DiffFitError, match=r"shape \[n, D\]"):
        running.update(torch.zeros(3))
    running.update(torch.zeros(1, 4))
    with pytest.raises(DiffFitError, match="5 dimensions; the ones before had 4"):
        running.update(torch.zeros(1, 5))
    bad = torch.zeros(3, 4)
    bad[1, 2] = float("nan")
    with pytest.raises(DiffFitError, match="1 of 3 images are NaN"):
        running.update(bad)
    assert running.count == 1


# --- Inception Score, precision and recall ---


def test_inception_score_of_certain_and_of_clueless_predictions():
    certain = torch.eye(10).repeat(30, 1) * 200
    score = ev.InceptionScore()
    score.update(certain)
    assert score.result() == (pytest.approx(10.0), 0.0)  # every class equally often, each without doubt
    score = ev.InceptionScore()
    score.update(torch.zeros(50, 10))
    assert score.result()[0] == pytest.approx(1.0)


def test_inception_score_in_splits_is_the_mean_of_the_splits():
    logits = torch.randn(250, 12, generator=torch.Generator().manual_seed(0)) * 2
    score = ev.InceptionScore(split_size=100)
    for block in logits.split(33):
        score.update(block)
    expected = []
    for part in logits.double().numpy()[:100], logits.double().numpy()[100:200], logits.double().numpy()[200:]:
        p = np.exp(part) / np.exp(part).sum(1, keepdims=True)
        expected.append(np.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean()))
    mean, std = score.result()
    assert mean == pytest.approx(np.mean(expected), rel=1e-10)
    assert std == pytest.approx(np.std(expected), rel=1e-8)
    with pytest.raises(DiffFitError, match="at least one image"):
        ev.InceptionScore().result()


def test_precision_and_recall_of_constructed_sets():
    grid = torch.cartesian_prod(torch.arange(10.0), torch.arange(10.0))
    assert ev.precision_recall(grid, grid) == (1.0, 1.0)
    assert ev.precision_recall(grid + 100, grid) == (0.0, 0.0)
    # Samples crowd in one corner: all are plausible, most of the reference is not reached.
    corner = torch.cartesian_prod(torch.arange(0, 1, 0.25), torch.arange(0, 1, 0.25))
    precision, recall = ev.precision_recall(corner, grid)
    assert precision == 1.0
    assert 0 < recall <= 0.05
    # One in three samples far away from everything.
    far = torch.cat([grid, torch.arange(50.0)[:, None] * torch.ones(2) * 1000 + 5000])
    precision, recall = ev.precision_recall(far, grid)
    assert precision == pytest.approx(100 / 150)
    assert recall == 1.0


def test_a_point_at_exactly_the_radius_counts_and_itself_is_no_neighbour():
    reference = torch.tensor([[0.0], [1.0], [2.0], [3.0]])  # third neighbours at 3, 2, 2, 3
    samples = torch.tensor([[6.0], [6.1], [-3.0], [100.0]])
    assert ev.precision_recall(samples, reference)[0] == 0.5
    assert ev.precision_recall(samples, reference, k=1)[0] == 0.0


@pytest.mark.parametrize("block", [7, 2048])
def test_precision_and_recall_against_all_pairs(block):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(60, 5, generator=generator) + 50
    b = torch.randn(45, 5, generator=generator) * 0.8 + 50.5

    def share(points, centres):
        radii = torch.cdist(centres.double(), centres.double(), compute_mode="donot_use_mm_for_euclid_dist").sort(1)[0][
            :, 3
        ]
        d = torch.cdist(points.double(), centres.double(), compute_mode="donot_use_mm_for_euclid_dist")
        return float((d <= radii).any(1).double().mean())

    assert ev.precision_recall(a, b, block=block) == pytest.approx((share(a, b), share(b, a)))


def test_precision_and_recall_refuse():
    with pytest.raises(DiffFitError, match="at least 4 images; the samples are 3"):
        ev.precision_recall(torch.zeros(3, 2), torch.zeros(9, 2))
    with pytest.raises(DiffFitError, match="2 and 3 dimensions"):
        ev.precision_recall(torch.zeros(9, 2), torch.zeros(9, 3))
    with pytest.raises(DiffFitError, match="NaN"):
        ev.precision_recall(torch.full((9, 2), float("nan")), torch.zeros(9, 2))


# --- the network ---


@pytest.mark.parametrize(("source", "target"), [((7, 5), (13, 11)), ((32, 32), (299, 299)), ((40, 31), (12, 9))])
def test_tf1_resize_is_the_formula(source, target):
    x = torch.randint(0, 256, (1, 2, *source), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    image = x[0].double().numpy()
    expected = np.empty((2, *target))
    for i in range(target[0]):
        for j in range(target[1]):
            y, z = i * source[0] / target[0], j * source[1] / target[1]
            r, c = int(y), int(z)
            r1, c1 = min(r + 1, source[0] - 1), min(c + 1, source[1] - 1)
            top = image[:, r, c] * (1 - z + c) + image[:, r, c1] * (z - c)
            bottom = image[:, r1, c] * (1 - z + c) + image[:, r1, c1] * (z - c)
            expected[:, i, j] = top * (1 - y + r) + bottom * (y - r)
    np.testing.assert_allclose(ev.tf1_resize(x, target)[0], expected, atol=1e-2)  # float32 coordinates
    assert np.abs(ev.tf1_resize(x, target)[0].numpy() - expected).mean() < 1e-4


def test_tf1_resize_has_no_half_pixel_shift():
    x = torch.tensor([[[[0.0, 10.0]]]])
    assert ev.tf1_resize(x, (1, 4)).flatten().tolist() == [0, 5, 10, 10]
    assert ev.tf1_resize(x, (1, 2)).flatten().tolist() == [0, 10]
    with pytest.raises(DiffFitError, match=r"\[N, C, H, W\]"):
        ev.tf1_resize(torch.zeros(3, 4), 8)


def test_inception_has_the_published_keys_and_shapes():
    with torch.device("meta"):
        state = inception.InceptionV3().state_dict()
    parameters = {k: tuple(v.shape) for k, v in state.items() if "running" not in k and "num_batches" not in k}
    # The published InceptionV3 has 27,161,264 parameters: take off its auxiliary head, and give it 1008 classes.
    auxiliary = (768 * 128 + 2 * 128) + (128 * 768 * 25 + 2 * 768) + (768 * 1000 + 1000)
    assert sum(np.prod(shape) for shape in parameters.values()) == 27_161_264 - auxiliary + 8 * 2049
    assert sum(k.endswith(".conv.weight") for k in parameters) == 94
    expected = {
        "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3),
        "Conv2d_4a_3x3.bn.running_var": (192,),
        "Mixed_5b.branch1x1.conv.weight": (64, 192, 1, 1),
        "Mixed_5c.branch5x5_2.conv.weight": (64, 48, 5, 5),
        "Mixed_5d.branch_pool.bn.bias": (64,),
        "Mixed_6a.branch3x3dbl_3.conv.weight": (96, 96, 3, 3),
        "Mixed_6b.branch7x7_2.conv.weight": (128, 128, 1, 7),
        "Mixed_6d.branch7x7dbl_2.conv.weight": (160, 160, 7, 1),
        "Mixed_6e.branch7x7dbl_5.conv.weight": (192, 192, 1, 7),
        "Mixed_7a.branch7x7x3_4.conv.weight": (192, 192, 3, 3),
        "Mixed_7b.branch3x3_2b.conv.weight": (384, 384, 3, 1),
        "Mixed_7c.branch3x3dbl_3a.conv.weight": (384, 384, 1, 3),
        "fc.weight": (1008, 2048),
        "fc.bias": (1008,),
    }
    assert {k: tuple(state[k].shape) for k in expected} == expected


def test_inception_outputs(weights):
    network, _ = ev.load_inception(weights, check=False)
    x = torch.randn(1, 3, 299, 299, generator=torch.Generator().manual_seed(0))
    seen = {}
    network.Mixed_6d.branch1x1.register_forward_hook(lambda m, i, o: seen.update(six=o))
    network.Mixed_7c.register_forward_hook(lambda m, i, o: seen.update(last=o))
    with torch.no_grad():
        pool, spatial, logits = network(x)
    assert (pool.shape, spatial.shape, logits.shape) == ((1, 2048), (1, 2023), (1, 1008))
    assert seen["six"].shape == (1, 192, 17, 17)
    assert seen["last"].shape == (1, 2048, 8, 8)
    # Rows, columns, channels: as the graph's NHWC tensor flattens.
    assert torch.equal(spatial[0, :7], seen["six"][0, :7, 0, 0])
    assert torch.equal(spatial[0, 7:14], seen["six"][0, :7, 0, 1])
    torch.testing.assert_close(pool, seen["last"].mean((2, 3)))
    torch.testing.assert_close(logits, pool @ network.fc.weight.T)
    with pytest.raises(DiffFitError, match=r"\[N, 3, 299, 299\]"):
        network(torch.zeros(1, 3, 64, 64))


def test_pooling_is_that_of_the_graph():
    x = torch.ones(1, 1, 4, 4)
    assert torch.equal(inception._average(x), x)  # the padding does not count
    with torch.device("meta"):
        network = inception.InceptionV3()
    assert (network.Mixed_7b.pool, network.Mixed_7c.pool) == ("avg", "max")


def test_random_inception_depends_on_its_seed_alone():
    before = torch.get_rng_state()
    a, b, c = ev.random_inception(1), ev.random_inception(1), ev.random_inception(2)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(a.Mixed_7c.branch1x1.conv.weight, b.Mixed_7c.branch1x1.conv.weight)
    assert not torch.equal(a.fc.weight, c.fc.weight)


def test_weights_are_asked_for_and_checked(weights, tmp_path, monkeypatch):
    monkeypatch.delenv(inception.WEIGHTS_ENV, raising=False)
    with pytest.raises(DiffFitError, match="pt_inception-2015-12-05-6726825d.pth"):
        ev.load_inception()
    with pytest.raises(DiffFitError, match="do not exist"):
        ev.load_inception(tmp_path / "none.pth")
    with pytest.raises(DiffFitError, match="SHA-256 begins with"):
        ev.load_inception(weights)
    monkeypatch.setenv(inception.WEIGHTS_ENV, str(weights))
    network, digest = ev.load_inception(check=False)
    assert len(digest) == 64
    assert torch.equal(network.fc.weight, ev.random_inception(5).fc.weight)
    torch.save({"fc.weight": torch.zeros(1000, 2048)}, tmp_path / "other.pth")
    with pytest.raises(DiffFitError, match="does not fit InceptionV3"):
        ev.load_inception(tmp_path / "other.pth", check=False)
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(DiffFitError, match="cannot be read as PyTorch weights"):
        ev.load_inception(tmp_path / "text.pth", check=False)


def test_dinov2_from_a_local_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, mlp_ratio=2, image_size=28, patch_size=14
    )
    transformers.Dinov2Model(config).save_pretrained(tmp_path / "dino")
    extractor = ev.get_extractor("dinov2", dinov2_path=tmp_path / "dino")
    images = [torch.randint(0, 256, (3, side, side), dtype=torch.uint8) for side in (40, 300)]
    assert extractor(images, torch.device("cpu"))["pool"].shape == (2, 16)
    with pytest.raises(DiffFitError, match="nothing is downloaded"):
        ev.get_extractor("dinov2")
    with pytest.raises(DiffFitError, match="no DINOv2 could be loaded"):
        ev.get_extractor("dinov2", dinov2_path=tmp_path)


# --- images and files ---


def write_npz(path, folder):
    source = open_images(folder)
    pixels = np.stack([image.permute(1, 2, 0).numpy() for batch in source.batches(8) for image in batch])
    np.savez(path, arr_0=pixels)
    return pixels


def test_folder_npz_tensor_and_array_give_the_same_images(image_folders, tmp_path):
    samples, reference = image_folders
    pixels = write_npz(tmp_path / "samples.npz", samples)
    as_float = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().sub(127.75).div(127.5)
    results = [
        ev.compare(images, reference, TinyFeatures(), metrics="all", batch_size=size)
        for images, size in ((samples, 7), (tmp_path / "samples.npz", 5), (pixels, 24), (as_float, 1))
    ]
    for result in results[1:]:
        assert result["fd"] == pytest.approx(results[0]["fd"], rel=1e-6)
        assert (result["precision"], result["recall"]) == (results[0]["precision"], results[0]["recall"])
    assert results[0]["num_samples"] == 24
    assert results[0]["num_reference"] == 30


def test_a_compressed_npz_is_read_in_batches(image_folders, tmp_path):
    pixels = write_npz(tmp_path / "plain.npz", image_folders[0])
    np.savez_compressed(tmp_path / "packed.npz", arr_0=pixels)
    back = [image for batch in open_images(tmp_path / "packed.npz", num_images=20).batches(9) for image in batch]
    np.testing.assert_array_equal(torch.stack(back).permute(0, 2, 3, 1), pixels[:20])


@pytest.mark.filterwarnings("ignore:.*covariance is singular")
def test_images_of_several_sizes_are_resized_each_and_keep_their_order(tmp_path):
    rng = np.random.default_rng(0)
    for i, side in enumerate((40, 20, 40, 30, 20)):
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    extractor = ev.get_extractor(TinyFeatures())
    (batch,) = open_images(tmp_path).batches(8)
    together = extractor(batch, torch.device("cpu"))["pool"]
    alone = torch.cat([extractor([image], torch.device("cpu"))["pool"] for image in batch])
    torch.testing.assert_close(together, alone)
    inception_like = ev.get_extractor("random-inception")
    assert {tuple(inception_like.prepare(image[None]).shape) for image in batch} == {(1, 3, 299, 299)}
    with pytest.warns(UserWarning, match="of several sizes"):
        ev.compare(tmp_path, tmp_path, TinyFeatures())


def test_images_that_cannot_be_used_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DiffFitError, match="holds no images"):
        open_images(tmp_path / "empty")
    with pytest.raises(DiffFitError, match="does not exist"):
        open_images(tmp_path / "nowhere")
    (tmp_path / "empty" / "broken.png").write_bytes(b"no picture")
    source = open_images(tmp_path / "empty")
    assert list(source.batches(4)) == []
    assert len(source.notes) == 1 and "left out 1 unreadable images (the first: broken.png: cannot" in source.notes[0]
    (tmp_path / "text.txt").write_text("x")
    with pytest.raises(DiffFitError, match="neither a folder"):
        open_images(tmp_path / "text.txt")
    np.savez(tmp_path / "key.npz", images=np.zeros((2, 4, 4, 3), np.uint8))
    with pytest.raises(DiffFitError, match="holds images; images are expected under the key arr_0"):
        open_images(tmp_path / "key.npz")
    np.savez(tmp_path / "dtype.npz", arr_0=np.zeros((2, 4, 4, 3), np.float32))
    with pytest.raises(DiffFitError, match=r"must be uint8 \[N, H, W, 3\]; it is float32"):
        open_images(tmp_path / "dtype.npz")
    (tmp_path / "fake.npz").write_bytes(b"PK nothing")
    with pytest.raises(DiffFitError, match=r"not a \.npz file"):
        open_images(tmp_path / "fake.npz")
    for images, message in (
        (torch.zeros(2, 5, 4, 4), "C 1 or 3"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.int64), "must be uint8, or floating point"),
        (torch.zeros(0, 3, 4, 4), "there are no images"),
        (np.zeros((2, 4, 4, 3)), "must be uint8"),
        (7, "got int"),
    ):
        with pytest.raises(DiffFitError, match=message):
            open_images(images)
    with pytest.raises(DiffFitError, match="holds 2 images; 3 were asked for"):
        open_images(torch.zeros(2, 3, 4, 4), num_images=3)
    with pytest.raises(DiffFitError, match="NaN"):
        list(open_images(torch.full((2, 3, 4, 4), float("nan"))).batches(2))


@pytest.mark.filterwarnings("ignore:.*left out", "ignore:the reference is of")
def test_one_bad_image_never_ends_an_evaluation(image_folders, tmp_path):
    samples, reference = (shutil.copytree(folder, tmp_path / folder.name) for folder in image_folders)
    whole = ev.compare(samples, reference, TinyFeatures())
    assert whole["notes"] == []
    (samples / "0" / "aaa.png").write_bytes(b"no picture")
    (samples / "notes.txt").touch()
    (reference / "1" / "zzz.png").write_bytes(b"no picture")
    result = ev.compare(samples, reference, TinyFeatures(), batch_size=7)
    assert (result["fd"], result["num_samples"], result["num_reference"]) == (
        pytest.approx(whole["fd"], rel=1e-6),
        whole["num_samples"],
        whole["num_reference"],
    )
    assert any("left out 1 unreadable images (the first: 0/aaa.png: " in note for note in result["notes"])
    assert any("left out: 1 files without an image's name ending (the first: notes.txt)" in n for n in result["notes"])
    assert any("the reference is of 30 of its 31 images" in note for note in result["notes"])


def test_an_npz_that_claims_more_than_it_holds_is_refused(tmp_path):
    header = b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little")
    text = b"{'descr': '|u1', 'fortran_order': False, 'shape': (9, 4, 4, 3), }"
    with zipfile.ZipFile(tmp_path / "short.npz", "w") as archive:
        archive.writestr("arr_0.npy", header + text.ljust(117) + b"\n" + bytes(4 * 48))
    with pytest.raises(DiffFitError, match=r"claims uint8 \[9, 4, 4, 3\], 432 bytes; there are 192"):
        open_images(tmp_path / "short.npz")


def test_features_that_do_not_fit_are_refused(image_folders):
    samples, reference = image_folders
    for features, message in (
        (lambda x: torch.zeros(len(x), 2, 2), r"must be a tensor \[.*, D\]"),
        (lambda x: [1, 2], "got list"),
        (lambda x: torch.full((len(x), 3), float("nan")), "NaN or infinite"),
        ("resnet", "unknown features 'resnet'"),
        (3, "a name or a callable"),
    ):
        with pytest.raises(DiffFitError, match=message):
            ev.compare(samples, reference, features)
    with pytest.raises(DiffFitError, match="unknown metric 'kid'"):
        ev.compare(samples, reference, TinyFeatures(), metrics="kid")
    with pytest.raises(DiffFitError, match="'fid' is defined in the features 'inception' only; ask for 'fd'"):
        ev.compare(samples, reference, TinyFeatures(), metrics=["fid"])
    with pytest.raises(DiffFitError, match="holds 1 image; at least 2"):
        ev.compare(torch.zeros(1, 3, 8, 8), reference, TinyFeatures())
    with pytest.raises(DiffFitError, match="precision and recall need at least 4"):
        ev.compare(torch.zeros(3, 3, 8, 8), reference, TinyFeatures(), metrics="pr")


# --- comparing ---


def test_compare_equals_torchmetrics_on_the_same_features(image_folders):
    fid = pytest.importorskip("torchmetrics.image.fid")
    metric = fid.FrechetInceptionDistance(feature=TinyFeatures())
    for real, folder in enumerate(image_folders):
        for batch in open_images(folder).batches(9):
            metric.update(torch.stack(batch), real=bool(real))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # 24 and 30 images for 11 features: nothing to warn of
        mine = ev.compare(*image_folders, TinyFeatures())
    assert mine["fd"] == pytest.approx(float(metric.compute()), rel=1e-4)
    assert mine["fd"] > 0.01


def test_few_images_are_noted(image_folders):
    with pytest.warns(UserWarning, match="8 samples for 11 features: their covariance is singular"):
        result = ev.compare(*image_folders, TinyFeatures(), num_samples=8)
    assert result["num_samples"] == 8
    assert np.isfinite(result["fd"])


def test_sizes_that_differ_are_noted(image_folders):
    with pytest.warns(UserWarning, match="samples are 32x32, the reference 64x64"):
        ev.compare(torch.rand(20, 3, 32, 32), image_folders[1], TinyFeatures())
    cropped = ev.Evaluator(image_folders[1], TinyFeatures(), image_size=32)
    assert cropped.reference.size == (32, 32)


def test_an_evaluator_serves_again_and_again(image_folders):
    calls = []

    def features(images):
        calls.append(len(images))
        return TinyFeatures()(images)

    evaluator = ev.Evaluator(image_folders[1], features)
    first = ev.compare(image_folders[0], evaluator)
    assert ev.compare(image_folders[0], evaluator) == first
    assert sum(calls) == 30 + 2 * 24
    with pytest.raises(DiffFitError, match="give no others"):
        ev.compare(image_folders[0], evaluator, metrics="pr")


def test_the_cache_is_used_only_while_it_fits(image_folders, tmp_path):
    samples, reference = image_folders
    cache = tmp_path / "reference.npz"
    fresh = ev.compare(samples, reference, TinyFeatures(), cache=cache, metrics="all")
    written = cache.stat().st_mtime_ns
    assert ev.compare(samples, reference, TinyFeatures(), cache=cache, metrics="all") == fresh
    assert ev.compare(samples, cache, TinyFeatures(), metrics="all") == fresh  # the file itself as reference
    assert cache.stat().st_mtime_ns == written
    assert [p.name for p in tmp_path.iterdir()] == ["reference.npz"]
    other = TinyFeatures()
    other.weight.data.neg_()
    with pytest.raises(DiffFitError, match="holds statistics in the features"):
        ev.compare(samples, cache, other)
    ev.compare(samples, samples, TinyFeatures(), cache=cache)  # other images: taken afresh
    assert ev.load_statistics(cache).count == 24
    with pytest.raises(DiffFitError, match="needs images or features of the reference"):
        ev.compare(samples, cache, TinyFeatures(), metrics="pr")
    np.savez(tmp_path / "theirs.npz", mu=np.zeros(11), sigma=np.eye(11))
    with pytest.raises(DiffFitError, match="not written by this program"):
        ev.compare(samples, reference, TinyFeatures(), cache=tmp_path / "theirs.npz")
    with pytest.raises(DiffFitError, match="images in memory cannot be cached"):
        ev.compare(samples, torch.rand(9, 3, 8, 8), TinyFeatures(), cache=cache)
    with pytest.raises(DiffFitError, match="cannot be cached"):
        ev.compare(samples, reference, lambda x: TinyFeatures()(x), cache=cache)


@pytest.mark.parametrize("packed", [False, True])
def test_the_cache_notices_images_that_changed_behind_name_size_and_time(image_folders, tmp_path, packed):
    samples, _ = image_folders
    images = np.random.default_rng(3).integers(0, 256, (8, 12, 12, 3), dtype=np.uint8)
    if packed:
        reference = changing = tmp_path / "reference.npz"
        write, content = (lambda x: np.savez(changing, arr_0=x)), (images, images // 2)
    else:
        reference, changing = (
            tmp_path / os.fsdecode(b"ref\xff"),
            tmp_path / os.fsdecode(b"ref\xff") / os.fsdecode(b"\xfe.bmp"),
        )
        reference.mkdir()
        for i in range(3):
            Image.fromarray(images[i]).save(reference / f"{i}.bmp")
        write, content = (lambda x: Image.fromarray(x).save(changing)), (images[4], images[5] // 2)
    write(content[0])
    status = changing.stat()
    old = ev.compare(samples, reference, TinyFeatures(), cache=tmp_path / "cache.npz")
    write(content[1])
    os.utime(changing, ns=(status.st_atime_ns, status.st_mtime_ns))  # as cp -p leaves it
    assert changing.stat().st_size == status.st_size
    new = ev.compare(samples, reference, TinyFeatures(), cache=tmp_path / "cache.npz")
    assert new["fd"] != old["fd"] and new == ev.compare(samples, reference, TinyFeatures())


def test_statistics_files_that_are_wrong_are_refused(tmp_path):
    np.savez(tmp_path / "keys.npz", mean=np.zeros(3))
    with pytest.raises(DiffFitError, match="holds mean; statistics are expected under the keys mu and sigma"):
        ev.load_statistics(tmp_path / "keys.npz")
    np.savez(tmp_path / "shape.npz", mu=np.zeros(3), sigma=np.eye(4))
    with pytest.raises(DiffFitError, match=r"a mean \[D\] and a covariance"):
        ev.load_statistics(tmp_path / "shape.npz")
    (tmp_path / "broken.npz").write_bytes(b"PK")
    with pytest.raises(DiffFitError, match="is not a .npz file, or damaged"):
        ev.load_statistics(tmp_path / "broken.npz")


def first_five(x):
    return x.float().flatten(1)[:, :5] / 255


def some_images(count, seed=0):
    return np.random.default_rng(seed).integers(0, 255, (count, 8, 8, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (lambda x: first_five(x)[:, :0], "must be real and at least one"),
        (lambda x: first_five(x) * 1j, "must be real and at least one; got torch.complex64"),
        (lambda x: first_five(x).double() * 1e200, "too large|not finite"),
        (lambda x: first_five(x).double() * 1e120, "not finite; means and covariances are as large as"),
        (lambda x: first_five(x) * float("nan"), "6 of 6 images are NaN or infinite"),
    ],
)
def test_features_that_measure_nothing_are_refused(features, message):
    """Of none, or of imaginary ones, every distance would be a perfect zero."""
    with pytest.raises(DiffFitError, match=message):
        ev.compare(some_images(6), some_images(6, 1), features=features)
    assert ev.compare(some_images(6), some_images(6, 1), features=first_five)["fd"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": -1}, "num_images must be at least 1; got -1"),
        ({"num_samples": 0}, "num_images must be at least 1; got 0"),
        ({"num_samples": 1}, "holds 1 image; at least 2"),
        ({"num_samples": 2.5}, "num_images must be a whole number"),
        ({"batch_size": 10**12}, "batch_size must be at least 1 and less than"),
        ({"batch_size": float("nan")}, "batch_size must be a whole number; got nan"),
        ({"image_size": 0}, "image_size must be at least 1"),
        ({"image_size": 10**9}, "image_size must be at least 1 and less than"),
    ],
)
def test_numbers_that_nobody_means_are_refused(options, message):
    with pytest.raises(DiffFitError, match=message):
        ev.compare(some_images(6), some_images(6, 1), features=first_five, **options)


def test_a_matrix_that_is_no_covariance_gives_no_distance(tmp_path):
    np.savez(tmp_path / "s.npz", mu=np.zeros(5), sigma=-np.eye(5))
    with pytest.raises(DiffFitError, match="negative eigenvalue"):
        ev.load_statistics(tmp_path / "s.npz")
    with pytest.raises(DiffFitError, match="must be real"):
        ev.frechet_distance(np.zeros(2), np.eye(2) * 1j, np.zeros(2), np.eye(2))
    with pytest.raises(DiffFitError, match="not finite"):
        ev.frechet_distance(np.zeros(2), np.eye(2) * 1e308, np.zeros(2), np.eye(2) * 1e308)


@pytest.mark.filterwarnings("ignore")
def test_what_looks_wrong_in_the_sets_is_noted(image_folders):
    def notes(samples, reference=image_folders[1]):
        return " ".join(ev.compare(samples, reference, features=lambda x: first_five(x)[:, :2])["notes"])

    same, other_range = "are the same images", "expected are -1 .black. to 1"
    assert same in notes(image_folders[0], image_folders[0]) and same not in notes(image_folders[0])
    values = torch.rand(6, 3, 8, 8)
    assert re.search(other_range, notes(values)) and re.search(other_range, notes(values * 255))
    assert not re.search(other_range, notes(values * 2.4 - 1.2))  # samples leave the range by a little


# --- the command ---


def test_numbers_are_in_the_file_before_they_are_printed(tmp_path, monkeypatch):
    from difffit_fast.cli import eval as command

    for i in range(2):
        np.savez(tmp_path / f"{i}.npz", arr_0=some_images(6, i))
    code = "def f(x): return x.float().flatten(1)[:, :5]\n\ndef bad(x): return f(x) * float('nan')\n"
    (tmp_path / "own_features.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    given = ["eval", str(tmp_path / "0.npz"), str(tmp_path / "1.npz"), "--quiet", "--json", str(tmp_path / "n.json")]
    printed = []
    table = command.format_table
    monkeypatch.setattr(command, "format_table", lambda r: printed.append((tmp_path / "n.json").exists()) or table(r))
    assert main([*given, "--features", "own_features:f"]) == 0 and printed == [True]
    assert json.loads((tmp_path / "n.json").read_text(), parse_constant=pytest.fail)["results"][0]["fd"] > 0
    (tmp_path / "n.json").unlink()
    assert main([*given, "--features", "own_features:f,own_features:bad"]) == 2
    assert printed == [True, False]  # what was measured is still said; the file is written whole or not


@pytest.mark.parametrize(
    "words",
    [["--batch-size", "0"], ["--batch-size", str(10**30)], ["--image-size", "-1"], ["--seed", "-1"], ["--num-samples", "1"],
     ["--seed", str(1 << 64)], ["--device", "mps"]],
)  # fmt: skip
def test_eval_refuses_numbers_in_one_sentence(words, tmp_path, capsys):
    np.savez(tmp_path / "i.npz", arr_0=some_images(6))
    assert (
        main(["eval", str(tmp_path / "i.npz"), str(tmp_path / "i.npz"), "--features", "random-inception", *words]) == 2
    )
    said = capsys.readouterr().err
    assert said.startswith(f"difffit eval: {words[0]} must be") and said.count("\n") == 1


def few(folder, target, count):
    target.mkdir()
    for i, file in enumerate(sorted(folder.rglob("*.png"))[:count]):
        (target / f"{i}.png").write_bytes(file.read_bytes())
    return target


def test_eval_command_with_inception(image_folders, weights, tmp_path, capsys):
    """Every metric, from a folder against an ADM file, checked against the pieces put together by hand."""
    samples = few(image_folders[0], tmp_path / "samples", 4)
    with torch.no_grad():
        extractor = ev.get_extractor("inception", inception_weights=weights, check_weights=False)
        found = collect(open_images(samples), extractor, ["fid", "sfid", "is", "pr"])
    rng = np.random.default_rng(0)
    shift = rng.uniform(0.5, 1, 2048) * 0.1
    arrays = {
        "mu": found.mean + torch.from_numpy(shift),
        "sigma": found.covariance,
        "mu_s": found.spatial_mean,
        "sigma_s": found.spatial_covariance,
    }
    np.savez(tmp_path / "adm.npz", **{k: torch.as_tensor(v).numpy() for k, v in arrays.items()})
    command = ["eval", str(samples), str(tmp_path / "adm.npz"), "--json", str(tmp_path / "out.json"), "--device", "cpu"]
    assert main([*command, "--inception-weights", str(weights)]) == 2
    assert "SHA-256" in capsys.readouterr().err
    assert main([*command, "--inception-weights", str(weights), "--any-inception-weights", "--batch-size", "4"]) == 0
    shown = capsys.readouterr()
    (result,) = json.loads((tmp_path / "out.json").read_text())["results"]
    assert result["fid"] == pytest.approx((shift**2).sum(), rel=1e-5)  # equal covariances: the shift alone
    assert result["sfid"] == pytest.approx(0, abs=1e-5)
    assert result["is"] == pytest.approx(found.inception_score[0], rel=1e-6)
    assert "precision" not in result  # the file has no images
    assert "NOT the published ones" in shown.out
    assert "4 samples for 2048 features" in shown.err


def test_eval_command_with_random_inception(image_folders, tmp_path, capsys):
    samples, reference = few(image_folders[0], tmp_path / "a", 2), few(image_folders[1], tmp_path / "b", 2)
    flags = [
        "--features",
        "random-inception",
        "--metrics",
        "fd",
        "--device",
        "cpu",
        "--json",
        str(tmp_path / "o.json"),
    ]
    assert main(["eval", str(samples), str(reference), *flags]) == 0
    shown = capsys.readouterr().out
    assert "NOT FID" in shown
    assert "2 samples against 2" in shown
    assert json.loads((tmp_path / "o.json").read_text())["results"][0]["fd"] > 0


# --- several sets ---


MEANS = """
def f(x):
    return x.float().mean((2, 3))

f.identity = "means"

def bad(x):
    return f(x) * float("nan")
"""


LEFT_OUT = "note: near: left out: 1 files without an image's name ending (the first: sampling.json)\n"


@pytest.fixture
def sets(tmp_path, monkeypatch):
    """Three sets and a reference in a folder, which is the working one; a module of features beside them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("means.py").write_text(MEANS)
    for name, seed in (("far", 1), ("near", 2), ("r", 0), ("runs/x/near", 3)):
        images = some_images(8, seed) // (8 if name == "far" else 1)
        Path(name).mkdir(parents=True)
        for i, image in enumerate(images):
            Image.fromarray(image).save(Path(name) / f"{i}.png")
    np.savez("n.1.npz", arr_0=some_images(8, 4))
    Path("n.1").mkdir()
    Path("n.1/sampling.json").write_text('{"seed": 0, "step": 24000}')
    Path("near/sampling.json").write_text('{"seed": 0, "step": 1000, "delta": "a"}')
    return tmp_path


def several(*words):
    return main(["eval", *words, "--features", "means:f", "--device", "cpu"])


def test_eval_of_several_sets_is_that_of_each_and_says_which_is_best(sets, capsys):
    assert several("far", "near", "n.1.npz", "r", "--json", "all.json") == 0
    shown = capsys.readouterr()
    reports = json.loads(Path("all.json").read_text())
    for name, report in zip(("far", "near", "n.1.npz"), reports, strict=True):
        assert several(name, "r", "--json", "one.json") == 0
        assert json.loads(Path("one.json").read_text()) == report
    values = {report["samples"]: report["results"][0]["fd"] for report in reports}
    head, titles, *rows, best = shown.out.splitlines()
    assert shown.err == LEFT_OUT
    assert head == "3 sets of samples against 8; features 'f'"
    assert titles.split() == ["set", "step", "samples", "Fréchet", "distance", "Precision", "Recall"]
    assert [row.split()[:4] for row in rows] == [
        ["far", "-", "8", f"{values['far']:.4f}"],
        ["near", "1000", "8", f"{values['near']:.4f}"],
        ["n.1", "24000", "8", f"{values['n.1.npz']:.4f}"],
    ]
    assert len({len(row) for row in (titles, *rows)}) == 1
    name = min(values, key=values.get)
    told = {"near": "near (step 1000)", "n.1.npz": "n.1 (step 24000)"}[name]
    assert best == f"best by Fréchet distance: {told}, {values[name]:.4f}"


def test_eval_of_several_sets_reads_the_reference_once(sets, monkeypatch):
    module, scores = sys.modules[ev.Evaluator.__module__], sys.modules[ev.precision_recall.__module__]
    passes, balls = [], []
    collect, radii = module.collect, scores._radii
    monkeypatch.setattr(
        module, "collect", lambda source, *a, **k: passes.append(source.name) or collect(source, *a, **k)
    )
    monkeypatch.setattr(scores, "_radii", lambda x, *rest: balls.append(len(x)) or radii(x, *rest))
    assert several("far", "near", "n.1.npz", "r") == 0
    assert passes == ["r", "far", "near", "n.1.npz"] and len(balls) == 4
    passes.clear()
    assert several("far", "near", "r", "--cache", "r.npz") == 0 and several("far", "near", "r", "--cache", "r.npz") == 0
    assert passes == ["r", "far", "near", "far", "near"]


def test_eval_with_random_inception_of_two_sets(image_folders, tmp_path, capsys):
    a, b, r = (few(image_folders[i], tmp_path / name, n) for i, name, n in ((0, "a", 2), (1, "b", 2), (1, "r", 3)))
    words = ["--features", "random-inception", "--metrics", "fd", "--device", "cpu", "--json", str(tmp_path / "o.json")]
    assert main(["eval", str(a), str(b), str(r), *words]) == 0
    shown = capsys.readouterr()
    far, near = (report["results"][0]["fd"] for report in json.loads((tmp_path / "o.json").read_text()))
    assert near < far and shown.out.splitlines()[-1] == f"best by Fréchet distance: b, {near:.4f}"
    notes = shown.err.splitlines()
    assert len(notes) == len(set(notes)) and not any(note.startswith("note: a: ") for note in notes)


def test_eval_calls_equals_equal_and_names_them_apart(sets, capsys):
    assert several("near", "near/", "r", "--metrics", "fd") == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(r"best by Fréchet distance: near \(step 1000\) and near/ \(step 1000\), [\d.]+ each", line)
    assert several("near", "runs/x/near", "r") == 0
    assert [row.split()[0] for row in capsys.readouterr().out.splitlines()[2:4]] == ["near", "runs/x/near"]


def test_eval_says_what_a_ranking_does_not_tell(sets, capsys):
    few(Path("far"), Path("less"), 5)
    assert several("near", "less", "r") == 0
    shown = capsys.readouterr()
    assert shown.out.endswith(
        "; the sets have 5 to 8 samples, on which the distance depends: --num-samples 5 compares as many of each\n"
    )
    assert several("near", "less", "r", "--num-samples", "5") == 0
    assert "depends" not in capsys.readouterr().out
    assert several("near", "r", "far", "--metrics", "pr") == 0
    assert "best" not in capsys.readouterr().out
    few(Path("near"), Path("tiny"), 2)
    assert several("tiny", "near", "r", "--metrics", "fd") == 0
    assert "note: tiny: 2 samples for 3 features" in capsys.readouterr().err


def test_eval_says_what_is_known_when_a_set_fails(sets, capsys):
    assert several("far", "near", "none", "r", "--json", "n.json") == 2
    shown = capsys.readouterr()
    assert [row.split()[0] for row in shown.out.splitlines()[2:-1]] == ["far", "near"]
    assert shown.out.endswith("\nno set is called best by Fréchet distance: 2 of 3 sets were measured\n")
    assert shown.err == LEFT_OUT + "difffit eval: none does not exist\n" and not Path("n.json").exists()
    assert several("none", "far", "r") == 2
    assert capsys.readouterr().out == ""
    assert main(["eval", "far", "near", "r", "--features", "means:f,means:bad"]) == 2
    assert capsys.readouterr().out.count("best by") == 1
    assert main(["eval", "far", "near", "r", "--features", "means:f,means:f", "--json", "n.json"]) == 0
    assert capsys.readouterr().out.count("best by") == 2
    assert [len(report["results"]) for report in json.loads(Path("n.json").read_text())] == [2, 2]


@pytest.mark.parametrize(
    ("text", "note"),
    [('{"step": "last"}', "step in near/sampling.json should be a whole number of steps; it is 'last'"),
     ('{"step": true}', "step in near/sampling.json should be"), ('{"step": -1}', "step in near/sampling.json should be"),
     ("nonsense", "near/sampling.json cannot be read as JSON"), ('{"step": null}', "")],
)  # fmt: skip
def test_a_step_that_cannot_be_read_is_noted(sets, capsys, text, note):
    Path("near/sampling.json").write_text(text)
    assert several("far", "near", "r") == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines()[1].split()[:2] == ["set", "samples"] and "best by" in shown.out
    assert shown.err.startswith(f"note: {note}") if note else shown.err == LEFT_OUT


def test_eval_needs_samples_and_a_reference(capsys):
    assert main(["eval", "far"]) == 2
    assert "required: REFERENCE" in capsys.readouterr().err


def test_eval_command_with_a_hook(image_folders, tmp_path, capsys, monkeypatch):
    (tmp_path / "myfeatures.py").write_text("def mean(images):\n    return images.float().mean((2, 3))\n")
    monkeypatch.chdir(tmp_path)
    samples, reference = map(str, image_folders)
    assert main(["eval", samples, reference, "--features", "myfeatures:mean", "--json", "out.json"]) == 0
    (result,) = json.loads((tmp_path / "out.json").read_text())["results"]

    def moments(folder):
        x = np.stack([np.asarray(Image.open(f), dtype=float).mean((0, 1)) for f in sorted(folder.rglob("*.png"))])
        return x.mean(0), np.cov(x, rowvar=False)

    assert result["fd"] == pytest.approx(
        ev.frechet_distance(*moments(image_folders[0]), *moments(image_folders[1])), rel=1e-4
    )
    assert main(["eval", samples, reference, "--features", "myfeatures:none"]) == 2
    assert main(["eval", samples, reference, "--features", "myfeatures:mean", "--metrics", "fid"]) == 2
    assert main(["eval", samples, "nowhere", "--features", "myfeatures:mean"]) == 2
    assert "nowhere does not exist" in capsys.readouterr().err
