// cos and sin of one rotary angle, for any backend.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "params.h"

namespace vxl {

// sin r = r + r z (s0 + s1 z + s2 z^2), cos r = 1 - z / 2 + z^2 (c0 + c1 z + c2 z^2), z = r^2:
// least-squares minimax fits on [-pi/4, pi/4], errors 2e-9 and 1e-10 before rounding.
struct SinCosFit {
  static constexpr float s0 = -1.66666505458e-1f, s1 = 8.331971729e-3f, s2 = -1.94947565e-4f;
  static constexpr float c0 = 4.166664671349e-2f, c1 = -1.388735971658e-3f,
                         c2 = 2.443752550776e-5f;
};

// The product rounded to float, as torch.float32 rounds it. It is never fused with an addition.
VXL_ALWAYS_INLINE float rotary_angle(int64_t position, float inv_freq) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(static_cast<float>(position), inv_freq);
#else
  return static_cast<float>(position) * inv_freq;
#endif
}

// The error is below 1.2e-7 for any |angle| below 2^31 (positions are int32). The multiple of pi/2
// is subtracted in double, where two parts of pi/2 leave an error below 1e-15. These three double
// operations are cheap beside the bytes that a row moves, even on GPUs that do one of them for
// every 64 float operations. The fast intrinsics (__sincosf) lose all digits by position 10^5.
// sinf reduces large arguments with a branch and an array.
VXL_ALWAYS_INLINE void cos_sin(float angle, float* cos_out, float* sin_out) {
  const double x = angle;
  const double magic = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer
  const double shifted = std::fma(x, 0.63661977236758134, magic);
  const double turns = shifted - magic;
  const double rest = std::fma(-turns, 6.123233995736766e-17,
                               std::fma(-turns, 1.5707963267948966, x));
  int64_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  const int quadrant = static_cast<int>(bits & 3);

  using Fit = SinCosFit;
  const float r = static_cast<float>(rest), z = r * r;
  const float s = r + r * (z * ((Fit::s2 * z + Fit::s1) * z + Fit::s0));
  const float c = (1.0f - 0.5f * z) + (z * z) * ((Fit::c2 * z + Fit::c1) * z + Fit::c0);
  // Odd quadrants swap sine and cosine. The quadrant also gives the signs.
  const bool odd = quadrant & 1;
  const float sine = odd ? c : s, cosine = odd ? s : c;
  *sin_out = quadrant & 2 ? -sine : sine;
  *cos_out = (quadrant + 1) & 2 ? -cosine : cosine;
}

}  // namespace vxl
