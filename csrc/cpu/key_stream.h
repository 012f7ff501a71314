// The keys that one chunk sees, as one causal sequence: first its cache entries, then its
// own rows by position. Row r of the chunk sees the first `cached + r + 1` of them, so the
// kernels know a single bound instead of two masks, whatever the storage order is.
#pragma once

#include "../include/vxl/params.h"
#include "simd.h"

namespace {

// P^T of one key block and column group (128 x 48 floats) stays in L1, K and V of the block in L2.
// Blocks of 64 and 192 keys measured 10 % and 2 % slower.
constexpr int64_t kKeyBlock = 128;

struct HeadRows {  // K and V of one key for one KV head; steps: bytes to the next head
  const char *k, *v;
  int64_t k_step, v_step;
};

template <typename T>
struct KeyStream {
  const vxl::AttentionParams& p;
  int64_t batch, kv_head, chunk, cached;

  KeyStream(const vxl::AttentionParams& params, int64_t b, int64_t h, int64_t c)
      : p(params), batch(b), kv_head(h), chunk(c),
        cached(params.cache.lens ? params.cache.lens[b] + c * params.geometry_at(b).vsts() : 0) {}

  // Finds the addresses of keys [begin, begin + n) for KV head `kv_head`.
  void find(int64_t begin, int64_t n, HeadRows* rows) const {
    const vxl::PagedCache& c = p.cache;
    const int64_t paged = min_(begin + n, cached) - begin;
    int64_t i = 0;
    while (i < paged) {  // a run within one page
      const int64_t slot = (begin + i) % c.page_size;
      const int64_t run = min_(paged, i + c.page_size - slot);
      const int64_t page =
          c.block_table[batch * c.block_table_stride + (begin + i) / c.page_size];
      const T* k = static_cast<const T*>(c.k) + page * c.k_strides[0] +
                   slot * c.k_strides[1] + kv_head * c.k_strides[2];
      const T* v = static_cast<const T*>(c.v) + page * c.v_strides[0] +
                   slot * c.v_strides[1] + kv_head * c.v_strides[2];
      for (; i < run; ++i, k += c.k_strides[1], v += c.v_strides[1])
        rows[i] = entry(k, v, c.k_strides[2], c.v_strides[2]);
    }
    for (; i < n; ++i) {
      const int64_t row = p.row_of(batch, chunk, begin + i - cached);
      rows[i] = entry(at(p.k, row), at(p.v, row), p.k.head_stride, p.v.head_stride);
    }
  }

 private:
  static HeadRows entry(const T* k, const T* v, int64_t k_step, int64_t v_step) {
    return {reinterpret_cast<const char*>(k), reinterpret_cast<const char*>(v),
            k_step * int64_t(sizeof(T)), v_step * int64_t(sizeof(T))};
  }
  const T* at(const vxl::RowTensor& t, int64_t row) const {
    return static_cast<const T*>(t.data) + batch * t.batch_stride + row * t.row_stride +
           kv_head * t.head_stride;
  }
};

// Prefetches the rows of the next key block into L2, a few at a time, while this block computes.
// Without it the copy of the next block waits for memory: 20 % of the time at 8100 keys.
struct Prefetch {
  HeadRows rows[kKeyBlock];
  int64_t count = 0, next = 0, step = 0, bytes = 0;
  bool packing = false;  // half of the rows while this block is packed: with few lanes that is long

  void plan(int64_t keys, int64_t calls, bool few_lanes) {
    count = keys;
    next = 0;
    packing = few_lanes;
    step = ceil_div(few_lanes ? ceil_div(count, 2) : count, max_(calls, 1));
  }
  VXL_INLINE void touch() { touch(step); }
  VXL_INLINE void touch(int64_t keys) {
    const int64_t end = min_(next + keys, count);
    for (; next < end; ++next)
      for (int64_t b = 0; b < bytes; b += 64) {
        __builtin_prefetch(rows[next].k + b, 0, 2);
        __builtin_prefetch(rows[next].v + b, 0, 2);
      }
  }
};

}  // namespace
