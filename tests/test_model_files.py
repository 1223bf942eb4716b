"""Model files: whatever training code wraps around a DiT, whatever a file records, one description that all tools use."""

from __future__ import annotations

import argparse
import json
import pathlib
import warnings
from collections import OrderedDict

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from training import digits, flags

from difffit_fast import DiT, FastDiffFitDiT, load_model
from difffit_fast.cli import main
from difffit_fast.cli.inspect import describe
from difffit_fast.errors import DiffFitError
from difffit_fast.models.checkpoint import model_of, read_model
from difffit_fast.models.header import VERSION, decode_header, encode_header, read_header, write_model_file
from difffit_fast.models.sizes import MODEL_NAMES, model_name, model_objective, model_sizes
from difffit_fast.models.state_dict import read_weights

SIZES = dict(input_size=16, patch_size=4, in_channels=3, hidden_size=48, depth=2, num_heads=3, num_classes=3)


def model(seed: int = 0, **changes) -> DiT:
    """A small DiT with a life: random everywhere, gates included."""
    torch.manual_seed(seed)
    dit = DiT(**{**SIZES, **changes})
    with torch.no_grad():
        for name, p in dit.named_parameters():
            if name != "pos_embed":
                p.normal_(std=0.1)
    return dit


RAW, EMA = model(0), model(1)
STATE, AVERAGE = dict(RAW.state_dict()), dict(EMA.state_dict())  # plain dictionaries: nothing recorded beside them


def prefixed(prefix: str, state=STATE) -> dict:
    return {prefix + key: value for key, value in state.items()}


def inside(word: str) -> dict:
    """Keys with a wrapper's name in the middle, as regional compilation and activation checkpointing leave them."""
    return {key.replace("blocks.1.", f"blocks.1.{word}."): value for key, value in STATE.items()}


def averaged_model() -> dict:
    average = torch.optim.swa_utils.AveragedModel(EMA)
    return dict(average.state_dict())


