// Launches around a product by cuBLAS: they round the factors before it, and run the epilogue after it.

#pragma once

#include "gemm.cuh"

// The epilogue of a finished product. The product may lie where the epilogue stores its result, because one thread has
// both.
template <class Epilogue>
KERNEL finish(const Op op) {
  using At = launch::finish;
  const Matrix& product = op[At::product];
  each(op[At::rows], op[At::cols], [&](int i, int j) { Epilogue::apply(op, i, j, product(i, j)); });
}

// The same for a weight's gradient, with the gradient of the bias, by blocks of 256 threads. Each of the first blocks
// sums 32 columns of dz.
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

// Rounds two matrices. Two rounded numbers take the room of one number; odd rows end with a zero.
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
