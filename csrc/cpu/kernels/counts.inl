// Likelihoods of counts in wide layers: sums of rows, normalised input, the loss with its gradient, and means.
//
// Promises: the loss reads counts in place, dense or CSR, with the same bits for both. A zero takes one logarithm and
// no gamma function; only counts above zero take gamma functions. The temporaries of a row stay in cache. Included
// inside the namespace of an instruction set.

// Calls fn(column, value) for the stored values of a row of CSR, or all of a dense one.
template <class In, class Fn>
inline void for_stored(const SourceView& s, index_t row, const Fn& fn) {
  if (!s.is_csr) {
    const char* p = s.data + row * s.row_stride;
    for (index_t j = 0; j < s.cols; ++j, p += s.col_stride) fn(j, read<In>(p));
    return;
  }
  const In* values = reinterpret_cast<const In*>(s.data);
  const auto walk = [&](const auto* indptr, const auto* indices) __attribute__((always_inline)) {
    for (index_t k = indptr[row]; k < index_t(indptr[row + 1]); ++k) fn(index_t(indices[k]), values[k]);
  };
  if (s.is_index64)
    walk(static_cast<const int64_t*>(s.indptr), static_cast<const int64_t*>(s.indices));
  else
    walk(static_cast<const int32_t*>(s.indptr), static_cast<const int32_t*>(s.indices));
}

template <class In>
inline double row_total(const SourceView& s, index_t row) {
  // Sums of integers are exact in any order.
  double part[4] = {};
  index_t k = 0;
  for_stored<In>(s, row, [&](index_t, In value) { part[k++ % 4] += double(value); });
  return (part[0] + part[1]) + (part[2] + part[3]);
}

template <class T>
void size_sum(const Args<T>& args, const Context<T>& ctx, int tid, int nt) {
  using O = op::SIZE_SUM;
  const SourceView& s = ctx.sources[args[O::source]];
  const Range rows(ctx.m, tid, nt);
  for (index_t i = rows.begin; i < rows.end; ++i) {
    const index_t row = ctx.rows[i];
    args[O::out].row(i)[0] = T(s.is_double ? row_total<double>(s, row) : row_total<float>(s, row));
  }
}
NARROWS_RUN(SIZE_SUM, size_sum)

// The factor of the counts of a row that sum to `total`, and the logarithm of counts with that factor.
template <class T>
inline T size_factor(T scale, T total) {
  return scale / (total > T(0) ? total : T(1));
}
template <class V>
inline V normalized(V x, scalar_t<V> factor) {
  return log1p_(rounded_value(x * factor));
}

template <class T>
void log_normalize(const Args<T>& args, const Context<T>& ctx, int tid, int nt) {
  using O = op::LOG_NORMALIZE;
  const Matrix<T>&x = args[O::x], &size_sum = args[O::size_sum];
  const Range rows(ctx.m, tid, nt);
  for (index_t i = rows.begin; i < rows.end; ++i) {
    const T factor = size_factor(T(args[O::scale]), size_sum.row(i)[0]);
    for (index_t j = 0; j < x.cols; j += WIDTH<T>) {
      const index_t n = x.cols - j;
      store_n(x.row(i) + j, normalized(load_n(x.row(i) + j, n), factor), n);
    }
  }
}
NARROWS_RUN(LOG_NORMALIZE, log_normalize)

template <class T>
void means(const Args<T>& args, const Context<T>& ctx, int tid, int nt) {
  using O = op::MEANS;
  const Matrix<T>&z = args[O::z], &out = args[O::out];
  const bool softmax = args[O::activation] == ACT_SOFTMAX;
  const Range rows(ctx.m, tid, nt);
  for (index_t i = rows.begin; i < rows.end; ++i) {
    const T total = args[O::size_sum].data ? args[O::size_sum].row(i)[0] : T(args[O::scale]);
    T* to = out.row(i);
    if (to != z.row(i)) __builtin_memcpy(to, z.row(i), size_t(out.cols) * sizeof(T));
    T highest;
    if (softmax) softmax_row(to, out.cols, highest);
    const T factor = softmax ? total : total / T(args[O::scale]);
    for (index_t j = 0; j < out.cols; j += WIDTH<T>) {
      const index_t n = out.cols - j;
      const vec<T> v = load_n(to + j, n);
      store_n(to + j, (softmax ? v : exp_(v)) * factor, n);
    }
  }
}
NARROWS_RUN(MEANS, means)

// Arrays in the scratch memory of a thread: an element for each feature of a row, or for each count above zero.
template <class T>
struct CountScratch {
  T *dense, *slopes, *theta, *inverse;                                // by feature
  T *y, *z, *at_theta, *zeta, *by_mean, *by_dispersion, *by_dropout;  // by count
  int32_t* column;

  CountScratch(T* scratch, index_t n) {
    T** const arrays[] = {&dense,    &slopes, &theta,   &inverse,       &y,         &z,
                          &at_theta, &zeta,   &by_mean, &by_dispersion, &by_dropout};
    for (T** a : arrays) *a = scratch, scratch += count_room(n);
    column = reinterpret_cast<int32_t*>(scratch);
  }
};

