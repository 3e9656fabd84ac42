"""Reading data sets: files, folders, arrays and frames as one kind of `Source`.

`open` is for files, `as_source` for anything, `read_obs` for what a file knows of its rows; `Source` is the
interface that training and encoding read from.
"""

from __future__ import annotations

from .checks import check_counts, check_finite
from .readers import as_source, open, read_obs
from .source import ArraySource, Source

__all__ = ["ArraySource", "Source", "as_source", "check_counts", "check_finite", "open", "read_obs"]
