// How convolutions lie in a thread's scratch memory: sizes of planes, tables and buffers, from shapes alone.
//
// Promises: a plan that passes validate() has a ConvPlan whose sizes are positive and below 2**62.
// Never: holds a pointer; is compiled with an instruction set's flags (its functions live in geometry.cpp).
//
// A convolution and its adjoint relate a wide image to a narrow one. Element (ky, kx) of the kernel joins the narrow
// pixel y to the wide pixel stride * y + ky - pad. A convolution reads the wide image and writes the narrow one. A
// transposed convolution does the opposite. Images are unpacked into planes, one for each channel, with zeros around
// them. Then a kernel element reads one run of memory, at its own offset, for all output pixels. The planes that are
// read and written have the same pitch. Pixels between the end of a row and the next row are computed and not used. A
// wide image with strides has a plane for each phase (row and column modulo the stride) of each channel.

#pragma once

#include "plan/plan.h"

namespace narrows {

// Along one axis: pixels, kernel, stride, padding before the first.
struct ConvAxis {
  index_t wide, narrow, kernel, stride, pad;
};

struct ConvGeometry {
  ConvAxis y, x;
  index_t wide_channels, narrow_channels;
  index_t up_y, up_x;  // the wide image is one of wide / up pixels, each repeated
  bool transposed, x_last, out_last;

  index_t taps() const;
  // True if repeating pixels and convolving them is done in one. It is a transposed convolution, whose stride is the
  // number of repetitions and whose kernel has sums of elements. An output has fewer terms then.
  bool folds() const;
  ConvGeometry folded() const;
};

// From the attributes of an op, which begin with `h`.
ConvGeometry conv_geometry(const int32_t* attributes);

// The planes for a product from wide to narrow, and for the gradient of the weight.
struct GatherPlan {
  index_t phases;         // planes of a channel
  index_t rows, pitch;    // of a plane
  index_t columns;        // of the wide image that are read
  index_t plane, planes;  // elements of one plane, and of all planes and the slack behind them
  index_t span;           // from the first narrow pixel to the last one
  index_t narrow_plane;   // elements of a plane of the narrow image: whole groups of LANES
};

// From narrow to wide, phase by phase.
struct ScatterPlan {
  index_t phases;
  index_t before_y, before_x;  // rows and columns of zeros
  index_t steps_y, steps_x;    // stride * step + phase - pad runs over the wide pixels
  index_t rows, pitch, columns, plane, planes;
  index_t span;
};

GatherPlan gather_plan(const ConvGeometry& g);
ScatterPlan scatter_plan(const ConvGeometry& g);

constexpr index_t CONV_CHANNELS = 6;     // output channels that are computed together, at most
constexpr index_t CONV_BLOCK = 1 << 17;  // elements of the images whose weight gradient is summed together
constexpr index_t CONV_SLACK = 64;       // elements behind a plane's last pixel that a tile may read

// Images of a block of the weight's gradient; the same for every team.
index_t conv_block(const GatherPlan& p, const ConvGeometry& g, index_t rows);

// Elements of scratch memory of a thread, for elements of `size` bytes.
index_t conv_scratch(int code, const ConvGeometry& g, index_t batch, index_t grains, index_t size);

}  // namespace narrows
