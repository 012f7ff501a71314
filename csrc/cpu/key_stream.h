// The keys that one chunk sees, as one causal sequence: first its cache entries, then its
// own rows by position. Row r of the chunk sees the first `cached + r + 1` of them, so the
// kernels know a single bound instead of two masks, whatever the storage order is.
#pragma once

#include "../include/vxl/params.h"
#include "tile.h"

namespace {

template <typename T>
struct KeyStream {
  const vxl::AttentionParams& p;
  int64_t batch, kv_head, chunk, cached;

  KeyStream(const vxl::AttentionParams& params, int64_t b, int64_t h, int64_t c)
      : p(params), batch(b), kv_head(h), chunk(c),
        cached(params.cache.lens ? params.cache.lens[b] + c * params.geometry.vsts() : 0) {}

  // Addresses of K and V of keys [begin, begin + n).
  void find(int64_t begin, int64_t n, const char** rows) const {
    const vxl::PagedCache& c = p.cache;
    const int64_t paged = least(begin + n, cached) - begin;
    int64_t i = 0;
    while (i < paged) {  // a run within one page
      const int64_t slot = (begin + i) % c.page_size;
      const int64_t run = least(paged, i + c.page_size - slot);
      const int64_t page =
          c.block_table[batch * c.block_table_stride + (begin + i) / c.page_size];
      const T* k = static_cast<const T*>(c.k) + page * c.k_strides[0] +
                   slot * c.k_strides[1] + kv_head * c.k_strides[2];
      const T* v = static_cast<const T*>(c.v) + page * c.v_strides[0] +
                   slot * c.v_strides[1] + kv_head * c.v_strides[2];
      for (; i < run; ++i, k += c.k_strides[1], v += c.v_strides[1]) {
        rows[2 * i] = reinterpret_cast<const char*>(k);
        rows[2 * i + 1] = reinterpret_cast<const char*>(v);
      }
    }
    for (; i < n; ++i) {
      const int64_t row = p.geometry.row_of(chunk, begin + i - cached);
      rows[2 * i] = reinterpret_cast<const char*>(at(p.k, row));
      rows[2 * i + 1] = reinterpret_cast<const char*>(at(p.v, row));
    }
  }

 private:
  const T* at(const vxl::RowTensor& t, int64_t row) const {
    return static_cast<const T*>(t.data) + batch * t.batch_stride + row * t.row_stride +
           kv_head * t.head_stride;
  }
};

}  // namespace
