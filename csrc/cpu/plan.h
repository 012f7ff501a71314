// How one attention call is cut into pieces of work. This code is the same for every instruction
// set: each call makes one plan, and the per-ISA kernels only read it.
#pragma once

#include <cstdint>

#include "../include/vxl/params.h"

namespace vxl {

struct Member {  // positions [first, first + rows) of a chunk of a sequence
  int32_t sequence, chunk, first, rows;
};

// Rows that attend to the keys [begin, end) together. The members of a piece of several sequences
// find these keys at the same places of the cache, and all of their rows see all of them.
struct Piece {
  int32_t member = 0, members = 0;  // in AttentionPlan::members
  int32_t rows = 0;                 // of all members
  int32_t kv_head = 0, kv_heads = 1;
  int32_t split = 0;
  int64_t begin = 0, end = 0;
  bool narrow = false;   // for the kernel of few rows; it alone takes several KV heads
  bool resumes = false;  // goes on from the partial result that a piece of an earlier phase left
  bool saves = false;    // leaves a partial result, for one that resumes or for the merge
};

struct SequencePlan {
  int64_t partials = 0;  // where its partial results begin, in floats of the workspace
  int64_t splits = 1;
};

// Without containers: a function of the standard library that the per-ISA kernels instantiate could
// be the one that the linker keeps for every machine.
struct AttentionPlan {
  int64_t group = 1;  // query heads of one KV head
  const Member* members = nullptr;
  const SequencePlan* sequences = nullptr;
  int64_t scratch_floats = 0;    // of one thread, independent of the cache
  int64_t workspace_floats = 0;  // partial results, shared
};

// The keys of a sequence with few rows are cut into splits, whose results are merged in order.
// Where they are cut depends on the length of the sequence alone. So neither other sequences nor
// the number of threads, nor who shares the keys of a split, change a bit of its result.
struct KeySplits {
  // 2048 keys: a partial result of a row is a thousandth of the keys that it stands for, and a few
  // thousand keys are still work for several threads. Above 64 splits their length doubles.
  static constexpr int64_t kLength = 2048, kMost = 64;
  static constexpr int64_t kFewLanes = 672;  // rows times heads of a KV head: one tile

  static int64_t length(int64_t keys, int64_t lanes) {
    if (lanes > kFewLanes) return keys > 0 ? keys : 1;
    int64_t n = kLength;
    while (n * kMost < keys) n *= 2;
    return n;
  }
};

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

// How many cache entries the rows of a chunk of sequence b see.
VXL_ALWAYS_INLINE int64_t cached_keys(const AttentionParams& p, int64_t b, int64_t chunk) {
  return p.cache.lens ? p.cache.lens[b] + chunk * p.geometry_at(b).vsts() : 0;
}

// How many keys the last chunk of sequence b sees.
VXL_ALWAYS_INLINE int64_t sequence_keys(const AttentionParams& p, int64_t b) {
  const ChunkGeometry& g = p.geometry_at(b);
  return cached_keys(p, b, g.chunks - 1) + g.chunk_rows();
}

}  // namespace vxl
