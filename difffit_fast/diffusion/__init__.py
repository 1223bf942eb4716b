"""Noise, losses and samplers.

``create_diffusion`` makes the Gaussian diffusion of DiT (noise prediction, learned-range variance); ``FlowMatching`` is
the linear path of SiT. Both have ``training_losses(model, x, t, model_kwargs)`` and ``sample_timesteps(n)``, so a
training loop need not know which it holds.
"""

from .flow import FlowMatching
from .gaussian import GaussianDiffusion, create_diffusion
from .noise import randn
from .solvers import SOLVERS, solver_sample_loop

__all__ = ["SOLVERS", "FlowMatching", "GaussianDiffusion", "create_diffusion", "randn", "solver_sample_loop"]
