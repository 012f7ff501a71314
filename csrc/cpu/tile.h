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

// Register tile: kRows broadcasts x kCols vectors of accumulators, the rest for operands.
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

// s[keys][NV lanes] = K q, with -inf where key >= limits[lane]; block_max[NV lanes] of it.
// k: [keys][head_dim], keys a multiple of kRows; q: [head_dim][NV lanes]; limits ascend.
template <int NV>
VXL_NOINLINE void scores(const float* k, int64_t keys, const float* q, int64_t head_dim,
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
    multiply<NV>(k + key * head_dim, 1, head_dim, q, head_dim, acc);
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
        store(s + ((key + i) * NV + j) * kLanes, acc[i][j]);
        top[j] = vmax(acc[i][j], top[j]);
      }
  }
  for (int j = 0; j < NV; ++j) store(block_max + j * kLanes, top[j]);
}

// s = 2^(s - max), in place; moves the running maximum m and sum l of the lanes and
// writes alpha, by which what was accumulated before has to be scaled.
template <int NV>
VXL_NOINLINE void softmax(float* s, int64_t keys, const float* block_max, float* m, float* l,
                          float* alpha) {
  Vec pivot[NV], sum[NV];
  for (int j = 0; j < NV; ++j) {
    const Vec before = load(m + j * kLanes);
    const Vec now = vmax(load(block_max + j * kLanes), before);
    // A lane that has seen nothing yet keeps a finite pivot: -inf - -inf would be NaN.
    pivot[j] = now == splat(-INFINITY) ? Vec{} : now;
    const Vec a = exp2v(before - pivot[j]);
    store(alpha + j * kLanes, a);
    store(m + j * kLanes, now);
    store(l + j * kLanes, load(l + j * kLanes) * a);
    sum[j] = Vec{};
  }
#pragma GCC unroll 4
  for (int64_t key = 0; key < keys; ++key)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      float* p = s + (key * NV + j) * kLanes;
      const Vec e = exp2v(load(p) - pivot[j]);
      sum[j] += e;
      store(p, e);
    }
  for (int j = 0; j < NV; ++j) store(l + j * kLanes, load(l + j * kLanes) + sum[j]);
}

// o[head_dim][NV lanes] = o * alpha + V^T p; v in panels [head_dim / kRows][kKeyBlock][kRows].
// The block is summed on its own before it joins o: adding key by key to the long sum loses
// five times the accuracy at 8100 keys.
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

// State of one column group of NV vectors; q and o are panels [dims][NV lanes].
struct Lanes {
  const float* q;
  float* o;
  float* m;
  float* l;
  const int32_t* limits;  // keys of this block that each lane sees, ascending
};

template <int NV>
void attend_block(const float* k, const float* v, int64_t keys, int64_t k_dims, int64_t v_dims,
                  const Lanes& lanes, float* s, Prefetch& prefetch) {
  const int64_t seen = min_(keys, lanes.limits[NV * kLanes - 1]);
  if (seen <= 0) return;
  const int64_t padded = round_up(seen, kRows);
  float block_max[NV * kLanes], alpha[NV * kLanes];
  scores<NV>(k, padded, lanes.q, k_dims, lanes.limits, s, block_max, prefetch);
  softmax<NV>(s, padded, block_max, lanes.m, lanes.l, alpha);
  accumulate<NV>(v, padded, s, v_dims, alpha, lanes.o);
}

}  // namespace
