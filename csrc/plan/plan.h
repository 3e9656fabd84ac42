// The plan as native backends see it: enumerations, descriptors, limits, validation.
//
// Promises: the numbers here are those of python/narrows/plan (a test compares the names). A table that passes
// validate() can be run without another check of a shape or an index. Never: trusts its input, or allocates in
// proportion to a number that it has not checked.

#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "plan/ops.h"
#include "shared/activations.h"

namespace narrows {

using index_t = int64_t;

// SOFTMAX couples the elements of a row, so it is an output link, and no elementwise functor.
enum Activation : int {
#define X(name, functor) ACT_##name,
  NARROWS_ACTIVATIONS(X)
#undef X
      ACT_SOFTMAX,
  ACT_COUNT
};

#define NARROWS_LOSSES(X)     \
  X(MSE, Mse)                 \
  X(BCE, Bce)                 \
  X(HUBER, Huber)             \
  X(MULTINOMIAL, Multinomial) \
  X(GAUSSIAN, Gaussian)       \
  X(POISSON, Poisson)         \
  X(NB, Nb)                   \
  X(ZINB, Zinb)

enum Loss : int {
#define X(name, functor) LOSS_##name,
  NARROWS_LOSSES(X)
#undef X
      LOSS_COUNT
};

enum Corruption : int { CORRUPT_GAUSSIAN, CORRUPT_MASKING, CORRUPT_SALT_AND_PEPPER, CORRUPT_COUNT };
enum Units : int { UNITS_BERNOULLI, UNITS_GAUSSIAN, UNITS_COUNT };
enum Solver : int { SOLVER_SGD, SOLVER_ADAM, SOLVER_ADAMW, SOLVER_COUNT };
enum Mode : int {
  MODE_ENCODE = 1,
  MODE_DECODE = 2,
  MODE_RECONSTRUCT = 4,
  MODE_SCORE = 8,
  MODE_GRADIENT = 16,
  MODE_TRAIN = 32,
  MODE_POSTERIOR = 64,
  MODE_LIKELIHOOD = 128
};
constexpr int MODE_BITS = 8;
// True if a mode begins with latent codes in place of X.
inline bool from_codes(int mode) { return mode & (MODE_DECODE | MODE_LIKELIHOOD); }
enum Region : int { REGION_PARAMETER, REGION_GRADIENT, REGION_MOMENT1, REGION_MOMENT2, REGION_BATCH, REGION_SCRATCH };
// The sources of training stay bound while validation data is applied.
enum Bank : int { BANK_TRAIN, BANK_APPLY, BANK_COUNT };
enum Source : int {
  SOURCE_X,
  SOURCE_TARGET,
  SOURCE_WEIGHT,
  SOURCE_LATENT,
  SOURCE_SHIFT,
  SOURCE_CONDITION,
  SOURCE_COUNT
};

// How the threads of an op share a slot that it writes. ROWS: each thread has its own rows of the batch. TILES: each
// has its own tiles of the matrix, cut by shape alone. FIRST: thread 0 does it all. ALL: the op shares in another way.
enum Share : int { SHARE_ROWS, SHARE_TILES, SHARE_FIRST, SHARE_ALL };

constexpr index_t LANES = 16;       // slots are padded to this many columns; sums run over as many virtual lanes
constexpr index_t SAME_SETS = 256;  // rows whose distance is a multiple of this share few sets of a cache
constexpr index_t CELL_ROWS = 6;    // penalties of a weight matrix are summed by cells of CELL_ROWS x LANES elements
constexpr double VARIANCE_FLOOR = 1e-6;                          // added to learned variances
constexpr double LOG_DISPERSION_LIMIT = 14, DROPOUT_LIMIT = 60;  // larger logarithms and logits are cut off
constexpr double DISPERSION_PACE = 30;                           // log theta divided by the parameter of a feature
constexpr index_t GRAIN = 4096;      // elements of a flat region that a thread takes at a time
constexpr double GRAM_GUARD = 1e-3;  // a loss below this part of |y|^2 is taken from the residuals
constexpr int JACOBIAN_LAYERS = 4;   // the most layers of an encoder

// Whole cache lines; wide rows have whole pairs of lines, at distances that use many sets of a cache. As ops.padded().
inline index_t padded(index_t cols) {
  const index_t lines = (cols + LANES - 1) / LANES * LANES;
  if (lines < SAME_SETS) return lines;
  const index_t pairs = (lines + 2 * LANES - 1) / (2 * LANES) * (2 * LANES);
  return pairs % SAME_SETS ? pairs : pairs + 2 * LANES;
}

struct OpDesc {
  int32_t code, modes;
  int32_t slots[MAX_SLOTS];  // -1 where an operand is absent
  int32_t ints[MAX_INTS];
  double floats[MAX_FLOATS];

