// Kernels for any CPU of the target: SSE2 on x86-64, NEON on Arm (which has the registers for a wider tile).

#define NARROWS_ISA baseline
#define NARROWS_VECTOR_BYTES 16
#if defined(__aarch64__)
#define NARROWS_TILE_VECTORS 4
#else
#define NARROWS_TILE_VECTORS 2
#endif
#include "cpu/tables/table.inl"
