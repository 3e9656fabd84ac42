// A cuBLAS of the host for tests: the functions that narrows calls, with the signatures and numbers of cublas_v2.h.
//
// Promises: refuses what the library refuses (sizes, strides, types that do not match, an invalid handle). A call fails
// if it touches memory that fake_memory did not name, or if the handle has no stream or workspace. Factors are rounded
// as the type of the sums says. If beta is zero the product is not read.

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#ifndef CUBLAS_V2_H_
enum { CUBLAS_STATUS_SUCCESS = 0, CUBLAS_STATUS_NOT_INITIALIZED = 1, CUBLAS_STATUS_INVALID_VALUE = 7 };
enum { CUBLAS_STATUS_EXECUTION_FAILED = 13, CUBLAS_STATUS_NOT_SUPPORTED = 15 };
enum { CUBLAS_OP_N = 0, CUBLAS_OP_T = 1 };
enum { CUDA_R_32F = 0, CUDA_R_64F = 1, CUDA_R_16BF = 14 };
enum { CUBLAS_COMPUTE_32F = 68, CUBLAS_COMPUTE_64F = 70, CUBLAS_COMPUTE_32F_FAST_TF32 = 77 };
typedef int cublasStatus_t, cublasOperation_t, cudaDataType, cublasComputeType_t, cublasGemmAlgo_t, cublasMath_t;
typedef int libraryPropertyType;
typedef struct cublasContext* cublasHandle_t;
typedef struct CUstream_st* cudaStream_t;
#define CUBLASAPI __attribute__((visibility("default")))
#define CUBLASWINAPI
#endif

namespace {

constexpr uint32_t ALIVE = 0xb1a5;

struct Context {
  uint32_t alive = ALIVE;
  cudaStream_t stream = nullptr;
  void* workspace = nullptr;
  int mode = -1;
};
Context* context(cublasHandle_t handle) {
  Context* c = reinterpret_cast<Context*>(handle);
  return c && c->alive == ALIVE ? c : nullptr;
}

std::vector<std::pair<uintptr_t, uintptr_t>> memory;
int major_version = 12, calls[128], handles = 0, refuses = 0;

bool inside(const void* data, int64_t columns, int64_t rows, int64_t ld, size_t size) {
  const uintptr_t begin = uintptr_t(data), end = begin + size_t((columns - 1) * ld + rows) * size;
  for (const auto& part : memory)
    if (part.first <= begin && end <= part.second) return true;
  return false;
}

float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// An element as the product uses it.
double element(const void* data, int64_t at, int type, int sums) {
  if (type == CUDA_R_64F) return static_cast<const double*>(data)[at];
  if (type == CUDA_R_16BF) return double(from_bits(uint32_t(static_cast<const uint16_t*>(data)[at]) << 16));
  const float x = static_cast<const float*>(data)[at];
  if (sums != CUBLAS_COMPUTE_32F_FAST_TF32 || !std::isfinite(x)) return double(x);
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return double(from_bits((bits + 0xfffu + (bits >> 13 & 1u)) & 0xffffe000u));
}

}  // namespace

