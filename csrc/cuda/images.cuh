// Convolutions and poolings.
//
// Promises: the geometry is GEOMETRY and POOLING of ops.def. Element (ky, kx) of the kernel connects the narrow pixel y
// with the wide pixel stride * y + ky - pad. No patch of an image is ever stored.

#pragma once

#include "updates.cuh"

struct Axis {
  int size, out, kernel, stride, pad, up;
};

struct Geometry {
  Axis y, x;
  int channels, filters, transposed, x_last, out_last;

  // The geometry of an op
  template <class At>
  DEVICE static Geometry of(const Op& op) {
    return {{op[At::h], op[At::out_h], op[At::ky], op[At::sy], op[At::py], op[At::uy]},
            {op[At::w], op[At::out_w], op[At::kx], op[At::sx], op[At::px], op[At::ux]},
            op[At::c],
            op[At::filters],
            op[At::transposed],
            op[At::layout] & 1,
            op[At::layout] & 2};
  }
  DEVICE int at_x(int row, int col, int c) const {
    return x_last ? (row * x.size + col) * channels + c : (c * y.size + row) * x.size + col;
  }
  DEVICE int at_out(int row, int col, int f) const {
    return out_last ? (row * x.out + col) * filters + f : (f * y.out + row) * x.out + col;
  }
  // The pixel of x that kernel element k connects with pixel `out` of the output, along an axis; -1 if it is outside.
  DEVICE int joined(const Axis& a, int out, int k) const {
    if (transposed) return quotient(out + a.pad - k, a.stride, a.size);
    const int at = out * a.stride + k - a.pad;
    return at >= 0 && at < a.size * a.up ? copied(at, a.up) : -1;
  }
  // The pixel of the output that kernel element k connects with copy `copy` of pixel `at` of x.
  DEVICE int joined_out(const Axis& a, int at, int copy, int k) const {
    if (!transposed) return quotient(at * a.up + copy + a.pad - k, a.stride, a.out);
    const int out = at * a.stride + k - a.pad;
    return out >= 0 && out < a.out ? out : -1;
  }
  // far / stride if it is a whole number below `end`, else -1. Strides of one and two need no division.
  DEVICE static int quotient(int far, int stride, int end) {
    if (far < 0) return -1;
    int at = far;
    if (stride == 2) {
      if (far & 1) return -1;
      at = far >> 1;
    } else if (stride != 1) {
      at = far / stride;
      if (at * stride != far) return -1;
    }
    return at < end ? at : -1;
  }
  DEVICE static int copied(int at, int up) { return up == 1 ? at : up == 2 ? at >> 1 : at / up; }
};

// Row, column and channel of element j of an image.
struct Pixel {
  int row, col, channel;
  DEVICE Pixel(int j, int height, int width, int channels, bool last) {
    const int pixel = last ? j / channels : j % (height * width);
    channel = last ? j % channels : j / (height * width);
    row = pixel / width, col = pixel % width;
  }
};

// --- convolutions as products ----------------------------------------------------------------------------------------
// As a product, a convolution has the pixels of all images as rows and the filters (backwards: channels) as columns.
// The depth is the kernel. A thread has a pixel and EACH columns, so a value that was read once serves many
// multiply-adds. Weights go through shared memory. The sum of an element is one chain in an order of shapes alone.

constexpr int CONV_THREADS = NARROWS_CONV_THREADS, CONV_DEPTH = 128;

// A block's part of a convolution, for `pixels` pixels of an image and `columns` columns.
template <int EACH>
struct Patch {
  static_assert(CONV_THREADS <= CONV_DEPTH, "sums find room where the weights were");
  int first, i, pixel;  // column, row of the batch, pixel of the image
  bool alive;
  real sum[EACH] = {};

