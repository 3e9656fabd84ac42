// Short vectors of one instruction set, and the functions that the functors need.
//
// Promises: a function does the same operations in every lane, for every vector width. So the result of an element
// depends neither on its neighbours nor on the width. float32 functions are polynomials in vector registers. They are
// accurate to a few ulp for all numbers, also subnormal ones (see docs/accuracy.md). NaN gives NaN. float64 uses the C
// library, lane by lane.
// Included inside the namespace of an instruction set; NARROWS_VECTOR_BYTES is its vector width.

template <class V>
struct scalar_of {
  using type = V;
};
template <class T>
struct vec_of;
template <>
struct vec_of<float> {
  typedef float type __attribute__((vector_size(NARROWS_VECTOR_BYTES)));
  typedef int32_t bits __attribute__((vector_size(NARROWS_VECTOR_BYTES)));
};
template <>
struct vec_of<double> {
  typedef double type __attribute__((vector_size(NARROWS_VECTOR_BYTES)));
  typedef int64_t bits __attribute__((vector_size(NARROWS_VECTOR_BYTES)));
};
template <>
struct vec_of<int32_t> {
  using type = vec_of<float>::bits;
};
template <>
struct scalar_of<vec_of<float>::type> {
  using type = float;
};
template <>
struct scalar_of<vec_of<double>::type> {
  using type = double;
};
template <class T>
using vec = typename vec_of<T>::type;
template <class V>
using scalar_t = typename scalar_of<V>::type;

using vf = vec<float>;
using vi = vec_of<float>::bits;
using vd = vec<double>;

template <class T>
constexpr int WIDTH = NARROWS_VECTOR_BYTES / int(sizeof(T));

template <class M, class V>
inline V select(M mask, V a, V b) {
  return mask ? a : b;
}

template <class V>
inline V splat(double x) {
  return V{} + scalar_t<V>(x);
}
// The greater and the lesser; b where either is NaN or both are zero, as in x86 instructions.
template <class V>
inline V max_(V a, V b) {
  return select(a > b, a, b);
}
template <class V>
inline V min_(V a, V b) {
  return select(a < b, a, b);
}
// Compilers do not choose these instructions on their own, because of NaN.
#if NARROWS_VECTOR_BYTES == 64
#define NARROWS_X86(name, a, b) _mm512_maskz_##name(-1, a, b)  // gcc 12 warns about the unmasked forms
#elif NARROWS_VECTOR_BYTES == 32
#define NARROWS_X86(name, a, b) _mm256_##name(a, b)
#elif defined(__SSE2__)
#define NARROWS_X86(name, a, b) _mm_##name(a, b)
#endif
#ifdef NARROWS_X86
inline vf max_(vf a, vf b) { return NARROWS_X86(max_ps, a, b); }
inline vf min_(vf a, vf b) { return NARROWS_X86(min_ps, a, b); }
inline vd max_(vd a, vd b) { return NARROWS_X86(max_pd, a, b); }
inline vd min_(vd a, vd b) { return NARROWS_X86(min_pd, a, b); }
#endif

