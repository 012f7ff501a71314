// The instructions on pairs of bf16 (see pairs.h) that AVX512_BF16 and aarch64's FEAT_BF16 have
// alike, under one name each, so that the kernels are written once.
//
// `vdpbf16ps` rounds to nearest even, and so do the conversions. It reads subnormal bf16 as 0 and
// flushes subnormal results to 0; the conversions do the same.
//
// BFDOT adds the two products of a pair first, then the sum to the lane. Both additions round to
// odd: an inexact result is cut off and its last bit set. That is wrong by less than one unit in
// the last place, in neither direction more often. Rounding to nearest is wrong by half of one at
// most. BFDOT reads subnormal bf16 as 0, flushes subnormal results to 0 and makes every NaN the
// same one, whatever FPCR says. (FPCR.EBF changes this on newer processors. A process of Linux
// starts with it off.) The conversions round to nearest even and keep subnormal numbers.
//
// BFMMLA multiplies twice as many pairs, but its operands are blocks of two rows by two pairs. The
// panels of pairs.h would have to be laid out in another way for it.
#pragma once

#include "simd.h"

#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#include <arm_neon.h>
#endif

namespace {

typedef uint32_t Pair __attribute__((may_alias));  // scratch is allocated as floats

constexpr int64_t kPackKeys = 2 * kLanes;  // keys that are transposed at once

#if defined(__AVX512BF16__)

typedef __m512bh PairVec;  // kLanes pairs

VXL_INLINE PairVec load_pairs(const void* p) { return (PairVec)_mm512_loadu_si512(p); }
VXL_INLINE void store_pairs(Pair* to, Vec v) { _mm512_storeu_si512(to, (__m512i)v); }
VXL_INLINE PairVec splat_pair(Pair x) { return (PairVec)_mm512_set1_epi32(int32_t(x)); }
VXL_INLINE PairVec pairs_of(Vec words) { return (PairVec)words; }

// Lane i gets sum[i] + a[i].low b[i].low + a[i].high b[i].high.
VXL_INLINE Vec add_products(Vec sum, PairVec a, PairVec b) {
  return (Vec)_mm512_dpbf16_ps((__m512)sum, a, b);
}

// Rounds to bf16 and makes pairs: lane i gets (low[i], high[i]).
VXL_INLINE Vec round_pairs(Vec low, Vec high) {
  alignas(64) static constexpr uint16_t kInterleave[32] = {
      0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
      8,  24, 9,  25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  return (Vec)_mm512_permutexvar_epi16(_mm512_load_si512(kInterleave), both);
}

// Rounds a vector to kLanes bf16.
VXL_INLINE void store_rounded(Pair* to, Vec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh((__m512)v));
}

// Makes pairs of two rows of 2 kLanes values: lane i of `low` and of `high` gets a value of `first`
// and the same of `second`. It works within 128 bits: of each eight values the first four go to
// `low` and the others to `high`.
VXL_INLINE void make_pairs(const Bf16* first, const Bf16* second, PairVec& low, PairVec& high) {
  const __m512i even = _mm512_loadu_si512(first), odd = _mm512_loadu_si512(second);
  low = (PairVec)_mm512_unpacklo_epi16(even, odd);
  high = (PairVec)_mm512_unpackhi_epi16(even, odd);
}

// Makes pairs of kPackKeys rows of kLanes values: x[i] gets rows 2 i and 2 i + 1. Rows past n and
// values past `width` are 0. Two arguments are references because GCC 12 then compiles this as if
// it were written in place.
VXL_INLINE void pair_rows(const Bf16* const* rows, const int64_t& n, const int64_t& offset,
                          int64_t width, Vec (&x)[kLanes]) {
  const __mmask16 keep = width >= kLanes ? 0xffff : width <= 0 ? 0 : (1u << width) - 1;
  auto values = [&](int64_t i) {
    if (i >= n) return _mm512_setzero_si512();
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(keep, rows[i] + offset));
  };
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    const __m512i high = _mm512_slli_epi32(values(2 * i + 1), 16);
    x[i] = (Vec)_mm512_or_si512(values(2 * i), high);
  }
}

