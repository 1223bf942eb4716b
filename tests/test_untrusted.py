"""Model files from strangers: crafted and damaged ones give a model or one sentence, and never ask for more memory than they
have bytes to show for."""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mutate import bytes_of, json_of, outcome, safetensors_of
from safetensors.torch import load_file, save_file

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
        ("config.learn_sigma", "maybe", "learn_sigma must be true or false, got 'maybe'"),
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
        ("class_names", ["a", "b"], "has 2 class_names for 3 classes"),
        ("difffit", {"bias": True}, "difffit in its metadata lacks affine_norm"),
        ("version", 0, "versions are counted from 1"),
        ("image_size", 9, "records an image size of 9 for 8 cells"),
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


def test_a_key_that_stands_twice_in_a_header(tmp_path: Path) -> None:
    strings = {"format": "difffit_fast-delta", "version": "2", "difffit": '{"bias": true, "bias": false}'}
    save_file({"a": torch.zeros(1)}, tmp_path / "bad.safetensors", strings)
    with pytest.raises(DiffFitError, match="difffit in its metadata is not JSON .a key stands twice in it"):
        read_header(tmp_path / "bad.safetensors")


def recorded(text: Any) -> Any:
    """A state dict that says ``text`` of itself."""
    state = DiT(**SIZES).state_dict()
    state._metadata[""]["difffit_fast"] = text
    return state


def shared(levels: int) -> dict[str, Any]:
    """Two to the power of ``levels`` paths in as many small dictionaries as there are levels."""
    inner: dict[str, Any] = {}
    for _ in range(levels):
        inner = {"a": inner, "b": inner}
    return inner


AWKWARD = {
    "no JSON": (lambda: recorded("{"), "is no header of a model: '{'"),
    "nested without end": (lambda: recorded("[" * 100_000), "is no header of a model"),
    "no text": (lambda: recorded(3), "is no header of a model: 3"),
    "no object": (lambda: recorded("[1]"), "is no header of a model"),
    "of a delta": (lambda: recorded('{"kind": "delta"}'), "is no header of a model"),
    "more paths than anyone can walk": (lambda: {**DiT(**SIZES).state_dict(), "x": shared(60)}, "over and over"),
    "a tensor under a number": (lambda: {**DiT(**SIZES).state_dict(), 7: torch.ones(1)}, "a tensor under 7"),
    "a nested tensor": (
        lambda: {**DiT(**SIZES).state_dict(), FC1: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])},
        "is nested; weights must be dense",
    ),
    "all blocks lost": (
        lambda: {k: v for k, v in DiT(**SIZES).state_dict().items() if not k.startswith("blocks.")},
        "has no blocks",
    ),
}


@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_checkpoints_are_refused(name: str, tmp_path: Path) -> None:
    make, message = AWKWARD[name]
    torch.save(make(), tmp_path / "bad.pt")
    with pytest.raises(DiffFitError, match=message):
        load_model(tmp_path / "bad.pt", num_heads=2)


def test_what_occurs_twice_in_a_checkpoint_is_no_obstacle(tmp_path: Path) -> None:
    state = dict(DiT(**SIZES).state_dict())
    cycle: dict[str, Any] = {}
    cycle["again"] = cycle
    torch.save({"ema": state, "model": state, "x": cycle}, tmp_path / "c.pt")
    assert torch.equal(load_model(tmp_path / "c.pt", num_heads=2).model.state_dict()[FC1], state[FC1])


def test_an_archive_that_unpacks_to_a_thousand_times_its_bytes(tmp_path: Path) -> None:
    torch.save(DiT(**SIZES).state_dict(), tmp_path / "c.pt")
    with (
        zipfile.ZipFile(tmp_path / "c.pt") as plain,
        zipfile.ZipFile(tmp_path / "z.pt", "w", zipfile.ZIP_DEFLATED) as small,
    ):
        for entry in plain.infolist():
            small.writestr(entry.filename, plain.read(entry))
        load_model(tmp_path / "c.pt")
        small.writestr("c/data/999", bytes(80 << 20))
    with pytest.raises(DiffFitError, match="bytes unpack to"):
        load_model(tmp_path / "z.pt")


