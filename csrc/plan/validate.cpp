// The check of a plan, which may come from anywhere. A plan that passes runs safely, if a kernel exists for each op.
//
// What a row of ops.def says is checked for every op alike; a function for each op checks the shapes of its operands.

#include <cmath>
#include <stdexcept>

#include "plan/geometry.h"
#include "plan/plan.h"

namespace narrows {

namespace {

constexpr index_t MAX_EXTENT = index_t(1) << 40;  // elements; keeps every product of sizes below 2**63
constexpr index_t MAX_DIM = index_t(1) << 31;
constexpr int32_t MAX_SIDE = 1 << 30;  // of images, kernels and strides

std::string text(index_t n) { return std::to_string(n); }
std::string shape(index_t rows, index_t cols) { return "(" + text(rows) + ", " + text(cols) + ")"; }
std::string shape(const SlotDesc& s) { return shape(s.rows, s.cols); }

index_t in_lanes(index_t cols) { return (cols + LANES - 1) / LANES * LANES; }

// The checks of one op. A message names the op's position, its kind and the operand.
class Check {
 public:
  Check(const PlanDesc& plan, size_t position) : plan_(plan), op_(plan.ops[position]), position_(position) {}

  void run() const {
    require(op_.code >= 0 && op_.code < OP_COUNT, "op code " + text(op_.code) + " is unknown");
    require(op_.modes > 0 && op_.modes < 1 << MODE_BITS, "modes " + text(op_.modes) + " are out of range");
    slots();
    attributes();
    switch (op_.code) {
#define OP(NAME, ...) \
  case OP_##NAME:     \
    return operands(op::NAME());
#include "plan/ops.def"
    }
  }

 private:
  [[noreturn]] void fail(const std::string& what) const {
    const bool known = op_.code >= 0 && op_.code < OP_COUNT;
    throw std::invalid_argument("plan: op " + std::to_string(position_) +
                                (known ? std::string(" (") + OPS[op_.code].name + ")" : "") + ": " + what);
  }
  void require(bool ok, const std::string& what) const {
    if (!ok) fail(what);
  }

  // --- what the op's row says ---

  void slots() const {
    const OpInfo& info = OPS[op_.code];
    for (int i = 0; i < MAX_SLOTS; ++i) {
      const int slot = op_.slots[i];
      if (i >= info.n_slots) {
        require(slot == -1, "slot " + text(slot) + " comes after the last operand");
        continue;
      }
      const std::string name = info.slots[i].name;
      require(slot >= -1 && slot < index_t(plan_.slots.size()),
              "operand " + name + " is slot " + text(slot) + ", the plan has " + text(index_t(plan_.slots.size())));
      require(slot >= 0 || info.slots[i].presence == Presence::OPTIONAL, "operand " + name + " is missing");
      for (int j = 0; j < i && slot >= 0; ++j)
        require(slot != op_.slots[j] || !(info.writes(i) || info.writes(j)) ||
                    (j == 0 && info.slots[i].access == Access::WRITE_OR_FIRST),
                "operands " + std::string(info.slots[j].name) + " and " + name + " must be different slots");
    }
  }

  void attributes() const {
    const OpInfo& info = OPS[op_.code];
    for (int i = 0; i < info.n_ints; ++i) {
      const IntInfo& rule = info.ints[i];
      const std::string given = std::string(rule.name) + "=" + text(op_.ints[i]);
      require(rule.rule != Rule::ABOVE_ZERO || op_.ints[i] > 0, given + " must be positive");
      require(rule.below == 0 || (op_.ints[i] >= 0 && op_.ints[i] < rule.below),
              given + " is outside 0.." + text(rule.below - 1));
    }
    for (int i = 0; i < info.n_floats; ++i) {
      const FloatInfo& rule = info.floats[i];
      const double value = op_.floats[i];
      const std::string given = std::string(rule.name) + "=" + std::to_string(value);
      require(std::isfinite(value), given + " is not finite");
      require(rule.rule != Rule::ABOVE_ZERO || value > 0, given + " must be positive");
      require(rule.rule != Rule::FROM_0_TO_1 || (value >= 0 && value <= 1), given + " is outside 0..1");
    }
  }

