// Entry points of the CUDA backend. They take plain parameters and a stream, and know no torch.
// Each launches at most one kernel. None synchronises, allocates, or reads a length on the host, so
// a CUDA graph can capture them. They return cudaErrorInvalidValue if head_dim is odd or over 512,
// or if there are 2^31 rows or more.
#pragma once

#include <cuda_runtime_api.h>

#include "../include/vxl/params.h"

namespace vxl {

// Writes q_out and k_out of every row, and the cache entries of appended rows. q_out may be q, and
// k_out may be k. Pages and lengths are not checked.
cudaError_t rope_append_cuda(const RopeParams& p, cudaStream_t stream);

cudaError_t copy_pages_cuda(const PageCopyParams& p, cudaStream_t stream);
cudaError_t gather_rows_cuda(const RowTransferParams& p, cudaStream_t stream);
cudaError_t scatter_rows_cuda(const RowTransferParams& p, cudaStream_t stream);

}  // namespace vxl
