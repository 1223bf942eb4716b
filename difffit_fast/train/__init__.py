"""Training: ``Trainer(...).train()``, and the settings of a run."""

from .config import TrainConfig
from .readback import NonFiniteLossError
from .trainer import Trainer, TrainResult

__all__ = ["NonFiniteLossError", "TrainConfig", "TrainResult", "Trainer"]
