// Variational networks (Kingma and Welling, ICLR 2014), with gradients: the draw of the latents, their divergence from
// the prior, and the Gaussian likelihood with learned variances. Included inside the namespace of an instruction set.

// z = mean + exp(log-variance / 2) normal; outside training z = mean.
template <class T>
void sample(const Args<T>& args, const Context<T>& ctx, int tid, int nt) {
  using O = op::SAMPLE;
  typedef int32_t ints __attribute__((vector_size(4 * WIDTH<T>)));
  const Matrix<T> stats = args[O::stats], z = args[O::z], noise = args[O::noise];
  const index_t k = z.cols;
  const Range rows(ctx.m, tid, nt);
  alignas(64) int32_t drawn[DRAWN];
  for (index_t i = rows.begin; i < rows.end; ++i) {
    const T* mean = stats.row(i);
    if (!ctx.learn) {
      __builtin_memcpy(z.row(i), mean, size_t(k) * sizeof(T));
      continue;
    }
    for (index_t j = 0; j < k; j += DRAWN) {
      const index_t end = k - j < DRAWN ? k : j + DRAWN;
      draw_cells(ctx.seed, args[O::stream], ctx.step, i, j, end - j, drawn);
      for (index_t l = j; l < end; l += WIDTH<T>) {
        const index_t n = end - l;
        ints cells;
        __builtin_memcpy(&cells, drawn + (l - j), sizeof cells);
        const vec<T> deviation = exp_(T(0.5) * load_n(mean + k + l, n));
        const vec<T> e = deviation * normal_of<T>(__builtin_convertvector(cells, vec<T>));
        store_n(noise.row(i) + l, e, n);
        store_n(z.row(i) + l, load_n(mean + l, n) + e, n);
      }
    }
  }
}
NARROWS_RUN(SAMPLE, sample)

// KL(N(mean, variance) || N(0, 1)) = 1/2 sum mean^2 + variance - 1 - log variance, and the gradient of it and of what
// dz is the derivative of. The derivative of z by the log-variance is half the noise.
template <class T>
void latent_kl(const Args<T>& args, const Context<T>& ctx, int tid, int nt) {
  using O = op::LATENT_KL;
  const Matrix<T>&stats = args[O::stats], &noise = args[O::noise], &dz = args[O::dz], &dstats = args[O::dstats];
  const index_t k = noise.cols;
  const T strength = T(args[O::strength] * ctx.kl_factor);
  const Range rows(ctx.m, tid, nt);
  for (index_t i = rows.begin; i < rows.end; ++i) {
    const T scale = strength * row_scale(args[O::weight], ctx, i), half = T(0.5) * scale;
    const T* mean = stats.row(i);
    T* out = dstats.row(i);
    LaneSum<T> sum;
    for (index_t j = 0; j < k; j += WIDTH<T>) {
      const index_t n = k - j;
      const vec<T> m = load_n(mean + j, n), log_variance = load_n(mean + k + j, n), grown = expm1_(log_variance);
      const vec<T> d = load_n(dz.row(i) + j, n), e = T(0.5) * load_n(noise.row(i) + j, n);
      sum.add(j, m * m + (grown - log_variance));
      store_n(out + j, d + scale * m, n);
      store_n(out + k + j, d * e + half * grown, n);
    }
    args[O::rowkl].row(i)[0] = T(0.5 * sum.total());
  }
}
NARROWS_RUN(LATENT_KL, latent_kl)

// -log N(y; p, v) = (y - p)^2 / (2 v) + log(2 pi v) / 2, v = exp(logvar) + floor.
template <class Act, class T>
void gaussian(const Args<T>& args, const Context<T>& ctx, int tid, int nt) {
  using O = op::GAUSSIAN;
  constexpr index_t CHUNK = 512;  // columns whose variances are computed once for all rows
  const Matrix<T>&z = args[O::z], &target = args[O::target], &rowloss = args[O::rowloss], &rates = args[O::rates];
  const T* logvar = args[O::logvar].data;
  const Range rows(ctx.m, tid, nt);
  alignas(64) T precision[CHUNK], rate[CHUNK];
  for (index_t begin = 0; begin < z.cols; begin += CHUNK) {
    const index_t end = z.cols - begin < CHUNK ? z.cols : begin + CHUNK;
    LaneSum<T> constant;
    for (index_t j = begin; j < end; j += WIDTH<T>) {
      const index_t n = end - j;
      const vec<T> grown = exp_(load_n(logvar + j, n)), variance = grown + T(VARIANCE_FLOOR);
      vec<T> log_density = log_(T(6.283185307179586) * variance);
      for (int l = n < WIDTH<T> ? int(n) : WIDTH<T>; l < WIDTH<T>; ++l) log_density[l] = T(0);
      constant.add(j, log_density);
      store(precision + (j - begin), T(1) / variance);
      store(rate + (j - begin), T(0.5) * grown / variance);
    }
    const double offset = constant.total();
    for (index_t i = rows.begin; i < rows.end; ++i) {
      const T scale = row_scale(args[O::weight], ctx, i);
      LaneSum<T> sum;
      for (index_t j = begin; j < end; j += WIDTH<T>) {
        const index_t n = end - j;
        T* at = z.row(i) + j;
        const vec<T> pre = load(at), p = Act::value(pre), d = p - load(target.row(i) + j);
        const vec<T> pull = d * load(precision + (j - begin));
        vec<T> square = d * pull;
        if (ctx.learn) {
          store(at, scale * pull * Act::slope(Act::FROM_PRE ? pre : p));
          store(rates.row(i) + j, (scale - scale * square) * load(rate + (j - begin)));
        }
        // Lanes past the last column hold old contents of the memory.
        for (int l = n < WIDTH<T> ? int(n) : WIDTH<T>; l < WIDTH<T>; ++l) square[l] = T(0);
        sum.add(j, square);
      }
      const T part = T(0.5 * (sum.total() + offset));
      rowloss.row(i)[0] = begin ? rowloss.row(i)[0] + part : part;
    }
  }
}
NARROWS_RUN_BY_ACTIVATION(GAUSSIAN, gaussian)
