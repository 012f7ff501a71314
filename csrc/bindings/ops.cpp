// The CPU kernels as torch operators. Schemas, fakes and gradients are in vxl_kernels/ops.py;
// shapes and dtypes are checked in vxl_kernels/api.py, what only the data tells is checked
// here, before anything is written.
#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <tuple>

#include "../cpu/kernels.h"

namespace {

using at::Tensor;

vxl::ThreadPool thread_pool() {
  vxl::ThreadPool pool;
#ifdef _OPENMP
  pool.threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  pool.run = [](int threads, void (*body)(void*, int), void* arg) {
#pragma omp parallel num_threads(threads)
    body(arg, omp_get_thread_num());
  };
#endif
  return pool;
}

vxl::DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat: return vxl::DType::f32;
    case at::kBFloat16: return vxl::DType::bf16;
    case at::kHalf: return vxl::DType::f16;
    default:
      TORCH_CHECK_VALUE(false, "q: got ", x.scalar_type(),
                        ", expected float32, bfloat16 or float16");
  }
}

// The kernels want head_dim contiguous; other strides are free. Caches are never copied:
// vxl_kernels/checks.py refuses them.
Tensor rows_contiguous(const Tensor& x) { return x.stride(-1) == 1 ? x : x.contiguous(); }

// A large result is fresh memory, and the kernel hands it out page by page: with four chunks
// in a call that was 4 % of the attention. Huge pages make it 512 times fewer.
Tensor empty_rows(const Tensor& like) {
  Tensor x = at::empty(like.sizes(), like.options());
#ifdef __linux__
  constexpr uintptr_t huge = uintptr_t(2) << 20;
  const auto begin = reinterpret_cast<uintptr_t>(x.data_ptr());
  const uintptr_t first = (begin + huge - 1) / huge * huge, last = (begin + x.nbytes()) / huge * huge;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return x;
}

// Tells autograd that these were written, so that a backward that saved them refuses.
void bump_versions(std::initializer_list<const Tensor*> written) {
  for (const Tensor* x : written) x->unsafeGetTensorImpl()->bump_version();
}

