"""What DiffFit trains: biases, a scale γ on the branches, affine LayerNorm and the class embedding.

Xie et al., "DiffFit: Unlocking Transferability of Large Diffusion Models via Simple Parameter-Efficient Fine-Tuning",
ICCV 2023 (arXiv 2304.06648). γ starts at 1 and LayerNorm at the identity, so a model starts as the pre-trained one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..errors import DiffFitError

GAMMA_SITES = ("qkv", "proj", "attn", "mlp")
DELTAS = "deltas."  # what the parameters of deltas beside the model's own are called (see .deltas)


def is_extra(name: str) -> bool:
    """Whether a parameter is one that DiffFit adds to a DiT: γ, or an affine LayerNorm's."""
    return ".gamma" in name or ".norm" in name


def neutral(name: str) -> float:
    """The value at which a parameter that DiffFit adds changes nothing."""
    return 0.0 if name.endswith(".bias") else 1.0


@dataclass(frozen=True)
class DiffFitConfig:
    """The trainable parts of a DiT.

    Attributes:
        bias: every bias of the blocks, the patch embedding and the final layer.
        time_embedder_bias: the biases of the timestep MLP as well (the paper's figure shows it frozen).
        class_embedding: the class table, null class included.
        affine_norm: give every LayerNorm a weight (1) and a bias (0) and train them.
        gamma: where γ scales: "qkv" (3D, output of the qkv projection), "proj" (D, output of proj), "attn" and "mlp"
            (D, the branch before it is added). γ on proj and attn multiply the same tensor; both exist in known checkpoints.
        gamma_blocks: which blocks have γ: "half" (the first half, 14 of 28: the paper's best), "all", a count k of first
            blocks, or −k for the last k blocks.
    """

    bias: bool = True
    time_embedder_bias: bool = False
    class_embedding: bool = True
    affine_norm: bool = True
    gamma: tuple[str, ...] = GAMMA_SITES
    gamma_blocks: str | int = "half"

    def __post_init__(self) -> None:
        if isinstance(self.gamma, str) or not isinstance(self.gamma, Iterable):
            raise DiffFitError(f"gamma must be a list of sites among {', '.join(GAMMA_SITES)}; got {self.gamma!r:.60}")
        object.__setattr__(self, "gamma", tuple(self.gamma))
        for name in ("bias", "time_embedder_bias", "class_embedding", "affine_norm"):
            if not isinstance(getattr(self, name), bool):
                raise DiffFitError(f"{name} must be true or false; got {getattr(self, name)!r:.60}")
        unknown = [site for site in self.gamma if site not in GAMMA_SITES]
        if unknown:
            raise DiffFitError(
                f"gamma sites must be among {', '.join(GAMMA_SITES)}; got {', '.join(map(str, unknown))}"
            )
        blocks = self.gamma_blocks
        if isinstance(blocks, bool) or not (blocks in ("half", "all") or isinstance(blocks, int)):
            raise DiffFitError(f'gamma_blocks must be "half", "all" or a number of blocks; got {blocks!r}')
        if self.time_embedder_bias and not self.bias:
            raise DiffFitError("time_embedder_bias=True needs bias=True")

    @classmethod
    def resolve(cls, value: str | DiffFitConfig | dict[str, Any]) -> DiffFitConfig:
        """A preset name, a configuration, or its dictionary -> the configuration."""
        if isinstance(value, cls):
            return value
        if isinstance(value, dict):
            known = {f.name for f in fields(cls)}
            if unknown := sorted(set(value) - known):
                raise DiffFitError(f"unknown DiffFit option {unknown[0]!r}; known: {', '.join(sorted(known))}")
            return cls(**value)
        if value in PRESETS:
            return PRESETS[value]
        raise DiffFitError(f"difffit must be a DiffFitConfig or one of {', '.join(PRESETS)}; got {value!r}")

    @property
    def name(self) -> str:
        """The preset's name, or "custom"."""
        return next((name for name, preset in PRESETS.items() if preset == self), "custom")

    def block_has_gamma(self, index: int, depth: int) -> bool:
        """Whether block ``index`` of ``depth`` carries γ."""
        if not self.gamma:
            return False
        n = {"half": depth // 2, "all": depth}.get(self.gamma_blocks, self.gamma_blocks)
        return index < n if n >= 0 else index >= depth + n

    def trains(self, name: str) -> bool:
        """Whether the parameter ``name`` of a FastDiffFitDiT is trained; those of deltas beside its own are not its."""
        if name.startswith(DELTAS):
            return False
        if name.startswith("y_embedder."):
            return self.class_embedding
        if name.startswith("t_embedder."):
            return name.endswith(".bias") and self.time_embedder_bias
        if is_extra(name):  # they exist only where the configuration made them
            return True
        return name.endswith(".bias") and self.bias

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> DiffFitConfig:
        return cls.resolve(json.loads(text))


PRESETS: dict[str, DiffFitConfig] = {
    # the paper's 0.83 M: 832,928 for DiT-XL/2 with 101 classes
    "paper": DiffFitConfig(),
    # what the public DiT code of DiffFit trains (no LayerNorm exists there to be trained): 703,904
    "minimax": DiffFitConfig(time_embedder_bias=True, affine_norm=False),
    # γ on both branches of every block, all biases: 671,648
    "block": DiffFitConfig(time_embedder_bias=True, affine_norm=False, gamma=("attn", "mlp"), gamma_blocks="all"),
    # biases and the class embedding: 607,136
    "bitfit": DiffFitConfig(time_embedder_bias=True, affine_norm=False, gamma=()),
}
