// Squared error of a linear layer against CSR rows, and its gradients: no array of batch x features.
//
// Let V = [W; b], g = [h 1], Q = V V' and p = y V'. The loss of a row y is g Q g' - 2 g p' + |y|^2. Its derivative by g
// is 2 (g Q - p). The derivative by V, summed over rows, is G V - H' Y. H has rows 2 s g with the share s of the row in
// the loss, and G = H' g.
//
// Promises: Q, G, p and the loss are summed in double (Q and p from blocks in the type of the slots). If the loss of a
// row is a small part of |y|^2, these sums cancel. Then the loss comes from the residuals. y is read in place. Sums are
// cut by shapes alone, so the bits depend neither on threads nor on the other rows. Products are in the type of the
// slots, also under bfloat16. Included inside the namespace of an instruction set.

// Terms of a sum in the type of the slots before it is added in double: for p, and for Q.
constexpr index_t SHORT_SUM = 64, GRAM_DEPTH = 128;

template <class T>
inline vd wide(const T* p) {
  typedef T part __attribute__((vector_size(WIDTH<double> * sizeof(T))));
  part v;
  __builtin_memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, vd);
}

constexpr index_t ROOM_SLACK = 16 * LANES;  // elements that rounding up to whole lines may add

// Hands out arrays of a thread's scratch memory, in whole lines.
template <class T>
struct Room {
  T* next;
  template <class U>
  U* take(index_t n) {
    U* at = reinterpret_cast<U*>(next);
    next += (n * index_t(sizeof(U) / sizeof(T)) + LANES - 1) / LANES * LANES;
    return at;
  }
};

// [W; b] at columns first..end as B of a product: rows SPARSE_COLUMNS apart, zeros beyond the end. `shift`, unless it
// is null, is added to b.
template <class T>
inline void copy_block(const Matrix<T>& W, const T* b, const T* shift, index_t first, index_t end, T* to) {
  for (index_t k = 0; k <= W.rows; ++k, to += SPARSE_COLUMNS) {
    const T* from = (k < W.rows ? W.row(k) : b) + first;
    const T* more = k < W.rows || !shift ? nullptr : shift + first;
    for (index_t j = 0; j < SPARSE_COLUMNS; j += WIDTH<T>) {
      vec<T> v = first + j < end ? load_n(from + j, end - first - j) : vec<T>{};
      if (more && first + j < end) v = load_n(more + j, end - first - j) + v;
      store(to + j, v);
    }
  }
}

// --- Gram matrices ---------------------------------------------------------------------------------------------------

