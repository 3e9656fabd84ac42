// Corruption, dropout, samples.
//
// Promises: philox.h gives each element its random word by row and column, so every backend drops, sets and draws the
// same elements. A thread has one Philox block: four columns of a row.

#pragma once

#include "scalar.h"

// The cells of columns 4 quad to 4 quad + 3 of a row.
DEVICE void draw_cells(const Op& op, int stream, int row, int quad, uint32_t (&cells)[4]) {
  uint32_t x[1][4] = {{uint32_t(quad), uint32_t(row), op.step->step, uint32_t(stream)}};
  philox4x32(x, op.step->seed);
  for (int w = 0; w < 4; ++w) cells[w] = philox_cell(x[0][w]);
}

// Calls fn(i, j, cell) for this thread's elements.
template <class Fn>
DEVICE void each_cell(const Op& op, int rows, int cols, int stream, const Fn& fn) {
  each(rows, (cols + 3) / 4, [&](int i, int quad) {
    uint32_t cells[4];
    draw_cells(op, stream, i, quad, cells);
    for (int w = 0; w < 4; ++w)
      if (4 * quad + w < cols) fn(i, 4 * quad + w, cells[w]);
  });
}

// The standard normal number of a cell. All steps are exact: q = u - 1/2 and its distance to the end of the interval
// are odd multiples of 2**-25.
DEVICE real normal_of(uint32_t cell) {
  const real unit = real(2.98023223876953125e-08);  // 2**-25
  const real odd = real(2 * int(cell) - (1 << 24) + 1);
  return normal_quantile(odd * unit, (real(1 << 24) - abs_(odd)) * unit);
}

KERNEL corrupt_gaussian(const Op op) {
  using At = op::CORRUPT;
  const Matrix& x = op[At::x];
  each_cell(op, x.rows, x.cols, op[At::stream],
            [&](int i, int j, uint32_t cell) { x(i, j) += real(op[At::level]) * normal_of(cell); });
}

KERNEL corrupt_masking(const Op op) {
  using At = op::CORRUPT;
  const Matrix& x = op[At::x];
  const uint32_t drop = philox_threshold(op[At::level]);
  each_cell(op, x.rows, x.cols, op[At::stream], [&](int i, int j, uint32_t cell) {
    if (cell < drop) x(i, j) = 0;
  });
}

KERNEL corrupt_salt_and_pepper(const Op op) {
  using At = op::CORRUPT;
  const Matrix& x = op[At::x];
  const uint32_t any = philox_threshold(op[At::level]), pepper = philox_threshold(op[At::level] / 2);
  each_cell(op, x.rows, x.cols, op[At::stream], [&](int i, int j, uint32_t cell) {
    if (cell < any) x(i, j) = real(cell < pepper ? op[At::low] : op[At::high]);
  });
}

KERNEL dropout(const Op op) {
  using At = op::DROPOUT;
  const Matrix& x = op[At::x];
  const uint32_t drop = philox_threshold(op[At::rate]);
  const real scale = real(1 / (1 - op[At::rate]));
  each_cell(op, x.rows, x.cols, op[At::stream],
            [&](int i, int j, uint32_t cell) { x(i, j) = cell < drop ? real(0) : x(i, j) * scale; });
}

// PROBE
KERNEL probe_signs(const Op op) {
  using At = op::PROBE;
  const Matrix& out = op[At::out];
  const uint32_t half = philox_threshold(0.5);
  each_cell(op, out.rows, out.cols, op[At::stream],
            [&](int i, int j, uint32_t cell) { out(i, j) = real(cell < half ? -1 : 1); });
}

// SAMPLE
KERNEL sample(const Op op) {
  using At = op::SAMPLE;
  const Matrix &stats = op[At::stats], &z = op[At::z], &noise = op[At::noise];
  each_cell(op, z.rows, z.cols, op[At::stream], [&](int i, int j, uint32_t cell) {
    const real mean = stats(i, j);
    z(i, j) = mean;
    if (!op.learn) return;
    noise(i, j) = exp_(stats(i, z.cols + j) / real(2)) * normal_of(cell);
    z(i, j) = mean + noise(i, j);
  });
}

// DRAW. The uniform number is compared with the mean without rounding.
KERNEL draw_binary(const Op op) {
  using At = op::DRAW;
  const Matrix &mean = op[At::mean], &out = op[At::out];
  each_cell(op, out.rows, out.cols, op[At::stream], [&](int i, int j, uint32_t cell) {
    out(i, j) = cell < philox_threshold(double(mean(i, j))) ? real(1) : real(0);
  });
}

KERNEL draw_normal(const Op op) {
  using At = op::DRAW;
  const Matrix &mean = op[At::mean], &out = op[At::out];
  each_cell(op, out.rows, out.cols, op[At::stream],
            [&](int i, int j, uint32_t cell) { out(i, j) = mean(i, j) + normal_of(cell); });
}
