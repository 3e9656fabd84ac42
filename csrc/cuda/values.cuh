// Ops that work on each element alone. A thread has an element.

#pragma once

#include "scalar.h"

// LINK without softmax
template <class Act>
KERNEL activate(const Op op) {
  using At = op::LINK;
  const Matrix& z = op[At::z];
  each(z.rows, z.cols, [&](int i, int j) { z(i, j) = Act::value(z(i, j)); });
}

// SLOPES
template <class Act>
KERNEL slopes(const Op op) {
  using At = op::SLOPES;
  const Matrix &saved = op[At::saved], &out = op[At::out];
  each(saved.rows, saved.cols, [&](int i, int j) { out(i, op[At::column] + j) = Act::slope(saved(i, j)); });
}

// CURVES
template <class Act>
KERNEL curves(const Op op) {
  using At = op::CURVES;
  const Matrix &dz = op[At::dz], &saved = op[At::saved], &dslopes = op[At::dslopes];
  each(dz.rows, dz.cols, [&](int i, int j) {
    const real by_pre = dslopes(i, op[At::column] + j) * Act::curve(saved(i, j));
    dz(i, j) = op[At::accumulate] ? dz(i, j) + by_pre : by_pre;
  });
}

// TANGENT
KERNEL tangent(const Op op) {
  using At = op::TANGENT;
  const Matrix &out = op[At::out], &x = op[At::x], &slopes = op[At::slopes];
  each(out.rows, out.cols, [&](int i, int j) { out(i, j) = x(i, j) * slopes(i, op[At::column] + j); });
}

// COTANGENT
KERNEL cotangent(const Op op) {
  using At = op::COTANGENT;
  const Matrix &dout = op[At::dout], &x = op[At::x], &slopes = op[At::slopes], &dslopes = op[At::dslopes];
  each(dout.rows, dout.cols, [&](int i, int j) {
    const real d = dout(i, j), by_slope = d * x(i, j);
    real& sum = dslopes(i, op[At::column] + j);
    sum = op[At::accumulate] ? sum + by_slope : by_slope;
    dout(i, j) = d * slopes(i, op[At::column] + j);
  });
}

// CONTRAST
KERNEL contrast(const Op op) {
  using At = op::CONTRAST;
  const Matrix &out = op[At::out], &x = op[At::x], &y = op[At::y];
  each(out.rows, out.cols, [&](int i, int j) { out(i, j) = row_share(op, op[At::weight], i) * (x(i, j) - y(i, j)); });
}

// KEEP
KERNEL copy(const Op op) {
  using At = op::KEEP;
  const Matrix &x = op[At::x], &out = op[At::out];
  each(x.rows, x.cols, [&](int i, int j) { out(i, j) = x(i, j); });
}

// SHIFT
KERNEL shift(const Op op) {
  using At = op::SHIFT;
  const Matrix &out = op[At::out], &b = op[At::b];
  const Source& source = op.sources[SOURCE_SHIFT];
  each(1, out.cols, [&](int, int j) { out(0, j) = source.dense(0, j) + (b ? b(0, j) : real(0)); });
}

// CONDITION
KERNEL condition(const Op op) {
  using At = op::CONDITION;
  const Matrix &out = op[At::out], &z = op[At::z];
  const Source& source = op.sources[SOURCE_CONDITION];
  each(out.rows, out.cols,
       [&](int i, int j) { out(i, j) = j < z.cols ? z(i, j) : real(source.dense(op.row(i), 0) == real(j - z.cols)); });
}

// out = value
KERNEL fill(const Op op) {
  using At = launch::fill;
  const Matrix& out = op[At::out];
  each(out.rows, out.cols, [&](int i, int j) { out(i, j) = real(op[At::value]); });
}

// The factor that scales a row with the sum `total` to the sum `scale`.
DEVICE real size_factor(real scale, real total) { return scale / (total > real(0) ? total : real(1)); }

// LOG_NORMALIZE
KERNEL log_normalize(const Op op) {
  using At = op::LOG_NORMALIZE;
  const Matrix &x = op[At::x], &size_sum = op[At::size_sum];
  each(x.rows, x.cols,
       [&](int i, int j) { x(i, j) = log1p_(x(i, j) * size_factor(real(op[At::scale]), size_sum(i, 0))); });
}

// COLUMN_DECAY
KERNEL column_decay(const Op op) {
  using At = op::COLUMN_DECAY;
  const Matrix &dW = op[At::dW], &W = op[At::W], &colrate = op[At::colrate];
  each(dW.rows, dW.cols, [&](int i, int j) { dW(i, j) += W(i, j) * colrate(0, j); });
}

// SHRINK
KERNEL shrink(const Op op) {
  using At = op::SHRINK;
  const Matrix& W = op[At::W];
  const real factor = real(1 - op.step->learning_rate * op[At::rate]);
  each(W.rows, W.cols, [&](int i, int j) { W(i, j) *= factor; });
}

// KL_SPARSITY. The threads of the first row store the penalties.
template <class Act>
KERNEL kl_sparsity(const Op op) {
  using At = op::KL_SPARSITY;
  const Matrix &saved = op[At::saved], &mean = op[At::mean], &dz = op[At::dz];
  const real strength = real(op[At::strength]), t = real(op[At::target]), one = real(1);
  const real tiny = sizeof(real) == 4 ? real(1.1920928955078125e-07) : real(2.220446049250313e-16);
  each(saved.rows, saved.cols, [&](int i, int j) {
    const real rho = min_(max_(mean(0, j), tiny), one - tiny);
    if (i == 0) op[At::penalty](0, j) = strength * (t * log_(t / rho) + (one - t) * log_((one - t) / (one - rho)));
    const real slope = (one - t) / (one - rho) - t / rho;
    dz(i, j) += strength * row_share(op, op[At::weight], i) * (slope * Act::slope(saved(i, j)));
  });
}
