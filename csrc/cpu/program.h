// A plan compiled for this CPU: one arena, an op loop, batches.
//
// Promises: a constructed program runs without an allocation; a training step is one parallel region; train() stops
// only between two steps. Never: owns the data that it is bound to (the caller keeps it alive), or serves two callers
// at once.

#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "cpu/team.h"
#include "cpu/tuning.h"

namespace narrows {

// Zeroed memory aligned to a page (huge pages where the system grants them), before a page that may not be touched.
// Throws std::bad_alloc.
class Arena {
 public:
  explicit Arena(size_t bytes);
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0, mapped_ = 0;
};

struct Hyper {
  uint64_t seed = 0;
  uint32_t step = 0;
  const double* learning_rate = nullptr;  // one per step
  const double* kl_factor = nullptr;      // one per step; null: 1
  const double* momentum = nullptr;       // one per step; null: that of the plan
};

// BFLOAT16 is FLOAT32 with its products in bfloat16.
enum Precision : int { FLOAT32, FLOAT64, BFLOAT16, PRECISION_COUNT };

// The interface of all precisions.
class Program {
 public:
  virtual ~Program() = default;

  // Throws std::invalid_argument for an invalid plan. simulate > 0 runs that many threads one after the other. With
  // `tune`, the first steps of a training try several ways to share products.
  static std::unique_ptr<Program> compile(PlanDesc plan, const Isa& isa, int precision, int n_threads, int simulate,
                                          bool tune);

  // Checks a source against the plan (columns, CSR structure) and remembers it.
  virtual void bind(int bank, int source, const SourceView& view) = 0;
  // Steps over consecutive batches of `rows`; terms has terms_size() values for each step. Calls stop() after every
  // step and ends early if it returns true. Returns the steps done.
  virtual index_t train(const index_t* rows, index_t n_rows, const Hyper& hyper, double* terms,
                        const std::function<bool()>& stop) = 0;
  // Forward and backward of one batch, without the update.
  virtual void gradient(const index_t* rows, index_t n_rows, uint64_t seed, uint32_t step, double* terms) = 0;
  // Runs a mode over all rows of the bound source and copies the rows of slot `result` to out, which is C-contiguous.
  virtual void apply(int mode, index_t result, void* out) = 0;

  // Trains like train(). Returns the seconds that each thread spent in each op; the last column is for barriers.
  virtual std::vector<double> profile(const index_t* rows, index_t n_rows, const Hyper& hyper) = 0;

  // How products are shared now, and whether trials have found it.
  virtual const Choice& choice() const = 0;
  virtual bool tuned() const = 0;

  virtual void* slot_data(index_t slot) = 0;
  virtual void* moment_data(int moment, index_t slot) = 0;
  virtual index_t terms_size() const = 0;
  virtual const PlanDesc& plan() const = 0;
  virtual void* arena() const = 0;
};

}  // namespace narrows
