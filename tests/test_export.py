"""``difffit export`` and its way back: an ordinary DiT, a pipeline of diffusers, a folder to publish."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from training import digits, flags

from difffit_fast import DiffFitError, DiT, FastDiffFitDiT, create_diffusion, load_model
from difffit_fast.cli import main
from difffit_fast.interop import export_pipeline
from difffit_fast.models.checkpoint import read_model
from difffit_fast.models.diffusers_keys import TimestepFrequenciesWarning, to_diffusers
from difffit_fast.models.header import read_header

SIZES = dict(input_size=8, patch_size=2, in_channels=4, hidden_size=48, depth=2, num_heads=3, num_classes=5)


def lively(dit: DiT, seed: int = 0) -> DiT:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in dit.named_parameters():
            if name != "pos_embed":
                p.copy_(torch.randn(p.shape, generator=g) * 0.1 + (".gamma" in name))
    return dit.eval()


def inputs(classes: int, n: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    x, t = torch.randn(n, 4, 8, 8, generator=g), torch.tensor([0, 7, 500, 999])
    return x, t, torch.tensor([0, 1, classes - 1, classes // 2])


def tiny_vae(folder: Path) -> Path:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), norm_num_groups=4, layers_per_block=1, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def read_pipeline(folder: Path):
    diffusers = pytest.importorskip("diffusers")
    pipe = diffusers.DiTPipeline.from_pretrained(folder, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("classes", [5, 1000, 1003])
@pytest.mark.parametrize("scale, sigma", [(1.0, True), (0.5, False)])
def test_diffusers_computes_the_same(tmp_path: Path, classes: int, scale: float, sigma: bool) -> None:
    dit = DiT(**SIZES | dict(num_classes=classes), learn_sigma=sigma)
    if scale != 1:
        from difffit_fast.models.dit import sincos_pos_embed

        dit.pos_embed.data.copy_(sincos_pos_embed(48, 4, scale)[None])
        dit.pos_embed_scale = scale
    lively(dit)
    export_pipeline(dit, tmp_path / "pipe", vae=tiny_vae(tmp_path / "vae"))
    pipe = read_pipeline(tmp_path / "pipe")
    x, t, y = inputs(classes)
    rows = torch.tensor(pipe.get_label_ids([str(int(label)) for label in y]))
    with torch.no_grad():
        want, got = dit(x, t, y), pipe.transformer(x, timestep=t, class_labels=rows).sample
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        null = torch.full((4,), classes)
        got = pipe.transformer(x, timestep=t, class_labels=torch.full((4,), 1000)).sample
        torch.testing.assert_close(got, dit(x, t, null), rtol=1e-5, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        file = read_model(tmp_path / "pipe")
    back = file.dit()
    assert back.config == dit.config and back.pos_embed_scale == scale and file.objective == "ddpm"
    for name, tensor in dit.state_dict().items():
        if name == "pos_embed":
            torch.testing.assert_close(back.state_dict()[name], tensor)
        else:
            assert torch.equal(back.state_dict()[name], tensor), name
    assert file.header["class_names"] == [str(i) for i in range(classes)]


def test_the_pipeline_draws_our_samples(tmp_path: Path) -> None:
    dit = lively(DiT(**SIZES))
    export_pipeline(dit, tmp_path / "pipe", class_names=list("abcde"), vae=tiny_vae(tmp_path / "vae"))
    pipe = read_pipeline(tmp_path / "pipe")
    assert pipe.get_label_ids(["d", "b"]) == [3, 1]
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    y = torch.tensor([3, 1, 5, 5])
    z = create_diffusion("ddim5").ddim_sample_loop(
        dit.forward_with_cfg, (4, 4, 8, 8), torch.cat([noise, noise]), clip_denoised=False,
        model_kwargs=dict(y=y, cfg_scale=3.0, cfg_channels="all"),
    )[:2]  # fmt: skip
    with torch.no_grad():
        want = (pipe.vae.decode(z / pipe.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    got = pipe([3, 1], 3.0, torch.Generator().manual_seed(7), 5, output_type="pt").images
    if isinstance(got, np.ndarray):  # before diffusers 0.40
        got = torch.from_numpy(got).permute(0, 3, 1, 2)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert want.std() > 0.01
    pipe.save_pretrained(tmp_path / "again")  # as its users do
    assert torch.equal(
        read_model(tmp_path / "again").dit().state_dict()["x_embedder.proj.weight"], dit.x_embedder.proj.weight
    )


def test_a_model_trained_in_diffusers_is_read_and_its_frequencies_are_told(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    stock = diffusers.DiTTransformer2DModel(
        num_attention_heads=3, attention_head_dim=16, num_layers=2, sample_size=8, num_embeds_ada_norm=5, out_channels=8,
    )  # fmt: skip
    one = stock.transformer_blocks[0].norm1.emb.state_dict()
    stock.transformer_blocks[1].norm1.emb.load_state_dict(one)
    stock.save_pretrained(tmp_path / "transformer")
    with pytest.warns(TimestepFrequenciesWarning, match="by 127, a DiT by 128"):
        file = read_model(tmp_path / "transformer")
    dit = file.dit().eval()
    assert dit.config == DiT(**SIZES).config
    x, _, y = inputs(5)
    t = torch.zeros(4, dtype=torch.long)  # where all frequencies agree
    with torch.no_grad():
        want = stock.eval()(x, timestep=t, class_labels=y).sample
    torch.testing.assert_close(dit(x, t, y), want, rtol=1e-4, atol=1e-4)

    with torch.no_grad():
        stock.transformer_blocks[1].norm1.emb.class_embedder.embedding_table.weight[0] += 1
    stock.save_pretrained(tmp_path / "apart")
    with (
        pytest.warns(TimestepFrequenciesWarning),
        pytest.raises(DiffFitError, match="block 1 has another norm1.emb.class"),
    ):
        read_model(tmp_path / "apart")


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    export_pipeline(lively(DiT(**SIZES)), tmp_path / "pipe")
    return tmp_path / "pipe"


@pytest.mark.parametrize(
    "change, message",
    {
        "norm": ({"norm_type": "layer_norm"}, "has norm_type 'layer_norm'; a DiT has ada_norm_zero"),
        "class": ({"_class_name": "PixArtTransformer2DModel"}, "has _class_name 'PixArtTransformer2DModel'"),
        "size": ({"sample_size": -8}, "sample_size in config.json should be a number from 1 to .*; it is -8"),
        "heads": ({"num_attention_heads": "many"}, "num_attention_heads in config.json should be a number"),
        "dropout": (
            {"class_dropout_prob": "often"},
            "class_dropout_prob in config.json should be a number from 0 to 1",
        ),
        "scale": ({"pos_embed_scale": None, "num_attention_heads": 5}, "makes no DiT|heads"),
        "positions": ({"pos_embed_scale": [1]}, "pos_embed_scale in config.json should be a number"),
        "classes": ({"num_classes": 2000}, "records 2000 classes, but its table has 1001 rows"),
    }.values(),
)
def test_configurations_that_are_no_dit(pipeline: Path, change: dict, message: str) -> None:
    path = pipeline / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DiffFitError, match=message):
        read_model(pipeline)


def test_keys_that_are_no_dit(pipeline: Path, tmp_path: Path) -> None:
    weights = pipeline / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    save_file({**state, "caption_projection.weight": torch.ones(2)}, weights)
    with pytest.raises(DiffFitError, match="has the unknown key 'caption_projection.weight'"):
        read_model(pipeline)
    lost = state.pop("proj_out_2.bias")
    save_file(state, weights)
    with pytest.raises(DiffFitError, match="lacks proj_out_2.bias"):
        read_model(pipeline)
    save_file({**state, "proj_out_2.bias": lost * float("nan")}, weights)
    with pytest.raises(DiffFitError, match="NaN"):
        read_model(pipeline)
    flat = state["pos_embed.proj.weight"].flatten()
    save_file({**state, "proj_out_2.bias": lost, "pos_embed.proj.weight": flat}, weights)
    with pytest.raises(DiffFitError, match="pos_embed.proj.weight should have 4 dimensions"):
        read_model(pipeline)
    narrow = state["transformer_blocks.0.attn1.to_k.weight"][:, :7].contiguous()
    save_file({**state, "proj_out_2.bias": lost, "transformer_blocks.0.attn1.to_k.weight": narrow}, weights)
    with pytest.raises(DiffFitError, match=r"weights of transformer_blocks.0.attn1 do not fit each other"):
        read_model(pipeline)
    save_file({**state, "proj_out_2.bias": lost}, tmp_path / "alone.safetensors")
    with pytest.raises(DiffFitError, match="keys of diffusers and no config.json beside it"):
        read_model(tmp_path / "alone.safetensors")


def test_models_that_the_pipeline_cannot_sample(tmp_path: Path) -> None:
    out = tmp_path / "pipe"
    for model, message in (
        (DiT(**SIZES, objective="flow"), "predicts a velocity"),
        (DiT(**SIZES | dict(in_channels=1)), "latents of 4 channels .* this model has 1"),
        (DiT(**SIZES, mlp_ratio=2.0), "mlp_ratio of 4; this model has 2.0"),
        (FastDiffFitDiT(**SIZES), "expected a plain DiT"),
    ):
        with pytest.raises(DiffFitError, match=message):
            export_pipeline(model, out)
    with pytest.raises(DiffFitError, match="expected 5 class names; got 2"):
        export_pipeline(DiT(**SIZES), out, class_names=["a", "b"])
    for nameless in (".", tmp_path / ".."):
        with pytest.raises(DiffFitError, match="a folder with a name of its own"):
            export_pipeline(DiT(**SIZES), nameless, overwrite=True)
    with pytest.raises(DiffFitError, match="holds no VAE"):
        export_pipeline(DiT(**SIZES), out, vae=tmp_path)
    assert not list(tmp_path.iterdir())  # nothing half done
    out.mkdir()
    (out / "mine").write_text("kept")
    with pytest.raises(DiffFitError, match="has something in it"):
        export_pipeline(DiT(**SIZES), out)
    assert [p.name for p in tmp_path.iterdir()] == ["pipe"] and (out / "mine").exists()
    export_pipeline(DiT(**SIZES), out, overwrite=True)
    assert not (out / "mine").exists() and [p.name for p in tmp_path.iterdir()] == ["pipe"]


def test_a_table_without_a_null_class(tmp_path: Path) -> None:
    dit = lively(DiT(**SIZES, class_dropout_prob=0.0))
    export_pipeline(dit, tmp_path / "pipe")
    assert (
        to_diffusers(dit.state_dict(), 5)["transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight"].shape[
            0
        ]
        == 1001
    )
    back = read_model(tmp_path / "pipe").dit()
    assert back.config == dit.config and torch.equal(
        back.y_embedder.embedding_table.weight, dit.y_embedder.embedding_table.weight
    )


def test_the_walk_through_diffusers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """A directory of diffusers is trained, exported and sampled from by diffusers: the images are ours."""
    monkeypatch.chdir(tmp_path)
    base = lively(DiT(**SIZES | dict(num_classes=3)))
    export_pipeline(base, "base", class_names=["digit0", "digit1", "digit2"], vae=tiny_vae(tmp_path / "vae"))
    assert main(["inspect", "base"]) == 0
    size = sum(file.stat().st_size for file in Path("base").rglob("*") if file.is_file()) / 2**20
    assert f"{size:.2f} MiB in all files of the folder" in capsys.readouterr().out and size > 0.1
    images = digits(tmp_path / "images", each=4)
    words = [
        w for w in flags(data_path=images, ckpt="base", max_steps=2, image_size=64, vae="base/vae") if "=" not in w
    ]
    assert main(["train", *(w for w in words if w != "--model-args")]) == 0
    (delta,) = Path("results").glob("*/checkpoints/0000002.safetensors")
    assert main(["export", "--to", "diffusers", "--delta", str(delta), "--out", "tuned"]) == 0
    assert 'DiTPipeline.from_pretrained("tuned", trust_remote_code=True)' in capsys.readouterr().out
    pipe = read_pipeline(Path("tuned"))
    merged = load_model("base", delta, merge=True)
    assert merged.class_names == list(pipe.labels) == ["digit0", "digit1", "digit2"]
    assert not torch.equal(merged.model.final_layer.linear.bias, base.final_layer.linear.bias)
    x, t, _ = inputs(3)
    y = torch.tensor([0, 2, 1, 1])
    with torch.no_grad():
        got = pipe.transformer(x, timestep=t, class_labels=y).sample
        torch.testing.assert_close(got, merged.model(x, t, y), rtol=1e-5, atol=1e-5)
    assert main(["sample", "--ckpt", "tuned", "--num-sampling-steps", "2", "-o", "ours.png"]) == 0  # with its VAE


def test_a_folder_to_publish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    images = digits(tmp_path / "images", each=4)
    assert (
        main(
            [
                "train",
                *flags(
                    data_path=images,
                    max_steps=2,
                    sample_every=2,
                    num_samples=3,
                    val_fraction=0.3,
                    val_every=1,
                    ckpt_every=1,
                ),
            ]
        )
        == 0
    )
    (delta,) = Path("results").glob("*/checkpoints/0000002.safetensors")
    command = ["export", "--to", "hub", "--delta", str(delta), "--out", "published"]
    assert main([*command, "--license", "cc-by-4.0", "--base-model", "someone/dit"]) == 0
    assert sorted(p.name for p in Path("published").iterdir()) == ["README.md", "delta.safetensors", "samples.png"]
    text = Path("published/README.md").read_text()
    for part in (
        "license: cc-by-4.0", "base_model: someone/dit", "| classes | 3: digit0, digit1, digit2 |", "val_loss", "max_steps: 2",
        "method: difffit", read_header(delta)["base_hash"], "difffit sample --ckpt", "![Samples of the run](samples.png)",
    ):  # fmt: skip
        assert part in text, part
    import yaml

    assert yaml.safe_load(text.split("---")[1])["tags"] == ["diffusion-transformer", "difffit"]
    assert main(command) == 2 and main([*command, "--overwrite"]) == 0
    assert "**not said**" in Path("published/README.md").read_text()

    assert main([*command, "--overwrite", "--ckpt", "none.pt"]) == 2  # a base that it does not belong to is not named
    assert "**not said**" in Path("published/README.md").read_text()
    early = delta.with_name("0000001.safetensors")  # what the run measured and drew later is not of it
    assert main(["export", "--to", "hub", "--delta", str(early), "--out", "early"]) == 0
    assert not Path("early/samples.png").exists() and "| 2 |" not in Path("early/README.md").read_text()

    torch.save(lively(DiT(**SIZES)).state_dict(), "base.pt")
    assert main([*command, "--overwrite", "--ckpt", "base.pt"]) == 2
    assert main(["export", "--to", "hub", "--ckpt", "base.pt", "--out", "whole"]) == 0
    whole = read_model("whole/model.safetensors").dit()
    assert torch.equal(whole.pos_embed, DiT(**SIZES).pos_embed) and whole.config == DiT(**SIZES).config


def test_a_model_without_a_delta_is_exported_too(tmp_path: Path, capsys) -> None:
    dit = lively(DiT(**SIZES))
    export_pipeline(dit, tmp_path / "pipe")
    out = tmp_path / "dit.pt"
    assert main(["export", "--to", "dit", "--ckpt", str(tmp_path / "pipe"), "--out", str(out)]) == 0
    state = torch.load(out)
    assert state.keys() == dit.state_dict().keys() and torch.equal(
        state["blocks.1.attn.qkv.weight"], dit.blocks[1].attn.qkv.weight
    )
    for words, message in (
        (["--to", "dit", "--out", "x.pt"], "--ckpt or --delta is needed"),
        (
            ["--to", "dit", "--ckpt", str(out), "--out", "x.pt", "--vae", "v"],
            "--vae is for --to diffusers; got --to dit",
        ),
        (["--to", "onnx", "--ckpt", str(out), "--out", "x"], "invalid choice: 'onnx'"),
    ):
        assert main(["export", *words]) == 2 and message in capsys.readouterr().err
