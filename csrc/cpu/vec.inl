// Short vectors of one instruction set and the mathematics the functors ask of them.
//
// Promises: every function acts on each lane alone, by the same operations whatever the vector's width, so an element's
// result does not depend on its neighbours or on the machine's vectors; float32 functions are polynomials in vector
// registers, accurate to a few ulp; float64 uses the C library, lane by lane.
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
template <class V>
inline V max_(V a, V b) {
  return select(a > b, a, b);
}
template <class V>
inline V min_(V a, V b) {
  return select(a < b, a, b);
}
template <class V>
inline V abs_(V a) {
  return select(a < V{}, -a, a);
}

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
inline void store_part(float* p, vf v, index_t n) { _mm512_mask_storeu_ps(p, first_lanes(n), v); }
inline void store_part(double* p, vd v, index_t n) { _mm512_mask_storeu_pd(p, __mmask8(first_lanes(n)), v); }
#elif defined(__AVX2__)
inline __m256i first_lanes(index_t n, vi lanes) { return __m256i(lanes < int32_t(n)); }
inline __m256i first_floats(index_t n) { return first_lanes(n, vi{0, 1, 2, 3, 4, 5, 6, 7}); }
inline __m256i first_doubles(index_t n) { return first_lanes(n, vi{0, 0, 1, 1, 2, 2, 3, 3}); }
inline vf load_part(const float* p, index_t n) { return _mm256_maskload_ps(p, first_floats(n)); }
inline vd load_part(const double* p, index_t n) { return _mm256_maskload_pd(p, first_doubles(n)); }
inline void store_part(float* p, vf v, index_t n) { _mm256_maskstore_ps(p, first_floats(n), v); }
inline void store_part(double* p, vd v, index_t n) { _mm256_maskstore_pd(p, first_doubles(n), v); }
#else
template <class T>
inline vec<T> load_part(const T* p, index_t n) {
  vec<T> v{};
  for (index_t i = 0; i < n; ++i) v[i] = p[i];
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

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

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

// A sum over LANES virtual lanes: element j of a row goes to lane j % LANES, and the lanes are added in a fixed order
// at the end, so the sum does not depend on the vector width.
template <class T>
struct LaneSum {
  static constexpr int N = LANES / WIDTH<T>;
  vec<T> lane[N] = {};
  void add(index_t j, vec<T> v) { lane[(j / WIDTH<T>) % N] += v; }
  double total() const {
    double sum = 0;
    for (int i = 0; i < N; ++i)
      for (int j = 0; j < WIDTH<T>; ++j) sum += double(lane[i][j]);
    return sum;
  }
};

// --- float32 ---------------------------------------------------------------------------------------------------------

// n = round(x / ln 2) and f = x - n ln 2, |f| < 0.35; for |x| < 2**21.
inline vf split_ln2(vf x, vi& n) {
  const vf magic = splat<vf>(12582912.0);  // 1.5 * 2**23: adding it rounds to an integer in the low bits
  const vf shifted = x * 1.44269504f + magic;
  n = bit_cast<vi>(shifted) - bit_cast<vi>(magic);
  const vf k = shifted - magic;
  return (x - k * 0.693359375f) - k * -2.12194440e-4f;
}

// (exp(f) - 1 - f) / f**2 on |f| < 0.35; coefficients of Cephes (Moshier).
inline vf exp_tail(vf f) {
  vf p = f * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  return p * f + 5.0000001201e-1f;
}

inline vf exp_(vf x) {
  // Clamped where the result is 0 or infinity anyway; NaN passes both comparisons by.
  x = select(x < splat<vf>(-104.0), splat<vf>(-104.0), x);
  x = select(x > splat<vf>(89.0), splat<vf>(89.0), x);
  vi n;
  const vf f = split_ln2(x, n);
  const vf y = exp_tail(f) * f * f + f + 1.0f;
  // 2**n in two factors, so that subnormal results round once and overflow gives infinity.
  const vi half = n >> 1;
  return y * bit_cast<vf>((half + 127) << 23) * bit_cast<vf>((n - half + 127) << 23);
}

inline vf expm1_(vf x) { return select(abs_(x) < splat<vf>(0.3465), exp_tail(x) * x * x + x, exp_(x) - 1.0f); }

inline vf log_(vf x) {
  const vf smallest = splat<vf>(1.17549435e-38), inf = splat<vf>(__builtin_inf());
  const auto subnormal = x < smallest;
  const vf scaled = select(subnormal, x * 8388608.0f, x);
  const vi bits = bit_cast<vi>(scaled);
  // x = m 2**e with m in [sqrt(1/2), sqrt(2))
  vi e = ((bits - 0x3f3504f3) >> 23) - select(subnormal, vi{} + 23, vi{});
  const vi shift = (bits - 0x3f3504f3) & vi(vi{} + int32_t(0xff800000u));
  const vf m = bit_cast<vf>(bits - shift) - 1.0f;
  const vf k = __builtin_convertvector(e, vf);
  const vf z = m * m;
  // Cephes (Moshier)
  vf p = m * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  p = p * m * z + k * -2.12194440e-4f - 0.5f * z;
  vf y = (m + p) + k * 0.693359375f;
  y = select(x == inf, inf, y);
  y = select(x == vf{}, -inf, y);
  return select(x < vf{}, splat<vf>(__builtin_nan("")), select(x != x, x, y));
}

// For x >= 0, as every caller has it.
inline vf log1p_(vf x) {
  const vf u = x + 1.0f;
  // What rounding took from 1 + x comes back to first order.
  return select(u == splat<vf>(__builtin_inf()), u, log_(u) + (x - (u - 1.0f)) / u);
}

inline vf tanh_(vf x) {
  const vf a = abs_(x), z = x * x;
  // Cephes (Moshier)
  vf p = z * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const vf small = p * z * x + x;
  const vf large = 1.0f - 2.0f / (exp_(a + a) + 1.0f);
  return select(a < splat<vf>(0.625), small, select(x < vf{}, -large, large));
}

// The normal distribution function by 0.5 erfcx(a / sqrt 2) exp(-a**2 / 2), a = |x|; the first factor is t P(t) with
// t = 1 / (1 + 0.3 a), P a least-squares fit weighted towards the largest relative error (3.4e-9).
inline vf normal_cdf_(vf x) {
  const vf a = abs_(x), t = 1.0f / (1.0f + 0.3f * a);
  vf p = t * -2.061305599e-02f + 1.123769980e-01f;
  p = p * t - 2.280703468e-01f;
  p = p * t + 1.915854121e-01f;
  p = p * t - 7.925036680e-02f;
  p = p * t + 9.605941017e-02f;
  p = p * t + 7.842505208e-02f;
  p = p * t + 1.102274320e-01f;
  p = p * t + 1.195728289e-01f;
  p = p * t + 1.196866347e-01f;
  const vf tail = select(a > splat<vf>(14.5), vf{}, p * t * exp_(-0.5f * a * a));
  return select(x != x, x, select(x < vf{}, tail, 1.0f - tail));
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

inline vd normal_cdf_(vd x) {
  for (int i = 0; i < WIDTH<double>; ++i) x[i] = 0.5 * __builtin_erfc(-0.7071067811865476 * x[i]);
  return x;
}
