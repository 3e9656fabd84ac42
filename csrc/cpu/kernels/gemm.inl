// Matrix product with an epilogue: C = epilogue(A B).
//
// Promises: each element of C is one chain of fused multiply-adds over k = 0, 1, ..., K-1. Tile, block, layout, thread
// count and vector width do not change it. A may have any strides and is never packed. B is read in place if its rows
// are contiguous and padded. Otherwise it is packed into panels of NR columns in the thread's scratch memory.
// Included inside the namespace of an instruction set.
//
// MR x NR is the micro-kernel's tile. MR * NV accumulators, NV vectors of B and one broadcast of A fill the registers:
// 24 + 4 + 1 of 32 with AVX-512, 12 + 2 + 1 of 16 with AVX2 and SSE.

constexpr int MR = 6;
constexpr index_t LINE = 64;  // bytes
static_assert(MR == CELL_ROWS, "a tile holds whole cells");
constexpr int NV = NARROWS_TILE_VECTORS;
template <class T>
constexpr int NR = NV * WIDTH<T>;

// One step of a product: acc + a b for one k.
inline vf madd(vf acc, vf a, vf b) { return acc + a * b; }
inline vd madd(vd acc, vd a, vd b) { return acc + a * b; }
// a - 0 is a for every a and costs nothing; 0 + a is not (of -0), and compilers would add.
inline vf broadcast(float a) { return a - vf{}; }
inline vd broadcast(double a) { return a - vd{}; }

// Operands of a product as the micro-kernel reads them: element (row i, step k) of A, step k and column j of B.
template <class E>
struct Operands {
  const E *a, *b;
  index_t a_row, a_col, b_row;
  index_t steps;
  bool first, last;  // whether these are the first and the last steps of the sum
  // Memory that will be used soon. The first `update_steps` steps fetch rows of `width` bytes for writing: a line of
  // each of `at_once` rows. Each later step fetches one line; these lie `ahead_step` bytes apart.
  const char* const* update = nullptr;
  index_t width = 0, at_once = 1, update_steps = 0;
  const char* ahead = nullptr;
  index_t ahead_step = 0;
};

// tile (MR_ x NV_ vectors, rows NR apart) = [tile +] A B.
template <class T, class E, int MR_, int NV_>
void micro_kernel(const Operands<E>& o, T* tile) {
  vec<T> acc[MR_][NV_];
#pragma GCC unroll 8
  for (int i = 0; i < MR_; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < NV_; ++j) acc[i][j] = o.first ? vec<T>{} : load(tile + i * NR<T> + j * WIDTH<T>);
  const E *a = o.a, *b = o.b;
  const char* ahead = o.ahead;
  const index_t a_row = o.a_row, a_col = o.a_col, b_row = o.b_row, ahead_step = o.ahead_step;
  const auto step = [&]() __attribute__((always_inline)) {
    vec<E> bv[NV_];
#pragma GCC unroll 8
    for (int j = 0; j < NV_; ++j) bv[j] = load(b + j * WIDTH<T>);
#pragma GCC unroll 8
    for (int i = 0; i < MR_; ++i) {
      const vec<E> av = broadcast(a[i * a_row]);
#pragma GCC unroll 8
      for (int j = 0; j < NV_; ++j) acc[i][j] = madd(acc[i][j], av, bv[j]);
    }
    a += a_col, b += b_row;
  };
  index_t k = 0;
  const char* const* row = o.update;
  for (index_t at = 0; k < o.update_steps; ++k) {
    for (index_t i = 0; i < o.at_once; ++i) __builtin_prefetch(row[i] + at, 1);
    if ((at += LINE) >= o.width) at = 0, row += o.at_once;
    step();
  }
  for (; k < o.steps; ++k, ahead += ahead_step) __builtin_prefetch(ahead), step();
#pragma GCC unroll 8
  for (int i = 0; i < MR_; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < NV_; ++j) store(tile + i * NR<T> + j * WIDTH<T>, acc[i][j]);
}

