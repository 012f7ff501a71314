// The page operators on the CPU. They check page numbers and row counts, then call memcpy.
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "../cpu/pages.h"
#include "page_arguments.h"
#include "threads.h"

namespace {

using at::Tensor;
using namespace vxl::bindings;

// Copies run in parallel, so their order must not matter: targets are distinct, and no target is a
// source.
void check_copies(const vxl::PageCopyParams& p, int64_t pages) {
  std::vector<int32_t> targets;
  for (int64_t i = 0; i < p.count; ++i) {
    const int32_t *copy = p.copies + 3 * i, rows = copy[2];
    TORCH_CHECK_VALUE(rows >= 0 && rows <= p.k.page_size, "copies: got ", rows,
                      " rows at entry ", i, ", expected 0 to ", p.k.page_size);
    if (rows == 0) continue;
    for (int j = 0; j < 2; ++j) {
      TORCH_CHECK_VALUE(copy[j] >= 0 && copy[j] < pages, "copies: got page ", copy[j],
                        " at entry ", i, ", expected 0 to ", pages - 1, " in k_cache");
    }
    targets.push_back(copy[1]);
  }
  std::sort(targets.begin(), targets.end());
  const auto twin = std::adjacent_find(targets.begin(), targets.end());
  TORCH_CHECK_VALUE(twin == targets.end(), "copies: got page ", *twin,
                    " as the target of two entries, expected distinct targets");
  for (int64_t i = 0; i < p.count; ++i) {
    const bool both = p.copies[3 * i + 2] > 0 &&
                      std::binary_search(targets.begin(), targets.end(), p.copies[3 * i]);
    TORCH_CHECK_VALUE(!both, "copies: got page ", p.copies[3 * i],
                      " as a source and a target, expected targets that are not sources");
  }
}

void check_pages(const vxl::RowTransferParams& p, int64_t pages) {
  if (p.rows == 0) return;
  const int64_t last = (p.first + p.rows - 1) / p.pool.page_size;
  for (int64_t i = p.first / p.pool.page_size; i <= last; ++i) {
    TORCH_CHECK_VALUE(p.block_table[i] >= 0 && p.block_table[i] < pages,
                      "block_table_row: got page ", p.block_table[i], " at ", i,
                      ", expected 0 to ", pages - 1, " in cache");
  }
}

void copy_pages_(const Tensor& k_cache, const Tensor& v_cache, const Tensor& copies) {
  const vxl::PageCopyParams p = page_copies(k_cache, v_cache, copies);
  check_copies(p, k_cache.size(1));
  vxl::copy_pages_cpu(p, thread_pool());
  bump_versions({&k_cache, &v_cache});
}

Tensor gather_rows(const Tensor& cache, const Tensor& block_table_row, int64_t first,
                   int64_t rows) {
  vxl::RowTransferParams p = row_transfer(cache, block_table_row, first, rows);
  check_pages(p, cache.size(1));
  Tensor out = empty_huge({cache.size(0), rows, cache.size(3), cache.size(4)}, cache.options());
  p.buffer = static_cast<char*>(out.data_ptr());
  vxl::gather_rows_cpu(p, thread_pool());
  return out;
}

void scatter_rows_(const Tensor& cache, const Tensor& block_table_row, int64_t first,
                   const Tensor& rows_in) {
  check_dense_rows(rows_in, cache);
  const Tensor rows = rows_in.contiguous();
  vxl::RowTransferParams p = row_transfer(cache, block_table_row, first, rows.size(1));
  check_pages(p, cache.size(1));
  p.buffer = static_cast<char*>(rows.data_ptr());
  vxl::scatter_rows_cpu(p, thread_pool());
  bump_versions({&cache});
}

}  // namespace

TORCH_LIBRARY_IMPL(vxl, CPU, m) {
  m.impl("copy_pages_", copy_pages_);
  m.impl("gather_rows", gather_rows);
  m.impl("scatter_rows_", scatter_rows_);
}
