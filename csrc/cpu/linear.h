// A product of few rows whose rows do not know one another: y = x W^T + b, W (out, in) as stored.
//
// A sum of products runs over `in` in one order, whatever the number of rows: lanes hold every
// kLanes-th product (of pairs, with bf16 operands), and a tree adds the lanes at the end. A tile of
// outputs and rows only says which sums run at the same time. So neither the rows of a call nor its
// threads change a bit of a row. A weight comes from memory once: all rows pass over a block of
// kLinearOuts of its rows while the block is in the nearest cache. Meanwhile each pass fetches a part
// of the next block into L2, so that memory and products are busy at the same time.
//
// x is copied once, to rows whose length is a multiple of a vector, zeros at the end.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace {

using vxl::LinearKernel;
using vxl::LinearParams;

// A register tile: kLinearOuts rows of W times kLinearRows rows of x.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kLinearOuts = 4, kLinearRows = 6;  // 24 of 32 registers accumulate
#else
constexpr int kLinearOuts = 4, kLinearRows = 2;  // 8 of 16
#endif
constexpr int64_t kLinearTask = 64;  // outputs of a task
constexpr int64_t kLinearNear = 1024;  // bytes of a row of W that are fetched from L2 in advance

// Multiplies in float32. W of another type is converted in registers, x beforehand.
template <typename T>
struct FloatDot {
  using Weight = T;
  using Packed = float;
  using Operand = Vec;
  static constexpr int64_t kStep = kLanes;

  static VXL_INLINE Vec weight(const T* w) { return load_as_float(w); }
  static VXL_INLINE Vec row(const float* x) { return load(x); }
  static VXL_INLINE Vec add(Vec sum, Vec w, Vec x) { return sum + w * x; }
  static void pack(const T* x, int64_t n, float* to) { load_row(x, to, n); }
};

// What to fetch while a tile is computed: `bytes` of each of kLinearOuts rows every `every` steps.
struct LinearAhead {
  const char* rows[kLinearOuts];
  int64_t bytes, every, left = 0;

  VXL_INLINE void step() {
    if (left-- > 0) return;
    left = every - 1;
#pragma GCC unroll 8
    for (int o = 0; o < kLinearOuts; ++o) {
      __builtin_prefetch(rows[o], 0, 2);
      rows[o] += bytes;
    }
  }
};

// The sum of all lanes, halves first.
template <int S = kLanes / 2>
VXL_INLINE float sum_lanes(Vec v) {
  v += swap_lanes<S>(v, EachLane{});
  if constexpr (S > 1) return sum_lanes<S / 2>(v);
  return v[0];
}

template <typename Dot>
int64_t linear_packed(int64_t in) {  // of a row of x, in floats
  return round_up(in, Dot::kStep) * int64_t(sizeof(typename Dot::Packed)) / 4;
}

template <typename Dot>
void linear_pack(const LinearParams& p, int64_t row, float* packed) {
  using T = typename Dot::Weight;
  const int64_t floats = linear_packed<Dot>(p.in);
  std::memset(packed, 0, floats * sizeof(float));
  Dot::pack(static_cast<const T*>(p.x) + row * p.x_row, p.in,
            reinterpret_cast<typename Dot::Packed*>(packed));
}

// sums[o][r] for kLinearOuts rows of W and NR rows of x.
template <typename Dot, int NR>
VXL_NOINLINE void linear_tile(const typename Dot::Weight* const (&w)[kLinearOuts],
                              const typename Dot::Packed* x, int64_t x_stride, int64_t in,
                              LinearAhead ahead, float (&sums)[kLinearOuts][kLinearRows]) {
  using T = typename Dot::Weight;
  Vec acc[kLinearOuts][NR];
#pragma GCC unroll 8
  for (int o = 0; o < kLinearOuts; ++o)
#pragma GCC unroll 8
    for (int r = 0; r < NR; ++r) acc[o][r] = Vec{};
  int64_t k = 0;
  const auto step = [&](const T* const (&from)[kLinearOuts], int64_t at) VXL_LAMBDA_INLINE {
    typename Dot::Operand wv[kLinearOuts];
#pragma GCC unroll 8
    for (int o = 0; o < kLinearOuts; ++o) wv[o] = Dot::weight(from[o] + at);
#pragma GCC unroll 8
    for (int r = 0; r < NR; ++r) {
      const typename Dot::Operand xv = Dot::row(x + r * x_stride + k);
#pragma GCC unroll 8
      for (int o = 0; o < kLinearOuts; ++o) acc[o][r] = Dot::add(acc[o][r], wv[o], xv);
    }
  };
  for (; k + Dot::kStep <= in; k += Dot::kStep) {
    ahead.step();
    if (ahead.every > 1) {  // this block is in L2 by now, but too large to stay in L1
#pragma GCC unroll 8
      for (int o = 0; o < kLinearOuts; ++o) {
        __builtin_prefetch(reinterpret_cast<const char*>(w[o] + k) + kLinearNear, 0, 3);
      }
    }
    step(w, k);
  }
  if (k < in) {
    T tail[kLinearOuts][Dot::kStep] = {};
    const T* rows[kLinearOuts];
    for (int o = 0; o < kLinearOuts; ++o) {
      std::memcpy(tail[o], w[o] + k, (in - k) * sizeof(T));
      rows[o] = tail[o];
    }
    step(rows, 0);
  }
  for (int o = 0; o < kLinearOuts; ++o)
    for (int r = 0; r < NR; ++r) sums[o][r] = sum_lanes(acc[o][r]);
}

