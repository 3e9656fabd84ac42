// Rows of the sources, and dense layers forward and backward.
// Included inside the namespace of an instruction set.

template <class T>
inline index_t rows_of(const Args<T>& args, const Context<T>& ctx, Slot i) {
  return args.batch[int(i)] ? ctx.m : args[i].rows;
}

// The rows of the batch, as a read-only matrix.
template <class T>
inline Matrix<const T> view(const Args<T>& args, const Context<T>& ctx, Slot i) {
  const Matrix<T>& s = args[i];
  return {s.data, rows_of(args, ctx, i), s.cols, s.row_stride, 1, true};
}
template <class T>
inline Matrix<const T> rows_from(Matrix<const T> m, const Range& rows) {
  m.data = m.row(rows.begin);
  m.rows = rows.end - rows.begin;
  return m;
}

// --- gather ----------------------------------------------------------------------------------------------------------

// The strides of user arrays are in bytes, and elements may be unaligned.
template <class In>
inline In read(const char* p) {
  In value;
  __builtin_memcpy(&value, p, sizeof value);
  return value;
}

template <class T, class In>
inline void gather_dense_row(const SourceView& s, index_t row, T* out) {
  const char* p = s.data + row * s.row_stride;
  if (s.col_stride == index_t(sizeof(In))) {
    for (index_t j = 0; j < s.cols; ++j) out[j] = T(read<In>(p + j * index_t(sizeof(In))));
  } else {
    for (index_t j = 0; j < s.cols; ++j) out[j] = T(read<In>(p + j * s.col_stride));
  }
}

template <class T, class In, class Index>
inline void gather_csr_row(const SourceView& s, index_t row, const T* less, T* out) {
  const Index* indptr = static_cast<const Index*>(s.indptr);
  const Index* indices = static_cast<const Index*>(s.indices);
  const In* values = reinterpret_cast<const In*>(s.data);
  for (index_t j = 0; j < s.cols; ++j) out[j] = less ? T(0) - less[j] : T(0);
  for (index_t k = indptr[row]; k < index_t(indptr[row + 1]); ++k) out[indices[k]] += T(values[k]);
}

template <class T>
void gather(const Args<T>& args, const Context<T>& ctx, int tid, int nt) {
  using O = op::GATHER;
  const SourceView& s = ctx.sources[args[O::source]];
  const T* less = args[O::shift].data;
  const Range rows(ctx.m, tid, nt);
  for (index_t i = rows.begin; i < rows.end; ++i) {
    const index_t row = ctx.rows[i];
    T* out = args[O::out].row(i);
    if (!s.is_csr) {
      s.is_double ? gather_dense_row<T, double>(s, row, out) : gather_dense_row<T, float>(s, row, out);
      for (index_t j = 0; less && j < s.cols; ++j) out[j] -= less[j];
    } else if (s.is_index64) {
      s.is_double ? gather_csr_row<T, double, int64_t>(s, row, less, out)
                  : gather_csr_row<T, float, int64_t>(s, row, less, out);
    } else {
      s.is_double ? gather_csr_row<T, double, int32_t>(s, row, less, out)
                  : gather_csr_row<T, float, int32_t>(s, row, less, out);
    }
  }
}
NARROWS_RUN(GATHER, gather)

template <class T>
void shift(const Args<T>& args, const Context<T>& ctx, int tid, int nt) {
  using O = op::SHIFT;
  const SourceView& s = ctx.sources[SOURCE_SHIFT];
  const T* b = args[O::b].data;
  T* out = args[O::out].data;
  const Range columns(args[O::out].cols, tid, nt);
  for (index_t j = columns.begin; j < columns.end; ++j) {
    const char* p = s.data + j * s.col_stride;
    const T value = s.is_double ? T(read<double>(p)) : T(read<float>(p));
    out[j] = b ? value + b[j] : value;
  }
}
NARROWS_RUN(SHIFT, shift)

// The condition of the row, from 0.
inline double batch_number(const SourceView& s, index_t row) {
  const char* p = s.data + row * s.row_stride;
  return s.is_double ? read<double>(p) : double(read<float>(p));
}

