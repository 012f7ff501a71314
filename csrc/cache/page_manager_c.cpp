#include "page_manager_c.h"

#include <cstdio>
#include <new>
#include <vector>

#include "page_manager.h"

struct vxl_pages {
  vxl::PageManager manager;
};

namespace {

// A fixed buffer: the report that memory is out must not allocate.
thread_local char last_error[256] = "";

vxl_status failed(vxl_status status, const char* reason) noexcept {
  std::snprintf(last_error, sizeof(last_error), "%s", reason);
  return status;
}

// The same number of rows for each of n sequences.
std::vector<int64_t> same(int64_t n, int64_t rows) {
  return std::vector<int64_t>(static_cast<size_t>(n), rows);
}

// Runs fn() and turns an exception into a status.
template <typename Fn>
vxl_status guarded(const Fn& fn) noexcept {
  try {
    fn();
    return VXL_OK;
  } catch (const vxl::PoolExhausted& e) {
    return failed(VXL_POOL_EXHAUSTED, e.what());
  } catch (const vxl::UnknownSequence& e) {
    return failed(VXL_UNKNOWN_SEQUENCE, e.what());
  } catch (const std::invalid_argument& e) {
    return failed(VXL_BAD_ARGUMENT, e.what());
  } catch (const std::bad_alloc&) {
    return failed(VXL_OUT_OF_MEMORY, "out of memory");
  } catch (const std::length_error&) {  // a vector longer than memory
    return failed(VXL_OUT_OF_MEMORY, "out of memory");
  } catch (const std::exception& e) {
    return failed(VXL_INTERNAL_ERROR, e.what());
  }
}

void require(const void* pointer, const char* name) {
  if (pointer == nullptr) {
    throw std::invalid_argument(std::string(name) + ": got NULL, expected a pointer");
  }
}

void require_array(const void* pointer, int64_t n, const char* name) {
  if (n > 0) require(pointer, name);
}

}  // namespace

vxl_status vxl_pages_create(int64_t num_pages, int64_t page_size, vxl_pages** pages) {
  return guarded([&] {
    require(pages, "pages");
    *pages = new vxl_pages{{num_pages, page_size}};
  });
}

void vxl_pages_destroy(vxl_pages* pages) { delete pages; }

vxl_status vxl_pages_new_sequence(vxl_pages* pages, int64_t* seq) {
  return guarded([&] {
    require(pages, "pages");
    require(seq, "seq");
    *seq = pages->manager.new_sequence();
  });
}

vxl_status vxl_pages_fork(vxl_pages* pages, int64_t seq, int64_t* child) {
  return guarded([&] {
    require(pages, "pages");
    require(child, "child");
    *child = pages->manager.fork(seq);
  });
}

vxl_status vxl_pages_truncate(vxl_pages* pages, int64_t seq, int64_t length) {
  return guarded([&] {
    require(pages, "pages");
    pages->manager.truncate(seq, length);
  });
}

vxl_status vxl_pages_free(vxl_pages* pages, int64_t seq) {
  return guarded([&] {
    require(pages, "pages");
    pages->manager.free(seq);
  });
}

vxl_status vxl_pages_reserve(vxl_pages* pages, const int64_t* seqs, int64_t n, int64_t rows,
                             vxl_page_copy* copies, int64_t* num_copies) {
  return guarded([&] {
    require(pages, "pages");
    require_array(seqs, n, "seqs");
    require_array(copies, n, "copies");
    require(num_copies, "num_copies");
    const std::vector<vxl::PageCopy> wanted = pages->manager.reserve(seqs, n, same(n, rows).data());
    for (const vxl::PageCopy& c : wanted) *copies++ = {c.source, c.target, c.rows};
    *num_copies = static_cast<int64_t>(wanted.size());
  });
}

vxl_status vxl_pages_commit(vxl_pages* pages, const int64_t* seqs, int64_t n, int64_t rows) {
  return guarded([&] {
    require(pages, "pages");
    require_array(seqs, n, "seqs");
    pages->manager.commit(seqs, n, same(n, rows).data());
  });
}

vxl_status vxl_pages_length(const vxl_pages* pages, int64_t seq, int64_t* length) {
  return guarded([&] {
    require(pages, "pages");
    require(length, "length");
    *length = pages->manager.length(seq);
  });
}

vxl_status vxl_pages_reserved(const vxl_pages* pages, int64_t seq, int64_t* rows) {
  return guarded([&] {
    require(pages, "pages");
    require(rows, "rows");
    *rows = pages->manager.reserved(seq);
  });
}

vxl_status vxl_pages_capacity(const vxl_pages* pages, int64_t seq, int64_t* rows) {
  return guarded([&] {
    require(pages, "pages");
    require(rows, "rows");
    *rows = pages->manager.capacity(seq);
  });
}

vxl_status vxl_pages_fill_block_tables(const vxl_pages* pages, const int64_t* seqs, int64_t n,
                                       int32_t* out, int64_t stride, int32_t pad) {
  return guarded([&] {
    require(pages, "pages");
    require_array(seqs, n, "seqs");
    if (stride != 0) require_array(out, n, "out");
    pages->manager.fill_block_tables(seqs, n, out, stride, pad);
  });
}

vxl_status vxl_pages_fill_lengths(const vxl_pages* pages, const int64_t* seqs, int64_t n,
                                  int32_t* out) {
  return guarded([&] {
    require(pages, "pages");
    require_array(seqs, n, "seqs");
    require_array(out, n, "out");
    pages->manager.fill_lengths(seqs, n, out);
  });
}

vxl_status vxl_pages_ref_count(const vxl_pages* pages, int64_t page, int64_t* holders) {
  return guarded([&] {
    require(pages, "pages");
    require(holders, "holders");
    *holders = pages->manager.ref_count(page);
  });
}

vxl_status vxl_pages_stats(const vxl_pages* pages, vxl_page_stats* stats) {
  return guarded([&] {
    require(pages, "pages");
    require(stats, "stats");
    const vxl::PageStats s = pages->manager.stats();
    *stats = {s.free_pages, s.used_pages, s.shared_pages, s.peak_used_pages,
              s.sequences,  s.tokens,     s.page_copies};
  });
}

const char* vxl_pages_last_error(void) { return last_error; }
