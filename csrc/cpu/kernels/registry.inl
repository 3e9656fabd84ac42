// How the kernel of an op is found: run_of(op, args) is the function that runs it, and cost_of(op, args, batch,
// bfloat16) what it takes. The file of a kernel registers it, in one line after it; table.inl collects all by ops.def.
// Included inside the namespace of an instruction set.

// fn(functor of the activation); null for one that is not elementwise.
template <class Fn>
inline auto by_activation(int activation, const Fn& fn) -> decltype(fn(Linear())) {
  switch (activation) {
#define X(name, functor) \
  case ACT_##name:       \
    return fn(functor());
    NARROWS_ACTIVATIONS(X)
#undef X
  }
  return nullptr;
}

// A type, as a value.
template <class T>
struct Type {
  using type = T;
};

template <class T>
struct Sgd;
template <class T>
struct Adam;

// fn(rule of the solver); AdamW differs from Adam by the decay alone, which is an attribute.
template <class T, class Fn>
inline auto by_solver(int solver, const Fn& fn) -> decltype(fn(Type<Sgd<T>>())) {
  return solver == SOLVER_SGD ? fn(Type<Sgd<T>>()) : fn(Type<Adam<T>>());
}

#define NARROWS_RUN(NAME, kernel)          \
  template <class T>                       \
  Op<T> run_of(op::NAME, const Args<T>&) { \
    return kernel<T>;                      \
  }
#define NARROWS_RUN_BY_ACTIVATION(NAME, kernel)                                                                   \
  template <class T>                                                                                              \
  Op<T> run_of(op::NAME, const Args<T>& args) {                                                                   \
    return by_activation(args[op::NAME::activation], [](auto act) -> Op<T> { return kernel<decltype(act), T>; }); \
  }
#define NARROWS_RUN_BY_SOLVER(NAME, kernel)                                                           \
  template <class T>                                                                                  \
  Op<T> run_of(op::NAME, const Args<T>& args) {                                                       \
    return by_solver<T>(args[op::NAME::solver],                                                       \
                        [](auto rule) -> Op<T> { return kernel<typename decltype(rule)::type, T>; }); \
  }

// Most ops take no scratch memory but SCRATCH, and make no products that count.
template <class O, class T>
Cost cost_of(O, const Args<T>&, index_t, bool) {
  return {};
}
