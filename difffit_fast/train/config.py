"""The settings of a training run: one typed dataclass, from which the flags of ``difffit train`` are made.

Order of precedence: the defaults below, then ``--config file.yaml``, then flags. What results is saved with the run.
Flag names are those of DiT's ``train.py`` where it has one.
"""

# ruff: noqa: RUF009 (the helpers that make a field)
from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from .._bounds import (
    BATCH,
    CLASS_COUNT,
    FRACTION,
    FROM_ONE,
    FROM_ZERO,
    GRID,
    IMAGES,
    NOT_NEGATIVE,
    POSITIVE,
    SEED,
    SIDE,
    STEPS,
    WORKERS,
)
from .._files import read_yaml, write_text
from .._words import nearest
from ..errors import DiffFitError
from ..models.classes import CLASSES
from ..models.frozen_dtype import DEFAULT_KEEP, FROZEN_DTYPES
from .schedule import SCHEDULES
from .settings import flag, option, settings_of

# The learning rates that the paper and the public scripts use: ten times higher where little is trained.
# Learning rates where there are many images, and few: within 2e-4 of the least loss of every rate and length that was tried on
# 20, 100 and 416 images (docs/experiments.md, experiments/glyphs).
DEFAULT_LR = {"full": (1e-4, 1e-5)}
DEFAULT_LR_SMALL = (1e-3, 3e-4)  # of methods that train few parameters
FEW = 50  # images, at most
DEFAULT_STEPS = (
    24_000  # the transfer protocol of the literature, of batches of 32; fewer images are seen 32 times each,
)
LEAST_STEPS = 200  # in so many steps at least
DEFAULT_WORKERS = 4  # that prepare batches, at most

_data, _model, _optimisation, _run = (partial(option, group) for group in ("data", "model", "optimisation", "run"))
_processes = partial(option, "several processes (started with torchrun)")


