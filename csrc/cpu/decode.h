// Attention of a few query rows over many keys, one vector or two of them for each KV head. Memory
// bounds it, so a piece walks one range of the cache front to back with all KV heads and reads
// every byte once, where it lies.
//
// The steps are those of tile.h in the same order for every number, so a row has the same bits here
// and in a tile: a score is summed over the dimensions in the parts of score_part, the softmax
// takes blocks of kKeyBlock keys, and the values of a block are summed key by key. Only the lanes
// differ: those of the values are head dimensions, which keeps them full, and those of the scores
// may be keys.
//
// Measured with 7 query rows and head_dim 128, from memory. Zen 5: prefetching rows in memory order
// doubles the speed. These were no faster: to prefetch every other line (the hardware does not
// fetch the rest), to read lines instead of prefetching them, to pull whole blocks into L2 first,
// to copy rows first. Zen 4: prefetches between the products instead of before them take a tenth to
// a fifth of the time away, and prefetches into L2 and further ahead another tenth in float32.
#pragma once

#include "decode_steps.h"
#include "epilogue.h"
#include "key_stream.h"
#include "plan.h"

namespace {

// The rows of a block and of the next one: which to read, and which to prefetch.
template <typename T>
struct BlockRows {
  static constexpr int64_t kDistance = sizeof(T) == 2 ? 64 : 32;  // keys
  const HeadRows *here, *next;
  int64_t count, next_count;
  int64_t heads, bytes;  // bytes of a row

  const T* k(int64_t i, int64_t head) const { return k_of(here[i], head); }
  const T* v(int64_t i, int64_t head) const { return v_of(here[i], head); }

  // What to prefetch in the step of `head` and keys [c, c + n). The steps go head by head, but rows
  // are prefetched as they lie in memory, all heads of a key together, and read in this order: K of
  // this block, its V, K of the next block.
  Ahead after_k(int64_t c, int64_t n, int64_t head) const {
    return ahead(c, n, head, [this](int64_t i, int64_t h) {
      return i < count ? k(i, h) : v(min_(i - count, count - 1), h);
    });
  }
  Ahead after_v(int64_t c, int64_t n, int64_t head) const {
    return ahead(c, n, head, [this](int64_t i, int64_t h) {
      if (i < count) return v(i, h);
      return i - count < next_count ? k_of(next[i - count], h) : v(count - 1, h);
    });
  }

 private:
  template <typename Find>
  VXL_INLINE Ahead ahead(int64_t c, int64_t n, int64_t head, const Find& find) const {
    Ahead x;
    x.count = n;
    x.bytes = bytes;
    // This step takes rows [head * n, head * n + n) of the n * heads rows of these keys.
    const uint32_t first = uint32_t(head * n), all = uint32_t(heads);
    int64_t key = c + first / all + kDistance, h = first % all;
    for (int64_t i = 0; i < n; ++i) {
      x.rows[i] = reinterpret_cast<const char*>(find(key, h));
      if (++h == heads) ++key, h = 0;
    }
    return x;
  }
  static const T* k_of(const HeadRows& x, int64_t head) {
    return reinterpret_cast<const T*>(x.k + head * x.k_step);
  }
  static const T* v_of(const HeadRows& x, int64_t head) {
    return reinterpret_cast<const T*>(x.v + head * x.v_step);
  }
};

// Calls step(key, head, rows, ahead) for the rows of K of kNarrowKeys keys and one head at a time.
// The last row takes the place of those past the end: nobody reads their scores. A step may change
// its pointers to rows. What it has not prefetched is prefetched after it.
template <typename T, typename Step>
VXL_INLINE void each_k_rows(const BlockRows<T>& block, const Step& step) {
  const T* rows[kNarrowKeys];
  for (int64_t c = 0; c < block.count; c += kNarrowKeys) {
    for (int64_t h = 0; h < block.heads; ++h) {
      for (int64_t i = 0; i < kNarrowKeys; ++i) rows[i] = block.k(min_(c + i, block.count - 1), h);
      Ahead ahead = block.after_k(c, kNarrowKeys, h);
      step(c, h, rows, ahead);
      ahead.rest();
    }
  }
}

// Calls step(key, n, head, rows, ahead) for n rows of V, kNarrowKeys at most.
template <typename T, typename Step>
VXL_INLINE void each_v_rows(const BlockRows<T>& block, const Step& step) {
  const T* rows[kNarrowKeys];
  for (int64_t c = 0; c < block.count; c += kNarrowKeys) {
    const int64_t n = min_(kNarrowKeys, block.count - c);
    for (int64_t h = 0; h < block.heads; ++h) {
      for (int64_t i = 0; i < n; ++i) rows[i] = block.v(c + i, h);
      Ahead ahead = block.after_v(c, n, h);
      step(c, n, h, rows, ahead);
      ahead.rest();
    }
  }
}

// State of the KV heads of a piece.
struct NarrowState {
  int64_t heads, lanes, padded;  // lanes: query rows; padded: whole vectors
  int64_t q_dims, dims;          // 32-bit words of a query; padded dimensions of a sum
  float *q, *o, *sum;            // q: [heads][q_dims][padded]; others: [heads][lanes][dims]
  float* s;                      // [heads][kKeyBlock][padded]
  float *m, *l, *alpha;          // [heads][padded]
  float* staged;                 // kNarrowKeys rows and more, padded
  int32_t* limits;               // [padded]

