// Finds which sequences see the same cache entries in a split, and cuts a call into pieces.
#include "pieces.h"

#include <algorithm>
#include <utility>

namespace vxl {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Q^T and O^T of a tile fit in a 1 MiB L2 beside one key block. Larger tiles copy each key block
// less often. Share of the FMA peak at head_dim 128: 0.80 with 240 lanes, 0.84 with 336, 0.86 with
// 672.
constexpr int64_t kMaxLanes = KeySplits::kFewLanes;
constexpr int64_t kTileFloats = 2 * 128 * kMaxLanes;
constexpr int64_t kKeyBlock = 128;

// A piece of few lanes takes as long as one of this many: it waits for its keys.
constexpr int64_t kLeastLanes = 48;

class Planner {
 public:
  Planner(const AttentionParams& call, const UnitShape& shape)
      : p_(call), unit_(shape), group_(call.heads / call.kv_heads) {
    work_.sequences.resize(p_.batch);
    for (int64_t b = 0; b < p_.batch; ++b) {
      const int64_t keys = sequence_keys(p_, b), n = split_length(b);
      work_.sequences[b].splits = std::max<int64_t>(ceil_div(keys, n), 1);
      most_splits_ = std::max(most_splits_, work_.sequences[b].splits);
    }
  }

  AttentionWork make(int threads) {
    find_shared();
    // A multiple of 3 vectors fills the register tiles. A call with few pieces cuts them smaller,
    // so that the threads end at about the same time.
    const int64_t dims = round_up(p_.head_dim, 32);  // AMX works on 32 values at a time
    const int64_t unit = 3 * unit_.lanes, wanted = 8 * int64_t(threads);
    int64_t lanes = std::clamp(kTileFloats / (2 * dims) / unit * unit, unit, kMaxLanes);
    for (bool by_head = false;;) {
      cut(lanes, by_head);
      const int64_t pieces = work_.pieces[0].size() + work_.pieces[1].size();
      if (pieces >= wanted) break;
      if (lanes > 4 * unit) {
        lanes /= 2;
      } else if (!by_head && pieces < 2 * int64_t(threads)) {
        by_head = true;
      } else {
        break;
      }
    }
    sort_pieces();
    plan_memory(dims);
    return std::move(work_);
  }

 private:
  struct Shared {  // the sequences that see the same entries [begin, end), in order
    int64_t split, begin, end;
    std::vector<int32_t> sequences;
  };

  bool splittable(int64_t b) const { return lanes_of(b) <= KeySplits::kFewLanes; }
  int64_t lanes_of(int64_t b) const {
    const ChunkGeometry& g = p_.geometry_at(b);
    return g.ratio == 0 ? g.rows() * group_ : KeySplits::kFewLanes + 1;
  }
  int64_t split_length(int64_t b) const {
    return KeySplits::length(sequence_keys(p_, b), lanes_of(b));
  }
  const int32_t* table(int64_t b) const {
    return p_.cache.block_table + b * p_.cache.block_table_stride;
  }

  // How many keys from `begin` on lie at the same places for a and b, up to `end`.
  int64_t common(int64_t a, int64_t b, int64_t begin, int64_t end) const {
    const int64_t size = p_.cache.page_size;
    int64_t page = begin / size;
    while (page * size < end && table(a)[page] == table(b)[page]) ++page;
    return std::max<int64_t>(std::min(page * size, end) - begin, 0);
  }

  void find_shared() {
    done_.assign(p_.batch, {});
    if (p_.cache.lens == nullptr) return;
    for (int64_t split = 0; split < most_splits_; ++split) {
      // By their first page and the length of their splits: only neighbours can share.
      std::vector<int32_t> found;
      for (int64_t b = 0; b < p_.batch; ++b) {
        const bool rows = p_.geometry_at(b).rows() > 0;
        if (!rows || !splittable(b) || split >= work_.sequences[b].splits) continue;
        if (p_.cache.lens[b] - split * split_length(b) >= kKeyBlock) found.push_back(b);
      }
      auto key = [&](int32_t b) {
        const int64_t length = split_length(b);  // where split 0 begins does not tell it
        return std::pair<int64_t, int32_t>(length, table(b)[split * length / p_.cache.page_size]);
      };
      std::stable_sort(found.begin(), found.end(),
                       [&](int32_t a, int32_t b) { return key(a) < key(b); });
      for (size_t i = 0, next; i < found.size(); i = next) {
        next = i + 1;
        while (next < found.size() && key(found[next]) == key(found[i])) ++next;
        group_run(split, found.data() + i, found.data() + next);
      }
    }
  }

