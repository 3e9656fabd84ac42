// Products with CSR rows, which are read in place, a band of 32 columns at a time.
//
// Promises: a sum skips zeros and keeps the order of the other terms. Masking noise is drawn for stored elements alone,
// from the counters of the dense op. One launch per step finds where each band of each row begins, so products do not
// search. A band of the weight is read once for many rows.

#pragma once

#include "gemm.cuh"
#include "noise.cuh"
#include "values.cuh"

// Columns that are taken together: one for each bit of a word.
constexpr int BAND = NARROWS_BAND;

// Once for a source and a step, for the rows of the batch. `starts` (64-bit numbers) has a column for each row: where
// its stored elements of each band begin, and their end. `found` has a word for each band and row: a bit for each
// column that is not zero. Dense rows have size_sum alone. A block has a row.
KERNEL scan_rows(const Op op) {
  using At = launch::scan_rows;
  const Source& x = op.sources[op[At::source]];
  const Matrix& size_sum = op[At::size_sum];
  const MatrixOf<int64_t> starts = as<int64_t>(op[At::starts]);
  const MatrixOf<uint32_t> found = as<uint32_t>(op[At::found]);
  const int i = block();
  const int64_t row = op.row(i);
  double sum = 0;
  if (!x.csr) {
    each_column(x.cols, [&](int j) { sum += double(x.dense(row, j)); });
  } else {
    const int64_t begin = x.begin(row), end = x.end(row);
    for (int64_t k = begin + thread(); k < end; k += threads()) {
      sum += double(x.value(k));
      // All bands begin here that are not behind an earlier element.
      if (starts)
        for (int b = k == begin ? 0 : x.column(k - 1) / BAND + 1; b <= x.column(k) / BAND; ++b) starts(b, i) = k;
    }
    if (starts)
      for (int b = (begin == end ? 0 : x.column(end - 1) / BAND + 1) + thread(); b < starts.rows; b += threads())
        starts(b, i) = end;
    if (found) {
      sync();
      for (int b = thread(); b < found.rows; b += threads()) {
        uint32_t bits = 0;
        for (int64_t k = starts(b, i); k < starts(b + 1, i); ++k)
          if (x.value(k) != 0) bits |= 1u << x.column(k) % BAND;
        found(b, i) = bits;
      }
    }
  }
  sum = block_sum(sum);
  if (size_sum && thread() == 0) size_sum(i, 0) = real(sum);
}

// A stored element of row i of the batch as the network sees it: normalised if there is a size_sum, then masked.
template <class At>
DEVICE real seen(const Op& op, int i, int column, real value) {
  const Matrix& size_sum = op[At::size_sum];
  if (size_sum) value = log1p_(value * size_factor(real(op[At::scale]), size_sum(i, 0)));
  if (op[At::level] > 0 && op.learn) {
    uint32_t cells[4];
    draw_cells(op, op[At::stream], i, column / 4, cells);
    const int w = column % 4;  // no index, which would put the cells into memory
    const uint32_t cell = w == 0 ? cells[0] : w == 1 ? cells[1] : w == 2 ? cells[2] : cells[3];
    if (cell < philox_threshold(op[At::level])) value = 0;
  }
  return value;
}

// --- rows times a weight ---------------------------------------------------------------------------------------------

