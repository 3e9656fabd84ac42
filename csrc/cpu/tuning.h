// How a plan's products are cut, found by measuring.
//
// Promises: a choice never changes a bit of a result, so trials are steps of the training at hand; what was found for a
// plan is kept for the process and serves every later program of the same plan, instruction set and team.
// Never: is asked again once it has settled.

#pragma once

#include <string>
#include <vector>

namespace narrows {

struct Choice {
  // Each thread takes the same rows of the batch through all layers; else tiles of each product, and layers wait for
  // each other.
  bool by_rows = true;
  // By op: whether an input gradient is computed as a transposed product, which packs the batch's rows and not W.
  std::vector<char> turned;
};

class Tuning {
 public:
  // `first` serves until all is measured; `turnable` ops may be turned where rows are shared, and `either` says that
  // both ways of sharing are open. Without a key nothing is tried.
  Tuning(std::string key, Choice first, bool either, std::vector<size_t> turnable);

  bool settled() const { return trial_ == trials_; }
  // What the next step should run with.
  const Choice& current() const { return settled() ? best_ : candidates_[trial_ % candidates_.size()]; }
  // The seconds of the slowest thread in each op, and last in barriers, of a step with the current choice.
  void record(const std::vector<double>& seconds);

 private:
  void settle();

  std::string key_;
  Choice best_;
  std::vector<size_t> turnable_;
  std::vector<Choice> candidates_;
  std::vector<std::vector<double>> fastest_;  // by candidate
  size_t trial_ = 0, trials_ = 0;
};

}  // namespace narrows
