// Squared error of a linear layer against CSR rows, and its gradients: no array of batch x features.
//
// With V = [W; b] and g = [h 1], the loss of a row y is g Q g' - 2 g p' + |y|^2, where Q = V V' and p = y V'; by g it
// is 2 (g Q - p), by V, summed over rows, G V - H' Y, where H has rows 2 s g, G = H' g, and s is the row's share.
//
// Promises: Q, G, p and the loss are summed in double (short sums of Q and p in the slots' type); a row whose loss is a
// small part of |y|^2, where these sums cancel, is taken from its residuals. V' is there once more, turned, so that the
// threads of a warp read side by side what belongs to one column.

#pragma once

#include "sparse.cuh"

// Slots: W, b, and V' (features x inner + 1)
KERNEL turn_weight(const Op op) {
  SHARED(real, tile, 32 * 33);
  const Matrix &W = op.slots[0], &b = op.slots[1], &turned = op.slots[2];
  const int strips = (turned.cols + 31) / 32, c = block() / strips * 32, l = block() % strips * 32;
  const int x = thread() % 32, y = thread() / 32, step = threads() / 32;
  for (int i = y; i < 32; i += step)
    if (l + i < turned.cols && c + x < W.cols) tile[i * 33 + x] = l + i < W.rows ? W(l + i, c + x) : b(0, c + x);
  sync();
  for (int i = y; i < 32; i += step)
    if (c + i < W.cols && l + x < turned.cols) turned(c + i, l + x) = tile[x * 33 + i];
}

// The part of V V' that ints[0] columns of V make: V', and a row of sums in double for each such grain. Blocks of 256
// threads, a tile of 16 x 16 each.
KERNEL weight_gram_grains(const Op op) {
  constexpr int SHORT = 128;
  SHARED(real, upper, 32 * 17);
  SHARED(real, lower, 32 * 17);
  const Matrix& V = op.slots[0];
  const MatrixOf<double> sums = wide(op.slots[1]);
  const int n = V.cols, strips = (n + 15) / 16, tile = block() % (strips * strips), grain = block() / (strips * strips);
  const int a = tile / strips * 16, b = tile % strips * 16, i = thread() / 16, j = thread() % 16;
  const int first = grain * op.ints[0], end = first + op.ints[0] < V.rows ? first + op.ints[0] : V.rows;
  double total = 0;
  real sum = 0;
  for (int c = first; c < end; c += 32) {
    for (int l = thread(); l < 32 * 16; l += threads()) {
      const int k = l / 16, x = l % 16;
      upper[k * 17 + x] = c + k < end && a + x < n ? V(c + k, a + x) : real(0);
      lower[k * 17 + x] = c + k < end && b + x < n ? V(c + k, b + x) : real(0);
    }
    sync();
    for (int k = 0; k < 32; ++k) sum += upper[k * 17 + i] * lower[k * 17 + j];
    sync();
    if ((c - first) / 32 % (SHORT / 32) == SHORT / 32 - 1) total += double(sum), sum = 0;
  }
  if (a + i < n && b + j < n) sums(grain, (a + i) * n + b + j) = total + double(sum);
}

// The sum of the grains, in two parts: sums, high, low
KERNEL weight_gram(const Op op) {
  const MatrixOf<double> sums = wide(op.slots[0]);
  const Matrix &high = op.slots[1], &low = op.slots[2];
  each(high.rows, high.cols, [&](int i, int j) {
    double sum = 0;
    for (int g = 0; g < sums.rows; ++g) sum += sums(g, i * high.cols + j);
    high(i, j) = real(sum);
    low(i, j) = real(sum - double(high(i, j)));
  });
}

