// The pool of cache pages: which sequence holds which page, and who may write where.
// Plain C++17: it never touches what the pages hold, so it knows no device and no dtype.
//
// A sequence is `length` committed rows, then `reserved` rows that may be written. Row r lies
// in page table[r / page_size], at r % page_size. A step is
//
//   copies = reserve(seq, rows)   make room; may name a page to copy
//   ... perform the copies, then write rows [length, length + rows) ...
//   commit(seq, rows)             now they count
//
// fork() shares pages instead of copying them. Only the last, partly filled page can ever be
// written again, so it alone is copied on write: by the first of its holders that reserves.
// With page_size 4:
//
//   a = 6 rows                 table [0, 1]     page 1 holds two rows
//   b = fork(a)                table [0, 1]     pages 0 and 1 have two holders
//   reserve(b, 3)              table [0, 2, 3]  copy {page 1 -> page 2, 2 rows}
//   reserve(a, 1)              table [0, 1]     page 1 is a's alone by now: no copy
//
// Rules
// - reserve(seq, rows) is absolute, not additive: afterwards at least `rows` rows past the
//   committed ones may be written. It never shrinks a reservation, and growing one keeps what
//   has been written into it. commit() takes rows off its front; the rest stays reserved.
// - A page is copied only if a reservation starts in it (none being open), it is partly filled
//   and someone else holds it. A reservation of no rows copies nothing.
// - fork() shares the committed rows. An open reservation stays with the parent, which goes on
//   writing its own rows in place even in a page the child now holds too: those rows lie
//   after the child's last one, and the child copies the page before it writes.
// - truncate() drops an open reservation, whatever the length, and the references to all pages
//   after the last row. What is left of a shared page is copied when the sequence grows again.
// - Ids count up from 0 and are never reused.
// - Strong guarantee: a call that throws, std::bad_alloc included, has changed nothing.
//   fork, truncate, free, fill_* and block_table take time in the pages they touch; the rest
//   is O(1), or O(sequences) for a batch, plus the pages added.
//
// Threads: one mutex. Every call is safe beside every other, happens at one moment, and what
// it returns is a copy. The manager can't order what callers do to the pages: perform the
// copies of a reserve() before any later write to the pool, by whomever. One CUDA stream does
// that by itself; CPU threads that share a pool hold a lock of their own from reserve() until
// its copies are done.
#pragma once

#include <cstdint>
#include <limits>
#include <mutex>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

namespace vxl {

class PoolExhausted : public std::runtime_error {
 public:
  PoolExhausted(const std::string& what, int64_t needed, int64_t free)
      : std::runtime_error(what), pages_needed(needed), pages_free(free) {}
  const int64_t pages_needed, pages_free;
};

class UnknownSequence : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

struct PageCopy {  // the first `rows` rows of page `source` go to page `target`
  int32_t source, target, rows;
};

struct PageStats {
  int64_t free_pages;
  int64_t used_pages;       // with at least one holder
  int64_t shared_pages;     // with at least two
  int64_t peak_used_pages;  // most used_pages so far
  int64_t sequences;
  int64_t tokens;       // committed rows of all sequences, shared rows counted for each
  int64_t page_copies;  // asked for so far
};

class PageManager {
 public:
  static constexpr int64_t kMaxPages = std::numeric_limits<int32_t>::max();
  static constexpr int64_t kMaxPageSize = int64_t{1} << 30;
  // Rows of one sequence: kernels read lengths as int32.
  static constexpr int64_t kMaxTokens = std::numeric_limits<int32_t>::max();

  // page_size: rows of a page, a power of two.
  PageManager(int64_t num_pages, int64_t page_size);

  int64_t num_pages() const noexcept { return num_pages_; }
  int64_t page_size() const noexcept { return page_size_; }

  int64_t new_sequence();
  int64_t fork(int64_t seq);
  void truncate(int64_t seq, int64_t length);
  void free(int64_t seq);

  // A batch is reserved or committed as a whole or not at all; `seqs` are distinct. Each
  // sequence asks for at most one copy, and no page is both a source and a target.
  std::vector<PageCopy> reserve(int64_t seq, int64_t rows);
  // rows: of each sequence.
  std::vector<PageCopy> reserve(const int64_t* seqs, int64_t n, const int64_t* rows);
  void commit(int64_t seq, int64_t rows);
  void commit(const int64_t* seqs, int64_t n, const int64_t* rows);

  int64_t length(int64_t seq) const;    // committed rows
  int64_t reserved(int64_t seq) const;  // rows after them that may be written
  int64_t capacity(int64_t seq) const;  // rows in the pages of the block table
  std::vector<int32_t> block_table(int64_t seq) const;

  int64_t most_pages(const int64_t* seqs, int64_t n) const;  // pages of the longest of these

  // out[i * stride + j] = page j of seqs[i], or `pad` after its last page. Sequences may repeat.
  void fill_block_tables(const int64_t* seqs, int64_t n, int32_t* out, int64_t stride,
                         int32_t pad) const;
  void fill_lengths(const int64_t* seqs, int64_t n, int32_t* out) const;

  int64_t free_pages() const;
  int64_t ref_count(int64_t page) const;  // holders of a page
  PageStats stats() const;

 private:
  struct Sequence {
    std::vector<int32_t> table;  // exactly the pages of rows [0, length + reserved)
    int64_t length = 0;
    int64_t reserved = 0;
    uint64_t batch = 0;  // the last batch that named it: finds duplicates without a set
  };
  struct Growth {
    int64_t new_pages = 0;  // without those of the copies
    std::vector<PageCopy> copies;
    std::vector<Sequence*> movers;  // the sequence of each copy
  };
  using Lock = std::lock_guard<std::mutex>;

  // The caller of all of these holds the lock.
  const Sequence& find(int64_t seq) const;
  Sequence& find(int64_t seq);
  const Sequence* find_in_batch(const int64_t* seqs, int64_t i) const;
  std::vector<Sequence*> find_distinct(const int64_t* seqs, int64_t n);

  int64_t pages_for(int64_t rows) const noexcept;
  int64_t pages_to_add(const Sequence& s, int64_t rows) const noexcept;
  bool must_copy(const Sequence& s, int64_t rows) const noexcept;
  std::vector<PageCopy> grow(Sequence* const* batch, int64_t n, const int64_t* rows);
  Growth prepare_growth(Sequence* const* batch, int64_t n, const int64_t* rows) const;
  void leave_shared_pages(Sequence* const* batch, int64_t n, const int64_t* rows,
                          Growth& growth) noexcept;
  void check_commit(const Sequence& s, int64_t rows) const;
  void advance(Sequence& s, int64_t rows) noexcept;

  int32_t take_page() noexcept;
  void add_holder(int32_t page) noexcept;
  void drop_holder(int32_t page) noexcept;
  void shrink_table(Sequence& s, int64_t pages) noexcept;

  const int64_t num_pages_, page_size_;
  mutable std::mutex mutex_;
  std::unordered_map<int64_t, Sequence> sequences_;
  std::vector<int64_t> holders_;  // of each page
  std::vector<int32_t> free_;     // a stack with room for every page, so a push can't throw
  int64_t next_id_ = 0;
  uint64_t last_batch_ = 0;
  int64_t shared_pages_ = 0, peak_used_pages_ = 0, tokens_ = 0, page_copies_ = 0;
};

}  // namespace vxl
