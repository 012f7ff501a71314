// linear.h with bf16 operands: `vdpbf16ps`, BFDOT, or AMX's tiles.
//
// With AMX a tile of W is 16 outputs x 32 products as they are stored. x is turned into panels of
// 16 rows, [pairs][16 rows], so that a row of x is a lane of the result and knows no other. One
// instruction sums 32 products of each output and row, in an order that is its own, and adds them
// to the sum so far: one order for any number of rows.
#pragma once

#include "linear.h"
#include "pairs.h"

namespace {

#if defined(__AMX_BF16__)

constexpr int64_t kTileOuts = 32;   // two tiles of W
constexpr int64_t kTilePairs = 16;  // pairs in a tile
constexpr int64_t kPanelRows = 16;  // rows of x in a tile
constexpr int64_t kTilesAhead = 16;  // tiles of W that are fetched in advance

inline int64_t tile_packed(int64_t in) {  // of a panel, in floats
  return round_up(ceil_div(in, 2), kTilePairs) * kPanelRows;
}

inline void tile_pack(const LinearParams& p, int64_t panel, float* packed) {
  const int64_t first = panel * kPanelRows, rows = min_(kPanelRows, p.rows - first);
  const uint16_t* x = static_cast<const uint16_t*>(p.x) + first * p.x_row;
  for (int64_t k = 0; k < p.in; k += 2 * kLanes) {
    const int64_t left = p.in - k;
    const __mmask32 keep = left >= 32 ? ~0u : (1u << left) - 1;
    Vec v[kLanes];
#pragma GCC unroll 16
    for (int r = 0; r < kLanes; ++r) {
      v[r] = r < rows ? (Vec)_mm512_maskz_loadu_epi16(keep, x + r * p.x_row + k) : Vec{};
    }
    transpose(v);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) store(packed + (k / 2 + i) * kPanelRows, v[i]);
  }
}

// sums[kTileOuts][NP panels x 16] of kTileOuts rows of W, which are `w_row` bytes apart, and NP
// panels.
template <int NP>
VXL_NOINLINE void tile_product(const char* w, int64_t w_row, int64_t in, const float* x,
                               int64_t panel_floats, int64_t outs, float* sums) {
  asm volatile("" : : : "memory");
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (NP > 1) {
    _tile_zero(2);
    _tile_zero(3);
  }
  const auto step = [&](const char* from, int64_t stride, int64_t k) VXL_LAMBDA_INLINE {
    const float* b = x + k / 2 * kPanelRows;
    _tile_loadd(6, b, 64);
    _tile_loadd(4, from, stride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, from + 16 * stride, stride);
    _tile_dpbf16ps(1, 5, 6);
    if constexpr (NP > 1) {
      _tile_loadd(7, b + panel_floats, 64);
      _tile_dpbf16ps(2, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  };
  const int64_t whole = outs == kTileOuts ? in / 32 * 32 : 0;
  int64_t k = 0;
  for (; k < whole; k += 32) {
    const char* at = w + 2 * k;
#pragma GCC unroll 32
    for (int o = 0; o < kTileOuts; ++o) {
      __builtin_prefetch(at + o * w_row + 64 * kTilesAhead, 0, 2);
    }
    step(at, w_row, k);
  }
  for (; k < in; k += 32) {  // a copy with zeros around what there is
    alignas(64) char edge[kTileOuts * 64] = {};
    const int64_t bytes = 2 * min_(32, in - k);
    for (int64_t o = 0; o < outs; ++o) std::memcpy(edge + 64 * o, w + o * w_row + 2 * k, bytes);
    asm volatile("" : : "r"(edge) : "memory");
    step(edge, 64, k);
  }
  constexpr int64_t stride = NP * kPanelRows * 4;
  _tile_stored(0, sums, stride);
  _tile_stored(1, sums + 16 * NP * kPanelRows, stride);
  if constexpr (NP > 1) {
    _tile_stored(2, sums + kPanelRows, stride);
    _tile_stored(3, sums + 16 * NP * kPanelRows + kPanelRows, stride);
  }
  asm volatile("" : : : "memory");
}

template <int NP>
VXL_INLINE void tile_block(const LinearParams& p, int64_t out, int64_t row, const float* x,
                           float* sums) {
  const int64_t outs = min_(kTileOuts, p.out - out);
  const char* w = static_cast<const char*>(p.weight) + 2 * out * p.weight_row;
  tile_product<NP>(w, 2 * p.weight_row, p.in, x, tile_packed(p.in), outs, sums);
  const int64_t rows = min_(NP * kPanelRows, p.rows - row);
  for (int64_t panel = 0; panel < rows; panel += kPanelRows) {
    for (int64_t o = 0; o < outs; o += kLanes) {
      Vec v[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) v[i] = load(sums + (o + i) * NP * kPanelRows + panel);
      transpose(v);
      const int64_t n = min_(kLanes, outs - o);
      for (int64_t r = 0; r < min_(kPanelRows, rows - panel); ++r) {
        float of_row[kLanes];
        store(of_row, v[r]);
        linear_store<Bf16>(p, row + panel + r, out + o, n, of_row);
      }
    }
  }
}

inline void tile_task(const LinearParams& p, int64_t task, float* scratch, const float* packed) {
  const TileSession session;
  const int64_t out = task * kTileOuts, panel = tile_packed(p.in);
  for (int64_t row = 0; row < p.rows; row += 2 * kPanelRows) {
    const float* x = packed + row / kPanelRows * panel;
    if (p.rows - row > kPanelRows) {
      tile_block<2>(p, out, row, x, scratch);
    } else {
      tile_block<1>(p, out, row, x, scratch);
    }
  }
}

constexpr LinearKernel pair_linear() {
  return {kPanelRows, kTileOuts, kTileOuts * 2 * kPanelRows, tile_packed, tile_pack, tile_task};
}

#else

struct PairDot {
  using Weight = Bf16;
  using Packed = Bf16;
  using Operand = PairVec;
  static constexpr int64_t kStep = 2 * kLanes;

  static VXL_INLINE PairVec weight(const Bf16* w) { return load_pairs(w); }
  static VXL_INLINE PairVec row(const Bf16* x) { return weight(x); }
  static VXL_INLINE Vec add(Vec sum, PairVec w, PairVec x) {
    return add_products(sum, w, x);
  }
  static void pack(const Bf16* x, int64_t n, Bf16* to) { std::memcpy(to, x, n * sizeof(Bf16)); }
};

constexpr LinearKernel pair_linear() { return linear_kernel<PairDot>(); }

#endif

}  // namespace
