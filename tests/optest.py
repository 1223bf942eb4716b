"""What every operation is tested for, and how exactly; the truth is plain PyTorch in float64.

Which operations there are, and in which sizes and types they are tested, is in op_cases.py.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

from difffit_fast.ops import use_kernels
from difffit_fast.ops.dispatch import cpp_ops

# -- the one table of tolerances -------------------------------------------------------------------------------------
# Of an operation: largest error relative to the largest value of the truth. bf16 has 8 bits, fp16 11, and there is one
# rounding of the output and of each gradient; an operation that rounds more often says so (Case.roundings).
TOLERANCE = {torch.float64: 1e-10, torch.float32: 3e-6, torch.bfloat16: 1.2e-2, torch.float16: 2e-3}
# Of a kernel alone, whose inputs are taken as they are: each value may be off by its own rounding, half a unit in the
# last place, and by KERNEL_SLACK of the largest value, the arithmetic in float32.
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}
KERNEL_SLACK = 2e-6

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


# -- rooms -----------------------------------------------------------------------------------------------------------
def rooms() -> list[str]:
    """The implementations that run on this machine's CPU tensors in this process."""
    return ["reference", *(["cpp"] if cpp_ops() is not None else [])]


TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
# Where operations are tested: on the CPU in plain PyTorch, in C++ and in Triton's interpreter, and Triton on a GPU.
ROOMS = {
    "reference": (),
    "cpp": (pytest.mark.skipif(cpp_ops() is None, reason="the C++ extension is not built"),),
    "triton": (TRITON, pytest.mark.interpreter),
    "gpu": (TRITON, pytest.mark.gpu),
}


@contextlib.contextmanager
def in_room(room: str) -> Iterator[None]:
    """Operations run there; on a GPU with float32 products in float32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with use_kernels("triton" if room == "gpu" else room):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def strided(x: Tensor) -> Tensor:
    """The same values, every second of a wider tensor."""
    wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1] + 1, dtype=x.dtype, device=x.device)
    wide[..., 1::2] = x
    return wide[..., 1::2]


def on_gpu(op: Callable) -> Callable:
    """``op`` on the device, for inputs and results on the CPU. What is not contiguous here is not contiguous there."""

    def carry(x: Tensor) -> Tensor:
        there = x.to("cuda")
        return there if x.is_contiguous() else strided(there)

    def wrapped(*inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        out = op(*map(carry, inputs))
        return tuple(o.cpu() for o in out) if isinstance(out, tuple) else out.cpu()

    return wrapped


# -- checks ----------------------------------------------------------------------------------------------------------
def draw(*shape: int, dtype: torch.dtype = torch.float64, shift: float = 0.0) -> Tensor:
    return (torch.randn(*shape, dtype=torch.float64) + shift).to(dtype)


def assert_close(got: Tensor, want: Tensor, tolerance: float, what: str) -> None:
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    if not want.numel():
        return
    error = (got.double() - want.double()).abs().max() / want.double().abs().max().clamp_min(1e-6)
    assert error <= tolerance, f"{what}: relative error {error:.2e} > {tolerance:.0e}"


def close(name: str, got: Tensor, want: Tensor, slack: float = KERNEL_SLACK) -> None:
    """A kernel's output against float64: its rounding, and ``slack`` of the largest value."""
    assert got.shape == want.shape, f"{name}: {tuple(got.shape)}, expected {tuple(want.shape)}"
    if not want.numel():
        return
    got, unit = got.double().cpu(), ROUNDING[got.dtype]
    excess = (got - want).abs() - 1.001 * unit * want.abs() - slack * want.abs().max()
    assert excess.max() <= 0, f"{name}: off by {(got - want).abs().max():.2e} of {want.abs().max():.2e}"


