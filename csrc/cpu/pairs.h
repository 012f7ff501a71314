// One key block against one column group, both products on bf16 operands with float32 sums. As in
// tile.h, the lanes are query rows. Softmax, sums and outputs are float32. P is rounded to bf16
// before the second product.
//
// An operand of a product holds pairs of bf16: two neighbours of the contracted dimension in one
// 32-bit word. The left operand has rows of pairs, [rows][pairs], and the right one has panels of
// lanes, [pairs][NV lanes]. `vdpbf16ps`, BFDOT and AMX's tiles read the same layout, so `product`
// alone differs between them: pair_ops.h has one name for the first two. A row of K is a row of
// pairs as it is stored. V is transposed once for each key block.
//
// AMX rounds to nearest even, reads subnormal bf16 as 0 and flushes subnormal results to 0.
// pair_ops.h tells how the others round.
#pragma once

#include <math.h>

#include "key_stream.h"
#include "pair_ops.h"
#include "tile.h"

namespace {

constexpr int64_t kPairKeys = kKeyBlock / 2;  // pairs in a row of a transposed key block

#if defined(__AMX_BF16__)

constexpr int kPairRows = 32, kPairCols = 2;  // four tiles accumulate, two hold A, two hold B
constexpr int64_t kPairUnit = 16;             // a product's number of pairs is a multiple of this
constexpr int64_t kPairVecs = kPairCols;      // there are no narrower column groups

// Configures the thread's tiles, and restores what it found: libraries keep their own setting.
class TileSession {
 public:
  TileSession() {
    _tile_storeconfig(before_);
    alignas(64) uint8_t ours[64] = {1};  // palette 1: all tiles have 16 rows of 64 bytes
    for (int i = 0; i < 8; ++i) {
      ours[16 + 2 * i] = 64;
      ours[48 + i] = 16;
    }
    asm volatile("" : : "r"(ours) : "memory");
    _tile_loadconfig(ours);
  }
  ~TileSession() {
    if (before_[0] == 0) {
      _tile_release();
    } else {
      _tile_loadconfig(before_);
    }
  }
  TileSession(const TileSession&) = delete;
  TileSession& operator=(const TileSession&) = delete;

 private:
  alignas(64) uint8_t before_[64];
};

// c[rows][NV lanes] = a b, plus c if `add`. a: [rows][a_stride] pairs. b: [pairs][NV lanes].
template <int NV>
VXL_NOINLINE void product(const Pair* a, int64_t a_stride, int64_t rows, const Pair* b,
                          int64_t pairs, float* c, int64_t c_stride, bool add,
                          Prefetch* prefetch) {
  static_assert(NV == kPairCols, "AMX has whole column groups only");
  // The compiler does not know that the tile loads read memory.
  asm volatile("" : : : "memory");
  const int64_t a_bytes = a_stride * 4, b_bytes = NV * kLanes * 4, c_bytes = c_stride * 4;
  for (int64_t r = 0; r < rows; r += kPairRows) {
    if (prefetch != nullptr) prefetch->touch();
    float *top = c + r * c_stride, *low = top + 16 * c_stride;
    if (add) {
      _tile_loadd(0, top, c_bytes);
      _tile_loadd(1, top + 16, c_bytes);
      _tile_loadd(2, low, c_bytes);
      _tile_loadd(3, low + 16, c_bytes);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    const Pair* a_top = a + r * a_stride;
    const Pair* a_low = a_top + 16 * a_stride;
    for (int64_t k = 0; k < pairs; k += kPairUnit) {
      _tile_loadd(4, a_top + k, a_bytes);
      _tile_loadd(6, b + k * NV * kLanes, b_bytes);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, b + k * NV * kLanes + kLanes, b_bytes);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, a_low + k, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, top, c_bytes);
    _tile_stored(1, top + 16, c_bytes);
    _tile_stored(2, low, c_bytes);
    _tile_stored(3, low + 16, c_bytes);
  }
  asm volatile("" : : : "memory");
}

#else

constexpr int kPairRows = kRows, kPairCols = kCols;
constexpr int64_t kPairUnit = 1, kPairVecs = 1;
struct TileSession {
  TileSession() {}
};

// c[rows][NV lanes] = a b, plus c if `add`. a: [rows][a_stride] pairs. b: [pairs][NV lanes].
template <int NV>
VXL_NOINLINE void product(const Pair* a, int64_t a_stride, int64_t rows, const Pair* b,
                          int64_t pairs, float* c, int64_t c_stride, bool add,
                          Prefetch* prefetch) {
  for (int64_t r = 0; r < rows; r += kPairRows, a += kPairRows * a_stride) {
    Vec acc[kPairRows][NV];
#pragma GCC unroll 8
    for (int i = 0; i < kPairRows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) acc[i][j] = Vec{};
    if (prefetch != nullptr) prefetch->touch();
    for (int64_t k = 0; k < pairs; ++k) {
      PairVec bv[NV];
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) bv[j] = load_pairs(b + (k * NV + j) * kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < kPairRows; ++i) {
        const PairVec av = splat_pair(a[i * a_stride + k]);
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) acc[i][j] = add_products(acc[i][j], av, bv[j]);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kPairRows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) {
        float* to = c + (r + i) * c_stride + j * kLanes;
        store(to, add ? load(to) + acc[i][j] : acc[i][j]);
      }
  }
}

