"""How close samples are to real images: FID, sFID, Inception Score, precision and recall, any Fréchet distance.

>>> from difffit_fast.evaluate import compare, frechet_distance
>>> frechet_distance([0.0], [[1.0]], [3.0], [[4.0]])              # (0 - 3)² + (1 - 2)²
10.0
"""

from __future__ import annotations

from .compare import METRICS, Evaluator, compare
from .features import FEATURES, Extractor, get_extractor
from .frechet import RunningStatistics, frechet_distance
from .inception import InceptionV3, load_inception, random_inception
from .resize import tf1_resize
from .scores import InceptionScore, precision_recall
from .statistics import Statistics, load_statistics, save_statistics

__all__ = [
    "compare",
    "frechet_distance",
    "Evaluator",
    "Statistics",
    "load_statistics",
    "save_statistics",
    "METRICS",
    "FEATURES",
    "Extractor",
    "get_extractor",
    "RunningStatistics",
    "InceptionScore",
    "precision_recall",
    "InceptionV3",
    "load_inception",
    "random_inception",
    "tf1_resize",
]
