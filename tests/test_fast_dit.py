"""FastDiffFitDiT against plain PyTorch with the same parameters: loss, every gradient, many steps, every way to run it."""

from __future__ import annotations

import copy
import gc
import io
import weakref

import pytest
import torch
from optest import rooms
from torch import Tensor

from difffit_fast import DiffFitConfig, DiffFitError, DiT, FastDiffFitDiT
from difffit_fast.baselines.plain_difffit import PlainDiffFitDiT
from difffit_fast.models.vectors import modulation_linears, proj_weights
from difffit_fast.ops import use_kernels
from difffit_fast.ops.weights import together

SMALL = dict(input_size=8, patch_size=2, hidden_size=48, depth=4, num_heads=3, num_classes=5)
PRESETS = ["paper", "minimax", "block", "bitfit"]


def shake(model: torch.nn.Module, amount: float = 0.1) -> torch.nn.Module:
    """Away from the initial values, where gates are closed and γ is 1."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(amount * torch.randn_like(p))
    return model


def pair(preset: str | DiffFitConfig = "paper", dtype: torch.dtype = torch.float32, **kwargs) -> tuple:
    plain = shake(PlainDiffFitDiT(**SMALL, difffit=preset)).to(dtype)
    fast = FastDiffFitDiT(**SMALL, difffit=preset, **kwargs)
    if kwargs.get("compute_dtype") is None:
        fast = fast.to(dtype)
    fast.load_state_dict(plain.state_dict())
    return plain, fast


def batch(n: int = 3, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(n, 4, 8, 8).to(dtype), torch.randint(0, 1000, (n,)), torch.randint(0, 6, (n,))


def loss_and_grads(model: torch.nn.Module, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(7)  # label dropout draws the same labels
    model.zero_grad()
    out = model(x, t, y).double()
    g = torch.Generator().manual_seed(3)
    loss = (out * torch.randn(out.shape, generator=g, dtype=torch.float64)).mean() + out.square().mean()
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def worst(grads: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """Error of each gradient relative to its norm (the key bias, whose gradient is 0, counts with its qkv bias)."""
    errors = {}
    for name, want in truth.items():
        got, want = grads[name].double(), want.double()
        errors[name] = ((got - want).norm() / want.norm().clamp_min(1e-12)).item()
    return errors


@pytest.mark.parametrize("kernels", rooms())
@pytest.mark.parametrize("preset", PRESETS)
def test_loss_and_every_gradient_float32(kernels: str, preset: str) -> None:
    plain, fast = pair(preset)
    inputs = batch()
    want_loss, want = loss_and_grads(plain.double(), inputs[0].double(), *inputs[1:])
    with use_kernels(kernels):
        loss, grads = loss_and_grads(fast, *inputs)
        assert set(grads) == set(want) and all(g is not None for g in grads.values())
        assert loss.item() == pytest.approx(want_loss.item(), rel=1e-6)
        errors = worst(grads, want)
        assert max(errors.values()) < 2e-5, max(errors.items(), key=lambda e: e[1])
        key_bias = [g[48:96] for n, g in grads.items() if n.endswith("qkv.bias")]
        assert all(not g.any() for g in key_bias)


@pytest.mark.parametrize("preset", PRESETS)
def test_float64_is_exact(preset: str) -> None:
    plain, fast = pair(preset, torch.float64)
    inputs = batch(dtype=torch.float64)
    want_loss, want = loss_and_grads(plain, *inputs)
    loss, grads = loss_and_grads(fast, *inputs)
    assert loss.item() == pytest.approx(want_loss.item(), rel=1e-12)
    assert max(worst(grads, want).values()) < 1e-10


@pytest.mark.parametrize("how", ["half", "compute_dtype", "autocast"])
def test_float16_on_the_cpu_runs_in_plain_pytorch(how: str) -> None:
    """No C++ kernel takes float16, on whichever side of it: auto chooses by every dtype of a call, not by the stream's."""
    plain, _ = pair()
    fast = FastDiffFitDiT(**SMALL, compute_dtype=torch.float16 if how == "compute_dtype" else None)
    fast.load_state_dict(plain.state_dict())
    fast = fast.half() if how == "half" else fast
    x, t, y = batch()
    truth, want = loss_and_grads(plain.double(), x.double(), t, y)
    with use_kernels("auto"), torch.autocast("cpu", torch.float16, enabled=how == "autocast"):
        loss, grads = loss_and_grads(fast, x.half() if how == "half" else x, t, y)
    assert abs(loss - truth) < 0.01 * abs(truth)
    errors = {name: error for name, error in worst(grads, want).items() if "qkv.bias" not in name}
    assert max(errors.values()) < 0.05, errors


