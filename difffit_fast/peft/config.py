"""The configuration that PEFT keeps beside an adapter, in ``adapter_config.json``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig
from peft.utils import PeftType

from ..models.difffit import DiffFitConfig

NAME = "difffit"  # of the method; its PeftType is the same in capitals


def peft_type() -> PeftType:
    """PEFT's name for the method. Its list of methods is closed; this adds ours to it, once."""
    name = NAME.upper()
    if name not in PeftType.__members__:
        member = str.__new__(PeftType, name)
        member._name_ = member._value_ = name
        PeftType._member_names_.append(name)
        PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
        type.__setattr__(PeftType, name, member)
    return PeftType(name)


@dataclass
class DiffFitPeftConfig(PeftConfig):
    """What an adapter trains; see :func:`difffit_fast.apply_difffit`.

    Args:
        difffit: a preset ("paper", "minimax", "block", "bitfit"), or a :class:`difffit_fast.DiffFitConfig` or its dictionary.
        add_bias: give every linear without a bias a zero one.
        branch_ends: the modules behind which γ is to be, by name or end of path; None: those that are known for the
            class of the model, or that its names suggest.
        target_modules: as everywhere in PEFT, a regular expression or names: only these of the modules that ``difffit``
            trains something in. None: all of them.
        exclude_modules: as everywhere in PEFT.
        modules_to_save: modules that are trained and saved as a whole beside; DiffFit leaves them to PEFT.

    Raises:
        DiffFitError: an unknown preset or option.
    """

    difffit: str | dict[str, Any] = field(default="paper", metadata={"help": "A preset of DiffFit, or its options."})
    add_bias: bool = field(default=False, metadata={"help": "Give every linear without a bias a zero one."})
    branch_ends: list[str] | None = field(default=None, metadata={"help": "The modules behind which γ is to be."})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "Only these modules."})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Not these modules."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules that train as a whole."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type()
        config = self.resolved
        self.difffit = dataclasses.asdict(config) if config.name == "custom" else config.name
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list) else value)

    @property
    def resolved(self) -> DiffFitConfig:
        """``difffit`` as a configuration."""
        return DiffFitConfig.resolve(self.difffit)