  float* scores(int64_t head, int64_t key = 0) const {
    return s + (head * kKeyBlock + key) * padded;
  }
};

// Copies a row of n values and fills it with zeros up to `dims`.
template <typename T>
VXL_INLINE const T* padded_row(const T* row, int64_t n, int64_t dims, float* staged) {
  T* const to = reinterpret_cast<T*>(staged);
  std::memcpy(to, row, n * sizeof(T));
  std::memset(to + n, 0, (dims - n) * sizeof(T));
  return to;
}

// How `narrow_piece` computes: the operands' layout, and one key block against all heads. This one
// works in float32 for every storage type. PairNarrow (pairs_decode.h) has the same members.
template <typename T>
struct FloatNarrow {
  static int64_t q_dims(int64_t head_dim) { return head_dim; }
  static int64_t dims(int64_t head_dim) {
    return round_up(head_dim, kEvenOdd<T> ? 2 * kLanes : kLanes);
  }

  float scale;
  explicit FloatNarrow(float x) : scale(x * kLog2e) {}

  void stage_query(const T* row, int64_t head_dim, float* out, int64_t stride) const {
    for (int64_t d = 0; d < head_dim; ++d) out[d * stride] = to_float(row[d]) * scale;
  }

  static int64_t place(int64_t d) {  // where a sum has dimension d
    if (!kEvenOdd<T>) return d;
    const int64_t i = d % (2 * kLanes);
    return d - i + i % 2 * kLanes + i / 2;
  }

  template <int NV>
  void attend_block(const vxl::AttentionParams& p, const BlockRows<T>& block,
                    const NarrowState& x) const {
    score_keys<NV>(p, block, x);
    float block_max[NV * kLanes];
    for (int64_t h = 0; h < x.heads; ++h) {
      mask_scores<NV>(x.scores(h), block.count, x.limits, block_max);
      softmax<NV>(x.scores(h), block.count, block_max, x.m + h * x.padded, x.l + h * x.padded,
                  x.alpha + h * x.padded);
    }
    weigh_values(p, block, x);
    for (int64_t h = 0; h < x.heads; ++h)
      for (int64_t lane = 0; lane < x.lanes; ++lane) {
        const Vec a = splat(x.alpha[h * x.padded + lane]);
        float* o = x.o + (h * x.lanes + lane) * x.dims;
        const float* sum = x.sum + (h * x.lanes + lane) * x.dims;
        for (int64_t d = 0; d < x.dims; d += kLanes) store(o + d, load(o + d) * a + load(sum + d));
      }
  }

 private:
  template <int NV>
  static void score_keys(const vxl::AttentionParams& p, const BlockRows<T>& block,
                         const NarrowState& x) {
    const int64_t dims = p.head_dim;
    [[maybe_unused]] const int64_t part = score_part(dims);
    const float* words[kNarrowKeys];
    each_k_rows(block, [&](int64_t c, int64_t h, const T** rows, Ahead& ahead) {
      const float* const q = x.q + h * dims * x.padded;
#if defined(__AVX512F__)
      if constexpr (std::is_same_v<T, Bf16>) {
        if (dims % 2 == 0 && part % 2 == 0 && few_rows_fit(x.lanes, dims / 2, part / 2)) {
          few_row_scores<TwoBf16Word>(x.lanes, rows, q, dims / 2, part / 2, x.scores(h, c), ahead);
          return;
        }
      }
#endif
      for (int64_t i = 0; i < kNarrowKeys; ++i) {
        if constexpr (std::is_same_v<T, float>) {
          words[i] = rows[i];
        } else {
          words[i] = x.staged + i * x.dims;
          load_row(rows[i], x.staged + i * x.dims, dims);
        }
      }
#if defined(__AVX512F__)
      if (few_rows_fit(x.lanes, dims, part)) {
        few_row_scores<FloatWord>(x.lanes, words, q, dims, part, x.scores(h, c), ahead);
        return;
      }
#endif
      for (int64_t i = 0; i < min_(kNarrowKeys, block.count - c); i += kScoreKeys) {
        narrow_scores<NV>(words + i, q, dims, x.scores(h, c + i), ahead);
      }
    });
  }

