#include "plan/geometry.h"

#include <algorithm>

namespace narrows {

namespace {

index_t up(index_t n, index_t to) { return (n + to - 1) / to * to; }

// Distance from row to row, if `data` elements have `before` zeros before them and `after` behind: those of one row
// serve the next as well.
index_t shared_pitch(index_t data, index_t before, index_t after) { return data + std::max(before, after); }

}  // namespace

ConvGeometry conv_geometry(const int32_t* attributes) {
  using O = op::CONVOLVE;
  const auto at = [&](Int i) { return index_t(attributes[int(i) - int(O::h)]); };
  ConvGeometry g;
  g.transposed = at(O::transposed);
  g.up_y = at(O::uy), g.up_x = at(O::ux);
  const index_t in_y = at(O::h) * g.up_y, in_x = at(O::w) * g.up_x, out_y = at(O::out_h), out_x = at(O::out_w);
  g.y = {g.transposed ? out_y : in_y, g.transposed ? in_y : out_y, at(O::ky), at(O::sy), at(O::py)};
  g.x = {g.transposed ? out_x : in_x, g.transposed ? in_x : out_x, at(O::kx), at(O::sx), at(O::px)};
  g.wide_channels = at(g.transposed ? O::filters : O::c);
  g.narrow_channels = at(g.transposed ? O::c : O::filters);
  g.x_last = at(O::layout) & 1, g.out_last = at(O::layout) & 2;
  return g;
}

index_t ConvGeometry::taps() const { return y.kernel * x.kernel; }

bool ConvGeometry::folds() const { return up_y * up_x > 1 && y.stride == 1 && x.stride == 1; }

ConvGeometry ConvGeometry::folded() const {
  ConvGeometry g = *this;
  // A pixel d of the repetitions of pixel n is read by the output up n + d - k + pad.
  g.y = {y.narrow, y.wide / up_y, y.kernel + up_y - 1, up_y, y.kernel - 1 - y.pad};
  g.x = {x.narrow, x.wide / up_x, x.kernel + up_x - 1, up_x, x.kernel - 1 - x.pad};
  g.wide_channels = narrow_channels, g.narrow_channels = wide_channels;
  g.up_y = g.up_x = 1;
  g.transposed = true;
  return g;
}

GatherPlan gather_plan(const ConvGeometry& g) {
  GatherPlan p;
  const index_t reach_y = (g.y.narrow - 1) * g.y.stride + g.y.kernel;
  const index_t reach_x = (g.x.narrow - 1) * g.x.stride + g.x.kernel;
  p.phases = g.y.stride * g.x.stride;
  p.rows = (reach_y + g.y.stride - 1) / g.y.stride;
  p.columns = std::max<index_t>(0, std::min(g.x.wide, reach_x - g.x.pad));
  if (g.x.stride == 1)
    p.pitch = shared_pitch(p.columns, g.x.pad, reach_x - g.x.pad - p.columns);
  else
    p.pitch = (reach_x + g.x.stride - 1) / g.x.stride;
  p.plane = p.rows * p.pitch;
  // Zeros, as far as the last row's windows and a tile reach.
  p.planes = up(p.plane * p.phases * g.wide_channels + g.x.kernel + CONV_SLACK, LANES);
  p.span = (g.y.narrow - 1) * p.pitch + g.x.narrow;
  p.narrow_plane = up(p.span, LANES);
  return p;
}

ScatterPlan scatter_plan(const ConvGeometry& g) {
  ScatterPlan p;
  p.phases = g.y.stride * g.x.stride;
  p.before_y = (g.y.kernel - 1) / g.y.stride, p.before_x = (g.x.kernel - 1) / g.x.stride;
  p.steps_y = (g.y.wide - 1 + g.y.pad) / g.y.stride + 1, p.steps_x = (g.x.wide - 1 + g.x.pad) / g.x.stride + 1;
  p.rows = p.before_y + p.steps_y;
  p.columns = std::min(g.x.narrow, p.steps_x);
  p.pitch = shared_pitch(p.columns, p.before_x, p.steps_x - p.columns);
  p.plane = p.rows * p.pitch;
  p.planes = up(p.plane * g.narrow_channels + p.before_x + g.x.kernel + CONV_SLACK, LANES);
  p.span = (p.steps_y - 1) * p.pitch + p.steps_x;
  return p;
}

index_t conv_block(const GatherPlan& p, const ConvGeometry& g, index_t rows) {
  const index_t image = p.planes + p.narrow_plane * g.narrow_channels;
  return std::max<index_t>(1, std::min(rows, CONV_BLOCK / image));
}

index_t conv_scratch(int code, const ConvGeometry& g, index_t batch, index_t grains, index_t size) {
  if (g.folds()) {
    const index_t channels = g.wide_channels * padded(g.narrow_channels);
    return conv_scratch(code, g.folded(), batch, grains, size) + g.folded().taps() * channels;
  }
  const auto table = [&](index_t entries) { return up(entries * 2 * index_t(sizeof(int64_t)) / size + 1, LANES); };
  const index_t line = up(std::max(g.x.wide, g.x.narrow) + CONV_SLACK, LANES);
  const bool gathers = (code == OP_CONVOLVE) != g.transposed;
  if (code != OP_CONV_WGRAD && gathers) {
    const GatherPlan p = gather_plan(g);
    return p.planes + table(g.taps() * g.wide_channels) + 2 * line + CONV_CHANNELS * up(p.span + CONV_SLACK, LANES);
  }
  if (code != OP_CONV_WGRAD) {
    const ScatterPlan p = scatter_plan(g);
    return p.planes + table(g.taps() * g.narrow_channels) + 2 * line +
           CONV_CHANNELS * p.phases * up(p.span + CONV_SLACK, LANES);
  }
  const GatherPlan p = gather_plan(g);
  const index_t images = conv_block(p, g, (batch + grains - 1) / grains);
  return images * (p.planes + p.narrow_plane * g.narrow_channels) + table(g.taps() * g.wide_channels) + 2 * line;
}

}  // namespace narrows