template <typename Dot, int NR = kLinearRows>
VXL_INLINE void linear_rows(int64_t rows, const typename Dot::Weight* const (&w)[kLinearOuts],
                            const typename Dot::Packed* x, int64_t x_stride, int64_t in,
                            const LinearAhead& ahead,
                            float (&sums)[kLinearOuts][kLinearRows]) {
  if (rows >= NR) {
    linear_tile<Dot, NR>(w, x, x_stride, in, ahead, sums);
  } else if constexpr (NR > 1) {
    linear_rows<Dot, NR - 1>(rows, w, x, x_stride, in, ahead, sums);
  }
}

// Writes n neighbouring outputs of a row: sums and bias, rounded once.
template <typename T>
VXL_INLINE void linear_store(const LinearParams& p, int64_t row, int64_t out, int64_t n,
                             const float* sums) {
  const T* bias = p.bias == nullptr ? nullptr : static_cast<const T*>(p.bias) + out;
  T* y = static_cast<T*>(p.y) + row * p.y_row + out;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Vec sum = load(sums + i);
    store_from_float(y + i, bias == nullptr ? sum : sum + load_as_float(bias + i));
  }
  for (; i < n; ++i) from_float(bias == nullptr ? sums[i] : sums[i] + to_float(bias[i]), y + i);
}

template <typename Dot>
void linear_task(const LinearParams& p, int64_t task, float* /*scratch*/, const float* packed) {
  using T = typename Dot::Weight;
  using Packed = typename Dot::Packed;
  const int64_t stride = round_up(p.in, Dot::kStep);
  const Packed* x = reinterpret_cast<const Packed*>(packed);
  const T* weight = static_cast<const T*>(p.weight);
  const int64_t end = min_(p.out, (task + 1) * kLinearTask);
  for (int64_t out = task * kLinearTask; out < end; out += kLinearOuts) {
    const int64_t n = min_(kLinearOuts, end - out);
    const T* w[kLinearOuts];
    for (int64_t o = 0; o < kLinearOuts; ++o) {  // past the last one, the last one again
      w[o] = weight + min_(out + o, p.out - 1) * p.weight_row;
    }
    const int64_t passes = ceil_div(p.rows, kLinearRows);
    const int64_t bytes = p.in * int64_t(sizeof(T));
    for (int64_t row = 0; row < p.rows; row += kLinearRows) {
      LinearAhead ahead;
      ahead.bytes = Dot::kStep * int64_t(sizeof(T));
      ahead.every = passes;
      for (int64_t o = 0; o < kLinearOuts; ++o) {
        const T* const next = weight + min_(out + kLinearOuts + o, p.out - 1) * p.weight_row;
        ahead.rows[o] = reinterpret_cast<const char*>(next) + row / kLinearRows * bytes / passes;
      }
      float sums[kLinearOuts][kLinearRows];
      const int64_t rows = min_(kLinearRows, p.rows - row);
      linear_rows<Dot>(rows, w, x + row * stride, stride, p.in, ahead, sums);
      for (int64_t r = 0; r < rows; ++r) {
        float of_row[kLinearOuts];
        for (int64_t o = 0; o < kLinearOuts; ++o) of_row[o] = sums[o][r];
        linear_store<T>(p, row + r, out, n, of_row);
      }
    }
  }
}

template <typename Dot>
constexpr LinearKernel linear_kernel() {
  return {1, kLinearTask, 0, linear_packed<Dot>, linear_pack<Dot>, linear_task<Dot>};
}

}  // namespace