// The speed of the micro-kernel if loading its operands were free.
template <class T>
double fma_probe(index_t n) {
  vec<T> acc[MR][NV], factor = splat<vec<T>>(0.5), term = splat<vec<T>>(0.25);
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) acc[i][j] = splat<vec<T>>(double(i * NV + j));
  for (index_t k = 0; k < n; ++k) {
    __asm__ volatile("" : "+m"(factor), "+m"(term));  // hides from the compiler that they stay the same
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) acc[i][j] = acc[i][j] * factor + term;
  }
  vec<T> sum{};
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) sum += acc[i][j];
  __asm__ volatile("" : : "m"(sum));  // keeps every lane
  return 2.0 * double(n) * MR * NR<T>;
}

template <class T, class E>
using MicroKernel = void (*)(const Operands<E>&, T*);

// The kernel for a number of rows and vectors. Edges run the same code with fewer of them.
template <class T, class E>
inline MicroKernel<T, E> micro(int rows, int vectors) {
#define ROW(r)                                                                                                  \
  {                                                                                                             \
    micro_kernel<T, E, r, 1>, micro_kernel<T, E, r, (NV > 1 ? 2 : 1)>, micro_kernel<T, E, r, (NV > 2 ? 3 : 1)>, \
        micro_kernel<T, E, r, (NV > 3 ? 4 : 1)>                                                                 \
  }
  static const MicroKernel<T, E> table[MR][4] = {ROW(1), ROW(2), ROW(3), ROW(4), ROW(5), ROW(6)};
#undef ROW
  return table[rows - 1][vectors - 1];
}

// a0 b0 a1 b1 ...: the lower halves of a and b interleaved, and the upper halves.
template <class T, int... I>
inline vec<T> zip(vec<T> a, vec<T> b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (I / 2 + I % 2 * WIDTH<T>)...);
}
template <class T, int... I>
inline vec<T> zip_upper(vec<T> a, vec<T> b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (I / 2 + WIDTH<T> / 2 + I % 2 * WIDTH<T>)...);
}

// to[i * to_stride + j] = from[j * from_stride + i] for i, j < WIDTH: log2(WIDTH) rounds of zipping row i with row
// i + WIDTH / 2.
template <class T>
inline void transpose_block(const T* from, index_t from_stride, T* to, index_t to_stride) {
  constexpr int W = WIDTH<T>;
  constexpr auto lanes = std::make_integer_sequence<int, W>();
  vec<T> rows[W], zipped[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) rows[i] = load(from + i * from_stride);
#pragma GCC unroll 4
  for (int round = 1; round < W; round *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < W / 2; ++i) {
      zipped[2 * i] = zip<T>(rows[i], rows[i + W / 2], lanes);
      zipped[2 * i + 1] = zip_upper<T>(rows[i], rows[i + W / 2], lanes);
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) rows[i] = zipped[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) store(to + i * to_stride, rows[i]);
}

template <class T>
inline Matrix<const T> transposed(const Matrix<const T>& m) {
  return {m.data, m.cols, m.rows, m.col_stride, m.row_stride, false};
}

// Copies k0..k0+depth of columns j0..j0+cols of B into a zero-padded panel, its rows `width` apart.
template <class T>
inline void pack(const Matrix<const T>& B, index_t k0, index_t depth, index_t j0, index_t cols, T* panel,
                 index_t width = NR<T>) {
  constexpr index_t W = WIDTH<T>;
  // The columns of a transposed view are contiguous, so whole blocks are transposed in registers.
  const index_t turned_rows = B.row_stride == 1 ? depth / W * W : 0, turned_cols = cols / W * W;
  for (index_t j = 0; j < turned_cols && turned_rows > 0; j += W)
    for (index_t k = 0; k < turned_rows; k += W)
      transpose_block(B.data + k0 + k + (j0 + j) * B.col_stride, B.col_stride, panel + k * width + j, width);
  for (index_t k = 0; k < depth; ++k) {
    const T* row = B.data + (k0 + k) * B.row_stride + j0 * B.col_stride;
    T* to = panel + k * width;
    for (index_t j = k < turned_rows ? turned_cols : 0; j < cols; ++j) to[j] = row[j * B.col_stride];
    for (index_t j = cols; j < width; ++j) to[j] = T(0);
  }
}

