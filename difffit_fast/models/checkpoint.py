"""What a model file is: :func:`read_model` reads any DiT or SiT checkpoint, says what it is, adapts it and gives the model.

    file = read_model("DiT-XL-2-256x256.pt")           # file.config, file.name, file.class_names, ...
    file = file.adapt(num_classes=101)                 # new class table, new positions
    dit = file.dit()                                   # a plain DiT; any method of fine-tuning starts from it

Everything that reads, samples, trains or describes a model goes through here; nothing else infers a size. What the file
records beats what its tensors suggest; what the user says beats both, or is refused where the tensors contradict it.
"""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DiffFitError
from .adapt import TABLE, class_table, coordinate_scale, find_scale
from .classes import ClassRows, choose_rows
from .difffit import is_extra
from .dit import DIT_ARGUMENTS, DiT, sincos_pos_embed
from .header import decode_header
from .sizes import HEADS, MODEL_NAMES, model_name, model_objective, model_sizes
from .state_dict import ANCHOR, Weights, find_weights, read_weights


@dataclass(frozen=True)
class ModelFile:
    """A DiT's weights and what is known about them.

    Attributes:
        state: tensors under the public keys; with γ and LayerNorm where a DiffFit model was saved unmerged.
        config: the constructor arguments of :class:`DiT`; ``num_heads`` is None where nothing tells it.
        source: the file, for messages.
        objective: "ddpm" or "flow"; None where the file does not tell.
        pos_embed_scale: of the coordinates of the positional table; None where it is no sine-cosine table.
        image_size: side of the images, pixels.
        header: what else the file records: ``class_names, vae, step, method`` ...; empty for public checkpoints.
        recorded: the constructor arguments that the file records, rather than its tensors suggest.
        weights: which of the sets in the file this is, and all of them.
        classes: where the rows of its class table came from, once they were chosen anew.
        left_out: the foreign parts that were beside it, in words.
    """

    state: dict[str, Tensor]
    config: dict[str, Any]
    source: str
    objective: str | None
    pos_embed_scale: float | None
    image_size: int
    header: dict[str, Any] = field(default_factory=dict)
    recorded: frozenset[str] = frozenset()
    weights: tuple[str, tuple[str, ...]] = ("", ("",))
    classes: ClassRows | None = None
    left_out: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The published name of its sizes, such as "SiT-XL/2", or "DiT-custom"."""
        return model_name(self.config, self.objective)

    @property
    def has_null_class(self) -> bool:
        return self.config["class_dropout_prob"] > 0

    @property
    def class_names(self) -> list[str] | None:
        return self.header.get("class_names")

    @property
    def is_difffit(self) -> bool:
        """Whether γ or an affine LayerNorm is among the tensors: a DiffFit model that was not merged."""
        return any(is_extra(key) for key in self.state)

    # -- what the user says --------------------------------------------------------------------------------------------
    def expect(self, *, name: str | None = None, flag: str = "", **arguments: Any) -> ModelFile:
        """The same file, after comparing it with what the user says it is.

        Args:
            name: a published name; its family tells the objective.
            flag: how the user said it, for messages ("--model-args").
            arguments: of the constructor; ``num_heads`` cannot be contradicted by tensors and is taken over, with a warning
                where the file records another number. None: nothing was said.

        Raises:
            DiffFitError: the tensors contradict it.
        """
        file = self
        told = {key: value for key, value in arguments.items() if value is not None}
        if unknown := sorted(set(told) - set(DIT_ARGUMENTS)):
            raise DiffFitError(f"a DiT has no argument {unknown[0]!r}; it has {', '.join(DIT_ARGUMENTS)}")
        said = f"{flag} {name}".strip() if flag.startswith("--model") and name else name
        sizes = {} if name is None else model_sizes(name)
        told = {**sizes, **told}
        if "num_heads" in told:
            file = file._with_heads(told.pop("num_heads"), said if "num_heads" not in arguments else None)
        for key, value in told.items():
            if file.config[key] != value:
                by_name = key in sizes and arguments.get(key) is None
                asked = f"{said} has {key} {value}" if by_name else f"{flag} {key} {value} was asked for".strip()
                raise DiffFitError(f"{asked}; {self.source} has {file.config[key]}")
        objective = model_objective(name)
        if objective is not None and file.objective not in (None, objective):
            raise DiffFitError(f"{said} predicts by {objective}; {self.source} was trained with {file.objective}")
        return dataclasses.replace(file, objective=file.objective or objective)

    def predicting(self, objective: str | None) -> ModelFile:
        """The same file, as one of a model trained for ``objective``, "ddpm" or "flow"; None: nothing was said.

        Raises:
            DiffFitError: it is known to be trained for another.
        """
        if objective not in (None, "ddpm", "flow"):
            raise DiffFitError(f"objective must be ddpm or flow; got {objective!r}")
        if objective is not None and self.objective not in (None, objective):
            raise DiffFitError(f"{self.source} was trained with {self.objective}; objective {objective} was asked for")
        return dataclasses.replace(self, objective=self.objective or objective)

    def _with_heads(self, heads: int, said: str | None) -> ModelFile:
        width, known = self.config["hidden_size"], self.config["num_heads"]
        if not isinstance(heads, int) or isinstance(heads, bool) or heads < 1 or width % heads:
            raise DiffFitError(f"num_heads must divide the width {width} of {self.source}; got {heads!r}")
        if known not in (None, heads) and "num_heads" in self.recorded:
            if said is not None:
                raise DiffFitError(f"{said} has {heads} heads; {self.source} records {known}")
            warnings.warn(f"{self.source} records {known} heads; {heads} are taken, as was asked for", stacklevel=3)
        return dataclasses.replace(self, config={**self.config, "num_heads": heads})

    def with_null_class(self, null_class: bool) -> ModelFile:
        """The file as one whose class table has a null class, or has none.

        Where the file records that, the table is changed accordingly. Where it does not, this says what the table is.
        """
        if null_class == self.has_null_class:
            return self
        if "class_dropout_prob" in self.recorded:
            return self.adapt(null_class=null_class)
        rows = self.state[TABLE].shape[0]
        config = {**self.config, "num_classes": rows - null_class, "class_dropout_prob": 0.1 if null_class else 0.0}
        if config["num_classes"] < 1:
            raise DiffFitError(f"{self.source} has a class table of one row, which cannot be the null class's")
        return dataclasses.replace(self, config=config)

    # -- other classes, another size -----------------------------------------------------------------------------------
    def adapt(
        self,
        *,
        num_classes: int | None = None,
        image_size: int | None = None,
        input_size: int | None = None,
        null_class: bool | None = None,
        pos_embed: str | float = "scaled",
        class_names: Sequence[str] | None = None,
        classes: str = "match",
    ) -> ModelFile:
        """The model for other classes or another size; None leaves a thing as it is.

        Args:
            num_classes: of the model (default: as many as ``class_names``). Where nothing is known by name, another number
                makes a new class table, the null class keeping its row; a warning tells of every class that is new.
            image_size: pixels; ``input_size``: the same in cells of what the model sees. Another one makes a new positional
                table in the coordinates ``pos_embed``: "scaled", "native" or their scale (:func:`.adapt.coordinate_scale`).
            null_class: whether the table has a row for dropped labels; a new one is the mean of the classes.
            class_names: of the classes, in the order of their labels; they take the base's rows as ``classes`` says:
                "match", "keep" or "new", see :func:`.classes.choose_rows`.

        Raises:
            DiffFitError: impossible sizes, or classes that cannot be chosen so.
        """
        state, config, scale = dict(self.state), dict(self.config), self.pos_embed_scale
        input_size = self._input_size(image_size, input_size)
        if input_size != config["input_size"]:
            scale = coordinate_scale(config["input_size"], input_size, 1.0 if scale is None else scale, pos_embed)
            table = sincos_pos_embed(config["hidden_size"], input_size // config["patch_size"], scale)
            state["pos_embed"], config["input_size"] = table[None], input_size
        else:
            coordinate_scale(1, 1, 1.0, pos_embed)  # is it one of the two?
        if num_classes is None:
            num_classes = config["num_classes"] if class_names is None else len(class_names)
        if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
            raise DiffFitError(f"num_classes must be a whole number of at least 1; got {num_classes!r}")
        chosen = choose_rows(self.class_names, config["num_classes"], class_names, num_classes, classes)
        null = self.has_null_class if null_class is None else null_class
        if chosen.new:
            what = f"{self.source}: {chosen.said}"
            if chosen.drawn and num_classes != config["num_classes"]:
                what = (
                    f"{self.source} has {config['num_classes']} classes and {num_classes} were asked for: the class embedding "
                    "is made anew" + (", keeping the null class" if null and self.has_null_class else "")
                )
            warnings.warn(what, stacklevel=2)
        pixels = input_size * self.image_size // self.config["input_size"]
        file = dataclasses.replace(self, state=state, config=config, pos_embed_scale=scale, image_size=pixels)
        return file._with_classes(chosen, null)

    def _with_classes(self, chosen: ClassRows, null_class: bool) -> ModelFile:
        """The file with the class table whose rows are ``chosen`` among its own."""
        state = {**self.state, TABLE: class_table(self.state[TABLE], chosen, null_class)}
        prob = (self.config["class_dropout_prob"] or 0.1) if null_class else 0.0
        config = {**self.config, "num_classes": len(chosen.rows), "class_dropout_prob": prob}
        header = dict(self.header)
        if chosen.names is not None:
            header["class_names"] = list(chosen.names)
        elif chosen.moved is not None:
            header.pop("class_names", None)
        return dataclasses.replace(self, state=state, config=config, header=header, classes=chosen.after(self.classes))

    def with_class_rows(self, rows: Sequence[int], names: Sequence[str] | None) -> ModelFile:
        """The file with those rows of its class table, in this order.

        Raises:
            DiffFitError: it has no such row.
        """
        count = self.config["num_classes"]
        if odd := [row for row in rows if isinstance(row, bool) or not isinstance(row, int) or not 0 <= row < count]:
            raise DiffFitError(f"{self.source} has the class rows 0..{count - 1}; row {odd[0]!r} was asked for")
        chosen = ClassRows(None if names is None else tuple(names), tuple(rows), (None,) * len(rows), count)
        return self._with_classes(chosen, self.has_null_class)

    def _input_size(self, image_size: int | None, input_size: int | None) -> int:
        old, patch = self.config["input_size"], self.config["patch_size"]
        cell = self.image_size // old
        if image_size is not None:
            if not isinstance(image_size, int) or isinstance(image_size, bool):
                raise DiffFitError(f"image_size must be one number, images are square; got {image_size!r}")
            if image_size < 1 or image_size % (cell * patch):
                raise DiffFitError(
                    f"image_size must be a positive multiple of {cell * patch} for this model; got {image_size}"
                )
            return image_size // cell
        if input_size is not None and (not isinstance(input_size, int) or input_size < 1 or input_size % patch):
            raise DiffFitError(f"input_size must be a positive multiple of the patch size {patch}; got {input_size!r}")
        return old if input_size is None else input_size

    # -- the model -----------------------------------------------------------------------------------------------------
    def arguments(self) -> dict[str, Any]:
        """The constructor arguments, all of them known.

        Raises:
            DiffFitError: the number of heads is not known.
        """
        if self.config["num_heads"] is None:
            raise DiffFitError(
                f"{self.source} is a DiT of width {self.config['hidden_size']}, which is none of the published sizes "
                f"({', '.join(map(str, sorted(HEADS)))}), and it does not record its number of heads, which no tensor tells: "
                "give it (num_heads=..., --num-heads)"
            )
        return dict(self.config)

    def dit(self) -> DiT:
        """A plain :class:`DiT` in float32 that holds these very tensors; everything but the positions requires gradients.

        Raises:
            DiffFitError: a key is missing, unknown or of another shape, or the file holds a DiffFit model.
        """
        self.arguments()
        if self.is_difffit:
            key = next(key for key in self.state if is_extra(key))
            raise DiffFitError(
                f"{self.source} is not a plain DiT: it has the unknown key {key}; it looks like a DiffFit model that was not "
                "merged (difffit export --to dit, model.merge())"
            )
        model = self.skeleton()
        self.check_keys(model)
        model.load_state_dict({key: value.float() for key, value in self.state.items()}, assign=True)
        for name, p in model.named_parameters():
            p.requires_grad_(name != "pos_embed")
        model.pos_embed_scale = 1.0 if self.pos_embed_scale is None else self.pos_embed_scale
        model.classes, model.objective = self.classes, self.objective
        return model

    def skeleton(self, **arguments: Any) -> DiT:
        """A DiT of these sizes without values."""
        with torch.device("meta"):
            return DiT(**{**self.config, "num_heads": self.config["num_heads"] or 1, **arguments})

    def check_keys(self, model: nn.Module) -> None:
        """Raise unless the tensors are those of ``model``; its γ and LayerNorm may be missing."""
        own = model.state_dict()
        if odd := sorted(key for key in set(own) ^ set(self.state) if not (key in own and is_extra(key))):
            what = "lacks" if odd[0] in own else "has the unknown key"
            raise DiffFitError(f"{self.source} is not a plain DiT: it {what} {odd[0]}")
        for key, value in self.state.items():
            if own[key].shape != value.shape:
                raise DiffFitError(
                    f"{self.source}: {key} should be {tuple(own[key].shape)}, it is {tuple(value.shape)}"
                )


def read_model(path: str | os.PathLike[str], weights: str = "ema") -> ModelFile:
    """Read a DiT or SiT checkpoint of any kind; see :func:`.state_dict.read_weights` for the arguments and errors."""
    return describe(read_weights(path, weights))


def model_of(dit_or_state_dict: DiT | Mapping[str, Tensor]) -> ModelFile:
    """The same for a model in memory, or a state dict."""
    if not isinstance(dit_or_state_dict, nn.Module):
        return describe(find_weights(dit_or_state_dict))
    model = dit_or_state_dict
    return ModelFile(
        state=model.state_dict(), config=dict(model.config), source=f"the {type(model).__name__}",
        objective=getattr(model, "objective", None), pos_embed_scale=model.pos_embed_scale,
        image_size=model.input_size * pixels_per_cell(model.in_channels),
        recorded=frozenset(DIT_ARGUMENTS), header=_names_of(model.classes), classes=model.classes,
    )  # fmt: skip


def _names_of(classes: ClassRows | None) -> dict[str, Any]:
    return {} if classes is None or classes.names is None else {"class_names": list(classes.names)}


def describe(weights: Weights) -> ModelFile:
    """Everything that header, training script and tensors tell, in this order of trust.

    Raises:
        DiffFitError: a tensor is missing or impossible, or a header contradicts the tensors.
    """
    source, state = weights.source, weights.state
    header = decode_header(weights.header, source)
    config, rows = _sizes(state, source), state[TABLE].shape[0]
    recorded = header.get("config") or {}
    if "mlp_ratio" in recorded and mlp_hidden(config) == mlp_hidden({**config, "mlp_ratio": recorded["mlp_ratio"]}):
        config["mlp_ratio"] = recorded["mlp_ratio"]  # channels are whole numbers, of which many ratios give the same
    for key, value in recorded.items():
        if key in config and config[key] != value:
            raise DiffFitError(f"{source} records {key} {value}, but its tensors have {config[key]}")
    script = weights.arguments
    known = model_sizes(script["model"]) if script.get("model") in MODEL_NAMES else {}
    if any(config.get(key, value) != value for key, value in known.items()):
        known = {}  # the arguments of some other model
    heads = recorded.get("num_heads") or known.get("num_heads") or HEADS.get(config["hidden_size"])
    config["num_heads"] = heads if heads and config["hidden_size"] % heads == 0 else None
    if recorded:
        classes, prob = recorded["num_classes"], recorded["class_dropout_prob"]
        if classes + (prob > 0) != rows:
            raise DiffFitError(
                f"{source} records {classes} classes, null class {prob > 0}, but its table has {rows} rows"
            )
    else:
        null = rows - 1 == script.get("num_classes") or (rows > 1 and rows != script.get("num_classes"))
        classes, prob = rows - null, 0.1 if null else 0.0
    config |= {"num_classes": classes, "class_dropout_prob": prob}
    table = state["pos_embed"][0]
    scale = header["pos_embed_scale"] if "pos_embed_scale" in header else find_scale(table)
    image_size = image_pixels(header, config, source)
    objective = header.get("objective") or (model_objective(script["model"]) if known else None)
    said = frozenset(recorded) | frozenset(known)
    named = weights.name, weights.names
    return ModelFile(
        state, config, source, objective, scale, image_size, header, said, named, left_out=weights.left_out
    )


def _sizes(state: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """The constructor arguments that the tensors tell: all but heads, classes and label dropout.

    Raises:
        DiffFitError: a tensor is missing, or of a shape that no DiT has.
    """

    def shape(key: str, *sizes: int | None) -> torch.Size:
        if key not in state:
            raise DiffFitError(f"{source} lacks {key}, which every DiT checkpoint has")
        found = state[key].shape
        if len(found) != len(sizes) or any(n < 1 or n != (want or n) for n, want in zip(found, sizes, strict=True)):
            wanted = ", ".join("…" if want is None else str(want) for want in sizes)
            raise DiffFitError(f"{source}: {key} should be ({wanted}), it is {tuple(found)}")
        return found

    hidden, channels, p, _ = shape(ANCHOR, None, None, None, None)
    shape(ANCHOR, hidden, channels, p, p)
    tokens = shape("pos_embed", 1, None, hidden)[1]
    shape(TABLE, None, hidden)
    outputs = shape("final_layer.linear.weight", None, hidden)[0]
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise DiffFitError(f"{source}: pos_embed has {tokens} positions, which is no square")
    if hidden % 4:
        raise DiffFitError(f"{source}: a DiT's width is a multiple of 4; this one's is {hidden}")
    if outputs not in (channels * p * p, 2 * channels * p * p):
        raise DiffFitError(
            f"{source}: final_layer.linear.weight has {outputs} rows for {channels} channels in {p} x {p} patches"
        )
    numbers = {key.split(".")[1] for key in state if key.startswith("blocks.")}
    depth = len(numbers)
    if numbers != {str(i) for i in range(depth)}:
        odd = sorted(numbers - {str(i) for i in range(depth)})[0]
        raise DiffFitError(f"{source} has a block {odd!r}, but {depth} blocks in all: they should be numbered from 0")
    if not depth:
        raise DiffFitError(f"{source} has no blocks")
    rows = shape("blocks.0.mlp.fc1.weight", None, hidden)[0]
    mlp = rows / hidden
    if int(mlp * hidden) < rows:  # the nearest float is below
        mlp = math.nextafter(mlp, math.inf)
    return dict(
        input_size=side * p, patch_size=p, in_channels=channels, hidden_size=hidden, depth=depth, mlp_ratio=mlp,
        learn_sigma=outputs == 2 * channels * p * p,
    )  # fmt: skip


def mlp_hidden(config: Mapping[str, Any]) -> int:
    """The hidden channels of a block's MLP."""
    return int(config["hidden_size"] * config["mlp_ratio"])


def image_pixels(header: Mapping[str, Any], config: Mapping[str, Any], source: str) -> int:
    """The side of a model's images, as its header says, else by :func:`pixels_per_cell`.

    Raises:
        DiffFitError: what the header says is no multiple of the input's cells.
    """
    cells = config["input_size"]
    pixels = header.get("image_size") or cells * pixels_per_cell(config["in_channels"])
    if pixels % cells:
        raise DiffFitError(f"{source} records an image size of {pixels} for {cells} cells")
    return pixels


def pixels_per_cell(in_channels: int) -> int:
    """Image pixels per input cell where no file tells: 8 for the latents of the Stable Diffusion VAE, 1 for pixels."""
    return 8 if in_channels == 4 else 1
