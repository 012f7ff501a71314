// How decode.h computes with bf16 operands: `vdpbf16ps` or BFDOT reads K and V where they lie.
// Every number is computed with the operations of PairTile (pairs.h) in the same order, so a row
// has the same bits in both. AMX sums in another order, so its unit has the tile alone.
#pragma once

#include "decode.h"
#include "pairs.h"

namespace {

constexpr int64_t kSumDims = 2 * kLanes;  // dimensions that two vectors of sums hold

// s[kScoreKeys][NV lanes] = K q. k: rows of pairs. q is [pairs][NV lanes].
template <int NV>
VXL_NOINLINE void narrow_pair_scores(const Bf16* const* k, const Pair* q, int64_t pairs, float* s,
                                     Ahead& ahead) {
  Vec acc[kScoreKeys][NV];
#pragma GCC unroll 8
  for (int i = 0; i < kScoreKeys; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) acc[i][j] = Vec{};
  for (int64_t n = 0; n < pairs; ++n) {
    if (n % 4 == 0) ahead.two_lines();
    PairVec qv[NV];
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) qv[j] = load_pairs(q + (n * NV + j) * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kScoreKeys; ++i) {
      uint32_t pair;
      std::memcpy(&pair, k[i] + 2 * n, sizeof(pair));
      const PairVec kv = splat_pair(pair);
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j) acc[i][j] = add_products(acc[i][j], qv[j], kv);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kScoreKeys; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) store(s + (i * NV + j) * kLanes, acc[i][j]);
}

#if defined(__AVX512F__)
// For few_row_scores.
struct PairWord {
  static constexpr int64_t kRows = 1;
  template <int R>
  static VXL_INLINE void add(Vec x, const float* q, Vec (&acc)[R]) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      acc[r] = add_products(acc[r], splat_pair(reinterpret_cast<const Pair*>(q)[r]), pairs_of(x));
    }
  }
};
#endif

// sum[R][dims] += P^T V over n pairs of keys. p is [n][stride]. v: 2 n rows. `make_pairs` works
// within 128 bits: in a sum, four dimensions of each eight are in the first vector of kSumDims and
// four in the second.
template <int R>
VXL_NOINLINE void narrow_weigh_pairs(const Pair* p, int64_t stride, int64_t n,
                                     const Bf16* const* v, int64_t dims, float* sum,
                                     Ahead& ahead) {
  for (int64_t d = 0; d < dims; d += kSumDims) {
    Vec acc[R][2];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int c = 0; c < 2; ++c) acc[r][c] = load(sum + r * dims + d + c * kLanes);
    for (int64_t i = 0; i < n; ++i) {
      ahead.two_lines();
      PairVec low, high;
      make_pairs(v[2 * i] + d, v[2 * i + 1] + d, low, high);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const PairVec pv = splat_pair(p[i * stride + r]);
        acc[r][0] = add_products(acc[r][0], low, pv);
        acc[r][1] = add_products(acc[r][1], high, pv);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int c = 0; c < 2; ++c) store(sum + r * dims + d + c * kLanes, acc[r][c]);
  }
}

struct PairNarrow {
  static int64_t q_dims(int64_t head_dim) { return ceil_div(head_dim, 2); }
  static int64_t dims(int64_t head_dim) { return round_up(head_dim, kSumDims); }

  PairScale scale;
  explicit PairNarrow(float x) : scale(x) {}

  void stage_query(const Bf16* row, int64_t head_dim, float* out, int64_t stride) const {
    if (scale.zero) return;
    for (int64_t d = 0; d < head_dim; d += 2) {
      const uint32_t low = row[d].bits ^ scale.flip;
      const uint32_t high = d + 1 < head_dim ? row[d + 1].bits ^ scale.flip : 0;
      reinterpret_cast<Pair*>(out)[d / 2 * stride] = high << 16 | low;
    }
  }

  static int64_t place(int64_t d) {  // where a sum has dimension d
    const int64_t i = d % kSumDims;
    return d - i + (i & 4) / 4 * kLanes + i / 8 * 4 + i % 4;
  }

