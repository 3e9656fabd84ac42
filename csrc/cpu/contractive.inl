// The contractive penalty: the squared Frobenius norm of the encoder's Jacobian, exact, and its gradient.
//
// Promises: formulas and operands of python/narrows/plan.py; products in the program's own type, also where those of
// the layers are in bfloat16; sums over the rows of the batch by grains of rows, cut by shapes and added in order.
// Included inside the namespace of an instruction set.

// sqrt(strength * weight / m): the rows of the Jacobian carry it, so their products are what is wanted.
template <class T>
inline T row_root(const Matrix<T>& weight, const Context<T>& ctx, index_t i, double strength) {
  const double share = strength / double(ctx.m) * (weight.data ? double(weight.row(i)[0]) : 1.0);
  return T(__builtin_sqrt(share));
}

// --- one layer, in closed form ---------------------------------------------------------------------------------------

// Columns are shared, so that a unit's sums over the rows are one thread's.
template <class Act, class T>
void contractive(const Args<T>& args, const Context<T>& ctx, int tid, int nt) {
  constexpr index_t GROUP = 4 * LANES, N = GROUP / WIDTH<T>;
  const Matrix<T>&saved = args.slots[0], &W = args.slots[1], &weight = args.slots[2], &dz = args.slots[3];
  const T strength = T(args.floats[0]);
  const Range grains((W.cols + LANES - 1) / LANES, tid, nt);
  const index_t end = grains.end * LANES;
  for (index_t j = grains.begin * LANES; j < end; j += GROUP) {
    const int vectors = int((end - j < GROUP ? end - j : GROUP) / WIDTH<T>);
    vec<T> norms[N] = {}, squares[N] = {};
    for (index_t i = 0; i < W.rows; ++i)
      for (int v = 0; v < vectors; ++v) {
        const vec<T> w = load(W.row(i) + j + v * WIDTH<T>);
        norms[v] += w * w;
      }
    for (index_t i = 0; i < ctx.m; ++i) {
      const T share = strength * row_scale(weight, ctx, i);
      const T* s = saved.row(i) + j;
      T* d = dz.row(i) + j;
      for (int v = 0; v < vectors; ++v) {
        const vec<T> a = load(s + v * WIDTH<T>), p = Act::slope(a);
        squares[v] += share * (p * p);
        store(d + v * WIDTH<T>, load(d + v * WIDTH<T>) + T(2) * share * (norms[v] * p * Act::curve(a)));
      }
    }
    for (int v = 0; v < vectors; ++v) {
      const index_t at = j + v * WIDTH<T>, n = W.cols - at;
      if (n <= 0) break;
      store_n(args.slots[4].data + at, T(2) * squares[v], n);
      store_n(args.slots[5].data + at, norms[v] * squares[v], n);
    }
  }
}

template <class T>
void column_decay(const Args<T>& args, const Context<T>&, int tid, int nt) {
  const Matrix<T>&W = args.slots[0], &dW = args.slots[2];
  const T* rate = args.slots[1].data;
  const Range rows(W.rows, tid, nt);
  for (index_t i = rows.begin; i < rows.end; ++i)
    for (index_t j = 0; j < W.cols; j += WIDTH<T>) {
      const index_t n = W.cols - j;
      T* p = dW.row(i) + j;
      store_n(p, load_n(p, n) + load_n(rate + j, n) * load_n(W.row(i) + j, n), n);
    }
}

// --- several layers --------------------------------------------------------------------------------------------------

// Epilogue that writes a tile, or adds it to what is there.
template <class T>
inline auto store_tiles(T* to, index_t stride, bool add, T factor = T(1)) {
  return [=](const Tile& t, const T* tile) {
    for_vectors(t, tile, [&](index_t i, index_t j, vec<T> v, index_t n) {
      T* p = to + i * stride + j;
      store_n(p, add ? load_n(p, n) + factor * v : factor * v, n);
    });
  };
}

template <class T, class Epilogue>
inline void plain_product(Matrix<const T> A, Matrix<const T> B, Matrix<T> partial, T* scratch, const Epilogue& epilogue,
                          int tid = 0, int nt = 1) {
  product(false, A, B, partial, scratch, epilogue, tid, nt);
}

