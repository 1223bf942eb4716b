"""Model files from strangers: crafted and damaged ones give a model or one sentence, and never ask for more memory than they
have bytes to show for."""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mutate import bytes_of, outcome, safetensors_of

from difffit_fast import DiT, FastDiffFitDiT
from difffit_fast.check import check
from difffit_fast.errors import DiffFitError
from difffit_fast.evaluate.sources import open_images
from difffit_fast.evaluate.statistics import load_statistics
from difffit_fast.models.header import read_header, write_model_file
from difffit_fast.models.load import load_model

pytestmark = pytest.mark.filterwarnings("ignore")
SIZES = dict(input_size=8, patch_size=4, in_channels=3, hidden_size=16, depth=2, num_heads=2, num_classes=3)
RECORDED = dict(class_names=["a", "b", "c"], image_size=8, objective="ddpm", vae="none")
FC1, TABLE = "blocks.0.mlp.fc1.weight", "y_embedder.embedding_table.weight"
GIB = 1 << 30


def make_files(folder: Path) -> dict[str, Path]:
    torch.manual_seed(0)
    base = DiT(**SIZES)
    files = {name: folder / name for name in ("base.pt", "base.safetensors", "delta.safetensors")}
    torch.save({"ema": base.state_dict(), "args": argparse.Namespace(model="x", num_classes=3)}, files["base.pt"])
    write_model_file(files["base.safetensors"], "model", base.state_dict(), {"config": base.config, **RECORDED})
    FastDiffFitDiT.from_dit(base).save_delta(files["delta.safetensors"], step=3, method_options={"a": 1}, **RECORDED)
    return files


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_files(tmp_path_factory.mktemp("files"))


# -- crafted -----------------------------------------------------------------------------------------------------------
def crafted(weight: torch.Tensor, pos: torch.Tensor) -> dict[str, tuple[dict[str, Any], str]]:
    """Entries that replace those of a good state dict, and what the refusal says."""
    deep: dict[str, Any] = {}
    for _ in range(150):
        deep = {"a": deep}
    return {
        "complex": ({FC1: weight.to(torch.complex64)}, "complex64"),
        "integer": ({FC1: weight.int()}, "int32"),
        "boolean": ({FC1: weight.bool()}, "bool"),
        "sparse": ({FC1: weight.to_sparse()}, "sparse_coo"),
        "float8": ({FC1: weight.to(torch.float8_e4m3fn)}, "float8_e4m3fn"),
        "NaN": ({FC1: torch.full_like(weight, float("nan"))}, "NaN or infinite"),
        "no values": ({FC1: weight.to("meta")}, "no values"),
        "a terabyte in four bytes": ({FC1: torch.zeros(1).as_strided((1 << 19, 1 << 19), (0, 0))}, "over and over"),
        "classes without end": ({TABLE: torch.zeros(1, 16).expand(1 << 40, 16)}, "over and over"),
        "positions without end": ({"pos_embed": torch.zeros(1, 1, 16).expand(1, 1 << 40, 16)}, "over and over"),
        "a far block": ({"blocks.99999999.y": weight}, "block '99999999'"),
        "a negative block": ({"blocks.-1.y": weight}, "block '-1'"),
        "no row": ({FC1: torch.zeros(0, 16)}, r"should be \(…, 16\), it is \(0, 16\)"),
        "no class": ({TABLE: torch.zeros(0, 16)}, r"it is \(0, 16\)"),
        "one dimension": ({FC1: weight.flatten()}, r"it is \(1024,\)"),
        "no dimension": ({FC1: torch.tensor(1.0)}, r"it is \(\)"),
        "no square": ({"pos_embed": torch.zeros(1, 5, 16)}, "no square"),
        "a number": ({FC1: 3}, f"lacks {FC1}"),
        "text": ({FC1: "x"}, f"lacks {FC1}"),
        "gone": ({FC1: None}, f"lacks {FC1}"),
        "deep": ({"x_embedder.proj.weight": deep}, "is not a DiT"),
    }