vxl::RowTensor row_tensor(const Tensor& x) {
  return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

vxl::ChunkGeometry geometry_of(at::IntArrayRef layout, int64_t rows) {
  if (layout.empty()) return {rows, 0, 1, true};
  TORCH_CHECK_VALUE(layout.size() == 4, "layout: got ", layout.size(),
                    " numbers, expected [window, ratio, chunks, split]");
  const vxl::ChunkGeometry g{layout[0], layout[1], layout[2], layout[3] != 0};
  TORCH_CHECK_VALUE(g.window > 0 && g.ratio > 0 && g.chunks > 0 && g.rows() == rows,
                    "layout: got ", layout, ", expected a layout of ", rows, " rows");
  return g;
}

// What would read or write outside a tensor. Calls through vxl_kernels/api.py never get
// here with it; the operators can be called by name, too.
void check_shapes(const Tensor& q, const Tensor& k, const Tensor& v) {
  TORCH_CHECK_VALUE(q.dim() == 4 && k.dim() == 4 && k.sizes() == v.sizes() &&
                        k.size(0) == q.size(0) && k.size(1) == q.size(1) &&
                        k.size(3) == q.size(3) && k.size(2) > 0 && q.size(2) % k.size(2) == 0 &&
                        q.size(3) > 0 && q.size(3) <= 256,
                    "q, k, v: got shapes ", q.sizes(), ", ", k.sizes(), ", ", v.sizes(),
                    ", expected (batch, rows, heads, head_dim), k and v with a divisor of heads");
  TORCH_CHECK_VALUE(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(),
                    "k, v: got ", k.scalar_type(), ", ", v.scalar_type(), ", expected ",
                    q.scalar_type(), " as q");
}

void check_cache(const Tensor& k, const Tensor& k_cache, const Tensor& v_cache,
                 const Tensor& block_table, const Tensor& cache_lens) {
  TORCH_CHECK_VALUE(k_cache.dim() == 4 && k_cache.sizes() == v_cache.sizes() &&
                        k_cache.size(1) > 0 && k_cache.size(2) == k.size(2) &&
                        k_cache.size(3) == k.size(3) && k_cache.stride(3) == 1 &&
                        v_cache.stride(3) == 1 && k_cache.scalar_type() == k.scalar_type() &&
                        v_cache.scalar_type() == k.scalar_type(),
                    "k_cache, v_cache: got ", k_cache.scalar_type(), " ", k_cache.sizes(), ", ",
                    v_cache.scalar_type(), " ", v_cache.sizes(), ", expected ", k.scalar_type(),
                    " (pages, page_size, ", k.size(2), ", ", k.size(3), "), head_dim contiguous");
  TORCH_CHECK_VALUE(block_table.dim() == 2 && block_table.size(0) == k.size(0) &&
                        block_table.scalar_type() == at::kInt && cache_lens.dim() == 1 &&
                        cache_lens.size(0) == k.size(0) && cache_lens.scalar_type() == at::kInt,
                    "block_table, cache_lens: got shapes ", block_table.sizes(), ", ",
                    cache_lens.sizes(), ", expected int32 (batch, max_pages) and (batch,)");
}

// Every sequence's first cache_lens + extra tokens lie in existing pages. The words are
// those of vxl_kernels/checks.py.
void check_paging(const Tensor& block_table, const Tensor& cache_lens, const Tensor& cache,
                  int64_t extra) {
  const int64_t pages = cache.size(0), page_size = cache.size(1);
  const int64_t max_pages = block_table.size(1);
  const int32_t* table = block_table.const_data_ptr<int32_t>();
  const int32_t* lens = cache_lens.const_data_ptr<int32_t>();
  for (int64_t b = 0; b < cache_lens.size(0); ++b) {
    TORCH_CHECK_VALUE(lens[b] >= 0, "cache_lens: got ", lens[b], " at sequence ", b,
                      ", expected at least 0");
    const int64_t need = lens[b] + extra;
    const int64_t used = (need + page_size - 1) / page_size;
    TORCH_CHECK_VALUE(used <= max_pages, "block_table: got ", max_pages, " pages of ", page_size,
                      " tokens, expected room for ", need, " tokens (cache_lens ", lens[b], " + ",
                      extra, ") of sequence ", b);
    for (int64_t i = 0; i < used; ++i) {
      const int32_t page = table[b * max_pages + i];
      TORCH_CHECK_VALUE(page >= 0 && page < pages, "block_table: got page ", page,
                        " at sequence ", b, ", expected 0 to ", pages - 1, " in k_cache");
    }
  }
}

// What both kernels take: AttentionParams and RopeParams name these alike.
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

struct Paging {  // owns what PagedCache points to
  Tensor block_table, cache_lens;
  vxl::PagedCache cache;

  Paging(const Tensor& k_cache, const Tensor& v_cache, const Tensor& table, const Tensor& lens,
         int64_t extra)
      : block_table(table.contiguous()), cache_lens(lens.contiguous()) {
    check_paging(block_table, cache_lens, k_cache, extra);
    cache.k = k_cache.data_ptr();
    cache.v = v_cache.data_ptr();
    for (int i = 0; i < 3; ++i) {
      cache.k_strides[i] = k_cache.stride(i);
      cache.v_strides[i] = v_cache.stride(i);
    }
    cache.page_size = k_cache.size(1);
    cache.block_table = block_table.const_data_ptr<int32_t>();
    cache.block_table_stride = block_table.size(1);
    cache.lens = cache_lens.const_data_ptr<int32_t>();
  }
};

std::tuple<Tensor, Tensor> vst_attention(
    const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
    const std::optional<Tensor>& k_cache, const std::optional<Tensor>& v_cache,
    const std::optional<Tensor>& block_table, const std::optional<Tensor>& cache_lens,
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
    TORCH_CHECK_VALUE(v_cache.has_value() && block_table.has_value() && cache_lens.has_value(),
                      "v_cache: got None, expected all four cache arguments or none");
    check_cache(k, *k_cache, *v_cache, *block_table, *cache_lens);
    paging.emplace(*k_cache, *v_cache, *block_table, *cache_lens,
                   (p.geometry.chunks - 1) * p.geometry.vsts());
    p.cache = paging->cache;
  } else {
    TORCH_CHECK_VALUE(p.geometry.chunks == 1, "k_cache: got None, expected a tensor");
  }
  if (q.numel() > 0) vxl::attention_cpu(p, thread_pool());
  return {out, lse};
}