  // --- operands ---

  bool has(Slot i) const { return op_[i] >= 0; }
  std::string name(Slot i) const { return OPS[op_.code].slots[int(i)].name; }
  const SlotDesc& slot(Slot i) const {
    require(has(i), "operand " + name(i) + " is missing");
    return plan_.slots[size_t(op_[i])];
  }
  [[noreturn]] void misfit(Slot i, const std::string& expected) const {
    fail("operand " + name(i) + " has shape " + shape(slot(i)) + ", expected " + expected);
  }
  // A slot with a row for each row of the batch.
  const SlotDesc& batch(Slot i) const {
    const SlotDesc& s = slot(i);
    require(s.region == REGION_BATCH, "operand " + name(i) + " must be a batch slot");
    return s;
  }
  const SlotDesc& batch(Slot i, index_t cols) const {
    const SlotDesc& s = batch(i);
    if (s.cols != cols) misfit(i, text(cols) + " columns");
    return s;
  }
  // A slot of this shape that is no batch slot.
  const SlotDesc& matrix(Slot i) const {
    const SlotDesc& s = slot(i);
    require(s.region != REGION_BATCH, "operand " + name(i) + " must not be a batch slot");
    return s;
  }
  const SlotDesc& matrix(Slot i, index_t rows, index_t cols) const {
    const SlotDesc& s = matrix(i);
    if (s.rows != rows || s.cols != cols) misfit(i, shape(rows, cols));
    return s;
  }
  void square(Slot i, index_t n) const { matrix(i, n, n); }
  // The same for operands that may be absent.
  void maybe_batch(Slot i, index_t cols) const {
    if (has(i)) batch(i, cols);
  }
  void maybe_matrix(Slot i, index_t rows, index_t cols) const {
    if (has(i)) matrix(i, rows, cols);
  }
  void together(Slot i, Slot j) const {
    require(has(i) == has(j), "operands " + name(i) + " and " + name(j) + " belong together");
  }
  // Any slot with a row for each row of the batch, or more.
  void rows_for_batch(Slot i, index_t cols) const {
    const SlotDesc& s = slot(i);
    if (s.cols != cols || s.rows < plan_.batch)
      misfit(i, text(cols) + " columns and a row for each of " + text(plan_.batch));
  }
  // A batch slot with room for `cols` columns from `column` on.
  void segment(Slot i, index_t column, index_t cols) const {
    const SlotDesc& s = batch(i);
    require(column >= 0 && column % LANES == 0 && column <= s.cols && in_lanes(cols) <= s.cols - column,
            "operand " + name(i) + " has no room for " + text(cols) + " columns from column " + text(column));
  }
  // Each row of partial sums has room for a matrix, row by row, from `column` on.
  void sums(Slot i, index_t column, index_t rows, index_t cols) const {
    const SlotDesc& s = matrix(i);
    require(column >= 0 && column % LANES == 0 && column <= s.cols && rows <= (s.cols - column) / padded(cols),
            "operand " + name(i) + " has no room for " + shape(rows, cols) + " from column " + text(column));
  }
  // A row of sums over columns, one for each grain of rows.
  void grains(Slot i, index_t cols) const { matrix(i, slot(i).rows, cols); }
  void cells(Slot i, const SlotDesc& W) const {
    matrix(i, (W.rows + CELL_ROWS - 1) / CELL_ROWS, (W.cols + LANES - 1) / LANES);
  }
  void lies_in(Slot i, Region region, const char* what) const {
    require(slot(i).region == region, "operand " + name(i) + " must lie among the " + what);
  }
  // A parameter and its optimiser state.
  void parameter(Slot W, Slot moment1, Slot moment2, int solver, index_t rows, index_t cols) const {
    matrix(W, rows, cols), lies_in(W, REGION_PARAMETER, "parameters");
    matrix(moment1, rows, cols), lies_in(moment1, REGION_MOMENT1, "first moments");
    require(has(moment2) == (solver != SOLVER_SGD), "operand " + name(moment2) + " does not fit the solver");
    if (has(moment2)) matrix(moment2, rows, cols), lies_in(moment2, REGION_MOMENT2, "second moments");
  }
  // The weight of an op that decays and updates it.
  template <class O>
  const SlotDesc& updated_weight(O o, index_t rows, index_t cols) const {
    parameter(o.W, o.moment1, o.moment2, op_[o.solver], rows, cols);
    const SlotDesc& W = slot(o.W);
    require(has(o.penalty) || (op_[o.l2] == 0 && op_[o.l1] == 0), "operand penalty is missing");
    if (has(o.penalty)) cells(o.penalty, W);
    return W;
  }

