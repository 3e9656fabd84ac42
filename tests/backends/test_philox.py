"""Random numbers: the words of Philox4x32-10, the same for any shape, with the distributions they claim."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from narrows.random import philox

MASK = 0xFFFFFFFF
# counter, key, result: the known-answer vectors distributed with Random123
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((MASK,) * 4, (MASK,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
known = pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)


def block(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """The cipher in Python's integers, as the paper writes it."""
    (a, b, c, d), (k0, k1) = counter, key
    for _ in range(10):
        (high0, low0), (high1, low1) = divmod(0xD2511F53 * a, 2**32), divmod(0xCD9E8D57 * c, 2**32)
        a, b, c, d = high1 ^ b ^ k0, low1, high0 ^ d ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return a, b, c, d


@known
def test_known_answers(counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert block(counter, key) == expected


@known
def test_known_answers_of_the_jitted_block(
    counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    from narrows.backends.numba.kernels import _philox

    assert _philox(*(np.uint64(v) for v in counter + key)) == expected


def test_the_first_words_of_seed_0() -> None:
    assert philox.words(0, 0, 0, 1, 4).tolist() == [list(KNOWN[0][2])]


@settings(max_examples=50, deadline=None)
@given(
    st.integers(0, 2**64 - 1),
    st.integers(0, MASK),
    st.integers(0, MASK),
    st.integers(0, 40),
    st.integers(0, 40),
)
def test_words_are_the_cipher_of_their_place(seed: int, stream: int, step: int, row: int, column: int) -> None:
    word = philox.words(seed, stream, step, row + 1, column + 1)[row, column]
    assert word == block((column // 4, row, step, stream), (seed & MASK, seed >> 32))[column % 4]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(0, 9), st.integers(1, 30), st.integers(1, 30))
def test_jitted_cells_are_the_words(seed: int, stream: int, rows: int, columns: int) -> None:
    from narrows.backends.numba.kernels import cells

    out = np.empty((rows, columns), np.int32)
    cells(np.uint64(seed), np.uint64(7), np.uint64(stream), out)
    np.testing.assert_array_equal(out, philox.words(seed, stream, 7, rows, columns) >> 8)


def test_an_element_does_not_depend_on_the_shape() -> None:
    large = philox.words(11, 2, 3, 40, 37)
    for rows, columns in ((1, 1), (40, 5), (7, 37), (3, 4)):
        np.testing.assert_array_equal(philox.words(11, 2, 3, rows, columns), large[:rows, :columns])


def test_seed_stream_and_step_each_matter() -> None:
    base = philox.words(1, 2, 3, 20, 20)
    for other in ((2, 2, 3), (1 + 2**32, 2, 3), (1, 3, 3), (1, 2, 4)):
        assert (philox.words(*other, 20, 20) == base).mean() < 0.01


def test_uniform() -> None:
    u = philox.uniform(42, 0, 0, 400, 500)
    assert u.min() > 0
    assert u.max() < 1
    assert stats.kstest(u.ravel(), "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(u[:, :-1].ravel(), u[:, 1:].ravel())[0, 1]) < 0.01
    assert abs(np.corrcoef(u[:-1].ravel(), u[1:].ravel())[0, 1]) < 0.01
    half = u - 0.5
    np.testing.assert_array_equal(half.astype(np.float32).astype(np.float64), half)


def test_normal() -> None:
    z = philox.normal(42, 0, 0, 400, 500)
    assert np.isfinite(z).all()
    assert stats.kstest(z.ravel(), "norm").pvalue > 1e-3
    np.testing.assert_allclose(stats.norm.cdf(z), philox.uniform(42, 0, 0, 400, 500), rtol=1e-12)


def test_jitted_normals_are_the_quantiles_of_the_cells() -> None:
    from scipy.special import ndtri

    from narrows.backends.numba.kernels import add_normal

    ends = np.arange(3000)
    cells = np.concatenate([ends, np.arange(0, 2**24, 997), 2**24 - 1 - ends]).astype(np.int32)[None]
    x = np.zeros(cells.shape)
    add_normal(x, cells, 1.0)
    np.testing.assert_allclose(x, ndtri((cells + 0.5) * 2.0**-24), rtol=4e-15, atol=1e-15)


def test_global_generator_is_left_alone() -> None:
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    philox.normal(1, 0, 0, 10, 10)
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002
