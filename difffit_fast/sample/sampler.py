"""The sampler: a model, a way to integrate, guidance and a decoder, in one object."""

from __future__ import annotations

import contextlib
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .._bounds import ANY, BATCH, NOT_NEGATIVE, POSITIVE, SEED, STEPS, check_number, check_whole
from .._words import nearest
from ..data.vae import LatentSpace, PixelSpace, load_vae
from ..diffusion import SOLVERS, FlowMatching, GaussianDiffusion, create_diffusion, randn, solver_sample_loop
from ..diffusion.flow import METHODS
from ..diffusion.flow import SAMPLERS as FLOW_SAMPLERS
from ..diffusion.solvers import make_scheduler
from ..errors import DiffFitError
from ..models.classes import class_of, composed
from ..models.deltas import OWN, Own, shown_delta
from .guidance import EVERYWHERE, Guidance, Predictor

DDPM_SAMPLERS = ("ddpm", "ddim", *SOLVERS)
SAMPLERS = (*DDPM_SAMPLERS, *FLOW_SAMPLERS)
SAMPLERS_OF = {"ddpm": DDPM_SAMPLERS, "flow": FLOW_SAMPLERS}  # by what the model was trained to predict


class NonFiniteSampleError(DiffFitError):
    """A model or a decoder made an image that is infinite or not a number."""

    exit_code = 1


