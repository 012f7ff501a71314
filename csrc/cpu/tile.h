// One key block against one column group: S^T = K Q^T, softmax, O^T += V^T P^T.
//
// Everything is transposed: the lanes of a vector are query rows (the heads of one KV head
// side by side), keys and head dimensions are the broadcast operands. So K and V need no
// transposition, the softmax runs down the lanes without horizontal steps, P^T lies ready
// for the second product, and masking a causal edge is one compare a vector.
//
// Measured on a Zen 5 core (AVX-512, FMA peak 227 GFLOP/s): both products 225 to 230
// GFLOP/s from L2, softmax 5 cycles a vector. The three steps stay out of line: inlined
// into the tile loop GCC 12 spills the vectors of `multiply` and loses a third.
#pragma once

#include <math.h>

#include "key_stream.h"
#include "simd.h"

namespace {

// Register tile: kRows broadcasts x kCols vectors accumulate. The other registers hold operands.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRows = 8, kCols = 3;  // 24 of 32 registers accumulate
#elif defined(__AVX2__)
constexpr int kRows = 4, kCols = 3;  // 12 of 16
#else
constexpr int kRows = 4, kCols = 2;  // 8 of 16; SSE2 needs temporaries for multiply-add
#endif

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// acc[i][j] += sum over k of a[k * k_stride + i * i_stride] * b[k][j].
template <int NV>
VXL_INLINE void multiply(const float* a, int64_t k_stride, int64_t i_stride, const float* b,
                         int64_t n, Vec (&acc)[kRows][NV]) {
  for (int64_t k = 0; k < n; ++k) {
    Vec bv[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) bv[j] = load(b + (k * NV + j) * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const Vec av = splat(a[k * k_stride + i * i_stride]);
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) acc[i][j] += av * bv[j];
    }
  }
}

// A score is the sum of this many partial sums, each over as many dimensions (the last over what is
// left). One sum over all dimensions had up to 2.5 times the error that vxl_kernels/testing.py
// allows in calls of a few rows. With four parts it has at most 0.85 of it. In prefill this step is
// 3 % slower. Every float32 kernel takes these parts, so that a row has the same bits in all of
// them.
constexpr int64_t kScoreParts = 4;
VXL_INLINE int64_t score_part(int64_t head_dim) { return ceil_div(head_dim, kScoreParts); }

// s[keys][NV lanes] = K q, and -inf where key >= limits[lane]. block_max[NV lanes] gets the maximum
// of each lane. k is [keys][dims], with keys a multiple of kRows. q is [dims][NV lanes]. part:
// dimensions of a partial sum. limits ascend.
template <int NV>
VXL_NOINLINE void scores(const float* k, int64_t keys, const float* q, int64_t dims, int64_t part,
                         const int32_t* limits, float* s, float* block_max, Prefetch& prefetch) {
  Vec top[NV];
  IVec limit[NV];
  for (int j = 0; j < NV; ++j) {
    top[j] = splat(-INFINITY);
    std::memcpy(&limit[j], limits + j * kLanes, sizeof(IVec));
  }
  for (int64_t key = 0; key < keys; key += kRows) {
    Vec acc[kRows][NV];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) acc[i][j] = Vec{};
    prefetch.touch();
    float* const to = s + key * NV * kLanes;
    for (int64_t d = 0;;) {
      multiply<NV>(k + key * dims + d, 1, dims, q + d * NV * kLanes, min_(part, dims - d), acc);
      if (d > 0) {
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
          for (int j = 0; j < NV; ++j) acc[i][j] += load(to + (i * NV + j) * kLanes);
      }
      d += part;
      if (d >= dims) break;
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) {
          store(to + (i * NV + j) * kLanes, acc[i][j]);
          acc[i][j] = Vec{};
        }
    }
    if (key + kRows > limits[0]) {  // the edge of the mask crosses these keys
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j)
          acc[i][j] = limit[j] > isplat(int32_t(key) + i) ? acc[i][j] : splat(-INFINITY);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) {
        store(to + (i * NV + j) * kLanes, acc[i][j]);
        top[j] = vmax(acc[i][j], top[j]);
      }
  }
  for (int j = 0; j < NV; ++j) store(block_max + j * kLanes, top[j]);
}

