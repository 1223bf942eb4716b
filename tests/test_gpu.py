"""What only a GPU can show: every attention backend, the whole model, compile, CUDA graphs, big tensors.

The operations' numbers are in test_ops.py and test_kernels.py (room "gpu"), CUDA C++ in test_cuda_kernels.py. Inputs are drawn on
the CPU, and the truth is float64 there.
"""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from op_cases import true_attention
from optest import draw, on_gpu, run
from test_fast_dit import SMALL, loss_and_grads, shake, worst
from torch import Tensor
from training import SETTINGS, digits

from difffit_fast import DiT, FastDiffFitDiT
from difffit_fast.baselines.plain_difffit import PlainDiffFitDiT
from difffit_fast.graph import capture
from difffit_fast.ops import use_kernels
from difffit_fast.ops.attention import attention, available_backends
from difffit_fast.ops.frozen_mlp import frozen_mlp
from difffit_fast.ops.residual import residual_adaln
from difffit_fast.train import Trainer
from difffit_fast.train.track import read_metrics

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
HEADS = 4


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    """Triton for everything, and float32 products in float32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    with use_kernels("triton"):
        yield
    torch.backends.cuda.matmul.allow_tf32 = before


# -- attention -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 72])
def test_every_available_attention_backend(head_dim: int, dtype: torch.dtype) -> None:
    """Each one that is offered runs forward and backward and is right; which ones is printed."""
    names = available_backends(DEVICE, dtype, head_dim)
    print(torch.cuda.get_device_name(), dtype, head_dim, names)
    qkv, do = draw(2, 256, 3 * HEADS * head_dim, dtype=dtype), draw(2, 256, HEADS * head_dim)
    want_out, want = run(lambda x: true_attention(x, HEADS), [qkv.double()], (True,), [do])
    broken = {}
    for name in names:
        try:
            out, grad = run(on_gpu(lambda x, name=name: attention(x, HEADS, backend=name)), [qkv], (True,), [do])
        except RuntimeError as error:
            broken[name] = str(error)[:200]
            continue
        for got, truth in ((out[0], want_out[0]), (grad[0], want[0])):
            error = ((got.double() - truth).norm() / truth.norm()).item()
            if not error < (1e-2 if dtype == torch.bfloat16 else 1e-5):
                broken[name] = f"relative error {error:.2e}"
    assert not broken, broken


# -- the model -------------------------------------------------------------------------------------------------------
def models(preset: str = "paper", **kwargs) -> tuple[PlainDiffFitDiT, FastDiffFitDiT]:
    """The plain model on the CPU and ours with the same parameters on the device."""
    plain = shake(PlainDiffFitDiT(**SMALL, difffit=preset))
    fast = FastDiffFitDiT(**SMALL, difffit=preset, **kwargs)
    fast.load_state_dict(plain.state_dict())
    return plain.eval(), fast.to(DEVICE).eval()  # no label dropout: two devices draw different labels


def batch(n: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(n, 4, 8, 8), torch.randint(0, 1000, (n,)), torch.randint(0, 6, (n,))


def on_device(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.to(DEVICE) for x in inputs)


class Back(torch.nn.Module):
    """A model on the device that takes and returns tensors of the CPU, for loss_and_grads; names stay the model's."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.__dict__["model"] = model

    def named_parameters(self, *args, **kwargs):
        return self.model.named_parameters(*args, **kwargs)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.model.zero_grad(set_to_none)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.model(*on_device(inputs)).cpu()


def to_cpu(grads: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: g.cpu() for n, g in grads.items()}


@pytest.mark.parametrize("preset", ["paper", "minimax", "block", "bitfit"])
@pytest.mark.parametrize("kernels", ["triton", "reference"])
def test_every_gradient_of_the_model_float32(kernels: str, preset: str) -> None:
    plain, fast = models(preset)
    inputs = batch()
    want_loss, want = loss_and_grads(plain.double(), inputs[0].double(), *inputs[1:])
    with use_kernels(kernels):
        loss, grads = loss_and_grads(Back(fast), *inputs)
    assert loss.item() == pytest.approx(want_loss.item(), rel=1e-5)
    errors = worst(to_cpu(grads), want)
    assert max(errors.values()) < 5e-5, max(errors.items(), key=lambda e: e[1])


