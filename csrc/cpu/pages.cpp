#include "pages.h"

#include <algorithm>
#include <atomic>
#include <cstring>

namespace vxl {
namespace {

// A core copies this much in about 0.3 ms. Less work does not pay for a second thread. Waking it
// takes microseconds, and if one core is busy (reading a file, say) the call waits for the slower
// thread: that halved the speed of a load.
constexpr int64_t kBytesPerThread = int64_t{4} << 20;

// Runs fn(begin, end) over equal parts of [0, pieces), several for each thread. A piece may be as
// small as one row, too small to be a task of its own.
template <typename Fn>
void each_part(const ThreadPool& pool, int64_t pieces, int64_t bytes, const Fn& fn) {
  const int64_t threads = std::min({int64_t{pool.threads}, pieces, bytes / kBytesPerThread});
  if (threads <= 1) {
    fn(int64_t{0}, pieces);
    return;
  }
  struct Shared {
    const Fn& fn;
    int64_t pieces, parts;
    std::atomic<int64_t> next{0};
  } shared{fn, pieces, std::min(pieces, 8 * threads)};
  auto body = [](void* arg, int) {
    Shared& s = *static_cast<Shared*>(arg);
    for (int64_t i; (i = s.next.fetch_add(1, std::memory_order_relaxed)) < s.parts;) {
      s.fn(s.pieces * i / s.parts, s.pieces * (i + 1) / s.parts);
    }
  };
  pool.run(static_cast<int>(threads), body, &shared);
}

// Each memcpy moves the rows of one page.
template <bool gather>
void transfer_rows(const RowTransferParams& p, const ThreadPool& pool) {
  const PagePool& c = p.pool;
  if (p.rows == 0) return;
  const int64_t first_page = p.first / c.page_size;
  const int64_t pages = (p.first + p.rows - 1) / c.page_size - first_page + 1;
  const int64_t bytes = c.layers * p.rows * c.row_bytes;
  each_part(pool, c.layers * pages, bytes, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t layer = i / pages, page = first_page + i % pages;
      const int64_t from = std::max(p.first, page * c.page_size);
      const int64_t to = std::min(p.first + p.rows, (page + 1) * c.page_size);
      char* cached = c.data + layer * c.layer_stride + p.block_table[page] * c.page_stride +
                     (from - page * c.page_size) * c.row_bytes;
      char* dense = p.buffer + (layer * p.rows + from - p.first) * c.row_bytes;
      std::memcpy(gather ? dense : cached, gather ? cached : dense, (to - from) * c.row_bytes);
    }
  });
}

}  // namespace

void copy_pages_cpu(const PageCopyParams& p, const ThreadPool& pool) {
  int64_t rows = 0;
  for (int64_t i = 0; i < p.count; ++i) rows += p.copies[3 * i + 2];
  each_part(pool, p.k.layers * p.count, 2 * p.k.layers * rows * p.k.row_bytes,
             [&](int64_t begin, int64_t end) {
               for (int64_t i = begin; i < end; ++i) {
                 const int32_t* copy = p.copies + 3 * (i % p.count);
                 for (const PagePool* c : {&p.k, &p.v}) {
                   char* layer = c->data + i / p.count * c->layer_stride;
                   if (copy[2] == 0) continue;  // pages may then be any number
                   std::memcpy(layer + copy[1] * c->page_stride, layer + copy[0] * c->page_stride,
                               copy[2] * c->row_bytes);
                 }
               }
             });
}

void gather_rows_cpu(const RowTransferParams& p, const ThreadPool& pool) {
  transfer_rows<true>(p, pool);
}

void scatter_rows_cpu(const RowTransferParams& p, const ThreadPool& pool) {
  transfer_rows<false>(p, pool);
}

}  // namespace vxl
