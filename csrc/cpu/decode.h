// Attention of a few query rows over many keys, one vector or two of them for each KV head. Memory
// bounds it, so a piece walks one range of the cache front to back with all KV heads and reads every
// byte once, where it lies.
//
// The steps are those of tile.h in the same order for every number, so a row has the same bits here
// and in a tile: a score is summed over the dimensions in the parts of score_part, the softmax takes
// blocks of kKeyBlock keys, and the values of a block are summed key by key. Only the lanes differ:
// those of the values are head dimensions, which keeps them full.
//
// Measured on a Zen 5 core with 7 query rows and head_dim 128: prefetching rows into L1, 8 keys ahead
// and in memory order, doubles the speed from memory. These were no faster: to prefetch every other
// line (the hardware does not fetch the rest), to read lines instead of prefetching them, to pull
// whole blocks into L2 first, to copy rows first.
#pragma once

#include <type_traits>

#include "epilogue.h"
#include "key_stream.h"
#include "plan.h"
#include "tile.h"

namespace {

// Vectors of query rows at most: their sums stay in registers.
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int kNarrowVecs = 1;
#else
constexpr int kNarrowVecs = 2;
#endif
constexpr int64_t kNarrowKeys = 8; // keys for each load and store of a sum: enough to pay for both
constexpr int kNarrowDims = kLanes == 16 ? 2 : 1;  // vectors of dimensions with 8 rows of sums

template <typename T>
VXL_INLINE void prefetch_row(const T* row, int64_t dims) {
  const char* p = reinterpret_cast<const char*>(row);
  for (int64_t b = 0; b < dims * int64_t(sizeof(T)); b += 64) __builtin_prefetch(p + b, 0, 3);
}

// s[kNarrowKeys][NV lanes] = K q. q is [dims][NV lanes].
template <int NV>
VXL_NOINLINE void narrow_scores(const float* const* k, const float* q, int64_t dims, float* s) {
  const int64_t part = score_part(dims);
  for (int64_t d = 0; d < dims;) {
    const bool first = d == 0;
    Vec acc[kNarrowKeys][NV];
#pragma GCC unroll 8
    for (int i = 0; i < kNarrowKeys; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j) acc[i][j] = Vec{};
    for (const int64_t end = min_(d + part, dims); d < end; ++d) {
      Vec qv[NV];
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j) qv[j] = load(q + (d * NV + j) * kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < kNarrowKeys; ++i) {
        const Vec kv = splat(k[i][d]);
#pragma GCC unroll 2
        for (int j = 0; j < NV; ++j) acc[i][j] += kv * qv[j];
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kNarrowKeys; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j) {
        float* const to = s + (i * NV + j) * kLanes;
        store(to, first ? acc[i][j] : load(to) + acc[i][j]);
      }
  }
}

// sum[R][dims] += p^T V over n keys, for C vectors of dimensions. p is [n][stride].
template <int R, int C, typename T>
VXL_INLINE void narrow_weigh_dims(const float* p, int64_t stride, int64_t n, const T* const* v,
                                  int64_t offset, int64_t dims, float* sum) {
  Vec acc[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) acc[r][c] = load(sum + r * dims + offset + c * kLanes);
  for (int64_t i = 0; i < n; ++i) {
    Vec vv[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) vv[c] = load_as_float(v[i] + offset + c * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec pv = splat(p[i * stride + r]);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) acc[r][c] += vv[c] * pv;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) store(sum + r * dims + offset + c * kLanes, acc[r][c]);
}

template <int R, typename T>
VXL_NOINLINE void narrow_weigh(const float* p, int64_t stride, int64_t n, const T* const* v,
                               int64_t dims, float* sum) {
  int64_t d = 0;
  for (; d + kNarrowDims * kLanes <= dims; d += kNarrowDims * kLanes)
    narrow_weigh_dims<R, kNarrowDims>(p, stride, n, v, d, dims, sum);
  for (; d < dims; d += kLanes) narrow_weigh_dims<R, 1>(p, stride, n, v, d, dims, sum);
}

// The same for any number of rows.
template <typename T>
VXL_INLINE void narrow_weigh_rows(int64_t rows, const float* p, int64_t stride, int64_t n,
                                  const T* const* v, int64_t dims, float* sum) {
  for (int64_t r = 0; r < rows;) {
    const int64_t left = rows - r;
    const float* const at = p + r;
    float* const to = sum + r * dims;
    if (left >= 8) {
      narrow_weigh<8>(at, stride, n, v, dims, to);
      r += 8;
    } else if (left == 7) {
      narrow_weigh<7>(at, stride, n, v, dims, to);
      r += 7;
    } else if (left >= 4) {
      narrow_weigh<4>(at, stride, n, v, dims, to);
      r += 4;
    } else if (left >= 2) {
      narrow_weigh<2>(at, stride, n, v, dims, to);
      r += 2;
    } else {
      narrow_weigh<1>(at, stride, n, v, dims, to);
      r += 1;
    }
  }
}

// The rows of a block and of the next one: which to read, and which to prefetch.
template <typename T>
struct BlockRows {
  static constexpr int64_t kDistance = 8;  // keys; 16 and 32 were up to a fifth slower
  const HeadRows *here, *next;
  int64_t count, next_count;

