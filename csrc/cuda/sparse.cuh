// Products with sparse rows, which are walked where they lie.
//
// Promises: a sum leaves out the steps with a zero and keeps the order of the others; nothing is sorted or copied;
// masking noise is drawn at the stored elements alone, from the counters of the dense op.

#pragma once

#include "gemm.cuh"
#include "noise.cuh"
#include "values.cuh"

// A stored element of row i of the batch as the network sees it: floats[6] is the level of masking noise, floats[7] the
// scale of counts, ints[5] the random stream; `library` holds the sums of the rows if they are to be normalised.
DEVICE real seen(const Op& op, const Matrix& library, int i, int column, real value) {
  if (library) value = log1p_(value * size_factor(real(op.floats[7]), library(i, 0)));
  if (op.floats[6] > 0 && op.learn) {
    uint32_t cells[4];
    draw_cells(op, op.ints[5], i, column / 4, cells);
    if (cells[column % 4] < philox_threshold(op.floats[6])) value = 0;
  }
  return value;
}

// SPARSE_DENSE: W, library, the slots of Activate, and what the shift of the rows comes to, shift W. A block has a row
// and as many outputs as it has threads.
template <class Act>
KERNEL sparse_dense(const Op op) {
  constexpr int MOST = 128;
  SHARED(real, value, MOST);
  SHARED(int, column, MOST);
  const Matrix &W = op.slots[0], &library = op.slots[1];
  const Source& x = op.sources[0];
  const int strips = (W.cols + threads() - 1) / threads(), i = block() / strips;
  const int j = block() % strips * threads() + thread();
  const int64_t row = op.row(i), end = x.end(row);
  real sum = 0;
  for (int64_t k = x.begin(row); k < end; k += threads()) {
    if (k + thread() < end) {
      column[thread()] = x.column(k + thread());
      value[thread()] = seen(op, library, i, column[thread()], x.value(k + thread()));
    }
    sync();
    const int n = end - k < threads() ? int(end - k) : threads();
    if (j < W.cols)
      for (int l = 0; l < n; ++l) sum += value[l] * W(column[l], j);
    sync();
  }
  if (j < W.cols) Activate<Act>::apply(op, i, j, op.slots[5] ? sum - op.slots[5](0, j) : sum);
}

// The weight gradient of sparse rows, X' dz: dz, library, and the slots of the epilogue; ints[0]: columns of X,
// ints[1]: the source. Behind the epilogue's, slots 7 and 8 are the shift of the rows and the sums of dz's columns,
// whose product is what shifted rows have less. A block has BAND columns of X and as many of dz as it has threads, and
// walks all rows of the batch.
template <class Epilogue>
KERNEL sparse_outer(const Op op) {
  constexpr int BAND = 16, MOST = 128;
  SHARED(real, sums, BAND * MOST);
  SHARED(real, value, BAND * MOST);
  SHARED(uint8_t, column, BAND* MOST);
  SHARED(int, count, MOST);
  const Matrix &dz = op.slots[0], &library = op.slots[1];
  const Source& x = op.sources[op.ints[1]];
  const int strips = (dz.cols + threads() - 1) / threads(), first = block() / strips * BAND;
  const int j = block() % strips * threads() + thread();
  for (int c = 0; c < BAND; ++c) sums[c * MOST + thread()] = 0;
  for (int r = 0; r < op.m; r += threads()) {
    // A thread takes what a row has in the band.
    if (r + thread() < op.m) {
      const int64_t row = op.row(r + thread()), end = x.end(row);
      int n = 0;
      for (int64_t k = x.first(row, first); k < end && x.column(k) < first + BAND; ++k, ++n) {
        value[thread() * BAND + n] = seen(op, library, r + thread(), x.column(k), x.value(k));
        column[thread() * BAND + n] = uint8_t(x.column(k) - first);
      }
      count[thread()] = n;
    }
    sync();
    if (j < dz.cols)
      for (int i = 0; i < threads() && r + i < op.m; ++i) {
        if (count[i] == 0) continue;
        const real d = dz(r + i, j);
        for (int l = i * BAND; l < i * BAND + count[i]; ++l) sums[column[l] * MOST + thread()] += value[l] * d;
      }
    sync();
  }
  if (j < dz.cols)
    for (int c = 0; c < BAND && first + c < op.ints[0]; ++c) {
      const real less = op.slots[7] ? op.slots[7](0, first + c) * op.slots[8](0, j) : real(0);
      Epilogue::apply(op, first + c, j, sums[c * MOST + thread()] - less);
    }
}
