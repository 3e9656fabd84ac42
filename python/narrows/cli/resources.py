"""Memory and threads of a job: the estimate before it starts, and the limits while it runs.

- The estimate needs shapes alone and allocates nothing. An error about a limit names the smallest one that works.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import resource
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from ..backends import resolve
from ..data import Source
from ..data.normalized import NormalizedSource
from ..errors import OutOfMemoryError
from ..evaluation.metrics import MAX_ROWS
from ..fitting.feed import split_rows
from ..fitting.spec_of import DataFacts
from ..fitting.table import BLOCK_BYTES, Table, density
from ..plan.lowering import lower
from ..plan.spec import NetworkSpec, Precision
from ..random.weights import draw_seed
from .settings import FitSettings, show_size

__all__ = ["Budget", "apply_bytes", "blas_threads", "held_rows", "peak_rss", "plan_text"]

#: Bytes of one block of rows when a model is applied.
APPLY_BYTES = 64 << 20
#: Blocks in memory at once: the current one, and the next one raw and normalised.
BLOCKS = 3
#: Bytes allocated after the estimate: libraries for plots and HDF5, compiled kernels, blocks in float64.
_LATER = 112 << 20


@dataclasses.dataclass(frozen=True)
class Budget:
    """Memory that a fit needs, in bytes.

    Attributes
    ----------
    process : int
        Already in use: the interpreter, libraries, and data that were read as a whole.
    model : int
        Network, optimiser, batches, and copies for the best epoch and the checkpoint.
    result : int
        Latent codes and their measures.
    data : int
        Rows of data in memory at once during training.
    smallest : int
        The total with the least possible data, two batches.
    """

    process: int
    model: int
    result: int
    data: int
    smallest: int

    @property
    def total(self) -> int:
        return self.process + self.model + self.result + self.data

    @classmethod
    def of(cls, estimator: Any, table: Source, limit: int | None) -> Budget:
        """Estimate the memory. With a `limit`, `data` is what the limit leaves.

        Raises
        ------
        OutOfMemoryError
            The limit is below `smallest`.
        """
        n_rows = int(table.shape[0])
        batch = min(int(estimator.batch_size), n_rows)
        plan = lower(_spec(estimator, table, batch), batch)
        itemsize = Precision.of(estimator.precision).dtype.itemsize
        copies = 6 * (1 + plan.n_moments) * plan.parameter_size
        model = itemsize * (plan.arena_size + plan.work_size + copies)
        codes = n_rows * int(estimator.n_components) * (itemsize + 8)
        sampled = min(n_rows, MAX_ROWS) * 8 * (2 * int(estimator.n_components) + 10)
        row = Table(table).row_bytes
        whole = BLOCKS * n_rows * row
        least = BLOCKS * min(n_rows, 2 * plan.batch_rows) * row
        process = _rss() + _LATER
        fixed = process + model + codes + sampled
        smallest = _sure_limit(fixed + least)
        if limit is not None and limit < fixed + least:
            raise OutOfMemoryError(
                f"--max-memory {show_size(limit)} is too small: this fit needs at least "
                f"{show_size(smallest)}; raise it, or lower --hidden, --components or --batch-size"
            )
        room = BLOCKS * BLOCK_BYTES if limit is None else limit - fixed
        return cls(process, model, codes + sampled, min(whole, room), smallest)

    @property
    def block_bytes(self) -> int:
        """Bytes of normalised data that the estimator may keep in memory."""
        return max(1, self.data // BLOCKS)


def _sure_limit(n_bytes: int) -> int:
    """A limit a little above `n_bytes`. It works next time too, although a process varies from run to run."""
    return -(-(n_bytes + (16 << 20)) // 10**7) * 10**7


def held_rows(estimator: Any, n_rows: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]] | None:
    """The training rows and the validation rows of a fit; None without validation. Its seed is an integer."""
    part = estimator._validation_part()
    return None if part is None else split_rows(n_rows, part, draw_seed(estimator.random_state))


def _spec(estimator: Any, table: Source, batch: int) -> NetworkSpec:
    """The network that a fit to this table trains."""
    stored, n_features = density(table), int(table.shape[1])
    shifted = Table(table).shifted
    data = DataFacts(n_features, n_features, shifted=shifted, density=stored, target_density=stored, batch_rows=batch)
    spec: NetworkSpec = estimator._spec(data)
    return spec


def plan_text(settings: FitSettings, estimator: Any, table: NormalizedSource, budget: Budget, threads: str) -> str:
    """The output of ``--dry-run``."""
    n_rows, n_features = table.shape
    spec = _spec(estimator, table, int(estimator.batch_size))
    widths = [n_features, *(layer.n_out for layer in spec.layers)]
    parameters = sum(rows * columns for rows, columns in spec.parameter_shapes.values())
    split = held_rows(estimator, n_rows)
    held = len(split[1]) if split else 0
    batch = min(int(estimator.batch_size), n_rows - held)
    stored = "" if table.n_stored is None else f", sparse ({100 * density(table):.3g} % stored)"
    steps = -(-(n_rows - held) // batch)
    lines = {
        "data": f"{settings.data}: {n_rows} rows x {n_features} features{stored}",
        "normalize": table.describe("--normalize NAME"),
        "estimator": f"{type(estimator).__name__}, loss {estimator.loss}",
        "layers": " - ".join(map(str, widths)),
        "parameters": f"{parameters:,}",
        "rows": f"{n_rows - held} to train on, {held} held out",
        "steps per epoch": f"{steps} of {batch} rows; epochs: at most {estimator.max_iter}",
        "memory": (
            f"about {show_size(budget.total)}: {show_size(budget.process)} process, "
            f"{show_size(budget.model)} model, {show_size(budget.result)} results, "
            f"{show_size(budget.data)} data"
        ),
        "smallest": f"--max-memory {show_size(budget.smallest)}",
        "backend": f"{resolve(estimator.backend, announce=False)}, {estimator.precision}",
        "threads": threads,
        "output": f"{settings.out} (nothing written: dry run)",
    }
    return "\n".join(f"{name:16s} {text}" for name, text in lines.items())


def apply_bytes(estimator: Any, limit: int | None) -> int:
    """Bytes of one block of rows under a memory limit, which must hold it raw, normalised, encoded and as a result."""
    if limit is None:
        return APPLY_BYTES
    sizes = sum(w.nbytes for w in estimator.coefs_)
    needed = _rss() + (64 << 20) + 4 * sizes
    least = 8 * (1 << 20)
    if limit < needed + least:
        enough = show_size(_sure_limit(needed + least))
        raise OutOfMemoryError(f"--max-memory {show_size(limit)} is too small: this model needs at least {enough}")
    return int(min(APPLY_BYTES, (limit - needed) // 8))


@contextlib.contextmanager
def blas_threads(n_threads: int) -> Iterator[None]:
    """Limit NumPy's BLAS to the threads of the job. By default it uses every core."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(n_threads, user_api="blas"):
        yield


def peak_rss() -> int:
    """Largest memory of this process so far, in bytes."""
    # On Linux, ru_maxrss starts at the memory of the parent process, so it is the second choice.
    with contextlib.suppress(OSError, StopIteration, ValueError), open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM:")) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def _rss() -> int:
    """Memory of this process now, in bytes; the peak if the system does not report it."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return peak_rss()
