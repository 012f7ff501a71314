#include "launch.cuh"
#include "launch.h"
#include "rope.cuh"

namespace vxl {
namespace {

// Two blocks per multiprocessor. Without this bound ptxas uses 64 registers on sm_100 and spills.
template <typename T, int N>
__global__ void __launch_bounds__(cuda::kBlockThreads, 2) rope_append_kernel(const RopeParams p) {
  cuda::rope_append_thread<T, N>(p);
}

template <typename T>
cudaError_t launch(const RopeParams& p, const cuda::Plan& plan, cudaStream_t stream) {
  constexpr int kPairs = 16 / sizeof(T);
  return cuda::launch<RopeParams>(
      plan.word == 16 ? rope_append_kernel<T, kPairs> : rope_append_kernel<T, 1>, plan, p, stream);
}

}  // namespace

cudaError_t rope_append_cuda(const RopeParams& p, cudaStream_t stream) {
  const cuda::Plan plan = cuda::plan_rope(p);
  if (plan.word == 0) return cudaErrorInvalidValue;
  if (plan.grid.x == 0) return cudaSuccess;
  switch (p.dtype) {
    case DType::f32: return launch<float>(p, plan, stream);
    case DType::bf16: return launch<cuda::Bf16>(p, plan, stream);
    case DType::f16: return launch<cuda::F16>(p, plan, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace vxl