template <class T>
inline vec<T> load(const T* p) {
  vec<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
inline void store(T* p, vec<T> v) {
  __builtin_memcpy(p, &v, sizeof v);
}
// The first n lanes; the others are zero (load) or left alone (store), and their memory is not touched.
#if defined(__AVX512F__)
inline __mmask16 first_lanes(index_t n) { return __mmask16((1u << n) - 1); }
inline vf load_part(const float* p, index_t n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
inline vd load_part(const double* p, index_t n) { return _mm512_maskz_loadu_pd(__mmask8(first_lanes(n)), p); }
inline vf keep_part(vf v, index_t n) { return _mm512_maskz_mov_ps(first_lanes(n), v); }
inline vd keep_part(vd v, index_t n) { return _mm512_maskz_mov_pd(__mmask8(first_lanes(n)), v); }
inline void store_part(float* p, vf v, index_t n) { _mm512_mask_storeu_ps(p, first_lanes(n), v); }
inline void store_part(double* p, vd v, index_t n) { _mm512_mask_storeu_pd(p, __mmask8(first_lanes(n)), v); }
#elif defined(__AVX2__)
inline __m256i first_lanes(index_t n, vi lanes) { return __m256i(lanes < int32_t(n)); }
inline __m256i first_floats(index_t n) { return first_lanes(n, vi{0, 1, 2, 3, 4, 5, 6, 7}); }
inline __m256i first_doubles(index_t n) { return first_lanes(n, vi{0, 0, 1, 1, 2, 2, 3, 3}); }
inline vf load_part(const float* p, index_t n) { return _mm256_maskload_ps(p, first_floats(n)); }
inline vd load_part(const double* p, index_t n) { return _mm256_maskload_pd(p, first_doubles(n)); }
inline vf keep_part(vf v, index_t n) { return _mm256_and_ps(v, __m256(first_floats(n))); }
inline vd keep_part(vd v, index_t n) { return _mm256_and_pd(v, __m256d(first_doubles(n))); }
inline void store_part(float* p, vf v, index_t n) { _mm256_maskstore_ps(p, first_floats(n), v); }
inline void store_part(double* p, vd v, index_t n) { _mm256_maskstore_pd(p, first_doubles(n), v); }
#else
template <class T>
inline vec<T> load_part(const T* p, index_t n) {
  vec<T> v{};
  for (index_t i = 0; i < n; ++i) v[i] = p[i];
  return v;
}
template <class V>
inline V keep_part(V v, index_t n) {
  for (index_t i = n; i < index_t(sizeof v / sizeof v[0]); ++i) v[i] = 0;
  return v;
}
template <class T>
inline void store_part(T* p, vec<T> v, index_t n) {
  for (index_t i = 0; i < n; ++i) p[i] = v[i];
}
#endif

template <class T>
inline vec<T> load_n(const T* p, index_t n) {
  return n >= WIDTH<T> ? load(p) : load_part(p, n);
}
template <class T>
inline void store_n(T* p, vec<T> v, index_t n) {
  n >= WIDTH<T> ? store(p, v) : store_part(p, v, n);
}

// The first n lanes of v, and zeros.
template <class V>
inline V keep_n(V v, index_t n) {
  return n >= index_t(sizeof v / sizeof v[0]) ? v : keep_part(v, n);
}

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

// v itself. If v is a product, it is rounded here. Otherwise a compiler may fuse any product of a sum, depending on
// what it has inlined.
template <class V>
inline V rounded_value(V v) {
#if defined(__x86_64__)
  __asm__("" : "+x"(v));
#elif defined(__aarch64__)
  __asm__("" : "+w"(v));
#endif
  return v;
}

inline vf abs_(vf a) { return bit_cast<vf>(bit_cast<vi>(a) & 0x7fffffff); }
inline vd abs_(vd a) { return bit_cast<vd>(bit_cast<vec_of<double>::bits>(a) & 0x7fffffffffffffff); }

template <class V>
inline V splat_bits(uint32_t bits) {
  return V{} + int32_t(bits);
}

// Elements 0, 2, 4, ... of the two vectors one after the other, and elements 1, 3, 5, ...
template <int FIRST, int... I>
inline vf every_second(vf a, vf b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (2 * I + FIRST)...);
}
inline vf evens(vf a, vf b) { return every_second<0>(a, b, std::make_integer_sequence<int, WIDTH<float>>()); }
inline vf odds(vf a, vf b) { return every_second<1>(a, b, std::make_integer_sequence<int, WIDTH<float>>()); }

// A sum over LANES virtual lanes. Element j of a row goes to lane j % LANES, and the lanes are added in a fixed order
// at the end. So the sum does not depend on the vector width.
template <class T>
struct LaneSum {
  static constexpr int N = LANES / WIDTH<T>;
  vec<T> lane[N] = {};
  void add(index_t j, vec<T> v) { lane[(j / WIDTH<T>) % N] += rounded_value(v); }
  double total() const {
    typedef T half __attribute__((vector_size(LANES / 2 * sizeof(T))));
    typedef double v8 __attribute__((vector_size(64)));
    typedef double v4 __attribute__((vector_size(32)));
    typedef double v2 __attribute__((vector_size(16)));
    static_assert(LANES == 16, "the tree below has four levels");
    half low, high;
    __builtin_memcpy(&low, lane, sizeof low);
    __builtin_memcpy(&high, reinterpret_cast<const char*>(lane) + sizeof low, sizeof high);
    const v8 a = __builtin_convertvector(low, v8) + __builtin_convertvector(high, v8);
    const v4 b = __builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7);
    const v2 c = __builtin_shufflevector(b, b, 0, 1) + __builtin_shufflevector(b, b, 2, 3);
    return c[0] + c[1];
  }
};

// --- float32 ---------------------------------------------------------------------------------------------------------

constexpr float PHI_0 = 0.398942280f;                                // 1 / sqrt(2 pi)
constexpr float LN2_HIGH = 0x1.62e4p-1f, LN2_LOW = 0x1.7f7d1cp-20f;  // k LN2_HIGH is exact for |k| < 2**9

// k = round(x / ln 2), |x| < 2**21; the low nine bits of n hold the integer k + BIAS.
template <int BIAS>
inline vf over_ln2(vf x, vi& n) {
  const vf magic = splat<vf>(12582912.0 + BIAS);  // 1.5 * 2**23: adding it rounds to an integer in the low bits
  const vf shifted = x * 1.44269504f + magic;
  n = bit_cast<vi>(shifted);
  return shifted - magic;
}

