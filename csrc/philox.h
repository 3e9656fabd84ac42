// Counter-based random numbers: Philox4x32-10 (Salmon et al., SC 2011).
//
// Promises: the words of python/narrows/philox.py; no state; valid C++17 and valid NVRTC.
// Included inside a namespace of the includer, so that each instruction set has functions of its own.

#ifndef NARROWS_HD
#define NARROWS_HD inline
#endif

// The four words of the block (column / 4, row, step, stream) under a 64-bit key.
NARROWS_HD void philox4x32(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t key, uint32_t out[4]) {
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(0xD2511F53u) * c0, p1 = uint64_t(0xCD9E8D57u) * c2;
    c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
    c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c1 = uint32_t(p1);
    c3 = uint32_t(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

// A word's cell among 2**24 equal cells of (0, 1); the uniform number is the cell's centre, (cell + 1/2) / 2**24.
NARROWS_HD uint32_t philox_cell(uint32_t word) { return word >> 8; }

// Cells below this one have a uniform number below p: the comparison u < p, decided alike in every precision.
NARROWS_HD uint32_t philox_threshold(double p) {
  const double edge = p * 16777216.0 - 0.5;
  return edge <= 0 ? 0u : uint32_t(edge) + (double(uint32_t(edge)) < edge ? 1u : 0u);
}