  // Sequences join the first group with which they share at least half of what it shares.
  void group_run(int64_t split, const int32_t* first, const int32_t* last) {
    if (last - first < 2) return;
    const int64_t begin = split * split_length(*first), length = split_length(*first);
    std::vector<Shared> groups;
    for (; first < last; ++first) {
      const int64_t b = *first, end = std::min<int64_t>(begin + length, p_.cache.lens[b]);
      bool joined = false;
      for (Shared& x : groups) {
        const int64_t keys = common(x.sequences[0], b, begin, std::min(end, x.end));
        const int64_t least = std::max(kKeyBlock, (x.end - begin) / 2);
        if (keys < least) continue;
        x.end = begin + keys;
        x.sequences.push_back(int32_t(b));
        joined = true;
        break;
      }
      if (!joined) groups.push_back({split, begin, end, {int32_t(b)}});
    }
    for (Shared& x : groups) {
      if (x.sequences.size() < 2) continue;
      // A piece that goes on later starts with a whole key block.
      if (x.end < begin + length) x.end -= (x.end - begin) % kKeyBlock;
      if (x.end <= begin) continue;
      for (int32_t b : x.sequences) {
        auto& ends = done_[b];
        ends.resize(work_.sequences[b].splits, 0);
        ends[split] = x.end;
      }
      shared_.push_back(std::move(x));
    }
  }

  void cut(int64_t tile_lanes, bool by_head) {
    work_.members.clear();
    work_.merges.clear();
    for (auto& phase : work_.pieces) phase.clear();
    const int64_t most = std::max<int64_t>(tile_lanes / group_, 1);
    for (const Shared& x : shared_) cut_shared(x, most, by_head);
    for (int64_t b = 0; b < p_.batch; ++b) cut_sequence(b, most, by_head);
  }

  void cut_shared(const Shared& x, int64_t most, bool by_head) {
    Piece piece;
    piece.split = int32_t(x.split);
    piece.begin = x.begin;
    piece.end = x.end;
    piece.saves = true;
    auto flush = [&] {
      if (piece.rows > 0) add(0, piece, by_head);
      piece.member = int32_t(work_.members.size());
      piece.members = piece.rows = 0;
    };
    flush();
    for (const int32_t b : x.sequences) {
      const int64_t rows = p_.geometry_at(b).rows();
      for (int64_t first = 0, n; first < rows; first += n) {
        if (piece.rows == most) flush();
        n = std::min(rows - first, most - piece.rows);
        work_.members.push_back({b, 0, int32_t(first), int32_t(n)});
        ++piece.members;
        piece.rows += int32_t(n);
      }
    }
    flush();
  }

