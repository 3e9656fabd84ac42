// Single fused layers for Python: checks arrays, releases the GIL, runs the kernels.
//
// Promises: operands may have any strides; one is copied only if its rows must be contiguous and are not. Results that
// share memory with an operand or with each other are refused.
// Never: allocates a result.

#include <pybind11/stl.h>

#include <optional>

#include "cpu/program.h"
#include "python/bindings.h"

namespace narrows {
namespace {

using MaybeArray = std::optional<py::array>;

template <class T>
Matrix<const T> matrix(const py::array& a, const char* name) {
  if (a.ndim() != 2 || !holds<T>(a))
    throw std::invalid_argument(std::string(name) + ": expected a matrix of the layer's dtype");
  const index_t size = index_t(sizeof(T));
  // The stride of a single row or column is never used, and may have any value.
  const index_t row = a.shape(0) > 1 ? a.strides(0) : size, col = a.shape(1) > 1 ? a.strides(1) : size;
  if (row % size || col % size || reinterpret_cast<uintptr_t>(a.data()) % alignof(T))
    throw std::invalid_argument(std::string(name) + ": expected aligned elements");
  return {static_cast<const T*>(a.data()), a.shape(0), a.shape(1), row / size, col / size, false};
}

// A matrix with contiguous rows. If the rows of `a` are not contiguous, `keep` gets a copy.
template <class T>
Matrix<const T> row_matrix(const py::array& a, const char* name, std::vector<py::array>& keep) {
  const Matrix<const T> m = matrix<T>(a, name);
  if (m.col_stride == 1) return m;
  keep.push_back(py::array_t<T, py::array::c_style | py::array::forcecast>(a));
  return matrix<T>(keep.back(), name);
}

template <class T>
Matrix<T> output(const py::array& a, index_t rows, index_t cols, const char* name) {
  const Matrix<const T> m = matrix<T>(a, name);
  const bool contiguous = m.col_stride == 1 || m.rows == 0;
  if (m.rows != rows || m.cols != cols || !contiguous || !a.writeable())
    throw std::invalid_argument(std::string(name) + ": does not fit (" + std::to_string(rows) + ", " +
                                std::to_string(cols) + ") with contiguous rows");
  return {const_cast<T*>(m.data), m.rows, m.cols, m.row_stride, 1, false};
}

template <class T>
const T* vector(const py::array& a, index_t size, const char* name) {
  if (a.ndim() != 1 || a.shape(0) != size || !(a.flags() & py::array::c_style) || !holds<T>(a))
    throw std::invalid_argument(std::string(name) + ": expected a contiguous vector of the layer's width and dtype");
  return static_cast<const T*>(a.data());
}

struct Named {
  const py::array* array;  // may be null
  const char* name;
};
const py::array* given(const MaybeArray& a) { return a ? &*a : nullptr; }

bool share_memory(const py::array& a, const py::array& b) {
  struct Bounds {
    intptr_t low, high;
    explicit Bounds(const py::array& a) : low(reinterpret_cast<intptr_t>(a.data())), high(low + a.itemsize()) {
      for (py::ssize_t i = 0; i < a.ndim(); ++i) (a.strides(i) < 0 ? low : high) += (a.shape(i) - 1) * a.strides(i);
      if (a.size() == 0) high = low;
    }
  };
  const Bounds m(a), n(b);
  if (m.high <= n.low || n.high <= m.low) return false;
  // They may interleave without sharing memory, as two columns of one array do.
  return py::module_::import("numpy").attr("shares_memory")(a, b).cast<bool>();
}

// Results are written while operands are still read.
void check_apart(std::initializer_list<Named> results, std::initializer_list<Named> operands) {
  for (const Named* r = results.begin(); r != results.end(); ++r) {
    if (!r->array) continue;
    auto check = [&](const Named& other) {
      if (other.array && share_memory(*r->array, *other.array))
        throw std::invalid_argument(std::string(r->name) + " must not share memory with " + other.name);
    };
    for (const Named& operand : operands) check(operand);
    for (const Named* other = r + 1; other != results.end(); ++other) check(*other);
  }
}

int elementwise(int activation) {
  if (activation < 0 || activation >= ACT_SOFTMAX) throw std::invalid_argument("activation is not elementwise");
  return activation;
}

int team(int n_threads) {
  if (n_threads < 1 || n_threads > 4096) throw std::invalid_argument("n_threads must be from 1 to 4096");
  return n_threads;
}

// bias, out and pre of a layer of shape (rows, cols).
template <class T>
LayerArgs<T> layer_args(index_t rows, index_t cols, const MaybeArray& bias, const py::array& out,
                        const MaybeArray& pre) {
  LayerArgs<T> l;
  l.out = output<T>(out, rows, cols, "out");
  if (pre) l.pre = output<T>(*pre, rows, cols, "Z");
  if (bias) l.bias = vector<T>(*bias, cols, "b");
  return l;
}

// Scratch memory for the layers of the calling thread, kept between calls up to KEPT bytes. Filling a larger one takes
// much longer than allocating it.
class LayerScratch {
 public:
  explicit LayerScratch(size_t bytes) {
    if (bytes > KEPT) own_.reset(new Arena(bytes));
    thread_local std::unique_ptr<Arena> kept;
    if (!own_ && (!kept || kept->bytes() < bytes)) kept.reset(), kept.reset(new Arena(bytes));
    data_ = own_ ? own_->data() : kept->data();
  }
  void* data() const { return data_; }

