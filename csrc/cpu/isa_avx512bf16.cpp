#define VXL_ISA_NAME "avx512bf16"
#define VXL_ISA_TABLE kernels_avx512bf16
#include "isa_pairs.inc"
