// The products of decode.h: one step of keys against one KV head's query rows, in float32.
//
// There are two ways to a score, and both give it the same bits. `narrow_scores` has query rows in
// the lanes, as tile.h has. With few query rows most lanes would be empty, so `few_row_scores`
// transposes keys in registers and has keys in the lanes.
#pragma once

#include <type_traits>

#include "tile.h"

namespace {

// Vectors of query rows at most: their sums stay in registers.
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int kNarrowVecs = 1;
#else
constexpr int kNarrowVecs = 2;
#endif
// Keys of a step, and for each load and store of a sum.
constexpr int64_t kNarrowKeys = kLanes == 16 ? 16 : 8;
constexpr int64_t kScoreKeys = 8;                  // keys whose scores stay in registers
constexpr int kNarrowDims = kLanes == 16 ? 2 : 1;  // vectors of dimensions with 8 rows of sums

// Rows that the steps to come will read, kNarrowKeys at most. A step prefetches two lines at a time
// between its products: with all at once, its own loads wait until the lines have arrived.
struct Ahead {
  const char* rows[kNarrowKeys];
  int64_t count = 0, bytes = 0, row = 0, at = 0;

  VXL_INLINE void two_lines() {
    if (row >= count) return;
    const char* const from = rows[row] + at;
    __builtin_prefetch(from, 0, 2);
    __builtin_prefetch(from + 64, 0, 2);  // or the first one of the next row
    at += 128;
    if (at < bytes) return;
    at = 0;
    ++row;
  }
  VXL_INLINE void rest() {
    while (row < count) two_lines();
  }
};

// s[kScoreKeys][NV lanes] = K q. q is [dims][NV lanes].
template <int NV>
VXL_NOINLINE void narrow_scores(const float* const* k, const float* q, int64_t dims, float* s,
                                Ahead& ahead) {
  const int64_t part = score_part(dims);
  for (int64_t d = 0; d < dims;) {
    const bool first = d == 0;
    Vec acc[kScoreKeys][NV];
#pragma GCC unroll 8
    for (int i = 0; i < kScoreKeys; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j) acc[i][j] = Vec{};
    for (const int64_t end = min_(d + part, dims); d < end; ++d) {
      if (d % 4 == 0) ahead.two_lines();
      Vec qv[NV];
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j) qv[j] = load(q + (d * NV + j) * kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < kScoreKeys; ++i) {
        const Vec kv = splat(k[i][d]);
#pragma GCC unroll 2
        for (int j = 0; j < NV; ++j) acc[i][j] += kv * qv[j];
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kScoreKeys; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j) {
        float* const to = s + (i * NV + j) * kLanes;
        store(to, first ? acc[i][j] : load(to) + acc[i][j]);
      }
  }
}

// -- keys in the lanes -------------------------------------------------------------------------

#if defined(__AVX512F__)
// Measured on an Intel Xeon without AMX, seven rows, K in L2: 22 ns a key in float32 and 20 ns in
// bf16, against 37 and 47 of narrow_scores. With shuffles alone for the transposition it was 30 and
// 25. AMD's processors have not been measured.

// A row of K is read as 32-bit words. Each kind of word adds its products with R query rows to acc;
// q points to what the word meets, and each of its kRows rows has kLanes lanes.
struct FloatWord {
  static constexpr int64_t kRows = 1;
  template <int R>
  static VXL_INLINE void add(Vec x, const float* q, Vec (&acc)[R]) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) acc[r] += x * splat(q[r]);
  }
};
struct TwoBf16Word {
  static constexpr int64_t kRows = 2;
  template <int R>
  static VXL_INLINE void add(Vec x, const float* q, Vec (&acc)[R]) {
    FloatWord::add(even_of(x), q, acc);
    FloatWord::add(odd_of(x), q + kLanes, acc);
  }
};

constexpr int64_t kFewRows = 8;
static_assert(kNarrowKeys == kLanes, "a step's keys fill the lanes");

// Whether few_row_scores takes so many query rows and words of K, and sums of `part` words.
VXL_INLINE bool few_rows_fit(int64_t rows, int64_t words, int64_t part) {
  return rows <= kFewRows && words % 4 == 0 && part % 4 == 0;
}