@pytest.mark.parametrize("kernels", rooms())
@pytest.mark.parametrize("how", ["compute_dtype", "autocast"])
def test_bf16_errs_no_more_than_plain_pytorch_under_autocast(kernels: str, how: str) -> None:
    """At most 1.5 times the error of the plain model under autocast, for the output and every gradient.

    Errors of single tensors are noise of few bits, so each is compared as a mean over draws.
    """
    fast_error: dict[str, float] = {}
    plain_error: dict[str, float] = {}
    for seed in range(6):
        torch.manual_seed(seed)
        plain, fast = pair("paper", compute_dtype=torch.bfloat16 if how == "compute_dtype" else None)
        inputs = batch(4)
        truth_model = copy.deepcopy(plain).double()
        want_loss, want = loss_and_grads(truth_model, inputs[0].double(), *inputs[1:])
        with torch.autocast("cpu", torch.bfloat16):
            loss_p, grads_p = loss_and_grads(plain, *inputs)
        with use_kernels(kernels), torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            loss_f, grads_f = loss_and_grads(fast, *inputs)
        for errors, loss, grads in ((fast_error, loss_f, grads_f), (plain_error, loss_p, grads_p)):
            # key biases: the truth is 0, autocast returns rounding noise; compare query and value parts
            for name, error in worst(grads, want).items():
                errors[name] = errors.get(name, 0) + error
            errors["loss"] = errors.get("loss", 0) + abs(loss - want_loss).item()
    bad = {n: (e, plain_error[n]) for n, e in fast_error.items() if n != "loss" and e > 1.5 * plain_error[n]}
    assert not bad, bad


@pytest.mark.parametrize("kernels", rooms())
def test_output_error_in_bf16(kernels: str) -> None:
    fast_error = plain_error = 0.0
    for seed in range(4):
        torch.manual_seed(seed)
        plain, fast = pair("paper", compute_dtype=torch.bfloat16)
        plain.eval(), fast.eval()
        x, t, y = batch(4)
        with torch.no_grad():
            want = copy.deepcopy(plain).double()(x.double(), t, y)
            with torch.autocast("cpu", torch.bfloat16):
                plain_error += (plain(x, t, y).double() - want).norm().item()
            with use_kernels(kernels):
                fast_error += (fast(x, t, y).double() - want).norm().item()
    assert fast_error <= 1.5 * plain_error, (fast_error, plain_error)


@pytest.mark.parametrize("kernels", rooms())
def test_a_hundred_steps_stay_with_frozen_pytorch(kernels: str) -> None:
    """From one seed, AdamW on both: the losses of all steps and the final trainables agree."""
    torch.manual_seed(1)
    plain, fast = pair("paper")
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-3) for m in (plain, fast)]
    histories: list[list[float]] = [[], []]
    target = torch.randn(8, 8, 8, 8)
    x0 = torch.randn(8, 4, 8, 8)
    with use_kernels(kernels):
        for step in range(100):
            t = torch.randint(0, 1000, (8,), generator=torch.Generator().manual_seed(step))
            y = t % 5
            for model, optimizer, history in zip((plain, fast), optimizers, histories, strict=True):
                torch.manual_seed(step)
                optimizer.zero_grad()
                loss = (model(x0, t, y) - target).square().mean()
                loss.backward()
                for name, p in model.named_parameters():
                    if name.endswith(
                        "qkv.bias"
                    ):  # autograd's key-bias gradient is rounding noise that AdamW would amplify
                        p.grad[48:96] = 0
                optimizer.step()
                history.append(loss.item())
    assert histories[0][-1] < 0.9 * histories[0][0], "the reference did not learn"
    torch.testing.assert_close(torch.tensor(histories[0]), torch.tensor(histories[1]), rtol=2e-4, atol=0)
    theirs = dict(plain.named_parameters())
    for name, p in fast.named_trainable_parameters():
        moved = (theirs[name] - p).norm() / theirs[name].norm().clamp_min(1e-3)
        assert moved < 2e-3, (name, moved)


