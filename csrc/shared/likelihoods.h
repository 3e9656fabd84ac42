// Log-gamma functions and the likelihoods of counts, each once: value and derivatives over a value type V.
//
// Promises: those of functors.h, with the same requirements of V. The includer also defines DROPOUT_LIMIT, and
// expm1_given(x, e) = exp(x) - 1 for x <= 0 and e = exp(x). Differences of log-gamma functions come from differences of
// Stirling's series. So they stay accurate for large counts and large inverse dispersions, where their terms are nearly
// equal. The formulas are those of python/narrows/backends/reference/counts.py.

// Stirling's series for the logarithm of the gamma function and its derivative at z > 0:
//   lgamma(z) = (at - 1/2) log at - at + log(2 pi) / 2 + rest() - log product,
//   digamma(z) = log at - slope_rest() - harmonic.
// If z is moved, at = z + SHIFT, product = z (z + 1) ... (z + SHIFT - 1), and harmonic is its logarithmic derivative.
// If not, at = z, product = 1 and harmonic = 0. From SHIFT on, the other terms of the series are below an ulp
// (Abramowitz and Stegun, 6.1.40 and 6.3.18).
template <class V>
struct Stirling {
  using S = scalar_t<V>;
  static constexpr bool WIDE = sizeof(S) == 8;
  static constexpr int SHIFT = WIDE ? 16 : 6;
  V at, product, harmonic, inverse;

  template <class M>
  NARROWS_HD Stirling(V z, M moved) {
    V p = z, h = splat<V>(1);
    for (int k = 1; k < SHIFT; ++k) {
      const V q = z + S(k);
      h = h * q + p;
      p = p * q;
    }
    at = select(moved, z + S(SHIFT), z);
    product = select(moved, p, splat<V>(1));
    harmonic = select(moved, h / p, V{});
    inverse = S(1) / at;
  }
  NARROWS_HD V rest() const {
    const V w = inverse * inverse;
    if constexpr (WIDE)
      return inverse *
             polynomial(w, {1.0 / 156, -691.0 / 360360, 1.0 / 1188, -1.0 / 1680, 1.0 / 1260, -1.0 / 360, 1.0 / 12});
    else
      return inverse * polynomial(w, {1.0 / 1260, -1.0 / 360, 1.0 / 12});
  }
  NARROWS_HD V slope_rest() const {
    const V w = inverse * inverse;
    V p;
    if constexpr (WIDE)
      p = polynomial(w, {1.0 / 12, -691.0 / 32760, 1.0 / 132, -1.0 / 240, 1.0 / 252, -1.0 / 120, 1.0 / 12});
    else
      p = polynomial(w, {1.0 / 252, -1.0 / 120, 1.0 / 12});
    return inverse * (S(0.5) + inverse * p);
  }
};

constexpr double HALF_LOG_TAU = 0.9189385332046727;  // log(2 pi) / 2

// log Gamma(z), z > 0 and finite.
template <class V>
NARROWS_HD V lgamma_(V z) {
  using S = scalar_t<V>;
  const Stirling<V> g(z, z < splat<V>(Stirling<V>::SHIFT));
  const V log_at = log_(g.at);
  return (g.at * (log_at - S(1)) - S(0.5) * log_at) + ((S(HALF_LOG_TAU) + g.rest()) - log_(g.product));
}

// Its derivative.
template <class V>
NARROWS_HD V digamma_(V z) {
  const Stirling<V> g(z, z < splat<V>(Stirling<V>::SHIFT));
  return (log_(g.at) - g.slope_rest()) - g.harmonic;
}

// log(a / b), accurate even if a and b are nearly equal. `difference` is a - b.
template <class V>
NARROWS_HD V log_ratio(V difference, V a, V b) {
  const auto above = difference > V{};
  const V size = log1p_(abs_(difference) / select(above, b, a));
  return select(above, size, -size);
}

// log (Gamma(y + t) / (Gamma(t) y!)) for y >= 0, t > 0, and `rise`, its derivative by t: digamma(y + t) - digamma(t).
template <class V>
NARROWS_HD V log_binomial(V y, V t, V& rise) {
  using S = scalar_t<V>;
  constexpr int N = Stirling<V>::SHIFT;
  // b = y + t is moved if t is moved. Not for large y: the product would overflow.
  const auto small = t < splat<V>(N), low = y < splat<V>(64), lowest = y < splat<V>(N - 1);
  const Stirling<V> b(y + t, small & low), c(y + S(1), lowest), a(t, small);
  const V none{}, all = splat<V>(N), apart = select(small, select(low, none, all), none);
  const V moved = select(lowest, all, none), beyond = select(small & low, all, none) - moved;
  const V ratio = log1p_((y - apart) / a.at), across = log_ratio((t - S(1)) + beyond, b.at, c.at), log_c = log_(c.at);
  rise = ((ratio - b.slope_rest()) + a.slope_rest()) + (a.harmonic - b.harmonic);
  // (b - 1/2) log b - (c - 1/2) log c - (a - 1/2) log a - (b - c - a) of the moved arguments.
  V sum = (y - apart) * across - (S(0.5) + moved + apart) * log_c;
  sum += (a.at - S(0.5)) * ratio;
  sum += ((S(1 - HALF_LOG_TAU) + moved) + apart) + ((b.rest() - c.rest()) - a.rest());
  return sum + log_(c.product * a.product / b.product);
}

