// Ops whose elements have nothing to do with each other.
//
// Each kernel names its slots in order; what is absent has no data. A thread has an element.

#pragma once

#include "scalar.h"

// LINK: z = activation(z)
template <class Act>
KERNEL activate(const Op op) {
  const Matrix& z = op.slots[0];
  each(z.rows, z.cols, [&](int i, int j) { z(i, j) = Act::value(z(i, j)); });
}

// SLOPES: saved, out
template <class Act>
KERNEL slopes(const Op op) {
  const Matrix &saved = op.slots[0], &out = op.slots[1];
  each(saved.rows, saved.cols, [&](int i, int j) { out(i, op.ints[0] + j) = Act::slope(saved(i, j)); });
}

// CURVES: dz, saved, dslopes
template <class Act>
KERNEL curves(const Op op) {
  const Matrix &dz = op.slots[0], &saved = op.slots[1], &dslopes = op.slots[2];
  each(dz.rows, dz.cols, [&](int i, int j) {
    const real by_pre = dslopes(i, op.ints[0] + j) * Act::curve(saved(i, j));
    dz(i, j) = op.ints[1] ? dz(i, j) + by_pre : by_pre;
  });
}

// TANGENT: out, x, slopes
KERNEL tangent(const Op op) {
  const Matrix &out = op.slots[0], &x = op.slots[1], &slopes = op.slots[2];
  each(out.rows, out.cols, [&](int i, int j) { out(i, j) = x(i, j) * slopes(i, op.ints[0] + j); });
}

// COTANGENT: dout, x, slopes, dslopes
KERNEL cotangent(const Op op) {
  const Matrix &dout = op.slots[0], &x = op.slots[1], &slopes = op.slots[2], &dslopes = op.slots[3];
  each(dout.rows, dout.cols, [&](int i, int j) {
    const real d = dout(i, j), by_slope = d * x(i, j);
    real& sum = dslopes(i, op.ints[0] + j);
    sum = op.ints[1] ? sum + by_slope : by_slope;
    dout(i, j) = d * slopes(i, op.ints[0] + j);
  });
}

// CONTRAST: out, x, y, weight
KERNEL contrast(const Op op) {
  const Matrix &out = op.slots[0], &x = op.slots[1], &y = op.slots[2];
  each(out.rows, out.cols, [&](int i, int j) { out(i, j) = row_share(op, op.slots[3], i) * (x(i, j) - y(i, j)); });
}

// KEEP: x, out
KERNEL copy(const Op op) {
  const Matrix &x = op.slots[0], &out = op.slots[1];
  each(x.rows, x.cols, [&](int i, int j) { out(i, j) = x(i, j); });
}

// SHIFT: out, b; ints: the source of the shift
KERNEL shift(const Op op) {
  const Matrix &out = op.slots[0], &b = op.slots[1];
  const Source& source = op.sources[op.ints[0]];
  each(1, out.cols, [&](int, int j) { out(0, j) = source.dense(0, j) + (b ? b(0, j) : real(0)); });
}

// CONDITION: out, z; ints: the source of the numbers
KERNEL condition(const Op op) {
  const Matrix &out = op.slots[0], &z = op.slots[1];
  const Source& source = op.sources[op.ints[0]];
  each(out.rows, out.cols,
       [&](int i, int j) { out(i, j) = j < z.cols ? z(i, j) : real(source.dense(op.row(i), 0) == real(j - z.cols)); });
}

// out = number
KERNEL fill(const Op op) {
  const Matrix& out = op.slots[0];
  each(out.rows, out.cols, [&](int i, int j) { out(i, j) = real(op.floats[0]); });
}

// What the counts of a row are multiplied with that sum to `total`.
DEVICE real size_factor(real scale, real total) { return scale / (total > real(0) ? total : real(1)); }

// LOG_NORMALIZE: x, library
KERNEL log_normalize(const Op op) {
  const Matrix &x = op.slots[0], &library = op.slots[1];
  each(x.rows, x.cols,
       [&](int i, int j) { x(i, j) = log1p_(x(i, j) * size_factor(real(op.floats[0]), library(i, 0))); });
}

// COLUMN_DECAY: dW, W, colrate
KERNEL column_decay(const Op op) {
  const Matrix &dW = op.slots[0], &W = op.slots[1], &colrate = op.slots[2];
  each(dW.rows, dW.cols, [&](int i, int j) { dW(i, j) += W(i, j) * colrate(0, j); });
}

// SHRINK: W
KERNEL shrink(const Op op) {
  const Matrix& W = op.slots[0];
  const real factor = real(1 - op.step->learning_rate * op.floats[0]);
  each(W.rows, W.cols, [&](int i, int j) { W(i, j) *= factor; });
}

// KL_SPARSITY: saved, mean, weight, dz, penalty. The threads of the first row leave the penalties.
template <class Act>
KERNEL kl_sparsity(const Op op) {
  const Matrix &saved = op.slots[0], &mean = op.slots[1], &dz = op.slots[3];
  const real strength = real(op.floats[0]), t = real(op.floats[1]), one = real(1);
  const real tiny = sizeof(real) == 4 ? real(1.1920928955078125e-07) : real(2.220446049250313e-16);
  each(saved.rows, saved.cols, [&](int i, int j) {
    const real rho = min_(max_(mean(0, j), tiny), one - tiny);
    if (i == 0) op.slots[4](0, j) = strength * (t * log_(t / rho) + (one - t) * log_((one - t) / (one - rho)));
    const real slope = (one - t) / (one - rho) - t / rho;
    dz(i, j) += strength * row_share(op, op.slots[2], i) * (slope * Act::slope(saved(i, j)));
  });
}