def test_the_same_bits_twice() -> None:
    _, fast = pair("paper", compute_dtype=torch.bfloat16)
    inputs = batch()
    first, second = loss_and_grads(fast, *inputs), loss_and_grads(fast, *inputs)
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(first[1][n], second[1][n]) for n in first[1])


@pytest.mark.parametrize("kernels", rooms())
def test_compile_without_graph_breaks(kernels: str) -> None:
    _, fast = pair("paper")
    inputs = batch()
    with use_kernels(kernels):
        want_loss, want = loss_and_grads(fast, *inputs)
        torch._dynamo.reset()
        fast.forward = torch.compile(fast.forward, fullgraph=True, backend="aot_eager")
        loss, grads = loss_and_grads(fast, *inputs)
    assert loss.item() == pytest.approx(want_loss.item(), rel=1e-6)
    assert max(worst(grads, want).values()) < 1e-5


def test_inductor_compiles_and_agrees() -> None:
    """The default backend too: loss and every gradient."""
    _, fast = pair("paper")
    inputs = batch()
    want_loss, want = loss_and_grads(fast, *inputs)
    torch._dynamo.reset()
    fast.forward = torch.compile(fast.forward)
    loss, grads = loss_and_grads(fast, *inputs)
    assert loss.item() == pytest.approx(want_loss.item(), rel=1e-5)
    assert max(worst(grads, want).values()) < 1e-4


def test_gradient_checkpointing_changes_nothing() -> None:
    _, fast = pair("paper")
    inputs = batch()
    want_loss, want = loss_and_grads(fast, *inputs)
    fast.gradient_checkpointing = True
    loss, grads = loss_and_grads(fast, *inputs)
    assert torch.equal(loss, want_loss)
    for n, g in grads.items():
        torch.testing.assert_close(g, want[n], rtol=1e-6, atol=1e-8)


def test_a_frozen_weight_with_requires_grad_is_an_error() -> None:
    _, fast = pair()
    for name in ("blocks.2.mlp.fc1.weight", "blocks.0.adaLN_modulation.1.weight", "pos_embed", "t_embedder.mlp.0.bias"):
        p = dict(fast.named_parameters())[name]
        p.requires_grad_(True)
        with pytest.raises(RuntimeError, match=f"{name} is frozen in DiffFit"):
            fast(*batch())
        p.requires_grad_(False)
    fast(*batch())


def test_trainables_stay_float32_and_frozen_weights_take_the_compute_dtype() -> None:
    fast = FastDiffFitDiT(**SMALL, compute_dtype=torch.bfloat16)
    assert {p.dtype for p in fast.trainable_parameters()} == {torch.float32}
    matrices = {
        n: p.dtype for n, p in fast.named_parameters() if n.endswith("weight") and p.dim() > 1 and not p.requires_grad
    }
    assert set(matrices.values()) == {torch.bfloat16} and len(matrices) == 4 * 5 + 5
    assert fast(*batch()).dtype == torch.float32


