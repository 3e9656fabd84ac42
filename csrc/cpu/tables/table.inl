// One instruction set's table of kernels. A file beside this one defines NARROWS_ISA (its namespace),
// NARROWS_VECTOR_BYTES and NARROWS_TILE_VECTORS, and includes this file. CMake compiles it with the instruction set's
// flags, once for each NARROWS_TYPE, float and double.
//
// Everything is in the namespace NARROWS_ISA, and nothing uses an inline function of the standard library. So the
// linker cannot confuse functions of two instruction sets.

#ifdef __SSE2__
#include <immintrin.h>
#endif
#include <stdint.h>

#include <type_traits>
#include <utility>

#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "plan/geometry.h"

namespace narrows {
namespace NARROWS_ISA {

// In this order: the functors rest on the vector functions, the ops on all before them.
// clang-format off
#include "shared/philox.h"
#include "cpu/kernels/vec.inl"
#include "shared/functors.h"
#include "shared/likelihoods.h"
#include "cpu/kernels/registry.inl"
#include "cpu/kernels/bfloat16.inl"
#include "cpu/kernels/gemm.inl"
#include "cpu/kernels/gemm_bfloat16.inl"
#include "cpu/kernels/dense.inl"
#include "cpu/kernels/noise.inl"
#include "cpu/kernels/losses.inl"
#include "cpu/kernels/penalties.inl"
#include "cpu/kernels/optimisers.inl"
#include "cpu/kernels/variational.inl"
#include "cpu/kernels/contractive.inl"
#include "cpu/kernels/boltzmann.inl"
#include "cpu/kernels/conv.inl"
#include "cpu/kernels/conv_wgrad.inl"
#include "cpu/kernels/pooling.inl"
#include "cpu/kernels/counts.inl"
#include "cpu/kernels/sparse.inl"
#include "cpu/kernels/sparse_mse.inl"
#include "cpu/kernels/evaluate.inl"
// clang-format on

template <class T>
void layer_dense(int activation, const LayerArgs<T>& l, int tid, int nt) {
  using Fn = void (*)(const LayerArgs<T>&, int, int);
  by_activation(activation, [](auto act) -> Fn { return dense_forward<decltype(act), T>; })(l, tid, nt);
}

template <class T>
void layer_activate(int activation, Matrix<const T> z, const LayerArgs<T>& l, int tid, int nt) {
  using Fn = void (*)(Matrix<const T>, const LayerArgs<T>&, int, int);
  by_activation(activation, [](auto act) -> Fn { return activate<decltype(act), T>; })(z, l, tid, nt);
}

template <class T>
void layer_slope(int activation, Matrix<const T> dA, Matrix<const T> saved, Matrix<T> out, int tid, int nt) {
  using Fn = void (*)(Matrix<const T>, Matrix<const T>, Matrix<T>, int, int);
  by_activation(activation, [](auto act) -> Fn { return slope<decltype(act), T>; })(dA, saved, out, tid, nt);
}

template <>
const Kernels<NARROWS_TYPE>& table<NARROWS_TYPE>() {
  using T = NARROWS_TYPE;
  static constexpr Kernels<T> kernels = {{
#define OP(NAME, ...)                                            \
  {[](const Args<T>& args) { return run_of(op::NAME(), args); }, \
   [](const Args<T>& args, index_t batch, bool bfloat16) { return cost_of(op::NAME(), args, batch, bfloat16); }},
#include "plan/ops.def"
                                         },
                                         layer_dense<T>,
                                         layer_activate<T>,
                                         layer_slope<T>,
                                         colsum_of<T>,
                                         fma_probe<T>,
                                         std::is_same_v<T, float> ? gemm_pairs<VectorPairs> : nullptr,
                                         evaluate<T>};
  return kernels;
}

}  // namespace NARROWS_ISA
}  // namespace narrows
