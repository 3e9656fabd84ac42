#include "cpu/isa.h"

#include <cstdlib>
#include <stdexcept>

#if defined(NARROWS_AMX) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

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

#ifdef NARROWS_AMX
// Linux gives tile registers to a process that asks for them. It refuses if a thread's signal stack is too small for
// them, and some containers refuse the call.
bool tiles_granted() {
#ifdef __linux__
  constexpr int REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM and XFEATURE_XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
  return granted;
#else
  return false;
#endif
}
bool cpu_has_amx() {
  return has_avx512bf16() && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16");
}
bool has_amx() { return cpu_has_amx() && tiles_granted(); }
#endif

}  // namespace

bool tiles_refused() {
#ifdef NARROWS_AMX
  return cpu_has_amx() && !tiles_granted();
#else
  return false;
#endif
}

const std::vector<const Isa*>& isa_tables() {
  static const Isa baseline = {"baseline", always, baseline::table<float>, baseline::table<double>};
#ifdef NARROWS_X86
  static const Isa avx2 = {"avx2", has_avx2, avx2::table<float>, avx2::table<double>};
  static const Isa avx512 = {"avx512", has_avx512, avx512::table<float>, avx512::table<double>};
#ifdef NARROWS_AMX
  static const Isa amx = {
      "amx", has_amx, avx512::table<float>, avx512::table<double>, amx::pair_product, "the tile registers of AMX"};
#endif
  static const Isa avx512bf16 = {"avx512bf16",          has_avx512bf16,           avx512::table<float>,
                                 avx512::table<double>, avx512bf16::pair_product, "vdpbf16ps"};
  // Last, so that nobody has it who does not ask for it.
  static const Isa amx_model = {
      "amx-model", has_avx512, avx512::table<float>, avx512::table<double>, amx_model::pair_product, "a model of AMX"};
  static const auto& tables = *new std::vector<const Isa*>{
#ifdef NARROWS_AMX
      &amx,
#endif
      &avx512bf16, &avx512, &avx2, &baseline, &amx_model};
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
