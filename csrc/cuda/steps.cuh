// The beginning and the end of a step, and several launches as one.
//
// Promises: the first launch of a step reads the number of steps begun, and the last launch increases it. So both can
// do other work, too. The record of a step does not change from its second launch on.

#pragma once

#include "updates.cuh"

// --- steps -----------------------------------------------------------------------------------------------------------
// See `step` in launches.def. A record takes as many elements of `real` as it needs.

DEVICE int& steps_begun(const Matrix& count) { return *reinterpret_cast<int*>(&count(0, 0)); }

// The record of the step that begins.
DEVICE const Step* next_record(const Matrix& records, const Matrix& count) {
  REQUIRE(records.cols * sizeof(real) == sizeof(Step));
  return reinterpret_cast<const Step*>(&records(steps_begun(count), 0));
}

// Copies the record to where the other launches of the step read it, and sets the terms to zero. For one block.
DEVICE void begin_terms(const Matrix& records, const Matrix& count, const Matrix& terms, const Step* step) {
  const int at = steps_begun(count);
  real* current = reinterpret_cast<real*>(const_cast<Step*>(step));
  each_column(records.cols, [&](int w) { current[w] = records(at, w); });
  each_column(terms.cols, [&](int j) { terms(0, j) = 0; });
}

KERNEL begin_step(const Op op) {
  using At = launch::step;
  begin_terms(op[At::records], op[At::begun], op[At::terms], op.step);
}

// For one block.
DEVICE void end_terms(const Op& op) {
  using At = launch::step;
  const Matrix &count = op[At::begun], &terms = op[At::terms], &kept = op[At::kept];
  const int at = steps_begun(count);
  each_column(terms.cols, [&](int j) { kept(at, j) = terms(0, j); });
  sync();
  if (thread() == 0) steps_begun(count) = at + 1;
}

KERNEL end_step(const Op op) { end_terms(op); }

// --- several launches as one -----------------------------------------------------------------------------------------

struct Nothing : Whole {
  DEVICE static void run(const Op&, int) {}
};

// Members of Body that share no memory. Each has as many blocks as it would have alone (kind 0). One more block may end
// the step: it runs REDUCE (kind 1) and end_step (kind 2), one after the other.
template <class Body>
KERNEL_OF(Body::THREADS, Body::BLOCKS)
group(const GRID_CONSTANT Ops ops) {
  int i = 0, first = 0;
  while (block() >= ops.ends[i]) first = ops.ends[i++];
  if (ops.kinds[i] == 0) {
    Body::run(ops.members[i], block() - first);
    return;
  }
  for (; i < MAX_MEMBERS && ops.kinds[i]; ++i) {
    if (ops.kinds[i] == 1)
      reduce_term(ops.members[i]);
    else
      end_terms(ops.members[i]);
    sync();
  }
}