  // --- images ---

  // A slot of images of this size.
  const SlotDesc& images(Slot i, index_t height, index_t width, index_t channels) const {
    const SlotDesc& s = batch(i);
    const index_t pixels = height * width;
    if (pixels > s.cols || pixels * channels != s.cols)
      misfit(i, "images of " + text(height) + " x " + text(width) + " x " + text(channels));
    return s;
  }
  template <class O>
  const SlotDesc& inputs(O o, Slot i) const {
    return images(i, op_[o.h], op_[o.w], op_[o.c]);
  }
  template <class O>
  const SlotDesc& outputs(O o, Slot i) const {
    return images(i, op_[o.out_h], op_[o.out_w], op_[o.filters]);
  }
  // The geometry of a convolution: windows begin inside the wide image, and its planes fit into memory.
  template <class O>
  ConvGeometry convolution(O o) const {
    for (Int i : {o.h, o.w, o.c, o.out_h, o.out_w, o.filters, o.ky, o.kx, o.sy, o.sx, o.uy, o.ux})
      require(op_[i] < MAX_SIDE, std::string(OPS[op_.code].ints[int(i)].name) + " is out of range");
    require(!op_[o.transposed] || (op_[o.uy] == 1 && op_[o.ux] == 1), "a transposed convolution takes no upsampling");
    const ConvGeometry g = conv_geometry(op_.ints + int(o.h));
    double elements = double(g.wide_channels) + double(g.narrow_channels);
    for (const ConvAxis& a : {g.y, g.x}) {
      require(a.pad >= 0 && a.pad < a.kernel, "padding " + text(a.pad) + " does not fit the kernel");
      require(a.stride <= (a.kernel > a.wide ? a.kernel : a.wide), "a stride is larger than image and kernel");
      require((a.narrow - 1) * a.stride - a.pad < a.wide, "a window begins outside the image");
      require(a.wide + a.pad - (a.narrow - 1) * a.stride - a.kernel < a.stride, "windows end before the image does");
      elements *= double(a.wide) + 2 * double(a.kernel) + 2 * double(a.stride);
    }
    require(elements < double(index_t(1) << 28), "images are out of range");
    return g;
  }
  // `whole` holds images, and `windows` a pixel for each of their windows.
  template <class O>
  void pooling(O o, Slot whole, Slot windows) const {
    require(op_[o.h] % op_[o.pool_y] == 0 && op_[o.w] % op_[o.pool_x] == 0, "windows do not divide the image");
    inputs(o, whole);
    images(windows, op_[o.h] / op_[o.pool_y], op_[o.w] / op_[o.pool_x], op_[o.c]);
  }

  void counts_link(int activation) const {
    require(activation == ACT_SOFTMAX || activation == ACT_EXP,
            "activation=" + text(activation) + " is no link of a likelihood of counts");
  }

  // --- one function for each op: `o` has its operands by name ---

  void operands(op::GATHER o) const {
    const SlotDesc& out = batch(o.out);
    require(op_[o.source] != SOURCE_WEIGHT || out.cols == 1, "sample weights have one column");
    maybe_matrix(o.shift, 1, out.cols);
  }

