// One SIMD vector of floats for the instruction set that this file is compiled for.
//
// The vector extensions of GCC and Clang let us write the kernels once and compile them for
// AVX-512, AVX2 and the baseline (SSE2 or NEON). Intrinsics appear only where the compilers miss an
// instruction; those on pairs of bf16 are in pair_ops.h. Only the per-ISA units may include this
// file. It is all in an anonymous namespace, so the linker cannot pick a symbol compiled for
// AVX-512 and run it on an older machine.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#define VXL_INLINE inline __attribute__((always_inline))
#define VXL_LAMBDA_INLINE __attribute__((always_inline))
#define VXL_NOINLINE __attribute__((noinline))

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IVec __attribute__((vector_size(kLanes * 4)));
typedef uint16_t HVec __attribute__((vector_size(kLanes * 2)));
typedef float VecU __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint16_t HVecU __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));

VXL_INLINE Vec load(const float* p) { return *reinterpret_cast<const VecU*>(p); }
VXL_INLINE void store(float* p, Vec v) { *reinterpret_cast<VecU*>(p) = v; }

VXL_INLINE Vec splat(float x) {
#if defined(__AVX512F__)
  return (Vec)_mm512_set1_ps(x);
#elif defined(__AVX2__)
  return (Vec)_mm256_set1_ps(x);
#else
  return Vec{x, x, x, x};
#endif
}

VXL_INLINE IVec isplat(int32_t x) { return x - IVec{}; }

// max(a, b); b where either is NaN.
VXL_INLINE Vec vmax(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

// 2^x with a relative error below 2e-7. Gives 0 below -126 (and for -inf); NaN stays NaN.
// Minimax polynomial of degree 5 on [-0.5, 0.5]; degree 4 has an error of 4e-6.
// Meant for x <= 0 (softmax), valid for x < 127.
VXL_INLINE Vec exp2v(Vec x) {
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec shifted = x + magic;
  const Vec f = x - (shifted - magic);
  Vec p = splat(1.326472033e-3f);
  p = p * f + splat(9.671512991e-3f);
  p = p * f + splat(5.550733581e-2f);
  p = p * f + splat(2.402224243e-1f);
  p = p * f + splat(6.931470037e-1f);
  p = p * f + splat(1.0f);
#if defined(__AVX512F__)
  const __mmask16 keep = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  return (Vec)_mm512_maskz_scalef_ps(keep, (__m512)p, (__m512)(shifted - magic));
#else
  const IVec bits = ((IVec)shifted << 23) + (IVec)p;
  const IVec zero = x < splat(-126.0f), nan = x != x;
  return (Vec)((bits & ~(zero | nan)) | ((IVec)x & nan));
#endif
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define VXL_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#endif
#endif
#ifndef VXL_SHUFFLE
#define VXL_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, IVec{__VA_ARGS__})
#endif

// A butterfly step at distance S takes rows a = i and b = i + S and exchanges lane blocks of length
// S. `low` interleaves the even blocks of a and b, `high` their odd blocks.
template <int S, int... Lane>
VXL_INLINE Vec low_blocks(Vec a, Vec b, std::integer_sequence<int, Lane...>) {
  return VXL_SHUFFLE(a, b, (Lane & S ? kLanes + Lane - S : Lane)...);
}
template <int S, int... Lane>
VXL_INLINE Vec high_blocks(Vec a, Vec b, std::integer_sequence<int, Lane...>) {
  return VXL_SHUFFLE(a, b, (Lane & S ? kLanes + Lane : Lane + S)...);
}
template <int S, int... Lane>
VXL_INLINE Vec swap_lanes(Vec x, std::integer_sequence<int, Lane...>) {  // lane i gets lane i ^ S
  return VXL_SHUFFLE(x, x, (Lane ^ S)...);
}
using EachLane = std::make_integer_sequence<int, kLanes>;

// Transposes a kLanes x kLanes block in place.
template <int S = kLanes / 2>
VXL_INLINE void transpose(Vec* rows) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & S) continue;
    const Vec a = rows[i], b = rows[i + S];
    rows[i] = low_blocks<S>(a, b, EachLane{});
    rows[i + S] = high_blocks<S>(a, b, EachLane{});
  }
  if constexpr (S > 1) transpose<S / 2>(rows);
}

// Lane i of the result is the sum of all lanes of rows[i]. Overwrites rows.
template <int S = kLanes / 2>
VXL_INLINE Vec sum_each(Vec* rows) {
#pragma GCC unroll 8
  for (int i = 0; i < S; ++i) {
    rows[i] = low_blocks<S>(rows[i], rows[i + S], EachLane{}) +
              high_blocks<S>(rows[i], rows[i + S], EachLane{});
  }
  if constexpr (S > 1) return sum_each<S / 2>(rows);
  return rows[0];
}

