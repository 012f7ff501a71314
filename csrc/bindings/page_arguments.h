// Checks the arguments of the page operators and turns them into parameters. The messages are those
// of vxl_kernels/cache/page_ops.py, which serves if this is not built.
#pragma once

#include "arguments.h"

namespace vxl::bindings {

// (layers, pages, page_size, kv_heads, head_dim) with dense pages.
inline vxl::PagePool page_pool(const Tensor& x, const char* name) {
  TORCH_CHECK_VALUE(x.dim() == 5, name, ": got shape ", x.sizes(),
                    ", expected 5 dimensions (layers, pages, page_size, kv_heads, head_dim)");
  bool dense = x.size(2) > 0;
  int64_t stride = 1;
  for (int64_t i = 4; i >= 2; --i) {
    dense &= x.size(i) == 1 || x.stride(i) == stride;
    stride *= x.size(i);
  }
  for (int64_t i = 0; i < 2; ++i) dense &= x.size(i) <= 1 || x.stride(i) >= stride;
  TORCH_CHECK_VALUE(dense, name, ": got shape ", x.sizes(), ", strides ", x.strides(),
                    ", expected dense pages of at least one row that do not overlap");
  const int64_t item = x.element_size();
  return {static_cast<char*>(x.data_ptr()), x.size(0), x.size(2), x.size(3) * x.size(4) * item,
          x.stride(0) * item, x.stride(1) * item};
}

inline vxl::PageCopyParams page_copies(const Tensor& k_cache, const Tensor& v_cache,
                                       const Tensor& copies) {
  vxl::PageCopyParams p{page_pool(k_cache, "k_cache"), page_pool(v_cache, "v_cache"), nullptr, 0};
  TORCH_CHECK_VALUE(v_cache.sizes() == k_cache.sizes() &&
                        v_cache.scalar_type() == k_cache.scalar_type() &&
                        v_cache.device() == k_cache.device(),
                    "v_cache: got ", v_cache.scalar_type(), " ", v_cache.sizes(), " on ",
                    v_cache.device(), ", expected ", k_cache.scalar_type(), " ", k_cache.sizes(),
                    " on ", k_cache.device(), " as k_cache");
  TORCH_CHECK_VALUE(copies.dim() == 2 && copies.size(1) == 3 &&
                        copies.scalar_type() == at::kInt && copies.is_contiguous() &&
                        copies.device() == k_cache.device(),
                    "copies: got ", copies.scalar_type(), " ", copies.sizes(), " on ",
                    copies.device(), ", expected contiguous int32 (n, 3) on ", k_cache.device());
  p.copies = copies.const_data_ptr<int32_t>();
  p.count = copies.size(0);
  return p;
}

// Leaves `buffer` null: the caller sets it.
inline vxl::RowTransferParams row_transfer(const Tensor& cache, const Tensor& block_table_row,
                                           int64_t first, int64_t rows) {
  vxl::RowTransferParams p;
  p.pool = page_pool(cache, "cache");
  TORCH_CHECK_VALUE(block_table_row.dim() == 1 && block_table_row.scalar_type() == at::kInt &&
                        block_table_row.is_contiguous() &&
                        block_table_row.device() == cache.device(),
                    "block_table_row: got ", block_table_row.scalar_type(), " ",
                    block_table_row.sizes(), " on ", block_table_row.device(),
                    ", expected contiguous int32 (max_pages,) on ", cache.device());
  const int64_t room = block_table_row.size(0) * cache.size(2);
  TORCH_CHECK_VALUE(first >= 0 && rows >= 0 && first <= room && rows <= room - first,
                    "first, rows: got ", first, ", ", rows, ", expected a range in the ",
                    block_table_row.size(0), " pages of ", cache.size(2), " rows");
  p.block_table = block_table_row.const_data_ptr<int32_t>();
  p.first = first;
  p.rows = rows;
  return p;
}

inline void check_dense_rows(const Tensor& rows, const Tensor& cache) {
  TORCH_CHECK_VALUE(rows.dim() == 4 && rows.size(0) == cache.size(0) &&
                        rows.size(2) == cache.size(3) && rows.size(3) == cache.size(4) &&
                        rows.scalar_type() == cache.scalar_type() &&
                        rows.device() == cache.device(),
                    "rows: got ", rows.scalar_type(), " ", rows.sizes(), " on ", rows.device(),
                    ", expected ", cache.scalar_type(), " (", cache.size(0), ", rows, ",
                    cache.size(3), ", ", cache.size(4), ") on ", cache.device());
}

}  // namespace vxl::bindings
