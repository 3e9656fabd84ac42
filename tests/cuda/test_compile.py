"""Every instance of a CUDA kernel compiles, through NVRTC, for each generation of GPUs that is supported.

NVRTC needs no GPU and no driver: ``pip install nvidia-cuda-nvrtc-cu12`` is all, and without it these are skipped. The
report of its assembler says what a kernel takes: none may keep registers in local memory.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from narrows.backends.cuda.nvrtc import Nvrtc
from narrows.backends.cuda.table import KERNELS
from narrows.plan.ops import source_folder
from narrows.plan.spec import Precision

ARCHITECTURES = ("sm_75", "sm_80", "sm_90")


def library() -> Path | None:
    """NVRTC of the wheels for CUDA 12 and 13."""
    found = importlib.util.find_spec("nvidia")
    for folder in found.submodule_search_locations or [] if found else []:
        for path in sorted(Path(folder).glob("*/lib/libnvrtc.so.*")):
            if "alt" not in path.name and "builtins" not in path.name:
                return path
    return None


@pytest.fixture(scope="module")
def nvrtc() -> Nvrtc:
    path = library()
    if path is None:
        pytest.skip("no NVRTC: pip install nvidia-cuda-nvrtc-cu12")
    return Nvrtc(path)


def test_the_sources_are_found() -> None:
    assert (source_folder() / "cuda" / "narrows.cu").is_file()
    assert (source_folder() / "shared" / "functors.h").is_file()


# The precisions differ alike on every architecture; tf32 has the kernels of float32.
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
        # Blocks of 256 threads: two of them find room in a multiprocessor's 65536; of the 128 of large tiles three.
        assert registers[name] <= (170 if kernel.count("emm<Large") else 128), kernel
    assert "warning" not in compiled.log


def test_one_kernel_alone_is_quick_to_compile(nvrtc: Nvrtc) -> None:
    compiled = nvrtc.compile(["gemm<Small, Rows, Turned, Activate<Gelu>>"], "sm_80", Precision.FLOAT32)
    assert len(compiled.names) == 1


def test_what_does_not_compile_says_why(nvrtc: Nvrtc) -> None:
    with pytest.raises(RuntimeError, match=r"sm_80.*Abacus"):
        nvrtc.compile(["activate<Abacus>"], "sm_80", Precision.FLOAT32)
