// What JACOBIAN needs besides matrix products: chains of derivatives have `ints[0]` rows, one for each latent, for a
// row of the batch.

#pragma once

#include "scalar.h"

// The derivatives of the latents by their pre-activations: slopes, out; ints[1]: first column of the last slopes
KERNEL jacobian_seed(const Op op) {
  const Matrix &slopes = op.slots[0], &out = op.slots[1];
  each(out.rows, out.cols,
       [&](int r, int j) { out(r, j) = r % op.ints[0] == j ? slopes(r / op.ints[0], op.ints[1] + j) : real(0); });
}

// x -= y
KERNEL subtract(const Op op) {
  const Matrix &x = op.slots[0], &y = op.slots[1];
  each(x.rows, x.cols, [&](int i, int j) { x(i, j) -= y(i, j); });
}

// out = number * share of the row * x: x, weight, out
KERNEL share_rows(const Op op) {
  const Matrix &x = op.slots[0], &out = op.slots[2];
  each(x.rows, x.cols,
       [&](int r, int j) { out(r, j) = real(op.floats[0]) * row_share(op, op.slots[1], r / op.ints[0]) * x(r, j); });
}

// x *= the slopes of the row of the batch, from column ints[1] on: x, slopes
KERNEL times_slopes(const Op op) {
  const Matrix &x = op.slots[0], &slopes = op.slots[1];
  each(x.rows, x.cols, [&](int r, int j) { x(r, j) *= slopes(r / op.ints[0], op.ints[1] + j); });
}

// The derivatives by slopes: d, by_out (absent: the identity), dslopes; ints[1]: first column
KERNEL jacobian_slopes(const Op op) {
  const Matrix &d = op.slots[0], &by_out = op.slots[1], &dslopes = op.slots[2];
  const int n = op.ints[0];
  each(op.m, d.cols, [&](int i, int j) {
    real sum = by_out ? real(0) : d(i * n + j, j);
    for (int a = 0; by_out && a < n; ++a) sum += d(i * n + a, j) * by_out(i * n + a, j);
    dslopes(i, op.ints[1] + j) += sum;
  });
}

// rowpenalty = strength * share * tr(B product'): B, product, weight, rowpenalty. A block has a row of the batch.
KERNEL jacobian_norm(const Op op) {
  const Matrix &B = op.slots[0], &product = op.slots[1];
  const int i = block(), n = op.ints[0];
  real sum = 0;
  for (int a = 0; a < n; ++a) each_column(B.cols, [&](int j) { sum += B(i * n + a, j) * product(i * n + a, j); });
  sum = real(op.floats[0]) * row_share(op, op.slots[2], i) * block_sum(sum);
  if (thread() == 0) op.slots[3](i, 0) = sum;
}
