// All kernels. They are templates; backends/launches.py has the table of their instances.

#include "blas.cuh"
#include "checks.cuh"
#include "contractive.cuh"
#include "counts.cuh"
#include "gemm.cuh"
#include "gram.cuh"
#include "images.cuh"
#include "noise.cuh"
#include "rows.cuh"
#include "sparse.cuh"
#include "updates.cuh"
#include "values.cuh"
