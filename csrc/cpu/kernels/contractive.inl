// The contractive penalty: the squared Frobenius norm of the encoder's Jacobian, exact, and its gradient.
//
// Promises: products are in the type of the program, also if those of the layers are in bfloat16. Sums over the rows of
// the batch go by grains of rows, which depend on shapes alone and are added in order.
// Included inside the namespace of an instruction set.

// sqrt(strength * weight / m), the factor of the rows of the Jacobian, so that their products have the right factor.
template <class T>
inline T row_root(const Matrix<T>& weight, const Context<T>& ctx, index_t i, double strength) {
  const double share = strength / double(ctx.m) * (weight.data ? double(weight.row(i)[0]) : 1.0);
  return T(__builtin_sqrt(share));
}

// --- one layer, in closed form ---------------------------------------------------------------------------------------

// Threads share columns, so one thread has all rows of a unit's sums.
template <class Act, class T>
void contractive(const Args<T>& args, const Context<T>& ctx, int tid, int nt) {
  using O = op::CONTRACTIVE;
  constexpr index_t GROUP = 4 * LANES, N = GROUP / WIDTH<T>;
  const Matrix<T>&saved = args[O::saved], &noisy = args[O::noisy], &W = args[O::W], &weight = args[O::weight];
  const Matrix<T>&dz = args[O::dz], &dnoisy = args[O::dnoisy];
  const bool onto = args[O::accumulate_dz], accumulate = args[O::accumulate_colrate];
  const T strength = T(args[O::strength]);
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
      for (int v = 0; v < vectors; ++v) {
        const index_t at = j + v * WIDTH<T>;
        const vec<T> a = load(saved.row(i) + at);
        vec<T> p = Act::slope(a), other{};
        if (noisy.data) other = load(noisy.row(i) + at), p -= Act::slope(other);
        squares[v] += share * (p * p);
        const vec<T> by_slope = T(2) * share * (norms[v] * p);
        T* d = dz.row(i) + at;
        store(d, onto ? load(d) + by_slope * Act::curve(a) : by_slope * Act::curve(a));
        if (noisy.data) store(dnoisy.row(i) + at, -by_slope * Act::curve(other));
      }
    }
    for (int v = 0; v < vectors; ++v) {
      const index_t at = j + v * WIDTH<T>, n = W.cols - at;
      if (n <= 0) break;
      T* rate = args[O::colrate].data + at;
      store_n(rate, accumulate ? load_n(rate, n) + T(2) * squares[v] : T(2) * squares[v], n);
      store_n(args[O::penalty].data + at, norms[v] * squares[v], n);
    }
  }
}
NARROWS_RUN_BY_ACTIVATION(CONTRACTIVE, contractive)

template <class T>
void column_decay(const Args<T>& args, const Context<T>&, int tid, int nt) {
  using O = op::COLUMN_DECAY;
  const Matrix<T>&W = args[O::W], &dW = args[O::dW];
  const T* rate = args[O::colrate].data;
  const Range rows(W.rows, tid, nt);
  for (index_t i = rows.begin; i < rows.end; ++i)
    for (index_t j = 0; j < W.cols; j += WIDTH<T>) {
      const index_t n = W.cols - j;
      T* p = dW.row(i) + j;
      store_n(p, load_n(p, n) + load_n(rate + j, n) * load_n(W.row(i) + j, n), n);
    }
}
NARROWS_RUN(COLUMN_DECAY, column_decay)

// --- several layers --------------------------------------------------------------------------------------------------

// Epilogue that writes a tile, or adds it to what is there.
template <class T>
inline auto store_tiles(T* to, index_t stride, bool add, T factor = T(1)) {
  return [=](const Tile& t, const T* tile) {
    for_vectors(t, tile, [&](index_t i) {
      return [add, factor, row = to + i * stride](index_t j, vec<T> v, index_t n) {
        store_n(row + j, add ? load_n(row + j, n) + factor * v : factor * v, n);
      };
    });
  };
}

