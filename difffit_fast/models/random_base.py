"""A base of random weights, for trying things out: made from its sizes and a seed alone, so that a delta on it can be used."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from .dit import DiT


def random_dit(config: Mapping[str, Any], seed: int, *, alive: bool = True, objective: str | None = None) -> DiT:
    """The DiT of these constructor arguments whose weights come from ``seed``; no global generator is moved.

    A DiT starts as the zero function, which stays one while its weights are frozen: ``alive`` opens its gates a little.
    """
    with seeded(seed):
        dit = DiT(**config, objective=objective)
        if alive:
            linears = [block.adaLN_modulation[1] for block in dit.blocks]
            with torch.no_grad():
                for linear in [*linears, dit.final_layer.adaLN_modulation[1], dit.final_layer.linear]:
                    linear.weight.normal_(std=0.02)
    dit.random_base = seed
    return dit


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The CPU's global generator at ``seed`` inside, as it was outside."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
