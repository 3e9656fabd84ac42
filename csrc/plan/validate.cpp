// Validation of plans as hostile input, and the one table of its error messages.

#include "plan/plan.h"

#include <cmath>
#include <stdexcept>

#include "plan/geometry.h"

namespace narrows {

const OpInfo OPS[OP_COUNT] = {
#define X(name, ...) {#name, __VA_ARGS__},
    NARROWS_OPS(X)
#undef X
};

namespace {

constexpr index_t MAX_EXTENT = index_t(1) << 40;  // elements; keeps every product of sizes below 2**63
constexpr index_t MAX_DIM = index_t(1) << 31;
constexpr int32_t MAX_EXTENT_INT = 1 << 30;

std::string shape(const SlotDesc& s) { return "(" + std::to_string(s.rows) + ", " + std::to_string(s.cols) + ")"; }

// The checks of one op; each names the op's position, its kind and the operand.
class Check {
 public:
  Check(const PlanDesc& plan, size_t position) : plan_(plan), op_(plan.ops[position]), position_(position) {}

  void run() const {
    require(op_.code >= 0 && op_.code < OP_COUNT, "op code " + std::to_string(op_.code) + " is unknown");
    const OpInfo& counts = OPS[op_.code];
    require(op_.modes > 0 && op_.modes < 1 << MODE_BITS, "modes " + std::to_string(op_.modes) + " are out of range");
    for (int i = 0; i < MAX_SLOTS; ++i) {
      const int s = op_.slots[i];
      require(s >= -1 && s < (i < counts.slots ? index_t(plan_.slots.size()) : 0),
              "operand " + std::to_string(i) + " is slot " + std::to_string(s) + " of " +
                  std::to_string(plan_.slots.size()));
    }
    for (int i = 0; i < counts.floats; ++i)
      require(std::isfinite(op_.floats[i]), "attribute " + std::to_string(i) + " is not finite");
    operands();
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
  bool has(int i) const { return op_.slots[i] >= 0; }
  const SlotDesc& slot(int i, const char* role) const {
    require(has(i), std::string(role) + " is missing");
    return plan_.slots[size_t(op_.slots[i])];
  }
  const SlotDesc& batch(int i, const char* role, index_t cols = -1) const {
    const SlotDesc& s = slot(i, role);
    require(s.region == REGION_BATCH, std::string(role) + " must be a batch slot");
    require(cols < 0 || s.cols == cols,
            std::string(role) + " has shape " + shape(s) + ", expected " + std::to_string(cols) + " columns");
    return s;
  }
  const SlotDesc& exact(int i, const char* role, index_t rows, index_t cols) const {
    const SlotDesc& s = slot(i, role);
    require(s.region != REGION_BATCH && s.rows == rows && s.cols == cols, std::string(role) + " has shape " + shape(s) +
                                                                              ", expected (" + std::to_string(rows) +
                                                                              ", " + std::to_string(cols) + ")");
    return s;
  }
  void cells(int i, const char* role, const SlotDesc& W) const {
    exact(i, role, (W.rows + CELL_ROWS - 1) / CELL_ROWS, (W.cols + LANES - 1) / LANES);
  }
  // Operand i is a parameter, and those after it are its optimiser state.
  const SlotDesc& parameter(int i, index_t rows, index_t cols) const {
    const SlotDesc& W = exact(i, "parameter", rows, cols);
    require(W.region == REGION_PARAMETER, "parameter lies in another region");
    range(op_.ints[0], SOLVER_COUNT, "solver");
    require(exact(i + 1, "moment1", rows, cols).region == REGION_MOMENT1, "moment1 lies in another region");
    require(has(i + 2) == (op_.ints[0] != SOLVER_SGD), "moment2 does not fit the solver");
    if (has(i + 2))
      require(exact(i + 2, "moment2", rows, cols).region == REGION_MOMENT2, "moment2 lies in another region");
    return W;
  }
  // A row, at least, for each row of the batch.
  void chains(int i, const char* role, index_t cols) const {
    const SlotDesc& s = slot(i, role);
    require(s.cols == cols && s.rows >= plan_.batch, std::string(role) + " has shape " + shape(s) + ", expected " +
                                                         std::to_string(cols) + " columns and a row for each of " +
                                                         std::to_string(plan_.batch));
  }
  void weight(int i) const {
    if (has(i)) batch(i, "weight", 1);
  }
  void level(double p) const { require(p >= 0 && p <= 1, "level is out of range"); }
  void distinct(int i, int j, const char* what) const {
    require(op_.slots[i] != op_.slots[j], std::string(what) + " must be different slots");
  }
  void all_distinct() const {
    for (int i = 0; i < MAX_SLOTS; ++i)
      for (int j = 0; j < i; ++j)
        if (has(i)) distinct(i, j, "operands");
  }
  static index_t segment_of(index_t cols) { return (cols + LANES - 1) / LANES * LANES; }
  // Columns of a batch slot, as many as a slot of `cols` takes.
  void segment(int i, const char* role, index_t column, index_t cols) const {
    const SlotDesc& s = batch(i, role);
    require(column >= 0 && column % LANES == 0 && column <= s.cols && segment_of(cols) <= s.cols - column,
            std::string(role) + " has no room for " + std::to_string(cols) + " columns from " + std::to_string(column));
  }
  void jacobian() const {
    const SlotDesc& gram = slot(2, "gram");
    exact(2, "gram", gram.rows, gram.rows);
    index_t before = gram.rows, columns = segment_of(before), size = before * padded(before);
    for (int i = 3; i < 2 + JACOBIAN_LAYERS; ++i) {
      if (i > 3 && !has(i)) break;
      const index_t width = slot(i, "weight").cols;
      exact(i, "weight", before, width);
      columns += segment_of(width), size += width * padded(before);
      before = width;
    }
    require(has(4) || !has(5), "W3 is missing");
    batch(0, "slopes", columns), weight(6), batch(7, "dslopes", columns), batch(10, "rowpenalty", 1);
    exact(8, "partial", slot(8, "partial").rows, size);
    require(has(1) == has(9), "noisy and dnoisy belong together");
    if (has(1)) batch(1, "noisy", columns), batch(9, "dnoisy", columns);
    flag(op_.ints[0], "accumulate");
    require(op_.floats[0] >= 0, "strength is negative");
    // Weights are read alone, and may be the same.
    for (int i = 7; i < 11; ++i)
      for (int j = 0; j < i; ++j)
        if (has(i)) distinct(i, j, "what is written and another operand");
  }
  // A matrix, row by row, in the columns of partial sums from `column` on.
  void held(const SlotDesc& partial, index_t column, index_t rows, index_t cols) const {
    require(
        column >= 0 && column % LANES == 0 && column <= partial.cols && rows <= (partial.cols - column) / padded(cols),
        "column " + std::to_string(column) + " leaves no room for out");
  }
  void positive(const int32_t* values, int n) const {
    for (int i = 0; i < n; ++i)
      require(values[i] >= 1, "attribute " + std::to_string(values + i - op_.ints) + " must be positive, not " +
                                  std::to_string(values[i]));
  }
  // A slot of images whose height, width and channels, all positive, are given.
  const SlotDesc& image(int i, const char* role, const int32_t* size) const {
    const SlotDesc& s = batch(i, role);
    const index_t pixels = index_t(size[0]) * size[1];
    require(pixels <= s.cols && pixels * size[2] == s.cols,
            std::string(role) + " has shape " + shape(s) + ", expected images of " + std::to_string(size[0]) + " x " +
                std::to_string(size[1]) + " x " + std::to_string(size[2]));
    return s;
  }
  // The geometry of a convolution: windows begin inside the wide image, and its planes can be held.
  ConvGeometry convolution(const int32_t* ints) const {
    positive(ints, 10), positive(ints + 12, 2);
    flag(ints[14], "transposed"), range(ints[15], 4, "layout");
    require(!ints[14] || (ints[12] == 1 && ints[13] == 1), "a transposed convolution takes no upsampling");
    for (int i = 0; i < 10; ++i) require(ints[i] < MAX_EXTENT_INT, "a size is out of range");
    require(ints[12] < MAX_EXTENT_INT && ints[13] < MAX_EXTENT_INT, "upsampling is out of range");
    const ConvGeometry g = conv_geometry(ints);
    double elements = double(g.wide_channels) + double(g.narrow_channels);
    for (const ConvAxis& a : {g.y, g.x}) {
      require(a.pad >= 0 && a.pad < a.kernel, "padding " + std::to_string(a.pad) + " does not fit the kernel");
      require(a.stride <= (a.kernel > a.wide ? a.kernel : a.wide), "a stride is larger than image and kernel");
      require((a.narrow - 1) * a.stride - a.pad < a.wide, "a window begins outside the image");
      require(a.wide + a.pad - (a.narrow - 1) * a.stride - a.kernel < a.stride, "windows end before the image");
      elements *= double(a.wide) + 2 * double(a.kernel) + 2 * double(a.stride);
    }
    require(elements < double(index_t(1) << 28), "images are out of range");
    return g;
  }
  // Operand i, if there is one, holds the sums of rows that are normalised to `scale`.
  void normalized(int i, double scale) const {
    if (has(i)) batch(i, "library", 1), require(scale > 0, "scale must be positive");
  }
  // Operand i, if there is one, is a number for each feature.
  void shifted(int i, index_t features) const {
    if (has(i)) exact(i, "shift", 1, features);
  }
  void counts_link(int activation) const {
    require(activation == ACT_SOFTMAX || activation == ACT_EXP,
            "activation " + std::to_string(activation) + " is no link of counts");
  }
  void counts() const {
    const SlotDesc& z = batch(0, "z");
    const int loss = op_.ints[0], by_cell = op_.ints[2], heads = counts_heads(op_);
    require(loss == LOSS_POISSON || loss == LOSS_NB || loss == LOSS_ZINB, "the loss is no likelihood of counts");
    counts_link(op_.ints[1]), flag(by_cell, "by_cell"), range(op_.ints[3], 2, "source");
    require(z.cols % heads == 0, "z has shape " + shape(z) + " for " + std::to_string(heads) + " numbers a feature");
    const index_t n = z.cols / heads;
    const bool shared = loss != LOSS_POISSON && !by_cell;
    require(loss != LOSS_POISSON || !by_cell, "poisson has no dispersion");
    weight(1), batch(2, "library", 1), batch(4, "rowloss", 1);
    require(has(3) == shared && has(5) == shared, "log_dispersion and partial do not fit the loss");
    if (shared) exact(3, "log_dispersion", 1, n), exact(5, "partial", slot(5, "partial").rows, padded(n));
    require(op_.floats[0] > 0, "scale must be positive");
    all_distinct();
  }
  // Of slot `whole`, whose windows are the pixels of slot `windows`.
  void pooling(const int32_t* ints, int whole, int windows) const {
    positive(ints, 5), range(ints[5], 4, "layout");
    require(ints[0] % ints[3] == 0 && ints[1] % ints[4] == 0, "windows do not divide the image");
    const int32_t pooled[] = {ints[0] / ints[3], ints[1] / ints[4], ints[2]};
    image(whole, "images", ints), image(windows, "pooled images", pooled);
    distinct(whole, windows, "images and pooled images");
  }
  // The weight in slot `at`, with `rows` rows, and the bias in slot `bias`; returns the rows.
  index_t layer(int at, index_t rows, int bias) const {
    const SlotDesc& W = slot(at, "W");
    exact(at, "W", rows, W.cols), exact(bias, "b", 1, W.cols);
    return rows;
  }
  // The columns of a slot, or the rows of a weight, of which the first `n` are wanted.
  index_t at_least(int i, const char* role, index_t n) const {
    const SlotDesc& s = slot(i, role);
    const index_t there = s.region == REGION_BATCH ? s.cols : s.rows;
    require(there >= n, std::string(role) + " has shape " + shape(s) + ", expected at least " + std::to_string(n));
    return there;
  }
  void square_of(int i, const char* role, index_t n) const { exact(i, role, n, n); }
  void elementwise(int activation) const {
    require(activation >= 0 && activation < ACT_SOFTMAX,
            "activation " + std::to_string(activation) + " is not elementwise");
  }
  void range(int value, int count, const char* what) const {
    require(value >= 0 && value < count, std::string(what) + " " + std::to_string(value) + " is unknown");
  }
  void flag(int value, const char* what) const { range(value, 2, what); }

  void operands() const {
    const int i0 = op_.ints[0], i1 = op_.ints[1];
    const double* f = op_.floats;
    switch (op_.code) {
      case OP_GATHER:
        range(i0, SOURCE_SHIFT, "source");
        shifted(0, batch(1, "out", i0 == SOURCE_WEIGHT ? 1 : -1).cols);
        break;
      case OP_SHIFT: {
        const SlotDesc& out = slot(1, "out");
        exact(1, "out", 1, out.cols);
        if (has(0)) exact(0, "b", 1, out.cols), distinct(0, 1, "b and out");
        break;
      }
      case OP_CORRUPT:
        range(i0, CORRUPT_COUNT, "corruption");
        require(f[0] >= 0 && (i0 == CORRUPT_GAUSSIAN || f[0] <= 1), "level is out of range");
        batch(0, "x");
        break;
      case OP_DENSE: {
        const SlotDesc &x = batch(0, "x"), &out = batch(3, "out");
        flag(i1, "transposed");
        exact(1, "W", i1 ? out.cols : x.cols, i1 ? x.cols : out.cols);
        exact(2, "b", 1, out.cols);
        if (has(4)) batch(4, "pre", out.cols), distinct(4, 3, "pre and out"), distinct(4, 0, "pre and x");
        distinct(0, 3, "x and out");
        elementwise(i0);
        break;
      }
      case OP_DROPOUT:
        batch(0, "x");
        require(f[0] >= 0 && f[0] < 1, "rate is out of range");
        break;
      case OP_LINK:
        batch(0, "z");
        range(i0, ACT_COUNT, "activation");
        break;
      case OP_LOSS: {
        const SlotDesc& z = batch(0, "z");
        batch(1, "target", z.cols);
        weight(2);
        batch(3, "rowloss", 1);
        distinct(0, 1, "z and target"), distinct(0, 3, "z and rowloss"), distinct(1, 3, "target and rowloss");
        range(i0, LOSS_COUNT, "loss");
        range(i1, ACT_COUNT, "activation");
        require(i0 != LOSS_BCE || i1 == ACT_SIGMOID || i1 == ACT_SOFTMAX, "bce needs sigmoid or softmax");
        require(i0 != LOSS_MULTINOMIAL || i1 == ACT_SOFTMAX, "multinomial needs softmax");
        require(i0 < LOSS_GAUSSIAN, "the loss has an op of its own");
        require(f[0] > 0, "delta must be positive");
        break;
      }
      case OP_WGRAD: {
        const SlotDesc &x = batch(0, "x"), &dz = batch(1, "dz");
        exact(2, "dW", x.cols, dz.cols);
        flag(i0, "accumulate");
        break;
      }
      case OP_COLSUM:
        exact(2, "out", 1, batch(0, "x").cols);
        weight(1);
        flag(i0, "mean"), flag(i1, "accumulate");
        distinct(0, 2, "x and out");
        break;
      case OP_DGRAD: {
        const SlotDesc &dz = batch(0, "dz"), &out = batch(3, "out");
        flag(i1, "transposed");
        exact(1, "W", i1 ? dz.cols : at_least(1, "W", out.cols), i1 ? out.cols : dz.cols);
        batch(2, "saved", out.cols);
        distinct(0, 3, "dz and out"), distinct(2, 3, "saved and out");
        elementwise(i0);
        break;
      }
      case OP_ACTIVITY_L1: {
        const SlotDesc& a = batch(0, "a");
        batch(1, "saved", a.cols), weight(2), batch(3, "dz", a.cols), batch(4, "rowpenalty", 1);
        distinct(0, 3, "a and dz"), distinct(1, 3, "saved and dz"), distinct(3, 4, "dz and rowpenalty");
        elementwise(i0);
        break;
      }
      case OP_KL_SPARSITY: {
        const SlotDesc& saved = batch(0, "saved");
        exact(1, "mean", 1, saved.cols), weight(2), batch(3, "dz", saved.cols);
        exact(4, "penalty", 1, saved.cols);
        distinct(0, 3, "saved and dz"), distinct(1, 4, "mean and penalty");
        elementwise(i0);
        require(f[1] > 0 && f[1] < 1, "target must lie between 0 and 1");
        break;
      }
      case OP_DECAY: {
        const SlotDesc& W = slot(0, "W");
        exact(0, "W", W.rows, W.cols), exact(1, "dW", W.rows, W.cols), cells(2, "penalty", W);
        distinct(0, 1, "W and dW"), distinct(1, 2, "dW and penalty"), distinct(0, 2, "W and penalty");
        break;
      }
      case OP_REDUCE: {
        slot(0, "x"), weight(1);
        if (has(1)) batch(0, "x", 1);
        const SlotDesc& terms = slot(2, "terms");
        exact(2, "terms", 1, terms.cols);
        require(i0 >= 0 && i0 < terms.cols, "index is outside terms");
        flag(i1, "mean");
        distinct(0, 2, "x and terms");
        break;
      }
      case OP_SQNORM:
        exact(0, "partial", 1, (plan_.parameter_size + GRAIN - 1) / GRAIN);
        break;
      case OP_SHRINK:
        require(slot(0, "W").region == REGION_PARAMETER, "W must be a parameter");
        break;
      case OP_UPDATE:
        if (has(0)) exact(0, "partial", 1, (plan_.parameter_size + GRAIN - 1) / GRAIN);
        range(i0, SOLVER_COUNT, "solver");
        require(i0 == SOLVER_SGD || plan_.moments == 2, "the solver needs two moments");
        break;
      case OP_WGRAD_UPDATE: {
        const SlotDesc &x = batch(0, "x"), &dz = batch(1, "dz"), &W = parameter(3, x.cols, dz.cols);
        if (has(2)) exact(2, "dW", W.rows, W.cols), distinct(2, 3, "dW and W");
        if (has(6)) exact(6, "colrate", 1, W.cols);
        if (has(7)) cells(7, "penalty", W);
        for (int i = 2; i < 7; ++i)
          if (has(i) && has(7)) distinct(i, 7, "penalty and another operand");
        for (int i = 3; i < 6; ++i)
          if (has(i) && has(6)) distinct(i, 6, "colrate and another operand");
        require(has(7) || (f[3] == 0 && f[4] == 0), "penalty is missing");
        break;
      }
      case OP_COLSUM_UPDATE:
        parameter(2, 1, batch(0, "x").cols);
        if (has(1)) exact(1, "db", 1, slot(0, "x").cols), distinct(1, 2, "db and b");
        break;
      case OP_SAMPLE: {
        const SlotDesc &stats = batch(0, "stats"), &z = batch(1, "z");
        batch(2, "noise", z.cols);
        require(stats.cols == 2 * z.cols, "stats has shape " + shape(stats) + " for z of shape " + shape(z));
        distinct(0, 1, "stats and z"), distinct(0, 2, "stats and noise"), distinct(1, 2, "z and noise");
        break;
      }
      case OP_LATENT_KL: {
        const index_t k = batch(1, "noise").cols;
        batch(0, "stats", 2 * k), weight(2), batch(3, "dz", k), batch(4, "dstats", 2 * k), batch(5, "rowkl", 1);
        for (int i = 0; i < 4; ++i)
          for (int j : {4, 5}) distinct(i, j, "an operand and a result");
        distinct(4, 5, "dstats and rowkl");
        break;
      }
      case OP_GAUSSIAN: {
        const SlotDesc& z = batch(0, "z");
        batch(1, "target", z.cols), weight(2), exact(3, "logvar", 1, z.cols);
        batch(4, "rowloss", 1), batch(5, "rates", z.cols);
        for (int i = 0; i < 3; ++i)
          for (int j : {4, 5}) distinct(i, j, "an operand and a result");
        distinct(0, 1, "z and target"), distinct(4, 5, "rowloss and rates");
        elementwise(i0);
        break;
      }
      case OP_CONTRACTIVE: {
        const SlotDesc& saved = batch(0, "saved");
        exact(2, "W", slot(2, "W").rows, saved.cols), weight(3), batch(4, "dz", saved.cols);
        exact(5, "colrate", 1, saved.cols), exact(7, "penalty", 1, saved.cols);
        require(has(1) == has(6), "noisy and dnoisy belong together");
        if (has(1)) batch(1, "noisy", saved.cols), batch(6, "dnoisy", saved.cols);
        flag(i1, "accumulate_dz"), flag(op_.ints[2], "accumulate_colrate");
        elementwise(i0);
        all_distinct();
        break;
      }
      case OP_COLUMN_DECAY: {
        const SlotDesc& W = slot(0, "W");
        exact(0, "W", W.rows, W.cols), exact(1, "colrate", 1, W.cols), exact(2, "dW", W.rows, W.cols);
        all_distinct();
        break;
      }
      case OP_GRAM: {
        const SlotDesc& W = slot(0, "W");
        exact(0, "W", W.rows, W.cols), exact(1, "out", W.cols, W.cols);
        all_distinct();
        break;
      }
      case OP_SLOPES:
        segment(1, "out", i1, batch(0, "saved").cols);
        elementwise(i0);
        all_distinct();
        break;
      case OP_CURVES: {
        const SlotDesc& saved = batch(1, "saved");
        segment(0, "dslopes", i1, saved.cols), batch(2, "dz", saved.cols);
        flag(op_.ints[2], "accumulate");
        elementwise(i0);
        all_distinct();
        break;
      }
      case OP_JACOBIAN:
        jacobian();
        break;
      case OP_GRAIN_SUM: {
        const SlotDesc &partial = slot(0, "partial"), &out = slot(1, "out");
        exact(0, "partial", partial.rows, partial.cols), exact(1, "out", out.rows, out.cols);
        range(i1, 3, "form");
        require(i1 || out.rows == out.cols, "a symmetric out must be square");
        held(partial, i0, i1 == 1 ? out.cols : out.rows, i1 == 1 ? out.rows : out.cols);
        all_distinct();
        break;
      }
      case OP_GRAM_WGRAD: {
        const SlotDesc& W = slot(0, "W");
        exact(0, "W", W.rows, W.cols), exact(1, "dgram", W.cols, W.cols), exact(2, "dW", W.rows, W.cols);
        all_distinct();
        break;
      }
      case OP_PROBE:
        batch(0, "out");
        break;
      case OP_TANGENT: {
        const SlotDesc& x = batch(0, "x");
        segment(1, "slopes", i0, x.cols), batch(2, "out", x.cols);
        all_distinct();
        break;
      }
      case OP_SQUARED_NORM:
        batch(0, "x"), weight(1), batch(2, "rowpenalty", 1);
        flag(i0, "accumulate");
        all_distinct();
        break;
      case OP_COTANGENT: {
        const SlotDesc& x = batch(1, "x");
        batch(0, "dout", x.cols), segment(2, "slopes", i0, x.cols), segment(3, "dslopes", i0, x.cols);
        flag(i1, "accumulate");
        all_distinct();
        break;
      }
      case OP_DRAW:
        chains(0, "mean", batch(1, "out").cols);
        range(i0, UNITS_COUNT, "kind");
        all_distinct();
        break;
      case OP_CONTRAST: {
        const SlotDesc& x = batch(0, "x");
        batch(1, "y", x.cols), weight(2), batch(3, "out", x.cols);
        all_distinct();
        break;
      }
      case OP_KEEP:
        chains(1, "out", batch(0, "x").cols);
        all_distinct();
        break;
      case OP_CONVOLVE: {
        const ConvGeometry g = convolution(op_.ints + 1);
        const SlotDesc &x = image(0, "x", op_.ints + 1), &out = image(3, "out", op_.ints + 4);
        exact(1, "W", g.taps() * op_.ints[3], op_.ints[6]);
        if (has(2)) exact(2, "b", 1, op_.ints[6]);
        require(x.cols > 0 && out.cols > 0, "empty images");
        if (has(4)) batch(4, "pre", out.cols);
        elementwise(i0);
        all_distinct();
        break;
      }
      case OP_CONV_DGRAD: {
        const ConvGeometry g = convolution(op_.ints + 1);
        image(0, "dz", op_.ints + 4), image(2, "saved", op_.ints + 1), image(3, "out", op_.ints + 1);
        exact(1, "W", g.taps() * op_.ints[3], op_.ints[6]);
        elementwise(i0);
        all_distinct();
        break;
      }
      case OP_CONV_WGRAD: {
        const ConvGeometry g = convolution(op_.ints + 2);
        flag(i0, "bias"), flag(i1, "accumulate");
        image(0, "x", op_.ints + 2), image(1, "dz", op_.ints + 5);
        const index_t ld = padded(op_.ints[7]), rows = g.taps() * op_.ints[4] + 1;
        require(rows <= MAX_EXTENT / ld, "the weight is out of range");
        exact(2, "partial", slot(2, "partial").rows, rows * ld);
        all_distinct();
        break;
      }
      case OP_MAXPOOL:
        pooling(op_.ints, 0, 1);
        break;
      case OP_MAXPOOL_DGRAD: {
        pooling(op_.ints + 1, 3, 0);
        const index_t cols = slot(3, "out").cols;
        batch(1, "x", cols), batch(2, "saved", cols);
        distinct(1, 0, "x and dout"), distinct(1, 3, "x and out");
        distinct(2, 0, "saved and dout"), distinct(2, 3, "saved and out");
        elementwise(i0);
        break;
      }
      case OP_GRAIN_UPDATE: {
        const SlotDesc &partial = slot(0, "partial"), &of = slot(1, "parameter"), &W = parameter(1, of.rows, of.cols);
        exact(0, "partial", partial.rows, partial.cols);
        held(partial, i1, W.rows, W.cols);
        if (has(4)) cells(4, "penalty", W);
        require(has(4) || (f[3] == 0 && f[4] == 0), "penalty is missing");
        all_distinct();
        break;
      }
      case OP_MAXPOOL_PICK:
        pooling(op_.ints, 1, 2);
        batch(0, "y", slot(1, "x").cols);
        distinct(0, 2, "y and out");
        break;
      case OP_SPARSE_DENSE: {
        const SlotDesc &W = slot(0, "W"), &out = batch(4, "out");
        exact(0, "W", W.rows, out.cols), exact(1, "b", 1, out.cols);
        if (has(5)) batch(5, "pre", out.cols);
        elementwise(i0);
        level(f[0]), normalized(2, f[1]), shifted(3, W.rows);
        all_distinct();
        break;
      }
      case OP_SPARSE_WGRAD: {
        const SlotDesc& dW = slot(1, "dW");
        exact(1, "dW", dW.rows, batch(0, "dz").cols);
        flag(i0, "accumulate");
        level(f[0]), normalized(2, f[1]), shifted(3, dW.rows);
        all_distinct();
        break;
      }
      case OP_WEIGHT_GRAM:
        square_of(2, "high", layer(0, slot(0, "W").rows, 1) + 1), square_of(3, "low", slot(0, "W").rows + 1);
        all_distinct();
        break;
      case OP_SPARSE_MSE: {
        const index_t inner = layer(1, batch(0, "h").cols, 2);
        square_of(3, "high", inner + 1), square_of(4, "low", inner + 1);
        batch(5, "saved", batch(8, "out").cols), weight(6), batch(7, "rowloss", 1);
        at_least(0, "h", slot(8, "out").cols);
        range(i0, SOURCE_WEIGHT, "source"), elementwise(i1);
        for (int i = 0; i < 9; ++i)
          for (int j : {7, 8})
            if (i != j && has(i)) distinct(i, j, "an operand and a result");
        break;
      }
      case OP_ROW_GRAM:
        weight(1), square_of(2, "out", batch(0, "h").cols + 1);
        all_distinct();
        break;
      case OP_SPARSE_MSE_WGRAD: {
        const index_t inner = layer(3, batch(0, "h").cols, 4);
        square_of(1, "gram", inner + 1), weight(2);
        exact(5, "dW", inner, slot(3, "W").cols), exact(6, "db", 1, slot(3, "W").cols);
        range(i0, SOURCE_WEIGHT, "source");
        all_distinct();
        break;
      }
      case OP_SPARSE_MSE_UPDATE: {
        const SlotDesc& W = parameter(3, batch(0, "h").cols, slot(3, "W").cols);
        parameter(6, 1, W.cols);
        square_of(1, "gram", W.rows + 1), weight(2), shifted(9, W.cols);
        range(i1, SOURCE_WEIGHT, "source");
        if (has(10)) cells(10, "penalty", W);
        require(has(10) || (f[3] == 0 && f[4] == 0), "penalty is missing");
        all_distinct();
        break;
      }
      case OP_SPARSE_WGRAD_UPDATE: {
        const SlotDesc &of = slot(2, "parameter"), &W = parameter(2, of.rows, batch(0, "dz").cols);
        if (has(1)) exact(1, "dW", W.rows, W.cols);
        if (has(5)) exact(5, "colrate", 1, W.cols);
        if (has(8)) cells(8, "penalty", W);
        require(has(8) || (f[3] == 0 && f[4] == 0), "penalty is missing");
        level(f[6]), normalized(6, f[7]), shifted(7, W.rows);
        all_distinct();
        break;
      }
      case OP_LIBRARY:
        batch(0, "out", 1);
        range(i0, 2, "source");
        break;
      case OP_LOG_NORMALIZE:
        batch(0, "x"), slot(1, "library"), normalized(1, f[0]);
        all_distinct();
        break;
      case OP_COUNTS:
        counts();
        break;
      case OP_MEANS: {
        const SlotDesc &z = batch(0, "z"), &out = batch(2, "out");
        if (has(1)) batch(1, "library", 1), distinct(1, 0, "library and z"), distinct(1, 2, "library and out");
        require(out.cols <= z.cols, "out has shape " + shape(out) + " for z of shape " + shape(z));
        counts_link(i0);
        require(f[0] > 0, "scale must be positive");
        break;
      }
      case OP_CONDITION: {
        const SlotDesc &z = batch(0, "z"), &out = batch(1, "out");
        require(out.cols > z.cols, "out has shape " + shape(out) + " for z of shape " + shape(z));
        break;
      }
    }
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
  require(plan.batch >= 1 && plan.batch < MAX_DIM, "batch " + std::to_string(plan.batch) + " is out of range");
  require(plan.moments == 1 || plan.moments == 2, "moments " + std::to_string(plan.moments) + " must be 1 or 2");
  for (index_t size : {plan.parameter_size, plan.work_size})
    require(size >= 0 && size <= MAX_EXTENT && size % LANES == 0,
            "region of " + std::to_string(size) + " elements is out of range");
  for (size_t i = 0; i < plan.slots.size(); ++i) {
    const SlotDesc& s = plan.slots[i];
    const std::string name = "slot " + std::to_string(i) + " " + shape(s);
    require(
        s.region >= REGION_PARAMETER && s.region <= REGION_SCRATCH && (s.region != REGION_MOMENT2 || plan.moments == 2),
        name + ": unknown region");
    require(s.rows >= 1 && s.cols >= 1 && s.rows < MAX_DIM && s.cols < MAX_DIM && s.rows <= MAX_EXTENT / s.ld(),
            name + ": shape is out of range");
    require(s.region != REGION_BATCH || s.rows == plan.batch,
            name + ": a batch slot has as many rows as the batch, " + std::to_string(plan.batch));
    const index_t extent = s.region < REGION_BATCH ? plan.parameter_size : plan.work_size;
    require(s.offset >= 0 && s.offset % LANES == 0 && s.offset <= extent && s.size() <= extent - s.offset,
            name + ": offset " + std::to_string(s.offset) + " leaves its region of " + std::to_string(extent));
  }
  for (size_t i = 0; i < plan.ops.size(); ++i) Check(plan, i).run();
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