// Takes the nonzero values of a row and their columns. Returns how many, or -1 if the columns do not increase.
template <class T, class In>
index_t take_counts(const SourceView& s, index_t row, const CountScratch<T>& to) {
  index_t n = 0, before = -1;
  bool ordered = true;
  // Every value is written, and kept if it is not zero: a branch could not be predicted on dense rows.
  for_stored<In>(s, row, [&](index_t j, In value) __attribute__((always_inline)) {
    to.column[n] = int32_t(j), to.y[n] = T(value);
    n += value != In(0) && n < s.cols;
    ordered = ordered && j > before;
    before = j;
  });
  return ordered ? n : -1;
}

template <class T>
index_t counts_of(const SourceView& s, index_t row, const CountScratch<T>& to) {
  const index_t n = s.is_double ? take_counts<T, double>(s, row, to) : take_counts<T, float>(s, row, to);
  if (n >= 0) return n;
  for (index_t j = 0; j < s.cols; ++j) to.dense[j] = T(0);
  const auto add = [&](index_t j, auto value) { to.dense[j] += T(value); };
  s.is_double ? for_stored<double>(s, row, add) : for_stored<float>(s, row, add);
  SourceView sums;
  sums.cols = s.cols, sums.col_stride = sizeof(T), sums.data = reinterpret_cast<const char*>(to.dense);
  return take_counts<T, T>(sums, 0, to);
}

// exp(pace log_dispersion) and its inverse, of n columns.
template <class T>
inline void dispersions_of(const T* log_dispersion, T pace, const CountScratch<T>& to, index_t n) {
  const vec<T> limit = splat<vec<T>>(LOG_DISPERSION_LIMIT);
  for (index_t j = 0; j < n; j += WIDTH<T>) {
    const vec<T> theta = exp_(max_(-limit, min_(limit, load_n(log_dispersion + j, n - j) * pace)));
    store(to.theta + j, theta);
    store(to.inverse + j, T(1) / theta);
  }
}

// One thread's work of COUNTS.
template <class L, bool SOFTMAX, class T>
class CountLoss {
  using O = op::COUNTS;
  using V = vec<T>;

 public:
  CountLoss(const Args<T>& args, const Context<T>& ctx, int tid)
      : args_(args),
        ctx_(ctx),
        source_(ctx.sources[args[O::source]]),
        by_cell_(args[O::by_cell]),
        n_(args[O::z].cols / (1 + by_cell_ + L::DROPOUT)),
        at_(ctx.scratch + tid * ctx.scratch_stride, n_) {
    if (L::DISPERSED && !by_cell_) dispersions_of(args[O::log_dispersion].data, T(DISPERSION_PACE), at_, n_);
  }

  // A grain of rows. The derivatives by the dispersions of columns are added up in `sums`, unless it is null.
  void run(const Range& rows, T* sums) {
    if (sums && ctx_.learn)
      for (index_t j = 0; j < n_; ++j) sums[j] = T(0);
    for (index_t i = rows.begin; i < rows.end; ++i) row(i, sums);
  }