// Sets s to -inf where key >= limits[lane]. block_max[NV lanes] gets the maximum of each lane.
template <int NV>
VXL_NOINLINE void mask_scores(float* s, int64_t keys, const int32_t* limits, float* block_max) {
  Vec top[NV];
  IVec limit[NV];
  for (int j = 0; j < NV; ++j) {
    top[j] = splat(-INFINITY);
    std::memcpy(&limit[j], limits + j * kLanes, sizeof(IVec));
  }
  const int64_t free = min_(keys, limits[0]);  // limits ascend
#pragma GCC unroll 4
  for (int64_t key = 0; key < free; ++key)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) top[j] = vmax(load(s + (key * NV + j) * kLanes), top[j]);
  for (int64_t key = max_(free, 0); key < keys; ++key)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      float* const at = s + (key * NV + j) * kLanes;
      const Vec x = limit[j] > isplat(int32_t(key)) ? load(at) : splat(-INFINITY);
      store(at, x);
      top[j] = vmax(x, top[j]);
    }
  for (int j = 0; j < NV; ++j) store(block_max + j * kLanes, top[j]);
}

// s = 2^(s - max), in place. Updates each lane's running maximum m and running sum l. alpha gets
// the factor by which the caller must scale the output accumulated so far.
template <int NV>
VXL_NOINLINE void softmax(float* s, int64_t keys, const float* block_max, float* m, float* l,
                          float* alpha) {
  Vec row_ref[NV], sum[NV];
  for (int j = 0; j < NV; ++j) {
    const Vec old_max = load(m + j * kLanes);
    const Vec new_max = vmax(load(block_max + j * kLanes), old_max);
    // A lane that has seen no key subtracts 0 instead: -inf - -inf would be NaN.
    row_ref[j] = new_max == splat(-INFINITY) ? Vec{} : new_max;
    const Vec a = exp2v(old_max - row_ref[j]);
    store(alpha + j * kLanes, a);
    store(m + j * kLanes, new_max);
    store(l + j * kLanes, load(l + j * kLanes) * a);
    sum[j] = Vec{};
  }
#pragma GCC unroll 4
  for (int64_t key = 0; key < keys; ++key)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      float* p = s + (key * NV + j) * kLanes;
      const Vec e = exp2v(load(p) - row_ref[j]);
      sum[j] += e;
      store(p, e);
    }
  for (int j = 0; j < NV; ++j) store(l + j * kLanes, load(l + j * kLanes) + sum[j]);
}

// o[head_dim][NV lanes] = o * alpha + V^T p. v is in panels [head_dim / kRows][kKeyBlock][kRows].
// The block is summed by itself and then added to o. Adding every key to the long sum instead gave
// five times the error at 8100 keys.
template <int NV>
VXL_NOINLINE void accumulate(const float* v, int64_t keys, const float* p, int64_t head_dim,
                             const float* alpha, float* o) {
  Vec a[NV];
  for (int j = 0; j < NV; ++j) a[j] = load(alpha + j * kLanes);
  for (int64_t d = 0; d < head_dim; d += kRows) {
    Vec acc[kRows][NV];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) acc[i][j] = Vec{};
    multiply<NV>(v + d * kKeyBlock, kRows, 1, p, keys, acc);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) {
        float* out = o + ((d + i) * NV + j) * kLanes;
        store(out, load(out) * a[j] + acc[i][j]);
      }
  }
}

// State of one column group of NV vectors. q and o are panels [dims][NV lanes].
struct Lanes {
  const float* q;
  float* o;
  float* m;
  float* l;
  const int32_t* limits;  // how many keys of this block each lane sees, ascending
};

template <int NV>
void attend_block(const float* k, const float* v, int64_t keys, int64_t k_dims, int64_t v_dims,
                  const Lanes& lanes, float* s, Prefetch& prefetch) {
  const int64_t seen = min_(keys, lanes.limits[NV * kLanes - 1]);
  if (seen <= 0) return;
  const int64_t padded = round_up(seen, kRows);
  float block_max[NV * kLanes], alpha[NV * kLanes];
  scores<NV>(k, padded, lanes.q, k_dims, score_part(k_dims), lanes.limits, s, block_max, prefetch);
  softmax<NV>(s, padded, block_max, lanes.m, lanes.l, alpha);
  accumulate<NV>(v, padded, s, v_dims, alpha, lanes.o);
}

}  // namespace