  template <int NV>
  void attend_block(const vxl::AttentionParams& p, const BlockRows<Bf16>& block,
                    const NarrowState& x) const {
    score_keys<NV>(p, block, x);
    const int64_t keys = round_up(block.count, 2);  // a key past the end is masked
    float block_max[NV * kLanes];
    for (int64_t h = 0; h < x.heads; ++h) {
      float* const alpha = x.alpha + h * x.padded;
      mask_scores<NV>(x.scores(h), keys, x.limits, block_max);
      if (!softmax_pairs<NV>(x.scores(h), keys, scale.scale, block_max, x.m + h * x.padded,
                             x.l + h * x.padded, alpha)) {
        continue;
      }
      for (int64_t lane = 0; lane < x.lanes; ++lane) {
        float* const o = x.o + (h * x.lanes + lane) * x.dims;
        for (int64_t d = 0; d < x.dims; d += kLanes) store(o + d, load(o + d) * splat(alpha[lane]));
      }
    }
    weigh_values(p, block, x);
    for (int64_t i = 0; i < x.heads * x.lanes * x.dims; i += kLanes) {
      store(x.o + i, load(x.o + i) + load(x.sum + i));
    }
  }

 private:
  template <int NV>
  static void score_keys(const vxl::AttentionParams& p, const BlockRows<Bf16>& block,
                         const NarrowState& x) {
    each_k_rows(block, [&](int64_t c, int64_t h, const Bf16** rows, Ahead& ahead) {
      if (p.head_dim % 2 != 0) {
        for (int64_t i = 0; i < kNarrowKeys; ++i) {
          rows[i] = padded_row(rows[i], p.head_dim, x.dims, x.staged + i * x.dims);
        }
      }
      const float* const q = x.q + h * x.q_dims * x.padded;
#if defined(__AVX512F__)
      if (few_rows_fit(x.lanes, x.q_dims, x.q_dims)) {
        few_row_scores<PairWord>(x.lanes, rows, q, x.q_dims, x.q_dims, x.scores(h, c), ahead);
        return;
      }
#endif
      for (int64_t i = 0; i < min_(kNarrowKeys, block.count - c); i += kScoreKeys) {
        narrow_pair_scores<NV>(rows + i, reinterpret_cast<const Pair*>(q), x.q_dims,
                               x.scores(h, c + i), ahead);
      }
    });
  }

  static void weigh_values(const vxl::AttentionParams& p, const BlockRows<Bf16>& block,
                           const NarrowState& x) {
    float* const zeros = x.staged + kNarrowKeys * x.dims;
    std::memset(zeros, 0, x.dims * sizeof(float));
    std::memset(x.sum, 0, x.heads * x.lanes * x.dims * sizeof(float));
    each_v_rows(block, [&](int64_t c, int64_t n, int64_t h, const Bf16** rows, Ahead& ahead) {
      if (x.dims != p.head_dim) {
        // A vector load from the tensor itself could read past its end.
        for (int64_t i = 0; i < n; ++i) {
          rows[i] = padded_row(rows[i], p.head_dim, x.dims, x.staged + i * x.dims);
        }
      }
      if (n % 2 != 0) rows[n] = reinterpret_cast<const Bf16*>(zeros);
      weigh_rows(x.lanes, reinterpret_cast<const Pair*>(x.scores(h)) + c / 2 * x.padded, x.padded,
                 ceil_div(n, 2), rows, x.dims, x.sum + h * x.lanes * x.dims, ahead);
    });
  }

  static void weigh_rows(int64_t rows, const Pair* p, int64_t stride, int64_t n,
                         const Bf16* const* v, int64_t dims, float* sum, Ahead& ahead) {
    narrow_rows(rows, [&](auto count, int64_t r) {
      narrow_weigh_pairs<decltype(count)::value>(p + r, stride, n, v, dims, sum + r * dims,
                                                   ahead);
    });
  }
};

}  // namespace
