"""The launches of one training step and their sums."""

from __future__ import annotations

from typing import Any

from ledger_costs import HOST_US, Launch, host_milliseconds, launches
from ledger_fusion import compiled
from ledger_trace import UPDATE, trace_step
from modes import is_ours

from difffit_fast.models.sizes import model_sizes

MODES = ("fast", "fast-fp8", "fast-int8", "full", "frozen")
KINDS = (
    "products", "eight bits", "attention", "joins", "GELU", "vectors", "sums", "other products", "element-wise", "small", UPDATE,
)  # fmt: skip


def config_of(model: str, image_size: int, **more: Any) -> dict[str, Any]:
    """Arguments of the DiT called ``model`` for images of this size."""
    return {**model_sizes(model), "input_size": image_size // 8, **more}


def step(
    mode: str, config: dict[str, Any], batch: int, device: str = "h200", choices: dict[str, str] | None = None
) -> tuple[list[Launch], float]:
    """The launches of a step and the milliseconds of the host in eager mode."""
    trace = trace_step(mode, config, batch, device, choices)
    if is_ours(mode):
        return launches(trace.calls), host_milliseconds(trace.calls, trace.ops)
    left = compiled(trace.calls)
    return left, sum(one.count for one in left) * HOST_US["call"] / 1e3


def summary(found: list[Launch], host_ms: float, devices: tuple[str, ...] = ("h100", "h200")) -> dict[str, Any]:
    """Launches, GB, TFLOP and predicted milliseconds on these devices, by kind and by half of the step.

    The launches must be theirs: a trace is good for devices of one architecture.
    """

    def sums(part: list[Launch]) -> dict[str, Any]:
        return {
            "launches": sum(one.count for one in part),
            "gigabytes": sum(one.bytes for one in part) / 1e9,
            "teraflop": sum(one.flops for one in part) / 1e12,
            "ms": {name: sum(one.microseconds(name) for one in part) / 1e3 for name in devices},
        }

    kinds = {kind: sums([one for one in found if one.kind == kind]) for kind in KINDS}
    return {
        **sums(found),
        "host_ms": host_ms,
        "forward and backward": sums([one for one in found if one.where != UPDATE]),
        "kinds": {kind: about for kind, about in kinds.items() if about["launches"] or about["gigabytes"]},
    }


def extrapolated(mode: str, config: dict[str, Any], batch: int) -> dict[str, Any]:
    """Like :func:`summary` for a model whose equal blocks need not all be traced: two depths, and a line through them."""
    depth = config["depth"]
    low, high = (summary(*step(mode, {**config, "depth": d}, batch)) for d in (2, 4))

    def line(a: Any, b: Any) -> Any:
        if isinstance(b, dict):
            return {key: line(a.get(key, 0) if isinstance(a, dict) else 0, b[key]) for key in b}
        return a + (b - a) * (depth - 2) / 2

    return line(low, high)
