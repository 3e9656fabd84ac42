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

// As gemm(): one of A's and one of B's strides is 1. K is cut only if there is a `partial`.
inline void gemm_bfloat16(Matrix<const float> A, Matrix<const float> B, Matrix<float> partial, float* scratch,
                          Epilogue<float> epilogue, int tid, int nt, const Update<float>& update) {
  constexpr index_t W = WIDTH<float>;
  const index_t M = A.rows, N = B.cols, K = A.cols;
  const PairBlocks size(M, K, partial.data);
  Pair* image = reinterpret_cast<Pair*>(scratch);
  Pair* panel_pairs = image + size.image;
  for (index_t i0 = 0; i0 < M; i0 += size.rows) {
    const index_t rows = M - i0 < size.rows ? M - i0 : size.rows;
    index_t k0 = 0;
    do {
      const index_t depth = K - k0 < size.depth ? K - k0 : size.depth, steps = (depth + 1) / 2;
      Operands<Pair> o{image, panel_pairs, 1, 1, NR<float>, steps, k0 == 0, k0 + depth >= K};
      const float* a = A.data + i0 * A.row_stride + k0 * A.col_stride;
      if (A.col_stride == 1) {
        o.a_row = PairBlocks::padded(steps);
        for (index_t i = 0; i < rows; ++i) pair_along(a + i * A.row_stride, depth, image + i * o.a_row);
      } else {
        o.a_col = PairBlocks::padded(rows);
        pair_rows(a, A.col_stride, depth, rows, image, o.a_col);
      }
      for_panels((N + W - 1) / W, (rows + MR - 1) / MR, tid, nt, [&](index_t panel, index_t begin, index_t end) {
        const index_t j0 = panel * NR<float>, cols = N - j0 < NR<float> ? N - j0 : NR<float>;
        const float* b = B.data + k0 * B.row_stride + j0 * B.col_stride;
        if (B.col_stride == 1) {
          pair_rows(b, B.row_stride, depth, cols, panel_pairs, NR<float>);
        } else {
          // The columns are contiguous: pairs along W columns at a time, transposed as blocks.
          alignas(64) Pair block[W * W] = {};
          for (index_t j = 0; j < cols; j += W)
            for (index_t s = 0; s < steps; s += W) {
              for (index_t l = 0; l < W && j + l < cols; ++l)
                pair_along(b + 2 * s + (j + l) * B.col_stride, depth - 2 * s < 2 * W ? depth - 2 * s : 2 * W,
                           block + l * W);
              transpose_block(block, W, panel_pairs + s * NR<float> + j, NR<float>);
            }
        }
        run_tiles<float>(o, i0, rows, begin, end, j0, cols, coming(B, k0, depth, j0 + NR<float>), partial, epilogue,
                         update);
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
