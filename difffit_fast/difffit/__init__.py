"""DiffFit itself: what trains, the delta that holds it, and the merge that folds it away."""

from .config import PRESETS, DiffFitConfig

__all__ = ["PRESETS", "DiffFitConfig"]
