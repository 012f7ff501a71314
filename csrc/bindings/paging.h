// Checks of block tables and lengths, before anything is written.
#pragma once

#include <algorithm>
#include <functional>
#include <vector>

#include "arguments.h"

namespace vxl::bindings {

// Tokens of a sequence beyond cache_seqlens.
using Extra = std::function<int64_t(int64_t sequence)>;
inline Extra same(int64_t tokens) {
  return [tokens](int64_t) { return tokens; };
}

// Checks that the first cache_seqlens + extra tokens of every sequence lie in existing pages. The
// messages are those of vxl_kernels/checks.py.
inline void check_paging(const Tensor& block_table, const Tensor& cache_seqlens,
                         const Tensor& cache, const Extra& extra) {
  const int64_t pages = cache.size(0), page_size = cache.size(1);
  const int64_t max_pages = block_table.size(1);
  const int32_t* table = block_table.const_data_ptr<int32_t>();
  const int32_t* lens = cache_seqlens.const_data_ptr<int32_t>();
  for (int64_t b = 0; b < cache_seqlens.size(0); ++b) {
    TORCH_CHECK_VALUE(lens[b] >= 0, "cache_seqlens: got ", lens[b], " at sequence ", b,
                      ", expected at least 0");
    const int64_t need = lens[b] + extra(b);
    const int64_t used = (need + page_size - 1) / page_size;
    TORCH_CHECK_VALUE(used <= max_pages, "block_table: got ", max_pages, " pages of ", page_size,
                      " tokens, expected room for ", need, " tokens (cache_seqlens ", lens[b],
                      " + ", extra(b), ") of sequence ", b);
    for (int64_t i = 0; i < used; ++i) {
      const int32_t page = table[b * max_pages + i];
      TORCH_CHECK_VALUE(page >= 0 && page < pages, "block_table: got page ", page,
                        " at sequence ", b, ", expected 0 to ", pages - 1, " in k_cache");
    }
  }
}

// A page that rows are appended to is no other entry's: two would write one place, or one would
// change what the other has kept. All that a call writes lies in the last pages of a sequence.
inline void check_written(const Tensor& block_table, const Tensor& cache_seqlens,
                          const Tensor& cache, const Extra& extra) {
  const int64_t page_size = cache.size(1), max_pages = block_table.size(1);
  const int32_t* table = block_table.const_data_ptr<int32_t>();
  const int32_t* lens = cache_seqlens.const_data_ptr<int32_t>();
  std::vector<int64_t> sequence_of(cache.size(0), -1);
  const auto each_entry = [&](bool written, auto&& look) {
    for (int64_t b = 0; b < cache_seqlens.size(0); ++b) {
      const int64_t kept = lens[b] / page_size, more = extra(b);
      const int64_t used = (lens[b] + more + page_size - 1) / page_size;
      const int64_t first_written = more > 0 ? kept : used;
      for (int64_t i = written ? first_written : 0; i < (written ? used : first_written); ++i) {
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
         const Extra& extra)
      : block_table(table.contiguous()), cache_seqlens(lens.contiguous()) {
    check_paging(block_table, cache_seqlens, k_cache, extra);
    cache = paged_cache(k_cache, v_cache, block_table, cache_seqlens);
  }
};

}  // namespace vxl::bindings