  void operands(op::CORRUPT o) const {
    batch(o.x);
    require(op_[o.level] >= 0 && (op_[o.kind] == CORRUPT_GAUSSIAN || op_[o.level] <= 1), "level is out of range");
  }

  void operands(op::DENSE o) const {
    const index_t n_in = batch(o.x).cols, n_out = batch(o.out).cols;
    matrix(o.W, op_[o.transposed] ? n_out : n_in, op_[o.transposed] ? n_in : n_out);
    matrix(o.b, 1, n_out), maybe_batch(o.pre, n_out);
  }

  void operands(op::DROPOUT o) const {
    batch(o.x);
    require(op_[o.rate] >= 0 && op_[o.rate] < 1, "rate is outside [0, 1)");
  }

  void operands(op::LINK o) const { batch(o.z); }

  void operands(op::LOSS o) const { batch(o.target, batch(o.z).cols), maybe_batch(o.weight, 1), batch(o.rowloss, 1); }

  void operands(op::WGRAD o) const { matrix(o.dW, batch(o.x).cols, batch(o.dz).cols); }

  void operands(op::COLSUM o) const { matrix(o.out, 1, batch(o.x).cols), maybe_batch(o.weight, 1); }

  void operands(op::DGRAD o) const {
    const index_t from = batch(o.dz).cols, to = batch(o.out).cols;
    batch(o.saved, to);
    if (op_[o.transposed]) {
      matrix(o.W, from, to);
    } else {
      const SlotDesc& W = matrix(o.W);
      if (W.rows < to || W.cols != from) misfit(o.W, "at least " + text(to) + " rows and " + text(from) + " columns");
    }
  }

  void operands(op::ACTIVITY_L1 o) const {
    const index_t n = batch(o.a).cols;
    batch(o.saved, n), maybe_batch(o.weight, 1), batch(o.dz, n), batch(o.rowpenalty, 1);
  }

  void operands(op::KL_SPARSITY o) const {
    const index_t n = batch(o.saved).cols;
    matrix(o.mean, 1, n), maybe_batch(o.weight, 1), batch(o.dz, n), matrix(o.penalty, 1, n);
    require(op_[o.target] > 0 && op_[o.target] < 1, "target must lie between 0 and 1");
  }

  void operands(op::DECAY o) const {
    const SlotDesc& W = matrix(o.W);
    matrix(o.dW, W.rows, W.cols), cells(o.penalty, W);
  }

  void operands(op::REDUCE o) const {
    if (has(o.weight)) batch(o.weight, 1), batch(o.x, 1);
    const SlotDesc& terms = matrix(o.terms, 1, slot(o.terms).cols);
    require(op_[o.index] >= 0 && op_[o.index] < terms.cols,
            "index=" + text(op_[o.index]) + " is outside the " + text(terms.cols) + " terms");
  }

  void operands(op::SQNORM o) const { matrix(o.partial, 1, (plan_.parameter_size + GRAIN - 1) / GRAIN); }

  void operands(op::SHRINK o) const { lies_in(o.W, REGION_PARAMETER, "parameters"); }

  void operands(op::UPDATE o) const {
    maybe_matrix(o.partial, 1, (plan_.parameter_size + GRAIN - 1) / GRAIN);
    require(op_[o.solver] == SOLVER_SGD || plan_.moments == 2, "the solver needs two moments");
  }

  void operands(op::WGRAD_UPDATE o) const {
    const SlotDesc& W = updated_weight(o, batch(o.x).cols, batch(o.dz).cols);
    maybe_matrix(o.dW, W.rows, W.cols), maybe_matrix(o.colrate, 1, W.cols);
  }

  void operands(op::COLSUM_UPDATE o) const {
    const index_t n = batch(o.x).cols;
    parameter(o.b, o.moment1, o.moment2, op_[o.solver], 1, n);
    maybe_matrix(o.db, 1, n);
  }

  void operands(op::SAMPLE o) const {
    const index_t n = batch(o.z).cols;
    batch(o.noise, n), batch(o.stats, 2 * n);
  }

