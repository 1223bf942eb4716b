"""One training step, run on tensors without memory that say they are on CUDA, and every call it makes written down.

The real model, its real autograd, loss, optimizer and EMA run (the step of ``modes.py``), on PyTorch's fake tensors: shapes
and types, no data. Only what needs a GPU has a stand-in, all of it in :func:`pretended_cuda`:

- fake tensors say ``cuda:0`` to Python and stay on the CPU for PyTorch's dispatcher, which a build without CUDA needs;
- our operations (``difffit_fast::…``) are not taken as a whole: their implementations run, down to the library calls;
- Triton's kernels are noted instead of launched, with their arguments by name;
- attention calls the library function that PyTorch would call on that device;
- where two implementations would be timed against each other the default is taken, or the one asked for;
- weights that are multiplied in eight bits have been quantized before the step, and their error, which wants data, is 0.

Nothing here knows what a call costs: that is :mod:`ledger_costs`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
import math
import pkgutil
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from modes import frozen_dtype, is_ours, make_optimizer, step_parts
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from difffit_fast import DiT, FastDiffFitDiT
from difffit_fast.baselines.plain_difffit import PlainDiffFitDiT
from difffit_fast.models import fast_dit
from difffit_fast.models.frozen_dtype import linears

CUDA = torch.device("cuda", 0)
CAPABILITY = {"h100": (9, 0), "h200": (9, 0), "a100": (8, 0)}
# What the package is assumed to find faster by timing, where it is not the default: of the int8 product the one kernel that moves
# 2 bytes for each result in place of 10.
ASSUMED = {"int8_product": "triton"}
HEAD, STEM, UPDATE = "head and loss", "stem and vectors", "optimizer and EMA"


# -- what is written down ----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Spec:
    """A tensor, as far as it costs something."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    bytes: int  # of memory it covers: a size that is broadcast counts once
    dense: bool
    memory: int  # equal for tensors that share memory


@dataclass
class Call:
    """A call of PyTorch's or CUDA's library, or a launch of a Triton kernel."""

    name: str  # of the aten operation without its overload, or of the kernel
    triton: bool
    args: dict[str, Any]  # by the names of the schema or of the kernel; tensors are Specs
    out: list[Spec]
    where: str  # STEM, "block 3 forward", HEAD, "block 3 backward", UPDATE
    backward: bool = False  # made by autograd
    op: str = ""  # the operation of this package that made the call

    def tensors(self) -> list[Spec]:
        return [a for a in tree_leaves(list(self.args.values())) if isinstance(a, Spec)]


@dataclass
class Trace:
    calls: list[Call] = field(default_factory=list)
    choices: dict[str, str] = field(default_factory=dict)  # operation -> the implementation taken
    ops: int = 0  # calls of this package's operations


