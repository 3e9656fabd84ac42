#include "cpu/program.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <string_view>

namespace narrows {

namespace {

// `train` reads Adam's decay rates where UPDATE has them, whichever op they come from.
#define OP(NAME, slots, ints, floats, ...)                                                      \
  static_assert(!(false ints) || std::string_view("" floats).substr(0, 14) == "beta_1,beta_2,", \
                #NAME ": beta_1 and beta_2 must be the first floats of an op with a solver");
#define INTEGER(name, rule, n) || Rule::rule == Rule::A_SOLVER
#define NUMBER(name, rule) #name ","
#include "plan/ops.def"

constexpr size_t HUGE_PAGE = size_t(2) << 20;

// A step with fewer operations takes less time than waking a second thread.
constexpr double SERIAL_FLOP = 5e5;

// Products are shared by rows if each thread has so many: with fewer, the tiles of the micro-kernel are too short.
constexpr index_t MIN_ROWS = 12;

// Memory that an op touches, and how threads share it.
struct Access {
  index_t begin, end;  // elements of the arena
  int slot;            // -1 for a whole region
  bool write;
  Share share;

  // True if one thread may touch memory that another has touched.
  bool conflicts(const Access& other) const {
    const bool same = slot >= 0 && slot == other.slot && share == other.share && share != SHARE_ALL;
    return begin < other.end && other.begin < end && (write || other.write) && !same;
  }
};

std::string number(index_t n) { return std::to_string(n); }

// The source that an op of the plan takes rows from (none: -1), and the columns that it must have (any: -1).
struct Gathered {
  int source;
  index_t cols = -1;
  bool csr;

  Gathered(const PlanDesc& plan, const OpDesc& op) {
    const Reach& reach = OPS[op.code].reach;
    source = reach.from.attribute >= 0 ? op.ints[reach.from.attribute] : reach.from.source;
    csr = reach.csr;
    const SlotDesc* slot = reach.extent.slot >= 0 ? &plan.slots[size_t(op.slots[reach.extent.slot])] : nullptr;
    switch (reach.extent.columns) {
      case Columns::ANY:
        break;
      case Columns::ONE:
        cols = 1;
        break;
      case Columns::COLUMNS_OF:
        cols = slot->cols;
        break;
      case Columns::ROWS_OF:
        cols = slot->rows;
        break;
      case Columns::FEATURES_OF:
        cols = slot->cols / count_columns(op);
        break;
    }
  }
};

// Kernels read CSR without a check, so its structure is checked here. `ordered`: columns must increase.
template <class Index>
void check_csr(const SourceView& v, bool ordered) {
  const Index* indptr = static_cast<const Index*>(v.indptr);
  const Index* indices = static_cast<const Index*>(v.indices);
  if (indptr[0] != 0) throw std::invalid_argument("CSR: indptr must start at 0");
  for (index_t i = 0; i < v.rows; ++i)
    if (indptr[i + 1] < indptr[i]) throw std::invalid_argument("CSR: indptr decreases at row " + number(i));
  if (index_t(indptr[v.rows]) > v.stored)
    throw std::invalid_argument("CSR: indptr ends at " + number(indptr[v.rows]) + ", past the " + number(v.stored) +
                                " stored values");
  for (index_t k = 0; k < index_t(indptr[v.rows]); ++k)
    if (indices[k] < 0 || index_t(indices[k]) >= v.cols)
      throw std::invalid_argument("CSR: column " + number(indices[k]) + " of " + number(v.cols));
  for (index_t i = 0; i < v.rows && ordered; ++i)
    for (index_t k = index_t(indptr[i]) + 1; k < index_t(indptr[i + 1]); ++k)
      if (indices[k] <= indices[k - 1])
        throw std::invalid_argument("CSR: columns of row " + number(i) + " do not increase (" + number(indices[k - 1]) +
                                    ", " + number(indices[k]) + "): call sum_duplicates() first");
}

// Throws unless a column holds numbers of conditions, from 0.
template <class In>
void check_conditions(const SourceView& v, index_t n_conditions) {
  if (v.is_csr) throw std::invalid_argument("bind: batch numbers must be dense, not CSR");
  for (index_t i = 0; i < v.rows; ++i) {
    In value;
    std::memcpy(&value, v.data + i * v.row_stride, sizeof value);
    if (!(value >= 0 && value < In(n_conditions) && value == std::floor(value)))
      throw std::invalid_argument("bind: batch number " + std::to_string(value) + " in row " + number(i) +
                                  " is outside 0.." + number(n_conditions - 1));
  }
}

template <class T>
struct CompiledOp {
  Op<T> run;
  Args<T> args;
  int modes;
};

// Seconds of each thread in each op; the last column is for barriers.
struct Trace {
  std::vector<double> seconds;
  size_t columns;
};

// Adds the time since the last lap to a column of the thread's row. Does nothing without a trace.
class Stopwatch {
 public:
  Stopwatch(Trace* trace, int tid) : row_(trace ? trace->seconds.data() + size_t(tid) * trace->columns : nullptr) {
    if (row_) last_ = Clock::now();
  }
  void lap(size_t column) {
    if (!row_) return;
    const Clock::time_point now = Clock::now();
    row_[column] += std::chrono::duration<double>(now - last_).count();
    last_ = now;
  }

 private:
  using Clock = std::chrono::steady_clock;
  double* row_;
  Clock::time_point last_;
};

template <class T>
class TypedProgram final : public Program {
  using Phase = std::vector<const CompiledOp<T>*>;  // ops between two barriers

 public:
  TypedProgram(PlanDesc plan, const Isa& isa, int precision, int n_threads, int simulate, bool tune)
      : plan_(std::move(plan)),
        arena_(size_t(plan_.arena_size()) * sizeof(T)),
        simulate_(simulate),
        n_threads_(n_threads),
        rows_(size_t(plan_.batch)) {
    T* base = static_cast<T*>(arena_.data());
    for (int r = 0; r < 2 + plan_.moments; ++r) ctx_.regions[r] = base + r * plan_.parameter_size;
    work_ = base + (2 + plan_.moments) * plan_.parameter_size;
    ctx_.parameter_size = plan_.parameter_size;
    if (precision == BFLOAT16) ctx_.bfloat16 = isa.pairs();
    const Kernels<T>& kernels = isa.kernels<T>();
    double flop = 0;
    for (const OpDesc& op : plan_.ops) {
      CompiledOp<T> compiled;
      Args<T>& args = compiled.args;
      for (int i = 0; i < MAX_SLOTS; ++i)
        if (op.slots[i] >= 0) {
          const SlotDesc& s = plan_.slots[size_t(op.slots[i])];
          args.slots[i] = {address(s), s.rows, s.cols, s.ld(), 1, true};
          args.batch[i] = s.region == REGION_BATCH;
        }
      std::memcpy(args.ints, op.ints, sizeof op.ints);
      std::memcpy(args.floats, op.floats, sizeof op.floats);
      const Kernel<T>& kernel = kernels.ops[op.code];
      compiled.run = kernel.run(args);
      compiled.modes = op.modes;
      if (!compiled.run)
        throw std::invalid_argument(std::string("plan: op ") + OPS[op.code].name +
                                    " has no kernel for its activation, loss or solver");
      const Cost cost = kernel.cost(args, plan_.batch, precision == BFLOAT16);
      if (cost.scratch > scratch_size_) scratch_size_ = (cost.scratch + LANES - 1) / LANES * LANES;
      if (cost.turnable) turnable_.push_back(ops_.size());
      flop += cost.flop;
      const int solver = OPS[op.code].solver();
      if (solver >= 0 && op.ints[solver] != SOLVER_SGD) solver_ = &op;
      if (op.code == OP_REDUCE) terms_ = &plan_.slots[size_t(op[op::REDUCE::terms])];
      ops_.push_back(compiled);
    }
    const int teams = simulate_ > 0 ? 1 : n_threads_;
    scratch_.reset(new Arena(size_t(teams) * size_t(scratch_size_) * sizeof(T)));
    if (flop < SERIAL_FLOP) n_threads_ = 1;
    const int team = simulate_ > 0 ? simulate_ : n_threads_;
    Choice first{plan_.batch / team >= MIN_ROWS, std::vector<char>(ops_.size())};
    const index_t rows = plan_.batch / team;
    for (size_t op : turnable_) first.turned[op] = rows >= 32 && ops_[op].args[op::DGRAD::out].cols >= 2 * rows;
    tuning_.reset(new Tuning(tune && simulate_ == 0 ? key(isa, precision) : std::string(), first,
                             n_threads_ > 1 && plan_.batch >= team, turnable_));
    for (const bool by_rows : {false, true}) {
      ctx_.split_rows = by_rows;
      for (int bit = 0; bit < MODE_BITS; ++bit) phases_[by_rows][bit] = phases(1 << bit);
    }
    adopt(tuning_->current());
  }

  void bind(int bank, int source, const SourceView& view) override {
    bool sparse = false;
    for (const OpDesc& op : plan_.ops) {
      const Gathered wanted(plan_, op);
      if (!view.bound || wanted.source != source) continue;
      if (wanted.cols >= 0 && wanted.cols != view.cols)
        throw std::invalid_argument("bind: source " + number(source) + " has " + number(view.cols) +
                                    " columns, the plan expects " + number(wanted.cols));
      if (wanted.csr && !view.is_csr)
        throw std::invalid_argument("bind: source " + number(source) + " is dense, the plan expects CSR");
      sparse = sparse || wanted.csr;
    }
    if (source == SOURCE_SHIFT && view.bound && (view.is_csr || view.rows != 1))
      throw std::invalid_argument("bind: a shift is one dense row");
    for (const OpDesc& op : plan_.ops)
      if (view.bound && source == SOURCE_CONDITION && op.code == OP_CONDITION) {
        using O = op::CONDITION;
        const index_t n = plan_.slots[size_t(op[O::out])].cols - plan_.slots[size_t(op[O::z])].cols;
        view.is_double ? check_conditions<double>(view, n) : check_conditions<float>(view, n);
      }
    if (view.is_csr) view.is_index64 ? check_csr<int64_t>(view, sparse) : check_csr<int32_t>(view, sparse);
    sources_[bank][source] = view;
  }

  index_t train(const index_t* rows, index_t n_rows, const Hyper& hyper, double* terms,
                const std::function<bool()>& stop) override {
    ctx_.sources = sources_[BANK_TRAIN];
    check_sources(MODE_TRAIN, rows, n_rows);
    index_t done = 0;
    for (index_t start = 0; start < n_rows; start += plan_.batch, ++done) {
      if (done > 0 && stop()) break;
      ctx_.rows = rows + start;
      ctx_.m = n_rows - start < plan_.batch ? n_rows - start : plan_.batch;
      ctx_.seed = hyper.seed;
      ctx_.step = hyper.step + uint32_t(done);
      ctx_.learning_rate = hyper.learning_rate[done];
      ctx_.kl_factor = hyper.kl_factor ? hyper.kl_factor[done] : 1;
      ctx_.momentum = hyper.momentum ? hyper.momentum[done] : -1;
      if (solver_) {
        const double t = double(ctx_.step) + 1;
        ctx_.adam_rate = ctx_.learning_rate / (1 - std::pow((*solver_)[op::UPDATE::beta_1], t));
        ctx_.adam_root = 1 / std::sqrt(1 - std::pow((*solver_)[op::UPDATE::beta_2], t));
      }
      tuning_->settled() || trace_ || ctx_.m < plan_.batch ? step(MODE_TRAIN, terms + done * terms_size())
                                                           : trial(terms + done * terms_size());
    }
    return done;
  }

  void gradient(const index_t* rows, index_t n_rows, uint64_t seed, uint32_t step_index, double* terms) override {
    ctx_.sources = sources_[BANK_TRAIN];
    check_sources(MODE_GRADIENT, rows, n_rows);
    if (n_rows < 1 || n_rows > plan_.batch)
      throw std::invalid_argument("gradient: " + number(n_rows) + " rows for a batch of " + number(plan_.batch));
    ctx_.rows = rows, ctx_.m = n_rows, ctx_.seed = seed, ctx_.step = step_index, ctx_.kl_factor = 1;
    step(MODE_GRADIENT, terms);
  }

  void apply(int mode, index_t result, void* out) override {
    ctx_.sources = sources_[BANK_APPLY];
    const index_t n = ctx_.sources[from_codes(mode) ? SOURCE_LATENT : SOURCE_X].rows;
    check_sources(mode, nullptr, 0);
    const SlotDesc& slot = plan_.slots.at(size_t(result));
    const T* from = address(slot);
    T* to = static_cast<T*>(out);
    for (index_t start = 0; start < n; start += plan_.batch) {
      ctx_.m = n - start < plan_.batch ? n - start : plan_.batch;
      for (index_t i = 0; i < ctx_.m; ++i) rows_[size_t(i)] = start + i;
      ctx_.rows = rows_.data();
      run(mode);
      for (index_t i = 0; i < ctx_.m; ++i)
        std::memcpy(to + (start + i) * slot.cols, from + i * slot.ld(), size_t(slot.cols) * sizeof(T));
    }
  }

  std::vector<double> profile(const index_t* rows, index_t n_rows, const Hyper& hyper) override {
    Trace trace = blank_trace();
    std::vector<double> terms(size_t(terms_size()) * size_t((n_rows + plan_.batch - 1) / plan_.batch));
    trace_ = &trace;
    try {
      train(rows, n_rows, hyper, terms.data(), [] { return false; });
    } catch (...) {
      trace_ = nullptr;
      throw;
    }
    trace_ = nullptr;
    return trace.seconds;
  }

  const Choice& choice() const override { return tuning_->current(); }
  bool tuned() const override { return tuning_->settled(); }

  void* slot_data(index_t slot) override { return address(plan_.slots.at(size_t(slot))); }
  void* moment_data(int moment, index_t slot) override {
    const SlotDesc& s = plan_.slots.at(size_t(slot));
    if (moment < 0 || moment >= plan_.moments || s.region != REGION_PARAMETER)
      throw std::invalid_argument("moment " + number(moment) + " of slot " + number(slot) + " does not exist");
    return ctx_.regions[REGION_MOMENT1 + moment] + s.offset;
  }
  index_t terms_size() const override { return terms_ ? terms_->cols : 0; }
  const PlanDesc& plan() const override { return plan_; }
  void* arena() const override { return arena_.data(); }

 private:
  T* address(const SlotDesc& s) const { return (s.region < REGION_BATCH ? ctx_.regions[s.region] : work_) + s.offset; }

  // Throws unless every source of the mode is bound and has the rows.
  void check_sources(int mode, const index_t* rows, index_t n_rows) const {
    const index_t n_apply = ctx_.sources[from_codes(mode) ? SOURCE_LATENT : SOURCE_X].rows;
    for (const OpDesc& op : plan_.ops) {
      const int source = Gathered(plan_, op).source;
      if (source < 0 || !(op.modes & mode)) continue;
      const SourceView& s = ctx_.sources[source];
      if (!s.bound) throw std::invalid_argument("source " + number(source) + " is not bound");
      if (source == SOURCE_SHIFT) continue;
      if (rows) {
        for (index_t i = 0; i < n_rows; ++i)
          if (rows[i] < 0 || rows[i] >= s.rows)
            throw std::out_of_range("row " + number(rows[i]) + " of a source with " + number(s.rows) + " rows");
      } else if (s.rows < n_apply) {
        throw std::invalid_argument("source " + number(source) + " has " + number(s.rows) + " rows, expected " +
                                    number(n_apply));
      }
    }
  }

  Trace blank_trace() const {
    const size_t columns = ops_.size() + 1;
    return {std::vector<double>(columns * size_t(n_threads_)), columns};
  }

  // Everything that the time of a step depends on, as bytes.
  std::string key(const Isa& isa, int precision) const {
    std::string key = std::string(isa.name) + '\0';
    const auto add = [&](const auto& value) { key.append(reinterpret_cast<const char*>(&value), sizeof value); };
    add(precision), add(sizeof(T)), add(n_threads_), add(plan_.batch);
    for (const OpDesc& op : plan_.ops) {
      add(op.code), add(op.ints);
      for (int32_t slot : op.slots) {
        const SlotDesc none{}, &s = slot < 0 ? none : plan_.slots[size_t(slot)];
        add(s.rows), add(s.cols);
      }
    }
    return key;
  }

  void adopt(const Choice& choice) {
    ctx_.split_rows = choice.by_rows;
    for (size_t op : turnable_) ops_[op].args.turned = choice.turned[op];
  }

  // A training step that is timed by op.
  void trial(double* terms) {
    Trace trace = blank_trace();
    trace_ = &trace;
    step(MODE_TRAIN, terms);
    trace_ = nullptr;
    std::vector<double> slowest(trace.columns);
    for (size_t i = 0; i < trace.seconds.size(); ++i)
      slowest[i % trace.columns] = std::max(slowest[i % trace.columns], trace.seconds[i]);
    tuning_->record(slowest);
    adopt(tuning_->current());
  }

  void step(int mode, double* terms) {
    T* values = terms_ ? address(*terms_) : nullptr;
    for (index_t i = 0; i < terms_size(); ++i) values[i] = T(0);
    run(mode);
    for (index_t i = 0; i < terms_size(); ++i) terms[i] = double(values[i]);
  }

  void run(int mode) {
    const std::vector<Phase>& schedule = phases_[ctx_.split_rows][__builtin_ctz(unsigned(mode))];
    ctx_.learn = mode & (MODE_TRAIN | MODE_GRADIENT);
    ctx_.scratch = static_cast<T*>(scratch_->data());
    ctx_.scratch_stride = simulate_ > 0 ? 0 : scratch_size_;  // simulated threads take turns with the one there is
    if (simulate_ > 0) {
      // One thread after the other, a whole phase each: a missing cut shows in the bits.
      for (const Phase& phase : schedule)
        for (int tid = 0; tid < simulate_; ++tid)
          for (const CompiledOp<T>* op : phase) op->run(op->args, ctx_, tid, simulate_);
      return;
    }
    launch(n_threads_, [&](int tid, int nt) {
      Stopwatch watch(trace_, tid);
      for (const Phase& phase : schedule) {
        if (&phase != schedule.data()) barrier_.wait(nt), watch.lap(ops_.size());
        for (const CompiledOp<T>* op : phase) op->run(op->args, ctx_, tid, nt), watch.lap(size_t(op - ops_.data()));
      }
    });
  }

  // The ops of a mode, cut where threads must wait for each other. There is a cut before an op if an op since the last
  // cut touches the same memory, and threads share it in another way.
  std::vector<Phase> phases(int mode) const {
    std::vector<Phase> result(1);
    std::vector<Access> since;
    for (size_t i = 0; i < ops_.size(); ++i) {
      if (!(ops_[i].modes & mode)) continue;
      const std::vector<Access> now = accesses(plan_.ops[i]);
      bool cut = false;
      for (const Access& a : now)
        for (const Access& b : since) cut = cut || a.conflicts(b);
      if (cut) {
        result.emplace_back();
        since.clear();
      }
      result.back().push_back(&ops_[i]);
      since.insert(since.end(), now.begin(), now.end());
    }
    return result;
  }

  std::vector<Access> accesses(const OpDesc& op) const {
    const OpInfo& info = OPS[op.code];
    std::vector<Access> result;
    for (int i = 0; i < info.n_slots; ++i) {
      if (op.slots[i] < 0) continue;
      const SlotDesc& s = plan_.slots[size_t(op.slots[i])];
      const bool write = info.writes(i);
      Share share = SHARE_ALL;
      if (info.share == SHARE_ROWS && s.region == REGION_BATCH && ctx_.split_rows) share = SHARE_ROWS;
      if ((info.share == SHARE_TILES || info.share == SHARE_FIRST) && write) share = info.share;
      const index_t begin = address(s) - static_cast<T*>(arena_.data());
      result.push_back({begin, begin + s.size(), op.slots[i], write, share});
    }
    auto region = [&](int r, bool write) {
      result.push_back({r * plan_.parameter_size, (r + 1) * plan_.parameter_size, -1, write, SHARE_ALL});
    };
    if (info.reach.reads_gradients) region(REGION_GRADIENT, false);
    if (info.reach.updates_parameters)
      for (int r : {REGION_PARAMETER, REGION_MOMENT1, REGION_MOMENT2})
        if (r < 2 + plan_.moments) region(r, true);
    return result;
  }

  PlanDesc plan_;
  Arena arena_;
  std::unique_ptr<Arena> scratch_;
  index_t scratch_size_ = SCRATCH;  // elements of one thread
  int simulate_;
  int n_threads_;
  std::vector<index_t> rows_;
  SourceView sources_[BANK_COUNT][SOURCE_COUNT];
  Context<T> ctx_;
  Trace* trace_ = nullptr;
  T* work_ = nullptr;
  const SlotDesc* terms_ = nullptr;
  const OpDesc* solver_ = nullptr;  // an op with the decay rates of Adam's moments
  std::vector<CompiledOp<T>> ops_;
  std::vector<size_t> turnable_;  // ops
  std::unique_ptr<Tuning> tuning_;
  std::vector<Phase> phases_[2][MODE_BITS];  // by `split_rows` and mode
  Barrier barrier_;
};

}  // namespace

Arena::Arena(size_t bytes) {
  const size_t page = size_t(sysconf(_SC_PAGESIZE));
  bytes_ = (bytes + page - 1) / page * page;
  if (bytes_ == 0) bytes_ = page;
  mapped_ = bytes_ + page;
  data_ = mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data_ == MAP_FAILED) throw std::bad_alloc();
  if (mprotect(data_, bytes_, PROT_READ | PROT_WRITE) != 0) {
    munmap(data_, mapped_);
    throw std::bad_alloc();
  }
#ifdef MADV_HUGEPAGE
  if (bytes_ >= HUGE_PAGE) madvise(data_, bytes_, MADV_HUGEPAGE);
#endif
}

Arena::~Arena() { munmap(data_, mapped_); }

std::unique_ptr<Program> Program::compile(PlanDesc plan, const Isa& isa, int precision, int n_threads, int simulate,
                                          bool tune) {
  validate(plan);
  if (n_threads < 1 || n_threads > 4096 || simulate < 0 || simulate > 4096)
    throw std::invalid_argument("threads " + number(n_threads) + " (simulated " + number(simulate) +
                                ") are out of range");
  if (precision < 0 || precision >= PRECISION_COUNT)
    throw std::invalid_argument("precision " + number(precision) + " is unknown");
  if (precision == FLOAT64)
    return std::make_unique<TypedProgram<double>>(std::move(plan), isa, precision, n_threads, simulate, tune);
  return std::make_unique<TypedProgram<float>>(std::move(plan), isa, precision, n_threads, simulate, tune);
}

}  // namespace narrows
