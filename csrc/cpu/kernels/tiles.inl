// Tile registers of AMX: eight of 16 rows of 64 bytes, and products of pairs of bfloat16 in them.
//
// Promises: with NARROWS_TILE_MODEL a model of the instructions takes their place. It gives their bits on a CPU without
// them, so the tests run it. Source: Intel, Architecture Instruction Set Extensions Programming Reference, TDPBF16PS.
// Included inside the namespace of an instruction set.

#ifdef NARROWS_TILE_MODEL

struct TileRegisters {
  float sums[4][16][16];  // registers 0 to 3
  Pair pairs[4][16][16];  // registers 4 to 7

  static float flushed(float x) { return __builtin_fabsf(x) < 1.17549435e-38f ? __builtin_copysignf(0.0f, x) : x; }
  static float value(Pair pair, bool odd) {
    return flushed(bit_cast<float>(odd ? pair & Pair(0xffff0000) : pair << 16));
  }

  void zero(int n) { __builtin_memset(sums[n], 0, sizeof sums[n]); }
  void load_sums(int n, const float* from, index_t stride) {
    for (int i = 0; i < 16; ++i) __builtin_memcpy(sums[n][i], from + i * stride, 64);
  }
  void store(int n, float* to, index_t stride) const {
    for (int i = 0; i < 16; ++i) __builtin_memcpy(to + i * stride, sums[n][i], 64);
  }
  void load(int n, const Pair* from, index_t stride) {
    for (int i = 0; i < 16; ++i) __builtin_memcpy(pairs[n - 4][i], from + i * stride, 64);
  }
  // Even and odd terms are summed apart, and then added to the sum.
  void multiply(int sum, int a, int b) {
    for (int m = 0; m < 16; ++m)
      for (int n = 0; n < 16; ++n) {
        float part[2] = {};
        for (int k = 0; k < 16; ++k)
          for (const bool odd : {false, true})
            part[odd] =
                flushed(__builtin_fmaf(value(pairs[a - 4][m][k], odd), value(pairs[b - 4][k][n], odd), part[odd]));
        sums[sum][m][n] = flushed(flushed(sums[sum][m][n]) + flushed(part[0] + part[1]));
      }
  }
};
#define TILE_ZERO(n) tiles.zero(n)
#define TILE_LOAD_SUMS(n, from, stride) tiles.load_sums(n, from, stride)
#define TILE_STORE(n, to, stride) tiles.store(n, to, stride)
#define TILE_LOAD(n, from, stride) tiles.load(n, from, stride)
#define TILE_MULTIPLY(sum, a, b) tiles.multiply(sum, a, b)

#else

// Configures the registers of this thread, and releases them: a thread with registers in use is slower to switch.
struct TileRegisters {
  TileRegisters() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } layout;
    for (int n = 0; n < 8; ++n) layout.row_bytes[n] = 64, layout.rows[n] = 16;
    _tile_loadconfig(&layout);
  }
  ~TileRegisters() { _tile_release(); }
  TileRegisters(const TileRegisters&) = delete;
};
// The number of a register is part of the instruction, so these are macros. A stride is in bytes.
#define TILE_ZERO(n) _tile_zero(n)
#define TILE_LOAD_SUMS(n, from, stride) _tile_loadd(n, from, (stride) * 4)
#define TILE_STORE(n, to, stride) _tile_stored(n, to, (stride) * 4)
#define TILE_LOAD(n, from, stride) _tile_loadd(n, from, (stride) * 4)
#define TILE_MULTIPLY(sum, a, b) _tile_dpbf16ps(sum, a, b)

#endif
