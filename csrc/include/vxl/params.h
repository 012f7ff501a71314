// Plain parameters of the operators: raw pointers, strides in elements, no torch.
// Shared by the CPU and CUDA kernels, the bindings and the stand-alone tests.
#pragma once

#include <cstdint>

// Callable from CUDA kernels too, where nvcc compiles this.
#if defined(__CUDACC__)
#define VXL_HD __host__ __device__
#else
#define VXL_HD
#endif

// The per-ISA units include these: never a copy that the linker could share between them.
#define VXL_ALWAYS_INLINE VXL_HD inline __attribute__((always_inline))

namespace vxl {

enum class DType : int32_t { f32, bf16, f16 };

// Which row of a call is what. A call holds `chunks` chunks of `window` raw tokens
// and vsts() VSTs each. `ratio == 0` means "no layout": one causal chunk of raw rows.
// The Python twin with the documentation is vxl_kernels/layout.py.
template <typename Int>
struct BasicGeometry {
  Int window = 0;
  Int ratio = 0;
  Int chunks = 1;
  bool split = true;  // [all raw | all VST], else as published (interleaved)

  VXL_ALWAYS_INLINE Int vsts() const { return ratio > 0 ? window / ratio : 0; }
  VXL_ALWAYS_INLINE Int chunk_rows() const { return window + vsts(); }
  VXL_ALWAYS_INLINE Int rows() const { return chunks * chunk_rows(); }

  // VST index if the row at this position of a chunk is a VST, else -1.
  VXL_ALWAYS_INLINE Int vst_at(Int position) const {
    if (ratio == 0) return -1;
    return position % (ratio + 1) == ratio ? position / (ratio + 1) : -1;
  }

  // Cache entry, behind those kept before the chunk, of the row at this position; -1 if it is
  // dropped. Without a layout every row is kept.
  VXL_ALWAYS_INLINE Int kept_at(Int position) const {
    return ratio == 0 ? position : vst_at(position);
  }

  // Storage row of the token at `position` of `chunk`.
  VXL_ALWAYS_INLINE Int row_of(Int chunk, Int position) const {
    if (ratio == 0) return position;
    if (!split) return chunk * chunk_rows() + position;
    const Int group = position / (ratio + 1);
    if (position - group * (ratio + 1) == ratio) {
      return chunks * window + chunk * vsts() + group;
    }
    return chunk * window + position - group;
  }
};
using ChunkGeometry = BasicGeometry<int64_t>;

// (batch, rows, heads, head_dim), head_dim contiguous.
struct RowTensor {
  void* data = nullptr;
  int64_t batch_stride = 0, row_stride = 0, head_stride = 0;
};

// (pages, page_size, kv_heads, head_dim), head_dim contiguous; K and V alike in shape.
struct PagedCache {
  void* k = nullptr;
  void* v = nullptr;
  int64_t k_strides[3] = {0, 0, 0};  // page, slot, head
  int64_t v_strides[3] = {0, 0, 0};
  int64_t page_size = 1;
  const int32_t* block_table = nullptr;  // (batch, max_pages)
  int64_t block_table_stride = 0;
  const int32_t* lens = nullptr;  // (batch,) kept tokens before this call
};

struct AttentionParams {
  DType dtype = DType::f32;
  int64_t batch = 0, heads = 0, kv_heads = 0, head_dim = 0;
  ChunkGeometry geometry;
  RowTensor q, k, v, out;
  PagedCache cache;
  float* lse = nullptr;  // (batch, heads, rows) contiguous, natural log; may be null
  float scale = 1.0f;
};

// Gradients of attention: what `call` took and gave, and where the gradients go. Those of the
// cache are cache-shaped and zero where the caller has put nothing else.
struct AttentionBackwardParams {
  AttentionParams call;  // `out` is read here
  RowTensor grad_out, grad_q, grad_k, grad_v;
  const float* grad_lse = nullptr;  // (batch, heads, rows) contiguous
  void* grad_k_cache = nullptr;     // contiguous, shaped and laid out as the pages
  void* grad_v_cache = nullptr;
  int64_t grad_cache_strides[3] = {0, 0, 0};  // page, slot, head
};

struct RopeParams {
  DType dtype = DType::f32;
  int64_t batch = 0, heads = 0, kv_heads = 0, head_dim = 0;
  ChunkGeometry geometry;
  RowTensor q, k, v, q_out, k_out;
  PagedCache cache;
  const float* inv_freq = nullptr;  // (head_dim / 2,)
};

// One cache tensor of all layers, (layers, pages, page_size, kv_heads, head_dim), as bytes: to
// copy is to know no dtype. A page is dense; strides, in bytes, are free between pages and layers.
struct PagePool {
  char* data = nullptr;
  int64_t layers = 0, page_size = 1, row_bytes = 0;
  int64_t layer_stride = 0, page_stride = 0;
};

// For each (source, target, rows) of `copies`: the first rows of page source to page target, in
// every layer of k and v. Targets are distinct and no source; rows == 0 marks an unused entry.
struct PageCopyParams {
  PagePool k, v;  // alike in shape
  const int32_t* copies = nullptr;  // (count, 3)
  int64_t count = 0;
};

// Rows [first, first + rows) of one sequence, between its pages and a dense buffer
// (layers, rows, row_bytes).
struct RowTransferParams {
  PagePool pool;
  const int32_t* block_table = nullptr;
  int64_t first = 0, rows = 0;
  char* buffer = nullptr;
};

}  // namespace vxl