// Memory that will be read soon: `rows` times `n` lines.
struct Coming {
  const char* at = nullptr;
  index_t step = 0, n = 0, row = 0, rows = 0;  // bytes from line to line and from row to row
};

// The panel of B that begins at column j0.
template <class T>
inline Coming coming(const Matrix<const T>& B, index_t k0, index_t depth, index_t j0) {
  constexpr index_t SIZE = sizeof(T);
  const index_t cols = B.cols - j0 < NR<T> ? B.cols - j0 : NR<T>;
  if (cols <= 0) return {};
  const char* at = reinterpret_cast<const char*>(B.data + k0 * B.row_stride + j0 * B.col_stride);
  if (B.col_stride == 1) return {at, B.row_stride * SIZE, depth, LINE, (cols * SIZE + LINE - 1) / LINE};
  // Columns follow each other in memory.
  if (B.row_stride == 1 && 2 * depth > B.col_stride) return {at, LINE, cols * B.col_stride * SIZE / LINE, 0, 1};
  return {};
}

// Has the first steps of `o` fetch what the epilogue writes for the next tile. `list` has room for three rows for each
// row of a tile.
template <class T, class E>
inline void fetch(Operands<E>& o, const Update<T>& update, const Tile& next, const char** list) {
  o.update = list;
  for (index_t i = next.row; i < next.row + next.rows; ++i)
    for (const Matrix<T>* x : {&update.W, &update.m, &update.v})
      *list++ = reinterpret_cast<const char*>(x->row(i) + next.col);
  o.width = next.cols * index_t(sizeof(T));
  const index_t lines = next.rows * ((o.width + LINE - 1) / LINE);  // of each matrix
  // One line at each step, so that the other loads do not wait. With few steps all three at once.
  o.at_once = 3 * lines <= o.steps ? 1 : 3;
  o.update_steps = 3 / o.at_once * lines;
  if (o.update_steps > o.steps) o.update_steps = o.steps;
}

// Computes the tiles of panel `col` from row block `begin` to `end`. The first row of A in `o` is row `origin` of C.
// `partial` holds partial sums; `next` is the memory that the caller reads afterwards.
template <class T, class E>
void run_tiles(Operands<E> o, index_t origin, index_t M, index_t begin, index_t end, index_t col, index_t cols,
               const Coming& next, const Matrix<T>& partial, const Epilogue<T> epilogue, const Update<T>& update) {
  constexpr index_t SIZE = sizeof(E);
  const int vectors = int((cols + WIDTH<T> - 1) / WIDTH<T>);
  const E* a = o.a;
  index_t row = 0, line = 0;  // in `next`
  const char* list[3 * MR];
  alignas(64) T tile[MR * NR<T>];
  for (index_t block = begin; block < end; ++block) {
    const index_t i = block * MR;
    const int rows = int(M - i < MR ? M - i : MR);
    const Tile t{origin + i, col, rows, cols};
    o.a = a + i * o.a_row;
    if (o.last && update.W.data && block + 1 < end)
      fetch(o, update, {t.row + MR, col, M - i - MR < MR ? int(M - i) - MR : MR, cols}, list);
    else
      o.update_steps = 0;
    // While a tile is computed, memory for later is fetched. First comes the next panel of B, and then the part of A
    // that the next tile reads first.
    const E* edge = o.a + (2 * MR - 1);
    if (row < next.rows) {
      o.ahead = next.at + row * next.row + line * next.step, o.ahead_step = next.step;
      line += o.steps - o.update_steps;
      if (line >= next.n) line = 0, ++row;
    } else if (o.a_row == 1 && (uintptr_t(edge) ^ uintptr_t(edge - MR)) / 64) {
      o.ahead = reinterpret_cast<const char*>(edge), o.ahead_step = o.a_col * SIZE;
    } else if (o.a_col == 1 && o.steps > 0) {
      o.ahead = reinterpret_cast<const char*>(o.a + MR * o.a_row), o.ahead_step = MR * o.a_row * SIZE / o.steps;
    } else {
      o.ahead = reinterpret_cast<const char*>(o.b), o.ahead_step = 0;
    }
    if (!o.first)
      for (int r = 0; r < rows; ++r)
        __builtin_memcpy(tile + r * NR<T>, partial.row(t.row + r) + col, size_t(cols) * sizeof(T));
    micro<T, E>(rows, vectors)(o, tile);
    if (o.last)
      epilogue(t, tile);
    else
      for (int r = 0; r < rows; ++r)
        __builtin_memcpy(partial.row(t.row + r) + col, tile + r * NR<T>, size_t(cols) * sizeof(T));
  }
}

