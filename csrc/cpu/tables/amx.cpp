// Products of bfloat16 by the tile registers of AMX.

#define NARROWS_ISA amx
#define NARROWS_TILES
#include "cpu/tables/pairs.inl"
