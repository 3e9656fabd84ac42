"""Convolutions of the CUDA backend: the columns per thread change no bit, and results are within the bounds of
`agreement`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from agreement import dtypes
from cases import CASES, CONVOLUTIONS
from cuda_device import HostDevice, check_agreement, program_on
from narrows.backends import Hyper
from narrows.backends.cuda.emit import images as emitted
from narrows.backends.cuda.launches import Writer
from narrows.backends.cuda.table import CONV_COLUMNS
from narrows.plan.plan import Mode
from narrows.plan.spec import Activation, Precision
from networks import Case, conv, images
from oracle import SEED, STEP, away_from_kinks

# Weights of several slices, both ways, that end within the channels of a pixel; and copies of pixels.
LONG_CASES = (
    Case("long", images((4, 3, 19), conv(33), conv(21), latent=1, separate_target=True), batch=3, rows=5),
    Case(
        "long-up",
        images(
            (2, 3, 33),
            conv(17, strides=2),
            conv(19, upsample=(3, 2)),
            conv(3, 2, strides=(1, 2)),
            latent=1,
            separate_target=True,
        ),
        batch=3,
        rows=5,
    ),
    Case(
        "long-back",
        images((4, 4, 17), conv(20, strides=2), conv(9, 5, strides=3, transposed=True), latent=1, separate_target=True),
        batch=3,
        rows=5,
    ),
)
IMAGE_CASES = (*LONG_CASES, *(c for c in CASES if c.name.removeprefix("convolution-") in CONVOLUTIONS))


@dtypes
@pytest.mark.parametrize("case", LONG_CASES, ids=str)
def test_long_sums_agree_with_the_reference(libraries: Any, case: Case, dtype: Any) -> None:
    case = away_from_kinks(case)
    program = program_on(HostDevice(libraries), case, dtype)
    check_agreement(program, case, dtype)
    program.close()


def bits(libraries: Any, case: Case, each: int | None, *, reverse: bool = False) -> list[bytes]:
    """Results with `each` columns per thread."""
    with pytest.MonkeyPatch.context() as patch:
        if each is not None:

            def blocks_of(w: Writer, pixels: int, columns: int) -> tuple[int, int]:
                return each, -(-w.m * pixels // emitted.CONV_THREADS) * -(-columns // each)

            patch.setattr(emitted, "columns_of", blocks_of)
        program = program_on(HostDevice(libraries, reverse), case)
        terms = program.train(np.arange(case.rows), Hyper(SEED, STEP, np.full(-(-case.rows // case.batch), 1e-2)))
        data = case.data(np.float32)
        applied = program.apply(data.X, Mode.RECONSTRUCT, data.target, data.condition)
        parts = [terms, *program.state().values(), applied]
        program.close()
        return [np.ascontiguousarray(part).tobytes() for part in parts]


@pytest.mark.parametrize("case", IMAGE_CASES, ids=str)
def test_bits_do_not_depend_on_the_columns_per_thread(libraries: Any, case: Case) -> None:
    expected = bits(libraries, case, None)
    for i, each in enumerate(CONV_COLUMNS):
        assert bits(libraries, case, each, reverse=i % 2 == 0) == expected, f"{each} columns to a thread"


def test_shapes_decide_the_columns_per_thread() -> None:
    """With many pixels a thread has many columns and reads an image seldom. With few pixels it has one column."""
    plan = Case("one", images((8, 8, 1), conv(16), conv(1), latent=1)).plan
    few, many = (Writer(plan, rows, Mode.TRAIN, Precision.FLOAT32) for rows in (1, 4096))
    assert emitted.columns_of(few, 64, 16) == (1, 16)
    assert emitted.columns_of(many, 28 * 28, 16)[0] == 16
    assert emitted.columns_of(many, 28 * 28, 1)[0] == 1
    assert Activation.LINEAR == 0, "what kernels take an unknown number for"