// Calls fn(panel, first block, last block) for a thread's share of the tiles of `vectors` columns of vectors. Tiles are
// ordered panel by panel, so that a thread packs few panels. The cost of a tile is its number of vectors.
template <class Fn>
inline void for_panels(index_t vectors, index_t blocks, int tid, int nt, const Fn& fn) {
  const Range share(vectors * blocks, tid, nt);
  if (share.begin == share.end) return;
  for (index_t panel = share.begin / (blocks * NV); panel * blocks * NV < share.end; ++panel) {
    const index_t width = vectors - panel * NV < NV ? vectors - panel * NV : NV, before = panel * blocks * NV;
    const auto block = [&](index_t cost) { return cost < before ? 0 : (cost - before + width - 1) / width; };
    const index_t begin = block(share.begin), end = block(share.end) < blocks ? block(share.end) : blocks;
    if (begin < end) fn(panel, begin, end);
  }
}

// epilogue(tile, values) gets each finished tile; the values are rows of NR elements. The memory of `update` is fetched
// one tile ahead. If K is cut for packing, `partial` holds the partial sums: a matrix of C's shape with contiguous
// rows, usually C itself. Without `partial`, K is not cut.
template <class T>
void gemm(Matrix<const T> A, Matrix<const T> B, Matrix<T> partial, T* scratch, Epilogue<T> epilogue, int tid, int nt,
          const Update<T>& update) {
  const index_t M = A.rows, N = B.cols, K = A.cols;
  const bool direct = B.col_stride == 1 && B.padded;
  const index_t depth_max = direct || !partial.data ? (K > 0 ? K : 1) : PACK_DEPTH;
  for_panels((N + WIDTH<T> - 1) / WIDTH<T>, (M + MR - 1) / MR, tid, nt, [&](index_t panel, index_t begin, index_t end) {
    const index_t j0 = panel * NR<T>, cols = N - j0 < NR<T> ? N - j0 : NR<T>;
    index_t k0 = 0;
    do {
      const index_t depth = K - k0 < depth_max ? K - k0 : depth_max;
      Operands<T> o{A.data + k0 * A.col_stride,
                    B.data + k0 * B.row_stride + j0,
                    A.row_stride,
                    A.col_stride,
                    B.row_stride,
                    depth,
                    k0 == 0,
                    k0 + depth >= K};
      if (!direct) {
        pack(B, k0, depth, j0, cols, scratch);
        o.b = scratch, o.b_row = NR<T>;
      }
      k0 += depth;
      const Coming next = k0 < K ? coming(B, k0, K - k0 < depth ? K - k0 : depth, j0)
                                 : coming(B, 0, K < depth_max ? K : depth_max, j0 + NR<T>);
      run_tiles<T>(o, 0, M, begin, end, j0, cols, next, partial, epilogue, update);
    } while (k0 < K);
  });
}
