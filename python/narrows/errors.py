"""The exceptions of narrows that no built-in type expresses.

Bad arguments raise ``ValueError`` or ``TypeError``, a missing file raises ``FileNotFoundError``, and an unfitted
estimator raises scikit-learn's ``NotFittedError``. These classes cover the rest. Each message is one line that says
what is wrong, where, and what to do. The command line exits with the error's ``exit_code``.
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
    """Base of all errors of narrows."""

    exit_code = 1


class DataError(NarrowsError, ValueError):
    """A data file or its content cannot be used."""

    exit_code = 3


class ModelFileError(NarrowsError, ValueError):
    """A model file is damaged, from another program, or of a newer version."""

    exit_code = 3


class OutputError(NarrowsError, OSError):
    """An output path cannot be written, or something else uses it."""

    exit_code = 3


class MissingExtraError(NarrowsError, ImportError):
    """An optional dependency is missing; the message names the extra that installs it."""

    exit_code = 3


class DivergenceError(NarrowsError, ArithmeticError):
    """Training produced NaN or infinity; the estimator keeps its last good parameters."""

    exit_code = 4


class ResumeError(NarrowsError, ValueError):
    """A checkpoint belongs to another run; the message names the fields that differ."""

    exit_code = 5


class OutOfMemoryError(NarrowsError, MemoryError):
    """The memory limit, or the machine's memory, is too small for the job."""

    exit_code = 6


class BackendError(NarrowsError, RuntimeError):
    """The requested backend does not exist or cannot run here."""

    exit_code = 6
