// Checks of results.
//
// Promises: a number is finite if it is neither NaN nor infinite, however large.

#pragma once

#include "op.h"

// x is one row. Each block has an element of `found`.
KERNEL not_finite(const Op op) {
  using At = launch::not_finite;
  const Matrix &x = op[At::x], &found = op[At::found];
  real worst = 0;
  for (int j = block() * threads() + thread(); j < x.cols; j += found.cols * threads())
    if (!(x(0, j) - x(0, j) == real(0))) worst = 1;
  worst = block_max(worst);
  if (thread() == 0) found(op[At::row], block()) = worst;
}
