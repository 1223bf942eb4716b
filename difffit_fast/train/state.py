"""What of a run outlives its process: trainables, averages, optimizer, generators, and how far it has come."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._processes import World
from ..data.base import visit_seed
from ..errors import DiffFitError
from ..models.base_hash import other_base
from ..models.delta import read_delta, untrained_rows
from ..models.header import read_header
from .best import Best
from .checkpoint import Checkpoint, CheckpointFolder
from .ema import EMA, local
from .generators import generators_state, seed_generators, set_generators_state
from .output import write_output
from .readback import NonFiniteLossError
from .setup import Parts


class Progress(NamedTuple):
    """How far a run has come: whole steps, samples seen, and the losses since the last line of its log."""

    step: int
    position: int
    window: list[float]


class RunState:
    """Takes a run's state out of checkpoints and puts it into them; all processes call its methods together."""

    def __init__(self, parts: Parts, ema: EMA, optimizer: torch.optim.Optimizer, world: World) -> None:
        self.parts, self.ema, self.optimizer, self.world = parts, ema, optimizer, world

    # -- in ------------------------------------------------------------------------------------------------------------
    def restore(self, checkpoint: Checkpoint | None) -> Progress:
        """Put a checkpoint's state into model, average, optimizer and generators; without one, seed these.

        Raises:
            DiffFitError: it cannot be read, or is of another model or base; on all processes if on one.
        """
        progress, error = Progress(0, 0, []), None
        if checkpoint is None:
            self._seed(0)
        else:
            try:
                progress = self._take(checkpoint)
            except (OSError, KeyError) as caught:
                error = DiffFitError(
                    f"cannot read {checkpoint.folder} (all processes must see --results-dir): {caught}"
                )
            except DiffFitError as caught:
                error = caught
        self.world.agree(error)
        return progress

    def _take(self, checkpoint: Checkpoint) -> Progress:
        info = checkpoint.info
        self._compare_classes(checkpoint.delta)
        self._compare_base(checkpoint.delta)
        unpack(checkpoint.tensors(), self.parts.parameters, self.ema, self.optimizer, info["updates"])
        generators = info["generators"]
        if len(generators) == self.world.size:
            set_generators_state(generators[self.world.rank])
        else:
            self._seed(checkpoint.step)
        return Progress(checkpoint.step, info["position"], list(info["window"]))

    def _seed(self, step: int) -> None:
        seed_generators(visit_seed(self.parts.config.global_seed, step, self.world.rank) % (1 << 63))

    def _compare_base(self, delta: Path) -> None:
        model, ckpt = self.parts.model, self.parts.config.ckpt
        if hasattr(model, "save_delta") and other_base(read_delta(delta)[1], model, str(delta)):
            base = f"--ckpt {ckpt}" if ckpt else "the random one of this seed"
            raise DiffFitError(f"cannot resume {delta}: it was trained on another base than {base}")

    def _compare_classes(self, delta: Path) -> None:
        """The rows of the class table come from the checkpoint: its classes must be the data's, in the same order."""
        header, ours = read_header(delta), self.parts.class_names
        theirs = header.get("class_names")
        if theirs is not None and theirs != ours:
            pairs = zip_longest(theirs, ours, fillvalue="nothing")
            label, (a, b) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
            order = "the same classes in another order" if sorted(theirs) == sorted(ours) else "other classes"
            raise DiffFitError(
                f"cannot resume {delta}: the data has {order}; class {label} was {a!r} and is {b!r} now. "
                "A new run can begin from that file (--ckpt)"
            )
        if hasattr(self.parts.model, "save_delta") and header.get("class_rows") != untrained_rows(self.parts.model):
            raise DiffFitError(
                f"cannot resume {delta}: it was trained with other rows of the base's class table (--classes)"
            )

    # -- out -----------------------------------------------------------------------------------------------------------
    def save(self, folder: CheckpointFolder, progress: Progress) -> Path | None:
        """Write a checkpoint; returns what one samples from, on the process that wrote it, the first.

        Raises:
            DiffFitError: it cannot be written.
        """
        main = self.world.main
        tensors = self._pack() if main or self.parts.config.fsdp else {}  # sharded tensors are gathered by all
        generators = self.world.gather(generators_state())
        return self._write(folder, progress, tensors, generators) if main else None

    def save_alone(self, folder: CheckpointFolder, progress: Progress) -> Path:
        """The same by the first process when its peers have gone, and their generators with them."""
        return self._write(folder, progress, self._pack(), [generators_state()])

    def save_best(self, folder: CheckpointFolder, best: Best) -> Path | None:
        """Write what one samples from as the best so far; returns where, on the process that wrote it, the first.

        Raises:
            DiffFitError: it cannot be written.
        """
        main = self.world.main
        averages = {name: _whole(t) for name, t in self.ema.tensors.items()} if main or self.parts.config.fsdp else {}
        if not main:
            return None
        self._check_finite({f"ema/{name}": t for name, t in averages.items()}, best.step, folder)
        metadata = {**self._metadata(best.step), "val_loss": best.loss, "val_set": best.val_set}
        try:
            return folder.save_best(lambda path: write_output(self.parts.model, averages, path, metadata))
        except OSError as error:
            raise DiffFitError(f"cannot write the best so far, of step {best.step}: {error}") from error

    def _pack(self) -> dict[str, Tensor]:
        return pack(self.parts.parameters, self.ema, self.optimizer)

    def _write(
        self, folder: CheckpointFolder, progress: Progress, tensors: dict[str, Tensor], generators: list[Any]
    ) -> Path:
        averages = {k.removeprefix("ema/"): v for k, v in tensors.items() if k.startswith("ema/")}
        info = {
            "position": progress.position, "updates": self.ema.updates, "window": progress.window,
            "generators": generators, "config": self.parts.config.to_dict(),
        }  # fmt: skip
        metadata = self._metadata(progress.step)
        self._check_finite(tensors, progress.step, folder)
        try:
            return folder.save(
                progress.step, lambda path: write_output(self.parts.model, averages, path, metadata), tensors, info
            )
        except OSError as error:
            raise DiffFitError(f"cannot write the checkpoint of step {progress.step}: {error}") from error

    def _metadata(self, step: int) -> dict[str, Any]:
        """What the file that one samples from says of itself."""
        parts, config = self.parts, self.parts.config
        return {
            "class_names": parts.class_names, "step": step, "image_size": config.image_size, "vae": config.vae,
            "objective": config.objective, "method": config.method, "architecture": parts.name,
            "method_options": config.method_args or None,
        }  # fmt: skip

    def _check_finite(self, tensors: Mapping[str, Tensor], step: int, folder: CheckpointFolder) -> None:
        name = first_non_finite(tensors)
        if name is not None:
            newest = folder.newest()
            kept = f"the checkpoint of step {newest.step} is kept" if newest else "there is no whole checkpoint"
            raise NonFiniteLossError(
                f"{name} is not finite after step {step}, which is not saved; {kept} in {folder.path.parent}"
            )


