// Threads: the only file that knows where they come from.
//
// Promises: launch() runs fn(tid, nt) on up to n threads and returns when all are done. nt is the number of threads
// that were available, so results must not depend on it. A process may fork after a launch; the child starts its own
// threads. Never: changes the floating-point mode, the signal mask or another library's thread settings.

#pragma once

#include <atomic>

namespace narrows {

// A spinning barrier. Between ops of a few microseconds it takes a tenth of the time of the runtime's barrier. It
// yields after a while, so that more threads than cores make progress.
class Barrier {
 public:
  void wait(int nt) {
    if (nt == 1) return;
    const int generation = generation_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == nt - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      generation_.store(generation + 1, std::memory_order_release);
    } else {
      spin(generation);
    }
  }

 private:
  void spin(int generation) const;

  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> generation_{0};
};

using TeamFn = void (*)(void* data, int tid, int nt);

void launch(int n, TeamFn fn, void* data);

template <class Fn>
void launch(int n, const Fn& fn) {
  launch(n, [](void* data, int tid, int nt) { (*static_cast<const Fn*>(data))(tid, nt); }, const_cast<Fn*>(&fn));
}

// The number of threads that the runtime uses by default in the calling thread: OMP_NUM_THREADS, or the limit that
// threadpoolctl has set. 0 if there is no limit.
int thread_limit();

// "openmp" or "std::thread".
const char* team_kind();

// Call this once, when the library is loaded.
void install_fork_handler();

}  // namespace narrows