WRAPPED = {
    "bare": (STATE, STATE),
    "DDP": (prefixed("module."), STATE),
    "compiled": (prefixed("_orig_mod."), STATE),
    "DDP of compiled": (prefixed("module._orig_mod."), STATE),
    "compiled DDP of FSDP": (prefixed("_orig_mod.module._fsdp_wrapped_module."), STATE),
    "compiled by region": (inside("_orig_mod"), STATE),
    "FSDP by block": (inside("_fsdp_wrapped_module"), STATE),
    "activation checkpointing": (inside("_checkpoint_wrapped_module"), STATE),
    "Fabric": (prefixed("_forward_module."), STATE),
    "AveragedModel": (averaged_model(), AVERAGE),
    "AveragedModel beside the model": ({"model": STATE, "swa": averaged_model()}, AVERAGE),
    "model_state_dict": ({"epoch": 3, "model_state_dict": STATE, "optimizer_state_dict": {}}, STATE),
    "net": ({"net": STATE, "acc": 0.5}, STATE),
    "DeepSpeed": ({"module": STATE, "global_steps": 7, "optimizer": None}, STATE),
    "state_dict": ({"state_dict": prefixed("module.")}, STATE),
    "Lightning": (
        {"pytorch-lightning_version": "2.5", "state_dict": prefixed("model.") | prefixed("ema.", AVERAGE)},
        AVERAGE,
    ),
    "Lightning with a VAE": (
        {"state_dict": prefixed("model.") | {"vae.decoder.conv.weight": torch.ones(2)}, "hyper_parameters": {}},
        STATE,
    ),
    "ema and model": ({"ema": AVERAGE, "model": STATE, "opt": {"state": {0: {"exp_avg": torch.ones(2)}}}}, AVERAGE),
    "ema_model": ({"ema_model": prefixed("module.", AVERAGE), "model": STATE}, AVERAGE),
    "model_ema": ({"model_ema": AVERAGE, "model": STATE}, AVERAGE),
    "ema_state_dict": ({"ema_state_dict": AVERAGE, "state_dict": STATE}, AVERAGE),
    "params_ema": ({"params_ema": AVERAGE, "params": STATE}, AVERAGE),
    "ema_pytorch": (
        {"model": STATE, "ema": prefixed("online_model.") | prefixed("ema_model.", AVERAGE) | {"step": torch.ones(())}},
        AVERAGE,
    ),
    "EMA of DDP of compiled": ({"ema": prefixed("module._orig_mod.", AVERAGE), "model": STATE}, AVERAGE),
    "nested": ({"state": {"weights": {"ema": AVERAGE, "raw": STATE}}}, AVERAGE),
    "half precision": ({k: v.to(torch.bfloat16) for k, v in STATE.items()}, None),
    "ordered": (OrderedDict(STATE), STATE),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_every_wrapper_around_a_state_dict(name: str, tmp_path) -> None:
    content, want = WRAPPED[name]
    torch.save(content, tmp_path / "c.pt")
    got = read_weights(tmp_path / "c.pt").state
    want = want or {k: v.to(torch.bfloat16) for k, v in STATE.items()}
    assert got.keys() == want.keys()
    assert all(torch.equal(got[key], want[key]) for key in want)
    if want is AVERAGE and name not in ("AveragedModel",):  # the others are there for who asks
        raw = read_weights(tmp_path / "c.pt", "model" if name != "nested" else "state.weights.raw").state
        assert all(torch.equal(raw[key], STATE[key]) for key in STATE)


@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_shards_with_an_index_in_a_folder_or_by_name(index: str, tmp_path) -> None:
    keys, ending = sorted(STATE), index.removeprefix("model.").removeprefix("pytorch_model.").split(".")[0]
    parts = {f"part-{i}.{ending}": keys[i::2] for i in range(2)}
    for name, mine in parts.items():
        part = {key: STATE[key] for key in mine}
        save_file(part, tmp_path / name) if ending == "safetensors" else torch.save(part, tmp_path / name)
    weight_map = {key: name for name, mine in parts.items() for key in mine}
    (tmp_path / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for path in (tmp_path, tmp_path / index):
        got = read_weights(path).state
        assert all(torch.equal(got[key], STATE[key]) for key in STATE) and len(got) == len(STATE)
    (tmp_path / next(iter(parts))).unlink()
    with pytest.raises(DiffFitError, match=r"names the shard part-0\..*, which is missing"):
        read_weights(tmp_path)
    (tmp_path / index).write_text(json.dumps({"weight_map": {"a": "../../elsewhere.bin"}}))
    with pytest.raises(DiffFitError, match="does not lie beside it"):
        read_weights(tmp_path)


def test_arguments_of_any_class_are_no_obstacle_and_nothing_is_run(tmp_path) -> None:
    arguments = argparse.Namespace(
        model="DiT-S/2", results=pathlib.Path("/results"), lr=np.float64(1e-4), steps=np.int64(7), when=slice(1, 2)
    )
    torch.save({"model": STATE, "ema": AVERAGE, "args": arguments}, tmp_path / "c.pt")
    weights = read_weights(tmp_path / "c.pt")
    assert torch.equal(weights.state["pos_embed"], AVERAGE["pos_embed"])
    assert weights.arguments == {"model": "DiT-S/2"}  # what is text or a number, nothing else
    torch.save({"model": STATE, "args": arguments}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(read_weights(tmp_path / "old.pt").state["pos_embed"], STATE["pos_embed"])
    (tmp_path / "canary").touch()
    torch.save({"model": STATE, "args": Payload(str(tmp_path / "canary"))}, tmp_path / "bad.pt")
    try:
        read_weights(tmp_path / "bad.pt")
    except DiffFitError as error:
        assert "\x1b" not in str(error) and "weights_only" not in str(error)
    assert (tmp_path / "canary").exists()


class Payload:
    """Removes a file when it is unpickled by Python's own rules."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return pathlib.Path.unlink, (pathlib.Path(self.path),)


REFUSED = {
    "a pickled module": (RAW, r"holds a pickled object of the class difffit_fast\.models\.dit\.DiT .*state_dict\(\)"),
    "pickled modules in a dictionary": ({"ema": RAW}, r"pickled objects instead of weights: ema \(a pickled .*DiT\)"),
    "a list": ([1, 2], "holds a list, not a state dict"),
    "nothing": ({"epoch": 3}, r"is not a DiT: it has no x_embedder.proj.weight \(it has no tensors, but epoch\)"),
    "another network": ({"conv.weight": torch.ones(2)}, r"is not a DiT: .*\(it has conv.weight\)"),
    "diffusers": ({"transformer_blocks.0.attn1.to_q.weight": torch.ones(2)}, "looks like a transformer of diffusers"),
    "flat FSDP": ({"_flat_param": torch.ones(9)}, "FULL_STATE_DICT"),
    "LoRA inside": (STATE | {"blocks.0.attn.qkv.lora_A.weight": torch.ones(2)}, "unknown key blocks.0.attn.qkv.lora_A"),
    "NaN": (STATE | {"blocks.1.mlp.fc2.bias": torch.full((48,), torch.nan)}, r"blocks\.1\.mlp\.fc2\.bias holds 48 of 48"),
    "infinity": (STATE | {"pos_embed": STATE["pos_embed"] / 0}, "pos_embed holds .* NaN or infinite"),
    "integers": (STATE | {"pos_embed": STATE["pos_embed"].to(torch.int8)}, "pos_embed is int8; weights must be"),
    "complex": (STATE | {"pos_embed": STATE["pos_embed"] * 1j}, "pos_embed is complex64"),
    "a key too few": ({k: v for k, v in STATE.items() if "blocks.1.mlp.fc2.bias" not in k}, r"lacks blocks\.1\.mlp\.fc2\.bias"),
    "a block far out": (STATE | {"blocks.99999999.y": torch.ones(1)}, "has a block '99999999', but 3 blocks in all"),
    "a block without number": (STATE | {"blocks.x.y": torch.ones(1)}, "has a block 'x'"),
    "positions that are no square": (STATE | {"pos_embed": torch.zeros(1, 15, 48)}, "15 positions, which is no square"),
    "flat patches": (STATE | {"x_embedder.proj.weight": torch.zeros(48)}, r"x_embedder.proj.weight should be \(…, …, …, …\)"),
    "no classes": (STATE | {"y_embedder.embedding_table.weight": torch.zeros(0, 48)}, r"should be \(…, 48\), it is \(0, 48\)"),
    "several averages": ({"ema_0.9": AVERAGE, "ema_0.99": STATE}, "several sets of weights: 'ema_0.9', 'ema_0.99'"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_says_which_object_and_what_to_do(name: str, tmp_path, capsys) -> None:
    content, message = REFUSED[name]
    path = tmp_path / "c.pt"
    torch.save(content, path)
    with pytest.raises(DiffFitError, match=message) as caught:
        read_model(path).expect(num_heads=3).dit()
    assert str(path) in str(caught.value) and "\x1b" not in str(caught.value) and "\n" not in str(caught.value)
    for words in (["inspect", path], ["sample", "--ckpt", path, "--num-heads", 3, "-o", tmp_path / "s.png"]):
        assert main([str(word) for word in words]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_file_is_read_by_its_content_and_not_by_its_name(tmp_path) -> None:
    save_file(STATE, tmp_path / "a.pt")
    torch.save(STATE, tmp_path / "a.safetensors")
    for name in ("a.pt", "a.safetensors"):
        assert torch.equal(read_weights(tmp_path / name).state["pos_embed"], STATE["pos_embed"])
        assert describe(tmp_path / name)["kind"] == "DiT checkpoint"
    whole = (tmp_path / "a.safetensors").read_bytes()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "script.pt")
    np.savez(tmp_path / "array.npz", a=np.ones(3))
    others = {
        "empty.pt": (b"", "it is empty"),
        "page.pt": (b"<html>404</html>", "neither .safetensors nor written by torch.save"),
        "pointer.pt": (b"version https://git-lfs.github.com/spec/v1", "a pointer of Git LFS"),
        "cut.pt": (whole[: len(whole) // 2], "damaged or was cut short"),
        "cut.safetensors": ((tmp_path / "a.pt").read_bytes()[:5000], "cannot read"),
        "script.pt": (None, "it is a TorchScript archive"),
        "array.npz": (None, "a zip archive, but not one of torch.save"),
    }
    for name, (content, message) in others.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(DiffFitError, match=message) as caught:
            read_weights(tmp_path / name)
        assert name in str(caught.value) and len(str(caught.value)) < 300


def test_the_name_of_one_set_chooses_it(tmp_path) -> None:
    torch.save({"ema_0.9": AVERAGE, "ema_0.99": STATE}, tmp_path / "c.pt")
    assert torch.equal(read_weights(tmp_path / "c.pt", "ema_0.99").state["pos_embed"], STATE["pos_embed"])
    with pytest.raises(DiffFitError, match="no weights called 'best'; it has 'ema_0.9', 'ema_0.99'"):
        read_weights(tmp_path / "c.pt", "best")


def test_averages_without_names_are_passed_over_and_it_is_said(tmp_path) -> None:
    torch.save({"model": STATE, "ema": {"decay": 0.9, "shadow_params": list(AVERAGE.values())}}, tmp_path / "c.pt")
    with pytest.warns(UserWarning, match="a list without names"):
        assert torch.equal(read_weights(tmp_path / "c.pt").state["pos_embed"], STATE["pos_embed"])


def with_projectors(state: dict) -> dict:
    """As REPA saves it: three layers of a projector for each encoder, among the keys of a SiT."""
    layers = {
        f"projectors.{i}.{j}.{kind}": torch.ones(2) for i in (0, 1) for j in (0, 2, 4) for kind in ("weight", "bias")
    }
    return state | layers


def test_foreign_parts_that_a_dit_does_not_need(tmp_path, capsys) -> None:
    torch.save({"model": with_projectors(STATE), "ema": with_projectors(AVERAGE), "steps": 7}, tmp_path / "repa.pt")
    with pytest.warns(UserWarning, match="the projectors of REPA are left out: 12 tensors under projectors.*") as said:
        assert read_weights(tmp_path / "repa.pt").state.keys() == AVERAGE.keys()
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main(["inspect", str(tmp_path / "repa.pt")]) == 0
        printed = capsys.readouterr().out
        assert printed.count("the projectors of REPA: 12 tensors under projectors.*") == 1
        assert main(["check", str(tmp_path / "repa.pt")]) == 1  # its heads are not known
        assert "left out  1  parts that are no DiT's  the projectors of REPA: 12 tensors" in capsys.readouterr().out
        torch.save(STATE, tmp_path / "plain.pt")
        assert "left out" not in describe(tmp_path / "plain.pt")
    torch.save(STATE | {"mask_token": torch.ones(2)}, tmp_path / "odd.pt")
    with pytest.raises(DiffFitError, match="is not a DiT: it has the unknown key mask_token"):
        read_weights(tmp_path / "odd.pt")


@pytest.mark.parametrize("kind", [DiT, FastDiffFitDiT])
@pytest.mark.parametrize("prefix", ["", "0."])
@pytest.mark.parametrize("strict", [True, False])
def test_a_model_leaves_them_out_and_nothing_else(kind: type, prefix: str, strict: bool) -> None:
    made = kind(**SIZES)
    inside = torch.nn.Sequential(made) if prefix else made  # as DDP and its kin hold it
    with pytest.warns(UserWarning, match="the projectors of REPA are left out: 12 tensors under projectors.*") as said:
        result = inside.load_state_dict(prefixed(prefix, with_projectors(STATE)), strict=strict and not prefix)
    assert len(said) == 1 and not result.unexpected_keys
    assert torch.equal(made.blocks[1].mlp.fc2.weight, STATE["blocks.1.mlp.fc2.weight"])
    for odd in ("projector.weight", "mask_token", "blocks.0.projectors.weight"):
        with pytest.raises(RuntimeError, match=f"[uU]nexpected key.*{odd}"):
            made.load_state_dict(STATE | {odd: torch.ones(2)})


@pytest.mark.filterwarnings("ignore:.*left out")
def test_a_checkpoint_of_repa_is_a_sit(tmp_path) -> None:
    torch.save({"ema": with_projectors(AVERAGE)}, tmp_path / "repa.pt")
    fast = FastDiffFitDiT.from_pretrained(tmp_path / "repa.pt", objective="flow", num_heads=3)
    x, t, y = torch.randn(2, 3, 16, 16), torch.tensor([0.3, 0.9]), torch.tensor([0, 2])
    torch.testing.assert_close(fast.eval()(x, t, y), EMA.eval()(x, t, y)[:, :3], rtol=1e-4, atol=1e-4)
    assert torch.equal(FastDiffFitDiT.from_dit(with_projectors(AVERAGE), num_heads=3).pos_embed, EMA.pos_embed)


# -- what a file is ----------------------------------------------------------------------------------------------------
def test_names_of_both_families() -> None:
    assert len(MODEL_NAMES) == 24
    for name in MODEL_NAMES:
        assert model_name(model_sizes(name), model_objective(name)) == name
    with pytest.raises(DiffFitError, match="nearest is SiT-XL/2"):
        model_sizes("SiT-XXL/2")


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("prob", [0.0, 0.1])
@pytest.mark.parametrize("kind", [".pt", ".safetensors", "merged.pt", "merged.safetensors"])
def test_what_is_recorded_comes_back(classes: int, prob: float, kind: str, tmp_path) -> None:
    dit = model(num_classes=classes, class_dropout_prob=prob, num_heads=12)
    path = tmp_path / f"c{kind}"
    if kind == ".pt":
        torch.save(dit.state_dict(), path)
    elif kind == ".safetensors":
        write_model_file(path, "model", dit.state_dict(), {"config": dit.config, "pos_embed_scale": 1.0})
    else:
        torch.save(dit.state_dict(), tmp_path / "base.pt")
        FastDiffFitDiT.from_dit(dit).save_delta(
            tmp_path / "d.safetensors", objective="flow", class_names=["x"] * classes
        )
        words = [
            "export",
            "--to",
            "dit",
            "--ckpt",
            tmp_path / "base.pt",
            "--delta",
            tmp_path / "d.safetensors",
            "--out",
            path,
        ]
        assert main([str(word) for word in words]) == 0
        torch.nn.Module.load_state_dict(DiT(**dit.config), torch.load(path)) if kind == "merged.pt" else None
    file = read_model(path)
    assert file.config == dit.config and file.has_null_class is (prob > 0)
    if kind.startswith("merged"):
        assert file.objective == "flow" and file.name == "SiT-custom" and file.class_names == ["x"] * classes
    assert file.dit().y_embedder.embedding_table.num_embeddings == classes + (prob > 0)


def test_a_files_record_beats_its_width_and_the_user_beats_both(tmp_path) -> None:
    dit = model(hidden_size=384, num_heads=12, depth=1)
    x, t, y = torch.randn(2, 3, 16, 16), torch.tensor([3, 700]), torch.tensor([0, 2])
    want = dit.eval()(x, t, y)
    torch.save(dit.state_dict(), tmp_path / "recorded.pt")
    torch.save(dict(dit.state_dict()), tmp_path / "bare.pt")
    assert FastDiffFitDiT.from_pretrained(tmp_path / "recorded.pt").num_heads == 12
    assert FastDiffFitDiT.from_pretrained(tmp_path / "bare.pt").num_heads == 6  # the published width's
    assert FastDiffFitDiT.from_pretrained(tmp_path / "bare.pt", num_heads=12).num_heads == 12
    with pytest.warns(UserWarning, match="records 12 heads; 6 are taken"):
        assert FastDiffFitDiT.from_pretrained(tmp_path / "recorded.pt", num_heads=6).num_heads == 6
    torch.testing.assert_close(read_model(tmp_path / "recorded.pt").dit().eval()(x, t, y), want)
    args = argparse.Namespace(model="DiT-S/2", num_classes=1000)  # of some other model: no witness
    torch.save({"ema": dict(dit.state_dict()), "args": args}, tmp_path / "args.pt")
    assert read_model(tmp_path / "args.pt").recorded == frozenset()


def test_the_arguments_of_a_public_training_script_are_a_record(tmp_path) -> None:
    with torch.device("meta"):
        meta = DiT(**model_sizes("SiT-S/2"), num_classes=11, class_dropout_prob=0.0)
    state = {key: torch.zeros(value.shape) for key, value in meta.state_dict().items()}
    torch.save({"ema": state, "args": argparse.Namespace(model="SiT-S/2", num_classes=11)}, tmp_path / "c.pt")
    file = read_model(tmp_path / "c.pt")
    assert (file.name, file.objective, file.config["num_classes"], file.has_null_class) == (
        "SiT-S/2",
        "flow",
        11,
        False,
    )


CONTRADICTIONS = {
    "depth": ({"depth": 3}, "depth 3 was asked for; .* has 2"),
    "patch": ({"patch_size": 2}, "patch_size 2 was asked for; .* has 4"),
    "heads": ({"num_heads": 5}, "num_heads must divide the width 48"),
    "image size": ({"image_size": 18}, "image_size must be a positive multiple of 4"),
    "input size": ({"input_size": 18}, "input_size must be a positive multiple of the patch size 4"),
    "classes": ({"num_classes": 0}, "num_classes must be a whole number of at least 1; got 0"),
    "sigma": ({"learn_sigma": False}, "learn_sigma False was asked for; .* has True"),
    "unknown": ({"heads": 3}, "heads"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_setting_that_contradicts_the_file_is_refused(name: str, tmp_path) -> None:
    torch.save(RAW.state_dict(), tmp_path / "c.pt")
    settings, message = CONTRADICTIONS[name]
    for make in (
        lambda s: FastDiffFitDiT.from_pretrained(tmp_path / "c.pt", **s),
        lambda s: FastDiffFitDiT.from_dit(RAW, **s),
    ):
        with pytest.raises((DiffFitError, TypeError), match=message):
            make(settings)


def test_the_null_class_is_dropped_or_made_where_that_is_asked_for() -> None:
    table = RAW.y_embedder.embedding_table.weight
    without = model_of(RAW).with_null_class(False)
    assert torch.equal(without.dit().y_embedder.embedding_table.weight, table[:3])
    again = without.adapt(null_class=True).dit().y_embedder.embedding_table.weight
    torch.testing.assert_close(again[3], table[:3].mean(0))
    bare = model_of(STATE).expect(num_heads=3)  # nothing recorded: the user says what the table is
    assert bare.config["num_classes"] == 3 and bare.with_null_class(False).config["num_classes"] == 4


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.75])
def test_positions_are_recognised(scale: float) -> None:
    file = model_of(RAW).adapt(input_size=32, pos_embed=scale)
    assert model_of(dict(file.state)).pos_embed_scale == pytest.approx(scale)
    odd = dict(file.state, pos_embed=torch.randn_like(file.state["pos_embed"]))
    assert model_of(odd).pos_embed_scale is None
    grown = model_of(dict(file.state)).expect(num_heads=3).adapt(input_size=64)  # spans what the old table spanned
    assert grown.pos_embed_scale == pytest.approx(scale / 2)


# -- headers -----------------------------------------------------------------------------------------------------------
def test_a_header_is_written_and_read_by_one_schema() -> None:
    values = {
        "config": RAW.config,
        "objective": "ddpm",
        "class_names": ["a", "b", "c"],
        "step": 7,
        "own": [1, {"x": None}],
    }
    strings = encode_header("delta", {**values, "base_hash": "ab", "vae": None})
    assert all(isinstance(text, str) for text in strings.values())
    read = decode_header(strings, "f")
    assert read == {**values, "base_hash": "ab", "format": "difffit_fast-delta", "kind": "delta", "version": VERSION}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "99"}, "f has version 99; this package reads up to"),
        ({"version": "new"}, "version 'new', not a number"),
        ({"config": "[1]"}, "config in its metadata should be dict"),
        ({"config": '{"depth": 1}'}, "config in its metadata lacks"),
        ({"step": '"x"'}, "step in its metadata should be int"),
        ({"objective": '"magic"'}, "objective in its metadata should be ddpm or flow"),
        ({"class_names": "[1]"}, "class_names in its metadata should be text"),
        ({"class_names": "{"}, "class_names in its metadata is not JSON"),
    ],
)
def test_bad_headers_are_refused_in_one_sentence(change: dict, message: str) -> None:
    with pytest.raises(DiffFitError, match=message):
        decode_header({**encode_header("model", {"config": RAW.config}), **change}, "f")


def test_files_of_version_1_stay_readable(tmp_path) -> None:
    old = {"version": "1", "config": json.dumps(RAW.config), "class_names": '["a", "b", "c"]', "objective": '"flow"'}
    save_file(STATE, tmp_path / "full.safetensors", {"format": "difffit_fast-model", **old})
    save_file(
        STATE, tmp_path / "merged.safetensors", {"format": "pt", **{k: v for k, v in old.items() if k != "version"}}
    )
    for name in ("full", "merged"):
        file = read_model(tmp_path / f"{name}.safetensors")
        assert file.config == RAW.config and file.class_names == ["a", "b", "c"] and file.objective == "flow"
    fast = FastDiffFitDiT.from_dit(RAW)
    fast.save_delta(tmp_path / "new.safetensors")
    header = read_header(tmp_path / "new.safetensors")
    strings = {
        k: v if k == "base_hash" else json.dumps(v)
        for k, v in header.items()
        if k in ("config", "difffit", "base_hash")
    }
    tensors = {name: p.detach().clone() for name, p in fast.named_trainable_parameters()}
    old = {"format": "difffit_fast-delta", "version": "1", "pos_embed_scale": "1.0", **strings}
    save_file(tensors, tmp_path / "old.safetensors", old)
    assert fast.load_delta(tmp_path / "old.safetensors")["version"] == 1


# -- one description for all tools -------------------------------------------------------------------------------------
def test_a_header_that_its_tensors_contradict_is_refused(tmp_path) -> None:
    save_file(STATE, tmp_path / "c.safetensors", encode_header("model", {"config": {**RAW.config, "depth": 3}}))
    with pytest.raises(DiffFitError, match="records depth 3, but its tensors have 2"):
        read_model(tmp_path / "c.safetensors")
    save_file(STATE, tmp_path / "c.safetensors", encode_header("model", {"config": {**RAW.config, "num_classes": 9}}))
    with pytest.raises(DiffFitError, match="records 9 classes, null class True, but its table has 4 rows"):
        read_model(tmp_path / "c.safetensors")


CHAIN = [
    dict(hidden_size=48, num_heads=3, num_classes=1, class_dropout_prob=0.1, input_size=16, objective="ddpm"),
    dict(hidden_size=384, num_heads=12, num_classes=3, class_dropout_prob=0.0, input_size=32, objective="flow"),
    dict(hidden_size=384, num_heads=2, num_classes=3, class_dropout_prob=0.1, input_size=16, objective="flow"),
    dict(hidden_size=48, num_heads=12, num_classes=1, class_dropout_prob=0.0, input_size=32, objective="ddpm"),
]


@pytest.mark.parametrize("case", CHAIN, ids=lambda c: f"{c['hidden_size']}-{c['num_classes']}-{c['objective']}")
def test_checkpoint_train_delta_sample_merge_train(case: dict, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    case = dict(case)
    objective, size = case.pop("objective"), case["input_size"]
    sizes = dict(patch_size=4, in_channels=3, depth=2, **case)
    images = digits(tmp_path / "images", classes=case["num_classes"], each=6)
    dit = model(**sizes)
    write_model_file("base.safetensors", "model", dit.state_dict(), {"config": dit.config, "objective": objective})

    def train(ckpt: str, method: str = "difffit"):
        words = flags(
            data_path=images, ckpt=ckpt, image_size=size, max_steps=2, ckpt_every=2, model_args={}, results_dir="r",
            flip=None, method=method,
        )  # fmt: skip
        words = [
            w for i, w in enumerate(words) if w not in ("--model-args", "--flip") and words[max(i - 1, 0)] != "--flip"
        ]
        assert main(["train", *words]) == 0
        return sorted(pathlib.Path("r").glob("*/checkpoints/0000002.safetensors"))[-1]

    shown = describe(pathlib.Path("base.safetensors"))
    assert (shown["num_heads"], shown["classes"], shown["null class"], shown["image size"], shown["objective"]) == (
        case["num_heads"], case["num_classes"], case["class_dropout_prob"] > 0, size, objective,
    )  # fmt: skip
    delta = train("base.safetensors")
    header = read_header(delta)
    assert {k: header["config"][k] for k in sizes} == sizes  # to the digit
    assert header["objective"] == objective and header["image_size"] == size
    shown = describe(delta)
    assert (shown["num_heads"], shown["classes"], shown["null class"]) == (
        case["num_heads"], case["num_classes"], case["class_dropout_prob"] > 0,
    )  # fmt: skip

    tuned = load_model(None, delta)  # its run names the base
    assert tuned.objective == objective and {k: tuned.model.config[k] for k in sizes} == sizes
    x, t = torch.randn(2, 3, size, size), torch.tensor([0.3, 0.9] if objective == "flow" else [3, 900])
    y = torch.zeros(2, dtype=torch.long)
    want = tuned.model(x, t, y)
    words = ["sample", "--delta", delta, "--num-sampling-steps", 2, "--num-images", 2, "-o", "s.png", "--cfg-scale", 1]
    assert main([str(word) for word in words]) == 0
    for out in ("merged.pt", "merged.safetensors"):
        assert main(["export", "--to", "dit", "--delta", str(delta), "--out", out]) == 0
        merged = load_model(out)
        assert {k: merged.model.config[k] for k in sizes} == sizes and merged.objective == objective
        torch.testing.assert_close(merged.model(x, t, y), want, rtol=1e-3, atol=1e-4)
        assert describe(pathlib.Path(out))["num_heads"] == case["num_heads"]
    again = train("merged.pt")  # once more, on what was merged
    assert {k: read_header(again)["config"][k] for k in sizes} == sizes
    full = train("merged.safetensors", method="full")
    assert {k: read_model(full).config[k] for k in sizes} == sizes and read_model(full).objective == objective


def test_names_of_both_families_in_train_and_sample(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    with torch.device("meta"):
        meta = DiT(**{**model_sizes("SiT-S/8"), "depth": 12}, input_size=16, in_channels=3, num_classes=2)
    torch.manual_seed(0)
    state = {key: torch.randn(value.shape) * 0.02 for key, value in meta.state_dict().items()}
    torch.save(state, "c.pt")
    images = digits(tmp_path / "images", classes=2, each=4)
    words = flags(data_path=images, ckpt="c.pt", model="SiT-S/8", max_steps=1, global_batch_size=2)
    words = [w for i, w in enumerate(words) if w != "--model-args" and "=" not in w]
    assert main(["train", *words]) == 0
    (delta,) = pathlib.Path("results").glob("*/checkpoints/0000001.safetensors")
    assert delta.parts[1] == "000-SiT-S-8" and read_header(delta)["objective"] == "flow"
    assert (
        main(["sample", "--delta", str(delta), "--model", "SiT-S/8", "--num-sampling-steps", "1", "-o", "s.png"]) == 0
    )
    assert main(["sample", "--delta", str(delta), "--model", "DiT-S/8", "-o", "s.png"]) == 2
    assert "predicts by ddpm" in capsys.readouterr().err
    assert main(["train", *words, "--objective", "ddpm"]) == 2
    assert "predicts by flow" in capsys.readouterr().err


def test_a_base_that_has_moved_says_where_its_name_came_from(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(RAW.state_dict(), "c.pt")
    images = digits(tmp_path / "images", each=4)
    words = [w for w in flags(data_path=images, ckpt="c.pt", max_steps=1) if w != "--model-args" and "=" not in w]
    assert main(["train", *words]) == 0
    (delta,) = pathlib.Path("results").glob("*/checkpoints/0000001.safetensors")
    pathlib.Path("c.pt").rename("moved.pt")
    assert main(["sample", "--delta", str(delta), "-o", "s.png"]) == 2
    message = capsys.readouterr().err
    assert (
        "checkpoint not found: c.pt" in message and "config.yaml names as the base" in message and "--ckpt" in message
    )


def test_a_state_dict_made_by_any_dit_carries_its_record_through_wrappers(tmp_path) -> None:
    wrapped = torch.nn.Sequential(OrderedDict(module=model(num_heads=12)))
    torch.save({"model": wrapped.state_dict()}, tmp_path / "c.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_model(tmp_path / "c.pt").config["num_heads"] == 12