def test_bf16_errs_no_more_than_plain_pytorch_under_autocast() -> None:
    """Output and every gradient: at most 1.5 times the error of the plain model under autocast, averaged over draws."""
    ours: dict[str, float] = {}
    theirs: dict[str, float] = {}
    for seed in range(6):
        torch.manual_seed(seed)
        plain, fast = models(compute_dtype=torch.bfloat16)
        inputs = batch(8)
        exact = copy.deepcopy(plain).double()
        _, want = loss_and_grads(exact, inputs[0].double(), *inputs[1:])
        with torch.no_grad():
            want_out = exact(inputs[0].double(), *inputs[1:])
        autocast = copy.deepcopy(plain).to(DEVICE)
        for errors, model, enabled in ((ours, fast, False), (theirs, autocast, True)):
            with torch.autocast("cuda", torch.bfloat16, enabled=enabled):
                _, grads = loss_and_grads(Back(model), *inputs)
                with torch.no_grad():
                    out = Back(model)(*inputs)
            for name, error in worst(to_cpu(grads), want).items():
                errors[name] = errors.get(name, 0) + error
            errors["output"] = errors.get("output", 0) + ((out.double() - want_out).norm() / want_out.norm()).item()
    bad = {n: (e, theirs[n]) for n, e in ours.items() if e > 1.5 * theirs[n]}
    assert not bad, bad


def grads_of(model: torch.nn.Module, inputs: tuple[Tensor, ...], forward: Callable | None = None) -> list[Tensor]:
    model.zero_grad()
    (forward or model)(*inputs).float().square().mean().backward()
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16], ids=str)
def test_deterministic(compute_dtype: torch.dtype | None) -> None:
    """The same bits twice, with attention by batched products; SDPA's backends make no such promise."""
    _, fast = models(compute_dtype=compute_dtype, attention="math")
    inputs = on_device(batch())
    assert all(torch.equal(a, b) for a, b in zip(grads_of(fast, inputs), grads_of(fast, inputs), strict=True))


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16], ids=str)
def test_compiled_without_a_graph_break(compute_dtype: torch.dtype | None) -> None:
    torch._dynamo.reset()
    _, fast = models(compute_dtype=compute_dtype)
    inputs = on_device(batch())
    compiled = torch.compile(fast, fullgraph=True)
    allowed = 1e-4 if compute_dtype is None else 3e-2
    for eager, other in zip(grads_of(fast, inputs), grads_of(fast, inputs, compiled), strict=True):
        assert (eager - other).norm() <= allowed * eager.norm() + 1e-7


def trainer_step(model: FastDiffFitDiT, inputs: tuple[Tensor, ...]) -> Callable[[], None]:
    params = list(model.trainable_parameters())
    lr = torch.tensor(1e-3, device=DEVICE)
    optimizer = torch.optim.AdamW(params, lr=lr, fused=True, capturable=True)
    target = torch.ones(inputs[0].shape[0], 8, 8, 8, device=DEVICE)

    def step() -> None:
        torch.nn.functional.mse_loss(model(*inputs).float(), target).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)  # captured, gradients lie in the graph's memory

    return step