def run(
    op: Callable, inputs: Sequence[Tensor], needs: Sequence[bool], grads: Sequence[Tensor] | None = None
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Outputs of ``op`` and the gradients of those inputs that need one."""
    leaves = [x.detach().requires_grad_(n) for x, n in zip(inputs, needs, strict=True)]
    out = op(*leaves)
    outs = list(out) if isinstance(out, tuple) else [out]
    if not any(needs):
        assert not any(o.requires_grad for o in outs)
        return outs, [None] * len(leaves)
    grads = grads or [torch.ones_like(o) for o in outs]
    wanted = [x for x in leaves if x.requires_grad]
    found = iter(torch.autograd.grad(outs, wanted, [g.to(o.dtype) for g, o in zip(grads, outs, strict=True)]))
    return outs, [next(found) if n else None for n in needs]


def check_numbers(
    op: Callable, truth: Callable, inputs: Sequence[Tensor], trainable: Sequence[bool], tolerance: float
) -> None:
    """Outputs and gradients against the truth, with random upstream gradients, and the same bits twice."""
    exact = [x.double() for x in inputs]
    out = truth(*exact)
    shapes = [o.shape for o in (out if isinstance(out, tuple) else (out,))]
    grads = [draw(*shape) for shape in shapes]
    want_out, want_grad = run(truth, exact, trainable, grads)
    got_out, got_grad = run(op, inputs, trainable, grads)
    for i, (got, want) in enumerate(zip(got_out, want_out, strict=True)):
        assert_close(got, want, tolerance, f"output {i}")
    for i, (g, want, x) in enumerate(zip(got_grad, want_grad, inputs, strict=True)):
        if want is not None:
            assert g is not None and g.dtype == x.dtype
            assert_close(g, want, tolerance, f"gradient of input {i}")
    again_out, again_grad = run(op, inputs, trainable, grads)
    for first, second in zip([*got_out, *got_grad], [*again_out, *again_grad], strict=True):
        assert (first is None) == (second is None)
        assert first is None or torch.equal(first, second), "a second run gave other bits"


def check_needs_input_grad(
    op: Callable, inputs: Sequence[Tensor], trainable: Sequence[bool], few: bool = False
) -> None:
    """Every combination of inputs that need a gradient gives those gradients, the same ones, and no others.

    ``few``: only none, one and all.
    """
    _, full = run(op, inputs, trainable)
    n = sum(trainable)
    for needs in itertools.product((False, True), repeat=n):
        if few and 1 < sum(needs) < n:
            continue
        flags = iter(needs)
        combination = [next(flags) if t else False for t in trainable]
        _, grads = run(op, inputs, combination)
        for i, (g, want, need) in enumerate(zip(grads, full, combination, strict=True)):
            assert (g is not None) == need
            if need:
                torch.testing.assert_close(g, want, msg=lambda m, i=i, c=combination: f"input {i} with needs {c}: {m}")


def check_layouts(op: Callable, inputs: Sequence[Tensor], trainable: Sequence[bool]) -> None:
    """Non-contiguous inputs and gradients give what contiguous ones give."""
    outs, grads = run(op, inputs, trainable)
    upstream = [draw(*o.shape).to(o.dtype) for o in outs]
    _, want = run(op, inputs, trainable, upstream)
    outs2, got = run(op, [strided(x) for x in inputs], trainable, [strided(g) for g in upstream])
    for a, b in zip([*outs, *want], [*outs2, *got], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    expanded = [o.new_ones(()).expand(o.shape) for o in outs]  # what sum().backward() sends
    _, got = run(op, inputs, trainable, expanded)
    for a, b in zip(grads, got, strict=True):
        assert a is None or torch.equal(a, b)


def check_compiled(op: Callable, inputs: Sequence[Tensor], trainable: Sequence[bool]) -> None:
    """torch.compile without a graph break gives eager's numbers."""
    torch._dynamo.reset()
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    outs, grads = run(op, inputs, trainable)
    outs2, grads2 = run(compiled, inputs, trainable)
    for a, b in zip([*outs, *grads], [*outs2, *grads2], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
