// Convolutions and poolings, as sums over what an element is joined to.
//
// Promises: names are those of plan.GEOMETRY, whose numbers are ints 4 to 19; an element (ky, kx) of the kernel joins
// the narrow pixel y to the wide pixel stride * y + ky - pad. A thread has an element of the result.

#pragma once

#include "scalar.h"

struct Axis {
  int size, out, kernel, stride, pad, up;
};

struct Geometry {
  Axis y, x;
  int channels, filters, transposed, x_last, out_last;

  DEVICE explicit Geometry(const int* v)
      : y{v[0], v[3], v[6], v[8], v[10], v[12]},
        x{v[1], v[4], v[7], v[9], v[11], v[13]},
        channels(v[2]),
        filters(v[5]),
        transposed(v[14]),
        x_last(v[15] & 1),
        out_last(v[15] & 2) {}
  DEVICE int at_x(int row, int col, int c) const {
    return x_last ? (row * x.size + col) * channels + c : (c * y.size + row) * x.size + col;
  }
  DEVICE int at_out(int row, int col, int f) const {
    return out_last ? (row * x.out + col) * filters + f : (f * y.out + row) * x.out + col;
  }
  // The pixel of x that an element of the kernel joins to one of the output, along an axis; -1 outside.
  DEVICE int joined(const Axis& a, int out, int k) const {
    if (transposed) {
      const int far = out + a.pad - k;
      return far >= 0 && far % a.stride == 0 && far / a.stride < a.size ? far / a.stride : -1;
    }
    const int at = out * a.stride + k - a.pad;
    return at >= 0 && at < a.size * a.up ? at / a.up : -1;
  }
  // The pixel of the output that it joins to copy `copy` of a pixel of x.
  DEVICE int joined_out(const Axis& a, int at, int copy, int k) const {
    if (transposed) {
      const int out = at * a.stride + k - a.pad;
      return out >= 0 && out < a.out ? out : -1;
    }
    const int far = at * a.up + copy + a.pad - k;
    return far >= 0 && far % a.stride == 0 && far / a.stride < a.out ? far / a.stride : -1;
  }
};

// Where a column of a row of images lies: row and column of the pixel, and channel.
struct Pixel {
  int row, col, channel;
  DEVICE Pixel(int j, int height, int width, int channels, bool last) {
    const int pixel = last ? j / channels : j % (height * width);
    channel = last ? j % channels : j / (height * width);
    row = pixel / width, col = pixel % width;
  }
};

// CONVOLVE: x, W, b, out, pre
template <class Act>
KERNEL convolve(const Op op) {
  const Matrix &x = op.slots[0], &W = op.slots[1], &b = op.slots[2], &out = op.slots[3], &pre = op.slots[4];
  const Geometry g(op.ints + 4);
  each(out.rows, out.cols, [&](int i, int j) {
    const Pixel p(j, g.y.out, g.x.out, g.filters, g.out_last);
    real z = 0;
    for (int ky = 0; ky < g.y.kernel; ++ky) {
      const int row = g.joined(g.y, p.row, ky);
      for (int kx = 0; row >= 0 && kx < g.x.kernel; ++kx) {
        const int col = g.joined(g.x, p.col, kx);
        for (int c = 0; col >= 0 && c < g.channels; ++c)
          z += x(i, g.at_x(row, col, c)) * W((ky * g.x.kernel + kx) * g.channels + c, p.channel);
      }
    }
    if (b) z += b(0, p.channel);
    if (pre) pre(i, j) = z;
    out(i, j) = Act::value(z);
  });
}

// CONV_DGRAD: dz, W, saved, out; floats: scale
template <class Act>
KERNEL conv_dgrad(const Op op) {
  const Matrix &dz = op.slots[0], &W = op.slots[1], &saved = op.slots[2], &out = op.slots[3];
  const Geometry g(op.ints + 4);
  each(out.rows, out.cols, [&](int i, int j) {
    const Pixel p(j, g.y.size, g.x.size, g.channels, g.x_last);
    real d = 0;
    for (int ky = 0; ky < g.y.kernel * g.y.up; ++ky) {
      const int row = g.joined_out(g.y, p.row, ky % g.y.up, ky / g.y.up);
      for (int kx = 0; row >= 0 && kx < g.x.kernel * g.x.up; ++kx) {
        const int col = g.joined_out(g.x, p.col, kx % g.x.up, kx / g.x.up);
        const int weight = (ky / g.y.up * g.x.kernel + kx / g.x.up) * g.channels + p.channel;
        for (int f = 0; col >= 0 && f < g.filters; ++f) d += dz(i, g.at_out(row, col, f)) * W(weight, f);
      }
    }
    out(i, j) = d * Act::slope(saved(i, j) * real(op.floats[0]));
  });
}

