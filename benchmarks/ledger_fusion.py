"""What ``torch.compile`` is assumed to leave of a step that was traced in eager mode. A model of it, not its output.

The products, attentions and other library calls stay as traced. Element-wise calls, copies and sums between them become
fused passes, by these rules:

- A pass holds what can run between the same library calls: what is connected, as producer and consumer or by reading
  the same large tensor. Sums along rows (LayerNorm) belong to it.
- It reads each tensor from outside once and writes what a library call or a later pass wants.
- Sums over tokens or samples (gradients of biases, scales, gates) are one more pass over what they are made of, with a
  second launch for the partial sums.
- What the backward wants of a forward pass is computed again from what is in memory anyway, and not stored.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from ledger_costs import Launch, is_free, kind_by_size, launches
from ledger_trace import UPDATE, Call, Spec

_KEPT = {
    *("mm", "addmm", "bmm", "convolution", "convolution_backward", "embedding", "embedding_dense_backward", "mse_loss"),
    *("_scaled_dot_product_cudnn_attention", "_scaled_dot_product_cudnn_attention_backward"),
    *("_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_backward"),
}
_SHARED = 1 << 20  # bytes of a tensor that two passes are joined for


def _kept(call: Call) -> bool:
    return call.name in _KEPT or call.where == UPDATE


def _over_rows(call: Call) -> bool:
    """Whether it is a sum that keeps the last size: one over tokens or samples."""
    return call.name == "sum" and call.out[0].shape[-1:] == call.tensors()[0].shape[-1:]


@dataclass
class _Graph:
    """Who makes what, and what has to be in memory."""

    calls: list[Call]
    maker: dict[int, int] = field(default_factory=dict)  # memory -> the call that made it
    level: dict[int, int] = field(default_factory=dict)  # call -> library calls before it, on the longest way
    stored: set[int] = field(default_factory=set)  # memory that a pass writes

    def __post_init__(self) -> None:
        for i, call in enumerate(self.calls):
            self.level[i] = 0
            for t in call.tensors():
                made = self.maker.get(t.memory)
                if made is None:
                    continue
                maker = self.calls[made]
                ends = _kept(maker) or _over_rows(maker)
                self.level[i] = max(self.level[i], self.level[made] + ends)
            for t in call.tensors():
                made = self.maker.get(t.memory)
                if made is not None and not self.one_pass(made, i) and (_kept(call) or self.same_way(made, i)):
                    self.stored.add(t.memory)
            self.maker.update({t.memory: i for t in call.out})

    def same_way(self, a: int, b: int) -> bool:
        return self.calls[a].backward == self.calls[b].backward

    def one_pass(self, a: int, b: int) -> bool:
        fusible = not _kept(self.calls[a]) and not _kept(self.calls[b]) and not _over_rows(self.calls[a])
        return fusible and self.same_way(a, b) and self.level[a] == self.level[b]

    def sources(self, t: Spec, seen: set[int] | None = None) -> dict[int, Spec]:
        """What has to be read to have ``t``: itself where it is in memory, else what it is made of."""
        seen = set() if seen is None else seen
        made = self.maker.get(t.memory)
        if made is None or _kept(self.calls[made]) or _over_rows(self.calls[made]) or t.memory in self.stored:
            return {t.memory: t}
        found: dict[int, Spec] = {}
        if made not in seen:
            seen.add(made)
            for one in self.calls[made].tensors():
                found.update(self.sources(one, seen))
        return found


def _passes(graph: _Graph) -> list[list[int]]:
    """The calls of each fused pass."""
    parent = list(range(len(graph.calls)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    readers: dict[tuple[int, int, bool], int] = {}
    for i, call in enumerate(graph.calls):
        if _kept(call):
            continue
        for t in call.tensors():
            made = graph.maker.get(t.memory)
            if made is not None and made < i and graph.one_pass(made, i):
                parent[root(made)] = root(i)
            elif t.bytes >= _SHARED:
                key = (t.memory, graph.level[i], call.backward)
                parent[root(readers.setdefault(key, i))] = root(i)
    groups: dict[int, list[int]] = defaultdict(list)
    for i, call in enumerate(graph.calls):
        if not _kept(call):
            groups[root(i)].append(i)
    return list(groups.values())


def _pass_launches(graph: _Graph, group: list[int]) -> list[tuple[int, Launch]]:
    own = {t.memory for i in group for t in graph.calls[i].out}
    reads: dict[int, Spec] = {}
    writes: dict[int, Spec] = {}
    sums: dict[int, Spec] = {}
    summed = 0
    for i in group:
        call = graph.calls[i]
        for t in call.tensors():
            into = sums if _over_rows(call) else reads
            for memory, spec in graph.sources(t).items():
                if memory not in own or _over_rows(call):
                    into[memory] = max(into.get(memory, spec), spec, key=lambda s: s.bytes)
        if _over_rows(call):
            summed += call.out[0].bytes
        else:
            writes.update({t.memory: t for t in call.out if t.memory in graph.stored})
    last, where = group[-1], graph.calls[group[-1]].where
    shape = max((graph.calls[i].out[0].shape for i in group if graph.calls[i].out), key=len, default=())
    found = []
    if writes:
        bytes = sum(t.bytes for t in (*reads.values(), *writes.values()))
        found.append(Launch("fused pass", "", bytes, shape="×".join(map(str, shape)), where=where))
    if sums:
        bytes = sum(t.bytes for t in sums.values()) + summed
        found.append(Launch("fused sums", "", bytes, shape="×".join(map(str, shape)), where=where, count=2))
    return [(last, one._replace(kind=kind_by_size("element-wise", one.bytes))) for one in found]


def compiled(calls: list[Call]) -> list[Launch]:
    """The launches of the traced calls after fusion, roughly in order."""
    calls = [c for c in calls if not is_free(c)]
    launches(calls)  # an unknown call is an error here too
    graph = _Graph(calls)
    placed = [(i, one) for i, c in enumerate(calls) if _kept(c) for one in launches([c])]
    placed += [one for group in _passes(graph) for one in _pass_launches(graph, group)]
    return [one for _, one in sorted(placed, key=lambda pair: pair[0])]
