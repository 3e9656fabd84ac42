#include "cpu/crew.h"

#include <algorithm>

namespace narrows {

namespace {

constexpr int64_t WINDOW = 4'000'000;  // about one turn that the scheduler gives to another process
constexpr int BAD_WINDOWS = 2;         // in a row, before the crew shrinks: one may be a short disturbance
constexpr int PROBE_WINDOWS = 8;       // good ones in a row, after which the full size is kept
constexpr int GOOD_WINDOWS = 16;       // in a row, after which a disturbance counts as the first one
// Trying the full size again may cost a window. So a crew that fails keeps the smaller size for a multiple of it.
constexpr int64_t SHORTEST_HOLD = 2, LONGEST_HOLD = 128;

// The part of the time that the slowest of nt threads may lose. Above it, the others wait longer than the work of one
// thread would cost them.
double tolerance(int nt) { return std::max(0.1, 0.5 / nt); }

}  // namespace

int Crew::size(int wanted) {
  if (wanted != wanted_) *this = Crew(), wanted_ = size_ = wanted, hold_ = SHORTEST_HOLD;
  if (size_ < wanted_ && !probing_ && clock_ >= until_) probing_ = true, good_ = 0, window_ = {};
  return probing_ ? wanted_ : size_;
}

void Crew::record(int nt, const RegionTimes& region) {
  pass(region.wall);
  window_.wall += region.wall, window_.worst_loss += region.worst_loss, window_.total_loss += region.total_loss;
  if (window_.wall < WINDOW) return;
  const RegionTimes done = window_;
  window_ = {};
  if (double(done.worst_loss) <= tolerance(nt) * double(done.wall)) {
    bad_ = 0;
    if (++good_ >= GOOD_WINDOWS) hold_ = SHORTEST_HOLD;
    // The first windows may lie within one turn of the scheduler.
    if (probing_ && good_ >= PROBE_WINDOWS) probing_ = false, size_ = wanted_;
    return;
  }
  good_ = 0;
  if (!probing_ && ++bad_ < BAD_WINDOWS) return;
  const int64_t lost = (done.total_loss + done.wall - 1) / done.wall;  // cores
  size_ = std::max(1, nt - int(std::min<int64_t>(lost, nt)));
  until_ = clock_ + hold_ * done.wall;
  hold_ = std::min(LONGEST_HOLD, 2 * hold_);
  probing_ = false, bad_ = 0;
}

}  // namespace narrows