template <class T>
void condition(const Args<T>& args, const Context<T>& ctx, int tid, int nt) {
  using O = op::CONDITION;
  const Matrix<T>&z = args[O::z], &out = args[O::out];
  const Range rows(ctx.m, tid, nt);
  for (index_t i = rows.begin; i < rows.end; ++i) {
    const double number = batch_number(ctx.sources[SOURCE_CONDITION], ctx.rows[i]);
    T* to = out.row(i);
    __builtin_memcpy(to, z.row(i), size_t(z.cols) * sizeof(T));
    for (index_t j = z.cols; j < out.cols; ++j) to[j] = number == double(j - z.cols) ? T(1) : T(0);
  }
}
NARROWS_RUN(CONDITION, condition)

// --- dense -----------------------------------------------------------------------------------------------------------

// Calls fn(i)(j, z, n) for every vector z of a finished tile. It lies at row i, column j, and its first n lanes count.
// fn(i) finds the rows of the operands once for a row of the tile.
template <class T, class Fn>
inline void for_vectors(const Tile& t, const T* tile, const Fn& fn) {
  constexpr index_t W = WIDTH<T>;
  const index_t end = t.col + t.cols;
  for (int i = 0; i < t.rows; ++i, tile += NR<T>) {
    const auto row = fn(t.row + i);
    index_t j = t.col;
    for (; j + W <= end; j += W) row(j, load(tile + j - t.col), W);
    if (j < end) row(j, load(tile + j - t.col), end - j);
  }
}

template <class Act, class T>
inline void dense_forward(const LayerArgs<T>& l, int tid, int nt) {
  product<T>(
      l.bfloat16, l.x, l.W, l.out, l.scratch,
      [bias = l.bias, pre = l.pre, out = l.out](const Tile& t, const T* tile) {
        for_vectors(t, tile, [&](index_t i) {
          return [=, pre = pre.data ? pre.row(i) : nullptr, out = out.row(i)](index_t j, vec<T> z, index_t n) {
            if (bias) z += load_n(bias + j, n);
            if (pre) store_n(pre + j, z, n);
            store_n(out + j, Act::value(z), n);
          };
        });
      },
      tid, nt);
}

template <class Act, class T>
void dense(const Args<T>& args, const Context<T>& ctx, int tid, int nt) {
  using O = op::DENSE;
  LayerArgs<T> l;
  l.x = view(args, ctx, O::x);
  l.W = args[O::transposed] ? transposed(view(args, ctx, O::W)) : view(args, ctx, O::W);
  l.bias = args[O::b].data;
  l.out = args[O::out];
  l.pre = args[O::pre];
  l.scratch = ctx.scratch + tid * ctx.scratch_stride;
  l.bfloat16 = ctx.bfloat16;
  if (!ctx.split_rows) return dense_forward<Act>(l, tid, nt);
  const Range rows(ctx.m, tid, nt);
  l.x = rows_from(l.x, rows);
  l.out.data = l.out.row(rows.begin);
  if (l.pre.data) l.pre.data = l.pre.row(rows.begin);
  dense_forward<Act>(l, 0, 1);
}
NARROWS_RUN_BY_ACTIVATION(DENSE, dense)
template <class T>
Cost cost_of(op::DENSE, const Args<T>& args, index_t batch, bool bfloat16) {
  using O = op::DENSE;
  const Matrix<T>& W = args[O::W];
  return {bfloat16 ? pair_scratch(batch, args[O::x].cols, true) : 0, 2.0 * double(batch) * double(W.rows * W.cols)};
}

template <class Act, class T>
void link(const Args<T>& args, const Context<T>& ctx, int tid, int nt) {
  using O = op::LINK;
  const Matrix<T>& z = args[O::z];
  const Range rows(ctx.m, tid, nt);
  for (index_t i = rows.begin; i < rows.end; ++i)
    for (index_t j = 0; j < z.cols; j += WIDTH<T>) store(z.row(i) + j, Act::value(load(z.row(i) + j)));
}

