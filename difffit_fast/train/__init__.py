"""Training: ``Trainer(...).train()``, and the settings of a run."""

from .config import TrainConfig
from .trainer import NonFiniteLossError, Trainer, TrainResult

__all__ = ["NonFiniteLossError", "TrainConfig", "TrainResult", "Trainer"]