#endif

// A running maximum may grow by this factor (a power of two in base 2) before sums are scaled to
// it: P then reaches 2^kSlack. Most blocks scale nothing. It is a rule of each lane by itself, so
// the lanes of a tile change no bit of one another.
constexpr float kSlack = 8.0f;

// Turns s[keys][NV lanes] into P = 2^(scale s - m) as pairs of keys, [keys / 2][NV lanes], in
// place. m, l, alpha: as in tile.h's softmax. Returns whether any alpha is not 1.
template <int NV>
VXL_NOINLINE bool softmax_pairs(float* s, int64_t keys, float scale, const float* block_max,
                                float* m, float* l, float* alpha) {
  const Vec factor = splat(scale);
  Vec row_ref[NV], sum[NV];
  bool scaled = false;
  for (int j = 0; j < NV; ++j) {
    const Vec old_max = load(m + j * kLanes);
    const Vec top = load(block_max + j * kLanes) * factor;
    const Vec new_max = top > old_max + splat(kSlack) ? top : old_max;
    // A lane that has seen no key subtracts 0 instead: -inf - -inf would be NaN.
    row_ref[j] = new_max == splat(-INFINITY) ? Vec{} : new_max;
    const Vec a = exp2v(old_max - row_ref[j]);
    scaled |= any_other(a, 1.0f);
    store(alpha + j * kLanes, a);
    store(m + j * kLanes, new_max);
    store(l + j * kLanes, load(l + j * kLanes) * a);
    sum[j] = Vec{};
  }
#pragma GCC unroll 2
  for (int64_t key = 0; key < keys; key += 2)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      const float* x = s + (key * NV + j) * kLanes;
      const Vec low = exp2_reduced(load(x) * factor - row_ref[j]);
      const Vec high = exp2_reduced(load(x + NV * kLanes) * factor - row_ref[j]);
      sum[j] += low + high;
      store(s + (key / 2 * NV + j) * kLanes, round_pairs(low, high));
    }
  for (int j = 0; j < NV; ++j) store(l + j * kLanes, load(l + j * kLanes) + sum[j]);
  return scaled;
}

// o[dims][NV lanes] *= alpha[NV lanes].
template <int NV>
VXL_NOINLINE void scale_sums(float* o, int64_t dims, const float* alpha) {
  Vec a[NV];
  for (int j = 0; j < NV; ++j) a[j] = load(alpha + j * kLanes);
  for (int64_t d = 0; d < dims; ++d)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      float* const at = o + (d * NV + j) * kLanes;
      store(at, load(at) * a[j]);
    }
}

// Copies a row of bf16 as pairs and fills it with zeros up to `pairs`. `flip` changes all signs.
VXL_INLINE void copy_pairs(const Bf16* row, int64_t n, int64_t pairs, Pair* to,
                           uint16_t flip = 0) {
  std::memcpy(to, row, n * sizeof(Bf16));
  std::memset(reinterpret_cast<char*>(to) + n * sizeof(Bf16), 0,
              pairs * sizeof(Pair) - n * sizeof(Bf16));
  if (flip == 0) return;
  for (int64_t i = 0; i < pairs; ++i) to[i] ^= uint32_t(flip) << 16 | flip;
}

// out[dims][kPairKeys] gets kPackKeys rows of keys, transposed: pairs of keys. Rows past n and
// dimensions past head_dim become zero. head_dim may be anything; dims is a multiple of kLanes.
inline void transpose_pairs(const Bf16* const* rows, int64_t n, int64_t head_dim, int64_t dims,
                            Pair* out, Prefetch* prefetch) {
  for (int64_t d = 0; d < dims; d += kLanes) {
    if (prefetch != nullptr) prefetch->touch(1);
    Vec x[kLanes];
    pair_rows(rows, n, d, head_dim - d, x);
    transpose(x);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) store_pairs(out + (d + i) * kPairKeys, x[i]);
  }
}