// s[kLanes keys][kLanes] = K q for R query rows, in sums of `part` words.
template <int R, typename Word>
VXL_NOINLINE void few_row_scores(const float* const* k, const float* q, int64_t words, int64_t part,
                                 float* s, Ahead& ahead) {
  Vec sum[8] = {};
  for (int64_t w = 0; w < words;) {
    const bool first = w == 0;
    Vec acc[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) acc[r] = Vec{};
    for (const int64_t end = min_(w + part, words); w < end; w += 4) {
      // Has the compiler read the rows' addresses again: they do not fit into its registers.
      asm volatile("" : : : "memory");
      Vec x[4];
      four_columns(k, w, x);
      ahead.two_lines();  // kLanes rows of `words` words are `words` lines
      ahead.two_lines();
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        Word::add(x[i], q + (w + i) * Word::kRows * kLanes, acc);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sum[r] = first ? acc[r] : sum[r] + acc[r];
  }
  store_columns(sum, s);
}

// Of rows of any type, which are read as words.
template <typename Word, typename T>
VXL_INLINE void few_row_scores(int64_t rows, const T* const* keys, const float* q, int64_t words,
                               int64_t part, float* s, Ahead& ahead) {
  const float* k[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) k[i] = reinterpret_cast<const float*>(keys[i]);
  if (rows > 7) return few_row_scores<8, Word>(k, q, words, part, s, ahead);
  if (rows > 4) return few_row_scores<7, Word>(k, q, words, part, s, ahead);
  if (rows > 2) return few_row_scores<4, Word>(k, q, words, part, s, ahead);
  if (rows > 1) return few_row_scores<2, Word>(k, q, words, part, s, ahead);
  few_row_scores<1, Word>(k, q, words, part, s, ahead);
}
#endif

// -- values ------------------------------------------------------------------------------------

// Whether a sum has the even dimensions of each 2 kLanes before the odd ones. Two vectors of bf16
// then take a shift and a mask, and no other conversion.
template <typename T>
constexpr bool kEvenOdd = kNarrowDims == 2 && std::is_same_v<T, Bf16>;

template <int C, typename T>
VXL_INLINE void load_dims(const T* from, Vec (&x)[C]) {
  if constexpr (kEvenOdd<T>) {
    static_assert(C == 2, "a sum has both vectors");
    Vec words;
    std::memcpy(&words, from, sizeof(words));
    x[0] = even_of(words);
    x[1] = odd_of(words);
  } else {
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c) x[c] = load_as_float(from + c * kLanes);
  }
}

// sum[R][dims] += p^T V over n keys, for C vectors of dimensions from `offset` on. p: [n][stride].
template <int R, int C, typename T>
VXL_INLINE void narrow_weigh_dims(const float* p, int64_t stride, int64_t n, const T* const* v,
                                  int64_t offset, int64_t dims, float* sum, Ahead& ahead) {
  Vec acc[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) acc[r][c] = load(sum + r * dims + offset + c * kLanes);
  for (int64_t i = 0; i < n; ++i) {
    ahead.two_lines();
    Vec vv[C];
    load_dims(v[i] + offset, vv);
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
                               int64_t dims, float* sum, Ahead& ahead) {
  int64_t d = 0;
  for (; d + kNarrowDims * kLanes <= dims; d += kNarrowDims * kLanes)
    narrow_weigh_dims<R, kNarrowDims>(p, stride, n, v, d, dims, sum, ahead);
  if constexpr (!kEvenOdd<T>) {
    for (; d < dims; d += kLanes) narrow_weigh_dims<R, 1>(p, stride, n, v, d, dims, sum, ahead);
  }
}

// Calls fn(number, first) for groups of 8, 7, 4, 2 and 1 of the rows, their number as a constant.
template <typename Fn>
VXL_INLINE void narrow_rows(int64_t rows, const Fn& fn) {
  for (int64_t r = 0; r < rows;) {
    const int64_t left = rows - r;
    if (left >= 8) {
      fn(std::integral_constant<int, 8>{}, r);
      r += 8;
    } else if (left == 7) {
      fn(std::integral_constant<int, 7>{}, r);
      r += 7;
    } else if (left >= 4) {
      fn(std::integral_constant<int, 4>{}, r);
      r += 4;
    } else if (left >= 2) {
      fn(std::integral_constant<int, 2>{}, r);
      r += 2;
    } else {
      fn(std::integral_constant<int, 1>{}, r);
      r += 1;
    }
  }
}

// `narrow_weigh` for any number of rows.
template <typename T>
VXL_INLINE void narrow_weigh_rows(int64_t rows, const float* p, int64_t stride, int64_t n,
                                  const T* const* v, int64_t dims, float* sum, Ahead& ahead) {
  narrow_rows(rows, [&](auto count, int64_t r) {
    narrow_weigh<decltype(count)::value>(p + r, stride, n, v, dims, sum + r * dims, ahead);
  });
}

}  // namespace
