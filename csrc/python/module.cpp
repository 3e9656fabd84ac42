// The Python module narrows._core: checks buffers, releases the GIL, calls. No arithmetic.

#include "python/bindings.h"

#include <pybind11/functional.h>
#include <pybind11/stl.h>

#include <array>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <optional>

#include "cpu/crew.h"
#include "cpu/probe.h"
#include "cpu/program.h"

namespace narrows {

using namespace py::literals;

namespace {

// A Program holds this while it runs, so that a second caller gets an error and not a corrupted state.
class InUse {
 public:
  explicit InUse(std::atomic<bool>& flag) : flag_(flag) {
    if (flag_.exchange(true)) throw std::runtime_error("this program is already running in another thread");
  }
  ~InUse() { flag_.store(false); }

 private:
  std::atomic<bool>& flag_;
};

SourceView dense_view(const py::array& array) {
  SourceView view;
  view.is_double = holds<double>(array);
  if (!view.is_double && !holds<float>(array))
    throw py::type_error("expected float32 or float64 of native byte order, got " +
                         std::string(py::str(array.dtype())));
  if (array.ndim() != 1 && array.ndim() != 2) throw std::invalid_argument("expected a matrix");
  view.bound = true;
  view.rows = array.shape(0);
  view.cols = array.ndim() == 2 ? array.shape(1) : 1;
  view.data = static_cast<const char*>(array.data());
  view.row_stride = array.strides(0);
  view.col_stride = array.ndim() == 2 ? array.strides(1) : array.itemsize();
  return view;
}

using Rates = py::array_t<double, py::array::c_style>;  // one for each step

class PyProgram {
 public:
  PyProgram(const py::array& slots, const py::array& ops, index_t batch, index_t parameter_size, index_t work_size,
            int moments, int precision, int n_threads, int simulate, bool tune) {
    PlanDesc plan;
    plan.batch = batch, plan.parameter_size = parameter_size, plan.work_size = work_size, plan.moments = moments;
    if (slots.ndim() != 2 || slots.shape(1) != 4 || !slots.dtype().equal(py::dtype::of<int64_t>()) ||
        !(slots.flags() & py::array::c_style))
      throw std::invalid_argument("plan: slots must be an int64 array of shape (n, 4)");
    if (ops.ndim() != 1 || ops.itemsize() != py::ssize_t(sizeof(OpDesc)) || !(ops.flags() & py::array::c_style))
      throw std::invalid_argument("plan: ops must be a structured array of " + std::to_string(sizeof(OpDesc)) +
                                  "-byte items");
    plan.slots.resize(size_t(slots.shape(0)));
    plan.ops.resize(size_t(ops.shape(0)));
    if (!plan.slots.empty()) std::memcpy(plan.slots.data(), slots.data(), size_t(slots.nbytes()));
    if (!plan.ops.empty()) std::memcpy(plan.ops.data(), ops.data(), size_t(ops.nbytes()));
    program_ = Program::compile(std::move(plan), chosen_isa(), precision, n_threads, simulate, tune);
    is_double_ = precision == FLOAT64;
  }

  void bind_dense(int bank, int source, const py::array& array) { set(bank, source, dense_view(array), {array}); }

  void bind_csr(int bank, int source, const py::array& indptr, const py::array& indices, const py::array& values,
                index_t cols) {
    SourceView view = dense_view(values);
    const bool is64 = indices.dtype().equal(py::dtype::of<int64_t>());
    for (const py::array& a : {indptr, indices, values})
      if (a.ndim() != 1 || !(a.flags() & py::array::c_style) ||
          reinterpret_cast<uintptr_t>(a.data()) % uintptr_t(a.itemsize()))
        throw std::invalid_argument("CSR: indptr, indices and data must be contiguous, aligned vectors");
    if (!indptr.dtype().equal(indices.dtype()) || !(is64 || indices.dtype().equal(py::dtype::of<int32_t>())))
      throw std::invalid_argument("CSR: indptr and indices must both be int32 or both int64");
    if (indptr.shape(0) < 1) throw std::invalid_argument("CSR: indptr is empty");
    if (indices.shape(0) != values.shape(0)) throw std::invalid_argument("CSR: indices and data differ in length");
    view.stored = values.shape(0);
    view.rows = indptr.shape(0) - 1;
    view.cols = cols;
    view.is_csr = true;
    view.is_index64 = is64;
    view.indptr = indptr.data();
    view.indices = indices.data();
    set(bank, source, view, {indptr, indices, values});
  }

