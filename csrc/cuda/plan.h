// Grids and access widths of the CUDA kernels. Plain host code without CUDA's headers, so that
// the tests run the very grids that a GPU runs.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "../include/vxl/params.h"

namespace vxl::cuda {

struct Extent {
  uint32_t x, y, z;
};

struct Plan {
  Extent grid{0, 0, 0}, block{0, 0, 0};  // grid.x == 0: nothing to do
  int word = 0;                          // bytes of an access; 0: the call cannot be served
};

constexpr int64_t kMaxBlocksX = INT32_MAX, kMaxBlocksYZ = 65535;  // loops take the rest
constexpr int64_t kBlockThreads = 256;

inline uint32_t clamped(int64_t n, int64_t most) {
  return static_cast<uint32_t>(n < most ? n : most);
}

// Largest power of two up to 16 that divides every one of these.
inline int widest_word(std::initializer_list<int64_t> bytes) {
  int64_t all = 16;
  for (int64_t b : bytes) all |= b;
  return static_cast<int>(all & -all);
}

inline int64_t address(const void* p) { return static_cast<int64_t>(reinterpret_cast<uintptr_t>(p)); }

// -- rope_append ------------------------------------------------------------------------------

// threadIdx.x picks the pairs of a head, .y every .y-th head, .z the position in the chunk that
// blockIdx.y picks. Each thread computes its angles once a row and goes through heads with them.
constexpr int64_t kFewRows = 1024;

inline Plan plan_rope(const RopeParams& p) {
  Plan plan;
  const ChunkGeometry& g = p.geometry;
  const int64_t item = p.dtype == DType::f32 ? 4 : 2, rows = p.batch * g.rows();
  const bool counts_fit = rows <= INT32_MAX && p.batch * g.chunks <= INT32_MAX &&
                          p.cache.page_size <= INT32_MAX && p.heads <= INT32_MAX / 2;
  if (p.head_dim <= 0 || p.head_dim % 2 != 0 || p.head_dim > 2 * kBlockThreads || !counts_fit) {
    return plan;
  }
  int word = widest_word({p.head_dim / 2 * item, address(p.inv_freq), address(p.cache.k),
                          address(p.cache.v)});
  for (const RowTensor* t : {&p.q, &p.k, &p.v, &p.q_out, &p.k_out}) {
    word = widest_word({word, address(t->data), t->batch_stride * item, t->row_stride * item,
                        t->head_stride * item});
  }
  for (int i = 0; i < 3; ++i) {
    word = widest_word({word, p.cache.k_strides[i] * item, p.cache.v_strides[i] * item});
  }
  plan.word = word == 16 ? 16 : static_cast<int>(item);
  if (rows == 0) return plan;

  const int64_t lanes = p.head_dim / 2 * item / plan.word, heads = p.heads + p.kv_heads;
  // Many rows: a warp a row, so that an angle serves several heads. Few rows (decode): all
  // threads that a row has work for.
  int64_t groups = (rows > kFewRows ? 32 : kBlockThreads) / lanes;
  groups = groups < 1 ? 1 : groups < heads ? groups : heads;
  int64_t rows_a_block = kBlockThreads / 2 / (lanes * groups);
  rows_a_block = rows_a_block < 1 ? 1 : rows_a_block < g.chunk_rows() ? rows_a_block
                                                                       : g.chunk_rows();
  if (rows_a_block > 64) rows_a_block = 64;  // CUDA's limit in z
  plan.block = {static_cast<uint32_t>(lanes), static_cast<uint32_t>(groups),
                static_cast<uint32_t>(rows_a_block)};
  plan.grid = {clamped((g.chunk_rows() + rows_a_block - 1) / rows_a_block, kMaxBlocksX),
               clamped(p.batch * g.chunks, kMaxBlocksYZ), 1};
  return plan;
}

// -- pages ------------------------------------------------------------------------------------

constexpr int kCopiesInFlight = 4;  // loads of a thread before its first store

inline int pool_word(const PagePool& p) {
  return widest_word({address(p.data), p.row_bytes, p.layer_stride, p.page_stride});
}

// Blocks that share one run of rows: each moves at least 16 KiB of a 16-byte run.
inline uint32_t blocks_a_run(int64_t bytes, int word) {
  const int64_t each = kBlockThreads * kCopiesInFlight * word;
  return clamped((bytes + each - 1) / each, 64);
}

// x shares a page, y is layers times K and V, z the entries.
inline Plan plan_copy_pages(const PageCopyParams& p) {
  Plan plan;
  plan.word = widest_word({pool_word(p.k), pool_word(p.v)});
  plan.block = {static_cast<uint32_t>(kBlockThreads), 1, 1};
  if (p.count == 0 || p.k.layers == 0 || p.k.row_bytes == 0) return plan;
  plan.grid = {blocks_a_run(p.k.page_size * p.k.row_bytes, plan.word),
               clamped(2 * p.k.layers, kMaxBlocksYZ), clamped(p.count, kMaxBlocksYZ)};
  return plan;
}

// x shares a page, y is the pages that the rows touch, z the layers.
inline Plan plan_row_transfer(const RowTransferParams& p) {
  Plan plan;
  const PagePool& c = p.pool;
  if (p.first + p.rows > INT32_MAX || c.page_size > INT32_MAX) return plan;
  plan.word = widest_word({pool_word(c), address(p.buffer)});
  plan.block = {static_cast<uint32_t>(kBlockThreads), 1, 1};
  if (p.rows == 0 || c.layers == 0 || c.row_bytes == 0) return plan;
  const int64_t pages = (p.first + p.rows - 1) / c.page_size - p.first / c.page_size + 1;
  const int64_t longest = p.rows < c.page_size ? p.rows : c.page_size;
  plan.grid = {blocks_a_run(longest * c.row_bytes, plan.word), clamped(pages, kMaxBlocksYZ),
               clamped(c.layers, kMaxBlocksYZ)};
  return plan;
}

}  // namespace vxl::cuda