// Threads share the tiles on and above the diagonal, and the products with b.
template <class T>
void weight_gram(const Args<T>& args, const Context<T>& ctx, int tid, int nt) {
  using O = op::WEIGHT_GRAM;
  const Matrix<const T> W = view(args, ctx, O::W);
  const T* b = args[O::b].data;
  const Matrix<T>&high = args[O::high], &low = args[O::low];
  const auto put = [&](index_t i, index_t j, double q) {
    high.row(i)[j] = high.row(j)[i] = T(q);
    low.row(i)[j] = low.row(j)[i] = T(q - double(T(q)));
  };
  const index_t n = W.rows, panels = (n + NR<T> - 1) / NR<T>;
  const auto width = [&](index_t p) { return n - p * NR<T> < NR<T> ? n - p * NR<T> : NR<T>; };
  const auto blocks = [&](index_t p) { return (p * NR<T> + width(p) + MR - 1) / MR; };
  index_t total = 0;
  for (index_t p = 0; p < panels; ++p) total += blocks(p) * width(p);
  const Range share(total, tid, nt);
  T* const scratch = ctx.scratch + tid * ctx.scratch_stride;
  double* const sums = reinterpret_cast<double*>(scratch + SCRATCH);
  for (index_t p = 0, before = 0; p < panels; before += blocks(p) * width(p), ++p) {
    const auto block = [&](index_t cost) {
      const index_t at = cost < before ? 0 : (cost - before + width(p) - 1) / width(p);
      return at < blocks(p) ? at : blocks(p);
    };
    const index_t begin = block(share.begin), end = block(share.end), j0 = p * NR<T>;
    if (begin >= end) continue;
    for (index_t i = 0; i < (end - begin) * MR * NR<T>; ++i) sums[i] = 0;
    for (index_t k0 = 0; k0 < W.cols; k0 += GRAM_DEPTH) {
      const index_t depth = W.cols - k0 < GRAM_DEPTH ? W.cols - k0 : GRAM_DEPTH;
      pack(transposed(W), k0, depth, j0, width(p), scratch);
      const Operands<T> o{W.data + k0, scratch, W.row_stride, 1, NR<T>, depth, true, true};
      run_tiles<T>(o, 0, n, begin, end, j0, width(p), Coming{}, Matrix<T>{},
                   [&](const Tile& t, const T* tile) {
                     double* sum = sums + (t.row - begin * MR) * NR<T>;
                     for (index_t i = 0; i < t.rows * NR<T>; i += WIDTH<double>)
                       store(sum + i, load(sum + i) + wide(tile + i));
                   },
                   {});
    }
    for (index_t i = begin * MR; i < end * MR && i < n; ++i)
      for (index_t j = i > j0 ? i : j0; j < j0 + width(p); ++j) put(i, j, sums[(i - begin * MR) * NR<T> + j - j0]);
  }
  const Range rows(n + 1, tid, nt);
  for (index_t i = rows.begin; i < rows.end; ++i) {
    const T* w = i < n ? W.row(i) : b;
    double sum = 0;
    for (index_t k0 = 0; k0 < W.cols; k0 += GRAM_DEPTH) {
      LaneSum<T> block;
      for (index_t k = k0; k < k0 + GRAM_DEPTH && k < W.cols; k += WIDTH<T>)
        block.add(k, load_n(w + k, W.cols - k) * load_n(b + k, W.cols - k));
      sum += block.total();
    }
    put(i, n, sum);
  }
}
NARROWS_RUN(WEIGHT_GRAM, weight_gram)
template <class T>
Cost cost_of(op::WEIGHT_GRAM, const Args<T>& args, index_t, bool) {
  const index_t inner = args[op::WEIGHT_GRAM::W].rows, doubles = sizeof(double) / sizeof(T);
  return {SCRATCH + (inner + CELL_ROWS) * 64 * doubles, 2.0 * double(inner) * double(inner)};
}

// 2 sum over rows of s g' g; a thread has whole rows of the result.
template <class T>
void row_gram(const Args<T>& args, const Context<T>& ctx, int tid, int nt) {
  using O = op::ROW_GRAM;
  constexpr int N = 8;  // rows of the result at a time
  constexpr index_t W = WIDTH<double>;
  const Matrix<T>&h = args[O::h], &weight = args[O::weight], &out = args[O::out];
  const index_t n = h.cols;
  const Range grains((n + N) / N, tid, nt);
  for (index_t k = grains.begin * N; k < grains.end * N && k <= n; k += N) {
    const int rows = int(n + 1 - k < N ? n + 1 - k : N);
    const auto factors = [&](index_t i, double* f) {
      const double share = 2.0 / double(ctx.m) * (weight.data ? double(weight.row(i)[0]) : 1.0);
      for (int r = 0; r < N; ++r) f[r] = r < rows ? share * (k + r < n ? double(h.row(i)[k + r]) : 1.0) : 0.0;
    };
    double f[N], last[N] = {};
    for (index_t i = 0; i < ctx.m; ++i) {
      factors(i, f);
      for (int r = 0; r < N; ++r) last[r] += f[r];
    }
    for (index_t j = 0; j < n; j += 2 * W) {
      vd sum[N][2] = {};
      for (index_t i = 0; i < ctx.m; ++i) {
        factors(i, f);
        const vd x = wide(h.row(i) + j), y = wide(h.row(i) + j + W);
        for (int r = 0; r < N; ++r) sum[r][0] += f[r] * x, sum[r][1] += f[r] * y;
      }
      for (int r = 0; r < rows; ++r)
        for (index_t l = 0; l < 2 * W && j + l < n; ++l) out.row(k + r)[j + l] = T(sum[r][l / W][l % W]);
    }
    for (int r = 0; r < rows; ++r) out.row(k + r)[n] = T(last[r]);
  }
}
NARROWS_RUN(ROW_GRAM, row_gram)

