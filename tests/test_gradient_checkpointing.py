"""Blocks that are computed again in the backward pass: the same bits, less memory, in every way to train."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from recording import Recorder
from torch import Tensor, nn
from training import SETTINGS, TINY, digits

from difffit_fast import DiT, baselines
from difffit_fast.baselines.plain_difffit import PlainDiffFitDiT
from difffit_fast.errors import DiffFitError
from difffit_fast.train import TrainConfig, Trainer
from difffit_fast.train.track import read_metrics

METHODS = ("difffit", "bitfit", "full", "lora", "adapter", "vpt", "class_embedding")
SIZES = dict(input_size=16, in_channels=3, hidden_size=48, num_heads=2, patch_size=4, num_classes=3)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return digits(tmp_path_factory.mktemp("digits"))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def shaken(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name != "pos_embed":
                p.add_(torch.randn_like(p) * 0.05)
    return model


def model_of(method: str, depth: int = 6) -> nn.Module:
    torch.manual_seed(0)
    sizes = {**SIZES, "depth": depth}
    if method == "plain difffit":
        return shaken(PlainDiffFitDiT(**sizes))
    if method == "plain":
        return shaken(DiT(**sizes))
    if method == "lora":
        pytest.importorskip("peft")
    return shaken(baselines.apply(method, shaken(DiT(**sizes))))


def gradients(model: nn.Module, call: Callable[..., Tensor] | None = None) -> tuple[dict[str, Tensor], int]:
    """The gradients of a loss, and the bytes that its forward pass kept beside the parameters."""
    generator = torch.Generator().manual_seed(2)
    x, y = torch.randn(4, 3, 16, 16, generator=generator), torch.tensor([0, 1, 2, 3])
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.eval().zero_grad(set_to_none=True)  # labels are not dropped
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = (model if call is None else call)(x, torch.tensor([0.0, 10.0, 500.0, 999.0]), y).square().mean()
    bytes_kept = sum(kept.values())
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, bytes_kept


@pytest.mark.parametrize("method", ["plain", "plain difffit", *METHODS])
def test_the_same_gradients_from_less_memory(method: str) -> None:
    model = model_of(method)
    assert model.gradient_checkpointing is False
    want, much = gradients(model)
    model.gradient_checkpointing = True
    got, little = gradients(model)
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
    assert any(bool(g.any()) for name, g in got.items() if name.startswith("blocks.0.")) or method == "class_embedding"
    assert little < (0.6 if method == "class_embedding" else 0.45) * much
    with torch.no_grad():
        model(torch.zeros(1, 3, 16, 16), torch.zeros(1), torch.zeros(1, dtype=torch.long))  # nothing to compute again


def make(images: Path, folder: Path, model: nn.Module | None = None, **changes: object) -> Trainer:
    settings = {**SETTINGS, "data_path": str(images), "results_dir": str(folder), "ckpt_every": 2, "max_steps": 4}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Trainer(model=model, **{**settings, **changes})


@pytest.mark.parametrize("changes", [{}, {"precision": "bf16"}, {"accumulate": 3, "val_fraction": 0.25}], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_a_run_with_it_equals_one_without(images: Path, tmp_path: Path, method: str, changes: dict) -> None:
    """Eager and from a graph; and a run may go on with it that began without."""
    if method == "lora":
        pytest.importorskip("peft")
    results = []
    for name, settings in (
        ("without", {}),
        ("with", {"gradient_checkpointing": True}),
        ("captured", {"gradient_checkpointing": True}),
        ("half", {"max_steps": 2}),
        ("half", {"gradient_checkpointing": True, "resume": "auto"}),
    ):
        trainer = make(images, tmp_path / name, method=method, **changes, **settings)
        assert trainer.model.gradient_checkpointing == bool(settings.get("gradient_checkpointing"))
        if name == "captured":
            trainer.stepper.capture = Recorder()
        results.append(trainer.train())
        if name == "captured":
            assert trainer.stepper.capture.captures == 1 and trainer.stepper.capture.replays == 4
    del results[3]
    first = results[0].folder / "checkpoints" / "0000004.state" / "tensors.safetensors"
    losses = [m["loss"] for m in read_metrics(results[0].folder) if "loss" in m]
    for result in results[1:]:
        assert (
            result.folder / "checkpoints" / "0000004.state" / "tensors.safetensors"
        ).read_bytes() == first.read_bytes()
        assert [m["loss"] for m in read_metrics(result.folder) if "loss" in m] == losses
    assert len(losses) == 4


@pytest.mark.parametrize("method", ["plain", "difffit"])
def test_under_torch_compile(method: str) -> None:
    """Traced and divided into forward and backward as ever; no code is made of it, which takes minutes."""
    model = model_of(method, depth=2)
    want, much = gradients(model)
    model.gradient_checkpointing = True
    torch._dynamo.reset()
    got, little = gradients(model, torch.compile(model, fullgraph=True, backend="aot_eager_decomp_partition"))
    assert got.keys() == want.keys() and little < 0.8 * much
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5)


class Foreign(nn.Module):
    """A model from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = DiT(input_size=16, in_channels=3, num_classes=3, **TINY)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.inner(x, t, y)


def with_dropout(p: float) -> DiT:
    model = DiT(input_size=16, in_channels=3, num_classes=3, **TINY)
    model.blocks[1].mlp.act = nn.Sequential(model.blocks[1].mlp.act, nn.Dropout(p))
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Foreign, "--gradient-checkpointing is for models of this package, not for Foreign"),
        (lambda: with_dropout(0.1), r"blocks.1.mlp.act.1 is random: Dropout\(p=0.1"),
    ],
)
def test_what_cannot_be_computed_twice_is_refused(images: Path, tmp_path: Path, model: Callable, message: str) -> None:
    with pytest.raises(DiffFitError, match=message):
        make(images, tmp_path, model(), gradient_checkpointing=True)
    make(images, tmp_path, model())
    make(images, tmp_path, with_dropout(0.0), gradient_checkpointing=True)


def test_it_does_not_steer() -> None:
    assert TrainConfig().differences({**TrainConfig().to_dict(), "gradient_checkpointing": True}) == {}
