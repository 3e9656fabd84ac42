// A run of ops on narrow layers as one launch: a gather, products up to 128 wide, the loss, and the backward products.
//
// Promises: a block keeps its rows for the whole run and needs no other block, so a barrier stands where a launch would
// end. An element is the same chain of operations as in the separate launches (gather, gemm, loss), so its bits are the
// same. The launch leaves the same values in memory.
//
// Weights go through shared memory, slice by slice. The next slice, also that of the next stage, is loaded while this
// one is multiplied.

#pragma once

#include "gemm.cuh"
#include "rows.cuh"

constexpr int STACK_WIDTH = NARROWS_STACK_WIDTH, STACK_THREADS = NARROWS_STACK_THREADS;
constexpr int MAX_STAGES = NARROWS_MAX_STAGES;

// A stage is an op (its kind is the OpCode, its slots are those of the op), or it begins the step.
constexpr int STAGE_BEGIN = -1;

// LOADS: the stage reads its rows from memory, not from the stage before. WEIGHT_TURNED: the weight is used transposed.
// ROUNDS: bfloat16 programs round the factors.
enum StageFlag { LOADS = 1, WEIGHT_TURNED = 2, ROUNDS = 4 };

struct Stage {
  Matrix slots[5];
  int kind, activation, option, flags;  // option: the source of GATHER, the kind of LOSS
  double number;                        // delta of LOSS, scale of DGRAD

  DEVICE const Matrix& operator[](Slot at) const { return slots[int(at)]; }
  DEVICE bool multiplies() const { return kind == narrows::OP_DENSE || kind == narrows::OP_DGRAD; }
  // The factors and the result of a stage that multiplies; DENSE and DGRAD have them in the same slots.
  DEVICE const Matrix& factor() const { return slots[int(op::DENSE::x)]; }
  DEVICE const Matrix& weight() const { return slots[int(op::DENSE::W)]; }
  DEVICE const Matrix& out() const { return slots[int(op::DENSE::out)]; }
};

struct Stack {
  Stage stages[MAX_STAGES];
  const Step* step;
  const Source* sources;
  int n, m, learn, unused;
};

static_assert(sizeof(Stack) == NARROWS_STACK_SIZE, "STACK_DTYPE has another layout");

// A slice of a stage's weight: first in registers, then element (k + d, j) of the factor in shared[d * PITCH + j].
struct Slice {
  static constexpr int DEPTH = sizeof(real) == 4 ? 32 : 16, PITCH = STACK_WIDTH + 1;
  static constexpr int EACH = DEPTH * STACK_WIDTH / STACK_THREADS;
  real held[EACH];

  // The logarithm of the number of threads for the columns of the product, a power of two.
  DEVICE static int lanes(int cols) { return cols <= 32 ? 5 : cols <= 64 ? 6 : 7; }

  template <class Fn>
  DEVICE static void each(const Stage& stage, const Fn& fn) {
    const int log = lanes(stage.out().cols);
    UNROLL
    for (int n = 0; n < EACH; ++n) {
      const int l = n * STACK_THREADS + thread();
      if (l >= DEPTH << log) break;
      if (stage.flags & WEIGHT_TURNED)
        fn(n, l % DEPTH, l / DEPTH);
      else
        fn(n, l >> log, l & ((1 << log) - 1));
    }
  }
  DEVICE void load(const Stage& stage, int k) {
    const Matrix& W = stage.weight();
    const int depth = stage.factor().cols, cols = stage.out().cols;
    each(stage, [&](int n, int d, int j) {
      const bool inside = k + d < depth && j < cols;
      const real w = inside ? stage.flags & WEIGHT_TURNED ? W(j, k + d) : W(k + d, j) : real(0);
      held[n] = rounded(stage.flags & ROUNDS, w);
    });
  }
  template <class Shared>
  DEVICE void put(const Stage& stage, Shared& shared) const {
    each(stage, [&](int n, int d, int j) { shared[d * PITCH + j] = held[n]; });
  }
};

// The stages of ROWS rows. Between two stages, `act` holds the rows, column by column, rounded as the next stage needs
// them.
template <int ROWS>
struct Stages {
  static_assert(STACK_THREADS == 2 * STACK_WIDTH && ROWS >= 4, "threads have rows of columns");
  const Stack& op;
  const int first, rows;
  const Step* step;
  Slice slice;