// --- loss and gradient by h ------------------------------------------------------------------------------------------

// The loss of a row from its residuals, by blocks of columns, and its gradient by h if `dh` is not null.
template <class T>
double residual_loss(const SparseRows<T>& y, index_t i, const T* h, const Matrix<T>& W, const T* b, double* dh) {
  constexpr index_t C = SPARSE_COLUMNS;
  alignas(64) T r[C];
  Segment<T> segment;
  Cursor cursor = y.at(i, 0);
  double loss = 0;
  if (dh)
    for (index_t k = 0; k < W.rows; ++k) dh[k] = 0;
  for (index_t first = 0; first < W.cols; first += C) {
    const index_t n = W.cols - first < C ? W.cols - first : C;
    for (index_t j = 0; j < C; j += WIDTH<T>) store(r + j, j < n ? load_n(b + first + j, n - j) : vec<T>{});
    for (index_t k = 0; k < W.rows; ++k) {
      const vec<T> a = broadcast(h[k]);
      for (index_t j = 0; j < n; j += WIDTH<T>) store(r + j, madd(load(r + j), a, load_n(W.row(k) + first + j, n - j)));
    }
    y.next(i, first + n, cursor, segment);
    for (index_t k = 0; k < segment.n; ++k) r[segment.column[k] - first] -= segment.value[k];
    LaneSum<T> squares;
    for (index_t j = 0; j < n; j += WIDTH<T>) squares.add(j, load(r + j) * load(r + j));
    loss += squares.total();
    for (index_t k = 0; dh && k < W.rows; ++k) {
      LaneSum<T> sum;
      for (index_t j = 0; j < n; j += WIDTH<T>) sum.add(j, load(r + j) * load_n(W.row(k) + first + j, n - j));
      dh[k] += 2 * sum.total();
    }
  }
  return loss;
}

// The rows that SPARSE_MSE works on at a time: their p and a block of V fit into L2.
template <class T>
struct GramRows {
  double *Q, *p, *square, *g, *gQ;  // Q and p with rows `ld` apart
  T *part, *block;                  // of p, PANEL apart; a block of W by columns, likewise
  Cursor* cursors;
  index_t* terms;  // in `part`
  index_t ld;

  GramRows(T* scratch, index_t inner) : ld(padded(inner + 1)) {
    Room<T> room{scratch};
    Q = room.template take<double>((inner + 1) * ld), p = room.template take<double>(GRAM_ROWS * ld);
    square = room.template take<double>(GRAM_ROWS), g = room.template take<double>(ld);
    gQ = room.template take<double>(ld), part = room.template take<T>(GRAM_ROWS * SPARSE_PANEL);
    block = room.template take<T>(SPARSE_COLUMNS * SPARSE_PANEL), cursors = room.template take<Cursor>(GRAM_ROWS);
    terms = room.template take<index_t>(GRAM_ROWS);
  }

  // p and |y|^2 of rows begin..end.
  void multiply(const SparseRows<T>& y, const Matrix<T>& W, const T* b, index_t begin, index_t end) {
    const index_t rows = end - begin, inner = W.rows;
    Segment<T> segment;
    for (index_t i = 0; i < rows * ld; ++i) p[i] = 0;
    for (index_t i = 0; i < rows; ++i) square[i] = 0;
    for (index_t j = 0; j < inner; j += PANEL<T>) {
      const index_t cols = inner - j < PANEL<T> ? inner - j : PANEL<T>;
      const auto add = sparse_kernels<T>(cols).product;
      for (index_t i = 0; i < rows; ++i) cursors[i] = y.at(begin + i, 0), terms[i] = 0;
      for (index_t i = 0; i < rows * PANEL<T>; i += WIDTH<T>) store(part + i, vec<T>{});
      for (index_t first = 0; first < W.cols; first += SPARSE_COLUMNS) {
        const index_t stop = first + SPARSE_COLUMNS < W.cols ? first + SPARSE_COLUMNS : W.cols;
        const Matrix<const T> by_column{W.data, W.cols, W.rows, 1, W.row_stride, false};
        pack(by_column, first, stop - first, j, cols, block, PANEL<T>);
        for (index_t i = 0; i < rows; ++i) {
          y.next(begin + i, stop, cursors[i], segment);
          if (!segment.n) continue;
          if (j == 0) add_ends(segment, b, p[i * ld + inner], square[i]);
          add(segment, block, PANEL<T>, first, part + i * PANEL<T>);
          if ((terms[i] += segment.n) >= SHORT_SUM) settle(i, j, cols);
        }
      }
      for (index_t i = 0; i < rows; ++i) settle(i, j, cols);
    }
  }