#if defined(__AVX512F__)
// Transposes the four words in each 128 bits of four vectors.
VXL_INLINE void transpose_fours(const __m512 (&y)[4], __m512 (&x)[4]) {
  const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(y[0], y[1]));
  const __m512d b = _mm512_castps_pd(_mm512_unpacklo_ps(y[2], y[3]));
  const __m512d c = _mm512_castps_pd(_mm512_unpackhi_ps(y[0], y[1]));
  const __m512d d = _mm512_castps_pd(_mm512_unpackhi_ps(y[2], y[3]));
  x[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
  x[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
  x[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(c, d));
  x[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(c, d));
}

// x[j] gets word `at + j` of each of kLanes rows, a row in each lane.
VXL_INLINE void four_columns(const float* const* rows, int64_t at, Vec (&x)[4]) {
  // On Intel's processors, an insert from memory can use either vector port, a shuffle only one.
  __m512 y[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    y[i] = _mm512_castps128_ps512(_mm_loadu_ps(rows[i] + at));
    y[i] = _mm512_insertf32x4(y[i], _mm_loadu_ps(rows[4 + i] + at), 1);
    y[i] = _mm512_insertf32x4(y[i], _mm_loadu_ps(rows[8 + i] + at), 2);
    y[i] = _mm512_insertf32x4(y[i], _mm_loadu_ps(rows[12 + i] + at), 3);
  }
  __m512 z[4];
  transpose_fours(y, z);
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) x[j] = (Vec)z[j];
}

// Transposes eight vectors: row i of to[kLanes][kLanes] gets lane i of each, then zeros.
VXL_INLINE void store_columns(const Vec (&x)[8], float* to) {
#pragma GCC unroll 2
  for (int h = 0; h < 2; ++h) {
    const __m512 y[4] = {(__m512)x[4 * h], (__m512)x[4 * h + 1], (__m512)x[4 * h + 2],
                         (__m512)x[4 * h + 3]};
    __m512 z[4];
    transpose_fours(y, z);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      float* const at = to + i * kLanes + 4 * h;
      _mm_storeu_ps(at, _mm512_castps512_ps128(z[i]));
      _mm_storeu_ps(at + 4 * kLanes, _mm512_extractf32x4_ps(z[i], 1));
      _mm_storeu_ps(at + 8 * kLanes, _mm512_extractf32x4_ps(z[i], 2));
      _mm_storeu_ps(at + 12 * kLanes, _mm512_extractf32x4_ps(z[i], 3));
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) _mm256_storeu_ps(to + i * kLanes + 8, _mm256_setzero_ps());
}
#endif

// ---- storage types ---------------------------------------------------------------

struct Bf16 { uint16_t bits; };
struct F16 { uint16_t bits; };

VXL_INLINE float as_float(uint32_t u) { float f; std::memcpy(&f, &u, 4); return f; }
VXL_INLINE uint32_t as_bits(float f) { uint32_t u; std::memcpy(&u, &f, 4); return u; }

VXL_INLINE float to_float(float x) { return x; }
VXL_INLINE float to_float(Bf16 x) { return as_float(uint32_t(x.bits) << 16); }
VXL_INLINE float to_float(F16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return as_float(sign | 0x7f800000u | (magnitude << 13));
  // Scaling by 2^112 moves the exponent bias from 15 to 127. It is right for subnormals too.
  return as_float(sign | as_bits(as_float(magnitude << 13) * 5.192296858534828e33f));
}

VXL_INLINE void from_float(float x, float* p) { *p = x; }
VXL_INLINE void from_float(float x, Bf16* p) {  // round to nearest even
  const uint32_t u = as_bits(x);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  p->bits = uint16_t(x != x ? (u >> 16) | 0x40u : rounded);
}
VXL_INLINE void from_float(float x, F16* p) {  // round to nearest even
  const uint32_t u = as_bits(x), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  uint32_t h;
  if (magnitude > 0x7f800000u) h = 0x7e00u;                     // NaN
  else if (magnitude >= 0x47800000u) h = 0x7c00u;               // overflow or inf
  else if (magnitude < 0x38800000u) {                           // subnormal: the addition rounds
    h = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000u;
  } else h = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  p->bits = uint16_t(sign | h);
}

VXL_INLINE Vec load_as_float(const float* p) { return load(p); }
VXL_INLINE Vec load_as_float(const Bf16* p) {
  const HVec h = *reinterpret_cast<const HVecU*>(p);
  return (Vec)(__builtin_convertvector(h, IVec) << 16);
}
VXL_INLINE Vec load_as_float(const F16* p) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Vec v;
  for (int i = 0; i < kLanes; ++i) v[i] = to_float(p[i]);
  return v;
#endif
}

// Of a vector of two bf16 each: the first ones as floats, and the second ones.
VXL_INLINE Vec even_of(Vec pairs) { return (Vec)((IVec)pairs << 16); }
VXL_INLINE Vec odd_of(Vec pairs) { return (Vec)((IVec)pairs & isplat(int32_t(0xffff0000u))); }

VXL_INLINE void store_from_float(float* p, Vec v) { store(p, v); }
VXL_INLINE void store_from_float(Bf16* p, Vec v) {
  const IVec u = (IVec)v;
  const IVec rounded = ((u + isplat(0x7fff) + ((u >> 16) & isplat(1))) >> 16);
  const IVec nan = v != v;
  const IVec out = (nan & ((u >> 16) | isplat(0x40))) | (~nan & rounded);
  *reinterpret_cast<HVecU*>(p) = __builtin_convertvector(out, HVec);
}
VXL_INLINE void store_from_float(F16* p, Vec v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) from_float(v[i], p + i);
#endif
}

// Copies n values as floats, for any n.
template <typename T>
VXL_INLINE void load_row(const T* src, float* dst, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(dst + i, load_as_float(src + i));
  for (; i < n; ++i) dst[i] = to_float(src[i]);
}

VXL_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
VXL_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
// Not std::min and std::max: the linker keeps one copy of such a function, which may be the one
// compiled for AVX-512.
VXL_INLINE int64_t min_(int64_t a, int64_t b) { return a < b ? a : b; }
VXL_INLINE int64_t max_(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace
