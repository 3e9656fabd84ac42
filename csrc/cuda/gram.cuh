// Squared error of a linear layer against CSR rows, and its gradients, without an array of batch x features.
//
// Let V = [W; b], g = [h 1], Q = V V' and p = y V'. The loss of a row y is g Q g' - 2 g p' + |y|^2. Its derivative by g
// is 2 (g Q - p). Its derivative by V, summed over rows, is G V - H' Y. H has the rows 2 s g with the row's share s,
// and G = H' g.
//
// Promises: Q, G, p and the loss are summed in double; short sums of Q, G and p are in the slots' type. If a row's loss
// is a small part of |y|^2, these sums cancel, and the loss is computed from the residuals instead. The weight is read
// in place. Its gradient is in memory only if an op asks for it or the layer is wide.

#pragma once

#include "sparse.cuh"

// Four numbers that are read at once.
struct alignas(4 * sizeof(real)) Quad {
  real of[4];
};

// The position of element (i, j) in the sums of a symmetric matrix, which are there for j <= i.
DEVICE int in_lower(int i, int j, int n) { return i < j ? j * n + i : i * n + j; }

// The part of V V' for `columns` columns of V: a row of `sums`, in double. Each part has blocks of 256 threads. There
// is one for each tile of 64 x 64 in the lower triangle of W W', and one for b.
KERNEL_OF(256, sizeof(real) == 4 ? 3 : 2) weight_gram_grains(const Op op) {
  using At = launch::weight_gram_grains;
  constexpr int TILE = NARROWS_GRAM_TILE, DEPTH = 32, SHORT = 128, EACH = 4, DOWN = TILE / EACH, PITCH = DOWN + 1;
  SHARED(Quad, upper, DEPTH * PITCH);
  SHARED(Quad, lower, DEPTH * PITCH);
  const Matrix &W = op[At::W], &b = op[At::b];
  const MatrixOf<double> sums = wide(op[At::sums]);
  const int n = W.rows + 1, strips = (W.rows + TILE - 1) / TILE, tiles = strips * (strips + 1) / 2;
  const int grain = block() / (tiles + 1), first = grain * op[At::columns];
  const int end = first + op[At::columns] < W.cols ? first + op[At::columns] : W.cols;
  int at = block() % (tiles + 1), down = 0;
  if (at == tiles) {
    for (int l = thread() / WARP; l < n; l += threads() / WARP) {
      double sum = 0;
      for (int c = first + thread() % WARP; c < end; c += WARP)
        sum += double(b(0, c)) * double(l < W.rows ? W(l, c) : b(0, c));
      sum = warp_sum(sum);
      if (thread() % WARP == 0) sums(grain, W.rows * n + l) = sum;
    }
    return;
  }
  while (at > down) at -= ++down;
  const int left = down * TILE, right = at * TILE, i = thread() / DOWN, j = thread() % DOWN;
  double total[EACH][EACH] = {};
  real sum[EACH][EACH] = {};
  for (int c = first; c < end; c += DEPTH) {
    for (int l = thread(); l < TILE * DEPTH; l += threads()) {
      // A warp has 4 rows of 8 columns: whole sectors of memory, and different banks.
      const int d = l % 8 + l / WARP % 4 * 8, o = l / 8 % 4 + l / (4 * WARP) * 4;
      const bool inside = c + d < end;
      upper[d * PITCH + o / 4].of[o % 4] = inside && left + o < W.rows ? W(left + o, c + d) : real(0);
      lower[d * PITCH + o / 4].of[o % 4] = inside && right + o < W.rows ? W(right + o, c + d) : real(0);
    }
    sync();
    for (int d = 0; d < DEPTH; ++d) {
      const Quad u = upper[d * PITCH + i], v = lower[d * PITCH + j];
      UNROLL
      for (int e = 0; e < EACH; ++e) {
        UNROLL
        for (int f = 0; f < EACH; ++f) sum[e][f] += u.of[e] * v.of[f];
      }
    }
    sync();
    if ((c - first) / DEPTH % (SHORT / DEPTH) == SHORT / DEPTH - 1 || c + DEPTH >= end) {
      UNROLL
      for (int e = 0; e < EACH; ++e) {
        UNROLL
        for (int f = 0; f < EACH; ++f) total[e][f] += double(sum[e][f]), sum[e][f] = 0;
      }
    }
  }
  UNROLL
  for (int e = 0; e < EACH; ++e) {
    UNROLL
    for (int f = 0; f < EACH; ++f) {
      const int a = left + i * EACH + e, o = right + j * EACH + f;
      if (a < W.rows && o <= a) sums(grain, a * n + o) = total[e][f];
    }
  }
}

