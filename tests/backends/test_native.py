"""What only the native backend promises: nothing is written outside its slot, every instruction set is tested, forks,
threads and signals are safe.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cases import CPU_PRECISIONS
from narrows.backends import Hyper
from narrows.backends.cpp import CppProgram, probe_machine
from narrows.plan.lowering import lower
from narrows.plan.plan import Mode, Plan, Region
from narrows.plan.spec import Activation, LayerSpec, NetworkSpec, Precision
from native_plans import every_plan, numbers_of, rich_plan, small_spec, started

pytestmark = pytest.mark.usefixtures("cpp")

SUPPORT = Path(__file__).parents[1] / "support"
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc or limits the address space")


# --- memory ---------------------------------------------------------------------------------------------------------


@every_plan
@pytest.mark.parametrize("dtype", CPU_PRECISIONS, ids=str)
def test_no_stray_write(dtype: Precision, make: Callable[[], Plan]) -> None:
    """Every element of the arena that belongs to no slot still holds its poison after training and inference."""
    plan = make()
    program = started(plan, dtype)
    arena = program.arena()
    owned = np.zeros(arena.size, bool)
    base = {r: r * plan.parameter_size for r in range(2 + plan.n_moments)}
    work = (2 + plan.n_moments) * plan.parameter_size
    for slot in plan.slots:
        starts = (
            [work] if slot.region >= Region.BATCH else base.values()  # moments mirror parameters
        )
        for start in starts:
            owned[start + slot.offset : start + slot.offset + slot.size] = True
    # The padding of parameters must stay zero: the update runs over it.
    for slot in plan.parameters:
        for start in base.values():
            rows = arena[start + slot.offset : start + slot.offset + slot.size].reshape(slot.rows, slot.ld)
            assert not rows[:, slot.cols :].any()
    arena[~owned] = 12345.0
    program.train(np.arange(60), Hyper(3, 0, np.full(3, 1e-2)))
    X = np.random.default_rng(2).random((31, 37)).astype(dtype.dtype)
    for mode in (Mode.ENCODE, Mode.RECONSTRUCT, Mode.SCORE):
        program.apply(X, mode, condition=numbers_of(plan, 31))
    assert (arena[~owned] == 12345.0).all()
    for slot in plan.parameters:
        for start in base.values():
            rows = arena[start + slot.offset : start + slot.offset + slot.size].reshape(slot.rows, slot.ld)
            assert not rows[:, slot.cols :].any()


def test_rows_beyond_int32_are_reached(tmp_path: Path) -> None:
    """A sparse file of 17 GB apparent size: element offsets need 64 bits."""
    n, k = 2**26 + 1, 64
    path = tmp_path / "huge.f4"
    with path.open("wb") as file:
        try:
            file.truncate(n * k * 4)
        except OSError as error:
            pytest.skip(f"no sparse files here: {error}")
    data = np.memmap(path, np.float32, "r+", shape=(n, k))
    rows = np.array([0, 2**25, 2**26])
    data[rows] = np.arange(3)[:, None] + 1
    spec = NetworkSpec((LayerSpec(k, 3, Activation.LINEAR), LayerSpec(3, k, Activation.LINEAR)), 1)
    program = CppProgram(lower(spec, 3), Precision.FLOAT32, 1)
    program.load({s.name: np.zeros((s.rows, s.cols)) for s in program.plan.parameters})
    program.bind(data)
    terms, _ = program.gradient(rows)
    assert terms[0] == pytest.approx(k * (1 + 4 + 9) / 3)


# --- instruction sets -----------------------------------------------------------------------------------------------

TRAIN_AND_HASH = """
import hashlib, numpy as np, sys
sys.path[:0] = {path!r}
from native_plans import PLANS, started
from narrows.backends import Hyper
from test_backends import Corruption, test_corruption_is_philox
for kind in Corruption:
    for dtype in (np.float32, np.float64):
        test_corruption_is_philox("cpp", kind, dtype)
for make in PLANS:
    p = started(make())
    for i in range(25):
        p.train(np.arange(60), Hyper(3, 3 * i, np.full(3, 1e-3)))
    print(hashlib.sha256(b"".join(a.tobytes() for a in p.state().values())).hexdigest())
