"""The first and the last sentences of a run."""

from __future__ import annotations

import signal
from pathlib import Path

from .._processes import World
from ..data.base import TrainingData
from ..models.frozen_dtype import summary
from .best import Best
from .runs import Start
from .setup import Parts
from .track import Tracker


def introduce(tracker: Tracker, parts: Parts, world: World, start: Start, folder: Path) -> None:
    """Where the run begins, what trains, and on what."""
    for message in start.messages:
        tracker.say(message)
    if start.checkpoint is not None:
        tracker.say(f"Resumed from step {start.checkpoint.step} of {folder}")
    else:
        tracker.say(f"Experiment directory created at {folder}")
    for note in parts.notes:
        tracker.say(note)
    total = sum(p.numel() for p in parts.model.parameters())
    trained = sum(p.numel() for p in parts.parameters.values())
    tracker.say(f"{parts.name} parameters: {total:,}, of which {trained:,} are trained ({100 * trained / total:.3f} %)")
    if getattr(parts.model, "frozen_dtype", "bf16") != "bf16":
        tracker.say(summary(parts.model.eight_bit_report()))
    tracker.say(
        f"Dataset contains {len(parts.stream):,} images of {parts.stream.data.num_classes} classes; training to step "
        f"{parts.total_steps} with {parts.config.global_batch_size} images a step on {world.size} process(es)"
    )


def say_farewell(
    tracker: Tracker, data: TrainingData, step: int, number: int, best: Best | None, best_path: Path
) -> None:
    """What could not be read, which step is the best, and how the run ended: by signal ``number``, or as it should (0)."""
    report = getattr(data, "report", list)()
    if report:
        tracker.say(f"{len(report)} unreadable images were passed over, the first: {report[0].file}")
    if best is not None:
        tracker.say(f"The smallest validation loss is {best.loss:.4f}, of step {best.step}: {best_path}")
    if number:
        name = signal.Signals(number).name
        tracker.say(f"Stopped by {name} after step {step}; --resume auto goes on from there")
    else:
        tracker.say("Done!")
