// Copies of cache pages and rows on the CPU: plain memcpy, spread over threads.
#pragma once

#include "../include/vxl/params.h"
#include "kernels.h"

namespace vxl {

// The caller has checked pages, rows, and that no target is a source or another's target.
void copy_pages_cpu(const PageCopyParams& p, const ThreadPool& pool);

void gather_rows_cpu(const RowTransferParams& p, const ThreadPool& pool);   // pages -> buffer
void scatter_rows_cpu(const RowTransferParams& p, const ThreadPool& pool);  // buffer -> pages

}  // namespace vxl