  static void weigh_values(const vxl::AttentionParams& p, const BlockRows<T>& block,
                           const NarrowState& x) {
    std::memset(x.sum, 0, x.heads * x.lanes * x.dims * sizeof(float));
    each_v_rows(block, [&](int64_t c, int64_t n, int64_t h, const T** rows, Ahead& ahead) {
      if (x.dims != p.head_dim) {
        // A vector load from the tensor itself could read past its end.
        for (int64_t i = 0; i < n; ++i) {
          rows[i] = padded_row(rows[i], p.head_dim, x.dims, x.staged + i * x.dims);
        }
      }
      narrow_weigh_rows(x.lanes, x.scores(h, c), x.padded, n, rows, x.dims,
                        x.sum + h * x.lanes * x.dims, ahead);
    });
  }
};

// Sets q, o, m and l of a piece.
template <typename T, typename Math>
void start_narrow(const vxl::AttentionParams& p, const vxl::AttentionPlan& plan,
                  const vxl::Piece& piece, const TileRow* rows, const Math& math,
                  const NarrowState& x, float* workspace) {
  std::memset(x.q, 0, x.heads * x.q_dims * x.padded * sizeof(float));
  std::memset(x.o, 0, x.heads * x.lanes * x.dims * sizeof(float));
  std::memset(x.l, 0, x.heads * x.padded * sizeof(float));
  for (int64_t i = 0; i < x.heads * x.padded; ++i) x.m[i] = -INFINITY;
  for (int64_t h = 0; h < x.heads; ++h) {
    for (int64_t lane = 0; lane < x.lanes; ++lane) {
      const TileRow& row = rows[lane / plan.group];
      const int64_t head = (piece.kv_head + h) * plan.group + lane % plan.group;
      math.stage_query(row_at<const T>(p.q, row, head), p.head_dim,
                       x.q + h * x.q_dims * x.padded + lane, x.padded);
      if (!piece.resumes) continue;
      const float* left = partial_at(p, plan, piece, row, head, workspace);
      float* const sum = x.o + (h * x.lanes + lane) * x.dims;
      for (int64_t d = 0; d < p.head_dim; ++d) sum[Math::place(d)] = left[d];
      x.m[h * x.padded + lane] = left[p.head_dim];
      x.l[h * x.padded + lane] = left[p.head_dim + 1];
    }
  }
}

template <typename T, typename Math>
void narrow_piece(const vxl::AttentionParams& p, const vxl::AttentionPlan& plan,
                  const vxl::Piece& piece, float* scratch, float* workspace) {
  const Math math(p.scale);
  NarrowState x;
  x.heads = piece.kv_heads;
  x.lanes = piece.rows * plan.group;
  x.padded = round_up(x.lanes, kLanes);
  x.q_dims = Math::q_dims(p.head_dim);
  x.dims = Math::dims(p.head_dim);
  auto take = [&scratch](int64_t n) { float* to = scratch; scratch += n; return to; };
  x.q = take(x.heads * x.q_dims * x.padded);
  for (float** to : {&x.o, &x.sum}) *to = take(x.heads * x.lanes * x.dims);
  x.s = take(x.heads * kKeyBlock * x.padded);
  for (float** to : {&x.m, &x.l, &x.alpha}) *to = take(x.heads * x.padded);
  x.staged = take((kNarrowKeys + 1) * x.dims);
  x.limits = reinterpret_cast<int32_t*>(take(x.padded));
  TileRow* const rows = reinterpret_cast<TileRow*>(scratch);
  find_rows(p, plan, piece, rows);
  start_narrow<T>(p, plan, piece, rows, math, x, workspace);

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
    const BlockRows<T> block{found[side], found[side ^ 1], count, next_count, x.heads,
                             p.head_dim * int64_t(sizeof(T))};
    if (x.padded == kLanes) {
      math.template attend_block<1>(p, block, x);
    } else {
      math.template attend_block<kNarrowVecs>(p, block, x);
    }
  }

  for (int64_t h = 0; h < x.heads; ++h)
    for (int64_t lane = 0; lane < x.lanes; ++lane) {
      const float* const sum = x.o + (h * x.lanes + lane) * x.dims;
      for (int64_t d = 0; d < p.head_dim; ++d) x.staged[d] = sum[Math::place(d)];
      leave_row<T>(p, plan, piece, rows[lane / plan.group],
                   (piece.kv_head + h) * plan.group + lane % plan.group,
                   Partial{x.staged, x.m[h * x.padded + lane], x.l[h * x.padded + lane]},
                   workspace);
    }
}

}  // namespace
