// The CPU kernels as torch operators. vxl_kernels/ops.py has schemas, fakes and gradients, and
// vxl_kernels/api.py checks shapes and dtypes. The contents of tables and lengths are checked here,
// before anything is written.
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "../cpu/kernels.h"
#include "arguments.h"
#include "backends.h"
#include "paging.h"
#include "rope_forms.h"
#include "threads.h"

namespace {

using at::Tensor;
using namespace vxl::bindings;

std::tuple<Tensor, Tensor> vst_attention(
    const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
    const std::optional<Tensor>& k_cache, const std::optional<Tensor>& v_cache,
    const std::optional<Tensor>& block_table, const std::optional<Tensor>& cache_seqlens,
    at::IntArrayRef layout, double scale) {
  check_shapes(q_in, k_in, v_in);
  const Tensor q = rows_contiguous(q_in), k = rows_contiguous(k_in), v = rows_contiguous(v_in);
  Tensor out = empty_rows(q);
  Tensor lse = at::empty({q.size(0), q.size(2), q.size(1)}, q.options().dtype(at::kFloat));

  vxl::AttentionParams p;
  set_call(p, q, k, v, layout);
  p.out = row_tensor(out);
  p.lse = lse.mutable_data_ptr<float>();
  p.scale = static_cast<float>(scale);

  std::optional<Paging> paging;
  if (k_cache.has_value()) {
    TORCH_CHECK_VALUE(v_cache.has_value() && block_table.has_value() && cache_seqlens.has_value(),
                      "v_cache: got None, expected all four cache arguments or none");
    check_cache(k, *k_cache, *v_cache, *block_table, *cache_seqlens, k.size(0));
    paging.emplace(*k_cache, *v_cache, *block_table, *cache_seqlens,
                   same((p.geometry.chunks - 1) * p.geometry.vsts()));
    p.cache = paging->cache;
  } else {
    TORCH_CHECK_VALUE(p.geometry.chunks == 1, "k_cache: got None, expected a tensor");
  }
  if (q.numel() > 0) vxl::attention_cpu(p, thread_pool());
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> vst_attention_backward(
    const Tensor& grad_out_in, const Tensor& grad_lse_in, const Tensor& q_in, const Tensor& k_in,
    const Tensor& v_in, const std::optional<Tensor>& k_cache, const std::optional<Tensor>& v_cache,
    const std::optional<Tensor>& block_table, const std::optional<Tensor>& cache_seqlens,
    const Tensor& out_in, const Tensor& lse_in, at::IntArrayRef layout, double scale) {
  check_shapes(q_in, k_in, v_in);
  for (const Tensor* x : {&grad_out_in, &out_in}) {
    TORCH_CHECK_VALUE(x->sizes() == q_in.sizes() && x->scalar_type() == q_in.scalar_type(),
                      "grad_out, out: got ", x->scalar_type(), " ", x->sizes(), ", expected ",
                      q_in.scalar_type(), " ", q_in.sizes(), " as q");
  }
  const int64_t lse_sizes[] = {q_in.size(0), q_in.size(2), q_in.size(1)};
  for (const Tensor* x : {&grad_lse_in, &lse_in}) {
    TORCH_CHECK_VALUE(x->sizes() == at::IntArrayRef(lse_sizes) && x->scalar_type() == at::kFloat,
                      "grad_lse, lse: got ", x->scalar_type(), " ", x->sizes(),
                      ", expected float32 ", at::IntArrayRef(lse_sizes));
  }
  const Tensor q = rows_contiguous(q_in), k = rows_contiguous(k_in), v = rows_contiguous(v_in);
  const Tensor grad_out = rows_contiguous(grad_out_in), out = rows_contiguous(out_in);
  const Tensor grad_lse = grad_lse_in.contiguous(), lse = lse_in.contiguous();
  Tensor grad_q = empty_rows(q), grad_k = empty_rows(k), grad_v = empty_rows(v);

  vxl::AttentionBackwardParams p;
  set_call(p.call, q, k, v, layout);
  p.call.scale = static_cast<float>(scale);
  p.call.out = row_tensor(out);
  p.call.lse = const_cast<float*>(lse.const_data_ptr<float>());
  p.grad_lse = grad_lse.const_data_ptr<float>();
  p.grad_out = row_tensor(grad_out);
  p.grad_q = row_tensor(grad_q);
  p.grad_k = row_tensor(grad_k);
  p.grad_v = row_tensor(grad_v);

  std::optional<Paging> paging;
  Tensor grad_k_cache = at::empty({0}, q.options()), grad_v_cache = grad_k_cache.clone();
  if (k_cache.has_value()) {
    TORCH_CHECK_VALUE(v_cache.has_value() && block_table.has_value() && cache_seqlens.has_value(),
                      "v_cache: got None, expected all four cache arguments or none");
    check_cache(k, *k_cache, *v_cache, *block_table, *cache_seqlens, k.size(0));
    const vxl::ChunkGeometry& g = p.call.geometry;
    paging.emplace(*k_cache, *v_cache, *block_table, *cache_seqlens,
                   same((g.chunks - 1) * g.vsts()));
    p.call.cache = paging->cache;
    grad_k_cache = at::zeros(k_cache->sizes(), q.options());
    grad_v_cache = at::zeros(k_cache->sizes(), q.options());
    p.grad_k_cache = grad_k_cache.data_ptr();
    p.grad_v_cache = grad_v_cache.data_ptr();
    for (int i = 0; i < 3; ++i) p.grad_cache_strides[i] = grad_k_cache.stride(i);
  } else {
    TORCH_CHECK_VALUE(p.call.geometry.chunks == 1, "k_cache: got None, expected a tensor");
  }
  if (q.numel() > 0) vxl::attention_backward_cpu(p, thread_pool());
  return {grad_q, grad_k, grad_v, grad_k_cache, grad_v_cache};
}

void rope_append_into(const Tensor& q, const Tensor& k, const Tensor& v_in, const Tensor& k_cache,
                      const Tensor& v_cache, const Tensor& block_table, const Tensor& cache_seqlens,
                      at::IntArrayRef layout, const Tensor& inv_freq_in, const Tensor& q_out,
                      const Tensor& k_out) {
  check_rope(q, k, v_in, k_cache, v_cache, block_table, cache_seqlens, inv_freq_in, q.size(0));
  const Tensor v = rows_contiguous(v_in), inv_freq = inv_freq_in.contiguous();
  vxl::RopeParams p;
  set_call(p, q, k, v, layout);
  p.q_out = row_tensor(q_out);
  p.k_out = row_tensor(k_out);
  const int64_t kept = layout.empty() ? q.size(1) : p.geometry.chunks * p.geometry.vsts();
  const Paging paging(k_cache, v_cache, block_table, cache_seqlens, same(kept));
  check_written(paging.block_table, paging.cache_seqlens, k_cache, same(kept));
  p.cache = paging.cache;
  p.inv_freq = inv_freq.const_data_ptr<float>();
  if (q.numel() > 0) vxl::rope_append_cpu(p, thread_pool());
  bump_versions({&k_cache, &v_cache});
}

}  // namespace

TORCH_LIBRARY_IMPL(vxl, CPU, m) {
  implement<vst_attention>(m, "vxl::vst_attention", "cpu");
  implement<vst_attention_backward>(m, "vxl::vst_attention_backward", "cpu");
  implement<rope_append<rope_append_into, empty_rows>>(m, "vxl::rope_append", "cpu");
  implement<rope_append_<rope_append_into, empty_rows>>(m, "vxl::rope_append_", "cpu");
}
