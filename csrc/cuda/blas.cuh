// What a product by cuBLAS leaves to do: factors rounded before, the epilogue behind.

#pragma once

#include "gemm.cuh"

// The epilogue of a product that is there: product, -, and the slots of the epilogue; ints: rows and columns, and what
// gemm has. It may lie where the epilogue leaves its result: an element is one thread's.
template <class Epilogue>
KERNEL finish(const Op op) {
  using At = launch::finish;
  const Matrix& product = op[At::product];
  each(op[At::rows], op[At::cols], [&](int i, int j) { Epilogue::apply(op, i, j, product(i, j)); });
}

// The same of a weight's gradient, and the gradient of the bias besides, by blocks of 256 threads: product, dz, and the
// slots of WithBias; ints[0] is one more than the product has rows. The first blocks have 32 columns of dz each.
template <class To>
KERNEL finish_with_bias(const Op op) {
  using At = launch::finish_with_bias;
  const Matrix &product = op[At::product], &dz = op[At::dz];
  const int rows = op[At::rows], cols = op[At::cols], strips = (cols + WARP - 1) / WARP;
  if (block() < strips) {
    column_sums(
        0, dz.rows, block() * WARP, cols, [&](int i, int j) { return dz(i, j); },
        [&](int j, real sum) { WithBias<To>::apply(op, rows, j, sum); });
    return;
  }
  const int64_t at = int64_t(block() - strips) * threads() + thread();
  const int i = int(at / cols), j = int(at - int64_t(i) * cols);
  if (i < rows) WithBias<To>::apply(op, i, j, product(i, j));
}

// Two matrices in bfloat16: x, x rounded, y, y rounded. Two rounded numbers take the room of one as it was; odd rows
// end with a zero.
KERNEL to_bfloat16(const Op op) {
  using At = launch::to_bfloat16;
  const int first = op[At::left_rounded].rows * op[At::left_rounded].cols;
  each(1, first + op[At::right_rounded].rows * op[At::right_rounded].cols, [&](int, int at) {
    const Matrix &x = op[at < first ? At::left : At::right],
                 &to = op[at < first ? At::left_rounded : At::right_rounded];
    if (at >= first) at -= first;
    const int i = at / to.cols, j = at % to.cols;
    const uint32_t low = 2 * j < x.cols ? bfloat16_bits(float(x(i, 2 * j))) >> 16 : 0;
    const uint32_t high = 2 * j + 1 < x.cols ? bfloat16_bits(float(x(i, 2 * j + 1))) : 0;
    reinterpret_cast<uint32_t&>(to(i, j)) = high | low;
  });
}
