// Likelihoods of counts: the loss of wide layers with its gradient, and no gamma function for zeros.
//
// Promises: counts are read where they lie, dense or CSR; a block has a row, whose bits depend on that row alone.

#pragma once

#include "rows.cuh"

// COUNTS: z, weight, library, log_dispersion, rowloss, by_mean (of a softmax: m x n, to lie between its two sweeps),
// by_dispersion (of a parameter: m x n); ints: source, by_cell, features
template <class L, bool SOFTMAX>
KERNEL counts(const Op op) {
  constexpr int MOST = 256;
  SHARED(uint8_t, is_zero, MOST);
  const Matrix &z = op.slots[0], &library = op.slots[2], &log_dispersion = op.slots[3];
  const Matrix &by_mean = op.slots[5], &by_dispersion = op.slots[6];
  const Source& source = op.sources[op.ints[0]];
  const int i = block(), by_cell = op.ints[1], n = op.ints[2], at_zeta = (1 + by_cell) * n;
  const int64_t row = op.row(i);
  const real total = library(i, 0), share = row_share(op, op.slots[1], i);
  // Means are factor * exp(logit - highest).
  real highest = 0, sum = 1, factor = total / real(op.floats[0]);
  if (SOFTMAX) sum = exponentials(z, i, n, highest), factor = total / sum;
  const real log_factor = real(log_(double(factor))) - highest;
  real loss = 0, slope = 0;

  // Of an element: y > 0, or zero.
  const auto judge = [&](int j, real y) {
    const real logit = z(i, j), mu = exp_(logit - highest) * factor;
    real theta = 0, inverse = 0, zeta = 0;
    if (L::DISPERSED) {
      const real tau = by_cell ? z(i, n + j) : real(DISPERSION_PACE) * log_dispersion(0, j);
      const real limit = real(LOG_DISPERSION_LIMIT);
      theta = exp_(max_(-limit, min_(limit, tau)));
      inverse = real(1) / theta;
    }
    if (L::DROPOUT) zeta = z(i, at_zeta + j);
    CountTerms<real> t = L::zero(mu, theta, inverse, zeta);
    if (y != 0) t = L::count(y, mu, logit + log_factor, theta, zeta, t);
    loss += t.loss;
    slope += t.by_mean;
    if (!op.learn) return;
    if (SOFTMAX)
      by_mean(i, j) = t.by_mean * share;
    else
      z(i, j) = t.by_mean * share;
    if (L::DROPOUT) z(i, at_zeta + j) = t.by_dropout * share;
    if (L::DISPERSED && by_cell) z(i, n + j) = t.by_dispersion * share;
    if (L::DISPERSED && !by_cell && by_dispersion)
      by_dispersion(i, j) = t.by_dispersion * (share * real(DISPERSION_PACE));
  };

  // All zeros first, the threads side by side; then the counts, whose gamma functions would hold up a whole warp.
  int64_t k = source.csr ? source.begin(row) : 0;
  for (int first = 0; first < n; first += threads()) {
    const int j = first + thread();
    if (source.csr) {
      is_zero[thread()] = 1;
      sync();
      const int64_t end = source.end(row);
      for (k += thread(); k < end && source.column(k) < first + threads(); k += threads())
        if (source.value(k) != 0) is_zero[source.column(k) - first] = 0;
      k = source.first(row, first + threads());
      sync();
      if (j < n && is_zero[thread()]) judge(j, real(0));
    } else if (j < n && source.dense(row, j) == 0) {
      judge(j, real(0));
    }
  }
  if (source.csr) {
    for (k = source.begin(row) + thread(); k < source.end(row); k += threads())
      if (source.value(k) != 0) judge(source.column(k), source.value(k));
  } else {
    each_column(n, [&](int j) {
      const real y = source.dense(row, j);
      if (y != 0) judge(j, y);
    });
  }
  loss = block_sum(loss);
  if (thread() == 0) op.slots[4](i, 0) = loss;
  if (!op.learn || !SOFTMAX) return;
  // Back through the softmax p = exp(z - highest) / sum: d_j - p_j sum_k d_k.
  slope = block_sum(slope);
  const real part = real(double(slope) * double(share) / double(sum));
  each_column(n, [&](int j) { z(i, j) = by_mean(i, j) - exp_(z(i, j) - highest) * part; });
}
