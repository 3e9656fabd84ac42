// The speed of the machine at this moment, to report with a timing.
//
// Shared machines change their clock and, even more, the cost of memory that another core has written. Without these
// three figures a timing says little.

#pragma once

#include "cpu/isa.h"

namespace narrows {

struct Probe {
  double fma_gflops = 0;     // float32 multiply-adds in registers, all threads at once
  double exchange_gb_s = 0;  // each thread reads what another has just written (with one thread, its own data)
  double barrier_us = 0;     // all threads meet once
};

Probe probe_machine(const Isa& isa, int n_threads);

}  // namespace narrows
