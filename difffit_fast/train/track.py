"""What a run tells: log.txt in DiT's format, metrics.jsonl for machines, a progress bar, TensorBoard, wandb."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from .._extras import require
from .config import TrainConfig

LOG_FILE, METRICS_FILE = "log.txt", "metrics.jsonl"


def open_trackers(config: TrainConfig) -> None:
    """Fail now, in one sentence, if a tracker that was asked for is not installed."""
    if config.tensorboard:
        require("torch.utils.tensorboard", "track", "--tensorboard")
    if config.wandb:
        require("wandb", "track", "--wandb")


class Tracker:
    """The voice of a run. ``folder`` None: a process that keeps quiet (all but the first).

    Args:
        resumed_at: the step that the run goes on from, None for one that begins; later lines of ``metrics.jsonl`` are cut
            off.
    """

    def __init__(self, folder: Path | None, config: TrainConfig, resumed_at: int | None, total_steps: int) -> None:
        self.quiet = folder is None
        self._bar: tqdm | None = None
        self._files: list[IO[str]] = []
        self._board = self._wandb = None
        if folder is None:
            return
        last = -1 if resumed_at is None else resumed_at  # what is looked at before the first step stands at step 0
        _cut_metrics(folder / METRICS_FILE, last)
        self._log = open(  # noqa: SIM115 (open for the run)
            folder / LOG_FILE, "a", encoding="utf-8", errors="backslashreplace", buffering=1
        )
        self._metrics = open(folder / METRICS_FILE, "a", encoding="utf-8", buffering=1)  # noqa: SIM115
        self._files = [self._log, self._metrics]
        if config.progress:
            self._bar = tqdm(
                total=total_steps, initial=resumed_at or 0, unit="step", dynamic_ncols=True, smoothing=0.05
            )
        if config.tensorboard:
            module = require("torch.utils.tensorboard", "track", "--tensorboard")
            self._board = module.SummaryWriter(str(folder / "tensorboard"), purge_step=last + 1)
        if config.wandb:
            module = require("wandb", "track", "--wandb")
            self._wandb = module.init(
                project=config.wandb, name=folder.name, dir=str(folder), config=config.to_dict(), resume="allow",
                id=f"{folder.resolve().parent.name}-{folder.name}",
            )  # fmt: skip

    def say(self, text: str) -> None:
        """A line in log.txt and on the screen."""
        if self.quiet:
            return
        self._log.write(f"[{time.strftime('%Y-%m-%d %H:%M:%S')}] {text}\n")
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr)

    def step(self, images_per_second: float, loss: float) -> None:
        """One more step on the bar, and its numbers beside it; the rate is 0 before it can be known."""
        if self._bar is None:
            return
        if images_per_second > 0:
            self._bar.set_postfix_str(f"loss {loss:.4f}, {images_per_second:.1f} images/s", refresh=False)
        self._bar.update()

    def numbers(self, step: int, **values: float) -> None:
        """Measured values of a step, to the files and trackers."""
        if self.quiet:
            return
        self._metrics.write(json.dumps({"step": step, **values}) + "\n")
        finite = {key: value for key, value in values.items() if math.isfinite(value)}
        if self._board is not None:
            for key, value in finite.items():
                self._board.add_scalar(key, value, step)
        if self._wandb is not None:
            self._wandb.log(finite, step=step)

    def image(self, step: int, path: Path) -> None:
        """A grid of samples that lies at ``path``."""
        if self._board is not None:
            import numpy as np
            from PIL import Image

            self._board.add_image("samples", np.asarray(Image.open(path).convert("RGB")), step, dataformats="HWC")
        if self._wandb is not None:
            self._wandb.log({"samples": require("wandb", "track").Image(str(path))}, step=step)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()
        for file in self._files:
            file.close()
        self._files = []


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; a last line that a kill cut short is left out."""
    path = Path(folder) / METRICS_FILE
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def _cut_metrics(path: Path, last_step: int) -> None:
    """Keep the lines up to ``last_step``: a resumed run writes the later ones again."""
    if path.is_file():
        from .._files import write_text

        kept = [line for line in read_metrics(path.parent) if line["step"] <= last_step]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