  py::array_t<double> train(const py::array_t<int64_t, py::array::c_style>& rows, uint64_t seed, uint32_t step,
                            const Rates& learning_rate, const py::object& poll, const std::optional<Rates>& kl_factor,
                            const std::optional<Rates>& momentum) {
    const index_t n = rows.size(), steps = check_rates(n, learning_rate);
    if (kl_factor) check_rates(n, *kl_factor, "KL factors");
    if (momentum) check_rates(n, *momentum, "momenta");
    py::array_t<double> terms({steps, program_->terms_size()});
    double* out = terms.mutable_data();
    const index_t* row_data = rows.data();
    const Hyper hyper{seed, step, learning_rate.data(), kl_factor ? kl_factor->data() : nullptr,
                      momentum ? momentum->data() : nullptr};
    auto last = std::chrono::steady_clock::now();
    NoGil* released = nullptr;
    auto stop = [&]() {
      const auto now = std::chrono::steady_clock::now();
      if (now - last < std::chrono::milliseconds(50)) return false;
      last = now;
      return released->with_gil([&] {
        PyObject* asked = PyErr_CheckSignals() ? nullptr
                          : poll.is_none()     ? Py_NewRef(Py_False)
                                               : PyObject_CallNoArgs(poll.ptr());
        const int answer = asked ? PyObject_IsTrue(asked) : -1;
        Py_XDECREF(asked);
        if (answer < 0) throw py::error_already_set();
        return answer > 0;
      });
    };
    InUse guard(in_use_);
    index_t done;
    {
      NoGil nogil;
      released = &nogil;
      done = program_->train(row_data, n, hyper, out, stop);
    }
    if (done < steps) terms.resize({done, program_->terms_size()});
    return terms;
  }

  py::array_t<double> gradient(const py::array_t<int64_t, py::array::c_style>& rows, uint64_t seed, uint32_t step) {
    py::array_t<double> terms(program_->terms_size());
    double* out = terms.mutable_data();
    InUse guard(in_use_);
    NoGil nogil;
    program_->gradient(rows.data(), rows.size(), seed, step, out);
    return terms;
  }

  void apply(int mode, index_t result, py::array& out) {
    const SlotDesc& slot = program_->plan().slots.at(size_t(result));
    const SourceView& source = sources_[BANK_APPLY][from_codes(mode) ? SOURCE_LATENT : SOURCE_X];
    const py::dtype type = is_double_ ? py::dtype::of<double>() : py::dtype::of<float>();
    if (out.ndim() != 2 || out.shape(0) != source.rows || out.shape(1) != slot.cols || !out.dtype().equal(type) ||
        !(out.flags() & py::array::c_style) || !out.writeable() || slot.region != REGION_BATCH)
      throw std::invalid_argument("apply: out does not fit the result");
    void* data = out.mutable_data();
    InUse guard(in_use_);
    NoGil nogil;
    program_->apply(mode, result, data);
  }

  // Whether rows are shared, the ops that are turned, and whether trials have found it.
  py::tuple choice() const {
    const Choice& choice = program_->choice();
    py::list turned;
    for (size_t op = 0; op < choice.turned.size(); ++op)
      if (choice.turned[op]) turned.append(op);
    return py::make_tuple(choice.by_rows, turned, program_->tuned());
  }

