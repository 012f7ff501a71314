#define VXL_ISA_NAME "neonbf16"
#define VXL_ISA_TABLE kernels_neonbf16
#include "isa_pairs.inc"
