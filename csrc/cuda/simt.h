// The words that kernels are written in: threads of a block, a barrier, shuffles in a warp, shared memory.
//
// Promises: under NVRTC and nvcc they are CUDA's own, without a system header. On a host they come from the header that
// NARROWS_SIMT_HOST names, so tests run the same kernels without a GPU and check every access.
// Never: knows an op.
//
// Blocks have one dimension and whole warps. Every thread of a block must reach every sync(), and every lane of a warp
// every shuffle, ballot and sync_warp(). KERNEL starts an entry point; KERNEL_OF also says how many blocks a
// multiprocessor should hold. DEVICE starts a function that kernels call. SHARED(T, name, N) is an array of the block.
// GRID_CONSTANT marks a parameter that is read in place. Only the host checks REQUIRE(condition).

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
// The same number, hidden from the compiler: it then does not keep values that depend on it in registers before a loop.
DEVICE int unknown(int number) {
  asm volatile("" : "+r"(number));
  return number;
}
// Keeps later reads from moving up here, where they would take registers.
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
// The size of the block alone decides the order. Every thread gets the result.

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
