// Threads: the only file that knows where they come from.
//
// Promises: launch() runs fn(tid, nt) on up to n threads and returns when all are done. nt is the number of threads
// that were available, so results must not depend on it. It is smaller while other processes want the cores (crew.h). A
// process may fork after a launch; the child starts its own threads. Never: changes the floating-point mode, the signal
// mask or another library's thread settings.

#pragma once

#include <atomic>

namespace narrows {

// A barrier whose threads spin first and then sleep. Between ops of a few microseconds it takes a tenth of the time of
// the runtime's barrier. A thread that sleeps leaves its core to a thread that is late, or to another process.
class Barrier {
 public:
  void wait(int nt) {
    if (nt == 1) return;
    const int generation = generation_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == nt - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      generation_.store(generation + 1);
      if (sleepers_.load() > 0) wake();
    } else {
      spin(generation);
    }
  }

 private:
  void spin(int generation);
  void wake();

  alignas(64) std::atomic<int> arrived_{0};
  // The last thread to arrive writes `generation_` and then reads `sleepers_`; a thread that goes to sleep does it the
  // other way round. In sequential order one of them sees the other.
  alignas(64) std::atomic<int> generation_{0};
  std::atomic<int> sleepers_{0};
};

using TeamFn = void (*)(void* data, int tid, int nt);

void launch(int n, TeamFn fn, void* data);
// As launch(), on all threads that are available, however busy the machine is.
void launch_all(int n, TeamFn fn, void* data);

template <class Fn>
void launch(int n, const Fn& fn, void (*how)(int, TeamFn, void*) = launch) {
  how(n, [](void* data, int tid, int nt) { (*static_cast<const Fn*>(data))(tid, nt); }, const_cast<Fn*>(&fn));
}

// The number of threads that the runtime uses by default in the calling thread: OMP_NUM_THREADS, or the limit that
// threadpoolctl has set. 0 if there is no limit.
int thread_limit();

// "openmp" or "std::thread".
const char* team_kind();

// Call this once, when the library is loaded.
void install_fork_handler();

}  // namespace narrows
