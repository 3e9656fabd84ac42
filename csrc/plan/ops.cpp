// The table of the ops, and the names of enumerations.

#include "plan/plan.h"

namespace narrows {

const OpInfo OPS[OP_COUNT] = {
#define OP(NAME, slots, ints, floats, share, reach)                                              \
  [] {                                                                                           \
    using O [[maybe_unused]] = op::NAME;                                                         \
    using N = position::NAME;                                                                    \
    return OpInfo{#NAME, N::SLOTS, N::INTS, N::FLOATS, {slots}, {ints}, {floats}, share, reach}; \
  }(),
#define SLOT(name, access, presence) {#name, Access::access, Presence::presence},
#define INTEGER(name, rule, n) {#name, Rule::rule, n},
#define NUMBER(name, rule) {#name, Rule::rule},
#define NOTHING Reach()
#define READS_GRADIENTS {{}, {}, false, true, false}
#define UPDATES_PARAMETERS {{}, {}, false, true, true}
#define GATHERS(from, extent) {from, extent, false, false, false}
#define GATHERS_CSR(from, extent) {from, extent, true, false, false}
#define ONLY(name) {SOURCE_##name, -1}
#define BY(name) {-1, int(O::name)}
#define ANY_COLUMNS {Columns::ANY, -1}
#define ONE_COLUMN {Columns::ONE, -1}
#define COLUMNS_OF(name) {Columns::COLUMNS_OF, int(O::name)}
#define ROWS_OF(name) {Columns::ROWS_OF, int(O::name)}
#define FEATURES_OF(name) {Columns::FEATURES_OF, int(O::name)}
#include "plan/ops.def"
};

int OpInfo::solver() const {
  for (int i = 0; i < n_ints; ++i)
    if (ints[i].rule == Rule::A_SOLVER) return i;
  return -1;
}

std::vector<std::string> activation_names() {
  return {
#define X(name, functor) #name,
      NARROWS_ACTIVATIONS(X)
#undef X
          "SOFTMAX"};
}

std::vector<std::string> loss_names() {
  return {
#define X(name, functor) #name,
      NARROWS_LOSSES(X)
#undef X
  };
}

}  // namespace narrows
