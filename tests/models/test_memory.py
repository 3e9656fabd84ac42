"""What a fit adds to the memory of its process: bounds by the size of the network, whatever the size of the data.

Each fit is measured in its own process, by the kernel's record of the most memory that the process held.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from sklearn.base import clone

from narrows import Autoencoder
from narrows.training import Callback, Checkpoint, Interrupted, Progress

MIB = 1 << 20
ELSE = 12 * MIB
"""Room for kernels, threads, the working area of a small batch, and pages of 2 MiB between parts of the arena."""

SCRIPT = """
import json, os, signal, sys, traceback
import numpy as np
from narrows import Autoencoder

def mib(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field + ":")) * 1024

WIDE = dict(n_components=16, hidden_layer_sizes=1500, batch_size=32, backend="cpp", n_threads=2, random_state=0)
def wide(rows=160, **params):
    X = np.random.default_rng(0).random((rows, 1500), dtype=np.float32)
    return Autoencoder(**WIDE | dict(max_iter=4) | params), X

found = []
def measure(fit):
    # A small fit first, so that code which is read from disk at its first use is not counted.
    wide(n_components=2, hidden_layer_sizes=4, max_iter=1)[0].fit(np.eye(40, 6, dtype=np.float32))
    before = mib("VmRSS")
    fit()
    found.append(mib("VmHWM") - before)

# Each line of the input is code. A copy of this process runs it, because the imports take longer than a fit.
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        signal.alarm(120)
        try:
            exec(json.loads(line))
            answer = found[0]
        except BaseException:
            answer = traceback.format_exc()
        print(json.dumps(answer), flush=True)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if status:
        print(json.dumps(f"the process ended with status {status}"), flush=True)
"""


@pytest.fixture(scope="module")
def added() -> Iterator[Callable[[str], int]]:
    """Bytes that `measure` in some code finds, in a process of its own."""
    if not Path("/proc/self/status").exists():
        pytest.skip("this system does not tell how much memory a process held")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(str(Path(p).resolve()) for p in sys.path if p)}
    command = [sys.executable, "-c", SCRIPT]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin
        assert server.stdout
        to, answers = server.stdin, server.stdout

        def run(code: str) -> int:
            print(json.dumps(code), file=to, flush=True)
            answer = json.loads(answers.readline())
            assert isinstance(answer, int), answer
            return answer

        yield run


PARAMETERS = 4 * (2 * 1500 * 1500 + 2 * 1500 * 16 + 3 * 1500 + 16)
HELD_OUT = 16 * 1500 * 4


@pytest.mark.parametrize(
    ("times", "kept", "code"),
    [
        # The parameters, two moments, and the parameters after the last complete epoch.
        (4, 0, "ae, X = wide(early_stopping=False); measure(lambda: ae.fit(X))"),
        # Also the parameters of the best epoch, which is the first.
        (
            5,
            0,
            "ae, X = wide(); measure(lambda: ae.fit(X, X_val=-X[:16])); assert np.argmin(ae.history_['val_loss']) == 0",
        ),
        # A program that applies the network has parameters and no moments. They replace the parameters of the last
        # complete epoch, but some machines release those late.
        (4, 1, "ae, X = wide(early_stopping=False); measure(lambda: ae.fit(X).transform(X[:40]))"),
        # float64 takes twice the bytes. The data are read in place.
        (8, 0, "ae, X = wide(early_stopping=False, precision='float64'); measure(lambda: ae.fit(X))"),
        # One moment.
        (3, 0, "ae, X = wide(early_stopping=False, solver='sgd', learning_rate_init=1e-6); measure(lambda: ae.fit(X))"),
        # The second fit holds the network of the first until it ends. Some machines release it late.
        (7, 1, "ae, X = wide(early_stopping=False, warm_start=True); measure(lambda: ae.fit(X).fit(X))"),
    ],
    ids=["plain", "best", "applied", "float64", "sgd", "warm start"],
)
def test_a_fit_holds_its_network_once(cpp: str, times: int, kept: int, code: str, added: Callable[[str], int]) -> None:
    found = added(code)
    assert (times - 1) * PARAMETERS < found < (times + kept) * PARAMETERS + HELD_OUT + ELSE


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_data_are_not_copied(cpp: str, dtype: str, added: Callable[[str], int]) -> None:
    code = f"""
