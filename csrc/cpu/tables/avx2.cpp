// Kernels for AVX2 with FMA.

#define NARROWS_ISA avx2
#define NARROWS_VECTOR_BYTES 32
#define NARROWS_TILE_VECTORS 2
#include "cpu/tables/table.inl"
