"""Counter-based random numbers: Philox4x32-10 in NumPy.

This is the specification of ``csrc/shared/philox.h``: both give the same 32-bit words for the same counter. So
corruption, dropout, and first weights are the same on every backend, for any number of threads and any order of
evaluation. Nothing here has state or touches NumPy's global generator.

Element (row, column) of a random matrix is a word of a block: word ``column % 4``. The block's counter is
``(column // 4, row, step, stream)``, and its key is the 64-bit seed.

Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["keyed_normal", "normal", "uniform", "uniforms", "words"]

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def words(seed: int, stream: int, step: int, n_rows: int, n_columns: int, first_row: int = 0) -> NDArray[np.uint32]:
    """32 random bits for each element of a matrix.

    Parameters
    ----------
    seed : int
        64-bit key.
    stream : int
        Number of the consumer (each random op of a plan has one), below 2**32.
    step : int
        Training step, below 2**32.
    n_rows, n_columns : int
        Shape of the matrix.
    first_row : int
        First row, in a taller matrix.

    Returns
    -------
    ndarray of uint32, shape (n_rows, n_columns)
    """
    rows = np.arange(first_row, first_row + n_rows, dtype=np.uint64)
    return _words(seed, stream, rows, np.full(n_rows, step & 0xFFFFFFFF, np.uint64), n_columns)


def _words(
    seed: int, stream: int, rows: NDArray[np.uint64], steps: NDArray[np.uint64], n_columns: int
) -> NDArray[np.uint32]:
    """`words` of any rows; each row has its own step."""
    n_rows, n_blocks = len(rows), -(-n_columns // 4)
    shape = (n_rows, n_blocks)
    c0 = np.broadcast_to(np.arange(n_blocks, dtype=np.uint64), shape)
    c1 = np.broadcast_to(rows[:, None], shape)
    c2 = np.broadcast_to(steps[:, None], shape)
    c3 = np.broadcast_to(np.uint64(stream & 0xFFFFFFFF), shape)
    k0, k1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (p1 >> _SHIFT) ^ c1 ^ np.uint64(k0),
            p1 & _LOW,
            (p0 >> _SHIFT) ^ c3 ^ np.uint64(k1),
            p0 & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    blocks = np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)
    return np.ascontiguousarray(blocks.reshape(n_rows, 4 * n_blocks)[:, :n_columns])


def uniform(seed: int, stream: int, step: int, n_rows: int, n_columns: int, first_row: int = 0) -> NDArray[np.float64]:
    """Uniform numbers in the open interval (0, 1): the centres of 2**24 equal cells.

    With 24 bits, ``u - 1/2`` is exact in float32. So float32 and float64 backends decide alike when they compare a
    number with a probability.
    """
    return _centres(words(seed, stream, step, n_rows, n_columns, first_row))


def uniforms(
    seed: int, stream: int, steps: range, n_rows: int, n_columns: int, first_row: int = 0
) -> NDArray[np.float64]:
    """`uniform` of several steps, shape (len(steps), n_rows, n_columns)."""
    rows = np.tile(np.arange(first_row, first_row + n_rows, dtype=np.uint64), len(steps))
    each = np.repeat(np.asarray(steps, np.uint64) & _LOW, n_rows)
    return _centres(_words(seed, stream, rows, each, n_columns)).reshape(len(steps), n_rows, n_columns)


def _centres(drawn: NDArray[np.uint32]) -> NDArray[np.float64]:
    return ((drawn >> np.uint32(8)).astype(np.float64) + 0.5) * 2.0**-24


def normal(seed: int, stream: int, step: int, n_rows: int, n_columns: int, first_row: int = 0) -> NDArray[np.float64]:
    """Standard normal numbers: the normal quantiles of :func:`uniform`."""
    from scipy.special import ndtri

    z: NDArray[np.float64] = ndtri(uniform(seed, stream, step, n_rows, n_columns, first_row))
    return z


def keyed_normal(seed: int, stream: int, keys: NDArray[np.uint64], n_columns: int) -> NDArray[np.float64]:
    """Standard normal numbers, shape (len(keys), n_columns); each row depends only on its 64-bit key.

    The halves of the key replace row and step in the counter.
    """
    from scipy.special import ndtri

    z: NDArray[np.float64] = ndtri(_centres(_words(seed, stream, keys & _LOW, keys >> _SHIFT, n_columns)))
    return z
