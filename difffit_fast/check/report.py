"""Findings about a path, and the table that tells them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

LEVELS = ("wrong", "left out", "suspicious")
EXAMPLES = 3


@dataclass
class Finding:
    """``count`` things of one kind; ``examples`` names the first of them."""

    level: str
    what: str
    count: int = 1
    examples: list[str] = field(default_factory=list)


@dataclass
class Report:
    """What a path is, facts about it, and what was found."""

    path: str
    kind: str
    facts: dict[str, Any] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not any(finding.level == "wrong" for finding in self.findings)

    def wrong(self, what: str, *examples: str) -> None:
        self.add("wrong", what, examples)

    def suspicious(self, what: str, *examples: str) -> None:
        self.add("suspicious", what, examples)

    def left_out(self, what: str, *examples: str) -> None:
        self.add("left out", what, examples)

    def add(self, level: str, what: str, examples: Iterable[str]) -> None:
        """One more of a kind; findings of one level and kind are counted together."""
        for known in self.findings:
            if (known.level, known.what) == (level, what):
                break
        else:
            known = Finding(level, what, 0)
            self.findings.append(known)
        examples = list(examples)
        known.count += len(examples) or 1
        known.examples += examples[: EXAMPLES - len(known.examples)]

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        findings = sorted(self.findings, key=lambda finding: LEVELS.index(finding.level))
        return {
            "path": self.path,
            "kind": self.kind,
            "ok": self.ok,
            "facts": self.facts,
            "findings": [dataclasses.asdict(finding) for finding in findings],
        }

    def table(self) -> str:
        """The findings for people, the worst first."""
        facts = ", ".join(f"{key} {value}" for key, value in self.facts.items())
        lines = [f"{self.path}: {self.kind}" + (f" ({facts})" if facts else "")]
        rows = [
            (f["level"], str(f["count"]), f["what"], "; ".join(f["examples"]) + (" …" if f["count"] > EXAMPLES else ""))
            for f in self.to_dict()["findings"]
        ]
        widths = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
        for level, count, what, examples in rows:
            lines.append(f"  {level:<{widths[0]}}  {count:>{widths[1]}}  {what:<{widths[2]}}  {examples}".rstrip())
        counts = Counter(finding.level for finding in self.findings)
        told = ", ".join(f"{counts[level]} kinds {level}" for level in LEVELS if counts[level])
        return "\n".join([*lines, told or "nothing found: all of it was read"])


def check_values(tensors: Iterable[tuple[str, Tensor]], report: Report) -> None:
    """Values that are not finite, or too large for anything that trained well."""
    for name, tensor in tensors:
        if not tensor.is_floating_point():
            report.wrong("tensors that are not floating", f"{name} ({str(tensor.dtype).removeprefix('torch.')})")
        elif not bool(torch.isfinite(tensor).all()):
            report.wrong("tensors with NaN or infinity", name)
        elif tensor.numel() and tensor.abs().max() > LARGE:
            report.suspicious(f"tensors with values above {LARGE}", f"{name} ({tensor.abs().max():.3g})")


LARGE = 1000
