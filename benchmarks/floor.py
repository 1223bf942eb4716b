"""The floor of a training step: its matrix products and attentions alone, with the fastest library call for each.

For a product with a frozen weight: forward x·Wᵀ and input gradient dy·W; full fine-tuning adds the weight gradient dyᵀ·x.
Candidates are plain ``mm``, ``mm`` with a transposed copy of the weight and, on the CPU, oneDNN with packed weights; for
attention SDPA (each backend that runs) and batched products (two forward, four backward, softmax left out). On a CPU
without instructions for the dtype, float32 products are candidates too.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from difffit_fast._devices import cpu_has_fast


def _fastest(candidates: dict[str, Callable[[], Any]], device: torch.device, repeats: int = 7) -> str:
    """Name of the candidate with the smallest median time; candidates that cannot run drop out."""
    times: dict[str, list[float]] = {}
    for _ in range(repeats):
        for name, call in list(candidates.items()):
            try:
                _sync(device)
                start = time.perf_counter()
                call()
                _sync(device)
                times.setdefault(name, []).append(time.perf_counter() - start)
            except (RuntimeError, NotImplementedError):
                candidates.pop(name)
                times.pop(name, None)
    return min(times, key=lambda n: sorted(times[n])[len(times[n]) // 2])


def _sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Floor:
    """``step()`` runs the products and attentions of one training step of kind "full" or "frozen".

    Every layer has its own weights, as in the model, so that caches see the same traffic. ``calls`` names the choices.
    """

    def __init__(self, config: dict[str, Any], batch: int, dtype: torch.dtype, device: torch.device, kind: str) -> None:
        self.calls: dict[str, str] = {}
        d, depth, heads = config["hidden_size"], config["depth"], config["num_heads"]
        tokens = (config["input_size"] // config["patch_size"]) ** 2
        rows, hidden = batch * tokens, int(d * config["mlp_ratio"])
        emulated = device.type == "cpu" and dtype == torch.bfloat16 and not cpu_has_fast(dtype)
        self.dtype = torch.float32 if emulated else dtype
        if emulated:
            self.calls["dtype"] = "float32 products, since this CPU has no bf16 ones"
        self.device = device
        make = lambda *shape: torch.randn(*shape, dtype=self.dtype, device=device)  # noqa: E731
        self.x = {n: make(rows, n) for n in {d, 3 * d, hidden}}
        self.products: list[Callable[[], Any]] = []
        chosen: dict[tuple[int, int], tuple[str, str]] = {}
        for _ in range(depth):
            for n, k in ((3 * d, d), (d, d), (hidden, d), (d, hidden)):
                weight = make(n, k)
                if (n, k) not in chosen:
                    names = tuple(
                        _fastest(dict(self._candidates(weight, rows, backward)), device) for backward in (False, True)
                    )
                    chosen[n, k] = names  # type: ignore[assignment]
                    self.calls[f"{n}x{k}"] = " / ".join(names)
                for backward, name in zip((False, True), chosen[n, k], strict=True):
                    self.products.append(self._candidates(weight, rows, backward)[name])
                if kind == "full":
                    self.products.append(lambda n=n, k=k: torch.mm(self.x[n].t(), self.x[k]))
        modulation = make((6 * depth + 2) * d, d)
        c, dm = make(batch, d), make(batch, modulation.shape[0])
        self.products += [lambda: torch.mm(c, modulation.t()), lambda: torch.mm(dm, modulation)]
        if kind == "full":
            self.products.append(lambda: torch.mm(dm.t(), c))
        qkv = make(batch, tokens, 3, heads, d // heads)
        attention = self._attention(qkv, batch, heads, tokens)
        name = _fastest(dict(attention), device)
        self.calls["attention"] = name
        self.attention, self.depth = attention[name], depth

    def step(self) -> None:
        for product in self.products:
            product()
        for _ in range(self.depth):
            self.attention()

    def _candidates(self, weight: Tensor, rows: int, backward: bool) -> dict[str, Callable[[], Tensor]]:
        n, k = weight.shape
        x = self.x[n] if backward else self.x[k]
        right = weight if backward else weight.t()
        copy = right.contiguous() if not backward else weight.t().contiguous().t()
        calls: dict[str, Callable[[], Tensor]] = {
            "mm": lambda: torch.mm(x, right),
            "mm-transposed": lambda: torch.mm(x, copy),
        }
        if self.device.type == "cpu":
            with contextlib.suppress(RuntimeError):
                packed = torch.ops.mkldnn._reorder_linear_weight(right.t().contiguous(), rows)
                calls["onednn-packed"] = lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
        return calls

    def _attention(self, qkv: Tensor, batch: int, heads: int, tokens: int) -> dict[str, Callable[[], Any]]:
        q, k, v = (t.transpose(1, 2).detach().requires_grad_() for t in qkv.unbind(2))
        g = torch.randn_like(q)

        def sdpa(backend: SDPBackend | None) -> None:
            with sdpa_kernel(backend) if backend else contextlib.nullcontext(), torch.enable_grad():
                o = F.scaled_dot_product_attention(q, k, v)
                torch.autograd.grad(o, (q, k, v), g)

        calls: dict[str, Callable[[], Any]] = {"sdpa": lambda: sdpa(None)}
        if self.device.type == "cuda":
            for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
                calls[f"sdpa-{backend.name.lower()}"] = lambda backend=backend: sdpa(backend)
        flat = [t.detach().reshape(batch * heads, tokens, -1) for t in (q, k, v, g)]
        p = torch.softmax(torch.randn(batch * heads, tokens, tokens, dtype=qkv.dtype, device=qkv.device), -1)

        def batched() -> None:
            fq, fk, fv, fg = flat
            torch.bmm(fq, fk.transpose(1, 2))
            torch.bmm(p, fv)
            torch.bmm(p.transpose(1, 2), fg)
            torch.bmm(fg, fv.transpose(1, 2))
            torch.bmm(p, fk)
            torch.bmm(p.transpose(1, 2), fq)

        if tokens <= 1024:
            calls["batched-mm"] = batched
        return calls
