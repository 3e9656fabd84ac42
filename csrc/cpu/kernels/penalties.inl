// Penalties on the latent layer and on weights: the gradient is added in place, and REDUCE sums the values.
// Included inside the namespace of an instruction set.

template <class V>
inline V sign_(V a) {
  return select(a > V{}, splat<V>(1), select(a < V{}, splat<V>(-1), V{}));
}

template <class Act, class T>
void activity_l1(const Args<T>& args, const Context<T>& ctx, int tid, int nt) {
  using O = op::ACTIVITY_L1;
  const Matrix<T>&a = args[O::a], &saved = args[O::saved], &weight = args[O::weight], &dz = args[O::dz];
  const T strength = T(args[O::strength]);
  const Range rows(ctx.m, tid, nt);
  for (index_t i = rows.begin; i < rows.end; ++i) {
    const T scale = strength * row_scale(weight, ctx, i);
    LaneSum<T> sum;
    for (index_t j = 0; j < a.cols; j += WIDTH<T>) {
      const index_t n = a.cols - j;
      const vec<T> av = load_n(a.row(i) + j, n);
      sum.add(j, abs_(av));
      T* p = dz.row(i) + j;
      store_n(p, load_n(p, n) + scale * (sign_(av) * Act::slope(load_n(saved.row(i) + j, n))), n);
    }
    args[O::rowpenalty].row(i)[0] = T(double(strength) * sum.total());
  }
}
NARROWS_RUN_BY_ACTIVATION(ACTIVITY_L1, activity_l1)

template <class Act, class T>
void kl_sparsity(const Args<T>& args, const Context<T>& ctx, int tid, int nt) {
  using O = op::KL_SPARSITY;
  const Matrix<T>&saved = args[O::saved], &weight = args[O::weight], &dz = args[O::dz];
  const T *mean = args[O::mean].data, strength = T(args[O::strength]), target = T(args[O::target]);
  const T tiny = sizeof(T) == 4 ? T(0x1p-23) : T(0x1p-52);
  // Threads share columns, because the penalty of a unit depends on its mean alone.
  const Range grains((saved.cols + LANES - 1) / LANES, tid, nt);
  for (index_t j = grains.begin * LANES; j < grains.end * LANES && j < saved.cols; j += WIDTH<T>) {
    const index_t n = saved.cols - j;
    const vec<T> t = splat<vec<T>>(double(target)), one = splat<vec<T>>(1);
    const vec<T> rho = min_(max_(load_n(mean + j, n), splat<vec<T>>(double(tiny))), one - tiny);
    store_n(args[O::penalty].data + j, strength * (t * log_(t / rho) + (one - t) * log_((one - t) / (one - rho))), n);
    const vec<T> slope = (one - t) / (one - rho) - t / rho;
    for (index_t i = 0; i < ctx.m; ++i) {
      T* p = dz.row(i) + j;
      const T scale = strength * row_scale(weight, ctx, i);
      store_n(p, load_n(p, n) + scale * (slope * Act::slope(load_n(saved.row(i) + j, n))), n);
    }
  }
}
NARROWS_RUN_BY_ACTIVATION(KL_SPARSITY, kl_sparsity)

// Weight decay: (l2 / 2 |w|^2 + l1 |w|) / m for each weight.
template <class T>
struct Decay {
  T l2, l1;

  Decay(double l2, double l1, const Context<T>& ctx) : l2(T(l2 / double(ctx.m))), l1(T(l1 / double(ctx.m))) {}
  vec<T> gradient(vec<T> w) const { return l2 * w + l1 * sign_(w); }
  // Writes the penalties of a tile of W into their cells. A tile that is narrower than a cell adds to the sum of the
  // tiles to its left.
  void tile(const Matrix<T>& W, const Tile& t, const Matrix<T>& penalty) const {
    for (index_t j = 0; j < t.cols; j += LANES) {
      LaneSum<T> sum;
      for (int i = 0; i < t.rows; ++i)
        for (index_t l = 0; l < LANES && j + l < t.cols; l += WIDTH<T>) {
          const vec<T> w = load_n(W.row(t.row + i) + t.col + j + l, t.cols - j - l);
          sum.add(l, T(0.5) * l2 * w * w + l1 * abs_(w));
        }
      T& cell = penalty.row(t.row / CELL_ROWS)[(t.col + j) / LANES];
      cell = T(((t.col + j) % LANES ? double(cell) : 0) + sum.total());
    }
  }
};

template <class T>
void decay(const Args<T>& args, const Context<T>& ctx, int tid, int nt) {
  using O = op::DECAY;
  const Matrix<T>&W = args[O::W], &dW = args[O::dW];
  const Decay<T> decay(args[O::l2], args[O::l1], ctx);
  const Range cells((W.rows + CELL_ROWS - 1) / CELL_ROWS, tid, nt);
  for (index_t c = cells.begin; c < cells.end; ++c) {
    const index_t begin = c * CELL_ROWS, end = begin + CELL_ROWS < W.rows ? begin + CELL_ROWS : W.rows;
    decay.tile(W, Tile{begin, 0, int(end - begin), W.cols}, args[O::penalty]);
    for (index_t i = begin; i < end; ++i)
      for (index_t j = 0; j < W.cols; j += WIDTH<T>) {
        const index_t n = W.cols - j;
        T* p = dW.row(i) + j;
        store_n(p, load_n(p, n) + decay.gradient(load_n(W.row(i) + j, n)), n);
      }
  }
}
NARROWS_RUN(DECAY, decay)
