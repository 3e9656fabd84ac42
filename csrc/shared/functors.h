// Each activation and each loss, once: value and derivative over a value type V.
//
// Promises: valid C++17 and valid NVRTC. The formulas are those of python/narrows/backends/reference/activations.py and
// dense.py. Included inside a namespace of the includer, so that each instruction set has functions of its own.
//
// V is a scalar or a short vector with arithmetic operators. The includer defines for it
//   scalar_t<V>, splat<V>(x), select(mask, a, b), max_ and min_ (b if a or b is NaN);
//   abs_, exp_, expm1_, log_, log1p_, tanh_, sqrt_, gelu_slope_;
//   exp_times_(x, w) = w exp(x) and normal_cdf_times_(x, w) = w Phi(x), accurate even if the factor of w is subnormal.

#ifndef NARROWS_HD
#define NARROWS_HD inline
#endif

// --- activations -----------------------------------------------------------------------------------------------------
// value(z) is the activation, slope(s) its derivative and curve(s) its second derivative, which is 0 at a kink. s is
// the saved tensor: the output a, or z if FROM_PRE is true.

// Straight on both sides of zero.
struct PiecewiseLinear {
  static constexpr bool FROM_PRE = false;
  template <class V>
  NARROWS_HD static V curve(V) {
    return V{};
  }
};

struct Linear : PiecewiseLinear {
  template <class V>
  NARROWS_HD static V value(V z) {
    return z;
  }
  template <class V>
  NARROWS_HD static V slope(V) {
    return splat<V>(1);
  }
};

struct Relu : PiecewiseLinear {
  template <class V>
  NARROWS_HD static V value(V z) {
    return max_(V{}, z);
  }
  template <class V>
  NARROWS_HD static V slope(V a) {
    return select(a > V{}, splat<V>(1), V{});
  }
};

// Slope 0.01 below zero (Maas et al., 2013).
struct LeakyRelu : PiecewiseLinear {
  template <class V>
  NARROWS_HD static V value(V z) {
    return max_(scalar_t<V>(0.01) * z, z);
  }
  template <class V>
  NARROWS_HD static V slope(V a) {
    return select(a > V{}, splat<V>(1), splat<V>(0.01));
  }
};

struct Elu {
  static constexpr bool FROM_PRE = false;
  template <class V>
  NARROWS_HD static V value(V z) {
    return select(z > V{}, z, expm1_(min_(V{}, z)));
  }
  template <class V>
  NARROWS_HD static V slope(V a) {
    return select(a > V{}, splat<V>(1), a + scalar_t<V>(1));
  }
  template <class V>
  NARROWS_HD static V curve(V a) {
    return select(a > V{}, V{}, a + scalar_t<V>(1));
  }
};

// The exact form, z times the normal distribution function (Hendrycks and Gimpel, 2016).
struct Gelu {
  static constexpr bool FROM_PRE = true;
  template <class V>
  NARROWS_HD static V value(V z) {
    const V t = max_(splat<V>(-40), z);  // 0 from there on, and at -infinity
    return normal_cdf_times_(t, t);
  }
  template <class V>
  NARROWS_HD static V slope(V z) {
    return gelu_slope_(z);
  }
  template <class V>
  NARROWS_HD static V curve(V z) {
    using S = scalar_t<V>;
    const V t = min_(splat<V>(40), abs_(z)), square = t * t;  // 0 from there on
    return S(0.3989422804014327) * exp_(S(-0.5) * square) * (S(2) - square);
  }
};

struct Sigmoid {
  static constexpr bool FROM_PRE = false;
  template <class V>
  NARROWS_HD static V value(V z) {
    const V e = exp_(-abs_(z)), one = splat<V>(1);
    return select(z < V{}, e, one) / (one + e);
  }
  template <class V>
  NARROWS_HD static V slope(V a) {
    return a * (scalar_t<V>(1) - a);
  }
  template <class V>
  NARROWS_HD static V curve(V a) {
    using S = scalar_t<V>;
    return a * (S(1) - a) * (S(1) - S(2) * a);
  }
};

