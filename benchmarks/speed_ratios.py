"""What the rounds of speed.py say: medians, ratios, and when they say enough to stop.

A ratio is that of the medians. Its interval comes from the ratios of single rounds, in which both modes stood next to each
other: two of their order statistics enclose the true median with at least 95 % probability, whatever the times'
distribution is (from the binomial distribution, and not before there are six rounds). A ratio is *settled* when its interval
lies on one side of 1, or is no wider than 3 % to either side. speed.py looks after every round and stops when
the ratios against the best full and the best frozen are settled, so an interval is a little optimistic.

Modes in eight bits do not compute the same numbers and are never "ours". They have a ratio of their own, the time of ours over
theirs: how many times faster than bfloat16's products they are.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

from modes import EIGHT_BIT, FROZEN, FULL, OURS

CONFIDENCE = 0.95
NARROW = 0.03
CLAIMS = ("vs_best_full", "vs_best_frozen", *(f"{kind}_vs_fast" for kind in EIGHT_BIT))


def spread(seconds: list[float]) -> dict[str, float]:
    ms = sorted(1e3 * s for s in seconds)
    quantile = lambda q: ms[min(len(ms) - 1, round(q * (len(ms) - 1)))]  # noqa: E731
    return {"median": statistics.median(ms), "p10": quantile(0.1), "p90": quantile(0.9)}


def median_interval(values: list[float], confidence: float = CONFIDENCE) -> tuple[float, float] | None:
    """The narrowest pair of order statistics, equally far from both ends, that encloses the median; None if none does."""
    n, ordered = len(values), sorted(values)
    found = None
    outside = 0.0  # chance that fewer than k of n values lie below the median
    for k in range(1, n // 2 + 1):
        outside += math.comb(n, k - 1) / 2**n
        if 1 - 2 * outside < confidence:
            break
        found = ordered[k - 1], ordered[n - k]
    return found


def best(modes: dict[str, Any], names: tuple[str, ...]) -> str | None:
    present = [n for n in names if n in modes]
    return min(present, key=lambda n: modes[n]["step_ms"]["median"]) if present else None


def ratios(modes: dict[str, Any], times: dict[str, list[float]], floor: dict[str, Any]) -> dict[str, Any]:
    """Ours against the best of each kind, among the modes that were timed in the rounds and whose numbers were right."""
    modes = {name: m for name, m in modes.items() if times.get(name)}
    ours = best(modes, OURS)
    if ours is None:
        return {}
    out: dict[str, Any] = {"ours": ours}
    for key, names in (
        ("vs_best_full", FULL),
        ("vs_best_frozen", FROZEN),
        ("vs_lora", ("lora",)),
        ("vs_full_tf32", ("full-tf32",)),
    ):
        other = best(modes, names)
        if other is None:
            continue
        out[key] = {"of": other} | times_faster(modes, times, ours, other)
    for kind, names in EIGHT_BIT.items():
        faster = best(modes, names)
        if faster is not None:
            out[f"{kind}_vs_fast"] = {"of": f"{faster} to {ours}"} | times_faster(modes, times, faster, ours)
    if "frozen_ms" in floor:
        out["step_over_floor"] = modes[ours]["step_ms"]["median"] / floor["frozen_ms"]
    memories = [modes[n]["peak_memory_bytes"] for n in FULL if n in modes]
    mine = modes[ours]["peak_memory_bytes"]
    if mine and any(memories):
        out["memory_of_best_full"] = mine / min(m for m in memories if m)
    return out


def times_faster(modes: dict[str, Any], times: dict[str, list[float]], mode: str, other: str) -> dict[str, Any]:
    """The time of ``other`` over that of ``mode``, of the medians and by rounds."""
    rounds = [a / b for a, b in zip(times[other], times[mode], strict=True)]
    value = modes[other]["step_ms"]["median"] / modes[mode]["step_ms"]["median"]
    interval = median_interval(rounds)
    found = {"ratio": value} | {f"round_{k}": v / 1e3 for k, v in spread(rounds).items()}
    return found | {"interval": interval, "settled": settled(interval)}


def settled(interval: tuple[float, float] | None) -> bool:
    if interval is None:
        return False
    low, high = interval
    return low > 1 or high < 1 or high - low <= 2 * NARROW * (low + high) / 2


def all_settled(found: dict[str, Any]) -> bool:
    """Whether the rounds so far allow the claims: every ratio there is of :data:`CLAIMS`."""
    claims = [found[key] for key in CLAIMS if key in found]
    return bool(claims) and all(claim["settled"] for claim in claims)
