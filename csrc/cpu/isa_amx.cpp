#define VXL_ISA_NAME "amx"
#define VXL_ISA_TABLE kernels_amx
#include "isa_pairs.inc"