@functools.cache
def _is_composite(func: Any) -> bool:
    """Whether PyTorch computes ``func`` by calling other operations, on every device."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return has(func.name(), "CompositeImplicitAutograd") and not has(func.name(), "CPU")


# -- the recorder ------------------------------------------------------------------------------------------------------
class _Lie:
    """What a fake tensor answers when Python asks for its device; None: the truth."""

    device: torch.device | None = None


_true_device = FakeTensor.device


def _said_device(tensor: FakeTensor) -> torch.device:
    return _true_device.__get__(tensor) if _Lie.device is None else _Lie.device


@contextlib.contextmanager
def _saying(device: torch.device | None) -> Iterator[None]:
    before, _Lie.device = _Lie.device, device
    try:
        yield
    finally:
        _Lie.device = before


class Recorder(TorchDispatchMode):
    """Writes down every call that reaches PyTorch's dispatcher below autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.trace = Trace()
        self.where = STEM
        self.op = ""
        self.on = True
        self._kept: list[Any] = []  # memory that was seen, so that its number names no other

    def note(self, name: str, args: dict[str, Any], out: Any, triton: bool = False) -> None:
        if self.on:
            out_specs = [self.spec(t) for t in tree_leaves(out) if isinstance(t, Tensor)]
            args = {k: tree_map(lambda a: self.spec(a) if isinstance(a, Tensor) else a, v) for k, v in args.items()}
            backward = torch._C._current_autograd_node() is not None
            self.trace.calls.append(Call(name, triton, args, out_specs, self.where, backward, self.op))

    def spec(self, t: Tensor) -> Spec:
        with _saying(None):
            covered = math.prod(n for n, stride in zip(t.shape, t.stride(), strict=True) if stride or n == 0)
            memory = t.untyped_storage()
            self._kept.append(memory)
            return Spec(tuple(t.shape), t.dtype, covered * t.element_size(), t.is_contiguous(), memory._cdata)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        if func.namespace == "difffit_fast":
            return self._inside(func, args, kwargs)
        if func.namespace not in ("aten", "prim", "prims"):
            return func(*args, **kwargs)  # the profiler's marks
        if _is_composite(func):
            with self:
                return func.decompose(*args, **kwargs)
        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        with _saying(None):
            out = func(*args, **kwargs)
        names = [a.name for a in func._schema.arguments]
        self.note(func._schema.name.split("::")[1], {**dict(zip(names, args, strict=False)), **kwargs}, out)
        return out

    def _inside(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run the implementation of one of our operations and write down what it calls."""
        before, self.op = self.op, func._schema.name.split("::")[1]
        self.trace.ops += self.on
        try:
            with self:
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
        finally:
            self.op = before

    def launch(self, kernel: Any, programs: int, device: Any, *args: Any, **constants: Any) -> None:
        """In place of ``difffit_fast.kernels.config.launch``."""
        named = {n.removesuffix("_ptr"): a for n, a in zip(kernel.arg_names, args, strict=False)}
        name = kernel.fn.__name__.strip("_").removesuffix("_kernel")
        self.note(name, {**named, **constants, "programs": programs}, None, triton=True)

    # -- where in the model ----------------------------------------------------------------------------------------
    def follow(self, model: nn.Module, stack: contextlib.ExitStack) -> None:
        """Let calls know the block they belong to: in the backward, from the gradient of its output to that of its input."""
        order = itertools.cycle(range(len(model.blocks)))

        def traced(forward: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **more: Any) -> Any:
                index = next(order)
                if index == 0:
                    self._when_differentiated(args, STEM)
                self.where = f"block {index} forward"
                out = forward(*args, **more)
                self._when_differentiated(out, f"block {index} backward")
                self.where = HEAD
                return out

            return run

        if isinstance(model, FastDiffFitDiT):  # its blocks are one operation, which the model's module calls
            stack.enter_context(mock.patch.object(fast_dit, "run_block", traced(fast_dit.run_block)))
        else:
            for block in model.blocks:
                block.forward = traced(block.forward)

    def _when_differentiated(self, tensors: Any, where: str) -> None:
        def arrive(_: Tensor) -> None:
            self.where = where

        for t in tree_leaves(tensors):
            if isinstance(t, Tensor) and t.dim() == 3 and t.requires_grad:
                t.register_hook(arrive)


# -- the stand-ins -----------------------------------------------------------------------------------------------------
def _attention(capability: tuple[int, int]) -> Callable[..., Tensor]:
    """F.scaled_dot_product_attention as PyTorch resolves it on CUDA for bfloat16: cuDNN on Hopper where allowed, else flash."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if torch.is_autocast_enabled("cpu"):  # where fake tensors live; CUDA's autocast narrows them alike
            q, k, v = (x.to(torch.get_autocast_dtype("cpu")) for x in (q, k, v))
        if capability[0] >= 9 and torch.backends.cuda.cudnn_sdp_enabled():
            return torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, False, False)[0]
        if not torch.backends.cuda.flash_sdp_enabled():
            raise NotImplementedError("the ledger knows cuDNN's attention and flash attention, and neither is enabled")
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False)[0]

    return attend


def _cublaslt(recorder: Recorder) -> Any:
    """The compiled CUDA operations, in shapes only."""

    def linear_gelu(h: Tensor, w1: Tensor, b1: Tensor, tune: bool) -> tuple[Tensor, Tensor]:
        u = h.new_empty(h.shape[0], w1.shape[0])
        g = torch.empty_like(u)
        recorder.note("cublaslt_linear_gelu", {"h": h, "w1": w1, "b1": b1}, (g, u))
        return g, u

    def dgelu_dgrad(dbranch: Tensor, w2: Tensor, u: Tensor, tune: bool) -> tuple[Tensor, Tensor]:
        du, db1 = torch.empty_like(u), u.new_empty(u.shape[1], dtype=torch.float32)
        recorder.note("cublaslt_dgelu_dgrad", {"dbranch": dbranch, "w2": w2, "u": u}, (du, db1))
        return du, db1

    return types.SimpleNamespace(linear_gelu=linear_gelu, dgelu_dgrad=dgelu_dgrad)


class _Together:
    """Weights side by side, as they lie on a device: one tensor for the same weights, of shapes only."""

    def __init__(self) -> None:
        self.known: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, weights: list[Tensor]) -> Tensor:
        with _saying(None):
            memory = tuple(w.untyped_storage()._cdata for w in weights)
            if memory not in self.known:
                self.known[memory] = weights[0].new_empty(sum(w.shape[0] for w in weights), *weights[0].shape[1:])
            return self.known[memory]


def _memory(tensor: Tensor) -> int:
    """In place of an address: a number for the memory of a tensor that has none."""
    with _saying(None):
        return tensor.untyped_storage()._cdata