@pytest.mark.parametrize("name", sorted(crafted(torch.zeros(64, 16), torch.zeros(1, 4, 16))))
def test_crafted_checkpoints_are_refused(name: str, tmp_path: Path) -> None:
    state = DiT(**SIZES).state_dict()
    entries, message = crafted(state[FC1], state["pos_embed"])[name]
    torch.save({**state, **entries}, tmp_path / "bad.pt")
    with pytest.raises(DiffFitError, match=message):
        load_model(tmp_path / "bad.pt", num_heads=2)
    torch.save(state, tmp_path / "good.pt")
    load_model(tmp_path / "good.pt", num_heads=2)


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("config.hidden_size", 10**30, "hidden_size must be at most"),
        ("config.depth", 10**9, "depth must be at most"),
        ("config.depth", 1000, "2 blocks; its metadata says 1000|made for depth"),
        ("config.depth", 1, "has a block '1'"),
        ("config.hidden_size", 32, "the width is 32"),
        ("config.input_size", 1 << 16, "patches are possible"),
        ("config.patch_size", 0, "patch_size must be at least 1"),
        ("config.num_heads", 0, "num_heads must be at least 1"),
        ("config.num_heads", 3, "divisible by num_heads"),
        ("config.mlp_ratio", float("nan"), "mlp_ratio must be"),
        ("config.class_dropout_prob", float("nan"), "class_dropout_prob"),
        ("config.learn_sigma", "maybe", "learn_sigma in its metadata should be bool"),
        ("config", [], "config in its metadata should be dict"),
        ("difffit.bias", "yes", "bias must be true or false"),
        ("difffit.gamma", "qkv", "gamma must be a list of sites"),
        ("difffit.gamma", [1], "gamma sites must be among"),
        ("difffit.gamma_blocks", 0.5, "gamma_blocks must be"),
        ("pos_embed_scale", float("inf"), "pos_embed_scale in its metadata should be from"),
        ("pos_embed_scale", 0, "pos_embed_scale in its metadata should be from"),
        ("image_size", -8, "image_size in its metadata should be from"),
        ("image_size", 10**30, "image_size in its metadata should be from"),
        ("random_base", 1 << 64, "random_base in its metadata should be from"),
        ("step", -1, "step in its metadata should be from"),
        ("class_names", "abc", "class_names in its metadata should be list"),
        ("class_names", [1, 2, 3], "class_names in its metadata should be text"),
        ("objective", "best", "objective in its metadata should be ddpm or flow"),
    ],
)
def test_crafted_headers_are_refused(
    files: dict[str, Path], tmp_path: Path, entry: str, value: object, message: str
) -> None:
    from json import dumps, loads
    from struct import pack, unpack

    content = files["delta.safetensors"].read_bytes()
    (length,) = unpack("<Q", content[:8])
    header = loads(content[8 : 8 + length])
    strings = header["__metadata__"]
    key, _, inner = entry.partition(".")
    strings[key] = dumps({**loads(strings[key]), inner: value} if inner else value)
    text = dumps(header).encode()
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(pack("<Q", len(text)) + text + content[8 + length :])
    with pytest.raises(DiffFitError, match=message):
        load_model(files["base.safetensors"], bad)
    assert outcome(lambda: check(bad), (DiffFitError,)) in ("fine", "refused")


def test_a_header_that_is_nested_without_end(tmp_path: Path) -> None:
    strings = {"format": "difffit_fast-delta", "kind": "delta", "version": "2", "difffit": "[" * 100_000}
    from difffit_fast._files import write_safetensors

    write_safetensors(tmp_path / "bad.safetensors", {"a": torch.zeros(1)}, strings)
    with pytest.raises(DiffFitError, match="difffit in its metadata is not JSON"):
        read_header(tmp_path / "bad.safetensors")


