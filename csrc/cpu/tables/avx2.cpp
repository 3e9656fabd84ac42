// Kernels for AVX2 with FMA.

#define NARROWS_ISA avx2
#define NARROWS_VECTOR_BYTES 32
#define NARROWS_TILE_VECTORS 2
#include "cpu/tables/table.inl"

#include "cpu/isa.h"

namespace narrows {
const Isa isa_avx2 = {"avx2", cpu_has_avx2, avx2::NATIVE_BFLOAT16, avx2::kernels<float>(), avx2::kernels<double>()};
}
