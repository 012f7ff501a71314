// Turns running sums into results: the final division, the LSE, and the merge of key splits.
#pragma once

#include "plan.h"
#include "tile.h"

namespace {

struct Partial {  // over some keys: o is the sum of 2^(s - m) v, l the sum of 2^(s - m)
  const float* o;
  float m, l;
};

// A query row of a piece, and how many keys of its sequence it sees.
struct TileRow {
  int64_t sequence, row, bound;
};

// Fills rows[piece.rows].
inline void find_rows(const vxl::AttentionParams& p, const vxl::AttentionPlan& plan,
                      const vxl::Piece& piece, TileRow* rows) {
  for (int32_t i = 0; i < piece.members; ++i) {
    const vxl::Member& x = plan.members[piece.member + i];
    const int64_t cached = vxl::cached_keys(p, x.sequence, x.chunk);
    for (int64_t at = x.first; at < x.first + x.rows; ++at) {
      *rows++ = {x.sequence, p.row_of(x.sequence, x.chunk, at), cached + at + 1};
    }
  }
}

template <typename T>
VXL_INLINE T* row_at(const vxl::RowTensor& x, const TileRow& row, int64_t head) {
  return static_cast<T*>(x.data) + row.sequence * x.batch_stride + row.row * x.row_stride +
         head * x.head_stride;
}

template <typename T>
void finish_row(const vxl::AttentionParams& p, const TileRow& row, int64_t head,
                const Partial& x) {
  T* out = row_at<T>(p.out, row, head);
  const float inverse = 1.0f / x.l;
  int64_t d = 0;
  for (; d + kLanes <= p.head_dim; d += kLanes)
    store_from_float(out + d, load(x.o + d) * splat(inverse));
  for (; d < p.head_dim; ++d) from_float(x.o[d] * inverse, out + d);
  if (p.lse != nullptr) {
    p.lse[p.lse_index(row.sequence, p.heads, head, row.row)] = x.m * kLn2 + logf(x.l);
  }
}

// The partial results of a sequence: [position][head][split][head_dim + 2], the sum o, then m and
// l. Only sequences of one chunk have some.
inline float* partial_at(const vxl::AttentionParams& p, const vxl::AttentionPlan& plan,
                         int64_t sequence, int64_t position, int64_t head, int64_t split,
                         float* workspace) {
  const vxl::SequencePlan& x = plan.sequences[sequence];
  return workspace + x.partials +
         ((position * p.heads + head) * x.splits + split) * (p.head_dim + 2);
}
inline float* partial_at(const vxl::AttentionParams& p, const vxl::AttentionPlan& plan,
                         const vxl::Piece& piece, const TileRow& row, int64_t head,
                         float* workspace) {
  const int64_t position = row.bound - vxl::cached_keys(p, row.sequence, 0) - 1;
  return partial_at(p, plan, row.sequence, position, head, piece.split, workspace);
}

// What a piece leaves of a row: its result, or a partial one.
template <typename T>
void leave_row(const vxl::AttentionParams& p, const vxl::AttentionPlan& plan,
               const vxl::Piece& piece, const TileRow& row, int64_t head, const Partial& x,
               float* workspace) {
  if (!piece.saves) return finish_row<T>(p, row, head, x);
  float* out = partial_at(p, plan, piece, row, head, workspace);
  std::memcpy(out, x.o, p.head_dim * sizeof(float));
  out[p.head_dim] = x.m;
  out[p.head_dim + 1] = x.l;
}

// Merges the splits of one row in order, so the bits do not depend on the threads.
template <typename T>
void merge_row(const vxl::AttentionParams& p, const vxl::AttentionPlan& plan,
               const vxl::Member& x, float* scratch, float* workspace) {
  const int64_t splits = plan.sequences[x.sequence].splits;
  const TileRow row{x.sequence, p.row_of(x.sequence, x.chunk, x.first), 0};
  for (int64_t head = 0; head < p.heads; ++head) {
    auto part = [&](int64_t split) {
      return partial_at(p, plan, x.sequence, x.first, head, split, workspace);
    };
    float m = -INFINITY;
    for (int64_t s = 0; s < splits; ++s) {
      const float top = part(s)[p.head_dim];
      m = top > m ? top : m;
    }
    float l = 0.0f;
    std::memset(scratch, 0, p.head_dim * sizeof(float));
    for (int64_t s = 0; s < splits; ++s) {
      const float* from = part(s);
      const float weight = exp2v(splat(from[p.head_dim] - (m == -INFINITY ? 0.0f : m)))[0];
      l += from[p.head_dim + 1] * weight;
      for (int64_t d = 0; d < p.head_dim; ++d) scratch[d] += from[d] * weight;
    }
    finish_row<T>(p, row, head, Partial{scratch, m, l});
  }
}

}  // namespace
