// The first layer on CSR rows: forward, and the gradient by its weight.
//
// Promises: X is read in place and never made dense. For finite weights the bits are those of the dense ops. The chain
// of multiply-adds of an element leaves out the steps with a zero of X. The other steps keep their order. Counts
// are normalised as LOG_NORMALIZE does. Masking noise falls on the elements that CORRUPT masks. With rows minus a shift
// s, the product is less s W. The gradient is less the outer product of s and the column sums of dz. Products are in
// the type of the slots, also under bfloat16. Included inside the namespace of an instruction set.
//
// Both products take X by blocks of columns, and all rows of a thread for each block. So the block of the weight (or of
// its gradient) stays in cache. A cursor for each row marks its next nonzero. Registers hold a row of the
// result, or of dZ, one panel of columns at a time.

constexpr int PANEL_VECTORS = 8;
template <class T>
constexpr index_t PANEL = PANEL_VECTORS * WIDTH<T>;
static_assert(PANEL<float> <= SPARSE_PANEL && PANEL<double> <= SPARSE_PANEL, "a block of gradients has its room");
static_assert(SPARSE_COLUMNS % CELL_ROWS == 0, "a block holds whole cells");

// The nonzeros of a row that are not taken yet: from `next` to `end`.
struct Cursor {
  index_t next, end;
};
static_assert(sizeof(Cursor) == SPARSE_CURSOR, "cursors have their room");

// The nonzeros of one row in a block of columns: in place, or a copy in the type of the slots.
template <class T>
struct Segment {
  const T* value;
  const int32_t* column;
  index_t n;
  alignas(64) T values[SPARSE_COLUMNS];
  int32_t columns[SPARSE_COLUMNS];
};

// How many of n increasing columns are below `end`.
inline index_t count_below(const int32_t* columns, index_t n, index_t end) {
  index_t count = 0;
#if defined(__AVX512F__)
  const __m512i limit = _mm512_set1_epi32(int32_t(end));
  for (int found = 16; found == 16; count += found) {
    const __mmask16 there = n - count >= 16 ? __mmask16(-1) : first_lanes(n - count);
    const __m512i c = _mm512_maskz_loadu_epi32(there, columns + count);
    found = __builtin_popcount(_mm512_mask_cmplt_epi32_mask(there, c, limit));
  }
#else
  while (count < n && index_t(columns[count]) < end) ++count;
#endif
  return count;
}

// Takes the nonzeros before column `end` from a row, and prefetches the next ones, which the next block takes.
template <class T, class In, class Index>
void take(const SourceView& s, index_t end, Cursor& at, Segment<T>& segment) {
  const Index* indices = static_cast<const Index*>(s.indices);
  const In* values = reinterpret_cast<const In*>(s.data);
  index_t k = at.next, n = 0;
  if constexpr (std::is_same_v<In, T> && std::is_same_v<Index, int32_t>) {
    segment.value = values + k, segment.column = indices + k;
    n = count_below(indices + k, at.end - k, end), k += n;
  } else {
    segment.value = segment.values, segment.column = segment.columns;
    for (; k < at.end && index_t(indices[k]) < end; ++k, ++n)
      segment.columns[n] = int32_t(indices[k]), segment.values[n] = T(values[k]);
  }
  at.next = k, segment.n = n;
  for (index_t ahead = 0; ahead < 128; ahead += 64) {
    __builtin_prefetch(reinterpret_cast<const char*>(indices + k) + ahead, 0, 2);
    __builtin_prefetch(reinterpret_cast<const char*>(values + k) + ahead, 0, 2);
  }
}

// The rows of the batch in a source, with the noise of training if `level` is not 0.
template <class T>
class SparseRows {
 public:
  // If there is a `size_sum`, rows are counts with these sums, and are normalised to the sum `scale`.
  SparseRows(const Context<T>& ctx, int source, int stream = 0, double level = 0, const Matrix<T>& size_sum = {},
             double scale = 1)
      : ctx_(ctx),
        s_(ctx.sources[source]),
        size_sum_(size_sum),
        scale_(T(scale)),
        stream_(stream),
        drop_(ctx.learn ? int32_t(philox_threshold(level)) : 0),
        take_(s_.is_index64 ? (s_.is_double ? take<T, double, int64_t> : take<T, float, int64_t>)
                            : (s_.is_double ? take<T, double, int32_t> : take<T, float, int32_t>)) {}

  // Row i of the batch, at its first nonzero that is not before `column`.
  Cursor at(index_t i, index_t column) const {
    return s_.is_index64 ? find<int64_t>(ctx_.rows[i], column) : find<int32_t>(ctx_.rows[i], column);
  }
  void next(index_t i, index_t end, Cursor& cursor, Segment<T>& segment) const {
    take_(s_, end, cursor, segment);
    if (size_sum_.data && segment.n) normalize(size_factor(scale_, size_sum_.row(i)[0]), segment);
    if (drop_ && segment.n) mask(i, segment);
  }

