// Losses fused with the output link: each row's loss and, in training, the gradient by the pre-activation, in place.
// Included inside the namespace of an instruction set.

// The factor of a row's gradient: d(mean over the batch)/d(row's loss).
template <class T>
inline T row_scale(const Matrix<T>& weight, const Context<T>& ctx, index_t i) {
  const T scale = T(1.0 / double(ctx.m));
  return weight.data ? scale * weight.row(i)[0] : scale;
}

template <class Loss, class Act, class T>
void loss_elementwise(const Args<T>& args, const Context<T>& ctx, int tid, int nt) {
  using O = op::LOSS;
  const Matrix<T>&z = args[O::z], &target = args[O::target], &rowloss = args[O::rowloss];
  const T delta = T(args[O::delta]);
  const Range rows(ctx.m, tid, nt);
  for (index_t i = rows.begin; i < rows.end; ++i) {
    const T scale = row_scale(args[O::weight], ctx, i);
    LaneSum<T> sum;
    for (index_t j = 0; j < z.cols; j += WIDTH<T>) {
      const index_t n = z.cols - j;
      T* p = z.row(i) + j;
      vec<T> dz;
      const vec<T> value = Linked<Loss, Act>::eval(load(p), load(target.row(i) + j), delta, dz);
      // Lanes past the last column hold old contents of the memory.
      sum.add(j, keep_n(value, n));
      if (ctx.learn) store(p, dz * scale);
    }
    rowloss.row(i)[0] = T(sum.total());
  }
}

// Cross-entropy behind a sigmoid. The features of a lane share a logarithm: Q = prod (1 + e) - 1 grows by
// Q <- Q + e + Q e, which keeps small e exact. log1p(Q) is added every FLUSH features of the lane (Q < 2**FLUSH).
template <class T>
void loss_bce_sigmoid(const Args<T>& args, const Context<T>& ctx, int tid, int nt) {
  using O = op::LOSS;
  constexpr int N = LANES / WIDTH<T>;
  constexpr index_t FLUSH = 32;
  const Matrix<T>&z = args[O::z], &target = args[O::target], &rowloss = args[O::rowloss];
  const Range rows(ctx.m, tid, nt);
  for (index_t i = rows.begin; i < rows.end; ++i) {
    const T scale = row_scale(args[O::weight], ctx, i);
    T* row = z.row(i);
    const T* y = target.row(i);
    LaneSum<T> sum;
    for (index_t begin = 0; begin < z.cols; begin += FLUSH * LANES) {
      const index_t end = begin + FLUSH * LANES < z.cols ? begin + FLUSH * LANES : z.cols;
      vec<T> product[N] = {};
      for (index_t j = begin; j < end; j += LANES)
        for (int v = 0; v < N; ++v) {
          const index_t at = j + v * WIDTH<T>, n = end - at;
          if (n <= 0) break;
          vec<T> e, dz, linear = BceSigmoid::eval(load(row + at), load(y + at), e, dz);
          if (ctx.learn) store(row + at, dz * scale);
          // Lanes past the last column hold old contents of the memory.
          e = keep_n(e, n);
          sum.add(at, keep_n(linear, n));
          product[v] += e + product[v] * e;
        }
      for (int v = 0; v < N; ++v) sum.add(v * WIDTH<T>, log1p_(product[v]));
    }
    rowloss.row(i)[0] = T(sum.total());
  }
}

// z becomes softmax(z) in place; returns log sum exp(z) - max z, and the maximum in `highest`.
template <class T>
inline T softmax_row(T* z, index_t cols, T& highest) {
  highest = z[0];
  for (index_t j = 1; j < cols; ++j) highest = z[j] > highest ? z[j] : highest;
  LaneSum<T> sum;
  for (index_t j = 0; j < cols; j += WIDTH<T>) {
    const vec<T> e = keep_n(exp_(load(z + j) - highest), cols - j);
    sum.add(j, e);
    store(z + j, e);
  }
  const double total = sum.total();
  const T inverse = T(1 / total);
  for (index_t j = 0; j < cols; j += WIDTH<T>) store(z + j, load(z + j) * inverse);
  return T(__builtin_log(total));
}

template <class T>
void link_softmax(const Args<T>& args, const Context<T>& ctx, int tid, int nt) {
  using O = op::LINK;
  const Range rows(ctx.m, tid, nt);
  T highest;
  for (index_t i = rows.begin; i < rows.end; ++i) softmax_row(args[O::z].row(i), args[O::z].cols, highest);
}

