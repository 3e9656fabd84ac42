// Kernels for AVX-512 (F, BW, DQ, VL) with products of bfloat16.

#define NARROWS_ISA avx512bf16
#define NARROWS_VECTOR_BYTES 64
#define NARROWS_TILE_VECTORS 4
#include "cpu/tables/table.inl"

#include "cpu/isa.h"

namespace narrows {
const Isa isa_avx512bf16 = {"avx512bf16", cpu_has_avx512bf16, avx512bf16::NATIVE_BFLOAT16, avx512bf16::kernels<float>(),
                            avx512bf16::kernels<double>()};
}