def first_non_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor with a value that is infinite or not a number; None where there is none."""
    return next((name for name, t in tensors.items() if not bool(torch.isfinite(local(t)).all())), None)


# -- as named tensors --------------------------------------------------------------------------------------------------


def pack(parameters: Mapping[str, nn.Parameter], ema: EMA, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Trainables, averages and optimizer state by name, whole, on the CPU; all processes of an FSDP job call it."""
    tensors = {f"value/{name}": _whole(p) for name, p in parameters.items()}
    tensors |= {f"ema/{name}": _whole(t) for name, t in ema.tensors.items()}
    for name, p in parameters.items():
        for key, value in optimizer.state.get(p, {}).items():
            tensors[f"optimizer/{name}/{key}"] = _whole(torch.as_tensor(value))
    return tensors


@torch.no_grad()
def unpack(
    tensors: Mapping[str, Tensor],
    parameters: Mapping[str, nn.Parameter],
    ema: EMA,
    optimizer: torch.optim.Optimizer,
    updates: int,
) -> None:
    """Put back what :func:`pack` took.

    Raises:
        DiffFitError: the tensors are of other parameters or shapes; nothing has been changed then.
    """
    stored = {key.removeprefix("value/"): value for key, value in tensors.items() if key.startswith("value/")}
    odd = sorted(set(stored) ^ set(parameters)) or [n for n, p in parameters.items() if p.shape != stored[n].shape]
    if odd:
        raise DiffFitError(f"the checkpoint does not fit this model: {odd[0]} is missing, unknown or of another shape")
    states: dict[int, dict[str, Tensor]] = {}
    for index, (name, p) in enumerate(parameters.items()):
        p.copy_(_like(stored[name], p))
        prefix = f"optimizer/{name}/"
        own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        if own:
            states[index] = {key: _like(value, p) if value.dim() else value for key, value in own.items()}
    ema.load({name: _like(tensors[f"ema/{name}"], p) for name, p in parameters.items()}, updates)
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})


def _whole(tensor: Tensor) -> Tensor:
    """A copy on the CPU, gathered if it is sharded."""
    tensor = tensor.detach()
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    return tensor.to("cpu", copy=True)


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    """``value`` on the parameter's device, and sharded as it is."""
    value = value.to(parameter.device)
    if hasattr(parameter, "full_tensor") and value.shape == parameter.shape:
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value