// f = x - k ln 2, |f| < 0.35
template <int BIAS>
inline vf reduce(vf x, vf& k, vi& n) {
  k = over_ln2<BIAS>(x, n);
  return (x - k * LN2_HIGH) - k * LN2_LOW;
}

// x 2**k, rounded once, with k and n of over_ln2<254>, |k| < 180. Two factors, because 2**k may be out of range.
inline vf ldexp_(vf x, [[maybe_unused]] vf k, [[maybe_unused]] vi n) {
#if NARROWS_VECTOR_BYTES == 64
  return NARROWS_X86(scalef_ps, x, k);  // the same bits
#else
  const vi half = n >> 1;
  return x * bit_cast<vf>(half << 23) * bit_cast<vf>((n - half) << 23);
#endif
}

// Polynomials are in powers of the square, with pairs of coefficients: half the latency of Horner's rule.

// exp(f) - 1 on |f| < 0.35; coefficients of Cephes (Moshier).
inline vf expm1_reduced(vf f) {
  const vf z = f * f;
  vf p = f * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * z + (f * 8.3334519073e-3f + 4.1665795894e-2f);
  p = p * z + (f * 1.6666665459e-1f + 5.0000001201e-1f);
  return p * z + f;
}

// w exp(x), rounded once after the product. So it is accurate even if exp(x) is subnormal. For w = 0, |w| in
// 2**(-60..60), and any w if |x| < 0.34.
inline vf exp_times_(vf x, vf w) {
  // Clamped where the result is 0 or infinity anyway.
  x = max_(splat<vf>(-115.0), min_(splat<vf>(89.0), x));
  vf k;
  vi n;
  const vf f = reduce<254>(x, k, n);
  return ldexp_((expm1_reduced(f) + 1.0f) * w, k, n);
}

inline vf exp_(vf x) { return exp_times_(x, splat<vf>(1)); }

// 2**k (expm1(f) + 1) - 1 with a single rounding after expm1(f). For x < 88, where 2**k is a number.
inline vf expm1_(vf x) {
  x = max_(splat<vf>(-20.0), x);
  vf k;
  vi n;
  const vf f = reduce<127>(x, k, n), power = bit_cast<vf>(n << 23);
  return power * expm1_reduced(f) + (power - 1.0f);
}

// exp(x) - 1 for x <= 0, given e = exp(x).
inline vf expm1_given(vf x, vf e) { return select(x > splat<vf>(-0.34), expm1_reduced(x), e - 1.0f); }

// log(2**k (1 + m)) for 1 + m in [sqrt(1/2), sqrt(2)); coefficients of Cephes (Moshier).
inline vf log_reduced(vf m, vf k) {
  const vf z = m * m;
  vf p = z * 7.0376836292e-2f + (m * -1.1514610310e-1f + 1.1676998740e-1f);
  p = p * z + (m * -1.2420140846e-1f + 1.4249322787e-1f);
  p = p * z + (m * -1.6668057665e-1f + 2.0000714765e-1f);
  p = p * z + (m * -2.4999993993e-1f + 3.3333331174e-1f);
  p = p * m * z + k * LN2_LOW - 0.5f * z;
  return (m + p) + k * LN2_HIGH;
}

// a - b modulo 2**32. NaN and infinity may have any bits.
inline vi minus_bits(vi a, vi b) {
  typedef uint32_t vu __attribute__((vector_size(NARROWS_VECTOR_BYTES)));
  return bit_cast<vi>(bit_cast<vu>(a) - bit_cast<vu>(b));
}

// The bits of 2**k minus those of 1, for a normal x = 2**k m with m in [sqrt(1/2), sqrt(2)).
inline vi exponent(vf x) { return minus_bits(bit_cast<vi>(x), vi{} + 0x3f3504f3) & int32_t(0xff800000u); }

inline vf log_(vf x) {
  const vf inf = splat<vf>(__builtin_inf());
  const auto subnormal = x < splat<vf>(0x1p-126);
  const vf scaled = select(subnormal, x * 0x1p23f, x);
  const vi power = exponent(scaled);
  const vf k = __builtin_convertvector(power >> 23, vf) - select(subnormal, splat<vf>(23), vf{});
  vf y = log_reduced(bit_cast<vf>(minus_bits(bit_cast<vi>(scaled), power)) - 1.0f, k);
  y = select(x < inf, y, x);  // and NaN is kept
  y = select(x == vf{}, -inf, y);
  return select(x < vf{}, splat<vf>(__builtin_nan("")), y);
}

