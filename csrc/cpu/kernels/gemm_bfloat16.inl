// Matrix product in bfloat16, under the same tiles and epilogues as gemm().
//
// Promises: each element of C is one chain over k, two terms a step, whatever the tile, the thread count or the vector
// width. Both operands are converted into pairs in the thread's scratch memory: A as an image of some of its rows, B
// panel by panel.
// Included inside the namespace of an instruction set.

// to[p * to_stride + l] = pair of rows 2 p and 2 p + 1 of x at column l, for `columns` columns. The elements of a row
// are contiguous. A row beyond `rows` counts as zero. Reads and writes whole vectors.
inline void pair_rows(const float* x, index_t stride, index_t rows, index_t columns, Pair* to, index_t to_stride) {
  for (index_t k = 0; k < rows; k += 2)
    for (index_t l = 0; l < columns; l += WIDTH<float>) {
      const float* p = x + k * stride + l;
      const index_t n = columns - l;
      store(to + k / 2 * to_stride + l, pairs(load_n(p, n), k + 1 < rows ? load_n(p + stride, n) : vf{}));
    }
}

// to[p] = pair of x[2 p] and x[2 p + 1], for n elements; an element beyond n counts as zero. Writes whole vectors.
inline void pair_along(const float* x, index_t n, Pair* to) {
  constexpr index_t W = WIDTH<float>;
  for (index_t k = 0; k < n; k += 2 * W) {
    const vf low = load_n(x + k, n - k), high = n - k > W ? load_n(x + k + W, n - k - W) : vf{};
    store(to + k / 2, pairs(evens(low, high), odds(low, high)));
  }
}

// The sizes of the images of a product: rows of A at a time, and pairs of scratch memory.
struct PairBlocks {
  index_t depth, rows, image, panel;

  PairBlocks(index_t M, index_t K, bool cut) {
    depth = cut && K > 2 * PACK_DEPTH ? 2 * PACK_DEPTH : K;
    const index_t steps = padded(depth / 2 + 1);
    // Whole groups of tiles, because a transposed input gradient collects a group before it transposes it.
    rows = IMAGE / steps / (TURNED_GROUP * MR) * (TURNED_GROUP * MR);
    if (rows < TURNED_GROUP * MR) rows = TURNED_GROUP * MR;
    if (rows > M) rows = M;
    image = padded(rows) * steps, panel = steps * NR<float>;
  }
  static index_t padded(index_t n) { return (n + LANES - 1) / LANES * LANES; }
};

inline index_t pair_scratch(index_t M, index_t K, bool cut) {
  const PairBlocks blocks(M, K, cut);
  return blocks.image + blocks.panel;
}

// to[i * to_stride + p] = pair p along row i of x. One of the strides of x is 1. Writes zeros to the end of a vector.
inline void pairs_by_row(Matrix<const float> x, Pair* to, index_t to_stride) {
  constexpr index_t W = WIDTH<float>;
  if (x.col_stride == 1) {
    for (index_t i = 0; i < x.rows; ++i) pair_along(x.row(i), x.cols, to + i * to_stride);
    return;
  }
  for (index_t i = 0; i < x.rows; i += W)
    for (index_t k = 0; k < x.cols; k += 2 * W) {
      alignas(64) Pair block[W * W] = {};
      const index_t depth = x.cols - k < 2 * W ? x.cols - k : 2 * W;
      pair_rows(x.row(i) + k * x.col_stride, x.col_stride, depth, x.rows - i < W ? x.rows - i : W, block, W);
      transpose_block(block, W, to + i * to_stride + k / 2, to_stride);
    }
}

// to[p * to_stride + j] = pair p along column j of x. One of the strides of x is 1.
inline void pairs_by_column(Matrix<const float> x, Pair* to, index_t to_stride) {
  constexpr index_t W = WIDTH<float>;
  if (x.col_stride == 1) return pair_rows(x.data, x.row_stride, x.rows, x.cols, to, to_stride);
  alignas(64) Pair block[W * W] = {};
  for (index_t j = 0; j < x.cols; j += W)
    for (index_t k = 0; k < x.rows; k += 2 * W) {
      for (index_t l = 0; l < W && j + l < x.cols; ++l)
        pair_along(x.data + k + (j + l) * x.col_stride, x.rows - k < 2 * W ? x.rows - k : 2 * W, block + l * W);
      transpose_block(block, W, to + k / 2 * to_stride + j, to_stride);
    }
}

// Multiplies the images of a product by the multiply-adds of vectors.
struct VectorPairs {
  // The image of A is by columns if those are contiguous.
  static Operands<Pair> image(Matrix<const float> A, Pair* to) {
    Operands<Pair> o{to, nullptr, 1, 1, NR<float>, (A.cols + 1) / 2, true, true};
    if (A.col_stride == 1) {
      o.a_row = PairBlocks::padded(o.steps);
      pairs_by_row(A, to, o.a_row);
    } else {
      o.a_col = PairBlocks::padded(A.rows);
      pairs_by_column(transposed(A), to, o.a_col);
    }
    return o;
  }
  static void finish_panel(const Operands<Pair>&, Pair*) {}
  static constexpr auto run = run_tiles<float, Pair>;
};

// As gemm(): one of A's and one of B's strides is 1. K is cut only if there is a `partial`.
template <class Engine>
void gemm_pairs(Matrix<const float> A, Matrix<const float> B, Matrix<float> partial, float* scratch,
                Epilogue<float> epilogue, int tid, int nt, const Update<float>& update) {
  const index_t M = A.rows, N = B.cols, K = A.cols;
  const PairBlocks size(M, K, partial.data);
  Pair* image = reinterpret_cast<Pair*>(scratch);
  Pair* panel_pairs = image + size.image;
  for (index_t i0 = 0; i0 < M; i0 += size.rows) {
    const index_t rows = M - i0 < size.rows ? M - i0 : size.rows;
    index_t k0 = 0;
    do {
      const index_t depth = K - k0 < size.depth ? K - k0 : size.depth;
      const float* a = A.data + i0 * A.row_stride + k0 * A.col_stride;
      Operands<Pair> o = Engine::image({a, rows, depth, A.row_stride, A.col_stride, false}, image);
      o.b = panel_pairs, o.first = k0 == 0, o.last = k0 + depth >= K;
      for_panels((N + WIDTH<float> - 1) / WIDTH<float>, (rows + MR - 1) / MR, tid, nt,
                 [&](index_t panel, index_t begin, index_t end) {
                   const index_t j0 = panel * NR<float>, cols = N - j0 < NR<float> ? N - j0 : NR<float>;
                   const float* b = B.data + k0 * B.row_stride + j0 * B.col_stride;
                   pairs_by_column({b, depth, cols, B.row_stride, B.col_stride, false}, panel_pairs, NR<float>);
                   Engine::finish_panel(o, panel_pairs);
                   Engine::run(o, i0, rows, begin, end, j0, cols, coming(B, k0, depth, j0 + NR<float>), partial,
                               epilogue, update);
                 });
      k0 += depth;
    } while (k0 < K);
  }
}

// A product of a step, in the precision of the program.
template <class T>
inline void product(PairProduct bfloat16, Matrix<const T> A, Matrix<const T> B, Matrix<T> partial, T* scratch,
                    Epilogue<T> epilogue, int tid, int nt, const Update<T>& update = {}) {
  if constexpr (sizeof(T) == 4)
    if (bfloat16) return bfloat16(A, B, partial, scratch, epilogue, tid, nt, update);
  gemm(A, B, partial, scratch, epilogue, tid, nt, update);
}