// Transposes one whole key block, of K or of V.
template <const char* HeadRows::*Row>
inline void transpose_block(const HeadRows* rows, int64_t keys, int64_t head_dim, int64_t dims,
                            Pair* out, Prefetch* prefetch = nullptr) {
  for (int64_t key = 0; key < keys; key += kPackKeys) {
    const Bf16* found[kPackKeys];
    const int64_t n = min_(kPackKeys, keys - key);
    for (int64_t i = 0; i < n; ++i) {
      found[i] = reinterpret_cast<const Bf16*>(rows[key + i].*Row);
    }
    transpose_pairs(found, n, head_dim, dims, out + key / 2, prefetch);
  }
}

// The scores' scale and the sign that q takes, so that the scale is positive: a maximum of scores
// is then one of scaled scores. Scale 0 is q = 0.
struct PairScale {
  float scale;
  uint16_t flip;
  bool zero;

  explicit PairScale(float x)
      : scale(x == 0.0f ? kLog2e : (x < 0.0f ? -x : x) * kLog2e), flip(x < 0.0f ? 0x8000 : 0),
        zero(x == 0.0f) {}
};

// How prefill.h computes with bf16 operands. See FloatTile.
struct PairTile {
  static constexpr int kRows = kPairRows, kCols = kPairCols;
  static constexpr int64_t kVecUnit = kPairVecs;
  using Session = TileSession;

  static int64_t k_dims(int64_t head_dim) { return round_up(ceil_div(head_dim, 2), kPairUnit); }
  static int64_t v_dims(int64_t head_dim) {
    return round_up(head_dim, max_(kLanes, kPairRows));
  }

  PairScale scale;
  explicit PairTile(float x) : scale(x) {}

  void stage_query(const Bf16* row, int64_t head_dim, float* out) const {
    const int64_t pairs = k_dims(head_dim);
    copy_pairs(row, scale.zero ? 0 : head_dim, pairs, reinterpret_cast<Pair*>(out), scale.flip);
  }

  static void pack_block(const HeadRows* rows, int64_t keys, int64_t head_dim, float* k, float* v,
                         float* /*staged*/, Prefetch& prefetch) {
    const int64_t pairs = k_dims(head_dim);
    for (int64_t i = 0; i < round_up(keys, kRows); ++i) {
      if (prefetch.packing && i % 4 == 0) prefetch.touch(1);
      Pair* const to = reinterpret_cast<Pair*>(k) + i * pairs;
      const Bf16* from = i < keys ? reinterpret_cast<const Bf16*>(rows[i].k) : nullptr;
      if (from != nullptr) {
        copy_pairs(from, head_dim, pairs, to);
      } else {
        std::memset(to, 0, pairs * sizeof(Pair));
      }
    }
    transpose_block<&HeadRows::v>(rows, keys, head_dim, v_dims(head_dim),
                                  reinterpret_cast<Pair*>(v),
                                  prefetch.packing ? &prefetch : nullptr);
  }

  template <int NV>
  void attend_block(const float* k, const float* v, int64_t keys, int64_t k_dims, int64_t v_dims,
                    const Lanes& lanes, float* s, Prefetch& prefetch) const {
    const int64_t seen = min_(keys, lanes.limits[NV * kLanes - 1]);
    if (seen <= 0) return;
    const int64_t padded = round_up(seen, kRows);
    float block_max[NV * kLanes], alpha[NV * kLanes];
    product<NV>(reinterpret_cast<const Pair*>(k), k_dims, padded,
                reinterpret_cast<const Pair*>(lanes.q), k_dims, s, NV * kLanes, false, &prefetch);
    mask_scores<NV>(s, padded, lanes.limits, block_max);
    if (softmax_pairs<NV>(s, padded, scale.scale, block_max, lanes.m, lanes.l, alpha)) {
      scale_sums<NV>(lanes.o, v_dims, alpha);
    }
    product<NV>(reinterpret_cast<const Pair*>(v), kPairKeys, v_dims,
                reinterpret_cast<const Pair*>(s), padded / 2, lanes.o, NV * kLanes, true, nullptr);
  }
};

}  // namespace
