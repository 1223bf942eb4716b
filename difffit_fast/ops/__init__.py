"""The operations, each in one file of the same stem as its kernels, tests and benchmark."""

from .adaln import adaln
from .attention import attention
from .colsum import frozen_qkv
from .dispatch import kernels_mode, use_kernels
from .frozen_linear import frozen_linear
from .mlp import frozen_mlp
from .residual import residual, residual_adaln

__all__ = [
    "adaln",
    "attention",
    "frozen_linear",
    "frozen_mlp",
    "frozen_qkv",
    "kernels_mode",
    "residual",
    "residual_adaln",
    "use_kernels",
]
