// The elementwise activations, in the order of their numbers in python/narrows/plan/spec.py.
//
// Promises: it is the only list of them in C++. It is a macro alone, so CUDA's compiler takes it, too.

#pragma once

// X(NAME, functor)
#define NARROWS_ACTIVATIONS(X) \
  X(LINEAR, Linear)            \
  X(RELU, Relu)                \
  X(LEAKY_RELU, LeakyRelu)     \
  X(ELU, Elu)                  \
  X(GELU, Gelu)                \
  X(SILU, Silu)                \
  X(SIGMOID, Sigmoid)          \
  X(TANH, Tanh)                \
  X(SOFTPLUS, Softplus)        \
  X(EXP, Exp)