// SPARSE_MSE: h, V', high, low, saved, weight, rowloss, out, and 2 (g Q - p) in double; ints: source; floats: scale.
// A block has a row.
template <class Act>
KERNEL sparse_mse(const Op op) {
  constexpr int MOST = 128, SHORT = 64;
  SHARED(real, value, MOST);
  SHARED(int, column, MOST);
  SHARED(double, residual, MOST);
  const Matrix &h = op.slots[0], &V = op.slots[1], &high = op.slots[2], &low = op.slots[3], &out = op.slots[7];
  const MatrixOf<double> slope = wide(op.slots[8]);
  const Source& source = op.sources[op.ints[0]];
  const int i = block(), n = V.cols;
  const int64_t row = op.row(i), begin = source.begin(row), end = source.end(row);
  const auto g = [&](int l) { return l < h.cols ? h(i, l) : real(1); };

  double square = 0, loss = 0;
  for (int64_t k = begin + thread(); k < end; k += threads())
    square += double(source.value(k)) * double(source.value(k));
  square = block_sum(square);
  for (int first = 0; first < n; first += threads()) {
    const int l = first + thread();
    double p = 0, gQ = 0;
    for (int64_t k = begin; k < end; k += threads()) {
      if (k + thread() < end)
        value[thread()] = source.value(k + thread()), column[thread()] = source.column(k + thread());
      sync();
      const int count = end - k < threads() ? int(end - k) : threads();
      if (l < n)
        for (int c = 0; c < count; c += SHORT) {
          real sum = 0;
          for (int at = c; at < count && at < c + SHORT; ++at) sum += value[at] * V(column[at], l);
          p += double(sum);
        }
      sync();
    }
    if (l >= n) continue;
    for (int a = 0; a < n; ++a) gQ += double(g(a)) * (double(high(a, l)) + double(low(a, l)));
    loss += double(g(l)) * (gQ - 2 * p);
    slope(i, l) = 2 * (gQ - p);
  }
  loss = block_sum(loss) + square;

  if (loss < GRAM_GUARD * square) {  // all threads have the same sums
    loss = 0;
    for (int l = thread(); l < n; l += threads()) slope(i, l) = 0;
    for (int first = 0; first < V.rows; first += threads()) {
      const int c = first + thread();
      residual[thread()] = 0;
      sync();
      for (int64_t k = source.first(row, first) + thread(); k < end && source.column(k) < first + threads();
           k += threads())
        residual[source.column(k) - first] = -double(source.value(k));
      sync();
      if (c < V.rows) {
        double sum = residual[thread()];
        for (int l = 0; l < n; ++l) sum += double(g(l)) * double(V(c, l));
        residual[thread()] = sum;
        loss += sum * sum;
      }
      sync();
      for (int l = thread(); l < n; l += threads()) {
        double sum = 0;
        for (int k = 0; k < threads() && first + k < V.rows; ++k) sum += residual[k] * double(V(first + k, l));
        slope(i, l) += 2 * sum;
      }
      sync();
    }
    loss = block_sum(loss);
  }
  if (thread() == 0) op.slots[6](i, 0) = real(loss);
  if (!op.learn) return;
  const double share = double(row_share(op, op.slots[5], i));
  each_column(out.cols, [&](int j) {
    out(i, j) = real(share * slope(i, j)) * Act::slope(op.slots[4](i, j) * real(op.floats[0]));
  });
}

// The rows 2 s g: h, weight, H
KERNEL gram_rows(const Op op) {
  const Matrix &h = op.slots[0], &H = op.slots[2];
  each(H.rows, H.cols,
       [&](int i, int j) { H(i, j) = real(2) * row_share(op, op.slots[1], i) * (j < h.cols ? h(i, j) : real(1)); });
}

// ROW_GRAM: h, weight, out
KERNEL row_gram(const Op op) {
  const Matrix &h = op.slots[0], &out = op.slots[2];
  each(out.rows, out.cols, [&](int a, int b) {
    double sum = 0;
    for (int i = 0; i < h.rows; ++i) {
      const double g = a < h.cols ? double(h(i, a)) : 1.0, other = b < h.cols ? double(h(i, b)) : 1.0;
      sum += double(row_share(op, op.slots[1], i)) * g * other;
    }
    out(a, b) = real(2 * sum);
  });
}

// The epilogue of G V: slots from 2 on: V', (H' Y)', dW, db. Slot 1, the right factor, is V' itself.
struct GramSlope {
  DEVICE static void apply(const Op& op, int i, int j, real sum) {
    const Matrix &HY = op.slots[2], &dW = op.slots[3], &db = op.slots[4];
    const real g = sum - HY(j, i);
    if (i < dW.rows)
      dW(i, j) = g;
    else
      db(0, j) = g;
  }
};