 private:
  template <class Index>
  Cursor find(index_t row, index_t column) const {
    const Index* indices = static_cast<const Index*>(s_.indices);
    const Index* indptr = static_cast<const Index*>(s_.indptr);
    index_t low = indptr[row], high = indptr[row + 1];
    const index_t end = high;
    while (low < high) {
      const index_t middle = low + (high - low) / 2;
      index_t(indices[middle]) < column ? low = middle + 1 : high = middle;
    }
    return {low, end};
  }

  static void normalize(T factor, Segment<T>& segment) {
    for (index_t k = 0; k < segment.n; k += WIDTH<T>)
      store(segment.values + k, normalized(load_n(segment.value + k, segment.n - k), factor));
    segment.value = segment.values;
  }

  void mask(index_t i, Segment<T>& segment) const {
    for (index_t k = 0; k < segment.n; ++k) segment.values[k] = segment.value[k];
    segment.value = segment.values;
    for (index_t k = 0; k < segment.n; k += BLOCKS) {
      const int n = int(segment.n - k < BLOCKS ? segment.n - k : BLOCKS);
      vw x[1][4] = {{vw{}, vw{} + uint64_t(i), vw{} + ctx_.step, vw{} + uint32_t(stream_)}};
      for (int l = 0; l < n; ++l) x[0][0][l] = uint64_t(segment.column[k + l] / 4);
      philox4x32(x, ctx_.seed);
      uint64_t words[4][BLOCKS];
      __builtin_memcpy(words, x, sizeof words);
      for (int l = 0; l < n; ++l)
        if (int32_t(philox_cell(uint32_t(words[segment.column[k + l] % 4][l]))) < drop_) segment.values[k + l] = T(0);
    }
  }

  const Context<T>& ctx_;
  const SourceView& s_;
  Matrix<T> size_sum_;
  T scale_;
  int stream_;
  int32_t drop_;  // cells below this are masked
  void (*take_)(const SourceView&, index_t, Cursor&, Segment<T>&);
};

// z (V vectors) += a segment times rows of W. The row at W belongs to column `first`.
template <class T, int V>
void add_product(const Segment<T>& x, const T* W, index_t ld, index_t first, T* z) {
  vec<T> acc[V];
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) acc[v] = load(z + v * WIDTH<T>);
  for (index_t k = 0; k < x.n; ++k) {
    const vec<T> a = broadcast(x.value[k]);
    const T* w = W + (x.column[k] - first) * ld;
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) acc[v] = madd(acc[v], a, load(w + v * WIDTH<T>));
  }
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) store(z + v * WIDTH<T>, acc[v]);
}

// Rows of g, PANEL apart, += `factor` times a segment times dz (V vectors). The first row of g belongs to column
// `first`.
template <class T, int V>
void add_outer(const Segment<T>& x, T factor, const T* dz, index_t first, T* g) {
  vec<T> d[V];
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) d[v] = load(dz + v * WIDTH<T>);
  for (index_t k = 0; k < x.n; ++k) {
    const vec<T> a = broadcast(factor * x.value[k]);
    T* to = g + (x.column[k] - first) * PANEL<T>;
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store(to + v * WIDTH<T>, madd(load(to + v * WIDTH<T>), a, d[v]));
  }
}

template <class T>
struct SparseKernels {
  void (*product)(const Segment<T>&, const T*, index_t, index_t, T*);
  void (*outer)(const Segment<T>&, T, const T*, index_t, T*);
};

// The kernels for a panel of so many columns.
template <class T>
inline const SparseKernels<T>& sparse_kernels(index_t cols) {
#define V(n)                           \
  {                                    \
    add_product<T, n>, add_outer<T, n> \
  }
  static const SparseKernels<T> table[PANEL_VECTORS] = {V(1), V(2), V(3), V(4), V(5), V(6), V(7), V(8)};
#undef V
  return table[(cols + WIDTH<T> - 1) / WIDTH<T> - 1];
}

// A thread's scratch memory: a block of gradients, then the cursors of the rows.
template <class T>
inline T* sparse_block(const Context<T>& ctx, int tid) {
  return ctx.scratch + tid * ctx.scratch_stride;
}
template <class T>
inline Cursor* sparse_cursors(const Context<T>& ctx, int tid) {
  return reinterpret_cast<Cursor*>(sparse_block(ctx, tid) + SPARSE_COLUMNS * SPARSE_PANEL);
}

