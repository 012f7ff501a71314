// Gradients with bf16 operands: see backward.h and pairs.h. P and dS are rounded to bf16 before the
// products that read them.
#pragma once

#include "backward.h"
#include "pairs.h"

namespace {

// Turns s into P = 2^(factor s - lse) and dp into dS = P (dp - delta) scale. Rounds both to rows,
// [keys][stride] pairs of lanes, and dS to pairs of keys, [keys / 2][NV lanes], in place of dp.
template <int NV>
VXL_NOINLINE void softmax_backward_pairs(const float* s, float* dp, int64_t keys, float factor,
                                         float scale, const float* lse, const float* delta,
                                         int64_t stride, Pair* p_rows, Pair* ds_rows) {
  Vec row_lse[NV], row_delta[NV];
  for (int j = 0; j < NV; ++j) {
    row_lse[j] = load(lse + j * kLanes);
    row_delta[j] = load(delta + j * kLanes) * splat(scale);
  }
  for (int64_t key = 0; key < keys; key += 2)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      Vec ds[2];
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        const int64_t at = ((key + i) * NV + j) * kLanes, to = (key + i) * stride + j * kLanes / 2;
        const Vec p = exp2_reduced(load(s + at) * splat(factor) - row_lse[j]);
        ds[i] = p * (load(dp + at) * splat(scale) - row_delta[j]);
        store_rounded(p_rows + to, p);
        store_rounded(ds_rows + to, ds[i]);
      }
      store(dp + (key / 2 * NV + j) * kLanes, round_pairs(ds[0], ds[1]));
    }
}

// sum[keys][dims] += p^T rows over all lanes of the tile. p: [key block][padded / 2] pairs of
// lanes. rows: panels [dims / (kWide lanes)][padded / 2][kWide lanes]. seen: as in add_over_lanes.
inline void add_pairs_over_lanes(const Pair* p, const Pair* rows, const Groups& groups,
                                 const int32_t* seen, int64_t dims, float* sum) {
  constexpr int64_t width = kWide * kLanes;
  const int64_t count = groups.count(), pairs = groups.vecs * kLanes / 2;
  for (int64_t d = 0; d < dims; d += width) {
    int64_t first = 0;
    for (int64_t key = 0, next; key < seen[count - 1]; key = next) {
      while (seen[first] <= key) ++first;
      next = seen[first];  // up to here the same groups have values
      const int64_t from = groups.lane(first) / 2;
      product<kWide>(p + key * pairs + from, pairs, next - key, rows + d * pairs + from * width,
                     pairs - from, sum + key * dims + d, dims, true, nullptr);
    }
  }
}

// How backward.h computes with bf16 operands. See FloatGradient.
struct PairGradient {
  static constexpr int kRows = kPairRows, kCols = kPairCols;
  static constexpr int64_t kVecUnit = kPairVecs;
  static constexpr int64_t kScoreFloats = 2 * kKeyBlock * kCols * kLanes;
  using Session = TileSession;

  float scale;
  PairScale forward;
  PairGradient(float x, int64_t /*head_dim*/) : scale(x), forward(x) {}
  float query_scale() const { return 1.0f; }  // dS holds the scale

  static Pair* as_pairs(float* x) { return reinterpret_cast<Pair*>(x); }

  static void pack_keys(const HeadRows* rows, int64_t keys, int64_t head_dim, int64_t dims,
                        const KeyBlock& to) {
    const int64_t pairs = dims / 2;
    for (int64_t i = 0; i < round_up(keys, kRows); ++i) {
      Pair *k = as_pairs(to.k) + i * pairs, *v = as_pairs(to.v) + i * pairs;
      if (i < keys) {
        copy_pairs(reinterpret_cast<const Bf16*>(rows[i].k), head_dim, pairs, k);
        copy_pairs(reinterpret_cast<const Bf16*>(rows[i].v), head_dim, pairs, v);
      } else {
        std::memset(k, 0, pairs * sizeof(Pair));
        std::memset(v, 0, pairs * sizeof(Pair));
      }
    }
    transpose_block<&HeadRows::k>(rows, keys, head_dim, dims, as_pairs(to.k_panels));
  }

  // q and grad hold bf16 values, so rounding them is exact.
  void put_queries(const float* q, const float* grad, int64_t v, int64_t dims, QueryTile& t,
                   float* staged) const {
    constexpr int64_t width = kWide * kLanes;
    const int64_t pairs = t.vecs * kLanes / 2;  // of lanes
    const int64_t start = v / kCols * kCols * kLanes;
    const int64_t stride = min_(kCols * kLanes, t.vecs * kLanes - start);
    auto put = [&](const float* x, float sign, float* lanes, float* rows) {
      for (int64_t i = 0; i < kLanes; ++i)
        for (int64_t d = 0; d < dims; d += kLanes)
          store_rounded(as_pairs(staged) + (i * dims + d) / 2,
                        load(x + i * dims + d) * splat(sign));
      lanes_from_rows(staged, dims / 2, lanes + start * dims / 2 + v * kLanes - start, stride);
      for (int64_t i = 0; i < kLanes; i += 2)
        for (int64_t d = 0; d < dims; d += kLanes)
          store(rows + d / width * width * pairs + (v * kLanes + i) / 2 * width + d % width,
                round_pairs(load(x + i * dims + d), load(x + (i + 1) * dims + d)));
    };
    put(q, forward.zero ? 0.0f : forward.flip != 0 ? -1.0f : 1.0f, t.q_lanes, t.q_rows);
    put(grad, 1.0f, t.do_lanes, t.do_rows);
  }

  template <int NV>
  void block(const KeyBlock& keys, int64_t padded, int64_t dims, const QueryTile& t, int64_t lane,
             Prefetch& prefetch) const {
    float unused[NV * kLanes];
    float *s = t.scores, *dp = s + kKeyBlock * NV * kLanes;
    const int64_t pairs = dims / 2, stride = t.vecs * kLanes / 2;
    product<NV>(as_pairs(keys.k), pairs, padded, as_pairs(t.q_lanes) + lane * pairs, pairs, s,
                NV * kLanes, false, &prefetch);
    mask_scores<NV>(s, padded, t.limits + lane, unused);
    product<NV>(as_pairs(keys.v), pairs, padded, as_pairs(t.do_lanes) + lane * pairs, pairs, dp,
                NV * kLanes, false, &prefetch);
    softmax_backward_pairs<NV>(s, dp, padded, forward.scale, scale, t.lse + lane, t.delta + lane,
                               stride, as_pairs(t.p) + lane / 2, as_pairs(t.ds) + lane / 2);
    product<NV>(as_pairs(keys.k_panels), kPairKeys, dims, as_pairs(dp), padded / 2,
                t.dq_lanes + lane * dims, NV * kLanes, true, nullptr);
  }

  static void add_keys(const QueryTile& t, const Groups& groups, int64_t dims, float* dk,
                       float* dv) {
    add_pairs_over_lanes(as_pairs(t.p), as_pairs(t.do_rows), groups, t.seen, dims, dv);
    add_pairs_over_lanes(as_pairs(t.ds), as_pairs(t.q_rows), groups, t.seen, dims, dk);
  }
};

}  // namespace