template <class Act, class T>
void activate(Matrix<const T> z, const LayerArgs<T>& l, int tid, int nt) {
  const Range rows(l.out.rows, tid, nt);
  for (index_t i = rows.begin; i < rows.end; ++i)
    for (index_t j = 0; j < l.out.cols; j += WIDTH<T>) {
      const index_t n = l.out.cols - j;
      vec<T> v = load_n(z.row(i) + j, n);
      if (l.bias) v += load_n(l.bias + j, n);
      if (l.pre.data) store_n(l.pre.row(i) + j, v, n);
      store_n(l.out.row(i) + j, Act::value(v), n);
    }
}

template <class Act, class T>
void slope(Matrix<const T> dA, Matrix<const T> saved, Matrix<T> out, int tid, int nt) {
  const Range rows(out.rows, tid, nt);
  for (index_t i = rows.begin; i < rows.end; ++i)
    for (index_t j = 0; j < out.cols; j += WIDTH<T>) {
      const index_t n = out.cols - j;
      store_n(out.row(i) + j, load_n(dA.row(i) + j, n) * Act::slope(load_n(saved.row(i) + j, n)), n);
    }
}

// d = d activation'(saved scale), n elements: for kernels that are compiled once for all activations.
template <class T>
using TimesSlope = void (*)(T* d, const T* saved, T scale, index_t n);
template <class Act, class T>
void times_slope(T* d, const T* saved, T scale, index_t n) {
  for (index_t j = 0; j < n; j += WIDTH<T>)
    store_n(d + j, load_n(d + j, n - j) * Act::slope(load_n(saved + j, n - j) * scale), n - j);
}
template <class T>
inline TimesSlope<T> times_slope_of(int activation) {
  return by_activation(activation, [](auto act) -> TimesSlope<T> { return times_slope<decltype(act), T>; });
}

template <class T>
void wgrad(const Args<T>& args, const Context<T>& ctx, int tid, int nt) {
  using O = op::WGRAD;
  const Matrix<T> dW = args[O::dW];
  const bool accumulate = args[O::accumulate];
  // K is the batch here. It is never cut, because there is no place for partial sums.
  product<T>(
      ctx.bfloat16, transposed(view(args, ctx, O::x)), view(args, ctx, O::dz), Matrix<T>{},
      ctx.scratch + tid * ctx.scratch_stride,
      [=](const Tile& t, const T* tile) {
        for_vectors(t, tile, [&](index_t i) {
          return [accumulate, out = dW.row(i)](index_t j, vec<T> g, index_t n) {
            store_n(out + j, accumulate ? load_n(out + j, n) + g : g, n);
          };
        });
      },
      tid, nt);
}
NARROWS_RUN(WGRAD, wgrad)
template <class T>
Cost cost_of(op::WGRAD, const Args<T>& args, index_t batch, bool bfloat16) {
  using O = op::WGRAD;
  return {bfloat16 ? pair_scratch(args[O::x].cols, batch, false) : 0};
}

