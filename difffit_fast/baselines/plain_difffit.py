"""DiffFit in plain PyTorch, what FastDiffFitDiT is compared with: :class:`~difffit_fast.models.plain_difffit.PlainDiffFitDiT`."""

from ..models.plain_difffit import PlainDiffFitDiT

__all__ = ["PlainDiffFitDiT"]
