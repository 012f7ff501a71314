// The CUDA kernels as torch operators. They check shapes and use the tensors' device and the
// current stream. Page numbers and lengths stay on the device: nothing here reads them or waits.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../cuda/launch.h"
#include "backends.h"
#include "page_arguments.h"
#include "rope_forms.h"

namespace {

using at::Tensor;
using namespace vxl::bindings;

// The kernel would read a pointer of another device as its own.
void check_device(const Tensor& x, const char* name, const Tensor& q) {
  TORCH_CHECK_VALUE(x.device() == q.device(), name, ": got device ", x.device(), ", expected ",
                    q.device(), " as q");
}

Tensor empty_on_device(const Tensor& like) { return at::empty(like.sizes(), like.options()); }

void rope_append_into(const Tensor& q, const Tensor& k, const Tensor& v_in, const Tensor& k_cache,
                      const Tensor& v_cache, const Tensor& table_in, const Tensor& lens_in,
                      at::IntArrayRef layout, const Tensor& inv_freq_in, const Tensor& q_out,
                      const Tensor& k_out) {
  check_rope(q, k, v_in, k_cache, v_cache, table_in, lens_in, inv_freq_in, q.size(0));
  check_device(k, "k", q);
  check_device(v_in, "v", q);
  check_device(k_cache, "k_cache", q);
  check_device(v_cache, "v_cache", q);
  check_device(table_in, "block_table", q);
  check_device(lens_in, "cache_seqlens", q);
  check_device(inv_freq_in, "inv_freq", q);
  const c10::cuda::CUDAGuard guard(q.device());
  const Tensor v = rows_contiguous(v_in), inv_freq = inv_freq_in.contiguous();
  const Tensor table = table_in.contiguous(), lens = lens_in.contiguous();
  vxl::RopeParams p;
  set_call(p, q, k, v, layout);
  p.q_out = row_tensor(q_out);
  p.k_out = row_tensor(k_out);
  p.cache = paged_cache(k_cache, v_cache, table, lens);
  p.inv_freq = inv_freq.const_data_ptr<float>();
  C10_CUDA_CHECK(vxl::rope_append_cuda(p, c10::cuda::getCurrentCUDAStream()));
  bump_versions({&k_cache, &v_cache});
}

void copy_pages_(const Tensor& k_cache, const Tensor& v_cache, const Tensor& copies) {
  const c10::cuda::CUDAGuard guard(k_cache.device());
  const vxl::PageCopyParams p = page_copies(k_cache, v_cache, copies);
  C10_CUDA_CHECK(vxl::copy_pages_cuda(p, c10::cuda::getCurrentCUDAStream()));
  bump_versions({&k_cache, &v_cache});
}

Tensor gather_rows(const Tensor& cache, const Tensor& block_table_row, int64_t first,
                   int64_t rows) {
  const c10::cuda::CUDAGuard guard(cache.device());
  vxl::RowTransferParams p = row_transfer(cache, block_table_row, first, rows);
  Tensor out = at::empty({cache.size(0), rows, cache.size(3), cache.size(4)}, cache.options());
  p.buffer = static_cast<char*>(out.data_ptr());
  C10_CUDA_CHECK(vxl::gather_rows_cuda(p, c10::cuda::getCurrentCUDAStream()));
  return out;
}

void scatter_rows_(const Tensor& cache, const Tensor& block_table_row, int64_t first,
                   const Tensor& rows_in) {
  const c10::cuda::CUDAGuard guard(cache.device());
  check_dense_rows(rows_in, cache);
  const Tensor rows = rows_in.contiguous();
  vxl::RowTransferParams p = row_transfer(cache, block_table_row, first, rows.size(1));
  p.buffer = static_cast<char*>(rows.data_ptr());
  C10_CUDA_CHECK(vxl::scatter_rows_cuda(p, c10::cuda::getCurrentCUDAStream()));
  bump_versions({&cache});
}

}  // namespace

TORCH_LIBRARY_IMPL(vxl, CUDA, m) {
  implement<rope_append<rope_append_into, empty_on_device>>(m, "vxl::rope_append", "");
  implement<rope_append_<rope_append_into, empty_on_device>>(m, "vxl::rope_append_", "");
  m.impl("copy_pages_", copy_pages_);
  m.impl("gather_rows", gather_rows);
  m.impl("scatter_rows_", scatter_rows_);
}
