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

// Calls fn(begin, end) for each of the thread's grains of the parameter region.
template <class T, class Fn>
inline void for_grains(const Context<T>& ctx, int tid, int nt, const Fn& fn) {
  const Range grains((ctx.parameter_size + GRAIN - 1) / GRAIN, tid, nt);
  const index_t end = grains.end * GRAIN < ctx.parameter_size ? grains.end * GRAIN : ctx.parameter_size;
  if (grains.begin < grains.end) fn(grains.begin * GRAIN, end);
}

template <class T>
void update_sgd(const Args<T>& args, const Context<T>& ctx, int tid, int nt) {
  T *w = ctx.regions[REGION_PARAMETER], *v = ctx.regions[REGION_MOMENT1];
  const T* g = ctx.regions[REGION_GRADIENT];
  const T momentum = T(args.floats[0]), rate = T(ctx.learning_rate), scale = clip_scale(args);
  for_grains(ctx, tid, nt, [&](index_t begin, index_t end) {
    for (index_t i = begin; i < end; i += WIDTH<T>) {
      const vec<T> vv = momentum * load(v + i) - rate * (scale * load(g + i));
      store(v + i, vv);
      store(w + i, load(w + i) + vv);
    }
  });
}

// Adam (Kingma and Ba, 2015), the bias corrections folded into two scalars.
template <class T>
void update_adam(const Args<T>& args, const Context<T>& ctx, int tid, int nt) {
  T *w = ctx.regions[REGION_PARAMETER], *m = ctx.regions[REGION_MOMENT1], *v = ctx.regions[REGION_MOMENT2];
  const T* g = ctx.regions[REGION_GRADIENT];
  const double beta_1 = args.floats[0], beta_2 = args.floats[1], t = double(ctx.step) + 1;
  const T b1 = T(beta_1), b2 = T(beta_2), c1 = T(1 - beta_1), c2 = T(1 - beta_2), epsilon = T(args.floats[2]);
  const T rate = T(ctx.learning_rate / (1 - __builtin_pow(beta_1, t)));
  const T root = T(1 / __builtin_sqrt(1 - __builtin_pow(beta_2, t))), scale = clip_scale(args);
  for_grains(ctx, tid, nt, [&](index_t begin, index_t end) {
    for (index_t i = begin; i < end; i += WIDTH<T>) {
      const vec<T> gv = scale * load(g + i);
      const vec<T> mv = b1 * load(m + i) + c1 * gv, vv = b2 * load(v + i) + c2 * (gv * gv);
      store(m + i, mv);
      store(v + i, vv);
      store(w + i, load(w + i) - rate * mv / (sqrt_(vv) * root + epsilon));
    }
  });
}