// Whether a lane is not x.
VXL_INLINE bool any_other(Vec v, float x) {
  return _mm512_cmp_ps_mask((__m512)v, _mm512_set1_ps(x), _CMP_NEQ_UQ) != 0;
}

// 2^x for any x, as exp2v with fewer steps: `vreduceps` leaves x - floor(x), `vscalefps` multiplies
// by 2^floor(x), and both take -inf. Minimax polynomial on [0, 1), exact at 0; relative error
// 1.4e-7.
VXL_INLINE Vec exp2_reduced(Vec x) {
  const Vec f = (Vec)_mm512_reduce_ps((__m512)x, 1);
  Vec p = splat(1.867130213e-3f);
  p = p * f + splat(9.017030019e-3f);
  p = p * f + splat(5.579991332e-2f);
  p = p * f + splat(2.401644501e-1f);
  p = p * f + splat(6.931513118e-1f);
  p = p * f + splat(1.0f);
  return (Vec)_mm512_scalef_ps((__m512)p, (__m512)x);
}

#else

typedef bfloat16x8_t PairVec;

VXL_INLINE PairVec load_pairs(const void* p) {
  PairVec x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}
VXL_INLINE void store_pairs(Pair* to, Vec v) { std::memcpy(to, &v, sizeof(v)); }
VXL_INLINE PairVec splat_pair(Pair x) { return vreinterpretq_bf16_u32(vdupq_n_u32(x)); }

VXL_INLINE Vec add_products(Vec sum, PairVec a, PairVec b) {
  return (Vec)vbfdotq_f32((float32x4_t)sum, a, b);
}

VXL_INLINE Vec round_pairs(Vec low, Vec high) {
  const uint16x4_t l = vreinterpret_u16_bf16(vcvt_bf16_f32((float32x4_t)low));
  const uint16x4_t h = vreinterpret_u16_bf16(vcvt_bf16_f32((float32x4_t)high));
  return (Vec)vorrq_u32(vmovl_u16(l), vshll_n_u16(h, 16));
}

VXL_INLINE void store_rounded(Pair* to, Vec v) {
  const bfloat16x4_t rounded = vcvt_bf16_f32((float32x4_t)v);
  std::memcpy(to, &rounded, sizeof(rounded));
}

VXL_INLINE void make_pairs(const Bf16* first, const Bf16* second, PairVec& low, PairVec& high) {
  const uint16x8_t even = vreinterpretq_u16_bf16(load_pairs(first));
  const uint16x8_t odd = vreinterpretq_u16_bf16(load_pairs(second));
  low = vreinterpretq_bf16_u16(vzip1q_u16(even, odd));
  high = vreinterpretq_bf16_u16(vzip2q_u16(even, odd));
}

VXL_INLINE void pair_rows(const Bf16* const* rows, const int64_t& n, const int64_t& offset,
                          int64_t width, Vec (&x)[kLanes]) {
  auto values = [&](int64_t i) {
    uint16x4_t v = vdup_n_u16(0);
    if (i < n && width >= kLanes) {
      std::memcpy(&v, rows[i] + offset, sizeof(v));
    } else if (i < n && width > 0) {
      std::memcpy(&v, rows[i] + offset, width * sizeof(Bf16));
    }
    return v;
  };
#pragma GCC unroll 4
  for (int i = 0; i < kLanes; ++i) {
    const uint32x4_t high = vshll_n_u16(values(2 * i + 1), 16);
    x[i] = (Vec)vorrq_u32(vmovl_u16(values(2 * i)), high);
  }
}

VXL_INLINE bool any_other(Vec v, float x) { return vmaxvq_u32((uint32x4_t)(v != splat(x))) != 0; }

VXL_INLINE Vec exp2_reduced(Vec x) { return exp2v(x); }

#endif

}  // namespace
