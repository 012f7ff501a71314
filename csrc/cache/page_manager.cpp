#include "page_manager.h"

#include <algorithm>
#include <utility>

namespace vxl {
namespace {

[[noreturn]] void refuse(const std::string& name, int64_t got, const std::string& expected) {
  throw std::invalid_argument(name + ": got " + std::to_string(got) + ", expected " + expected);
}

int64_t in_range(const char* name, int64_t got, int64_t low, int64_t high) {
  if (got < low || got > high) {
    refuse(name, got, std::to_string(low) + " to " + std::to_string(high));
  }
  return got;
}

int64_t power_of_two(const char* name, int64_t got, int64_t high) {
  if (got < 1 || got > high || (got & (got - 1)) != 0) {
    refuse(name, got, "a power of two from 1 to " + std::to_string(high));
  }
  return got;
}

[[noreturn]] void unknown(const std::string& name, int64_t seq, size_t live) {
  throw UnknownSequence(name + ": got " + std::to_string(seq) + ", expected one of the " +
                        std::to_string(live) + " live sequences");
}

std::string item(int64_t i) { return "seqs[" + std::to_string(i) + "]"; }

[[noreturn]] void exhausted(int64_t rows, int64_t needed, int64_t free, int64_t all) {
  throw PoolExhausted("rows: got " + std::to_string(rows) + ", which needs " +
                          std::to_string(needed) + " pages, expected at most " +
                          std::to_string(free) + " (free pages; the pool has " +
                          std::to_string(all) + ")",
                      needed, free);
}

// Doubles the room, as push_back does. With exact room, growing by one page a step would take
// quadratic time.
void make_room(std::vector<int32_t>& table, int64_t more) {
  const size_t wanted = table.size() + static_cast<size_t>(more);
  if (wanted > table.capacity()) table.reserve(std::max(wanted, 2 * table.capacity()));
}

}  // namespace

PageManager::PageManager(int64_t num_pages, int64_t page_size)
    : num_pages_(in_range("num_pages", num_pages, 1, kMaxPages)),
      page_size_(power_of_two("page_size", page_size, kMaxPageSize)),
      holders_(static_cast<size_t>(num_pages)),
      free_(static_cast<size_t>(num_pages)) {
  // Page 0 is on top, so a fresh pool gives pages in ascending order.
  for (int64_t i = 0; i < num_pages; ++i) free_[i] = static_cast<int32_t>(num_pages - 1 - i);
}

// ---- sequences

int64_t PageManager::new_sequence() {
  const Lock lock(mutex_);
  sequences_.try_emplace(next_id_);
  return next_id_++;
}

int64_t PageManager::fork(int64_t seq) {
  const Lock lock(mutex_);
  const Sequence& parent = find(seq);
  Sequence child;
  child.length = parent.length;
  child.table.assign(parent.table.begin(), parent.table.begin() + pages_for(parent.length));
  const auto placed = sequences_.try_emplace(next_id_, std::move(child)).first;
  for (const int32_t page : placed->second.table) add_holder(page);
  tokens_ += placed->second.length;
  return next_id_++;
}

void PageManager::truncate(int64_t seq, int64_t length) {
  const Lock lock(mutex_);
  Sequence& s = find(seq);
  in_range("length", length, 0, s.length);
  shrink_table(s, pages_for(length));
  tokens_ -= s.length - length;
  s.length = length;
  s.reserved = 0;
}

void PageManager::free(int64_t seq) {
  const Lock lock(mutex_);
  Sequence& s = find(seq);
  shrink_table(s, 0);
  tokens_ -= s.length;
  sequences_.erase(seq);
}

// ---- growing

std::vector<PageCopy> PageManager::reserve(int64_t seq, int64_t rows) {
  const Lock lock(mutex_);
  Sequence* const s = &find(seq);
  return grow(&s, 1, &rows);
}

std::vector<PageCopy> PageManager::reserve(const int64_t* seqs, int64_t n, const int64_t* rows) {
  const Lock lock(mutex_);
  const std::vector<Sequence*> batch = find_distinct(seqs, n);
  return grow(batch.data(), n, rows);
}

void PageManager::commit(int64_t seq, int64_t rows) {
  const Lock lock(mutex_);
  Sequence& s = find(seq);
  check_commit(s, rows);
  advance(s, rows);
}

void PageManager::commit(const int64_t* seqs, int64_t n, const int64_t* rows) {
  const Lock lock(mutex_);
  const std::vector<Sequence*> batch = find_distinct(seqs, n);
  for (int64_t i = 0; i < n; ++i) check_commit(*batch[i], rows[i]);
  for (int64_t i = 0; i < n; ++i) advance(*batch[i], rows[i]);
}

// Whether a new reservation of s would write into a page that another sequence holds. If s already
// has a reservation, it may write its last page even if the page has been shared since.
bool PageManager::must_copy(const Sequence& s, int64_t rows) const noexcept {
  const bool opens = rows > 0 && s.reserved == 0;
  return opens && s.length % page_size_ != 0 && holders_[s.table.back()] > 1;
}

std::vector<PageCopy> PageManager::grow(Sequence* const* batch, int64_t n,
                                        const int64_t* rows) {
  Growth growth = prepare_growth(batch, n, rows);
  leave_shared_pages(batch, n, rows, growth);
  const int64_t needed = growth.new_pages + static_cast<int64_t>(growth.copies.size());
  const int64_t available = static_cast<int64_t>(free_.size());
  if (needed > available) {
    for (const PageCopy& c : growth.copies) add_holder(c.source);
    exhausted(n > 0 ? *std::max_element(rows, rows + n) : 0, needed, available, num_pages_);
  }
  for (size_t i = 0; i < growth.copies.size(); ++i) {
    growth.copies[i].target = growth.movers[i]->table.back() = take_page();
  }
  for (int64_t i = 0; i < n; ++i) {
    Sequence& s = *batch[i];
    for (int64_t pages = pages_to_add(s, rows[i]); pages > 0; --pages) {
      s.table.push_back(take_page());
    }
    s.reserved = std::max(s.reserved, rows[i]);
  }
  page_copies_ += static_cast<int64_t>(growth.copies.size());
  return std::move(growth.copies);
}

// Does everything in growing that can run out of memory.
PageManager::Growth PageManager::prepare_growth(Sequence* const* batch, int64_t n,
                                                const int64_t* rows) const {
  Growth growth;
  size_t shared = 0;
  for (int64_t i = 0; i < n; ++i) {
    const Sequence& s = *batch[i];
    in_range("rows", rows[i], 0, kMaxTokens - s.length);
    growth.new_pages += pages_to_add(s, rows[i]);
    shared += must_copy(s, rows[i]);
  }
  growth.copies.reserve(shared);
  growth.movers.reserve(shared);
  if (growth.new_pages > static_cast<int64_t>(free_.size())) return growth;  // grow() will refuse
  for (int64_t i = 0; i < n; ++i) {
    make_room(batch[i]->table, pages_to_add(*batch[i], rows[i]));
  }
  return growth;
}

// In the order of the batch: the last holder of a shared page keeps it. So the number of copies is
// known only after the other holders have left.
void PageManager::leave_shared_pages(Sequence* const* batch, int64_t n, const int64_t* rows,
                                     Growth& growth) noexcept {
  for (int64_t i = 0; i < n; ++i) {
    Sequence& s = *batch[i];
    if (!must_copy(s, rows[i])) continue;
    drop_holder(s.table.back());
    growth.movers.push_back(&s);
    growth.copies.push_back(
        {s.table.back(), -1, static_cast<int32_t>(s.length % page_size_)});
  }
}

void PageManager::check_commit(const Sequence& s, int64_t rows) const {
  if (rows < 0 || rows > s.reserved) {
    refuse("rows", rows, "0 to " + std::to_string(s.reserved) + ", the reserved rows");
  }
}

void PageManager::advance(Sequence& s, int64_t rows) noexcept {
  s.length += rows;
  s.reserved -= rows;
  tokens_ += rows;
}

// ---- reading

int64_t PageManager::length(int64_t seq) const {
  const Lock lock(mutex_);
  return find(seq).length;
}

int64_t PageManager::reserved(int64_t seq) const {
  const Lock lock(mutex_);
  return find(seq).reserved;
}

int64_t PageManager::capacity(int64_t seq) const {
  const Lock lock(mutex_);
  return static_cast<int64_t>(find(seq).table.size()) * page_size_;
}

std::vector<int32_t> PageManager::block_table(int64_t seq) const {
  const Lock lock(mutex_);
  return find(seq).table;
}

int64_t PageManager::most_pages(const int64_t* seqs, int64_t n) const {
  const Lock lock(mutex_);
  size_t most = 0;
  for (int64_t i = 0; i < n; ++i) most = std::max(most, find_in_batch(seqs, i)->table.size());
  return static_cast<int64_t>(most);
}

void PageManager::fill_block_tables(const int64_t* seqs, int64_t n, int32_t* out,
                                    int64_t stride, int32_t pad) const {
  const Lock lock(mutex_);
  in_range("n", n, 0, std::numeric_limits<int64_t>::max());
  std::vector<const Sequence*> rows;
  rows.reserve(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) {
    rows.push_back(find_in_batch(seqs, i));
    const int64_t pages = static_cast<int64_t>(rows.back()->table.size());
    if (stride < pages) {
      refuse("stride", stride, "at least " + std::to_string(pages) + ", the pages of " + item(i));
    }
  }
  for (const Sequence* s : rows) {
    std::fill(std::copy(s->table.begin(), s->table.end(), out), out + stride, pad);
    out += stride;
  }
}

void PageManager::fill_lengths(const int64_t* seqs, int64_t n, int32_t* out) const {
  const Lock lock(mutex_);
  in_range("n", n, 0, std::numeric_limits<int64_t>::max());
  std::vector<int32_t> lengths;
  lengths.reserve(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) {
    lengths.push_back(static_cast<int32_t>(find_in_batch(seqs, i)->length));
  }
  std::copy(lengths.begin(), lengths.end(), out);
}

int64_t PageManager::free_pages() const {
  const Lock lock(mutex_);
  return static_cast<int64_t>(free_.size());
}

int64_t PageManager::ref_count(int64_t page) const {
  const Lock lock(mutex_);
  return holders_[static_cast<size_t>(in_range("page", page, 0, num_pages_ - 1))];
}

PageStats PageManager::stats() const {
  const Lock lock(mutex_);
  const int64_t free_pages = static_cast<int64_t>(free_.size());
  return {free_pages,
          num_pages_ - free_pages,
          shared_pages_,
          peak_used_pages_,
          static_cast<int64_t>(sequences_.size()),
          tokens_,
          page_copies_};
}

// ---- looking up

const PageManager::Sequence& PageManager::find(int64_t seq) const {
  const auto found = sequences_.find(seq);
  if (found == sequences_.end()) unknown("seq", seq, sequences_.size());
  return found->second;
}

PageManager::Sequence& PageManager::find(int64_t seq) {
  return const_cast<Sequence&>(static_cast<const PageManager*>(this)->find(seq));
}

const PageManager::Sequence* PageManager::find_in_batch(const int64_t* seqs, int64_t i) const {
  const auto found = sequences_.find(seqs[i]);
  if (found == sequences_.end()) unknown(item(i), seqs[i], sequences_.size());
  return &found->second;
}

std::vector<PageManager::Sequence*> PageManager::find_distinct(const int64_t* seqs, int64_t n) {
  in_range("n", n, 0, std::numeric_limits<int64_t>::max());
  std::vector<Sequence*> batch;
  batch.reserve(static_cast<size_t>(n));
  ++last_batch_;
  for (int64_t i = 0; i < n; ++i) {
    batch.push_back(const_cast<Sequence*>(find_in_batch(seqs, i)));
    if (batch.back()->batch == last_batch_) refuse(item(i), seqs[i], "each sequence once");
    batch.back()->batch = last_batch_;
  }
  return batch;
}

// ---- pages

int64_t PageManager::pages_for(int64_t rows) const noexcept {
  return (rows + page_size_ - 1) / page_size_;
}

int64_t PageManager::pages_to_add(const Sequence& s, int64_t rows) const noexcept {
  return pages_for(s.length + std::max(s.reserved, rows)) - static_cast<int64_t>(s.table.size());
}

int32_t PageManager::take_page() noexcept {
  const int32_t page = free_.back();
  free_.pop_back();
  holders_[page] = 1;
  peak_used_pages_ =
      std::max(peak_used_pages_, num_pages_ - static_cast<int64_t>(free_.size()));
  return page;
}

void PageManager::add_holder(int32_t page) noexcept {
  if (++holders_[page] == 2) ++shared_pages_;
}

void PageManager::drop_holder(int32_t page) noexcept {
  const int64_t left = --holders_[page];
  if (left == 1) --shared_pages_;
  if (left == 0) free_.push_back(page);
}

// From the back, so that the stack later gives these pages in the same order.
void PageManager::shrink_table(Sequence& s, int64_t pages) noexcept {
  while (static_cast<int64_t>(s.table.size()) > pages) {
    drop_holder(s.table.back());
    s.table.pop_back();
  }
}

}  // namespace vxl
