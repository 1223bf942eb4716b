"""Other ways to fine-tune a DiT, in the same harness as DiffFit: what it is compared with.

>>> from difffit_fast import DiT
>>> from difffit_fast import baselines
>>> dit = DiT(input_size=8, hidden_size=64, depth=2, num_heads=2, num_classes=10)
>>> model = baselines.apply("adapter", dit, bottleneck=16)
>>> model.num_trainable                                  # 2 adapters and the class embedding
4960

| name | trained beside the class embedding | DiT-XL/2, 101 classes |
|---|---|---|
| ``full`` | everything except the fixed position table | 673,799,072 |
| ``difffit`` | biases, affine LayerNorm, γ (options ``difffit``, ``gamma_blocks``) | 832,928 |
| ``bitfit`` | biases | 607,136 |
| ``lora`` | low-rank updates, of qkv (the paper's) or all linear maps (``targets="all"``) | 1,149,696 (rank 8) |
| ``adapter`` | an AdaptFormer bottleneck in every MLP branch | 4,280,320 |
| ``vpt`` | prompt tokens before every block (VPT-deep) | 2,827,008 |
| ``class_embedding`` | nothing | 117,504 |

Every model of :func:`apply` has ``forward(x, t, y)``, ``forward_with_cfg``, ``trainable_parameters()``,
``named_trainable_parameters()`` and ``num_trainable``; exactly its trainables require gradients. LoRA needs the extra ``peft``.
"""

from __future__ import annotations

from .base import BaselineDiT
from .registry import METHODS, apply, load_trainables, save_trainables

__all__ = ["METHODS", "BaselineDiT", "apply", "load_trainables", "save_trainables"]
