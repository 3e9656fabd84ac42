// Convolutions and their adjoints.
//
// Promises: each output is one chain of fused multiply-adds over (kernel row, kernel column, channel): the same bits
// for any tile, team and vector width. Products are made in the program's own type, under bfloat16, too. Included
// inside the namespace of an instruction set; geometry.h says how images lie in scratch memory.

// A row of a slot, as an image.
template <class T>
struct ImageRow {
  T* data;
  index_t h, w, c;
  bool last;  // channels are last, else one comes after the other

  T* at(index_t channel, index_t y, index_t x) const {
    return last ? data + (y * w + x) * c + channel : data + (channel * h + y) * w + x;
  }
  // A vector of n pixels of a channel from (y, x) on, at most.
  auto load_pixels(index_t channel, index_t y, index_t x, index_t n) const {
    using S = std::remove_const_t<T>;
    const T* p = at(channel, y, x);
    if (!last) return load_n<S>(p, n);
    vec<S> v{};
    for (index_t l = 0; l < n && l < WIDTH<S>; ++l) v[l] = p[l * c];
    return v;
  }
  template <class V>
  void store_pixels(index_t channel, index_t y, index_t x, V v, index_t n) const {
    T* p = at(channel, y, x);
    if (!last) return store_n(p, v, n);
    for (index_t l = 0; l < n && l < WIDTH<T>; ++l) p[l * c] = v[l];
  }
};

// The shape and layout of the images in a slot.
struct ImageShape {
  index_t h, w, c;
  bool last;

  template <class T>
  ImageRow<T> row(T* data) const {
    return {data, h, w, c, last};
  }
};
// The attributes of a convolution O.
template <class O, class T>
inline ConvGeometry geometry_of(const Args<T>& args) {
  return conv_geometry(args.ints + int(O::h));
}
template <class O, class T>
inline ImageShape x_shape(const Args<T>& args, const ConvGeometry& g) {
  return {args[O::h], args[O::w], args[O::c], g.x_last};
}
template <class O, class T>
inline ImageShape out_shape(const Args<T>& args, const ConvGeometry& g) {
  return {args[O::out_h], args[O::out_w], args[O::filters], g.out_last};
}

// Elements FIRST, FIRST + 2, ... of a and b, one after the other.
template <int FIRST, class T, int... I>
inline vec<T> alternate(vec<T> a, vec<T> b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (2 * I + FIRST)...);
}
template <class T>
inline vec<T> even_lanes(vec<T> a, vec<T> b) {
  return alternate<0, T>(a, b, std::make_integer_sequence<int, WIDTH<T>>());
}
template <class T>
inline vec<T> odd_lanes(vec<T> a, vec<T> b) {
  return alternate<1, T>(a, b, std::make_integer_sequence<int, WIDTH<T>>());
}
// As load_n and store_n, for an n that may be none.
template <class T>
inline vec<T> load_some(const T* p, index_t n) {
  return n > 0 ? load_n(p, n) : vec<T>{};
}
template <class T>
inline void store_some(T* p, vec<T> v, index_t n) {
  if (n > 0) store_n(p, v, n);
}
// to[2 i] = a[i], to[2 i + 1] = b[i], for n elements of `to`.
template <class T>
inline void store_zipped(T* to, vec<T> a, vec<T> b, index_t n) {
  constexpr auto lanes = std::make_integer_sequence<int, WIDTH<T>>();
  store_some(to, zip<T>(a, b, lanes), n);
  store_some(to + WIDTH<T>, zip_upper<T>(a, b, lanes), n - WIDTH<T>);
}

// --- images into planes ----------------------------------------------------------------------------------------------

// A row of an image, as contiguous pixels: in place, or gathered into `line`.
template <class T>
inline const T* pixel_line(const ImageRow<const T>& image, index_t channel, index_t y, T* line) {
  const T* p = image.at(channel, y, 0);
  if (!image.last) return p;
  for (index_t x = 0; x < image.w; ++x) line[x] = p[x * image.c];
  return line;
}

