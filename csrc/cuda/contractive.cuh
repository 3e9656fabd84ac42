// The contractive penalty of one layer in closed form, and the parts of JACOBIAN that are not products.

#pragma once

#include "updates.cuh"

// --- one layer -------------------------------------------------------------------------------------------------------

// Columns of a block. They are few, so that the rows of a layer have many threads.
constexpr int CONTRACTED = NARROWS_CONTRACTED;

// The sums over rows of CONTRACTIVE. Two blocks have the same columns: one computes the squared norms of the columns of
// W, the other the weighted sums of squared slopes.
template <class Act>
KERNEL contractive_columns(const Op op) {
  using At = op::CONTRACTIVE;
  const Matrix &saved = op[At::saved], &noisy = op[At::noisy], &W = op[At::W], &colrate = op[At::colrate];
  const int first = block() / 2 * CONTRACTED;
  if (block() % 2 == 0)
    column_sums<CONTRACTED>(
        0, W.rows, first, W.cols, [&](int i, int j) { return W(i, j) * W(i, j); },
        [&](int j, real sum) { op[launch::contractive::norms](0, j) = sum; });
  else
    column_sums<CONTRACTED>(
        0, saved.rows, first, W.cols,
        [&](int i, int j) {
          real slope = Act::slope(saved(i, j));
          if (noisy) slope -= Act::slope(noisy(i, j));
          return real(op[At::strength]) * row_share(op, op[At::weight], i) * slope * slope;
        },
        [&](int j, real sum) {
          op[launch::contractive::sums](0, j) = sum;
          colrate(0, j) = (op[At::accumulate_colrate] ? colrate(0, j) : real(0)) + real(2) * sum;
        });
}

// The rest of CONTRACTIVE. The threads of the first row store the penalties.
template <class Act>
KERNEL contractive_rows(const Op op) {
  using At = op::CONTRACTIVE;
  const Matrix &dz = op[At::dz], &saved = op[At::saved], &norms = op[launch::contractive::norms],
               &noisy = op[At::noisy];
  each(dz.rows, dz.cols, [&](int i, int j) {
    if (i == 0) op[At::penalty](0, j) = norms(0, j) * op[launch::contractive::sums](0, j);
    const real share = real(op[At::strength]) * row_share(op, op[At::weight], i);
    real slope = Act::slope(saved(i, j));
    if (noisy) slope -= Act::slope(noisy(i, j));
    const real by_slope = real(2) * share * norms(0, j) * slope, by_pre = by_slope * Act::curve(saved(i, j));
    dz(i, j) = op[At::accumulate_dz] ? dz(i, j) + by_pre : by_pre;
    if (noisy) op[At::dnoisy](i, j) = -by_slope * Act::curve(noisy(i, j));
  });
}

// --- several ---------------------------------------------------------------------------------------------------------
// A row of the batch has `latents` rows in a chain of derivatives.

// The derivatives of the latents by their pre-activations; `column` is the first one of the last layer's slopes.
KERNEL jacobian_seed(const Op op) {
  using At = launch::jacobian_seed;
  const Matrix &slopes = op[At::slopes], &out = op[At::out];
  each(out.rows, out.cols, [&](int r, int j) {
    out(r, j) = r % op[At::latents] == j ? slopes(r / op[At::latents], op[At::column] + j) : real(0);
  });
}

// x -= y
KERNEL subtract(const Op op) {
  using At = launch::subtract;
  const Matrix &x = op[At::x], &y = op[At::y];
  each(x.rows, x.cols, [&](int i, int j) { x(i, j) -= y(i, j); });
}

// out = factor * share of the row * x
KERNEL share_rows(const Op op) {
  using At = launch::share_rows;
  const Matrix &x = op[At::x], &out = op[At::out];
  each(x.rows, x.cols, [&](int r, int j) {
    out(r, j) = real(op[At::factor]) * row_share(op, op[At::weight], r / op[At::latents]) * x(r, j);
  });
}

// x *= the slopes of the row of the batch
KERNEL times_slopes(const Op op) {
  using At = launch::times_slopes;
  const Matrix &x = op[At::x], &slopes = op[At::slopes];
  each(x.rows, x.cols, [&](int r, int j) { x(r, j) *= slopes(r / op[At::latents], op[At::column] + j); });
}

// The derivatives by slopes. An absent `by_out` is the identity.
KERNEL jacobian_slopes(const Op op) {
  using At = launch::jacobian_slopes;
  const Matrix &d = op[At::d], &by_out = op[At::by_out], &dslopes = op[At::dslopes];
  const int n = op[At::latents];
  each(op.m, d.cols, [&](int i, int j) {
    real sum = by_out ? real(0) : d(i * n + j, j);
    for (int a = 0; by_out && a < n; ++a) sum += d(i * n + a, j) * by_out(i * n + a, j);
    dslopes(i, op[At::column] + j) += sum;
  });
}

// rowpenalty = strength * share * tr(B product'). A block has a row of the batch.
KERNEL jacobian_norm(const Op op) {
  using At = launch::jacobian_norm;
  const Matrix &B = op[At::B], &product = op[At::product];
  const int i = block(), n = op[At::latents];
  real sum = 0;
  for (int a = 0; a < n; ++a) each_column(B.cols, [&](int j) { sum += B(i * n + a, j) * product(i * n + a, j); });
  sum = real(op[At::strength]) * row_share(op, op[At::weight], i) * block_sum(sum);
  if (thread() == 0) op[At::rowpenalty](i, 0) = sum;
}
