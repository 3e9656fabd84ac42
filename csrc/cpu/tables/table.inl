// One instruction set's table of kernels. A table_*.cpp defines NARROWS_ISA (its namespace), NARROWS_VECTOR_BYTES and
// NARROWS_TILE_VECTORS, is compiled with that instruction set's flags, and includes this file.
//
// Everything lives in the namespace NARROWS_ISA and no inline function of the standard library is used, so the linker
// cannot take a function compiled for one instruction set for another's.

#ifdef __SSE2__
#include <immintrin.h>
#endif
#include <stdint.h>

#include <type_traits>
#include <utility>

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

// kernel<Functor, T> for each activation.
#define NARROWS_BY_ACTIVATION(activation, kernel) \
  switch (activation) { NARROWS_ACTIVATIONS(kernel) }

template <class T>
Op<T> resolve_loss(int loss, int activation) {
  if (activation == ACT_SOFTMAX) {
    switch (loss) {
      case LOSS_MSE:
        return loss_softmax<Mse, T>;
      case LOSS_HUBER:
        return loss_softmax<Huber, T>;
      case LOSS_BCE:
        return loss_softmax<Bce, T>;
      case LOSS_MULTINOMIAL:
        return loss_multinomial<T>;
    }
  }
  if (loss == LOSS_BCE && activation == ACT_SIGMOID) return loss_bce_sigmoid<T>;
#define X(name, functor)                                                \
  case ACT_##name:                                                      \
    if (loss == LOSS_MSE) return loss_elementwise<Mse, functor, T>;     \
    if (loss == LOSS_HUBER) return loss_elementwise<Huber, functor, T>; \
    break;
  NARROWS_BY_ACTIVATION(activation, X)
#undef X
  return nullptr;
}

