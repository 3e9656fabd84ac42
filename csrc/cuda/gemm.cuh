// Matrix products, tile by tile, with what becomes of each element as an epilogue.
//
// Promises: an element is one chain of multiply-adds over k = 0, 1, 2, ... whatever the tile, so its bits depend on its
// row and its column alone; ragged edges are filled with zeros. For layers up to some hundreds wide: large products
// are better left to cuBLAS.
//
// Slots 0 and 1 are the factors, as stored; ints: rows, columns and depth of the product, two of the epilogue's, and
// whether bfloat16 programs round the factors.

#pragma once

#include "updates.cuh"

// ROWS x COLS elements by THREADS threads, each EACH_ROW x EACH_COL; DEPTH of the sum at a time.
template <int ROWS_, int COLS_, int DEPTH_, int EACH_ROW_, int EACH_COL_>
struct Tile {
  static constexpr int ROWS = ROWS_, COLS = COLS_, DEPTH = DEPTH_, EACH_ROW = EACH_ROW_, EACH_COL = EACH_COL_;
  static constexpr int DOWN = ROWS / EACH_ROW, ACROSS = COLS / EACH_COL, THREADS = DOWN * ACROSS;
};
typedef Tile<64, 64, 16, 4, 4> Large;
typedef Tile<16, 32, 32, 1, 2> Small;

// A factor of a product: as it is, or rounded to bfloat16 (to nearest, ties to even; subnormals become zero).
DEVICE real factor(const Op& op, real x) {
  (void)op;
#ifdef NARROWS_BFLOAT16
  if (!op.ints[5] || x != x) return x;
  union {
    float number;
    uint32_t bits;
  } u;
  u.number = x;
  const bool subnormal = (u.bits & 0x7f800000u) == 0;
  u.bits = subnormal ? u.bits & 0x80000000u : (u.bits + 0x7fffu + (u.bits >> 16 & 1u)) & 0xffff0000u;
  return u.number;
#else
  return x;
#endif
}

template <class T, bool LEFT_TURNED, bool RIGHT_TURNED, class Epilogue>
KERNEL gemm(const Op op) {
  constexpr int UP = T::ROWS + 1, WIDE = T::COLS + 1;  // one more, so that turned writes fall on different banks
  SHARED(real, left, T::DEPTH * UP);
  SHARED(real, right, T::DEPTH * WIDE);
  const Matrix &A = op.slots[0], &B = op.slots[1];
  const int rows = op.ints[0], cols = op.ints[1], depth = op.ints[2];
  const int strips = (cols + T::COLS - 1) / T::COLS;
  const int row = block() / strips * T::ROWS, col = block() % strips * T::COLS;
  const int down = thread() / T::ACROSS, across = thread() % T::ACROSS;

  real sum[T::EACH_ROW][T::EACH_COL] = {};
  for (int k = 0; k < depth; k += T::DEPTH) {
    // Neighbours in memory go to neighbours among the threads.
    for (int l = thread(); l < T::ROWS * T::DEPTH; l += T::THREADS) {
      const int i = LEFT_TURNED ? l % T::ROWS : l / T::DEPTH, d = LEFT_TURNED ? l / T::ROWS : l % T::DEPTH;
      const bool inside = row + i < rows && k + d < depth;
      left[d * UP + i] = inside ? factor(op, LEFT_TURNED ? A(k + d, row + i) : A(row + i, k + d)) : real(0);
    }
    for (int l = thread(); l < T::COLS * T::DEPTH; l += T::THREADS) {
      const int j = RIGHT_TURNED ? l / T::DEPTH : l % T::COLS, d = RIGHT_TURNED ? l % T::DEPTH : l / T::COLS;
      const bool inside = col + j < cols && k + d < depth;
      right[d * WIDE + j] = inside ? factor(op, RIGHT_TURNED ? B(col + j, k + d) : B(k + d, col + j)) : real(0);
    }
    sync();
    for (int d = 0; d < T::DEPTH; ++d) {
      real a[T::EACH_ROW], b[T::EACH_COL];
      UNROLL
      for (int i = 0; i < T::EACH_ROW; ++i) a[i] = left[d * UP + down + i * T::DOWN];
      UNROLL
      for (int j = 0; j < T::EACH_COL; ++j) b[j] = right[d * WIDE + across + j * T::ACROSS];
      UNROLL
      for (int i = 0; i < T::EACH_ROW; ++i) {
        UNROLL
        for (int j = 0; j < T::EACH_COL; ++j) sum[i][j] += a[i] * b[j];
      }
    }
    sync();
  }
  UNROLL
  for (int i = 0; i < T::EACH_ROW; ++i) {
    UNROLL
    for (int j = 0; j < T::EACH_COL; ++j) {
      const int r = row + down + i * T::DOWN, c = col + across + j * T::ACROSS;
      if (r < rows && c < cols) Epilogue::apply(op, r, c, sum[i][j]);
    }
  }
}

// --- epilogues -------------------------------------------------------------------------------------------------------

// DENSE: slots from 2 on: b, out, pre
template <class Act>
struct Activate {
  DEVICE static void apply(const Op& op, int i, int j, real z) {
    const Matrix &b = op.slots[2], &out = op.slots[3], &pre = op.slots[4];
    if (b) z += b(0, j);
    if (pre) pre(i, j) = z;
    out(i, j) = Act::value(z);
  }
};

// DGRAD: slots from 2 on: saved, out; floats[0]: scale
template <class Act>
struct Slope {
  DEVICE static void apply(const Op& op, int i, int j, real d) {
    op.slots[3](i, j) = d * Act::slope(op.slots[2](i, j) * real(op.floats[0]));
  }
};

// A link of JACOBIAN's chain: slots from 2 on: slopes, product, and the product times the slopes of its row; a row of
// the batch has ints[3] rows here, and its slopes begin at column ints[4].
struct Link {
  DEVICE static void apply(const Op& op, int i, int j, real d) {
    op.slots[3](i, j) = d;
    op.slots[4](i, j) = d * op.slots[2](i / op.ints[3], op.ints[4] + j);
  }
};
