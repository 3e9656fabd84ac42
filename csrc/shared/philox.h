// Counter-based random numbers: Philox4x32-10 (Salmon et al., SC 2011).
//
// Promises: the words of python/narrows/random/philox.py; no state; valid C++17 and valid NVRTC.
// Included inside a namespace of the includer, so that each instruction set has functions of its own.

#ifndef NARROWS_HD
#define NARROWS_HD inline
#endif

// The halves of the product of two words. W is uint32_t, or a vector of wider lanes. Such a vector holds words in the
// low halves of its lanes, anything in the high halves, and needs a specialisation.
template <class W>
NARROWS_HD void multiply_words(W a, uint32_t b, W& high, W& low) {
  const uint64_t product = uint64_t(a) * b;
  high = W(product >> 32), low = W(product);
}

// Replaces N counters (column / 4, row, step, stream) by the four words of their blocks under a 64-bit key. Each round
// waits for the one before it, so a CPU is busy only with several counters at once.
template <int N, class W>
NARROWS_HD void philox4x32(W (&x)[N][4], uint64_t key) {
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) {
      W high0, low0, high1, low1;
      multiply_words(x[i][0], 0xD2511F53u, high0, low0);
      multiply_words(x[i][2], 0xCD9E8D57u, high1, low1);
      x[i][0] = high1 ^ x[i][1] ^ k0;
      x[i][2] = high0 ^ x[i][3] ^ k1;
      x[i][1] = low1;
      x[i][3] = low0;
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// The cells of words (uint32_t, or a vector of it) among 2**24 equal cells of (0, 1). The uniform number is the centre
// of the cell, (cell + 1/2) / 2**24.
template <class W>
NARROWS_HD W philox_cell(W word) {
  return word >> 8;
}

// Cells below this one have a uniform number below p: the comparison u < p, decided alike in every precision.
NARROWS_HD uint32_t philox_threshold(double p) {
  const double edge = p * 16777216.0 - 0.5;
  return edge <= 0 ? 0u : uint32_t(edge) + (double(uint32_t(edge)) < edge ? 1u : 0u);
}
