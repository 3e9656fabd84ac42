// The products in bfloat16 of one instruction set; all other kernels are AVX-512's. A file beside this one defines
// NARROWS_ISA (its namespace), and NARROWS_TILES for products by tile registers, and includes this file.

#define NARROWS_VECTOR_BYTES 64
#define NARROWS_TILE_VECTORS 4

#include <immintrin.h>
#include <stdint.h>

#include <type_traits>
#include <utility>

#include "cpu/isa.h"

namespace narrows {
namespace NARROWS_ISA {

// clang-format off
#include "cpu/kernels/vec.inl"
#include "cpu/kernels/bfloat16.inl"
#include "cpu/kernels/gemm.inl"
#include "cpu/kernels/gemm_bfloat16.inl"
#ifdef NARROWS_TILES
#include "cpu/kernels/tiles.inl"
#include "cpu/kernels/gemm_tiles.inl"
using Engine = TilePairs;
#else
using Engine = VectorPairs;
#endif
// clang-format on

PairProduct pair_product() { return gemm_pairs<Engine>; }

}  // namespace NARROWS_ISA
}  // namespace narrows
