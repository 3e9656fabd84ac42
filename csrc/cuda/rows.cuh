// Ops that work on one row at a time: gathers, losses, penalties with a sum over a row.
//
// Promises: a block has a row. The width of the row alone decides the order of its sums, so a row's bits do not depend
// on other rows.

#pragma once

#include "steps.cuh"

// --- data in ---------------------------------------------------------------------------------------------------------

// GATHER of row i of the batch, which is row `row` of the source.
DEVICE void gather_row(const Op& op, int i, int64_t row) {
  using At = op::GATHER;
  const Matrix &out = op[At::out], &shift = op[At::shift];
  const Source& source = op.sources[op[At::source]];
  const auto moved = [&](real value, int j) { return shift ? value - shift(0, j) : value; };
  if (!source.csr) {
    each_column(out.cols, [&](int j) { out(i, j) = moved(source.dense(row, j), j); });
    return;
  }
  each_column(out.cols, [&](int j) { out(i, j) = moved(real(0), j); });
  sync();
  for (int64_t k = source.begin(row) + thread(); k < source.end(row); k += threads())
    out(i, source.column(k)) = moved(source.value(k), source.column(k));
}

KERNEL gather(const Op op) { gather_row(op, block(), op.row(block())); }

// The first launch of a step: member 0 begins the step, member 1 is GATHER.
KERNEL begin_gather(const GRID_CONSTANT Ops ops) {
  const Op &begin = ops.members[0], &op = ops.members[1];
  using At = launch::step;
  const Step* step = next_record(begin[At::records], begin[At::begun]);
  if (block() == 0) begin_terms(begin[At::records], begin[At::begun], begin[At::terms], begin.step);
  REQUIRE(block() < op.m);
  gather_row(op, block(), step->rows[block()]);
}

// --- softmax ---------------------------------------------------------------------------------------------------------

// The sum of exp(z - highest) over the first `cols` columns of row i; `highest` becomes the maximum of z there.
DEVICE real exponentials(const Matrix& z, int i, int cols, real& highest) {
  real most = z(i, 0), sum = 0;
  each_column(cols, [&](int j) { most = max_(z(i, j), most); });
  highest = block_max(most);
  each_column(cols, [&](int j) { sum += exp_(z(i, j) - highest); });
  return block_sum(sum);
}

// LINK with softmax
KERNEL activate_softmax(const Op op) {
  using At = op::LINK;
  const Matrix& z = op[At::z];
  const int i = block();
  real highest;
  const real sum = exponentials(z, i, z.cols, highest);
  each_column(z.cols, [&](int j) { z(i, j) = exp_(z(i, j) - highest) / sum; });
}

// MEANS
template <bool SOFTMAX>
KERNEL means(const Op op) {
  using At = op::MEANS;
  const Matrix &z = op[At::z], &size_sum = op[At::size_sum], &out = op[At::out];
  const int i = block();
  const real scale = real(op[At::scale]), total = size_sum ? size_sum(i, 0) : scale;
  real highest = 0, factor = total / scale;
  if (SOFTMAX) factor = total / exponentials(z, i, out.cols, highest);
  each_column(out.cols, [&](int j) { out(i, j) = exp_(z(i, j) - highest) * factor; });
}

// --- losses ----------------------------------------------------------------------------------------------------------
// LOSS. In training z becomes the derivative.

// BceSigmoid, with the logarithm that it leaves to its caller.
struct Logistic {
  DEVICE static real eval(real z, real y, real, real& dz) {
    real e;
    const real value = BceSigmoid::eval(z, y, e, dz);
    return value + log1p_(e);
  }
};

template <class L>
KERNEL loss(const Op op) {
  using At = op::LOSS;
  const Matrix &z = op[At::z], &target = op[At::target];
  const int i = block();
  const real share = row_share(op, op[At::weight], i), delta = real(op[At::delta]);
  real sum = 0;
  each_column(z.cols, [&](int j) {
    real dz;
    sum += L::eval(z(i, j), target(i, j), delta, dz);
    if (op.learn) z(i, j) = dz * share;
  });
  sum = block_sum(sum);
  if (thread() == 0) op[At::rowloss](i, 0) = sum;
}

// -sum_j y_j log p_j with p = softmax(z); dz = p sum_j y_j - y.
KERNEL loss_multinomial(const Op op) {
  using At = op::LOSS;
  const Matrix &z = op[At::z], &target = op[At::target];
  const int i = block();
  const real share = row_share(op, op[At::weight], i);
  real highest, counts = 0, inner = 0;
  const real sum = exponentials(z, i, z.cols, highest);
  each_column(z.cols, [&](int j) {
    const real y = target(i, j);
    counts += y;
    if (y != 0) inner += y * (z(i, j) - highest);  // a probability of zero costs nothing where nothing is counted
  });
  counts = block_sum(counts);
  inner = block_sum(inner);
  if (op.learn)
    each_column(z.cols, [&](int j) { z(i, j) = (exp_(z(i, j) - highest) / sum * counts - target(i, j)) * share; });
  if (thread() == 0) op[At::rowloss](i, 0) = counts * log_(sum) - inner;
}

