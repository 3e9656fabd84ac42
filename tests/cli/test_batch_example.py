"""The batch script of the examples, beside stand-ins for the scheduler's commands."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "genomics_batch.sh"
SMALL = ["--components", "2", "--hidden", "4", "--epochs", "2", "--quiet"]


def program(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with two matrices, their list, and `bin` with the commands that the script calls."""
    for name in ("first", "second"):
        np.save(tmp_path / f"{name}.npy", np.random.default_rng(0).poisson(1.0, (40, 6)).astype(np.float32))
    (tmp_path / "list.txt").write_text("first.npy\nsecond.npy\n")
    (tmp_path / "bin").mkdir()
    run = "import sys; from narrows.cli import main; sys.exit(main())"
    program(tmp_path / "bin" / "narrows", f'echo "$@" >> calls; exec {sys.executable} -c "{run}" "$@"')
    program(tmp_path / "bin" / "srun", 'exec "$@"')
    program(tmp_path / "bin" / "scontrol", 'echo "$@" >> queue')
    return tmp_path


def task(place: Path, number: int, **slurm: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    environment |= slurm | {
        "SLURM_ARRAY_TASK_ID": str(number),
        "PATH": f"{place / 'bin'}:{environment['PATH']}",
        "PYTHONPATH": os.pathsep.join(str(Path(p).resolve()) for p in sys.path if p),
    }
    command = ["bash", str(SCRIPT), "list.txt", "results", *SMALL]
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=120)


JOB = {"SLURM_JOB_ID": "70", "SLURM_ARRAY_JOB_ID": "69", "SLURM_MEM_PER_NODE": "4000", "SLURM_CPUS_PER_TASK": "1"}


def test_a_task_compresses_its_matrix(place: Path) -> None:
    result = task(place, 1, **JOB)
    assert result.returncode == 0, result.stderr
    assert (place / "results" / "second" / "_SUCCESS").exists()
    assert not (place / "results" / "first").exists()
    assert "--max-memory 3600MiB" in (place / "calls").read_text()
    assert not (place / "queue").exists()


def test_without_a_scheduler(place: Path) -> None:
    (place / "bin" / "srun").unlink()
    assert task(place, 0).returncode == 0
    assert (place / "results" / "first" / "_SUCCESS").exists()


def test_an_interrupted_task_goes_back_into_the_queue(place: Path) -> None:
    program(place / "bin" / "narrows", "exit 138")
    assert task(place, 0, **JOB).returncode == 138
    assert (place / "queue").read_text() == "requeue 69_0\n"


@pytest.mark.parametrize("status", [3, 143])
def test_a_task_that_failed_or_was_cancelled_does_not(place: Path, status: int) -> None:
    program(place / "bin" / "narrows", f"exit {status}")
    assert task(place, 0, **JOB).returncode == status
    assert not (place / "queue").exists()


def test_a_number_without_a_matrix(place: Path) -> None:
    result = task(place, 2, **JOB)
    assert result.returncode == 2
    assert result.stderr == "list.txt has no line 3\n"
