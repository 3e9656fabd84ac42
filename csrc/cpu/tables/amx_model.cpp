// Products of bfloat16 by a model of AMX, for tests on other CPUs.

#define NARROWS_ISA amx_model
#define NARROWS_TILES
#define NARROWS_TILE_MODEL
#include "cpu/tables/pairs.inl"
