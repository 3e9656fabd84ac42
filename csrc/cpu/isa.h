// Which instruction sets were built, which this CPU has, and which one runs.

#pragma once

#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace narrows {

struct Isa {
  const char* name;
  bool (*supported)();
  const Kernels<float>& (*f32)();
  const Kernels<double>& (*f64)();
  PairProduct (*own_pairs)() = nullptr;    // products in bfloat16 of its own; null: those of its kernels
  const char* bfloat16 = "multiply-adds";  // what makes them

  template <class T>
  const Kernels<T>& kernels() const {
    if constexpr (sizeof(T) == 4)
      return f32();
    else
      return f64();
  }
  PairProduct pairs() const { return own_pairs ? own_pairs() : f32().bfloat16; }
};

// The tables, each compiled with its instruction set's flags.
#define NARROWS_TABLE(isa)                \
  namespace isa {                         \
  template <class T>                      \
  const Kernels<T>& table();              \
  template <>                             \
  const Kernels<float>& table<float>();   \
  template <>                             \
  const Kernels<double>& table<double>(); \
  }
NARROWS_TABLE(baseline)
NARROWS_TABLE(avx2)
NARROWS_TABLE(avx512)
#undef NARROWS_TABLE
namespace avx512bf16 {
PairProduct pair_product();
}
namespace amx {
PairProduct pair_product();
}
namespace amx_model {
PairProduct pair_product();
}

// Whether this CPU has AMX, but the operating system refuses its registers.
bool tiles_refused();

// Every table built into this library, best first.
const std::vector<const Isa*>& isa_tables();

// The table named `name`, or the best that this CPU supports if it is empty. Throws std::invalid_argument for an
// unknown name and std::runtime_error for one that this CPU cannot run.
const Isa& isa_select(const std::string& name);

// The table that the environment variable NARROWS_ISA names, which is read once. Throws as isa_select().
const Isa& chosen_isa();

}  // namespace narrows
