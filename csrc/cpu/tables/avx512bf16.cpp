// Products of bfloat16 for AVX-512 with its instruction for them; all else is AVX-512's.

#define NARROWS_ISA avx512bf16
#define NARROWS_VECTOR_BYTES 64
#define NARROWS_TILE_VECTORS 4

#include <immintrin.h>
#include <stdint.h>

#include <type_traits>
#include <utility>

#include "cpu/isa.h"

namespace narrows {
namespace avx512bf16 {

// clang-format off
#include "cpu/kernels/vec.inl"
#include "cpu/kernels/bfloat16.inl"
#include "cpu/kernels/gemm.inl"
#include "cpu/kernels/gemm_bfloat16.inl"
// clang-format on

PairProduct pair_product() { return gemm_bfloat16; }

}  // namespace avx512bf16
}  // namespace narrows
