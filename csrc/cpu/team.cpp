#include "cpu/team.h"

#include <pthread.h>
#include <sched.h>
#include <time.h>

#include <algorithm>
#include <climits>

#include "cpu/crew.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace narrows {

namespace {

constexpr int SPINS = 4000;  // about 0.1 ms, longer than waking a thread takes

// Threads time a region if the last one took so long, or if none was timed for so long. Of short regions some are
// enough, because a thread's clock is a system call.
constexpr int64_t SAMPLING = 1'000'000;

int64_t nanoseconds(clockid_t clock) {
  timespec t;
  clock_gettime(clock, &t);
  return int64_t(t.tv_sec) * 1'000'000'000 + t.tv_nsec;
}
int64_t now() { return nanoseconds(CLOCK_MONOTONIC); }

// Nanoseconds that this thread has slept in barriers.
thread_local int64_t slept = 0;

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// Returns when the value is another one, or at any time before.
void sleep_while(const std::atomic<int>& word, int value) {
#if defined(__linux__)
  static_assert(sizeof(word) == sizeof(int), "a futex is a plain word");
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
#else
  if (word.load() == value) sched_yield();
#endif
}

}  // namespace

void Barrier::spin(int generation) {
  for (int i = 0; i < SPINS; ++i) {
    if (generation_.load(std::memory_order_acquire) != generation) return;
    pause();
  }
  const int64_t start = now();
  ++sleepers_;
  while (generation_.load() == generation) sleep_while(generation_, generation);
  --sleepers_;
  slept += now() - start;
}

void Barrier::wake() {
#if defined(__linux__)
  syscall(SYS_futex, &generation_, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
#endif
}

namespace {

// A region whose threads say how long they had no core.
class TimedRegion {
 public:
  TimedRegion(TeamFn fn, void* data) : fn_(fn), data_(data) {}

  void run(int tid, int nt) {
    const int64_t cpu = nanoseconds(CLOCK_THREAD_CPUTIME_ID), asleep = slept;
    fn_(data_, tid, nt);
    const int64_t used = nanoseconds(CLOCK_THREAD_CPUTIME_ID) - cpu, end = now();
    // A thread that begins late has waited for its core too.
    const int64_t loss = end - start_ - used - (slept - asleep);
    total_ += loss;
    for (int64_t worst = worst_.load(); loss > worst && !worst_.compare_exchange_weak(worst, loss);) {
    }
    size_ = nt;
    end_.wait(nt);  // this barrier lets a thread sleep sooner than the runtime's
  }
  int size() const { return size_; }
  RegionTimes times() const { return {now() - start_, worst_.load(), total_.load()}; }

 private:
  TeamFn fn_;
  void* data_;
  int64_t start_ = now();
  std::atomic<int64_t> worst_{0}, total_{0};
  std::atomic<int> size_{1};
  Barrier end_;
};

}  // namespace

void launch(int n, TeamFn fn, void* data) {
  if (n <= 1) return fn(data, 0, 1);
  thread_local Crew crew;
  thread_local int64_t last = 0, timed = 0;  // wall time of the last region, and the end of the last timed one
  const int64_t start = now();
  const int nt = crew.size(n);
  if (nt == 1 || (last < SAMPLING && start - timed < SAMPLING)) {
    launch_all(nt, fn, data);
    last = now() - start;
    crew.pass(last);
    return;
  }
  TimedRegion region(fn, data);
  launch_all(nt, [](void* self, int tid, int size) { static_cast<TimedRegion*>(self)->run(tid, size); }, &region);
  const RegionTimes times = region.times();
  last = times.wall, timed = start + times.wall;
  crew.record(region.size(), times);
}

}  // namespace narrows

#ifdef _OPENMP

#include <omp.h>

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

void launch_all(int n, TeamFn fn, void* data) {
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

void launch_all(int n, TeamFn fn, void* data) {
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