template <class T, class Fn>
inline void plain_product(Matrix<const T> A, Matrix<const T> B, Matrix<T> partial, T* scratch, const Fn& epilogue,
                          int tid = 0, int nt = 1) {
  gemm<T>(A, B, partial, scratch, epilogue, tid, nt, {});
}

template <class T>
void gram(const Args<T>& args, const Context<T>& ctx, int tid, int nt) {
  using O = op::GRAM;
  const Matrix<const T> W = view(args, ctx, O::W);
  const Matrix<T>& out = args[O::out];
  plain_product(transposed(W), W, Matrix<T>{}, static_cast<T*>(nullptr), store_tiles(out.data, out.row_stride, false),
                tid, nt);
}
NARROWS_RUN(GRAM, gram)

template <class T>
void gram_wgrad(const Args<T>& args, const Context<T>& ctx, int tid, int nt) {
  using O = op::GRAM_WGRAD;
  const Matrix<T>& dW = args[O::dW];
  plain_product(view(args, ctx, O::W), view(args, ctx, O::dgram), Matrix<T>{}, static_cast<T*>(nullptr),
                store_tiles(dW.data, dW.row_stride, false, T(2)), tid, nt);
}
NARROWS_RUN(GRAM_WGRAD, gram_wgrad)

template <class Act, class T>
void slopes(const Args<T>& args, const Context<T>& ctx, int tid, int nt) {
  using O = op::SLOPES;
  const Matrix<T>& saved = args[O::saved];
  const Range rows(ctx.m, tid, nt);
  for (index_t i = rows.begin; i < rows.end; ++i) {
    T* out = args[O::out].row(i) + args[O::column];
    for (index_t j = 0; j < saved.cols; j += WIDTH<T>) store(out + j, Act::slope(load(saved.row(i) + j)));
  }
}
NARROWS_RUN_BY_ACTIVATION(SLOPES, slopes)

template <class Act, class T>
void curves(const Args<T>& args, const Context<T>& ctx, int tid, int nt) {
  using O = op::CURVES;
  const Matrix<T>&saved = args[O::saved], &dz = args[O::dz];
  const Range rows(ctx.m, tid, nt);
  for (index_t i = rows.begin; i < rows.end; ++i) {
    const T* d = args[O::dslopes].row(i) + args[O::column];
    for (index_t j = 0; j < saved.cols; j += WIDTH<T>) {
      T* p = dz.row(i) + j;
      const vec<T> g = load(d + j) * Act::curve(load(saved.row(i) + j));
      store(p, args[O::accumulate] ? load(p) + g : g);
    }
  }
}
NARROWS_RUN_BY_ACTIVATION(CURVES, curves)

// One grain of rows of JACOBIAN. A row of a block belongs to a row of the batch and a latent.
template <class T>
struct JacobianGrain {
  using O = op::JACOBIAN;

  // The chain of derivatives for one input.
  struct Chain {
    Matrix<T> slopes, dslopes;
    // Derivatives of the latents by the pre-activations and by the outputs of each layer.
    T *pre[JACOBIAN_LAYERS], *out[JACOBIAN_LAYERS];
  };

  const Args<T>& args;
  const Context<T>& ctx;
  const JacobianBlock block;
  const int top;  // the layer below the last
  const index_t latents;
  const bool noisy, accumulate;
  Chain chains[2];
  Matrix<const T> weights[JACOBIAN_LAYERS];  // of the layer above layer i
  index_t columns[JACOBIAN_LAYERS];          // of layer i among the slopes
  T* sums[JACOBIAN_LAYERS];                  // of the gradients by the Gram matrix, W2', W3', ...
  T *pack, *turned, *d, *other, *kept;

