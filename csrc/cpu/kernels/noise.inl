// Corruption of the input, and dropout.
//
// Promises: the random word of an element depends on its row and column alone (see philox.h). Every instruction set
// drops, sets and keeps the same elements. Whole vectors are written, so padding gets noise, too. Included inside the
// namespace of an instruction set.

// The same word of several blocks, in the low halves of the lanes.
typedef uint64_t vw __attribute__((vector_size(NARROWS_VECTOR_BYTES)));

template <>
inline void multiply_words(vw a, uint32_t b, vw& high, vw& low) {
  const vw factor = vw{} + b;
#if defined(__AVX512F__)
  // gcc 12 warns in its own header about the form without a mask.
  low = vw(_mm512_maskz_mul_epu32(-1, __m512i(a), __m512i(factor)));
#elif defined(__AVX2__)
  low = vw(_mm256_mul_epu32(__m256i(a), __m256i(factor)));
#elif defined(__SSE2__)
  low = vw(_mm_mul_epu32(__m128i(a), __m128i(factor)));
#else
  low = (a & 0xFFFFFFFFu) * factor;
#endif
  high = low >> 32;
}

constexpr int BLOCKS = NARROWS_VECTOR_BYTES / 8;  // of a vector
constexpr int GROUPS = 4;  // vectors whose rounds alternate, so that none waits for the round before
// Cells are drawn before they are used. In one loop for both, compilers would move each group to its use, and one would
// wait for the other again.
constexpr index_t DRAWN = 512;

template <int... I>
inline vw count(std::integer_sequence<int, I...>) {
  return vw{I...};
}

// The cells of n <= DRAWN columns of a row, from column j on; the last group is drawn as a whole.
inline void draw_cells(uint64_t seed, int stream, uint32_t step, index_t row, index_t j, index_t n, int32_t* cells) {
  typedef uint32_t vu __attribute__((vector_size(NARROWS_VECTOR_BYTES)));
  constexpr auto lanes = std::make_integer_sequence<int, BLOCKS>();
  static_assert(DRAWN % (4 * BLOCKS * GROUPS) == 0, "groups are whole");
  for (const index_t end = j + n; j < end; j += 4 * BLOCKS * GROUPS) {
    vw x[GROUPS][4];
#pragma GCC unroll 4
    for (int g = 0; g < GROUPS; ++g) {
      x[g][0] = count(lanes) + uint64_t(j / 4 + g * BLOCKS);
      x[g][1] = vw{} + uint64_t(row);
      x[g][2] = vw{} + step;
      x[g][3] = vw{} + uint32_t(stream);
    }
    philox4x32(x, seed);
#pragma GCC unroll 4
    for (int g = 0; g < GROUPS; ++g) {
      // Words 0 and 1 of a block side by side, words 2 and 3 likewise; then both are interleaved.
      const vd head = bit_cast<vd>((x[g][0] & 0xFFFFFFFFu) | x[g][1] << 32);
      const vd tail = bit_cast<vd>((x[g][2] & 0xFFFFFFFFu) | x[g][3] << 32);
      const vu low = philox_cell(bit_cast<vu>(zip<double>(head, tail, lanes)));
      const vu high = philox_cell(bit_cast<vu>(zip_upper<double>(head, tail, lanes)));
      __builtin_memcpy(cells, &low, sizeof low);
      __builtin_memcpy(cells + 2 * BLOCKS, &high, sizeof high);
      cells += 4 * BLOCKS;
    }
  }
}

// Replaces each vector v of x by fn(v, cells). Cells are numbers below 2**24, exact in T. (x is a copy, because a store
// might change what a reference refers to.)
template <class T, class Fn>
inline void for_cells(const Matrix<T> x, const Context<T>& ctx, int stream, int tid, int nt, const Fn fn) {
  typedef int32_t ints __attribute__((vector_size(4 * WIDTH<T>)));
  const uint64_t seed = ctx.seed;
  const uint32_t step = ctx.step;
  const Range rows(ctx.m, tid, nt);
  alignas(64) int32_t drawn[DRAWN];
  for (index_t i = rows.begin; i < rows.end; ++i)
    for (index_t j = 0; j < x.cols; j += DRAWN) {
      const index_t n = x.cols - j < DRAWN ? x.cols - j : DRAWN;
      draw_cells(seed, stream, step, i, j, n, drawn);
      T* p = x.row(i) + j;
      for (index_t l = 0; l < n; l += WIDTH<T>) {
        ints cells;
        __builtin_memcpy(&cells, drawn + l, sizeof cells);
        store(p + l, fn(load(p + l), __builtin_convertvector(cells, vec<T>)));
      }
    }
}

// The standard normal numbers of cells.
template <class T>
inline vec<T> normal_of(vec<T> cells) {
  // All exact: q = u - 1/2 and its distance to the end of the interval are odd multiples of 2**-25.
  const vec<T> odd = (cells - T(1 << 23)) * T(2) + T(1);
  return normal_quantile(odd * T(0x1p-25), (T(1 << 24) - abs_(odd)) * T(0x1p-25));
}

template <class T>
void corrupt_gaussian(const Args<T>& args, const Context<T>& ctx, int tid, int nt) {
  using O = op::CORRUPT;
  const T level = T(args[O::level]);
  for_cells(args[O::x], ctx, args[O::stream], tid, nt,
            [=](vec<T> x, vec<T> cells) { return x + level * normal_of<T>(cells); });
}

template <class T>
void corrupt_masking(const Args<T>& args, const Context<T>& ctx, int tid, int nt) {
  using O = op::CORRUPT;
  const vec<T> drop = splat<vec<T>>(philox_threshold(args[O::level]));
  for_cells(args[O::x], ctx, args[O::stream], tid, nt,
            [=](vec<T> x, vec<T> cells) { return select(cells < drop, vec<T>{}, x); });
}

template <class T>
void corrupt_salt_and_pepper(const Args<T>& args, const Context<T>& ctx, int tid, int nt) {
  using O = op::CORRUPT;
  const vec<T> any = splat<vec<T>>(philox_threshold(args[O::level]));
  const vec<T> pepper = splat<vec<T>>(philox_threshold(args[O::level] / 2));
  const vec<T> low = splat<vec<T>>(args[O::low]), high = splat<vec<T>>(args[O::high]);
  for_cells(args[O::x], ctx, args[O::stream], tid, nt,
            [=](vec<T> x, vec<T> cells) { return select(cells < any, select(cells < pepper, low, high), x); });
}
template <class T>
Op<T> run_of(op::CORRUPT, const Args<T>& args) {
  const int kind = args[op::CORRUPT::kind];
  return kind == CORRUPT_GAUSSIAN  ? corrupt_gaussian<T>
         : kind == CORRUPT_MASKING ? corrupt_masking<T>
                                   : corrupt_salt_and_pepper<T>;
}

template <class T>
void dropout(const Args<T>& args, const Context<T>& ctx, int tid, int nt) {
  using O = op::DROPOUT;
  const vec<T> drop = splat<vec<T>>(philox_threshold(args[O::rate]));
  const T scale = T(1 / (1 - args[O::rate]));
  for_cells(args[O::x], ctx, args[O::stream], tid, nt,
            [=](vec<T> x, vec<T> cells) { return select(cells < drop, vec<T>{}, x * scale); });
}
NARROWS_RUN(DROPOUT, dropout)