template <class T>
Op<T> resolve(int code, const int* ints) {
#define X(name, functor) \
  case ACT_##name:       \
    return NARROWS_KERNEL<functor, T>;
  switch (code) {
    case OP_GATHER:
      return gather<T>;
    case OP_CORRUPT:
      return ints[0] == CORRUPT_GAUSSIAN  ? corrupt_gaussian<T>
             : ints[0] == CORRUPT_MASKING ? corrupt_masking<T>
                                          : corrupt_salt_and_pepper<T>;
#define NARROWS_KERNEL dense
    case OP_DENSE:
      NARROWS_BY_ACTIVATION(ints[0], X)
      break;
#undef NARROWS_KERNEL
    case OP_DROPOUT:
      return dropout<T>;
#define NARROWS_KERNEL link
    case OP_LINK:
      if (ints[0] == ACT_SOFTMAX) return link_softmax<T>;
      NARROWS_BY_ACTIVATION(ints[0], X)
      break;
#undef NARROWS_KERNEL
    case OP_LOSS:
      return resolve_loss<T>(ints[0], ints[1]);
    case OP_WGRAD:
      return wgrad<T>;
    case OP_COLSUM:
      return colsum<T>;
#define NARROWS_KERNEL dgrad
    case OP_DGRAD:
      NARROWS_BY_ACTIVATION(ints[0], X)
      break;
#undef NARROWS_KERNEL
#define NARROWS_KERNEL activity_l1
    case OP_ACTIVITY_L1:
      NARROWS_BY_ACTIVATION(ints[0], X)
      break;
#undef NARROWS_KERNEL
#define NARROWS_KERNEL kl_sparsity
    case OP_KL_SPARSITY:
      NARROWS_BY_ACTIVATION(ints[0], X)
      break;
#undef NARROWS_KERNEL
    case OP_DECAY:
      return decay<T>;
    case OP_REDUCE:
      return reduce<T>;
    case OP_SQNORM:
      return sqnorm<T>;
    case OP_SHRINK:
      return shrink<T>;
    case OP_UPDATE:
      return ints[0] == SOLVER_SGD ? update<Sgd, T> : update<Adam, T>;
    case OP_WGRAD_UPDATE:
      return ints[0] == SOLVER_SGD ? wgrad_update<Sgd, T> : wgrad_update<Adam, T>;
    case OP_COLSUM_UPDATE:
      return ints[0] == SOLVER_SGD ? colsum_update<Sgd, T> : colsum_update<Adam, T>;
    case OP_SAMPLE:
      return sample<T>;
    case OP_LATENT_KL:
      return latent_kl<T>;
#define NARROWS_KERNEL gaussian
    case OP_GAUSSIAN:
      NARROWS_BY_ACTIVATION(ints[0], X)
      break;
#undef NARROWS_KERNEL
#define NARROWS_KERNEL contractive
    case OP_CONTRACTIVE:
      NARROWS_BY_ACTIVATION(ints[0], X)
      break;
#undef NARROWS_KERNEL
    case OP_COLUMN_DECAY:
      return column_decay<T>;
    case OP_GRAM:
      return gram<T>;
#define NARROWS_KERNEL slopes
    case OP_SLOPES:
      NARROWS_BY_ACTIVATION(ints[0], X)
      break;
#undef NARROWS_KERNEL
    case OP_JACOBIAN:
      return jacobian<T>;
#define NARROWS_KERNEL curves
    case OP_CURVES:
      NARROWS_BY_ACTIVATION(ints[0], X)
      break;
#undef NARROWS_KERNEL
    case OP_GRAIN_SUM:
      return grain_sum<T>;
    case OP_GRAM_WGRAD:
      return gram_wgrad<T>;
    case OP_PROBE:
      return probe_signs<T>;
    case OP_TANGENT:
      return tangent<T>;
    case OP_SQUARED_NORM:
      return squared_norm<T>;
    case OP_COTANGENT:
      return cotangent<T>;
    case OP_DRAW:
      return ints[0] == UNITS_BERNOULLI ? draw_bernoulli<T> : draw_gaussian<T>;
    case OP_CONTRAST:
      return contrast<T>;
    case OP_KEEP:
      return keep_rows<T>;
#define NARROWS_KERNEL convolve
    case OP_CONVOLVE:
      NARROWS_BY_ACTIVATION(ints[0], X)
      break;
#undef NARROWS_KERNEL
#define NARROWS_KERNEL conv_dgrad
    case OP_CONV_DGRAD:
      NARROWS_BY_ACTIVATION(ints[0], X)
      break;
#undef NARROWS_KERNEL
    case OP_CONV_WGRAD:
      return conv_wgrad<T>;
    case OP_MAXPOOL:
      return maxpool<T>;
#define NARROWS_KERNEL maxpool_dgrad
    case OP_MAXPOOL_DGRAD:
      NARROWS_BY_ACTIVATION(ints[0], X)
      break;
#undef NARROWS_KERNEL
    case OP_GRAIN_UPDATE:
      return ints[0] == SOLVER_SGD ? grain_update<Sgd, T> : grain_update<Adam, T>;
    case OP_MAXPOOL_PICK:
      return maxpool_pick<T>;
#define NARROWS_KERNEL sparse_dense
    case OP_SPARSE_DENSE:
      NARROWS_BY_ACTIVATION(ints[0], X)
      break;
#undef NARROWS_KERNEL
    case OP_SPARSE_WGRAD:
      return sparse_wgrad<T>;
    case OP_SPARSE_WGRAD_UPDATE:
      return ints[0] == SOLVER_SGD ? sparse_wgrad_update<Sgd, T> : sparse_wgrad_update<Adam, T>;
    case OP_WEIGHT_GRAM:
      return weight_gram<T>;
#define NARROWS_KERNEL sparse_mse
    case OP_SPARSE_MSE:
      NARROWS_BY_ACTIVATION(ints[1], X)
      break;
#undef NARROWS_KERNEL
    case OP_ROW_GRAM:
      return row_gram<T>;
    case OP_SPARSE_MSE_WGRAD:
      return sparse_mse_wgrad<T>;
    case OP_SPARSE_MSE_UPDATE:
      return ints[0] == SOLVER_SGD ? sparse_mse_update<Sgd, T> : sparse_mse_update<Adam, T>;
    case OP_SIZE_SUM:
      return size_sum<T>;
    case OP_LOG_NORMALIZE:
      return log_normalize<T>;
    case OP_COUNTS:
      return ints[0] == LOSS_POISSON ? resolve_link<Poisson, T>(ints[1])
             : ints[0] == LOSS_NB    ? resolve_link<Nb, T>(ints[1])
                                     : resolve_link<Zinb, T>(ints[1]);
    case OP_MEANS:
      return means<T>;
    case OP_SHIFT:
      return shift<T>;
    case OP_CONDITION:
      return condition<T>;
  }
#undef X
  return nullptr;
}

template <class T>
void layer_dense(int activation, const LayerArgs<T>& l, int tid, int nt) {
#define X(name, functor) \
  case ACT_##name:       \
    return dense_forward<functor>(l, tid, nt);
  NARROWS_BY_ACTIVATION(activation, X)
#undef X
}

template <class T>
void layer_activate(int activation, Matrix<const T> z, const LayerArgs<T>& l, int tid, int nt) {
#define X(name, functor) \
  case ACT_##name:       \
    return activate<functor>(z, l, tid, nt);
  NARROWS_BY_ACTIVATION(activation, X)
#undef X
}

template <class T>
void layer_slope(int activation, Matrix<const T> dA, Matrix<const T> saved, Matrix<T> out, int tid, int nt) {
#define X(name, functor) \
  case ACT_##name:       \
    return slope<functor, T>(dA, saved, out, tid, nt);
  NARROWS_BY_ACTIVATION(activation, X)
#undef X
}

template <class T>
constexpr Kernels<T> kernels() {
  return {resolve<T>,   layer_dense<T>, layer_activate<T>, layer_slope<T>,
          colsum_of<T>, fma_probe<T>,   pair_scratch,      evaluate<T>};
}

}  // namespace NARROWS_ISA
}  // namespace narrows