// Any other loss behind a softmax, by the chain rule: dz = p (dp - sum_k p_k dp_k).
template <class L>
KERNEL loss_softmax(const Op op) {
  using At = op::LOSS;
  const Matrix &z = op[At::z], &target = op[At::target];
  const int i = block();
  const real share = row_share(op, op[At::weight], i), delta = real(op[At::delta]);
  real highest, value = 0, mean = 0;
  const real sum = exponentials(z, i, z.cols, highest);
  each_column(z.cols, [&](int j) {
    const real p = exp_(z(i, j) - highest) / sum;
    value += L::value(p, target(i, j), delta);
    mean += p * L::slope(p, target(i, j), delta);
  });
  value = block_sum(value);
  mean = block_sum(mean);
  if (op.learn)
    each_column(z.cols, [&](int j) {
      const real p = exp_(z(i, j) - highest) / sum;
      z(i, j) = p * (L::slope(p, target(i, j), delta) - mean) * share;
    });
  if (thread() == 0) op[At::rowloss](i, 0) = value;
}

// GAUSSIAN
template <class Act>
KERNEL gaussian(const Op op) {
  using At = op::GAUSSIAN;
  const Matrix &z = op[At::z], &target = op[At::target], &logvar = op[At::logvar], &rates = op[At::rates];
  const int i = block();
  const real share = row_share(op, op[At::weight], i);
  real sum = 0;
  each_column(z.cols, [&](int j) {
    const real grown = exp_(logvar(0, j)), variance = grown + real(VARIANCE_FLOOR);
    const real pre = z(i, j), p = Act::value(pre), d = p - target(i, j), square = d * d / variance;
    sum += square + log_(real(6.283185307179586) * variance);
    if (!op.learn) return;
    rates(i, j) = share * (real(1) - square) * (grown / (real(2) * variance));
    z(i, j) = share * d / variance * Act::slope(Act::FROM_PRE ? pre : p);
  });
  sum = block_sum(sum);
  if (thread() == 0) op[At::rowloss](i, 0) = sum / real(2);
}

// --- penalties -------------------------------------------------------------------------------------------------------

// ACTIVITY_L1
template <class Act>
KERNEL activity_l1(const Op op) {
  using At = op::ACTIVITY_L1;
  const Matrix &a = op[At::a], &saved = op[At::saved], &dz = op[At::dz];
  const int i = block();
  const real strength = real(op[At::strength]), scale = strength * row_share(op, op[At::weight], i);
  real sum = 0;
  each_column(a.cols, [&](int j) {
    sum += abs_(a(i, j));
    dz(i, j) += scale * (sign_(a(i, j)) * Act::slope(saved(i, j)));
  });
  sum = block_sum(sum);
  if (thread() == 0) op[At::rowpenalty](i, 0) = strength * sum;
}

// LATENT_KL
KERNEL latent_kl(const Op op) {
  using At = op::LATENT_KL;
  const Matrix &stats = op[At::stats], &noise = op[At::noise], &dz = op[At::dz], &dstats = op[At::dstats];
  const int i = block(), k = noise.cols;
  const real scale = real(op[At::strength] * op.step->kl_factor) * row_share(op, op[At::weight], i);
  real sum = 0;
  each_column(k, [&](int j) {
    const real mean = stats(i, j), log_variance = stats(i, k + j), grown = expm1_(log_variance);
    sum += mean * mean + (grown - log_variance);
    dstats(i, j) = dz(i, j) + scale * mean;
    dstats(i, k + j) = (dz(i, j) * noise(i, j) + scale * grown) / real(2);
  });
  sum = block_sum(sum);
  if (thread() == 0) op[At::rowkl](i, 0) = sum / real(2);
}

// SQUARED_NORM
KERNEL squared_norm(const Op op) {
  using At = op::SQUARED_NORM;
  const Matrix &x = op[At::x], &rowpenalty = op[At::rowpenalty];
  const int i = block();
  const real share = real(op[At::strength]) * row_share(op, op[At::weight], i);
  real sum = 0;
  each_column(x.cols, [&](int j) {
    sum += x(i, j) * x(i, j);
    x(i, j) *= real(2) * share;
  });
  sum = share * block_sum(sum);
  if (thread() == 0) rowpenalty(i, 0) = op[At::accumulate] ? rowpenalty(i, 0) + sum : sum;
}