  DEVICE Patch(const Op& op, int pixels, int columns) {
    const int strips = (columns + EACH - 1) / EACH, at = block() / strips * CONV_THREADS + thread();
    first = block() % strips * EACH;
    i = at / pixels;
    pixel = at - i * pixels;
    alive = i < op.m;
  }
  // Loads the weights from depth k on into shared memory, as weight(k, column).
  template <class Shared, class Fn>
  DEVICE int load(Shared& weights, int k, int depth, int columns, const Fn& weight) const {
    const int n = depth - k < CONV_DEPTH ? depth - k : CONV_DEPTH;
    sync();
    for (int l = thread(); l < n * EACH; l += CONV_THREADS) {
      const int column = first + l % EACH;
      weights[l] = column < columns ? weight(k + l / EACH, column) : real(0);
    }
    sync();
    return n;
  }
  // Adds n products: the elements of row i of x from j on, `step` apart, times the weights from k on.
  template <class Shared>
  DEVICE void add(const Matrix& x, int j, int step, Shared& weights, int k, int n) {
    UNROLL_BY_8
    for (int l = 0; l < n; ++l) {
      const real value = x(i, j + l * step);
      UNROLL
      for (int e = 0; e < EACH; ++e) sum[e] += value * weights[(k + l) * EACH + e];
    }
  }
  // Calls visit(ky, kx, c, l, n) over the depth in order. A kernel element has `inner` channels. The call covers n
  // channels from c on; their weights start at l of those in shared memory.
  template <class Shared, class Weight, class Visit>
  DEVICE void walk(Shared& weights, const Geometry& g, int inner, int columns, const Weight& weight,
                   const Visit& visit) const {
    const int depth = g.y.kernel * g.x.kernel * inner;
    int ky = 0, kx = 0, c = 0;
    for (int k = 0; k < depth; k += CONV_DEPTH) {
      const int n = load(weights, k, depth, columns, weight);
      for (int l = 0; l < n;) {
        // Up to the end of the kernel element, or of the loaded weights.
        const int run = inner - c < n - l ? inner - c : n - l;
        visit(ky, kx, c, l, run);
        l += run, c += run;
        if (c == inner) {
          c = 0;
          if (++kx == g.x.kernel) kx = 0, ++ky;
        }
      }
    }
  }
  // Leaves the sums in shared memory, where `kept` finds them.
  template <class Shared>
  DEVICE void keep(Shared& shared) const {
    sync();
    UNROLL
    for (int e = 0; e < EACH; ++e) shared[e * CONV_THREADS + thread()] = sum[e];
  }
  template <class Shared>
  DEVICE static real kept(Shared& shared, int e) {
    return shared[e * CONV_THREADS + thread()];
  }
};

// CONVOLVE
template <int EACH, class Shared>
struct Convolved {
  const Op& op;
  const Geometry& g;
  const Patch<EACH>& patch;
  const int row, col;
  Shared& sums;

  template <class Act>
  DEVICE void as() const {
    const Matrix &b = op[op::CONVOLVE::b], &out = op[op::CONVOLVE::out], &pre = op[op::CONVOLVE::pre];
    for (int e = 0; e < EACH && patch.first + e < g.filters; ++e) {
      const int f = patch.first + e, j = g.at_out(row, col, f);
      real z = patch.kept(sums, e);
      if (b) z += b(0, f);
      if (pre) pre(patch.i, j) = z;
      out(patch.i, j) = Act::value(z);
    }
  }
};

template <int EACH>
KERNEL_OF(CONV_THREADS, 4)
convolve(const Op op) {
  using At = op::CONVOLVE;
  SHARED(real, weights, CONV_DEPTH * EACH);
  const Matrix &x = op[At::x], &W = op[At::W];
  const Geometry g = Geometry::of<At>(op);
  Patch<EACH> patch(op, g.y.out * g.x.out, g.filters);
  const int row = patch.pixel / g.x.out, col = patch.pixel % g.x.out;
  const int step = g.x_last ? 1 : g.y.size * g.x.size;
  patch.walk(
      weights, g, g.channels, g.filters, [&](int at, int f) { return W(at, f); },
      [&](int ky, int kx, int c, int l, int run) {
        const int from_row = g.joined(g.y, row, ky), from_col = g.joined(g.x, col, kx);
        if (patch.alive && from_row >= 0 && from_col >= 0)
          patch.add(x, g.at_x(from_row, from_col, c), step, weights, l, run);
      });
  patch.keep(weights);
  if (patch.alive)
    with_activation(op[At::activation], Convolved<EACH, decltype(weights)>{op, g, patch, row, col, weights});
}