def test_any_ratio_of_the_mlp_comes_back(tmp_path: Path) -> None:
    for ratio in (4.0, 2.2, 61 / 28):
        dit = DiT(**{**SIZES, "hidden_size": 28, "mlp_ratio": ratio})
        for name, state in (("recorded.pt", dit.state_dict()), ("bare.pt", dict(dit.state_dict()))):
            torch.save(state, tmp_path / name)
            loaded = load_model(tmp_path / name, num_heads=2).model
            assert torch.equal(loaded.state_dict()[FC1], state[FC1])
        assert load_model(tmp_path / "recorded.pt").model.config == dit.config


# -- an index and its shards -------------------------------------------------------------------------------------------
def make_shards(folder: Path) -> dict[str, Any]:
    """Two shards; returns the index that belongs to them."""
    dit = DiT(**SIZES)
    state = dict(dit.state_dict())
    names = {key: f"part-{i % 2}.safetensors" for i, key in enumerate(sorted(state))}
    for name in set(names.values()):
        mine = {key: value for key, value in state.items() if names[key] == name}
        write_model_file(folder / name, "model", mine, {"config": dit.config})
    return {"metadata": {"total_size": 1}, "weight_map": names}


INDEXES = {
    "nested without end": ("[" * 100_000, "cannot be read as JSON"),
    "a list": ("[]", "should hold a JSON object"),
    "no map": ('{"weight_map": [1]}', "weight_map should lead from keys to files"),
    "a number": ({"pos_embed": 3}, "weight_map should lead from keys to files"),
    "no name": ({"pos_embed": ""}, "names the shard '', which does not lie beside it"),
    "above": ({"pos_embed": "../x"}, "names the shard '../x', which does not lie beside it"),
    "a long name": ({"pos_embed": "x" * 5000}, "names the shard x{80}, which is missing"),
    "the other shard": ({"pos_embed": "part-1.safetensors"}, "names 'pos_embed' in part-1.safetensors"),
    "one that nobody holds": ({"odd": "part-0.safetensors"}, "names 'odd' in part-0.safetensors"),
}


@pytest.mark.parametrize("name", INDEXES)
def test_crafted_indexes_are_refused(name: str, tmp_path: Path) -> None:
    index, path = make_shards(tmp_path), tmp_path / "model.safetensors.index.json"
    changes, message = INDEXES[name]
    path.write_text(json.dumps(index))
    load_model(path)
    if isinstance(changes, dict):
        index["weight_map"] |= changes
        assert name != "the other shard" or sorted(index["weight_map"]).index("pos_embed") % 2 == 0
    path.write_text(json.dumps(index) if isinstance(changes, dict) else changes)
    with pytest.raises(DiffFitError, match=message):
        load_model(path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    index = make_shards(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    held = load_file(tmp_path / "part-1.safetensors")
    save_file({**held, "pos_embed": torch.zeros(1, 4, 16)}, tmp_path / "part-1.safetensors")
    with pytest.raises(DiffFitError, match="two of its shards hold 'pos_embed'"):
        load_model(tmp_path, num_heads=2)


# -- the settings of a run ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ckpt": 3}, "ckpt in .* should be a path or null; it is 3; give --ckpt"),
        ({"ckpt": ["a"]}, "should be a path or null"),
        ({"ckpt": ""}, "should be a path or null"),
        ({"ckpt": None, "global_seed": "x"}, "global_seed in .* should be a whole number"),
        ({"ckpt": None, "global_seed": -1}, "global_seed in .* should be a whole number"),
    ],
)
def test_a_base_that_the_settings_of_a_run_do_not_name(
    files: dict[str, Path], tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    (tmp_path / "checkpoints").mkdir()
    delta = tmp_path / "checkpoints" / "0000003.safetensors"
    delta.write_bytes(files["delta.safetensors"].read_bytes())
    (tmp_path / "config.yaml").write_text(json.dumps(settings))
    with pytest.raises(DiffFitError, match=message):
        load_model(None, delta)
    (tmp_path / "config.yaml").write_text(json.dumps({"ckpt": str(files["base.safetensors"])}))
    load_model(None, delta)


# -- statistics --------------------------------------------------------------------------------------------------------
GOOD = {"mu": np.zeros(3), "sigma": np.eye(3), "features": np.zeros((4, 3), np.float32)}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"mu": np.zeros((3, 1))}, r"needs a mean \[D\]"),
        ({"mu": np.full(3, np.nan)}, "NaN or infinite"),
        ({"sigma": np.array([[1, 9, 0], [0, 1, 0], [0, 0, 1.0]])}, "not symmetric"),
        ({"mu": np.array([{}, 1, 2], dtype=object)}, "mu of .* holds Python objects"),
        ({"features": np.zeros((4, 2), np.float32)}, r"features should be .* \(N, 3\)"),
        ({"features": np.full((4, 3), np.inf, np.float32)}, "features should be finite"),
        ({"features": np.zeros((4, 3), np.int64)}, "features should be finite floating"),
        ({"features": np.full((4, 3), 1e300)}, "features should be finite floating numbers of float32's range"),
        ({"features": np.zeros((0, 3), np.float32)}, "features should be finite"),
        ({"sigma": -np.eye(3)}, "negative eigenvalue"),
        ({"sigma": np.array([[1, 2, 0], [2, 1, 0], [0, 0, 1.0]])}, r"negative eigenvalue \(-1"),
        ({"mu_s": np.zeros(2), "sigma_s": -np.eye(2)}, "spatial.*negative eigenvalue"),
        ({"mu_s": np.zeros(2)}, "mu_s without its partner"),
        ({"sigma": np.eye(3) * 1j}, "must be real"),
        ({"sigma": np.ones((3, 4))}, r"a covariance \[D, D\]"),
        ({"mu": np.zeros(9000), "sigma": np.zeros((1, 1))}, "at most 8192 features"),
        ({"difffit_fast": np.array('{"version": 2}')}, "is of version 2; this program reads version 1"),
        ({"difffit_fast": np.array('{"count": 5}')}, "features of 4 images; its note says 5"),
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


