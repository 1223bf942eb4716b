"""What only a GPU can show: numbers of every operation through Triton, the whole model, compile, CUDA graphs, big tensors.

The checkers are those of the CPU's tests (optest.py): they draw on the CPU, and :func:`on_gpu` carries the inputs over and the
results back, so the truth stays float64 on the CPU. Kernels alone are in test_triton_kernels.py and test_cuda_kernels.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from optest import DTYPES, TOLERANCE, check_needs_input_grad, check_numbers, draw, run
from test_fast_dit import SMALL, loss_and_grads, shake, worst
from torch import Tensor

from difffit_fast import FastDiffFitDiT
from difffit_fast.baselines.plain_difffit import PlainDiffFitDiT
from difffit_fast.graph import capture
from difffit_fast.ops import (
    adaln,
    attention,
    frozen_linear,
    frozen_mlp,
    frozen_qkv,
    residual,
    residual_adaln,
    use_kernels,
)
from difffit_fast.ops.attention import available_backends
from difffit_fast.ops.colsum import colsum_op

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
SIZES = [(1, 1, 72), (2, 77, 384), (2, 256, 1152), (3, 37, 100), (0, 4, 72)]  # B, T, D
HEADS = 4


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    """Triton for everything, and float32 products in float32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    with use_kernels("triton"):
        yield
    torch.backends.cuda.matmul.allow_tf32 = before


def on_gpu(op: Callable, layout: Callable[[Tensor], Tensor] = lambda x: x) -> Callable:
    """``op`` on the device, for inputs and results on the CPU; ``layout`` changes the strides of the inputs there."""

    def wrapped(*inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        out = op(*(layout(x.to(DEVICE)) for x in inputs))
        return tuple(o.cpu() for o in out) if isinstance(out, tuple) else out.cpu()

    return wrapped


def strided(x: Tensor) -> Tensor:
    """The same values, every second of a wider tensor."""
    wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1] + 1, dtype=x.dtype, device=x.device)
    wide[..., 1::2] = x
    return wide[..., 1::2]


# -- the operations --------------------------------------------------------------------------------------------------
def norm(x: Tensor) -> Tensor:
    return torch.nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6)


def truth_adaln(x: Tensor, a: Tensor, c: Tensor) -> Tensor:
    return norm(x) * a[:, None] + c[:, None]


def truth_residual(x: Tensor, f: Tensor, s: Tensor, r: Tensor) -> Tensor:
    return x + s[:, None] * f + r[:, None]


def truth_residual_adaln(x: Tensor, f: Tensor, s: Tensor, r: Tensor, a: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    y = truth_residual(x, f, s, r)
    return y, truth_adaln(y, a, c)


def truth_mlp(h: Tensor, w1: Tensor, b1: Tensor, w2: Tensor) -> Tensor:
    return torch.nn.functional.gelu(h @ w1.t() + b1, approximate="tanh") @ w2.t()


def truth_attention(qkv: Tensor, heads: int = HEADS) -> Tensor:
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return (torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, -1) @ v).transpose(1, 2).flatten(2)


def truth_chain(h: Tensor, weight: Tensor, bias_q: Tensor, gamma: Tensor) -> Tensor:
    z = h @ weight.t() + torch.cat([bias_q, bias_q.new_zeros(2 * bias_q.shape[0])])
    return truth_attention(z * gamma)


def vectors(n: int, b: int, d: int) -> list[Tensor]:
    return [draw(b, d, dtype=torch.float32) for _ in range(n)]


