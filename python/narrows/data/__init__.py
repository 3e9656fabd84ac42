"""Reading data sets: files, folders, arrays and frames become a `Source`.

`open` opens files, `as_source` accepts anything, `read_obs` reads a column of `obs`. Training and encoding read from a
`Source`. Its `obs` may hold `Column` objects.
"""

from __future__ import annotations

from .checks import check_counts, check_finite
from .columns import Column
from .readers import as_source, open, read_obs
from .source import ArraySource, Source

__all__ = ["ArraySource", "Column", "Source", "as_source", "check_counts", "check_finite", "open", "read_obs"]

KINDS = ("auto", "log1p", "standard", "minmax", "none")
"""Kinds of normalisation. They are not in `normalize` because ``narrows --help`` must not import scikit-learn."""
