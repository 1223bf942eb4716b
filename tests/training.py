"""What the tests of training share: a few real images, a tiny model, and ways to start a run."""

from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path

import numpy as np
from PIL import Image

TINY = {"depth": 2, "hidden_size": 48, "num_heads": 2, "patch_size": 4}
# Settings of every run here: 16-pixel digits, no VAE, a model of a hundred thousand parameters.
SETTINGS = {
    "vae": "none", "image_size": 16, "model_args": TINY, "global_batch_size": 8, "num_workers": 0, "device": "cpu",
    "precision": "fp32", "progress": False, "log_every": 1, "max_steps": 1,
}  # fmt: skip


def digits(folder: Path, classes: int = 3, each: int = 8) -> Path:
    """Handwritten digits (scikit-learn's) as PNG files in class folders."""
    from sklearn.datasets import load_digits

    data = load_digits()
    for label in range(classes):
        (folder / f"digit{label}").mkdir(parents=True, exist_ok=True)
        for i, index in enumerate(np.flatnonzero(data.target == label)[:each]):
            pixels = np.kron(data.images[index], np.ones((2, 2))) * 15.9
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"digit{label}" / f"{i:03d}.png")
    return folder


def flags(**settings: object) -> list[str]:
    """Settings as command-line flags of ``difffit train``."""
    words = []
    for key, value in {**SETTINGS, **settings}.items():
        name = "--" + key.replace("_", "-")
        if isinstance(value, bool):
            words.append(name if value else name.replace("--", "--no-", 1))
        elif isinstance(value, dict):
            words += [name, *(f"{k}={v}" for k, v in value.items())]
        else:
            words += [name, str(value)]
    return words


# Processes that are killed, or that train together, come from a server which has imported everything: quick and clean.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["training", "difffit_fast.cli.train", "difffit_fast.train.trainer"])


class Process:
    """``difffit`` with ``words`` in a process of its own, one thread; what it prints goes to a file."""

    def __init__(self, words: list[str], log: Path, **variables: str) -> None:
        self.log = log
        self._process = _context.Process(target=_run, args=(words, str(log), variables))
        self._process.start()

    def signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    @property
    def running(self) -> bool:
        return self._process.is_alive()

    def wait(self, timeout: float = 120) -> tuple[int, str]:
        """Exit code (-n: killed by signal n) and what was printed; killed when it takes too long."""
        self._process.join(timeout)
        if self.running:
            self._process.kill()
            self._process.join()
        return self._process.exitcode, self.log.read_text() if self.log.exists() else ""


def _run(words: list[str], log: str, variables: dict[str, str]) -> None:
    import torch

    from difffit_fast.cli import main

    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(variables)
    torch.set_num_threads(1)
    if "CRASH_BELOW" in variables:
        from crash import install

        install(variables["CRASH_BELOW"], int(variables["CRASH_AT"]), variables["CRASH_REPORT"])
    if "RECORDED" in variables:  # as on a GPU, with recordings for graphs
        from recording import Recorder

        from difffit_fast.train import setup, step

        setup.choose_capture = lambda *_: (True, "recordings instead of a graph")
        step.capture = Recorder()
    code = main(words)
    sys.stdout.flush()
    os._exit(code)


def tiny_features(images):
    """Features for a Fréchet distance that takes no time: means of quarters of the picture."""
    import torch

    return torch.nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)
