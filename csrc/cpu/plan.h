// How one attention call is cut into tasks. No instruction set in here: the plan is made
// once a call, the per-ISA kernels only read it.
#pragma once

#include <cstdint>

#include "../include/vxl/params.h"

namespace vxl {

struct KeySplit {  // [begin, end) of one sequence's keys
  int64_t begin, end;
};

struct AttentionPlan {
  bool decode = false;     // few query rows: lanes hold head_dim, all KV heads in one task
  int64_t group = 1;       // query heads of one KV head
  int64_t tile_rows = 1;   // positions of a chunk in one tile
  int64_t tiles = 1;       // of one chunk
  int64_t split_unit = 0;  // fewest keys of a split; 0: keys are never split
  int64_t splits = 1;      // of the longest sequence
  int64_t tasks = 0;
  int64_t scratch_floats = 0;    // of one thread, whatever the cache holds
  int64_t workspace_floats = 0;  // partial results of split sequences, shared

  // Splits depend on the sequence's own length only, so neither its neighbours in the
  // batch nor the number of threads change a bit of its result.
  static constexpr int64_t kMostSplits = 64;
  // Up to this many query rows of a KV head the keys are the long side.
  static constexpr int64_t kDecodeRows = 32;
  static constexpr int64_t kSplitAlign = 128;
  VXL_ALWAYS_INLINE int64_t split_length(int64_t keys) const {
    if (split_unit == 0) return keys > 0 ? keys : 1;
    int64_t length = (keys + kMostSplits - 1) / kMostSplits;
    if (length < split_unit) length = split_unit;
    return (length + kSplitAlign - 1) / kSplitAlign * kSplitAlign;
  }
  VXL_ALWAYS_INLINE int64_t split_count(int64_t keys) const {
    const int64_t length = split_length(keys);
    return keys > 0 ? (keys + length - 1) / length : 1;
  }
};

// `lanes`: floats in a SIMD vector; `threads` only shapes the tiles, which changes no bit.
AttentionPlan plan_attention(const AttentionParams& p, int lanes, int threads);

// All keys that the last chunk of sequence b sees.
VXL_ALWAYS_INLINE int64_t sequence_keys(const AttentionParams& p, int64_t b) {
  const int64_t cached = p.cache.lens ? p.cache.lens[b] : 0;
  return cached + (p.geometry.chunks - 1) * p.geometry.vsts() + p.geometry.chunk_rows();
}

}  // namespace vxl
