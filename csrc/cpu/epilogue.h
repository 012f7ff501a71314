// Turns running sums into results: the final division, the LSE, and the merge of key splits.
#pragma once

#include "plan.h"
#include "tile.h"

namespace {

struct Partial {  // over some keys: o is the sum of 2^(s - m) v, l the sum of 2^(s - m)
  const float* o;
  float m, l;
};

template <typename T>
void finish_row(const vxl::AttentionParams& p, int64_t batch, int64_t row, int64_t head,
                const Partial& x) {
  T* out = static_cast<T*>(p.out.data) + batch * p.out.batch_stride +
           row * p.out.row_stride + head * p.out.head_stride;
  const float inverse = 1.0f / x.l;
  int64_t d = 0;
  for (; d + kLanes <= p.head_dim; d += kLanes)
    store_from_float(out + d, load(x.o + d) * splat(inverse));
  for (; d < p.head_dim; ++d) from_float(x.o[d] * inverse, out + d);
  if (p.lse != nullptr) {
    p.lse[(batch * p.heads + head) * p.geometry.rows() + row] = x.m * kLn2 + logf(x.l);
  }
}

// Workspace: [batch][row][head][split][head_dim + 2].
inline float* partial_at(const vxl::AttentionParams& p, const vxl::AttentionPlan& plan,
                         int64_t batch, int64_t row, int64_t head, int64_t split,
                         float* workspace) {
  return workspace +
         (((batch * p.geometry.rows() + row) * p.heads + head) * plan.splits + split) *
             (p.head_dim + 2);
}

inline void save_partial(const vxl::AttentionParams& p, const vxl::AttentionPlan& plan,
                         int64_t batch, int64_t split, int64_t row, int64_t head,
                         const Partial& x, float* workspace) {
  float* out = partial_at(p, plan, batch, row, head, split, workspace);
  std::memcpy(out, x.o, p.head_dim * sizeof(float));
  out[p.head_dim] = x.m;
  out[p.head_dim + 1] = x.l;
}

// Merges the splits of one row in order, so the bits do not depend on the threads.
template <typename T>
void merge_row(const vxl::AttentionParams& p, const vxl::AttentionPlan& plan, int64_t batch,
               int64_t row, float* scratch, float* workspace) {
  const int64_t splits = plan.split_count(vxl::sequence_keys(p, batch));
  for (int64_t head = 0; head < p.heads; ++head) {
    float m = -INFINITY;
    for (int64_t s = 0; s < splits; ++s) {
      const float* x = partial_at(p, plan, batch, row, head, s, workspace);
      m = x[p.head_dim] > m ? x[p.head_dim] : m;
    }
    float l = 0.0f;
    std::memset(scratch, 0, p.head_dim * sizeof(float));
    for (int64_t s = 0; s < splits; ++s) {
      const float* x = partial_at(p, plan, batch, row, head, s, workspace);
      const float weight = exp2v(splat(x[p.head_dim] - (m == -INFINITY ? 0.0f : m)))[0];
      l += x[p.head_dim + 1] * weight;
      for (int64_t d = 0; d < p.head_dim; ++d) scratch[d] += x[d] * weight;
    }
    finish_row<T>(p, batch, row, head, Partial{scratch, m, l});
  }
}

}  // namespace
