// How the threads share the products of a plan, found by trials.
//
// Promises: a choice never changes a bit of a result, so trials are steps of the training itself. The process keeps the
// choice for a plan, and later programs with the same plan, instruction set and team use it.
// Never: tries again once it has settled.

#pragma once

#include <string>
#include <vector>

namespace narrows {

struct Choice {
  // Each thread takes the same rows of the batch through all layers. Else threads share tiles of each product, and wait
  // for each other after each layer.
  bool by_rows = true;
  // By op: true if its input gradient is a transposed product, which packs the rows of the batch and not W.
  std::vector<char> turned;
};

class Tuning {
 public:
  // `first` is used until the trials end. `turnable` are the ops that may be turned if rows are shared. `either`: both
  // ways of sharing are possible. Without a key there are no trials.
  Tuning(std::string key, Choice first, bool either, std::vector<size_t> turnable);

  bool settled() const { return trial_ == trials_; }
  // The choice for the next step.
  const Choice& current() const { return settled() ? best_ : candidates_[trial_ % candidates_.size()]; }
  // Takes the seconds of the slowest thread in each op, and last in barriers, for a step with the current choice.
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