struct Silu {
  static constexpr bool FROM_PRE = true;
  template <class V>
  NARROWS_HD static V value(V z) {
    const V t = max_(splat<V>(-800), z), a = -abs_(t);  // 0 from there on, and at -infinity
    const V q = t / (scalar_t<V>(1) + exp_(a));
    return select(z < V{}, exp_times_(a, q), q);
  }
  template <class V>
  NARROWS_HD static V slope(V z) {
    // Let e = exp(-|z|) and r = 1 / (1 + e). The slope at -|z| is e r (1 - |z| r). The slopes at |z| and -|z| add up
    // to 1. r is computed as 1 - e / (1 + e), so the rounding of 1 + e does not matter if e is small.
    using S = scalar_t<V>;
    const V a = min_(splat<V>(800), abs_(z)), e = exp_(-a), r = S(1) - e / (S(1) + e);
    const V below = exp_times_(-a, r * (S(1) - a * r));
    return select(z < V{}, below, S(1) - below);
  }
  template <class V>
  NARROWS_HD static V curve(V z) {
    // An even function: with e = exp(-|z|), s (1 - s) = e / (1 + e)**2 and 1 - 2 s = -(1 - e) / (1 + e) at |z|.
    using S = scalar_t<V>;
    const V t = min_(splat<V>(80), abs_(z)), e = exp_(-t), r = S(1) / (S(1) + e);
    return e * r * r * (S(2) - t * ((S(1) - e) * r));
  }
};

struct Tanh {
  static constexpr bool FROM_PRE = false;
  template <class V>
  NARROWS_HD static V value(V z) {
    return tanh_(z);
  }
  template <class V>
  NARROWS_HD static V slope(V a) {
    using S = scalar_t<V>;
    return (S(1) - a) * (S(1) + a);
  }
  template <class V>
  NARROWS_HD static V curve(V a) {
    using S = scalar_t<V>;
    return S(-2) * a * ((S(1) - a) * (S(1) + a));
  }
};

struct Softplus {
  static constexpr bool FROM_PRE = false;
  template <class V>
  NARROWS_HD static V value(V z) {
    return max_(V{}, z) + log1p_(exp_(-abs_(z)));
  }
  template <class V>
  NARROWS_HD static V slope(V a) {
    return -expm1_(-a);
  }
  template <class V>
  NARROWS_HD static V curve(V a) {
    return -expm1_(-a) * exp_(-a);
  }
};

struct Exp {
  static constexpr bool FROM_PRE = false;
  template <class V>
  NARROWS_HD static V value(V z) {
    return exp_(z);
  }
  template <class V>
  NARROWS_HD static V slope(V a) {
    return a;
  }
  template <class V>
  NARROWS_HD static V curve(V a) {
    return a;
  }
};

// --- losses ----------------------------------------------------------------------------------------------------------
// value(p, y) of one feature, and slope(p, y) = d value / d p.

struct Mse {
  template <class V>
  NARROWS_HD static V value(V p, V y, scalar_t<V>) {
    return (p - y) * (p - y);
  }
  template <class V>
  NARROWS_HD static V slope(V p, V y, scalar_t<V>) {
    return scalar_t<V>(2) * (p - y);
  }
};

struct Huber {
  template <class V>
  NARROWS_HD static V value(V p, V y, scalar_t<V> delta) {
    using S = scalar_t<V>;
    const V d = abs_(p - y);
    return select(d > V{} + delta, delta * (d - S(0.5) * delta), S(0.5) * d * d);
  }
  template <class V>
  NARROWS_HD static V slope(V p, V y, scalar_t<V> delta) {
    const V d = p - y, bound = V{} + delta;
    return select(d > bound, bound, select(d < -bound, -bound, d));
  }
};

// For links without a joint form. A probability is at least the smallest normal number, so the loss of 0 and 1 is
// finite.
struct Bce {
  template <class V>
  NARROWS_HD static V floor(V p) {
    return max_(splat<V>(sizeof(scalar_t<V>) == 8 ? 3.720075976020836e-44 : 1.17549435e-38), p);
  }
  template <class V>
  NARROWS_HD static V value(V p, V y, scalar_t<V>) {
    const V one = splat<V>(1);
    return -(y * log_(floor(p)) + (one - y) * log_(floor(one - p)));
  }
  template <class V>
  NARROWS_HD static V slope(V p, V y, scalar_t<V>) {
    const V one = splat<V>(1);
    return (one - y) / floor(one - p) - y / floor(p);
  }
};