X = np.ones((4000, 2000), {dtype!r})
ae = Autoencoder(**WIDE | dict(n_components=4, hidden_layer_sizes=(), max_iter=2, early_stopping=False))
measure(lambda: ae.fit(X))
"""
    assert added(code) < ELSE


def test_a_resumed_fit_releases_its_checkpoint(cpp: str, tmp_path: Path) -> None:
    """The network and its moments are released. The parameters of the last complete epoch remain."""
    X = np.random.default_rng(0).random((64, 1500), dtype=np.float32)
    ae = Autoencoder(
        16,
        hidden_layer_sizes=200,
        batch_size=32,
        max_iter=4,
        early_stopping=False,
        backend=cpp,
        n_threads=1,
        random_state=0,
    )
    asked = itertools.count()
    with pytest.raises(Interrupted):
        ae.fit(X, checkpoint=Checkpoint(tmp_path / "c", stop=lambda: "test" if next(asked) >= 3 else None))
    parameters = sum(array.nbytes for array in ae.coefs_ + ae.intercepts_)
    held: list[int] = []

    class Watch(Callback):
        def on_batch(self, progress: Progress) -> None:
            held.append(tracemalloc.get_traced_memory()[0])

    tracemalloc.start()
    try:
        clone(ae).fit(X, checkpoint=Checkpoint(tmp_path / "c", resume="require"), callbacks=[Watch()])
    finally:
        tracemalloc.stop()
    assert held
    assert max(held) < 2.5 * parameters


CELLS, GENES, STORED = 40_000, 2_000, 400
"""The size of a file: 128 MB. Its rows take that once when read, once normalised and once in training."""


def counts_file(path: Path, cells: int, genes: int, stored: int) -> None:
    """Write a file of counts. Each cell has `stored` counts, in genes that begin at a random one."""
    h5py = pytest.importorskip("h5py")
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        X = file.create_group("X")
        X.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": (cells, genes)})
        X["data"] = rng.integers(1, 9, cells * stored).astype(np.float32)
        step = min(5, (genes - 1) // stored)
        first = rng.integers(0, genes - step * (stored - 1), (cells, 1))
        X["indices"] = (first + step * np.arange(stored)).astype(np.int32).ravel()
        X["indptr"] = np.arange(0, cells * stored + 1, stored)


def fitted(folder: Path, *options: str, out: str = "run") -> tuple[subprocess.CompletedProcess[str], int]:
    """Fit ``counts.h5ad`` in its own process. Also returns the most memory it held, by the system's record."""
    # fmt: off
    command = [
        sys.executable, "-c", "import sys; from narrows.cli import main; sys.exit(main())", "fit", "counts.h5ad",
        "--out", out, "--epochs", "1", "--components", "4", "--hidden", "16", "--threads", "2", "--quiet",
        "--backend", "cpp", "--set", "early_stopping=False", *options,
    ]
    # fmt: on
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(str(Path(p).resolve()) for p in sys.path if p)}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    metrics = folder / out / "metrics.json"
    return result, json.loads(metrics.read_text())["peak_rss_bytes"] if metrics.exists() else 0


@pytest.fixture(scope="module")
def counts_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("counts")
    counts_file(folder / "counts.h5ad", CELLS, GENES, STORED)
    return folder


@pytest.mark.parametrize("normalize", ["log1p", "standard"])
def test_a_limit_is_kept(cpp: str, normalize: str, counts_folder: Path) -> None:
    """The file does not fit into the first limit. The job keeps the least limit that the error names."""
    options = "--normalize", normalize, "--max-memory"
    refused, _ = fitted(counts_folder, *options, "20MB", out=normalize)
    assert refused.returncode == 6, refused.stderr
    found = re.search(r"at least (\d+) MB", refused.stderr)
    assert found
    limit = int(found[1]) * 10**6
    result, held = fitted(counts_folder, *options, str(limit), out=normalize)
    assert result.returncode == 0, result.stderr
    assert 8 * CELLS * STORED < held < limit


def test_standardised_rows_are_never_made_dense(cpp: str, tmp_path: Path) -> None:
    """The file stores one value in a hundred. Without a limit, the job takes less than a third of its dense rows."""
    cells = genes = 20_000
    counts_file(tmp_path / "counts.h5ad", cells, genes, genes // 100)
    result, held = fitted(tmp_path, "--normalize", "standard")
    assert result.returncode == 0, result.stderr
    assert 8 * cells * genes // 100 < held < 4 * cells * genes / 3
