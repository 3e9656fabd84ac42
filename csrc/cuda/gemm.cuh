// Matrix products, tile by tile. Operands fill the tiles, and an epilogue uses each element of the result.
//
// Promises: an element is one chain of multiply-adds over k = 0, 1, 2, ... In the tile Deep it is eight chains, cut by
// the depth alone and added in order. So its bits depend on its row and its column alone, and all tiles but Deep give
// the same bits. Ragged edges are filled with zeros. cuBLAS is faster for large products, where it is there.

#pragma once

#include "updates.cuh"

// ROWS x COLS elements by THREADS threads; each thread has EACH_ROW x EACH_COL of them. DEPTH terms of the sum at a
// time, of which each of WAYS groups of threads takes a part.
template <int ROWS_, int COLS_, int DEPTH_, int EACH_ROW_, int EACH_COL_, int WAYS_>
struct Tile {
  static constexpr int ROWS = ROWS_, COLS = COLS_, DEPTH = DEPTH_, EACH_ROW = EACH_ROW_, EACH_COL = EACH_COL_;
  static constexpr int WAYS = WAYS_, DOWN = ROWS / EACH_ROW, ACROSS = COLS / EACH_COL, GROUP = DOWN * ACROSS;
  static constexpr int THREADS = GROUP * WAYS;
  // Blocks that a multiprocessor should hold: 128 registers for a thread, or 168 if it has many elements.
  static constexpr int BLOCKS = (EACH_ROW * EACH_COL < 32 ? 512 : 384) / THREADS;
  static_assert(ROWS % 8 == 0 && COLS % 8 == 0 && DEPTH % (8 * WAYS) == 0, "see Fetched");
};
// The numbers come from table.TILES.
#ifdef NARROWS_DOUBLE
typedef Tile<NARROWS_TILE_SMALL_DOUBLE> Small;
typedef Tile<NARROWS_TILE_MEDIUM_DOUBLE> Medium;
typedef Tile<NARROWS_TILE_LARGE_DOUBLE> Large;
typedef Tile<NARROWS_TILE_DEEP_DOUBLE> Deep;
#else
typedef Tile<NARROWS_TILE_SMALL> Small;
typedef Tile<NARROWS_TILE_MEDIUM> Medium;
typedef Tile<NARROWS_TILE_LARGE> Large;
typedef Tile<NARROWS_TILE_DEEP> Deep;
#endif

// x rounded to bfloat16 (to nearest, ties to even; subnormals become zero), as the bits of a float.
DEVICE uint32_t bfloat16_bits(float x) {
  union {
    float number;
    uint32_t bits;
  } u;
  u.number = x;
  if (x != x) return (u.bits & 0xffff0000u) | 0x00400000u;
  const bool subnormal = (u.bits & 0x7f800000u) == 0;
  return subnormal ? u.bits & 0x80000000u : (u.bits + 0x7fffu + (u.bits >> 16 & 1u)) & 0xffff0000u;
}

// A factor of a product, rounded to bfloat16 if `rounds`.
DEVICE real rounded(bool rounds, real x) {
  (void)rounds;
#ifdef NARROWS_BFLOAT16
  if (!rounds) return x;
  union {
    uint32_t bits;
    float number;
  } u;
  u.bits = bfloat16_bits(x);
  return u.number;
#else
  return x;
#endif
}
DEVICE real factor(const Op& op, real x) { return rounded(op[launch::gemm::rounds], x); }

// --- operands --------------------------------------------------------------------------------------------------------
// A side of a product has `outer` rows (left) or columns (right) of the result, and the depth of the sum. An operand is
// a class with a member template Of<OUTER, DEPTH, THREADS>: one thread's share of a tile of OUTER x DEPTH. All threads
// of a block make one from (op, x, outer, depth), where x is the matrix as stored. Then they call in turn
//   load(first, k)          Reads the thread's share of the tile at (first, k), into registers if possible.
//   fill<PITCH>(shared)     Stores element (first + o, k + d) in shared[d * PITCH + o], and zeros outside.
// Two other tiles are multiplied between the two calls, so slow reads belong into load. Both may have state and shared
// arrays, and may call sync(). Threads read what fill stored after another sync(), and one more comes before it is
// overwritten.

