"""Whether the tests have teeth: faults that are planted one at a time in a copy of the project, each of which must die.

Usage: ``python bench/mutants.py [--only NAME,...] [--list]`` in an environment that holds the package's test extra,
CMake and Ninja. First the tests that are to notice run on the copy as it is and must pass. A fault dies if they fail
then, or do not come to an end; one that lives is named, and the exit code is 1.
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
"""Seconds after which tests that go on count as having noticed."""


class Mutant(NamedTuple):
    """A fault: in which file which text, there once, is replaced, and what pytest is given to notice."""

    name: str
    file: str
    text: str
    fault: str
    tests: str

    @property
    def native(self) -> bool:
        """Whether the extension must be built again."""
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
    Mutant("a-checkpoint-of-another-run-is-taken", f"{_PY}/training/checkpoint.py", "        if differing:\n",
           "        if False:\n", "tests/models/test_training.py"),
    Mutant("the-worst-epoch-is-the-best", f"{_PY}/training/trainer.py", "if loss < s.best_loss:",
           "if not loss < s.best_loss:", "tests/models/test_training.py "
           "tests/models/test_estimators.py -k 'best or early'"),
    Mutant("a-held-out-row-is-trained-on", f"{_PY}/fitting/feed.py", "np.sort(order[n_held:])",
           "np.sort(order[n_held - 1 :])", "tests/models/test_estimators.py tests/models/test_training.py"),
    Mutant("rows-are-scaled-to-twice-the-sum", f"{_PY}/data/normalize.py",
           "np.log1p(block.data * np.repeat(", "np.log1p(2 * block.data * np.repeat(", "tests/data/test_normalize.py"),
    Mutant("codes-are-drawn-with-dropout", f"{_PY}/plan/lowering.py",
           'low.op(OpCode.DROPOUT, LEARN, {"x": out}', 'low.op(OpCode.DROPOUT, LEARN | Mode.ENCODE, {"x": out}',
           "tests/plan/test_plan.py tests/backends/test_backends.py"),
    # Native kernels.
    Mutant("a-slope-is-of-another-activation", "csrc/shared/functors.h", "splat<V>(1), splat<V>(0.01)",
           "splat<V>(1), V{}", "tests/backends/test_backends.py -k leaky"),
    Mutant("a-random-number-is-another", "csrc/shared/philox.h", "k1 += 0xBB67AE85u;", "k1 += 0xBB67AE87u;",
           "tests/backends/test_backends.py -k dropout"),
    Mutant("the-second-moment-is-the-first", "csrc/cpu/kernels/optimisers.inl", "rounded_value(c2 * (g * g))",
           "rounded_value(c1 * (g * g))", "tests/backends/test_backends.py -k adam"),
    Mutant("what-is-past-the-last-column-counts", "csrc/cpu/kernels/losses.inl", "sum.add(j, keep_n(value, n));",
           "sum.add(j, value);", "tests/backends/test_edges.py"),
    Mutant("rows-are-masked-when-they-are-encoded", "csrc/cpu/kernels/sparse.inl",
           "drop_(ctx.learn ? int32_t(philox_threshold(level)) : 0)", "drop_(int32_t(philox_threshold(level)))",
           "tests/backends/test_native_sparse.py tests/backends/test_backends.py -k 'sparse or mask'"),
    Mutant("threads-do-not-wait", "csrc/cpu/program.cpp", "if (&phase != schedule.data()) barrier_.wait(nt), ",
           "if (&phase != schedule.data()) ", "tests/backends/test_bits.py -k cpp"),
    Mutant("a-child-waits-for-ever", "csrc/cpu/team.cpp", "omp_pause_resource_all(omp_pause_hard), ++forks", "++forks",
           "tests/backends/test_native.py -k fork"),
    Mutant("a-plan-writes-what-it-reads", "csrc/plan/validate.cpp", "slot != op_.slots[j] || ", "true || ",
           "tests/backends/test_native_plans.py"),
    Mutant("a-plan-reads-past-a-matrix", "csrc/plan/validate.cpp", "matrix(O::dW, W.rows, W.cols), cells(", "cells(",
           "tests/backends/test_native_plans.py"),
    # CUDA: kernels on the host, launches, and what is asked of a device.
    Mutant("a-stack-does-not-wait", f"{_CUDA}/stack.cuh", "      sync();\n    }\n    if (works) {",
           "    }\n    if (works) {", "tests/cuda/test_host.py tests/cuda/test_schedule.py"),
    Mutant("a-tile-is-overwritten", f"{_CUDA}/gemm.cuh", "    if (BUFFERS == 1) sync();\n", "",
           "tests/cuda/test_host.py tests/cuda/test_kernels.py"),
    Mutant("a-tile-reads-past-its-matrix", f"{_CUDA}/gemm.cuh", "if (i >= high || l >= deep) continue;",
           "if (i > high || l >= deep) continue;", "tests/cuda/test_host.py"),
    Mutant("a-band-begins-nowhere", f"{_CUDA}/sparse.cuh", "int b = k == begin ? 0 :", "int b = k == begin ? 1 :",
           "tests/cuda/test_host.py"),
    Mutant("a-gram-form-counts-twice", f"{_CUDA}/gram.cuh", "slope(i, l) = 2 * (gQ - p);",
           "slope(i, l) = 2 * (gQ - 2 * p);", "tests/cuda/test_host.py"),
    Mutant("a-step-is-always-the-second", f"{_CUDA}/steps.cuh", "steps_begun(count) = at + 1;",
           "steps_begun(count) = 1;", "tests/cuda/test_host.py"),
    Mutant("launches-pass-those-that-read", f"{_PY}/backends/cuda/schedule.py",
           "return not apart and (self.written or other.written)",
           "return not apart and self.written and other.written", "tests/cuda/test_schedule.py"),
    Mutant("a-chunk-does-not-wait-for-its-turn", f"{_PY}/backends/cuda/program.py",
           "                turn.settle()\n                if done", "                if done",
           "tests/cuda/test_host.py tests/cuda/test_program.py"),
    Mutant("rows-of-the-host-come-in-another-order", f"{_PY}/backends/cuda/data.py", "data.take(rows, axis=0",
           "data.take(np.sort(rows), axis=0", "tests/cuda/test_program.py"),
    Mutant("launches-do-not-wait-for-a-copy", f"{_PY}/backends/cuda/device.py",
           "self._stream.wait_event(self._copies.record())", "self._copies.record()", "tests/cuda/test_device.py"),
    Mutant("the-caller-is-not-waited-for", f"{_PY}/backends/cuda/device.py",
           "self._stream.wait_event(self._cupy.cuda.get_current_stream().record())", "pass",
           "tests/cuda/test_arrays.py"),
    Mutant("a-likelihood-has-another-slope", "csrc/shared/likelihoods.h", "t.by_mean = mu - y;", "t.by_mean = mu;",
           "tests/backends/test_counts.py"),
)  # fmt: skip


class Copy:
    """The project in a folder, with an extension of its own."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "narrows"
        self._build = folder / "build"
        out = shutil.ignore_patterns(".*", "build*", "out", "__pycache__", "*.so")
        shutil.copytree(ROOT, self.root, ignore=out)
        pybind = subprocess.run(
            [sys.executable, "-m", "pybind11", "--cmakedir"], check=True, capture_output=True, text=True
        )
        configure = [
            "cmake",
            "-S",
            self.root,
            "-B",
            self._build,
            "-G",
            "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}",
        ]
        subprocess.run([*configure, f"-Dpybind11_DIR={pybind.stdout.strip()}"], check=True, stdout=subprocess.DEVNULL)

    def compile(self) -> None:
        subprocess.run(["cmake", "--build", self._build], check=True, stdout=subprocess.DEVNULL)
        library = f"_core{sysconfig.get_config_var('EXT_SUFFIX')}"
        shutil.copy(self._build / library, self.root / "python" / "narrows" / library)

    def noticed(self, tests: str) -> bool:
        """Whether tests fail."""
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
                f"{mutant.name}: {mutant.file} has {mutant.text!r} {whole.count(mutant.text)} times, not once"
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
    parser.add_argument("--only", help="names of faults, by default all")
    parser.add_argument("--list", action="store_true", help="say what they are")
    options = parser.parse_args()
    wanted = options.only.split(",") if options.only else [mutant.name for mutant in MUTANTS]
    if unknown := set(wanted) - {mutant.name for mutant in MUTANTS}:
        parser.error(f"--only: no fault is called {', '.join(sorted(unknown))}; see --list")
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
                raise RuntimeError(f"{tests} fail, or do not end, without a fault")
        alive = []
        for mutant in sorted(chosen, key=lambda mutant: mutant.native):
            begun = time.monotonic()
            survives = copy.survives(mutant)
            alive += [mutant.name] * survives
            print(f"{mutant.name}: {'ALIVE' if survives else 'dead'} ({time.monotonic() - begun:.0f} s)", flush=True)
    print(f"{len(chosen) - len(alive)} of {len(chosen)} faults are noticed")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())