def test_captured_training_steps_equal_eager_ones() -> None:
    """Three warm-up steps and four replays, on inputs that change in between, against seven eager steps."""
    _, graphed = models(compute_dtype=torch.bfloat16, attention="math")
    eager = copy.deepcopy(graphed)
    draws = [on_device(batch()) for _ in range(5)]
    slots = [tuple(x.clone() for x in draws[0]) for _ in range(2)]
    replay, step = capture(trainer_step(graphed, slots[0])), trainer_step(eager, slots[1])
    for _ in range(3):
        step()
    for new in draws[1:]:
        for slot, run_step in zip(slots, (replay, step), strict=True):
            for place, value in zip(slot, new, strict=True):
                place.copy_(value)
            run_step()
    for a, b in zip(graphed.trainable_parameters(), eager.trainable_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_captured_forward_of_any_mixture_of_deltas() -> None:
    model = FastDiffFitDiT(**SMALL)
    model.load_state_dict(shake(DiT(**SMALL)).state_dict())
    for name in ("a", "b"):
        shake(model.add_delta(name))
    exact, model = copy.deepcopy(model).double().eval(), model.to(DEVICE).eval()
    x, t, y = torch.randn(4, 4, 8, 8), torch.randint(0, 1000, (4,)), torch.randint(0, 6, (4,))
    slots = [v.to(DEVICE) for v in (x, t, y, torch.tensor([0, 0, 0, 0]), torch.ones(4))]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            model(*slots[:3], delta=slots[3], strength=slots[4])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = model(*slots[:3], delta=slots[3], strength=slots[4])
    for index, strength in (([0, 1, -1, 0], [1.0, 1.0, 1.0, 1.0]), ([-1, -1, 1, 1], [0.5, 1.0, 0.0, 1.5])):
        slots[3].copy_(torch.tensor(index))
        slots[4].copy_(torch.tensor(strength))
        graph.replay()
        want = exact(x.double(), t, y, delta=torch.tensor(index), strength=torch.tensor(strength))
        torch.testing.assert_close(out.cpu().double(), want, rtol=1e-4, atol=1e-4)
        assert torch.equal(out, model(*slots[:3], delta=slots[3], strength=slots[4]))


def test_no_synchronisation_in_a_step() -> None:
    """Forward, backward and the optimizer never wait for the device: nothing reads a value back."""
    _, fast = models(compute_dtype=torch.bfloat16)
    fast.train()
    step = trainer_step(fast, on_device(batch()))
    step()  # compiles, initialises the optimizer
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()


# -- the trainer -----------------------------------------------------------------------------------------------------
def trainer(images: Path, folder: Path, steps: int, model: torch.nn.Module | None = None, **changes: object) -> Trainer:
    """One on the device; without a model of its own, ours with attention that gives the same bits twice."""
    if model is None:
        torch.manual_seed(1)
        model = shake(
            FastDiffFitDiT(**{**SMALL, "in_channels": 3, "input_size": 16, "num_classes": 3}, attention="math")
        )
    settings = {**SETTINGS, "model_args": {}, "device": "cuda", "data_path": str(images), "results_dir": str(folder)}
    return Trainer(model=model, **{**settings, "max_steps": steps, "ckpt_every": 10, "global_batch_size": 7, **changes})


def numbers(folder: Path) -> list[float]:
    """The loss of every step."""
    return [m["loss"] for m in read_metrics(folder)]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return digits(tmp_path_factory.mktemp("digits"))


TRAINED = {
    "whole": {},
    "pieces, clipped": {"accumulate": 3, "max_grad_norm": 0.01},
    "flow": {"objective": "flow"},
    "bf16 under autocast": {"precision": "bf16"},
}


@pytest.mark.parametrize("case", TRAINED)
def test_twenty_captured_steps_of_the_trainer_equal_twenty_eager_ones(images: Path, tmp_path: Path, case: str) -> None:
    results = {}
    for setting in ("off", "on"):
        run_of = trainer(images, tmp_path / setting, 20, cuda_graph=setting, **TRAINED[case])
        results[setting] = run_of, run_of.train().folder
    torch.testing.assert_close(numbers(results["on"][1]), numbers(results["off"][1]), rtol=1e-5, atol=1e-6)
    for name, p in results["on"][0].parameters.items():
        torch.testing.assert_close(p, results["off"][0].parameters[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["difffit", "full", "adapter", "vpt", "lora"])
def test_every_method_can_be_captured(images: Path, tmp_path: Path, method: str) -> None:
    """Insisted on; whatever attention PyTorch takes, losses are those of an eager run but for rounding."""
    if method == "lora":
        pytest.importorskip("peft")
    losses = []
    for setting in ("off", "on"):
        settings = {**SETTINGS, "device": "cuda", "data_path": str(images), "results_dir": str(tmp_path / setting)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run_of = Trainer(**{**settings, "method": method, "max_steps": 6, "cuda_graph": setting})
        losses.append(numbers(run_of.train().folder))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=1e-4)


def test_a_captured_run_that_is_resumed_equals_one_that_is_not(images: Path, tmp_path: Path) -> None:
    whole = trainer(images, tmp_path / "a", 20, cuda_graph="on").train()
    trainer(images, tmp_path / "b", 10, cuda_graph="on").train()
    resumed = trainer(images, tmp_path / "b", 20, cuda_graph="on", resume="auto").train()
    assert numbers(resumed.folder)[10:] == pytest.approx(numbers(whole.folder)[10:], rel=1e-5)


@pytest.mark.parametrize("setting", ["off", "on"])
def test_nothing_in_a_step_of_the_trainer_waits_for_the_device(images: Path, tmp_path: Path, setting: str) -> None:
    run_of = trainer(
        images, tmp_path, 8, cuda_graph=setting, accumulate=2, max_grad_norm=1.0, num_workers=0, log_every=8
    )
    fetch, one_step = run_of._fetch, run_of._one_step

    def strictly(function: Callable) -> Callable:
        def called(argument: object) -> object:
            torch.cuda.set_sync_debug_mode("error" if run_of.step >= 3 else "default")  # first ones compile and capture
            try:
                return function(argument)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return called

    run_of._fetch, run_of._one_step = strictly(fetch), strictly(one_step)
    assert run_of.train().step == 8


def test_the_memory_of_a_graph_is_given_back(images: Path, tmp_path: Path) -> None:
    run_of = trainer(images, tmp_path, 3, cuda_graph="on")
    before = torch.cuda.memory_allocated()
    run_of.train()
    gc.collect()
    extra = sum(p.numel() * p.element_size() for p in run_of.parameters.values())
    assert torch.cuda.memory_allocated() - before < 4 * extra + (
        64 << 20
    )  # the optimizer's moments, cuBLAS's workspaces


def test_another_stream() -> None:
    """Kernels go to the current stream: the numbers are right while the default stream is busy with something else."""
    _, fast = models(attention="math")
    inputs = on_device(batch())
    want = grads_of(fast, inputs)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    fast.zero_grad()
    busy = torch.randn(4096, 4096, device=DEVICE)
    for _ in range(50):
        busy = torch.tanh(busy @ busy)  # work that a kernel on the wrong stream would have to wait for
    with torch.cuda.stream(side):
        late = tuple(x.clone() for x in inputs)
        got = grads_of(fast, late)
    side.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("which", ["residual_adaln", "frozen_mlp"])
def test_index_beyond_31_bits(which: str) -> None:
    """Operations on more than 2³¹ values, forward and backward; the last rows are compared with the same rows alone."""
    D = 1152
    B = (1 << 31) // (256 * D) + 5
    if torch.cuda.mem_get_info()[1] < 70 << 30:
        pytest.skip("needs 70 GiB of device memory")
    bf16 = dict(dtype=torch.bfloat16, device=DEVICE)
    branch = torch.randn(B, 256, D, **bf16).requires_grad_()
    if which == "residual_adaln":
        x = torch.randn(B, 256, D, **bf16)
        vectors = [torch.randn(B, D, device=DEVICE) for _ in range(4)]
        op = lambda *z: residual_adaln(*z)[1]  # noqa: E731
        every, last = (x, branch, *vectors), tuple(v[-2:].detach() for v in (x, branch, *vectors))
        wanted = 1
    else:
        # A square fc1 keeps the pre-activation at the size of the input: 2³¹ values as well.
        w1, w2 = (torch.randn(D, D, **bf16) / D**0.5 for _ in range(2))
        b1 = torch.zeros(D, device=DEVICE)
        op, every, last, wanted = frozen_mlp, (branch, w1, b1, w2), (branch[-2:].detach(), w1, b1, w2), 0
    out = op(*every)
    few = [v.detach().requires_grad_(i == wanted) for i, v in enumerate(last)]
    small = op(*few)
    torch.testing.assert_close(out[-2:], small, rtol=2e-2, atol=2e-2)
    # dh of 1 everywhere, except that mean and variance of LayerNorm want something that is not constant
    weight = torch.randn(D, device=DEVICE).bfloat16().expand(2, 256, D)
    (want,) = torch.autograd.grad(small, few[wanted], weight.contiguous())
    (got,) = torch.autograd.grad(out, every[wanted], weight[:1].expand(B, 256, D))
    torch.testing.assert_close(got[-2:], want, rtol=2e-2, atol=2e-2)
