#define VXL_ISA_NAME "avx512"
#define VXL_ISA_TABLE kernels_avx512
#include "isa_unit.inc"