  // Seconds by thread and op; the last column is for barriers.
  py::array_t<double> profile(const py::array_t<int64_t, py::array::c_style>& rows, uint64_t seed, uint32_t step,
                              const Rates& learning_rate) {
    check_rates(rows.size(), learning_rate);
    std::vector<double> seconds;
    InUse guard(in_use_);
    {
      NoGil nogil;
      seconds = program_->profile(rows.data(), rows.size(), Hyper{seed, step, learning_rate.data(), nullptr});
    }
    const py::ssize_t columns = py::ssize_t(program_->plan().ops.size()) + 1;
    return py::array_t<double>({py::ssize_t(seconds.size()) / columns, columns}, seconds.data());
  }

  // Releases the data of a bank.
  void release(int bank) {
    InUse guard(in_use_);
    for (int source = 0; source < SOURCE_COUNT; ++source) {
      program_->bind(bank, source, SourceView{});
      sources_[bank][source] = SourceView{};
      owners_[bank][source].clear();
    }
  }

  // A writable view of the memory of a slot, without the padding. It keeps the program alive.
  static py::array slot(const py::object& self, index_t slot, int moment) {
    PyProgram& p = self.cast<PyProgram&>();
    const SlotDesc& s = p.program_->plan().slots.at(size_t(slot));
    void* data = moment < 0 ? p.program_->slot_data(slot) : p.program_->moment_data(moment, slot);
    return p.view(self, data, s.rows, s.cols, s.ld());
  }

  static py::array arena(const py::object& self) {
    PyProgram& p = self.cast<PyProgram&>();
    const index_t n = p.program_->plan().arena_size();
    return p.view(self, p.program_->arena(), 1, n, n);
  }

 private:
  // The number of steps for n rows. Throws unless there is a rate for each.
  index_t check_rates(index_t n, const Rates& rates, const char* what = "learning rates") const {
    const index_t batch = program_->plan().batch, steps = (n + batch - 1) / batch;
    if (rates.size() < steps)
      throw std::invalid_argument("train: " + std::to_string(rates.size()) + " " + what + " for " +
                                  std::to_string(steps) + " steps");
    return steps;
  }

  py::array view(const py::object& self, void* data, index_t rows, index_t cols, index_t ld) const {
    const py::ssize_t size = is_double_ ? 8 : 4;
    return py::array(is_double_ ? py::dtype::of<double>() : py::dtype::of<float>(), {rows, cols}, {ld * size, size},
                     data, self);
  }

  void set(int bank, int source, const SourceView& view, std::vector<py::array> owners) {
    if (bank < 0 || bank >= BANK_COUNT || source < 0 || source >= SOURCE_COUNT)
      throw std::invalid_argument("bind: unknown source");
    InUse guard(in_use_);
    {
      NoGil nogil;
      program_->bind(bank, source, view);
    }
    sources_[bank][source] = view;
    owners_[bank][source] = std::move(owners);
  }

