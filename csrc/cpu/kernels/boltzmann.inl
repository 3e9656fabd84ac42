// Restricted Boltzmann machines: draws of units given their means, and the contrast of the two phases.
// Included inside the namespace of an instruction set.

// Stores fn(mean, cells) for each vector of the means.
template <class T, class Fn>
inline void draw_units(const Args<T>& args, const Context<T>& ctx, int tid, int nt, const Fn fn) {
  using O = op::DRAW;
  typedef int32_t ints __attribute__((vector_size(4 * WIDTH<T>)));
  const Matrix<T> mean = args[O::mean], out = args[O::out];
  const Range rows(ctx.m, tid, nt);
  alignas(64) int32_t drawn[DRAWN];
  for (index_t i = rows.begin; i < rows.end; ++i)
    for (index_t j = 0; j < out.cols; j += DRAWN) {
      const index_t n = out.cols - j < DRAWN ? out.cols - j : DRAWN;
      draw_cells(ctx.seed, args[O::stream], ctx.step, i, j, n, drawn);
      const T* p = mean.row(i) + j;
      T* q = out.row(i) + j;
      for (index_t l = 0; l < n; l += WIDTH<T>) {
        ints cells;
        __builtin_memcpy(&cells, drawn + l, sizeof cells);
        store_n(q + l, fn(load_n(p + l, n - l), __builtin_convertvector(cells, vec<T>)), n - l);
      }
    }
}

template <class T>
void draw_bernoulli(const Args<T>& args, const Context<T>& ctx, int tid, int nt) {
  // (cell + 1/2) / 2**24 < mean without rounding: the difference is exact where it is near -1/2.
  draw_units(args, ctx, tid, nt, [](vec<T> mean, vec<T> cells) {
    const vec<T> one = splat<vec<T>>(1);
    return select(cells - mean * T(1 << 24) < splat<vec<T>>(-0.5), one, vec<T>{});
  });
}

template <class T>
void draw_gaussian(const Args<T>& args, const Context<T>& ctx, int tid, int nt) {
  draw_units(args, ctx, tid, nt, [](vec<T> mean, vec<T> cells) { return mean + normal_of<T>(cells); });
}
template <class T>
Op<T> run_of(op::DRAW, const Args<T>& args) {
  return args[op::DRAW::kind] == UNITS_BERNOULLI ? draw_bernoulli<T> : draw_gaussian<T>;
}

template <class T>
void contrast(const Args<T>& args, const Context<T>& ctx, int tid, int nt) {
  using O = op::CONTRAST;
  const Matrix<T>&x = args[O::x], &y = args[O::y], &out = args[O::out];
  const Range rows(ctx.m, tid, nt);
  for (index_t i = rows.begin; i < rows.end; ++i) {
    const T scale = row_scale(args[O::weight], ctx, i);
    for (index_t j = 0; j < x.cols; j += WIDTH<T>) {
      const index_t n = x.cols - j;
      store_n(out.row(i) + j, scale * (load_n(x.row(i) + j, n) - load_n(y.row(i) + j, n)), n);
    }
  }
}
NARROWS_RUN(CONTRAST, contrast)

template <class T>
void keep_rows(const Args<T>& args, const Context<T>& ctx, int tid, int nt) {
  using O = op::KEEP;
  const Matrix<T>&x = args[O::x], &out = args[O::out];
  const Range rows(ctx.m, tid, nt);
  for (index_t i = rows.begin; i < rows.end; ++i) __builtin_memcpy(out.row(i), x.row(i), size_t(x.cols) * sizeof(T));
}
NARROWS_RUN(KEEP, keep_rows)
