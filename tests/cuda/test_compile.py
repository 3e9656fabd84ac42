"""Every instance of a CUDA kernel compiles with NVRTC for each supported generation of GPUs.

NVRTC needs neither a GPU nor a driver: ``pip install nvidia-cuda-nvrtc-cu12``. Without it these tests are skipped. No
kernel may spill registers to local memory, by the report of the assembler.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from narrows.backends.cuda.table import KERNELS
from narrows.plan.spec import Precision
from nvrtc import Nvrtc

ARCHITECTURES = ("sm_75", "sm_80", "sm_90")


def library() -> Path | None:
    """NVRTC in the wheels for CUDA 12 and 13."""
    found = importlib.util.find_spec("nvidia")
    for folder in found.submodule_search_locations or [] if found else []:
        for path in sorted(Path(folder).glob("*/lib/libnvrtc.so.*")):
            if "alt" not in path.name and "builtins" not in path.name:
                return path
    return None


PATH = library()
if PATH is None:
    pytest.skip("no NVRTC: pip install nvidia-cuda-nvrtc-cu12", allow_module_level=True)


@pytest.fixture(scope="module")
def nvrtc() -> Nvrtc:
    return Nvrtc(PATH)


# One architecture is enough to compare precisions. tf32 has the kernels of float32.
@pytest.mark.parametrize(
    ("architecture", "precision"),
    [
        *((a, Precision.FLOAT32) for a in ARCHITECTURES),
        *((ARCHITECTURES[0], p) for p in (Precision.FLOAT64, Precision.BFLOAT16)),
    ],
    ids=str,
)
def test_every_kernel_compiles_and_spills_nothing(nvrtc: Nvrtc, architecture: str, precision: Precision) -> None:
    compiled = nvrtc.compile(KERNELS, architecture, precision)
    assert compiled.code[:4] == b"\x7fELF"
    assert set(compiled.names) == set(KERNELS)
    report = re.findall(
        r"Function properties for (\S+)\n.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r"\n.*?Used (\d+) registers",
        compiled.log,
    )
    spilled = [entry for entry in report if entry[1:4] != ("0", "0", "0")]
    assert not spilled
    assert {entry[0] for entry in report} >= set(compiled.names.values()), "the report speaks of every kernel"
    registers = {entry[0]: int(entry[4]) for entry in report}
    for kernel, name in compiled.names.items():
        # A multiprocessor has 65536 registers: room for two blocks of 256 threads, or three of the 128 of large tiles.
        assert registers[name] <= (170 if kernel.count("emm<Large") else 128), kernel
    assert "warning" not in compiled.log


def test_one_kernel_alone_is_quick_to_compile(nvrtc: Nvrtc) -> None:
    compiled = nvrtc.compile(["gemm<Small, Rows, Turned, Activate<Gelu>>"], "sm_80", Precision.FLOAT32)
    assert len(compiled.names) == 1


def test_a_compiler_error_has_the_compilers_message(nvrtc: Nvrtc) -> None:
    with pytest.raises(RuntimeError, match=r"sm_80.*Abacus"):
        nvrtc.compile(["activate<Abacus>"], "sm_80", Precision.FLOAT32)