// The sum of the parts, as high + low
KERNEL weight_gram(const Op op) {
  using At = launch::weight_gram;
  const MatrixOf<double> sums = wide(op[At::sums]);
  const Matrix &high = op[At::high], &low = op[At::low];
  each(high.rows, high.cols, [&](int i, int j) {
    double sum = 0;
    for (int g = 0; g < sums.rows; ++g) sum += sums(g, in_lower(i, j, high.cols));
    high(i, j) = real(sum);
    low(i, j) = real(sum - double(high(i, j)));
  });
}

// SPARSE_MSE. A block has a row.
template <class Act>
KERNEL sparse_mse(const Op op) {
  using At = op::SPARSE_MSE;
  constexpr int MOST = 256;
  SHARED(double, residual, MOST);
  const Matrix &h = op[At::h], &W = op[At::W], &high = op[At::high], &low = op[At::low], &out = op[At::out];
  const Matrix &b = op[At::b], &parts = op[launch::sparse_mse::parts];
  const MatrixOf<double> slope = wide(op[launch::sparse_mse::slope]);
  const Source& source = op.sources[op[At::source]];
  const int i = block(), inner = W.rows, n = inner + 1;
  const int64_t row = op.row(i), begin = source.begin(row), end = source.end(row);
  const auto g = [&](int l) { return l < inner ? h(i, l) : real(1); };
  const auto V = [&](int l, int c) { return l < inner ? W(l, c) : b(0, c); };

  double square = 0, by_b = 0, loss = 0;
  for (int64_t k = begin + thread(); k < end; k += threads()) {
    const double y = double(source.value(k));
    square += y * y;
    by_b += y * double(b(0, source.column(k)));
  }
  square = block_sum(square);
  by_b = block_sum(by_b);
  for (int l = thread(); l < n; l += threads()) {
    double p = 0, gQ = 0;
    if (l == inner)
      p = by_b;
    else
      for (int r = i; r < parts.rows; r += op.m) p += double(parts(r, l));
    for (int a = 0; a < n; ++a) gQ += double(g(a)) * (double(high(a, l)) + double(low(a, l)));
    loss += double(g(l)) * (gQ - 2 * p);
    slope(i, l) = 2 * (gQ - p);
  }
  loss = block_sum(loss) + square;

  if (loss < GRAM_GUARD * square) {  // all threads have the same sums
    loss = 0;
    for (int l = thread(); l < n; l += threads()) slope(i, l) = 0;
    for (int first = 0; first < W.cols; first += threads()) {
      const int c = first + thread();
      residual[thread()] = 0;
      sync();
      for (int64_t k = begin + thread(); k < end; k += threads()) {
        const int at = source.column(k) - first;
        if (at >= 0 && at < threads()) residual[at] = -double(source.value(k));
      }
      sync();
      if (c < W.cols) {
        double sum = residual[thread()];
        for (int l = 0; l < n; ++l) sum += double(g(l)) * double(V(l, c));
        residual[thread()] = sum;
        loss += sum * sum;
      }
      sync();
      for (int l = thread(); l < n; l += threads()) {
        double sum = 0;
        for (int k = 0; k < threads() && first + k < W.cols; ++k) sum += residual[k] * double(V(l, first + k));
        slope(i, l) += 2 * sum;
      }
      sync();
    }
    loss = block_sum(loss);
  }
  if (thread() == 0) op[At::rowloss](i, 0) = real(loss);
  if (!op.learn) return;
  const double share = double(row_share(op, op[At::weight], i));
  each_column(out.cols, [&](int j) {
    out(i, j) = real(share * slope(i, j)) * Act::slope(op[At::saved](i, j) * real(op[At::scale]));
  });
}

