// Fuzzes the page manager through its C API against a model that holds real contents.
//
// Bytes choose the calls. After each call the fuzzer compares all visible state of the manager with
// the model: lengths, block tables, reference counts, statistics, and the contents that the tables
// point to. After a failed call the model is unchanged. Some calls fail because operator new does.
//
//   clang++ -std=c++17 -g -O1 -fsanitize=fuzzer,address,undefined ...  ./fuzz -max_total_time=60
//   g++ -std=c++17 -g -O1 -fsanitize=address,undefined -DVXL_FUZZ_STANDALONE ...
//   ./fuzz [operations = 1000000] [seed = 1]
//
// with csrc/cache/page_manager.cpp and csrc/cache/page_manager_c.cpp.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <new>
#include <vector>

#include "../../csrc/cache/page_manager_c.h"

// ---- an operator new that fails on demand

namespace {
int64_t allocations_left = -1;  // < 0: no limit

struct FailAllocation {  // while this lives, the allocation after the next `left` ones fails
  explicit FailAllocation(int64_t left) { allocations_left = left; }
  ~FailAllocation() { allocations_left = -1; }
};
}  // namespace

void* operator new(size_t size) {
  if (allocations_left == 0) throw std::bad_alloc();
  if (allocations_left > 0) --allocations_left;
  if (void* p = std::malloc(size > 0 ? size : 1)) return p;
  throw std::bad_alloc();
}
void operator delete(void* p) noexcept { std::free(p); }
void operator delete(void* p, size_t) noexcept { std::free(p); }

namespace {

#define CHECK(condition)                                                                  \
  do {                                                                                    \
    if (!(condition)) {                                                                   \
      std::fprintf(stderr, "%s:%d: %s; last error: %s\n", __FILE__, __LINE__, #condition, \
                   vxl_pages_last_error());                                               \
      std::abort();                                                                       \
    }                                                                                     \
  } while (false)

constexpr int64_t kPoison = -1;
constexpr size_t kMaxSequences = 12;
int64_t operations = 0;

class Bytes {
 public:
  Bytes(const uint8_t* data, size_t size) : at_(data), end_(data + size) {}
  bool done() const { return at_ == end_; }
  int64_t below(int64_t n) { return n > 0 ? next() % n : 0; }

 private:
  int64_t next() { return at_ < end_ ? *at_++ : 0; }
  const uint8_t *at_, *end_;
};

struct Sequence {
  std::vector<int32_t> table;
  std::vector<int64_t> tokens;   // committed
  std::vector<int64_t> pending;  // written into the reservation
  int64_t reserved = 0;

  int64_t length() const { return static_cast<int64_t>(tokens.size()); }
};

class Session {
 public:
  explicit Session(Bytes bytes)
      : bytes_(bytes), num_pages_(1 + bytes_.below(96)), page_size_(1 << bytes_.below(4)) {
    CHECK(vxl_pages_create(num_pages_, page_size_, &pages_) == VXL_OK);
    contents_.assign(static_cast<size_t>(num_pages_ * page_size_), kPoison);
    holders_.assign(static_cast<size_t>(num_pages_), 0);
  }

  void run() {
    while (!bytes_.done()) {
      ++operations;
      step();
      check_all();
    }
    for (const auto& item : model_) CHECK(vxl_pages_free(pages_, item.first) == VXL_OK);
    model_.clear();
    check_all();
    vxl_pages_destroy(pages_);
  }

 private:
  void step() {
    const int64_t choice = bytes_.below(16);
    if (model_.empty() || choice == 0) return start();
    switch (choice) {
      case 1: case 2: return fork();
      case 3: return truncate();
      case 4: return release();
      case 5: case 6: case 7: case 8: return reserve(1);
      case 9: case 10: return reserve(1 + bytes_.below(static_cast<int64_t>(model_.size())));
      case 11: case 12: case 13: return commit();
      case 14: return commit_all();
      default: return fail();
    }
  }

  // ---- calls

  int64_t pick() {
    auto at = model_.begin();
    std::advance(at, bytes_.below(static_cast<int64_t>(model_.size())));
    return at->first;
  }

  // One call in eight runs out of memory early, if it allocates.
  int64_t allocations() { return bytes_.below(8) == 0 ? bytes_.below(6) : -1; }

  template <typename Fn>
  vxl_status call(int64_t allocations, const Fn& fn) {
    const FailAllocation guard(allocations);
    return fn();
  }

  void start() {
    if (model_.size() >= kMaxSequences) return;
    int64_t seq = -1;
    const vxl_status got =
        call(allocations(), [&] { return vxl_pages_new_sequence(pages_, &seq); });
    accept_child(got, seq, {});
  }

