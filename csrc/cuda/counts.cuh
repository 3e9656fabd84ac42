// Likelihoods of counts with their gradients. Zeros need no gamma function.
//
// Promises: kernels read counts in place, dense or CSR. The bits of a row depend on that row alone. z is the only array
// of rows x features: once the sums of a row are known, the derivatives are computed again, in place.

#pragma once

#include "rows.cuh"
#include "sparse.cuh"

// exp(tau), where tau is the logarithm of an inverse dispersion.
DEVICE real inverse_dispersion(real tau) {
  const real limit = real(LOG_DISPERSION_LIMIT);
  return exp_(max_(-limit, min_(limit, tau)));
}

// GROUP rows of a block.
template <class L, bool SOFTMAX, bool BY_CELL>
struct CountRows {
  using At = op::COUNTS;
  static constexpr int GROUP = NARROWS_COUNT_GROUP;
  static constexpr bool BY_GENE = L::DISPERSED && !BY_CELL;
  const Op& op;
  const Matrix &z, &log_dispersion, &sums;
  const MatrixOf<uint32_t> found;
  const Source& source;
  const int n, first, at_zeta;
  // Means are factor * exp(logit - highest), or exp(logit + log_factor).
  real highest[GROUP], factor[GROUP], log_factor[GROUP], share[GROUP], part[GROUP];

  DEVICE explicit CountRows(const Op& op)
      : op(op),
        z(op[At::z]),
        log_dispersion(op[At::log_dispersion]),
        sums(op[launch::counts::sums]),
        found(as<uint32_t>(op[launch::counts::found])),
        source(op.sources[op[At::source]]),
        n(op[launch::counts::features]),
        first(block() * GROUP),
        at_zeta(BY_CELL ? 2 * n : n) {
    UNROLL
    for (int r = 0; r < GROUP; ++r) {
      const int i = first + r;
      if (i >= op.m) break;
      share[r] = row_share(op, op[At::weight], i), highest[r] = 0;
      factor[r] = op[At::size_sum](i, 0) / (SOFTMAX ? exponentials(z, i, n, highest[r]) : real(op[At::scale]));
      log_factor[r] = real(log_(double(factor[r]))) - highest[r];
    }
  }

  // The terms of an element; e becomes exp(logit - highest). The compiler drops what a caller does not use.
  DEVICE CountTerms<real> terms(int r, int j, real y, real& e) const {
    const real logit = z(first + r, j);
    e = exp_(logit - highest[r]);
    const real mu = e * factor[r], zeta = L::DROPOUT ? z(first + r, at_zeta + j) : real(0);
    real theta = 0, inverse = 0;
    if (L::DISPERSED) {
      theta = inverse_dispersion(BY_CELL ? z(first + r, n + j) : real(DISPERSION_PACE) * log_dispersion(0, j));
      inverse = real(1) / theta;
    }
    const CountTerms<real> zero = L::zero(mu, theta, inverse, zeta);
    return y != 0 ? L::count(y, mu, logit + log_factor[r], theta, zeta, zero) : zero;
  }
  DEVICE void write(int r, int j, const CountTerms<real>& t, real e) const {
    real d = t.by_mean * share[r];
    // Back through the softmax p = e / sum: d_j - p_j sum_k d_k.
    if (SOFTMAX) d -= e * part[r];
    z(first + r, j) = d;
    if (L::DROPOUT) z(first + r, at_zeta + j) = t.by_dropout * share[r];
    if (BY_CELL) z(first + r, n + j) = t.by_dispersion * share[r];
  }

  // Calls fn(r, j, y) for all elements. Zeros come first, spread over the threads. Then come the counts, because their
  // gamma functions would delay a whole warp. If `keeps`, adds what fn returns to `sums`.
  template <class Fn>
  DEVICE void visit(bool keeps, const Fn& fn) const {
    each_column(n, [&](int j) {
      real sum = 0;
      UNROLL
      for (int r = 0; r < GROUP; ++r) {
        if (first + r >= op.m) break;
        const bool none =
            source.csr ? !(found(j / BAND, first + r) >> j % BAND & 1u) : source.dense(op.row(first + r), j) == 0;
        if (none) sum += fn(r, j, real(0));
      }
      if (keeps) sums(block(), j) = sum;
    });
    UNROLL
    for (int r = 0; r < GROUP; ++r) {
      if (first + r >= op.m) break;
      if (keeps) sync();  // a column may be another thread's now
      const auto take = [&](int j, real y) {
        if (y == 0) return;
        const real more = fn(r, j, y);
        if (keeps) sums(block(), j) += more;
      };
      const int64_t row = op.row(first + r), end = source.csr ? source.end(row) : 0;
      if (source.csr)
        for (int64_t k = source.begin(row) + thread(); k < end; k += threads()) take(source.column(k), source.value(k));
      else
        each_column(n, [&](int j) { take(j, source.dense(row, j)); });
    }
  }
};

// COUNTS. `found` is there for CSR rows alone.
template <class L, bool SOFTMAX, bool BY_CELL>
KERNEL_OF(512, sizeof(real) == 4 ? 2 : 1)
counts(const Op op) {
  CountRows<L, SOFTMAX, BY_CELL> of(op);
  constexpr int GROUP = CountRows<L, SOFTMAX, BY_CELL>::GROUP;
  real loss[GROUP] = {}, slope[GROUP] = {};
  of.visit(of.BY_GENE && of.sums, [&](int r, int j, real y) {
    real e;
    const CountTerms<real> t = of.terms(r, j, y, e);
    loss[r] += t.loss;
    slope[r] += t.by_mean;
    if (!SOFTMAX && op.learn) of.write(r, j, t, e);
    return t.by_dispersion * (of.share[r] * real(DISPERSION_PACE));
  });
  UNROLL
  for (int r = 0; r < GROUP; ++r) {
    const int i = of.first + r;
    if (i >= op.m) break;
    loss[r] = block_sum(loss[r]);
    if (thread() == 0) op[op::COUNTS::rowloss](i, 0) = loss[r];
    // share * sum_k d_k / the softmax's sum, which is size_sum / factor.
    const double d = block_sum(double(slope[r])), total = double(op[op::COUNTS::size_sum](i, 0));
    of.part[r] = total > 0 ? real(d * double(of.share[r]) * double(of.factor[r]) / total) : real(0);
  }
  if (!op.learn || !SOFTMAX) return;
  of.visit(false, [&](int r, int j, real y) {
    real e;
    const CountTerms<real> t = of.terms(r, j, y, e);
    of.write(r, j, t, e);
    return real(0);
  });
}
