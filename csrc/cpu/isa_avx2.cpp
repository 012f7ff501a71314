#define VXL_ISA_NAME "avx2"
#define VXL_ISA_TABLE kernels_avx2
#include "isa_unit.inc"