  DEVICE explicit Stages(const Stack& op)
      : op(op), first(block() * ROWS), rows(op.m - first < ROWS ? op.m - first : ROWS), step(op.step) {}

  // The next stage from s on that multiplies.
  DEVICE int product_from(int s) const {
    while (s < op.n && !op.stages[s].multiplies()) ++s;
    return s;
  }
  // x as the stage after s uses it.
  DEVICE real onward(int s, real x) const { return rounded(s + 1 < op.n && op.stages[s + 1].flags & ROUNDS, x); }

  // Calls fn(r, j) for this thread's elements of the rows; neighbouring threads have neighbouring elements.
  template <class Fn>
  DEVICE void elements(int cols, const Fn& fn) const {
    for (int l = thread(); l < rows * cols; l += STACK_THREADS) fn(l / cols, l % cols);
  }

  template <class Act>
  DEVICE void load(const Stage& stage, Act& act) const {
    const Matrix& x = stage.factor();
    elements(x.cols, [&](int r, int j) { act[j * ROWS + r] = rounded(stage.flags & ROUNDS, x(first + r, j)); });
    sync();
  }

  template <class Act>
  DEVICE void gather(int s, Act& act) const {
    const Matrix &out = op.stages[s][op::GATHER::out], &shift = op.stages[s][op::GATHER::shift];
    const Source& source = op.sources[op.stages[s].option];
    const auto moved = [&](real value, int j) { return shift ? value - shift(0, j) : value; };
    elements(out.cols, [&](int r, int j) {
      act[j * ROWS + r] = moved(source.csr ? real(0) : source.dense(step->rows[first + r], j), j);
    });
    sync();
    if (source.csr) {
      for (int r = thread() / WARP; r < rows; r += STACK_THREADS / WARP) {
        const int64_t row = step->rows[first + r];
        for (int64_t k = source.begin(row) + thread() % WARP; k < source.end(row); k += WARP)
          act[source.column(k) * ROWS + r] = moved(source.value(k), source.column(k));
      }
      sync();
    }
    elements(out.cols, [&](int r, int j) {
      real& x = act[j * ROWS + r];
      out(first + r, j) = x;
      x = onward(s, x);
    });
    sync();
  }

  // The sums of stage s. A thread has part `part`, of EACH rows, of column j. Returns EACH, so that the compiler reads
  // `act` in whole vectors.
  template <int EACH, class Act, class Shared>
  DEVICE int multiply(int s, int part, int j, Act& act, Shared& weights) {
    const Stage& stage = op.stages[s];
    const int from = part * EACH;
    const int depth = stage.factor().cols;
    const bool works = j < stage.out().cols && from < ROWS;
    real sum[EACH] = {};
    for (int k = 0; k < depth; k += Slice::DEPTH) {
      slice.put(stage, weights);
      sync();
      const bool more = k + Slice::DEPTH < depth;
      const int ahead = more ? s : product_from(s + 1);
      if (ahead < op.n) slice.load(op.stages[ahead], more ? k + Slice::DEPTH : 0);
      const int end = more ? Slice::DEPTH : depth - k;
      if (works) {
        UNROLL_BY_8
        for (int d = 0; d < end; ++d) {
          const real w = weights[d * Slice::PITCH + j];
          UNROLL
          for (int r = 0; r < EACH; ++r) sum[r] += act[(k + d) * ROWS + from + r] * w;
        }
      }
      sync();
    }
    if (works) {
      UNROLL
      for (int r = 0; r < EACH; ++r) act[j * ROWS + from + r] = sum[r];
    }
    return EACH;
  }