  std::unique_ptr<Program> program_;
  bool is_double_ = false;
  SourceView sources_[BANK_COUNT][SOURCE_COUNT];
  std::vector<py::array> owners_[BANK_COUNT][SOURCE_COUNT];  // keep what the views point into
  std::atomic<bool> in_use_{false};
};

// An elementwise function of the instruction set `isa`, for tests and measurements.
template <class T>
py::array evaluate(const py::array& x, const std::string& name, const std::string& isa, double target) {
  if (!(x.flags() & py::array::c_style)) throw std::invalid_argument("x: expected C order");
  py::array_t<T> out(std::vector<py::ssize_t>(x.shape(), x.shape() + x.ndim()));
  const T* in = static_cast<const T*>(x.data());
  T* to = out.mutable_data();
  const Kernels<T>& kernels = isa_select(isa).kernels<T>();
  NoGil nogil;
  if (!kernels.evaluate(name.c_str(), T(target), in, to, x.size()))
    throw std::invalid_argument("'" + name + "' is not a function");
  return std::move(out);
}

py::dict build_info() {
  py::dict info;
  py::list tables;
  for (const Isa* isa : isa_tables()) tables.append(py::make_tuple(isa->name, isa->supported()));
  info["isa_tables"] = tables;
  info["threads"] = team_kind();
  info["compiler"] = __VERSION__;
  py::list ops;
  for (const OpInfo& op : OPS) {
    std::vector<std::string> slots, written, ints, floats;
    for (int i = 0; i < op.n_slots; ++i) {
      slots.push_back(op.slots[i].name);
      if (op.writes(i)) written.push_back(op.slots[i].name);
    }
    for (int i = 0; i < op.n_ints; ++i) ints.push_back(op.ints[i].name);
    for (int i = 0; i < op.n_floats; ++i) floats.push_back(op.floats[i].name);
    ops.append(py::make_tuple(op.name, slots, written, ints, floats));
  }
  info["ops"] = ops;
  info["activation_names"] = activation_names();
  info["loss_names"] = loss_names();
  info["op_size"] = sizeof(OpDesc);
  return info;
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "Native backend of narrows.";
  install_fork_handler();
  m.def("build_info", build_info);
  m.def("isa", [] { return std::string(chosen_isa().name); });
  m.def("thread_limit", thread_limit);
  m.def("bfloat16", [] { return std::string(chosen_isa().bfloat16); });
  m.def("tiles_refused", tiles_refused);
  m.def("probe_machine", [](int n_threads) {
    if (n_threads < 1 || n_threads > 4096) throw std::invalid_argument("n_threads must be positive");
    Probe probe;
    {
      NoGil nogil;
      probe = probe_machine(chosen_isa(), n_threads);
    }
    return py::dict("fma_gflops"_a = probe.fma_gflops, "exchange_gb_s"_a = probe.exchange_gb_s,
                    "barrier_us"_a = probe.barrier_us);
  });
  // The sizes of a crew over regions with these times in nanoseconds (wall, worst loss, total loss), for tests.
  m.def("crew_sizes", [](int wanted, const std::vector<std::array<int64_t, 3>>& regions) {
    Crew crew;
    std::vector<int> sizes;
    for (const auto& [wall, worst, total] : regions) {
      sizes.push_back(crew.size(wanted));
      if (sizes.back() > 1)
        crew.record(sizes.back(), RegionTimes{wall, worst, total});
      else
        crew.pass(wall);
    }
    return sizes;
  });
  bind_layers(m);
  m.def(
      "evaluate",
      [](const std::string& name, const py::array& x, const std::string& isa, double target) {
        return by_dtype(evaluate<float>, evaluate<double>)(x, name, isa, target);
      },
      "name"_a, "x"_a, "isa"_a, "target"_a = 0.0);
  py::class_<PyProgram>(m, "Program")
      .def(py::init<const py::array&, const py::array&, index_t, index_t, index_t, int, int, int, int, bool>(),
           py::arg("slots"), py::arg("ops"), py::arg("batch"), py::arg("parameter_size"), py::arg("work_size"),
           py::arg("moments"), py::arg("precision"), py::arg("n_threads"), py::arg("simulate_threads") = 0,
           py::arg("tune") = true)
      .def("bind_dense", &PyProgram::bind_dense)
      .def("bind_csr", &PyProgram::bind_csr)
      .def("train", &PyProgram::train, py::arg("rows"), py::arg("seed"), py::arg("step"), py::arg("learning_rate"),
           py::arg("poll"), py::arg("kl_factor") = py::none(), py::arg("momentum") = py::none())
      .def("gradient", &PyProgram::gradient)
      .def("apply", &PyProgram::apply)
      .def("profile", &PyProgram::profile)
      .def("choice", &PyProgram::choice)
      .def("release", &PyProgram::release)
      .def_static("slot", &PyProgram::slot, py::arg("program"), py::arg("slot"), py::arg("moment") = -1)
      .def_static("arena", &PyProgram::arena);
}

}  // namespace narrows
