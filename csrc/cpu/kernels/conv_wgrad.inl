// Gradients of the weights and biases of convolutions.
//
// Promises: the same bits for any team and vector width. A sum over pixels runs over 16 virtual lanes, image after
// image, and one tree adds the lanes. Shapes alone cut rows into grains, and the images of a grain into blocks.
// Included inside the namespace of an instruction set, after conv.inl.

// Accumulators of a tile of the weight's gradient, each of LANES lanes: taps and narrow channels.
template <class T>
constexpr int LANE_VECTORS = LANES / WIDTH<T>;
template <class T>
constexpr int TILE_TAPS = LANE_VECTORS<T> == 1   ? 4
                          : LANE_VECTORS<T> == 2 ? 2
                                                 : 1;
template <class T>
constexpr int TILE_CHANNELS = LANE_VECTORS<T> == 1   ? 4
                              : LANE_VECTORS<T> == 2 ? 3
                              : LANE_VECTORS<T> == 4 ? 2
                                                     : 1;

// sums[tap][channel] = lane by lane, wide pixels times narrow ones, over all steps of LANES pixels of all images.
template <class T, int K_, int N_>
void wgrad_kernel(const T* const* wide, index_t wide_image, const T* narrow, index_t plane, index_t narrow_image,
                  index_t images, T* sums) {
  constexpr int V = LANE_VECTORS<T>;
  vec<T> acc[K_][N_][V];
#pragma GCC unroll 16
  for (int k = 0; k < K_; ++k)
#pragma GCC unroll 16
    for (int n = 0; n < N_; ++n)
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) acc[k][n][v] = vec<T>{};
  const T* from[K_];
#pragma GCC unroll 16
  for (int k = 0; k < K_; ++k) from[k] = wide[k];
  for (index_t i = 0; i < images; ++i) {
    for (index_t at = 0; at < plane; at += LANES)
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) {
        vec<T> d[N_];
#pragma GCC unroll 16
        for (int n = 0; n < N_; ++n) d[n] = load(narrow + n * plane + at + v * WIDTH<T>);
#pragma GCC unroll 16
        for (int k = 0; k < K_; ++k) {
          const vec<T> x = load(from[k] + at + v * WIDTH<T>);
#pragma GCC unroll 16
          for (int n = 0; n < N_; ++n) acc[k][n][v] = madd(acc[k][n][v], x, d[n]);
        }
      }
#pragma GCC unroll 16
    for (int k = 0; k < K_; ++k) from[k] += wide_image;
    narrow += narrow_image;
  }
#pragma GCC unroll 16
  for (int k = 0; k < K_; ++k)
#pragma GCC unroll 16
    for (int n = 0; n < N_; ++n)
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) store(sums + (k * N_ + n) * LANES + v * WIDTH<T>, acc[k][n][v]);
}

// Taps of a tile of one channel: it has as many accumulators as other tiles.
template <class T>
constexpr int TALL_TAPS = LANE_VECTORS<T> > 4 ? 1 : 3 * TILE_TAPS<T>;

template <class T>
using WgradKernel = void (*)(const T* const*, index_t, const T*, index_t, index_t, index_t, T*);

template <class T>
inline WgradKernel<T> wgrad_micro(index_t taps, index_t channels) {
  constexpr int K = TILE_TAPS<T>, N = TILE_CHANNELS<T>, TALL = TALL_TAPS<T>;
#define COLUMN(k, n) wgrad_kernel<T, (k < K ? k : K), (n < N ? n : N)>
#define ROW(k) {COLUMN(k, 1), COLUMN(k, 2), COLUMN(k, 3), COLUMN(k, 4)}
#define SINGLE(k) wgrad_kernel<T, (k < TALL ? k : TALL), 1>
  static const WgradKernel<T> table[4][4] = {ROW(1), ROW(2), ROW(3), ROW(4)};
  static const WgradKernel<T> single[12] = {SINGLE(1), SINGLE(2), SINGLE(3), SINGLE(4),  SINGLE(5),  SINGLE(6),
                                            SINGLE(7), SINGLE(8), SINGLE(9), SINGLE(10), SINGLE(11), SINGLE(12)};
#undef SINGLE
#undef ROW
#undef COLUMN
  return channels == 1 ? single[taps - 1] : table[taps - 1][channels - 1];
}

// totals[i] = the sum of the LANES lanes at sums + i LANES, for WIDTH sums. Lanes l and l + 8 are added first, then
// those 4 apart, and so on. As in transpose_block(), but halves that meet are added.
template <class T>
inline void add_lanes(const T* sums, T* totals) {
  constexpr int W = WIDTH<T>, V = LANE_VECTORS<T>;
  constexpr auto lanes = std::make_integer_sequence<int, W>();
  vec<T> rows[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) {
    vec<T> part[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) part[v] = load(sums + i * LANES + v * W);
#pragma GCC unroll 4
    for (int half = V / 2; half > 0; half /= 2)
#pragma GCC unroll 4
      for (int v = 0; v < half; ++v) part[v] += part[v + half];
    rows[i] = part[0];
  }
#pragma GCC unroll 4
  for (int half = W / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i)
      rows[i] = zip<T>(rows[i], rows[i + half], lanes) + zip_upper<T>(rows[i], rows[i + half], lanes);
  store(totals, rows[0]);
}

