"""Which attention runs: the passes around a library's, and the choice between them by the clock.

A library for the CPU stands in for those on CUDA.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from op_cases import HEADS, attention_inputs, true_attention
from optest import BF16, F32, TOLERANCE, check_numbers, draw

from difffit_fast.ops import attention as module
from difffit_fast.ops.attention import attention


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """PyTorch's flash attention for the CPU in place of one on CUDA, with the same signature; who was called."""
    aten, called = torch.ops.aten, []

    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        called.append("forward")
        o, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, scale=scale)
        return o, lse.transpose(1, 2).contiguous().transpose(1, 2)

    def backward(do: torch.Tensor, q, k, v, o, lse, scale: float) -> tuple[torch.Tensor, ...]:
        called.append("backward")
        given = (do, q, k, v, o, lse.transpose(1, 2).contiguous().transpose(1, 2))
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(*given, 0.0, False, scale=scale)

    monkeypatch.setitem(module._LIBRARIES, "sdpa-flash", (forward, backward))
    monkeypatch.setattr(module, "available_backends", lambda *_: ["fused", "sdpa-flash", "math"])
    yield called
    module.forget()


@pytest.mark.parametrize("vectors", ["", "bias", "gamma", "each"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_around_a_library(vectors: str, dtype: torch.dtype, library: list[str]) -> None:
    """What is done before and after a library's attention gives the gradients of the bare product."""
    inputs = attention_inputs(vectors, (2, 37, 72), F32, dtype)
    op = lambda *given: attention(given[0], HEADS, *given[1:], backend="sdpa-flash")  # noqa: E731
    check_numbers(op, true_attention, inputs, (True,) * len(inputs), 4 * TOLERANCE[dtype])
    assert {"forward", "backward"} <= set(library)


@pytest.mark.parametrize(
    ("times", "chosen"),
    [
        ({"fused": 10.0, "sdpa-flash": 5.0}, "sdpa-flash"),
        ({"fused": 5.0, "sdpa-flash": 10.0}, "fused"),
        ({"fused": 10.0, "sdpa-flash": RuntimeError("no kernel")}, "fused"),
        ({"fused": RuntimeError("refused"), "sdpa-flash": 10.0}, "sdpa-flash"),
    ],
)
def test_the_device_decides(times: dict, chosen: str, library: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The faster one, copies counted, for forward and backward alike; one that refuses drops out, and the report says so."""
    tried: list[str] = []
    names = [name for name, time in times.items() if not isinstance(time, Exception)]

    def timer(call: Callable, device: torch.device) -> float:
        failing = [name for name in times if name not in names and name not in tried]
        name = failing[0] if failing and (failing[0] == "fused" or "fused" in tried) else names[len(tried) % len(names)]
        tried.append(name)
        if name in failing:
            raise times[name]
        call()
        return times[name]

    module.forget()
    monkeypatch.setattr(module._chooser, "_timer", timer)
    x = draw(1, 5, 72, dtype=F32).requires_grad_()
    attention(x, HEADS).sum().backward()
    (entry,) = module._chooser.report()
    assert entry["chosen"] == chosen and entry["problem"][0] == "attention"
    if any(isinstance(t, Exception) for t in times.values()):
        assert "failed: " in entry["why"]
    library.clear()
    attention(x, HEADS).sum().backward()
    assert library == (["forward", "backward"] if chosen == "sdpa-flash" else [])


def test_a_library_that_computes_something_else_is_not_taken(
    library: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However fast it is."""
    forward, backward = module._LIBRARIES["sdpa-flash"]

    def wrong(*args: Any) -> tuple[torch.Tensor, ...]:
        dq, dk, dv = backward(*args)
        return dq, dk, 1.2 * dv

    monkeypatch.setitem(module._LIBRARIES, "sdpa-flash", (forward, wrong))
    times = iter([1.0, 100.0, *[100.0] * 20])

    def timer(call: Callable, device: torch.device) -> float:
        call()
        return next(times)

    module.forget()
    monkeypatch.setattr(module._chooser, "_timer", timer)
    attention(draw(1, 5, 72, dtype=F32), HEADS)
    (entry,) = module._chooser.report()
    assert entry["chosen"] == "fused" and "dqkv of sdpa-flash is off by" in entry["why"]


def test_where_ours_is_not_there_plain_pytorch_stands_behind_the_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "available_backends", lambda *_: ["sdpa-efficient", "math"])
    assert module.resolve_backend("auto", torch.device("cpu"), F32, 24) == ["sdpa-efficient", "math"]
