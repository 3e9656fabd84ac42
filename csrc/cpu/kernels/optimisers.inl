// Sums of a step's values, and the update of the flat parameter region.
// Included inside the namespace of an instruction set.

// A handful of numbers: one thread adds them in order.
template <class T>
void reduce(const Args<T>& args, const Context<T>& ctx, int tid, int) {
  if (tid != 0) return;
  const Matrix<T>&x = args.slots[0], &weight = args.slots[1];
  const index_t rows = rows_of(args, ctx, 0);
  double total = 0;
  for (index_t i = 0; i < rows; ++i)
    for (index_t j = 0; j < x.cols; ++j) total += double(x.row(i)[j]) * (weight.data ? double(weight.row(i)[0]) : 1.0);
  args.slots[2].data[args.ints[0]] += T(args.ints[1] ? total / double(ctx.m) : total);
}

template <class T>
void sqnorm(const Args<T>& args, const Context<T>& ctx, int tid, int nt) {
  const T* g = ctx.regions[REGION_GRADIENT];
  const Range grains(args.slots[0].cols, tid, nt);
  for (index_t i = grains.begin; i < grains.end; ++i) {
    const index_t begin = i * GRAIN;
    const index_t end = begin + GRAIN < ctx.parameter_size ? begin + GRAIN : ctx.parameter_size;
    LaneSum<T> sum;
    for (index_t j = begin; j < end; j += WIDTH<T>) sum.add(j, load(g + j) * load(g + j));
    args.slots[0].data[i] = T(sum.total());
  }
}

template <class T>
void shrink(const Args<T>& args, const Context<T>& ctx, int tid, int nt) {
  const Matrix<T>& W = args.slots[0];
  const T factor = T(1 - ctx.learning_rate * args.floats[0]);
  const Range rows(W.rows, tid, nt);
  for (index_t i = rows.begin; i < rows.end; ++i)
    for (index_t j = 0; j < W.cols; ++j) W.row(i)[j] *= factor;
}

// The update rules: step() gives the new parameters from w and their gradient g; the state lies at m and, for a rule
// with two moments, at v; the first n elements count.

// With momentum (Polyak, 1964).
template <class T>
struct Sgd {
  T momentum, rate;

  Sgd(const double* floats, const Context<T>& ctx)
      : momentum(T(ctx.momentum < 0 ? floats[0] : ctx.momentum)), rate(T(ctx.learning_rate)) {}
  vec<T> step(vec<T> w, vec<T> g, T* m, T*, index_t n) const {
    const vec<T> velocity = momentum * load_n(m, n) - rounded_value(rate * g);
    store_n(m, velocity, n);
    return w + velocity;
  }
};

// Kingma and Ba, 2015, the bias corrections folded into two scalars.
template <class T>
struct Adam {
  T b1, b2, c1, c2, epsilon, rate, root;

  Adam(const double* floats, const Context<T>& ctx)
      : b1(T(floats[0])),
        b2(T(floats[1])),
        c1(T(1 - floats[0])),
        c2(T(1 - floats[1])),
        epsilon(T(floats[2])),
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

// The factor that brings the gradient down to norm `clip`; every thread adds the partial sums in the same order.
template <class T>
inline T clip_scale(const Args<T>& args) {
  const Matrix<T>& partial = args.slots[0];
  if (!partial.data) return T(1);
  double total = 0;
  for (index_t i = 0; i < partial.cols; ++i) total += double(partial.data[i]);
  const double scale = args.floats[3] / (__builtin_sqrt(total) + 1e-6);
  return T(scale < 1 ? scale : 1);
}

// The whole parameter region from the whole gradient region.
template <template <class> class Rule, class T>
void update(const Args<T>& args, const Context<T>& ctx, int tid, int nt) {
  T *w = ctx.regions[REGION_PARAMETER], *m = ctx.regions[REGION_MOMENT1];
  T* v = ctx.regions[ctx.regions[REGION_MOMENT2] ? REGION_MOMENT2 : REGION_MOMENT1];
  const T *g = ctx.regions[REGION_GRADIENT], scale = clip_scale(args);
  const Rule<T> rule(args.floats, ctx);
  const Range grains((ctx.parameter_size + GRAIN - 1) / GRAIN, tid, nt);
  const index_t end = grains.end * GRAIN < ctx.parameter_size ? grains.end * GRAIN : ctx.parameter_size;
  for (index_t i = grains.begin * GRAIN; i < end; i += WIDTH<T>)
    store(w + i, rule.step(load(w + i), rounded_value(scale * load(g + i)), m + i, v + i, WIDTH<T>));
}

// The decays and the update of a weight, whose slots begin with operand `at`, from parts of its gradient.
template <template <class> class Rule, class T>
struct WeightStep {
  Matrix<T> W, m, v, penalty;
  Rule<T> rule;
  Decay<T> decay;
  T keep;