  int32_t operator[](Slot slot) const { return slots[int(slot)]; }
  int32_t operator[](Int i) const { return ints[int(i)]; }
  double operator[](Float f) const { return floats[int(f)]; }
};

struct SlotDesc {
  int64_t region, rows, cols, offset;
  index_t ld() const { return padded(cols); }
  index_t size() const { return rows * ld(); }
};

struct PlanDesc {
  std::vector<SlotDesc> slots;
  std::vector<OpDesc> ops;
  index_t batch = 0;
  index_t parameter_size = 0;  // elements of each of the parameter-like regions
  index_t work_size = 0;       // elements for batch and scratch slots, which share memory
  int moments = 0;             // regions of optimiser state, 1 or 2

  index_t arena_size() const { return (2 + moments) * parameter_size + work_size; }
};

// Columns that z of COUNTS has for each feature.
inline int count_columns(const OpDesc& op) { return 1 + op[op::COUNTS::by_cell] + (op[op::COUNTS::loss] == LOSS_ZINB); }

// Throws std::invalid_argument, which names the op, the operand and the values that do not fit.
void validate(const PlanDesc& plan);

// A row of ops.def.
enum class Access { READ, WRITE, WRITE_OR_FIRST, UPDATE };
enum class Presence { REQUIRED, OPTIONAL };
enum class Rule { ANY, BELOW, A_SOLVER, ABOVE_ZERO, FROM_0_TO_1 };
enum class Columns { ANY, ONE, COLUMNS_OF, ROWS_OF, FEATURES_OF };

struct SlotInfo {
  const char* name = nullptr;
  Access access = Access::READ;
  Presence presence = Presence::REQUIRED;
};
struct IntInfo {
  const char* name = nullptr;
  Rule rule = Rule::ANY;
  int below = 0;  // it must be 0 to below - 1 under the rules BELOW and A_SOLVER
};
struct FloatInfo {
  const char* name = nullptr;
  Rule rule = Rule::ANY;
};
// The source that an op takes rows from: a fixed one, or the one that an attribute names.
struct From {
  int source = -1, attribute = -1;
};
// How many columns the source must have.
struct Extent {
  Columns columns = Columns::ANY;
  int slot = -1;
};
// What an op touches besides its slots.
struct Reach {
  From from;
  Extent extent;
  bool csr = false;
  bool reads_gradients = false, updates_parameters = false;
};

struct OpInfo {
  const char* name;
  int n_slots, n_ints, n_floats;
  SlotInfo slots[MAX_SLOTS];
  IntInfo ints[MAX_INTS];
  FloatInfo floats[MAX_FLOATS];
  Share share;
  Reach reach;

  bool writes(int slot) const { return slots[slot].access != Access::READ; }
  // The position of the solver among the integers; -1 if the op updates no parameter.
  int solver() const;
};
extern const OpInfo OPS[OP_COUNT];

std::vector<std::string> activation_names();
std::vector<std::string> loss_names();

}  // namespace narrows