  const T* k(int64_t i, int64_t head) const { return k_of(here[i], head); }
  const T* v(int64_t i, int64_t head) const { return v_of(here[i], head); }
  // Rows are read in this order: K of this block, its V, K of the next block. Past the end these
  // return the last row.
  const T* after_k(int64_t i, int64_t head) const {
    const int64_t j = i + kDistance;
    return j < count ? k(j, head) : v(min_(j - count, count - 1), head);
  }
  const T* after_v(int64_t i, int64_t head) const {
    const int64_t j = i + kDistance;
    if (j < count) return v(j, head);
    return j - count < next_count ? k_of(next[j - count], head) : v(count - 1, head);
  }

 private:
  static const T* k_of(const HeadRows& x, int64_t head) {
    return reinterpret_cast<const T*>(x.k + head * x.k_step);
  }
  static const T* v_of(const HeadRows& x, int64_t head) {
    return reinterpret_cast<const T*>(x.v + head * x.v_step);
  }
};

// Walks (key, head) in memory order, for prefetches. The arithmetic goes head by head.
struct InOrder {
  const int64_t heads;
  int64_t key, head = 0;

  VXL_INLINE void step() {
    if (++head == heads) {
      head = 0;
      ++key;
    }
  }
};

// State of the KV heads of a piece.
struct NarrowState {
  int64_t heads, lanes, padded, dims;  // lanes: query rows; padded: whole vectors
  float *q, *o, *sum;                  // q: [heads][head_dim][padded]; others: [heads][lanes][dims]
  float* s;                            // [heads][kKeyBlock][padded]
  float *m, *l, *alpha;                // [heads][padded]
  float* staged;                       // rows as floats, with whole vectors of dimensions
  int32_t* limits;                     // [padded]
};

template <int NV, typename T>
void score_keys(const vxl::AttentionParams& p, const BlockRows<T>& block, const NarrowState& x) {
  const T* rows[kNarrowKeys];
  const float* floats[kNarrowKeys];
  for (int64_t c = 0; c < block.count; c += kNarrowKeys) {
    InOrder next{x.heads, c};
    for (int64_t h = 0; h < x.heads; ++h) {
      for (int64_t i = 0; i < kNarrowKeys; ++i, next.step()) {
        rows[i] = block.k(min_(c + i, block.count - 1), h);  // past the end: a score nobody reads
        prefetch_row(block.after_k(next.key, next.head), p.head_dim);
      }
      for (int64_t i = 0; i < kNarrowKeys; ++i) {
        if constexpr (std::is_same_v<T, float>) {
          floats[i] = rows[i];
        } else {
          floats[i] = x.staged + i * x.dims;
          load_row(rows[i], x.staged + i * x.dims, p.head_dim);
        }
      }
      narrow_scores<NV>(floats, x.q + h * p.head_dim * x.padded, p.head_dim,
                        x.s + (h * kKeyBlock + c) * x.padded);
    }
  }
}

template <int NV, typename T>
void weigh_values(const vxl::AttentionParams& p, const BlockRows<T>& block, const NarrowState& x) {
  const T* rows[kNarrowKeys];
  const float* whole[kNarrowKeys];
  std::memset(x.sum, 0, x.heads * x.lanes * x.dims * sizeof(float));
  for (int64_t c = 0; c < block.count; c += kNarrowKeys) {
    const int64_t n = min_(kNarrowKeys, block.count - c);
    InOrder next{x.heads, c};
    for (int64_t h = 0; h < x.heads; ++h) {
      for (int64_t i = 0; i < n; ++i, next.step()) {
        rows[i] = block.v(c + i, h);
        prefetch_row(block.after_v(next.key, next.head), p.head_dim);
      }
      const float* weights = x.s + (h * kKeyBlock + c) * x.padded;
      float* sum = x.sum + h * x.lanes * x.dims;
      if (x.dims == p.head_dim) {
        narrow_weigh_rows(x.lanes, weights, x.padded, n, rows, x.dims, sum);
        continue;
      }
      // A vector load from the tensor itself could read past its end.
      for (int64_t i = 0; i < n; ++i) {
        float* to = x.staged + i * x.dims;
        whole[i] = to;
        load_row(rows[i], to, p.head_dim);
        for (int64_t d = p.head_dim; d < x.dims; ++d) to[d] = 0.0f;
      }
      narrow_weigh_rows(x.lanes, weights, x.padded, n, whole, x.dims, sum);
    }
  }
}

template <int NV, typename T>
void narrow_block(const vxl::AttentionParams& p, const BlockRows<T>& block, const NarrowState& x) {
  score_keys<NV>(p, block, x);
  float block_max[NV * kLanes];
  for (int64_t h = 0; h < x.heads; ++h) {
    float* s = x.s + h * kKeyBlock * x.padded;
    mask_scores<NV>(s, block.count, x.limits, block_max);
    softmax<NV>(s, block.count, block_max, x.m + h * x.padded, x.l + h * x.padded,
                x.alpha + h * x.padded);
  }
  weigh_values<NV>(p, block, x);
  for (int64_t h = 0; h < x.heads; ++h)
    for (int64_t lane = 0; lane < x.lanes; ++lane) {
      const Vec a = splat(x.alpha[h * x.padded + lane]);
      float* o = x.o + (h * x.lanes + lane) * x.dims;
      const float* sum = x.sum + (h * x.lanes + lane) * x.dims;
      for (int64_t d = 0; d < x.dims; d += kLanes) store(o + d, load(o + d) * a + load(sum + d));
    }
}

// Sets q, o, m and l of a piece. The scale is in q.
template <typename T>
void start_narrow(const vxl::AttentionParams& p, const vxl::AttentionPlan& plan,
                  const vxl::Piece& piece, const TileRow* rows, const NarrowState& x,
                  float* workspace) {
  const float scale = p.scale * kLog2e;
  std::memset(x.q, 0, x.heads * p.head_dim * x.padded * sizeof(float));
  std::memset(x.o, 0, x.heads * x.lanes * x.dims * sizeof(float));
  std::memset(x.l, 0, x.heads * x.padded * sizeof(float));
  for (int64_t i = 0; i < x.heads * x.padded; ++i) x.m[i] = -INFINITY;
  for (int64_t h = 0; h < x.heads; ++h) {
    for (int64_t lane = 0; lane < x.lanes; ++lane) {
      const TileRow& row = rows[lane / plan.group];
      const int64_t head = (piece.kv_head + h) * plan.group + lane % plan.group;
      const T* from = row_at<const T>(p.q, row, head);
      float* to = x.q + h * p.head_dim * x.padded + lane;
      for (int64_t d = 0; d < p.head_dim; ++d) to[d * x.padded] = to_float(from[d]) * scale;
      if (!piece.resumes) continue;
      const float* left = partial_at(p, plan, piece, row, head, workspace);
      std::memcpy(x.o + (h * x.lanes + lane) * x.dims, left, p.head_dim * sizeof(float));
      x.m[h * x.padded + lane] = left[p.head_dim];
      x.l[h * x.padded + lane] = left[p.head_dim + 1];
    }
  }
}

template <typename T>
void narrow_piece(const vxl::AttentionParams& p, const vxl::AttentionPlan& plan,
                  const vxl::Piece& piece, float* scratch, float* workspace) {
  NarrowState x;
  x.heads = piece.kv_heads;
  x.lanes = piece.rows * plan.group;
  x.padded = round_up(x.lanes, kLanes);
  x.dims = round_up(p.head_dim, kLanes);
  auto take = [&scratch](int64_t n) { float* to = scratch; scratch += n; return to; };
  x.q = take(x.heads * p.head_dim * x.padded);
  for (float** to : {&x.o, &x.sum}) *to = take(x.heads * x.lanes * x.dims);
  x.s = take(x.heads * kKeyBlock * x.padded);
  for (float** to : {&x.m, &x.l, &x.alpha}) *to = take(x.heads * x.padded);
  x.staged = take(kNarrowKeys * x.dims);
  x.limits = reinterpret_cast<int32_t*>(take(x.padded));
  TileRow* const rows = reinterpret_cast<TileRow*>(scratch);
  find_rows(p, plan, piece, rows);
  start_narrow<T>(p, plan, piece, rows, x, workspace);

  const vxl::Member& first = plan.members[piece.member];
  const KeyStream<T> stream(p, first.sequence, piece.kv_head, first.chunk);
  HeadRows found[2][kKeyBlock];
  int side = 0;
  stream.find(piece.begin, min_(kKeyBlock, piece.end - piece.begin), found[side]);
  for (int64_t key = piece.begin; key < piece.end; key += kKeyBlock, side ^= 1) {
    const int64_t count = min_(kKeyBlock, piece.end - key);
    const int64_t next_count = max_(0, min_(kKeyBlock, piece.end - key - kKeyBlock));
    stream.find(key + kKeyBlock, next_count, found[side ^ 1]);
    for (int64_t lane = 0; lane < x.padded; ++lane) {
      const TileRow& row = rows[min_(lane, x.lanes - 1) / plan.group];
      x.limits[lane] = int32_t(min_(count, max_(0, row.bound - key)));
    }
    const BlockRows<T> block{found[side], found[side ^ 1], count, next_count};
    if (x.padded == kLanes) {
      narrow_block<1>(p, block, x);
    } else {
      narrow_block<kNarrowVecs>(p, block, x);
    }
  }

  for (int64_t h = 0; h < x.heads; ++h)
    for (int64_t lane = 0; lane < x.lanes; ++lane)
      leave_row<T>(p, plan, piece, rows[lane / plan.group],
                   (piece.kv_head + h) * plan.group + lane % plan.group,
                   Partial{x.o + (h * x.lanes + lane) * x.dims, x.m[h * x.padded + lane],
                           x.l[h * x.padded + lane]},
                   workspace);
}

}  // namespace
