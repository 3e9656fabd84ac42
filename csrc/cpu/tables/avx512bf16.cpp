// Products of bfloat16 by the instruction of AVX-512 for them.

#define NARROWS_ISA avx512bf16
#include "cpu/tables/pairs.inl"