// Writes n pixels, each repeated, from column `pad` on over the phases of a row, whose planes lie `plane` apart.
template <class T>
inline void spread(const T* line, index_t n, index_t repeat, index_t pad, index_t stride, index_t plane, T* to) {
  constexpr index_t W = WIDTH<T>;
  if (stride == 1 && repeat == 1) {
    for (index_t x = 0; x < n; x += W) store_n(to + pad + x, load_n(line + x, n - x), n - x);
  } else if (stride == 1 && repeat == 2) {
    for (index_t x = 0; x < n; x += 2 * W) {
      const vec<T> v = load_n(line + x / 2, (n - x + 1) / 2);
      store_zipped(to + pad + x, v, v, n - x);
    }
  } else if (stride == 2 && repeat == 1) {
    T* even = to + (pad % 2) * plane + pad / 2;
    T* odd = to + (pad + 1) % 2 * plane + (pad + 1) / 2;
    for (index_t x = 0; x < n; x += 2 * W) {
      const vec<T> a = load_n(line + x, n - x), b = load_some(line + x + W, n - x - W);
      store_some(even + x / 2, even_lanes<T>(a, b), (n - x + 1) / 2);
      store_some(odd + x / 2, odd_lanes<T>(a, b), (n - x) / 2);
    }
  } else {
    for (index_t x = 0; x < n; ++x) to[(x + pad) % stride * plane + (x + pad) / stride] = line[x / repeat];
  }
}

template <class T>
inline void unpack_wide(const ConvGeometry& g, const GatherPlan& p, const ImageRow<const T>& image, T* line,
                        T* planes) {
  for (index_t c = 0; c < image.c; ++c)
    for (index_t y = 0; y < image.h; ++y) {
      const T* from = pixel_line(image, c, y, line);
      for (index_t r = 0; r < g.up_y; ++r) {
        const index_t at = y * g.up_y + r + g.y.pad;
        if (at / g.y.stride >= p.rows) break;
        T* to = planes + (c * p.phases + at % g.y.stride * g.x.stride) * p.plane + at / g.y.stride * p.pitch;
        spread(from, p.columns, g.up_x, g.x.pad, g.x.stride, p.plane, to);
      }
    }
}

// The narrow image from (before_y, before_x) on in planes of one phase.
template <class T>
inline void unpack_narrow(const ImageRow<const T>& image, index_t rows, index_t columns, index_t pitch, index_t plane,
                          T* line, T* to) {
  for (index_t c = 0; c < image.c; ++c)
    for (index_t y = 0; y < rows; ++y)
      spread(pixel_line(image, c, y, line), columns, 1, 0, 1, 0, to + c * plane + y * pitch);
}

// --- the products ----------------------------------------------------------------------------------------------------

// A term of an output: where its pixels begin, and where its weight is.
struct Tap {
  index_t image, weight;
};

