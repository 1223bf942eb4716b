"""Errors that are the user's to mend: one clear sentence, no traceback at the command line."""

from __future__ import annotations


class DiffFitError(Exception):
    """Bad input, a bad file or an impossible combination.

    The message says what was expected and what came. The command line prints it as one sentence and exits with 2;
    in Python it is an ordinary exception.
    """


class DeltaMismatchError(DiffFitError):
    """A delta does not belong to the model it is loaded onto (other base, size or number of classes)."""
