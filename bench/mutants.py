"""Tests of the tests: plant faults in a copy of the project, one at a time; the tests must notice each of them.

Usage: ``python bench/mutants.py [--only NAME,...] [--list]`` in an environment that holds the package's `nightly`
extra. First the chosen tests run on the copy without a fault and must pass. Tests notice a fault if they fail, or do
not end within the limit. The program names each fault that nobody notices, and then its exit code is 1.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 900
"""Seconds after which tests that still run count as having noticed the fault."""


class Mutant(NamedTuple):
    """A fault: the file, the text to replace (it stands there once), the replacement, and arguments for pytest."""

    name: str
    file: str
    text: str
    fault: str
    tests: str

    @property
    def native(self) -> bool:
        """Whether the extension must be compiled again."""
        return self.file.startswith("csrc/") and not self.file.startswith("csrc/cuda/")


_PY, _CUDA = "python/narrows", "csrc/cuda"
MUTANTS = (
    # Training, files and data.
    Mutant("a-file-is-not-synced", f"{_PY}/persistence.py", "os.fsync(stream.fileno())", "stream.fileno()",
           "tests/models/test_persistence.py"),
    Mutant("a-checksum-is-not-compared", f"{_PY}/persistence.py", "claimed != actual or not isinstance(meta, dict)",
           "not isinstance(meta, dict)", "tests/models/test_persistence.py"),
    Mutant("a-checkpoint-confuses-best-and-last", f"{_PY}/training/checkpoint.py", 'best=parts.get("best")',
           'best=parts.get("good")', "tests/models/test_training.py"),
    Mutant("a-checkpoint-of-another-run-is-accepted", f"{_PY}/training/checkpoint.py", "        if differing:\n",
           "        if False:\n", "tests/models/test_training.py"),
    Mutant("the-worst-epoch-is-the-best", f"{_PY}/training/trainer.py", "if loss < s.best_loss:",
           "if not loss < s.best_loss:", "tests/models/test_training.py "
           "tests/models/test_estimators.py -k 'best or early'"),
    Mutant("a-held-out-row-is-trained-on", f"{_PY}/fitting/feed.py", "np.sort(order[n_held:])",
           "np.sort(order[n_held - 1 :])", "tests/models/test_estimators.py tests/models/test_training.py"),
    Mutant("rows-are-scaled-to-twice-the-sum", f"{_PY}/data/normalize.py",
           "np.log1p(block.data * np.repeat(", "np.log1p(2 * block.data * np.repeat(", "tests/data/test_normalize.py"),
    Mutant("codes-are-computed-with-dropout", f"{_PY}/plan/lowering.py",
           'low.op(OpCode.DROPOUT, LEARN, {"x": out}', 'low.op(OpCode.DROPOUT, LEARN | Mode.ENCODE, {"x": out}',
           "tests/plan/test_plan.py tests/backends/test_backends.py"),
    # Native kernels.
    Mutant("leaky-relu-has-the-slope-of-relu", "csrc/shared/functors.h", "splat<V>(1), splat<V>(0.01)",
           "splat<V>(1), V{}", "tests/backends/test_backends.py -k leaky"),
    Mutant("a-constant-of-philox-differs", "csrc/shared/philox.h", "k1 += 0xBB67AE85u;", "k1 += 0xBB67AE87u;",
           "tests/backends/test_backends.py -k dropout"),
    Mutant("the-second-moment-decays-like-the-first", "csrc/cpu/kernels/optimisers.inl", "rounded_value(c2 * (g * g))",
           "rounded_value(c1 * (g * g))", "tests/backends/test_backends.py -k adam"),
    Mutant("lanes-past-the-last-column-are-added", "csrc/cpu/kernels/losses.inl", "sum.add(j, keep_n(value, n));",
           "sum.add(j, value);", "tests/backends/test_edges.py"),
    Mutant("masking-is-applied-when-encoding", "csrc/cpu/kernels/sparse.inl",
           "drop_(ctx.learn ? int32_t(philox_threshold(level)) : 0)", "drop_(int32_t(philox_threshold(level)))",
           "tests/backends/test_native_sparse.py tests/backends/test_backends.py -k 'sparse or mask'"),
    Mutant("threads-do-not-wait", "csrc/cpu/program.cpp", "if (&phase != schedule.data()) barrier_.wait(nt), ",
           "if (&phase != schedule.data()) ", "tests/backends/test_bits.py -k cpp"),
    Mutant("a-forked-child-keeps-the-parents-threads", "csrc/cpu/team.cpp",
           "omp_pause_resource_all(omp_pause_hard), ++forks", "++forks", "tests/backends/test_native.py -k fork"),
    Mutant("a-plan-may-write-its-own-operand", "csrc/plan/validate.cpp", "slot != op_.slots[j] || ", "true || ",
           "tests/backends/test_native_plans.py"),
    Mutant("a-plan-may-read-past-a-matrix", "csrc/plan/validate.cpp", "matrix(o.dW, W.rows, W.cols), cells(", "cells(",
           "tests/backends/test_native_plans.py"),
    # CUDA: kernels on the host, launches, and what is asked of a device.
    Mutant("a-stack-does-not-wait", f"{_CUDA}/stack.cuh", "      sync();\n    }\n    if (works) {",
           "    }\n    if (works) {", "tests/cuda/test_host.py tests/cuda/test_schedule.py"),
    Mutant("a-tile-is-overwritten", f"{_CUDA}/gemm.cuh", "    if (BUFFERS == 1) sync();\n", "",
           "tests/cuda/test_host.py tests/cuda/test_kernels.py"),
    Mutant("a-tile-reads-past-its-matrix", f"{_CUDA}/gemm.cuh", "if (i >= high || l >= deep) continue;",
           "if (i > high || l >= deep) continue;", "tests/cuda/test_host.py"),
    Mutant("a-band-begins-at-one", f"{_CUDA}/sparse.cuh", "int b = k == begin ? 0 :", "int b = k == begin ? 1 :",
           "tests/cuda/test_host.py"),
    Mutant("the-gram-form-subtracts-twice", f"{_CUDA}/gram.cuh", "slope(i, l) = 2 * (gQ - p);",
           "slope(i, l) = 2 * (gQ - 2 * p);", "tests/cuda/test_host.py"),
    Mutant("the-step-counter-stops-at-one", f"{_CUDA}/steps.cuh", "steps_begun(count) = at + 1;",
           "steps_begun(count) = 1;", "tests/cuda/test_host.py"),
    Mutant("launches-overtake-launches-that-read", f"{_PY}/backends/cuda/schedule.py",
           "return not apart and (self.written or other.written)",
           "return not apart and self.written and other.written", "tests/cuda/test_schedule.py"),
    Mutant("a-chunk-does-not-wait-for-its-turn", f"{_PY}/backends/cuda/program.py",
           "                turn.settle()\n                if done", "                if done",
           "tests/cuda/test_host.py tests/cuda/test_program.py"),
    Mutant("rows-from-the-host-are-sorted", f"{_PY}/backends/cuda/data.py", "data.take(rows, axis=0",
           "data.take(np.sort(rows), axis=0", "tests/cuda/test_program.py"),
    Mutant("launches-do-not-wait-for-a-copy", f"{_PY}/backends/cuda/device.py",
           "self._stream.wait_event(self._copies.record())", "self._copies.record()", "tests/cuda/test_device.py"),
    Mutant("the-callers-stream-is-not-waited-for", f"{_PY}/backends/cuda/device.py",
           "self._stream.wait_event(self._cupy.cuda.get_current_stream().record())", "pass",
           "tests/cuda/test_arrays.py"),
    Mutant("the-slope-of-a-likelihood-lacks-the-count", "csrc/shared/likelihoods.h", "t.by_mean = mu - y;",
           "t.by_mean = mu;", "tests/backends/test_counts.py"),
)  # fmt: skip


class Copy:
    """A copy of the project in a folder, with its own extension."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "narrows"
        self._build = folder / "build"
        out = shutil.ignore_patterns(".*", "build*", "out", "__pycache__", "*.so")
        shutil.copytree(ROOT, self.root, ignore=out)
        pybind = subprocess.run(
            [sys.executable, "-m", "pybind11", "--cmakedir"], check=True, capture_output=True, text=True
        )
        configure = ["cmake", "-S", str(self.root), "-B", str(self._build), "-G", "Ninja"]
        configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind.stdout.strip()}"]
        subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)

    def compile(self) -> None:
        subprocess.run(["cmake", "--build", self._build], check=True, stdout=subprocess.DEVNULL)
        library = f"_core{sysconfig.get_config_var('EXT_SUFFIX')}"
        shutil.copy(self._build / library, self.root / "python" / "narrows" / library)

    def noticed(self, tests: str) -> bool:
        """Whether tests fail, or do not end."""
        command = f"{sys.executable} -m pytest -x -q -p no:cacheprovider {tests}"
        environment = os.environ | {"PYTHONPATH": str(self.root / "python"), "PYTHONDONTWRITEBYTECODE": "1"}
        try:
            run = subprocess.run(
                command, shell=True, cwd=self.root, env=environment, capture_output=True, text=True, timeout=LIMIT
            )
        except subprocess.TimeoutExpired:
            return True
        if run.returncode not in (0, 1):
            raise RuntimeError(f"{command}: {run.stdout[-2000:]}{run.stderr[-2000:]}")
        return run.returncode == 1

    def survives(self, mutant: Mutant) -> bool:
        path = self.root / mutant.file
        whole = path.read_text(encoding="utf-8")
        if whole.count(mutant.text) != 1:
            raise RuntimeError(
                f"{mutant.name}: {mutant.file} has {mutant.text!r} {whole.count(mutant.text)} times, expected once"
            )
        path.write_text(whole.replace(mutant.text, mutant.fault), encoding="utf-8")
        try:
            if mutant.native:
                self.compile()
            return not self.noticed(mutant.tests)
        finally:
            path.write_text(whole, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="comma-separated names of faults, by default all")
    parser.add_argument("--list", action="store_true", help="list the faults and end")
    options = parser.parse_args()
    wanted = options.only.split(",") if options.only else [mutant.name for mutant in MUTANTS]
    if unknown := set(wanted) - {mutant.name for mutant in MUTANTS}:
        parser.error(f"--only: there is no fault named {', '.join(sorted(unknown))}; see --list")
    chosen = [mutant for mutant in MUTANTS if mutant.name in wanted]
    if options.list:
        for mutant in chosen:
            print(f"{mutant.name}: {mutant.file}: {mutant.tests}")
        return 0
    with tempfile.TemporaryDirectory(prefix="narrows-mutants-") as folder:
        copy = Copy(Path(folder))
        copy.compile()
        for tests in dict.fromkeys(mutant.tests for mutant in chosen):
            if copy.noticed(tests):
                raise RuntimeError(f"without any fault, these tests fail or do not end: {tests}")
        alive = []
        for mutant in sorted(chosen, key=lambda mutant: mutant.native):
            begun = time.monotonic()
            survives = copy.survives(mutant)
            alive += [mutant.name] * survives
            print(
                f"{mutant.name}: {'NOT NOTICED' if survives else 'noticed'} ({time.monotonic() - begun:.0f} s)",
                flush=True,
            )
    print(f"{len(chosen) - len(alive)} of {len(chosen)} faults are noticed")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())
