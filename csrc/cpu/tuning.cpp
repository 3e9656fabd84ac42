#include "cpu/tuning.h"

#include <map>
#include <mutex>
#include <numeric>

namespace narrows {

namespace {

constexpr size_t ROUNDS = 4;      // for every candidate; the fastest counts, because disturbances only slow a step down
constexpr double CLEARLY = 0.98;  // another choice wins if it takes less than this part of the time

std::mutex mutex;
std::map<std::string, Choice>& found() {
  static std::map<std::string, Choice> choices;
  return choices;
}

double sum(const std::vector<double>& v) { return std::accumulate(v.begin(), v.end(), 0.0); }

}  // namespace

Tuning::Tuning(std::string key, Choice first, bool either, std::vector<size_t> turnable)
    : key_(std::move(key)), best_(std::move(first)), turnable_(std::move(turnable)) {
  if (key_.empty()) return;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto known = found().find(key_);
    if (known != found().end()) {
      best_ = known->second;
      return;
    }
  }
  candidates_.push_back(best_);
  if (best_.by_rows && !turnable_.empty()) {
    candidates_.push_back(best_);
    for (size_t op : turnable_) candidates_.back().turned[op] = !best_.turned[op];
  }
  if (either) {
    candidates_.push_back(best_);
    candidates_.back().by_rows = !best_.by_rows;
  }
  if (candidates_.size() < 2) return;
  trials_ = ROUNDS * candidates_.size();
  fastest_.resize(candidates_.size());
}

void Tuning::record(const std::vector<double>& seconds) {
  std::vector<double>& fastest = fastest_[trial_ % candidates_.size()];
  if (fastest.empty()) fastest = seconds;
  for (size_t i = 0; i < seconds.size(); ++i)
    if (seconds[i] < fastest[i]) fastest[i] = seconds[i];
  if (++trial_ == trials_) settle();
}

void Tuning::settle() {
  std::vector<double> best = fastest_[0];
  if (best_.by_rows && !turnable_.empty())
    for (size_t op : turnable_)
      if (fastest_[1][op] < CLEARLY * best[op]) best_.turned[op] = !best_.turned[op], best[op] = fastest_[1][op];
  // The last candidate may share the work in the other way.
  const Choice& other = candidates_.back();
  if (other.by_rows != best_.by_rows && sum(fastest_.back()) < CLEARLY * sum(best)) best_.by_rows = other.by_rows;
  const std::lock_guard<std::mutex> lock(mutex);
  found()[key_] = best_;
}

}  // namespace narrows
