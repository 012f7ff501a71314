// Attention of a few query rows over many keys: bound by memory, so a task walks one range
// of the cache front to back with all KV heads, and every byte is read once, in order.
// Lanes hold head dimensions here; rows and keys are blocked so that one vector load feeds
// four multiply-adds.
#pragma once

#include "finish.h"
#include "key_stream.h"
#include "plan.h"
#include "tile.h"

namespace {

constexpr int64_t kDecodeBlock = 64;  // keys; K or V of one head: 32 KiB at head_dim 128
// Accumulators of the dot products: as many as lanes, so one butterfly sums them all.
constexpr int kDotRows = kLanes == 16 ? 4 : 2;
constexpr int kDotKeys = kLanes / kDotRows;

// out[r * kDotKeys + c] = q[r] . k[c]
VXL_INLINE void dots(const float* q, const float* k, int64_t dims, float* out) {
  Vec acc[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) acc[i] = Vec{};
  for (int64_t d = 0; d < dims; d += kLanes) {
    Vec kv[kDotKeys];
#pragma GCC unroll 4
    for (int c = 0; c < kDotKeys; ++c) kv[c] = load(k + c * dims + d);
#pragma GCC unroll 4
    for (int r = 0; r < kDotRows; ++r) {
      const Vec qv = load(q + r * dims + d);
#pragma GCC unroll 4
      for (int c = 0; c < kDotKeys; ++c) acc[r * kDotKeys + c] += qv * kv[c];
    }
  }
  store(out, sum_each(acc));
}

// o[r] = o[r] * alpha[r] + sum over keys of p[r][key] * v[key], for C vectors of dims.
template <int C>
VXL_INLINE void weigh(const float* p, const float* alpha, const float* v, int64_t keys,
                      int64_t dims, float* o) {
  Vec acc[kDotRows][C];
#pragma GCC unroll 4
  for (int r = 0; r < kDotRows; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c)
      acc[r][c] = load(o + r * dims + c * kLanes) * splat(alpha[r]);
  for (int64_t key = 0; key < keys; ++key) {
    Vec vv[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) vv[c] = load(v + key * dims + c * kLanes);
#pragma GCC unroll 4
    for (int r = 0; r < kDotRows; ++r) {
      const Vec pv = splat(p[r * kDecodeBlock + key]);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) acc[r][c] += pv * vv[c];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kDotRows; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) store(o + r * dims + c * kLanes, acc[r][c]);
}

// Running softmax of one row over a block whose first `seen` keys are visible.
VXL_NOINLINE void softmax_row(float* s, int64_t seen, float* m, float* l, float* alpha) {
  for (int64_t i = seen; i < kDecodeBlock; ++i) s[i] = -INFINITY;
  Vec top = splat(*m);
  for (int64_t i = 0; i < kDecodeBlock; i += kLanes) top = vmax(load(s + i), top);
  const float now = hmax(top);
  const float pivot = now == -INFINITY ? 0.0f : now;
  Vec sum = Vec{};
  for (int64_t i = 0; i < kDecodeBlock; i += kLanes) {
    const Vec e = exp2v(load(s + i) - splat(pivot));
    store(s + i, e);
    sum += e;
  }
  float total = 0.0f;
  for (int i = 0; i < kLanes; ++i) total += sum[i];
  *alpha = exp2v(splat(*m - pivot))[0];
  *l = *l * *alpha + total;
  *m = now;
}

template <typename T>
VXL_NOINLINE void stage(const char* const* rows, int64_t keys, int64_t padded_keys,
                        int64_t head_dim, int64_t dims, float* out) {
  for (int64_t i = 0; i < keys; ++i) {
    load_row(reinterpret_cast<const T*>(rows[2 * i]), out + i * dims, head_dim);
    for (int64_t d = head_dim; d < dims; ++d) out[i * dims + d] = 0.0f;
  }
  for (int64_t i = keys; i < padded_keys; ++i)
    std::memset(out + i * dims, 0, dims * sizeof(float));
}

template <typename T>
void decode_task(const vxl::AttentionParams& p, const vxl::AttentionPlan& plan, int64_t task,
                 float* scratch, float* workspace) {
  const int64_t batch = task % p.batch, split = task / p.batch;
  const int64_t keys = vxl::sequence_keys(p, batch);
  const int64_t length = plan.split_length(keys);
  const int64_t begin = split * length, end = least(begin + length, keys);
  if (begin >= end) return;

  const int64_t rows = p.geometry.rows(), group = plan.group;
  const int64_t n = rows * group, n_pad = round_up(n, kDotRows);  // lanes of a KV head
  const int64_t dims = round_up(p.head_dim, kLanes);
  const int64_t cached = keys - rows;

  auto take = [&scratch](int64_t size) { float* x = scratch; scratch += size; return x; };
  float* q = take(p.kv_heads * n_pad * dims);
  float* o = take(p.kv_heads * n_pad * dims);
  float* staged = take(kDecodeBlock * dims);
  float* s = take(n_pad * kDecodeBlock);
  float* m = take(p.kv_heads * n_pad);
  float* l = take(p.kv_heads * n_pad);
  float* alpha = take(n_pad);

  std::memset(q, 0, p.kv_heads * n_pad * dims * sizeof(float));
  std::memset(o, 0, p.kv_heads * n_pad * dims * sizeof(float));
  for (int64_t h = 0; h < p.kv_heads; ++h) {
    for (int64_t i = 0; i < n_pad; ++i) {
      m[h * n_pad + i] = -INFINITY;
      l[h * n_pad + i] = 0.0f;
      if (i >= n) continue;
      float* out = q + (h * n_pad + i) * dims;
      load_row(static_cast<const T*>(p.q.data) + batch * p.q.batch_stride +
                   i / group * p.q.row_stride + (h * group + i % group) * p.q.head_stride,
               out, p.head_dim);
      for (int64_t d = 0; d < p.head_dim; ++d) out[d] *= p.scale * kLog2e;
    }
  }

  Ahead ahead;
  ahead.bytes = p.head_dim * int64_t(sizeof(T));
  const char* here[2 * kDecodeBlock];
  for (int64_t key = begin; key < end; key += kDecodeBlock) {
    const int64_t count = least(kDecodeBlock, end - key);
    const int64_t padded = round_up(count, kDotKeys);
    const int64_t n_next = most(0, least(kDecodeBlock, end - key - kDecodeBlock));
    for (int64_t h = 0; h < p.kv_heads; ++h) {
      const KeyStream<T> stream(p, batch, h, 0);
      stream.find(key, count, here);
      stream.find(key + kDecodeBlock, n_next, ahead.rows);
      ahead.plan(n_next, padded / kDotKeys);
      float* qh = q + h * n_pad * dims;
      float* oh = o + h * n_pad * dims;

      stage<T>(here, count, padded, p.head_dim, dims, staged);
      for (int64_t c = 0; c < padded; c += kDotKeys) {
        ahead.touch();
        for (int64_t r = 0; r < n_pad; r += kDotRows) {
          float block[kLanes];
          dots(qh + r * dims, staged + c * dims, dims, block);
          for (int i = 0; i < kDotRows; ++i)
            std::memcpy(s + (r + i) * kDecodeBlock + c, block + i * kDotKeys,
                        kDotKeys * sizeof(float));
        }
      }
      for (int64_t i = 0; i < n_pad; ++i) {
        const int64_t row = least(i, n - 1) / group;
        const int64_t seen = most(0, least(count, cached + row + 1 - key));
        softmax_row(s + i * kDecodeBlock, seen, m + h * n_pad + i, l + h * n_pad + i,
                    alpha + i);
      }
      stage<T>(here + 1, count, count, p.head_dim, dims, staged);
      for (int64_t r = 0; r < n_pad; r += kDotRows) {
        const float* w = s + r * kDecodeBlock;
        int64_t d = 0;
        for (; d + 4 * kLanes <= dims; d += 4 * kLanes)
          weigh<4>(w, alpha + r, staged + d, count, dims, oh + r * dims + d);
        for (; d < dims; d += kLanes)
          weigh<1>(w, alpha + r, staged + d, count, dims, oh + r * dims + d);
      }
    }
  }

  for (int64_t h = 0; h < p.kv_heads; ++h) {
    for (int64_t i = 0; i < n; ++i) {
      const int64_t row = i / group, head = h * group + i % group, at = h * n_pad + i;
      const Partial result{o + at * dims, m[at], l[at]};
      if (plan.splits > 1) {
        save_partial(p, plan, batch, split, row, head, result, workspace);
      } else {
        finish_row<T>(p, batch, row, head, result);
      }
    }
  }
}

}  // namespace
