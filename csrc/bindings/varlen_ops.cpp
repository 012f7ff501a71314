// The operators of ragged calls on the CPU. Their tensors are flat, (rows, heads, head_dim), and
// `layout` is int32 (sequences, 5): window, ratio, chunks, first raw row, first VST row
// (vxl_kernels/varlen.py). The contents of layout, tables and lengths are checked here, before
// anything is written.
#include <torch/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "../cpu/kernels.h"
#include "arguments.h"
#include "backends.h"
#include "paging.h"
#include "threads.h"

namespace {

using at::Tensor;
using namespace vxl::bindings;

// The sequences of a call. Their raw rows follow one another from row 0, then their VST rows do.
std::vector<vxl::RaggedSequence> sequences_of(const Tensor& layout_in, int64_t rows) {
  TORCH_CHECK_VALUE(layout_in.dim() == 2 && layout_in.size(1) == 5 &&
                        layout_in.scalar_type() == at::kInt,
                    "layout: got ", layout_in.scalar_type(), " ", layout_in.sizes(),
                    ", expected int32 (sequences, 5)");
  const Tensor layout = layout_in.contiguous();
  const int32_t* at = layout.const_data_ptr<int32_t>();
  std::vector<vxl::RaggedSequence> found;
  int64_t raw = 0, vst = 0;
  for (int64_t i = 0; i < layout.size(0); ++i, at += 5) {
    const vxl::RaggedSequence x{{at[0], at[1], at[2], true}, at[3], at[4]};
    const vxl::ChunkGeometry& g = x.geometry;
    TORCH_CHECK_VALUE(g.window >= 0 && g.ratio >= 0 && g.chunks > 0 &&
                          (g.ratio > 0 ? g.ratio <= g.window : g.chunks == 1),
                      "layout: got window ", g.window, ", ratio ", g.ratio, ", chunks ", g.chunks,
                      " at sequence ", i, ", expected a layout");
    raw += g.chunks * g.window;
    found.push_back(x);
  }
  int64_t raw_at = 0;
  for (size_t i = 0; i < found.size(); ++i) {
    const vxl::RaggedSequence& x = found[i];
    TORCH_CHECK_VALUE(x.raw_begin == raw_at && x.vst_begin == raw + vst,
                      "layout: got rows from ", x.raw_begin, " and ", x.vst_begin, " at sequence ",
                      i, ", expected ", raw_at, " and ", raw + vst);
    raw_at += x.geometry.chunks * x.geometry.window;
    vst += x.geometry.chunks * x.geometry.vsts();
  }
  TORCH_CHECK_VALUE(raw + vst == rows, "layout: got ", raw + vst, " rows, expected the ", rows,
                    " of q");
  return found;
}

int64_t earlier_vsts(const vxl::RaggedSequence& x) {
  return (x.geometry.chunks - 1) * x.geometry.vsts();
}
int64_t appended(const vxl::RaggedSequence& x) {
  const vxl::ChunkGeometry& g = x.geometry;
  return g.ratio > 0 ? g.chunks * g.vsts() : g.window;
}

// (rows, heads, head_dim) as one sequence of a batch, and back.
Tensor as_batch(const Tensor& x) {
  TORCH_CHECK_VALUE(x.dim() == 3, "q, k, v: got shape ", x.sizes(),
                    ", expected (rows, heads, head_dim)");
  return x.unsqueeze(0);
}

vxl::RowTensor flat(const Tensor& x) { return {x.data_ptr(), 0, x.stride(1), x.stride(2)}; }

// Sets the fields that AttentionParams and RopeParams share. q, k, v: as_batch.
template <typename Params>
void set_ragged(Params& p, const Tensor& q, const Tensor& k, const Tensor& v,
                const std::vector<vxl::RaggedSequence>& sequences) {
  p.dtype = dtype_of(q);
  p.batch = static_cast<int64_t>(sequences.size());
  p.heads = q.size(2);
  p.kv_heads = k.size(2);
  p.head_dim = q.size(3);
  p.ragged = sequences.data();
  p.ragged_rows = q.size(1);
  p.q = flat(q);
  p.k = flat(k);
  p.v = flat(v);
}

struct RaggedCall {  // owns what the parameters of an attention call point to
  std::vector<vxl::RaggedSequence> sequences;
  Tensor q, k, v;
  std::optional<Paging> paging;
  vxl::AttentionParams p;

