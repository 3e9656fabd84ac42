// bfloat16: conversion, and the step of a product: two terms at once, summed in float32.
//
// Promises: rounds to nearest, ties to even, subnormals to zero. A step is an instruction of the CPU where it has one
// (vdpbf16ps). Elsewhere it is two multiply-adds, the odd term first, as Intel documents the instruction.
// Included inside the namespace of an instruction set.

// The values for two consecutive k. The even one has the lower 16 bits.
using Pair = int32_t;

#if defined(__AVX512BF16__)
constexpr bool NATIVE_BFLOAT16 = true;

inline vf madd(vf acc, vi a, vi b) { return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b); }

// Two vectors of values into one of pairs.
inline vi pairs(vf even, vf odd) {
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return (vi)_mm512_permutexvar_epi16(order, both);
}

#else
constexpr bool NATIVE_BFLOAT16 = false;

inline vf madd(vf acc, vi a, vi b) {
  const vi odd = splat_bits<vi>(0xffff0000u);
  acc += bit_cast<vf>(a & odd) * bit_cast<vf>(b & odd);
  return acc + bit_cast<vf>(a << 16) * bit_cast<vf>(b << 16);
}

// The upper 16 bits hold the rounded value. The lower bits have no meaning.
inline vi rounded(vf x) {
  const vi bits = bit_cast<vi>(x);
  const vi even = bits + 0x7fff + ((bits >> 16) & 1);
  const vi quiet = bits | 0x400000;
  const vi result = select(x != x, quiet, even);
  return select(abs_(x) < splat<vf>(1.17549435e-38), bits & splat_bits<vi>(0x80000000u), result);
}
inline vi pairs(vf even, vf odd) {
  return (rounded(odd) & splat_bits<vi>(0xffff0000u)) | ((rounded(even) >> 16) & 0xffff);
}
#endif

inline vi broadcast(Pair a) { return vi{} + a; }