  // Adds what is in `part` of a row to columns j..j+cols of its p.
  void settle(index_t i, index_t j, index_t cols) {
    T* const from = part + i * PANEL<T>;
    double* const sum = p + i * ld + j;
    // A vector may reach into the column of b, which is not in `part`.
    for (index_t l = 0; l < cols; l += WIDTH<double>) store(sum + l, load(sum + l) + keep_n(wide(from + l), cols - l));
    for (index_t l = 0; l < cols; l += WIDTH<T>) store(from + l, vec<T>{});
    terms[i] = 0;
  }

  // The last element of p and |y|^2, over the nonzeros of a segment: sums by four.
  static void add_ends(const Segment<T>& x, const T* b, double& last, double& square) {
    double ends[4] = {}, squares[4] = {};
    for (index_t k = 0; k < x.n; ++k) {
      const double v = double(x.value[k]);
      ends[k % 4] += rounded_value(v * double(b[x.column[k]]));
      squares[k % 4] += rounded_value(v * v);
    }
    last += (ends[0] + ends[1]) + (ends[2] + ends[3]);
    square += (squares[0] + squares[1]) + (squares[2] + squares[3]);
  }

  // gQ = g Q.
  void by_gram(index_t n) {
    constexpr int N = 8;
    for (index_t j = 0; j < n; j += N * WIDTH<double>) {
      const index_t left = (n - j + WIDTH<double> - 1) / WIDTH<double>;
      const int vectors = int(left < N ? left : N);
      vd sum[N] = {};
      if (vectors == N)
        for (index_t k = 0; k < n; ++k)
          for (int v = 0; v < N; ++v) sum[v] = madd(sum[v], broadcast(g[k]), load(Q + k * ld + j + v * WIDTH<double>));
      else
        for (index_t k = 0; k < n; ++k)
          for (int v = 0; v < vectors; ++v)
            sum[v] = madd(sum[v], broadcast(g[k]), load(Q + k * ld + j + v * WIDTH<double>));
      for (int v = 0; v < vectors; ++v) store(gQ + j + v * WIDTH<double>, sum[v]);
    }
  }
};

template <class T>
void sparse_mse(const Args<T>& args, const Context<T>& ctx, int tid, int nt) {
  using O = op::SPARSE_MSE;
  const Matrix<T>&h = args[O::h], &W = args[O::W], &high = args[O::high], &low = args[O::low];
  const Matrix<T>&saved = args[O::saved], &weight = args[O::weight], &rowloss = args[O::rowloss], &out = args[O::out];
  const T *b = args[O::b].data, scale = T(args[O::scale]);
  const index_t inner = W.rows, n = inner + 1;
  const TimesSlope<T> times_slope = times_slope_of<T>(args[O::activation]);
  const SparseRows<T> y(ctx, args[O::source]);
  GramRows<T> gram(ctx.scratch + tid * ctx.scratch_stride, inner);
  const Range rows(ctx.m, tid, nt);
  if (rows.begin == rows.end) return;
  for (index_t k = 0; k < n; ++k)
    for (index_t j = 0; j < gram.ld; ++j)
      gram.Q[k * gram.ld + j] = j < n ? double(high.row(k)[j]) + double(low.row(k)[j]) : 0.0;
  for (index_t begin = rows.begin; begin < rows.end; begin += GRAM_ROWS) {
    const index_t end = begin + GRAM_ROWS < rows.end ? begin + GRAM_ROWS : rows.end;
    gram.multiply(y, W, b, begin, end);
    for (index_t i = begin; i < end; ++i) {
      double* p = gram.p + (i - begin) * gram.ld;
      const double square = gram.square[i - begin];
      for (index_t k = 0; k < inner; ++k) gram.g[k] = double(h.row(i)[k]);
      gram.g[inner] = 1;
      gram.by_gram(n);
      LaneSum<double> sum;
      for (index_t j = 0; j < n; j += WIDTH<double>)
        sum.add(j, keep_n(load(gram.g + j) * (load(gram.gQ + j) - 2.0 * load(p + j)), n - j));
      double loss = sum.total() + square;
      const bool direct = loss < GRAM_GUARD * square;
      if (direct) loss = residual_loss(y, i, h.row(i), W, b, ctx.learn ? p : nullptr);
      rowloss.row(i)[0] = T(loss);
      if (!ctx.learn) continue;
      const double share = (weight.data ? double(weight.row(i)[0]) : 1.0) / double(ctx.m);
      for (index_t j = 0; j < out.cols; ++j) {
        const double dh = direct ? p[j] : 2 * (gram.gQ[j] - p[j]);
        out.row(i)[j] = T(share * dh);
      }
      times_slope(out.row(i), saved.row(i), scale, out.cols);
    }
  }
}
NARROWS_RUN(SPARSE_MSE, sparse_mse)
template <class T>
Cost cost_of(op::SPARSE_MSE, const Args<T>& args, index_t, bool) {
  const index_t inner = args[op::SPARSE_MSE::W].rows, ld = padded(inner + 1);
  const index_t doubles = sizeof(double) / sizeof(T), cursors = SPARSE_CURSOR / sizeof(T);
  return {doubles * (ld * (inner + 1 + GRAM_ROWS + 2) + GRAM_ROWS) + GRAM_ROWS * (SPARSE_PANEL + 2 * cursors) +
              SPARSE_COLUMNS * SPARSE_PANEL + ROOM_SLACK,
          2.0 * double(inner) * double(inner)};
}

