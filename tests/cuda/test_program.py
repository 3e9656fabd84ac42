"""Programs of the CUDA backend on the host's device: graphs, chunks of steps, data on the host, and errors."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp

from agreement import inference
from cases import GRAM_CASES, MODEL_CASES, SPARSE_CASES
from cuda_device import HostDevice, on_host, program_on
from narrows.backends import Hyper
from narrows.backends.cuda import data as data_module
from narrows.backends.cuda.data import CHUNK
from narrows.backends.cuda.program import GRAPH_STEPS
from narrows.plan.plan import Mode
from narrows.plan.spec import Corruption
from networks import Case, network
from oracle import SEED, STEP


def test_a_graph_is_captured_once_for_each_number_of_rows(libraries: Any) -> None:
    case = Case("graphs", network((7, 4, 7)), batch=8, rows=21)
    program = on_host(libraries, case)
    for step in range(3):
        program.train(np.arange(21), Hyper(SEED, 3 * step, np.full(3, 1e-2)))
    assert set(program._graphs) == {(Mode.TRAIN, 8, 1), (Mode.TRAIN, 5, 1)}
    assert program.device.n_graphs == 2
    program.bind(case.data(np.float32).X * 2)
    program.train(np.arange(16), Hyper(SEED, 9, np.full(2, 1e-2)))
    assert program.device.n_graphs == 2, "data that is bound anew needs no new graph"


def test_steps_of_several_chunks_and_calls_are_the_same(libraries: Any) -> None:
    case = Case("chunks", network((7, 4, 7), corruption=Corruption.GAUSSIAN, corruption_level=0.1), batch=4, rows=20)
    n = 2 * CHUNK + 3
    rows, rates = np.arange(4 * n) % 20, np.linspace(1e-2, 1e-3, n)
    one, two = on_host(libraries, case), on_host(libraries, case)
    together = one.train(rows, Hyper(9, 5, rates))
    apart = [two.train(rows[4 * i : 4 * i + 4], Hyper(9, 5 + i, rates[i : i + 1])) for i in range(n)]
    np.testing.assert_array_equal(together, np.concatenate(apart))
    for name, value in one.state().items():
        assert value.tobytes() == two.state()[name].tobytes()
    assert len(one.train(rows, Hyper(9, 5 + n, rates), lambda: True)) == CHUNK


STREAMED = (
    Case("dense", network((33, 9, 33), separate_target=True, weighted=True), batch=4, rows=41),
    *(case for case in (*SPARSE_CASES[:6], *GRAM_CASES[:3])),
)


@pytest.mark.parametrize("case", STREAMED, ids=str)
def test_data_on_the_host_change_no_bit(
    libraries: Any, case: Case, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With chunks of one step and of several. The device does its work as late as possible."""
    hyper = Hyper(SEED, STEP, np.full(2 * -(-case.rows // case.batch), 1e-2))
    rows = np.concatenate([np.random.default_rng(i).permutation(case.rows) for i in range(2)])
    data, expected = case.data(np.float32), None
    for left, most in ((2**40, data_module.STAGED_BYTES), (0, 1), (0, 3000), (0, data_module.STAGED_BYTES)):
        monkeypatch.setattr(data_module, "STAGED_BYTES", most)
        program = program_on(HostDevice(libraries, late=left == 0, memory_left=left), case)
        with caplog.at_level(logging.INFO, "narrows"):
            program.bind(*data)
        assert ("stay on the host" in caplog.text) == (left == 0)
        terms = program.train(rows, hyper)
        found = [terms, *program.state().values(), *program.gradient(rows[:3], SEED, STEP)[1].values()]
        found += [program.apply(data.X, mode, data.target, data.condition) for mode in inference]
        program.close()
        assert not program.device.memory
        bits = [np.ascontiguousarray(part).tobytes() for part in found]
        expected = expected or bits
        assert bits == expected, (left, most)


def test_the_host_does_not_wait_between_chunks(libraries: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two chunks are under way at a time, on a device that works only when someone waits for it."""
    case = Case("chunks", network((7, 4, 7)), batch=4, rows=20)
    device = HostDevice(libraries, late=True)
    program = program_on(device, case)
    waiting = []
    n = 4 * CHUNK + 1
    program.train(
        np.arange(4 * n) % 20, Hyper(9, 5, np.full(n, 1e-3)), lambda: waiting.append(len(device.to_do)) is not None
    )
    one, *more = waiting
    assert one == 2 + CHUNK // GRAPH_STEPS, "a message, graphs of several steps, and what they report"
    assert more[:-1] == [2 * one] * 3


@pytest.mark.parametrize("where", ["between chunks", "in a chunk"])
def test_a_run_that_ends_early_leaves_nothing_behind(
    libraries: Any, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Work that remains on the device would read memory that the next run changes, or that is freed."""
    case = Case("chunks", network((7, 4, 7)), batch=4, rows=20)
    device = HostDevice(libraries, late=True)
    program, n = program_on(device, case), 3 * CHUNK

    def interrupt() -> bool:
        raise KeyboardInterrupt

    hyper = Hyper(9, 5, np.full(n, 1e-3))
    with monkeypatch.context() as during:
        if where == "in a chunk":
            during.setattr(device, "fetch", lambda address, pinned: interrupt())
        with pytest.raises(KeyboardInterrupt):
            program.train(np.arange(4 * n) % 20, hyper, interrupt)
    assert not device.to_do
    assert len(program.train(np.arange(4 * n) % 20, hyper)) == n
    assert program.apply(np.empty((0, 7), np.float32), Mode.ENCODE).shape == (0, 4)


def test_rows_outside_the_data_are_refused(libraries: Any) -> None:
    program = on_host(libraries, Case("rows", network((7, 4, 7))))
    for rows in ([21], [-1], [0, 5, 100]):
        with pytest.raises(IndexError, match="21 rows"):
            program.gradient(np.array(rows))


CSR_CASE = next(c for c in SPARSE_CASES if c.name == "sparse-plain-3")


@pytest.mark.parametrize(
    ("indptr", "indices", "message"),
    [
        ([1, 1, 3], [1, 5, 6], "source 0: indptr runs from 1 to 3"),
        ([0, 2], [1, 5, 6], "2 entries; 2 rows need 3"),
        ([0, 3, 2], [1, 5, 6], "decreases at row 1"),
        ([0, 0, 9], [1, 5, 6], "runs from 0 to 9, but 3 values are stored"),
        ([0, 0, 3], [1, 5, 23], "23"),
        ([0, 0, 3], [-1, 5, 6], "-1"),
    ],
)
@pytest.mark.parametrize("sorted_", [True, False], ids=["sorted", "to sort"])
def test_damaged_sparse_rows_are_refused(
    libraries: Any, indptr: Any, indices: Any, message: str, sorted_: bool
) -> None:
    X = sp.csr_array((2, 23), dtype=np.float32)
    X.data, X.indices, X.indptr = np.ones(3, np.float32), np.array(indices, np.int32), np.array(indptr, np.int32)
    if sorted_:
        X.has_canonical_format = True
    program = on_host(libraries, CSR_CASE)
    with pytest.raises(ValueError, match=message):
        program.bind(X)
    program.close()
    assert not program.device.memory


def test_sources_that_do_not_fit_or_are_missing_are_refused(libraries: Any) -> None:
    program = on_host(libraries, CSR_CASE)
    with pytest.raises(ValueError, match="source 0 has 22 columns, the plan expects 23"):
        program.bind(sp.csr_array((4, 22), dtype=np.float32))
    with pytest.raises(ValueError, match="source 0 is not bound"):
        program.gradient(np.arange(2))
    spec = network((7, 4, 7), separate_target=True, weighted=True)
    program = on_host(libraries, Case("wide", spec))
    X = np.ones((5, 7), np.float32)
    for bound, message in (
        ((X[:, 1:], X, X[:, 0]), "source 0 has 6 columns, the plan expects 7"),
        ((X, X[:, 1:], X[:, 0]), "source 1 has 6 columns, the plan expects 7"),
        ((X, X, X), "source 2 has 7 columns, the plan expects 1"),
    ):
        with pytest.raises(ValueError, match=message):
            program.bind(*bound)
    program.bind(X, X)
    with pytest.raises(ValueError, match="source 2 is not bound"):
        program.train(np.arange(5), Hyper(0, 0, np.zeros(1)))
    with pytest.raises(ValueError, match="source 1 is not bound, expected 5 rows"):
        program.apply(X, Mode.SCORE)
    with pytest.raises(ValueError, match="source 1 has 4 rows, expected 5 rows"):
        program.apply(X, Mode.SCORE, X[1:])
    with pytest.raises(ValueError, match="source 3 has 7 columns, the plan expects 4"):
        program.apply(X, Mode.DECODE)


def test_state_round_trip(libraries: Any) -> None:
    case = next(c for c in MODEL_CASES if c.name == "penalty-all")
    one, two = on_host(libraries, case), on_host(libraries, case)
    one.train(np.arange(case.rows), Hyper(1, 0, np.full(3, 1e-2)))
    two.load(one.state())
    views = two.views()
    for name, value in one.state().items():
        np.testing.assert_array_equal(views[name], value)
    assert one.finite()
    for name, bad in (("W0", np.nan), ("b1", np.inf), ("moment2.W1", -np.inf), ("moment1.b0", np.nan)):
        broken = {name: value.copy() for name, value in views.items()}
        broken[name][-1, -1] = bad
        two.load(broken)
        assert not two.finite(), name
    two.load(one.state())
    assert two.finite()
    assert one.state(optimiser=False).keys() == {name for name in views if "." not in name}
    two.load({name: value for name, value in one.state().items() if "." not in name})
    assert all(not value.any() for name, value in two.state().items() if "." in name)
    handed = one.hand_over()
    assert handed.keys() == views.keys()
    assert not one.device.memory
