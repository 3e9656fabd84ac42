"""The benches run: a few of each file, once each, so that they cannot rot between two readings."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cases import OP_CASES
from narrows.benchmark import CASES
from narrows.plan import OpCode

ROOT = Path(__file__).parent.parent
FEW = "tabular or table or images or narrows-16"


def test_a_few_of_each_file_run() -> None:
    pytest.importorskip("pytest_benchmark")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(str(Path(p).resolve()) for p in sys.path if p)}
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "bench",
            "--benchmark-disable",
            "-q",
            "-rA",
            "-p",
            "no:cacheprovider",
            "-k",
            FEW,
        ],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    passed = set(re.findall(r"^PASSED bench/(test_\w+\.py)", result.stdout, flags=re.MULTILINE))
    assert passed == {path.name for path in (ROOT / "bench").glob("test_*.py")}


def test_every_op_has_a_bench() -> None:
    assert {op.code for case in OP_CASES for op in case.plan.ops} == set(OpCode)


def test_peers_are_given_the_standard_cases() -> None:
    """Their cases are apart from the package, since the memory of a process without it is measured, too."""
    code = (
        "from peer_cases import *; "
        "print([(c.name, c.widths, c.batch, c.loss) for c in CASES if not isinstance(c, ImageCase)])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "bench", capture_output=True, text=True, check=True
    )
    theirs = ast.literal_eval(result.stdout)
    standard = [(c.name, c.widths, c.batch, c.loss.name.lower()) for c in CASES]
    assert [case for case in theirs if not case[0].endswith("-bf16")] == standard
