#!/usr/bin/env bash
# Proofs too long for every commit: sanitizers, an installation without a compiler, the slow tests, tests of the tests.
#
# Usage: bench/nightly.sh [symbols|address|thread|fallback|cuda|gpu|slow|mutants ...]; without arguments, all of them but
# `gpu`, which takes a GPU, CuPy and compute-sanitizer. Needs python3, g++ and the package's test extra in the environment
# of `python3`.
set -euo pipefail
cd "$(dirname "$0")/.."
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# A copy of the package with an extension built with the given flags, in $scratch/$1.
sanitized() {
  local name=$1 flags=$2
  shift 2
  cmake -S . -B "$scratch/build-$name" -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DPython_EXECUTABLE="$(command -v python3)" \
    -Dpybind11_DIR="$(python3 -m pybind11 --cmakedir)" -DCMAKE_CXX_FLAGS="$flags -fno-omit-frame-pointer" \
    -DNARROWS_FP_CONTRACT="$([ "$flags" ] && echo off || echo fast)" "$@" >/dev/null
  cmake --build "$scratch/build-$name" >/dev/null
  mkdir -p "$scratch/$name"
  cp -r python/narrows "$scratch/$name/"
  rm -f "$scratch/$name"/narrows/_core*
  cp "$scratch/build-$name"/_core* "$scratch/$name/narrows/"
}

native_tests="tests/backends/test_native.py tests/backends/test_native_plans.py tests/backends/test_native_sparse.py tests/backends/test_functional.py tests/backends/test_backends.py tests/backends/test_programs.py tests/backends/test_bits.py tests/backends/test_edges.py tests/backends/test_convolution.py tests/backends/test_boltzmann.py tests/backends/test_contractive.py tests/backends/test_counts.py tests/models/test_shifted.py tests/models/test_batches.py"

# An inline function compiled with an instruction set's flags must carry its namespace: the linker keeps one copy of a
# weak symbol, and another's could be the one that this CPU cannot run.
symbols() {
  sanitized symbols ""
  local object name found
  for object in $(find "$scratch/build-symbols" -path '*/tables/*.o'); do
    name=$(basename "$object" .cpp.o)
      found=$(nm -C --defined-only "$object" | grep -c " [WVu] .*narrows::$name::" || true)
    if [ "$found" = 0 ]; then
      echo "$name: no weak symbol of its own: has the layout changed?"
      exit 1
    fi
    if nm -C --defined-only "$object" | grep " [WVu] " | grep -v "narrows::$name::"; then
      echo "$name: the weak symbols above can be taken for another instruction set's"
      exit 1
    fi
    echo "$name: $found weak symbols, all its own"
  done
}

address() {
  sanitized address "-fsanitize=address,undefined -fno-sanitize-recover=undefined"
  # Limits on the address space, a list of threads and the signal of a bad access mean nothing under the sanitizer.
  # shellcheck disable=SC2086
  LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so) $(g++ -print-file-name=libstdc++.so)" \
    ASAN_OPTIONS=detect_leaks=0 PYTHONMALLOC=malloc PYTHONPATH="$scratch/address" \
    python3 -m pytest -q -p no:cacheprovider $native_tests -k "not out_of_memory and not citizen and not numba and not ends_the_process"
}

thread() {
  # gcc 12 crashes in its vectoriser of straight-line code on what the sanitizer makes of the AVX-512 kernels.
  sanitized thread "-fsanitize=thread -fno-tree-slp-vectorize" -DNARROWS_OPENMP=OFF
  LD_PRELOAD="$(g++ -print-file-name=libtsan.so)" TSAN_OPTIONS="halt_on_error=1 ignore_noninstrumented_modules=1" \
    PYTHONPATH="$scratch/thread" python3 -m pytest -q -p no:cacheprovider tests/backends/test_native.py tests/backends/test_edges.py \
    -k "two_programs or program_in_two or isa_is_chosen or stray or tile_edges or several_tiles"
}

fallback() {
  python3 -m venv "$scratch/fallback"
  cp -r . "$scratch/source"
  CXX=/bin/false "$scratch/fallback/bin/pip" install -q "$scratch/source[test]"
  "$scratch/fallback/bin/narrows" doctor
  (cd "$scratch/source" && "$scratch/fallback/bin/python" -m pytest -q -rs)
}

# The compiler of CUDA kernels, too large for the package's test extra, and CuPy; neither needs a GPU.
cuda() (
  python3 -m pip install -q --target "$scratch/cuda" nvidia-cuda-nvrtc-cu12
  python3 -m pip install -q --no-deps --target "$scratch/cuda" cupy-cuda12x cuda-pathfinder
  export PYTHONPATH="$scratch/cuda${PYTHONPATH:+:$PYTHONPATH}"
  python3 -c "import cupy, nvidia.cuda_nvrtc"
  python3 -m pytest -q -rs tests/cuda/test_compile.py tests/cuda/test_device.py tests/cuda/test_host.py tests/cuda/test_kernels.py \
    tests/cuda/test_program.py tests/cuda/test_probe.py tests/cuda/test_blas.py
)

# What only a GPU can show. A test that is skipped for want of one is a failure here.
gpu() {
  python3 -m pytest -q -rs -m gpu tests | tee "$scratch/gpu.log"
  if grep -q SKIPPED "$scratch/gpu.log"; then
    echo "tests were skipped: see the reasons above"
    exit 1
  fi
  local tool
  # Rows are copied to the host with the gaps between them, which nobody writes; kernels may not read these.
  for tool in memcheck racecheck synccheck "initcheck --check-api-memory-access no"; do
    # shellcheck disable=SC2086
    compute-sanitizer --tool $tool --error-exitcode 1 --target-processes all \
      python3 -m pytest -q -m gpu tests/cuda/test_gpu.py -k sanitized
  done
}

slow() {
  python3 -m pytest -q -m slow
}

mutants() {
  python3 bench/mutants.py
}

for proof in "${@:-symbols address thread fallback cuda slow mutants}"; do
  for name in $proof; do
    echo "== $name"
    "$name"
  done
done
