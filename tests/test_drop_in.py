"""The import swapped in the public training scripts, of DiT and of SiT; and SiT as a family of its own, velocity and all."""

from __future__ import annotations

import argparse
from collections import OrderedDict
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from training import TINY, digits, flags

import difffit_fast
from difffit_fast import (
    DiffFitError,
    DiT,
    DiT_models,
    FastDiffFitDiT,
    FastDiffFitDiT_models,
    Sampler,
    create_diffusion,
    load_model,
)
from difffit_fast.baselines.plain_difffit import PlainDiffFitDiT
from difffit_fast.cli import main
from difffit_fast.diffusion import FlowMatching
from difffit_fast.errors import DeltaMismatchError
from difffit_fast.models.checkpoint import read_model
from difffit_fast.models.header import read_header
from difffit_fast.models.sizes import MODEL_NAMES, model_sizes
from difffit_fast.train import TrainConfig, Trainer

SIZES = dict(input_size=8, patch_size=2, in_channels=4, hidden_size=48, depth=2, num_heads=3, num_classes=5)


def lively(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random everywhere, gates included; γ and LayerNorm near 1."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name != "pos_embed":
                near = ".gamma" in name or (".norm" in name and name.endswith("weight"))
                p.copy_(torch.randn(p.shape, generator=g) * 0.1 + near)
    return model


def inputs(n: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, 4, 8, 8, generator=g), torch.rand(n, generator=g), torch.tensor([0, 3] * (n // 2))


# ------------------------------------------------------------------------------------------------------ dictionaries


@pytest.mark.parametrize("models, kind", [(DiT_models, DiT), (FastDiffFitDiT_models, FastDiffFitDiT)])
def test_every_published_name_has_a_constructor(models, kind) -> None:
    assert tuple(models) == MODEL_NAMES and len(models) == 24
    for name, build in models.items():
        with torch.device("meta"):
            model = build(input_size=32, num_classes=7)
        assert type(model) is kind and model.objective == ("flow" if name.startswith("SiT") else None)
        assert model.config == DiT(**SIZES).config | model_sizes(name) | dict(input_size=32, num_classes=7)
    with torch.device("meta"):
        assert models["DiT-S/8"](depth=1, learn_sigma=False).config["depth"] == 1  # what is said goes before the name
    assert difffit_fast.FastDiffFitDiT_models is FastDiffFitDiT_models


@pytest.fixture
def alone():
    """A process group of one, as torchrun with one process makes it."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@torch.no_grad()
def update_ema(ema_model: nn.Module, model: nn.Module, decay: float = 0.9999) -> None:
    averages, parameters = OrderedDict(ema_model.named_parameters()), OrderedDict(model.named_parameters())
    for name, parameter in parameters.items():
        averages[name].mul_(decay).add_(parameter.data, alpha=1 - decay)


def transport_losses(model: nn.Module, x1: Tensor, model_kwargs: dict) -> dict[str, Tensor]:
    """What SiT's own code asks of a model: the shape of its input, asserted."""
    t, x0 = torch.rand(len(x1)), torch.randn_like(x1)
    time = t.view(-1, 1, 1, 1)
    output = model(time * x1 + (1 - time) * x0, t, **model_kwargs)
    assert output.size() == x1.size()
    return {"loss": ((output - (x1 - x0)) ** 2).flatten(1).mean(1)}


@pytest.mark.parametrize("name", ["DiT-S/8", "SiT-S/8"])
def test_what_the_public_training_scripts_call(name: str, alone: None, tmp_path: Path) -> None:
    """The order and the calls of the scripts, with the models' import swapped and nothing else."""
    torch.manual_seed(0)
    models, flow = FastDiffFitDiT_models, name.startswith("SiT")
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=str, choices=list(models.keys()), default="DiT-XL/2")
    args = parser.parse_args(["--model", name])
    model = models[args.model](input_size=8, num_classes=10, depth=2)  # two of the twelve blocks, to save time
    ema = deepcopy(model)
    for p in ema.parameters():
        p.requires_grad = False
    model = nn.parallel.DistributedDataParallel(model)
    diffusion = create_diffusion(timestep_respacing="")
    frozen = {n: p.detach().clone() for n, p in model.module.named_parameters() if not p.requires_grad}
    assert 0 < model.module.num_trainable < 0.02 * sum(p.numel() for p in model.parameters())
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)
    update_ema(ema, model.module, decay=0)
    model.train()
    ema.eval()
    for _ in range(2):
        x, y = torch.randn(4, 4, 8, 8), torch.randint(0, 10, (4,))
        if flow:
            losses = transport_losses(model, x, dict(y=y))
        else:
            t = torch.randint(0, diffusion.num_timesteps, (x.shape[0],))
            losses = diffusion.training_losses(model, x, t, dict(y=y))
        loss = losses["loss"].mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        update_ema(ema, model.module, decay=0.9)
    model.eval()
    own = OrderedDict(model.module.named_parameters())
    assert all(torch.equal(own[n], p) for n, p in frozen.items())
    bias = "final_layer.linear.bias"
    average = ema.state_dict()[bias]
    assert own[bias].abs().sum() > 0 and 0 < average.abs().sum() < own[bias].abs().sum()

    checkpoint = {"model": model.module.state_dict(), "ema": ema.state_dict(), "opt": opt.state_dict(), "args": args}
    torch.save(checkpoint, tmp_path / "0000002.pt")
    with torch.serialization.safe_globals([argparse.Namespace]):
        state = torch.load(tmp_path / "0000002.pt")
    fresh = models[name](input_size=8, num_classes=10, depth=2)
    fresh.load_state_dict(state["ema"])
    z, t, y = torch.randn(2, 4, 8, 8), torch.full((2,), 0.5), torch.tensor([1, 2])
    fresh.eval()
    with torch.no_grad():
        assert torch.equal(fresh(z, t, y), ema(z, t, y))
        kwargs = dict(y=torch.cat([y, torch.full((2,), 10)]), cfg_scale=4.0)
        doubled = torch.cat([z, z])
        if flow:
            assert ema.forward_with_cfg(doubled, torch.full((4,), 0.5), **kwargs).shape == doubled.shape
        else:
            samples = create_diffusion(str(3)).p_sample_loop(
                ema.forward_with_cfg, doubled.shape, doubled, clip_denoised=False, model_kwargs=kwargs, progress=False,
                device="cpu",
            )  # fmt: skip
            assert samples.chunk(2, dim=0)[0].isfinite().all()
    file = read_model(tmp_path / "0000002.pt")
    assert file.is_difffit and file.name == f"{name[:3]}-custom" and file.objective == ("flow" if flow else None)


# --------------------------------------------------------------------------------------------------------------- SiT


def test_a_sit_is_a_dit_whose_variance_is_dropped() -> None:
    x, t, y = inputs()
    plain, dit = lively(DiT(**SIZES, objective="flow")).eval(), lively(DiT(**SIZES)).eval()
    assert plain.state_dict().keys() == dit.state_dict().keys() and plain.out_channels == 8
    assert torch.equal(plain(x, t, y), dit(x, t, y)[:, :4])
    for kind in (FastDiffFitDiT, PlainDiffFitDiT):
        sit, whole = lively(kind(**SIZES, objective="flow")).eval(), lively(kind(**SIZES)).eval()
        assert sit(x, t, y).shape == x.shape and torch.equal(sit(x, t, y), whole(x, t, y)[:, :4])
        noise = torch.randn_like(x)
        for model in (sit, whole):
            FlowMatching().training_losses(model, x, t, dict(y=y), noise)["loss"].mean().backward()
        for (name, p), q in zip(sit.named_parameters(), whole.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None) and (p.grad is None or torch.equal(p.grad, q.grad)), name
    doubled = sit.forward_with_cfg(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, torch.full((2,), 5)]), 3.0)
    assert doubled.shape == (4, 4, 8, 8)
    half = DiT(**SIZES, learn_sigma=False, objective="flow")
    assert half(x, t, y).shape == x.shape
    with pytest.raises(ValueError, match="objective must be 'ddpm', 'flow' or None, got 'edm'"):
        DiT(**SIZES, objective="edm")