  void fork() {
    if (model_.size() >= kMaxSequences) return;
    const int64_t seq = pick();
    const Sequence& parent = model_[seq];
    Sequence child;
    child.tokens = parent.tokens;
    child.table.assign(parent.table.begin(), parent.table.begin() + pages_for(parent.length()));
    int64_t id = -1;
    const vxl_status got =
        call(allocations(), [&] { return vxl_pages_fork(pages_, seq, &id); });
    accept_child(got, id, child);
  }

  void accept_child(vxl_status got, int64_t seq, const Sequence& child) {
    if (got == VXL_OUT_OF_MEMORY) {
      CHECK(seq == -1);
      return;
    }
    CHECK(got == VXL_OK);
    CHECK(seq > last_id_);  // never used again
    last_id_ = seq;
    model_[seq] = child;
  }

  // truncate, free and commit of one sequence allocate nothing, so they can't run out of memory.
  void truncate() {
    const int64_t seq = pick();
    Sequence& s = model_[seq];
    const int64_t length = bytes_.below(s.length() + 1);
    CHECK(call(0, [&] { return vxl_pages_truncate(pages_, seq, length); }) == VXL_OK);
    s.tokens.resize(static_cast<size_t>(length));
    s.table.resize(static_cast<size_t>(pages_for(length)));
    s.pending.clear();
    s.reserved = 0;
  }

  void release() {
    const int64_t seq = pick();
    CHECK(call(0, [&] { return vxl_pages_free(pages_, seq); }) == VXL_OK);
    model_.erase(seq);
  }

  void reserve(int64_t n) {
    const std::vector<int64_t> seqs = pick_distinct(n);
    const int64_t rows = bytes_.below((bytes_.below(8) == 0 ? 4 : 1) * page_size_ + 2);
    const int64_t needed = pages_needed(seqs, rows);
    std::vector<vxl_page_copy> copies(seqs.size(), vxl_page_copy{-1, -1, -1});
    int64_t num_copies = -1;
    const vxl_status got = call(allocations(), [&] {
      return vxl_pages_reserve(pages_, seqs.data(), n, rows, copies.data(), &num_copies);
    });
    if (got != VXL_OK) {
      CHECK(got == VXL_OUT_OF_MEMORY || (got == VXL_POOL_EXHAUSTED && needed > free_pages()));
      CHECK(num_copies == -1);
      return;
    }
    CHECK(needed <= free_pages());
    int64_t used = 0;
    for (const int64_t seq : seqs) used += accept_growth(seq, rows, &copies[used]);
    CHECK(num_copies == used);
    for (const int64_t seq : seqs) {
      if (bytes_.below(2) == 0) write(seq, model_[seq].reserved);
    }
  }

  std::vector<int64_t> pick_distinct(int64_t n) {
    std::vector<int64_t> all;
    for (const auto& item : model_) all.push_back(item.first);
    for (int64_t i = 0; i < n; ++i) {
      std::swap(all[i], all[i + bytes_.below(static_cast<int64_t>(all.size()) - i)]);
    }
    all.resize(static_cast<size_t>(n));
    return all;
  }

  bool copies_on_write(const Sequence& s, int64_t rows) const {
    return rows > 0 && s.reserved == 0 && s.length() % page_size_ != 0 &&
           holders_[s.table.back()] > 1;
  }

  int64_t added_pages(const Sequence& s, int64_t rows) const {
    return pages_for(s.length() + std::max(s.reserved, rows)) -
           static_cast<int64_t>(s.table.size());
  }

  int64_t pages_needed(const std::vector<int64_t>& seqs, int64_t rows) {
    const std::vector<int64_t> before = holders_;
    int64_t needed = 0;
    for (const int64_t seq : seqs) {
      const Sequence& s = model_[seq];
      needed += added_pages(s, rows);
      if (!copies_on_write(s, rows)) continue;
      --holders_[s.table.back()];
      ++needed;
    }
    holders_ = before;
    return needed;
  }

  // Checks that the new table of a sequence is what reserve() promises, performs the copy and
  // stores the table in the model. Returns the number of copies.
  int64_t accept_growth(int64_t seq, int64_t rows, const vxl_page_copy* copy) {
    Sequence& s = model_[seq];
    const std::vector<int32_t> table = table_of(seq);
    const bool copied = copies_on_write(s, rows);
    const size_t added = static_cast<size_t>(added_pages(s, rows));
    CHECK(table.size() == s.table.size() + added);
    for (size_t i = 0; i < table.size(); ++i) {
      if (i < s.table.size() - copied) {
        CHECK(table[i] == s.table[i]);
      } else {
        CHECK(holders_[table[i]] == 0);  // it was free, and no other sequence of the batch got it
        ++holders_[table[i]];
      }
    }
    if (copied) {
      const size_t last = s.table.size() - 1;
      CHECK(copy->source == s.table[last] && copy->target == table[last]);
      CHECK(copy->rows == s.length() % page_size_);
      std::copy_n(row(copy->source, 0), copy->rows, row(copy->target, 0));
      --holders_[s.table[last]];
      ++page_copies_;
    }
    s.table = table;
    s.reserved = std::max(s.reserved, rows);
    return copied;
  }