// The part of the bias gradient of some rows.
template <class T>
inline void bias_sums(const ImageShape& shape, const Matrix<T>& dz, const Range& rows, T* to) {
  const index_t pixels = shape.h * shape.w;
  if (!shape.last) {
    for (index_t c = 0; c < shape.c; ++c) {
      LaneSum<T> sum;
      for (index_t i = rows.begin; i < rows.end; ++i)
        for (index_t j = 0; j < pixels; j += WIDTH<T>) sum.add(j, load_n(dz.row(i) + c * pixels + j, pixels - j));
      to[c] = T(sum.total());
    }
    return;
  }
  for (index_t c = 0; c < shape.c; c += WIDTH<T>) {
    const index_t n = shape.c - c;
    vec<T> sum{};
    for (index_t i = rows.begin; i < rows.end; ++i)
      for (index_t j = 0; j < pixels; ++j) sum += load_n(dz.row(i) + j * shape.c + c, n);
    store_n(to + c, sum, n);
  }
}

template <class T>
void conv_wgrad(const Args<T>& args, const Context<T>& ctx, int tid, int nt) {
  using O = op::CONV_WGRAD;
  const Matrix<T>&x = args[O::x], &dz = args[O::dz], &partial = args[O::partial];
  const index_t grains = partial.rows;
  const Range mine(grains, tid, nt);
  if (mine.begin == mine.end) return;
  const bool bias = args[O::bias], accumulate = args[O::accumulate];
  const ConvGeometry given = geometry_of<O>(args), g = given.folds() ? given.folded() : given;
  const GatherPlan p = gather_plan(g);
  const ImageShape x_image = x_shape<O>(args, g), dz_image = out_shape<O>(args, g);
  const ImageShape &wide_shape = g.transposed ? dz_image : x_image, &narrow_shape = g.transposed ? x_image : dz_image;
  const Matrix<T>&wide = g.transposed ? dz : x, &narrow = g.transposed ? x : dz;
  const index_t ld = padded(dz_image.c), element = x_image.c * ld, n_taps = g.taps() * g.wide_channels;
  const index_t block = conv_block(p, g, (x.rows + grains - 1) / grains);
  const index_t narrow_image = p.narrow_plane * g.narrow_channels;
  const WeightSteps steps(g, ld);
  Scratch<T> scratch{ctx.scratch + tid * ctx.scratch_stride};
  T *planes = scratch.zeros(block * p.planes), *narrow_planes = scratch.zeros(block * narrow_image);
  Tap* taps = scratch.taps(n_taps);
  T *line = scratch.line(g), *folded = given.folds() ? scratch.take(g.taps() * element) : nullptr;
  gather_taps(g, p, steps, taps);
  constexpr index_t K = TALL_TAPS<T> > TILE_TAPS<T> ? TALL_TAPS<T> : TILE_TAPS<T>, W = WIDTH<T>;
  constexpr index_t SUMS = (TILE_TAPS<T> * TILE_CHANNELS<T> > K ? TILE_TAPS<T> * TILE_CHANNELS<T> : K) + W - 1;
  alignas(64) T sums[SUMS / W * W * LANES] = {}, totals[SUMS / W * W];
  for (index_t grain = mine.begin; grain < mine.end; ++grain) {
    if (!accumulate) __builtin_memset(partial.row(grain), 0, size_t(given.taps() * element + ld) * sizeof(T));
    T* out = partial.row(grain);
    if (folded) out = static_cast<T*>(__builtin_memset(folded, 0, size_t(g.taps() * element) * sizeof(T)));
    const Range rows(ctx.m, int(grain), int(grains));
    if (bias) bias_sums(dz_image, dz, rows, partial.row(grain) + given.taps() * element);
    for (index_t begin = rows.begin; begin < rows.end; begin += block) {
      const index_t images = rows.end - begin < block ? rows.end - begin : block;
      for (index_t i = 0; i < images; ++i) {
        unpack_wide(g, p, wide_shape.row(static_cast<const T*>(wide.row(begin + i))), line, planes + i * p.planes);
        unpack_narrow(narrow_shape.row(static_cast<const T*>(narrow.row(begin + i))), g.y.narrow, g.x.narrow, p.pitch,
                      p.narrow_plane, line, narrow_planes + i * narrow_image);
      }
      in_even_parts(g.narrow_channels, TILE_CHANNELS<T>, [&](index_t n, index_t width) {
        in_even_parts(n_taps, width == 1 ? TALL_TAPS<T> : TILE_TAPS<T>, [&](index_t k, index_t height) {
          const T* from[K];
          for (index_t r = 0; r < height; ++r) from[r] = planes + taps[k + r].image;
          wgrad_micro<T>(height, width)(from, p.planes, narrow_planes + n * p.narrow_plane, p.narrow_plane,
                                        narrow_image, images, sums);
          for (index_t s = 0; s < height * width; s += W) add_lanes(sums + s * LANES, totals + s);
          for (index_t r = 0; r < height; ++r)
            for (index_t c = 0; c < width; ++c)
              out[taps[k + r].weight + (n + c) * steps.narrow] += totals[r * width + c];
        });
      });
    }
    if (folded)
      for_folded(given, [&](index_t k, index_t at) {
        add_to(partial.row(grain) + k * element, folded + at * element, element);
      });
  }
}
NARROWS_RUN(CONV_WGRAD, conv_wgrad)
template <class T>
Cost cost_of(op::CONV_WGRAD, const Args<T>& args, index_t batch, bool) {
  return conv_cost<op::CONV_WGRAD>(OP_CONV_WGRAD, args, batch, args[op::CONV_WGRAD::partial].rows);
}
