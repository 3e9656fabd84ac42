// The functions of single numbers that functors.h and likelihoods.h need.
//
// Promises: float32 is accurate to a few ulp for all numbers, if CUDA's (or the C library's) functions are. On GPUs
// CuPy flushes subnormal numbers to zero. In float32 nothing is computed in double.

#pragma once

#include "../shared/activations.h"
#include "op.h"

template <class V>
using scalar_t = V;

template <class V>
DEVICE V splat(double x) {
  return V(x);
}
template <class V>
DEVICE V select(bool mask, V a, V b) {
  return mask ? a : b;
}
template <class V>
DEVICE V max_(V a, V b) {
  return a > b ? a : b;
}
template <class V>
DEVICE V min_(V a, V b) {
  return a < b ? a : b;
}

DEVICE float abs_(float x) { return fabsf(x); }
DEVICE float exp_(float x) { return expf(x); }
DEVICE float expm1_(float x) { return expm1f(x); }
DEVICE float log_(float x) { return logf(x); }
DEVICE float log1p_(float x) { return log1pf(x); }
DEVICE float tanh_(float x) { return tanhf(x); }
DEVICE float sqrt_(float x) { return sqrtf(x); }
DEVICE double abs_(double x) { return fabs(x); }
DEVICE double exp_(double x) { return exp(x); }
DEVICE double expm1_(double x) { return expm1(x); }
DEVICE double log_(double x) { return log(x); }
DEVICE double log1p_(double x) { return log1p(x); }
DEVICE double tanh_(double x) { return tanh(x); }
DEVICE double sqrt_(double x) { return sqrt(x); }

// w exp(x). Half of the exponent at a time, so that no factor is subnormal unless the product is.
DEVICE float exp_times_(float x, float w) {
  const float e = exp_(0.5f * x);
  return (w * e) * e;
}
DEVICE double exp_times_(double x, double w) { return w * exp_(x); }

// exp(x) - 1 for x <= 0; e = exp(x).
DEVICE float expm1_given(float x, float e) { return x > -0.34f ? expm1_(x) : e - 1.0f; }
DEVICE double expm1_given(double x, double) { return expm1_(x); }

// w phi(a) for 0 <= a <= 15; phi is the normal density. The square of a has two parts, because its rounding error would
// grow by a**2 / 2.
DEVICE float normal_pdf_times(float a, float w) {
  const float head = float(int(a * 256.0f)) * 0.00390625f;  // 12 bits: its square is exact
  const float low = 0.5f * (head - a) * (head + a);
  return exp_times_(-0.5f * head * head, w * 0.398942280f * exp_(low));
}

// phi(a) / Phi(-a) for 0 <= a <= 15; Phi is the normal distribution function. As in cpu/kernels/vec.inl.
DEVICE float normal_hazard(float a) {
  float p = a * 0.00767060556f + 0.0626053885f;
  p = p * a + 0.222651899f;
  p = p * a + 0.363379627f;
  float q = a * 0.00961493887f + 0.0904582292f;
  q = q * a + 0.393508554f;
  q = q * a + 0.912685156f;
  q = q * a + 1.0f;
  return a * (1.0f - p / q) + 2.0f * 0.398942280f;
}

// w Phi(x)
DEVICE float normal_cdf_times_(float x, float w) {
  const float a = min_(15.0f, abs_(x));
  const float tail = normal_pdf_times(a, (x < 0 ? w : 1.0f) / normal_hazard(a));
  return x < 0 ? tail : w * (1.0f - tail);
}
DEVICE double normal_cdf_times_(double x, double w) { return w * (0.5 * erfc(x * -0.7071067811865476)); }

// Phi(x) + x phi(x), the derivative of x Phi(x)
DEVICE float gelu_slope_(float x) {
  const float a = min_(15.0f, abs_(x));
  const float below = normal_pdf_times(a, 1.0f / normal_hazard(a) - a);
  return x < 0 ? below : 1.0f - below;
}
DEVICE double gelu_slope_(double x) {
  x = max_(-40.0, min_(40.0, x));
  return normal_cdf_times_(x, 1.0) + x * exp_(-0.5 * x * x) * 0.3989422804014327;
}

template <class V>
DEVICE V sign_(V a) {
  return V(a > V(0)) - V(a < V(0));
}

// Constants of narrows.plan.ops.
constexpr double DROPOUT_LIMIT = NARROWS_DROPOUT_LIMIT, LOG_DISPERSION_LIMIT = NARROWS_LOG_DISPERSION_LIMIT;
constexpr double DISPERSION_PACE = NARROWS_DISPERSION_PACE;
constexpr double VARIANCE_FLOOR = NARROWS_VARIANCE_FLOOR, GRAM_GUARD = NARROWS_GRAM_GUARD;
constexpr int SOURCE_SHIFT = NARROWS_SOURCE_SHIFT, SOURCE_CONDITION = NARROWS_SOURCE_CONDITION;
constexpr int LOSS_MSE = NARROWS_LOSS_MSE, LOSS_BCE = NARROWS_LOSS_BCE;
constexpr int CELL_ROWS = NARROWS_CELL_ROWS, LANES = NARROWS_LANES, GRAIN = NARROWS_GRAIN;

// In this order: each file uses the one before it.
#include "../shared/functors.h"
#include "../shared/philox.h"
// clang-format off
#include "../shared/likelihoods.h"
// clang-format on

enum ActivationNumber : int {
#define X(name, functor) ACT_##name,
  NARROWS_ACTIVATIONS(X)
#undef X
};

// Calls fn.as<A>(), where A is the activation with this number in spec.Activation.
template <class Fn>
DEVICE void with_activation(int number, const Fn& fn) {
  switch (number) {
#define X(name, functor) \
  case ACT_##name:       \
    return fn.template as<functor>();
    NARROWS_ACTIVATIONS(X)
#undef X
  }
}