// --- likelihoods -----------------------------------------------------------------------------------------------------
// A count has mean mu, inverse dispersion theta (variance mu + mu^2 / theta), and logit zeta of being zero by dropout.
// The terms are minus its log-probability, and the derivatives by log mu, log theta and zeta.

template <class V>
struct CountTerms {
  V loss{}, by_mean{}, by_dispersion{}, by_dropout{};
};

// The smallest mean that is a divisor. For smaller means the logarithm of the mean is used.
constexpr double LEAST_MEAN = 1e-30;

struct Poisson {
  static constexpr bool DISPERSED = false, DROPOUT = false;
  // The terms of a zero; `inverse` is 1 / theta.
  template <class V>
  NARROWS_HD static CountTerms<V> zero(V mu, V, V, V) {
    CountTerms<V> t;
    t.loss = t.by_mean = mu;
    return t;
  }
  // The terms of a count y > 0, from the terms of a zero in its place.
  template <class V>
  NARROWS_HD static CountTerms<V> count(V y, V mu, V log_mu, V, V, CountTerms<V> t) {
    using S = scalar_t<V>;
    constexpr int N = Stirling<V>::SHIFT;
    // log y! - y log mu by Stirling's series of y + 1. Its logarithm and that of mu form one term.
    const auto lowest = y < splat<V>(N - 1);
    const Stirling<V> c(y + S(1), lowest);
    const V half = S(0.5) + select(lowest, splat<V>(N), V{});
    const V log_c = log_(c.at);
    const V above = select(mu > splat<V>(LEAST_MEAN), log_ratio(c.at - mu, c.at, mu), log_c - log_mu);
    V sum = y * above;
    sum += half * log_c;
    sum += (mu - c.at) + ((S(HALF_LOG_TAU) + c.rest()) - log_(c.product));
    t.loss = sum;
    t.by_mean = mu - y;
    return t;
  }
};

struct Nb {
  static constexpr bool DISPERSED = true, DROPOUT = false;
  template <class V>
  NARROWS_HD static CountTerms<V> zero(V mu, V theta, V inverse, V) {
    CountTerms<V> t;
    const V q = mu * inverse;
    t.loss = theta * log1p_(q);
    t.by_mean = mu / (q + scalar_t<V>(1));
    t.by_dispersion = t.loss - t.by_mean;
    return t;
  }
  template <class V>
  NARROWS_HD static CountTerms<V> count(V y, V mu, V log_mu, V theta, V, CountTerms<V> t) {
    V rise;
    const V binomial = log_binomial(y, theta, rise), share = theta / (theta + mu);
    const V odds = select(mu > splat<V>(LEAST_MEAN), log1p_(theta / mu), log_(theta) - log_mu);
    t.loss += y * odds - binomial;
    t.by_mean = (mu - y) * share;
    t.by_dispersion += y * share - theta * rise;
    return t;
  }
};

// A zero has the probability w = pi + (1 - pi) P(0) with pi = sigmoid(zeta). Its logarithm is -log1p(u / w), u = 1 - w.
// w and u are computed without cancellation.
struct Zinb {
  static constexpr bool DISPERSED = true, DROPOUT = true;
  template <class V>
  NARROWS_HD static V clipped(V zeta) {
    return max_(splat<V>(-DROPOUT_LIMIT), min_(splat<V>(DROPOUT_LIMIT), zeta));
  }
  template <class V>
  NARROWS_HD static CountTerms<V> zero(V mu, V theta, V inverse, V zeta) {
    CountTerms<V> t = Nb::zero(mu, theta, inverse, zeta);
    const V one = splat<V>(1), e = exp_(-abs_(clipped(zeta))), part = one / (one + e);
    const auto negative = zeta < V{};
    const V dropped = select(negative, e, one) * part, kept = select(negative, one, e) * part;
    const V zero = exp_(-t.loss), expected = kept * zero, inverse_w = one / (dropped + expected);
    const V odds = -kept * expm1_given(-t.loss, zero) * inverse_w, share = expected * inverse_w;
    t.loss = log1p_(odds);
    t.by_mean = t.by_mean * share;
    t.by_dispersion = t.by_dispersion * share;
    t.by_dropout = -dropped * odds;
    return t;
  }
  template <class V>
  NARROWS_HD static CountTerms<V> count(V y, V mu, V log_mu, V theta, V zeta, CountTerms<V>) {
    const V one = splat<V>(1), z = clipped(zeta), e = exp_(-abs_(z));
    CountTerms<V> t = Nb::count(y, mu, log_mu, theta, zeta, Nb::zero(mu, theta, one / theta, zeta));
    t.loss += max_(V{}, z) + log1p_(e);
    t.by_dropout = select(zeta < V{}, e, one) / (one + e);
    return t;
  }
};