def test_what_becomes_of_a_sit_is_one(tmp_path: Path) -> None:
    x, t, y = inputs()
    sit = lively(DiT(**SIZES, objective="flow")).eval()
    want = sit(x, t, y)
    torch.save({"ema": sit.state_dict()}, tmp_path / "sit.pt")
    assert read_model(tmp_path / "sit.pt").objective == "flow"
    fast = FastDiffFitDiT.from_pretrained(tmp_path / "sit.pt").eval()
    copies = {
        "from_dit": FastDiffFitDiT.from_dit(sit), "from_pretrained": fast, "deepcopy": deepcopy(fast),
        "merge": fast.merge(), "load_model": load_model(tmp_path / "sit.pt").model,
    }  # fmt: skip
    fast.save_delta(tmp_path / "delta.safetensors")
    assert read_header(tmp_path / "delta.safetensors")["objective"] == "flow"
    for merge in (False, True):
        loaded = load_model(tmp_path / "sit.pt", tmp_path / "delta.safetensors", merge=merge)
        assert loaded.objective == "flow"
        copies[f"delta, merge={merge}"] = loaded.model
    for name, model in copies.items():
        assert model.objective == "flow", name
        torch.testing.assert_close(model.eval()(x, t, y), want, rtol=1e-4, atol=1e-5, msg=name)


