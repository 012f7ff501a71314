// How one attention call is cut into tasks. This code is the same for every instruction set: each
// call makes one plan, and the per-ISA kernels only read it.
#pragma once

#include <cstdint>

#include "../include/vxl/params.h"

namespace vxl {

struct KeySplit {  // [begin, end) of one sequence's keys
  int64_t begin, end;
};

struct AttentionPlan {
  bool decode = false;     // few query rows: lanes hold head_dim, and a task has all KV heads
  int64_t group = 1;       // query heads of one KV head
  int64_t tile_rows = 1;   // positions of a chunk in one tile
  int64_t tiles = 1;       // of one chunk
  int64_t split_unit = 0;  // a split has at least this many keys; 0: keys are never split
  int64_t splits = 1;      // of the longest sequence
  int64_t tasks = 0;
  int64_t scratch_floats = 0;    // of one thread, independent of the cache
  int64_t workspace_floats = 0;  // partial results of split sequences, shared

  // Splits depend only on the length of the sequence itself. So neither other sequences of the
  // batch nor the number of threads change a bit of its result.
  static constexpr int64_t kMaxSplits = 64;
  // The decode kernel serves at most this many query rows of a KV head.
  static constexpr int64_t kDecodeRows = 32;
  static constexpr int64_t kSplitAlign = 128;
  VXL_ALWAYS_INLINE int64_t split_length(int64_t keys) const {
    if (split_unit == 0) return keys > 0 ? keys : 1;
    int64_t length = (keys + kMaxSplits - 1) / kMaxSplits;
    if (length < split_unit) length = split_unit;
    return (length + kSplitAlign - 1) / kSplitAlign * kSplitAlign;
  }
  VXL_ALWAYS_INLINE int64_t split_count(int64_t keys) const {
    const int64_t length = split_length(keys);
    return keys > 0 ? (keys + length - 1) / length : 1;
  }
};

// lanes: floats in a SIMD vector. decode_rows: with more query rows of a KV head, tiles are faster
// than the decode kernel. threads: affects the tile sizes, but no bit of the result.
AttentionPlan plan_attention(const AttentionParams& p, int lanes, int64_t decode_rows,
                             int threads);

// How the backward pass of one call is cut into tasks. A task walks some tiles of some chunks, for
// one KV head of one sequence. It adds up the gradients of K and V in its own workspace, and the
// workspaces are then summed in order. The tasks depend on shapes alone, so the gradients do not
// depend on the number of threads.
struct BackwardPlan {
  int64_t group = 1;           // query heads of one KV head
  int64_t tile_rows = 1;       // positions of a chunk in one tile
  int64_t tiles = 1;           // of one chunk
  int64_t segments = 1;        // runs of chunks of a sequence
  int64_t segment_chunks = 1;  // chunks of a run (the last may have fewer)
  int64_t parts = 1;           // a chunk's tiles are dealt: part i takes tiles i, i + parts, ...
  int64_t tasks = 0;
  int64_t dims = 0;            // head_dim, padded to whole panels
  int64_t cached = 0;          // cache entries of the longest sequence, VSTs of this call included
  int64_t scratch_floats = 0;

  // A workspace holds the gradients of K, then of V: of `cached` entries, of the segment's new
  // rows, and of up to 32 rows that the last register tile computes past the end.
  VXL_ALWAYS_INLINE int64_t workspace_keys(const ChunkGeometry& g) const {
    return cached + segment_chunks * g.chunk_rows() + 32;
  }
  VXL_ALWAYS_INLINE int64_t workspace_floats(const ChunkGeometry& g) const {
    return 2 * workspace_keys(g) * dims;
  }
  // Tasks of one sequence and KV head are adjacent.
  VXL_ALWAYS_INLINE int64_t task_of(const AttentionParams& p, int64_t batch, int64_t kv_head,
                                    int64_t segment, int64_t part) const {
    return ((batch * p.kv_heads + kv_head) * segments + segment) * parts + part;
  }
};

BackwardPlan plan_backward(const AttentionParams& p, int lanes);

// How many keys the last chunk of sequence b sees.
VXL_ALWAYS_INLINE int64_t sequence_keys(const AttentionParams& p, int64_t b) {
  const int64_t cached = p.cache.lens ? p.cache.lens[b] : 0;
  return cached + (p.geometry.chunks - 1) * p.geometry.vsts() + p.geometry.chunk_rows();
}

}  // namespace vxl
