// The ops of ops.def in C++: their numbers, and the positions of their operands, by name.
//
// Promises: nothing but the language, so that CUDA's compiler takes it, too.
// Never: knows what an op computes.
//
// `op::DENSE::W` is a Slot, `op::DENSE::activation` an Int, `op::DENSE::scale` a Float. Each is a type of its own, so
// that one is not taken for another: `args[op::DENSE::W]` is a matrix, and `args[op::DENSE::activation]` an integer.

#pragma once

namespace narrows {

enum OpCode : int {
#define OP(NAME, ...) OP_##NAME,
#include "plan/ops.def"
  OP_COUNT
};

enum class Slot : int {};
enum class Int : int {};
enum class Float : int {};

// The position of each operand among those of its kind, in the order of the row; then how many there are.
namespace position {
#define OP(NAME, slots, ints, floats, ...) \
  struct NAME {                            \
    enum : int { slots SLOTS };            \
    enum : int { ints INTS };              \
    enum : int { floats FLOATS };          \
  };
#define SLOT(name, access, presence) name,
#define INTEGER(name, rule, n) name,
#define NUMBER(name, rule) name,
#include "plan/ops.def"

struct Counts {
  int slots, ints, floats;
};
constexpr Counts COUNTS_OF[] = {
#define OP(NAME, ...) {NAME::SLOTS, NAME::INTS, NAME::FLOATS},
#include "plan/ops.def"
};
constexpr int most(int Counts::* kind) {
  int n = 0;
  for (const Counts& c : COUNTS_OF) n = c.*kind > n ? c.*kind : n;
  return n;
}
}  // namespace position

// The most operands of each kind that an op has.
constexpr int MAX_SLOTS = position::most(&position::Counts::slots);
constexpr int MAX_INTS = position::most(&position::Counts::ints);
constexpr int MAX_FLOATS = position::most(&position::Counts::floats);

namespace op {
#define OP(NAME, slots, ints, floats, ...) \
  struct NAME {                            \
    using At = position::NAME;             \
    slots ints floats                      \
  };
#define SLOT(name, access, presence) static constexpr Slot name{At::name};
#define INTEGER(name, rule, n) static constexpr Int name{At::name};
#define NUMBER(name, rule) static constexpr Float name{At::name};
#include "plan/ops.def"
}  // namespace op

}  // namespace narrows
