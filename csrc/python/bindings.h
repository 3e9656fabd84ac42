// Helpers that the parts of the Python module share.

#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <unistd.h>

#include <string>

#if defined(__GLIBCXX__)
#include <cxxabi.h>
#endif

#include "cpu/isa.h"

namespace narrows {

namespace py = pybind11;

// True if the elements of `a` are T, in native byte order. (Comparing dtypes takes as long as a small layer.)
template <class T>
bool holds(const py::array& a) {
  const py::dtype type = a.dtype(), wanted = py::dtype::of<T>();
  return type.is(wanted) || (type.itemsize() == sizeof(T) && type.equal(wanted));
}

// A function that calls f32 or f64, by the dtype of its first argument.
template <class Result, class... Rest>
auto by_dtype(Result (*f32)(const py::array&, Rest...), Result (*f64)(const py::array&, Rest...)) {
  return [=](const py::array& first, Rest... rest) -> Result {
    if (holds<float>(first)) return f32(first, rest...);
    if (holds<double>(first)) return f64(first, rest...);
    throw py::type_error("expected float32 or float64, got " + std::string(py::str(first.dtype())));
  };
}

// Releases the GIL for a scope.
//
// A daemon thread may still compute when the interpreter ends. CPython ends a thread that asks for the GIL then, by
// pthread_exit. With glibc this unwinds the C++ stack, where it would meet destructors that may not throw, and abort
// the process. Such a thread sleeps here instead, until the process is gone.
class NoGil {
  // Returns fn(), or sleeps if CPython ends the thread.
  template <class Fn>
  static auto or_sleep(const Fn& fn) {
#if defined(__GLIBCXX__)
    try {
      return fn();
    } catch (abi::__forced_unwind&) {
      for (;;) pause();
    }
#else
    return fn();
#endif
  }

 public:
  NoGil() : thread_(PyEval_SaveThread()) {}
  NoGil(const NoGil&) = delete;
  NoGil& operator=(const NoGil&) = delete;
  ~NoGil() { retake(); }

  // Returns fn(), which is called with the GIL. fn must own no Python object while it runs Python code.
  template <class Fn>
  bool with_gil(const Fn& fn) {
    retake();
    struct Again {
      NoGil& released;
      ~Again() { released.thread_ = PyEval_SaveThread(); }
    } again{*this};
    return or_sleep(fn);
  }

 private:
  void retake() noexcept {
    or_sleep([this] { PyEval_RestoreThread(thread_); });
  }

  PyThreadState* thread_;
};

// Adds the functions of single layers.
void bind_layers(py::module_& m);

}  // namespace narrows