// N numbers in one or two reads of memory.
template <int N>
struct alignas(N * sizeof(real) < 16 ? N * sizeof(real) : 16) Run {
  real at[N];
};

// A thread's share of a tile, in runs of four: along the depth if ALONG, else along the outer indices. ALONG, a warp
// has two runs side by side for each of 16 outer indices. If the pitch is four more than a multiple of eight, the
// writes of a warp fall on different banks.
template <int OUTER, int DEPTH, int THREADS, bool ALONG>
struct Fetched {
  static constexpr int EACH = OUTER * DEPTH / (4 * THREADS), PAIR = ALONG ? 2 : 1, SIDE = THREADS / PAIR;
  static constexpr int ACROSS = ALONG ? OUTER : OUTER / 4;
  static_assert(EACH * 4 * THREADS == OUTER * DEPTH && (SIDE % ACROSS == 0 || ACROSS % SIDE == 0), "all have as many");
  Run<4> fetched[EACH];

  // Where run n begins: a number of the thread plus a constant.
  DEVICE static int outer(int n) { return (thread() / PAIR % ACROSS + n * SIDE % ACROSS) * (ALONG ? 1 : 4); }
  DEVICE static int deep(int n) {
    return (thread() / PAIR / ACROSS + n * SIDE / ACROSS) * (ALONG ? 8 : 1) + (ALONG ? thread() % 2 * 4 : 0);
  }
  // Loads each element as at(o, d).
  template <class Fn>
  DEVICE void take(const Fn& at) {
    take_runs([&](int o, int d) {
      Run<4> run;
      UNROLL
      for (int c = 0; c < 4; ++c) run.at[c] = ALONG ? at(o, d + c) : at(o + c, d);
      return run;
    });
  }
  // Loads each run as run_at(o, d).
  template <class Fn>
  DEVICE void take_runs(const Fn& run_at) {
    UNROLL
    for (int n = 0; n < EACH; ++n) fetched[n] = run_at(outer(n), deep(n));
  }
  template <int PITCH, class Shared>
  DEVICE void put(Shared& shared) const {
    static_assert(PITCH % 4 == 0, "runs are read and written at once");
    UNROLL
    for (int n = 0; n < EACH; ++n) {
      const int at = deep(n) * PITCH + outer(n);
      if (ALONG) {
        UNROLL
        for (int c = 0; c < 4; ++c) shared[at + c * PITCH] = fetched[n].at[c];
      } else {
        REQUIRE(&shared[at + 3] == &shared[at] + 3);
        *reinterpret_cast<Run<4>*>(&shared[at]) = fetched[n];
      }
    }
  }
};

// A matrix whose rows (TURNED: columns) are the rows (left) or columns (right) of the result. If EXTENDED, a row of
// ones follows, so the result also has the sums of the other factor.
template <bool TURNED, bool EXTENDED>
struct Dense {
  template <int OUTER, int DEPTH, int THREADS>
  struct Of : Fetched<OUTER, DEPTH, THREADS, !TURNED> {
    const Op& op;
    const Matrix& x;
    const int outer, depth;