// CONV_WGRAD: x, dz, partial; ints: bias, accumulate, elements from one row of the weight to the next in `partial`. A
// warp has an element of a grain's partial sums, and its lanes share the rows and pixels.
KERNEL conv_wgrad(const Op op) {
  const Matrix &x = op.slots[0], &dz = op.slots[1], &partial = op.slots[2];
  const Geometry g(op.ints + 4);
  const int weights = g.y.kernel * g.x.kernel * g.channels, elements = (weights + op.ints[0]) * g.filters;
  const int at = block() * (threads() / WARP) + thread() / WARP, lane = thread() % WARP;
  const int grain = at / elements, element = at % elements, weight = element / g.filters, f = element % g.filters;
  const int c = weight % g.channels, kx = weight / g.channels % g.x.kernel, ky = weight / g.channels / g.x.kernel;
  real sum = 0;
  if (grain < partial.rows) {
    const int first = int(int64_t(op.m) * grain / partial.rows), end = int(int64_t(op.m) * (grain + 1) / partial.rows);
    const int pixels = g.y.out * g.x.out;
    for (int l = lane; l < (end - first) * pixels; l += WARP) {
      const int i = first + l / pixels, row = l % pixels / g.x.out, col = l % pixels % g.x.out;
      const real d = dz(i, g.at_out(row, col, f));
      if (weight == weights) {
        sum += d;
        continue;
      }
      const int from_row = g.joined(g.y, row, ky), from_col = g.joined(g.x, col, kx);
      if (from_row >= 0 && from_col >= 0) sum += x(i, g.at_x(from_row, from_col, c)) * d;
    }
  }
  sum = warp_sum(sum);
  if (lane || grain >= partial.rows) return;
  real& to = partial(grain, weight * op.ints[2] + f);
  to = op.ints[1] && weight < weights ? to + sum : sum;
}

// --- pooling ---------------------------------------------------------------------------------------------------------
// ints from 4 on: plan.POOLING. The input has one channel after the other.

struct Pool {
  int height, width, channels, down, across, last;
  DEVICE explicit Pool(const int* v)
      : height(v[0]), width(v[1]), channels(v[2]), down(v[3]), across(v[4]), last(v[5] & 2) {}
  DEVICE Pixel out(int j) const { return Pixel(j, height / down, width / across, channels, last); }
  DEVICE int at_out(const Pixel& p) const {
    const int w = width / across;
    return last ? (p.row * w + p.col) * channels + p.channel : (p.channel * (height / down) + p.row) * w + p.col;
  }
  // The column of x with the greatest of a window, the first one if there are several.
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

// MAXPOOL_PICK and, of x itself, MAXPOOL: y, x, out
KERNEL maxpool_pick(const Op op) {
  const Matrix &y = op.slots[0], &x = op.slots[1], &out = op.slots[2];
  const Pool pool(op.ints + 4);
  each(out.rows, out.cols, [&](int i, int j) { out(i, j) = y(i, pool.greatest(x, i, pool.out(j))); });
}

// MAXPOOL_DGRAD: dout, x, saved, out
template <class Act>
KERNEL maxpool_dgrad(const Op op) {
  const Matrix &dout = op.slots[0], &x = op.slots[1], &saved = op.slots[2], &out = op.slots[3];
  const Pool pool(op.ints + 4);
  each(out.rows, out.cols, [&](int i, int j) {
    Pixel window(j, pool.height, pool.width, pool.channels, false);
    window.row /= pool.down, window.col /= pool.across;
    const bool chosen = pool.greatest(x, i, window) == j;
    out(i, j) = chosen ? dout(i, pool.at_out(window)) * Act::slope(saved(i, j)) : real(0);
  });
}