"""


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_isa_is_chosen_by_environment_and_the_fma_ones_agree_bitwise() -> None:
    """Each set also draws the same random numbers: its process compares them with Philox."""
    from narrows import _core

    code = TRAIN_AND_HASH.format(path=[str(SUPPORT), str(Path(__file__).parent)])
    hashes = {}
    for name, supported in _core.build_info()["isa_tables"]:
        result = run_python(code, NARROWS_ISA=name)
        if supported:
            assert result.returncode == 0, f"{name}: {result.stderr}"
            hashes[name] = result.stdout
        else:
            assert "this CPU does not have it" in result.stderr
    fused = {hashes[name] for name in ("avx2", "avx512") if name in hashes}
    assert len(fused) <= 1, "AVX2 and AVX-512 trained to different bits"


@pytest.mark.parametrize(
    "code",
    [
        "from narrows.backends import resolve; resolve('cpp')",
        "from narrows.backends import resolve; resolve('auto')",
        "import narrows; narrows.functional.dense([[1.0]], [[1.0]])",
    ],
    ids=["cpp", "auto", "layer"],
)
def test_unknown_isa_is_an_error(code: str) -> None:
    result = run_python(code, NARROWS_ISA="sse9")
    assert result.returncode != 0
    assert "NARROWS_ISA='sse9' is not an instruction set; choose from" in result.stderr


# --- processes, threads, signals ------------------------------------------------------------------------------------


def train_hash(_: int = 0) -> bytes:
    program = started(rich_plan(256), n_rows=2000)
    program.train(np.arange(2000), Hyper(1, 0, np.full(8, 1e-3)))
    return b"".join(a.tobytes() for a in program.state().values())


def nested_hash(_: int) -> bytes:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=lambda: sender.send_bytes(train_hash()))
    child.start()
    result = receiver.recv_bytes()
    child.join(30)
    return result


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_fork_after_training_and_nested() -> None:
    here = train_hash()
    context = multiprocessing.get_context("fork")
    for worker in (train_hash, nested_hash):
        ready: list[bytes] = []
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(target=lambda s, w: s.send_bytes(w(0)), args=(sender, worker))
        child.start()
        watchdog = threading.Timer(60, child.kill)
        watchdog.start()
        try:
            ready.append(receiver.recv_bytes())
        finally:
            watchdog.cancel()
            child.join(30)
        assert ready == [here], f"{worker.__name__} in a forked child"
    assert train_hash() == here


@linux_only
def test_a_daemon_thread_in_native_code_outlives_nothing() -> None:
    """The interpreter ends while daemon threads compute: no abort."""
    code = """
import threading, time
import numpy as np, narrows
X = np.random.default_rng(0).normal(size=(2000, 200)).astype(np.float32)
ae = narrows.Autoencoder(8, hidden_layer_sizes=(64,), max_iter=1, n_threads=1, backend="cpp").fit(X)
begun = threading.Barrier(4)
def repeat(f):
    f()
    begun.wait()
    while True: f()
for f in (lambda: ae.transform(X), lambda: narrows.functional.dense(X, X[:200], n_threads=1),
          lambda: narrows.Autoencoder(8, max_iter=20, n_threads=1, backend="cpp").fit(X)):
    threading.Thread(target=repeat, args=(f,), daemon=True).start()
begun.wait()
time.sleep(0.2)
"""
    for _ in range(2):
        result = run_python(code)
        assert (result.returncode, result.stderr) == (0, "")


@linux_only
def test_a_fork_during_the_first_imports_waits_for_them() -> None:
    """The child can fit too; a module whose import was under way would never end there."""
    code = """
import os, signal, sys, threading, warnings
import numpy as np, narrows
warnings.simplefilter("ignore")
at, begun = os.environ["AT"], threading.Event()
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == at: begun.set()
sys.meta_path.insert(0, Finder())
def fit():
    ae = narrows.Autoencoder(2, hidden_layer_sizes=(4,), max_iter=1, n_threads=1)
    ae.fit(np.eye(20, 8, dtype=np.float32))
thread = threading.Thread(target=fit)
thread.start()
begun.wait(60)
child = os.fork()
if child == 0:
    signal.alarm(60)
    fit()
    os._exit(0)
thread.join()
sys.exit(os.waitpid(child, 0)[1])
"""
    for module in ("sklearn.base", "narrows._core"):
        result = run_python(code, AT=module)
        assert result.returncode == 0, (module, result.stderr)


def test_interrupt_stops_between_steps_and_soon() -> None:
    """SIGINT during one long call: KeyboardInterrupt well within a second, a whole number of steps done."""
    plan = lower(small_spec(), 64)
    program = started(plan, n_rows=64)
    n = 10**6
    rates = np.full(n, 1e-6)
    for delay in np.random.default_rng(0).uniform(0.05, 0.3, 5):
        sent = []
        timer = threading.Timer(
            delay, lambda sent=sent: (sent.append(time.monotonic()), os.kill(os.getpid(), signal.SIGINT))
        )
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            program.train(np.zeros(64 * n, np.int64), Hyper(0, 0, rates))
        assert time.monotonic() - sent[0] < 2.0
        timer.join()
        assert all(np.isfinite(a).all() for a in program.state().values())


def test_a_program_in_two_threads_at_once_is_an_error() -> None:
    program = started(lower(small_spec(), 64), n_rows=64)
    n = 20000
    errors: list[str] = []

    def work() -> None:
        try:
            program.train(np.zeros(64 * n, np.int64), Hyper(0, 0, np.full(n, 1e-6)), lambda: bool(errors))
        except RuntimeError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == ["this program is already running in another thread"]


def test_two_programs_in_two_threads_equal_serial() -> None:
    results: dict[int, bytes] = {}
    threads = [threading.Thread(target=lambda i=i: results.update({i: train_hash()})) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == {0: train_hash(), 1: train_hash()}


@linux_only
def test_out_of_memory_is_an_exception() -> None:
    code = """