// out (M_ channels, V_ vectors of pixels) = sum over taps of weight * pixels.
template <class T, int M_, int V_>
void conv_kernel(const Tap* taps, index_t n, const T* image, const T* weight, index_t step, T* out, index_t out_row) {
  vec<T> acc[M_][V_];
#pragma GCC unroll 8
  for (int m = 0; m < M_; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < V_; ++v) acc[m][v] = vec<T>{};
  for (index_t k = 0; k < n; ++k) {
    const T *p = image + taps[k].image, *w = weight + taps[k].weight;
    vec<T> pixels[V_];
#pragma GCC unroll 8
    for (int v = 0; v < V_; ++v) pixels[v] = load(p + v * WIDTH<T>);
#pragma GCC unroll 8
    for (int m = 0; m < M_; ++m) {
      const vec<T> factor = broadcast(w[m * step]);
#pragma GCC unroll 8
      for (int v = 0; v < V_; ++v) acc[m][v] = madd(acc[m][v], factor, pixels[v]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M_; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < V_; ++v) store(out + m * out_row + v * WIDTH<T>, acc[m][v]);
}

template <class T>
using ConvKernel = void (*)(const Tap*, index_t, const T*, const T*, index_t, T*, index_t);

// A single channel takes twice the vectors, because few accumulators would wait for each other.
template <class T>
inline ConvKernel<T> conv_micro(index_t channels, index_t vectors) {
#define ROW(m)                                                                                      \
  {                                                                                                 \
    conv_kernel<T, m, 1>, conv_kernel<T, m, (NV > 1 ? 2 : 1)>, conv_kernel<T, m, (NV > 2 ? 3 : 1)>, \
        conv_kernel<T, m, (NV > 3 ? 4 : 1)>                                                         \
  }
  static const ConvKernel<T> table[CONV_CHANNELS][4] = {ROW(1), ROW(2), ROW(3), ROW(4), ROW(5), ROW(6)};
#undef ROW
  static const ConvKernel<T> single[4] = {conv_kernel<T, 1, NV + 1>, conv_kernel<T, 1, NV + (NV > 1 ? 2 : 1)>,
                                          conv_kernel<T, 1, NV + (NV > 2 ? 3 : 1)>,
                                          conv_kernel<T, 1, NV + (NV > 3 ? 4 : 1)>};
  return vectors > NV ? single[vectors - NV - 1] : table[channels - 1][vectors - 1];
}

// Cuts n things into the fewest parts of at most `most`, of nearly equal size, and calls fn(begin, size) for each.
template <class Fn>
inline void in_even_parts(index_t n, index_t most, const Fn& fn) {
  const index_t parts = (n + most - 1) / most;
  for (index_t i = 0; i < parts; ++i) fn(n * i / parts, n * (i + 1) / parts - n * i / parts);
}

// Some channels of all pixels.
template <class T>
inline void conv_tiles(const Tap* taps, index_t n, const T* image, const T* weight, index_t step, index_t channels,
                       index_t pixels, T* out, index_t out_row) {
  in_even_parts((pixels + WIDTH<T> - 1) / WIDTH<T>, channels == 1 ? 2 * NV : NV, [&](index_t begin, index_t vectors) {
    conv_micro<T>(channels, vectors)(taps, n, image + begin * WIDTH<T>, weight, step, out + begin * WIDTH<T>, out_row);
  });
}

// Elements from one weight to the next by kernel element, wide and narrow channel.
struct WeightSteps {
  index_t tap, wide, narrow;
  WeightSteps(const ConvGeometry& g, index_t ld)
      : tap((g.transposed ? g.narrow_channels : g.wide_channels) * ld),
        wide(g.transposed ? 1 : ld),
        narrow(g.transposed ? ld : 1) {}
};

inline index_t whole_lanes(index_t n) { return (n + LANES - 1) / LANES * LANES; }

// Hands out the parts of a thread's scratch memory, in the order that conv_scratch() counts them.
template <class T>
struct Scratch {
  T* at;
  T* take(index_t n) { return at += n, at - n; }
  T* zeros(index_t n) { return static_cast<T*>(__builtin_memset(take(n), 0, size_t(n) * sizeof(T))); }
  Tap* taps(index_t n) {
    return reinterpret_cast<Tap*>(take(whole_lanes(n * index_t(sizeof(Tap)) / index_t(sizeof(T)) + 1)));
  }
  T* line(const ConvGeometry& g) {
    return take(whole_lanes((g.x.wide > g.x.narrow ? g.x.wide : g.x.narrow) + CONV_SLACK));
  }
};

// For each weight: where its pixels of the wide image begin, and where the weight is.
inline Tap* gather_taps(const ConvGeometry& g, const GatherPlan& p, const WeightSteps& steps, Tap* tap) {
  for (index_t ky = 0; ky < g.y.kernel; ++ky)
    for (index_t kx = 0; kx < g.x.kernel; ++kx) {
      const index_t phase = ky % g.y.stride * g.x.stride + kx % g.x.stride;
      const index_t at = phase * p.plane + ky / g.y.stride * p.pitch + kx / g.x.stride;
      for (index_t c = 0; c < g.wide_channels; ++c)
        *tap++ = {c * p.phases * p.plane + at, (ky * g.x.kernel + kx) * steps.tap + c * steps.wide};
    }
  return tap;
}

// From wide images to narrow ones: emit(row, channel, y, x, sums, n) takes a vector of n pixels, at most. It is
// inlined, because a call for each row of small images takes a tenth of the time.
template <class T, class Emit>
inline void gather_rows(const ConvGeometry& g, const Matrix<T>& from, const ImageShape& shape, const Matrix<T>& W,
                        T* memory, const Range& rows, const Emit& emit) {
  const GatherPlan p = gather_plan(g);
  const WeightSteps steps(g, W.row_stride);
  const index_t n_taps = g.taps() * g.wide_channels, stride = whole_lanes(p.span + CONV_SLACK);
  Scratch<T> scratch{memory};
  T* planes = scratch.zeros(p.planes);
  Tap* taps = scratch.taps(n_taps);
  T *line = scratch.line(g), *sums = scratch.take(CONV_CHANNELS * stride);
  gather_taps(g, p, steps, taps);
  for (index_t i = rows.begin; i < rows.end; ++i) {
    unpack_wide(g, p, shape.row(static_cast<const T*>(from.row(i))), line, planes);
    in_even_parts(g.narrow_channels, CONV_CHANNELS, [&](index_t first, index_t channels) {
      conv_tiles(taps, n_taps, planes, W.data + first * steps.narrow, steps.narrow, channels, p.span, sums, stride);
      for (index_t c = 0; c < channels; ++c)
        for (index_t y = 0; y < g.y.narrow; ++y)
          for (index_t x = 0; x < g.x.narrow; x += WIDTH<T>)
            emit(i, first + c, y, x, load(sums + c * stride + y * p.pitch + x), g.x.narrow - x);
    });
  }
}

// The wide pixels of a row, from its phases, which lie `plane` apart.
template <class T>
inline const T* join_phases(const T* row, const ConvAxis& axis, index_t plane, T* line) {
  if (axis.stride == 1) return row + axis.pad;
  if (axis.stride == 2) {
    const T* first = row + axis.pad % 2 * plane + axis.pad / 2;
    const T* second = row + (axis.pad + 1) % 2 * plane + (axis.pad + 1) / 2;
    for (index_t x = 0; x < axis.wide; x += 2 * WIDTH<T>)
      store_zipped(line + x, load(first + x / 2), load(second + x / 2), 2 * WIDTH<T>);
    return line;
  }
  for (index_t x = 0; x < axis.wide; ++x)
    line[x] = row[(x + axis.pad) % axis.stride * plane + (x + axis.pad) / axis.stride];
  return line;
}

// Pixels from x on: each is the sum of its repetitions in the line.
template <class T>
inline vec<T> sum_repeated(const T* line, index_t x, index_t n, index_t repeat) {
  constexpr index_t W = WIDTH<T>;
  if (repeat == 1) return load(line + x);
  if (repeat == 2) {
    const vec<T> a = load(line + 2 * x), b = 2 * (n < W ? n : W) > W ? load(line + 2 * x + W) : vec<T>{};
    return even_lanes<T>(a, b) + odd_lanes<T>(a, b);
  }
  vec<T> sum{};
  for (index_t l = 0; l < n && l < W; ++l) {
    T total = line[(x + l) * repeat];
    for (index_t r = 1; r < repeat; ++r) total += line[(x + l) * repeat + r];
    sum[l] = total;
  }
  return sum;
}

// From narrow images to wide ones, where pixels that are repetitions of each other are added; emit as in gather_rows().
template <class T, class Emit>
inline void scatter_rows(const ConvGeometry& g, const Matrix<T>& from, const ImageShape& shape, const Matrix<T>& W,
                         T* memory, const Range& rows, const Emit& emit) {
  const ScatterPlan p = scatter_plan(g);
  const WeightSteps steps(g, W.row_stride);
  const index_t stride = whole_lanes(p.span + CONV_SLACK);
  Scratch<T> scratch{memory};
  T* planes = scratch.zeros(p.planes);
  Tap* const taps = scratch.taps(g.taps() * g.narrow_channels);
  T *line = scratch.line(g), *other = scratch.line(g), *sums = scratch.take(CONV_CHANNELS * p.phases * stride);
  Tap* tap = taps;
  for (index_t phase = 0; phase < p.phases; ++phase)
    for (index_t ky = phase / g.x.stride; ky < g.y.kernel; ky += g.y.stride)
      for (index_t kx = phase % g.x.stride; kx < g.x.kernel; kx += g.x.stride) {
        const index_t y = p.before_y - ky / g.y.stride, x = p.before_x - kx / g.x.stride;
        for (index_t c = 0; c < g.narrow_channels; ++c)
          *tap++ = {c * p.plane + y * p.pitch + x, (ky * g.x.kernel + kx) * steps.tap + c * steps.narrow};
      }
  const auto count = [](const ConvAxis& a, index_t phase) {
    return phase < a.kernel ? (a.kernel - phase + a.stride - 1) / a.stride : 0;
  };
  // The first step of a phase that writes a pixel, and the step after the last.
  const auto first_step = [](const ConvAxis& a, index_t phase) {
    return a.pad > phase ? (a.pad - phase + a.stride - 1) / a.stride : 0;
  };
  const auto end_step = [](const ConvAxis& a, index_t phase) {
    const index_t last = a.wide - 1 + a.pad - phase;
    return last < 0 ? 0 : last / a.stride + 1;
  };
  const index_t narrow_rows = g.y.narrow < p.steps_y ? g.y.narrow : p.steps_y;
  for (index_t i = rows.begin; i < rows.end; ++i) {
    unpack_narrow(shape.row(static_cast<const T*>(from.row(i))), narrow_rows, p.columns, p.pitch, p.plane, line,
                  planes + p.before_y * p.pitch + p.before_x);
    in_even_parts(g.wide_channels, CONV_CHANNELS, [&](index_t first, index_t channels) {
      const Tap* of = taps;
      for (index_t phase = 0; phase < p.phases; ++phase) {
        const index_t py = phase / g.x.stride, px = phase % g.x.stride;
        const index_t n = count(g.y, py) * count(g.x, px) * g.narrow_channels;
        const index_t y = first_step(g.y, py), x = first_step(g.x, px);
        const index_t height = end_step(g.y, py) - y, width = end_step(g.x, px) - x, at = y * p.pitch + x;
        if (height > 0 && width > 0)
          conv_tiles(of, n, planes + at, W.data + first * steps.wide, steps.wide, channels,
                     (height - 1) * p.pitch + width, sums + phase * stride + at, p.phases * stride);
        of += n;
      }
      for (index_t c = 0; c < channels; ++c)
        for (index_t y = 0; y < g.y.wide / g.up_y; ++y) {
          const T* wide = nullptr;
          for (index_t r = 0; r < g.up_y; ++r) {
            const index_t at = y * g.up_y + r + g.y.pad;
            const T* row = sums + (c * p.phases + at % g.y.stride * g.x.stride) * stride + at / g.y.stride * p.pitch;
            const T* joined = join_phases(row, g.x, stride, r == 0 ? line : other);
            if (r > 0)
              for (index_t x = 0; x < g.x.wide; x += WIDTH<T>) store(line + x, load(wide + x) + load(joined + x));
            wide = r == 0 ? joined : line;
          }
          const index_t width = g.x.wide / g.up_x;
          for (index_t x = 0; x < width; x += WIDTH<T>)
            emit(i, first + c, y, x, sum_repeated(wide, x, width - x, g.up_x), width - x);
        }
    });
  }
}

// --- repeated pixels -------------------------------------------------------------------------------------------------

// Calls fn(element of the kernel, element of the folded kernel) for all pairs in which the second contains the first.
template <class Fn>
inline void for_folded(const ConvGeometry& g, const Fn& fn) {
  const index_t width = g.x.kernel + g.up_x - 1;
  for (index_t ky = 0; ky < g.y.kernel; ++ky)
    for (index_t kx = 0; kx < g.x.kernel; ++kx)
      for (index_t dy = 0; dy < g.up_y; ++dy)
        for (index_t dx = 0; dx < g.up_x; ++dx)
          fn(ky * g.x.kernel + kx, (dy - ky + g.y.kernel - 1) * width + dx - kx + g.x.kernel - 1);
}

// to += from, n elements, whole vectors.
template <class T>
inline void add_to(T* to, const T* from, index_t n) {
  for (index_t i = 0; i < n; i += WIDTH<T>) store(to + i, load(to + i) + load(from + i));
}

// A convolution with its weight. If pixels are repeated, it is the equivalent transposed convolution.
template <class T>
struct Folded {
  ConvGeometry g;
  Matrix<T> W;
  T* scratch;

  Folded(const ConvGeometry& given, const Matrix<T>& weight, T* memory) : g(given), W(weight), scratch(memory) {
    if (!given.folds()) return;
    g = given.folded();
    const index_t element = given.wide_channels * W.row_stride;
    Scratch<T> s{memory};
    T* sums = s.zeros(g.taps() * element);
    for_folded(given,
               [&](index_t k, index_t folded) { add_to(sums + folded * element, weight.data + k * element, element); });
    W.data = sums, scratch = s.at;
  }
};

// --- the ops ---------------------------------------------------------------------------------------------------------

template <class O, class T>
inline Cost conv_cost(int code, const Args<T>& args, index_t batch, index_t grains) {
  const ConvGeometry g = geometry_of<O>(args);
  return {conv_scratch(code, g, batch, grains, sizeof(T)), 2.0 * double(batch) * double(g.y.narrow * g.x.narrow) *
                                                               double(g.taps() * g.wide_channels * g.narrow_channels)};
}

template <class Act, class T>
void convolve(const Args<T>& args, const Context<T>& ctx, int tid, int nt) {
  using O = op::CONVOLVE;
  const Matrix<T>&x = args[O::x], &out = args[O::out], &pre = args[O::pre];
  const Folded<T> f(geometry_of<O>(args), args[O::W], ctx.scratch + tid * ctx.scratch_stride);
  const ConvGeometry& g = f.g;
  const ImageShape from = x_shape<O>(args, g), to = out_shape<O>(args, g);
  const T* bias = args[O::b].data;
  const Range rows(ctx.m, tid, nt);
  const auto emit = [&](index_t i, index_t c, index_t y, index_t at, vec<T> z, index_t n)
                        __attribute__((always_inline)) {
                          if (bias) z += bias[c];
                          if (pre.data) to.row(pre.row(i)).store_pixels(c, y, at, z, n);
                          to.row(out.row(i)).store_pixels(c, y, at, Act::value(z), n);
                        };
  g.transposed ? scatter_rows(g, x, from, f.W, f.scratch, rows, emit)
               : gather_rows(g, x, from, f.W, f.scratch, rows, emit);
}
NARROWS_RUN_BY_ACTIVATION(CONVOLVE, convolve)
template <class T>
Cost cost_of(op::CONVOLVE, const Args<T>& args, index_t batch, bool) {
  return conv_cost<op::CONVOLVE>(OP_CONVOLVE, args, batch, 1);
}

template <class Act, class T>
void conv_dgrad(const Args<T>& args, const Context<T>& ctx, int tid, int nt) {
  using O = op::CONV_DGRAD;
  const Matrix<T>&dz = args[O::dz], &saved = args[O::saved], &out = args[O::out];
  const Folded<T> f(geometry_of<O>(args), args[O::W], ctx.scratch + tid * ctx.scratch_stride);
  const ConvGeometry& g = f.g;
  const ImageShape from = out_shape<O>(args, g), to = x_shape<O>(args, g);
  const T scale = T(args[O::scale]);
  const Range rows(ctx.m, tid, nt);
  const auto emit = [&](index_t i, index_t c, index_t y, index_t at, vec<T> d, index_t n)
                        __attribute__((always_inline)) {
                          const vec<T> a = to.row(static_cast<const T*>(saved.row(i))).load_pixels(c, y, at, n);
                          to.row(out.row(i)).store_pixels(c, y, at, d * Act::slope(a * scale), n);
                        };
  g.transposed ? gather_rows(g, dz, from, f.W, f.scratch, rows, emit)
               : scatter_rows(g, dz, from, f.W, f.scratch, rows, emit);
}
NARROWS_RUN_BY_ACTIVATION(CONV_DGRAD, conv_dgrad)
template <class T>
Cost cost_of(op::CONV_DGRAD, const Args<T>& args, index_t batch, bool) {
  return conv_cost<op::CONV_DGRAD>(OP_CONV_DGRAD, args, batch, 1);
}
