// Rotates one block of rows and appends its K and V to the cache.
#pragma once

#include "../include/vxl/params.h"
#include "../include/vxl/rotary.h"
#include "plan.h"
#include "tile.h"

namespace {

constexpr int64_t kRopeRows = 16;  // rows of a task

// The largest angle that `angles` reduces in float. Up to it the error is below 1.2e-7. From 2^22
// quarter turns on, the quadrant no longer fits the float that holds it.
constexpr float kNearAngle = 1048576.0f;

inline float largest_magnitude(const float* x, int64_t n) {
  float largest = 0.0f;
  for (int64_t i = 0; i < n; ++i) largest = fmaxf(largest, fabsf(x[i]));
  return largest;
}

// cos and sin of n angles position * inv_freq. The product is rounded to float, as in the published
// code. Cody-Waite reduction by pi/2 in three parts with fused multiply-adds, then minimax
// polynomials on [-pi/4, pi/4]. `largest` is the largest magnitude in inv_freq. Where it leads
// beyond kNearAngle, the reduction is in double: a row's result depends on its position alone.
inline void angles(float position, const float* inv_freq, [[maybe_unused]] float largest,
                   int64_t n, float* cos_out, float* sin_out) {
  int64_t i = 0;
#if defined(__FMA__) || defined(__aarch64__)
  if (!(position * largest <= kNearAngle)) {  // also where an angle is NaN
    for (; i < n; ++i) vxl::cos_sin(position * inv_freq[i], cos_out + i, sin_out + i);
  }
  using Fit = vxl::SinCosFit;
  for (; i + kLanes <= n; i += kLanes) {
    const Vec x = splat(position) * load(inv_freq + i);
    const Vec magic = splat(12582912.0f);
    const Vec shifted = x * splat(0.63661977236758134f) + magic;
    const IVec quadrant = (IVec)shifted;
    const Vec turns = shifted - magic;
    Vec r = x - turns * splat(1.5707963705062866f);
    r = r - turns * splat(-4.371138828673793e-8f);
    r = r - turns * splat(-1.7151245100058819e-15f);
    const Vec z = r * r;
    Vec sp = splat(Fit::s2) * z + splat(Fit::s1);
    sp = sp * z + splat(Fit::s0);
    const Vec s = r + r * (z * sp);
    Vec cp = splat(Fit::c2) * z + splat(Fit::c1);
    cp = cp * z + splat(Fit::c0);
    const Vec c = (splat(1.0f) - splat(0.5f) * z) + (z * z) * cp;
    // Odd quadrants swap sine and cosine. The quadrant also gives the signs.
    const IVec odd = (quadrant & isplat(1)) != isplat(0);
    const IVec sin_sign = (quadrant & isplat(2)) << 30;
    const IVec cos_sign = ((quadrant + isplat(1)) & isplat(2)) << 30;
    store(sin_out + i, (Vec)((IVec)(odd ? c : s) ^ sin_sign));
    store(cos_out + i, (Vec)((IVec)(odd ? s : c) ^ cos_sign));
  }
#endif
  for (; i < n; ++i) {
    const float x = position * inv_freq[i];
    cos_out[i] = cosf(x);
    sin_out[i] = sinf(x);
  }
}

// Rotates the pairs (x[i], x[half + i]), as rotate_half does. x and out may be the same row.
template <typename T>
VXL_INLINE void rotate(const T* x, T* out, const float* c, const float* s, int64_t half) {
  int64_t i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    const Vec a = load_as_float(x + i), b = load_as_float(x + half + i);
    const Vec cv = load(c + i), sv = load(s + i);
    store_from_float(out + i, a * cv - b * sv);
    store_from_float(out + half + i, b * cv + a * sv);
  }
  for (; i < half; ++i) {
    const float a = to_float(x[i]), b = to_float(x[half + i]);
    from_float(a * c[i] - b * s[i], out + i);
    from_float(b * c[i] + a * s[i], out + half + i);
  }
}

template <typename T>
void rope_rows(const vxl::RopeParams& p, const vxl::Member& rows, float* scratch) {
  const int64_t batch = rows.sequence, chunk = rows.chunk;
  const vxl::ChunkGeometry& g = p.geometry_at(batch);
  const int64_t half = p.head_dim / 2;
  const float largest = largest_magnitude(p.inv_freq, half);
  float* c = scratch;
  float* s = scratch + half;

  auto at = [&](const vxl::RowTensor& t, int64_t row) {
    return static_cast<T*>(t.data) + batch * t.batch_stride + row * t.row_stride;
  };
  const int64_t base = p.cache.lens[batch] + chunk * g.vsts();
  for (int64_t position = rows.first; position < rows.first + rows.rows; ++position) {
    const int64_t row = p.row_of(batch, chunk, position);
    const int64_t append = g.append_index(position);
    if (append >= 0) {  // first, because K may be rotated in place
      const int64_t slot = base + append;
      const vxl::PagedCache& cache = p.cache;
      const int64_t page =
          cache.block_table[batch * cache.block_table_stride + slot / cache.page_size];
      T* k = static_cast<T*>(cache.k) + page * cache.k_strides[0] +
             slot % cache.page_size * cache.k_strides[1];
      T* v = static_cast<T*>(cache.v) + page * cache.v_strides[0] +
             slot % cache.page_size * cache.v_strides[1];
      angles(float(slot), p.inv_freq, largest, half, c, s);
      for (int64_t h = 0; h < p.kv_heads; ++h) {
        rotate(at(p.k, row) + h * p.k.head_stride, k + h * cache.k_strides[2], c, s, half);
        std::memcpy(v + h * cache.v_strides[2], at(p.v, row) + h * p.v.head_stride,
                    p.head_dim * sizeof(T));
      }
    }
    if (append != position) angles(float(base + position), p.inv_freq, largest, half, c, s);
    for (int64_t h = 0; h < p.heads; ++h)
      rotate(at(p.q, row) + h * p.q.head_stride, at(p.q_out, row) + h * p.q_out.head_stride, c,
             s, half);
    for (int64_t h = 0; h < p.kv_heads; ++h)
      rotate(at(p.k, row) + h * p.k.head_stride, at(p.k_out, row) + h * p.k_out.head_stride, c,
             s, half);
  }
}

}  // namespace