// For x >= 0. Callers pass nothing else.
inline vf log1p_(vf x) {
  const vf inf = splat<vf>(__builtin_inf());
  const vi power = exponent(x + 1.0f);
  // m = (1 + x) / 2**k - 1 from x itself, not from the rounded 1 + x. Four times 2**-k is in range for every k.
  const vf inverse = bit_cast<vf>(minus_bits(vi{} + 0x40800000, power));
  const vf m = x * inverse * 0.25f + (inverse * 0.25f - 1.0f);
  return select(x == inf, inf, log_reduced(m, __builtin_convertvector(power >> 23, vf)));
}

inline vf tanh_(vf x) {
  const vf a = abs_(x), z = x * x;
  // Cephes (Moshier)
  vf p = z * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const vf small = p * z * x + x;
  // 1 - 2 / (exp(2 a) + 1), which is 1 from 9.1 on
  vf k;
  vi n;
  const vf f = reduce<127>(min_(splat<vf>(20), a + a), k, n);
  const vf large = 1.0f - 2.0f / ((expm1_reduced(f) + 1.0f) * bit_cast<vf>(n << 23) + 1.0f);
  const vi sign = bit_cast<vi>(x) & int32_t(0x80000000u);
  return select(a < splat<vf>(0.625), small, bit_cast<vf>(bit_cast<vi>(large) | sign));
}

// w phi(a) with the normal density phi, 0 <= a <= 15; w as in exp_times_. The square of a is in two parts, because the
// exponential makes its rounding error a**2 / 2 times as large.
inline vf normal_pdf_times(vf a, vf w) {
  const vf head = bit_cast<vf>(bit_cast<vi>(a) & int32_t(0xfffff000u));  // 12 bits: its square is exact
  const vf high = -0.5f * head * head, low = 0.5f * (head - a) * (head + a);
  vi n;
  const vf k = over_ln2<254>(high + low, n), f = (high - k * LN2_HIGH) - (k * LN2_LOW - low);
  return ldexp_((expm1_reduced(f) * PHI_0 + PHI_0) * w, k, n);
}

// phi(a) / Phi(-a) with the normal distribution function Phi, 0 <= a <= 15. It is 2 phi(0) + a (1 - s). s falls slowly
// from 0.36 to 0, so its errors hardly count. s = P(a) / Q(a) is fitted to the least relative error of the result on
// [0, 14.4], which is 1.8e-8.
inline vf normal_hazard(vf a) {
  vf p = a * 0.00767060556f + 0.0626053885f;
  p = p * a + 0.222651899f;
  p = p * a + 0.363379627f;
  vf q = a * 0.00961493887f + 0.0904582292f;
  q = q * a + 0.393508554f;
  q = q * a + 0.912685156f;
  q = q * a + 1.0f;
  return a * (1.0f - p / q) + 2.0f * PHI_0;
}

// w Phi(x); w as in exp_times_.
inline vf normal_cdf_times_(vf x, vf w) {
  const vf a = min_(splat<vf>(15), abs_(x));
  const auto negative = x < vf{};
  const vf tail = normal_pdf_times(a, select(negative, w, splat<vf>(1)) / normal_hazard(a));
  return select(negative, tail, w * (1.0f - tail));
}

// Phi(x) + x phi(x), the derivative of x Phi(x). The values at x and -x add up to 1.
inline vf gelu_slope_(vf x) {
  const vf a = min_(splat<vf>(15), abs_(x));
  const vf below = normal_pdf_times(a, 1.0f / normal_hazard(a) - a);
  return select(x < vf{}, below, 1.0f - below);
}

inline vf sqrt_(vf x) {
  for (int i = 0; i < WIDTH<float>; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
}

// --- float64 ---------------------------------------------------------------------------------------------------------

#define NARROWS_BY_LANE(name, call)                                        \
  inline vd name(vd x) {                                                   \
    for (int i = 0; i < WIDTH<double>; ++i) x[i] = __builtin_##call(x[i]); \
    return x;                                                              \
  }
NARROWS_BY_LANE(exp_, exp)
NARROWS_BY_LANE(expm1_, expm1)
NARROWS_BY_LANE(log_, log)
NARROWS_BY_LANE(log1p_, log1p)
NARROWS_BY_LANE(tanh_, tanh)
NARROWS_BY_LANE(sqrt_, sqrt)
#undef NARROWS_BY_LANE

inline vd expm1_given(vd x, vd) { return expm1_(x); }
inline vd exp_times_(vd x, vd w) { return w * exp_(x); }
inline vd normal_cdf_times_(vd x, vd w) {
  for (int i = 0; i < WIDTH<double>; ++i) x[i] = 0.5 * __builtin_erfc(-0.7071067811865476 * x[i]);
  return w * x;
}
inline vd gelu_slope_(vd x) {
  x = max_(splat<vd>(-40), min_(splat<vd>(40), x));  // 0 and 1 from there on
  return normal_cdf_times_(x, splat<vd>(1)) + x * exp_(-0.5 * x * x) * 0.3989422804014327;
}
