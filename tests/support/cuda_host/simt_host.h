// The threads of a GPU on a CPU, for tests: a launch is a loop over blocks, and the threads of a block are fibers.
//
// Promises: a thread runs until a barrier or a shuffle and then waits for the others. A warp runs as far as it can
// before the next warp starts. They take turns in either order (`reversed`), so a missing barrier shows as different
// bits. Shared memory is garbage when a block begins. A launch ends with a message if a thread leaves a matrix or a
// shared array, returns while others wait, or if not all threads reach a barrier.
// Never: used outside tests; safe for two OS threads.

#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#define NARROWS_HD inline
#define DEVICE inline
#define KERNEL void
#define KERNEL_OF(threads, blocks) void
#define UNROLL
#define UNROLL_BY_8
#define UNROLL_BY_2
#define GRID_CONSTANT
#define SHARED(T, name, N) static simt::Shared<T, (N)> name
#define REQUIRE(condition) \
  if (!(condition)) simt::fail(__FILE__, __LINE__, #condition)

namespace simt {

// The content of memory that nobody wrote: NaN as floating-point numbers.
constexpr int GARBAGE = 0xff;

[[noreturn]] inline void fail(const char* file, int line, const char* what);

// Blocks so far. Shared memory belongs to a block.
inline uint64_t blocks_begun = 0;

struct Fiber {
  ucontext_t entry;
  jmp_buf at;
  std::unique_ptr<char[]> stack;
  bool waiting = false;  // whether `at` leads into it
  int thread = -1;
  const unsigned* generation = nullptr;  // what it waits for to be another than `mine`
  unsigned mine = 0;
};

struct Machine {
  static constexpr size_t STACK = 64 << 10;
  int block = 0, threads = 0, thread = 0;
  bool reversed = false;
  std::string error;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Fiber*> idle;    // fibers that are within no thread
  std::vector<Fiber*> within;  // the fiber of each thread that has begun and is not done, in the order of their turns
  Fiber* current = nullptr;
  jmp_buf scheduler;
  void (*body)(const void*) = nullptr;
  const void* argument = nullptr;
  int next = 0, last = 0, finished = 0;  // threads that have begun, that may, and that are done
  // Threads that wait at the barrier of the block, and at that of each warp.
  int at_barrier = 0;
  std::vector<int> at_shuffle;
  std::vector<char> exchanged;

  static Machine& get();

  [[noreturn]] void give_way() { _longjmp(scheduler, 1); }

  // Waits until `arrived` is zero again. The last of `expected` threads sets it to zero.
  void wait(int& arrived, int expected, unsigned& generation) {
    const unsigned mine = generation;
    if (++arrived == expected) {
      arrived = 0;
      ++generation;
      progress = true;
      return;
    }
    Fiber* self = current;
    self->waiting = true;
    self->generation = &generation;
    self->mine = mine;
    if (!_setjmp(self->at)) give_way();
  }

  unsigned block_generation = 0;
  std::vector<unsigned> warp_generation;
  bool progress = false;

  static void enter() {
    Machine& m = get();
    // A fiber that has not waited serves the next thread, too.
    Fiber* const self = m.current;
    for (;;) {
      while (m.next < m.last) {
        const int i = m.next++;
        self->thread = m.reversed ? m.threads - 1 - i : i;
        m.thread = self->thread;
        m.within[size_t(i)] = self;
        m.body(m.argument);
        m.within[size_t(i)] = nullptr;
        self->thread = -1;
        ++m.finished;
        m.progress = true;
      }
      // All threads that may begin have begun: wait for more.
      m.idle.push_back(self);
      self->waiting = true;
      if (!_setjmp(self->at)) m.give_way();
    }
  }

  void resume(Fiber& f) {
    current = &f;
    thread = f.thread;
    if (_setjmp(scheduler)) return;
    if (f.waiting) _longjmp(f.at, 1);
    getcontext(&f.entry);
    if (!f.stack) f.stack.reset(new char[STACK]);
    f.entry.uc_stack.ss_sp = f.stack.get();
    f.entry.uc_stack.ss_size = STACK;
    f.entry.uc_link = nullptr;
    makecontext(&f.entry, enter, 0);
    setcontext(&f.entry);
  }

  void launch(int blocks, int block_threads, bool in_reverse, void (*kernel)(const void*), const void* operands) {
    error.clear();
    threads = block_threads, reversed = in_reverse, body = kernel, argument = operands;
    if (threads < 32 || threads > 1024 || threads % 32) error = "a block of " + std::to_string(threads) + " threads";
    for (int b = 0; b < blocks && error.empty(); ++b) run_block(reversed ? blocks - 1 - b : b);
  }

  void run_block(int index) {
    block = index;
    next = finished = at_barrier = 0;
    at_shuffle.assign(size_t(threads / 32), 0);
    warp_generation.assign(size_t(threads / 32), 0);
    exchanged.assign(size_t(threads) * 16, 0);
    within.assign(size_t(threads), nullptr);
    if (idle.size() < fibers.size()) {  // an error has left fibers within threads, to which they do not return
      idle.clear();
      for (auto& f : fibers) f->waiting = false, idle.push_back(f.get());
    }
    ++blocks_begun;
    // A warp runs as far as it can before the next one, so early reads and writes meet late ones of other warps.
    bool any = true;
    while (finished < threads && error.empty()) {
      if (!any) error = "block " + std::to_string(block) + ": a barrier or a shuffle that not all threads reach";
      any = false;
      for (int first = 0; first < threads && error.empty(); first += 32) {
        last = first + 32;
        do {
          progress = false;
          run_warp(first);
          any = any || progress;
        } while (progress && error.empty());
      }
    }
  }

  // Continues the threads that can go on, and starts those that have not begun.
  void run_warp(int first) {
    const int begun = std::min(next, last);
    for (int turn = first; turn < begun && error.empty(); ++turn) {
      Fiber* const f = within[size_t(turn)];
      if (f && *f->generation != f->mine) resume(*f);
    }
    while (next < last && error.empty()) {
      if (idle.empty()) fibers.emplace_back(new Fiber), idle.push_back(fibers.back().get());
      Fiber* const fiber = idle.back();
      idle.pop_back();
      resume(*fiber);
      progress = true;
    }
  }
};

inline Machine machine;
inline Machine& Machine::get() { return machine; }

[[noreturn]] inline void fail(const char* file, int line, const char* what) {
  Machine& m = Machine::get();
  m.error = std::string(file) + ":" + std::to_string(line) + ": " + what + " does not hold, block " +
            std::to_string(m.block) + " thread " + std::to_string(m.thread);
  m.give_way();
}

template <class T, size_t N>
struct Shared {
  alignas(16) T data[N];
  uint64_t block = 0;

  T& operator[](int64_t i) {
    REQUIRE(i >= 0 && size_t(i) < N);
    if (block != blocks_begun) {
      block = blocks_begun;
      std::memset(static_cast<void*>(data), GARBAGE, sizeof data);
    }
    return data[i];
  }
};

}  // namespace simt

inline int thread() { return simt::Machine::get().thread; }
inline int threads() { return simt::Machine::get().threads; }
inline int block() { return simt::Machine::get().block; }
inline void in_turn() {}
inline int unknown(int number) { return number; }

inline void sync() {
  simt::Machine& m = simt::Machine::get();
  const int self = m.thread;
  m.wait(m.at_barrier, m.threads, m.block_generation);
  m.thread = self;
}

// The lanes of a warp meet twice; between the two, each reads the values of the others.
template <class T, class Fn>
inline auto among_lanes(T value, const Fn& read) {
  simt::Machine& m = simt::Machine::get();
  const int self = m.thread;
  const size_t warp = size_t(self / 32);
  const auto meet = [&] {
    m.wait(m.at_shuffle[warp], 32, m.warp_generation[warp]);
    m.thread = self;
  };
  static_assert(sizeof(T) <= 16, "room for a value");
  std::memcpy(&m.exchanged[size_t(self) * 16], &value, sizeof value);
  meet();
  const auto result = read(self, [&](int thread) {
    std::memcpy(&value, &m.exchanged[size_t(thread) * 16], sizeof value);
    return value;
  });
  meet();
  return result;
}

template <class T>
inline T shuffle_xor(T value, int mask) {
  return among_lanes(value, [&](int self, const auto& of) { return of(self ^ mask); });
}

inline uint32_t ballot(bool condition) {
  return among_lanes(condition, [](int self, const auto& of) {
    uint32_t bits = 0;
    for (int lane = 0; lane < 32; ++lane) bits |= uint32_t(of(self / 32 * 32 + lane)) << lane;
    return bits;
  });
}

inline void sync_warp() { ballot(true); }
inline int ones(uint32_t bits) { return __builtin_popcount(bits); }

using std::exp;
using std::expm1;
