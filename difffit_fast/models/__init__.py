"""Models: ``dit`` is the plain reference, ``fast_dit`` the one that DiffFit trains."""

from .dit import DiT, DiT_models

__all__ = ["DiT", "DiT_models"]