  JacobianGrain(const Args<T>& a, const Context<T>& c, int tid)
      : args(a),
        ctx(c),
        block(a),
        top(block.layers - 2),
        latents(block.widths[top + 1]),
        noisy(a[O::noisy].data),
        accumulate(a[O::accumulate]),
        chains{{a[O::slopes], a[O::dslopes], {}, {}}, {a[O::noisy], a[O::dnoisy], {}, {}}} {
    T* at = ctx.scratch + tid * ctx.scratch_stride;
    const auto take = [&](index_t n) { return at += n, at - n; };
    pack = take(SCRATCH), turned = take(latents * block.ld[top]);
    columns[0] = 0;
    for (int i = 0; i <= top; ++i) {
      weights[i] = view(args, ctx, JACOBIAN_WEIGHTS[i]);
      columns[i + 1] = columns[i] + (block.widths[i] + LANES - 1) / LANES * LANES;
      for (int chain = 0; chain <= noisy; ++chain) {
        chains[chain].pre[i] = take(block.rows * block.ld[i]);
        chains[chain].out[i] = i < top ? take(block.rows * block.ld[i]) : nullptr;
      }
    }
    d = take(block.rows * block.widest), other = take(block.rows * block.widest);
    kept = noisy ? take(block.rows * block.ld[0]) : nullptr;
    const Matrix<const T>& W = weights[top];
    for (index_t j = 0; j < W.rows; ++j)
      for (index_t k = 0; k < latents; ++k) turned[k * block.ld[top] + j] = W.row(j)[k];
  }

  Matrix<const T> rows_of(const T* data, index_t rows, int layer) const {
    return {data, rows, block.widths[layer], block.ld[layer], 1, true};
  }
  T root(index_t i) const { return row_root(args[O::weight], ctx, i, args[O::strength]); }

  void run(index_t grain, const Range& rows) {
    T* at = args[O::partial].row(grain);
    for (int i = 0; i <= top + 1; ++i) {
      const index_t size = block.widths[i] * block.ld[i > 0 ? i - 1 : 0];
      sums[i] = at, at += size;
      // Sums that no first tile writes.
      if (!accumulate && (i == top + 1 || rows.begin == rows.end)) clear(sums[i], size);
    }
    for (index_t i = rows.begin; i < rows.end; ++i) {
      if (!accumulate) clear(chains[0].dslopes.row(i), chains[0].dslopes.cols);
      if (noisy) clear(chains[1].dslopes.row(i), chains[1].dslopes.cols);
      args[O::rowpenalty].row(i)[0] = T(0);
    }
    const index_t begin = rows.begin * latents, n = rows.end * latents - begin;
    const index_t blocks = (n + block.rows - 1) / block.rows;
    const index_t size = blocks ? (n + blocks * MR - 1) / (blocks * MR) * MR : 0;
    for (index_t q = 0; q < n; q += size) forward_backward(begin + q, n - q < size ? n - q : size, accumulate || q > 0);
  }
  static void clear(T* p, index_t n) { __builtin_memset(p, 0, size_t(n) * sizeof(T)); }

  // Calls fn(row of the block, row of the batch, latent) for n rows from row q of all on.
  template <class Fn>
  void for_rows(index_t q, index_t n, const Fn& fn) const {
    index_t i = q / latents, k = q % latents;
    for (index_t r = 0; r < n; ++r) {
      fn(r, i, k);
      if (++k == latents) k = 0, ++i;
    }
  }

  // A block, whose sums are added to what is there if `onto`.
  void forward_backward(index_t q, index_t n, bool onto) {
    const index_t units = block.widths[0], ld = block.ld[0];
    for (int chain = 0; chain <= noisy; ++chain) forward(chains[chain], q, n);
    T* const b = chains[0].pre[0];
    if (noisy)
      for (index_t r = 0; r < n * ld; r += WIDTH<T>) store(b + r, load(b + r) - load(chains[1].pre[0] + r));
    const Matrix<const T> B = rows_of(b, n, 0);
    plain_product(B, view(args, ctx, O::gram), Matrix<T>{}, pack, store_tiles(d, ld, false));
    // The tiles of the symmetric B' B that reach above the diagonal.
    for (index_t j = 0; j < units; j += NR<T>) {
      Matrix<const T> left = B, right = B;
      left.cols = j + NR<T> < units ? j + NR<T> : units;
      right.data += j, right.cols = left.cols - j;
      plain_product(transposed(left), right, Matrix<T>{}, pack, store_tiles(sums[0] + j, ld, onto));
    }
    for_rows(q, n, [&](index_t r, index_t i, index_t) {
      LaneSum<T> sum;
      for (index_t j = 0; j < units; j += WIDTH<T>)
        sum.add(j, load_n(d + r * ld + j, units - j) * load_n(b + r * ld + j, units - j));
      args[O::rowpenalty].row(i)[0] += T(sum.total());
    });
    if (noisy) __builtin_memcpy(kept, d, size_t(n * ld) * sizeof(T));
    backward(chains[0], q, n, T(2), onto);
    if (noisy) {
      __builtin_memcpy(d, kept, size_t(n * ld) * sizeof(T));
      backward(chains[1], q, n, T(-2), true);
    }
  }

