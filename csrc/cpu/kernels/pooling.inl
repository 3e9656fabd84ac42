// Max pooling.
//
// Promises: the gradient of a window goes to its first maximum; NaN is the maximum of a window that has one.
// Included inside the namespace of an instruction set, after conv.inl.

// The maximum; NaN if one of them is.
template <class V>
inline V greater(V a, V b) {
  return select(b != b, b, select(b > a, b, a));
}

constexpr index_t POOL_SLACK = 64;  // elements behind a line of pixels that are written

struct Pooling {
  index_t h, w, c, y, x;
  ImageShape out;
  template <class O, class T>
  Pooling(O, const Args<T>& args)
      : h(args[O::h]),
        w(args[O::w]),
        c(args[O::c]),
        y(args[O::pool_y]),
        x(args[O::pool_x]),
        out{h / y, w / x, c, bool(args[O::layout] & 2)} {}
};

template <class T>
void maxpool(const Args<T>& args, const Context<T>& ctx, int tid, int nt) {
  using O = op::MAXPOOL;
  constexpr index_t W = WIDTH<T>;
  const Pooling p(O(), args);
  T* line = ctx.scratch + tid * ctx.scratch_stride;
  const Range rows(ctx.m, tid, nt);
  for (index_t i = rows.begin; i < rows.end; ++i) {
    const ImageRow<T> out = p.out.row(args[O::out].row(i));
    for (index_t c = 0; c < p.c; ++c)
      for (index_t y = 0; y < out.h; ++y) {
        const T* from = args[O::x].row(i) + (c * p.h + y * p.y) * p.w;
        for (index_t x = 0; x < p.w; x += W) {
          vec<T> v = load_n(from + x, p.w - x);
          for (index_t r = 1; r < p.y; ++r) v = greater(v, load_n(from + r * p.w + x, p.w - x));
          store(line + x, v);
        }
        for (index_t x = 0; x < out.w; x += W) {
          vec<T> v;
          if (p.x == 1) {
            v = load(line + x);
          } else if (p.x == 2) {
            const vec<T> a = load(line + 2 * x), b = load(line + 2 * x + W);
            v = greater(even_lanes<T>(a, b), odd_lanes<T>(a, b));
          } else {
            v = vec<T>{};
            for (index_t l = 0; l < W && x + l < out.w; ++l) {
              T most = line[(x + l) * p.x];
              for (index_t r = 1; r < p.x; ++r) {
                const T other = line[(x + l) * p.x + r];
                most = other != other || other > most ? other : most;
              }
              v[l] = most;
            }
          }
          out.store_pixels(c, y, x, v, out.w - x);
        }
      }
  }
}
NARROWS_RUN(MAXPOOL, maxpool)
template <class T>
Cost cost_of(op::MAXPOOL, const Args<T>& args, index_t, bool) {
  return {args[op::MAXPOOL::w] + POOL_SLACK};
}

// The maxima of windows p.y rows high and two columns wide, in n columns from `from` on.
template <class T>
inline vec<T> greatest_of_pairs(const Pooling& p, const T* from, index_t n) {
  vec<T> most{};
  for (index_t r = 0; r < p.y; ++r) {
    const T* row = from + r * p.w;
    const vec<T> a = load_n(row, n), b = load_some(row + WIDTH<T>, n - WIDTH<T>);
    const vec<T> v = greater(even_lanes<T>(a, b), odd_lanes<T>(a, b));
    most = r == 0 ? v : greater(most, v);
  }
  return most;
}

// The position, from `from` on, of the first maximum of window x.
template <class T>
inline index_t first_greatest(const Pooling& p, const T* from, index_t x) {
  index_t best = x * p.x;
  for (index_t r = 0; r < p.y; ++r)
    for (index_t l = 0; l < p.x; ++l)
      if (const index_t at = r * p.w + x * p.x + l; from[at] > from[best]) best = at;
  return best;
}

