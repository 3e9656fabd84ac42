#include "team.h"

#include <pthread.h>
#include <sched.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace narrows {

void Barrier::spin(int generation) const {
  for (int i = 0; generation_.load(std::memory_order_acquire) == generation; ++i) {
    if (i < 4000) {
#if defined(__x86_64__)
      _mm_pause();
#elif defined(__aarch64__)
      __asm__ volatile("yield");
#endif
    } else {
      sched_yield();
    }
  }
}

}  // namespace narrows

#ifdef _OPENMP

#include <omp.h>

namespace narrows {

void launch(int n, TeamFn fn, void* data) {
  if (n <= 1) return fn(data, 0, 1);
#pragma omp parallel num_threads(n)
  fn(data, omp_get_thread_num(), omp_get_num_threads());
}

const char* team_kind() { return "openmp"; }

// A pool's threads do not survive fork, but the runtime's record of them does, and the child would wait for them for
// ever. Letting the pool go before the fork leaves both sides a clean start.
void install_fork_handler() {
  pthread_atfork(
      [] {
        if (!omp_in_parallel()) omp_pause_resource_all(omp_pause_hard);
      },
      nullptr, nullptr);
}

}  // namespace narrows

#else

// Without OpenMP, and for thread sanitizers, which do not know OpenMP's barriers: threads started for each launch.

#include <system_error>
#include <thread>
#include <vector>

namespace narrows {

void launch(int n, TeamFn fn, void* data) {
  if (n <= 1) return fn(data, 0, 1);
  // The team's size must be known before any of it runs: those that could not be started are run by nobody.
  std::atomic<int> size{0};
  std::vector<std::thread> threads;
  threads.reserve(size_t(n - 1));
  auto body = [&](int tid) {
    int nt;
    while ((nt = size.load(std::memory_order_acquire)) == 0) sched_yield();
    fn(data, tid, nt);
  };
  for (int tid = 1; tid < n; ++tid) {
    try {
      threads.emplace_back(body, tid);
    } catch (const std::system_error&) {
      break;
    }
  }
  size.store(int(threads.size()) + 1, std::memory_order_release);
  body(0);
  for (std::thread& t : threads) t.join();
}

const char* team_kind() { return "std::thread"; }

void install_fork_handler() {}

}  // namespace narrows

#endif