// --- gradients by W and b --------------------------------------------------------------------------------------------

// Calls done(tile, values) for tiles of [dW; db], which are whole cells high. The values are rows of NR elements. The
// calls for a block of columns come after W and b have been read there.
template <class T>
void sparse_mse_outer(const Matrix<T>& h, const Matrix<T>& G, const Matrix<T>& weight, const Context<T>& ctx,
                      const Matrix<T>& W, const T* b, const T* shift, int source, Epilogue<T> done,
                      const Update<T>& update, int tid, int nt) {
  constexpr index_t C = SPARSE_COLUMNS;
  const Range blocks((W.cols + C - 1) / C, tid, nt);
  if (blocks.begin == blocks.end) return;
  const SparseRows<T> y(ctx, source);
  const index_t inner = W.rows, turned_rows = (inner + PANEL<T> - 1) / PANEL<T> * PANEL<T>;
  Room<T> room{ctx.scratch + tid * ctx.scratch_stride};
  T *const V = room.template take<T>((inner + 1) * C), *const turned = room.template take<T>((turned_rows + 1) * C);
  T* const sums = room.template take<T>(C * SPARSE_PANEL);
  T* const ends = turned + inner * C;  // of b, below the rows of W
  Cursor* const cursors = room.template take<Cursor>(ctx.m);
  Segment<T> segment;
  for (index_t i = 0; i < ctx.m; ++i) cursors[i] = y.at(i, blocks.begin * C);
  for (index_t block = blocks.begin; block < blocks.end; ++block) {
    const index_t first = block * C, end = first + C < W.cols ? first + C : W.cols;
    copy_block(W, b, shift, first, end, V);
    // H' Y, by columns of Y, and turned.
    for (index_t j = 0; j < inner; j += PANEL<T>) {
      const index_t cols = inner - j < PANEL<T> ? inner - j : PANEL<T>;
      const bool last = j + PANEL<T> >= inner;
      const auto add = sparse_kernels<T>(cols).outer;
      for (index_t l = 0; l < C * PANEL<T>; l += WIDTH<T>) store(sums + l, vec<T>{});
      T total[C] = {};
      for (index_t i = 0; i < ctx.m; ++i) {
        Cursor at = cursors[i];
        y.next(i, end, at, segment);
        if (last) cursors[i] = at;
        if (!segment.n) continue;
        const T share = T(2) * row_scale(weight, ctx, i);
        add(segment, share, h.row(i) + j, first, sums);
        for (index_t k = 0; last && k < segment.n; ++k)
          total[segment.column[k] - first] += rounded_value(share * segment.value[k]);
      }
      pack(Matrix<const T>{sums, cols, C, 1, PANEL<T>, false}, 0, cols, 0, C, turned + j * C, C);
      if (last) __builtin_memcpy(ends, total, sizeof total);
    }
    for (index_t c = 0; c < end - first; c += NR<T>) {
      const index_t cols = end - first - c < NR<T> ? end - first - c : NR<T>;
      const auto subtract = [&](const Tile& t, T* tile) {
        for (int i = 0; i < t.rows; ++i)
          for (index_t j = 0; j < t.cols; j += WIDTH<T>) {
            T* at = tile + i * NR<T> + j;
            store(at, load(at) - load(turned + (t.row + i) * C + c + j));
          }
        done(t, tile);
      };
      Operands<T> o{G.data, V + c, G.row_stride, 1, C, inner + 1, true, true};
      run_tiles<T>(o, 0, inner, 0, (inner + MR - 1) / MR, first + c, cols, Coming{}, Matrix<T>{}, subtract, update);
      o.a = G.row(inner);
      run_tiles<T>(o, inner, 1, 0, 1, first + c, cols, Coming{}, Matrix<T>{}, subtract, update);
    }
  }
}