// X W, or X W' if `turned`, in parts that a later launch adds. The parts of a row are m rows apart. A block of 512
// threads has one part for TILE rows and 32 EACH outputs. A warp has some of the rows, and a lane every 32nd output.
template <int EACH>
KERNEL_OF(NARROWS_SPARSE_THREADS, sizeof(real) == 4 ? 2 : 1)
sparse_parts(const Op op) {
  using At = launch::sparse_parts;
  constexpr int TILE = NARROWS_SPARSE_ROWS, THREADS = NARROWS_SPARSE_THREADS, STRIP = WARP * EACH, PITCH = STRIP + 1;
  constexpr int ROWS = sizeof(real) == 4 ? TILE : TILE / 2, SHARE = THREADS / ROWS, OF_WARP = ROWS / (THREADS / WARP);
  SHARED(real, weight, BAND * PITCH);
  SHARED(real, value, ROWS * BAND);
  SHARED(uint8_t, column, ROWS* BAND);
  SHARED(int, count, ROWS);
  const Matrix &W = op[At::W], &parts = op[At::parts];
  const MatrixOf<int64_t> starts = as<int64_t>(op[At::starts]);
  const Source& x = op.sources[op[At::source]];
  const bool turned = op[At::turned];
  const int cols = parts.cols, n = turned ? W.cols : W.rows, tiles = (op.m + TILE - 1) / TILE;
  const int part = block() / tiles % (parts.rows / op.m), first = part * op[At::width];
  const int end = first + op[At::width] < n ? first + op[At::width] : n,
            col = block() / tiles / (parts.rows / op.m) * STRIP;
  const int warp = thread() / WARP, lane = thread() % WARP, slot = thread() / SHARE;

  // What the next band needs, loaded while this band is multiplied: the weight, and the first element of a row that is
  // this thread's. Neighbours read along a row of W, then along other rows `step` apart.
  constexpr int HELD = BAND * STRIP / THREADS;
  const int wide = turned ? BAND : STRIP, down = thread() / wide, across = thread() % wide, step = THREADS / wide;
  const int at = turned ? across * PITCH + down : down * PITCH + across, at_step = turned ? step : step * PITCH;
  real held[HELD], ahead = 0;
  int after = 0;
  const auto load = [&](int c) {
    const int row = (turned ? col : c) + down, column = (turned ? c : col) + across;
    UNROLL
    for (int e = 0; e < HELD; ++e)
      held[e] = row + e * step < W.rows && column < W.cols ? W(row + e * step, column) : real(0);
  };

  for (int half = 0; half < TILE; half += ROWS) {
    const int top = block() % tiles * TILE + half, i = top + slot, mine = thread() % SHARE;
    const int64_t last = i < op.m ? starts((end + BAND - 1) / BAND, i) : 0;
    real sum[OF_WARP][EACH] = {};
    int64_t begin = i < op.m ? starts(first / BAND, i) : 0, stop = i < op.m ? starts(first / BAND + 1, i) : 0;
    const auto element = [&] {
      if (begin + mine < last) after = x.column(begin + mine), ahead = x.value(begin + mine);
    };
    load(first);
    element();
    for (int c = first; c < end; c += BAND) {
      UNROLL
      for (int e = 0; e < HELD; ++e) weight[at + e * at_step] = held[e];
      const auto put = [&](int64_t k, int j, real y) {
        const int to = slot * BAND + int(k - begin);
        column[to] = uint8_t(j - c);
        value[to] = seen<At>(op, i, j, y);
      };
      if (begin + mine < stop) put(begin + mine, after, ahead);
      for (int64_t k = begin + mine + SHARE; k < stop; k += SHARE) put(k, x.column(k), x.value(k));
      if (mine == 0) count[slot] = int(stop - begin);
      sync();
      if (c + BAND < end) {
        begin = stop;
        if (i < op.m) stop = starts(c / BAND + 2, i);
        load(c + BAND);
        element();
      }
      UNROLL
      for (int r = 0; r < OF_WARP; ++r) {
        const int from = (warp * OF_WARP + r) * BAND, found = count[warp * OF_WARP + r];
        UNROLL_BY_2
        for (int l = from; l < from + found; ++l) {
          const real v = value[l];
          const int from_weight = column[l] * PITCH + lane;
          UNROLL
          for (int q = 0; q < EACH; ++q) sum[r][q] += v * weight[from_weight + q * WARP];
        }
      }
      sync();
    }
    UNROLL
    for (int r = 0; r < OF_WARP; ++r) {
      UNROLL
      for (int q = 0; q < EACH; ++q) {
        const int row = top + warp * OF_WARP + r, j = col + q * WARP + lane;
        if (row < op.m && j < cols) parts(part * op.m + row, j) = sum[r][q];
      }
    }
  }
}

// SPARSE_DENSE: adds the parts. `moved` is shift W.
template <class Act>
KERNEL sparse_dense(const Op op) {
  using At = launch::sparse_dense;
  const Matrix &parts = op[At::parts], &moved = op[At::moved];
  each(op.m, parts.cols, [&](int i, int j) {
    real sum = 0;
    for (int row = i; row < parts.rows; row += op.m) sum += parts(row, j);
    Activate<Act>::apply(op, i, j, moved ? sum - moved(0, j) : sum);
  });
}

// --- sums over rows, column by column --------------------------------------------------------------------------------

// A warp has COLUMNS of a band. Rows are taken CHUNK at a time.
constexpr int OUTER_THREADS = 256, COLUMNS = BAND / (OUTER_THREADS / WARP);
constexpr int CHUNK = sizeof(real) == 4 ? 4 * WARP : WARP, CHUNK_PITCH = CHUNK + 1;

// A value that is not zero, and its row of the batch.
struct Entry {
  real value;
  int row;
};

