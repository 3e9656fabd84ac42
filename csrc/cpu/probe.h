// What the machine can do at this moment, to stand beside a timing taken then.
//
// Shared machines change their clock and, more, the cost of memory that another core has written; a figure without
// these three says little.

#pragma once

#include "cpu/isa.h"

namespace narrows {

struct Probe {
  double fma_gflops = 0;     // float32 multiply-adds in registers, all threads at once
  double exchange_gb_s = 0;  // reading what another thread has just written, each thread (its own with one thread)
  double barrier_us = 0;     // all threads meeting once
};

Probe probe_machine(const Isa& isa, int n_threads);

}  // namespace narrows
