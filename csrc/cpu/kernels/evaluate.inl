// A function of vec.inl or functors.h, by name, on an array: for tests and measurements of one instruction set.
// Included inside the namespace of an instruction set.

template <class T, class Fn>
bool map(const T* x, T* out, index_t n, const Fn& fn) {
  for (index_t i = 0; i < n; i += WIDTH<T>) store_n(out + i, fn(load_n(x + i, n - i)), n - i);
  return true;
}

// `target` is the target of a loss, or the count of a binomial coefficient. False if there is no such function.
template <class T>
bool evaluate(const char* name, T target, const T* x, T* out, index_t n) {
  const vec<T> one = splat<vec<T>>(1), y = one * target;
#define CASE(label, ...) \
  if (!__builtin_strcmp(name, label)) return map(x, out, n, [&](vec<T> v) -> vec<T> { __VA_ARGS__; });
  CASE("exp", return exp_(v))
  CASE("expm1", return expm1_(v))
  CASE("log", return log_(v))
  CASE("log1p", return log1p_(v))
  CASE("tanh", return tanh_(v))
  CASE("sqrt", return sqrt_(v))
  CASE("lgamma", return lgamma_(v))
  CASE("digamma", return digamma_(v))
  CASE("log_binomial", vec<T> rise; return log_binomial(y, v, rise))
  CASE("digamma_rise", vec<T> rise; log_binomial(y, v, rise); return rise)
  CASE("normal_cdf", return normal_cdf_times_(v, one))
  CASE("normal_quantile", return normal_quantile(v, T(0.5) - abs_(v)))  // of 1/2 + v
#define X(label, functor)                            \
  CASE(#functor "::value", return functor::value(v)) \
  CASE(#functor "::slope", return functor::slope(v)) \
  CASE(#functor "::curve", return functor::curve(v))
  NARROWS_ACTIVATIONS(X)
#undef X
  CASE("BceSigmoid::value", vec<T> e, dz, linear = BceSigmoid::eval(v, y, e, dz); return linear + log1p_(e))
  CASE("BceSigmoid::slope", vec<T> e, dz; BceSigmoid::eval(v, y, e, dz); return dz)
#undef CASE
  return false;
}
