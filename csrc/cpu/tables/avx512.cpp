// Kernels for AVX-512 (F, BW, DQ, VL).

#define NARROWS_ISA avx512
#define NARROWS_VECTOR_BYTES 64
#define NARROWS_TILE_VECTORS 4
#include "cpu/tables/table.inl"