// ROW_GRAM. A block of 256 threads has a tile of 32 x 32.
KERNEL row_gram(const Op op) {
  using At = op::ROW_GRAM;
  constexpr int TILE = 32, PITCH = TILE + 1, EACH = 4, WARPS = TILE / EACH;
  SHARED(real, left, TILE * PITCH);
  SHARED(real, right, TILE * PITCH);
  const Matrix &h = op[At::h], &out = op[At::out];
  const int n = out.cols, strips = (n + TILE - 1) / TILE, a = block() / strips * TILE, b = block() % strips * TILE;
  const int warp = thread() / WARP, lane = thread() % WARP;
  const auto g = [&](int i, int l) { return l < h.cols ? h(i, l) : real(1); };
  double total[EACH] = {};
  for (int r = 0; r < op.m; r += TILE) {
    for (int l = thread(); l < TILE * TILE; l += threads()) {
      const int k = l / TILE, x = l % TILE;
      const bool inside = r + k < op.m;
      left[k * PITCH + x] =
          inside && a + x < n ? real(2) * row_share(op, op[At::weight], r + k) * g(r + k, a + x) : real(0);
      right[k * PITCH + x] = inside && b + x < n ? g(r + k, b + x) : real(0);
    }
    sync();
    real sum[EACH] = {};
    for (int k = 0; k < TILE; ++k) {
      const real y = right[k * PITCH + lane];
      UNROLL
      for (int e = 0; e < EACH; ++e) sum[e] += left[k * PITCH + warp + e * WARPS] * y;
    }
    UNROLL
    for (int e = 0; e < EACH; ++e) total[e] += double(sum[e]);
    sync();
  }
  UNROLL
  for (int e = 0; e < EACH; ++e)
    if (a + warp + e * WARPS < n && b + lane < n) out(a + warp + e * WARPS, b + lane) = real(total[e]);
}

// --- the gradient by V -----------------------------------------------------------------------------------------------
// To is what becomes of the gradient.

// Stores it
struct GramStore {
  static constexpr bool IN_PLACE = false;
  DEVICE static void weight(const Op& op, int l, int c, real g) { op[launch::GramStore::dW](l, c) = g; }
  DEVICE static void bias(const Op& op, int c, real g) { op[launch::GramStore::db](0, c) = g; }
};

// Updates W and b with it
template <class Rule>
struct GramDescend {
  using At = launch::GramDescend;
  static constexpr bool IN_PLACE = true;
  DEVICE static void weight(const Op& op, int l, int c, real g) {
    const Matrix &m = op[At::moment1], &v = op[At::moment2];
    Descend<Rule>::element(op, op[launch::sparse_mse_slopes::W](l, c), g, m(l, c), v ? &v(l, c) : nullptr);
  }
  DEVICE static void bias(const Op& op, int c, real g) {
    const Matrix &b = op[launch::sparse_mse_slopes::b], &m = op[At::b_moment1], &v = op[At::b_moment2];
    Rule::step(op, b(0, c), g, m(0, c), v ? &v(0, c) : nullptr);
  }
};

// Calls fn(l, c) for rows `from` to `to` of a band with `cols` columns; neighbouring threads have neighbouring columns.
template <class Fn>
DEVICE void rows_of_band(int from, int to, int cols, const Fn& fn) {
  UNROLL_BY_2
  for (int at = thread(); at < (to - from) * BAND; at += OUTER_THREADS)
    if (at % BAND < cols) fn(from + at / BAND, at % BAND);
}

