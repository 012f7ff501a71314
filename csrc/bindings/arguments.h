// Turns tensors into parameters, and checks that no kernel leaves them. Every backend uses this.
#pragma once

#include <ATen/Functions.h>
#include <c10/util/Exception.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdint>
#include <initializer_list>

#include "../include/vxl/params.h"

namespace vxl::bindings {

using at::Tensor;

inline vxl::DType dtype_of(const Tensor& x, const char* name = "q") {
  switch (x.scalar_type()) {
    case at::kFloat: return vxl::DType::f32;
    case at::kBFloat16: return vxl::DType::bf16;
    case at::kHalf: return vxl::DType::f16;
    default:
      TORCH_CHECK_VALUE(false, name, ": got ", x.scalar_type(),
                        ", expected float32, bfloat16 or float16");
  }
}

// The kernels need a contiguous head_dim; other strides are arbitrary. A cache is never copied:
// vxl_kernels/checks.py refuses one with other strides.
inline Tensor rows_contiguous(const Tensor& x) { return x.stride(-1) == 1 ? x : x.contiguous(); }

// A large result is fresh memory, and the operating system maps it page by page on first use. With
// four chunks in a call that took 4 % of the attention's time. Huge pages are 512 times fewer.
inline Tensor empty_huge(at::IntArrayRef sizes, const at::TensorOptions& options) {
  Tensor x = at::empty(sizes, options);
#ifdef __linux__
  constexpr uintptr_t huge = uintptr_t(2) << 20;
  const auto begin = reinterpret_cast<uintptr_t>(x.data_ptr());
  const uintptr_t first = (begin + huge - 1) / huge * huge;
  const uintptr_t last = (begin + x.nbytes()) / huge * huge;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return x;
}
inline Tensor empty_rows(const Tensor& like) { return empty_huge(like.sizes(), like.options()); }

// Tells autograd that these were written, so that a backward pass that saved them raises. No
// backward pass saves a tensor of inference mode, whose version may not be touched outside of it.
inline void bump_versions(std::initializer_list<const Tensor*> written) {
  for (const Tensor* x : written) {
    if (!x->is_inference()) x->unsafeGetTensorImpl()->bump_version();
  }
}

inline vxl::RowTensor row_tensor(const Tensor& x) {
  return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

inline vxl::ChunkGeometry geometry_of(at::IntArrayRef layout, int64_t rows) {
  if (layout.empty()) return {rows, 0, 1, true};
  TORCH_CHECK_VALUE(layout.size() == 4, "layout: got ", layout.size(),
                    " numbers, expected [window, ratio, chunks, split]");
  const vxl::ChunkGeometry g{layout[0], layout[1], layout[2], layout[3] != 0};
  TORCH_CHECK_VALUE(g.window > 0 && g.ratio > 0 && g.chunks > 0 && g.rows() == rows,
                    "layout: got ", layout, ", expected a layout of ", rows, " rows");
  return g;
}

// Refuses what would read or write outside a tensor. vxl_kernels/api.py has refused such calls
// already, but the operators can also be called by name.
inline void check_shapes(const Tensor& q, const Tensor& k, const Tensor& v) {
  TORCH_CHECK_VALUE(q.dim() == 4 && k.dim() == 4 && k.sizes() == v.sizes() &&
                        k.size(0) == q.size(0) && k.size(1) == q.size(1) &&
                        k.size(3) == q.size(3) && k.size(2) > 0 && q.size(2) % k.size(2) == 0 &&
                        q.size(3) > 0 && q.size(3) <= 256,
                    "q, k, v: got shapes ", q.sizes(), ", ", k.sizes(), ", ", v.sizes(),
                    ", expected (batch, rows, heads, head_dim) with head_dim up to 256, and k and "
                    "v whose heads divide those of q");
  TORCH_CHECK_VALUE(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(),
                    "k, v: got ", k.scalar_type(), ", ", v.scalar_type(), ", expected ",
                    q.scalar_type(), " as q");
}

inline void check_cache(const Tensor& k, const Tensor& k_cache, const Tensor& v_cache,
                        const Tensor& block_table, const Tensor& cache_seqlens, int64_t batch) {
  TORCH_CHECK_VALUE(k_cache.dim() == 4 && k_cache.sizes() == v_cache.sizes() &&
                        k_cache.size(1) > 0 && k_cache.size(2) == k.size(2) &&
                        k_cache.size(3) == k.size(3) && k_cache.stride(3) == 1 &&
                        v_cache.stride(3) == 1 && k_cache.scalar_type() == k.scalar_type() &&
                        v_cache.scalar_type() == k.scalar_type(),
                    "k_cache, v_cache: got ", k_cache.scalar_type(), " ", k_cache.sizes(), ", ",
                    v_cache.scalar_type(), " ", v_cache.sizes(), ", expected ", k.scalar_type(),
                    " (pages, page_size, ", k.size(2), ", ", k.size(3), "), head_dim contiguous");
  TORCH_CHECK_VALUE(block_table.dim() == 2 && block_table.size(0) == batch &&
                        block_table.scalar_type() == at::kInt && cache_seqlens.dim() == 1 &&
                        cache_seqlens.size(0) == batch &&
                        cache_seqlens.scalar_type() == at::kInt,
                    "block_table, cache_seqlens: got shapes ", block_table.sizes(), ", ",
                    cache_seqlens.sizes(), ", expected int32 (batch, max_pages) and (batch,)");
}

inline void check_rope(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& k_cache,
                       const Tensor& v_cache, const Tensor& block_table,
                       const Tensor& cache_seqlens, const Tensor& inv_freq, int64_t batch) {
  check_shapes(q, k, v);
  check_cache(k, k_cache, v_cache, block_table, cache_seqlens, batch);
  TORCH_CHECK_VALUE(inv_freq.dim() == 1 && 2 * inv_freq.size(0) == q.size(3) &&
                        inv_freq.scalar_type() == at::kFloat,
                    "inv_freq: got ", inv_freq.scalar_type(), " ", inv_freq.sizes(),
                    ", expected float32 (head_dim / 2,)");
}

// `block_table` and `cache_seqlens` are contiguous and outlive the result.
inline vxl::PagedCache paged_cache(const Tensor& k_cache, const Tensor& v_cache,
                                   const Tensor& block_table, const Tensor& cache_seqlens) {
  vxl::PagedCache cache;
  cache.k = k_cache.data_ptr();
  cache.v = v_cache.data_ptr();
  for (int i = 0; i < 3; ++i) {
    cache.k_strides[i] = k_cache.stride(i);
    cache.v_strides[i] = v_cache.stride(i);
  }
  cache.page_size = k_cache.size(1);
  cache.block_table = block_table.const_data_ptr<int32_t>();
  cache.block_table_stride = block_table.size(1);
  cache.lens = cache_seqlens.const_data_ptr<int32_t>();
  return cache;
}

// Sets the fields that AttentionParams and RopeParams share.
template <typename Params>
void set_call(Params& p, const Tensor& q, const Tensor& k, const Tensor& v,
              at::IntArrayRef layout) {
  p.dtype = dtype_of(q);
  p.batch = q.size(0);
  p.heads = q.size(2);
  p.kv_heads = k.size(2);
  p.head_dim = q.size(3);
  p.geometry = geometry_of(layout, q.size(1));
  p.q = row_tensor(q);
  p.k = row_tensor(k);
  p.v = row_tensor(v);
}

}  // namespace vxl::bindings