 private:
  void row(index_t i, T* sums) {
    T* z = args_[O::z].row(i);
    T *tau = by_cell_ ? z + n_ : nullptr, *zeta = L::DROPOUT ? z + (1 + by_cell_) * n_ : nullptr;
    const index_t count = counts_of(source_, ctx_.rows[i], at_);
    if (L::DISPERSED && by_cell_) dispersions_of(tau, T(1), at_, n_);
    for (index_t k = 0; k < count; ++k) {
      const index_t j = at_.column[k];
      at_.z[k] = z[j];
      if (L::DISPERSED) at_.at_theta[k] = at_.theta[j];
      if (L::DROPOUT) at_.zeta[k] = zeta[j];
    }
    // Means are factor * exp(logit - highest), and z holds these exponentials.
    const T total = args_[O::size_sum].row(i)[0];
    T highest = T(0), sum = T(1), factor = total / T(args_[O::scale]);
    if (SOFTMAX) sum = exponentials(z, highest), factor = total / sum;
    const T log_factor = T(__builtin_log(double(factor))) - highest;
    const T scale = row_scale(args_[O::weight], ctx_, i);
    const T by_log_theta = by_cell_ ? scale : scale * T(DISPERSION_PACE);
    T* slopes = SOFTMAX ? at_.slopes : z;
    LaneSum<T> loss, slope;

    for (index_t j = 0; j < n_; j += WIDTH<T>) {
      const index_t n = n_ - j;
      V theta{}, inverse{}, logit{}, mu = load_n(z + j, n);
      if (L::DISPERSED) theta = load(at_.theta + j), inverse = load(at_.inverse + j);
      if (L::DROPOUT) logit = load_n(zeta + j, n);
      mu = (SOFTMAX ? mu : exp_(mu)) * factor;
      const CountTerms<V> t = L::zero(mu, theta, inverse, logit);
      loss.add(j, keep_n(t.loss, n));
      if (!ctx_.learn) continue;
      slope.add(j, keep_n(t.by_mean, n));
      store_n(slopes + j, t.by_mean * scale, n);
      if (L::DROPOUT) store_n(zeta + j, t.by_dropout * scale, n);
      if (L::DISPERSED && by_cell_) store_n(tau + j, t.by_dispersion * scale, n);
      if (L::DISPERSED && sums)
        store_n(sums + j, load_n(sums + j, n) + rounded_value(t.by_dispersion * by_log_theta), n);
    }

    for (index_t k = 0; k < count; k += WIDTH<T>) {
      const index_t n = count - k;
      V theta{}, logit{};
      const V one = splat<V>(1), y = load_n(at_.y + k, n), log_mean = load_n(at_.z + k, n) + log_factor;
      if (L::DISPERSED) theta = load_n(at_.at_theta + k, n);
      if (L::DROPOUT) logit = load_n(at_.zeta + k, n);
      const V mu = exp_(load_n(at_.z + k, n) - highest) * factor;
      const CountTerms<V> zero = L::zero(mu, theta, one / theta, logit);
      const CountTerms<V> t = L::count(y, mu, log_mean, theta, logit, zero);
      loss.add(k, keep_n(t.loss - zero.loss, n));
      if (!ctx_.learn) continue;
      slope.add(k, keep_n(t.by_mean - zero.by_mean, n));
      store_n(at_.by_mean + k, t.by_mean * scale, n);
      if (L::DROPOUT) store_n(at_.by_dropout + k, t.by_dropout * scale, n);
      if (L::DISPERSED)
        store_n(at_.by_dispersion + k,
                (by_cell_ ? t.by_dispersion : t.by_dispersion - zero.by_dispersion) * by_log_theta, n);
    }

    args_[O::rowloss].row(i)[0] = T(loss.total());
    if (!ctx_.learn) return;
    for (index_t k = 0; k < count; ++k) {
      const index_t j = at_.column[k];
      slopes[j] = at_.by_mean[k];
      if (L::DROPOUT) zeta[j] = at_.by_dropout[k];
      if (L::DISPERSED && by_cell_) tau[j] = at_.by_dispersion[k];
      if (L::DISPERSED && sums) sums[j] += at_.by_dispersion[k];
    }
    if (!SOFTMAX) return;
    // Back through the softmax p = z / sum: d_j - p_j sum_k d_k.
    const T part = T(slope.total() * double(scale) / double(sum));
    for (index_t j = 0; j < n_; j += WIDTH<T>) {
      const index_t n = n_ - j;
      store_n(z + j, load_n(slopes + j, n) - rounded_value(load_n(z + j, n) * part), n);
    }
  }

  // z becomes exp(z - highest); returns the sum.
  T exponentials(T* z, T& highest) const {
    V most = splat<V>(z[0]);
    for (index_t j = 0; j + WIDTH<T> <= n_; j += WIDTH<T>) most = max_(load(z + j), most);
    highest = most[0];
    for (int l = 1; l < WIDTH<T>; ++l) highest = most[l] > highest ? most[l] : highest;
    for (index_t j = n_ / WIDTH<T> * WIDTH<T>; j < n_; ++j) highest = z[j] > highest ? z[j] : highest;
    LaneSum<T> sum;
    for (index_t j = 0; j < n_; j += WIDTH<T>) {
      const index_t n = n_ - j;
      const V e = keep_n(exp_(load_n(z + j, n) - highest), n);
      sum.add(j, e);
      store_n(z + j, e, n);
    }
    return T(sum.total());
  }

  const Args<T>& args_;
  const Context<T>& ctx_;
  const SourceView& source_;
  const index_t by_cell_, n_;
  const CountScratch<T> at_;
};

template <class L, bool SOFTMAX, class T>
void counts(const Args<T>& args, const Context<T>& ctx, int tid, int nt) {
  using O = op::COUNTS;
  CountLoss<L, SOFTMAX, T> work(args, ctx, tid);
  const Matrix<T>& partial = args[O::partial];
  if (!partial.data) return work.run(Range(ctx.m, tid, nt), nullptr);
  const Range grains(partial.rows, tid, nt);
  for (index_t g = grains.begin; g < grains.end; ++g) work.run(Range(ctx.m, int(g), int(partial.rows)), partial.row(g));
}
template <class L, class T>
Op<T> counts_by_link(int activation) {
  return activation == ACT_SOFTMAX ? counts<L, true, T> : counts<L, false, T>;
}
template <class T>
Op<T> run_of(op::COUNTS, const Args<T>& args) {
  const int loss = args[op::COUNTS::loss], activation = args[op::COUNTS::activation];
  return loss == LOSS_POISSON ? counts_by_link<Poisson, T>(activation)
         : loss == LOSS_NB    ? counts_by_link<Nb, T>(activation)
                              : counts_by_link<Zinb, T>(activation);
}
template <class T>
Cost cost_of(op::COUNTS, const Args<T>& args, index_t, bool) {
  using O = op::COUNTS;
  const index_t columns = 1 + args[O::by_cell] + (args[O::loss] == LOSS_ZINB);
  return {COUNT_ARRAYS * count_room(args[O::z].cols / columns)};
}