// Adds products to sum[g][q], in the order of the rows that have the column: of column COLUMNS warp + g of a band, and
// column col + 32 q + lane of d. value(i, column, x) turns a stored element into a factor. also(g, sum) is
// called by whole warps for each chunk of rows, with the sum of each lane's values. For blocks of OUTER_THREADS. `tile`
// has room for a chunk of the band, `list` for CHUNK entries of each warp.
template <int EACH, class Tile, class List, class Value, class Also>
DEVICE void band_sums(const Op& op, const Source& x, const MatrixOf<int64_t>& starts, int band, const Matrix& d,
                      int col, Tile& tile, List& list, const Value& value, const Also& also,
                      real (&sum)[COLUMNS][EACH]) {
  constexpr int AHEAD = 4;  // loads on their way at once
  const int warp = thread() / WARP, lane = thread() % WARP, mine = warp * CHUNK;
  bool inside[EACH];
  UNROLL
  for (int q = 0; q < EACH; ++q) inside[q] = col + q * WARP + lane < d.cols;
  for (int r = 0; r < op.m; r += CHUNK) {
    for (int l = thread(); l < BAND * CHUNK_PITCH; l += OUTER_THREADS) tile[l] = 0;
    sync();
    const int i = r + thread() % CHUNK;
    if (i < op.m)
      for (int64_t k = starts(band, i) + thread() / CHUNK; k < starts(band + 1, i); k += OUTER_THREADS / CHUNK)
        tile[(x.column(k) - band * BAND) * CHUNK_PITCH + (i - r)] = value(i, x.column(k), x.value(k));
    sync();
    UNROLL
    for (int g = 0; g < COLUMNS; ++g) {
      int n = 0;
      real total = 0;
      UNROLL
      for (int w = 0; w < CHUNK; w += WARP) {
        const real v = tile[(warp * COLUMNS + g) * CHUNK_PITCH + w + lane];
        const uint32_t found = ballot(v != 0);
        if (v != 0) list[mine + n + ones(found & ((1u << lane) - 1))] = {v, r + w + lane};
        n += ones(found);
        total += v;
      }
      also(g, total);
      sync_warp();
      for (int e = 0; e < n; e += AHEAD) {
        real v[AHEAD], by[AHEAD][EACH];
        UNROLL
        for (int u = 0; u < AHEAD; ++u) {
          const Entry entry = list[mine + min_(e + u, n - 1)];
          v[u] = e + u < n ? entry.value : real(0);
          UNROLL
          for (int q = 0; q < EACH; ++q) by[u][q] = inside[q] ? d(entry.row, col + q * WARP + lane) : real(0);
        }
        UNROLL
        for (int u = 0; u < AHEAD; ++u) {
          UNROLL
          for (int q = 0; q < EACH; ++q) sum[g][q] += v[u] * by[u][q];
        }
      }
      sync_warp();
    }
    sync();
  }
}

template <class Epilogue>
constexpr int WITH_BIAS = 0;
template <class To>
constexpr int WITH_BIAS<WithBias<To>> = 1;

// The gradient of a weight, X' dz. A block has a band of X and 32 EACH columns of dz; neighbouring blocks read the same
// columns. With bias, other blocks add the rows of dz. Shifted rows subtract shift times the column sums of dz.
template <int EACH, class Epilogue>
KERNEL_OF(OUTER_THREADS, sizeof(real) == 4 ? 3 : 2)
sparse_outer(const Op op) {
  using At = launch::sparse_outer;
  constexpr int STRIP = WARP * EACH, WARPS = OUTER_THREADS / WARP, BIAS = WITH_BIAS<Epilogue>;
  SHARED(real, tile, BAND * CHUNK_PITCH);
  SHARED(Entry, list, WARPS * CHUNK);
  const Matrix& dz = op[At::dz];
  const int columns = op[At::columns], blocks = (columns + BAND - 1) / BAND + BIAS;
  const int band = block() % blocks - BIAS, col = block() / blocks * STRIP;
  const int warp = thread() / WARP, lane = thread() % WARP;
  if (band < 0) {
    static_assert(WARPS * STRIP <= BAND * CHUNK_PITCH, "room for the sums of the warps");
    real sum[EACH] = {};
    for (int i = warp; i < op.m; i += WARPS) {
      UNROLL
      for (int q = 0; q < EACH; ++q) {
        const int j = col + q * WARP + lane;
        sum[q] += j < dz.cols ? dz(i, j) : real(0);
      }
    }
    UNROLL
    for (int q = 0; q < EACH; ++q) tile[warp * STRIP + q * WARP + lane] = sum[q];
    sync();
    for (int l = thread(); l < min_(STRIP, dz.cols - col); l += OUTER_THREADS) {
      real total = tile[l];
      for (int w = 1; w < WARPS; ++w) total += tile[w * STRIP + l];
      Epilogue::apply(op, columns, col + l, total);
    }
    return;
  }
  real sum[COLUMNS][EACH] = {};
  band_sums<EACH>(
      op, op.sources[op[At::source]], as<int64_t>(op[At::starts]), band, dz, col, tile, list,
      [&](int i, int column, real x) { return seen<At>(op, i, column, x); }, [](int, real) {}, sum);
  const Matrix& shift = op[launch::Shifted::shift];
  UNROLL
  for (int g = 0; g < COLUMNS; ++g) {
    const int c = band * BAND + warp * COLUMNS + g;
    if (c >= columns) break;
    UNROLL
    for (int q = 0; q < EACH; ++q) {
      const int j = col + q * WARP + lane;
      if (j < dz.cols)
        Epilogue::apply(op, c, j,
                        !BIAS && shift ? sum[g][q] - shift(0, c) * op[launch::Shifted::sums](0, j) : sum[g][q]);
    }
  }
}
