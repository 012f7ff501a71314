#define VXL_ISA_NAME "baseline"
#define VXL_ISA_TABLE kernels_baseline
#include "isa_unit.inc"
