// Sums of a step's values, and the update of the flat parameter region.
// Included inside the namespace of an instruction set.

// Few numbers: one thread adds them in order.
template <class T>
void reduce(const Args<T>& args, const Context<T>& ctx, int tid, int) {
  using O = op::REDUCE;
  if (tid != 0) return;
  const Matrix<T>&x = args[O::x], &weight = args[O::weight];
  const index_t rows = rows_of(args, ctx, O::x);
  double total = 0;
  for (index_t i = 0; i < rows; ++i)
    for (index_t j = 0; j < x.cols; ++j) total += double(x.row(i)[j]) * (weight.data ? double(weight.row(i)[0]) : 1.0);
  args[O::terms].data[args[O::index]] += T(args[O::mean] ? total / double(ctx.m) : total);
}
NARROWS_RUN(REDUCE, reduce)

template <class T>
void sqnorm(const Args<T>& args, const Context<T>& ctx, int tid, int nt) {
  using O = op::SQNORM;
  const T* g = ctx.regions[REGION_GRADIENT];
  const Range grains(args[O::partial].cols, tid, nt);
  for (index_t i = grains.begin; i < grains.end; ++i) {
    const index_t begin = i * GRAIN;
    const index_t end = begin + GRAIN < ctx.parameter_size ? begin + GRAIN : ctx.parameter_size;
    LaneSum<T> sum;
    for (index_t j = begin; j < end; j += WIDTH<T>) sum.add(j, load(g + j) * load(g + j));
    args[O::partial].data[i] = T(sum.total());
  }
}
NARROWS_RUN(SQNORM, sqnorm)

template <class T>
void shrink(const Args<T>& args, const Context<T>& ctx, int tid, int nt) {
  using O = op::SHRINK;
  const Matrix<T>& W = args[O::W];
  const T factor = T(1 - ctx.learning_rate * args[O::rate]);
  const Range rows(W.rows, tid, nt);
  for (index_t i = rows.begin; i < rows.end; ++i)
    for (index_t j = 0; j < W.cols; ++j) W.row(i)[j] *= factor;
}
NARROWS_RUN(SHRINK, shrink)

// The update rules. step() returns the new parameters from w and their gradient g. The moments lie at m and, for a rule
// with two of them, at v. The first n elements count.

// With momentum (Polyak, 1964).
template <class T>
struct Sgd {
  T momentum, rate;

  template <class O>
  Sgd(O, const Args<T>& args, const Context<T>& ctx)
      : momentum(T(ctx.momentum < 0 ? args[O::beta_1] : ctx.momentum)), rate(T(ctx.learning_rate)) {}
  vec<T> step(vec<T> w, vec<T> g, T* m, T*, index_t n) const {
    const vec<T> velocity = momentum * load_n(m, n) - rounded_value(rate * g);
    store_n(m, velocity, n);
    return w + velocity;
  }
};

// Kingma and Ba, 2015, with the bias corrections in two scalars.
template <class T>
struct Adam {
  T b1, b2, c1, c2, epsilon, rate, root;

  template <class O>
  Adam(O, const Args<T>& args, const Context<T>& ctx)
      : b1(T(args[O::beta_1])),
        b2(T(args[O::beta_2])),
        c1(T(1 - args[O::beta_1])),
        c2(T(1 - args[O::beta_2])),
        epsilon(T(args[O::epsilon])),
        rate(T(ctx.adam_rate)),
        root(T(ctx.adam_root)) {}
  vec<T> step(vec<T> w, vec<T> g, T* m, T* v, index_t n) const {
    const vec<T> mv = b1 * load_n(m, n) + rounded_value(c1 * g);
    const vec<T> vv = b2 * load_n(v, n) + rounded_value(c2 * (g * g));
    store_n(m, mv, n);
    store_n(v, vv, n);
    return w - rate * mv / (sqrt_(vv) * root + epsilon);
  }
};

// The factor that scales the gradient down to norm `clip`. Every thread adds the partial sums in the same order.
template <class T>
inline T clip_scale(const Args<T>& args) {
  using O = op::UPDATE;
  const Matrix<T>& partial = args[O::partial];
  if (!partial.data) return T(1);
  double total = 0;
  for (index_t i = 0; i < partial.cols; ++i) total += double(partial.data[i]);
  const double scale = args[O::clip] / (__builtin_sqrt(total) + 1e-6);
  return T(scale < 1 ? scale : 1);
}

// The whole parameter region from the whole gradient region.
template <class Rule, class T>
void update(const Args<T>& args, const Context<T>& ctx, int tid, int nt) {
  using O = op::UPDATE;
  T *w = ctx.regions[REGION_PARAMETER], *m = ctx.regions[REGION_MOMENT1];
  T* v = ctx.regions[ctx.regions[REGION_MOMENT2] ? REGION_MOMENT2 : REGION_MOMENT1];
  const T *g = ctx.regions[REGION_GRADIENT], scale = clip_scale(args);
  const Rule rule(O(), args, ctx);
  const Range grains((ctx.parameter_size + GRAIN - 1) / GRAIN, tid, nt);
  const index_t end = grains.end * GRAIN < ctx.parameter_size ? grains.end * GRAIN : ctx.parameter_size;
  for (index_t i = grains.begin * GRAIN; i < end; i += WIDTH<T>)
    store(w + i, rule.step(load(w + i), rounded_value(scale * load(g + i)), m + i, v + i, WIDTH<T>));
}
NARROWS_RUN_BY_SOLVER(UPDATE, update)

