// Launches one kernel with the grid of a plan.
#pragma once

#include "device.cuh"
#include "plan.h"

namespace vxl::cuda {

// cudaLaunchKernel returns the error of this launch; cudaGetLastError would clear an earlier one.
template <typename Params>
cudaError_t launch(void (*kernel)(Params), const Plan& plan, Params p, cudaStream_t stream) {
  const dim3 grid(plan.grid.x, plan.grid.y, plan.grid.z);
  const dim3 block(plan.block.x, plan.block.y, plan.block.z);
  void* arguments[] = {&p};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, arguments, 0, stream);
}

}  // namespace vxl::cuda
