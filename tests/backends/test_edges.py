"""Tile edges on every instruction set, with each operand against a page that may not be touched (see `edges.py`)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from guards import LAYOUTS, OUTPUTS, Guarded
from narrows.backends import probe

if not probe("cpp").ok:
    pytest.skip(f"no native backend: {probe('cpp').reason}", allow_module_level=True)

from native_functions import instruction_sets, pair_sets

SUPPORT = Path(__file__).parents[1] / "support"
ISAS = instruction_sets()
isas = pytest.mark.parametrize("isa", ISAS)


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-X", "faulthandler", *map(str, arguments)],
        cwd=SUPPORT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


def sweep(isa: str, folder: Path, *, round_: int = 0, **strides: int) -> None:
    """Every n-th case of each named sweep, in one process: its imports take as long as a sweep."""
    log = folder / "case"
    log.touch()
    sweeps = [word for sweep in strides.items() for word in sweep]
    offset = ISAS.index(isa) if isa in ISAS else 0
    result = run("edges.py", offset, round_, log, *sweeps, NARROWS_ISA=isa)
    assert result.returncode == 0, f"{log.read_text()}\n{result.stderr}"


@isas
def test_sizes_at_tile_edges(isa: str, tmp_path: Path) -> None:
    """Half of the layers and penalties on each instruction set. Neighbours in the list of sets share no size, so two
    sets run each size.
    """
    sweep(isa, tmp_path, layers=2, programs=79, images=17, penalties=2)


@pytest.mark.parametrize("isa", pair_sets())
def test_products_in_bfloat16_at_tile_edges(isa: str, tmp_path: Path) -> None:
    sweep(isa, tmp_path, pairs=29)


@pytest.mark.slow
@pytest.mark.parametrize("isa", pair_sets())
def test_all_products_in_bfloat16_at_tile_edges(isa: str, tmp_path: Path) -> None:
    sweep(isa, tmp_path, round_=1, pairs=1)


@pytest.mark.slow
@isas
def test_layers_at_tile_edges_in_many_layouts(isa: str, tmp_path: Path) -> None:
    for round_ in range(51):
        sweep(isa, tmp_path, round_=round_, layers=1)


@pytest.mark.slow
@isas
def test_all_programs_at_tile_edges(isa: str, tmp_path: Path) -> None:
    for name in ("programs", "penalties", "images"):
        sweep(isa, tmp_path, round_=1, **{name: 1})


# --- that the guards guard ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code",
    [
        "a = Guarded(9).place(np.ones(9, np.uint8)); ctypes.string_at(a.ctypes.data, 10)",
        "a = Guarded(9).place(np.ones(9, np.uint8), at_end=False); ctypes.string_at(a.ctypes.data - 1, 10)",
        "a = small.arena(); ctypes.string_at(a.ctypes.data, a.nbytes + mmap.PAGESIZE)",
    ],
    ids=["after", "before", "after the arena"],
)
def test_a_guarded_page_ends_the_process(code: str) -> None:
    prelude = """
import ctypes, mmap, sys
import numpy as np
from guards import Guarded
from narrows.backends.cpp import CppProgram
from narrows.plan.lowering import lower
from narrows.plan.spec import Precision
from native_plans import small_spec
small = CppProgram(lower(small_spec(), 8), Precision.FLOAT32, 1)
print("ready", flush=True)
"""
    result = run("-c", prelude + code)
    assert result.stdout == "ready\n"
    assert -result.returncode in (signal.SIGSEGV, signal.SIGBUS), result.stderr


@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_written_beside_an_array_is_seen(layout: str, at_end: bool) -> None:
    guarded, values = Guarded(10000), np.arange(12.0).reshape(3, 4)
    array = guarded.place(values, LAYOUTS[layout](3, 4), at_end=at_end)
    if "repeated" not in layout:
        np.testing.assert_array_equal(array, values)
    guarded.check()
    array[1, 2] += 1
    with pytest.raises(AssertionError, match="bytes changed"):
        guarded.check()
    if layout in OUTPUTS:
        guarded.check(written=True)
    guarded._room[0 if at_end else -1] ^= 1
    with pytest.raises(AssertionError, match="1 bytes changed"):
        guarded.check(written=True)