class Sampler:
    """Turns class labels into images.

    Args:
        model: a :class:`DiT` or :class:`FastDiffFitDiT`; used in eval mode, and put back in its mode afterwards.
        sampler: ``"ddpm"``, ``"ddim"``, ``"dpm++"``, ``"unipc"`` (the last two from diffusers) for models that predict
            noise, ``"euler"``, ``"heun"``, ``"dopri5"``, ``"sde"`` for flow matching (SiT).
        num_sampling_steps: steps; Heun calls the model twice in each. DDPM and DDIM spread them evenly from end to end;
            dopri5 takes as many as its tolerances ask for, whatever is given here.
        cfg_scale: scale of the guidance; 1 uses the conditional prediction alone, in half the time.
        cfg_channels: ``"first3"`` (as published), ``"all"``, or a count.
        guidance: ``"cfg"``, ``"source"`` or ``"none"``: away from what, see :mod:`.guidance`.
        guidance_interval: noise levels between which it is on, 0 the image and 1 noise.
        vae: decoder: None or ``"none"`` for models of pixels, ``"ema"``, ``"mse"``, a folder, or a loaded one.
        eta: DDIM's noise, 0 to 1.
        rtol, atol: dopri5's tolerances, relative and absolute.
        diffusion: noise schedule to sample from in place of DiT's linear one; its respacing is made anew.
        batch_size: images at a time.
        autocast: dtype to run the model in through autocast (``torch.bfloat16``); None: as the model is.
        class_names: lets :meth:`sample` take names for labels.
        progress: show a bar over the steps.

    Image i of ``sample(labels, seed)`` depends on ``seed``, i and its label, not on the batch size, the device's random
    numbers or the number of processes (beyond the last bits of float arithmetic, and with dopri5 its tolerances where
    these bits decide about a step).
    """

    def __init__(
        self,
        model: nn.Module,
        sampler: str = "ddpm",
        num_sampling_steps: int = 250,
        cfg_scale: float = 4.0,
        cfg_channels: str | int = "first3",
        vae: str | LatentSpace | PixelSpace | None = None,
        device: torch.device | str | None = None,
        *,
        guidance: str = "cfg",
        guidance_interval: tuple[float, float] = EVERYWHERE,
        eta: float = 0.0,
        rtol: float = 1e-3,
        atol: float = 1e-6,
        diffusion: GaussianDiffusion | None = None,
        batch_size: int = 32,
        autocast: torch.dtype | None = None,
        class_names: Sequence[str] | None = None,
        progress: bool = False,
    ) -> None:
        if sampler not in SAMPLERS:
            raise DiffFitError(f"the sampler must be one of {', '.join(SAMPLERS)}; got {sampler!r}")
        check_whole("num_sampling_steps", num_sampling_steps, STEPS)
        check_whole("batch_size", batch_size, BATCH)
        self.guidance = Guidance(guidance, cfg_scale, cfg_channels, tuple(guidance_interval))
        check_number("eta", eta, NOT_NEGATIVE)
        check_number("rtol", rtol, POSITIVE)
        check_number("atol", atol, POSITIVE)
        if eta > 1:
            raise DiffFitError(f"eta must be at most 1; got {eta}")
        objective = getattr(model, "objective", None)
        if objective is not None and sampler not in SAMPLERS_OF[objective]:
            raise DiffFitError(
                f"the sampler {sampler} is not for a model of the objective {objective}, which takes "
                f"{', '.join(SAMPLERS_OF[objective])}"
            )
        self.model = model if device is None else model.to(device)
        self.device = next(model.parameters()).device
        self.sampler = sampler
        self.num_sampling_steps = num_sampling_steps
        self.eta = eta
        self.rtol, self.atol = rtol, atol
        self.batch_size = batch_size
        self.autocast = autocast
        self.class_names = list(class_names) if class_names is not None else None
        self.progress = progress
        self.guidance.check(model)
        self.vae = load_vae(vae or "none", self.device) if vae is None or isinstance(vae, str) else vae.to(self.device)
        self._steps = (diffusion or create_diffusion()).original_num_steps
        self._integrate = self._integrator(diffusion)

    @property
    def cfg_scale(self) -> float:
        return self.guidance.scale

    @property
    def cfg_channels(self) -> str | int:
        return self.guidance.channels

    def sample(
        self,
        labels: Sequence[int | str] | Tensor,
        seed: int = 0,
        *,
        indices: Sequence[int] | None = None,
        decode: bool = True,
        delta: str | Own | Sequence[str | None] | None = OWN,
        strength: float | Sequence[float] | None = None,
    ) -> Tensor:
        """Images float32 (N, 3, H, W) in [-1, 1] on the CPU, one per label, see :func:`resolve_labels`.

        Args:
            indices: numbers of the images for the seeding (default 0, 1, ...).
            decode: False for what the diffusion model works on: (N, in_channels, input_size, input_size).
            delta: of those that the model's ``load_deltas`` has loaded, the name of the one that each sample wears, or all
                do; None for the base. Labels are then classes of each sample's.
            strength: of the deltas, see :mod:`difffit_fast.models.deltas`; one number, or one for each sample.
        """
        worn = self._wearing(delta, len(labels))
        y = self._labels(labels, worn)
        strengths = self._strengths(strength, worn)
        indices = range(len(y)) if indices is None else indices
        check_whole("the seed", seed, SEED)
        if len(indices) != len(y):
            raise ValueError(f"expected one index per label, {len(y)}; got {len(indices)}")
        if decode:
            self.check_decoder()
        parts = []
        for start in range(0, len(y), self.batch_size):
            part = slice(start, start + self.batch_size)
            generators = image_generators(seed, indices[part])
            with torch.no_grad(), _evaluating(self.model):
                wearing: Any = OWN if worn is OWN else worn[part]
                each = None if strengths is None else strengths[part]
                predictor = Predictor(self.model, self.guidance, y[part].to(self.device), wearing, each)
                latents = self._sample_latents(predictor, generators)
                self._check_finite(latents, y[part], indices[part], "the model's")
                images = (self.vae.decode(latents) if decode else latents).float().cpu()
                self._check_finite(images, y[part], indices[part], "the decoder's")
                parts.append(images)
        return torch.cat(parts) if parts else torch.empty(0)

    def _wearing(self, delta: Any, count: int) -> Own | list[str | None]:
        """A delta for each sample, or OWN."""
        if delta is OWN:
            return OWN
        if not hasattr(self.model, "deltas"):
            raise DiffFitError(
                f"delta= needs a FastDiffFitDiT with deltas loaded; this is a {type(self.model).__name__}"
            )
        worn = [delta] * count if delta is None or isinstance(delta, str) else list(delta)
        if len(worn) != count:
            raise DiffFitError(f"expected one delta per label, {count}; got {len(worn)}")
        for name in dict.fromkeys(worn):
            has_null = self.model.deltas.of(name).has_null_class
            if self.guidance.on and self.guidance.kind == "cfg" and not has_null:
                raise DiffFitError(f"{shown_delta(name)} has no null class and cannot be guided; use cfg_scale=1")
        return worn

    def _labels(self, labels: Sequence[int | str] | Tensor, worn: Own | list[str | None]) -> Tensor:
        if worn is OWN:
            return resolve_labels(labels, self.model.num_classes, self.class_names)
        labels = labels.tolist() if isinstance(labels, Tensor) else list(labels)
        found = torch.empty(len(labels), dtype=torch.long)
        for name in dict.fromkeys(worn):
            at = [i for i, other in enumerate(worn) if other == name]
            of = self.model.deltas.of(name)
            try:
                found[at] = resolve_labels([labels[i] for i in at], of.num_classes, of.class_names)
            except DiffFitError as error:
                raise DiffFitError(f"{shown_delta(name)}: {error}") from error
        return found

    def _strengths(self, strength: Any, worn: Own | list[str | None]) -> list[float] | None:
        if strength is None:
            return None
        if worn is OWN:
            raise DiffFitError("strength is that of a delta that load_deltas has loaded; say which (delta=...)")
        each = list(strength) if isinstance(strength, Sequence) else [strength] * len(worn)
        if len(each) != len(worn):
            raise DiffFitError(f"expected one strength per label, {len(worn)}; got {len(each)}")
        for number in dict.fromkeys(each):
            check_number("strength", number, ANY)
        return [float(number) for number in each]

    def _check_finite(self, made: Tensor, labels: Tensor, indices: Sequence[int], whose: str) -> None:
        """Raise for the first image that is not finite: it would be drawn black, and scored."""
        bad = (~torch.isfinite(made).flatten(1).all(1)).nonzero().flatten().tolist()
        if bad:
            raise NonFiniteSampleError(
                f"{len(bad)} of {len(made)} samples are not finite, {whose} fault; the first is image {indices[bad[0]]} of class "
                f"{int(labels[bad[0]])} ({self.sampler}, {self.num_sampling_steps} steps, cfg_scale {self.cfg_scale:g}); look "
                "for NaN in the model (difffit check), or try more steps, less guidance or --precision fp32"
            )

    def check_decoder(self) -> None:
        """Raise unless the decoder takes what the model makes."""
        channels = self.model.in_channels
        allowed = (1, 3) if isinstance(self.vae, PixelSpace) else (self.vae.channels,)
        if channels not in allowed:
            what = "there is no VAE (vae='none')" if isinstance(self.vae, PixelSpace) else f"the VAE has {allowed[0]}"
            raise DiffFitError(f"the model makes {channels} channels, but {what}; pass the VAE it was trained with")

    def _sample_latents(self, predictor: Predictor, generators: list[torch.Generator]) -> Tensor:
        shape = (len(predictor.y), self.model.in_channels, self.model.input_size, self.model.input_size)
        noise = randn(shape, generators, self.device)

        def predict(x: Tensor, t: Tensor) -> Tensor:
            with self._precision():
                return predictor(x, t, self._level(t))

        return self._integrate(predict, shape, noise, generator=generators, progress=self.progress)

    def _level(self, t: Tensor) -> float:
        """Of the noise, at the timestep t (N,), one for all; known without a look where guidance is the same everywhere."""
        if not self.guidance.on or self.guidance.interval == EVERYWHERE:
            return 0.0
        time = float(t[0])
        return 1 - time if self.sampler in FLOW_SAMPLERS else time / self._steps

    def _precision(self) -> Any:
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.autocast)

    def _integrator(self, diffusion: GaussianDiffusion | None) -> Callable[..., Tensor]:
        """``loop(model, shape, noise, generator=, progress=)`` for the sampler's name."""
        steps, learn_sigma = self.num_sampling_steps, self.model.learn_sigma
        flow = FlowMatching()
        if self.sampler in METHODS:
            return lambda *a, **k: flow.ode_sample_loop(*a, num_steps=steps, method=self.sampler, **k)
        if self.sampler == "dopri5":
            return lambda *a, **k: flow.dopri5_sample_loop(*a, rtol=self.rtol, atol=self.atol, **k)
        if self.sampler == "sde":
            return lambda *a, **k: flow.sde_sample_loop(*a, num_steps=steps, **k)
        base = diffusion or create_diffusion()
        # The solvers' last step of as many as the schedule has begins and ends at the same noise, and divides by nothing.
        most = base.original_num_steps - (self.sampler in SOLVERS)
        if steps > most:
            raise DiffFitError(f"{self.sampler} takes at most {most} steps; got {steps}")
        if self.sampler in SOLVERS:
            make_scheduler(self.sampler, base)  # if diffusers is missing, say so now
            return lambda *a, **k: solver_sample_loop(self.sampler, base, *a, num_steps=steps, **k)
        kept = create_diffusion(str(steps), diffusion_steps=base.original_num_steps).steps
        spaced = GaussianDiffusion(base.original_betas, kept, learn_sigma)
        clip = isinstance(self.vae, PixelSpace)  # pixels lie in [-1, 1], latents anywhere
        if self.sampler == "ddim":
            return lambda *a, **k: spaced.ddim_sample_loop(*a, eta=self.eta, clip_denoised=clip, **k)
        return lambda *a, **k: spaced.p_sample_loop(*a, clip_denoised=clip, **k)