@pytest.mark.parametrize(("stream", "branch"), DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_adaln_residual_and_both(size: tuple[int, int, int], stream: torch.dtype, branch: torch.dtype) -> None:
    b, t, d = size
    x, f = draw(b, t, d, dtype=stream, shift=0.5), draw(b, t, d, dtype=branch)
    twice = TOLERANCE[branch] * (2 if stream == torch.bfloat16 else 1)  # h normalises the y that was stored, rounded
    normed = on_gpu(lambda *z: adaln(*z, out_dtype=branch))
    check_numbers(normed, truth_adaln, [x, *vectors(2, b, d)], (True,) * 3, TOLERANCE[branch])
    check_numbers(on_gpu(residual), truth_residual, [x, f, *vectors(2, b, d)], (True,) * 4, TOLERANCE[branch])
    check_numbers(on_gpu(residual_adaln), truth_residual_adaln, [x, f, *vectors(4, b, d)], (True,) * 6, twice)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_products(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    """frozen_linear, frozen_mlp, frozen_qkv with attention behind it, colsum."""
    b, t, d = size
    slack = 4 if dtype == torch.float32 else 3
    h, bias = draw(b, t, d, dtype=dtype), draw(4 * d, dtype=torch.float32)
    w1, w2 = (draw(4 * d, d) / d**0.5).to(dtype), (draw(d, 4 * d) / (4 * d) ** 0.5).to(dtype)
    allowed = slack * TOLERANCE[dtype]
    linear = lambda x, w, b: x @ w.t() + b  # noqa: E731
    check_numbers(on_gpu(frozen_linear), linear, [h, w1, bias], (True, False, True), allowed)
    check_numbers(on_gpu(frozen_mlp), truth_mlp, [h, w1, bias, w2], (True, False, True, False), allowed)
    chain = on_gpu(lambda *z: attention(frozen_qkv(*z), HEADS))
    weight = (1.5 * draw(3 * d, d) / d**0.5).to(dtype)
    qkv = [h, weight, draw(d, dtype=torch.float32), draw(3 * d, dtype=torch.float32, shift=1)]
    # Small query and key gradients are compared with the largest value of a whole tensor, after attention's roundings.
    check_numbers(chain, truth_chain, qkv, (True, False, True, True), 2 * allowed)
    x = draw(b * t, d, dtype=dtype)
    check_numbers(on_gpu(colsum_op), lambda x: x.sum(0), [x], (False,), 1e-5)


def test_every_combination_of_gradients_and_strided_inputs() -> None:
    x, f, *four = [draw(2, 5, 72, dtype=torch.float32), draw(2, 5, 72, dtype=torch.float32), *vectors(4, 2, 72)]
    check_needs_input_grad(on_gpu(residual_adaln), [x, f, *four], (True,) * 6)
    for op, inputs in ((adaln, [x, *four[:2]]), (residual, [x, f, *four[:2]]), (residual_adaln, [x, f, *four])):
        outs, grads = run(on_gpu(op), inputs, (True,) * len(inputs))
        outs2, grads2 = run(on_gpu(op, strided), inputs, (True,) * len(inputs))
        for a, b in zip([*outs, *grads], [*outs2, *grads2], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 72])
def test_every_available_attention_backend(head_dim: int, dtype: torch.dtype) -> None:
    """Each one that is offered runs forward and backward and is right; which ones is printed."""
    names = available_backends(DEVICE, dtype, head_dim)
    print(torch.cuda.get_device_name(), dtype, head_dim, names)
    qkv, do = draw(2, 256, 3 * HEADS * head_dim, dtype=dtype), draw(2, 256, HEADS * head_dim)
    want_out, want = run(truth_attention, [qkv.double()], (True,), [do])
    broken = {}
    for name in names:
        try:
            out, grad = run(on_gpu(lambda x, name=name: attention(x, HEADS, name)), [qkv], (True,), [do])
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
    _, fast = models(compute_dtype=compute_dtype, attention="bmm")
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
        optimizer.zero_grad(set_to_none=False)

    return step


def test_captured_training_steps_equal_eager_ones() -> None:
    """Three warm-up steps and four replays, on inputs that change in between, against seven eager steps."""
    _, graphed = models(compute_dtype=torch.bfloat16, attention="bmm")
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


def test_another_stream() -> None:
    """Kernels go to the current stream: the numbers are right while the default stream is busy with something else."""
    _, fast = models(attention="bmm")
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


@pytest.mark.parametrize("which", ["residual_adaln", "mlp"])
def test_index_beyond_31_bits(which: str) -> None:
    """Operations on more than 2³¹ values, forward and backward; the last rows are compared with the same rows alone."""
    D = 1152
    B = (1 << 31) // (256 * D) + 5
    if torch.cuda.mem_get_info()[1] < 70 << 30:
        pytest.skip("needs 70 GiB of device memory")
    bf16 = dict(dtype=torch.bfloat16, device=DEVICE)
    f = torch.randn(B, 256, D, **bf16).requires_grad_()
    if which == "residual_adaln":
        x = torch.randn(B, 256, D, **bf16)
        s, r, a, c = (torch.randn(B, D, device=DEVICE) for _ in range(4))
        op = lambda x, f, s, r, a, c: residual_adaln(x, f, s, r, a, c)[1]  # noqa: E731
        every, last = (x, f, s, r, a, c), tuple(v[-2:].detach() for v in (x, f, s, r, a, c))
        wanted = 1
    else:
        # A square fc1 keeps the pre-activation at the size of the input: 2³¹ values as well.
        w1, w2 = (torch.randn(D, D, **bf16) / D**0.5 for _ in range(2))
        b1 = torch.zeros(D, device=DEVICE)
        op, every, last, wanted = frozen_mlp, (f, w1, b1, w2), (f[-2:].detach(), w1, b1, w2), 0
    out = op(*every)
    few = [v.detach().requires_grad_(i == wanted) for i, v in enumerate(last)]
    small = op(*few)
    torch.testing.assert_close(out[-2:], small, rtol=2e-2, atol=2e-2)
    # dh of 1 everywhere, except that mean and variance of LayerNorm want something that is not constant
    weight = torch.randn(D, device=DEVICE).bfloat16().expand(2, 256, D)
    (want,) = torch.autograd.grad(small, few[wanted], weight.contiguous())
    (got,) = torch.autograd.grad(out, every[wanted], weight[:1].expand(B, 256, D))
    torch.testing.assert_close(got[-2:], want, rtol=2e-2, atol=2e-2)