// CONV_DGRAD
template <int EACH, class Shared>
struct Descended {
  const Op& op;
  const Geometry& g;
  const Patch<EACH>& patch;
  const int row, col;
  Shared& sums;

  template <class Act>
  DEVICE void as() const {
    using At = op::CONV_DGRAD;
    for (int e = 0; e < EACH && patch.first + e < g.channels; ++e) {
      const int j = g.at_x(row, col, patch.first + e);
      op[At::out](patch.i, j) = patch.kept(sums, e) * Act::slope(op[At::saved](patch.i, j) * real(op[At::scale]));
    }
  }
};

template <int EACH>
KERNEL_OF(CONV_THREADS, 4)
conv_dgrad(const Op op) {
  using At = op::CONV_DGRAD;
  SHARED(real, weights, CONV_DEPTH * EACH);
  const Matrix &dz = op[At::dz], &W = op[At::W];
  const Geometry g = Geometry::of<At>(op);
  Patch<EACH> patch(op, g.y.size * g.x.size, g.channels);
  const int row = patch.pixel / g.x.size, col = patch.pixel % g.x.size;
  const int step = g.out_last ? 1 : g.y.out * g.x.out;
  patch.walk(
      weights, g, g.filters, g.channels,
      [&](int at, int c) { return W(at / g.filters * g.channels + c, at % g.filters); },
      [&](int ky, int kx, int f, int l, int run) {
        // An upsampled pixel has copies.
        for (int copy = 0; copy < g.y.up * g.x.up; ++copy) {
          const int to_row = g.joined_out(g.y, row, copy / g.x.up, ky);
          const int to_col = g.joined_out(g.x, col, copy % g.x.up, kx);
          if (patch.alive && to_row >= 0 && to_col >= 0)
            patch.add(dz, g.at_out(to_row, to_col, f), step, weights, l, run);
        }
      });
  patch.keep(weights);
  if (patch.alive)
    with_activation(op[At::activation], Descended<EACH, decltype(weights)>{op, g, patch, row, col, weights});
}

// Lane l gets the sum over the warp of element l: lanes that are HALF apart exchange half of their elements.
template <int HALF>
DEVICE real scattered_sum(real (&values)[WARP]) {
  const bool upper = thread() & HALF;
  UNROLL
  for (int a = 0; a < HALF; ++a) {
    const real mine = upper ? values[a + HALF] : values[a], others = upper ? values[a] : values[a + HALF];
    values[a] = mine + shuffle_xor(others, HALF);
  }
  if constexpr (HALF > 1)
    return scattered_sum<HALF / 2>(values);
  else
    return values[0];
}

// CONV_WGRAD. A block has WEIGHTS rows by FILTERS columns of the weight, in one grain. Its threads share the pixels.
// The row after the last row of the weight is the bias.
template <int WEIGHTS, int FILTERS>
struct ConvWgrad {
  static constexpr int THREADS = CONV_THREADS, BLOCKS = 4;
  static_assert(WEIGHTS * FILTERS == WARP, "a lane has an element in the end");