  template <class Act, class Shared>
  DEVICE void product(int s, Act& act, Shared& weights) {
    const Stage& stage = op.stages[s];
    if (stage.flags & LOADS) load(stage, act);
    // Two or more threads share a column. Each has a part of the rows.
    const int log = Slice::lanes(stage.out().cols), j = thread() & ((1 << log) - 1), part = thread() >> log;
    int each;
    if (log == 7)
      each = multiply<ROWS / 2>(s, part, j, act, weights);
    else if (log == 6)
      each = multiply<ROWS / 4>(s, part, j, act, weights);
    else
      each = multiply<(ROWS < 8 ? 1 : ROWS / 8)>(s, part, j, act, weights);
    const int from = part * each;
    // A thread continues with its own sums.
    const int end = from + each < rows ? from + each : rows;
    if (j < stage.out().cols) with_activation(stage.activation, Finish<Act>{*this, s, from, end, j, act});
    sync();
  }

  // What becomes of the sums of column j, as in the epilogues of `gemm`.
  template <class Act>
  struct Finish {
    const Stages& stages;
    const int s, from, end, j;
    Act& act;

    template <class A>
    DEVICE void as() const {
      const Stage& stage = stages.op.stages[s];
      for (int r = from; r < end; ++r) {
        const int i = stages.first + r;
        real z = act[j * ROWS + r];
        if (stage.kind == narrows::OP_DENSE) {
          const Matrix &b = stage[op::DENSE::b], &pre = stage[op::DENSE::pre];
          if (b) z += b(0, j);
          if (pre) pre(i, j) = z;
          z = A::value(z);
        } else {
          z *= A::slope(stage[op::DGRAD::saved](i, j) * real(stage.number));
        }
        stage.out()(i, j) = z;
        act[j * ROWS + r] = stages.onward(s, z);
      }
    }
  };

  // A warp has a row, as in `loss`.
  template <class L, class Act>
  DEVICE void row_losses(int s, Act& act) const {
    using At = op::LOSS;
    const Matrix &z = op.stages[s][At::z], &target = op.stages[s][At::target];
    const real delta = real(op.stages[s].number);
    for (int r = thread() / WARP; r < rows; r += STACK_THREADS / WARP) {
      const int i = first + r;
      const real share = row_share(op, op.stages[s][At::weight], i);
      real sum = 0;
      for (int j = thread() % WARP; j < z.cols; j += WARP) {
        real dz;
        sum += L::eval(act[j * ROWS + r], target(i, j), delta, dz);
        if (!op.learn) continue;
        z(i, j) = dz * share;
        act[j * ROWS + r] = onward(s, dz * share);
      }
      sum = warp_sum(sum);
      if (thread() % WARP == 0) op.stages[s][At::rowloss](i, 0) = sum;
    }
    sync();
  }

  template <class Act>
  DEVICE void loss(int s, Act& act) const {
    const Stage& stage = op.stages[s];
    if (stage.flags & LOADS) load(stage, act);
    if (stage.option == LOSS_BCE) return row_losses<Logistic>(s, act);
    with_activation(stage.activation, Losses<Act>{*this, s, act});
  }

  template <class Act>
  struct Losses {
    const Stages& stages;
    const int s;
    Act& act;

    template <class A>
    DEVICE void as() const {
      if (stages.op.stages[s].option == LOSS_MSE)
        stages.template row_losses<Linked<Mse, A>>(s, act);
      else
        stages.template row_losses<Linked<Huber, A>>(s, act);
    }
  };
};

// Stages are in the order of the launches that they replace.
template <int ROWS>
KERNEL_OF(STACK_THREADS, 2)
stack(const GRID_CONSTANT Stack op) {
  SHARED(real, act, STACK_WIDTH * ROWS);
  SHARED(real, weights, Slice::DEPTH * Slice::PITCH);
  Stages<ROWS> stages(op);
  const int begins = stages.product_from(0);
  if (begins < op.n) stages.slice.load(op.stages[begins], 0);
  for (int s = 0; s < op.n; ++s) {
    const Stage& stage = op.stages[s];
    if (stage.kind == STAGE_BEGIN) {
      using At = launch::step;
      stages.step = next_record(stage[At::records], stage[At::begun]);
      if (block() == 0) begin_terms(stage[At::records], stage[At::begun], stage[At::terms], op.step);
    } else if (stage.kind == narrows::OP_GATHER) {
      stages.gather(s, act);
    } else if (stage.kind == narrows::OP_LOSS) {
      stages.loss(s, act);
    } else {
      stages.product(s, act, weights);
    }
  }
}