  void forward(const Chain& chain, index_t q, index_t n) const {
    for_rows(q, n, [&](index_t r, index_t i, index_t k) {
      const T share = root(i) * chain.slopes.row(i)[columns[top + 1] + k];
      const T *p = chain.slopes.row(i) + columns[top], *w = turned + k * block.ld[top];
      T* to = chain.pre[top] + r * block.ld[top];
      for (index_t j = 0; j < block.widths[top]; j += WIDTH<T>) store(to + j, share * load(w + j) * load(p + j));
    });
    for (int layer = top - 1; layer >= 0; --layer) {
      const index_t ld = block.ld[layer];
      plain_product(rows_of(chain.pre[layer + 1], n, layer + 1), transposed(weights[layer]),
                    Matrix<T>{chain.out[layer], n, block.widths[layer], ld, 1, true}, pack,
                    store_tiles(chain.out[layer], ld, false));
      for_rows(q, n, [&](index_t r, index_t i, index_t) {
        const T *p = chain.slopes.row(i) + columns[layer], *from = chain.out[layer] + r * ld;
        T* to = chain.pre[layer] + r * ld;
        for (index_t j = 0; j < block.widths[layer]; j += WIDTH<T>) store(to + j, load(from + j) * load(p + j));
      });
    }
  }

  // From the derivatives by the pre-activations of the first layer, d times `factor`, up through all layers.
  void backward(const Chain& chain, index_t q, index_t n, T factor, bool onto) {
    for (int i = 0; i < top; ++i) {
      through_slopes(chain, i, q, n, i == 0 ? factor : T(1));
      const Matrix<const T> dout = rows_of(d, n, i);
      plain_product(transposed(rows_of(chain.pre[i + 1], n, i + 1)), dout, Matrix<T>{}, pack,
                    store_tiles(sums[i + 1], block.ld[i], onto));
      plain_product(dout, weights[i], Matrix<T>{}, pack, store_tiles(other, block.ld[i + 1], false));
      T* const swapped = d;
      d = other, other = swapped;
    }
    through_last(chain, q, n, top == 0 ? factor : T(1));
  }

  // From the derivatives by the pre-activations of a layer to those by its slopes and, in place, by its outputs.
  void through_slopes(const Chain& chain, int layer, index_t q, index_t n, T factor) const {
    for_rows(q, n, [&](index_t r, index_t i, index_t) {
      const T *p = chain.slopes.row(i) + columns[layer], *from = chain.out[layer] + r * block.ld[layer];
      T *dp = chain.dslopes.row(i) + columns[layer], *at = d + r * block.ld[layer];
      for (index_t j = 0; j < block.widths[layer]; j += WIDTH<T>) {
        const vec<T> g = factor * load(at + j);
        store(dp + j, load(dp + j) + g * load(from + j));
        store(at + j, g * load(p + j));
      }
    });
  }

