// Matrix product in bfloat16 by tile registers, under the same epilogues as gemm().
//
// Promises: an element of C is a sum over blocks of 32 terms in order. In a block the even and the odd terms are summed
// apart. So the bits depend neither on the thread count nor on the other elements.
// Included inside the namespace of an instruction set.

// C = [C +] A B for 16 or 32 rows and columns. Rows of A are a_row pairs apart, rows of B and C are NR apart.
template <bool TWO_ROWS, bool TWO_COLUMNS>
inline void multiply_tiles([[maybe_unused]] TileRegisters& tiles, const Pair* a, index_t a_row, const Pair* b,
                           index_t steps, bool first, float* c) {
  constexpr index_t N = NR<float>;
  if (first) {
    TILE_ZERO(0);
    if constexpr (TWO_COLUMNS) TILE_ZERO(1);
    if constexpr (TWO_ROWS) TILE_ZERO(2);
    if constexpr (TWO_ROWS && TWO_COLUMNS) TILE_ZERO(3);
  } else {
    TILE_LOAD_SUMS(0, c, N);
    if constexpr (TWO_COLUMNS) TILE_LOAD_SUMS(1, c + 16, N);
    if constexpr (TWO_ROWS) TILE_LOAD_SUMS(2, c + 16 * N, N);
    if constexpr (TWO_ROWS && TWO_COLUMNS) TILE_LOAD_SUMS(3, c + 16 * N + 16, N);
  }
  for (index_t s = 0; s < steps; s += 16, a += 16, b += 16 * N) {
    TILE_LOAD(4, a, a_row);
    TILE_LOAD(6, b, N);
    TILE_MULTIPLY(0, 4, 6);
    if constexpr (TWO_COLUMNS) {
      TILE_LOAD(7, b + 16, N);
      TILE_MULTIPLY(1, 4, 7);
    }
    if constexpr (TWO_ROWS) {
      TILE_LOAD(5, a + 16 * a_row, a_row);
      TILE_MULTIPLY(2, 5, 6);
    }
    if constexpr (TWO_ROWS && TWO_COLUMNS) TILE_MULTIPLY(3, 5, 7);
  }
  TILE_STORE(0, c, N);
  if constexpr (TWO_COLUMNS) TILE_STORE(1, c + 16, N);
  if constexpr (TWO_ROWS) TILE_STORE(2, c + 16 * N, N);
  if constexpr (TWO_ROWS && TWO_COLUMNS) TILE_STORE(3, c + 16 * N + 16, N);
}

// Multiplies the images of a product by tile registers.
struct TilePairs {
  static constexpr index_t ROWS = 96;  // rows of C at a time: whole tiles of registers, and whole tiles of epilogues
  static_assert(ROWS % 32 == 0 && ROWS % MR == 0 && NR<float> % 32 == 0 && WIDTH<float> == 16);

  // Rows have whole blocks of 32 terms. The last rows of a tile may lie in the panel; their results are not used.
  static Operands<Pair> image(Matrix<const float> A, Pair* to) {
    Operands<Pair> o{to, nullptr, PairBlocks::padded((A.cols + 1) / 2), 1, NR<float>, (A.cols + 1) / 2, true, true};
    pairs_by_row(A, to, o.a_row);
    return o;
  }
  // The zeros of A need finite factors.
  static void finish_panel(const Operands<Pair>& o, Pair* panel) {
    const index_t end = PairBlocks::padded(o.steps);
    __builtin_memset(panel + o.steps * NR<float>, 0, size_t(end - o.steps) * NR<float> * sizeof(Pair));
  }

  static void run(const Operands<Pair>& o, index_t origin, index_t M, index_t begin, index_t end, index_t col,
                  index_t cols, const Coming&, const Matrix<float>& partial, const Epilogue<float> epilogue,
                  const Update<float>& update) {
    constexpr index_t N = NR<float>;
    const index_t last = end * MR < M ? end * MR : M;
    TileRegisters tiles;
    alignas(64) float c[ROWS * N];
    for (index_t i = begin * MR; i < last; i += ROWS) {
      const index_t rows = last - i < ROWS ? last - i : ROWS;
      const auto sums = [&](index_t r) { return partial.row(origin + i + r) + col; };
      for (index_t r = 0; !o.first && r < rows; ++r) __builtin_memcpy(c + r * N, sums(r), size_t(cols) * sizeof(float));
      for (index_t j = 0; j < cols; j += 32)
        for (index_t r = 0; r < rows; r += 32) {
          const auto multiply = rows - r > 16
                                    ? (cols - j > 16 ? multiply_tiles<true, true> : multiply_tiles<true, false>)
                                    : (cols - j > 16 ? multiply_tiles<false, true> : multiply_tiles<false, false>);
          multiply(tiles, o.a + (i + r) * o.a_row, o.a_row, o.b + j, o.steps, o.first, c + r * N + j);
        }
      for (index_t r = 0; !o.last && r < rows; ++r) __builtin_memcpy(sums(r), c + r * N, size_t(cols) * sizeof(float));
      for (index_t r = 0; o.last && r < rows; r += MR) {
        const auto part = [&](index_t at) -> Tile {
          return {origin + i + at, col, int(rows - at < MR ? rows - at : MR), cols};
        };
        if (update.W.data && r + MR < rows) prefetch(update, part(r + MR));
        epilogue(part(r), c + r * N);
      }
    }
  }

  // Fetches what the epilogue writes for a tile.
  static void prefetch(const Update<float>& update, const Tile& t) {
    for (index_t i = t.row; i < t.row + t.rows; ++i)
      for (index_t j = t.col; j < t.col + t.cols; j += LINE / index_t(sizeof(float)))
        for (const Matrix<float>* x : {&update.W, &update.m, &update.v}) __builtin_prefetch(x->row(i) + j, 1);
  }
};