def test_a_file_that_does_not_say_so(tmp_path: Path) -> None:
    sit = lively(DiT(**SIZES, objective="flow"))
    torch.save(dict(sit.state_dict()), tmp_path / "bare.pt")  # as the public one
    assert FastDiffFitDiT.from_pretrained(tmp_path / "bare.pt", num_heads=3).objective is None
    fast = FastDiffFitDiT.from_pretrained(tmp_path / "bare.pt", num_heads=3, objective="flow")
    fast.save_delta(tmp_path / "delta.safetensors")
    x, t, y = inputs()
    loaded = load_model(tmp_path / "bare.pt", tmp_path / "delta.safetensors")  # the delta says so
    assert loaded.model(x, t, y).shape == x.shape
    torch.save(sit.state_dict(), tmp_path / "sit.pt")
    with pytest.raises(DiffFitError, match="was trained with flow; objective ddpm was asked for"):
        FastDiffFitDiT.from_pretrained(tmp_path / "sit.pt", objective="ddpm")
    other = FastDiffFitDiT.from_pretrained(tmp_path / "bare.pt", num_heads=3, objective="ddpm")
    with pytest.raises(DeltaMismatchError, match="was made for the objective flow; the model has ddpm"):
        other.load_delta(tmp_path / "delta.safetensors")


def test_samplers_of_the_other_family_are_refused() -> None:
    sit, dit = DiT(**SIZES, objective="flow"), DiT(**SIZES, objective="ddpm")
    with pytest.raises(
        DiffFitError, match=r"ddpm is not for a model of the objective flow, which takes euler, .*, sde"
    ):
        Sampler(sit, "ddpm", 2)
    with pytest.raises(DiffFitError, match="sde is not for a model of the objective ddpm, which takes ddpm, ddim"):
        Sampler(dit, "sde", 2)
    for sampler in ("euler", "heun", "dopri5", "sde"):
        made = Sampler(lively(sit), sampler, 3, 2.0).sample([0, 4], decode=False)
        whole = lively(DiT(**SIZES))
        torch.testing.assert_close(made, Sampler(whole, sampler, 3, 2.0).sample([0, 4], decode=False))


@pytest.mark.parametrize("method", ["difffit", "full", "class_embedding"])
def test_the_trainer_trains_a_sit(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    images = digits(tmp_path / "images", each=4)
    base = lively(DiT(input_size=16, in_channels=3, num_classes=3, **TINY, objective="flow"))
    torch.save(base.state_dict(), "base.pt")
    words = [w for w in flags(data_path=images, ckpt="base.pt", max_steps=1, method=method) if "=" not in w]
    assert main(["train", *(w for w in words if w != "--model-args")]) == 0
    (written,) = Path("results").glob("*/checkpoints/0000001.safetensors")
    assert read_header(written)["objective"] == "flow"
    if method != "class_embedding":
        loaded = load_model("base.pt", written) if method == "difffit" else load_model(written)
        x = torch.randn(1, 3, 16, 16)
        assert loaded.model(x, torch.tensor([0.5]), torch.tensor([0])).shape == x.shape
        assert main(["sample", *(["--ckpt", "base.pt", "--delta"] if method == "difffit" else ["--ckpt"]), str(written),
                     "--sampler", "sde", "--num-sampling-steps", "2", "-o", "s.png"]) == 0  # fmt: skip


def test_the_trainer_asks_a_model_what_it_is(tmp_path: Path) -> None:
    settings = dict(
        data_path=str(digits(tmp_path / "images", each=4)), vae="none", image_size=16, device="cpu", precision="fp32",
        num_workers=0, max_steps=1, global_batch_size=4, results_dir=str(tmp_path), progress=False,
    )  # fmt: skip
    sit = FastDiffFitDiT(input_size=16, in_channels=3, num_classes=3, **TINY, objective="flow")
    trainer = Trainer(TrainConfig(**settings), model=sit)
    assert trainer.objective.name == "flow"
    with pytest.raises(DiffFitError, match="--objective ddpm was asked for, but the model predicts by flow"):
        Trainer(TrainConfig(**settings, objective="ddpm"), model=sit)
