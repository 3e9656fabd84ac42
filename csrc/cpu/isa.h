// Which instruction sets were built, which this CPU has, and which one runs.

#pragma once

#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace narrows {

// Compiled without any instruction set's flags, so that asking is safe on every CPU.
bool cpu_has_baseline();
bool cpu_has_avx2();
bool cpu_has_avx512();
bool cpu_has_avx512bf16();

extern const Isa isa_baseline, isa_avx2, isa_avx512, isa_avx512bf16;

// Every table built into this library, best first.
const std::vector<const Isa*>& isa_tables();

// The table named `name`, or the best that this CPU supports if it is empty. Throws std::invalid_argument for an
// unknown name and std::runtime_error for one that this CPU cannot run.
const Isa& isa_select(const std::string& name);

}  // namespace narrows
