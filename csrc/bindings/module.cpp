// The Python module vxl_kernels._C. Loading it also registers the operators.
#include <pybind11/pybind11.h>

#include "../cpu/kernels.h"

void bind_page_manager(pybind11::module_& m);  // page_manager.cpp

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled part of vxl_kernels. Loading it registers the vxl:: operators.";
  m.def("cpu_isa", &vxl::cpu_isa,
        "Instruction set of the CPU kernels in this process: 'amx', 'avx512bf16', 'avx512', 'avx2' "
        "or 'baseline'; on aarch64 'neonbf16' or 'baseline'. The environment variable VXL_CPU_ISA "
        "lowers it; it is read once.");
#ifdef VXL_WITH_CUDA
  m.attr("has_cuda") = true;
#else
  m.attr("has_cuda") = false;
#endif
  bind_page_manager(m);
}