extern "C" {

CUBLASAPI void fake_memory(const void* begin, size_t size) {
  memory.push_back({uintptr_t(begin), uintptr_t(begin) + size});
}
CUBLASAPI void fake_reset(int major, int status) {
  memory.clear(), major_version = major, refuses = status;
  std::memset(calls, 0, sizeof calls);
}
CUBLASAPI int fake_calls(int sums) { return calls[sums]; }
CUBLASAPI int fake_handles() { return handles; }

CUBLASAPI cublasStatus_t CUBLASWINAPI cublasCreate_v2(cublasHandle_t* handle) {
  if (refuses) return cublasStatus_t(refuses);
  *handle = reinterpret_cast<cublasHandle_t>(new Context);
  ++handles;
  return CUBLAS_STATUS_SUCCESS;
}
CUBLASAPI cublasStatus_t CUBLASWINAPI cublasDestroy_v2(cublasHandle_t handle) {
  if (!context(handle)) return CUBLAS_STATUS_NOT_INITIALIZED;
  context(handle)->alive = 0;
  delete reinterpret_cast<Context*>(handle);
  --handles;
  return CUBLAS_STATUS_SUCCESS;
}
CUBLASAPI cublasStatus_t CUBLASWINAPI cublasSetStream_v2(cublasHandle_t handle, cudaStream_t stream) {
  if (!context(handle)) return CUBLAS_STATUS_NOT_INITIALIZED;
  context(handle)->stream = stream;
  context(handle)->workspace = nullptr;
  return CUBLAS_STATUS_SUCCESS;
}
CUBLASAPI cublasStatus_t CUBLASWINAPI cublasSetWorkspace_v2(cublasHandle_t handle, void* workspace, size_t size) {
  if (!context(handle)) return CUBLAS_STATUS_NOT_INITIALIZED;
  if (uintptr_t(workspace) % 256 || size == 0) return CUBLAS_STATUS_INVALID_VALUE;
  context(handle)->workspace = workspace;
  return CUBLAS_STATUS_SUCCESS;
}
CUBLASAPI cublasStatus_t CUBLASWINAPI cublasSetMathMode(cublasHandle_t handle, cublasMath_t mode) {
  if (!context(handle)) return CUBLAS_STATUS_NOT_INITIALIZED;
  context(handle)->mode = int(mode);
  return CUBLAS_STATUS_SUCCESS;
}
CUBLASAPI cublasStatus_t CUBLASWINAPI cublasGetProperty(libraryPropertyType type, int* value) {
  if (int(type) > 1) return CUBLAS_STATUS_INVALID_VALUE;
  *value = int(type) == 0 ? major_version : 9;
  return CUBLAS_STATUS_SUCCESS;
}
CUBLASAPI const char* CUBLASWINAPI cublasGetStatusString(cublasStatus_t status) {
  return status == CUBLAS_STATUS_SUCCESS ? "success" : "refused by the fake";
}

CUBLASAPI cublasStatus_t CUBLASWINAPI cublasGemmEx(cublasHandle_t handle, cublasOperation_t transa,
                                                   cublasOperation_t transb, int m, int n, int k, const void* alpha,
                                                   const void* A, cudaDataType Atype, int lda, const void* B,
                                                   cudaDataType Btype, int ldb, const void* beta, void* C,
                                                   cudaDataType Ctype, int ldc, cublasComputeType_t sums,
                                                   cublasGemmAlgo_t algo) {
  const Context* c = context(handle);
  if (!c) return CUBLAS_STATUS_NOT_INITIALIZED;
  const bool a_turned = transa == CUBLAS_OP_T, b_turned = transb == CUBLAS_OP_T;
  if ((!a_turned && transa != CUBLAS_OP_N) || (!b_turned && transb != CUBLAS_OP_N)) return CUBLAS_STATUS_INVALID_VALUE;
  if (m < 0 || n < 0 || k < 0 || lda < (a_turned ? k : m) || ldb < (b_turned ? n : k) || ldc < m || int(algo) != -1)
    return CUBLAS_STATUS_INVALID_VALUE;
  const bool wide = Atype == CUDA_R_64F && Ctype == CUDA_R_64F && sums == CUBLAS_COMPUTE_64F;
  const bool plain = Atype == CUDA_R_32F && (sums == CUBLAS_COMPUTE_32F || sums == CUBLAS_COMPUTE_32F_FAST_TF32);
  const bool half = Atype == CUDA_R_16BF && sums == CUBLAS_COMPUTE_32F;
  if (Btype != Atype || !(wide || (Ctype == CUDA_R_32F && (plain || half)))) return CUBLAS_STATUS_NOT_SUPPORTED;
  if (!c->stream || !c->workspace || c->mode != 0) return CUBLAS_STATUS_EXECUTION_FAILED;
  const size_t of_factor = wide ? 8 : half ? 2 : 4, of_product = wide ? 8 : 4;
  if (!inside(A, a_turned ? m : k, a_turned ? k : m, lda, of_factor) ||
      !inside(B, b_turned ? k : n, b_turned ? n : k, ldb, of_factor) || !inside(C, n, m, ldc, of_product))
    return CUBLAS_STATUS_EXECUTION_FAILED;
  const double by = wide ? *static_cast<const double*>(alpha) : double(*static_cast<const float*>(alpha));
  const double kept = wide ? *static_cast<const double*>(beta) : double(*static_cast<const float*>(beta));
  ++calls[sums];
  for (int64_t j = 0; j < n; ++j)
    for (int64_t i = 0; i < m; ++i) {
      double sum = 0;
      for (int64_t l = 0; l < k; ++l)
        sum += element(A, a_turned ? i * lda + l : l * lda + i, Atype, sums) *
               element(B, b_turned ? l * ldb + j : j * ldb + l, Btype, sums);
      sum *= by;
      if (wide) {
        double& to = static_cast<double*>(C)[j * ldc + i];
        to = kept == 0 ? sum : sum + kept * to;
      } else {
        float& to = static_cast<float*>(C)[j * ldc + i];
        to = float(kept == 0 ? sum : sum + kept * double(to));
      }
    }
  return CUBLAS_STATUS_SUCCESS;
}
}