void rope_append_into(const Tensor& q, const Tensor& k, const Tensor& v_in, const Tensor& k_cache,
                      const Tensor& v_cache, const Tensor& block_table, const Tensor& cache_lens,
                      at::IntArrayRef layout, const Tensor& inv_freq_in, const Tensor& q_out,
                      const Tensor& k_out) {
  check_shapes(q, k, v_in);
  check_cache(k, k_cache, v_cache, block_table, cache_lens);
  TORCH_CHECK_VALUE(inv_freq_in.dim() == 1 && 2 * inv_freq_in.size(0) == q.size(3) &&
                        inv_freq_in.scalar_type() == at::kFloat,
                    "inv_freq: got ", inv_freq_in.scalar_type(), " ", inv_freq_in.sizes(),
                    ", expected float32 (head_dim / 2,)");
  const Tensor v = rows_contiguous(v_in), inv_freq = inv_freq_in.contiguous();
  vxl::RopeParams p;
  set_call(p, q, k, v, layout);
  p.q_out = row_tensor(q_out);
  p.k_out = row_tensor(k_out);
  const int64_t kept = layout.empty() ? q.size(1) : p.geometry.chunks * p.geometry.vsts();
  const Paging paging(k_cache, v_cache, block_table, cache_lens, kept);
  p.cache = paging.cache;
  p.inv_freq = inv_freq.const_data_ptr<float>();
  if (q.numel() > 0) vxl::rope_append_cpu(p, thread_pool());
  bump_versions({&k_cache, &v_cache});
}

std::tuple<Tensor, Tensor> rope_append(const Tensor& q_in, const Tensor& k_in, const Tensor& v,
                                       const Tensor& k_cache, const Tensor& v_cache,
                                       const Tensor& block_table, const Tensor& cache_lens,
                                       at::IntArrayRef layout, const Tensor& inv_freq) {
  const Tensor q = rows_contiguous(q_in), k = rows_contiguous(k_in);
  Tensor q_out = empty_rows(q), k_out = empty_rows(k);
  rope_append_into(q, k, v, k_cache, v_cache, block_table, cache_lens, layout, inv_freq, q_out,
                   k_out);
  return {q_out, k_out};
}

void rope_append_(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& k_cache,
                  const Tensor& v_cache, const Tensor& block_table, const Tensor& cache_lens,
                  at::IntArrayRef layout, const Tensor& inv_freq) {
  if (q.stride(-1) == 1 && k.stride(-1) == 1) {
    rope_append_into(q, k, v, k_cache, v_cache, block_table, cache_lens, layout, inv_freq, q, k);
    bump_versions({&q, &k});
    return;
  }
  auto [q_out, k_out] = rope_append(q, k, v, k_cache, v_cache, block_table, cache_lens, layout,
                                    inv_freq);
  q.copy_(q_out);
  k.copy_(k_out);
  bump_versions({&q, &k});
}

}  // namespace

TORCH_LIBRARY_IMPL(vxl, CPU, m) {
  m.impl("vst_attention", vst_attention);
  m.impl("rope_append", rope_append);
  m.impl("rope_append_", rope_append_);
}
