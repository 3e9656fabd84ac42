// Helpers that the parts of the Python module share.

#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>

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

// Adds the functions of single layers.
void bind_layers(py::module_& m);

}  // namespace narrows