def claimed(path: Path, shapes: dict[str, tuple], data: bytes = bytes(768), dtype: str = "|u1") -> Path:
    """An archive of arrays that claim ``shapes`` and hold ``data``."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for key, shape in shapes.items():
            head = io.BytesIO()
            np.lib.format.write_array_header_1_0(head, {"descr": dtype, "fortran_order": False, "shape": shape})
            archive.writestr(f"{key}.npy", head.getvalue() + data)
    return path


@pytest.mark.parametrize(
    "shape",
    [
        (10**12, 8, 8, 3), (4, 10**6, 10**6, 3), (1 << 70, 8, 8, 3), (-4, 8, 8, 3), (4, -8, -8, 3), (True, 8, 8, 3),
        (3, 8, 8, 3), (0, 8, 8, 3), (),
    ],
)  # fmt: skip
def test_images_are_as_many_as_they_claim(tmp_path: Path, shape: tuple) -> None:
    with pytest.raises(DiffFitError, match="arr_0 of .* (claims|is empty)"):
        open_images(claimed(tmp_path / "i.npz", {"arr_0": shape}))
    assert len(open_images(claimed(tmp_path / "i.npz", {"arr_0": (4, 8, 8, 3)}))) == 4


def test_sizes_of_statistics_are_looked_at_before_memory_is_taken(tmp_path: Path) -> None:
    """A file of half a megabyte that is a matrix of half a gigabyte; one that only says so."""
    width = 8_200
    bomb = claimed(tmp_path / "bomb.npz", {"mu": (width,)}, bytes(8 * width), "<f8")
    with zipfile.ZipFile(bomb, "a", zipfile.ZIP_DEFLATED) as archive, archive.open("sigma.npy", "w") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": (width, width)})
        for _ in range(width):
            file.write(bytes(8 * width))
    liar = claimed(tmp_path / "liar.npz", {"mu": (3,), "sigma": (30_000, 30_000)}, bytes(24), "<f8")
    for path, message in (
        (bomb, "at most 8192 features"),
        (liar, "sigma of .* claims .* 7200000000 bytes; there are 24"),
    ):
        tracemalloc.start()
        try:
            with pytest.raises(DiffFitError, match=message):
                load_statistics(path)
            assert tracemalloc.get_traced_memory()[1] < 16 << 20
        finally:
            tracemalloc.stop()


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
    return bad + fuzz_index(folder, count, seed)


def fuzz_index(folder: Path, count: int, seed: int) -> list[str]:
    """The same for the index of a checkpoint in two shards."""
    index, path, bad = make_shards(folder), folder / "model.safetensors.index.json", []
    for number in range(count):
        rng = random.Random(f"index {seed} {number}")
        text = json.dumps(json_of(index, rng)).encode()
        path.write_bytes(text if rng.random() < 0.7 else bytes_of(text, rng))
        said = outcome(lambda: load_model(path), (DiffFitError,))
        if said not in ("fine", "refused"):
            bad.append(f"index, number {number} of seed {seed}: {said}")
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
