// The plan as native backends see it: enumerations, descriptors, limits, validation.
//
// Promises: the numbers here are those of python/narrows/{spec,ops,plan}.py (a test compares the names); a table that
// passes validate() can be run without another check of a shape or an index.
// Never: trusts its input; allocates in proportion to a number it has not checked.

#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "shared/activations.h"

namespace narrows {

using index_t = int64_t;

// SOFTMAX couples the elements of a row, so it is an output link and not an elementwise functor.
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
// Whether a mode begins with latent codes in place of X.
inline bool from_codes(int mode) { return mode & (MODE_DECODE | MODE_LIKELIHOOD); }
enum Region : int { REGION_PARAMETER, REGION_GRADIENT, REGION_MOMENT1, REGION_MOMENT2, REGION_BATCH, REGION_SCRATCH };
// Training keeps its sources bound while validation data is applied.
enum Bank : int { BANK_TRAIN, BANK_APPLY, BANK_COUNT };
enum Source : int { SOURCE_X, SOURCE_TARGET, SOURCE_WEIGHT, SOURCE_LATENT, SOURCE_SHIFT, SOURCE_BATCH, SOURCE_COUNT };

// How the threads of an op share a slot they write: each has its own rows of the batch, its own tiles of the matrix
// (cut by shape alone), thread 0 does it all, or in a way of the op's own.
enum Share : int { SHARE_ROWS, SHARE_TILES, SHARE_FIRST, SHARE_ALL };

// X(NAME, slots, integers, floats, slots read, slots written, share), in the order of ops.SIGNATURES; the sets of
// slots are bit masks. SHARE_ROWS is of the batch slots, SHARE_TILES and SHARE_FIRST of those written.
#define NARROWS_OPS(X)                                                    \
  X(GATHER, 2, 1, 0, 0b01, 0b10, SHARE_ROWS)                              \
  X(CORRUPT, 1, 2, 3, 0b1, 0b1, SHARE_ROWS)                               \
  X(DENSE, 5, 2, 0, 0b00111, 0b11000, SHARE_ROWS)                         \
  X(DROPOUT, 1, 1, 1, 0b1, 0b1, SHARE_ROWS)                               \
  X(LINK, 1, 1, 0, 0b1, 0b1, SHARE_ROWS)                                  \
  X(LOSS, 4, 2, 1, 0b0111, 0b1001, SHARE_ROWS)                            \
  X(WGRAD, 3, 1, 0, 0b111, 0b100, SHARE_TILES)                            \
  X(COLSUM, 3, 2, 0, 0b111, 0b100, SHARE_ALL)                             \
  X(DGRAD, 4, 2, 1, 0b0111, 0b1000, SHARE_ROWS)                           \
  X(ACTIVITY_L1, 5, 1, 1, 0b01111, 0b11000, SHARE_ROWS)                   \
  X(KL_SPARSITY, 5, 1, 2, 0b01111, 0b11000, SHARE_ALL)                    \
  X(DECAY, 3, 0, 2, 0b011, 0b110, SHARE_ALL)                              \
  X(REDUCE, 3, 2, 0, 0b111, 0b100, SHARE_FIRST)                           \
  X(SQNORM, 1, 0, 0, 0b0, 0b1, SHARE_ALL)                                 \
  X(SHRINK, 1, 0, 1, 0b1, 0b1, SHARE_ALL)                                 \
  X(UPDATE, 1, 1, 4, 0b1, 0b0, SHARE_ALL)                                 \
  X(WGRAD_UPDATE, 8, 1, 6, 0b01111111, 0b10111000, SHARE_TILES)           \
  X(COLSUM_UPDATE, 5, 1, 3, 0b11111, 0b11100, SHARE_ALL)                  \
  X(SAMPLE, 3, 1, 0, 0b001, 0b110, SHARE_ROWS)                            \
  X(LATENT_KL, 6, 0, 1, 0b001111, 0b110000, SHARE_ROWS)                   \
  X(GAUSSIAN, 6, 1, 0, 0b001111, 0b110001, SHARE_ROWS)                    \
  X(CONTRACTIVE, 8, 3, 1, 0b00111111, 0b11110000, SHARE_ALL)              \
  X(COLUMN_DECAY, 3, 0, 0, 0b111, 0b100, SHARE_ALL)                       \
  X(GRAM, 2, 0, 0, 0b01, 0b10, SHARE_TILES)                               \
  X(SLOPES, 2, 2, 0, 0b01, 0b10, SHARE_ROWS)                              \
  X(JACOBIAN, 11, 1, 1, 0b00111111111, 0b11110000000, SHARE_ALL)          \
  X(CURVES, 3, 3, 0, 0b111, 0b100, SHARE_ROWS)                            \
  X(GRAIN_SUM, 2, 2, 0, 0b01, 0b10, SHARE_ALL)                            \
  X(GRAM_WGRAD, 3, 0, 0, 0b011, 0b100, SHARE_TILES)                       \
  X(PROBE, 1, 1, 0, 0b0, 0b1, SHARE_ROWS)                                 \
  X(TANGENT, 3, 1, 0, 0b011, 0b100, SHARE_ROWS)                           \
  X(SQUARED_NORM, 3, 1, 1, 0b111, 0b101, SHARE_ROWS)                      \
  X(COTANGENT, 4, 2, 0, 0b1111, 0b1001, SHARE_ROWS)                       \
  X(DRAW, 2, 2, 0, 0b01, 0b10, SHARE_ROWS)                                \
  X(CONTRAST, 4, 0, 0, 0b0111, 0b1000, SHARE_ROWS)                        \
  X(KEEP, 2, 0, 0, 0b01, 0b10, SHARE_ROWS)                                \
  X(CONVOLVE, 5, 17, 0, 0b00111, 0b11000, SHARE_ROWS)                     \
  X(CONV_DGRAD, 4, 17, 1, 0b0111, 0b1000, SHARE_ROWS)                     \
  X(CONV_WGRAD, 3, 18, 0, 0b111, 0b100, SHARE_ALL)                        \
  X(MAXPOOL, 2, 6, 0, 0b01, 0b10, SHARE_ROWS)                             \
  X(MAXPOOL_DGRAD, 4, 7, 0, 0b0111, 0b1000, SHARE_ROWS)                   \
  X(GRAIN_UPDATE, 5, 2, 6, 0b01111, 0b11110, SHARE_ALL)                   \
  X(MAXPOOL_PICK, 3, 6, 0, 0b011, 0b100, SHARE_ROWS)                      \
  X(SPARSE_DENSE, 6, 2, 2, 0b001111, 0b110000, SHARE_ROWS)                \
  X(SPARSE_WGRAD, 4, 2, 2, 0b1111, 0b0010, SHARE_ALL)                     \
  X(SPARSE_WGRAD_UPDATE, 9, 2, 8, 0b011111111, 0b100011100, SHARE_ALL)    \
  X(WEIGHT_GRAM, 4, 0, 0, 0b0011, 0b1100, SHARE_ALL)                      \
  X(SPARSE_MSE, 9, 2, 1, 0b001111111, 0b110000000, SHARE_ROWS)            \
  X(ROW_GRAM, 3, 0, 0, 0b011, 0b100, SHARE_ALL)                           \
  X(SPARSE_MSE_WGRAD, 7, 1, 0, 0b0011111, 0b1100000, SHARE_ALL)           \
  X(SPARSE_MSE_UPDATE, 11, 2, 6, 0b01111111111, 0b10111111000, SHARE_ALL) \
  X(LIBRARY, 1, 1, 0, 0b0, 0b1, SHARE_ROWS)                               \
  X(LOG_NORMALIZE, 2, 0, 1, 0b11, 0b01, SHARE_ROWS)                       \
  X(COUNTS, 6, 4, 1, 0b001111, 0b110001, SHARE_ALL)                       \
  X(MEANS, 3, 1, 1, 0b011, 0b100, SHARE_ROWS)                             \
  X(SHIFT, 2, 0, 0, 0b01, 0b10, SHARE_ALL)                                \
  X(CONDITION, 2, 0, 0, 0b01, 0b10, SHARE_ROWS)

enum OpCode : int {
#define X(name, ...) OP_##name,
  NARROWS_OPS(X)
#undef X
      OP_COUNT
};

constexpr int MAX_SLOTS = 11, MAX_INTS = 18, MAX_FLOATS = 8;
constexpr index_t LANES = 16;       // slots are padded to this many columns; sums run over as many virtual lanes
constexpr index_t SAME_SETS = 256;  // rows a multiple of so many elements apart fall on few sets of a cache
constexpr index_t CELL_ROWS = 6;    // penalties of a weight matrix are summed by cells of CELL_ROWS x LANES elements
constexpr double VARIANCE_FLOOR = 1e-6;                          // added to learned variances
constexpr double LOG_DISPERSION_LIMIT = 14, DROPOUT_LIMIT = 60;  // as far as the logarithms and the logits count
constexpr double DISPERSION_PACE = 30;                           // log theta, by the parameter of a feature
constexpr index_t GRAIN = 4096;                                  // elements of a flat region one thread takes at a time
constexpr double GRAM_GUARD = 1e-3;  // part of |y|^2 below which a row's loss is taken from its residuals
constexpr int JACOBIAN_LAYERS = 4;   // of an encoder, at most

// As ops.padded(): whole cache lines, whole pairs of them in wide rows, and these not on the same sets of a cache.
inline index_t padded(index_t cols) {
  const index_t lines = (cols + LANES - 1) / LANES * LANES;
  if (lines < SAME_SETS) return lines;
  const index_t pairs = (lines + 2 * LANES - 1) / (2 * LANES) * (2 * LANES);
  return pairs % SAME_SETS ? pairs : pairs + 2 * LANES;
}

struct OpDesc {
  int32_t code, modes;
  int32_t slots[MAX_SLOTS];
  int32_t ints[MAX_INTS];
  double floats[MAX_FLOATS];
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
  index_t work_size = 0;       // elements shared by batch and scratch slots
  int moments = 0;             // regions of optimiser state, 1 or 2

  index_t arena_size() const { return (2 + moments) * parameter_size + work_size; }
};

// Of COUNTS: numbers that z holds for each feature.
inline int counts_heads(const OpDesc& op) { return 1 + op.ints[2] + (op.ints[0] == LOSS_ZINB); }

// Throws std::invalid_argument naming the op, the operand and the values that do not fit.
void validate(const PlanDesc& plan);

// What is known of an op kind.
struct OpInfo {
  const char* name;
  int slots, ints, floats;
  unsigned reads, writes;  // bit masks over the slots
  Share share;
};
extern const OpInfo OPS[OP_COUNT];

std::vector<std::string> activation_names();
std::vector<std::string> loss_names();

}  // namespace narrows