  // Writes those of the first `rows` reserved rows that have not been written yet.
  void write(int64_t seq, int64_t rows) {
    Sequence& s = model_[seq];
    while (static_cast<int64_t>(s.pending.size()) < rows) {
      const int64_t at = s.length() + static_cast<int64_t>(s.pending.size());
      *row(s.table[at / page_size_], at % page_size_) = next_token_;
      s.pending.push_back(next_token_++);
    }
  }

  void commit() {
    const int64_t seq = pick();
    const int64_t reserved = model_[seq].reserved;
    // Mostly all of it, because only then may the next reservation need a copy.
    const int64_t rows = bytes_.below(4) == 0 ? bytes_.below(reserved + 1) : reserved;
    write(seq, rows);
    CHECK(vxl_pages_commit(pages_, &seq, 1, rows) == VXL_OK);
    commit_model(seq, rows);
  }

  void commit_all() {
    std::vector<int64_t> seqs;
    int64_t smallest = INT64_MAX;
    for (const auto& item : model_) {
      if (item.second.reserved == 0) continue;
      seqs.push_back(item.first);
      smallest = std::min(smallest, item.second.reserved);
    }
    const int64_t rows = seqs.empty() ? 0 : bytes_.below(smallest + 1);
    for (const int64_t seq : seqs) write(seq, rows);
    const int64_t n = static_cast<int64_t>(seqs.size());
    const vxl_status got =
        call(allocations(), [&] { return vxl_pages_commit(pages_, seqs.data(), n, rows); });
    if (got == VXL_OUT_OF_MEMORY) return;
    CHECK(got == VXL_OK);
    for (const int64_t seq : seqs) commit_model(seq, rows);
  }

  void commit_model(int64_t seq, int64_t rows) {
    Sequence& s = model_[seq];
    s.tokens.insert(s.tokens.end(), s.pending.begin(), s.pending.begin() + rows);
    s.pending.erase(s.pending.begin(), s.pending.begin() + rows);
    s.reserved -= rows;
  }

  // Calls that can't succeed. check_all() then finds any trace that they left.
  void fail() {
    const int64_t good = pick();
    const Sequence& s = model_[good];
    const int64_t unknown[] = {good, last_id_ + 1};
    const int64_t twice[] = {good, good};
    // Largest reservation first: this finds a manager that commits some before it has checked all.
    std::vector<int64_t> all = pick_distinct(static_cast<int64_t>(model_.size()));
    std::sort(all.begin(), all.end(),
              [&](int64_t a, int64_t b) { return model_[a].reserved > model_[b].reserved; });
    const int64_t n = static_cast<int64_t>(all.size()), smallest = model_[all.back()].reserved;
    vxl_page_copy copies[2];
    vxl_pages* no_pages = nullptr;
    int32_t page = -1;
    int64_t out = -1;
    const int64_t left = allocations();
    vxl_status want = VXL_BAD_ARGUMENT;
    const vxl_status got = call(left, [&] {
      switch (bytes_.below(21)) {
        case 0: return vxl_pages_reserve(pages_, &good, 1, -1, copies, &out);
        case 1: return vxl_pages_reserve(pages_, &good, 1, INT64_MAX, copies, &out);
        case 2: return vxl_pages_reserve(pages_, &good, 1, INT64_C(1) << 31, copies, &out);
        case 3: return vxl_pages_reserve(pages_, twice, 2, 1, copies, &out);
        case 4: return vxl_pages_commit(pages_, &good, 1, s.reserved + 1);
        case 5: return vxl_pages_commit(pages_, twice, 2, 0);
        case 6: return vxl_pages_commit(pages_, &good, 1, -1);
        case 7: return vxl_pages_truncate(pages_, good, s.length() + 1);
        case 8: return vxl_pages_truncate(pages_, good, INT64_MIN);
        case 9: return vxl_pages_ref_count(pages_, num_pages_, &out);
        case 10: return vxl_pages_fill_block_tables(pages_, &good, 1, &page, -1, 0);
        case 11: return vxl_pages_fill_lengths(pages_, &good, -1, &page);
        case 12: return vxl_pages_fork(pages_, good, nullptr);
        case 13: return vxl_pages_reserve(pages_, nullptr, 1, 1, copies, &out);
        case 14: return vxl_pages_create(0, 1, &no_pages);
        case 15: return vxl_pages_create(1, 3, &no_pages);
        case 16: return vxl_pages_commit(pages_, all.data(), n, smallest + 1);
      }
      want = VXL_UNKNOWN_SEQUENCE;
      switch (bytes_.below(4)) {
        case 0: return vxl_pages_reserve(pages_, unknown, 2, 1, copies, &out);
        case 1: return vxl_pages_commit(pages_, unknown, 2, 0);
        case 2: return vxl_pages_free(pages_, last_id_ + 1);
        default: return vxl_pages_fork(pages_, -1, &out);
      }
    });
    CHECK(got == want || (got == VXL_OUT_OF_MEMORY && left >= 0));
    CHECK(out == -1 && page == -1 && no_pages == nullptr);
  }

