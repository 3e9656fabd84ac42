// Kernels for AVX-512 (F, BW, DQ, VL).

#define NARROWS_ISA avx512
#define NARROWS_VECTOR_BYTES 64
#define NARROWS_TILE_VECTORS 4
#include "cpu/tables/table.inl"

#include "cpu/isa.h"

namespace narrows {
const Isa isa_avx512 = {"avx512", cpu_has_avx512, avx512::NATIVE_BFLOAT16, avx512::kernels<float>(),
                        avx512::kernels<double>()};
}