def image_generators(seed: int, indices: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator per image, seeded by (seed, index): images do not share a stream of random numbers."""
    states = [int(np.random.SeedSequence((seed, int(i))).generate_state(1, np.uint64)[0]) for i in indices]
    return [torch.Generator().manual_seed(state) for state in states]


def resolve_labels(
    labels: Sequence[int | str] | Tensor, num_classes: int, class_names: Sequence[str] | None = None
) -> Tensor:
    """Class numbers (0 .. num_classes - 1) and names, mixed -> (N,) long on the CPU.

    A whole number is a class's number. Text is a name, or a number where it is one; ``#3`` is class 3 and ``name:3`` the
    class of that name, whatever the names are. Of a letter the name of its folder will do, too (``lower_a``).

    Raises:
        DiffFitError: a number out of range, an unknown name (the nearest known one is named), names without a list, or text
            that can be meant in two ways.
    """
    if isinstance(labels, Tensor):
        labels = labels.tolist()
    names = None if class_names is None else [composed(name) for name in class_names]
    numbers = [_number(label, names, num_classes) for label in labels]
    if odd := [number for number in numbers if not 0 <= number < num_classes]:
        raise DiffFitError(f"class labels must be in 0..{num_classes - 1}; got {odd[0]}")
    return torch.tensor(numbers, dtype=torch.long)


def _number(label: int | str, names: Sequence[str] | None, num_classes: int) -> int:
    """The one class that ``label`` can mean; its range is the caller's to check."""
    if not isinstance(label, str):
        if isinstance(label, bool) or not hasattr(label, "__index__"):
            raise DiffFitError(f"a class label must be a whole number or a name; got {label!r}")
        return operator.index(label)
    text = composed(label)
    wanted = {text, text[5:]} if text.startswith("name:") else {text}
    meant = [row for row, name in enumerate(names or []) if name in wanted]
    if not meant:  # a letter by the name of its folder, or the other way round
        wanted = set(map(class_of, wanted))
        meant = [row for row, name in enumerate(names or []) if class_of(name) in wanted]
    number = re.fullmatch(r"#?(-?[0-9]+)", text)
    if number is None and not meant:
        raise DiffFitError(_unknown_name(label, names))
    if number is not None:
        row = int(number[1])
        if not meant and text[0] != "#" and names and all(re.fullmatch("[0-9]+", name) for name in names):
            raise DiffFitError(
                f"no class is named {label!r}; where the names are numbers, class {row} is written '#{row}'"
            )
        if row not in meant and (not meant or 0 <= row < num_classes):
            meant.append(row)
    if len(meant) > 1:
        words = [f"#{row}" + (f" (named {names[row]!r})" if names and row < len(names) else "") for row in meant]
        raise DiffFitError(f"the class label {label!r} can mean {' or '.join(words)}; say #NUMBER or name:NAME")
    return meant[0]


def _unknown_name(name: str, names: Sequence[str] | None) -> str:
    if not names:
        return f"the class {name!r} was given by name, but the model carries no class names; use its number"
    return f"there is no class {name!r}; the nearest known one is {nearest(name, names)!r}"


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