  void operands(op::LATENT_KL o) const {
    const index_t n = batch(o.noise).cols;
    batch(o.stats, 2 * n), maybe_batch(o.weight, 1), batch(o.dz, n), batch(o.dstats, 2 * n), batch(o.rowkl, 1);
  }

  void operands(op::GAUSSIAN o) const {
    const index_t n = batch(o.z).cols;
    batch(o.target, n), maybe_batch(o.weight, 1), matrix(o.logvar, 1, n);
    batch(o.rowloss, 1), batch(o.rates, n);
  }

  void operands(op::CONTRACTIVE o) const {
    const index_t n = batch(o.saved).cols;
    matrix(o.W, slot(o.W).rows, n), maybe_batch(o.weight, 1), batch(o.dz, n);
    matrix(o.colrate, 1, n), matrix(o.penalty, 1, n);
    together(o.noisy, o.dnoisy), maybe_batch(o.noisy, n), maybe_batch(o.dnoisy, n);
  }

  void operands(op::COLUMN_DECAY o) const {
    const SlotDesc& W = matrix(o.W);
    matrix(o.colrate, 1, W.cols), matrix(o.dW, W.rows, W.cols);
  }

  void operands(op::GRAM o) const { square(o.out, matrix(o.W).cols); }

  void operands(op::SLOPES o) const { segment(o.out, op_[o.column], batch(o.saved).cols); }

  void operands(op::JACOBIAN o) const {
    const index_t units = slot(o.gram).rows;
    square(o.gram, units);
    index_t before = units, columns = in_lanes(units), size = units * padded(units);
    for (Slot W : {o.W2, o.W3, o.W4}) {
      if (!has(W)) break;
      const index_t width = slot(W).cols;
      matrix(W, before, width);
      columns += in_lanes(width), size += width * padded(before);
      before = width;
    }
    require(has(o.W3) || !has(o.W4), "operand W3 is missing");
    batch(o.slopes, columns), maybe_batch(o.weight, 1), batch(o.dslopes, columns), batch(o.rowpenalty, 1);
    grains(o.partial, size);
    together(o.noisy, o.dnoisy), maybe_batch(o.noisy, columns), maybe_batch(o.dnoisy, columns);
    require(op_[o.strength] >= 0, "strength is negative");
  }

  void operands(op::CURVES o) const {
    const index_t n = batch(o.saved).cols;
    segment(o.dslopes, op_[o.column], n), batch(o.dz, n);
  }

  void operands(op::GRAIN_SUM o) const {
    const SlotDesc& out = matrix(o.out);
    const bool turned = op_[o.form] == 1;
    require(op_[o.form] || out.rows == out.cols, "a symmetric out must be square");
    sums(o.partial, op_[o.column], turned ? out.cols : out.rows, turned ? out.rows : out.cols);
  }

  void operands(op::GRAM_WGRAD o) const {
    const SlotDesc& W = matrix(o.W);
    square(o.dgram, W.cols), matrix(o.dW, W.rows, W.cols);
  }

  void operands(op::PROBE o) const { batch(o.out); }

  void operands(op::TANGENT o) const {
    const index_t n = batch(o.x).cols;
    segment(o.slopes, op_[o.column], n), batch(o.out, n);
  }

  void operands(op::SQUARED_NORM o) const { batch(o.x), maybe_batch(o.weight, 1), batch(o.rowpenalty, 1); }

  void operands(op::COTANGENT o) const {
    const index_t n = batch(o.x).cols;
    batch(o.dout, n), segment(o.slopes, op_[o.column], n), segment(o.dslopes, op_[o.column], n);
  }

  void operands(op::DRAW o) const { rows_for_batch(o.mean, batch(o.out).cols); }

  void operands(op::CONTRAST o) const {
    const index_t n = batch(o.x).cols;
    batch(o.y, n), maybe_batch(o.weight, 1), batch(o.out, n);
  }

  void operands(op::KEEP o) const { rows_for_batch(o.out, batch(o.x).cols); }