template <class T>
void gram(const Args<T>& args, const Context<T>& ctx, int tid, int nt) {
  const Matrix<const T> W = view(args, ctx, 0);
  const Matrix<T>& out = args.slots[1];
  plain_product(transposed(W), W, Matrix<T>{}, static_cast<T*>(nullptr), store_tiles(out.data, out.row_stride, false),
                tid, nt);
}

template <class T>
void gram_wgrad(const Args<T>& args, const Context<T>& ctx, int tid, int nt) {
  const Matrix<T>& dW = args.slots[2];
  plain_product(view(args, ctx, 0), view(args, ctx, 1), Matrix<T>{}, static_cast<T*>(nullptr),
                store_tiles(dW.data, dW.row_stride, false, T(2)), tid, nt);
}

template <class Act, class T>
void slopes(const Args<T>& args, const Context<T>& ctx, int tid, int nt) {
  const Matrix<T>& saved = args.slots[0];
  const Range rows(ctx.m, tid, nt);
  for (index_t i = rows.begin; i < rows.end; ++i) {
    T* out = args.slots[1].row(i) + args.ints[1];
    for (index_t j = 0; j < saved.cols; j += WIDTH<T>) store(out + j, Act::slope(load(saved.row(i) + j)));
  }
}

template <class Act, class T>
void curves(const Args<T>& args, const Context<T>& ctx, int tid, int nt) {
  const Matrix<T>&saved = args.slots[1], &dz = args.slots[2];
  const Range rows(ctx.m, tid, nt);
  for (index_t i = rows.begin; i < rows.end; ++i) {
    const T* d = args.slots[0].row(i) + args.ints[1];
    for (index_t j = 0; j < saved.cols; j += WIDTH<T>) {
      T* p = dz.row(i) + j;
      store(p, load(p) + load(d + j) * Act::curve(load(saved.row(i) + j)));
    }
  }
}

// One grain of rows of JACOBIAN. A row of a block belongs to a row of the batch and a latent: in `pre[i]` it holds the
// derivatives of the latent by the pre-activations of layer i, in `out[i]` those by its outputs.
template <class T>
struct JacobianGrain {
  const Args<T>& args;
  const Context<T>& ctx;
  const JacobianBlock block;
  const int top;  // the layer below the last
  const index_t latents;
  Matrix<const T> weights[JACOBIAN_LAYERS];  // of the layer above layer i
  index_t columns[JACOBIAN_LAYERS];          // of layer i among the slopes
  T* sums[JACOBIAN_LAYERS];                  // of the gradients by the Gram matrix, W2', W3', ...
  T *pack, *turned, *pre[JACOBIAN_LAYERS], *out[JACOBIAN_LAYERS], *d, *other;

  JacobianGrain(const Args<T>& a, const Context<T>& c, int tid)
      : args(a), ctx(c), block(a), top(block.layers - 2), latents(block.widths[top + 1]) {
    index_t column = 0;
    T* at = ctx.scratch + tid * ctx.scratch_stride;
    const auto take = [&](index_t n) { return at += n, at - n; };
    pack = take(SCRATCH), turned = take(latents * block.ld[top]);
    for (int i = 0; i <= top; ++i) {
      weights[i] = view(args, ctx, 2 + i);
      columns[i] = column, column += (block.widths[i] + LANES - 1) / LANES * LANES;
      pre[i] = take(block.rows * block.ld[i]), out[i] = i < top ? take(block.rows * block.ld[i]) : nullptr;
    }
    columns[top + 1] = column;
    d = take(block.rows * block.widest), other = take(block.rows * block.widest);
    const Matrix<const T>& W = weights[top];
    for (index_t j = 0; j < W.rows; ++j)
      for (index_t k = 0; k < latents; ++k) turned[k * block.ld[top] + j] = W.row(j)[k];
  }

