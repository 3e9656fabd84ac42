#include "cpu/isa.h"

#include <cstdlib>
#include <stdexcept>

namespace narrows {

namespace {

// Compiled without any instruction set's flags, so that asking is safe on every CPU.
bool always() { return true; }

#ifdef NARROWS_X86
// __builtin_cpu_supports also asks whether the operating system saves the registers.
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

}  // namespace

const std::vector<const Isa*>& isa_tables() {
  static const Isa baseline = {"baseline", always, baseline::table<float>, baseline::table<double>, nullptr};
#ifdef NARROWS_X86
  static const Isa avx2 = {"avx2", has_avx2, avx2::table<float>, avx2::table<double>, nullptr};
  static const Isa avx512 = {"avx512", has_avx512, avx512::table<float>, avx512::table<double>, nullptr};
  static const Isa avx512bf16 = {"avx512bf16", has_avx512bf16, avx512::table<float>, avx512::table<double>,
                                 avx512bf16::pair_product};
  static const auto& tables = *new std::vector<const Isa*>{&avx512bf16, &avx512, &avx2, &baseline};
#else
  static const auto& tables = *new std::vector<const Isa*>{&baseline};
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

const Isa& chosen_isa() {
  static const Isa& isa = [&]() -> const Isa& {
    const char* name = std::getenv("NARROWS_ISA");
    return isa_select(name ? name : "");
  }();
  return isa;
}

}  // namespace narrows