  void operands(op::CONVOLVE o) const {
    const ConvGeometry g = convolution(o);
    const index_t n = outputs(o, o.out).cols;
    inputs(o, o.x), maybe_batch(o.pre, n);
    matrix(o.W, g.taps() * op_[o.c], op_[o.filters]), maybe_matrix(o.b, 1, op_[o.filters]);
  }

  void operands(op::CONV_DGRAD o) const {
    const ConvGeometry g = convolution(o);
    outputs(o, o.dz), inputs(o, o.saved), inputs(o, o.out);
    matrix(o.W, g.taps() * op_[o.c], op_[o.filters]);
  }

  void operands(op::CONV_WGRAD o) const {
    const ConvGeometry g = convolution(o);
    inputs(o, o.x), outputs(o, o.dz);
    const index_t ld = padded(op_[o.filters]), rows = g.taps() * op_[o.c] + 1;
    require(rows <= MAX_EXTENT / ld, "the weight is out of range");
    grains(o.partial, rows * ld);
  }

  void operands(op::MAXPOOL o) const { pooling(o, o.x, o.out); }

  void operands(op::MAXPOOL_DGRAD o) const {
    pooling(o, o.out, o.dout);
    const index_t n = slot(o.out).cols;
    batch(o.x, n), batch(o.saved, n);
  }

  void operands(op::GRAIN_UPDATE o) const {
    const SlotDesc& W = updated_weight(o, slot(o.W).rows, slot(o.W).cols);
    sums(o.partial, op_[o.column], W.rows, W.cols);
  }

  void operands(op::MAXPOOL_PICK o) const {
    pooling(o, o.x, o.out);
    batch(o.y, slot(o.x).cols);
  }

  void operands(op::SPARSE_DENSE o) const {
    const index_t n_in = slot(o.W).rows, n_out = batch(o.out).cols;
    matrix(o.W, n_in, n_out), matrix(o.b, 1, n_out), maybe_batch(o.pre, n_out);
    maybe_batch(o.size_sum, 1), maybe_matrix(o.shift, 1, n_in);
  }

  void operands(op::SPARSE_WGRAD o) const {
    const index_t n_in = slot(o.dW).rows;
    matrix(o.dW, n_in, batch(o.dz).cols);
    maybe_batch(o.size_sum, 1), maybe_matrix(o.shift, 1, n_in);
  }

  void operands(op::SPARSE_WGRAD_UPDATE o) const {
    const SlotDesc& W = updated_weight(o, slot(o.W).rows, batch(o.dz).cols);
    maybe_matrix(o.dW, W.rows, W.cols), maybe_matrix(o.colrate, 1, W.cols);
    maybe_batch(o.size_sum, 1), maybe_matrix(o.shift, 1, W.rows);
  }

  void operands(op::WEIGHT_GRAM o) const {
    const SlotDesc& W = matrix(o.W);
    matrix(o.b, 1, W.cols), square(o.high, W.rows + 1), square(o.low, W.rows + 1);
  }

  void operands(op::SPARSE_MSE o) const {
    const index_t inner = batch(o.h).cols, n = slot(o.W).cols, learned = batch(o.out).cols;
    matrix(o.W, inner, n), matrix(o.b, 1, n), square(o.high, inner + 1), square(o.low, inner + 1);
    batch(o.saved, learned), maybe_batch(o.weight, 1), batch(o.rowloss, 1);
    if (learned > inner) misfit(o.out, "at most " + text(inner) + " columns");
  }

  void operands(op::ROW_GRAM o) const { maybe_batch(o.weight, 1), square(o.out, batch(o.h).cols + 1); }

  void operands(op::SPARSE_MSE_WGRAD o) const {
    const index_t inner = batch(o.h).cols, n = slot(o.W).cols;
    matrix(o.W, inner, n), matrix(o.b, 1, n), square(o.gram, inner + 1), maybe_batch(o.weight, 1);
    matrix(o.dW, inner, n), matrix(o.db, 1, n);
  }