// `shift` may be null. Each thread computes s W along with its own rows, while W is in cache.
template <class T>
void sparse_product(const Context<T>& ctx, const SparseRows<T>& x, const T* shift, const Matrix<T>& W,
                    const Matrix<T>& out, int tid, int nt) {
  const Range rows(ctx.m, tid, nt);
  if (rows.begin == rows.end) return;
  Cursor* cursors = sparse_cursors(ctx, tid);
  Segment<T> segment;
  alignas(64) T less[PANEL<T>], part[PANEL<T>];
  int32_t every[SPARSE_COLUMNS];
  for (index_t k = 0; k < SPARSE_COLUMNS; ++k) every[k] = int32_t(k);
  for (index_t j = 0; j < W.cols; j += PANEL<T>) {
    const index_t cols = W.cols - j < PANEL<T> ? W.cols - j : PANEL<T>;
    const auto add = sparse_kernels<T>(cols).product;
    for (index_t i = rows.begin; i < rows.end; ++i) {
      cursors[i - rows.begin] = x.at(i, 0);
      for (index_t l = 0; l < cols; l += WIDTH<T>) store(out.row(i) + j + l, vec<T>{});
    }
    for (index_t l = 0; l < PANEL<T>; l += WIDTH<T>) store(less + l, vec<T>{});
    for (index_t first = 0; first < W.rows; first += SPARSE_COLUMNS) {
      const index_t n = W.rows - first < SPARSE_COLUMNS ? W.rows - first : SPARSE_COLUMNS;
      for (index_t i = rows.begin; i < rows.end; ++i) {
        x.next(i, first + n, cursors[i - rows.begin], segment);
        if (segment.n) add(segment, W.data + j, W.row_stride, 0, out.row(i) + j);
      }
      if (!shift) continue;
      segment.value = shift + first, segment.column = every, segment.n = n;
      for (index_t l = 0; l < cols; l += WIDTH<T>) store(part + l, vec<T>{});
      add(segment, W.row(first) + j, W.row_stride, 0, part);
      for (index_t l = 0; l < cols; l += WIDTH<T>) store(less + l, load(less + l) + load(part + l));
    }
    for (index_t i = rows.begin; shift && i < rows.end; ++i)
      for (index_t l = 0; l < cols; l += WIDTH<T>) {
        T* z = out.row(i) + j + l;
        store(z, load(z) - load(less + l));
      }
  }
}

// The expected part of nonzeros in CSR rows.
constexpr double SPARSE_DENSITY = 0.05;

template <class T>
inline Cost sparse_cost(index_t features, index_t outputs, index_t batch) {
  return {SPARSE_COLUMNS * SPARSE_PANEL + batch * index_t(SPARSE_CURSOR / sizeof(T)),
          2.0 * double(batch) * double(features) * double(outputs) * SPARSE_DENSITY};
}

template <class Act, class T>
void sparse_dense(const Args<T>& args, const Context<T>& ctx, int tid, int nt) {
  using O = op::SPARSE_DENSE;
  LayerArgs<T> l;
  l.bias = args[O::b].data;
  l.out = args[O::out], l.out.rows = ctx.m;
  l.pre = args[O::pre];
  const SparseRows<T> x(ctx, SOURCE_X, args[O::stream], args[O::level], args[O::size_sum], args[O::scale]);
  sparse_product(ctx, x, args[O::shift].data, args[O::W], l.out, tid, nt);
  activate<Act>(view(args, ctx, O::out), l, tid, nt);
}
NARROWS_RUN_BY_ACTIVATION(SPARSE_DENSE, sparse_dense)
template <class T>
Cost cost_of(op::SPARSE_DENSE, const Args<T>& args, index_t batch, bool) {
  using O = op::SPARSE_DENSE;
  return sparse_cost<T>(args[O::W].rows, args[O::out].cols, batch);
}