 private:
  static constexpr size_t KEPT = size_t(32) << 20;
  std::unique_ptr<Arena> own_;
  void* data_;
};

template <class T>
void dense_layer(const py::array& x, const py::array& W, const MaybeArray& bias, int activation, const py::array& out,
                 const MaybeArray& pre, int n_threads) {
  const Matrix<const T> xm = matrix<T>(x, "X"), Wm = matrix<T>(W, "W");
  if (xm.cols != Wm.rows) throw std::invalid_argument("X and W: inner sizes differ");
  LayerArgs<T> l = layer_args<T>(xm.rows, Wm.cols, bias, out, pre);
  l.x = xm, l.W = Wm;
  check_apart({{&out, "out"}, {given(pre), "Z"}}, {{&x, "X"}, {&W, "W"}, {given(bias), "b"}});
  const Kernels<T>& kernels = chosen_isa().kernels<T>();
  const int nt = team(n_threads);
  elementwise(activation);
  NoGil nogil;
  const LayerScratch memory(size_t(nt) * SCRATCH * sizeof(T));
  launch(nt, [&](int tid, int n) {
    LayerArgs<T> mine = l;
    mine.scratch = static_cast<T*>(memory.data()) + tid * SCRATCH;
    kernels.dense(activation, mine, tid, n);
  });
}

template <class T>
void activate_layer(const py::array& z, const MaybeArray& bias, int activation, const py::array& out,
                    const MaybeArray& pre, int n_threads) {
  std::vector<py::array> keep;
  const Matrix<const T> zm = row_matrix<T>(z, "Z", keep);
  const LayerArgs<T> l = layer_args<T>(zm.rows, zm.cols, bias, out, pre);
  check_apart({{&out, "out"}, {given(pre), "Z"}}, {{given(bias), "b"}});
  const Kernels<T>& kernels = chosen_isa().kernels<T>();
  const int nt = team(n_threads);
  elementwise(activation);
  NoGil nogil;
  launch(nt, [&](int tid, int n) { kernels.activate(activation, zm, l, tid, n); });
}

// Computes those gradients that have an array, in one parallel region. dZ has one if the caller wants it.
template <class T>
void dense_backward_layer(const py::array& dA, const MaybeArray& x, const py::array& W, const py::array& saved,
                          int activation, const MaybeArray& dX, const MaybeArray& dW, const MaybeArray& db,
                          const MaybeArray& dZ, int n_threads) {
  std::vector<py::array> keep;
  const Matrix<const T> d = row_matrix<T>(dA, "dA", keep), s = row_matrix<T>(saved, "A", keep);
  const Matrix<const T> Wm = matrix<T>(W, "W");
  if (d.rows != s.rows || d.cols != s.cols || d.cols != Wm.cols)
    throw std::invalid_argument("dA, A and W: shapes differ");
  LayerArgs<T> by_x, by_W;
  by_x.W = {Wm.data, Wm.cols, Wm.rows, Wm.col_stride, Wm.row_stride, false};
  if (dX) by_x.out = output<T>(*dX, d.rows, Wm.rows, "dX");
  if (dW) {
    if (!x) throw std::invalid_argument("dW: needs X");
    const Matrix<const T> xm = matrix<T>(*x, "X");
    if (xm.rows != d.rows || xm.cols != Wm.rows) throw std::invalid_argument("X, dA and W: shapes differ");
    by_W.x = {xm.data, xm.cols, xm.rows, xm.col_stride, xm.row_stride, false};
    by_W.out = output<T>(*dW, Wm.rows, Wm.cols, "dW");
  }
  T* sums = db ? const_cast<T*>(vector<T>(*db, d.cols, "db")) : nullptr;
  if (db && !db->writeable()) throw std::invalid_argument("db: is read-only");
  Matrix<T> dz;
  if (dZ) dz = output<T>(*dZ, d.rows, d.cols, "dZ");
  check_apart({{given(dX), "dX"}, {given(dW), "dW"}, {given(db), "db"}},
              {{&dA, "dA"}, {given(x), "X"}, {&W, "W"}, {&saved, "A"}});
  const Kernels<T>& kernels = chosen_isa().kernels<T>();
  const int nt = team(n_threads);
  elementwise(activation);
  NoGil nogil;
  const index_t packs = index_t(nt) * SCRATCH;
  const LayerScratch memory(size_t(packs + (dZ ? 0 : d.rows * d.cols)) * sizeof(T));
  T* scratch = static_cast<T*>(memory.data());
  if (!dZ) dz = {scratch + packs, d.rows, d.cols, d.cols, 1, false};
  const Matrix<const T> dz_read = {dz.data, dz.rows, dz.cols, dz.row_stride, 1, false};
  by_x.x = by_W.W = dz_read;
  Barrier barrier;
  launch(nt, [&](int tid, int n) {
    kernels.slope(activation, d, s, dz, tid, n);
    barrier.wait(n);
    for (LayerArgs<T> l : {by_x, by_W}) {
      l.scratch = scratch + tid * SCRATCH;
      if (l.out.data) kernels.dense(ACT_LINEAR, l, tid, n);
    }
    if (sums) kernels.colsum(dz_read, sums, tid, n);
  });
}

}  // namespace

void bind_layers(py::module_& m) {
  m.def("dense", by_dtype(dense_layer<float>, dense_layer<double>));
  m.def("activate", by_dtype(activate_layer<float>, activate_layer<double>));
  m.def("dense_backward", by_dtype(dense_backward_layer<float>, dense_backward_layer<double>));
}

}  // namespace narrows
