// Grids and access widths of the CUDA kernels. This is plain host code without CUDA headers, so the
// tests run the same grids as a GPU.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "../include/vxl/params.h"

namespace vxl::cuda {

struct Extent {
  uint32_t x, y, z;
};

struct Plan {
  Extent grid{0, 0, 0}, block{0, 0, 0};  // grid.x == 0: nothing to do
  int word = 0;                          // bytes of an access; 0: the kernel cannot serve the call
};

constexpr int64_t kMaxBlocksX = INT32_MAX, kMaxBlocksYZ = 65535;  // the kernels loop over the rest
constexpr int64_t kBlockThreads = 256;

inline uint32_t at_most(int64_t n, int64_t limit) {
  return static_cast<uint32_t>(std::min(n, limit));
}

// The largest power of two up to 16 that divides all of these.
inline int widest_word(std::initializer_list<int64_t> bytes) {
  int64_t all = 16;
  for (int64_t b : bytes) all |= b;
  return static_cast<int>(all & -all);
}

inline int64_t address(const void* p) {
  return static_cast<int64_t>(reinterpret_cast<uintptr_t>(p));
}

// -- rope_append ------------------------------------------------------------------------------

// threadIdx.x selects the pairs of a head, .y the heads (every blockDim.y-th), .z the position in
// the chunk that blockIdx.y selects. A thread computes its angles once for each row and uses them
// for all its heads.
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
  // With many rows a row gets one warp, so that an angle serves several heads. With few rows
  // (decode) a row gets as many threads as it has work for.
  const int64_t threads = rows > kFewRows ? 32 : kBlockThreads, max_z = 64;  // z: CUDA's limit
  const int64_t groups = std::clamp<int64_t>(threads / lanes, 1, heads);
  const int64_t rows_a_block = std::clamp<int64_t>(kBlockThreads / 2 / (lanes * groups), 1,
                                                   std::min(g.chunk_rows(), max_z));
  plan.block = {static_cast<uint32_t>(lanes), static_cast<uint32_t>(groups),
                static_cast<uint32_t>(rows_a_block)};
  plan.grid = {at_most((g.chunk_rows() + rows_a_block - 1) / rows_a_block, kMaxBlocksX),
               at_most(p.batch * g.chunks, kMaxBlocksYZ), 1};
  return plan;
}

// -- pages ------------------------------------------------------------------------------------

constexpr int kCopiesInFlight = 4;  // a thread issues this many loads before its first store

inline int pool_word(const PagePool& p) {
  return widest_word({address(p.data), p.row_bytes, p.layer_stride, p.page_stride});
}

// How many blocks share one run of rows. With 16-byte words each moves at least 16 KiB.
inline uint32_t blocks_a_run(int64_t bytes, int word) {
  const int64_t each = kBlockThreads * kCopiesInFlight * word;
  return at_most((bytes + each - 1) / each, 64);
}

// x: blocks that share a page; y: layers of K and V; z: the copies.
inline Plan plan_copy_pages(const PageCopyParams& p) {
  Plan plan;
  plan.word = widest_word({pool_word(p.k), pool_word(p.v)});
  plan.block = {static_cast<uint32_t>(kBlockThreads), 1, 1};
  if (p.count == 0 || p.k.layers == 0 || p.k.row_bytes == 0) return plan;
  plan.grid = {blocks_a_run(p.k.page_size * p.k.row_bytes, plan.word),
               at_most(2 * p.k.layers, kMaxBlocksYZ), at_most(p.count, kMaxBlocksYZ)};
  return plan;
}

// x: blocks that share a page; y: pages that hold the rows; z: layers.
inline Plan plan_row_transfer(const RowTransferParams& p) {
  Plan plan;
  const PagePool& c = p.pool;
  if (p.first + p.rows > INT32_MAX || c.page_size > INT32_MAX) return plan;
  plan.word = widest_word({pool_word(c), address(p.buffer)});
  plan.block = {static_cast<uint32_t>(kBlockThreads), 1, 1};
  if (p.rows == 0 || c.layers == 0 || c.row_bytes == 0) return plan;
  const int64_t pages = (p.first + p.rows - 1) / c.page_size - p.first / c.page_size + 1;
  const int64_t longest = p.rows < c.page_size ? p.rows : c.page_size;
  plan.grid = {blocks_a_run(longest * c.row_bytes, plan.word), at_most(pages, kMaxBlocksYZ),
               at_most(c.layers, kMaxBlocksYZ)};
  return plan;
}

}  // namespace vxl::cuda
