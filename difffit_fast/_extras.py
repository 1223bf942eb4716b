"""Optional dependencies: imported where they are used, with an error that names the extra to install."""

from __future__ import annotations

import importlib
from types import ModuleType

from .errors import DiffFitError


def require(module: str, extra: str, purpose: str = "") -> ModuleType:
    """Import ``module`` or raise a :class:`DiffFitError` that names the extra which brings it.

    >>> require("json", "vae").__name__
    'json'
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        what = f" for {purpose}" if purpose else ""
        name = module.split(".")[0]
        raise DiffFitError(
            f"{name} is needed{what} and could not be imported ({error}); install it with: pip install 'difffit_fast[{extra}]'"
        ) from error