// Cross-entropy behind a sigmoid, from logits: exact for any z and free of cancellation. A feature costs
// max(z, 0) - z y + log(1 + e), e = exp(-|z|); the caller adds the logarithm.
struct BceSigmoid {
  template <class V>
  NARROWS_HD static V eval(V z, V y, V& e, V& dz) {
    const V one = splat<V>(1);
    e = exp_(-abs_(z));
    const V t = e / (one + e);  // sigmoid(-|z|)
    dz = select(z < V{}, t - y, (one - y) - t);
    return max_(V{}, z) - z * y;
  }
};

// A loss behind an elementwise link: value and derivative by the pre-activation z.
template <class Loss, class Act>
struct Linked {
  template <class V>
  NARROWS_HD static V eval(V z, V y, scalar_t<V> delta, V& dz) {
    const V p = Act::value(z);
    dz = Loss::slope(p, y, delta) * Act::slope(Act::FROM_PRE ? z : p);
    return Loss::value(p, y, delta);
  }
};

template <class Loss>
struct Linked<Loss, Linear> {
  template <class V>
  NARROWS_HD static V eval(V z, V y, scalar_t<V> delta, V& dz) {
    dz = Loss::slope(z, y, delta);
    return Loss::value(z, y, delta);
  }
};

// --- normal quantile -------------------------------------------------------------------------------------------------

template <class V, int N>
NARROWS_HD V polynomial(V x, const double (&coefficients)[N]) {
  V p = splat<V>(coefficients[0]);
  for (int i = 1; i < N; ++i) p = p * x + scalar_t<V>(coefficients[i]);
  return p;
}

// The standard normal quantile of 1/2 + q, |q| < 1/2 (Wichura, Algorithm AS 241, Applied Statistics 37, 1988: PPND7 for
// float32, PPND16 for float64). The caller passes `tail`, the exact value of 1/2 - |q|. Numbers of 24 bits never reach
// the algorithm's far tail.
template <class V>
NARROWS_HD V normal_quantile(V q, V tail) {
  using S = scalar_t<V>;
  const V r = S(0.180625) - q * q, t = sqrt_(-log_(tail)) - S(1.6);
  V num, den, num_tail, den_tail;
  if constexpr (sizeof(S) == 4) {
    num = polynomial(r, {5.9109374720e+1, 1.5929113202e+2, 5.0434271938e+1, 3.3871327179e+0});
    den = polynomial(r, {6.7187563600e+1, 7.8757757664e+1, 1.7895169469e+1, 1.0});
    num_tail = polynomial(t, {1.7023821103e-1, 1.3067284816e+0, 2.7568153900e+0, 1.4234372777e+0});
    den_tail = polynomial(t, {1.2021132975e-1, 7.3700164250e-1, 1.0});
  } else {
    num = polynomial(
        r, {2.5090809287301226727e+3, 3.3430575583588128105e+4, 6.7265770927008700853e+4, 4.5921953931549871457e+4,
            1.3731693765509461125e+4, 1.9715909503065514427e+3, 1.3314166789178437745e+2, 3.3871328727963666080e+0});
    den = polynomial(
        r, {5.2264952788528545610e+3, 2.8729085735721942674e+4, 3.9307895800092710610e+4, 2.1213794301586595867e+4,
            5.3941960214247511077e+3, 6.8718700749205790830e+2, 4.2313330701600911252e+1, 1.0});
    num_tail = polynomial(t, {7.74545014278341407640e-4, 2.27238449892691845833e-2, 2.41780725177450611770e-1,
                              1.27045825245236838258e+0, 3.64784832476320460504e+0, 5.76949722146069140550e+0,
                              4.63033784615654529590e+0, 1.42343711074968357734e+0});
    den_tail = polynomial(
        t, {1.05075007164441684324e-9, 5.47593808499534494600e-4, 1.51986665636164571966e-2, 1.48103976427480074590e-1,
            6.89767334985100004550e-1, 1.67638483018380384940e+0, 2.05319162663775882187e+0, 1.0});
  }
  const auto in_tail = abs_(q) > splat<V>(0.425);
  return select(in_tail, select(q < V{}, -num_tail, num_tail), q * num) / select(in_tail, den_tail, den);
}