@dataclass
class TrainConfig:
    """Settings of a run; each field is also a flag (``--data-path``) and a key of the YAML file (``data_path``).

    A value of a wrong type is refused at once, and one out of bounds or against another by :meth:`validate`: each by a
    :class:`DiffFitError` that names the setting, what was expected and what came.
    """

    # fmt: off
    # data
    data_path: str | None = _data(
        None, "folder with one sub-folder of images per class", steers=True, rival="feature_path")
    feature_path: str | None = _data(
        None, "features cached by difffit extract, instead of --data-path", steers=True, rival="data_path")
    image_size: int | None = _data(
        None, "side of the images, pixels (default: that of the features, else of --ckpt, else 256)",
        steers=True, bounds=SIDE, part_of_model=True)
    vae: str = _data(
        "auto", "ema, mse, a diffusers folder, a hub name, or none to train on pixels (gray ones for a model of one channel); "
        "auto: that of --ckpt where it is recorded, else ema, and none for models without the four channels of its latents",
        steers=True, part_of_model=True, null="none")
    flip: str = _data(
        "horizontal", "mirror half of the visits of images: horizontal; none where left and right are not alike (letters)",
        steers=True, choices=("horizontal", "none"), null="none", unrecorded="horizontal")
    num_classes: int | None = _data(
        None, "classes of the model (default: those of the data)", steers=True, bounds=CLASS_COUNT, part_of_model=True)
    val_path: str | None = _data(
        None, "images by class, or cached features, for the validation loss; of classes of the training data or of --ckpt",
        steers=False, rival="val_fraction")
    val_fraction: float = _data(
        0.0, "part of the training data held out for the validation loss",
        steers=True, bounds=FRACTION, rival="val_path")
    val_samples: int = _data(512, "images that the validation loss looks at, at most", steers=False, bounds=FROM_ONE)
    num_workers: int | None = _data(
        None, "processes that prepare batches, as far as there are CPUs beside the one that trains; 0: a thread of this process "
        f"(default: {DEFAULT_WORKERS}, or as many as there are CPUs for)", steers=False, bounds=WORKERS)
    # model
    model: str | None = _model(
        None, "DiT-XL/2, SiT-XL/2 and their kin (default: that of --ckpt, else DiT-XL/2)", steers=True)
    model_args: dict = _model(
        {}, "sizes other than the model's, e.g. depth=2 hidden_size=64 num_heads=2", steers=True, part_of_model=True)
    ckpt: str | None = _model(
        None, "pre-trained DiT or SiT checkpoint, or a base of the package by name (default: random weights)",
        steers=True)
    num_heads: int | None = _model(
        None, "attention heads, for unpublished widths in files that do not record them", steers=True, bounds=SIDE)
    classes: str = _model(
        "match", "rows of the class table that classes start from: match takes those of --ckpt by name and makes others from "
        "the names most like theirs, keep makes none and keeps those that no image is of, new draws all at random",
        steers=True, choices=CLASSES)
    method: str = _model(
        "difffit", "difffit, bitfit, full, lora, or another of difffit_fast.baselines", steers=True, part_of_model=True)
    method_args: dict = _model(
        {}, "options of the method, e.g. rank=16, or gamma_blocks=4 for difffit", steers=True, part_of_model=True)
    difffit: str = _model(
        "paper", "what DiffFit trains: paper, minimax, block, bitfit", steers=True, part_of_model=True)
    class_dropout_prob: float | None = _model(
        None, "how often a label is dropped, for classifier-free guidance (default: 0.1 where there is a null class)",
        steers=True, bounds=FRACTION)
    objective: str | None = _model(
        None, "ddpm (DiT: noise and learned variance) or flow (SiT) (default: that of the model)",
        steers=True, choices=("ddpm", "flow"), part_of_model=True)
    precision: str = _model(
        "auto", "arithmetic of the model; auto: bf16 where the device has it, else fp32",
        steers=True, choices=("auto", "bf16", "fp32"))
    frozen_dtype: str = _model(
        "bf16", "products with the frozen weights of the blocks: bf16 (as --precision says), fp8, int8, or auto, what is fastest "
        "on the device", steers=True, choices=FROZEN_DTYPES, null="bf16", unrecorded="bf16")
    frozen_keep: str = _model(
        ",".join(DEFAULT_KEEP), "what of the blocks' linears stays out of --frozen-dtype, by name or pattern, with commas: "
        "*.fc2,blocks.0.*.forward", steers=True, unrecorded=",".join(DEFAULT_KEEP))
    tf32: bool = _model(True, "TF32 matrix products in fp32 on GPUs that have them", steers=True)
    compile: bool = _model(False, "run the model through torch.compile", steers=True)
    gradient_checkpointing: bool = _model(
        False, "compute each block again in the backward pass instead of keeping what it needs: less memory, and a second "
        "forward pass; the same gradients", steers=False)
    cuda_graph: str = _model(
        "auto", "replay forward and backward from a CUDA graph, which keeps the memory of a step's activations while the "
        "run lasts; auto: where that can be", steers=False, choices=("auto", "on", "off"))
    # optimisation
    global_batch_size: int = _optimisation(
        32, "images per step, over all processes and accumulation", steers=True, bounds=BATCH)
    accumulate: int = _optimisation(
        1, "parts that a process works through its share of the batch in", steers=True, bounds=BATCH)
    lr: float | None = _optimisation(
        None, f"learning rate (default: 1e-3, full 1e-4; of up to {FEW} images 3e-4, full 1e-5)",
        steers=True, bounds=POSITIVE)
    weight_decay: float = _optimisation(0.0, "AdamW's weight decay", steers=True, bounds=NOT_NEGATIVE)
    warmup_steps: int = _optimisation(0, "steps of linear warm-up", steers=True, bounds=FROM_ZERO)
    lr_schedule: str = _optimisation(
        "constant", "the learning rate after its warm-up: constant, or falling to 0 at the last step as a cosine or linear",
        steers=True, choices=tuple(SCHEDULES), unrecorded="constant")
    max_grad_norm: float = _optimisation(
        0.0, "clip the gradient to this norm (metrics.jsonl has the norms before); 0: do not", steers=True, bounds=NOT_NEGATIVE)
    ema_decay: float = _optimisation(
        0.9999, "decay of the averaged weights, after its own warm-up", steers=True, bounds=FRACTION)
    max_steps: int | None = _optimisation(
        None, f"steps to train (default: of 32 images, as many as there are images, at least {LEAST_STEPS} and at most "
        f"{DEFAULT_STEPS}; of larger batches as many fewer)", steers=False, bounds=FROM_ONE, rival="epochs")
    epochs: int | None = _optimisation(
        None, "passes over the data, instead of --max-steps", steers=False, bounds=IMAGES, rival="max_steps")
    # the run
    results_dir: str = _run("results", "where runs are kept, each in NNN-<model>", steers=False)
    resume: str = _run(
        "none", "none, auto (the newest run with these settings), a run folder or a checkpoint in it", steers=False)
    global_seed: int = _run(0, "seed of everything random", steers=True, bounds=SEED)
    device: str = _run("auto", "auto, cpu, cuda or cuda:N", steers=False)
    log_every: int = _run(100, "steps between lines of the log", steers=False, bounds=FROM_ONE)
    ckpt_every: int = _run(1000, "steps between checkpoints", steers=False, bounds=FROM_ONE)
    keep_checkpoints: int = _run(5, "newest checkpoints to keep; 0: all", steers=False, bounds=FROM_ZERO)
    val_every: int = _run(
        1000, "steps between validation losses, where there is validation data; the first and the last step have theirs anyway",
        steers=False, bounds=FROM_ONE)
    best_by: str = _run(
        "none", "val: the averaged weights of the smallest validation loss so far are kept as checkpoints/best.safetensors",
        steers=False, choices=("none", "val"), null="none")
    sample_every: int = _run(0, "steps between grids of samples; 0: none", steers=False, bounds=FROM_ZERO)
    num_samples: int = _run(8, "images in such a grid", steers=False, bounds=GRID)
    num_sampling_steps: int = _run(50, "sampling steps of such a grid", steers=False, bounds=STEPS)
    cfg_scale: float = _run(4.0, "guidance of such a grid", steers=False, bounds=NOT_NEGATIVE)
    fid_every: int = _run(
        0, "steps between Fréchet distances of samples to the reference; 0: none", steers=False, bounds=FROM_ZERO)
    fid_reference: str | None = _run(
        None, "folder of images or .npz to compare samples with (default: --data-path)", steers=False)
    fid_samples: int = _run(1000, "samples of such a distance", steers=False, bounds=IMAGES)
    fid_features: str = _run(
        "inception", "its features: inception, random-inception, dinov2 or module:function", steers=False)
    inception_weights: str | None = _run(None, "file of the public FID Inception weights", steers=False)
    tensorboard: bool = _run(False, "write TensorBoard events into the run folder (extra [track])", steers=False)
    wandb: str | None = _run(None, "report to this project of Weights & Biases, where wandb is installed", steers=False)
    progress: bool = _run(True, "show a progress bar", steers=False)
    # several processes
    fsdp: bool = _processes(
        False, "method full: shard weights, gradients and optimizer over the processes (FSDP2)", steers=True)
    dist_timeout: float = _processes(
        600.0, "seconds after which a process that does not answer ends the job", steers=False, bounds=POSITIVE)
    # fmt: on

    def __post_init__(self) -> None:
        for name, setting in settings_of(type(self)).items():
            setattr(self, name, setting.coerce(getattr(self, name)))

    # -- making one ----------------------------------------------------------------------------------------------------
    @classmethod
    def load(
        cls, path: str | os.PathLike[str] | None = None, overrides: Mapping[str, Any] | None = None
    ) -> TrainConfig:
        """The defaults, then the YAML file at ``path``, then ``overrides``; validated."""
        values = read_yaml(path) if path is not None else {}
        config = cls.from_dict(values, source=f"{path}" if path is not None else "")
        changes = dict(overrides or {})
        settings = settings_of(cls)
        for name, setting in settings.items():
            rival = setting.rival
            if rival and changes.get(name) is not None and rival not in changes:  # a flag beats its rival in the file
                config = config.replace(**{rival: settings[rival].default})
        return config.replace(**changes).validate()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "") -> TrainConfig:
        """A configuration from keys and values; an unknown key is an error that names the nearest known one."""
        return cls().replace(_source=source, **values)

    def replace(self, _source: str = "", **changes: Any) -> TrainConfig:
        """A copy with ``changes``."""
        settings = settings_of(type(self))
        clean: dict[str, Any] = {}
        for raw, value in changes.items():
            key = str(raw).replace("-", "_")
            if key not in settings:
                where = f" in {_source}" if _source else ""
                raise DiffFitError(
                    f"unknown setting {str(raw)!r}{where}; the nearest known one is {nearest(key, settings)!r}"
                )
            clean[key] = value
        return dataclasses.replace(self, **clean)

    # -- checking ------------------------------------------------------------------------------------------------------
    def validate(self) -> TrainConfig:
        """Check every setting on its own and against the others; returns self."""
        settings = settings_of(type(self))
        for name, setting in settings.items():
            setting.check(getattr(self, name))
        given = [name for name, setting in settings.items() if getattr(self, name) != setting.default]
        for name in given:
            rival = settings[name].rival
            if rival in given:
                both = f"{getattr(self, name)} and {getattr(self, rival)}"
                raise DiffFitError(f"give {flag(name)} or {flag(rival)}, not both; got both: {both}")
        if self.accumulate > self.global_batch_size:
            raise DiffFitError(
                f"--accumulate must be at most --global-batch-size; got {self.accumulate} and {self.global_batch_size}"
            )
        if self.fsdp and self.method != "full":
            raise DiffFitError(f"--fsdp is for --method full; {self.method} has too little to shard")
        return self

    def learning_rate(self, images: int) -> float:
        """``lr``, or the method's default for so many images."""
        many, few = DEFAULT_LR.get(self.method, DEFAULT_LR_SMALL)
        return self.lr if self.lr is not None else few if images <= FEW else many

    def total_steps(self, images: int) -> int:
        """Steps to train, of so many images: ``max_steps``, those of ``epochs``, or the default."""
        if self.max_steps is not None:
            return self.max_steps
        if self.epochs is not None:
            return max(1, -(-self.epochs * images // self.global_batch_size))
        return max(1, -(-32 * min(DEFAULT_STEPS, max(LEAST_STEPS, images)) // self.global_batch_size))

    @property
    def _also_steering(self) -> tuple[str, ...]:
        """Settings that steer training because of what others are: a falling rate falls to the last step."""
        return ("max_steps",) if self.lr_schedule != "constant" else ()

    # -- keeping -------------------------------------------------------------------------------------------------------
    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the effective configuration as YAML; ``--config`` reads it back."""
        write_text(Path(path), yaml.safe_dump(self.to_dict(), sort_keys=False))

    def differences(self, other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """The settings that steer training and are others in ``other``, as (theirs, ours).

        One that is missing there, from before it was a setting, counts as what it was then, where that is declared.
        """
        mine = self.to_dict()
        theirs = {
            name: other.get(name, setting.unrecorded)
            for name, setting in settings_of(type(self)).items()
            if (setting.steers or name in self._also_steering) and (name in other or setting.unrecorded is not None)
        }
        return {name: (value, mine[name]) for name, value in theirs.items() if value != mine[name]}
