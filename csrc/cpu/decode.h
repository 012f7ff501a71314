// Attention of a few query rows over many keys. Memory bounds it, so a task walks one range of the
// cache front to back with all KV heads and reads every byte once.
//
// Measured on a Zen 5 core with 7 query rows and head_dim 128, in ns per key and KV head (1 KiB):
// 30 from cache; 95 from memory without prefetch, because the multiply-adds fill the reorder window
// and leave few loads in flight; 44 with rows prefetched into L1, 8 keys ahead and in memory order.
// These were no faster: to prefetch every other line (the hardware does not fetch the rest), to
// read lines instead of prefetching them, to pull whole blocks into L2 first, to copy rows first.
//
// Lanes hold head dimensions. R query rows form a block, so that each loaded vector of K or V feeds
// R multiply-adds.
#pragma once

#include "epilogue.h"
#include "key_stream.h"
#include "plan.h"
#include "tile.h"

namespace {

constexpr int64_t kDecodeBlock = 64;  // keys between two softmax steps
constexpr int64_t kWeighKeys = 8;     // keys for each load and store of O: enough to pay for both
constexpr int kMaxDotRows = kLanes == 16 ? 8 : 4;  // more would leave no registers for operands

template <typename T>
VXL_INLINE void prefetch_row(const T* row, int64_t dims) {
  const char* p = reinterpret_cast<const char*>(row);
  for (int64_t b = 0; b < dims * int64_t(sizeof(T)); b += 64) __builtin_prefetch(p + b, 0, 3);
}

// out[r * keys + c] = q[r] . k[c] for kLanes / R keys. There is one sum for each lane, so one
// butterfly reduces them all. Only the first A of the R rows are computed (28 query heads on 4 KV
// heads make 7 rows of 8). Also prefetches kLanes / R rows at `prefetch` into L1.
// Inlining would make the compiler spill registers.
template <int R, int A, typename T>
VXL_NOINLINE void dots(const float* q, const T* const* k, const T* const* prefetch, int64_t dims,
                       float* out) {
  constexpr int kKeys = kLanes / R;
  for (int c = 0; c < kKeys; ++c) prefetch_row(prefetch[c], dims);
  Vec acc[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) acc[i] = Vec{};
  for (int64_t d = 0; d < dims; d += kLanes) {
    Vec kv[kKeys];
#pragma GCC unroll 16
    for (int c = 0; c < kKeys; ++c) kv[c] = load_as_float(k[c] + d);
#pragma GCC unroll 8
    for (int r = 0; r < A; ++r) {
      const Vec qv = load(q + r * dims + d);
#pragma GCC unroll 16
      for (int c = 0; c < kKeys; ++c) acc[r * kKeys + c] += qv * kv[c];
    }
  }
  store(out, sum_each(acc));
}

// The scores of R rows keep the order in which `dots` writes them, [keys / kKeys][R][kKeys]: one
// vector a step, so that the softmax works on whole vectors too.
template <int R>
VXL_INLINE int64_t score_at(int64_t key) {
  constexpr int kKeys = kLanes / R;
  return key / kKeys * kLanes + key % kKeys;  // of row 0; row r is r * kKeys after it
}

// `weigh` for the C vectors of dims that start at `offset`.
template <int R, int A, int C, typename T>
VXL_INLINE void weigh_dims(const float* p, int64_t n, const float* alpha, const T* const* v,
                           int64_t offset, int64_t dims, float* o) {
  constexpr int kKeys = kLanes / R;
  Vec acc[A][C];
#pragma GCC unroll 8
  for (int r = 0; r < A; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c)
      acc[r][c] = load(o + r * dims + offset + c * kLanes) * splat(alpha[r * kKeys]);
  for (int64_t i = 0; i < n; ++i) {
    const float* p_key = p + score_at<R>(i);
    Vec vv[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) vv[c] = load_as_float(v[i] + offset + c * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < A; ++r) {
      const Vec pv = splat(p_key[r * kKeys]);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) acc[r][c] += pv * vv[c];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < A; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) store(o + r * dims + offset + c * kLanes, acc[r][c]);
}

// o[r] = o[r] * alpha[r] + sum over n keys of p[r][key] * v[key]. Also prefetches n rows at
// `prefetch`.
template <int R, int A, typename T>
VXL_NOINLINE void weigh(const float* p, int64_t n, const float* alpha, const T* const* v,
                        const T* const* prefetch, int64_t dims, float* o) {
  const int64_t per_step = ceil_div(n * 2 * kLanes, dims);
  int64_t fetched = 0;
  for (int64_t d = 0; d < dims; d += 2 * kLanes) {
    for (int64_t i = 0; i < per_step && fetched < n; ++i) prefetch_row(prefetch[fetched++], dims);
    if (d + 2 * kLanes <= dims) {
      weigh_dims<R, A, 2>(p, n, alpha, v, d, dims, o);
    } else {
      weigh_dims<R, A, 1>(p, n, alpha, v, d, dims, o);
    }
  }
}

// Sets the KEYS adjacent lanes of each row to their maximum.
template <int KEYS, int S = KEYS / 2>
VXL_INLINE Vec max_of_row(Vec x) {
  if constexpr (S >= 1) {
    return max_of_row<KEYS, S / 2>(vmax(x, swap_lanes<S>(x, EachLane{})));
  } else {
    return x;
  }
}

// Running softmax of R rows over `count` keys. Row r sees the first seen[r] of them. Within a row
// all lanes of m are equal, and the lanes of l are partial sums.
template <int R>
VXL_NOINLINE void softmax_rows(float* s, int64_t count, const int64_t* seen, float* m,
                               float* l, float* alpha) {
  constexpr int kKeys = kLanes / R;
  const int64_t steps = ceil_div(count, kKeys);
  IVec limit, key;
  bool masked = count % kKeys != 0;
  for (int i = 0; i < kLanes; ++i) {
    limit[i] = int32_t(seen[i / kKeys]);
    key[i] = i % kKeys;
    masked |= seen[i / kKeys] < count;
  }
  const Vec old_max = load(m);
  Vec top = old_max;
  for (int64_t i = 0; i < steps; ++i) {
    Vec x = load(s + i * kLanes);
    if (masked) {
      x = limit > key + isplat(int32_t(i * kKeys)) ? x : splat(-INFINITY);
      store(s + i * kLanes, x);
    }
    top = vmax(x, top);
  }
  top = max_of_row<kKeys>(top);
  const Vec row_ref = top == splat(-INFINITY) ? Vec{} : top;  // as in tile.h
  const Vec a = exp2v(old_max - row_ref);
  Vec sum = load(l) * a;
  for (int64_t i = 0; i < steps; ++i) {
    const Vec e = exp2v(load(s + i * kLanes) - row_ref);
    store(s + i * kLanes, e);
    sum += e;
  }
  store(alpha, a);
  store(m, top);
  store(l, sum);
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

// State of all KV heads of one sequence. Each head has `groups` groups of R query rows.
struct DecodeState {
  float *q, *o;          // [kv_heads][groups][R][dims]
  float* s;              // [kv_heads][groups][kDecodeBlock * R]
  float *m, *l, *alpha;  // [kv_heads][groups][kLanes]
  float* padded;         // operands, if head_dim is not a multiple of the vector
  int64_t groups, dims;
};

// Copies rows and pads them with zeros. If head_dim is not a multiple of the vector, a vector load
// from the tensor itself could read past its end.
template <typename T>
VXL_INLINE void pad_rows(const T* const* rows, int64_t n, int64_t head_dim, int64_t dims,
                         float* out, const float** padded) {
  for (int64_t i = 0; i < n; ++i) {
    padded[i] = out + i * dims;
    load_row(rows[i], out + i * dims, head_dim);
    for (int64_t d = head_dim; d < dims; ++d) out[i * dims + d] = 0.0f;
  }
}

template <int R, int A, typename T>
void score_keys(const vxl::AttentionParams& p, const BlockRows<T>& block,
                const DecodeState& x) {
  constexpr int kKeys = kLanes / R;
  const T *rows[kKeys], *prefetch[kKeys];
  const float* padded[kKeys];
  for (int64_t c = 0; c < block.count; c += kKeys) {
    InOrder next{p.kv_heads, c};
    for (int64_t h = 0; h < p.kv_heads; ++h) {
      for (int64_t i = 0; i < kKeys; ++i, next.step()) {
        rows[i] = block.k(min_(c + i, block.count - 1), h);  // past the end: the softmax masks it
        prefetch[i] = block.after_k(next.key, next.head);
      }
      const bool whole = x.dims == p.head_dim;
      if (!whole) pad_rows(rows, kKeys, p.head_dim, x.dims, x.padded, padded);
      for (int64_t g = h * x.groups; g < (h + 1) * x.groups; ++g) {
        const float* q = x.q + g * R * x.dims;
        float* s = x.s + g * kDecodeBlock * R + score_at<R>(c);
        if (whole) {
          dots<R, A>(q, rows, prefetch, x.dims, s);
        } else {
          dots<R, A>(q, padded, padded, x.dims, s);
        }
      }
    }
  }
}

template <int R, int A, typename T>
void weigh_values(const vxl::AttentionParams& p, const BlockRows<T>& block,
                  const DecodeState& x) {
  const T *rows[kWeighKeys], *prefetch[kWeighKeys];
  const float* padded[kWeighKeys];
  for (int64_t c = 0; c < block.count; c += kWeighKeys) {
    const int64_t n = min_(kWeighKeys, block.count - c);
    InOrder next{p.kv_heads, c};
    for (int64_t h = 0; h < p.kv_heads; ++h) {
      for (int64_t i = 0; i < n; ++i, next.step()) {
        rows[i] = block.v(c + i, h);
        prefetch[i] = block.after_v(next.key, next.head);
      }
      const bool whole = x.dims == p.head_dim;
      if (!whole) pad_rows(rows, n, p.head_dim, x.dims, x.padded, padded);
      for (int64_t g = h * x.groups; g < (h + 1) * x.groups; ++g) {
        const float* s = x.s + g * kDecodeBlock * R + score_at<R>(c);
        const float* alpha = x.alpha + g * kLanes;
        float* o = x.o + g * R * x.dims;
        if (whole) {
          weigh<R, A>(s, n, alpha, rows, prefetch, x.dims, o);
        } else {
          weigh<R, A>(s, n, alpha, padded, padded, x.dims, o);
        }
      }
    }
    if (c == 0)  // the old sums are scaled once a block
      for (int64_t i = 0; i < p.kv_heads * x.groups * kLanes; ++i) x.alpha[i] = 1.0f;
  }
}

template <int R, int A, typename T>
void decode_block(const vxl::AttentionParams& p, const BlockRows<T>& block, const int64_t* seen,
                  const DecodeState& x) {
  score_keys<R, A>(p, block, x);
  for (int64_t g = 0; g < p.kv_heads * x.groups; ++g)
    softmax_rows<R>(x.s + g * kDecodeBlock * R, block.count, seen + g % x.groups * R,
                    x.m + g * kLanes, x.l + g * kLanes, x.alpha + g * kLanes);
  weigh_values<R, A>(p, block, x);
}

template <typename T>
void decode_task(const vxl::AttentionParams& p, const vxl::AttentionPlan& plan, int64_t task,
                 float* scratch, float* workspace) {
  const int64_t batch = task % p.batch, split = task / p.batch;
  const int64_t keys = vxl::sequence_keys(p, batch);
  const int64_t length = plan.split_length(keys);
  const int64_t begin = split * length, end = min_(begin + length, keys);
  if (begin >= end) return;

  const int64_t rows = p.geometry.rows(), group = plan.group;
  const int64_t n = rows * group;  // query rows of a KV head
  int block_rows = 1;
  while (block_rows < n && block_rows < kMaxDotRows) block_rows *= 2;
  const int64_t groups = ceil_div(n, block_rows), n_pad = groups * block_rows;
  const int64_t total = p.kv_heads * n_pad, dims = round_up(p.head_dim, kLanes);

  auto take = [&scratch](int64_t size) { float* x = scratch; scratch += size; return x; };
  DecodeState x;
  x.q = take(total * dims);
  x.o = take(total * dims);
  x.s = take(total * kDecodeBlock);
  x.m = take(p.kv_heads * groups * kLanes);
  x.l = take(p.kv_heads * groups * kLanes);
  x.alpha = take(p.kv_heads * groups * kLanes);
  x.padded = take(max_(kLanes, kWeighKeys) * dims);
  x.groups = groups;
  x.dims = dims;

  std::memset(x.q, 0, total * dims * sizeof(float));
  std::memset(x.o, 0, total * dims * sizeof(float));
  for (int64_t i = 0; i < p.kv_heads * groups * kLanes; ++i) {
    x.m[i] = -INFINITY;
    x.l[i] = 0.0f;
  }
  for (int64_t h = 0; h < p.kv_heads; ++h) {
    for (int64_t i = 0; i < n; ++i) {
      float* out = x.q + (h * n_pad + i) * dims;
      load_row(static_cast<const T*>(p.q.data) + batch * p.q.batch_stride +
                   i / group * p.q.row_stride + (h * group + i % group) * p.q.head_stride,
               out, p.head_dim);
      for (int64_t d = 0; d < p.head_dim; ++d) out[d] *= p.scale * kLog2e;
    }
  }

  const KeyStream<T> stream(p, batch, 0, 0);
  HeadRows found[2][kDecodeBlock];
  int64_t seen[vxl::AttentionPlan::kDecodeRows + kMaxDotRows];
  int side = 0;
  stream.find(begin, min_(kDecodeBlock, end - begin), found[side]);
  for (int64_t key = begin; key < end; key += kDecodeBlock, side ^= 1) {
    const int64_t count = min_(kDecodeBlock, end - key);
    const int64_t next_count = max_(0, min_(kDecodeBlock, end - key - kDecodeBlock));
    stream.find(key + kDecodeBlock, next_count, found[side ^ 1]);
    const BlockRows<T> block{found[side], found[side ^ 1], count, next_count};
    for (int64_t i = 0; i < n_pad; ++i)
      seen[i] = max_(0, min_(count, stream.cached + min_(i, n - 1) / group + 1 - key));
    switch (n < kMaxDotRows ? n : block_rows) {
      case 1: decode_block<1, 1>(p, block, seen, x); break;
      case 2: decode_block<2, 2>(p, block, seen, x); break;
      case 3:
      case 4: decode_block<4, 4>(p, block, seen, x); break;
      case 7: decode_block<kMaxDotRows, kMaxDotRows - 1>(p, block, seen, x); break;
      default: decode_block<kMaxDotRows, kMaxDotRows>(p, block, seen, x);
    }
  }

  const int64_t row_lanes = kLanes / block_rows;
  for (int64_t h = 0; h < p.kv_heads; ++h) {
    for (int64_t i = 0; i < n; ++i) {
      const int64_t row = i / group, head = h * group + i % group;
      const int64_t lane = (h * n_pad + i) * row_lanes;
      float l = 0.0f;
      for (int64_t j = 0; j < row_lanes; ++j) l += x.l[lane + j];
      const Partial result{x.o + (h * n_pad + i) * dims, x.m[lane], l};
      if (plan.splits > 1) {
        save_partial(p, plan, batch, split, row, head, result, workspace);
      } else {
        finish_row<T>(p, batch, row, head, result);
      }
    }
  }
}

}  // namespace