template <class T>
inline Cost outer_cost(index_t inner, index_t batch) {
  return {
      SPARSE_COLUMNS * (2 * (inner + 1) + 2 * SPARSE_PANEL) + batch * index_t(SPARSE_CURSOR / sizeof(T)) + ROOM_SLACK,
      2.0 * double(inner) * double(inner)};
}

template <class T>
void sparse_mse_wgrad(const Args<T>& args, const Context<T>& ctx, int tid, int nt) {
  using O = op::SPARSE_MSE_WGRAD;
  const Matrix<T>&W = args[O::W], &dW = args[O::dW];
  T* db = args[O::db].data;
  sparse_mse_outer<T>(
      args[O::h], args[O::gram], args[O::weight], ctx, W, args[O::b].data, static_cast<const T*>(nullptr),
      args[O::source],
      [W, dW, db](const Tile& t, const T* tile) {
        for_vectors(t, tile, [&](index_t i) {
          return [row = i < W.rows ? dW.row(i) : db](index_t j, vec<T> g, index_t n) { store_n(row + j, g, n); };
        });
      },
      {}, tid, nt);
}
NARROWS_RUN(SPARSE_MSE_WGRAD, sparse_mse_wgrad)
template <class T>
Cost cost_of(op::SPARSE_MSE_WGRAD, const Args<T>& args, index_t batch, bool) {
  return outer_cost<T>(args[op::SPARSE_MSE_WGRAD::W].rows, batch);
}

template <class Rule, class T>
void sparse_mse_update(const Args<T>& args, const Context<T>& ctx, int tid, int nt) {
  using O = op::SPARSE_MSE_UPDATE;
  const WeightStep<Rule, O, T> step(O(), args, ctx);
  const Matrix<T>&W = step.W, &m = step.m, &v = step.v;
  T *b = args[O::b].data, *bm = args[O::b_moment1].data,
    *bv = args[args[O::b_moment2].data ? O::b_moment2 : O::b_moment1].data;
  sparse_mse_outer<T>(
      args[O::h], args[O::gram], args[O::weight], ctx, W, b, static_cast<const T*>(args[O::shift].data),
      args[O::source],
      [step, b, bm, bv](const Tile& t, const T* tile) {
        if (t.row < step.W.rows) step.penalise(t);
        for_vectors(t, tile, [&](index_t i) {
          return [=, weight = i < step.W.rows, row = step.row(i)](index_t j, vec<T> g, index_t n) {
            if (weight)
              row(j, g, n);
            else
              store_n(b + j, step.rule.step(load_n(b + j, n), g, bm + j, bv + j, n), n);
          };
        });
      },
      {W, m, v}, tid, nt);
}
NARROWS_RUN_BY_SOLVER(SPARSE_MSE_UPDATE, sparse_mse_update)
template <class T>
Cost cost_of(op::SPARSE_MSE_UPDATE, const Args<T>& args, index_t batch, bool) {
  return outer_cost<T>(args[op::SPARSE_MSE_UPDATE::W].rows, batch);
}
