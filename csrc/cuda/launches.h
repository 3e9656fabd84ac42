// The operands of kernels by name: op[op::GATHER::out] is an operand of an op, op[launch::fill::value] one of a row of
// launches.def.

#pragma once

#include "../plan/ops.h"

namespace op = narrows::op;
using narrows::Float;
using narrows::Int;
using narrows::Slot;

// The position of each operand among those of its kind.
namespace launch_position {
#define LAUNCH(NAME, slots, ints, floats) \
  struct NAME {                           \
    enum : int { slots SLOTS };           \
    enum : int { ints INTS };             \
    enum : int { floats FLOATS };         \
  };
#define PART(NAME, at_slot, at_int, at_float, slots, ints, floats) \
  struct NAME {                                                    \
    enum : int { BEFORE_SLOTS = at_slot - 1, slots SLOTS };        \
    enum : int { BEFORE_INTS = at_int - 1, ints INTS };            \
    enum : int { BEFORE_FLOATS = at_float - 1, floats FLOATS };    \
  };
#define SLOT(name, access, presence) name,
#define INTEGER(name, rule, n) name,
#define NUMBER(name, rule) name,
#include "launches.def"
}  // namespace launch_position

namespace launch {
#define LAUNCH(NAME, slots, ints, floats) \
  struct NAME {                           \
    using At = launch_position::NAME;     \
    slots ints floats                     \
  };
#define PART(NAME, at_slot, at_int, at_float, slots, ints, floats) LAUNCH(NAME, slots, ints, floats)
#define SLOT(name, access, presence) static constexpr Slot name{At::name};
#define INTEGER(name, rule, n) static constexpr Int name{At::name};
#define NUMBER(name, rule) static constexpr Float name{At::name};
#include "launches.def"
}  // namespace launch