// Puts the gradients of the windows of one row of outputs, which are in `line`, at their first maxima; 0 elsewhere.
template <class Act, class T>
inline void unpool_row(const Pooling& p, const T* from, const T* line, const T* saved, T* to) {
  constexpr index_t W = WIDTH<T>;
  if (p.x == 2) {
    for (index_t x = 0; x < p.out.w; x += W) {
      const index_t n = p.w - 2 * x;
      const vec<T> most = greatest_of_pairs(p, from + 2 * x, n);
      vec<T> d = load_n(line + x, p.out.w - x);
      for (index_t r = 0; r < p.y; ++r) {
        const index_t at = r * p.w + 2 * x;
        const vec<T> a = load_n(from + at, n), b = load_some(from + at + W, n - W);
        // A gradient is put at one pixel only.
        const vec<T> left = select(even_lanes<T>(a, b) == most, d, vec<T>{});
        d = select(even_lanes<T>(a, b) == most, vec<T>{}, d);
        const vec<T> right = select(odd_lanes<T>(a, b) == most, d, vec<T>{});
        d = select(odd_lanes<T>(a, b) == most, vec<T>{}, d);
        constexpr auto lanes = std::make_integer_sequence<int, WIDTH<T>>();
        store_n(to + at, zip<T>(left, right, lanes) * Act::slope(load_n(saved + at, n)), n);
        if (n > W)
          store_n(to + at + W, zip_upper<T>(left, right, lanes) * Act::slope(load_n(saved + at + W, n - W)), n - W);
      }
    }
    return;
  }
  for (index_t r = 0; r < p.y; ++r)
    for (index_t j = 0; j < p.w; ++j) to[r * p.w + j] = T(0);
  for (index_t x = 0; x < p.out.w; ++x) to[first_greatest(p, from, x)] = line[x];
  for (index_t j = 0; j < p.y * p.w; j += W) {
    const index_t n = p.y * p.w - j;
    store_n(to + j, load_n(to + j, n) * Act::slope(load_n(saved + j, n)), n);
  }
}

template <class Act, class T>
void maxpool_dgrad(const Args<T>& args, const Context<T>& ctx, int tid, int nt) {
  using O = op::MAXPOOL_DGRAD;
  const Pooling p(O(), args);
  T* line = ctx.scratch + tid * ctx.scratch_stride;
  const Range rows(ctx.m, tid, nt);
  for (index_t i = rows.begin; i < rows.end; ++i) {
    const ImageRow<const T> dout = p.out.row(static_cast<const T*>(args[O::dout].row(i)));
    for (index_t c = 0; c < p.c; ++c)
      for (index_t y = 0; y < p.out.h; ++y) {
        const index_t at = (c * p.h + y * p.y) * p.w;
        unpool_row<Act>(p, args[O::x].row(i) + at, pixel_line(dout, c, y, line), args[O::saved].row(i) + at,
                        args[O::out].row(i) + at);
      }
  }
}
NARROWS_RUN_BY_ACTIVATION(MAXPOOL_DGRAD, maxpool_dgrad)
template <class T>
Cost cost_of(op::MAXPOOL_DGRAD, const Args<T>& args, index_t, bool) {
  return {args[op::MAXPOOL_DGRAD::w] + POOL_SLACK};
}

// The adjoint of maxpool_dgrad without an activation: a pixel of each window.
template <class T>
void maxpool_pick(const Args<T>& args, const Context<T>& ctx, int tid, int nt) {
  using O = op::MAXPOOL_PICK;
  constexpr index_t W = WIDTH<T>;
  const Pooling p(O(), args);
  const Range rows(ctx.m, tid, nt);
  for (index_t i = rows.begin; i < rows.end; ++i) {
    const ImageRow<T> out = p.out.row(args[O::out].row(i));
    for (index_t c = 0; c < p.c; ++c)
      for (index_t y = 0; y < out.h; ++y) {
        const index_t at = (c * p.h + y * p.y) * p.w;
        const T *of = args[O::y].row(i) + at, *from = args[O::x].row(i) + at;
        for (index_t x = 0; x < out.w; x += W) {
          vec<T> v{};
          if (p.x == 2) {
            const index_t n = p.w - 2 * x;
            const vec<T> most = greatest_of_pairs(p, from + 2 * x, n);
            // From the last pixel to the first, so that the first maximum remains.
            for (index_t r = p.y - 1; r >= 0; --r) {
              const index_t j = r * p.w + 2 * x;
              const vec<T> a = load_n(from + j, n), b = load_some(from + j + W, n - W);
              const vec<T> d = load_n(of + j, n), e = load_some(of + j + W, n - W);
              v = select(odd_lanes<T>(a, b) == most, odd_lanes<T>(d, e), v);
              v = select(even_lanes<T>(a, b) == most, even_lanes<T>(d, e), v);
            }
          } else {
            for (index_t l = 0; l < W && x + l < out.w; ++l) v[l] = of[first_greatest(p, from, x + l)];
          }
          out.store_pixels(c, y, x, v, out.w - x);
        }
      }
  }
}
NARROWS_RUN(MAXPOOL_PICK, maxpool_pick)