    DEVICE Of(const Op& op, const Matrix& x, int outer, int depth)
        : op(op), x(x), outer(outer - EXTENDED), depth(depth) {}
    DEVICE void load(int first, int k) {
      const int ld = unknown(x.ld), high = outer - first, deep = depth - k;
      const real* begin = x.data + (TURNED ? int64_t(k) * ld + first : int64_t(first) * ld + k);
      const bool aligned = ld % 4 == 0 && size_t(x.data) % alignof(Run<4>) == 0;
      this->take_runs([&](int o, int d) {
        const int at = TURNED ? d * ld + o : o * ld + d;
        Run<4> run;
        if (aligned && o + (TURNED ? 3 : 0) < high && d + (TURNED ? 0 : 3) < deep) {
          REQUIRE(begin + at + 3 == (TURNED ? &x(k + d, first + o + 3) : &x(first + o, k + d + 3)));
          run = *reinterpret_cast<const Run<4>*>(begin + at);
        } else {
          UNROLL
          for (int c = 0; c < 4; ++c) {
            const int i = o + (TURNED ? c : 0), l = d + (TURNED ? 0 : c);
            run.at[c] = real(EXTENDED && i == high && l < deep);
            if (i >= high || l >= deep) continue;
            REQUIRE(begin + at + c == (TURNED ? &x(k + l, first + i) : &x(first + i, k + l)));
            run.at[c] = begin[at + c];
          }
        }
        UNROLL
        for (int c = 0; c < 4; ++c) run.at[c] = factor(op, run.at[c]);
        return run;
      });
    }
    template <int PITCH, class Shared>
    DEVICE void fill(Shared& shared) {
      this->template put<PITCH>(shared);
    }
  };
};
typedef Dense<false, false> Rows;
typedef Dense<true, false> Turned;
typedef Dense<true, true> Extended;

// --- the product -----------------------------------------------------------------------------------------------------

template <int N, class Shared>
DEVICE Run<N> run(Shared& shared, int i) {
  const real* first = &shared[i];
  REQUIRE(&shared[i + N - 1] == first + N - 1 && size_t(first) % alignof(Run<N>) == 0);
  return *reinterpret_cast<const Run<N>*>(first);
}

// A shared array from an element on.
template <class Shared>
struct From {
  Shared& shared;
  int first;

  DEVICE real& operator[](int i) const { return shared[first + i]; }
};

// Tile `at` of the product.
template <class T, class Left, class Right, class Epilogue>
DEVICE void product(const Op& op, int at) {
  using At = launch::gemm;
  constexpr int UP = T::ROWS + 4, WIDE = T::COLS + 4, BUFFERS = T::WAYS == 1 ? 2 : 1;
  constexpr bool APART = T::WAYS == 1;  // a thread's columns; else they are one run
  SHARED(real, left, BUFFERS * T::DEPTH * UP);
  SHARED(real, right, BUFFERS * T::DEPTH * WIDE);
  const int rows = op[At::rows], cols = op[At::cols], depth = op[At::depth];
  const int strips = (cols + T::COLS - 1) / T::COLS;
  const int row = at / strips * T::ROWS, col = at % strips * T::COLS;
  const int way = thread() / T::GROUP, down = thread() % T::GROUP / T::ACROSS, across = thread() % T::ACROSS;
  typename Left::template Of<T::ROWS, T::DEPTH, T::THREADS> of_left(op, op[At::left], rows, depth);
  typename Right::template Of<T::COLS, T::DEPTH, T::THREADS> of_right(op, op[At::right], cols, depth);

  real sum[T::EACH_ROW][T::EACH_COL] = {};
  of_left.load(row, 0);
  of_right.load(col, 0);
  for (int k = 0; k < depth; k += T::DEPTH) {
    // Two buffers take turns, so threads that still read the last one are not disturbed.
    const int buffer = k / T::DEPTH % BUFFERS;
    From<decltype(left)> up = {left, buffer * T::DEPTH * UP};
    From<decltype(right)> wide = {right, buffer * T::DEPTH * WIDE};
    of_left.template fill<UP>(up);
    of_right.template fill<WIDE>(wide);
    sync();
    if (k + T::DEPTH < depth) {
      of_left.load(row, k + T::DEPTH);
      of_right.load(col, k + T::DEPTH);
    }
    UNROLL_BY_8
    for (int n = 0; n < T::DEPTH / T::WAYS; ++n) {
      const int d = way * (T::DEPTH / T::WAYS) + n;
      const Run<T::EACH_ROW> a = run<T::EACH_ROW>(up, d * UP + down * T::EACH_ROW);
      Run<T::EACH_COL> b;
      if (!APART) b = run<T::EACH_COL>(wide, d * WIDE + across * T::EACH_COL);
      UNROLL
      for (int j = 0; APART && j < T::EACH_COL; ++j) b.at[j] = wide[d * WIDE + across + j * T::ACROSS];
      UNROLL
      for (int i = 0; i < T::EACH_ROW; ++i) {
        UNROLL
        for (int j = 0; j < T::EACH_COL; ++j) sum[i][j] += a.at[i] * b.at[j];
      }
    }
    if (BUFFERS == 1) sync();
  }

  if (APART) {
    UNROLL
    for (int i = 0; i < T::EACH_ROW; ++i) {
      UNROLL
      for (int j = 0; j < T::EACH_COL; ++j) {
        const int r = row + down * T::EACH_ROW + i, c = col + across + j * T::ACROSS;
        if (r < rows && c < cols) Epilogue::apply(op, r, c, sum[i][j]);
      }
    }
    return;
  }
  // The sums of all groups, one after the other, in the memory of the left factor. Each thread then adds the sums of an
  // element.
  constexpr int TILE = T::ROWS * T::COLS;
  static_assert(APART || T::WAYS * TILE <= T::DEPTH * UP, "room for the sums");
  UNROLL
  for (int i = 0; i < T::EACH_ROW; ++i) {
    UNROLL
    for (int j = 0; j < T::EACH_COL; ++j)
      left[way * TILE + (down * T::EACH_ROW + i) * T::COLS + across * T::EACH_COL + j] = sum[i][j];
  }
  sync();
  for (int l = thread(); l < TILE; l += T::THREADS) {
    real total = left[l];
    UNROLL
    for (int w = 1; w < T::WAYS; ++w) total += left[w * TILE + l];
    const int r = row + l / T::COLS, c = col + l % T::COLS;
    if (r < rows && c < cols) Epilogue::apply(op, r, c, total);
  }
}