  Matrix<const T> rows_of(const T* data, index_t rows, int layer) const {
    return {data, rows, block.widths[layer], block.ld[layer], 1, true};
  }
  const T* slope(index_t i, int layer) const { return args.slots[0].row(i) + columns[layer]; }
  T* dslope(index_t i, int layer) const { return args.slots[6].row(i) + columns[layer]; }
  T root(index_t i) const { return row_root(args.slots[5], ctx, i, args.floats[0]); }

  void run(index_t grain, const Range& rows) {
    T* at = args.slots[8].row(grain);
    for (int i = 0; i <= top + 1; ++i) {
      const index_t size = block.widths[i] * block.ld[i > 0 ? i - 1 : 0];
      sums[i] = at, at += size;
      // What no tile writes.
      if (i == top + 1 || rows.begin == rows.end) __builtin_memset(sums[i], 0, size_t(size) * sizeof(T));
    }
    for (index_t i = rows.begin; i < rows.end; ++i) {
      __builtin_memset(args.slots[6].row(i), 0, size_t(args.slots[6].cols) * sizeof(T));
      args.slots[7].row(i)[0] = T(0);
    }
    const index_t begin = rows.begin * latents, n = rows.end * latents - begin;
    const index_t blocks = (n + block.rows - 1) / block.rows;
    const index_t size = blocks ? (n + blocks * MR - 1) / (blocks * MR) * MR : 0;
    for (index_t q = 0; q < n; q += size) forward_backward(begin + q, n - q < size ? n - q : size, q == 0);
  }

  // Calls fn(row of the block, row of the batch, latent) for n rows from row q of all on.
  template <class Fn>
  void for_rows(index_t q, index_t n, const Fn& fn) const {
    index_t i = q / latents, k = q % latents;
    for (index_t r = 0; r < n; ++r) {
      fn(r, i, k);
      if (++k == latents) k = 0, ++i;
    }
  }

  void forward_backward(index_t q, index_t n, bool first) {
    forward(q, n);
    const Matrix<const T> B = rows_of(pre[0], n, 0);
    const index_t units = block.widths[0], ld = block.ld[0];
    plain_product(B, view(args, ctx, 1), Matrix<T>{}, pack, store_tiles(d, ld, false));
    // Of the symmetric B' B the tiles that reach above the diagonal.
    for (index_t j = 0; j < units; j += NR<T>) {
      Matrix<const T> left = B, right = B;
      left.cols = j + NR<T> < units ? j + NR<T> : units;
      right.data += j, right.cols = left.cols - j;
      plain_product(transposed(left), right, Matrix<T>{}, pack, store_tiles(sums[0] + j, ld, !first));
    }
    for (int i = 0; i < top; ++i) {
      through_slopes(i, q, n);
      const Matrix<const T> dout = rows_of(d, n, i);
      plain_product(transposed(rows_of(pre[i + 1], n, i + 1)), dout, Matrix<T>{}, pack,
                    store_tiles(sums[i + 1], block.ld[i], !first));
      plain_product(dout, weights[i], Matrix<T>{}, pack, store_tiles(other, block.ld[i + 1], false));
      T* const swapped = d;
      d = other, other = swapped;
    }
    through_last(q, n);
  }

  void forward(index_t q, index_t n) const {
    for_rows(q, n, [&](index_t r, index_t i, index_t k) {
      const T share = root(i) * slope(i, top + 1)[k];
      const T *p = slope(i, top), *w = turned + k * block.ld[top];
      T* to = pre[top] + r * block.ld[top];
      for (index_t j = 0; j < block.widths[top]; j += WIDTH<T>) store(to + j, share * load(w + j) * load(p + j));
    });
    for (int layer = top - 1; layer >= 0; --layer) {
      const index_t ld = block.ld[layer];
      plain_product(rows_of(pre[layer + 1], n, layer + 1), transposed(weights[layer]),
                    Matrix<T>{out[layer], n, block.widths[layer], ld, 1, true}, pack,
                    store_tiles(out[layer], ld, false));
      for_rows(q, n, [&](index_t r, index_t i, index_t) {
        const T *p = slope(i, layer), *from = out[layer] + r * ld;
        T* to = pre[layer] + r * ld;
        for (index_t j = 0; j < block.widths[layer]; j += WIDTH<T>) store(to + j, load(from + j) * load(p + j));
      });
    }
  }