  RaggedCall(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
             const std::optional<Tensor>& k_cache, const std::optional<Tensor>& v_cache,
             const std::optional<Tensor>& block_table, const std::optional<Tensor>& cache_seqlens,
             const Tensor& layout, double scale)
      : q(rows_contiguous(as_batch(q_in))), k(rows_contiguous(as_batch(k_in))),
        v(rows_contiguous(as_batch(v_in))) {
    check_shapes(q, k, v);
    sequences = sequences_of(layout, q.size(1));
    set_ragged(p, q, k, v, sequences);
    p.scale = static_cast<float>(scale);
    if (k_cache.has_value()) {
      TORCH_CHECK_VALUE(v_cache.has_value() && block_table.has_value() && cache_seqlens.has_value(),
                        "v_cache: got None, expected all four cache arguments or none");
      check_cache(k, *k_cache, *v_cache, *block_table, *cache_seqlens, p.batch);
      paging.emplace(*k_cache, *v_cache, *block_table, *cache_seqlens,
                     [&](int64_t b) { return earlier_vsts(sequences[b]); });
      p.cache = paging->cache;
      return;
    }
    for (const vxl::RaggedSequence& x : sequences) {
      TORCH_CHECK_VALUE(x.geometry.chunks == 1, "k_cache: got None, expected a tensor");
    }
  }
};

std::tuple<Tensor, Tensor> vst_attention_varlen(
    const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& k_cache,
    const std::optional<Tensor>& v_cache, const std::optional<Tensor>& block_table,
    const std::optional<Tensor>& cache_seqlens, const Tensor& layout, int64_t /*chunks*/,
    double scale) {
  RaggedCall call(q, k, v, k_cache, v_cache, block_table, cache_seqlens, layout, scale);
  const Tensor out = empty_rows(call.q);
  Tensor lse = at::empty({q.size(1), q.size(0)}, q.options().dtype(at::kFloat));
  call.p.out = flat(out);
  call.p.lse = lse.mutable_data_ptr<float>();
  if (q.numel() > 0) vxl::attention_cpu(call.p, thread_pool());
  return {out.squeeze(0), lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> vst_attention_varlen_backward(
    const Tensor& grad_out_in, const Tensor& grad_lse_in, const Tensor& q, const Tensor& k,
    const Tensor& v, const std::optional<Tensor>& k_cache, const std::optional<Tensor>& v_cache,
    const std::optional<Tensor>& block_table, const std::optional<Tensor>& cache_seqlens,
    const Tensor& out_in, const Tensor& lse_in, const Tensor& layout, int64_t /*chunks*/,
    double scale) {
  RaggedCall call(q, k, v, k_cache, v_cache, block_table, cache_seqlens, layout, scale);
  for (const Tensor* x : {&grad_out_in, &out_in}) {
    TORCH_CHECK_VALUE(x->sizes() == q.sizes() && x->scalar_type() == q.scalar_type(),
                      "grad_out, out: got ", x->scalar_type(), " ", x->sizes(), ", expected ",
                      q.scalar_type(), " ", q.sizes(), " as q");
  }
  const int64_t lse_sizes[] = {q.size(1), q.size(0)};
  for (const Tensor* x : {&grad_lse_in, &lse_in}) {
    TORCH_CHECK_VALUE(x->sizes() == at::IntArrayRef(lse_sizes) && x->scalar_type() == at::kFloat,
                      "grad_lse, lse: got ", x->scalar_type(), " ", x->sizes(),
                      ", expected float32 ", at::IntArrayRef(lse_sizes));
  }
  const Tensor grad_out = rows_contiguous(as_batch(grad_out_in));
  const Tensor out = rows_contiguous(as_batch(out_in));
  const Tensor grad_lse = grad_lse_in.contiguous(), lse = lse_in.contiguous();
  const Tensor grad_q = empty_rows(call.q), grad_k = empty_rows(call.k);
  const Tensor grad_v = empty_rows(call.v);

  vxl::AttentionBackwardParams p;
  p.call = call.p;
  p.call.out = flat(out);
  p.call.lse = const_cast<float*>(lse.const_data_ptr<float>());
  p.grad_lse = grad_lse.const_data_ptr<float>();
  p.grad_out = flat(grad_out);
  p.grad_q = flat(grad_q);
  p.grad_k = flat(grad_k);
  p.grad_v = flat(grad_v);
  Tensor grad_k_cache = at::empty({0}, q.options()), grad_v_cache = grad_k_cache.clone();
  if (k_cache.has_value()) {
    grad_k_cache = at::zeros(k_cache->sizes(), q.options());
    grad_v_cache = at::zeros(k_cache->sizes(), q.options());
    p.grad_k_cache = grad_k_cache.data_ptr();
    p.grad_v_cache = grad_v_cache.data_ptr();
    for (int i = 0; i < 3; ++i) p.grad_cache_strides[i] = grad_k_cache.stride(i);
  }
  // One sequence after another: each has the workspace and the bits that it has alone.
  p.call.batch = 1;
  for (size_t i = 0; q.numel() > 0 && i < call.sequences.size(); ++i) {
    p.call.ragged = &call.sequences[i];
    p.call.geometry = call.sequences[i].geometry;
    if (call.paging.has_value()) {
      p.call.cache.block_table = call.p.cache.block_table + i * call.p.cache.block_table_stride;
      p.call.cache.lens = call.p.cache.lens + i;
    }
    if (p.call.geometry.rows() > 0) vxl::attention_backward_cpu(p, thread_pool());
  }
  return {grad_q.squeeze(0), grad_k.squeeze(0), grad_v.squeeze(0), grad_k_cache, grad_v_cache};
}

void append_into(const Tensor& q, const Tensor& k, const Tensor& v_in, const Tensor& k_cache,
                 const Tensor& v_cache, const Tensor& block_table, const Tensor& cache_seqlens,
                 const Tensor& layout, const Tensor& inv_freq_in, const Tensor& q_out,
                 const Tensor& k_out) {
  const auto sequences = sequences_of(layout, q.size(1));
  check_rope(q, k, v_in, k_cache, v_cache, block_table, cache_seqlens, inv_freq_in,
             static_cast<int64_t>(sequences.size()));
  const Tensor v = rows_contiguous(v_in), inv_freq = inv_freq_in.contiguous();
  vxl::RopeParams p;
  set_ragged(p, q, k, v, sequences);
  p.q_out = flat(q_out);
  p.k_out = flat(k_out);
  const Extra kept = [&](int64_t b) { return appended(sequences[b]); };
  const Paging paging(k_cache, v_cache, block_table, cache_seqlens, kept);
  check_written(paging.block_table, paging.cache_seqlens, k_cache, kept);
  p.cache = paging.cache;
  p.inv_freq = inv_freq.const_data_ptr<float>();
  if (q.numel() > 0) vxl::rope_append_cpu(p, thread_pool());
  bump_versions({&k_cache, &v_cache});
}

std::tuple<Tensor, Tensor> rope_append_varlen(const Tensor& q_in, const Tensor& k_in,
                                              const Tensor& v, const Tensor& k_cache,
                                              const Tensor& v_cache, const Tensor& block_table,
                                              const Tensor& cache_seqlens, const Tensor& layout,
                                              const Tensor& inv_freq) {
  const Tensor q = rows_contiguous(as_batch(q_in)), k = rows_contiguous(as_batch(k_in));
  const Tensor q_out = empty_rows(q), k_out = empty_rows(k);
  append_into(q, k, as_batch(v), k_cache, v_cache, block_table, cache_seqlens, layout, inv_freq,
              q_out, k_out);
  return {q_out.squeeze(0), k_out.squeeze(0)};
}

void rope_append_varlen_(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& k_cache,
                         const Tensor& v_cache, const Tensor& block_table,
                         const Tensor& cache_seqlens, const Tensor& layout,
                         const Tensor& inv_freq) {
  if (q.stride(-1) == 1 && k.stride(-1) == 1) {
    const Tensor q_rows = as_batch(q), k_rows = as_batch(k);
    append_into(q_rows, k_rows, as_batch(v), k_cache, v_cache, block_table, cache_seqlens, layout,
                inv_freq, q_rows, k_rows);
  } else {
    const auto [q_out, k_out] = rope_append_varlen(q, k, v, k_cache, v_cache, block_table,
                                                   cache_seqlens, layout, inv_freq);
    q.copy_(q_out);
    k.copy_(k_out);
  }
  bump_versions({&q, &k});
}

}  // namespace

TORCH_LIBRARY_IMPL(vxl, CPU, m) {
  implement<vst_attention_varlen>(m, "vxl::vst_attention_varlen", "cpu");
  implement<vst_attention_varlen_backward>(m, "vxl::vst_attention_varlen_backward", "cpu");
  implement<rope_append_varlen>(m, "vxl::rope_append_varlen", "cpu");
  implement<rope_append_varlen_>(m, "vxl::rope_append_varlen_", "cpu");
}