template <class T, class Left, class Right, class Epilogue>
KERNEL_OF(T::THREADS, T::BLOCKS)
gemm(const Op op) {
  product<T, Left, Right, Epilogue>(op, block());
}

// A product as a member of `group`
template <class T, class Left, class Right, class Epilogue>
struct Gemm {
  static constexpr int THREADS = T::THREADS, BLOCKS = T::BLOCKS;
  DEVICE static void run(const Op& op, int at) { product<T, Left, Right, Epilogue>(op, at); }
};

// --- epilogues -------------------------------------------------------------------------------------------------------

// DENSE
template <class Act>
struct Activate {
  DEVICE static void apply(const Op& op, int i, int j, real z) {
    using At = launch::Activate;
    const Matrix &b = op[At::b], &out = op[At::out], &pre = op[At::pre];
    if (b) z += b(0, j);
    if (pre) pre(i, j) = z;
    out(i, j) = Act::value(z);
  }
};

// DGRAD
template <class Act>
struct Slope {
  using At = launch::Slope;
  DEVICE static void apply(const Op& op, int i, int j, real d) {
    op[At::out](i, j) = d * Act::slope(op[At::saved](i, j) * real(op[At::scale]));
  }
};

// A link of JACOBIAN's chain
struct Link {
  using At = launch::Link;
  DEVICE static void apply(const Op& op, int i, int j, real d) {
    op[At::out](i, j) = d;
    op[At::scaled](i, j) = d * op[At::slopes](i / op[At::latents], op[At::column] + j);
  }
};

// With an Extended left factor, the last row of the result is the gradient of the bias.
template <class To>
struct WithBias;

template <>
struct WithBias<Store> {
  DEVICE static void apply(const Op& op, int i, int j, real g) {
    using At = launch::StoreBias;
    if (i < op[At::bias_row]) return Store::apply(op, i, j, g);
    real& sum = op[At::bias](0, j);
    sum = op[At::accumulate_bias] ? sum + g : g;
  }
};
template <class Rule>
struct WithBias<Descend<Rule>> {
  DEVICE static void apply(const Op& op, int i, int j, real g) {
    using At = launch::DescendBias;
    if (i < op[At::bias_row]) return Descend<Rule>::apply(op, i, j, g);
    const Matrix &db = op[At::db], &b = op[At::b], &m = op[At::b_moment1], &v = op[At::b_moment2];
    if (db) g += db(0, j);
    Rule::step(op, b(0, j), g, m(0, j), v ? &v(0, j) : nullptr);
  }
};
