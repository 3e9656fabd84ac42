#include "cpu/probe.h"

#include <algorithm>
#include <chrono>
#include <vector>

#include "cpu/team.h"

namespace narrows {

namespace {

constexpr int ROUNDS = 25;
constexpr index_t FMA_ROUNDS = 20000;         // about half a millisecond
constexpr size_t EXCHANGE = size_t(1) << 16;  // doubles of one thread: 512 KiB, within a core's own cache
constexpr int BARRIERS = 200;

using Clock = std::chrono::steady_clock;
double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

}  // namespace

// The best round counts for each figure, because interruptions only add time.
Probe probe_machine(const Isa& isa, int n_threads) {
  std::vector<double> buffer(EXCHANGE * size_t(n_threads));
  Barrier barrier;
  Probe best;
  launch(
      n_threads,
      [&](int tid, int nt) {
        const double* theirs = buffer.data() + EXCHANGE * size_t((tid + 1) % nt);
        double* mine = buffer.data() + EXCHANGE * size_t(tid);
        volatile double keep = 0;
        for (int round = 0; round < ROUNDS; ++round) {
          barrier.wait(nt);
          auto start = Clock::now();
          const double flop = isa.f32().fma_probe(FMA_ROUNDS) * nt;
          barrier.wait(nt);
          const double fma = seconds_since(start);

          std::fill(mine, mine + EXCHANGE, double(round));
          barrier.wait(nt);
          start = Clock::now();
          double sums[8] = {};
          for (size_t i = 0; i < EXCHANGE; i += 8)
            for (size_t j = 0; j < 8; ++j) sums[j] += theirs[i + j];
          for (double s : sums) keep = keep + s;
          barrier.wait(nt);
          const double exchange = seconds_since(start);

          start = Clock::now();
          for (int i = 0; i < BARRIERS; ++i) barrier.wait(nt);
          const double barriers = seconds_since(start);
          if (tid == 0) {
            best.fma_gflops = std::max(best.fma_gflops, flop / fma / 1e9);
            best.exchange_gb_s = std::max(best.exchange_gb_s, double(EXCHANGE * sizeof(double)) / exchange / 1e9);
            const double us = barriers / BARRIERS * 1e6;
            best.barrier_us = round == 0 ? us : std::min(best.barrier_us, us);
          }
        }
      },
      launch_all);
  return best;
}

}  // namespace narrows
