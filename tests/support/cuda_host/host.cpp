// All instances of the kernels as functions of the host, in the order of the table.

#include "../../../csrc/cuda/narrows.cu"

namespace {

// Calls a kernel with its one structure.
template <class Operands>
void hand_over(void (*kernel)(const Operands), const void* operands) {
  kernel(*static_cast<const Operands*>(operands));
}
template <auto kernel>
void call(const void* operands) {
  hand_over(kernel, operands);
}

void (*const KERNELS[])(const void*) = {
#include NARROWS_KERNELS
};

}  // namespace

struct Planned {
  int32_t kernel, blocks, threads, unused;
  const void* operands;
};

// Runs launches one after the other. Returns -1, or the number of the launch that failed, with its message in `error`.
extern "C" __attribute__((visibility("default"))) int run(const Planned* planned, int n, int reversed, char* error,
                                                          int size) {
  simt::Machine& m = simt::Machine::get();
  for (int i = 0; i < n; ++i) {
    m.launch(planned[i].blocks, planned[i].threads, reversed, KERNELS[planned[i].kernel], planned[i].operands);
    if (m.error.empty()) continue;
    std::strncpy(error, m.error.c_str(), size_t(size) - 1);
    return i;
  }
  return -1;
}
