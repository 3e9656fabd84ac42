#include "cpu/isa.h"

#include <stdexcept>

namespace narrows {

bool cpu_has_baseline() { return true; }

#ifdef NARROWS_X86
// __builtin_cpu_supports also asks whether the operating system saves the registers.
bool cpu_has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool cpu_has_avx512() {
  return cpu_has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool cpu_has_avx512bf16() { return cpu_has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

const std::vector<const Isa*>& isa_tables() {
#ifdef NARROWS_X86
  static const std::vector<const Isa*> tables = {&isa_avx512bf16, &isa_avx512, &isa_avx2, &isa_baseline};
#else
  static const std::vector<const Isa*> tables = {&isa_baseline};
#endif
  return tables;
}

const Isa& isa_select(const std::string& name) {
  std::string known;
  for (const Isa* isa : isa_tables()) {
    known += (known.empty() ? "" : ", ") + std::string(isa->name);
    if (name.empty() ? isa->supported() : name == isa->name) {
      if (!isa->supported()) throw std::runtime_error("NARROWS_ISA='" + name + "': this CPU does not have it");
      return *isa;
    }
  }
  throw std::invalid_argument("NARROWS_ISA='" + name + "' is not an instruction set; choose from " + known);
}

}  // namespace narrows
