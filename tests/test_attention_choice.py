"""Which attention runs: the passes around a library's, and the choice between them by the clock.

A library for the CPU stands in for those on CUDA.
"""

from __future__ import annotations

from collections.abc import Iterator
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


def decided(monkeypatch: pytest.MonkeyPatch, times: dict[str, tuple[Any, Any]]) -> dict[str, tuple[str, str]]:
    """What is chosen, and why, each way, where ``times``, forward and backward, are what each needs; an error is raised."""
    ways: list[str] = []
    choose = module._choose

    def noting(way: str, *given: Any) -> str:
        ways.append(way)
        return choose(way, *given)

    def timer(call: Any, device: torch.device) -> float:
        time = times[call.args[0]][ways[-1] == "backward"]
        if isinstance(time, Exception):
            raise time
        call()
        return time

    module.forget()
    monkeypatch.setattr(module, "_choose", noting)
    monkeypatch.setattr(module._chooser, "_timer", timer)
    x = draw(1, 5, 72, dtype=F32).requires_grad_()
    attention(x, HEADS).sum().backward()
    entries = module._chooser.report()
    assert {entry["problem"][0] for entry in entries} == {"attention"}
    return {entry["problem"][1]: (entry["chosen"], entry["why"]) for entry in entries}


REFUSED = RuntimeError("no kernel")


@pytest.mark.parametrize(
    ("ours", "theirs", "chosen"),
    [
        ((10.0, 10.0), (5.0, 5.0), "library library"),
        ((5.0, 5.0), (10.0, 10.0), "ours ours"),
        ((5.0, 10.0), (10.0, 5.0), "ours library"),
        ((10.0, 5.0), (5.0, 10.0), "library ours"),
        ((10.0, 10.0), (REFUSED, 5.0), "ours library"),
        ((10.0, 10.0), (5.0, REFUSED), "library ours"),
        ((REFUSED, REFUSED), (10.0, 10.0), "library library"),
    ],
)
def test_the_device_decides(
    ours: tuple, theirs: tuple, chosen: str, library: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The faster one, passes counted, forward and backward apart; one that refuses drops out, and the report says so. Whatever
    is chosen, the gradients are right."""
    names = {"ours": "fused", "library": "sdpa-flash"}
    found = decided(monkeypatch, {"fused": ours, "sdpa-flash": theirs})
    assert [found[way][0] for way in ("forward", "backward")] == [names[who] for who in chosen.split()]
    for way, first, second in zip(("forward", "backward"), ours, theirs, strict=True):
        assert ("failed: no kernel" in found[way][1]) == (REFUSED in (first, second))
    library.clear()
    x = draw(1, 5, 72, dtype=F32)
    check_numbers(lambda x: attention(x, HEADS), lambda x: true_attention(x), [x], (True,), 4 * TOLERANCE[F32])
    assert [way in library for way in ("forward", "backward")] == [who == "library" for who in chosen.split()]


@pytest.mark.parametrize("way", ["forward", "backward"])
def test_a_library_that_computes_something_else_is_not_taken(
    way: str, library: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However fast it is; the other way still is."""
    right = module._LIBRARIES["sdpa-flash"]

    def wrong(*args: Any) -> tuple[torch.Tensor, ...]:
        *first, last = right[way == "backward"](*args)
        return *first, 1.2 * last

    monkeypatch.setitem(module._LIBRARIES, "sdpa-flash", (wrong, right[1]) if way == "forward" else (right[0], wrong))
    found = decided(monkeypatch, {"fused": (10.0, 10.0), "sdpa-flash": (1.0, 1.0)})
    other = "forward" if way == "backward" else "backward"
    assert found[way][0] == "fused" and " of sdpa-flash is off by" in found[way][1]
    assert found[other][0] == "sdpa-flash"


def test_a_library_that_gives_other_bits_again_has_to_be_named(
    library: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those do that add up gradients in the order in which programs end."""
    forward, backward = module._LIBRARIES["sdpa-flash"]
    runs = iter(range(1, 1000))

    def uneven(*args: Any) -> tuple[torch.Tensor, ...]:
        dq, dk, dv = backward(*args)
        return dq * (1 + 1e-6 * (next(runs) % 3 == 0)), dk, dv

    monkeypatch.setitem(module._LIBRARIES, "sdpa-flash", (forward, uneven))
    found = decided(monkeypatch, {"fused": (10.0, 10.0), "sdpa-flash": (1.0, 1.0)})
    assert found["forward"][0] == "sdpa-flash"
    assert (
        found["backward"][0] == "fused" and "dqkv of sdpa-flash has other bits on another run" in found["backward"][1]
    )
    library.clear()
    x = draw(1, 5, 72, dtype=F32).requires_grad_()
    attention(x, HEADS, backend="sdpa-flash").sum().backward()
    assert library == ["forward", "backward"]


def test_where_ours_is_not_there_plain_pytorch_stands_behind_the_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "available_backends", lambda *_: ["sdpa-efficient", "math"])
    assert module.resolve_backend("auto", torch.device("cpu"), F32, 24) == ["sdpa-efficient", "math"]
