// Matrix products, tile by tile: where their factors come from as operands, what becomes of each element as an
// epilogue.
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

// --- operands --------------------------------------------------------------------------------------------------------
// A side of a product is `outer` rows of the result on the left, columns of it on the right, by the depth of the sum.
// An operand is a class with a member template Of<OUTER, DEPTH, THREADS>: what one of THREADS threads has of it, a tile
// of OUTER x DEPTH at a time. All threads of a block make one from (op, side, outer, depth), side 0 being the left and
// 1 the right, and then call in turn
//   load(first, k)          to read, into registers if it can, what the tile has from (first, k) on,
//   fill<PITCH>(shared)     to leave element (first + o, k + d) in shared[d * PITCH + o], zeros outside of the operand.
// Between the two other tiles are multiplied, so what is read from far belongs into load. Both may hold state, have
// shared arrays of their own and call sync(); what fill leaves is read behind another sync(), and not written again
// before one more. Slots `side`, and whatever the epilogue leaves, are the operand's.

// `at(o, d)` by the thread that is to read it, whose neighbour reads the next d if ALONG, and else the next o.
template <int OUTER, int DEPTH, int THREADS, bool ALONG>
struct Held {
  static constexpr int EACH = (OUTER * DEPTH + THREADS - 1) / THREADS;
  real held[EACH];

  DEVICE static int outer(int l) { return ALONG ? l / DEPTH : l % OUTER; }
  DEVICE static int deep(int l) { return ALONG ? l % DEPTH : l / OUTER; }
  template <class Fn>
  DEVICE void take(const Fn& at) {
    UNROLL
    for (int n = 0; n < EACH; ++n) {
      const int l = n * THREADS + thread();
      if (EACH * THREADS == OUTER * DEPTH || l < OUTER * DEPTH) held[n] = at(outer(l), deep(l));
    }
  }
  template <int PITCH, class Shared>
  DEVICE void put(Shared& shared) const {
    UNROLL
    for (int n = 0; n < EACH; ++n) {
      const int l = n * THREADS + thread();
      if (EACH * THREADS == OUTER * DEPTH || l < OUTER * DEPTH) shared[deep(l) * PITCH + outer(l)] = held[n];
    }
  }
};

// A matrix whose rows (TURNED: whose columns) are those of the result on the left, or its columns on the right.
template <bool TURNED>
struct Dense {
  template <int OUTER, int DEPTH, int THREADS>
  struct Of : Held<OUTER, DEPTH, THREADS, !TURNED> {
    const Op& op;
    const Matrix& x;
    const int outer, depth;

    DEVICE Of(const Op& op, int side, int outer, int depth) : op(op), x(op.slots[side]), outer(outer), depth(depth) {}
    DEVICE void load(int first, int k) {
      this->take([&](int o, int d) {
        const bool inside = first + o < outer && k + d < depth;
        return inside ? factor(op, TURNED ? x(k + d, first + o) : x(first + o, k + d)) : real(0);
      });
    }
    template <int PITCH, class Shared>
    DEVICE void fill(Shared& shared) {
      this->template put<PITCH>(shared);
    }
  };
};
typedef Dense<false> Rows;
typedef Dense<true> Turned;

// --- the product -----------------------------------------------------------------------------------------------------

template <class T, class Left, class Right, class Epilogue>
KERNEL gemm(const Op op) {
  constexpr int UP = T::ROWS + 1, WIDE = T::COLS + 1;  // one more, so that turned writes fall on different banks
  SHARED(real, left, T::DEPTH * UP);
  SHARED(real, right, T::DEPTH * WIDE);
  const int rows = op.ints[0], cols = op.ints[1], depth = op.ints[2];
  const int strips = (cols + T::COLS - 1) / T::COLS;
  const int row = block() / strips * T::ROWS, col = block() % strips * T::COLS;
  const int down = thread() / T::ACROSS, across = thread() % T::ACROSS;
  typename Left::template Of<T::ROWS, T::DEPTH, T::THREADS> of_left(op, 0, rows, depth);
  typename Right::template Of<T::COLS, T::DEPTH, T::THREADS> of_right(op, 1, cols, depth);

  real sum[T::EACH_ROW][T::EACH_COL] = {};
  of_left.load(row, 0);
  of_right.load(col, 0);
  for (int k = 0; k < depth; k += T::DEPTH) {
    of_left.template fill<UP>(left);
    of_right.template fill<WIDE>(right);
    sync();
    if (k + T::DEPTH < depth) {
      of_left.load(row, k + T::DEPTH);
      of_right.load(col, k + T::DEPTH);
    }
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
