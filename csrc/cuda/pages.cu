#include "launch.cuh"
#include "launch.h"
#include "pages.cuh"

namespace vxl {
namespace {

template <typename W>
__global__ void __launch_bounds__(cuda::kBlockThreads) copy_pages_kernel(const PageCopyParams p) {
  cuda::copy_pages_thread<W>(p);
}

template <typename W, bool kGather>
__global__ void __launch_bounds__(cuda::kBlockThreads) transfer_rows_kernel(
    const RowTransferParams p) {
  cuda::transfer_rows_thread<W, kGather>(p);
}

template <bool kGather>
cudaError_t transfer(const RowTransferParams& p, cudaStream_t stream) {
  const cuda::Plan plan = cuda::plan_row_transfer(p);
  if (plan.word == 0) return cudaErrorInvalidValue;
  if (plan.grid.x == 0) return cudaSuccess;
  switch (plan.word) {
    case 16: return cuda::launch(transfer_rows_kernel<cuda::Word16, kGather>, plan, p, stream);
    case 8:
    case 4: return cuda::launch(transfer_rows_kernel<uint32_t, kGather>, plan, p, stream);
    case 2: return cuda::launch(transfer_rows_kernel<uint16_t, kGather>, plan, p, stream);
    default: return cuda::launch(transfer_rows_kernel<uint8_t, kGather>, plan, p, stream);
  }
}

}  // namespace

cudaError_t copy_pages_cuda(const PageCopyParams& p, cudaStream_t stream) {
  const cuda::Plan plan = cuda::plan_copy_pages(p);
  if (plan.grid.x == 0) return cudaSuccess;
  switch (plan.word) {
    case 16: return cuda::launch(copy_pages_kernel<cuda::Word16>, plan, p, stream);
    case 8:
    case 4: return cuda::launch(copy_pages_kernel<uint32_t>, plan, p, stream);
    case 2: return cuda::launch(copy_pages_kernel<uint16_t>, plan, p, stream);
    default: return cuda::launch(copy_pages_kernel<uint8_t>, plan, p, stream);
  }
}

cudaError_t gather_rows_cuda(const RowTransferParams& p, cudaStream_t stream) {
  return transfer<true>(p, stream);
}

cudaError_t scatter_rows_cuda(const RowTransferParams& p, cudaStream_t stream) {
  return transfer<false>(p, stream);
}

}  // namespace vxl
