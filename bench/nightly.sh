#!/usr/bin/env bash
# Checks that take too long for every commit.
#
# Usage: bench/nightly.sh [symbols|address|thread|fallback|cuda|gpu|slow|mutants ...]; without arguments, all except `gpu`.
#
#   symbols    no object file of an instruction set has a symbol that the linker could take for another instruction set
#   address    the native tests under the address and undefined-behaviour sanitizers
#   thread     tests of threads under the thread sanitizer
#   fallback   the whole suite from a source distribution, after an installation without a compiler; nothing of it stays
#   cuda       CUDA kernels compiled for every architecture; needs no GPU
#   gpu        the tests on a GPU, also under compute-sanitizer; needs a GPU, CuPy and compute-sanitizer
#   slow       the slow tests
#   mutants    planted faults, which the tests must notice
#
# Needs g++, and `python3` in an environment with the package's extra `nightly` (pip install "narrows[nightly]").
set -euo pipefail
cd "$(dirname "$0")/.."
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# Build the extension with the given flags, in a copy of the package in $scratch/$1.
sanitized() {
  local name=$1 flags=$2
  shift 2
  cmake -S . -B "$scratch/build-$name" -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DPython_EXECUTABLE="$(command -v python3)" \
    -Dpybind11_DIR="$(python3 -m pybind11 --cmakedir)" -DCMAKE_CXX_FLAGS="$flags -fno-omit-frame-pointer" \
    -DNARROWS_FP_CONTRACT="$([ "$flags" ] && echo off || echo fast)" "$@" >/dev/null
  cmake --build "$scratch/build-$name" >/dev/null
  mkdir -p "$scratch/$name"
  cp -r python/narrows "$scratch/$name/"
  cp -r csrc "$scratch/$name/narrows/"  # where an installation has it
  rm -f "$scratch/$name"/narrows/_core*
  cp "$scratch/build-$name"/_core* "$scratch/$name/narrows/"
}

native_tests="
  tests/backends/test_native.py tests/backends/test_native_plans.py tests/backends/test_native_sparse.py
  tests/backends/test_functional.py tests/backends/test_backends.py tests/backends/test_programs.py
  tests/backends/test_bits.py tests/backends/test_edges.py tests/backends/test_convolution.py
  tests/backends/test_boltzmann.py tests/backends/test_contractive.py tests/backends/test_counts.py
  tests/models/test_contractive.py tests/models/test_convolutional.py tests/models/test_counts.py
  tests/models/test_shifted.py tests/models/test_batches.py"

# An inline function compiled with an instruction set's flags must be in that set's namespace. The linker keeps one copy of
# each weak symbol, and without the namespace it could keep a copy that this CPU cannot run.
symbols() {
  sanitized symbols ""
  local object name found
  for object in $(find "$scratch/build-symbols" -path '*/tables/*.o'); do
    name=$(basename "$object" .cpp.o)
    found=$(nm -C --defined-only "$object" | grep -c " [WVu] .*narrows::$name::" || true)
    if [ "$found" = 0 ]; then
      echo "$name: there is no weak symbol in its namespace: has the layout changed?"
      exit 1
    fi
    if nm -C --defined-only "$object" | grep " [WVu] " | grep -v "narrows::$name::"; then
      echo "$name: the weak symbols above are outside its namespace"
      exit 1
    fi
    echo "$name: $found weak symbols, all in its namespace"
  done
}

address() {
  sanitized address "-fsanitize=address,undefined -fno-sanitize-recover=undefined"
  # The sanitizer changes address-space limits, the list of threads and the signal of a bad access, and it takes the way in
  # which glibc ends a thread for an error. Tests of these are left out.
  # shellcheck disable=SC2086
  LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so) $(g++ -print-file-name=libstdc++.so)" \
    ASAN_OPTIONS=detect_leaks=0 PYTHONMALLOC=malloc PYTHONPATH="$scratch/address" \
    python3 -m pytest -q -p no:cacheprovider $native_tests -k "not out_of_memory and not citizen and not numba and not ends_the_process and not daemon"
}

thread() {
  # gcc 12 crashes when its straight-line vectoriser meets the sanitizer's instrumentation of the AVX-512 kernels.
  sanitized thread "-fsanitize=thread -fno-tree-slp-vectorize" -DNARROWS_OPENMP=OFF
  LD_PRELOAD="$(g++ -print-file-name=libtsan.so)" TSAN_OPTIONS="halt_on_error=1 ignore_noninstrumented_modules=1" \
    PYTHONPATH="$scratch/thread" python3 -m pytest -q -p no:cacheprovider tests/backends/test_native.py tests/backends/test_edges.py \
    -k "two_programs or program_in_two or isa_is_chosen or stray or tile_edges"
}

fallback() {
  local bin=$scratch/fallback/bin
  python3 -m venv "$scratch/fallback"
  "$bin/pip" install -q scikit-build-core
  "$bin/python" -c "from scikit_build_core.build import build_sdist; build_sdist('$scratch')"
  mkdir "$scratch/source"
  tar -xzf "$scratch"/narrows-*.tar.gz -C "$scratch/source" --strip-components=1
  CXX=/bin/false "$bin/pip" install -q "$scratch/source[test]"
  "$bin/narrows" doctor
  (cd "$scratch/source" && "$bin/python" -m pytest -q -rs)
  "$bin/pip" uninstall -q -y narrows
  if (cd "$scratch/fallback" && "$bin/python" -c "import narrows") 2>/dev/null; then
    echo "narrows can be imported after pip uninstall"
    exit 1
  fi
}

# Installs the compiler of CUDA kernels and CuPy into a scratch folder: they are too large for an extra of the package.
cuda() (
  python3 -m pip install -q --target "$scratch/cuda" nvidia-cuda-nvrtc-cu12
  python3 -m pip install -q --no-deps --target "$scratch/cuda" cupy-cuda12x cuda-pathfinder
  export PYTHONPATH="$scratch/cuda${PYTHONPATH:+:$PYTHONPATH}"
  python3 -c "import cupy, nvidia.cuda_nvrtc"
  python3 -m pytest -q -rs tests/cuda/test_compile.py tests/cuda/test_device.py tests/cuda/test_host.py tests/cuda/test_kernels.py \
    tests/cuda/test_program.py tests/cuda/test_probe.py tests/cuda/test_blas.py
)

# A test that is skipped is a failure here.
gpu() {
  python3 -m pytest -q -rs -m gpu tests | tee "$scratch/gpu.log"
  if grep -q SKIPPED "$scratch/gpu.log"; then
    echo "tests were skipped: see the reasons above"
    exit 1
  fi
  local tool
  # Copies of rows to the host include the gaps between rows, which nobody writes; only kernels must not read them.
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
