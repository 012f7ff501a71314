// Plain parameters of the operators: raw pointers, strides in elements, no torch.
// The CPU and CUDA kernels, the bindings and the stand-alone tests share them.
#pragma once

#include <cstdint>

// Under nvcc, CUDA kernels can call these functions too.
#if defined(__CUDACC__)
#define VXL_HD __host__ __device__
#else
#define VXL_HD
#endif

// The per-ISA units include these functions. Inlining leaves no copy that the linker could share
// between units.
#define VXL_ALWAYS_INLINE VXL_HD inline __attribute__((always_inline))

namespace vxl {

enum class DType : int32_t { f32, bf16, f16 };

// Maps the rows of a call to chunks and positions. A call holds `chunks` chunks of `window` raw
// tokens and vsts() VSTs each. `ratio == 0` means "no layout": one causal chunk of raw rows.
// vxl_kernels/layout.py is the Python version and documents it.
template <typename Int>
struct BasicGeometry {
  Int window = 0;
  Int ratio = 0;
  Int chunks = 1;
  bool split = true;  // [all raw | all VST]; false: interleaved, as published

  VXL_ALWAYS_INLINE Int vsts() const { return ratio > 0 ? window / ratio : 0; }
  VXL_ALWAYS_INLINE Int chunk_rows() const { return window + vsts(); }
  VXL_ALWAYS_INLINE Int rows() const { return chunks * chunk_rows(); }

  // Index of the VST at this position of a chunk; -1 if the row is a raw token.
  VXL_ALWAYS_INLINE Int vst_at(Int position) const {
    if (ratio == 0) return -1;
    return position % (ratio + 1) == ratio ? position / (ratio + 1) : -1;
  }

  // Index of this position's row among the rows that its chunk appends to the cache; -1 if the row
  // is not appended. Without a layout every row is appended.
  VXL_ALWAYS_INLINE Int append_index(Int position) const {
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

// (pages, page_size, kv_heads, head_dim), head_dim contiguous. K and V have the same shape.
struct PagedCache {
  void* k = nullptr;
  void* v = nullptr;
  int64_t k_strides[3] = {0, 0, 0};  // page, slot, head
  int64_t v_strides[3] = {0, 0, 0};
  int64_t page_size = 1;
  const int32_t* block_table = nullptr;  // (batch, max_pages)
  int64_t block_table_stride = 0;
  const int32_t* lens = nullptr;  // (batch,) tokens cached before this call
};

// A sequence of a ragged call, whose tensors are flat, (rows, heads, head_dim): the raw rows of all
// sequences, then all VST rows.
struct RaggedSequence {
  ChunkGeometry geometry;  // of this sequence; split order
  int64_t raw_begin = 0, vst_begin = 0;  // its first raw row, its first VST row
};

// Which row of the tensors holds a position of a sequence. A ragged call gives every sequence a
// geometry and a place of its own, and the tensors' batch_stride is 0.
struct CallRows {
  ChunkGeometry geometry;  // of every sequence, if `ragged` is null
  const RaggedSequence* ragged = nullptr;  // (batch,)
  int64_t ragged_rows = 0;                 // of the flat tensors

  VXL_ALWAYS_INLINE const ChunkGeometry& geometry_at(int64_t b) const {
    return ragged != nullptr ? ragged[b].geometry : geometry;
  }
  VXL_ALWAYS_INLINE int64_t row_of(int64_t b, int64_t chunk, int64_t position) const {
    if (ragged == nullptr) return geometry.row_of(chunk, position);
    const RaggedSequence& s = ragged[b];
    const int64_t raw_rows = s.geometry.chunks * s.geometry.window;
    const int64_t row = s.geometry.row_of(chunk, position);
    return row < raw_rows ? s.raw_begin + row : s.vst_begin + row - raw_rows;
  }
  // Of a contiguous (batch, heads, rows), or (heads, rows) if ragged.
  VXL_ALWAYS_INLINE int64_t lse_index(int64_t b, int64_t heads, int64_t head, int64_t row) const {
    return ragged != nullptr ? head * ragged_rows + row
                             : (b * heads + head) * geometry.rows() + row;
  }
};

struct AttentionParams : CallRows {
  DType dtype = DType::f32;
  int64_t batch = 0, heads = 0, kv_heads = 0, head_dim = 0;
  RowTensor q, k, v, out;
  PagedCache cache;
  float* lse = nullptr;  // natural log, see lse_index; may be null
  float scale = 1.0f;
};

// The backward pass of attention: the forward call, and where its gradients go. The gradients of
// the cache have its shape. The kernels add to them, so the caller fills them with zeros first.
struct AttentionBackwardParams {
  AttentionParams call;  // `out` and `lse` are read
  RowTensor grad_out, grad_q, grad_k, grad_v;
  const float* grad_lse = nullptr;  // as call.lse
  void* grad_k_cache = nullptr;     // contiguous, in the shape of the pages
  void* grad_v_cache = nullptr;
  int64_t grad_cache_strides[3] = {0, 0, 0};  // page, slot, head
};

struct RopeParams : CallRows {
  DType dtype = DType::f32;
  int64_t batch = 0, heads = 0, kv_heads = 0, head_dim = 0;
  RowTensor q, k, v, q_out, k_out;
  PagedCache cache;
  const float* inv_freq = nullptr;  // (head_dim / 2,)
};

// One cache tensor of all layers, (layers, pages, page_size, kv_heads, head_dim), as bytes: a copy
// needs no dtype. A page is dense. The strides of pages and layers are in bytes and arbitrary.
struct PagePool {
  char* data = nullptr;
  int64_t layers = 0, page_size = 1, row_bytes = 0;
  int64_t layer_stride = 0, page_stride = 0;
};

// For each (source, target, rows) of `copies`: copy the first `rows` rows of page `source` to page
// `target`, in every layer of k and v. Targets are distinct, and no target is a source. rows == 0
// marks an unused entry.
struct PageCopyParams {
  PagePool k, v;  // of the same shape
  const int32_t* copies = nullptr;  // (count, 3)
  int64_t count = 0;
};

// Moves rows [first, first + rows) of one sequence between its pages and a dense buffer
// (layers, rows, row_bytes).
struct RowTransferParams {
  PagePool pool;
  const int32_t* block_table = nullptr;
  int64_t first = 0, rows = 0;
  char* buffer = nullptr;
};

// y (rows, out) = x (rows, in) W^T + bias, W (out, in). The last dimension of each is dense.
struct LinearParams {
  DType dtype;
  int64_t rows = 0, in = 0, out = 0;
  const void *x = nullptr, *weight = nullptr, *bias = nullptr;  // bias may be missing
  void* y = nullptr;
  int64_t x_row = 0, weight_row = 0, y_row = 0;  // strides
};

}  // namespace vxl