@contextlib.contextmanager
def pretended_cuda(recorder: Recorder, device: str, choices: dict[str, str]) -> Iterator[None]:
    """What runs on ``_saying(CUDA)`` tensors sees a CUDA device of this kind."""
    from difffit_fast import _rooms, kernels
    from difffit_fast.ops import eight_bit, linear_gelu, probe, stacked

    capability = CAPABILITY[device]

    def choose(
        self: probe.Chooser, key: tuple, candidates: dict[str, Any], device: torch.device, default: str | None = None
    ) -> str:
        taken = ASSUMED.get(key[0], default or self.default)
        chosen = recorder.trace.choices[key[0]] = choices.get(key[0], taken)
        return chosen

    with contextlib.ExitStack() as stack:
        stack.enter_context(_rooms.use_kernels("auto"))

        def replace(owner: Any, **values: Any) -> None:
            for name, value in values.items():
                stack.enter_context(mock.patch.object(owner, name, value))

        for found in pkgutil.iter_modules(kernels.__path__):
            module = importlib.import_module(f"{kernels.__name__}.{found.name}")
            stand_ins = {"launch": recorder.launch, "architecture": lambda _: 10 * capability[0] + capability[1]}
            replace(module, **{name: value for name, value in stand_ins.items() if hasattr(module, name)})
        replace(probe.Chooser, choose=choose)
        if "cublaslt" in choices.values():
            replace(
                linear_gelu, refusal=lambda *_: None, cuda_ops=lambda: _cublaslt(recorder), _aligned=Tensor.contiguous
            )
        replace(stacked, together=_Together())  # there are no addresses to compare
        replace(FakeTensor, device=property(_said_device), data_ptr=_memory)
        replace(eight_bit, PLAIN=(*eight_bit.PLAIN, FakeTensor), emulated=lambda: False, _error=lambda *_: 0.0)
        replace(torch.backends.cudnn, is_available=lambda: True)
        replace(torch.cuda, get_device_capability=lambda _=None: capability, current_device=lambda: 0)
        replace(torch.cuda, is_current_stream_capturing=lambda: False, get_device_name=lambda _=None: device.upper())
        replace(torch.nn.functional, scaled_dot_product_attention=_attention(capability))
        yield


# -- a step ------------------------------------------------------------------------------------------------------------
def build(mode: str, config: dict[str, Any], recorder: Recorder) -> nn.Module:
    """The model of a mode of ``modes.py``, in bfloat16 where that mode is, of fake parameters. Inside FakeTensorMode."""
    with (
        mock.patch.object(DiT, "initialize_weights", lambda self: None),
        mock.patch.object(nn.Linear, "reset_parameters", lambda self: None),
        torch.device("meta"),
    ):
        if is_ours(mode):
            model: nn.Module = FastDiffFitDiT(**config, compute_dtype=torch.bfloat16)
        else:
            model = (PlainDiffFitDiT if mode.startswith("frozen") else DiT)(**config)
    for module in model.modules():
        for key, p in module._parameters.items():
            if p is not None:
                made = torch.empty(p.shape, dtype=p.dtype)
                module._parameters[key] = nn.Parameter(made, requires_grad=p.requires_grad)
    return model.train()


def _quantize(model: FastDiffFitDiT, kind: str) -> None:
    """Make both copies of every weight, as the first step does on a device."""
    from difffit_fast.ops.eight_bit import eight_bit_of

    model.set_frozen_dtype(kind)
    for _, linear in linears(model):
        kept = eight_bit_of(linear.weight)
        for backward in (False, True) if kept is not None else ():
            kept.side(linear.weight, backward)


def trace_step(
    mode: str, config: dict[str, Any], batch: int, device: str = "h200", choices: dict[str, str] | None = None,
    change: Callable[[nn.Module], None] | None = None,
) -> Trace:  # fmt: skip
    """Every call of a training step that is not the first.

    Args:
        mode: "fast", "fast-fp8", "fast-int8", "full", "frozen": as in ``modes.py``, in eager mode; a captured step has the same
            launches.
        config: arguments of the DiT.
        choices: operation -> implementation, where the package would time two; :data:`ASSUMED` or the default is taken for the
            others.
        change: does something to the model before it runs (for tests).

    Raises:
        DiffFitError: the device has no such eight-bit products.
    """
    recorder = Recorder()
    side, channels = config.get("input_size", 32), config.get("in_channels", 4)
    out = 2 * channels if config.get("learn_sigma", True) else channels
    with FakeTensorMode(), pretended_cuda(recorder, device, choices or {}), contextlib.ExitStack() as stack:
        recorder.on = False
        model = build(mode, config, recorder)
        if change is not None:
            change(model)
        recorder.follow(model, stack)
        data = {
            "x": torch.empty(batch, channels, side, side),
            "t": torch.empty(batch, dtype=torch.int64),
            "y": torch.empty(batch, dtype=torch.int64),
            "target": torch.empty(batch, out, side, side),
        }
        with recorder, _saying(CUDA):
            if frozen_dtype(mode) != "bf16":
                _quantize(model, frozen_dtype(mode))
            params = [p for p in model.parameters() if p.requires_grad]
            autocast = None if is_ours(mode) else torch.bfloat16
            ema = [torch.empty_like(p) for p in params]
            cpu = torch.device("cpu")  # for PyTorch's dispatcher and autocast, whatever the tensors say
            optimizer = make_optimizer(params, cpu)
            forward_backward, update = step_parts(model, optimizer, ema, params, autocast, cpu, data, {})
            for p in model.parameters():
                p.grad = torch.empty_like(p) if p.requires_grad else None
            update()  # the optimizer makes its state
            recorder.on, recorder.where = True, STEM
            forward_backward()
            recorder.where = UPDATE
            update()
    return recorder.trace
