"""The operations, each in one file of the same stem as its kernels, tests and benchmark.

``difffit_fast.ops.<stem>`` is the module; the function lies in it: ``from difffit_fast.ops.adaln import adaln``.

One word for each thing, the same in Python, Triton, C++, CUDA, schemas, tests and benchmarks:

========================= ============================================================================================
x, y                      residual stream before and after a branch, (B, T, D)
h                         what a branch reads, normalised and modulated, (B, T, D)
branch                    what a branch returns, without the bias of its last linear, (B, T, D)
scale, shift              of a LayerNorm, (B, D): h = x̂·scale + shift. ``scale`` is the whole factor on x̂, so under DiT's
                          modulation it is 1 + DiT's scale
gate, bias                of a join, (B, D): y = x + gate·branch + bias. ``gate`` is the whole factor on the branch, DiT's
                          gate times every γ of the branch; ``bias`` is the last linear's bias times that factor
mean, rstd, eps           statistics of a LayerNorm, (B, T), and what is added to the variance
qkv, proj, fc1, fc2       the linears of a block; u is what fc1 gives, g = GELU(u)
gamma                     DiffFit's γ
d<name>                   gradient of <name>: dscale, dshift, dgate, dbias, dbranch, dx, dqkv, dgamma
========================= ============================================================================================

z is what qkv gives, bare: without bias and γ. In :mod:`.frozen_linear` and on qkv, fc1 and fc2 a bias is that of the linear
itself. In :mod:`.attention` and :mod:`.block` ``vectors`` is what acts on the channels of z.
"""

from .. import _ext
from .._rooms import kernels_mode, use_kernels
from . import adaln, attention, block, colsum, frozen_gelu, frozen_linear, frozen_mlp, modulation, residual

kernel_report = _ext.kernel_report  # complete here, where every operation has registered itself

__all__ = [
    "adaln",
    "attention",
    "block",
    "colsum",
    "frozen_gelu",
    "frozen_linear",
    "frozen_mlp",
    "kernel_report",
    "kernels_mode",
    "modulation",
    "residual",
    "use_kernels",
]
