// Sums over rows, and what uses them: penalties of weights, update rules.
//
// Promises: there are no atomics. Shapes alone cut the sums, and the parts are added in a fixed order: over many rows
// in two passes. The thread that has a gradient updates its parameter and its optimiser state.

#pragma once

#include "scalar.h"

// --- update rules ----------------------------------------------------------------------------------------------------
// Their numbers are `Rule` in launches.def.

// SGD with momentum (Polyak, 1964).
struct Sgd {
  DEVICE static void step(const Op& op, real& w, real g, real& m, real*) {
    const double momentum = op.step->momentum < 0 ? op[launch::Rule::beta_1] : op.step->momentum;
    m = real(momentum) * m - real(op.step->learning_rate) * g;
    w += m;
  }
};

// Adam (Kingma and Ba, 2015). Two factors hold the bias corrections.
struct Adam {
  DEVICE static void step(const Op& op, real& w, real g, real& m, real* v) {
    using At = launch::Rule;
    m = real(op[At::beta_1]) * m + real(1 - op[At::beta_1]) * g;
    *v = real(op[At::beta_2]) * *v + real(1 - op[At::beta_2]) * (g * g);
    w -= real(op.step->adam_rate) * m / (sqrt_(*v) * real(op.step->adam_root) + real(op[At::epsilon]));
  }
};

// The derivative of a weight's penalty, (l2 / 2 w**2 + l1 |w|) / m.
DEVICE real decay_of(const Op& op, real w, double l2, double l1) {
  return real(l2 / op.m) * w + real(l1 / op.m) * sign_(w);
}

// Updates an element of a weight with its gradient: decays, then the rule.
template <class Rule>
struct Descend {
  DEVICE static void apply(const Op& op, int i, int j, real g) {
    using At = launch::Descend;
    const Matrix &dW = op[At::dW], &W = op[At::W], &m = op[At::moment1], &v = op[At::moment2],
                 &colrate = op[At::colrate];
    if (dW) g += dW(i, j);
    if (colrate) g += colrate(0, j) * W(i, j);
    element(op, W(i, j), g, m(i, j), v ? &v(i, j) : nullptr);
  }
  // Needs the operands Rule and Decays alone.
  DEVICE static void element(const Op& op, real& W, real g, real& m, real* v) {
    using At = launch::Decays;
    real w = W;
    if (op[At::penalised]) g += decay_of(op, w, op[At::l2], op[At::l1]);
    if (op[At::rate] != 0) w *= real(1 - op.step->learning_rate * op[At::rate]);
    Rule::step(op, w, g, m, v);
    W = w;
  }
};

// Stores the gradient times a factor.
struct Store {
  DEVICE static void apply(const Op& op, int i, int j, real g) {
    using At = launch::Store;
    const Matrix& out = op[At::out];
    g *= real(op[At::factor]);
    out(i, j) = op[At::accumulate] ? out(i, j) + g : g;
  }
};

// UPDATE of the whole regions, each one row
template <class Rule>
KERNEL update(const Op op) {
  using At = launch::update;
  const Matrix &g = op[At::gradient], &partial = op[At::partial], &W = op[At::W], &m = op[At::moment1],
               &v = op[At::moment2];
  double sum = 0;
  each_column(partial.cols, [&](int j) { sum += double(partial(0, j)); });
  const double scale = op[At::clip] / (sqrt_(block_sum(sum)) + 1e-6);
  each(1, W.cols, [&](int, int j) {
    Rule::step(op, W(0, j), g(0, j) * real(scale < 1 ? scale : 1), m(0, j), v ? &v(0, j) : nullptr);
  });
}

// DECAY
KERNEL decay(const Op op) {
  using At = op::DECAY;
  const Matrix &dW = op[At::dW], &W = op[At::W];
  each(W.rows, W.cols, [&](int i, int j) { dW(i, j) += decay_of(op, W(i, j), op[At::l2], op[At::l1]); });
}

// For launches that can be members of a `group`: threads, and blocks that a multiprocessor should hold.
struct Whole {
  static constexpr int THREADS = 256, BLOCKS = 2;
};

// The penalties of a weight, cell by cell. A warp has a cell.
struct Penalties : Whole {
  DEVICE static void run(const Op& op, int b) {
    using At = launch::penalties;
    const Matrix &W = op[At::W], &penalty = op[At::penalty];
    const int at = b * (threads() / WARP) + thread() / WARP, lane = thread() % WARP;
    const int row = at / penalty.cols, col = at % penalty.cols;
    const real l2 = real(op[At::l2] / op.m), l1 = real(op[At::l1] / op.m);
    real sum = 0;
    for (int i = lane / LANES; i < CELL_ROWS; i += WARP / LANES) {
      const int r = row * CELL_ROWS + i, c = col * LANES + lane % LANES;
      if (r >= W.rows || c >= W.cols) continue;
      const real w = W(r, c);
      sum += real(0.5) * l2 * w * w + l1 * abs_(w);
    }
    sum = warp_sum(sum);
    if (lane == 0 && row < penalty.rows) penalty(row, col) = sum;
  }
};
KERNEL penalties(const Op op) { Penalties::run(op, block()); }

