"""FastDiffFitDiT: DiT with frozen weights, whose forward and backward do what DiffFit needs and nothing else.

One pass of the network, x the residual stream, h what a branch reads:

    h = adaln(x)
    each block:  x, h = residual_adaln(x, proj(attention(qkv(h))))
                 x, h = residual_adaln(x, mlp(h))                       both in one operation: :mod:`..ops.block`
    out = linear(h)

The join after a branch already belongs to the next one, so the residual stream is read and written once per branch.
All that is small is prepared for every layer at once, before the first block: what modulates the layers, one vector per
sample (:meth:`FastDiffFitDiT._modulation`), biases and γ (:meth:`FastDiffFitDiT._biases`). No layer slices, casts or
concatenates anything.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import DiffFitError
from ..ops._register import autocast_on
from ..ops.adaln import adaln
from ..ops.attention import BACKENDS
from ..ops.block import block as run_block
from ..ops.frozen_linear import frozen_linear
from ..ops.modulation import modulation
from ..ops.stacked import stacked_linear, stacked_matvec
from ..ops.weights import keep_layout, lay_together
from .checkpoint import ModelFile, model_of, read_model
from .delta import load_delta, save_delta
from .difffit import DiffFitConfig, is_extra
from .dit import DIT_ARGUMENTS, LN_EPS, DiT, check_dit_inputs, published, timestep_embedding, transformed
from .merge import merge
from .plain_difffit import PlainDiffFitDiT


class Biases(NamedTuple):
    """What acts on the channels inside the blocks, of all layers."""

    qkv: list[Tensor]  # of each block, (1, 1 or 3, D): ops.attention.qkv_vectors
    fc1: tuple[Tensor, ...]  # of each block, (F,)
    fc1_cast: tuple[Tensor, ...]  # the same in the compute dtype, without gradient
    branch: Tensor  # of the last linear of each branch, (2·depth, D): behind the attention, behind the MLP, ...


class FastDiffFitDiT(PlainDiffFitDiT):
    """A drop-in :class:`DiT` for DiffFit fine-tuning.

    Args (besides DiT's):
        difffit: preset ("paper", "minimax", "block", "bitfit") or a :class:`DiffFitConfig`.
        compute_dtype: dtype of the frozen weights and of the branches, e.g. ``torch.bfloat16``. Trainable parameters and
            the residual stream stay float32. None: the parameters' dtype, or autocast's where it is on.
        attention: "auto" or a backend of :mod:`difffit_fast.ops.attention`.

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
        self._said: str | None = None
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
            lay_together([linear.weight for linear in self._modulation_linears()])
            lay_together(self._proj_weights())
            keep_layout(w for b in self.blocks for w in (b.attn.qkv.weight, b.attn.proj.weight, b.mlp.fc1.weight))

    def _modulation_linears(self) -> list[nn.Linear]:
        return [b.adaLN_modulation[1] for b in (*self.blocks, self.final_layer)]

    def _proj_weights(self) -> list[nn.Parameter]:
        return [b.attn.proj.weight for b in self.blocks]

    def _apply(self, fn: Any, recurse: bool = True) -> FastDiffFitDiT:
        super()._apply(fn, recurse)
        self._arrange()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._arrange()

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
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """x (N, C, H, W), t (N,) int or float, y (N,) long -> (N, C or 2C, H, W) in the dtype of ``x``.

        Where modules have been replaced, wrapped, sharded or given hooks, they are called one by one, as a plain DiT's, and
        a warning says so once: the same numbers, without the speed. So they are inside ``torch.func``'s transforms and
        forward-mode differentiation, without a warning.

        Raises:
            ValueError: shapes that do not fit.
            RuntimeError: a frozen parameter wants a gradient.
            DiffFitError: modules that must be called one by one, with parameters of several dtypes.
        """
        check_dit_inputs(x, t, y, self.in_channels, self.input_size)
        change = self.as_built.change()
        device = x.device.type
        dtype = self._dtype(device)
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
            return self._forward(x, t, y, dtype)

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

    def _forward(self, x: Tensor, t: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
        in_dtype, stream = x.dtype, torch.float64 if dtype == torch.float64 else torch.float32
        biases = self._biases(dtype)
        first, joints = self._modulation(self._condition(t, y, dtype), biases.branch, dtype)
        patch = self.x_embedder.proj
        x = frozen_linear(self._patchify(x).to(dtype), patch.weight.to(dtype).flatten(1), patch.bias)
        x = x.to(stream) + self.pos_embed.to(stream)
        h = adaln(x, *first.unbind(), LN_EPS, dtype)
        for i, module in enumerate(self.blocks):
            attn, mlp = module.attn, module.mlp
            weights = tuple(w.to(dtype) for w in (attn.qkv.weight, attn.proj.weight, mlp.fc1.weight, mlp.fc2.weight))
            x, h = self.call_block(
                run_block, x, h, weights, biases.qkv[i], biases.fc1[i], joints[2 * i : 2 * i + 2], self.num_heads,
                bias1_cast=biases.fc1_cast[i], eps=LN_EPS, backend=self.attention,
            )  # fmt: skip
        last = self.final_layer.linear
        return self.output(frozen_linear(h, last.weight.to(dtype), last.bias)).to(in_dtype)

    def _patchify(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, T, C·p·p), in the order of the flattened weight of a strided convolution."""
        n, c, p, side = x.shape[0], self.in_channels, self.patch_size, self.input_size // self.patch_size
        return x.reshape(n, c, side, p, side, p).permute(0, 2, 4, 1, 3, 5).reshape(n, side * side, c * p * p)

    def _condition(self, t: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
        """Timestep and class: (N, D), float32."""
        first, last = self.t_embedder.mlp[0], self.t_embedder.mlp[2]
        t_freq = timestep_embedding(t, self.t_embedder.frequency_embedding_size).to(dtype)
        hidden = F.silu(frozen_linear(t_freq, first.weight.to(dtype), first.bias))
        time = frozen_linear(hidden, last.weight.to(dtype), last.bias)
        return time + self.y_embedder(y, self.training)

    def _modulation(self, condition: Tensor, beta: Tensor, dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Scale and shift of the first LayerNorm (2, N, D), and for each join gate, bias, scale, shift (4, N, D)."""
        n, d, blocks, linears = condition.shape[0], self.hidden_size, self.blocks, self._modulation_linears()
        m = stacked_linear(F.silu(condition).to(dtype), [linear.weight for linear in linears]).view(n, -1, d)
        bias = torch.cat([linear.bias for linear in linears]).view(-1, d)
        norm = None
        if self.difffit.affine_norm:
            norms = [norm for b in blocks for norm in (b.norm1, b.norm2)] + [self.final_layer.norm_final]
            norm = torch.stack([p for module in norms for p in (module.weight, module.bias)]).view(-1, 2, d)
        vectors = modulation(m, bias, norm, self._branch_gamma(), beta)
        first, *joints = vectors.split([2] + [4] * (2 * self.depth))
        return first, tuple(joints)

    def _branch_gamma(self) -> Tensor | None:
        """γ of every branch, (2·depth, D): the branch's own times that of proj; 1 where there is none, None without any."""
        own = [g for block in self.blocks for g in (block.gamma1, block.gamma2)]
        proj = [g for block in self.blocks for g in (block.attn.gamma2, None)]
        factors = [self._or_one(gammas) for gammas in (own, proj) if any(g is not None for g in gammas)]
        return factors[0] * factors[1] if len(factors) == 2 else factors[0] if factors else None

    def _or_one(self, gammas: list[Tensor | None]) -> Tensor:
        one = self.pos_embed.new_ones(self.hidden_size, dtype=torch.float32)
        return torch.stack([one if g is None else g for g in gammas])

    def _biases(self, dtype: torch.dtype) -> Biases:
        blocks, d = self.blocks, self.hidden_size
        # Those with γ first, so that a split parts them: one copy in the backward, however many layers there are.
        order = sorted(range(len(blocks)), key=lambda i: blocks[i].attn.gamma1 is None)
        query, _, value = torch.stack([blocks[i].attn.qkv.bias for i in order]).view(-1, 3, d).unbind(1)
        gammas = [g for g in (blocks[i].attn.gamma1 for i in order) if g is not None]
        vectors, value = self._with_gamma(query, value, gammas)
        if order != sorted(order):
            value = torch.stack([value[order.index(i)] for i in range(len(blocks))])
        qkv = [vectors[order.index(i)] for i in range(len(blocks))]
        # The value bias passes through the attention unchanged: it is added behind it, as a part of proj's.
        moved = stacked_matvec(value.to(dtype), self._proj_weights())
        proj = torch.stack([b.attn.proj.bias for b in blocks]) + moved
        fc2 = torch.stack([b.mlp.fc2.bias for b in blocks])
        fc1 = torch.stack([b.mlp.fc1.bias for b in blocks])
        return Biases(qkv, fc1.unbind(), fc1.detach().to(dtype).unbind(), torch.stack([proj, fc2], 1).flatten(0, 1))

    def _with_gamma(self, query: Tensor, value: Tensor, gammas: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """What acts on qkv in each block, and the value biases times their γ; the first ``len(gammas)`` blocks have one."""
        n, d = len(gammas), self.hidden_size
        if not n:
            return list(query[:, None].split(1)), value
        gamma_q, gamma_k, gamma_v = torch.stack(gammas).view(n, 3, d).unbind(1)
        rest = len(query) - n
        (query, plain), (value, others) = query.split([n, rest]), value.split([n, rest])
        vectors = list(torch.stack([query, gamma_q * gamma_k, gamma_v], 1).split(1))
        value = value * gamma_v
        if rest:
            vectors += plain[:, None].split(1)
            value = torch.cat([value, others])
        return vectors, value

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
        """Write the trainable parameters and what they belong to; see :func:`difffit_fast.models.delta.save_delta`."""
        save_delta(self, path, **metadata)

    def load_delta(self, path: str | os.PathLike[str]) -> dict[str, Any]:
        """Load what :meth:`save_delta` wrote; see :func:`difffit_fast.models.delta.load_delta`."""
        return load_delta(self, path)

    def merge(self) -> DiT:
        """An ordinary DiT that computes the same; see :func:`difffit_fast.models.merge.merge`."""
        return merge(self)


# What the public training scripts import as DiT_models or SiT_models.
FastDiffFitDiT_models: dict[str, Callable[..., FastDiffFitDiT]] = published(FastDiffFitDiT)