import resource, numpy as np
from narrows.backends.cpp import CppProgram
from narrows.backends.reference import ReferenceProgram
from narrows.plan.lowering import lower
from narrows.plan.spec import Activation, LayerSpec, NetworkSpec, Precision
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
wide = NetworkSpec((LayerSpec(2**16, 2**17, Activation.LINEAR), LayerSpec(2**17, 2**16, Activation.LINEAR)), 1)
try:
    CppProgram(lower(wide, 4), Precision.FLOAT32, 1)
except MemoryError:
    print("MemoryError")
"""
    result = run_python(code)
    assert result.stdout.strip() == "MemoryError", result.stderr


def test_limits_of_openmp_are_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    """By these joblib, scikit-learn and threadpoolctl keep what runs side by side from taking each other's cores."""
    from threadpoolctl import threadpool_limits

    from narrows import _core
    from narrows.machine import thread_choice, usable_cpus

    if _core.build_info()["threads"] != "openmp":
        pytest.skip("threads that OpenMP does not know")
    for variable in ("NARROWS_NUM_THREADS", "SLURM_CPUS_PER_TASK"):
        monkeypatch.delenv(variable, raising=False)
    before = usable_cpus()
    with threadpool_limits(limits=1, user_api="openmp"):
        assert usable_cpus()[0] == 1
        assert thread_choice(3) == (3, "n_threads")
    assert usable_cpus() == before
    code = "from narrows.machine import thread_choice; print(*thread_choice())"
    assert run_python(code, OMP_NUM_THREADS=str(before[0] + 1)).stdout.split()[0] == str(before[0])
    assert run_python(code, OMP_NUM_THREADS="1").stdout.split()[0] == "1"
    assert run_python(code, OMP_NUM_THREADS="1", NARROWS_NUM_THREADS="2").stdout == "2 NARROWS_NUM_THREADS\n"


@linux_only
def test_threads_that_cannot_be_started_are_done_without() -> None:
    """Where there is no memory for their stacks a step runs on those there are, to the same bits; nothing ends here."""
    code = f"""
import resource, sys, numpy as np
sys.path[:0] = {[str(SUPPORT)]!r}
from narrows.backends import Hyper
from native_plans import rich_plan, started
def bits(program):
    program.train(np.arange(2000), Hyper(1, 0, np.full(8, 1e-3)))
    return [a.tobytes() for a in program.state().values()]
one = bits(started(rich_plan(256), n_rows=2000, n_threads=1, tune=False))
many = started(rich_plan(256), n_rows=2000, n_threads=128, tune=False)
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (24 << 20),) * 2)
print("same" if bits(many) == one else "other")
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "same\n"


@linux_only
def test_import_is_a_good_citizen() -> None:
    """Importing starts no thread, takes no signal, draws no random number and leaves the rounding mode alone."""
    code = """
import random, signal, threading
import numpy as np
np.random.seed(0); random.seed(0)
def state():
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    return handlers, np.random.get_state()[1].tolist(), random.getstate()
before = state()
import narrows, narrows._core
assert before == state()
assert threading.active_count() == 1
assert len(__import__("os").listdir("/proc/self/task")) <= {tasks}, "threads were started"
assert np.float32(1e-40) * np.float32(1) > 0, "subnormals are flushed"
"""
    plain = run_python("import numpy, os; print(len(os.listdir('/proc/self/task')))")
    result = run_python(code.replace("{tasks}", plain.stdout.strip()))
    assert result.returncode == 0, result.stderr


def test_apply_lets_go_of_its_data() -> None:
    program = started(rich_plan())
    X = np.zeros((4, 37), np.float32)
    kept = weakref.ref(X)
    program.apply(X, Mode.ENCODE)
    del X
    gc.collect()
    assert kept() is None


def test_profile_times_the_ops_of_a_step_and_leaves_no_trace() -> None:
    plan = rich_plan()
    program = started(plan)
    program.train(np.arange(60), Hyper(3, 0, np.full(3, 1e-2)))
    before = program.state()
    seconds = program.profile(np.arange(60), Hyper(3, 0, np.full(3, 1e-2)))
    assert seconds.shape[1] == len(plan.ops) + 1
    assert [t > 0 for t in seconds[0, :-1]] == [bool(op.modes & Mode.TRAIN) for op in plan.ops]
    after = program.state()
    assert all((before[name] == after[name]).all() for name in before)


@pytest.mark.parametrize("n_threads", [1, 2])
def test_probe_of_the_machine_gives_figures_that_can_be(n_threads: int) -> None:
    figures = probe_machine(n_threads)
    # A core does between one and 128 float32 operations in a cycle of 0.5 to 8 GHz.
    assert 0.5 < figures["fma_gflops"] < 1024 * n_threads
    assert 0 < figures["exchange_gb_s"] < 1000
    assert 0 <= figures["barrier_us"] < 1e5