template <class T>
Op<T> run_of(op::LINK, const Args<T>& args) {
  const int activation = args[op::LINK::activation];
  if (activation == ACT_SOFTMAX) return link_softmax<T>;
  return by_activation(activation, [](auto act) -> Op<T> { return link<decltype(act), T>; });
}

// -sum_j y_j log p_j with p = softmax(z); dz = p sum_j y_j - y.
template <class T>
void loss_multinomial(const Args<T>& args, const Context<T>& ctx, int tid, int nt) {
  using O = op::LOSS;
  const Matrix<T>&z = args[O::z], &target = args[O::target], &rowloss = args[O::rowloss];
  const Range rows(ctx.m, tid, nt);
  for (index_t i = rows.begin; i < rows.end; ++i) {
    T* p = z.row(i);
    const T *y = target.row(i), scale = row_scale(args[O::weight], ctx, i);
    // The softmax overwrites the logits, so their part of the loss comes first.
    T highest = p[0];
    for (index_t j = 1; j < z.cols; ++j) highest = p[j] > highest ? p[j] : highest;
    LaneSum<T> counts, inner;
    for (index_t j = 0; j < z.cols; j += WIDTH<T>) {
      const vec<T> v = load_n(y + j, z.cols - j);
      counts.add(j, v);
      inner.add(j, select(v == vec<T>{}, vec<T>{}, v * (load_n(p + j, z.cols - j) - highest)));
    }
    const T total = T(counts.total()), log_sum = softmax_row(p, z.cols, highest);
    rowloss.row(i)[0] = T(double(total) * double(log_sum) - inner.total());
    if (ctx.learn)
      for (index_t j = 0; j < z.cols; j += WIDTH<T>) store(p + j, (load(p + j) * total - load(y + j)) * scale);
  }
}

// Any other loss behind softmax, by the chain rule: dz = p (dp - sum_k p_k dp_k).
template <class Loss, class T>
void loss_softmax(const Args<T>& args, const Context<T>& ctx, int tid, int nt) {
  using O = op::LOSS;
  const Matrix<T>&z = args[O::z], &target = args[O::target], &rowloss = args[O::rowloss];
  const T delta = T(args[O::delta]);
  const Range rows(ctx.m, tid, nt);
  for (index_t i = rows.begin; i < rows.end; ++i) {
    T *p = z.row(i), highest;
    const T *y = target.row(i), scale = row_scale(args[O::weight], ctx, i);
    softmax_row(p, z.cols, highest);
    LaneSum<T> sum, inner;
    for (index_t j = 0; j < z.cols; j += WIDTH<T>) {
      const index_t n = z.cols - j;
      const vec<T> pv = load_n(p + j, n), yv = load_n(y + j, n);
      sum.add(j, keep_n(Loss::value(pv, yv, delta), n));
      inner.add(j, keep_n(pv * Loss::slope(pv, yv, delta), n));
    }
    rowloss.row(i)[0] = T(sum.total());
    const T mean = T(inner.total());
    if (ctx.learn)
      for (index_t j = 0; j < z.cols; j += WIDTH<T>) {
        const vec<T> pv = load(p + j);
        store(p + j, pv * (Loss::slope(pv, load(y + j), delta) - mean) * scale);
      }
  }
}
template <class T>
Op<T> run_of(op::LOSS, const Args<T>& args) {
  const int loss = args[op::LOSS::loss], activation = args[op::LOSS::activation];
  if (activation == ACT_SOFTMAX) {
    switch (loss) {
      case LOSS_MSE:
        return loss_softmax<Mse, T>;
      case LOSS_HUBER:
        return loss_softmax<Huber, T>;
      case LOSS_BCE:
        return loss_softmax<Bce, T>;
      case LOSS_MULTINOMIAL:
        return loss_multinomial<T>;
    }
  }
  if (loss == LOSS_BCE && activation == ACT_SIGMOID) return loss_bce_sigmoid<T>;
  return by_activation(activation, [&](auto act) -> Op<T> {
    if (loss == LOSS_MSE) return loss_elementwise<Mse, decltype(act), T>;
    if (loss == LOSS_HUBER) return loss_elementwise<Huber, decltype(act), T>;
    return nullptr;
  });
}