// Calls done(tile, values) for tiles of X' dz, which are whole cells high and a panel wide. The values are rows PANEL
// apart. `shift` may be null.
template <class T>
void sparse_outer(const Context<T>& ctx, const SparseRows<T>& x, const T* shift, const Matrix<T>& dz, index_t features,
                  Epilogue<T> done, int tid, int nt) {
  const Range blocks((features + SPARSE_COLUMNS - 1) / SPARSE_COLUMNS, tid, nt);
  T* block = sparse_block(ctx, tid);
  Cursor* cursors = sparse_cursors(ctx, tid);
  Segment<T> segment;
  for (index_t j = 0; j < dz.cols && blocks.begin < blocks.end; j += PANEL<T>) {
    const index_t cols = dz.cols - j < PANEL<T> ? dz.cols - j : PANEL<T>;
    const auto add = sparse_kernels<T>(cols).outer;
    for (index_t i = 0; i < ctx.m; ++i) cursors[i] = x.at(i, blocks.begin * SPARSE_COLUMNS);
    vec<T> sums[PANEL_VECTORS] = {};  // of the columns of dz
    for (index_t i = 0; shift && i < ctx.m; ++i)
      for (index_t l = 0; l < cols; l += WIDTH<T>) sums[l / WIDTH<T>] += load(dz.row(i) + j + l);
    for (index_t b = blocks.begin; b < blocks.end; ++b) {
      const index_t first = b * SPARSE_COLUMNS,
                    end = first + SPARSE_COLUMNS < features ? first + SPARSE_COLUMNS : features;
      for (index_t r = 0; r < end - first; ++r) {
        const vec<T> less = broadcast(shift ? T(0) - shift[first + r] : T(0));
        for (index_t l = 0; l < cols; l += WIDTH<T>) store(block + r * PANEL<T> + l, less * sums[l / WIDTH<T>]);
      }
      for (index_t i = 0; i < ctx.m; ++i) {
        x.next(i, end, cursors[i], segment);
        if (segment.n) add(segment, T(1), dz.row(i) + j, first, block);
      }
      for (index_t r = first; r < end; r += CELL_ROWS)
        done(Tile{r, j, int(end - r < CELL_ROWS ? end - r : CELL_ROWS), cols}, block + (r - first) * PANEL<T>);
    }
  }
}

// Calls fn(i)(j, g, n) as for_vectors does.
template <class T, class Fn>
inline void for_panel_vectors(const Tile& t, const T* tile, const Fn& fn) {
  for (int i = 0; i < t.rows; ++i, tile += PANEL<T>) {
    const auto row = fn(t.row + i);
    for (index_t j = 0; j < t.cols; j += WIDTH<T>)
      row(t.col + j, load(tile + j), t.cols - j < WIDTH<T> ? t.cols - j : WIDTH<T>);
  }
}

template <class T>
void sparse_wgrad(const Args<T>& args, const Context<T>& ctx, int tid, int nt) {
  using O = op::SPARSE_WGRAD;
  const Matrix<T>& dW = args[O::dW];
  const bool accumulate = args[O::accumulate];
  sparse_outer<T>(
      ctx, SparseRows<T>(ctx, SOURCE_X, args[O::stream], args[O::level], args[O::size_sum], args[O::scale]),
      args[O::shift].data, args[O::dz], dW.rows,
      [dW, accumulate](const Tile& t, const T* tile) {
        for_panel_vectors(t, tile, [&](index_t i) {
          return [accumulate, out = dW.row(i)](index_t j, vec<T> g, index_t n) {
            store_n(out + j, accumulate ? load_n(out + j, n) + g : g, n);
          };
        });
      },
      tid, nt);
}
NARROWS_RUN(SPARSE_WGRAD, sparse_wgrad)
template <class T>
Cost cost_of(op::SPARSE_WGRAD, const Args<T>& args, index_t batch, bool) {
  using O = op::SPARSE_WGRAD;
  return sparse_cost<T>(args[O::dW].rows, args[O::dz].cols, batch);
}

template <class Rule, class T>
void sparse_wgrad_update(const Args<T>& args, const Context<T>& ctx, int tid, int nt) {
  using O = op::SPARSE_WGRAD_UPDATE;
  const Matrix<T>& before = args[O::dW];
  const T* colrate = args[O::colrate].data;
  const WeightStep<Rule, O, T> step(O(), args, ctx);
  sparse_outer<T>(
      ctx, SparseRows<T>(ctx, SOURCE_X, args[O::stream], args[O::level], args[O::size_sum], args[O::scale]),
      args[O::shift].data, args[O::dz], step.W.rows,
      [step, before, colrate](const Tile& t, const T* tile) {
        step.penalise(t);
        for_panel_vectors(t, tile, [&](index_t i) {
          return [colrate, row = step.row(i), before = before.data ? before.row(i) : nullptr](index_t j, vec<T> g,
                                                                                              index_t n) {
            if (before) g += load_n(before + j, n);
            if (colrate) g += load_n(colrate + j, n) * load_n(row.w + j, n);
            row(j, g, n);
          };
        });
      },
      tid, nt);
}
NARROWS_RUN_BY_SOLVER(SPARSE_WGRAD_UPDATE, sparse_wgrad_update)
template <class T>
Cost cost_of(op::SPARSE_WGRAD_UPDATE, const Args<T>& args, index_t batch, bool) {
  using O = op::SPARSE_WGRAD_UPDATE;
  return sparse_cost<T>(args[O::W].rows, args[O::dz].cols, batch);
}
