// The operands of a launch, and the step and the data behind them.
//
// Promises: the layouts are LAUNCH_DTYPE, STEP_DTYPE and SOURCE_DTYPE of python/narrows/backends/cuda/table.py; the
// compiler compares the sizes. What changes from step to step is behind `step` and `sources`, so a launch can be
// captured once and replayed.

#pragma once

#include "../plan/ops.h"
#include "launches.h"
#include "simt.h"

#ifdef NARROWS_DOUBLE
typedef double real;
#else
typedef float real;
#endif

// A row-major matrix on the device; absent if `data` is null.
template <class T>
struct MatrixOf {
  T* data;
  int rows, cols, ld, unused;

  DEVICE explicit operator bool() const { return data != nullptr; }
  DEVICE T& operator()(int i, int j) const {
    REQUIRE(data && i >= 0 && i < rows && j >= 0 && j < cols);
    return data[int64_t(i) * ld + j];
  }
};
typedef MatrixOf<real> Matrix;

// The same memory as numbers of another type.
template <class T>
DEVICE MatrixOf<T> as(const Matrix& m) {
  return {reinterpret_cast<T*>(m.data), m.rows, m.cols, m.ld, 0};
}
DEVICE MatrixOf<double> wide(const Matrix& m) { return as<double>(m); }

// Rows to gather: dense, or CSR with increasing columns.
struct Source {
  const real* data;
  const int64_t* indptr;
  const int32_t* indices;
  int64_t rows, stored;
  int cols, csr;

  DEVICE real dense(int64_t row, int j) const {
    REQUIRE(!csr && row >= 0 && row < rows && j >= 0 && j < cols);
    return data[row * cols + j];
  }
  DEVICE int64_t begin(int64_t row) const {
    REQUIRE(csr && row >= 0 && row < rows);
    return indptr[row];
  }
  DEVICE int64_t end(int64_t row) const { return begin(row) + (indptr[row + 1] - indptr[row]); }
  DEVICE int column(int64_t k) const {
    REQUIRE(k >= 0 && k < stored);
    return indices[k];
  }
  DEVICE real value(int64_t k) const {
    REQUIRE(k >= 0 && k < stored);
    return data[k];
  }
};

struct Step {
  uint64_t seed;
  double learning_rate, kl_factor, momentum;  // momentum below zero: the op's own
  double adam_rate, adam_root;                // rate / (1 - beta_1**t), 1 / sqrt(1 - beta_2**t)
  const int64_t* rows;                        // of the batch
  uint32_t step, unused;
};

constexpr int MAX_MATRICES = 12, MAX_INTEGERS = 24, MAX_REALS = 8;

struct Op {
  Matrix slots[MAX_MATRICES];
  int ints[MAX_INTEGERS];
  double floats[MAX_REALS];
  const Step* step;
  const Source* sources;
  int m, learn;  // rows of the batch, and whether the step learns

  DEVICE const Matrix& operator[](Slot at) const { return slots[int(at)]; }
  DEVICE int operator[](Int at) const { return ints[int(at)]; }
  DEVICE double operator[](Float at) const { return floats[int(at)]; }

  DEVICE int64_t row(int i) const {
    REQUIRE(i >= 0 && i < m);
    return step->rows[i];
  }
};

constexpr int MAX_MEMBERS = NARROWS_MAX_MEMBERS;

// Several launches as one. Member i has the blocks from ends[i - 1] to ends[i]. The kernel defines what kinds[i] means.
struct Ops {
  Op members[MAX_MEMBERS];
  int ends[MAX_MEMBERS], kinds[MAX_MEMBERS];
};

static_assert(sizeof(Op) == NARROWS_LAUNCH_SIZE, "LAUNCH_DTYPE has another layout");
static_assert(sizeof(Ops) == NARROWS_GROUP_SIZE, "GROUP_DTYPE has another layout");
static_assert(sizeof(Step) == NARROWS_STEP_SIZE, "STEP_DTYPE has another layout");
static_assert(sizeof(Source) == NARROWS_SOURCE_SIZE, "SOURCE_DTYPE has another layout");

// The derivative of the mean weighted loss by the loss of row i. Gradients of the row are multiplied with it.
template <class Operands>
DEVICE real row_share(const Operands& op, const Matrix& weight, int i) {
  const real share = real(1.0 / op.m);
  return weight ? share * weight(i, 0) : share;
}

// Calls fn(i, j) for this thread's element of a matrix of `rows` x `cols`, in block `b` of the launch.
template <class Fn>
DEVICE void each_of(int b, int rows, int cols, const Fn& fn) {
  const int64_t at = int64_t(b) * threads() + thread();
  const int i = int(at / cols);
  if (i < rows) fn(i, int(at - int64_t(i) * cols));
}
template <class Fn>
DEVICE void each(int rows, int cols, const Fn& fn) {
  each_of(block(), rows, cols, fn);
}

// Calls fn(j) for this thread's columns of the row that the block works on.
template <class Fn>
DEVICE void each_column(int cols, const Fn& fn) {
  for (int j = thread(); j < cols; j += threads()) fn(j);
}