  // ---- the model

  int64_t pages_for(int64_t rows) const { return (rows + page_size_ - 1) / page_size_; }

  int64_t* row(int32_t page, int64_t r) { return &contents_[page * page_size_ + r]; }

  int64_t free_pages() const { return std::count(holders_.begin(), holders_.end(), 0); }

  std::vector<int32_t> table_of(int64_t seq) const {
    int64_t capacity = -1;
    CHECK(vxl_pages_capacity(pages_, seq, &capacity) == VXL_OK);
    CHECK(capacity >= 0 && capacity % page_size_ == 0);
    std::vector<int32_t> table(static_cast<size_t>(capacity / page_size_) + 1);
    const int64_t room = static_cast<int64_t>(table.size());
    CHECK(vxl_pages_fill_block_tables(pages_, &seq, 1, table.data(), room, -7) == VXL_OK);
    CHECK(table.back() == -7);
    table.pop_back();
    for (const int32_t page : table) CHECK(page >= 0 && page < num_pages_);
    return table;
  }

  void check_all() {
    std::fill(holders_.begin(), holders_.end(), 0);
    for (const auto& item : model_) {
      check_sequence(item.first, item.second);
      for (const int32_t page : item.second.table) ++holders_[page];
    }
    for (int32_t page = 0; page < num_pages_; ++page) {
      int64_t got = -1;
      CHECK(vxl_pages_ref_count(pages_, page, &got) == VXL_OK && got == holders_[page]);
      if (got == 0) std::fill_n(row(page, 0), page_size_, kPoison);
    }
    check_stats();
  }

  void check_sequence(int64_t seq, const Sequence& s) {
    int64_t length = -1, reserved = -1;
    int32_t filled = -1;
    CHECK(vxl_pages_length(pages_, seq, &length) == VXL_OK && length == s.length());
    CHECK(vxl_pages_fill_lengths(pages_, &seq, 1, &filled) == VXL_OK && filled == length);
    CHECK(vxl_pages_reserved(pages_, seq, &reserved) == VXL_OK && reserved == s.reserved);
    CHECK(table_of(seq) == s.table);
    for (int64_t r = 0; r < length + static_cast<int64_t>(s.pending.size()); ++r) {
      const int64_t want = r < length ? s.tokens[r] : s.pending[r - length];
      CHECK(*row(s.table[r / page_size_], r % page_size_) == want);
    }
  }

  void check_stats() {
    int64_t tokens = 0;
    for (const auto& item : model_) tokens += item.second.length();
    vxl_page_stats got;
    CHECK(vxl_pages_stats(pages_, &got) == VXL_OK);
    CHECK(got.free_pages == free_pages());
    CHECK(got.used_pages == num_pages_ - free_pages());
    CHECK(got.shared_pages == std::count_if(holders_.begin(), holders_.end(),
                                            [](int64_t n) { return n > 1; }));
    peak_ = std::max(peak_, got.used_pages);
    CHECK(got.peak_used_pages == peak_);
    CHECK(got.sequences == static_cast<int64_t>(model_.size()));
    CHECK(got.tokens == tokens);
    CHECK(got.page_copies == page_copies_);
  }

  Bytes bytes_;
  const int64_t num_pages_, page_size_;
  vxl_pages* pages_ = nullptr;
  std::map<int64_t, Sequence> model_;
  std::vector<int64_t> contents_;  // [num_pages, page_size]
  std::vector<int64_t> holders_;   // as of the last check
  int64_t next_token_ = 0, last_id_ = -1, page_copies_ = 0, peak_ = 0;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Session(Bytes(data, size)).run();
  return 0;
}

#ifdef VXL_FUZZ_STANDALONE
#include <random>

int main(int argc, char** argv) {
  const int64_t wanted = argc > 1 ? std::atoll(argv[1]) : 1000000;
  std::mt19937_64 random(argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1);
  std::vector<uint8_t> bytes(1 << 12);
  while (operations < wanted) {
    for (uint8_t& b : bytes) b = static_cast<uint8_t>(random() >> 56);
    LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
  }
  std::printf("%lld operations, no finding\n", static_cast<long long>(operations));
  return 0;
}
#endif
