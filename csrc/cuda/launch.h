// The CUDA backend's entry points: plain parameters in, a stream, no torch. Each is at most one
// kernel launch; none synchronises, allocates, or reads a length on the host, so all can be
// captured in a CUDA graph. cudaErrorInvalidValue: a head_dim that is odd or over 512, or 2^31 rows
// and more.
#pragma once

#include <cuda_runtime_api.h>

#include "../include/vxl/params.h"

namespace vxl {

// q_out, k_out and the cache rows of every kept row. q_out may be q, k_out may be k. Pages and
// lengths are not checked.
cudaError_t rope_append_cuda(const RopeParams& p, cudaStream_t stream);

cudaError_t copy_pages_cuda(const PageCopyParams& p, cudaStream_t stream);
cudaError_t gather_rows_cuda(const RowTransferParams& p, cudaStream_t stream);
cudaError_t scatter_rows_cuda(const RowTransferParams& p, cudaStream_t stream);

}  // namespace vxl