def test_weights_lie_side_by_side_and_are_the_parameters() -> None:
    """Modulation and proj weights, without a copy, through load, cast, deepcopy and pickle; each in a storage of its own."""

    def check(model: FastDiffFitDiT) -> None:
        for weights in ([linear.weight for linear in modulation_linears(model)], proj_weights(model)):
            whole = together(weights)
            assert whole is not None and torch.equal(whole, torch.cat([w.detach() for w in weights]))
            assert whole.data_ptr() == weights[0].data_ptr()
            assert all(w.untyped_storage().nbytes() == w.nbytes for w in weights)

    plain, fast = pair()
    inputs = batch()
    fast.eval()
    out = fast(*inputs)
    check(fast)
    for twin in (copy.deepcopy(fast), fast.float()):
        check(twin)
        assert torch.equal(twin(*inputs), out)
    buffer = io.BytesIO()
    torch.save(fast, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    check(loaded)
    assert torch.equal(loaded(*inputs), out)
    shake(plain)
    fast.load_state_dict(plain.state_dict(), assign=True)
    check(fast)
    plain.eval()
    torch.testing.assert_close(fast(*inputs), plain(*inputs), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        fast.blocks[1].adaLN_modulation[1].weight.mul_(2)
    check(fast)


def test_a_model_that_nobody_holds_is_gone_at_once() -> None:
    """No circle keeps its memory until the garbage collector comes by."""
    fast = FastDiffFitDiT(**SMALL)
    with torch.no_grad():
        fast(*batch())
    gone = weakref.ref(fast)
    gc.disable()
    try:
        del fast
        assert gone() is None
    finally:
        gc.enable()


def test_label_dropout_only_in_training_and_null_class_is_num_classes() -> None:
    _, fast = pair()
    x, t, _ = batch(64)
    y = torch.zeros(64, dtype=torch.long)
    fast.y_embedder.dropout_prob = 1.0
    fast.train()
    dropped = fast(x, t, y)
    fast.eval()
    torch.testing.assert_close(dropped, fast(x, t, torch.full_like(y, 5)))
    assert not torch.allclose(dropped, fast(x, t, y))


def test_forward_with_cfg_equals_dit() -> None:
    plain, fast = pair()
    plain.eval(), fast.eval()
    x, t, _ = batch(2)
    y = torch.tensor([1, 3, 5, 5])
    xx, tt = torch.cat([x, x]), torch.cat([t, t])
    for channels in ("first3", "all"):
        want = plain.forward_with_cfg(xx, tt, y, 3.0, cfg_channels=channels)
        torch.testing.assert_close(
            fast.forward_with_cfg(xx, tt, y, 3.0, cfg_channels=channels), want, rtol=1e-4, atol=1e-4
        )


def test_no_grad_saves_nothing_and_agrees() -> None:
    _, fast = pair()
    fast.eval()
    inputs = batch()
    with torch.no_grad():
        out = fast(*inputs)
    assert not out.requires_grad
    torch.testing.assert_close(out, fast(*inputs).detach())


def test_ddp_reduces_only_the_trainables(tmp_path) -> None:
    """One gloo process: DDP accepts the model, and its buckets hold the trainables alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        _, fast = pair()
        inputs = batch()
        want = loss_and_grads(fast, *inputs)
        ddp = torch.nn.parallel.DistributedDataParallel(fast)
        reduced = []

        def count(state, bucket):  # DDP inspects annotations, so none
            reduced.append(bucket.buffer().numel())
            future: torch.futures.Future[Tensor] = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        ddp.register_comm_hook(None, count)
        got = loss_and_grads(ddp, *inputs)
        assert torch.equal(want[0], got[0])
        assert all(torch.equal(g, got[1][f"module.{n}"]) for n, g in want[1].items())
        assert sum(reduced) == fast.num_trainable
    finally:
        torch.distributed.destroy_process_group()


def test_a_single_image_float_t_and_eval_mode() -> None:
    plain, fast = pair()
    plain.eval(), fast.eval()
    x, _, y = batch(1)
    t = torch.tensor([0.25])
    torch.testing.assert_close(fast(x, t, y), plain(x, t, y), rtol=1e-4, atol=1e-4)


def test_clear_errors() -> None:
    _, fast = pair()
    x, t, y = batch()
    with pytest.raises(ValueError, match=r"x must have the shape \(N, 4, 8, 8\), got \(3, 4, 8, 6\)"):
        fast(x[..., :6], t, y)
    with pytest.raises(DiffFitError, match="attention must be one of"):
        FastDiffFitDiT(**SMALL, attention="fast")
    with pytest.raises(DiffFitError, match="compute_dtype must be a floating dtype"):
        FastDiffFitDiT(**SMALL, compute_dtype=torch.int8)
    with pytest.raises(RuntimeError, match=r"missing keys: x_embedder.proj.weight; unexpected keys: odd"):
        state = DiT(**SMALL).state_dict()
        state["odd"] = state.pop("x_embedder.proj.weight")
        fast.load_state_dict(state)