# -- statistics --------------------------------------------------------------------------------------------------------
GOOD = {"mu": np.zeros(3), "sigma": np.eye(3), "features": np.zeros((4, 3), np.float32)}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"mu": np.zeros((3, 1))}, r"needs a mean \[D\]"),
        ({"mu": np.full(3, np.nan)}, "NaN or infinite"),
        ({"sigma": np.array([[1, 9, 0], [0, 1, 0], [0, 0, 1.0]])}, "not symmetric"),
        ({"mu": np.array([{}, 1, 2], dtype=object)}, "cannot be read as statistics"),
        ({"features": np.zeros((4, 2), np.float32)}, r"features should be .* \(N, 3\)"),
        ({"features": np.full((4, 3), np.inf, np.float32)}, "features should be finite"),
        ({"features": np.zeros((4, 3), np.int64)}, "features should be finite floating"),
        ({"difffit_fast": np.array("[")}, "its note is not JSON"),
        ({"difffit_fast": np.array("[" * 100_000)}, "its note is not JSON"),
        ({"difffit_fast": np.array("[1]")}, "its note should be a JSON object"),
        ({"difffit_fast": np.array('{"count": "many"}')}, "count in its note should be int"),
        ({"difffit_fast": np.array('{"count": -1}')}, "count in its note should be a number of images"),
        ({"difffit_fast": np.array('{"size": [8]}')}, "size in its note should be a height and a width"),
        ({"difffit_fast": np.array('{"identity": 3}')}, "identity in its note should be str"),
    ],
)
def test_crafted_statistics_are_refused(tmp_path: Path, entries: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "s.npz", **{**GOOD, **entries})
    with pytest.raises(DiffFitError, match=message):
        load_statistics(tmp_path / "s.npz")
    np.savez(tmp_path / "s.npz", **GOOD)
    assert load_statistics(tmp_path / "s.npz").features.shape == (4, 3)


def test_damaged_statistics_and_images_give_one_sentence(tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", **GOOD, difffit_fast=np.array('{"count": 4, "size": [8, 8], "identity": "x"}'))
    np.savez(tmp_path / "i.npz", arr_0=np.zeros((3, 4, 4, 3), np.uint8))
    for name, read in (
        ("s.npz", load_statistics),
        ("i.npz", lambda path: list(open_images(path).batches(2))),
    ):
        content = (tmp_path / name).read_bytes()
        for number in range(150):
            path = tmp_path / f"damaged-{name}"
            path.write_bytes(bytes_of(content, random.Random(f"{name} {number}")))
            said = outcome(lambda: read(path), (DiffFitError,))  # noqa: B023
            assert said in ("fine", "refused"), f"{name}, number {number}: {said}"


# -- damaged -----------------------------------------------------------------------------------------------------------
def fuzz(folder: Path, count: int, seed: int) -> list[str]:
    """What came of ``count`` damaged copies of each file that was neither a model nor one sentence."""
    files, bad = make_files(folder), []
    for name, source in files.items():
        content = source.read_bytes()
        for number in range(count):
            rng = random.Random(f"{name} {seed} {number}")
            inside = source.suffix == ".safetensors" and rng.random() < 0.8
            path = folder / f"damaged{source.suffix}"
            path.write_bytes((safetensors_of if inside else bytes_of)(content, rng))
            base = files["base.safetensors"]
            load = (lambda: load_model(base, path)) if name.startswith("delta") else lambda: load_model(path)  # noqa: B023
            for how, action in (("load", load), ("check", lambda: check(path))):  # noqa: B023
                said = outcome(action, (DiffFitError,))
                if said not in ("fine", "refused"):
                    bad.append(f"{name}, number {number} of seed {seed}, {how}: {said}")
    return bad


def run_fuzz(folder: Path, count: int, seed: int) -> None:
    """In a process of its own, which may take three gigabytes of memory more than it begins with, and two minutes."""
    script = (
        "import resource, sys, torch; from pathlib import Path; import test_untrusted as t; torch.set_num_threads(1)\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 3 * t.GIB, used + 3 * t.GIB))\n"
        f"bad = t.fuzz(Path({str(folder)!r}), {count}, {seed}); print('\\n'.join(bad)); sys.exit(bool(bad))"
    )
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        cwd=Path(__file__).parent, env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)}, capture_output=True,
        text=True, check=False, timeout=120 + count,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]


@pytest.mark.skipif(sys.platform != "linux", reason="limits the process's memory as Linux does")
def test_damaged_files_give_a_model_or_a_sentence(tmp_path: Path) -> None:
    run_fuzz(tmp_path, 60, seed=0)


@pytest.mark.reliability
@pytest.mark.skipif(sys.platform != "linux", reason="limits the process's memory as Linux does")
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_thousands_of_damaged_files(tmp_path: Path, seed: int) -> None:
    run_fuzz(tmp_path, 700, seed)