  // The same for the layer below the last. Only the weight and the slopes of the last layer follow its outputs.
  void through_last(const Chain& chain, index_t q, index_t n, T factor) const {
    const index_t ld = block.ld[top];
    for_rows(q, n, [&](index_t r, index_t i, index_t k) {
      T* const above = chain.dslopes.row(i) + columns[top + 1] + k;
      const T f = root(i), share = f * chain.slopes.row(i)[columns[top + 1] + k];
      const T *p = chain.slopes.row(i) + columns[top], *w = turned + k * ld, *at = d + r * ld;
      T *dp = chain.dslopes.row(i) + columns[top], *dw = sums[top + 1] + k * ld;
      LaneSum<T> sum;
      for (index_t j = 0; j < block.widths[top]; j += WIDTH<T>) {
        const index_t m = block.widths[top] - j;
        const vec<T> g = factor * load_n(at + j, m), wv = load_n(w + j, m), out = g * load_n(p + j, m);
        store(dp + j, load(dp + j) + g * (share * wv));
        store_n(dw + j, load_n(dw + j, m) + share * out, m);
        sum.add(j, out * wv);
      }
      *above += T(double(f) * sum.total());
    });
  }
};

template <class T>
void jacobian(const Args<T>& args, const Context<T>& ctx, int tid, int nt) {
  using O = op::JACOBIAN;
  const index_t grains = args[O::partial].rows;
  const Range mine(grains, tid, nt);
  if (mine.begin == mine.end) return;
  JacobianGrain<T> grain(args, ctx, tid);
  for (index_t g = mine.begin; g < mine.end; ++g) grain.run(g, Range(ctx.m, int(g), int(grains)));
}
NARROWS_RUN(JACOBIAN, jacobian)
template <class T>
Cost cost_of(op::JACOBIAN, const Args<T>& args, index_t batch, bool) {
  const JacobianBlock block(args);
  const double units = double(block.widths[0]);
  return {block.scratch, 3.0 * double(batch) * double(block.widths[block.layers - 1]) * units * units};
}

// n elements of the sum over the grains, in order.
template <class T>
inline vec<T> sum_of_grains(const Matrix<T>& partial, index_t column, index_t n) {
  vec<T> sum{};
  for (index_t g = 0; g < partial.rows; ++g) sum += load_n(partial.row(g) + column, n);
  return sum;
}

// Block by block; each is transposed in registers for its place across the diagonal. Threads take rows of blocks in
// turn, because the rows of a triangle differ in length.
template <class T>
void grain_sum(const Args<T>& args, const Context<T>&, int tid, int nt) {
  using O = op::GRAIN_SUM;
  constexpr index_t W = WIDTH<T>;
  const Matrix<T>&partial = args[O::partial], &out = args[O::out];
  const bool symmetric = args[O::form] == 0;
  if (args[O::form] == 2) {
    const Range rows(out.rows, tid, nt);
    for (index_t i = rows.begin; i < rows.end; ++i)
      for (index_t j = 0; j < out.cols; j += W)
        store_n(out.row(i) + j, sum_of_grains(partial, args[O::column] + i * padded(out.cols) + j, out.cols - j),
                out.cols - j);
    return;
  }
  const index_t rows = symmetric ? out.rows : out.cols, cols = symmetric ? out.cols : out.rows, ld = padded(cols);
  alignas(64) T block[W * W] = {}, turned[W * W];
  for (index_t i = tid * W; i < rows; i += nt * W)
    for (index_t j = symmetric ? i : 0; j < cols; j += W) {
      const index_t height = rows - i < W ? rows - i : W, width = cols - j < W ? cols - j : W;
      for (index_t r = 0; r < height; ++r) {
        store(block + r * W, sum_of_grains(partial, args[O::column] + (i + r) * ld + j, width));
      }
      if (symmetric && i == j)
        for (index_t r = 1; r < height; ++r)
          for (index_t l = 0; l < r; ++l) block[r * W + l] = block[l * W + r];
      transpose_block(block, W, turned, W);
      for (index_t l = 0; l < width; ++l) store_n(out.row(j + l) + i, load(turned + l * W), height);
      if (symmetric)
        for (index_t r = 0; r < height; ++r) store_n(out.row(i + r) + j, load(block + r * W), width);
    }
}
NARROWS_RUN(GRAIN_SUM, grain_sum)

