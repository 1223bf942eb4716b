"""FastDiffFitDiT: DiT with frozen weights, whose forward and backward do what DiffFit needs and nothing else.

One pass of the network, x the residual stream, h what a branch reads:

    h = adaln(x)
    each block:  x, h = residual_adaln(x, proj(attention(qkv(h))))
                 x, h = residual_adaln(x, mlp(h))                       both in one operation: :mod:`..ops.block`
    out = linear(h)

The join after a branch already belongs to the next one, so the residual stream is read and written once per branch.
All that is small is prepared for every layer at once, before the first block (:mod:`.vectors`): what modulates the layers, one
vector per sample, biases and γ. No layer slices, casts or concatenates anything. These vectors are the model's own, or those of
deltas that lie beside each other (:mod:`.deltas`), one for each sample.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import DiffFitError
from ..ops._register import autocast_on
from ..ops.adaln import adaln
from ..ops.attention import BACKENDS
from ..ops.block import block as run_block
from ..ops.eight_bit import eight_bit_of
from ..ops.frozen_linear import frozen_linear
from ..ops.pieces import usual
from ..ops.weights import keep_layout, lay_together
from . import frozen_dtype as frozen_dtypes
from .adapt import TABLE
from .checkpoint import ModelFile, model_of, read_model
from .delta import load_delta, save_delta
from .deltas import OWN, Base, Delta, Deltas, Own, Strength, Wearing, add_delta, load_deltas
from .difffit import DiffFitConfig, is_extra
from .dit import DIT_ARGUMENTS, LN_EPS, DiT, check_dit_inputs, published, timestep_embedding, transformed
from .frozen_dtype import DEFAULT_KEEP, check_frozen_dtype, chosen
from .merge import merge
from .plain_difffit import PlainDiffFitDiT
from .vectors import Vectors, block_biases, join_vectors, modulation_linears, own_vectors, proj_weights


class FastDiffFitDiT(PlainDiffFitDiT):
    """A drop-in :class:`DiT` for DiffFit fine-tuning.

    Args (besides DiT's):
        difffit: preset ("paper", "minimax", "block", "bitfit") or a :class:`DiffFitConfig`.
        compute_dtype: dtype of the frozen weights and of the branches, e.g. ``torch.bfloat16``. Trainable parameters and
            the residual stream stay float32. None: the parameters' dtype, or autocast's where it is on.
        attention: "auto" or a backend of :mod:`difffit_fast.ops.attention`.
        frozen_dtype: of the products with the blocks' frozen weights: "bf16" (as ``compute_dtype`` says), "fp8" or "int8" (see
            :mod:`difffit_fast.ops.eight_bit`), or "auto", what is fastest on the device. The parameters stay what they are.
        frozen_keep: what of the blocks' linears stays out of it, by name or pattern: ``("*.fc2", "blocks.0.*.forward")``.

    Keys and shapes are those of the public DiT; extra keys are γ (``blocks.i.gamma1``, ``blocks.i.gamma2``,
    ``blocks.i.attn.gamma1``, ``blocks.i.attn.gamma2``) and LayerNorm's ``weight`` and ``bias``. A state dict without them
    loads strictly and leaves them at their identity values.
    """

    def __init__(
        self,
        *args: Any,
        difffit: str | DiffFitConfig = "paper",
        compute_dtype: torch.dtype | None = None,
        attention: str = "auto",
        frozen_dtype: str = "bf16",
        frozen_keep: Sequence[str] = DEFAULT_KEEP,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, difffit=difffit, **kwargs)
        if self.depth < 1:
            raise DiffFitError(f"DiffFit fine-tunes blocks, and there must be at least one; got depth {self.depth}")
        if attention not in BACKENDS:
            raise DiffFitError(f"attention must be one of {', '.join(BACKENDS)}; got {attention!r}")
        if compute_dtype not in (None, torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise DiffFitError(f"compute_dtype must be a floating dtype of at least 16 bits; got {compute_dtype}")
        self.compute_dtype = compute_dtype
        self.attention = attention
        check_frozen_dtype(frozen_dtype, compute_dtype)
        self.frozen_dtype, self.frozen_keep = frozen_dtype, tuple(frozen_keep)
        chosen(self, self.frozen_keep)
        self._eight_bit_problem: str | None = None
        self._said: str | None = None
        self.deltas = Deltas()
        self._narrow()
        self._arrange()

    # -- the weights in memory -----------------------------------------------------------------------------------------
    def _narrow(self) -> None:
        """Frozen weights in the compute dtype, where there is one; what trains in float32 or wider."""
        if self.compute_dtype is None:
            return
        for name, p in self.named_parameters():
            if self.difffit.trains(name):
                p.data = p.data.to(torch.promote_types(p.dtype, torch.float32))
            elif name.endswith(".weight"):
                p.data = p.data.to(self.compute_dtype)

    def _arrange(self) -> None:
        """Lay the modulation weights, and those of proj, side by side, and keep the layout of others: :mod:`..ops.weights`.

        The parameters stay what they are, and whatever becomes of them later is seen there. Those that a tool has put in
        another's place are left alone.
        """
        if self.as_built.other_model() is None:
            lay_together([linear.weight for linear in modulation_linears(self)])
            lay_together(proj_weights(self))
            self._eight_bit_problem = frozen_dtypes.arrange(self)
            weights = [w for b in self.blocks for w in (b.attn.qkv.weight, b.attn.proj.weight, b.mlp.fc1.weight)]
            keep_layout(w for w in weights if eight_bit_of(w) is None and not usual(w))

    def set_frozen_dtype(self, frozen_dtype: str, keep: Sequence[str] = DEFAULT_KEEP) -> None:
        """Multiply by the frozen weights in another dtype from now on; arguments as ``frozen_dtype`` and ``frozen_keep``.

        Raises:
            DiffFitError: no such dtype or linear. What the device does not have is told by the first product.
        """
        check_frozen_dtype(frozen_dtype, self.compute_dtype)
        chosen(self, keep)
        self.frozen_dtype, self.frozen_keep = frozen_dtype, tuple(keep)
        self._arrange()

    def eight_bit_report(self) -> dict[str, dict[str, Any]]:
        """Of each linear of the blocks, whether it is multiplied in eight bits, and its error: :func:`.frozen_dtype.report`."""
        return frozen_dtypes.report(self)

    def _apply(self, fn: Any, recurse: bool = True) -> FastDiffFitDiT:
        super()._apply(fn, recurse)
        self._arrange()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._arrange()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self.deltas.knows_base and not self._has_weights(state_dict, prefix):
            if len(self.deltas):
                warnings.warn(
                    f"another base is loaded: its deltas ({', '.join(self.deltas)}) are dropped", stacklevel=5
                )
            self.deltas.know(None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _has_weights(self, state: Mapping[str, Any], prefix: str) -> bool:
        """Whether the frozen weights in ``state`` are those that the model has."""
        for name, p in self.named_parameters():
            found = state.get(prefix + name)
            if found is None or not name.endswith(".weight") or p.dim() < 2 or name == TABLE:
                continue
            if p.is_meta or found.is_meta or found.shape != p.shape or not torch.equal(found.to(p), p):
                return False
        return True

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a DiT's or a FastDiffFitDiT's state dict; γ and LayerNorm that a whole DiT's lacks are set to the identity.

        With ``assign=True`` the tensors become the parameters, but for those whose dtype is not that of ``compute_dtype``'s
        rule, and the modulation and proj weights, which are copied to lie side by side.
        """
        result = super().load_state_dict(state_dict, strict=False, assign=assign)
        missing = [key for key in result.missing_keys if not is_extra(key)]
        if strict and (missing or result.unexpected_keys):
            lines = [f"missing keys: {', '.join(missing)}"] if missing else []
            lines += [f"unexpected keys: {', '.join(result.unexpected_keys)}"] if result.unexpected_keys else []
            raise RuntimeError(f"Error(s) in loading state_dict for {type(self).__name__}: {'; '.join(lines)}")
        if assign:
            self._narrow()
            self._arrange()
        return result

    # -- forward -------------------------------------------------------------------------------------------------------
    def forward(self, x: Tensor, t: Tensor, y: Tensor, delta: Wearing = OWN, strength: Strength = None) -> Tensor:
        """x (N, C, H, W), t (N,) int or float, y (N,) long -> (N, C or 2C, H, W) in the dtype of ``x``.

        Args:
            delta: what the samples wear in place of the model's own parameters, of what :meth:`load_deltas` has loaded: a
                name, None for the base as it was before any delta, a list with one of these for each sample, or their
                numbers (N,) long (``model.deltas.index(names)``), which a compiler need not know. ``y`` are then classes of
                each sample's delta.
            strength: of the deltas, from 0, the base, to 1, as trained, and beyond: a number, one for each sample, or by name.

        Where modules have been replaced, wrapped, sharded or given hooks, they are called one by one, as a plain DiT's, and
        a warning says so once: the same numbers, without the speed. So they are inside ``torch.func``'s transforms and
        forward-mode differentiation, without a warning.

        Raises:
            ValueError: shapes that do not fit.
            RuntimeError: a frozen parameter wants a gradient.
            DiffFitError: modules that must be called one by one, with parameters of several dtypes or with ``delta``; an
                unknown delta; a strength that is not finite, or without a delta.
        """
        check_dit_inputs(x, t, y, self.in_channels, self.input_size)
        change = self.as_built.change()
        device = x.device.type
        dtype = self._dtype(device)
        own = delta is OWN
        if own and strength is not None:
            raise DiffFitError("strength is that of a delta that load_deltas has loaded; say which (delta=...)")
        if not own and (change is not None or transformed()):
            raise DiffFitError(
                f"delta= is not possible where the modules are called one by one ({change or 'under a transform'})"
            )
        if change is not None:
            if not torch.compiler.is_compiling() and change != self._said:
                self._said = change
                warnings.warn(
                    f"{change}: the modules are called one by one, with a plain DiT's numbers and speed", stacklevel=4
                )
            return self._by_modules(x, t, y, dtype)
        if transformed():
            return self._by_modules(x, t, y, dtype)
        if self.pos_embed.device != x.device:
            raise DiffFitError(f"the model is on {self.pos_embed.device} and x on {x.device}; move one of them")
        off: Any = contextlib.nullcontext()
        if autocast_on(device):
            off = torch.autocast(device, enabled=False)
        with off:
            if own:
                return self._forward(x, t, own_vectors(self), self.y_embedder(y, self.training), dtype)
            drop = self.class_dropout_prob if self.training else 0.0
            flat, rows = self.deltas.worn(delta, strength, y, drop)
            return self._forward(x, t, self.deltas.layout.vectors(self, flat), rows, dtype)

    def _dtype(self, device: str) -> torch.dtype:
        """That of the branches. Autocast leaves float64 as it is, here as everywhere in PyTorch."""
        if self.compute_dtype is not None:
            return self.compute_dtype
        own = self.pos_embed.dtype
        return torch.get_autocast_dtype(device) if own != torch.float64 and autocast_on(device) else own

    def _by_modules(self, x: Tensor, t: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
        device, half = x.device.type, dtype in (torch.bfloat16, torch.float16)
        dtypes = {p.dtype for p in self.parameters() if p.is_floating_point()}
        if self.compute_dtype is not None and not half and len(dtypes) > 1:
            raise DiffFitError(
                f"the modules are called one by one ({self.as_built.change() or 'under a transform'}), and PyTorch's take one "
                f"dtype unless a half one is computed in; the parameters have {', '.join(sorted(map(str, dtypes)))}: "
                f"model.to({dtype}) makes it one"
            )
        stream = torch.float64 if dtype == torch.float64 else torch.float32
        mixed: Any = contextlib.nullcontext()
        if half or autocast_on(device):
            mixed = torch.autocast(device, dtype if half else None, enabled=half)
        with mixed:
            tokens = self.x_embedder(x).to(stream) + self.pos_embed.to(stream)
            condition = self.t_embedder(t) + self.y_embedder(y, self.training)
            for block in self.blocks:
                tokens = self.call_block(block, tokens, condition)
            return self.output(self.final_layer(tokens, condition)).to(x.dtype)

    def _forward(self, x: Tensor, t: Tensor, vectors: Vectors, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """``rows``: of the class table, (N, D)."""
        if self.frozen_dtype != "bf16":
            self._check_eight_bit(dtype)
        in_dtype, stream = x.dtype, torch.float64 if dtype == torch.float64 else torch.float32
        biases = block_biases(self, vectors, dtype)
        condition = self._time(t, vectors, dtype) + rows
        first, joints = join_vectors(self, vectors, condition, biases.branch, dtype)
        patch = self.x_embedder.proj.weight.to(dtype).flatten(1)
        x = _linear(self._patchify(x).to(dtype), patch, vectors.patch, stream) + self.pos_embed.to(stream)
        h = adaln(x, *first.unbind(), LN_EPS, dtype)
        for i, module in enumerate(self.blocks):
            attn, mlp = module.attn, module.mlp
            weights = tuple(w.to(dtype) for w in (attn.qkv.weight, attn.proj.weight, mlp.fc1.weight, mlp.fc2.weight))
            x, h = self.call_block(
                run_block, x, h, weights, biases.qkv[i], biases.fc1[i], joints[2 * i : 2 * i + 2], self.num_heads,
                bias1_cast=biases.fc1_cast[i], eps=LN_EPS, backend=self.attention,
            )  # fmt: skip
        last = self.final_layer.linear.weight.to(dtype)
        return self.output(_linear(h, last, vectors.last)).to(in_dtype)

    def _check_eight_bit(self, dtype: torch.dtype) -> None:
        problem, weight = self._eight_bit_problem, self.blocks[0].attn.qkv.weight
        if problem is not None:
            frozen_dtypes.complain(self, problem)
            self._eight_bit_problem = None
        if weight.dtype != dtype:
            raise DiffFitError(
                f"frozen_dtype={self.frozen_dtype!r} quantizes the weights as they are, {weight.dtype}, and {dtype} is computed "
                f"with; give compute_dtype={dtype}, without autocast"
            )

    def _patchify(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, T, C·p·p), in the order of the flattened weight of a strided convolution."""
        n, c, p, side = x.shape[0], self.in_channels, self.patch_size, self.input_size // self.patch_size
        return x.reshape(n, c, side, p, side, p).permute(0, 2, 4, 1, 3, 5).reshape(n, side * side, c * p * p)

    def _time(self, t: Tensor, vectors: Vectors, dtype: torch.dtype) -> Tensor:
        """The timestep's embedding, (N, D)."""
        first, last = self.t_embedder.mlp[0].weight.to(dtype), self.t_embedder.mlp[2].weight.to(dtype)
        t_freq = timestep_embedding(t, self.t_embedder.frequency_embedding_size).to(dtype)
        return _linear(F.silu(_linear(t_freq, first, vectors.time1)), last, vectors.time2)

    # -- construction --------------------------------------------------------------------------------------------------
    @classmethod
    def from_dit(cls, dit_or_state_dict: DiT | Mapping[str, Tensor], **kwargs: Any) -> FastDiffFitDiT:
        """Take over a DiT or its state dict; sizes come from what it says of itself and its tensors.

        ``kwargs``: of :meth:`from_pretrained` and of the constructor.

        Raises:
            DiffFitError: no DiT, or an argument that its tensors contradict.
        """
        model = cls._of_file(model_of(dit_or_state_dict), **kwargs)
        if isinstance(dit_or_state_dict, nn.Module):
            model.random_base = dit_or_state_dict.random_base
        return model

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        num_classes: int | None = None,
        class_names: Sequence[str] | None = None,
        classes: str = "match",
        image_size: int | None = None,
        difffit: str | DiffFitConfig = "paper",
        compute_dtype: torch.dtype | None = None,
        pos_embed: str = "scaled",
        weights: str = "ema",
        **kwargs: Any,
    ) -> FastDiffFitDiT:
        """Read a DiT or SiT checkpoint for fine-tuning.

        Args:
            path: any checkpoint of one, see :func:`difffit_fast.models.state_dict.read_weights`.
            num_classes: classes of the new domain (default: as many as ``class_names``). Without names, and if it differs
                from the checkpoint's, the class table is made anew (the null class keeps its row) and a warning says so.
            class_names: of the new domain, in the order of its labels. They take the checkpoint's rows as ``classes`` says:
                "match" (by name), "keep" or "new", see :func:`difffit_fast.models.classes.choose_rows`.
            image_size: in pixels (8 per latent cell). If it differs, the positional table is made anew.
            pos_embed: coordinates of a new positional table: "scaled" spans the range that the base was trained on
                (DiffFit's way from 256 to 512), "native" counts patches, as in the public 512 model.
            weights: "ema" or "model" where a file has both, or the name of a set.
            kwargs: further constructor arguments. ``num_heads`` for unpublished widths whose file does not record it;
                ``class_dropout_prob=0`` for a table without a null class; ``objective="flow"`` for a SiT whose file does not
                say so, as the public one; ``attention``. Others must agree with the file.

        Raises:
            DiffFitError: unreadable file, not a DiT, impossible sizes, or an argument that the file contradicts.
        """
        return cls._of_file(
            read_model(path, weights), num_classes=num_classes, class_names=class_names, classes=classes,
            image_size=image_size, pos_embed=pos_embed, difffit=difffit, compute_dtype=compute_dtype, **kwargs,
        )  # fmt: skip

    @classmethod
    def _of_file(
        cls,
        file: ModelFile,
        *,
        num_classes: int | None = None,
        class_names: Sequence[str] | None = None,
        classes: str = "match",
        image_size: int | None = None,
        input_size: int | None = None,
        pos_embed: str | float = "scaled",
        class_dropout_prob: float | None = None,
        objective: str | None = None,
        **kwargs: Any,
    ) -> FastDiffFitDiT:
        told = {key: kwargs.pop(key) for key in DIT_ARGUMENTS if key in kwargs}
        file = file.expect(**told).predicting(objective)
        if class_dropout_prob is not None:
            file = file.with_null_class(class_dropout_prob > 0)
        original = file
        file = file.adapt(
            num_classes=num_classes, class_names=class_names, classes=classes, image_size=image_size,
            input_size=input_size, pos_embed=pos_embed,
        )  # fmt: skip
        arguments = file.arguments()
        if class_dropout_prob is not None:
            arguments["class_dropout_prob"] = class_dropout_prob
        try:
            model = cls(**arguments, objective=file.objective, **kwargs)
        except ValueError as error:
            raise DiffFitError(f"the model cannot be built: {error}") from error
        file.check_keys(model)
        model.load_state_dict(file.state)
        model.deltas.know(Base.of_file(original, model.difffit.trains))
        model.pos_embed_scale = 1.0 if file.pos_embed_scale is None else file.pos_embed_scale
        model.classes = file.classes
        if model.classes is not None and model.classes.new and not model.difffit.class_embedding:
            raise DiffFitError(
                f"{model.classes.new} of {len(model.classes.rows)} classes have no row in {file.source}, and difffit="
                f"{model.difffit.name} does not train the class embedding"
            )
        return model

    # -- the delta -----------------------------------------------------------------------------------------------------
    def save_delta(self, path: str | os.PathLike[str], **metadata: Any) -> None:
        """Write the trainable parameters and what they belong to, or those of ``delta="name"``; see
        :func:`difffit_fast.models.delta.save_delta`."""
        save_delta(self, path, **metadata)

    def load_delta(self, path: str | os.PathLike[str]) -> dict[str, Any]:
        """Load what :meth:`save_delta` wrote; see :func:`difffit_fast.models.delta.load_delta`."""
        return load_delta(self, path)

    def load_deltas(self, paths: Mapping[str, str | os.PathLike[str]]) -> dict[str, dict[str, Any]]:
        """Load deltas by name, beside each other and beside the model's own parameters; see :mod:`difffit_fast.models.deltas`.

        Those of the same name are replaced. Returns what each file records.
        """
        return load_deltas(self, paths)

    def add_delta(self, name: str, **classes: Any) -> Delta:
        """A new delta to be trained beside others; see :func:`difffit_fast.models.deltas.add_delta`."""
        return add_delta(self, name, **classes)

    def drop_delta(self, name: str) -> None:
        """Let a delta go that :meth:`load_deltas` or :meth:`add_delta` has brought."""
        self.deltas.drop(name)

    def merge(self, *, delta: str | Own | None = OWN, strength: float = 1.0) -> DiT:
        """An ordinary DiT that computes the same; see :func:`difffit_fast.models.merge.merge`."""
        return merge(self, delta=delta, strength=strength)


def _linear(x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """x (N, ..., K) by a frozen weight, in ``dtype`` or that of x; the bias (F,), or (N, F): one for each sample."""
    if bias.dim() == 1:
        y = frozen_linear(x, weight, bias)
        return y if dtype is None else y.to(dtype)
    y = frozen_linear(x, weight)
    each = bias.unsqueeze(1) if y.dim() == 3 else bias
    return (y + each).to(x.dtype if dtype is None else dtype)


# What the public training scripts import as DiT_models or SiT_models.
FastDiffFitDiT_models: dict[str, Callable[..., FastDiffFitDiT]] = published(FastDiffFitDiT)
