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
        require(slot == -1, "slot " + text(slot) + " stands behind the last operand");
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
  // The weight of O, whose update decays it.
  template <class O>
  const SlotDesc& updated_weight(index_t rows, index_t cols) const {
    parameter(O::W, O::moment1, O::moment2, op_[O::solver], rows, cols);
    const SlotDesc& W = slot(O::W);
    require(has(O::penalty) || (op_[O::l2] == 0 && op_[O::l1] == 0), "operand penalty is missing");
    if (has(O::penalty)) cells(O::penalty, W);
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
  const SlotDesc& inputs(Slot i) const {
    return images(i, op_[O::h], op_[O::w], op_[O::c]);
  }
  template <class O>
  const SlotDesc& outputs(Slot i) const {
    return images(i, op_[O::out_h], op_[O::out_w], op_[O::filters]);
  }
  // The geometry of a convolution: windows begin inside the wide image, and its planes can be held in memory.
  template <class O>
  ConvGeometry convolution() const {
    for (Int i : {O::h, O::w, O::c, O::out_h, O::out_w, O::filters, O::ky, O::kx, O::sy, O::sx, O::uy, O::ux})
      require(op_[i] < MAX_SIDE, std::string(OPS[op_.code].ints[int(i)].name) + " is out of range");
    require(!op_[O::transposed] || (op_[O::uy] == 1 && op_[O::ux] == 1),
            "a transposed convolution takes no upsampling");
    const ConvGeometry g = conv_geometry(op_.ints + int(O::h));
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
  void pooling(Slot whole, Slot windows) const {
    require(op_[O::h] % op_[O::pool_y] == 0 && op_[O::w] % op_[O::pool_x] == 0, "windows do not divide the image");
    inputs<O>(whole);
    images(windows, op_[O::h] / op_[O::pool_y], op_[O::w] / op_[O::pool_x], op_[O::c]);
  }

  void counts_link(int activation) const {
    require(activation == ACT_SOFTMAX || activation == ACT_EXP,
            "activation=" + text(activation) + " is no link of a likelihood of counts");
  }

  // --- one function for each op ---

  void operands(op::GATHER) const {
    using O = op::GATHER;
    const SlotDesc& out = batch(O::out);
    require(op_[O::source] != SOURCE_WEIGHT || out.cols == 1, "sample weights have one column");
    maybe_matrix(O::shift, 1, out.cols);
  }

  void operands(op::CORRUPT) const {
    using O = op::CORRUPT;
    batch(O::x);
    require(op_[O::level] >= 0 && (op_[O::kind] == CORRUPT_GAUSSIAN || op_[O::level] <= 1), "level is out of range");
  }

  void operands(op::DENSE) const {
    using O = op::DENSE;
    const index_t n_in = batch(O::x).cols, n_out = batch(O::out).cols;
    matrix(O::W, op_[O::transposed] ? n_out : n_in, op_[O::transposed] ? n_in : n_out);
    matrix(O::b, 1, n_out), maybe_batch(O::pre, n_out);
  }

  void operands(op::DROPOUT) const {
    using O = op::DROPOUT;
    batch(O::x);
    require(op_[O::rate] >= 0 && op_[O::rate] < 1, "rate is outside [0, 1)");
  }

  void operands(op::LINK) const {
    using O = op::LINK;
    batch(O::z);
  }

  void operands(op::LOSS) const {
    using O = op::LOSS;
    batch(O::target, batch(O::z).cols), maybe_batch(O::weight, 1), batch(O::rowloss, 1);
  }

  void operands(op::WGRAD) const {
    using O = op::WGRAD;
    matrix(O::dW, batch(O::x).cols, batch(O::dz).cols);
  }

  void operands(op::COLSUM) const {
    using O = op::COLSUM;
    matrix(O::out, 1, batch(O::x).cols), maybe_batch(O::weight, 1);
  }

  void operands(op::DGRAD) const {
    using O = op::DGRAD;
    const index_t from = batch(O::dz).cols, to = batch(O::out).cols;
    batch(O::saved, to);
    if (op_[O::transposed]) {
      matrix(O::W, from, to);
    } else {
      const SlotDesc& W = matrix(O::W);
      if (W.rows < to || W.cols != from) misfit(O::W, "at least " + text(to) + " rows and " + text(from) + " columns");
    }
  }

  void operands(op::ACTIVITY_L1) const {
    using O = op::ACTIVITY_L1;
    const index_t n = batch(O::a).cols;
    batch(O::saved, n), maybe_batch(O::weight, 1), batch(O::dz, n), batch(O::rowpenalty, 1);
  }

  void operands(op::KL_SPARSITY) const {
    using O = op::KL_SPARSITY;
    const index_t n = batch(O::saved).cols;
    matrix(O::mean, 1, n), maybe_batch(O::weight, 1), batch(O::dz, n), matrix(O::penalty, 1, n);
    require(op_[O::target] > 0 && op_[O::target] < 1, "target must lie between 0 and 1");
  }

  void operands(op::DECAY) const {
    using O = op::DECAY;
    const SlotDesc& W = matrix(O::W);
    matrix(O::dW, W.rows, W.cols), cells(O::penalty, W);
  }

  void operands(op::REDUCE) const {
    using O = op::REDUCE;
    if (has(O::weight)) batch(O::weight, 1), batch(O::x, 1);
    const SlotDesc& terms = matrix(O::terms, 1, slot(O::terms).cols);
    require(op_[O::index] >= 0 && op_[O::index] < terms.cols,
            "index=" + text(op_[O::index]) + " is outside the " + text(terms.cols) + " terms");
  }

  void operands(op::SQNORM) const {
    using O = op::SQNORM;
    matrix(O::partial, 1, (plan_.parameter_size + GRAIN - 1) / GRAIN);
  }

  void operands(op::SHRINK) const {
    using O = op::SHRINK;
    lies_in(O::W, REGION_PARAMETER, "parameters");
  }

  void operands(op::UPDATE) const {
    using O = op::UPDATE;
    maybe_matrix(O::partial, 1, (plan_.parameter_size + GRAIN - 1) / GRAIN);
    require(op_[O::solver] == SOLVER_SGD || plan_.moments == 2, "the solver needs two moments");
  }

  void operands(op::WGRAD_UPDATE) const {
    using O = op::WGRAD_UPDATE;
    const SlotDesc& W = updated_weight<O>(batch(O::x).cols, batch(O::dz).cols);
    maybe_matrix(O::dW, W.rows, W.cols), maybe_matrix(O::colrate, 1, W.cols);
  }

  void operands(op::COLSUM_UPDATE) const {
    using O = op::COLSUM_UPDATE;
    const index_t n = batch(O::x).cols;
    parameter(O::b, O::moment1, O::moment2, op_[O::solver], 1, n);
    maybe_matrix(O::db, 1, n);
  }

  void operands(op::SAMPLE) const {
    using O = op::SAMPLE;
    const index_t n = batch(O::z).cols;
    batch(O::noise, n), batch(O::stats, 2 * n);
  }

  void operands(op::LATENT_KL) const {
    using O = op::LATENT_KL;
    const index_t n = batch(O::noise).cols;
    batch(O::stats, 2 * n), maybe_batch(O::weight, 1), batch(O::dz, n), batch(O::dstats, 2 * n), batch(O::rowkl, 1);
  }

  void operands(op::GAUSSIAN) const {
    using O = op::GAUSSIAN;
    const index_t n = batch(O::z).cols;
    batch(O::target, n), maybe_batch(O::weight, 1), matrix(O::logvar, 1, n);
    batch(O::rowloss, 1), batch(O::rates, n);
  }

  void operands(op::CONTRACTIVE) const {
    using O = op::CONTRACTIVE;
    const index_t n = batch(O::saved).cols;
    matrix(O::W, slot(O::W).rows, n), maybe_batch(O::weight, 1), batch(O::dz, n);
    matrix(O::colrate, 1, n), matrix(O::penalty, 1, n);
    together(O::noisy, O::dnoisy), maybe_batch(O::noisy, n), maybe_batch(O::dnoisy, n);
  }

  void operands(op::COLUMN_DECAY) const {
    using O = op::COLUMN_DECAY;
    const SlotDesc& W = matrix(O::W);
    matrix(O::colrate, 1, W.cols), matrix(O::dW, W.rows, W.cols);
  }

  void operands(op::GRAM) const {
    using O = op::GRAM;
    square(O::out, matrix(O::W).cols);
  }

  void operands(op::SLOPES) const {
    using O = op::SLOPES;
    segment(O::out, op_[O::column], batch(O::saved).cols);
  }

  void operands(op::JACOBIAN) const {
    using O = op::JACOBIAN;
    const index_t units = slot(O::gram).rows;
    square(O::gram, units);
    index_t before = units, columns = in_lanes(units), size = units * padded(units);
    for (Slot W : {O::W2, O::W3, O::W4}) {
      if (!has(W)) break;
      const index_t width = slot(W).cols;
      matrix(W, before, width);
      columns += in_lanes(width), size += width * padded(before);
      before = width;
    }
    require(has(O::W3) || !has(O::W4), "operand W3 is missing");
    batch(O::slopes, columns), maybe_batch(O::weight, 1), batch(O::dslopes, columns), batch(O::rowpenalty, 1);
    grains(O::partial, size);
    together(O::noisy, O::dnoisy), maybe_batch(O::noisy, columns), maybe_batch(O::dnoisy, columns);
    require(op_[O::strength] >= 0, "strength is negative");
  }

  void operands(op::CURVES) const {
    using O = op::CURVES;
    const index_t n = batch(O::saved).cols;
    segment(O::dslopes, op_[O::column], n), batch(O::dz, n);
  }

  void operands(op::GRAIN_SUM) const {
    using O = op::GRAIN_SUM;
    const SlotDesc& out = matrix(O::out);
    const bool turned = op_[O::form] == 1;
    require(op_[O::form] || out.rows == out.cols, "a symmetric out must be square");
    sums(O::partial, op_[O::column], turned ? out.cols : out.rows, turned ? out.rows : out.cols);
  }

  void operands(op::GRAM_WGRAD) const {
    using O = op::GRAM_WGRAD;
    const SlotDesc& W = matrix(O::W);
    square(O::dgram, W.cols), matrix(O::dW, W.rows, W.cols);
  }

  void operands(op::PROBE) const {
    using O = op::PROBE;
    batch(O::out);
  }

  void operands(op::TANGENT) const {
    using O = op::TANGENT;
    const index_t n = batch(O::x).cols;
    segment(O::slopes, op_[O::column], n), batch(O::out, n);
  }

  void operands(op::SQUARED_NORM) const {
    using O = op::SQUARED_NORM;
    batch(O::x), maybe_batch(O::weight, 1), batch(O::rowpenalty, 1);
  }

  void operands(op::COTANGENT) const {
    using O = op::COTANGENT;
    const index_t n = batch(O::x).cols;
    batch(O::dout, n), segment(O::slopes, op_[O::column], n), segment(O::dslopes, op_[O::column], n);
  }

  void operands(op::DRAW) const {
    using O = op::DRAW;
    rows_for_batch(O::mean, batch(O::out).cols);
  }

  void operands(op::CONTRAST) const {
    using O = op::CONTRAST;
    const index_t n = batch(O::x).cols;
    batch(O::y, n), maybe_batch(O::weight, 1), batch(O::out, n);
  }

  void operands(op::KEEP) const {
    using O = op::KEEP;
    rows_for_batch(O::out, batch(O::x).cols);
  }

  void operands(op::CONVOLVE) const {
    using O = op::CONVOLVE;
    const ConvGeometry g = convolution<O>();
    const index_t n = outputs<O>(O::out).cols;
    inputs<O>(O::x), maybe_batch(O::pre, n);
    matrix(O::W, g.taps() * op_[O::c], op_[O::filters]), maybe_matrix(O::b, 1, op_[O::filters]);
  }

  void operands(op::CONV_DGRAD) const {
    using O = op::CONV_DGRAD;
    const ConvGeometry g = convolution<O>();
    outputs<O>(O::dz), inputs<O>(O::saved), inputs<O>(O::out);
    matrix(O::W, g.taps() * op_[O::c], op_[O::filters]);
  }

  void operands(op::CONV_WGRAD) const {
    using O = op::CONV_WGRAD;
    const ConvGeometry g = convolution<O>();
    inputs<O>(O::x), outputs<O>(O::dz);
    const index_t ld = padded(op_[O::filters]), rows = g.taps() * op_[O::c] + 1;
    require(rows <= MAX_EXTENT / ld, "the weight is out of range");
    grains(O::partial, rows * ld);
  }

  void operands(op::MAXPOOL) const {
    using O = op::MAXPOOL;
    pooling<O>(O::x, O::out);
  }

  void operands(op::MAXPOOL_DGRAD) const {
    using O = op::MAXPOOL_DGRAD;
    pooling<O>(O::out, O::dout);
    const index_t n = slot(O::out).cols;
    batch(O::x, n), batch(O::saved, n);
  }

  void operands(op::GRAIN_UPDATE) const {
    using O = op::GRAIN_UPDATE;
    const SlotDesc& W = updated_weight<O>(slot(O::W).rows, slot(O::W).cols);
    sums(O::partial, op_[O::column], W.rows, W.cols);
  }

  void operands(op::MAXPOOL_PICK) const {
    using O = op::MAXPOOL_PICK;
    pooling<O>(O::x, O::out);
    batch(O::y, slot(O::x).cols);
  }

  void operands(op::SPARSE_DENSE) const {
    using O = op::SPARSE_DENSE;
    const index_t n_in = slot(O::W).rows, n_out = batch(O::out).cols;
    matrix(O::W, n_in, n_out), matrix(O::b, 1, n_out), maybe_batch(O::pre, n_out);
    maybe_batch(O::size_sum, 1), maybe_matrix(O::shift, 1, n_in);
  }

  void operands(op::SPARSE_WGRAD) const {
    using O = op::SPARSE_WGRAD;
    const index_t n_in = slot(O::dW).rows;
    matrix(O::dW, n_in, batch(O::dz).cols);
    maybe_batch(O::size_sum, 1), maybe_matrix(O::shift, 1, n_in);
  }

  void operands(op::SPARSE_WGRAD_UPDATE) const {
    using O = op::SPARSE_WGRAD_UPDATE;
    const SlotDesc& W = updated_weight<O>(slot(O::W).rows, batch(O::dz).cols);
    maybe_matrix(O::dW, W.rows, W.cols), maybe_matrix(O::colrate, 1, W.cols);
    maybe_batch(O::size_sum, 1), maybe_matrix(O::shift, 1, W.rows);
  }

  void operands(op::WEIGHT_GRAM) const {
    using O = op::WEIGHT_GRAM;
    const SlotDesc& W = matrix(O::W);
    matrix(O::b, 1, W.cols), square(O::high, W.rows + 1), square(O::low, W.rows + 1);
  }

  void operands(op::SPARSE_MSE) const {
    using O = op::SPARSE_MSE;
    const index_t inner = batch(O::h).cols, n = slot(O::W).cols, learned = batch(O::out).cols;
    matrix(O::W, inner, n), matrix(O::b, 1, n), square(O::high, inner + 1), square(O::low, inner + 1);
    batch(O::saved, learned), maybe_batch(O::weight, 1), batch(O::rowloss, 1);
    if (learned > inner) misfit(O::out, "at most " + text(inner) + " columns");
  }

  void operands(op::ROW_GRAM) const {
    using O = op::ROW_GRAM;
    maybe_batch(O::weight, 1), square(O::out, batch(O::h).cols + 1);
  }

  void operands(op::SPARSE_MSE_WGRAD) const {
    using O = op::SPARSE_MSE_WGRAD;
    const index_t inner = batch(O::h).cols, n = slot(O::W).cols;
    matrix(O::W, inner, n), matrix(O::b, 1, n), square(O::gram, inner + 1), maybe_batch(O::weight, 1);
    matrix(O::dW, inner, n), matrix(O::db, 1, n);
  }

  void operands(op::SPARSE_MSE_UPDATE) const {
    using O = op::SPARSE_MSE_UPDATE;
    const SlotDesc& W = updated_weight<O>(batch(O::h).cols, slot(O::W).cols);
    parameter(O::b, O::b_moment1, O::b_moment2, op_[O::solver], 1, W.cols);
    square(O::gram, W.rows + 1), maybe_batch(O::weight, 1), maybe_matrix(O::shift, 1, W.cols);
  }

  void operands(op::SIZE_SUM) const {
    using O = op::SIZE_SUM;
    batch(O::out, 1);
  }

  void operands(op::LOG_NORMALIZE) const {
    using O = op::LOG_NORMALIZE;
    batch(O::x), batch(O::size_sum, 1);
  }

  void operands(op::COUNTS) const {
    using O = op::COUNTS;
    const SlotDesc& z = batch(O::z);
    const int loss = op_[O::loss], columns = count_columns(op_);
    require(loss == LOSS_POISSON || loss == LOSS_NB || loss == LOSS_ZINB, "the loss is no likelihood of counts");
    require(loss != LOSS_POISSON || !op_[O::by_cell], "poisson has no dispersion");
    counts_link(op_[O::activation]);
    if (z.cols % columns) misfit(O::z, text(columns) + " columns for each feature");
    const index_t n = z.cols / columns;
    maybe_batch(O::weight, 1), batch(O::size_sum, 1), batch(O::rowloss, 1);
    const bool shared = loss != LOSS_POISSON && !op_[O::by_cell];
    require(has(O::log_dispersion) == shared && has(O::partial) == shared,
            "operands log_dispersion and partial do not fit the loss");
    if (shared) matrix(O::log_dispersion, 1, n), grains(O::partial, padded(n));
  }

  void operands(op::MEANS) const {
    using O = op::MEANS;
    const index_t n = batch(O::z).cols;
    maybe_batch(O::size_sum, 1);
    if (batch(O::out).cols > n) misfit(O::out, "at most " + text(n) + " columns");
    counts_link(op_[O::activation]);
  }

  void operands(op::SHIFT) const {
    using O = op::SHIFT;
    const SlotDesc& out = matrix(O::out, 1, slot(O::out).cols);
    maybe_matrix(O::b, 1, out.cols);
  }

  void operands(op::CONDITION) const {
    using O = op::CONDITION;
    const index_t n = batch(O::z).cols;
    if (batch(O::out).cols <= n) misfit(O::out, "more than " + text(n) + " columns");
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