// Updates a parameter with the sum of the grains as its gradient.
template <class Rule, class T>
void grain_update(const Args<T>& args, const Context<T>& ctx, int tid, int nt) {
  using O = op::GRAIN_UPDATE;
  const Matrix<T>&partial = args[O::partial], &W = args[O::W];
  const WeightStep<Rule, O, T> step(O(), args, ctx);
  const Range cells((W.rows + CELL_ROWS - 1) / CELL_ROWS, tid, nt);
  for (index_t c = cells.begin; c < cells.end; ++c) {
    const index_t begin = c * CELL_ROWS, end = begin + CELL_ROWS < W.rows ? begin + CELL_ROWS : W.rows;
    step.penalise(Tile{begin, 0, int(end - begin), W.cols});
    for (index_t i = begin; i < end; ++i)
      for (index_t j = 0; j < W.cols; j += WIDTH<T>) {
        const index_t n = W.cols - j;
        step.row(i)(j, sum_of_grains(partial, args[O::column] + i * padded(W.cols) + j, n), n);
      }
  }
}
NARROWS_RUN_BY_SOLVER(GRAIN_UPDATE, grain_update)

// --- by probes -------------------------------------------------------------------------------------------------------

template <class T>
void probe_signs(const Args<T>& args, const Context<T>& ctx, int tid, int nt) {
  using O = op::PROBE;
  const vec<T> half = splat<vec<T>>(philox_threshold(0.5)), one = splat<vec<T>>(1);
  for_cells(args[O::out], ctx, args[O::stream], tid, nt,
            [=](vec<T>, vec<T> cells) { return select(cells < half, -one, one); });
}
NARROWS_RUN(PROBE, probe_signs)

template <class T>
void tangent(const Args<T>& args, const Context<T>& ctx, int tid, int nt) {
  using O = op::TANGENT;
  const Matrix<T>&x = args[O::x], &out = args[O::out];
  const Range rows(ctx.m, tid, nt);
  for (index_t i = rows.begin; i < rows.end; ++i) {
    const T* p = args[O::slopes].row(i) + args[O::column];
    for (index_t j = 0; j < x.cols; j += WIDTH<T>) store(out.row(i) + j, load(x.row(i) + j) * load(p + j));
  }
}
NARROWS_RUN(TANGENT, tangent)

template <class T>
void squared_norm(const Args<T>& args, const Context<T>& ctx, int tid, int nt) {
  using O = op::SQUARED_NORM;
  const Matrix<T>&x = args[O::x], &rowpenalty = args[O::rowpenalty];
  const Range rows(ctx.m, tid, nt);
  for (index_t i = rows.begin; i < rows.end; ++i) {
    const T share = T(args[O::strength]) * row_scale(args[O::weight], ctx, i);
    LaneSum<T> sum;
    for (index_t j = 0; j < x.cols; j += WIDTH<T>) {
      const index_t n = x.cols - j;
      const vec<T> v = load_n(x.row(i) + j, n);
      sum.add(j, v * v);
      store_n(x.row(i) + j, T(2) * share * v, n);
    }
    const T value = T(double(share) * sum.total());
    rowpenalty.row(i)[0] = args[O::accumulate] ? rowpenalty.row(i)[0] + value : value;
  }
}
NARROWS_RUN(SQUARED_NORM, squared_norm)

template <class T>
void cotangent(const Args<T>& args, const Context<T>& ctx, int tid, int nt) {
  using O = op::COTANGENT;
  const Matrix<T>&dout = args[O::dout], &x = args[O::x];
  const Range rows(ctx.m, tid, nt);
  for (index_t i = rows.begin; i < rows.end; ++i) {
    const T* p = args[O::slopes].row(i) + args[O::column];
    T *dp = args[O::dslopes].row(i) + args[O::column], *d = dout.row(i);
    for (index_t j = 0; j < x.cols; j += WIDTH<T>) {
      const vec<T> g = load(d + j), by_slope = g * load(x.row(i) + j);
      store(dp + j, args[O::accumulate] ? load(dp + j) + by_slope : by_slope);
      store(d + j, g * load(p + j));
    }
  }
}
NARROWS_RUN(COTANGENT, cotangent)