  WeightStep(const Args<T>& args, const Context<T>& ctx, int at, int penalty_at)
      : W(args.slots[at]),
        m(args.slots[at + 1]),
        v(args.slots[args.slots[at + 2].data ? at + 2 : at + 1]),
        penalty(args.slots[penalty_at]),
        rule(args.floats, ctx),
        decay(args.floats[3], args.floats[4], ctx),
        keep(T(1 - ctx.learning_rate * args.floats[5])) {}

  void penalise(const Tile& t) const {
    if (penalty.data) decay.tile(W, t, penalty);
  }
  void operator()(index_t i, index_t j, vec<T> g, index_t n) const {
    T* p = W.row(i) + j;
    const vec<T> w = load_n(p, n);
    if (penalty.data) g += decay.gradient(w);
    store_n(p, rule.step(rounded_value(keep * w), g, m.row(i) + j, v.row(i) + j, n), n);
  }
};

// A weight's gradient, its decays and its update, tile by tile: no gradient array.
template <template <class> class Rule, class T>
void wgrad_update(const Args<T>& args, const Context<T>& ctx, int tid, int nt) {
  Matrix<T> before = args.slots[2];
  const Matrix<T>& colrate = args.slots[6];
  WeightStep<Rule, T> step(args, ctx, 3, 7);
  Matrix<T>&W = step.W, &m = step.m, &v = step.v, &penalty = step.penalty;
  Matrix<const T> x = transposed(view(args, ctx, 0));
  T* scratch = ctx.scratch + tid * ctx.scratch_stride;
  if (NR<T> < LANES && penalty.data) {
    // Tiles are narrower than the cells of penalties, so a thread takes whole rows of both.
    const Range cells((W.rows + CELL_ROWS - 1) / CELL_ROWS, tid, nt);
    const index_t first = cells.begin * CELL_ROWS, end = cells.end * CELL_ROWS;
    x.data = x.row(first), x.rows = (end < W.rows ? end : W.rows) - first;
    for (Matrix<T>* a : {&before, &W, &m, &v})
      if (a->data) a->data = a->row(first);
    penalty.data = penalty.row(cells.begin);
    tid = 0, nt = 1;
  }
  product(
      ctx.bfloat16, x, view(args, ctx, 1), Matrix<T>{}, scratch,
      [&](const Tile& t, const T* tile) {
        step.penalise(t);
        for_vectors(t, tile, [&](index_t i, index_t j, vec<T> g, index_t n) {
          if (before.data) g += load_n(before.row(i) + j, n);
          if (colrate.data) g += load_n(colrate.data + j, n) * load_n(W.row(i) + j, n);
          step(i, j, g, n);
        });
      },
      tid, nt,
      [&](const Tile& t, const void** lines) {
        int n = 0;
        for (int i = 0; i < t.rows; ++i)
          for (index_t j = 0; j < t.cols; j += index_t(64 / sizeof(T)))
            for (const Matrix<T>* x : {&W, &m, &v}) lines[n++] = x->row(t.row + i) + t.col + j;
        return n;
      });
}

template <template <class> class Rule, class T>
void colsum_update(const Args<T>& args, const Context<T>& ctx, int tid, int nt) {
  const T* before = args.slots[1].data;
  T *b = args.slots[2].data, *m = args.slots[3].data, *v = args.slots[args.slots[4].data ? 4 : 3].data;
  const Rule<T> rule(args.floats, ctx);
  column_sums(
      view(args, ctx, 0), static_cast<const T*>(nullptr), 0,
      [&](index_t j, vec<T> g, index_t n) {
        if (before) g += load_n(before + j, n);
        store_n(b + j, rule.step(load_n(b + j, n), g, m + j, v + j, n), n);
      },
      tid, nt);
}
