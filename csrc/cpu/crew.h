// How many threads to run while other processes want the same cores.
//
// Promises: a crew shrinks if threads wait for a core, and tries its full size again after a while. On a quiet machine
// it keeps its full size. Never: changes a result, because no result depends on the number of threads.

#pragma once

#include <cstdint>

namespace narrows {

// Nanoseconds of one parallel region. A thread loses time while it could run and has no core.
struct RegionTimes {
  int64_t wall, worst_loss, total_loss;  // the loss of the thread with the largest one, and of all threads
};

class Crew {
 public:
  // The number of threads for the next region, of `wanted`.
  int size(int wanted);
  // Takes the times of a region that nt threads have run.
  void record(int nt, const RegionTimes& times);
  // Takes the wall time of a region that was not timed.
  void pass(int64_t wall) { clock_ += wall; }

 private:
  int wanted_ = 0, size_ = 0;
  RegionTimes window_{};  // sums of the regions since the last decision
  int64_t clock_ = 0;     // the wall time of all regions: pauses between them do not count
  int64_t until_ = 0;     // the full size is tried again at this time
  bool probing_ = false;
  int bad_ = 0, good_ = 0;  // consecutive windows
  int64_t hold_ = 0;        // windows that the smaller size is kept for
};

}  // namespace narrows
