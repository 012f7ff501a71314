// Copies cache pages and rows on the CPU, by memcpy on several threads.
#pragma once

#include "../include/vxl/params.h"
#include "kernels.h"

namespace vxl {

// The caller has checked pages and rows, that targets are distinct, and that no target is a source.
void copy_pages_cpu(const PageCopyParams& p, const ThreadPool& pool);

void gather_rows_cpu(const RowTransferParams& p, const ThreadPool& pool);   // pages -> buffer
void scatter_rows_cpu(const RowTransferParams& p, const ThreadPool& pool);  // buffer -> pages

}  // namespace vxl
