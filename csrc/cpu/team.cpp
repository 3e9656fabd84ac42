#include "cpu/team.h"

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

#include <algorithm>
#include <vector>

namespace narrows {

namespace {

std::atomic<int> forks{0};

// The number of threads that can run at once, up to n, with this one. libgomp ends the process if it cannot start a
// thread (no memory for a stack, or a limit). So this function tries it first, with threads like those of libgomp.
int startable(int n) {
  std::atomic<bool> done{false};
  std::vector<pthread_t> threads(size_t(n - 1));
  int started = 0;
  const auto wait = [](void* flag) -> void* {
    while (!static_cast<std::atomic<bool>*>(flag)->load(std::memory_order_acquire)) sched_yield();
    return nullptr;
  };
  while (started < n - 1 && pthread_create(&threads[size_t(started)], nullptr, wait, &done) == 0) ++started;
  done.store(true, std::memory_order_release);
  for (int i = 0; i < started; ++i) pthread_join(threads[size_t(i)], nullptr);
  return started + 1;
}

// The runtime keeps a pool for each thread that launches. It grows to the largest team.
int available(int n) {
  thread_local int asked = 1, found = 1, generation = 0;
  if (const int now = forks.load(std::memory_order_relaxed); generation != now) asked = found = 1, generation = now;
  if (n > asked) asked = n, found = startable(n);
  return std::min(n, found);
}

}  // namespace

void launch(int n, TeamFn fn, void* data) {
  if (n > 1) n = available(n);
  if (n <= 1) return fn(data, 0, 1);
#pragma omp parallel num_threads(n)
  fn(data, omp_get_thread_num(), omp_get_num_threads());
}

int thread_limit() { return omp_get_max_threads(); }

const char* team_kind() { return "openmp"; }

// The threads of a pool do not survive a fork, but the runtime's record of them does, and the child would wait for them
// forever. So the pool is released before the fork.
void install_fork_handler() {
  pthread_atfork(
      [] {
        if (!omp_in_parallel()) omp_pause_resource_all(omp_pause_hard), ++forks;
      },
      nullptr, nullptr);
}

}  // namespace narrows

#else

// Without OpenMP, and for thread sanitizers, which do not know OpenMP's barriers: each launch starts threads.

#include <system_error>
#include <thread>
#include <vector>

namespace narrows {

void launch(int n, TeamFn fn, void* data) {
  if (n <= 1) return fn(data, 0, 1);
  // The size of the team must be known before a thread runs: nobody does the work of a thread that did not start.
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

int thread_limit() { return 0; }

const char* team_kind() { return "std::thread"; }

void install_fork_handler() {}

}  // namespace narrows

#endif
