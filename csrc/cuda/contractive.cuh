// The contractive penalty: of one layer in closed form, and of several what JACOBIAN needs besides matrix products.

#pragma once

#include "updates.cuh"

// --- one layer -------------------------------------------------------------------------------------------------------

// Columns of a block: few, so that the rows of a layer have many threads.
constexpr int CONTRACTED = NARROWS_CONTRACTED;

// The sums over rows of CONTRACTIVE: saved, noisy, W, weight, colrate, norms, sums; ints[0]: accumulate. Of two blocks
// with the same columns one has the squared norms of those of W, the other the weighted squares of slopes.
template <class Act>
KERNEL contractive_columns(const Op op) {
  const Matrix &saved = op.slots[0], &noisy = op.slots[1], &W = op.slots[2], &colrate = op.slots[4];
  const int first = block() / 2 * CONTRACTED;
  if (block() % 2 == 0)
    column_sums<CONTRACTED>(
        0, W.rows, first, W.cols, [&](int i, int j) { return W(i, j) * W(i, j); },
        [&](int j, real sum) { op.slots[5](0, j) = sum; });
  else
    column_sums<CONTRACTED>(
        0, saved.rows, first, W.cols,
        [&](int i, int j) {
          real slope = Act::slope(saved(i, j));
          if (noisy) slope -= Act::slope(noisy(i, j));
          return real(op.floats[0]) * row_share(op, op.slots[3], i) * slope * slope;
        },
        [&](int j, real sum) {
          op.slots[6](0, j) = sum;
          colrate(0, j) = (op.ints[0] ? colrate(0, j) : real(0)) + real(2) * sum;
        });
}

// The rest: dz, saved, weight, norms, noisy, dnoisy, sums, penalty. The threads of the first row leave the penalties.
template <class Act>
KERNEL contractive_rows(const Op op) {
  const Matrix &dz = op.slots[0], &saved = op.slots[1], &norms = op.slots[3], &noisy = op.slots[4];
  each(dz.rows, dz.cols, [&](int i, int j) {
    if (i == 0) op.slots[7](0, j) = norms(0, j) * op.slots[6](0, j);
    const real share = real(op.floats[0]) * row_share(op, op.slots[2], i);
    real slope = Act::slope(saved(i, j));
    if (noisy) slope -= Act::slope(noisy(i, j));
    const real by_slope = real(2) * share * norms(0, j) * slope, by_pre = by_slope * Act::curve(saved(i, j));
    dz(i, j) = op.ints[0] ? dz(i, j) + by_pre : by_pre;
    if (noisy) op.slots[5](i, j) = -by_slope * Act::curve(noisy(i, j));
  });
}

// --- several ---------------------------------------------------------------------------------------------------------
// Chains of derivatives have `ints[0]` rows, one for each latent, for a row of the batch.

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
