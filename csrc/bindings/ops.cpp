// The CPU kernels as torch operators. vxl_kernels/ops.py has schemas, fakes and gradients, and
// vxl_kernels/api.py checks shapes and dtypes. The contents of tables and lengths are checked here,
// before anything is written.
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "../cpu/kernels.h"
#include "arguments.h"
#include "backends.h"
#include "rope_forms.h"
#include "threads.h"

namespace {

using at::Tensor;
using namespace vxl::bindings;

// Checks that the first cache_seqlens + extra tokens of every sequence lie in existing pages. The
// messages are those of vxl_kernels/checks.py.
void check_paging(const Tensor& block_table, const Tensor& cache_seqlens, const Tensor& cache,
                  int64_t extra) {
  const int64_t pages = cache.size(0), page_size = cache.size(1);
  const int64_t max_pages = block_table.size(1);
  const int32_t* table = block_table.const_data_ptr<int32_t>();
  const int32_t* lens = cache_seqlens.const_data_ptr<int32_t>();
  for (int64_t b = 0; b < cache_seqlens.size(0); ++b) {
    TORCH_CHECK_VALUE(lens[b] >= 0, "cache_seqlens: got ", lens[b], " at sequence ", b,
                      ", expected at least 0");
    const int64_t need = lens[b] + extra;
    const int64_t used = (need + page_size - 1) / page_size;
    TORCH_CHECK_VALUE(used <= max_pages, "block_table: got ", max_pages, " pages of ", page_size,
                      " tokens, expected room for ", need, " tokens (cache_seqlens ", lens[b],
                      " + ", extra, ") of sequence ", b);
    for (int64_t i = 0; i < used; ++i) {
      const int32_t page = table[b * max_pages + i];
      TORCH_CHECK_VALUE(page >= 0 && page < pages, "block_table: got page ", page,
                        " at sequence ", b, ", expected 0 to ", pages - 1, " in k_cache");
    }
  }
}

// A page that rows are appended to is no other entry's: two would write one place, or one would
// change what the other has kept. All that a call writes lies in the last pages of a sequence.
void check_written(const Tensor& block_table, const Tensor& cache_seqlens, const Tensor& cache,
                   int64_t extra) {
  if (extra == 0) return;
  const int64_t page_size = cache.size(1), max_pages = block_table.size(1);
  const int32_t* table = block_table.const_data_ptr<int32_t>();
  const int32_t* lens = cache_seqlens.const_data_ptr<int32_t>();
  std::vector<int64_t> sequence_of(cache.size(0), -1);
  const auto each_entry = [&](bool written, auto&& look) {
    for (int64_t b = 0; b < cache_seqlens.size(0); ++b) {
      const int64_t kept = lens[b] / page_size;
      const int64_t used = (lens[b] + extra + page_size - 1) / page_size;
      for (int64_t i = written ? kept : 0; i < (written ? used : kept); ++i) {
        look(b, table[b * max_pages + i]);
      }
    }
  };
  const auto refuse_twin = [&](int64_t b, int32_t page) {
    const int64_t first = std::min(b, sequence_of[page]), second = std::max(b, sequence_of[page]);
    TORCH_CHECK_VALUE(sequence_of[page] != b, "block_table: got page ", page,
                      " twice at sequence ", b, ", expected one place for what is appended");
    TORCH_CHECK_VALUE(sequence_of[page] < 0, "block_table: got page ", page, " at sequences ",
                      first, " and ", second, ", expected one place for what is appended");
  };
  each_entry(true, [&](int64_t b, int32_t page) {
    refuse_twin(b, page);
    sequence_of[page] = b;
  });
  each_entry(false, refuse_twin);
}

struct Paging {  // owns what PagedCache points to
  Tensor block_table, cache_seqlens;
  vxl::PagedCache cache;

  Paging(const Tensor& k_cache, const Tensor& v_cache, const Tensor& table, const Tensor& lens,
         int64_t extra)
      : block_table(table.contiguous()), cache_seqlens(lens.contiguous()) {
    check_paging(block_table, cache_seqlens, k_cache, extra);
    cache = paged_cache(k_cache, v_cache, block_table, cache_seqlens);
  }
};

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
    check_cache(k, *k_cache, *v_cache, *block_table, *cache_seqlens);
    paging.emplace(*k_cache, *v_cache, *block_table, *cache_seqlens,
                   (p.geometry.chunks - 1) * p.geometry.vsts());
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
    check_cache(k, *k_cache, *v_cache, *block_table, *cache_seqlens);
    const vxl::ChunkGeometry& g = p.call.geometry;
    paging.emplace(*k_cache, *v_cache, *block_table, *cache_seqlens, (g.chunks - 1) * g.vsts());
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
  check_rope(q, k, v_in, k_cache, v_cache, block_table, cache_seqlens, inv_freq_in);
  const Tensor v = rows_contiguous(v_in), inv_freq = inv_freq_in.contiguous();
  vxl::RopeParams p;
  set_call(p, q, k, v, layout);
  p.q_out = row_tensor(q_out);
  p.k_out = row_tensor(k_out);
  const int64_t kept = layout.empty() ? q.size(1) : p.geometry.chunks * p.geometry.vsts();
  const Paging paging(k_cache, v_cache, block_table, cache_seqlens, kept);
  check_written(paging.block_table, paging.cache_seqlens, k_cache, kept);
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