  // What there is of the penalty itself, when the first layer's turn comes: d holds B gram, of which twice is wanted.
  void penalty(index_t r, index_t i) const {
    LaneSum<T> sum;
    for (index_t j = 0; j < block.widths[0]; j += WIDTH<T>) {
      const index_t n = block.widths[0] - j;
      sum.add(j, load_n(d + r * block.ld[0] + j, n) * load_n(pre[0] + r * block.ld[0] + j, n));
    }
    args.slots[7].row(i)[0] += T(sum.total());
  }

  // From derivatives by the pre-activations of a layer, in d, to those by its slopes and, in place, by its outputs.
  void through_slopes(int layer, index_t q, index_t n) const {
    const T factor = layer == 0 ? T(2) : T(1);
    for_rows(q, n, [&](index_t r, index_t i, index_t) {
      if (layer == 0) penalty(r, i);
      const T *p = slope(i, layer), *from = out[layer] + r * block.ld[layer];
      T *dp = dslope(i, layer), *at = d + r * block.ld[layer];
      for (index_t j = 0; j < block.widths[layer]; j += WIDTH<T>) {
        const vec<T> g = factor * load(at + j);
        store(dp + j, load(dp + j) + g * load(from + j));
        store(at + j, g * load(p + j));
      }
    });
  }

  // The same of the layer below the last, whose outputs the last layer's weight and slopes alone stand above.
  void through_last(index_t q, index_t n) const {
    const T factor = top == 0 ? T(2) : T(1);
    const index_t ld = block.ld[top];
    for_rows(q, n, [&](index_t r, index_t i, index_t k) {
      if (top == 0) penalty(r, i);
      const T f = root(i), share = f * slope(i, top + 1)[k];
      const T *p = slope(i, top), *w = turned + k * ld, *at = d + r * ld;
      T *dp = dslope(i, top), *dw = sums[top + 1] + k * ld;
      LaneSum<T> sum;
      for (index_t j = 0; j < block.widths[top]; j += WIDTH<T>) {
        const index_t m = block.widths[top] - j;
        const vec<T> g = factor * load_n(at + j, m), wv = load_n(w + j, m), out = g * load_n(p + j, m);
        store(dp + j, load(dp + j) + g * (share * wv));
        store_n(dw + j, load_n(dw + j, m) + share * out, m);
        sum.add(j, out * wv);
      }
      dslope(i, top + 1)[k] = T(double(f) * sum.total());
    });
  }
};

template <class T>
void jacobian(const Args<T>& args, const Context<T>& ctx, int tid, int nt) {
  const index_t grains = args.slots[8].rows;
  const Range mine(grains, tid, nt);
  if (mine.begin == mine.end) return;
  JacobianGrain<T> grain(args, ctx, tid);
  for (index_t g = mine.begin; g < mine.end; ++g) grain.run(g, Range(ctx.m, int(g), int(grains)));
}

// Sums of the grains, in order. Rows are dealt in turn, because those of a triangle differ in length.
template <class T>
void grain_sum(const Args<T>& args, const Context<T>&, int tid, int nt) {
  const Matrix<T>&partial = args.slots[0], &out = args.slots[1];
  const bool symmetric = args.ints[1] == 0;
  const index_t rows = symmetric ? out.rows : out.cols, cols = symmetric ? out.cols : out.rows;
  const index_t ld = padded(cols);
  for (index_t i = tid; i < rows; i += nt)
    for (index_t j = symmetric ? i / WIDTH<T> * WIDTH<T> : 0; j < cols; j += WIDTH<T>) {
      const index_t n = cols - j < WIDTH<T> ? cols - j : WIDTH<T>;
      vec<T> sum{};
      for (index_t g = 0; g < partial.rows; ++g) sum += load_n(partial.row(g) + args.ints[0] + i * ld + j, n);
      for (index_t l = 0; l < n; ++l) {
        if (symmetric && j + l < i) continue;
        out.row(j + l)[i] = sum[int(l)];
        if (symmetric) out.row(i)[j + l] = sum[int(l)];
      }
    }
}