// The second moment, or the first if the rule has only one.
template <class O, class T>
inline const Matrix<T>& second_moment(const Args<T>& args) {
  return args[args[O::moment2].data ? O::moment2 : O::moment1];
}

// The decays and the update of the weight of O, from tiles of its gradient.
template <class Rule, class O, class T>
struct WeightStep {
  Matrix<T> W, m, v, penalty;
  Rule rule;
  Decay<T> decay;
  T keep;

  WeightStep(O o, const Args<T>& args, const Context<T>& ctx)
      : W(args[O::W]),
        m(args[O::moment1]),
        v(second_moment<O>(args)),
        penalty(args[O::penalty]),
        rule(o, args, ctx),
        decay(args[O::l2], args[O::l1], ctx),
        keep(T(1 - ctx.learning_rate * args[O::rate])) {}

  void penalise(const Tile& t) const {
    if (penalty.data) decay.tile(W, t, penalty);
  }
  // The step of row i.
  struct Row {
    T *w, *m, *v;
    const Rule& rule;
    Decay<T> decay;
    T keep;
    bool decays;

    void operator()(index_t j, vec<T> g, index_t n) const {
      const vec<T> value = load_n(w + j, n);
      if (decays) g += decay.gradient(value);
      store_n(w + j, rule.step(rounded_value(keep * value), g, m + j, v + j, n), n);
    }
  };
  Row row(index_t i) const { return {W.row(i), m.row(i), v.row(i), rule, decay, keep, penalty.data != nullptr}; }
};

// The gradient, the decays and the update of a weight, tile by tile, without a gradient array.
template <class Rule, class T>
void wgrad_update(const Args<T>& args, const Context<T>& ctx, int tid, int nt) {
  using O = op::WGRAD_UPDATE;
  Matrix<T> before = args[O::dW];
  const T* colrate = args[O::colrate].data;
  WeightStep<Rule, O, T> step(O(), args, ctx);
  Matrix<T>&W = step.W, &m = step.m, &v = step.v, &penalty = step.penalty;
  Matrix<const T> x = transposed(view(args, ctx, O::x));
  T* scratch = ctx.scratch + tid * ctx.scratch_stride;
  if (NR<T> < LANES && penalty.data) {
    // Tiles are narrower than the cells of penalties, so a thread has whole rows of cells.
    const Range cells((W.rows + CELL_ROWS - 1) / CELL_ROWS, tid, nt);
    const index_t first = cells.begin * CELL_ROWS, end = cells.end * CELL_ROWS;
    x.data = x.row(first), x.rows = (end < W.rows ? end : W.rows) - first;
    for (Matrix<T>* a : {&before, &W, &m, &v})
      if (a->data) a->data = a->row(first);
    penalty.data = penalty.row(cells.begin);
    tid = 0, nt = 1;
  }
  product<T>(ctx.bfloat16, x, view(args, ctx, O::dz), Matrix<T>{}, scratch,
             [step, before, colrate](const Tile& t, const T* tile) {
               step.penalise(t);
               for_vectors(t, tile, [&](index_t i) {
                 return [colrate, row = step.row(i), before = before.data ? before.row(i) : nullptr](
                            index_t j, vec<T> g, index_t n) {
                   if (before) g += load_n(before + j, n);
                   if (colrate) g += load_n(colrate + j, n) * load_n(row.w + j, n);
                   row(j, g, n);
                 };
               });
             },
             tid, nt, {W, m, v});
}
NARROWS_RUN_BY_SOLVER(WGRAD_UPDATE, wgrad_update)
template <class T>
Cost cost_of(op::WGRAD_UPDATE, const Args<T>& args, index_t batch, bool bfloat16) {
  using O = op::WGRAD_UPDATE;
  return {bfloat16 ? pair_scratch(args[O::x].cols, batch, false) : 0};
}

template <class Rule, class T>
void colsum_update(const Args<T>& args, const Context<T>& ctx, int tid, int nt) {
  using O = op::COLSUM_UPDATE;
  const T* before = args[O::db].data;
  T *b = args[O::b].data, *m = args[O::moment1].data, *v = second_moment<O>(args).data;
  const Rule rule(O(), args, ctx);
  column_sums(
      view(args, ctx, O::x), static_cast<const T*>(nullptr), 0,
      [&](index_t j, vec<T> g, index_t n) {
        if (before) g += load_n(before + j, n);
        store_n(b + j, rule.step(load_n(b + j, n), g, m + j, v + j, n), n);
      },
      tid, nt);
}
NARROWS_RUN_BY_SOLVER(COLSUM_UPDATE, colsum_update)