// --- sums over rows --------------------------------------------------------------------------------------------------

// A block has COLS columns and some rows. Each group of COLS threads adds a part of the rows. Calls done(j, sum) once
// for each column. Each place in the code must have its own call, because each instance has its own shared memory.
template <int COLS = WARP, class Value, class Done>
DEVICE void column_sums(int first_row, int end_row, int first_col, int cols, const Value& value, const Done& done) {
  SHARED(real, part, 32 * WARP);
  const int j = first_col + thread() % COLS, w = thread() / COLS, ways = threads() / COLS;
  real sum = 0;
  if (j < cols) {
    UNROLL_BY_8
    for (int i = first_row + w; i < end_row; i += ways) sum += value(i, j);
  }
  part[thread()] = sum;
  sync();
  if (w == 0 && j < cols) {
    for (int k = 1; k < ways; ++k) sum += part[k * COLS + thread()];
    done(j, sum);
  }
}

// The first pass
KERNEL colsum_grains(const Op op) {
  using At = launch::colsum_grains;
  const Matrix &x = op[At::x], &weight = op[At::weight], &partial = op[At::partial];
  const int strips = (x.cols + WARP - 1) / WARP, grain = block() / strips, first = grain * op[At::rows];
  const int end = first + op[At::rows] < x.rows ? first + op[At::rows] : x.rows;
  column_sums(
      first, end, block() % strips * WARP, x.cols,
      [&](int i, int j) { return weight ? x(i, j) * weight(i, 0) : x(i, j); },
      [&](int j, real sum) { partial(grain, j) = sum; });
}

// The last pass: over x, or over the sums of the first pass
template <class Finish>
struct ColSum : Whole {
  DEVICE static void run(const Op& op, int b) {
    using At = launch::colsum;
    const Matrix &x = op[At::x], &weight = op[At::weight];
    column_sums(
        0, x.rows, b * WARP, x.cols, [&](int i, int j) { return weight ? x(i, j) * weight(i, 0) : x(i, j); },
        [&](int j, real sum) { Finish::apply(op, 0, j, sum); });
  }
};
template <class Finish>
KERNEL colsum(const Op op) {
  ColSum<Finish>::run(op, block());
}

// GRAIN_SUM and GRAIN_UPDATE
template <class Finish>
struct GrainSum : Whole {
  DEVICE static void run(const Op& op, int b) {
    using At = launch::grain_sum;
    const Matrix& partial = op[At::partial];
    each_of(b, op[At::rows], op[At::cols], [&](int i, int j) {
      int r = i, c = j;
      if (op[At::form] == 1 || (op[At::form] == 0 && i > j)) r = j, c = i;
      real sum = 0;
      UNROLL_BY_8
      for (int g = 0; g < partial.rows; ++g) sum += partial(g, op[At::column] + r * op[At::ld] + c);
      Finish::apply(op, i, j, sum);
    });
  }
};
template <class Finish>
KERNEL grain_sum(const Op op) {
  GrainSum<Finish>::run(op, block());
}

// --- what a step reports ---------------------------------------------------------------------------------------------

// REDUCE by one block. Only as many threads work as the smallest block has, so the size of the block does not change
// the order of the sum.
DEVICE void reduce_term(const Op& op) {
  using At = op::REDUCE;
  constexpr int WORKING = 64;
  const Matrix &x = op[At::x], &weight = op[At::weight], &terms = op[At::terms];
  const int size = thread() < WORKING ? x.rows * x.cols : 0;
  double sum = 0;
  UNROLL_BY_8
  for (int at = thread(); at < size; at += WORKING) {
    const int i = at / x.cols;
    sum += double(x(i, at - i * x.cols)) * (weight ? double(weight(i, 0)) : 1.0);
  }
  sum = block_sum(sum);
  if (thread() == 0) terms(0, op[At::index]) += real(op[At::mean] ? sum / op.m : sum);
}
KERNEL reduce(const Op op) { reduce_term(op); }

// SQNORM. A block has a grain.
KERNEL sqnorm(const Op op) {
  using At = launch::sqnorm;
  const Matrix &g = op[At::gradient], &partial = op[At::partial];
  const int end = (block() + 1) * GRAIN < g.cols ? (block() + 1) * GRAIN : g.cols;
  double sum = 0;
  for (int j = block() * GRAIN + thread(); j < end; j += threads()) sum += double(g(0, j)) * double(g(0, j));
  sum = block_sum(sum);
  if (thread() == 0) partial(0, block()) = real(sum);
}