template <class Act, class T>
void dgrad(const Args<T>& args, const Context<T>& ctx, int tid, int nt) {
  using O = op::DGRAD;
  Matrix<T> saved = args[O::saved], out = args[O::out];
  Matrix<const T> dz = view(args, ctx, O::dz);
  Matrix<const T> W = view(args, ctx, O::W);
  if (!args[O::transposed]) W.rows = out.cols;  // the other inputs are no outputs of a layer
  const T scale = T(args[O::scale]);
  T* scratch = ctx.scratch + tid * ctx.scratch_stride;
  if (ctx.split_rows) {
    const Range rows(ctx.m, tid, nt);
    dz = rows_from(dz, rows);
    saved.data = saved.row(rows.begin), out.data = out.row(rows.begin);
    tid = 0, nt = 1;
  }
  const Matrix<const T> Wt = args[O::transposed] ? W : transposed(W);
  const auto finish = [=](index_t i) {
    return [scale, saved = saved.row(i), out = out.row(i)](index_t j, vec<T> g, index_t n)
               __attribute__((always_inline)) { store_n(out + j, g * Act::slope(load_n(saved + j, n) * scale), n); };
  };
  if (args.turned && nt == 1) {
    // The transposed product packs the gradients of the batch and not the larger weight. Tiles are collected until they
    // fill whole blocks, and then transposed back.
    constexpr index_t W = WIDTH<T>, GROUP = TURNED_GROUP;
    alignas(64) T group[GROUP * MR * NR<T>];
    product<T>(
        ctx.bfloat16, transposed(Wt), transposed(dz), Matrix<T>{}, scratch,
        [finish, to = &group[0], rows = Wt.cols](const Tile& t, const T* tile) {
          const index_t at = t.row / MR % GROUP;
          alignas(64) T block[W * W];
          __builtin_memcpy(to + at * MR * NR<T>, tile, size_t(t.rows) * NR<T> * sizeof(T));
          const index_t end = t.row + t.rows;
          if (at < GROUP - 1 && end < rows) return;
          for (index_t i = t.row - at * MR; i < end; i += W)
            for (index_t r = 0; r < t.cols; r += W) {
              transpose_block(to + (i - (t.row - at * MR)) * NR<T> + r, NR<T>, block, W);
              for (index_t k = 0; k < W && r + k < t.cols; ++k) finish(t.col + r + k)(i, load(block + k * W), end - i);
            }
        },
        0, 1);
    return;
  }
  product<T>(
      ctx.bfloat16, dz, Wt, out, scratch, [=](const Tile& t, const T* tile) { for_vectors(t, tile, finish); }, tid, nt);
}
NARROWS_RUN_BY_ACTIVATION(DGRAD, dgrad)
template <class T>
Cost cost_of(op::DGRAD, const Args<T>& args, index_t batch, bool bfloat16) {
  using O = op::DGRAD;
  const Matrix<T>&W = args[O::W], &dz = args[O::dz], &out = args[O::out];
  Cost cost{bfloat16 ? pair_scratch(batch, dz.cols, true) : 0, 2.0 * double(batch) * double(W.rows * W.cols)};
  cost.turnable = dz.cols <= TURNED_DEPTH;
  const index_t turned = bfloat16 ? pair_scratch(out.cols, dz.cols, false) : dz.cols * 64;
  if (cost.turnable && turned > cost.scratch) cost.scratch = turned;
  return cost;
}

// --- column sums -----------------------------------------------------------------------------------------------------

// Columns are cut into grains of LANES; one thread walks all rows of its columns in order. fn(j, sums, n) takes them.
template <class T, class Fn>
inline void column_sums(Matrix<const T> x, const T* weight, index_t weight_stride, const Fn& fn, int tid, int nt) {
  constexpr int N = LANES / WIDTH<T>;
  const Range grains((x.cols + LANES - 1) / LANES, tid, nt);
  for (index_t g = grains.begin; g < grains.end; ++g) {
    const index_t j = g * LANES, n = x.cols - j < LANES ? x.cols - j : LANES;
    vec<T> sum[N] = {};
    for (index_t i = 0; i < x.rows; ++i) {
      const T w = weight ? weight[i * weight_stride] : T(1);
      for (int v = 0; v < N && v * WIDTH<T> < n; ++v)
        sum[v] += w * load_n(x.row(i) + j + v * WIDTH<T>, n - v * WIDTH<T>);
    }
    for (int v = 0; v < N && v * WIDTH<T> < n; ++v) fn(j + v * WIDTH<T>, sum[v], n - v * WIDTH<T>);
  }
}

template <class T>
void colsum(const Args<T>& args, const Context<T>& ctx, int tid, int nt) {
  using O = op::COLSUM;
  const T scale = args[O::mean] ? T(1.0 / double(ctx.m)) : T(1);
  const bool accumulate = args[O::accumulate];
  T* out = args[O::out].data;
  column_sums(
      view(args, ctx, O::x), static_cast<const T*>(args[O::weight].data), args[O::weight].row_stride,
      [&](index_t j, vec<T> sum, index_t n) {
        store_n(out + j, accumulate ? load_n(out + j, n) + sum * scale : sum * scale, n);
      },
      tid, nt);
}
NARROWS_RUN(COLSUM, colsum)

template <class T>
void colsum_of(Matrix<const T> x, T* out, int tid, int nt) {
  column_sums(
      x, static_cast<const T*>(nullptr), 0, [&](index_t j, vec<T> sum, index_t n) { store_n(out + j, sum, n); }, tid,
      nt);
}
