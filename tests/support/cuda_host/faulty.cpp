// Kernels with one fault each, which the checks of simt_host.h must find.

#include "../../../csrc/cuda/op.h"

namespace {

const Matrix& out_of(const Op& op) { return op[launch::fill::out]; }

// Reads a column that the matrix does not have.
void strays(const Op& op) { out_of(op)(0, thread()) = out_of(op)(0, out_of(op).cols); }

// Half of the threads leave before a barrier.
void leaves(const Op&) {
  if (thread() < threads() / 2) sync();
}

// Some lanes of a warp skip a shuffle.
void skips(const Op&) {
  if (thread() % 2) shuffle_xor(1, 1);
}

// Reads what another thread writes, without a barrier.
void races(const Op& op) {
  SHARED(real, value, 64);
  value[thread()] = real(thread());
  out_of(op)(0, thread()) = value[threads() - 1 - thread()];
}

// The same with a barrier.
void meets(const Op& op) {
  SHARED(real, value, 64);
  value[thread()] = real(thread());
  sync();
  out_of(op)(0, thread()) = value[threads() - 1 - thread()];
}

// Reads shared memory that nobody has written.
void forgets(const Op& op) {
  SHARED(real, value, 64);
  out_of(op)(0, thread()) = value[thread()];
}

// Reads beyond a shared array.
void overruns(const Op& op) {
  SHARED(real, value, 32);
  value[thread()] = 0;
  out_of(op)(0, thread()) = value[thread()];
}

void (*const KERNELS[])(const Op&) = {strays, leaves, skips, races, meets, forgets, overruns};

}  // namespace

extern "C" __attribute__((visibility("default"))) int run(int kernel, int threads, const Op* op, int reversed,
                                                          char* error, int size) {
  simt::Machine& m = simt::Machine::get();
  static int chosen;
  chosen = kernel;
  const auto body = [](const void* operands) { KERNELS[chosen](*static_cast<const Op*>(operands)); };
  m.launch(1, threads, reversed, body, op);
  std::strncpy(error, m.error.c_str(), size_t(size) - 1);
  return m.error.empty() ? 0 : 1;
}