// G V - H' Y. A block has a band of columns and all rows of V, so no other block reads what it changes. If W is updated
// in place and has more rows than a block takes at once, its gradient goes through `kept`.
template <int EACH, class To>
KERNEL_OF(OUTER_THREADS, sizeof(real) == 4 ? 3 : 2)
sparse_mse_slopes(const Op op) {
  using At = launch::sparse_mse_slopes;
  constexpr int STRIP = WARP * EACH, ACROSS = BAND + 1, WARPS = OUTER_THREADS / WARP, DEPTH = WARP;
  constexpr int FOR_ROWS = BAND * CHUNK_PITCH, FOR_STRIP = STRIP * ACROSS;
  static_assert(COLUMNS == 4, "a warp's columns are a Quad");
  SHARED(real, room, FOR_ROWS > FOR_STRIP ? FOR_ROWS : FOR_STRIP);
  SHARED(Entry, list, WARPS * CHUNK);
  SHARED(Quad, slice, DEPTH * WARPS);
  SHARED(real, of_b, (WARPS + 1) * BAND);
  const Matrix &h = op[At::h], &G = op[At::gram], &W = op[At::W], &b = op[At::b], &shift = op[At::shift];
  const Matrix& kept = op[At::kept];
  const int inner = h.cols, first = block() * BAND, cols = min_(W.cols - first, BAND), warp = thread() / WARP,
            lane = thread() % WARP;
  const auto V = [&](int l, int c) { return l < inner ? W(l, c) : shift ? b(0, c) + shift(0, c) : b(0, c); };

  for (int col = 0; col < inner; col += STRIP) {
    real sum[COLUMNS][EACH] = {}, last = 0;
    of_b[WARPS * BAND + warp * COLUMNS + lane % COLUMNS] = 0;
    sync_warp();
    band_sums<EACH>(
        op, op.sources[op[At::source]], as<int64_t>(op[At::starts]), block(), h, col, room, list,
        [&](int i, int, real y) { return real(2) * row_share(op, op[At::weight], i) * y; },
        [&](int g, real ys) {
          ys = warp_sum(ys);
          if (lane == 0) of_b[WARPS * BAND + warp * COLUMNS + g] += ys;
        },
        sum);
    UNROLL
    for (int g = 0; g < COLUMNS; ++g) {
      UNROLL
      for (int q = 0; q < EACH; ++q) sum[g][q] = -sum[g][q];
    }
    for (int a = 0; a <= inner; a += DEPTH) {
      const int depth = inner + 1 - a < DEPTH ? inner + 1 - a : DEPTH;
      for (int l = thread(); l < DEPTH * BAND; l += OUTER_THREADS) {
        const int d = l / BAND, c = l % BAND;
        slice[l / 4].of[l % 4] = d < depth && c < cols ? V(a + d, first + c) : real(0);
      }
      sync();
      UNROLL_BY_2
      for (int d = 0; d < depth; ++d) {
        const Quad v = slice[d * WARPS + warp];
        UNROLL
        for (int q = 0; q < EACH; ++q) {
          const int l = col + q * WARP + lane;
          const real by = l < inner ? G(a + d, l) : real(0);
          UNROLL
          for (int g = 0; g < COLUMNS; ++g) sum[g][q] += v.of[g] * by;
        }
      }
      // The row of b: a warp has every eighth product.
      for (int d = warp; d < depth; d += WARPS) last += G(a + d, inner) * slice[d * WARPS + lane / 4].of[lane % 4];
      sync();
    }
    of_b[warp * BAND + lane] = last;
    // Transposed, so that neighbouring threads have neighbouring elements in memory.
    UNROLL
    for (int g = 0; g < COLUMNS; ++g) {
      UNROLL
      for (int q = 0; q < EACH; ++q) room[(q * WARP + lane) * ACROSS + warp * COLUMNS + g] = sum[g][q];
    }
    sync();
    const bool at_once = !To::IN_PLACE || inner <= STRIP;
    rows_of_band(col, min_(inner, col + STRIP), cols, [&](int l, int c) {
      const real g = room[(l - col) * ACROSS + c];
      if (at_once)
        To::weight(op, l, first + c, g);
      else
        kept(l, first + c) = g;
    });
    sync();
  }
  if (To::IN_PLACE && inner > STRIP)
    rows_of_band(0, inner, cols, [&](int l, int c) { To::weight(op, l, first + c, kept(l, first + c)); });
  rows_of_band(inner, inner + 1, cols, [&](int, int c) {
    real g = -of_b[WARPS * BAND + c];
    for (int w = 0; w < WARPS; ++w) g += of_b[w * BAND + c];
    To::bias(op, first + c, g);
  });
}