  // The last chunks and their last tiles see the most keys and go first. The tiles of a chunk run
  // one after another and share its K and V in the processor's cache.
  void cut_sequence(int64_t b, int64_t most, bool by_head) {
    const ChunkGeometry& g = p_.geometry_at(b);
    const int64_t rows = g.chunk_rows();
    if (g.rows() == 0) return;
    const int64_t tiles = ceil_div(rows, most), tile_rows = ceil_div(rows, tiles);
    const int64_t length = split_length(b), splits = work_.sequences[b].splits;
    for (int64_t chunk = g.chunks - 1; chunk >= 0; --chunk) {
      const int64_t cached = cached_keys(p_, b, chunk);
      for (int64_t tile = tiles - 1; tile >= 0; --tile) {
        const int64_t first = tile * tile_rows, n = std::min(tile_rows, rows - first);
        if (n <= 0) continue;
        Piece piece;
        piece.member = int32_t(work_.members.size());
        piece.members = 1;
        piece.rows = int32_t(n);
        piece.saves = splits > 1;
        work_.members.push_back({int32_t(b), int32_t(chunk), int32_t(first), int32_t(n)});
        for (int64_t split = 0; split < splits; ++split) {
          const int64_t begin = split * length, done = done_[b].empty() ? 0 : done_[b][split];
          piece.split = int32_t(split);
          piece.resumes = done > 0;
          piece.begin = std::max(begin, done);
          // The keys of this split that the last row sees.
          piece.end = std::min(begin + length, cached + first + n);
          if (piece.end <= piece.begin && piece.resumes) continue;
          piece.end = std::max(piece.end, piece.begin);
          add(piece.resumes ? 1 : 0, piece, by_head);
        }
      }
    }
    if (splits == 1) return;
    for (int64_t row = 0; row < rows; ++row) {
      work_.merges.push_back({int32_t(b), 0, int32_t(row), 1});
    }
  }

  void add(int phase, Piece piece, bool by_head) {
    piece.narrow = piece.rows * group_ <= unit_.narrow_lanes;
    piece.kv_heads = piece.narrow && !by_head ? int32_t(p_.kv_heads) : 1;
    for (int64_t h = 0; h < p_.kv_heads; h += piece.kv_heads) {
      piece.kv_head = int32_t(h);
      work_.pieces[phase].push_back(piece);
    }
  }

  void sort_pieces() {
    auto cost = [&](const Piece& x) {
      const int64_t lanes = std::max(kLeastLanes, x.rows * group_);
      return (x.end - x.begin) * lanes * x.kv_heads;
    };
    for (auto& phase : work_.pieces) {
      std::stable_sort(phase.begin(), phase.end(),
                       [&](const Piece& a, const Piece& b) { return cost(a) > cost(b); });
    }
  }

  void plan_memory(int64_t dims) {
    AttentionPlan& plan = work_.plan;
    plan.group = group_;
    plan.members = work_.members.data();
    plan.sequences = work_.sequences.data();
    for (int64_t b = 0; b < p_.batch; ++b) {
      SequencePlan& s = work_.sequences[b];
      if (s.splits == 1 && done_[b].empty()) continue;
      s.partials = plan.workspace_floats;
      plan.workspace_floats +=
          p_.geometry_at(b).rows() * p_.heads * s.splits * (p_.head_dim + 2);
    }
    for (const auto& phase : work_.pieces) {
      for (const Piece& x : phase) {
        plan.scratch_floats = std::max(plan.scratch_floats, scratch_floats(x, dims));
      }
    }
    plan.scratch_floats = std::max(plan.scratch_floats, p_.head_dim);
  }

  int64_t scratch_floats(const Piece& x, int64_t dims) const {
    const int64_t lanes = unit_.lanes, slack = 64;
    const int64_t rows = 8 * int64_t(x.rows);  // what is known of each row
    if (x.narrow) {
      const int64_t n = round_up(x.rows * group_, lanes);
      return x.kv_heads * n * (3 * dims + kKeyBlock + 3) + n + 18 * dims + rows + slack;
    }
    const int64_t n = round_up(x.rows * group_, 2 * lanes);
    return 2 * n * dims + 2 * kKeyBlock * dims + kKeyBlock * 3 * lanes + 3 * n + lanes * dims +
           rows + slack;
  }

  const AttentionParams& p_;
  const UnitShape& unit_;
  const int64_t group_;
  AttentionWork work_;
  int64_t most_splits_ = 0;
  std::vector<std::vector<int64_t>> done_;  // of a sequence and split: where its own piece begins
  std::vector<Shared> shared_;
};

}  // namespace

AttentionWork plan_attention(const AttentionParams& p, const UnitShape& unit, int threads) {
  return Planner(p, unit).make(threads);
}

}  // namespace vxl
