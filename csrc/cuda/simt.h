// What a kernel is written in: threads of a block, a barrier, shuffles in a warp, shared memory.
//
// Promises: under NVRTC (and nvcc) these are CUDA's own, and no system header is needed; on a host they come from the
// includer's NARROWS_SIMT_HOST, so that tests run the very kernels without a GPU, with every access checked.
// Never: says anything of ops.
//
// Blocks are of one dimension, in whole warps; every thread of a block reaches every sync() and every lane of a warp
// every shuffle, ballot and sync_warp(). KERNEL is an entry (KERNEL_OF: one of which a multiprocessor is to hold some
// blocks), DEVICE a function of kernels, SHARED(T, name, N) an array of the block, GRID_CONSTANT a parameter of a
// kernel that is read where it lies; REQUIRE(condition) is checked on the host alone.

#pragma once

#if defined(__CUDACC__)

#if defined(__CUDACC_RTC__)
typedef unsigned char uint8_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
#else
#include <cstdint>
#endif

#define NARROWS_HD __device__ inline
#define DEVICE __device__ inline
#define KERNEL __global__ void
#define KERNEL_OF(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define SHARED(T, name, N) __shared__ __align__(16) T name[N]
#define REQUIRE(condition)
#define UNROLL _Pragma("unroll")
#define UNROLL_BY_8 _Pragma("unroll 8")
#define UNROLL_BY_2 _Pragma("unroll 2")
#define GRID_CONSTANT __grid_constant__

DEVICE int thread() { return int(threadIdx.x); }
DEVICE int threads() { return int(blockDim.x); }
DEVICE int block() { return int(blockIdx.x); }
DEVICE void sync() { __syncthreads(); }
// The same number, of which the compiler knows nothing: what is made of it inside a loop is not kept in registers from
// before the loop.
DEVICE int unknown(int number) {
  asm volatile("" : "+r"(number));
  return number;
}
// What is read behind it is not read before it, into registers that are wanted for other things.
DEVICE void in_turn() { asm volatile("" ::: "memory"); }
template <class T>
DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
DEVICE uint32_t ballot(bool condition) { return __ballot_sync(0xffffffffu, condition); }
DEVICE void sync_warp() { __syncwarp(); }
DEVICE int ones(uint32_t bits) { return __popc(bits); }

#else
#include NARROWS_SIMT_HOST
#endif

constexpr int WARP = 32;

// --- sums over a block -----------------------------------------------------------------------------------------------
// In an order fixed by the size of the block; every thread has the result.

template <class T, class Fn>
DEVICE T warp_combine(T value, const Fn& fn) {
  UNROLL
  for (int mask = WARP / 2; mask; mask /= 2) value = fn(value, shuffle_xor(value, mask));
  return value;
}

template <class T, class Fn>
DEVICE T block_combine(T value, const Fn& fn) {
  SHARED(T, of_warp, WARP);
  value = warp_combine(value, fn);
  if (threads() == WARP) return value;
  if (thread() % WARP == 0) of_warp[thread() / WARP] = value;
  sync();
  value = of_warp[0];
  for (int w = 1; w < threads() / WARP; ++w) value = fn(value, of_warp[w]);
  sync();
  return value;
}

template <class T>
DEVICE T warp_sum(T value) {
  return warp_combine(value, [](T a, T b) { return a + b; });
}
template <class T>
DEVICE T block_sum(T value) {
  return block_combine(value, [](T a, T b) { return a + b; });
}
template <class T>
DEVICE T block_max(T value) {
  return block_combine(value, [](T a, T b) { return a > b ? a : b; });
}