  DEVICE static void run(const Op& op, int b) {
    using At = op::CONV_WGRAD;
    SHARED(real, of_warp, CONV_THREADS);
    const Matrix &x = op[At::x], &dz = op[At::dz], &partial = op[At::partial];
    const Geometry g = Geometry::of<At>(op);
    const int weights = g.y.kernel * g.x.kernel * g.channels, rows = weights + op[At::bias];
    const int across = (g.filters + FILTERS - 1) / FILTERS, down = (rows + WEIGHTS - 1) / WEIGHTS;
    const int grain = b / (across * down), weight = b / across % down * WEIGHTS, filter = b % across * FILTERS;
    const int c = weight % g.channels, tap = weight / g.channels;
    const int first = int(int64_t(op.m) * grain / partial.rows), end = int(int64_t(op.m) * (grain + 1) / partial.rows);
    const int pixels = g.y.out * g.x.out;
    real sum[WARP] = {};
    int i = first + thread() / pixels, pixel = thread() % pixels;
    while (i < end) {
      const int row = pixel / g.x.out, col = pixel % g.x.out;
      real d[FILTERS];
      UNROLL
      for (int e = 0; e < FILTERS; ++e) d[e] = filter + e < g.filters ? dz(i, g.at_out(row, col, filter + e)) : real(0);
      int ky = tap / g.x.kernel, kx = tap % g.x.kernel, channel = c;
      int from_row = g.joined(g.y, row, ky), from_col = g.joined(g.x, col, kx);
      UNROLL
      for (int a = 0; a < WEIGHTS; ++a) {
        if (a % 8 == 0) in_turn();
        real value = real(weight + a == weights);
        if (weight + a < weights && from_row >= 0 && from_col >= 0) value = x(i, g.at_x(from_row, from_col, channel));
        UNROLL
        for (int e = 0; e < FILTERS; ++e) sum[a * FILTERS + e] += value * d[e];
        if (++channel < g.channels) continue;
        channel = 0;
        if (++kx == g.x.kernel) kx = 0, from_row = g.joined(g.y, row, ++ky);
        from_col = g.joined(g.x, col, kx);
      }
      pixel += CONV_THREADS;
      while (pixel >= pixels) pixel -= pixels, ++i;
    }
    const int lane = thread() % WARP, w = weight + lane / FILTERS, f = filter + lane % FILTERS;
    of_warp[thread()] = scattered_sum<WARP / 2>(sum);
    sync();
    if (thread() >= WARP || w >= rows || f >= g.filters) return;
    real total = of_warp[lane];
    UNROLL
    for (int l = 1; l < CONV_THREADS / WARP; ++l) total += of_warp[l * WARP + lane];
    real& to = partial(grain, w * op[launch::conv_wgrad::ld] + f);
    to = op[At::accumulate] && w < weights ? to + total : total;
  }
};
template <int WEIGHTS, int FILTERS>
KERNEL_OF(CONV_THREADS, 4)
conv_wgrad(const Op op) {
  ConvWgrad<WEIGHTS, FILTERS>::run(op, block());
}

// --- pooling ---------------------------------------------------------------------------------------------------------
// The input has one channel after the other.

struct Pool {
  int height, width, channels, down, across, last;
  // The geometry of an op
  template <class At>
  DEVICE static Pool of(const Op& op) {
    return {op[At::h], op[At::w], op[At::c], op[At::pool_y], op[At::pool_x], op[At::layout] & 2};
  }
  DEVICE Pixel out(int j) const { return Pixel(j, height / down, width / across, channels, last); }
  DEVICE int at_out(const Pixel& p) const {
    const int w = width / across;
    return last ? (p.row * w + p.col) * channels + p.channel : (p.channel * (height / down) + p.row) * w + p.col;
  }
  // The column of the maximum of a window of x, the first one of several.
  DEVICE int greatest(const Matrix& x, int i, const Pixel& window) const {
    const int first = (window.channel * height + window.row * down) * width + window.col * across;
    int best = first;
    for (int l = 1; l < down * across; ++l) {
      const int j = first + l / across * width + l % across;
      if (x(i, j) > x(i, best)) best = j;
    }
    return best;
  }
};

// MAXPOOL_PICK, and MAXPOOL, whose y is x
KERNEL maxpool_pick(const Op op) {
  using At = op::MAXPOOL_PICK;
  const Matrix &y = op[At::y], &x = op[At::x], &out = op[At::out];
  const Pool pool = Pool::of<At>(op);
  each(out.rows, out.cols, [&](int i, int j) { out(i, j) = y(i, pool.greatest(x, i, pool.out(j))); });
}

// MAXPOOL_DGRAD
template <class Act>
KERNEL maxpool_dgrad(const Op op) {
  using At = op::MAXPOOL_DGRAD;
  const Matrix &dout = op[At::dout], &x = op[At::x], &saved = op[At::saved], &out = op[At::out];
  const Pool pool = Pool::of<At>(op);
  each(out.rows, out.cols, [&](int i, int j) {
    Pixel window(j, pool.height, pool.width, pool.channels, false);
    window.row /= pool.down, window.col /= pool.across;
    const bool chosen = pool.greatest(x, i, window) == j;
    out(i, j) = chosen ? dout(i, pool.at_out(window)) * Act::slope(saved(i, j)) : real(0);
  });
}