  void operands(op::SPARSE_MSE_UPDATE o) const {
    const SlotDesc& W = updated_weight(o, batch(o.h).cols, slot(o.W).cols);
    parameter(o.b, o.b_moment1, o.b_moment2, op_[o.solver], 1, W.cols);
    square(o.gram, W.rows + 1), maybe_batch(o.weight, 1), maybe_matrix(o.shift, 1, W.cols);
  }

  void operands(op::SIZE_SUM o) const { batch(o.out, 1); }

  void operands(op::LOG_NORMALIZE o) const { batch(o.x), batch(o.size_sum, 1); }

  void operands(op::COUNTS o) const {
    const SlotDesc& z = batch(o.z);
    const int loss = op_[o.loss], columns = count_columns(op_);
    require(loss == LOSS_POISSON || loss == LOSS_NB || loss == LOSS_ZINB, "the loss is no likelihood of counts");
    require(loss != LOSS_POISSON || !op_[o.by_cell], "poisson has no dispersion");
    counts_link(op_[o.activation]);
    if (z.cols % columns) misfit(o.z, text(columns) + " columns for each feature");
    const index_t n = z.cols / columns;
    maybe_batch(o.weight, 1), batch(o.size_sum, 1), batch(o.rowloss, 1);
    const bool shared = loss != LOSS_POISSON && !op_[o.by_cell];
    require(has(o.log_dispersion) == shared && has(o.partial) == shared,
            "operands log_dispersion and partial do not fit the loss");
    if (shared) matrix(o.log_dispersion, 1, n), grains(o.partial, padded(n));
  }

  void operands(op::MEANS o) const {
    const index_t n = batch(o.z).cols;
    maybe_batch(o.size_sum, 1);
    if (batch(o.out).cols > n) misfit(o.out, "at most " + text(n) + " columns");
    counts_link(op_[o.activation]);
  }

  void operands(op::SHIFT o) const {
    const SlotDesc& out = matrix(o.out, 1, slot(o.out).cols);
    maybe_matrix(o.b, 1, out.cols);
  }

  void operands(op::CONDITION o) const {
    const index_t n = batch(o.z).cols;
    if (batch(o.out).cols <= n) misfit(o.out, "more than " + text(n) + " columns");
  }

  const PlanDesc& plan_;
  const OpDesc& op_;
  size_t position_;
};

}  // namespace

void validate(const PlanDesc& plan) {
  auto require = [](bool ok, const std::string& what) {
    if (!ok) throw std::invalid_argument("plan: " + what);
  };
  require(plan.batch >= 1 && plan.batch < MAX_DIM, "batch " + text(plan.batch) + " is out of range");
  require(plan.moments == 1 || plan.moments == 2, "moments " + text(plan.moments) + " must be 1 or 2");
  for (index_t size : {plan.parameter_size, plan.work_size})
    require(size >= 0 && size <= MAX_EXTENT && size % LANES == 0,
            "region of " + text(size) + " elements is out of range");
  for (size_t i = 0; i < plan.slots.size(); ++i) {
    const SlotDesc& s = plan.slots[i];
    const std::string name = "slot " + text(index_t(i)) + " " + shape(s);
    require(
        s.region >= REGION_PARAMETER && s.region <= REGION_SCRATCH && (s.region != REGION_MOMENT2 || plan.moments == 2),
        name + ": unknown region");
    require(s.rows >= 1 && s.cols >= 1 && s.rows < MAX_DIM && s.cols < MAX_DIM && s.rows <= MAX_EXTENT / s.ld(),
            name + ": shape is out of range");
    require(s.region != REGION_BATCH || s.rows == plan.batch,
            name + ": a batch slot has as many rows as the batch, " + text(plan.batch));
    const index_t extent = s.region < REGION_BATCH ? plan.parameter_size : plan.work_size;
    require(s.offset >= 0 && s.offset % LANES == 0 && s.offset <= extent && s.size() <= extent - s.offset,
            name + ": offset " + text(s.offset) + " leaves its region of " + text(extent));
  }
  for (size_t i = 0; i < plan.ops.size(); ++i) Check(plan, i).run();
}

}  // namespace narrows
