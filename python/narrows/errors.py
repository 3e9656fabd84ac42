"""The exceptions of narrows that no built-in type expresses.

Bad arguments raise ``ValueError`` or ``TypeError``, a missing file ``FileNotFoundError`` and an unfitted
estimator scikit-learn's ``NotFittedError``; these classes cover the rest. Each message is one line that says
what is wrong, where, and what to do. ``exit_code`` is what the command line returns for the error.
"""

from __future__ import annotations

__all__ = [
    "BackendError",
    "DataError",
    "DivergenceError",
    "MissingExtraError",
    "ModelFileError",
    "NarrowsError",
    "OutOfMemoryError",
    "OutputError",
    "ResumeError",
]


class NarrowsError(Exception):
    """Base of every error that is narrows's own."""

    exit_code = 1


class DataError(NarrowsError, ValueError):
    """A data file, or what is in it, cannot be used."""

    exit_code = 3


class ModelFileError(NarrowsError, ValueError):
    """A model file is damaged, foreign, or of a newer version."""

    exit_code = 3


class OutputError(NarrowsError, OSError):
    """An output path cannot be written, or belongs to something else."""

    exit_code = 3


class MissingExtraError(NarrowsError, ImportError):
    """An optional dependency is absent; the message names the extra that installs it."""

    exit_code = 3


class DivergenceError(NarrowsError, ArithmeticError):
    """Training produced NaN or infinity; the estimator keeps its last good parameters."""

    exit_code = 4


class ResumeError(NarrowsError, ValueError):
    """A checkpoint does not belong to this command: the message names the fields that differ."""

    exit_code = 5


class OutOfMemoryError(NarrowsError, MemoryError):
    """The memory limit, or the machine's memory, is too small for the job."""

    exit_code = 6


class BackendError(NarrowsError, RuntimeError):
    """A backend that was asked for does not exist or cannot run here."""

    exit_code = 6
