"""The settings of a training run: one typed dataclass, from which the flags of ``difffit train`` are made.

Order of precedence: the defaults below, then ``--config file.yaml``, then flags. What results is saved with the run.
Flag names are those of DiT's ``train.py`` where it has one.
"""

# ruff: noqa: RUF009 (the helper that makes a field)
from __future__ import annotations

import dataclasses
import math
import os
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from .._files import read_yaml, write_text
from .._words import nearest
from ..errors import DiffFitError

# The learning rates that the paper and the public scripts use: ten times higher where little is trained.
DEFAULT_LR = {"full": 1e-4, "lora": 1e-4}
DEFAULT_LR_SMALL = 1e-3
DEFAULT_STEPS = 24_000  # the transfer protocol of the literature


def _option(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    metadata = {"help": help, "choices": choices}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class TrainConfig:
    """Settings of a run; each field is also a flag (``--data-path``) and a key of the YAML file (``data_path``).

    Raises :class:`DiffFitError` from :meth:`validate`, which names the setting, what was expected and what came.
    """

    # data
    data_path: str | None = _option(None, "folder with one sub-folder of images per class")
    feature_path: str | None = _option(None, "features cached by difffit extract, instead of --data-path")
    image_size: int | None = _option(None, "side of the images, pixels (default: that of the features, else 256)")
    vae: str = _option("ema", "ema, mse, a diffusers folder, a hub name, or none to train on pixels")
    num_classes: int | None = _option(None, "classes of the model (default: those of the data)")
    val_path: str | None = _option(None, "images by class, or cached features, for the validation loss")
    val_fraction: float = _option(0.0, "part of the training data held out for the validation loss")
    val_samples: int = _option(512, "images that the validation loss looks at, at most")
    num_workers: int = _option(4, "processes that prepare batches; 0: one thread of this process")
    # model
    model: str | None = _option(None, "DiT-XL/2, SiT-XL/2 and their kin (default: that of --ckpt, else DiT-XL/2)")
    model_args: dict = _option({}, "sizes other than the model's, e.g. depth=2 hidden_size=64 num_heads=2")
    ckpt: str | None = _option(None, "pre-trained DiT or SiT checkpoint (default: random weights, for trying out)")
    num_heads: int | None = _option(None, "attention heads, for unpublished widths in files that do not record them")
    method: str = _option("difffit", "difffit, bitfit, full, lora, or another of difffit_fast.baselines")
    method_args: dict = _option({}, "options of the method, e.g. rank=16, or gamma_blocks=4 for difffit")
    difffit: str = _option("paper", "what DiffFit trains: paper, minimax, block, bitfit")
    class_dropout_prob: float | None = _option(
        None, "how often a label is dropped, for classifier-free guidance (default: 0.1 where there is a null class)"
    )
    objective: str | None = _option(
        None, "ddpm (DiT: noise and learned variance) or flow (SiT) (default: that of the model)", ("ddpm", "flow")
    )
    precision: str = _option(
        "auto", "arithmetic of the model; auto: bf16 where the device has it, else fp32", ("auto", "bf16", "fp32")
    )
    tf32: bool = _option(True, "TF32 matrix products in fp32 on GPUs that have them")
    compile: bool = _option(False, "run the model through torch.compile")
    # optimisation
    global_batch_size: int = _option(32, "images per step, over all processes and accumulation")
    accumulate: int = _option(1, "parts that a process works through its share of the batch in")
    lr: float | None = _option(None, "learning rate (default: 1e-3; full and lora: 1e-4)")
    weight_decay: float = _option(0.0, "AdamW's weight decay")
    warmup_steps: int = _option(0, "steps of linear warm-up")
    max_grad_norm: float = _option(0.0, "clip the gradient to this norm; 0: do not")
    ema_decay: float = _option(0.9999, "decay of the averaged weights, after its own warm-up")
    max_steps: int | None = _option(None, f"steps to train (default: {DEFAULT_STEPS})")
    epochs: int | None = _option(None, "passes over the data, instead of --max-steps")
    # the run
    results_dir: str = _option("results", "where runs are kept, each in NNN-<model>")
    resume: str = _option("none", "none, auto (the newest run with these settings), a run folder or a checkpoint in it")
    global_seed: int = _option(0, "seed of everything random")
    device: str = _option("auto", "auto, cpu, cuda or cuda:N")
    log_every: int = _option(100, "steps between lines of the log")
    ckpt_every: int = _option(1000, "steps between checkpoints")
    keep_checkpoints: int = _option(5, "newest checkpoints to keep; 0: all")
    val_every: int = _option(1000, "steps between validation losses, where there is validation data")
    sample_every: int = _option(0, "steps between grids of samples; 0: none")
    num_samples: int = _option(8, "images in such a grid")
    num_sampling_steps: int = _option(50, "sampling steps of such a grid")
    cfg_scale: float = _option(4.0, "guidance of such a grid")
    fid_every: int = _option(0, "steps between Fréchet distances of samples to the reference; 0: none")
    fid_reference: str | None = _option(None, "folder of images or .npz to compare samples with (default: --data-path)")
    fid_samples: int = _option(1000, "samples of such a distance")
    fid_features: str = _option("inception", "its features: inception, random-inception, dinov2 or module:function")
    inception_weights: str | None = _option(None, "file of the public FID Inception weights")
    tensorboard: bool = _option(False, "write TensorBoard events into the run folder (extra [track])")
    wandb: str | None = _option(None, "report to this project of Weights & Biases, where wandb is installed")
    progress: bool = _option(True, "show a progress bar")
    # several processes
    fsdp: bool = _option(False, "method full: shard weights, gradients and optimizer over the processes (FSDP2)")
    dist_timeout: float = _option(600.0, "seconds after which a process that does not answer ends the job")

    # -- making one ----------------------------------------------------------------------------------------------------
    @classmethod
    def load(
        cls, path: str | os.PathLike[str] | None = None, overrides: Mapping[str, Any] | None = None
    ) -> TrainConfig:
        """The defaults, then the YAML file at ``path``, then ``overrides``; validated."""
        values = read_yaml(path) if path is not None else {}
        config = cls.from_dict(values, source=f"{path}" if path is not None else "")
        changes = dict(overrides or {})
        for one, other in [*RIVALS, *(pair[::-1] for pair in RIVALS)]:
            if changes.get(one) is not None and other not in changes:  # a flag beats its rival in the file, too
                config = config.replace(**{other: getattr(cls(), other)})
        return config.replace(**changes).validate()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "") -> TrainConfig:
        """A configuration from keys and values; an unknown key is an error that names the nearest known one."""
        return cls().replace(_source=source, **values)

    def replace(self, _source: str = "", **changes: Any) -> TrainConfig:
        """A copy with ``changes``, each checked for its type."""
        types = typing.get_type_hints(type(self))
        clean: dict[str, Any] = {}
        for raw, value in changes.items():
            key = str(raw).replace("-", "_")
            if key not in types:
                where = f" in {_source}" if _source else ""
                raise DiffFitError(
                    f"unknown setting {str(raw)!r}{where}; the nearest known one is {nearest(key, types)!r}"
                )
            clean[key] = _coerce(key, value, types[key])
        return dataclasses.replace(self, **clean)

    # -- checking ------------------------------------------------------------------------------------------------------
    def validate(self) -> TrainConfig:
        """Check every setting on its own and against the others; returns self."""
        for f in fields(self):
            choices = f.metadata.get("choices")
            if choices and getattr(self, f.name) not in (*choices, f.default):
                raise DiffFitError(f"{flag(f.name)} must be one of {', '.join(choices)}; got {getattr(self, f.name)!r}")
        for name in ("global_batch_size", "accumulate", "log_every", "ckpt_every", "val_every",
                     "val_samples", "num_samples", "num_sampling_steps"):  # fmt: skip
            self._at_least(name, 1)
        for name in ("image_size", "num_classes", "num_heads", "max_steps", "epochs"):
            self._at_least(name, 1)
        for name in ("num_workers", "weight_decay", "warmup_steps", "max_grad_norm", "keep_checkpoints", "sample_every",
                     "fid_every", "global_seed", "cfg_scale"):  # fmt: skip
            self._at_least(name, 0)
        for name in ("lr", "dist_timeout"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise DiffFitError(f"{flag(name)} must be positive; got {value}")
        for name in ("class_dropout_prob", "val_fraction", "ema_decay"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise DiffFitError(f"{flag(name)} must be at least 0 and less than 1; got {getattr(self, name)}")
        if self.max_steps is not None and self.epochs is not None:
            raise DiffFitError(f"give --max-steps or --epochs, not both; got {self.max_steps} and {self.epochs}")
        if self.val_path is not None and self.val_fraction > 0:
            raise DiffFitError("give --val-path or --val-fraction, not both")
        if self.accumulate > self.global_batch_size:
            raise DiffFitError(
                f"--accumulate must be at most --global-batch-size; got {self.accumulate} and {self.global_batch_size}"
            )
        if self.fsdp and self.method != "full":
            raise DiffFitError(f"--fsdp is for --method full; {self.method} has too little to shard")
        return self

    def _at_least(self, name: str, low: int) -> None:
        value = getattr(self, name)
        if value is not None and not (value >= low and math.isfinite(value)):
            raise DiffFitError(f"{flag(name)} must be at least {low}; got {value}")

    @property
    def learning_rate(self) -> float:
        """``lr``, or the method's default."""
        return self.lr if self.lr is not None else DEFAULT_LR.get(self.method, DEFAULT_LR_SMALL)

    # -- keeping -------------------------------------------------------------------------------------------------------
    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the effective configuration as YAML; ``--config`` reads it back."""
        write_text(Path(path), yaml.safe_dump(self.to_dict(), sort_keys=False))

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """The settings that steer training and differ in ``other``, as ``name: theirs -> ours``."""
        mine = self.to_dict()
        keys = [f.name for f in fields(self) if f.name not in NOT_STEERING]
        return [f"{k}: {other.get(k)} -> {mine[k]}" for k in keys if k in other and other[k] != mine[k]]


# Settings that may change between a run and its continuation without changing what is computed at a step.
NOT_STEERING = frozenset({
    "results_dir", "resume", "device", "log_every", "ckpt_every", "keep_checkpoints", "val_path", "val_samples",
    "val_every", "sample_every", "num_samples", "num_sampling_steps", "cfg_scale", "num_workers", "tensorboard",
    "fid_every", "fid_reference", "fid_samples", "fid_features", "inception_weights",
    "wandb", "progress", "dist_timeout", "max_steps", "epochs",
})  # fmt: skip

# Pairs of which only one can be given.
RIVALS = (("max_steps", "epochs"), ("val_path", "val_fraction"), ("data_path", "feature_path"))


def flag(name: str) -> str:
    """The flag of a setting: ``data_path`` -> ``--data-path``."""
    return "--" + name.replace("_", "-")


def _coerce(name: str, value: Any, hint: Any) -> Any:
    """``value`` in the type of its field, or an error; YAML reads 1e-3 as text and 1 as an integer."""
    optional = type(None) in typing.get_args(hint)
    target = next((t for t in typing.get_args(hint) if t is not type(None)), hint) if optional else hint
    if value is None and optional:
        return None
    if target is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    if target is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if target is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    if target is str and value is None and name == "vae":  # YAML's bare `none` is text, `null` is this
        return "none"
    if isinstance(value, target) and not (target in (int, float) and isinstance(value, bool)):
        return dict(value) if target is dict else value
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "keys and values"}
    raise DiffFitError(f"{flag(name)} must be {names[target]}; got {value!r}")
